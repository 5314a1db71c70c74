//! The Connect service `process.Process`: requests are checked here, and errors given their codes.

use std::str;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use connectrpc::{
    ConnectError, ErrorCode, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::stream::{self, Stream, StreamExt as _};
use http::header::AUTHORIZATION;
use nix::errno::Errno;
use roost_common::guest::KEEPALIVE_HEADER;
use roost_common::guest::process::process_event::KeepAlive;
use roost_common::guest::process::process_input::Input;
use roost_common::guest::process::process_selector::Selector;
use roost_common::guest::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest, ListResponse,
    Process as Service, ProcessEvent, ProcessInput, ProcessSelector, SendInputRequest, SendInputResponse,
    SendSignalRequest, SendSignalResponse, Signal, StartRequest, StartResponse, StreamInputRequest,
    StreamInputResponse, UpdateRequest, UpdateResponse, stream_input_request,
};
use tokio::time::Instant;

use super::input::InputError;
use super::spawn::{Plan, SpawnError, StdinSource};
use super::{AttachError, Events, Process, Processes};
use crate::guest::Guest;
use crate::hold::{Hold, Start};
use crate::users::UserError;

/// Silence after which a stream says that it lives, where the caller does not say.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// The service, and the guest that it runs processes in.
pub(crate) struct ProcessService {
    pub(crate) guest: Arc<Guest>,
    pub(crate) processes: Arc<Processes>,
}

#[allow(
    refining_impl_trait,
    reason = "the trait leaves the answers' types open; here they are the messages"
)]
impl Service for ProcessService {
    async fn list(&self, _: RequestContext, _: ServiceRequest<'_, ListRequest>) -> ServiceResult<ListResponse> {
        Response::ok(ListResponse {
            processes: self.processes.list(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<ConnectResponse>> {
        let process = self.find(request.to_owned_message().process.into_option())?;
        let events = process.attach().map_err(attach_error)?;
        let wrap = |event: ProcessEvent| ConnectResponse {
            event: event.into(),
            ..Default::default()
        };
        Response::stream_ok(event_stream(events, keepalive(&context)).map(move |event| Ok(wrap(event))))
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<StartResponse>> {
        let request = request.to_owned_message();
        if request.pty.is_set() {
            return Err(ConnectError::unimplemented("this envd has no terminals yet"));
        }
        let config = request
            .process
            .into_option()
            .ok_or_else(|| ConnectError::invalid_argument("no process given"))?;
        let user = basic_user(&context)?;
        let deadline = context.deadline().map(Instant::from_std);
        let (guest, processes) = (Arc::clone(&self.guest), Arc::clone(&self.processes));
        let start = may_start(&guest.hold, deadline).await?;
        // On a thread of its own, which finishes whatever becomes of this call: a process is either started and
        // accompanied, or not started.
        let started = tokio::task::spawn_blocking(move || {
            let settings = guest.settings();
            let mut environment = settings.environment();
            environment.extend(config.envs.iter().map(|(name, value)| (name.clone(), value.clone())));
            let plan = Plan {
                user: guest.user(user.as_deref(), &settings)?,
                program: config.cmd.clone(),
                args: config.args.clone(),
                environment,
                workdir: config.cwd.clone().or(settings.workdir),
                stdin: if request.stdin.unwrap_or(true) {
                    StdinSource::Pipe
                } else {
                    StdinSource::Empty
                },
            };
            let events = processes.start(&plan, config, request.tag, deadline);
            drop(start);
            events
        });
        let events = started
            .await
            .map_err(|_| ConnectError::internal("starting the process failed"))?;
        let events = events.map_err(spawn_error)?;
        let wrap = |event: ProcessEvent| StartResponse {
            event: event.into(),
            ..Default::default()
        };
        Response::stream_ok(event_stream(events, keepalive(&context)).map(move |event| Ok(wrap(event))))
    }

    async fn update(&self, _: RequestContext, _: ServiceRequest<'_, UpdateRequest>) -> ServiceResult<UpdateResponse> {
        Err(ConnectError::unimplemented("this envd has no terminals yet"))
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<StreamInputResponse> {
        let mut process = None;
        while let Some(message) = requests.next().await {
            match message?.to_owned_message().event {
                Some(stream_input_request::Event::Start(start)) => {
                    process = Some(self.find(start.process.into_option())?);
                }
                Some(stream_input_request::Event::Data(data)) => {
                    let process = process
                        .as_ref()
                        .ok_or_else(|| ConnectError::failed_precondition("input came before the process was named"))?;
                    write(process, data.input.into_option()).await?;
                }
                Some(stream_input_request::Event::Keepalive(_)) | None => {}
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        write(&process, request.input.into_option()).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<SendSignalResponse> {
        let request = request.to_owned_message();
        let signal = match request.signal.as_known() {
            Some(Signal::SIGNAL_SIGTERM) => nix::sys::signal::Signal::SIGTERM,
            Some(Signal::SIGNAL_SIGKILL) => nix::sys::signal::Signal::SIGKILL,
            Some(Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::invalid_argument(
                    "the signal is neither SIGTERM nor SIGKILL",
                ));
            }
        };
        let process = self.find(request.process.into_option())?;
        if !self.processes.signal(&process, signal) {
            return Err(ConnectError::not_found("the process has ended"));
        }
        Response::ok(SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        self.find(request.to_owned_message().process.into_option())?
            .stdin
            .close();
        Response::ok(CloseStdinResponse::default())
    }
}

impl ProcessService {
    fn find(&self, selector: Option<ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        let selector = selector
            .and_then(|selector| selector.selector)
            .ok_or_else(|| ConnectError::invalid_argument("no process given"))?;
        self.processes.find(&selector).ok_or_else(|| match selector {
            Selector::Pid(pid) => ConnectError::not_found(format!("there is no process {pid}")),
            Selector::Tag(tag) => ConnectError::not_found(format!("there is no process with tag {tag:?}")),
        })
    }
}

/// Waits while a snapshot is taken or the guest wakes from it.
async fn may_start(hold: &Arc<Hold>, deadline: Option<Instant>) -> Result<Start, ConnectError> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, hold.start()).await.map_err(|_| {
            ConnectError::deadline_exceeded("the guest was being snapshotted, and started nothing meanwhile")
        }),
        None => Ok(hold.start().await),
    }
}

async fn write(process: &Process, input: Option<ProcessInput>) -> Result<(), ConnectError> {
    match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => process.stdin.write(&bytes).await.map_err(|error| match error {
            InputError::Closed => ConnectError::failed_precondition("the process's standard input is closed"),
            InputError::NoReader => ConnectError::failed_precondition("the process reads no more input"),
        }),
        Some(Input::Pty(_)) => Err(ConnectError::failed_precondition("the process has no terminal")),
        None => Err(ConnectError::invalid_argument("no input given")),
    }
}

/// A process's events; after `silence` without one, a `keepalive`.
fn event_stream(events: Events, silence: Duration) -> impl Stream<Item = ProcessEvent> + Send + 'static {
    stream::unfold(events, move |mut events| async move {
        match tokio::time::timeout(silence, events.recv()).await {
            Ok(event) => event.map(|event| (event, events)),
            Err(_) => Some((
                ProcessEvent {
                    event: KeepAlive::default().into(),
                    ..Default::default()
                },
                events,
            )),
        }
    })
}

fn keepalive(context: &RequestContext) -> Duration {
    let seconds = context
        .header(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    seconds
        .filter(|seconds| (1..=3600).contains(seconds))
        .map_or(KEEPALIVE, Duration::from_secs)
}

/// The user name of HTTP Basic authentication, if there is one. Other schemes are not ours to judge.
fn basic_user(context: &RequestContext) -> Result<Option<String>, ConnectError> {
    let Some(value) = context.header(AUTHORIZATION) else {
        return Ok(None);
    };
    let malformed = || ConnectError::invalid_argument("the Authorization header is malformed");
    let (scheme, credentials) = value
        .to_str()
        .map_err(|_| malformed())?
        .split_once(' ')
        .ok_or_else(malformed)?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let decoded = BASE64_STANDARD.decode(credentials.trim()).map_err(|_| malformed())?;
    let (user, _password) = str::from_utf8(&decoded)
        .ok()
        .and_then(|text| text.split_once(':'))
        .ok_or_else(malformed)?;
    Ok((!user.is_empty()).then(|| user.to_owned()))
}

fn attach_error(error: AttachError) -> ConnectError {
    match error {
        AttachError::Ended => ConnectError::not_found("the process has ended"),
        AttachError::TooMany => ConnectError::resource_exhausted("too many clients read this process"),
    }
}

/// The codes of `Start`. Nothing is left behind by any of them.
fn spawn_error(error: SpawnError) -> ConnectError {
    let code = match &error {
        SpawnError::User(UserError::Unknown(_)) | SpawnError::Text(_) => ErrorCode::InvalidArgument,
        SpawnError::User(UserError::Read { .. }) => ErrorCode::Internal,
        SpawnError::Workdir { errno, .. } | SpawnError::Program { errno, .. } => match errno {
            Errno::ENOENT | Errno::ENOTDIR => ErrorCode::NotFound,
            Errno::EACCES | Errno::EPERM => ErrorCode::PermissionDenied,
            Errno::ENOEXEC | Errno::E2BIG | Errno::ENAMETOOLONG | Errno::ELOOP | Errno::EISDIR => {
                ErrorCode::InvalidArgument
            }
            _ => ErrorCode::Internal,
        },
        SpawnError::Identity { .. } => ErrorCode::PermissionDenied,
        SpawnError::Resources(_) | SpawnError::TooMany(_) => ErrorCode::ResourceExhausted,
    };
    ConnectError::new(code, error.to_string())
}

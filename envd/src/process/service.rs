//! The Connect service `process.Process`: requests are checked here, and errors given their codes.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    ConnectError, ErrorCode, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::stream::{self, Stream, StreamExt as _};
use nix::errno::Errno;
use roost_common::guest::process::process_event::KeepAlive;
use roost_common::guest::process::process_input::Input;
use roost_common::guest::process::process_selector::Selector;
use roost_common::guest::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest, ListResponse, PTY,
    Process as Service, ProcessEvent, ProcessInput, ProcessSelector, SendInputRequest, SendInputResponse,
    SendSignalRequest, SendSignalResponse, Signal, StartRequest, StartResponse, StreamInputRequest,
    StreamInputResponse, UpdateRequest, UpdateResponse, stream_input_request,
};
use tokio::time::Instant;

use super::input::{InputError, Way};
use super::output::{AttachError, Client};
use super::spawn::{Plan, SpawnError, Streams};
use super::terminal::Size;
use super::{Process, Processes, ResizeError};
use crate::caller::{basic_user, keepalive};
use crate::guest::Guest;
use crate::hold::{Hold, Start};
use crate::users::UserError;

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
        let request = request.to_owned_message();
        let selector = selector(request.process.into_option())?;
        let (pid, output) = self
            .processes
            .find_output(&selector)
            .ok_or_else(|| not_found(&selector))?;
        let events = output.attach(pid, request.offset).map_err(attach_error)?;
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
        let streams = match request.pty.into_option() {
            Some(terminal) => Streams::Terminal(size(terminal)?),
            None if request.stdin.unwrap_or(true) => Streams::Pipes,
            None => Streams::Outputs,
        };
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
                streams,
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

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        if let Some(terminal) = request.pty.into_option() {
            process.resize(size(terminal)?).map_err(|error| match error {
                ResizeError::NoTerminal => ConnectError::failed_precondition("the process has no terminal"),
                ResizeError::Kernel(errno) => {
                    ConnectError::internal(format!("the terminal cannot have this size: {errno}"))
                }
            })?;
        }
        Response::ok(UpdateResponse::default())
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
        let process = self.find(request.to_owned_message().process.into_option())?;
        if process.stdin.way == Way::Terminal {
            return Err(ConnectError::failed_precondition(
                "the input of a terminal cannot be closed; its end-of-file character, usually Ctrl-D, can be sent",
            ));
        }
        process.stdin.close();
        Response::ok(CloseStdinResponse::default())
    }
}

impl ProcessService {
    fn find(&self, process: Option<ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        let selector = selector(process)?;
        self.processes.find(&selector).ok_or_else(|| not_found(&selector))
    }
}

fn selector(process: Option<ProcessSelector>) -> Result<Selector, ConnectError> {
    process
        .and_then(|process| process.selector)
        .ok_or_else(|| ConnectError::invalid_argument("no process given"))
}

fn not_found(selector: &Selector) -> ConnectError {
    match selector {
        Selector::Pid(pid) => ConnectError::not_found(format!("there is no process {pid}")),
        Selector::Tag(tag) => ConnectError::not_found(format!("there is no process with tag {tag:?}")),
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
    let (way, bytes) = match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => (Way::Pipe, bytes),
        Some(Input::Pty(bytes)) => (Way::Terminal, bytes),
        None => return Err(ConnectError::invalid_argument("no input given")),
    };
    if way != process.stdin.way {
        return Err(ConnectError::failed_precondition(match process.stdin.way {
            Way::Pipe => "the process has no terminal",
            Way::Terminal => "the process reads from a terminal, and the input is for a pipe",
        }));
    }
    process.stdin.write(&bytes).await.map_err(|error| match error {
        InputError::Closed => ConnectError::failed_precondition("the process's standard input is closed"),
        InputError::NoReader => ConnectError::failed_precondition("the process reads no more input"),
    })
}

fn size(terminal: PTY) -> Result<Size, ConnectError> {
    let Some(size) = terminal.size.into_option() else {
        return Ok(Size::default());
    };
    Size::new(size.cols, size.rows).ok_or_else(|| ConnectError::invalid_argument("no terminal can have this size"))
}

/// A process's events; after `silence` without one, a `keepalive`.
fn event_stream(events: Client, silence: Duration) -> impl Stream<Item = ProcessEvent> + Send + 'static {
    stream::unfold(events, move |mut events| async move {
        match tokio::time::timeout(silence, events.next()).await {
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

fn attach_error(error: AttachError) -> ConnectError {
    match error {
        AttachError::Beyond { end } => {
            ConnectError::invalid_argument(format!("the output ends at {end}, before this offset"))
        }
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

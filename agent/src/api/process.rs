//! Processes of a sandbox over the API: what requests ask for, checked, and what guests say, in the words of both protocols.
//!
//! Holds: a stream lives no longer than the incarnation of the guest that it comes from, counts as use of the sandbox while it lives,
//! and leaves its process alone when its caller goes away.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt as _};
use roost_hostagent::hostagent::v1::*;

use super::errors::ApiError;
use super::service::Service;
use crate::guest::process::{Channel, Command, Event, Events, Input, Selector, Signal, Size, What};
use crate::guest::{Guest, GuestError};
use crate::sandbox::plan;
use crate::sandbox::task::{Handle, InUse, View};

/// Longest time that a process may be given.
const MAX_SECONDS: i32 = 24 * 60 * 60;
/// Most bytes of a tag.
const MAX_TAG: usize = 256;
/// Of a terminal whose caller names no size.
const USUAL: Size = Size { cols: 80, rows: 24 };
/// Most columns or lines: the kernel's.
const MAX_CELLS: u32 = u16::MAX as u32;

/// The events of a process, for as long as its sandbox runs.
struct Followed {
    handle: Handle,
    guest: Arc<Guest>,
    at: At,
    _in_use: InUse,
}

enum At {
    /// envd has not answered yet: the caller's stream stands meanwhile.
    Opening(Pin<Box<dyn Future<Output = Result<Events, GuestError>> + Send>>),
    Open(Events),
}

impl Followed {
    async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        let at = &mut self.at;
        let next = async {
            loop {
                match at {
                    At::Opening(opening) => {
                        let events = opening.await?;
                        *at = At::Open(events);
                    }
                    At::Open(events) => return events.next().await,
                }
            }
        };
        while_running(&self.handle, &self.guest, next).await
    }
}

/// What a guest answers, for as long as it is there to do so.
pub(super) async fn while_running<T>(
    handle: &Handle,
    guest: &Arc<Guest>,
    answer: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, ApiError> {
    tokio::select! {
        biased;
        answer = answer => answer.map_err(|error| match handle.view() {
            View::Running(..) => ApiError::Guest(error),
            // A guest that is on its way to disk has its connections closed.
            other => not_running(handle, &other),
        }),
        () = handle.stopped_running(guest) => Err(not_running(handle, &handle.view())),
    }
}

fn not_running(handle: &Handle, view: &View) -> ApiError {
    ApiError::NotRunning {
        id: handle.plan.id.clone(),
        state: view.name(),
    }
}

/// Follows a process from the moment its events are asked for.
fn follow<F>(handle: Handle, guest: Arc<Guest>, open: F) -> impl Stream<Item = Result<Event, ApiError>> + Send + 'static
where
    F: Future<Output = Result<Events, GuestError>> + Send + 'static,
{
    let followed = Followed {
        _in_use: handle.begin_use(),
        handle,
        guest,
        at: At::Opening(Box::pin(open)),
    };
    stream::unfold(Some(followed), |followed| async move {
        let mut followed = followed?;
        match followed.next().await {
            Ok(event) => Some((Ok(event?), Some(followed))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

impl Service {
    /// Starts a process and follows it.
    pub(super) fn start_process(
        &self,
        sandbox: &str,
        command: Command,
    ) -> Result<impl Stream<Item = Result<Event, ApiError>> + Send + use<>, ApiError> {
        let (handle, guest) = self.running(sandbox)?;
        let starter = guest.clone();
        Ok(follow(handle, guest, async move { starter.start(command).await }))
    }

    /// Follows a process that was started before.
    pub(super) fn attach_to(
        &self,
        sandbox: &str,
        process: Selector,
        offset: Option<u64>,
    ) -> Result<impl Stream<Item = Result<Event, ApiError>> + Send + use<>, ApiError> {
        let (handle, guest) = self.running(sandbox)?;
        let asked = guest.clone();
        Ok(follow(
            handle,
            guest,
            async move { asked.attach(&process, offset).await },
        ))
    }

    pub(super) fn stream_exec(
        &self,
        request: ExecStreamRequest,
    ) -> Result<impl Stream<Item = Result<Event, ApiError>> + Send + use<>, ApiError> {
        let command = Command {
            program: program(request.cmd)?,
            args: request.args,
            limit: limit(request.timeout_sec)?,
            ..Command::default()
        };
        self.start_process(&request.sandbox_id, command)
    }

    /// Starts a process and leaves it to itself once it runs.
    pub(super) async fn start_in_background(
        &self,
        request: StartBackgroundRequest,
    ) -> Result<StartBackgroundResponse, ApiError> {
        let tag = named(request.tag, "bg")?;
        let command = Command {
            program: program(request.cmd)?,
            args: request.args,
            env: environment(request.envs)?,
            cwd: Some(request.cwd).filter(|cwd| !cwd.is_empty()),
            tag: Some(tag.clone()),
            ..Command::default()
        };
        let mut followed = pin!(self.start_process(&request.sandbox_id, command)?);
        match followed.next().await.transpose()?.map(|event| event.what) {
            Some(What::Started { pid }) => Ok(StartBackgroundResponse {
                pid,
                tag,
                ..StartBackgroundResponse::default()
            }),
            Some(_) | None => Err(GuestError::BadStream("began without a process").into()),
        }
    }

    /// Starts a terminal, or finds the one of a tag.
    pub(super) fn attach_terminal(
        &self,
        request: PtyAttachRequest,
    ) -> Result<(String, impl Stream<Item = Result<Event, ApiError>> + Send + use<>), ApiError> {
        let (handle, guest) = self.running(&request.sandbox_id)?;
        let asked = guest.clone();
        let (tag, open): (String, Pin<Box<dyn Future<Output = _> + Send>>) = if request.cmd.is_empty() {
            let Selector::Tag(tag) = tagged(request.tag)? else {
                unreachable!("a tag names a process by its tag")
            };
            let process = Selector::Tag(tag.clone());
            let offset = request.offset;
            (tag, Box::pin(async move { asked.attach(&process, offset).await }))
        } else {
            let tag = named(request.tag, "pty")?;
            let command = Command {
                program: program(request.cmd)?,
                args: request.args,
                env: environment(request.envs)?,
                cwd: Some(request.cwd).filter(|cwd| !cwd.is_empty()),
                user: plan::user(request.user)?,
                tag: Some(tag.clone()),
                input: Input::Terminal(size(request.cols, request.rows)?),
                limit: None,
            };
            (tag, Box::pin(async move { asked.start(command).await }))
        };
        Ok((tag, follow(handle, guest, open)))
    }

    pub(super) async fn processes(&self, sandbox: &str) -> Result<Vec<ProcessEntry>, ApiError> {
        let entry = |process: crate::guest::process::Process| ProcessEntry {
            pid: process.pid,
            tag: process.tag.unwrap_or_default(),
            cmd: process.program,
            args: process.args,
            ..ProcessEntry::default()
        };
        let listed = self
            .ask(sandbox, async |guest: Arc<Guest>| guest.processes().await)
            .await?;
        Ok(listed.into_iter().map(entry).collect())
    }

    pub(super) async fn signal_process(
        &self,
        sandbox: &str,
        process: &Selector,
        signal: Signal,
    ) -> Result<(), ApiError> {
        self.ask(sandbox, async |guest: Arc<Guest>| guest.signal(process, signal).await)
            .await
    }

    pub(super) async fn resize(&self, sandbox: &str, process: &Selector, size: Size) -> Result<(), ApiError> {
        self.ask(sandbox, async |guest: Arc<Guest>| guest.resize(process, size).await)
            .await
    }

    pub(super) async fn send_input(
        &self,
        sandbox: &str,
        process: &Selector,
        channel: Channel,
        data: Vec<u8>,
    ) -> Result<(), ApiError> {
        self.ask(sandbox, async |guest: Arc<Guest>| {
            guest.send_input(process, channel, data).await
        })
        .await
    }

    pub(super) async fn end_input(&self, sandbox: &str, process: &Selector) -> Result<(), ApiError> {
        self.ask(sandbox, async |guest: Arc<Guest>| guest.end_input(process).await)
            .await
    }

    /// Asks the guest of a running sandbox for something, which counts as use of it. Ends with the guest.
    pub(super) async fn ask<T, F>(&self, sandbox: &str, call: impl FnOnce(Arc<Guest>) -> F) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, GuestError>>,
    {
        let (handle, guest) = self.running(sandbox)?;
        let _in_use = handle.begin_use();
        while_running(&handle, &guest, call(guest.clone())).await
    }
}

/// A program's name.
pub(super) fn program(cmd: String) -> Result<String, ApiError> {
    if cmd.is_empty() {
        return Err(ApiError::BadCommand("cmd is empty"));
    }
    Ok(cmd)
}

/// How long a process may run, where that is limited.
pub(super) fn limit(seconds: i32) -> Result<Option<Duration>, ApiError> {
    match seconds {
        0 => Ok(None),
        1..=MAX_SECONDS => Ok(Some(Duration::from_secs(seconds.unsigned_abs().into()))),
        _ => Err(ApiError::BadCommand(
            "timeout_sec is out of range: 1 to 86400, or 0 for none",
        )),
    }
}

/// A checked environment of a process.
pub(super) fn environment(
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<BTreeMap<String, String>, ApiError> {
    Ok(plan::environment(env.into_iter().collect())?)
}

/// A checked size of a terminal; 0 is the usual number.
pub(super) fn size(cols: u32, rows: u32) -> Result<Size, ApiError> {
    if cols > MAX_CELLS || rows > MAX_CELLS {
        return Err(ApiError::BadCommand("a terminal has at most 65535 columns and rows"));
    }
    let or = |given, usual| if given == 0 { usual } else { given };
    Ok(Size {
        cols: or(cols, USUAL.cols),
        rows: or(rows, USUAL.rows),
    })
}

/// A signal by its name; the empty one kills.
pub(super) fn signal(name: &str) -> Result<Signal, ApiError> {
    match name {
        "" | "SIGKILL" => Ok(Signal::Kill),
        "SIGTERM" => Ok(Signal::Terminate),
        _ => Err(ApiError::BadCommand("signal is neither SIGKILL nor SIGTERM")),
    }
}

/// The process of a tag.
pub(super) fn tagged(tag: String) -> Result<Selector, ApiError> {
    if tag.is_empty() {
        return Err(ApiError::BadCommand("tag is empty"));
    }
    checked(tag).map(Selector::Tag)
}

/// A checked tag, if there is one.
pub(super) fn tag(tag: String) -> Result<Option<String>, ApiError> {
    Ok(Some(checked(tag)?).filter(|tag| !tag.is_empty()))
}

/// A tag, made where none is given.
fn named(tag: String, kind: &str) -> Result<String, ApiError> {
    if tag.is_empty() {
        return Ok(format!("{kind}-{}", &crate::sandbox::build::random_hex()[..16]));
    }
    checked(tag)
}

fn checked(tag: String) -> Result<String, ApiError> {
    if tag.len() > MAX_TAG || tag.contains(char::is_control) {
        return Err(ApiError::BadCommand(
            "tag has more than 256 bytes, or control characters",
        ));
    }
    Ok(tag)
}

/// Nothing names a process.
pub(super) const NO_SELECTOR: ApiError = ApiError::BadCommand("neither pid nor tag is given");

/// Which process is to be signalled.
pub(super) fn killed(selector: Option<kill_process_request::Selector>) -> Result<Selector, ApiError> {
    match selector.ok_or(NO_SELECTOR)? {
        kill_process_request::Selector::Pid(pid) => Ok(Selector::Pid(pid)),
        kill_process_request::Selector::Tag(tag) => tagged(tag),
    }
}

/// Which process is to be followed.
pub(super) fn connected(selector: Option<connect_process_request::Selector>) -> Result<Selector, ApiError> {
    match selector.ok_or(NO_SELECTOR)? {
        connect_process_request::Selector::Pid(pid) => Ok(Selector::Pid(pid)),
        connect_process_request::Selector::Tag(tag) => tagged(tag),
    }
}

fn start(pid: u32) -> ExecStreamStart {
    ExecStreamStart {
        pid,
        ..ExecStreamStart::default()
    }
}

fn data(channel: Channel, bytes: Vec<u8>) -> ExecStreamData {
    use exec_stream_data::Output;
    let output = match channel {
        // It has one stream, and this is what this protocol has for it.
        Channel::Stdout | Channel::Terminal => Output::Stdout(bytes),
        Channel::Stderr => Output::Stderr(bytes),
    };
    ExecStreamData {
        output: Some(output),
        ..ExecStreamData::default()
    }
}

fn end(exit_code: i32, error: Option<String>) -> ExecStreamEnd {
    ExecStreamEnd {
        exit_code,
        error: error.unwrap_or_default(),
        ..ExecStreamEnd::default()
    }
}

/// An event of ExecStream.
pub(super) fn exec_event(event: Event) -> ExecStreamResponse {
    ExecStreamResponse {
        event: match event.what {
            What::Started { pid } => start(pid).into(),
            What::Output(channel, bytes) => data(channel, bytes).into(),
            What::Ended { exit_code, error } => end(exit_code, error).into(),
        },
        offset: event.offset,
        cut: event.cut,
        ..ExecStreamResponse::default()
    }
}

/// An event of ConnectProcess.
pub(super) fn connect_event(event: Event) -> ConnectProcessResponse {
    ConnectProcessResponse {
        event: match event.what {
            What::Started { pid } => start(pid).into(),
            What::Output(channel, bytes) => data(channel, bytes).into(),
            What::Ended { exit_code, error } => end(exit_code, error).into(),
        },
        offset: event.offset,
        cut: event.cut,
        ..ConnectProcessResponse::default()
    }
}

/// An event of PtyAttach, on the terminal of a tag.
pub(super) fn terminal_event(event: Event, tag: &str) -> PtyAttachResponse {
    PtyAttachResponse {
        event: match event.what {
            What::Started { pid } => PtyStarted {
                pid,
                tag: tag.to_owned(),
                ..PtyStarted::default()
            }
            .into(),
            What::Output(_, data) => PtyOutput {
                data,
                ..PtyOutput::default()
            }
            .into(),
            What::Ended { exit_code, error } => PtyExited {
                exit_code,
                error: error.unwrap_or_default(),
                ..PtyExited::default()
            }
            .into(),
        },
        offset: event.offset,
        cut: event.cut,
        ..PtyAttachResponse::default()
    }
}

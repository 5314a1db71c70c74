//! Processes of a guest: started, attached to, fed, signalled.
//!
//! Holds: a guest's stream costs one message of memory, whatever the guest sends; it may not fall silent, and not say nothing
//! without end. Only [`Guest::exec`] collects output, up to a bound.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode};
use futures::stream::{self, Stream, StreamExt as _};
use roost_common::guest::KEEPALIVE_HEADER;
use roost_common::guest::process::process_event::data_event::Output;
use roost_common::guest::process::process_event::{EndEvent, Event as Said};
use roost_common::guest::process::process_input::Input as InputKind;
use roost_common::guest::process::process_selector::Selector as Named;
use roost_common::guest::process::{
    self, CloseStdinRequest, ConnectRequest, ConnectResponse, ListRequest, PTY, ProcessConfig, ProcessEvent,
    ProcessInput, ProcessSelector, SendInputRequest, SendSignalRequest, StartRequest, StartResponse, UpdateRequest,
    pty,
};

use super::{ANSWER_LIMIT, Guest, GuestError, escaped, refused};

/// Messages without output that a stream may bring at once, and as many again every second: keepalives are far fewer.
const EMPTY_MESSAGES: u64 = 100;
/// Longest silence of a stream: envd is asked for a keepalive well within it.
const MAX_SILENCE: Duration = Duration::from_secs(60);
/// Seconds between keepalives that envd is asked for.
const KEEPALIVE_SECONDS: &str = "20";
/// Time that envd has, after a command's deadline, to report that it ended it.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);
/// How long a process may take to read what it is sent: control planes end a call after as long.
const INPUT_LIMIT: Duration = Duration::from_secs(600);
/// The exit code of a command that SIGKILL ended.
const KILLED: i32 = 128 + 9;

/// A program and how it is run.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// A path, or a name to be found in PATH.
    pub program: String,
    /// Its arguments, without its name.
    pub args: Vec<String>,
    /// Added to the sandbox's environment.
    pub env: BTreeMap<String, String>,
    /// Its directory; unset: the sandbox's, else the user's home.
    pub cwd: Option<String>,
    /// Who runs it; unset: the sandbox's default user.
    pub user: Option<String>,
    /// A name by which it can be found again.
    pub tag: Option<String>,
    /// What it reads and writes.
    pub input: Input,
    /// After how long it is killed.
    pub limit: Option<Duration>,
}

/// What a process reads, and so whether it has a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Input {
    /// End-of-file.
    #[default]
    Empty,
    /// A pipe.
    Pipe,
    /// A terminal, for its output too.
    Terminal(Size),
}

/// Of a terminal, in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Of a line.
    pub cols: u32,
    /// Lines.
    pub rows: u32,
}

/// Names a process; of several with one tag, the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By its number in the guest.
    Pid(u32),
    /// By the name it was started with.
    Tag(String),
}

/// Where a process writes, or is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Its terminal.
    Terminal,
}

/// What a process may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM.
    Terminate,
    /// SIGKILL.
    Kill,
}

/// Something that happened to a process, and where in its output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub what: What,
    /// How many bytes of output came before it, where that is known: an envd of another make does not count.
    pub offset: Option<u64>,
    /// How many bytes just before that are lost to this reader.
    pub cut: u64,
}

/// What happened to a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// It runs, or ran when this stream began.
    Started {
        /// Its number in the guest.
        pid: u32,
    },
    /// It wrote.
    Output(Channel, Vec<u8>),
    /// It has ended, and this is the last event.
    Ended {
        /// Its exit code; 128 + n when signal n ended it.
        exit_code: i32,
        /// Why it did not end well, in the guest's words, escaped and cut short.
        error: Option<String>,
    },
}

/// What a command left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Its exit code; 128 + n when signal n ended it.
    pub exit_code: i32,
}

/// A process that callers started and that has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number in the guest.
    pub pid: u32,
    /// The name it was started with.
    pub tag: Option<String>,
    /// Its program.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
}

type Messages = Pin<Box<dyn Stream<Item = Result<ProcessEvent, ConnectError>> + Send>>;

/// The events of a process, one at a time. Dropping it leaves the process alone.
pub struct Events {
    messages: Messages,
    /// Where the output stands, for an envd that does not say.
    counted: Option<u64>,
    began: Instant,
    empty: u64,
    is_over: bool,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events")
            .field("counted", &self.counted)
            .finish_non_exhaustive()
    }
}

impl Events {
    fn new(messages: Messages, counted: Option<u64>) -> Self {
        Self {
            messages,
            counted,
            began: Instant::now(),
            empty: 0,
            is_over: false,
        }
    }

    /// The next event; `None` after the last.
    ///
    /// # Errors
    /// [`GuestError::BadStream`] and those of the call. The process may run on.
    pub async fn next(&mut self) -> Result<Option<Event>, GuestError> {
        if self.is_over {
            return Ok(None);
        }
        loop {
            let message = tokio::time::timeout(MAX_SILENCE, self.messages.next())
                .await
                .map_err(|_| GuestError::BadStream("fell silent"))?
                .ok_or(GuestError::BadStream("ended before the command did"))?
                .map_err(refused)?;
            if let Some(event) = self.take(message) {
                self.is_over = matches!(event.what, What::Ended { .. });
                return Ok(Some(event));
            }
            self.empty += 1;
            if self.empty > EMPTY_MESSAGES * (1 + self.began.elapsed().as_secs()) {
                return Err(GuestError::BadStream("says nothing, and that without end"));
            }
        }
    }

    /// `None` for a message that says nothing.
    fn take(&mut self, message: ProcessEvent) -> Option<Event> {
        let offset = message.offset.or(self.counted);
        let cut = message.cut.unwrap_or_default();
        let what = match message.event? {
            Said::Start(start) => What::Started { pid: start.pid },
            Said::Data(data) => {
                let (channel, bytes) = match data.output? {
                    Output::Stdout(bytes) => (Channel::Stdout, bytes),
                    Output::Stderr(bytes) => (Channel::Stderr, bytes),
                    Output::Pty(bytes) => (Channel::Terminal, bytes),
                };
                if bytes.is_empty() {
                    return None;
                }
                self.counted = offset.map(|offset| offset.saturating_add(bytes.len() as u64));
                What::Output(channel, bytes)
            }
            Said::End(end) => ended(*end),
            Said::Keepalive(_) => return None,
        };
        Some(Event { what, offset, cut })
    }
}

fn ended(end: EndEvent) -> What {
    let exit_code = if end.exited {
        end.exit_code
    } else {
        code_of_signal(&end.status)
    };
    What::Ended {
        exit_code,
        error: end.error.as_deref().map(escaped),
    }
}

impl Guest {
    /// Starts a process. It runs on when its events are read no more.
    ///
    /// # Errors
    /// [`GuestError::Process`], [`GuestError::Unreachable`].
    pub async fn start(&self, command: Command) -> Result<Events, GuestError> {
        let mut options = streaming();
        if let Some(limit) = command.limit {
            // envd ends the process at this deadline even when we are not there to see it. As a header only: the client's own
            // timeout would end the call before envd has told how the process ended.
            options = options.with_header("connect-timeout-ms", limit.as_millis().to_string());
        }
        if let Some(user) = command.user {
            let credentials = BASE64_STANDARD.encode(format!("{user}:"));
            options = options.with_header("authorization", format!("Basic {credentials}"));
        }
        let terminal = match command.input {
            Input::Terminal(size) => Some(terminal(size)),
            Input::Empty | Input::Pipe => None,
        };
        let request = StartRequest {
            process: ProcessConfig {
                cmd: command.program,
                args: command.args,
                envs: command.env.into_iter().collect(),
                cwd: command.cwd,
                ..ProcessConfig::default()
            }
            .into(),
            pty: terminal.into(),
            tag: command.tag,
            stdin: Some(command.input == Input::Pipe),
            ..StartRequest::default()
        };
        let events = self.process.start_with_options(request, options).await;
        let messages = stream::unfold(events.map_err(refused)?, |mut events| async {
            let message = events.message::<StartResponse>().await.transpose()?;
            let event = message.map(|message| message.to_owned_message().event.into_option().unwrap_or_default());
            Some((event, events))
        });
        Ok(Events::new(messages.boxed(), Some(0)))
    }

    /// The events of a process that was started before: from an offset on, else what nobody has been given yet.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`], and those of [`Guest::start`].
    pub async fn attach(&self, process: &Selector, offset: Option<u64>) -> Result<Events, GuestError> {
        let request = ConnectRequest {
            process: selector(process).into(),
            offset,
            ..ConnectRequest::default()
        };
        let events = self.process.connect_with_options(request, streaming()).await;
        let messages = stream::unfold(events.map_err(no_process)?, |mut events| async {
            let message = events.message::<ConnectResponse>().await.transpose()?;
            let event = message.map(|message| message.to_owned_message().event.into_option().unwrap_or_default());
            Some((event, events))
        });
        Ok(Events::new(messages.boxed(), None))
    }

    /// Sends bytes to a process's terminal or standard input, and waits until it has room for all of them. A caller that does not wait
    /// does not know how many arrive.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`], [`GuestError::Process`], [`GuestError::Unreachable`].
    pub async fn send_input(&self, process: &Selector, channel: Channel, bytes: Vec<u8>) -> Result<(), GuestError> {
        let input = match channel {
            Channel::Terminal => InputKind::Pty(bytes),
            Channel::Stdout | Channel::Stderr => InputKind::Stdin(bytes),
        };
        let request = SendInputRequest {
            process: selector(process).into(),
            input: ProcessInput {
                input: Some(input),
                ..ProcessInput::default()
            }
            .into(),
            ..SendInputRequest::default()
        };
        let options = CallOptions::default().with_timeout(INPUT_LIMIT);
        let sent = self.process.send_input_with_options(request, options).await;
        sent.map(drop).map_err(no_process)
    }

    /// Ends a process's standard input.
    ///
    /// # Errors
    /// As [`Guest::send_input`].
    pub async fn end_input(&self, process: &Selector) -> Result<(), GuestError> {
        let request = CloseStdinRequest {
            process: selector(process).into(),
            ..CloseStdinRequest::default()
        };
        let ended = self.process.close_stdin_with_options(request, short()).await;
        ended.map(drop).map_err(no_process)
    }

    /// Tells a process's terminal its size.
    ///
    /// # Errors
    /// As [`Guest::send_input`].
    pub async fn resize(&self, process: &Selector, size: Size) -> Result<(), GuestError> {
        let request = UpdateRequest {
            process: selector(process).into(),
            pty: terminal(size).into(),
            ..UpdateRequest::default()
        };
        let resized = self.process.update_with_options(request, short()).await;
        resized.map(drop).map_err(no_process)
    }

    /// Signals a process and what it has started.
    ///
    /// # Errors
    /// As [`Guest::send_input`].
    pub async fn signal(&self, process: &Selector, signal: Signal) -> Result<(), GuestError> {
        let signal = match signal {
            Signal::Terminate => process::Signal::SIGNAL_SIGTERM,
            Signal::Kill => process::Signal::SIGNAL_SIGKILL,
        };
        let request = SendSignalRequest {
            process: selector(process).into(),
            signal: signal.into(),
            ..SendSignalRequest::default()
        };
        let sent = self.process.send_signal_with_options(request, short()).await;
        sent.map(drop).map_err(no_process)
    }

    /// The processes that callers started and that have not ended.
    ///
    /// # Errors
    /// [`GuestError::Process`], [`GuestError::Unreachable`].
    pub async fn processes(&self) -> Result<Vec<Process>, GuestError> {
        let listed = self.process.list_with_options(ListRequest::default(), short()).await;
        let listed = listed.map_err(refused)?.into_owned();
        let of_guest = |info: process::ProcessInfo| {
            let config = info.config.into_option().unwrap_or_default();
            Process {
                pid: info.pid,
                tag: info.tag,
                program: config.cmd,
                args: config.args,
            }
        };
        Ok(listed.processes.into_iter().map(of_guest).collect())
    }

    /// Runs a command to its end and collects what it writes, at most `max_output` bytes.
    ///
    /// # Errors
    /// [`GuestError::Process`], [`GuestError::TimedOut`], [`GuestError::TooMuchOutput`], [`GuestError::BadStream`].
    pub async fn exec(
        &self,
        program: String,
        args: Vec<String>,
        limit: Duration,
        max_output: u64,
    ) -> Result<Finished, GuestError> {
        let command = Command {
            program,
            args,
            limit: Some(limit),
            ..Command::default()
        };
        let began = Instant::now();
        let mut pid = None;
        let collected = self.collect(command, max_output, &mut pid);
        let outcome = tokio::time::timeout(limit + DEADLINE_GRACE, collected).await;
        match outcome {
            Err(_) => {
                self.kill(pid).await;
                Err(GuestError::TimedOut(limit))
            }
            Ok(Err(GuestError::Process {
                code: ErrorCode::DeadlineExceeded,
                ..
            })) => Err(GuestError::TimedOut(limit)),
            // Killed, and not before the deadline: then it was the deadline that killed it.
            Ok(Ok(finished)) if finished.exit_code == KILLED && began.elapsed() >= limit => {
                Err(GuestError::TimedOut(limit))
            }
            Ok(Err(error @ (GuestError::TooMuchOutput(_) | GuestError::BadStream(_)))) => {
                self.kill(pid).await;
                Err(error)
            }
            Ok(outcome) => outcome,
        }
    }

    async fn collect(
        &self,
        command: Command,
        max_output: u64,
        started: &mut Option<u32>,
    ) -> Result<Finished, GuestError> {
        let mut events = self.start(command).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(event) = events.next().await? {
            match event.what {
                What::Started { pid } => *started = Some(pid),
                What::Output(Channel::Stdout | Channel::Terminal, bytes) => stdout.extend_from_slice(&bytes),
                What::Output(Channel::Stderr, bytes) => stderr.extend_from_slice(&bytes),
                What::Ended { exit_code, .. } => {
                    return Ok(Finished {
                        stdout,
                        stderr,
                        exit_code,
                    });
                }
            }
            if (stdout.len() + stderr.len()) as u64 > max_output {
                return Err(GuestError::TooMuchOutput(max_output));
            }
        }
        Err(GuestError::BadStream("ended before the command did"))
    }

    /// Best effort: a guest that does not do it is no reason to fail the caller, whose answer is an error anyway.
    async fn kill(&self, pid: Option<u32>) {
        let Some(pid) = pid else { return };
        if let Err(error) = self.signal(&Selector::Pid(pid), Signal::Kill).await {
            tracing::debug!(error = %crate::errors::Chain(&error), "a command could not be killed");
        }
    }
}

/// Of a call that goes on for as long as the process does.
fn streaming() -> CallOptions {
    CallOptions::default().with_header(KEEPALIVE_HEADER, KEEPALIVE_SECONDS)
}

/// Of a call that the guest answers at once.
fn short() -> CallOptions {
    CallOptions::default().with_timeout(ANSWER_LIMIT)
}

fn selector(process: &Selector) -> ProcessSelector {
    ProcessSelector {
        selector: Some(match process {
            Selector::Pid(pid) => Named::Pid(*pid),
            Selector::Tag(tag) => Named::Tag(tag.clone()),
        }),
        ..ProcessSelector::default()
    }
}

fn terminal(size: Size) -> PTY {
    PTY {
        size: pty::Size {
            cols: size.cols,
            rows: size.rows,
            ..pty::Size::default()
        }
        .into(),
        ..PTY::default()
    }
}

/// An error of a call that names a process.
fn no_process(error: ConnectError) -> GuestError {
    match refused(error) {
        GuestError::Process {
            code: ErrorCode::NotFound,
            message,
        } => GuestError::NoProcess(message),
        other => other,
    }
}

/// The exit code by which shells report a signal, 128 + n, from envd's words for the end ("signal: killed"), which are Go's.
/// A status in other words is 255: the command did fail.
fn code_of_signal(status: &str) -> i32 {
    const WORDS: [(&str, i32); 12] = [
        ("hangup", 1),
        ("interrupt", 2),
        ("quit", 3),
        ("illegal instruction", 4),
        ("trace/breakpoint trap", 5),
        ("aborted", 6),
        ("bus error", 7),
        ("floating point exception", 8),
        ("killed", 9),
        ("segmentation fault", 11),
        ("broken pipe", 13),
        ("terminated", 15),
    ];
    let Some(words) = status.strip_prefix("signal: ") else {
        return 255;
    };
    let words = words.trim_end_matches(" (core dumped)");
    let number = words
        .strip_prefix("signal ")
        .and_then(|number| number.parse::<i32>().ok());
    let named = || WORDS.iter().find(|(word, _)| *word == words).map(|(_, number)| *number);
    match number.or_else(named) {
        Some(number @ 1..=64) => 128 + number,
        Some(_) | None => 255,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::super::Token;
    use super::*;

    /// A guest whose stream begins with the first message and goes on with the second without end.
    async fn streams(first: &'static [u8], again: &'static [u8]) -> Guest {
        begins(first, move |mut stream| async move {
            while !again.is_empty() && stream.write_all(again).await.is_ok() {}
        })
        .await
    }

    /// A guest whose stream begins with this message, and then does as it likes.
    async fn begins<F>(first: &'static [u8], then: impl FnOnce(TcpStream) -> F + Send + 'static) -> Guest
    where
        F: Future<Output = ()> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut request = [0; 4096];
            drop(stream.read(&mut request).await);
            let head = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\n\r\n";
            drop(stream.write_all(&[head, first].concat()).await);
            then(stream).await;
        });
        Guest::new(address, Token::random())
    }

    /// Envelopes, as the Connect protocol has them: flags, length, a `StartResponse`.
    const STARTED: &[u8] = &[0, 0, 0, 0, 6, 0x0a, 4, 0x0a, 2, 8, 7];
    const KEEPALIVE: &[u8] = &[0, 0, 0, 0, 4, 0x0a, 2, 0x22, 0];
    const NOTHING: &[u8] = &[0, 0, 0, 0, 0];
    const ONE_BYTE: &[u8] = &[0, 0, 0, 0, 7, 0x0a, 5, 0x12, 3, 0x0a, 1, b'x'];

    async fn all(guest: &Guest) -> Result<Vec<What>, GuestError> {
        let mut events = guest.start(Command::default()).await?;
        let mut all = Vec::new();
        while let Some(event) = events.next().await? {
            all.push(event.what);
            if all.len() == 1000 {
                return Ok(all);
            }
        }
        Ok(all)
    }

    #[tokio::test]
    async fn a_stream_that_says_nothing_without_end_is_given_up() {
        for nothing in [KEEPALIVE, NOTHING] {
            let outcome = all(&streams(STARTED, nothing).await).await;
            assert!(
                matches!(outcome, Err(GuestError::BadStream(said)) if said.contains("without end")),
                "{outcome:?}"
            );
        }
        // One that says something is as long as its process runs.
        let events = all(&streams(STARTED, ONE_BYTE).await).await.expect("events");
        assert_eq!(events[0], What::Started { pid: 7 });
        assert_eq!(events[999], What::Output(Channel::Stdout, b"x".to_vec()));
    }

    #[tokio::test]
    async fn a_stream_that_falls_silent_is_given_up() {
        let then = |stream| async move {
            std::future::pending::<()>().await;
            drop(stream);
        };
        let guest = begins(STARTED, then).await;
        let mut events = guest.start(Command::default()).await.expect("begun");
        let first = events.next().await.expect("said").expect("an event");
        assert_eq!(first.what, What::Started { pid: 7 });
        // From here on nothing happens but that time passes.
        tokio::time::pause();
        let outcome = events.next().await;
        assert!(
            matches!(outcome, Err(GuestError::BadStream("fell silent"))),
            "{outcome:?}"
        );
    }

    #[tokio::test]
    async fn a_message_that_is_garbage_or_too_large_or_breaks_off_ends_the_stream() {
        const LARGE: &[u8] = &[0, 0x7f, 0xff, 0xff, 0xff, 0x0a];
        for bad in [
            LARGE,
            &[0, 0, 0, 0, 2, 0x0a, 0xff],
            &[0xff, 0, 0, 0, 1, 0],
            &[0, 0, 0, 0, 9, 0x0a],
            b"",
            b"\0\0\0",
        ] {
            let guest = streams(bad, b"").await;
            assert!(all(&guest).await.is_err(), "{bad:?}");
        }
        // An error of the guest's own at the end of the stream: its words are shown as they may be.
        let end = b"\x02\0\0\0\x37{\"error\": {\"code\": \"not_found\", \"message\": \"a\\u0007b\"}}   ";
        let error = all(&streams(end, b"").await).await.expect_err("an error");
        assert!(
            matches!(&error, GuestError::Process { code: ErrorCode::NotFound, message } if message == "a?b"),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn output_is_counted_where_the_guest_does_not() {
        let guest = streams(STARTED, ONE_BYTE).await;
        let mut events = guest.start(Command::default()).await.expect("started");
        for offset in [0, 0, 1, 2] {
            let event = events.next().await.expect("it goes on").expect("an event");
            assert_eq!((event.offset, event.cut), (Some(offset), 0));
        }
    }

    #[test]
    fn signals_become_the_exit_codes_of_shells() {
        for (status, code) in [
            ("signal: killed", 137),
            ("signal: terminated", 143),
            ("signal: segmentation fault (core dumped)", 139),
            ("signal: signal 34", 162),
            ("signal: signal 99999", 255),
            ("exit status 3", 255),
            ("", 255),
        ] {
            assert_eq!(code_of_signal(status), code, "{status}");
        }
    }
}

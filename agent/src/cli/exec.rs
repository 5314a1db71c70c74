//! `roost exec`: a command of a sandbox, with what it writes as it comes, and its terminal where one is wanted.
//!
//! Holds: nothing that the command writes is lost or comes twice when the agent is started anew meanwhile: the stream is taken up where it
//! was. What is lost all the same is said. A terminal is given back as it was, however this ends.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use connectrpc::{ConnectError, ErrorCode};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::client::{Client, Operator};
use super::{CliError, pair, print, print_json};
use crate::sandbox::build::random_hex;
use roost_hostagent::hostagent::v1::ExecRequest;
use roost_hostagent::roost::v1::__buffa::view::ProcessEventView;
use roost_hostagent::roost::v1::{
    AttachRequest, ProcessEvent, ProcessSelector, ResizeRequest, SendInputRequest, SignalRequest, StartRequest,
    TerminalSize, process_event, process_output, process_selector,
};

/// How long an agent that has gone is waited for.
const RETURN_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two attempts to reach it.
const RETURN_PAUSE: Duration = Duration::from_millis(300);
/// Time beyond its own that a command has for its end to be told.
const DEADLINE_GRACE: Duration = Duration::from_secs(10);
/// Bytes of input in one call.
const INPUT: usize = 64 << 10;
/// Leave a terminal and let its command run: Ctrl-P, Ctrl-Q.
const LEAVE: [u8; 2] = [0x10, 0x11];
/// The exit code of a command that SIGKILL ended.
const KILLED: i32 = 128 + 9;

/// What is run, and how.
#[derive(Args)]
pub(super) struct Exec {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; Ctrl-P Ctrl-Q leaves it running
    #[arg(short, long)]
    tty: bool,
    /// Leave the command running; prints its process id
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// The user that it runs as [default: the sandbox's]
    #[arg(long)]
    user: Option<String>,
    /// The directory that it runs in [default: the user's home]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// A variable of its environment; may be given several times
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// End the command after this many seconds [default: never; 30 with --json]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i32>,
}

impl Exec {
    /// Nothing but these.
    pub(super) fn of(interactive: bool, tty: bool) -> Self {
        Self {
            interactive,
            tty,
            detach: false,
            user: None,
            cwd: None,
            env: Vec::new(),
            timeout: None,
        }
    }

    fn has_no_stream(&self) -> bool {
        !self.interactive && !self.tty && !self.detach
    }
}

/// Why a command has no exit status.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExecError {
    #[error("--tty needs a terminal as standard input")]
    NoTerminal,
    #[error("the command did not end within {0} s and was killed")]
    TimedOut(i32),
    #[error("the agent's answer broke off before the command ended")]
    Ended,
    #[error("the agent went away, and this guest's envd does not tell where to go on")]
    NoOffset,
}

/// Runs a command in a sandbox; its exit status.
pub(super) async fn exec(
    (client, operator): (&Client, &Operator),
    sandbox: String,
    exec: Exec,
    command: Vec<String>,
    json: bool,
) -> Result<ExitCode, CliError> {
    if json && exec.has_no_stream() {
        return whole(client, sandbox, exec, command).await;
    }
    if exec.tty && !io::stdin().is_terminal() {
        return Err(ExecError::NoTerminal.into());
    }
    let mut words = command.into_iter();
    let tag = format!("roost-{}", random_hex());
    let mut env = exec.env;
    if let Some(term) = std::env::var("TERM").ok().filter(|_| exec.tty) {
        env.insert(0, ("TERM".to_owned(), term));
    }
    let request = StartRequest {
        sandbox_id: sandbox.clone(),
        cmd: words.next().unwrap_or_default(),
        args: words.collect(),
        envs: env.into_iter().collect(),
        cwd: exec.cwd.unwrap_or_default(),
        user: exec.user.unwrap_or_default(),
        tag: tag.clone(),
        stdin: exec.interactive && !exec.tty,
        terminal: exec.tty.then(terminal_size).into(),
        timeout_sec: exec.timeout.unwrap_or_default(),
        ..StartRequest::default()
    };
    let process = Process {
        operator,
        sandbox,
        tag,
        is_terminal: exec.tty,
    };
    // From here on: an error of the call puts the terminal back, too.
    let raw = if exec.tty { Some(Raw::set()?) } else { None };
    let deadline = exec.timeout.filter(|seconds| *seconds > 0);
    let followed = process.follow(request, exec.detach, exec.interactive || exec.tty, deadline);
    let outcome = match deadline {
        Some(seconds) => {
            let most = Duration::from_secs(seconds.unsigned_abs().into()) + DEADLINE_GRACE;
            let late = Err(ExecError::TimedOut(seconds).into());
            tokio::time::timeout(most, followed).await.unwrap_or(late)
        }
        None => followed.await,
    };
    drop(raw);
    match outcome? {
        Outcome::Ended(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))),
        Outcome::Running(pid) => {
            print(format_args!("{pid}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Left => {
            eprintln!("roost: left; the command runs on");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The answer with all output at once.
async fn whole(client: &Client, sandbox: String, exec: Exec, command: Vec<String>) -> Result<ExitCode, CliError> {
    let mut words = command.into_iter();
    let request = ExecRequest {
        sandbox_id: sandbox,
        cmd: words.next().unwrap_or_default(),
        args: words.collect(),
        timeout_sec: exec.timeout.unwrap_or_default(),
        ..ExecRequest::default()
    };
    let answer = client.exec(request).await?.into_owned();
    print_json(&answer)?;
    // An exit status is a byte; what does not fit one is a failure of some kind.
    Ok(ExitCode::from(u8::try_from(answer.exit_code).unwrap_or(u8::MAX)))
}

/// How it ended for the person at this end.
enum Outcome {
    Ended(i32),
    Running(u32),
    Left,
}

type Events = connectrpc::client::ServerStream<hyper::body::Incoming, ProcessEventView<'static>>;

/// A command that was started, by a name that nobody else uses.
struct Process<'a> {
    operator: &'a Operator,
    sandbox: String,
    tag: String,
    is_terminal: bool,
}

impl Process<'_> {
    async fn follow(
        &self,
        request: StartRequest,
        is_detached: bool,
        has_input: bool,
        deadline: Option<i32>,
    ) -> Result<Outcome, CliError> {
        let began = Instant::now();
        let (events, mut arriving) = mpsc::channel(4);
        let (has_started, started) = oneshot::channel();
        let mut has_started = Some(has_started);
        let read = self.read(request, events);
        // Beside the reading, or a command that waits for its output to be read would not take its input.
        let typed = async {
            match (has_input, started.await) {
                (true, Ok(())) => self.pass_input().await,
                (false, _) | (_, Err(_)) => Ok(false),
            }
        };
        tokio::pin!(read, typed);
        let mut window = signal(SignalKind::window_change())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (mut is_typing, mut output) = (true, Output::default());
        loop {
            tokio::select! {
                biased;
                Some(event) = arriving.recv() => match event {
                    process_event::Event::Started(started) => {
                        if is_detached {
                            return Ok(Outcome::Running(started.pid));
                        }
                        if let Some(has_started) = has_started.take() {
                            // It waits for this, or has nothing to do.
                            has_started.send(()).ok();
                        }
                    }
                    process_event::Event::Output(bytes) => output.write(*bytes),
                    process_event::Event::Ended(ended) => {
                        output.end();
                        let was_late = deadline.filter(|seconds| {
                            ended.exit_code == KILLED && began.elapsed().as_secs() >= u64::from(seconds.unsigned_abs())
                        });
                        return match was_late {
                            Some(seconds) => Err(ExecError::TimedOut(seconds).into()),
                            None => Ok(Outcome::Ended(ended.exit_code)),
                        };
                    }
                },
                // With all its events taken.
                outcome = &mut read => return outcome.and(Err(ExecError::Ended.into())),
                leaves = &mut typed, if is_typing => {
                    is_typing = false;
                    if leaves? {
                        return Ok(Outcome::Left);
                    }
                }
                Some(()) = window.recv(), if self.is_terminal => self.resize().await,
                Some(()) = interrupt.recv() => self.interrupt().await,
            }
        }
    }

    /// Sends what is typed until its end; whether it ended with the word to leave.
    async fn pass_input(&self) -> Result<bool, CliError> {
        let mut input = input();
        let mut keys = Keys::default();
        while let Some(bytes) = input.recv().await {
            let (bytes, leaves) = keys.take(bytes, self.is_terminal);
            self.send(bytes, false).await?;
            if leaves {
                return Ok(true);
            }
        }
        if !self.is_terminal {
            self.send(Vec::new(), true).await?;
        }
        Ok(false)
    }

    /// Reads the events of the command, over as many streams as it takes.
    async fn read(&self, request: StartRequest, events: mpsc::Sender<process_event::Event>) -> Result<(), CliError> {
        let mut stream = self.operator.start(request).await?;
        let mut place = Place::default();
        let mut lost: Option<(Instant, ConnectError)> = None;
        loop {
            let failure = match stream.message::<ProcessEvent>().await {
                Ok(Some(message)) => {
                    lost = None;
                    if let Some(event) = place.take(message.to_owned_message())
                        && events.send(event).await.is_err()
                    {
                        return Ok(());
                    }
                    continue;
                }
                Ok(None) => return Ok(()),
                Err(failure) => failure,
            };
            // What was never begun is the caller's to begin again, or not.
            if !place.has_started || !is_passing(&failure) {
                return Err(failure.into());
            }
            let (since, failure) = lost.get_or_insert((Instant::now(), failure));
            stream = self.come_back(&place, *since, failure).await?;
        }
    }

    /// Attaches to the command where its output was left, once the agent is there again.
    async fn come_back(&self, place: &Place, since: Instant, failure: &ConnectError) -> Result<Events, CliError> {
        let offset = place.offset.ok_or(ExecError::NoOffset)?;
        loop {
            tokio::time::sleep(RETURN_PAUSE).await;
            let request = AttachRequest {
                sandbox_id: self.sandbox.clone(),
                process: self.selector().into(),
                offset: Some(offset),
                ..AttachRequest::default()
            };
            match self.operator.attach(request).await {
                _ if since.elapsed() > RETURN_LIMIT => return Err(failure.clone().into()),
                Ok(stream) => return Ok(stream),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn selector(&self) -> ProcessSelector {
        ProcessSelector {
            selector: Some(process_selector::Selector::Tag(self.tag.clone())),
            ..ProcessSelector::default()
        }
    }

    async fn send(&self, data: Vec<u8>, end: bool) -> Result<(), CliError> {
        if data.is_empty() && !end {
            return Ok(());
        }
        let request = SendInputRequest {
            sandbox_id: self.sandbox.clone(),
            process: self.selector().into(),
            data,
            terminal: self.is_terminal,
            end,
            ..SendInputRequest::default()
        };
        match self.operator.send_input(request).await {
            // A command that has ended, or reads no more, says so by its end.
            Err(error) if matches!(error.code, ErrorCode::NotFound | ErrorCode::Internal) => Ok(()),
            sent => sent.map(drop).map_err(CliError::from),
        }
    }

    /// Best effort: a terminal of the wrong size is no reason to end its command.
    async fn resize(&self) {
        let request = ResizeRequest {
            sandbox_id: self.sandbox.clone(),
            process: self.selector().into(),
            size: terminal_size().into(),
            ..ResizeRequest::default()
        };
        drop(self.operator.resize(request).await);
    }

    /// Without a terminal, Ctrl-C is for the command: with one, it is a key like any other.
    async fn interrupt(&self) {
        let request = SignalRequest {
            sandbox_id: self.sandbox.clone(),
            process: self.selector().into(),
            signal: "SIGTERM".to_owned(),
            ..SignalRequest::default()
        };
        if let Err(error) = self.operator.signal(request).await {
            eprintln!("roost: the command was not signalled: {}", super::words(&error));
        }
    }
}

/// How far the output of a command has come.
#[derive(Default)]
struct Place {
    has_started: bool,
    offset: Option<u64>,
}

impl Place {
    fn take(&mut self, message: ProcessEvent) -> Option<process_event::Event> {
        if message.cut > 0 {
            eprintln!("roost: {} bytes of output were lost", message.cut);
        }
        let event = message.event?;
        let length = match &event {
            process_event::Event::Output(output) => length(output.output.as_ref()?),
            process_event::Event::Started(_) | process_event::Event::Ended(_) => 0,
        };
        self.has_started = true;
        self.offset = message.offset.map(|offset| offset.saturating_add(length));
        Some(event)
    }
}

fn length(output: &process_output::Output) -> u64 {
    let (process_output::Output::Stdout(bytes)
    | process_output::Output::Stderr(bytes)
    | process_output::Output::Terminal(bytes)) = output;
    bytes.len() as u64
}

/// Whether a failure is one of the way there, or of an agent that starts: then what was asked for can still be had.
fn is_passing(error: &ConnectError) -> bool {
    error.code == ErrorCode::Unavailable || error.source_arc().is_some() || error.code == ErrorCode::Internal
}

/// Where output goes. A reader that has gone (as `head` does) does not change how the command ended.
#[derive(Default)]
struct Output {
    failure: Option<io::Error>,
}

impl Output {
    fn write(&mut self, output: roost_hostagent::roost::v1::ProcessOutput) {
        use process_output::Output as Kind;
        if self.failure.is_some() {
            return;
        }
        let written = match output.output {
            Some(Kind::Stdout(bytes) | Kind::Terminal(bytes)) => {
                io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush())
            }
            Some(Kind::Stderr(bytes)) => io::stderr().write_all(&bytes),
            None => Ok(()),
        };
        self.failure = written.err();
    }

    fn end(&self) {
        if let Some(error) = &self.failure {
            eprintln!("roost: output was cut short: {error}");
        }
    }
}

/// Finds the keys that leave a terminal.
#[derive(Default)]
struct Keys {
    has_first: bool,
}

impl Keys {
    /// What is to be sent of what was typed, and whether that was the word to leave.
    fn take(&mut self, bytes: Vec<u8>, is_terminal: bool) -> (Vec<u8>, bool) {
        if !is_terminal {
            return (bytes, false);
        }
        let mut sent = Vec::with_capacity(bytes.len() + 1);
        for byte in bytes {
            match (self.has_first, byte) {
                (true, second) if second == LEAVE[1] => return (sent, true),
                (was_first, byte) => {
                    if was_first {
                        sent.push(LEAVE[0]);
                    }
                    self.has_first = byte == LEAVE[0];
                    if !self.has_first {
                        sent.push(byte);
                    }
                }
            }
        }
        (sent, false)
    }
}

/// Reads standard input on a thread of its own, which the end of the program ends: a read of a terminal cannot be given up.
fn input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; INPUT];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => {
                    if sender.blocking_send(buffer[..read].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

/// A terminal that passes every key on, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn set() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSADRAIN, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is nothing else to do for it.
        termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.0).ok();
    }
}

fn terminal_size() -> TerminalSize {
    let size = rustix::termios::tcgetwinsize(io::stdin()).ok();
    TerminalSize {
        cols: size.map_or(0, |size| size.ws_col.into()),
        rows: size.map_or(0, |size| size.ws_row.into()),
        ..TerminalSize::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_leave_and_one_alone_is_sent_with_the_next() {
        let typed = |pieces: &[&[u8]]| {
            let mut keys = Keys::default();
            let mut all = Vec::new();
            for piece in pieces {
                let (sent, leaves) = keys.take(piece.to_vec(), true);
                all.extend(sent);
                if leaves {
                    return (all, true);
                }
            }
            (all, false)
        };
        assert_eq!(typed(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(typed(&[b"a\x10\x11b"]), (b"a".to_vec(), true));
        assert_eq!(typed(&[b"a\x10", b"\x11"]), (b"a".to_vec(), true));
        assert_eq!(typed(&[b"\x10", b"x\x11"]), (b"\x10x\x11".to_vec(), false));
        assert_eq!(typed(&[b"\x10\x10", b"\x11"]), (b"\x10".to_vec(), true));
        let mut keys = Keys::default();
        assert_eq!(keys.take(b"\x10\x11".to_vec(), false), (b"\x10\x11".to_vec(), false));
    }
}

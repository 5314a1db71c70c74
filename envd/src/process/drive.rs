//! One process from its start to its end: output taken from its pipes or its terminal, the deadline, the exit.
//!
//! ```text
//! stdout pipe --copy--> Output --> a client's stream
//! stderr pipe --copy----^          `end` goes last, after all output
//! reaper or deadline ----> exited
//! ```
//!
//! Holds: when a client that is attached reads slowly the copy waits, then the pipe fills and the process waits. Nobody's
//! leaving stops or ends a process.

use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use nix::sys::signal::Signal;
use roost_common::guest::process::process_event::EndEvent;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::Process;
use super::descriptor::Descriptor;
use super::output::{Kind, Output};
use super::reaper::Reaper;

/// How long output is waited for that others write after the process has ended, such as the last words of `> >(tee
/// log)`. A background program that keeps the pipe open costs its caller this much, no more.
const GRACE: Duration = Duration::from_millis(250);

/// Taken from a pipe after [`GRACE`]: a pipe's capacity, so all that the process itself wrote is among it.
const LEFT_IN_PIPE: usize = 64 * 1024;

/// Our ends of a process's output, and how it ends.
pub(super) struct Ends {
    pub(super) outputs: Vec<(Kind, Arc<Descriptor>)>,
    pub(super) exit: oneshot::Receiver<ExitStatus>,
    /// When the process is killed, if it still runs.
    pub(super) deadline: Option<Instant>,
}

/// Accompanies a process to its end, which it publishes.
pub(super) async fn drive(process: &Process, reaper: &Reaper, ends: Ends, on_exit: impl FnOnce()) {
    let (exited, has_exited) = watch::channel(None);
    let watch_exit = async {
        let (status, deadline) = wait(process, reaper, ends.exit, ends.deadline).await;
        on_exit();
        exited.send_replace(Some(Instant::now()));
        (status, deadline)
    };
    let copies = ends.outputs.into_iter().map(|(kind, end)| {
        let exited = has_exited.clone();
        async move { copy(&process.output, &end, kind, exited).await.then_some((kind, end)) }
    });
    let (still_open, (status, deadline)) = tokio::join!(join_all(copies), watch_exit);
    process.output.end(end_event(status, deadline));
    for (kind, end) in still_open.into_iter().flatten() {
        match kind {
            // Others still write here. Closing the pipe would end them by SIGPIPE, not reading it would stop them.
            Kind::Stdout | Kind::Stderr => drop(tokio::spawn(discard(end))),
            // Others are still in the terminal, which was the process's: it hangs up.
            Kind::Terminal => drop(end),
        }
    }
}

/// Whether the deadline ended the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deadline {
    Passed,
    Kept,
}

/// `None` as status when nobody knows it, which the reaper rules out.
async fn wait(
    process: &Process,
    reaper: &Reaper,
    mut exit: oneshot::Receiver<ExitStatus>,
    deadline: Option<Instant>,
) -> (Option<ExitStatus>, Deadline) {
    let passed = async {
        match deadline {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        status = &mut exit => return (status.ok(), Deadline::Kept),
        () = passed => {}
    }
    let killed = reaper.signal_group(process.pid, Signal::SIGKILL);
    (exit.await.ok(), if killed { Deadline::Passed } else { Deadline::Kept })
}

/// Takes what the process writes. Whether others can still write when it has ended.
async fn copy(output: &Output, end: &Descriptor, kind: Kind, mut exited: watch::Receiver<Option<Instant>>) -> bool {
    let mut buffer = vec![0; kind.chunk()];
    let grace = async {
        let at = exited.wait_for(Option::is_some).await.ok().and_then(|at| *at);
        sleep_until(at.unwrap_or_else(Instant::now) + GRACE).await;
    };
    tokio::pin!(grace);
    loop {
        tokio::select! {
            // A background program that always has more to say must not hold the end back.
            biased;
            () = &mut grace => break,
            read = end.read(&mut buffer) => match read {
                // A terminal that nobody is in any more is at its end by EIO.
                Ok(0) | Err(_) => return false,
                Ok(read) => output.append(kind, &buffer[..read]).await,
            },
        }
    }
    // A slow client may have held us up: what the process wrote can still be in the pipe.
    let mut taken = 0;
    while taken < LEFT_IN_PIPE {
        match end.try_read(&mut buffer) {
            Ok(read) if read > 0 => {
                output.append(kind, &buffer[..read]).await;
                taken += read;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Ok(_) | Err(_) => return false,
        }
    }
    true
}

async fn discard(end: Arc<Descriptor>) {
    let mut buffer = [0; 4096];
    // An error ends the pipe as end-of-file does.
    while end.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}

/// The words are those of other guest agents, which clients show to people.
fn end_event(status: Option<ExitStatus>, deadline: Deadline) -> EndEvent {
    let Some(status) = status else {
        let error = Some("the exit status is not known".to_owned());
        return EndEvent {
            exit_code: -1,
            error,
            ..Default::default()
        };
    };
    let (exit_code, exited, text) = match (status.code(), status.signal()) {
        (Some(code), _) => (code, true, format!("exit status {code}")),
        (None, signal) => (-1, false, signal_text(signal.unwrap_or_default(), status.core_dumped())),
    };
    let error = match deadline {
        Deadline::Passed => Some(format!("killed at the deadline of its call: {text}")),
        Deadline::Kept if status.success() => None,
        Deadline::Kept => Some(text.clone()),
    };
    EndEvent {
        exit_code,
        exited,
        status: text,
        error,
        ..Default::default()
    }
}

fn signal_text(signal: i32, core_dumped: bool) -> String {
    let name = match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        _ => return format!("signal: signal {signal}"),
    };
    format!("signal: {name}{}", if core_dumped { " (core dumped)" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_says_whether_and_how_the_process_exited() {
        let ended = |raw, deadline| {
            let end = end_event(Some(ExitStatus::from_raw(raw)), deadline);
            (end.exit_code, end.exited, end.status, end.error)
        };
        assert_eq!(ended(0, Deadline::Kept), (0, true, "exit status 0".to_owned(), None));
        let three = "exit status 3".to_owned();
        assert_eq!(ended(3 << 8, Deadline::Kept), (3, true, three.clone(), Some(three)));
        let killed = "signal: killed".to_owned();
        assert_eq!(
            ended(9, Deadline::Kept),
            (-1, false, killed.clone(), Some(killed.clone()))
        );
        let late = Some("killed at the deadline of its call: signal: killed".to_owned());
        assert_eq!(ended(9, Deadline::Passed), (-1, false, killed, late));
        assert_eq!(
            ended(11 | 0x80, Deadline::Kept).2,
            "signal: segmentation fault (core dumped)"
        );
        assert_eq!(ended(34, Deadline::Kept).2, "signal: signal 34");
    }
}

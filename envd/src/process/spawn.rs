//! From what a caller asked for to a running child: user, directory, environment, pipes.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, getegid, geteuid, pipe2};
use tokio::sync::oneshot;

use super::child::{ChildSetup, Credentials, Step};
use super::reaper::Reaper;
use super::terminal::{Size, Terminal};
use crate::sys;
use crate::users::{User, UserError};

/// What to start, as whom and where.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) user: User,
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    /// The default environment with the caller's over it; HOME and the like come from the user unless it says
    /// otherwise.
    pub(crate) environment: BTreeMap<String, String>,
    /// What the caller or the sandbox's default named; the user's home when neither did.
    pub(crate) workdir: Option<String>,
    pub(crate) streams: Streams,
}

/// Where a process reads from and writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    Pipes,
    /// Pipes for output; the input is at its end.
    Outputs,
    Terminal(Size),
}

/// The kind of terminal, unless the caller names another: what the terminals of browsers and of people are like.
const TERM: &str = "xterm-256color";

/// A child and our ends of its streams.
pub(super) struct Spawned {
    pub(super) pid: u32,
    pub(super) ends: SpawnedEnds,
    pub(super) exit: oneshot::Receiver<ExitStatus>,
}

pub(super) enum SpawnedEnds {
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    Terminal(OwnedFd),
}

/// Why nothing was started. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error("{0} holds a NUL byte, is empty, or is not a name")]
    Text(&'static str),
    #[error("cannot enter directory {path:?}: {errno}")]
    Workdir { path: String, errno: Errno },
    #[error("cannot run {program:?}: {errno}")]
    Program { program: String, errno: Errno },
    #[error("cannot become user {user:?}: {errno}")]
    Identity { user: String, errno: Errno },
    #[error("cannot make a process: {0}")]
    Resources(Errno),
    #[error("{0} processes are running already")]
    TooMany(usize),
}

/// Starts `plan`'s program. Blocks for as long as fork and exec take.
pub(super) fn spawn(reaper: &Reaper, plan: &Plan) -> Result<Spawned, SpawnError> {
    check_text(plan)?;
    let workdir = workdir(plan);
    let (report, report_write) = pipe2(OFlag::O_CLOEXEC).map_err(SpawnError::Resources)?;
    let mut command = Command::new(&plan.program);
    command.args(&plan.args).env_clear().envs(environment(plan));
    let terminal = match plan.streams {
        Streams::Pipes | Streams::Outputs => {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.stdin(if plan.streams == Streams::Pipes {
                Stdio::piped()
            } else {
                Stdio::null()
            });
            None
        }
        Streams::Terminal(size) => {
            let terminal = Terminal::open(size, Uid::from_raw(plan.user.uid)).map_err(SpawnError::Resources)?;
            let copy = || -> Result<OwnedFd, SpawnError> {
                let copied = terminal.programs.try_clone();
                copied.map_err(|error| SpawnError::Resources(errno(&error)))
            };
            command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
            Some(terminal)
        }
    };
    let (ours, programs) = terminal.map_or((None, None), |Terminal { ours, programs }| (Some(ours), Some(programs)));
    let setup = ChildSetup {
        credentials: credentials(&plan.user),
        workdir: CString::new(workdir.as_os_str().as_encoded_bytes()).map_err(|_| SpawnError::Text("cwd"))?,
        terminal: programs,
        report: report_write,
    };
    sys::set_child_setup(&mut command, setup);
    let started = reaper.start(&mut command);
    // Our copies of the report pipe's writing end and of the program's end of the terminal, so that reading them ends.
    drop(command);
    let (mut child, exit) = started.map_err(|error| failure(plan, &workdir, report, &error))?;
    Ok(Spawned {
        pid: child.id(),
        ends: match ours {
            Some(ours) => SpawnedEnds::Terminal(ours),
            None => SpawnedEnds::Pipes {
                stdin: child.stdin.take().map(OwnedFd::from),
                stdout: child.stdout.take().expect("stdout was asked to be a pipe").into(),
                stderr: child.stderr.take().expect("stderr was asked to be a pipe").into(),
            },
        },
        exit,
    })
}

fn check_text(plan: &Plan) -> Result<(), SpawnError> {
    let has_nul = |text: &String| text.contains('\0');
    if plan.program.is_empty() || has_nul(&plan.program) {
        return Err(SpawnError::Text("the command"));
    }
    if plan.args.iter().any(has_nul) {
        return Err(SpawnError::Text("an argument"));
    }
    if plan.environment.iter().any(|(name, value)| !is_variable(name, value)) {
        return Err(SpawnError::Text("a variable"));
    }
    Ok(())
}

/// Whether the two can stand in an environment.
pub(crate) fn is_variable(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

/// Relative paths and `~` start at the user's home. A home that does not exist is no reason to refuse: then it is `/`.
fn workdir(plan: &Plan) -> PathBuf {
    let home = Path::new(&plan.user.home);
    match plan.workdir.as_deref() {
        None | Some("") if home.is_dir() => home.to_owned(),
        None | Some("") => PathBuf::from("/"),
        Some("~") => home.to_owned(),
        Some(path) => home.join(path.strip_prefix("~/").unwrap_or(path)),
    }
}

fn environment(plan: &Plan) -> BTreeMap<&str, &str> {
    let user = &plan.user;
    let mut environment = BTreeMap::from([
        ("HOME", user.home.as_str()),
        ("LOGNAME", user.name.as_str()),
        ("PATH", user.login_path()),
        ("SHELL", user.shell.as_str()),
        ("USER", user.name.as_str()),
    ]);
    if matches!(plan.streams, Streams::Terminal(_)) {
        environment.insert("TERM", TERM);
    }
    environment.extend(
        plan.environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str())),
    );
    environment
}

/// `None` when the child may stay what envd is: the same user, and no privilege that could be meant to go.
pub(crate) fn credentials(user: &User) -> Option<Credentials> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if !geteuid().is_root() && uid == geteuid() && gid == getegid() {
        return None;
    }
    Some(Credentials {
        uid,
        gid,
        groups: user.groups.iter().copied().map(Gid::from_raw).collect(),
    })
}

fn failure(plan: &Plan, workdir: &Path, report: OwnedFd, error: &io::Error) -> SpawnError {
    let errno = errno(error);
    let mut step = [0];
    // No byte: the steps before exec went well, or there was no child at all.
    let reported = File::from(report).read(&mut step).unwrap_or_default() == 1;
    match (reported.then(|| Step::from_byte(step[0])).flatten(), errno) {
        (Some(Step::Workdir), errno) => SpawnError::Workdir {
            path: workdir.display().to_string(),
            errno,
        },
        (Some(Step::Identity), errno) => SpawnError::Identity {
            user: plan.user.name.clone(),
            errno,
        },
        (Some(Step::Session | Step::Descriptors), errno) => SpawnError::Resources(errno),
        (None, Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE) => SpawnError::Resources(errno),
        (None, errno) => SpawnError::Program {
            program: plan.program.clone(),
            errno,
        },
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

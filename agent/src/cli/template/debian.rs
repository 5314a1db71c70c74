//! A minimal Debian, by mmdebstrap.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::archive::Archive;
use super::tree::{Meaning, Tree, TreeError};

/// How long is waited for output until it is seen whether somebody has had enough, in milliseconds.
const LOOK: u8 = 200;
/// How much of what mmdebstrap has said is told where it failed: lines, and bytes that are looked at for them.
const LINES: usize = 12;
const BYTES: u64 = 8 << 10;

/// Why there is no Debian.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebianError {
    /// No program.
    #[error("mmdebstrap is not installed; it is in Debian's package of that name")]
    NoMmdebstrap,
    /// It cannot be run, or be heard.
    #[error("mmdebstrap cannot be run")]
    Run(#[source] io::Error),
    /// It failed.
    #[error("mmdebstrap failed ({status}); at last it said:\n{said}")]
    Mmdebstrap {
        /// How it ended.
        status: ExitStatus,
        /// The last lines of what it said.
        said: String,
    },
    /// A file that no image can hold, or somebody has had enough.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// What a Debian is made of.
pub(super) struct Wish<'a> {
    pub(super) release: &'a str,
    /// Packages besides those that every one has, as mmdebstrap takes them.
    pub(super) include: Option<&'a str>,
    /// Where they come from, as mmdebstrap takes it; Debian's own archive where there are none.
    pub(super) mirrors: &'a [String],
}

/// Puts the files of a Debian into the tree. `work` is a directory for what mmdebstrap says.
pub(super) fn add(tree: &mut Tree, wish: &Wish<'_>, work: &Path, stop: &AtomicBool) -> Result<(), DebianError> {
    let mut said = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(work.join("mmdebstrap"))
        .map_err(DebianError::Run)?;
    let mut command = Command::new("mmdebstrap");
    // Not quiet: then it would keep apt's reasons to itself.
    command.args(["--variant=minbase", "--format=tar"]);
    if let Some(packages) = wish.include {
        command.arg(format!("--include={packages}"));
    }
    command.args(["--", wish.release, "-"]).args(wish.mirrors);
    let child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(said.try_clone().map_err(DebianError::Run)?)
        .spawn();
    let mut group = Group(child.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => DebianError::NoMmdebstrap,
        _ => DebianError::Run(error),
    })?);
    let mut out = group.0.stdout.take().expect("it was asked for");
    // Nothing comes before all packages are installed, which takes minutes.
    while !is_readable(&out).map_err(DebianError::Run)? {
        if stop.load(Ordering::Relaxed) {
            return Err(TreeError::Stopped.into());
        }
    }
    let added = tree.add(&mut Archive::new(&mut out), Meaning::Plain, stop);
    if let Err(TreeError::Stopped) = added {
        return Err(TreeError::Stopped.into());
    }
    // A program whose output is closed before its end fails of that alone.
    io::copy(&mut out, &mut io::sink()).map_err(DebianError::Run)?;
    // What it says of itself counts for more than what came of it.
    let status = group.0.wait().map_err(DebianError::Run)?;
    if !status.success() {
        let said = last_lines(&mut said).map_err(DebianError::Run)?;
        return Err(DebianError::Mmdebstrap { status, said });
    }
    Ok(added?)
}

/// The last lines of a file.
fn last_lines(file: &mut File) -> io::Result<String> {
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(LINES)..].join("\n"))
}

/// Whether there is something to read, or the end, within a moment.
fn is_readable(stream: &ChildStdout) -> io::Result<bool> {
    let mut wanted = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    match poll(&mut wanted, LOOK) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A program in a process group of its own, which is ended with this value: all of it, because the program itself waits for what it has started.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let id = i32::try_from(self.0.id()).expect("a process id is one of the kernel's");
            // A signal that it can hear: it removes what it has made. It may have ended meanwhile.
            killpg(Pid::from_raw(id), Signal::SIGTERM).ok();
            drop(self.0.wait());
        }
    }
}

//! A VMM that runs, what it runs on, and what can be asked about it. The shim copies what it writes and parses none of it; in its events
//! it looks for one string, that of a guest's reset.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::NixPath;
use nix::dir::Dir;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::getuid;
use roost_common::shim::{
    EXIT_FILE, Exit, LaunchStep, Lendable, MAX_TAIL, MEMORY_FILE, RESET_EVENT, ShimError, Started, Status, VmSpec,
};

use crate::cgroup;
use crate::confine::{Process, failure, sys};
use crate::ring::Ring;

/// Index of the ring of the guest's serial console.
pub(crate) const CONSOLE: usize = 0;
/// Index of the ring of the VMM's messages and events.
pub(crate) const LOG: usize = 1;

/// Most a pipe can hold (`/proc/sys/fs/pipe-max-size` for an unprivileged writer): what is left in it when the VMM has gone.
const MAX_PIPE: usize = 1 << 20;
/// Most files in a snapshot attempt; the VMM makes three.
const MAX_SNAPSHOT_FILES: usize = 64;

/// A pipe that the VMM writes to, and the ring its bytes go to.
pub(crate) struct Output {
    /// `None` from its end of file on.
    pub(crate) pipe: Option<File>,
    ring: usize,
    /// Only for the event monitor's: a guest can write on the console whatever it likes.
    resets: Option<Resets>,
}

impl Output {
    pub(crate) fn new(pipe: File, ring: usize) -> Self {
        Self {
            pipe: Some(pipe),
            ring,
            resets: None,
        }
    }

    /// The event monitor's.
    pub(crate) fn events(pipe: File) -> Self {
        Self {
            resets: Some(Resets::default()),
            ..Self::new(pipe, LOG)
        }
    }
}

/// Looks for [`RESET_EVENT`] in a stream that comes in pieces. No parser: a VMM that a guest has taken over can only bring about its
/// own end by it.
#[derive(Default)]
struct Resets {
    /// The end of what came before, shorter than what is looked for.
    before: Vec<u8>,
}

impl Resets {
    /// Whether what is looked for ends in this piece.
    fn found_in(&mut self, piece: &[u8]) -> bool {
        let wanted = RESET_EVENT.as_bytes();
        self.before.extend_from_slice(piece);
        let found = self.before.windows(wanted.len()).any(|window| window == wanted);
        let done = self.before.len().saturating_sub(wanted.len() - 1);
        self.before.drain(..done);
        found
    }
}

/// How a file is opened that the VMM may have put another in place of.
const ONLY: OFlag = OFlag::O_NOFOLLOW
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_NOCTTY)
    .union(OFlag::O_CLOEXEC);

/// Opens a file in a directory that the VMM had: a regular one of our own, with no other name.
fn own_file<P: NixPath + ?Sized>(directory: &Dir, name: &P, access: OFlag) -> io::Result<File> {
    let file = File::from(openat(directory, name, access | ONLY, Mode::empty())?);
    let found = file.metadata()?;
    if !found.file_type().is_file() || found.uid() != getuid().as_raw() || found.nlink() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(file)
}

/// A running VMM.
pub(crate) struct Vm {
    pub(crate) spec: VmSpec,
    pub(crate) started: Started,
    pub(crate) process: Process,
    pub(crate) disk: OwnedFd,
    pub(crate) tap: OwnedFd,
    /// An `O_PATH` descriptor.
    pub(crate) vm_dir: OwnedFd,
    pub(crate) run_dir: PathBuf,
    /// `shim.sock`.
    pub(crate) listener: UnixListener,
    pub(crate) outputs: [Output; 3],
    pub(crate) rings: [Ring; 2],
}

impl Vm {
    pub(crate) fn status(&self) -> Status {
        Status::Running {
            spec: self.spec.clone(),
            started: self.started.clone(),
        }
    }

    /// Sends SIGKILL; a VMM that has ended but is not reaped takes it too.
    pub(crate) fn kill(&self) {
        if let Err(error) = sys::kill(self.process.pidfd.as_fd()) {
            crate::log!("sandbox_id={}: cannot kill the VMM: {error}", self.spec.sandbox);
        }
    }

    pub(crate) fn lend(&self, what: Lendable) -> Result<OwnedFd, ShimError> {
        let descriptor = match what {
            Lendable::Disk => self.disk.try_clone(),
            Lendable::Tap => self.tap.try_clone(),
            Lendable::Memory { attempt } => self
                .attempt(attempt)
                .and_then(|directory| own_file(&directory, MEMORY_FILE, OFlag::O_RDWR))
                .map(OwnedFd::from),
        };
        descriptor.map_err(|error| failure(LaunchStep::LendDescriptor, &error))
    }

    /// Copies what one output has for us, at most `buffer` at a time. `false` when there is nothing more for now. A guest that resets
    /// its machine is not booted anew: its VMM is killed here, before the VMM gets to it or soon after.
    pub(crate) fn copy(&mut self, index: usize, buffer: &mut [u8]) -> bool {
        let output = &mut self.outputs[index];
        let Some(pipe) = &mut output.pipe else { return false };
        match pipe.read(buffer) {
            Ok(0) => output.pipe = None,
            Ok(length) => {
                // A full file system costs output, never the draining of the pipe: the VMM would stop on it.
                self.rings[output.ring].append(&buffer[..length]).ok();
                let reset = output
                    .resets
                    .as_mut()
                    .is_some_and(|resets| resets.found_in(&buffer[..length]));
                if reset {
                    crate::log!(
                        "sandbox_id={}: the guest was reset, the VMM is killed",
                        self.spec.sandbox
                    );
                    self.kill();
                }
                return true;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => output.pipe = None,
        }
        false
    }

    /// Opens the files of a snapshot attempt to the agent. The VMM had the directory: only regular files of our own are touched,
    /// by descriptor, and anything else in it refuses the whole.
    pub(crate) fn publish(&self, attempt: u32) -> Result<(), ShimError> {
        self.publish_files(attempt)
            .map_err(|error| failure(LaunchStep::PublishFiles, &error))
    }

    fn publish_files(&self, attempt: u32) -> io::Result<()> {
        let mut directory = self.attempt(attempt)?;
        let mut names = Vec::new();
        for entry in directory.iter().take(MAX_SNAPSHOT_FILES + 3) {
            let name = entry?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        if names.len() > MAX_SNAPSHOT_FILES {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let mut files = Vec::new();
        for name in names {
            files.push(own_file(&directory, name.as_c_str(), OFlag::O_RDONLY)?);
        }
        files
            .iter()
            .try_for_each(|file| file.set_permissions(Permissions::from_mode(0o640)))
    }

    /// The directory of a snapshot attempt.
    fn attempt(&self, number: u32) -> io::Result<Dir> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | ONLY;
        Ok(Dir::openat(
            &self.vm_dir,
            number.to_string().as_str(),
            flags,
            Mode::empty(),
        )?)
    }

    /// Reaps the VMM after its pidfd says that it has ended, and tells how.
    pub(crate) fn reap(&mut self, buffer: &mut [u8], own: Cgroup) -> Exit {
        let wait = sys::reap(self.process.pidfd.as_fd()).expect("a child that nobody else reaps can be reaped");
        for index in 0..self.outputs.len() {
            // Bounded: a descendant of the VMM could hold the pipe and write on.
            for _ in 0..MAX_PIPE.div_ceil(buffer.len()) {
                if !self.copy(index, buffer) {
                    break;
                }
            }
        }
        let exit = Exit {
            wait,
            oom_kills: match own {
                Cgroup::Own => cgroup::oom_kills(&self.started.cgroup),
                Cgroup::Shared => 0,
            },
            console: self.rings[CONSOLE].tail(MAX_TAIL),
            log: self.rings[LOG].tail(MAX_TAIL),
        };
        if let Err(error) = self.record(&exit) {
            crate::log!(
                "sandbox_id={}: cannot write the exit record: {error}",
                self.spec.sandbox
            );
        }
        exit
    }

    /// Writes the exit record; it is whole or absent.
    fn record(&self, exit: &Exit) -> io::Result<()> {
        let unfinished = self.run_dir.join(".exit.new");
        fs::write(&unfinished, exit.to_json())?;
        fs::set_permissions(&unfinished, Permissions::from_mode(0o644))?;
        fs::rename(&unfinished, self.run_dir.join(EXIT_FILE))
    }
}

/// Whether the VMM's cgroup is that of this sandbox alone.
#[derive(Clone, Copy)]
pub(crate) enum Cgroup {
    Own,
    Shared,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_found_however_the_events_are_cut_and_once() {
        let events = format!("{{\n  \"source\": \"vm\",\n  {RESET_EVENT},\n  \"properties\": null\n}}\n\n");
        for size in 1..=events.len() {
            let mut resets = Resets::default();
            let found = events
                .as_bytes()
                .chunks(size)
                .filter(|piece| resets.found_in(piece))
                .count();
            assert_eq!(found, 1, "pieces of {size}");
            assert!(!resets.found_in(b"\"event\": \"rebooted\""));
        }
        assert!(!Resets::default().found_in(b"rebooting"));
    }
}

//! What version the VMM's program says it is. It is executed for that in the cage of a VMM, with nothing of any sandbox, before anything
//! is launched: so nothing has been started yet where its answer is that nothing can be.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use roost_common::shim::{LaunchStep, MAX_VERSION, ShimError};

use crate::Options;
use crate::confine::filter::Filters;
use crate::confine::{self, Allow, Cage, failure, sys};
use crate::launch::{Kind, open, output_pipe, program};

/// How long the program may take: it reads nothing but itself and its libraries. The shim does nothing else meanwhile, and has nothing
/// else to do.
const LIMIT: Duration = Duration::from_secs(20);

/// The beginning of what the VMM's program writes for `--version`.
///
/// # Errors
/// The step that failed; no process is left.
pub(crate) fn version(options: &Options) -> Result<Vec<u8>, ShimError> {
    let failed = |error: io::Error| failure(LaunchStep::AskVersion, &error);
    let mut rules = options.profile.rules().map_err(|_| ShimError::BadProfile)?;
    rules.push((open(&options.vmm, Kind::File)?.into(), Allow::Execute));
    let (said, says) = output_pipe()?;
    let null = || {
        let opened = OpenOptions::new().read(true).write(true).open("/dev/null");
        opened.map(OwnedFd::from).map_err(failed)
    };
    let program = program(options)?;
    let process = confine::spawn(Cage {
        arguments: vec![program.clone(), c"--version".into()],
        program,
        ruleset: confine::ruleset(&rules)?,
        entrance: None,
        filters: Filters::new(options.profile.violations())?,
        descriptors: [null()?, says, null()?, null()?, null()?, null()?],
    })?;
    let said = read(said);
    // Whatever it is still about. One that has ended takes it too.
    let killed = sys::kill(process.pidfd.as_fd());
    killed.and_then(|()| sys::reap(process.pidfd.as_fd())).map_err(failed)?;
    said.map_err(failed)
}

/// Reads a pipe to its end, or until that is enough, or late.
fn read(mut pipe: File) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + LIMIT;
    let (mut said, mut buffer) = (Vec::new(), [0; MAX_VERSION]);
    while said.len() < MAX_VERSION {
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], patience) {
            Ok(0) => return Err(Errno::ETIMEDOUT.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        match pipe.read(&mut buffer[said.len()..]) {
            Ok(0) => break,
            Ok(length) => said.extend_from_slice(&buffer[said.len()..][..length]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(said)
}

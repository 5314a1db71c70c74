//! From a request to a VMM that runs: everything is opened, bound and built before the fork, so that a refusal leaves nothing.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::{getuid, pipe2};
use roost_common::shim::{
    API_SOCKET, CONSOLE_FILE, LOG_FILE, Launch, LaunchStep, RestoreMode, SHIM_SOCKET, ShimError, SpecField, Start,
    Started, VmSpec,
};

use crate::Options;
use crate::cgroup::{self, VmmCgroup};
use crate::confine::filter::Filters;
use crate::confine::{self, Allow, Cage, failure};
use crate::profile::open_path;
use crate::ring::Ring;
use crate::spec;
use crate::vm::{self, Output, Vm};

/// What on-demand restores handle page faults through.
const USERFAULTFD: &str = "/dev/userfaultfd";
/// Connections that may wait at the shim's socket: the VMM may connect too, and should not find it easy to fill.
pub(crate) const BACKLOG: i32 = 64;

/// Launches the VMM.
///
/// # Errors
/// What was refused or failed; nothing is left of it.
pub(crate) fn launch(options: &Options, request: Launch) -> Result<Vm, ShimError> {
    let Launch { spec, tap, disk } = request;
    spec::check(&spec).map_err(|field| ShimError::BadSpec { field })?;
    let at = |step| move |error: io::Error| failure(step, &error);
    let disk = disk.into_owned().map_err(at(LaunchStep::OpenFiles))?;
    let tap = tap.into_owned().map_err(at(LaunchStep::OpenFiles))?;

    let mut rules = options.profile.rules().map_err(|_| ShimError::BadProfile)?;
    if options.profile.checks_devices() {
        let bad = |field| ShimError::BadSpec { field };
        let node = open_path(Path::new(&spec::disk_node(&spec))).map_err(|_| bad(SpecField::Disk))?;
        spec::check_disk(&spec, disk.as_fd(), node.as_fd()).map_err(bad)?;
        spec::check_tap(tap.as_fd()).map_err(bad)?;
        rules.push((node.into(), Allow::ReadWrite));
    }
    rules.push((open(&options.vmm, Kind::File)?.into(), Allow::Execute));
    rules.extend(start_files(&spec)?);
    let vm_dir = open(Path::new(&spec.vm_dir), Kind::Directory)?;
    rules.push((
        vm_dir.try_clone().map_err(at(LaunchStep::OpenFiles))?.into(),
        Allow::MakeFiles,
    ));
    let ruleset = confine::ruleset(&rules)?;
    drop(rules);

    let mut made = RunFiles::new(&spec.run_dir);
    let api = made
        .bind(SockType::Stream, API_SOCKET)
        .map_err(at(LaunchStep::BindApiSocket))?;
    let listener = made
        .bind(SockType::SeqPacket, SHIM_SOCKET)
        .map_err(at(LaunchStep::BindShimSocket))?;
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true).map_err(at(LaunchStep::BindShimSocket))?;
    let console = made.ring(CONSOLE_FILE).map_err(at(LaunchStep::OpenFiles))?;
    let log = made.ring(LOG_FILE).map_err(at(LaunchStep::OpenFiles))?;
    let (serial_out, serial_in) = output_pipe()?;
    let (messages_out, messages_in) = output_pipe()?;
    let (events_out, events_in) = output_pipe()?;
    let null = File::open("/dev/null").map_err(at(LaunchStep::OpenFiles))?;

    let overhead = options.profile.overhead().filter(|_| !options.child);
    let cgroup = overhead
        .map(|overhead| VmmCgroup::make(&spec, overhead, disk.as_fd()))
        .transpose()
        .map_err(at(LaunchStep::MakeCgroup))?;
    let (cgroup, entrance) = match cgroup {
        Some(cgroup) => (cgroup.name, Some(cgroup.entrance.into())),
        None => (cgroup::own(), None),
    };
    let arguments = spec::arguments(&options.vmm, &spec);
    let process = confine::spawn(Cage {
        program: program(options)?,
        arguments,
        ruleset,
        entrance,
        filters: Filters::new(options.profile.violations())?,
        descriptors: [
            null.into(),
            serial_in,
            messages_in,
            tap.try_clone().map_err(at(LaunchStep::OpenFiles))?,
            api,
            events_in,
        ],
    })?;
    made.keep();
    Ok(Vm {
        started: Started {
            pid: process.pid,
            uid: getuid().as_raw(),
            cgroup,
        },
        run_dir: PathBuf::from(&spec.run_dir),
        spec,
        process,
        disk,
        tap,
        vm_dir: vm_dir.into(),
        listener,
        outputs: [
            Output::new(serial_out, vm::CONSOLE),
            Output::new(messages_out, vm::LOG),
            Output::events(events_out),
        ],
        rings: [console, log],
    })
}

/// The VMM's program, for exec.
pub(crate) fn program(options: &Options) -> Result<CString, ShimError> {
    CString::new(options.vmm.as_os_str().as_bytes())
        .map_err(|_| failure(LaunchStep::OpenFiles, &io::ErrorKind::InvalidInput.into()))
}

/// Rules for the files that a VM starts from.
fn start_files(spec: &VmSpec) -> Result<Vec<(OwnedFd, Allow)>, ShimError> {
    let mut rules = Vec::new();
    let mut read = |path: &String| open(Path::new(path), Kind::File).map(|file| rules.push((file.into(), Allow::Read)));
    match &spec.start {
        Start::Boot { kernel, initramfs } => {
            read(kernel)?;
            initramfs.as_ref().map_or(Ok(()), read)?;
        }
        Start::Restore {
            attempt,
            memory,
            initramfs,
        } => {
            initramfs.as_ref().map_or(Ok(()), read)?;
            open(&Path::new(&spec.vm_dir).join(attempt.to_string()), Kind::Directory)?;
            if *memory == RestoreMode::OnDemand {
                // Handling the kernel's own page faults helps exploits along, so only who needs it has it.
                rules.push((open(Path::new(USERFAULTFD), Kind::Device)?.into(), Allow::ReadWrite));
            }
        }
    }
    Ok(rules)
}

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    File,
    Directory,
    Device,
}

/// Opens a path for naming it, if it is what it should be.
pub(crate) fn open(path: &Path, kind: Kind) -> Result<File, ShimError> {
    let failed = |error: io::Error| failure(LaunchStep::OpenFiles, &error);
    let file = open_path(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.file_type();
    let (fits, errno) = match kind {
        Kind::File => (found.is_file(), libc::EINVAL),
        Kind::Directory => (found.is_dir(), libc::ENOTDIR),
        Kind::Device => (!found.is_file() && !found.is_dir(), libc::ENODEV),
    };
    if fits {
        Ok(file)
    } else {
        Err(failed(io::Error::from_raw_os_error(errno)))
    }
}

/// A pipe for what the VMM writes: our end, which does not block, and its end.
pub(crate) fn output_pipe() -> Result<(File, OwnedFd), ShimError> {
    let failed = |error: nix::Error| failure(LaunchStep::OpenPipes, &error.into());
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed)?;
    Ok((ours.into(), theirs))
}

/// What has been made in the run directory; removed again unless kept.
struct RunFiles {
    directory: PathBuf,
    made: Vec<PathBuf>,
}

impl RunFiles {
    fn new(directory: &str) -> Self {
        Self {
            directory: directory.into(),
            made: Vec::new(),
        }
    }

    /// Binds a listener. Everybody may connect whom the directory lets in: the VM's uid and the agent.
    fn bind(&mut self, kind: SockType, name: &str) -> io::Result<OwnedFd> {
        let path = self.directory.join(name);
        let listener = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &UnixAddr::new(&path)?)?;
        self.made.push(path.clone());
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        listen(&listener, Backlog::new(BACKLOG)?)?;
        Ok(listener)
    }

    fn ring(&mut self, name: &str) -> io::Result<Ring> {
        let path = self.directory.join(name);
        let ring = Ring::create(&path)?;
        self.made.push(path);
        Ok(ring)
    }

    fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for RunFiles {
    fn drop(&mut self) {
        for path in &self.made {
            if let Err(error) = fs::remove_file(path) {
                crate::log!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

//! envd as PID 1: in the initramfs ([`stage_one`]), then on the real root, from a bare kernel to a machine that
//! programs can run in.
//!
//! What every program needs comes first and is done before anything listens ([`mount_filesystems`]); the rest
//! ([`set_up`], then [`grow`]) runs beside the listener, and readiness tells when it is done.
//!
//! Not here: reaping (`process::reaper`), which is the same with and without being PID 1.

mod grow;
mod mounts;
pub(crate) mod stage_one;
mod uevent;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, sethostname, sync};

pub(crate) use self::grow::grow;
pub(crate) use self::mounts::mount_filesystems;
use crate::console::say;
use crate::net::{self, BootAddress};

/// How long devices that the kernel is still finding are waited for.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long programs have to end before they are killed.
const TERM_TIMEOUT: Duration = Duration::from_secs(2);

/// For envd itself: a connection or a pipe is a descriptor, and its children set limits of their own.
const OPEN_FILES: u64 = 524_288;

/// Network, name and limits of the machine.
///
/// # Errors
/// What a guest cannot do without is missing; the text is for the console and for `GET /health`.
pub(crate) fn set_up() -> anyhow::Result<()> {
    // Without it Ctrl-Alt-Del is an immediate reset; with it, SIGINT to PID 1.
    set_cad_enabled(false).ok();
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES) {
        say!("cannot raise the limit of open files: {error}");
    }
    net::bring_up_loopback()?;
    let address = BootAddress::from_cmdline(&fs::read_to_string("/proc/cmdline")?)?;
    set_hostname(address.as_ref());
    match address {
        Some(address) => {
            let sysfs = Path::new("/sys/class/net").join(&address.device);
            uevent::wait_for(&sysfs, DEVICE_TIMEOUT)?;
            net::bring_up(&address)?;
        }
        None => say!("no ip= boot argument: the machine has no network"),
    }
    Ok(())
}

fn set_hostname(address: Option<&BootAddress>) {
    let file = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let from_file = file
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with('#'));
    let name = address
        .and_then(|address| address.hostname.as_deref())
        .or(from_file)
        .unwrap_or("sandbox");
    if let Err(error) = sethostname(name) {
        say!("cannot set the host name {name:?}: {error}");
    }
}

/// How the machine goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shutdown {
    PowerOff,
    Restart,
}

/// Ends all programs, writes everything to disk, and ends the machine. Blocks.
pub(crate) fn shut_down(how: Shutdown) -> ! {
    say!("shutting down: {how:?}");
    let everyone = Pid::from_raw(-1);
    // ESRCH: nobody is there to be ended.
    kill(everyone, Signal::SIGTERM).ok();
    let deadline = Instant::now() + TERM_TIMEOUT;
    while programs_are_running() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    kill(everyone, Signal::SIGKILL).ok();
    end_machine(how)
}

/// Writes everything to disk and ends the machine.
pub(crate) fn end_machine(how: Shutdown) -> ! {
    sync();
    // Marks the filesystem clean; with files still open for writing it stays as it is, which a journal is for.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .ok();
    let mode = match how {
        Shutdown::PowerOff => RebootMode::RB_POWER_OFF,
        Shutdown::Restart => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(mode);
    say!("the kernel refuses to end the machine: {error}");
    // PID 1 ending is a panic, which ends the machine too.
    std::process::exit(1)
}

/// Whether there is a process other than us; kernel threads and zombies have no command line.
fn programs_are_running() -> bool {
    let Ok(entries) = fs::read_dir("/proc") else {
        return false;
    };
    entries.flatten().any(|entry| {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        pid.is_some_and(|pid| pid > 1) && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
    })
}

/// What exec of envd on the new root passes on: nothing of the kernel's environment.
fn exec_self(program: &Path) -> std::io::Error {
    use std::os::unix::process::CommandExt as _;
    Command::new(program).env_clear().exec()
}

//! envd: the guest's init and agent.
//!
//! One program in three places: `/init` of the initramfs (it becomes the next), PID 1 of a sandbox, and, with
//! `--no-init`, an ordinary process on a machine that is not its own, for tests and development.
//!
//! | module | holds |
//! |---|---|
//! | [`init`] | the machine: stage one, mounts, network, disk size, shutdown |
//! | [`http`], [`connections`] | the listener and the routes; which connections are to end |
//! | [`rest`], [`clock`], [`entropy`], [`identity`], [`metrics`] | the plain HTTP calls and what they do |
//! | [`snapshot`], [`filesystems`], [`freeze`], [`mountinfo`] | before a snapshot: the disk written, then frozen |
//! | [`hold`], [`cgroups`] | over a snapshot: the guest's programs stopped |
//! | [`disk`] | after a restore: proof that the disk answers |
//! | [`process`] | the Connect service that runs programs |
//! | [`filesystem`] | the Connect service for names and attributes of files, and watches |
//! | [`files`] | `/files`: what is in files, up and down |
//! | [`ports`] | ports of programs forwarded to where the host reaches them |
//! | [`caller`] | who makes a Connect call, and how long its stream may be silent |
//! | [`guest`] | settings and readiness, shared by all calls |
//! | [`users`], [`net`] | `/etc/passwd`; interfaces |
//! | [`sys`] | all unsafe code |
//!
//! Wire facts are in `roost_common::guest`.

mod caller;
mod cgroups;
mod clock;
mod connections;
mod console;
mod disk;
mod entropy;
mod files;
mod filesystem;
mod filesystems;
mod freeze;
mod guest;
mod hold;
mod http;
mod identity;
mod init;
mod metrics;
mod mountinfo;
mod net;
mod ports;
mod process;
mod rest;
mod snapshot;
mod sys;
#[cfg(test)]
mod testing;
mod users;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use nix::time::{ClockId, clock_gettime};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::console::say;
use crate::filesystem::service::FilesystemService;
use crate::guest::{Disk, Guest, Machine, Readiness};
use crate::init::Shutdown;
use crate::process::Processes;
use crate::process::reaper::Reaper;
use crate::process::service::ProcessService;
use crate::rest::Rest;

const USAGE: &str = "usage: envd --no-init [--listen ADDRESS:PORT] [--root DIRECTORY]
       (without --no-init it must be PID 1, and takes no options)";

/// Threads that wait in system calls (starting processes, the disk); most of the time none. Many, because a start in a
/// directory on a dead network never comes back.
const BLOCKING_THREADS: usize = 256;

fn main() -> ExitCode {
    let result = if std::process::id() == 1 {
        run_as_init()
    } else {
        run_as_guest()
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// PID 1 has nobody to return to: whatever fails is told on the console, and the machine goes off.
fn run_as_init() -> ! {
    let error = if init::stage_one::is_initramfs() {
        let Err(error) = init::stage_one::run();
        error.context("stage one failed")
    } else {
        match serve_machine() {
            Ok(how) => init::shut_down(how),
            Err(error) => error.context("init failed"),
        }
    };
    say!("{error:#}");
    init::end_machine(Shutdown::PowerOff)
}

/// Runs the sandbox's machine until it is told to go down.
fn serve_machine() -> anyhow::Result<Shutdown> {
    init::mount_filesystems()?;
    let guest = Arc::new(Guest::new(PathBuf::from("/"), Machine::Own));
    let runtime = runtime()?;
    runtime.block_on(async {
        let mut shutdowns = Shutdowns::new()?;
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, roost_common::guest::PORT));
        tokio::task::spawn_blocking({
            let guest = Arc::clone(&guest);
            move || set_up_machine(&guest)
        });
        serve(address, Arc::clone(&guest)).await?;
        tokio::spawn(async move { guest.ports.forward(roost_common::net::GUEST).await });
        Ok(shutdowns.next().await)
    })
}

/// What may take a moment: beside the listener, in the order in which callers need it.
fn set_up_machine(guest: &Guest) {
    let readiness = match init::set_up() {
        Ok(()) => Readiness::Ready,
        Err(error) => {
            say!("the machine could not be set up: {error:#}");
            Readiness::Failed(format!("{error:#}"))
        }
    };
    guest.readiness.send_replace(readiness);
    if let Err(error) = init::grow() {
        say!("cannot grow the root filesystem: {error}");
    }
    guest.disk.send_replace(Disk::Settled);
}

/// `--no-init`: serves until SIGTERM or SIGINT, and kills what it started.
fn run_as_guest() -> anyhow::Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let guest = Arc::new(Guest::new(options.root, Machine::Borrowed));
    runtime()?.block_on(async {
        let mut shutdowns = Shutdowns::new()?;
        let processes = serve(options.listen, guest).await?;
        shutdowns.next().await;
        processes.kill_all();
        Ok(())
    })
}

/// Starts the reaper and the listener.
async fn serve(address: SocketAddr, guest: Arc<Guest>) -> anyhow::Result<Arc<Processes>> {
    let processes = Arc::new(Processes::new(
        Reaper::spawn().context("cannot watch for children that end")?,
    ));
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    // The kernel's log has the rest of a boot by the same clock.
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).context("no clock")?;
    say!(
        "listening on {} after {}.{:06} s",
        listener.local_addr().context("the listener has no address")?,
        uptime.tv_sec(),
        uptime.tv_nsec() / 1000
    );
    let service = ProcessService {
        guest: Arc::clone(&guest),
        processes: Arc::clone(&processes),
    };
    let files = FilesystemService::new(Arc::clone(&guest));
    tokio::spawn(http::Server::new(Rest::new(guest), service, files).serve(listener));
    Ok(processes)
}

fn runtime() -> anyhow::Result<Runtime> {
    // Two, also on one processor: a call that takes its time must not hold back the next.
    let workers = std::thread::available_parallelism().map_or(2, |count| count.get().max(2));
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("cannot start threads")
}

/// The signals by which a machine is told to go down.
struct Shutdowns {
    restart: [tokio::signal::unix::Signal; 2],
    power_off: [tokio::signal::unix::Signal; 3],
}

impl Shutdowns {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            restart: [listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?],
            power_off: [
                listen(SignalKind::user_defined1())?,
                listen(SignalKind::user_defined2())?,
                listen(SignalKind::from_raw(libc::SIGPWR))?,
            ],
        })
    }

    async fn next(&mut self) -> Shutdown {
        let [terminate, interrupt] = &mut self.restart;
        let [user1, user2, power] = &mut self.power_off;
        tokio::select! {
            _ = terminate.recv() => Shutdown::Restart,
            _ = interrupt.recv() => Shutdown::Restart,
            _ = user1.recv() => Shutdown::PowerOff,
            _ = user2.recv() => Shutdown::PowerOff,
            _ = power.recv() => Shutdown::PowerOff,
        }
    }
}

/// The command line of `--no-init`.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    listen: SocketAddr,
    root: PathBuf,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut listen = SocketAddr::from((Ipv4Addr::LOCALHOST, roost_common::guest::PORT));
        let mut root = PathBuf::from("/");
        let mut no_init = false;
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .with_context(|| format!("{argument} needs a value\n{USAGE}"))
            };
            match argument.as_str() {
                "--no-init" => no_init = true,
                "--listen" => listen = value()?.parse().context("--listen takes an address and a port")?,
                "--root" => root = value()?.into(),
                _ => bail!("unknown option {argument}\n{USAGE}"),
            }
        }
        if !no_init {
            bail!("not PID 1\n{USAGE}");
        }
        Ok(Self { listen, root })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Options> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn without_no_init_and_with_unknown_options_it_does_not_start() {
        for line in [
            "",
            "--listen 127.0.0.1:0",
            "--no-init --listen",
            "--no-init --listen here",
            "--no-init x",
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
        let options = parse("--no-init --listen 127.0.0.1:0 --root /tmp").unwrap();
        assert_eq!(
            options,
            Options {
                listen: "127.0.0.1:0".parse().unwrap(),
                root: "/tmp".into()
            }
        );
    }
}

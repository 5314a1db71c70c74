//! Shims: each holds a VM's tap and disk, and lets go of them before its connections end. As `vmmshim/src/serve.rs`, but for the process
//! that it would start: the VMM is [`crate::vmm`].

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use roost_common::ids::Slot;
use roost_common::ipc::{self, PacketSocket};
use roost_common::shim::{
    API_SOCKET, EXIT_FILE, Exit, FromShim, Launch, LaunchStep, Lendable, MEMORY_FILE, PROTOCOL, ProgramId, SHIM_SOCKET,
    ShimError, SpecField, Start, Started, Status, ToShim, VmSpec, WaitStatus,
};
use tokio::sync::watch;

use crate::dice::Fault;
use crate::vmm::{self, VERSION, Vmm};
use crate::world::{Inner, World, bind_packets, ended, listening};

/// The file that the VMM's program would be.
const PROGRAM: ProgramId = ProgramId {
    device: 1,
    inode: 1,
    changed_at: 0,
};

/// A shim. It is in the world for as long as its process runs.
pub(crate) struct Shim {
    pub(crate) vm: Option<Vm>,
    /// How it has ended, for its connections.
    end: watch::Sender<Option<End>>,
}

/// How a shim ends.
#[derive(Debug, Clone)]
pub(crate) enum End {
    /// It tells everybody how its VMM has ended.
    Reports(Exit),
    /// Without a word.
    Killed,
}

/// What a shim has launched.
pub(crate) struct Vm {
    pub(crate) spec: VmSpec,
    pub(crate) slot: Slot,
    pub(crate) disk: File,
    pub(crate) tap: File,
    /// It has been told to end, which may take a while.
    pub(crate) is_dying: bool,
    /// It has been told to end, and has not heard.
    pub(crate) is_deaf: bool,
    pub(crate) vmm: Vmm,
    pub(crate) api: UnixListener,
    listener: UnixListener,
}

/// Starts a shim for each connection, as systemd does, and lets those that are there go on.
pub(crate) async fn serve(world: Arc<World>) {
    let listener = listening(&world.shims);
    let there: Vec<u64> = world.lock().shims.keys().copied().collect();
    for number in there {
        go_on(&world, number);
    }
    loop {
        let (stream, _) = listener.accept().await.expect("accepted");
        let number = {
            let mut inner = world.lock();
            let number = inner.number();
            let end = watch::Sender::new(None);
            inner.shims.insert(number, Shim { vm: None, end });
            number
        };
        let connection: OwnedFd = stream.into_std().expect("taken out of the runtime").into();
        tokio::spawn(converse(world.clone(), number, connection));
    }
}

/// Ends a shim, and its VM with it. Its connections end once it has let go of everything.
pub(crate) fn end(world: &World, number: u64, how: End) {
    let gone = world.lock().shims.remove(&number);
    let Some(Shim { vm, end }) = gone else { return };
    if let (Some(vm), End::Reports(exit)) = (&vm, &how) {
        // Where its directory has gone nobody will read it.
        std::fs::write(Path::new(&vm.spec.run_dir).join(EXIT_FILE), exit.to_json()).ok();
    }
    drop(vm);
    end.send_replace(Some(how));
}

/// The end of a VMM.
pub(crate) fn report(wait: WaitStatus) -> End {
    End::Reports(Exit {
        wait,
        oom_kills: 0,
        console: Vec::new(),
        log: Vec::new(),
    })
}

/// All that a shim with a VM does by itself, in the runtime that runs now.
fn go_on(world: &Arc<World>, number: u64) {
    let mut inner = world.lock();
    let faults = inner.faults;
    let dies_by_itself = inner.dice.chance(2 * faults);
    let (dies_in, killed) = (inner.dice.millis(600_000), inner.dice.chance(300));
    let Some(Shim { vm: Some(vm), end }) = inner.shims.get(&number) else {
        return;
    };
    let listener = listening(&vm.listener);
    let is_dying = vm.is_dying;
    let mut accepting = end.subscribe();
    drop(inner);
    let of_this = world.clone();
    tokio::spawn(async move {
        let accept = async {
            loop {
                let (stream, _) = listener.accept().await.expect("accepted");
                let connection = stream.into_std().expect("taken out of the runtime").into();
                tokio::spawn(converse(of_this.clone(), number, connection));
            }
        };
        tokio::select! {
            _ = ended(&mut accepting) => {}
            () = accept => {}
        }
    });
    vmm::go_on(world, number);
    if is_dying {
        die(world, number, Duration::ZERO);
    } else if dies_by_itself {
        let of_this = world.clone();
        tokio::spawn(async move {
            tokio::time::sleep(dies_in).await;
            let how = if killed {
                End::Killed
            } else {
                report(WaitStatus::Exited(1))
            };
            self::end(&of_this, number, how);
        });
    }
}

/// Whether a shim has ended, to be waited for.
pub(crate) fn end_of(inner: &Inner, number: u64) -> Option<watch::Receiver<Option<End>>> {
    inner.shims.get(&number).map(|shim| shim.end.subscribe())
}

async fn converse(world: Arc<World>, number: u64, connection: OwnedFd) {
    let socket = PacketSocket::new(connection).expect("registered");
    let Some(mut end) = end_of(&world.lock(), number) else {
        return;
    };
    let last = tokio::select! {
        last = ended(&mut end) => last,
        () = talk(&world, number, &socket) => {
            let mut inner = world.lock();
            // The connection of one that has launched nothing is its only one.
            if inner.shims.get(&number).is_some_and(|shim| shim.vm.is_none()) {
                inner.shims.remove(&number);
            }
            return;
        }
    };
    if let Some(End::Reports(exit)) = last {
        drop(socket.send(&FromShim::Exited(exit)).await);
        // Closed with requests in it that nobody has read, it would take back what was just said.
        let descriptor = socket.as_fd();
        shutdown(std::os::fd::AsRawFd::as_raw_fd(&descriptor), Shutdown::Read).ok();
        while ipc::receive::<ToShim>(descriptor).is_ok() {}
    }
}

/// Answers what comes, until the connection ends.
async fn talk(world: &Arc<World>, number: u64, socket: &PacketSocket) {
    match world.called().await {
        Fault::None | Fault::Refuse | Fault::DoAndHang => {}
        Fault::Hang if hang(world, number, socket).await == Then::End => return,
        Fault::Hang => {}
        Fault::Lose | Fault::Die => return end(world, number, End::Killed),
    }
    let hello = FromShim::Hello {
        protocol: PROTOCOL,
        vmm: Some(PROGRAM),
    };
    if socket.send(&hello).await.is_err() {
        return;
    }
    while let Ok((request, _)) = socket.receive::<ToShim>().await {
        let fault = world.called().await;
        if matches!(fault, Fault::Hang | Fault::DoAndHang) {
            is_stubborn(world, number, &request);
        }
        let answer = match (request, fault) {
            (ToShim::Kill, fault) => match kill(world, number, fault) {
                Some(answer) => answer,
                None => return,
            },
            (_, Fault::Refuse) => FromShim::Refused(ShimError::Step {
                step: LaunchStep::Fork,
                errno: nix::libc::EAGAIN,
            }),
            (_, Fault::Hang) if hang(world, number, socket).await == Then::End => return,
            (_, Fault::Hang) => continue,
            (_, Fault::Die) => return end(world, number, End::Killed),
            (request, Fault::None | Fault::DoAndHang | Fault::Lose) => {
                let answer = answer(world, number, request).unwrap_or_else(FromShim::Refused);
                match fault {
                    Fault::DoAndHang => late(socket).await,
                    Fault::Lose => return end(world, number, End::Killed),
                    _ => {}
                }
                answer
            }
        };
        if socket.send(&answer).await.is_err() {
            return;
        }
    }
}

/// Longer than anybody waits for an answer, or until nobody does any more.
async fn late(socket: &PacketSocket) {
    let is_left = || {
        // That the other end has gone is told unasked.
        let mut asked = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        poll(&mut asked, PollTimeout::ZERO).is_ok_and(|told| told > 0)
    };
    for _ in 0..70 {
        if is_left() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Whether a connection goes on.
#[derive(PartialEq, Eq)]
enum Then {
    Go,
    End,
}

/// Hears nothing that is said on a connection but its end, until nothing goes wrong any more.
async fn hang(world: &Arc<World>, number: u64, socket: &PacketSocket) -> Then {
    let mut calm = world.calm.subscribe();
    loop {
        let heard = tokio::select! {
            // The world goes on for longer than this.
            _ = calm.wait_for(|calm| *calm) => break,
            heard = socket.receive::<ToShim>() => heard,
        };
        let Ok((request, _)) = heard else { return Then::End };
        is_stubborn(world, number, &request);
        let mut inner = world.lock();
        let vm = inner.shims.get_mut(&number).and_then(|shim| shim.vm.as_mut());
        if let (ToShim::Kill, Some(vm)) = (request, vm) {
            vm.is_deaf = true;
        }
    }
    let is_deaf = |shim: &Shim| shim.vm.as_ref().is_some_and(|vm| vm.is_deaf);
    if world.lock().shims.get(&number).is_some_and(is_deaf) {
        kill(world, number, Fault::None);
    }
    Then::Go
}

/// Who waits for this shim waits in vain, or long.
fn is_stubborn(world: &World, number: u64, request: &ToShim) {
    let mut inner = world.lock();
    let id = match request {
        ToShim::Launch(launch) => Some(launch.spec.sandbox.clone()),
        _ => {
            let vm = inner.shims.get(&number).and_then(|shim| shim.vm.as_ref());
            vm.map(|vm| vm.spec.sandbox.clone())
        }
    };
    inner.stubborn.extend(id);
}

/// A kill, which cannot be refused: but a VMM that waits for a device ends no sooner than that answers.
fn kill(world: &Arc<World>, number: u64, fault: Fault) -> Option<FromShim> {
    let mut inner = world.lock();
    let is_slow = matches!(fault, Fault::Hang | Fault::DoAndHang);
    let takes = inner.dice.millis(if is_slow { 590_000 } else { 200 });
    let vm = inner.shims.get_mut(&number).and_then(|shim| shim.vm.as_mut());
    let was_dying = vm.map(|vm| std::mem::replace(&mut vm.is_dying, true));
    drop(inner);
    match was_dying {
        None => {
            end(world, number, End::Killed);
            return None;
        }
        Some(false) => die(world, number, takes),
        Some(true) => {}
    }
    Some(FromShim::Killed)
}

fn die(world: &Arc<World>, number: u64, takes: Duration) {
    let world = world.clone();
    tokio::spawn(async move {
        tokio::time::sleep(takes).await;
        end(&world, number, report(WaitStatus::Signaled(nix::libc::SIGKILL)));
    });
}

fn answer(world: &Arc<World>, number: u64, request: ToShim) -> Result<FromShim, ShimError> {
    if let ToShim::Launch(request) = request {
        return launch(world, number, *request).map(FromShim::Started);
    }
    let inner = world.lock();
    let vm = inner.shims.get(&number).and_then(|shim| shim.vm.as_ref());
    match (request, vm) {
        (ToShim::Version, None) => Ok(FromShim::Version(format!("cloud-hypervisor v{VERSION}\n").into())),
        (ToShim::Program, None) => Ok(FromShim::Program(None)),
        (ToShim::Version | ToShim::Program, Some(_)) => Err(ShimError::AlreadyLaunched),
        (ToShim::Status, None) => Ok(FromShim::Status(Status::Idle)),
        (ToShim::Status, Some(vm)) => Ok(FromShim::Status(Status::Running {
            spec: vm.spec.clone(),
            started: started(number),
        })),
        (ToShim::Lend(what), Some(vm)) => {
            let held = match what {
                Lendable::Disk => vm.disk.try_clone(),
                Lendable::Tap => vm.tap.try_clone(),
                Lendable::Memory { attempt } => File::options()
                    .read(true)
                    .write(true)
                    .open(Path::new(&vm.spec.vm_dir).join(format!("{attempt}/{MEMORY_FILE}"))),
            };
            let lent = held.map_err(|error| ShimError::Step {
                step: LaunchStep::LendDescriptor,
                errno: error.raw_os_error().unwrap_or_default(),
            });
            Ok(FromShim::Lent(OwnedFd::from(lent?).into()))
        }
        (ToShim::Publish { attempt }, Some(vm)) if Path::new(&vm.spec.vm_dir).join(attempt.to_string()).is_dir() => {
            Ok(FromShim::Published)
        }
        (ToShim::Publish { .. }, Some(_)) => Err(ShimError::Step {
            step: LaunchStep::PublishFiles,
            errno: nix::libc::ENOENT,
        }),
        (ToShim::Lend(_) | ToShim::Publish { .. }, None) => Err(ShimError::NotRunning),
        (ToShim::Launch(_) | ToShim::Kill, _) => unreachable!("seen to"),
    }
}

fn started(number: u64) -> Started {
    Started {
        pid: u32::try_from(number).expect("a pid"),
        uid: nix::unistd::getuid().as_raw(),
        cgroup: String::new(),
    }
}

fn launch(world: &Arc<World>, number: u64, request: Launch) -> Result<Started, ShimError> {
    let owned = |descriptor: ipc::PassedFd| File::from(descriptor.into_owned().expect("duplicated"));
    let (spec, tap, disk) = (request.spec, owned(request.tap), owned(request.disk));
    let mut inner = world.lock();
    let bad = |field| ShimError::BadSpec { field };
    let found = inner.disk_of(&disk).map(|disk| (disk.id.clone(), disk.minor));
    if found != Some((spec.sandbox.clone(), spec.disk_minor)) {
        inner
            .wrong
            .push(format!("{} was launched with the disk {found:?}", spec.sandbox));
        return Err(bad(SpecField::Disk));
    }
    let slot = inner
        .network_of(&tap)
        .map(|network| network.slot)
        .ok_or(bad(SpecField::Tap))?;
    let other = inner.shims.values().filter_map(|shim| shim.vm.as_ref());
    let other = other
        .into_iter()
        .find(|vm| vm.spec.sandbox == spec.sandbox || vm.slot == slot);
    if let Some(other) = other {
        let what = format!(
            "{} was launched in slot {slot} beside {} in slot {}",
            spec.sandbox, other.spec.sandbox, other.slot
        );
        inner.wrong.push(what);
    }
    if inner.shims.get(&number).is_none_or(|shim| shim.vm.is_some()) {
        return Err(ShimError::AlreadyLaunched);
    }
    let vmm = match &spec.start {
        Start::Boot { .. } => Vmm::boots(),
        Start::Restore { attempt, .. } => {
            let from = Path::new(&spec.vm_dir).join(attempt.to_string());
            Vmm::restores(&from).ok_or(bad(SpecField::Start))?
        }
    };
    let failed = |step| {
        move |error: std::io::Error| ShimError::Step {
            step,
            errno: error.raw_os_error().unwrap_or(0),
        }
    };
    let run_dir = Path::new(&spec.run_dir);
    let api = run_dir.join(API_SOCKET);
    let api = UnixListener::bind(api).map_err(failed(LaunchStep::BindApiSocket))?;
    let listener = bind_packets(&run_dir.join(SHIM_SOCKET)).map_err(failed(LaunchStep::BindShimSocket))?;
    api.set_nonblocking(true).expect("set");
    let vm = Vm {
        spec,
        slot,
        disk,
        tap,
        is_dying: false,
        is_deaf: false,
        vmm,
        api,
        listener,
    };
    inner.shims.get_mut(&number).expect("seen above").vm = Some(vm);
    drop(inner);
    go_on(world, number);
    Ok(started(number))
}

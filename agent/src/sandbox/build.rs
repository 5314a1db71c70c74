//! Building a sandbox, and taking one down.
//!
//! ```text
//! files (record, cow) --> shim --+--> open_disk (needs the shim's uid) --+--> launch --> envd up --> init --> record
//!                                +--> open_network ----------------------+
//! ```
//!
//! What a build acquires stands in [`Parts`] from the moment it is asked for. A build that fails or is told to stop waits for what
//! is under way and undoes it with the rest before it ends, so that its answer comes when nothing is left but what the kernel
//! removes in its own time.

use std::fs::File;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::ipc::PassedFd;
use roost_common::net::SlotAddresses;
use roost_common::privd::{Disk, EgressPolicy, Internet, Network, OpenDisk, OpenNetwork};
use roost_common::shim::{API_SOCKET, Launch, SHIM_SOCKET, Start, VmSpec};
use roost_common::units::{Bytes, Sectors};
use tokio::task::JoinHandle;

use super::plan::Plan;
use super::record::{Phase, Record};
use super::{BuildFailure, TeardownError};
use crate::errors::{Chain, FileError};
use crate::guest::{Guest, GuestError, Identity};
use crate::host::acl::{self, Access};
use crate::host::images::{self, Image, ImageError};
use crate::host::kernels::{self, Kernel};
use crate::host::privd::CallError;
use crate::host::shim::{self, ExitSummary, ShimFault, ShimLink, VmmEnd};
use crate::host::slots::SlotLease;
use crate::host::{Host, files};
use crate::tombstone;
use crate::vmm::{Vmm, VmmError};

/// Why a sandbox could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// It was told to stop.
    #[error("the build was stopped")]
    Stopped,
    /// The template.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is larger than the disk that was asked for.
    #[error("a disk of {asked} MiB is smaller than its image of {image}")]
    DiskTooSmall {
        /// What was asked for, in MiB.
        asked: u32,
        /// The image's size.
        image: Sectors,
    },
    /// The disk is larger than any there can be.
    #[error("a disk of {0} is larger than 2 TiB")]
    DiskTooLarge(Sectors),
    /// An earlier sandbox of this id is still there.
    #[error("an earlier sandbox of this id could not be removed")]
    Left(#[source] TeardownError),
    /// There is no kernel to boot.
    #[error("no guest kernel in {}: put vmlinux-<version> there", dir.display())]
    NoKernel {
        /// The directory.
        dir: std::path::PathBuf,
    },
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// privd.
    #[error("no disk or network for the sandbox")]
    Privd(#[from] CallError),
    /// The shim.
    #[error("the VMM could not be launched")]
    Shim(#[from] ShimFault),
    /// The VMM's API.
    #[error("the VMM does not answer")]
    Vmm(#[from] VmmError),
    /// The VMM ended before the guest was up.
    #[error("the VMM ended before its guest was up: {0}")]
    VmmEnded(ExitSummary),
    /// The shim ended, and the VMM with it.
    #[error("the vmmshim ended before the guest was up")]
    ShimLost,
    /// The guest did not come up, or refused its identity.
    #[error("the guest did not come up")]
    Guest(#[from] GuestError),
}

/// A running VM with everything it has on this host. The disk and the network are held by shim and VMM, not here.
#[derive(Debug)]
pub struct Vm {
    /// Ends the VMM, and hears of its end.
    pub shim: ShimLink,
    /// Reaches the guest.
    pub guest: Arc<Guest>,
    /// Which versions run, for the caller.
    pub versions: Versions,
}

/// Which versions run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions {
    /// The guest's kernel.
    pub kernel: String,
    /// The VMM.
    pub vmm: String,
    /// The guest's envd.
    pub envd: String,
}

/// What a build has acquired so far, or is acquiring.
#[derive(Default)]
struct Parts {
    /// The sandbox's directories may exist.
    files: bool,
    gate: Gate,
    shim: Held<ShimLink, ShimFault>,
    disk: Held<Disk, CallError>,
    network: Held<Network, CallError>,
}

/// Something that a task of its own acquires. The task goes on when the build that asked for it is dropped, so that an undo can
/// wait for what was under way: a call of privd cannot be taken back, only its result.
#[derive(Default)]
enum Held<T, E> {
    #[default]
    Nothing,
    Coming(JoinHandle<Result<T, E>>),
    Here(T),
}

impl<T: Send + 'static, E: Send + 'static> Held<T, E> {
    fn start(work: impl Future<Output = Result<T, E>> + Send + 'static) -> Self {
        Self::Coming(tokio::spawn(work))
    }

    /// Waits for it. Safe to cancel.
    async fn here(&mut self) -> Result<&mut T, E> {
        if let Self::Coming(task) = self {
            let outcome = task.await.expect("acquiring does not panic");
            *self = Self::Nothing;
            *self = Self::Here(outcome?);
        }
        match self {
            Self::Here(thing) => Ok(thing),
            Self::Nothing | Self::Coming(_) => unreachable!("it was started, and a failure ended the build"),
        }
    }

    /// Waits for what is under way, and takes it.
    async fn settled(self) -> Option<T> {
        match self {
            Self::Nothing => None,
            Self::Coming(task) => task.await.expect("acquiring does not panic").ok(),
            Self::Here(thing) => Some(thing),
        }
    }
}

/// Builds a sandbox; `stop` ends the build at any point.
///
/// # Errors
/// [`BuildFailure`], after everything has been undone, or with what could not be.
pub async fn build(
    host: Arc<Host>,
    plan: Plan,
    slot: Arc<SlotLease>,
    created_at_unix: i64,
    stop: impl Future<Output = ()>,
) -> Result<Vm, BuildFailure> {
    let mut parts = Parts::default();
    let outcome = tokio::select! {
        biased;
        () = stop => Err(BuildError::Stopped),
        outcome = steps(&host, &plan, &slot, created_at_unix, &mut parts) => outcome,
    };
    match outcome {
        Ok((guest, versions)) => {
            let shim = parts.shim.settled().await.expect("a finished build has a shim");
            Ok(Vm {
                shim,
                guest: Arc::new(guest),
                versions,
            })
        }
        Err(error) => {
            tracing::info!(sandbox_id = %plan.id, error = %Chain(&error), "undoing a create");
            let left = undo(&host, &plan, parts).await.err();
            Err(BuildFailure { error, left })
        }
    }
}

async fn steps(
    host: &Arc<Host>,
    plan: &Plan,
    slot: &SlotLease,
    created_at_unix: i64,
    parts: &mut Parts,
) -> Result<(Guest, Versions), BuildError> {
    let started = Instant::now();
    let gate = parts.gate.clone();
    // What the caller may have got wrong comes first, before anything is made or started.
    let (image, size, kernel) = gate
        .run({
            let (host, plan) = (host.clone(), plan.clone());
            move || find(&host, &plan)
        })
        .await?;
    let cow_length = size.cow_length().ok_or(BuildError::DiskTooLarge(size))?;
    parts.files = true;
    if left_behind(host, &plan.id) {
        remove_files(host, &gate, &plan.id).await.map_err(BuildError::Left)?;
    }
    // A shim needs nothing of the sandbox's, so it starts meanwhile.
    parts.shim = Held::start({
        let host = host.clone();
        async move { host.shims.start().await }
    });
    let record = Record::new(Phase::Creating, slot.slot().into(), plan.clone(), created_at_unix);
    let cow = gate
        .run({
            let (host, record) = (host.clone(), record.clone());
            move || make_files(&host, &record, cow_length)
        })
        .await?;
    let uid = parts.shim.here().await?.uid();

    parts.disk = Held::start({
        let (host, sandbox) = (host.clone(), plan.id.clone());
        async move {
            let request = OpenDisk {
                sandbox,
                origin: PassedFd::from(OwnedFd::from(image.rootfs)),
                cow: PassedFd::from(OwnedFd::from(cow)),
                size,
                owner: uid,
            };
            host.privd.open_disk(request).await
        }
    });
    parts.network = Held::start({
        let (host, slot) = (host.clone(), slot.slot());
        async move {
            let policy = EgressPolicy {
                internet: Internet::Open,
                resolvers: host.resolvers.clone(),
            };
            host.privd.open_network(OpenNetwork { slot, policy }).await
        }
    });
    let (disk, network) = tokio::try_join!(parts.disk.here(), parts.network.here())?;

    let run_dir = host.layout.vm_run(&plan.id);
    gate.run({
        let (host, id) = (host.clone(), plan.id.clone());
        move || admit(&host, &id, uid)
    })
    .await?;
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let launch = Launch {
        spec: VmSpec {
            sandbox: plan.id.clone(),
            vcpus: plan.vcpus,
            memory: plan.memory,
            disk_minor: disk.node.minor,
            start: Start::Boot {
                kernel: path(&kernel.kernel),
                initramfs: kernel.initramfs.as_deref().map(path),
            },
            run_dir: path(&run_dir),
            vm_dir: path(&host.layout.vm(&plan.id)),
        },
        tap: network.tap.clone(),
        disk: disk.device.clone(),
    };
    let vmm = parts.shim.here().await?.launch(launch).await?;
    tracing::info!(sandbox_id = %plan.id, vmm_pid = vmm.pid, op = "launch", elapsed_ms = millis(started), "VMM started");
    // From here on the VMM and its shim hold them.
    let (disk, network) = (std::mem::take(&mut parts.disk), std::mem::take(&mut parts.network));
    close(disk, network);

    let guest = Guest::new(SlotAddresses::of(slot.slot()).host, random_hex());
    let api = Vmm::new(&run_dir.join(API_SOCKET));
    let shim = parts.shim.here().await?;
    let up = async {
        let (version, envd) = tokio::try_join!(async { api.version().await.map_err(BuildError::from) }, async {
            guest.wait_until_up(boot_limit(plan)).await.map_err(BuildError::from)
        },)?;
        guest.init(identity(host, plan)).await?;
        Ok::<_, BuildError>(Versions {
            kernel: kernel.version.clone(),
            vmm: version,
            envd,
        })
    };
    let versions = tokio::select! {
        versions = up => versions?,
        end = shim.ended() => return Err(match end {
            VmmEnd::Reported(exit) => BuildError::VmmEnded(ExitSummary(*exit)),
            VmmEnd::ShimLost => BuildError::ShimLost,
        }),
    };
    gate.run({
        let (host, record) = (
            host.clone(),
            Record {
                phase: Phase::Running,
                ..record
            },
        );
        move || record.write(&host.layout)
    })
    .await?;
    tracing::info!(sandbox_id = %plan.id, op = "create", elapsed_ms = millis(started), "guest is up");
    Ok((guest, versions))
}

/// Finds image and kernel, and what size the disk has. Changes nothing.
fn find(host: &Host, plan: &Plan) -> Result<(Image, Sectors, Kernel), BuildError> {
    let image = images::open(&host.layout.images(), plan.template)?;
    let size = plan.disk_over(image.size).ok_or(BuildError::DiskTooSmall {
        asked: plan.disk.map_or(0, |disk| disk.0),
        image: image.size,
    })?;
    let dir = host.layout.kernels();
    let kernel = kernels::latest(&dir)
        .map_err(|source| FileError::new("reading", &dir, source))?
        .ok_or(BuildError::NoKernel { dir })?;
    Ok((image, size, kernel))
}

/// Whether an earlier sandbox of this id could not be removed.
fn left_behind(host: &Host, id: &SandboxId) -> bool {
    [host.layout.sandbox(id), host.layout.vm_run(id)]
        .iter()
        .any(|dir| dir.exists())
}

/// Makes a sandbox's directories, its record and its exception store.
fn make_files(host: &Host, record: &Record, cow_length: Bytes) -> Result<File, FileError> {
    let (layout, id) = (&host.layout, &record.plan.id);
    files::make_dir(&layout.sandbox(id))?;
    record.write(layout)?;
    tombstone::forget(layout, id)?;
    files::make_dir(&layout.vm(id))?;
    files::make_dir(&layout.vm_run(id))?;
    files::make_cow(&layout.cow(id), cow_length)
}

/// Lets the VM's uid into the directories it needs. Where it is our own uid, as with a child shim, it is in already.
fn admit(host: &Host, id: &SandboxId, uid: u32) -> Result<(), BuildError> {
    if uid == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    let layout = &host.layout;
    for (dir, access) in [
        (layout.sandbox(id), Access::Enter),
        (layout.vm(id), Access::Enter),
        (layout.vm_run(id), Access::Write),
    ] {
        acl::grant(&dir, uid, access).map_err(|source| FileError::new("opening to the VM", &dir, source))?;
    }
    Ok(())
}

async fn undo(host: &Arc<Host>, plan: &Plan, parts: Parts) -> Result<(), TeardownError> {
    let Parts {
        files,
        gate,
        shim,
        disk,
        network,
    } = parts;
    let (shim, disk, network) = tokio::join!(shim.settled(), disk.settled(), network.settled());
    let closed = tokio::task::spawn_blocking(move || drop((disk, network)));
    if let Some(shim) = shim {
        shim.kill().await.map_err(TeardownError::Vmm)?;
    }
    closed.await.expect("closing does not panic");
    if files {
        remove_files(host, &gate, &plan.id).await
    } else {
        Ok(())
    }
}

/// Takes a VM down, where there is a connection to one, and removes the sandbox's files.
///
/// # Errors
/// [`TeardownError`]; a repetition without a VM goes on where this ended.
pub async fn tear_down(host: &Arc<Host>, id: &SandboxId, vm: Option<Vm>) -> Result<(), TeardownError> {
    if let Some(vm) = vm {
        vm.shim.kill().await.map_err(TeardownError::Vmm)?;
    }
    remove_files(host, &Gate::default(), id).await
}

/// Removes a sandbox's files, once no shim of it answers any more: its socket is among them, and the only way back to it.
async fn remove_files(host: &Arc<Host>, gate: &Gate, id: &SandboxId) -> Result<(), TeardownError> {
    shim::end_at(&host.layout.vm_run(id).join(SHIM_SOCKET))
        .await
        .map_err(TeardownError::Vmm)?;
    let (host, id) = (host.clone(), id.clone());
    gate.run(move || files::remove_sandbox(&host.layout, &id))
        .await
        .map_err(TeardownError::Files)
}

/// File work of one build, a piece at a time. A piece runs on a blocking thread to its end even when the build that waits for it
/// is dropped; the undo that follows comes through the same gate, so it never overtakes that piece.
#[derive(Debug, Clone, Default)]
struct Gate(Arc<tokio::sync::Mutex<()>>);

impl Gate {
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let pass = self.0.clone().lock_owned().await;
        let piece = tokio::task::spawn_blocking(move || {
            let outcome = work();
            drop(pass);
            outcome
        });
        piece.await.expect("file work does not panic")
    }
}

/// Closes our copies of a disk and a network. Not on a runtime thread: closing the last copy of a tap takes its network down, which
/// takes tens of milliseconds.
fn close(disk: Held<Disk, CallError>, network: Held<Network, CallError>) {
    // Nobody waits for it.
    drop(tokio::task::spawn_blocking(move || drop((disk, network))));
}

/// How long a guest may take to come up: large memories take long to set up on a busy host.
fn boot_limit(plan: &Plan) -> Duration {
    Duration::from_secs(120.max(8 * u64::from(plan.memory.0).div_ceil(1024)))
}

fn identity(host: &Host, plan: &Plan) -> Identity {
    let mut entropy = vec![0; 256];
    fill_random(&mut entropy);
    Identity {
        sandbox: plan.id.clone(),
        template: plan.template.template.to_string(),
        user: plan.user.clone(),
        env: plan.env.clone(),
        resolvers: host.resolvers.clone(),
        entropy,
        lifecycle: random_hex(),
    }
}

fn random_hex() -> String {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fills `bytes` from the kernel's generator.
pub fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("getrandom works once the host has booted");
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

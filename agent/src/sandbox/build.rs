//! Building a sandbox, and taking one down.
//!
//! ```text
//! files (record, cow) --> shim --+--> open_disk (needs the shim's uid) --+--> launch --> envd up --> init --> record
//!                                +--> open_network ----------------------+
//! ```
//!
//! What a build has acquired stands in [`Parts`] from the moment it exists. A build that fails or is told to stop drops the step
//! under way and undoes the parts before it ends, so that its answer comes when nothing is left.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::ipc::PassedFd;
use roost_common::net::SlotAddresses;
use roost_common::privd::{EgressPolicy, Internet, OpenDisk, OpenNetwork};
use roost_common::shim::{API_SOCKET, Exit, Launch, Start, VmSpec};
use roost_common::units::Sectors;

use super::plan::Plan;
use super::record::{Phase, Record};
use super::{BuildFailure, TeardownError};
use crate::errors::{Chain, FileError};
use crate::guest::{Guest, GuestError, Identity};
use crate::host::acl::{self, Access};
use crate::host::images::{self, Image, ImageError};
use crate::host::kernels::{self, Kernel};
use crate::host::privd::CallError;
use crate::host::shim::{ExitSummary, ShimFault, ShimLink, VmmEnd};
use crate::host::slots::SlotLease;
use crate::host::{Host, files};
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

/// What a build has acquired so far.
#[derive(Debug, Default)]
struct Parts {
    /// The sandbox's directories may exist.
    files: bool,
    gate: Gate,
    shim: Option<ShimLink>,
    tap: Option<OwnedFd>,
    disk: Option<OwnedFd>,
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
            let shim = parts.shim.take().expect("a finished build has a shim");
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
    let record = Record::new(Phase::Creating, slot.slot().into(), plan.clone(), created_at_unix);
    parts.files = true;
    let gate = parts.gate.clone();
    let prepared = gate.run({
        let (host, record) = (host.clone(), record.clone());
        move || prepare(&host, &record)
    });
    // A shim needs nothing of the sandbox's, so it starts meanwhile.
    let (prepared, shim) = tokio::join!(prepared, host.shims.start());
    let Prepared {
        image,
        cow,
        size,
        kernel,
    } = prepared?;
    let shim = parts.shim.insert(shim?);

    let uid = shim.uid();
    let open_disk = host.privd.open_disk(OpenDisk {
        sandbox: plan.id.clone(),
        origin: PassedFd::from(OwnedFd::from(image.rootfs)),
        cow: PassedFd::from(OwnedFd::from(cow)),
        size,
        owner: uid,
    });
    let policy = EgressPolicy {
        internet: Internet::Open,
        resolvers: host.resolvers.clone(),
    };
    let open_network = host.privd.open_network(OpenNetwork {
        slot: slot.slot(),
        policy,
    });
    let (disk, network) = tokio::try_join!(open_disk, open_network)?;
    let owned = |fd: PassedFd| {
        fd.into_owned()
            .map_err(|source| FileError::new("duplicating", host.layout.vm_runs(), source))
    };
    let node = disk.node;
    let disk = parts.disk.insert(owned(disk.device)?);
    let tap = parts.tap.insert(owned(network.tap)?);

    let run_dir = host.layout.vm_run(&plan.id);
    let vm_dir = host.layout.vm(&plan.id);
    gate.run({
        let (host, id) = (host.clone(), plan.id.clone());
        move || admit(&host, &id, uid)
    })
    .await?;
    let duplicate = |fd: &OwnedFd| {
        fd.try_clone()
            .map(PassedFd::from)
            .map_err(|source| FileError::new("duplicating", host.layout.vm_runs(), source))
    };
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let launch = Launch {
        spec: VmSpec {
            sandbox: plan.id.clone(),
            vcpus: plan.vcpus,
            memory: plan.memory,
            disk_minor: node.minor,
            start: Start::Boot {
                kernel: path(&kernel.kernel),
                initramfs: kernel.initramfs.as_deref().map(path),
            },
            run_dir: path(&run_dir),
            vm_dir: path(&vm_dir),
        },
        tap: duplicate(tap)?,
        disk: duplicate(disk)?,
    };
    let vmm = shim.launch(launch).await?;
    tracing::info!(sandbox_id = %plan.id, vmm_pid = vmm.pid, op = "launch", elapsed_ms = millis(started), "VMM started");
    // From here on the VMM and its shim hold them.
    let (tap, disk) = (parts.tap.take(), parts.disk.take());
    drop(disk);
    close_tap(tap);

    let guest = Guest::new(SlotAddresses::of(slot.slot()).host, random_hex());
    let api = Vmm::new(&run_dir.join(API_SOCKET));
    let shim = parts.shim.as_mut().expect("inserted above");
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

/// What the files of a new sandbox give.
struct Prepared {
    image: Image,
    cow: std::fs::File,
    size: Sectors,
    kernel: Kernel,
}

/// Finds image and kernel, then makes the sandbox's directories, its record and its exception store.
fn prepare(host: &Host, record: &Record) -> Result<Prepared, BuildError> {
    let (layout, plan) = (&host.layout, &record.plan);
    let image = images::open(&layout.images(), plan.template)?;
    let size = plan.disk_over(image.size).ok_or(BuildError::DiskTooSmall {
        asked: plan.disk.map_or(0, |disk| disk.0),
        image: image.size,
    })?;
    let kernels_dir = layout.kernels();
    let kernel = kernels::latest(&kernels_dir)
        .map_err(|source| FileError::new("reading", &kernels_dir, source))?
        .ok_or(BuildError::NoKernel { dir: kernels_dir })?;
    // Left by an earlier sandbox of this id that could not be removed at the time.
    files::remove_sandbox(layout, &plan.id)?;
    files::make_dir(&layout.sandbox(&plan.id))?;
    record.write(layout)?;
    files::make_dir(&layout.vm(&plan.id))?;
    files::make_dir(&layout.vm_run(&plan.id))?;
    let length = size
        .cow_length()
        .expect("whole chunks, and at most the configured maximum");
    let cow = files::make_cow(&layout.cow(&plan.id), length)?;
    Ok(Prepared {
        image,
        cow,
        size,
        kernel,
    })
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
        tap,
        disk,
    } = parts;
    drop(disk);
    close_tap(tap);
    if let Some(shim) = shim {
        shim.kill().await.map_err(TeardownError::Vmm)?;
    }
    if files {
        remove_files(host, &gate, &plan.id).await
    } else {
        Ok(())
    }
}

/// Takes a VM down, and removes the sandbox's files. The end of the VMM, where it was still to come.
///
/// # Errors
/// [`TeardownError`]; a repetition with no VM goes on with the files.
pub async fn tear_down(host: &Arc<Host>, id: &SandboxId, vm: Option<Vm>) -> Result<Option<Exit>, TeardownError> {
    let exit = match vm {
        Some(vm) => vm.shim.kill().await.map_err(TeardownError::Vmm)?,
        None => None,
    };
    remove_files(host, &Gate::default(), id).await?;
    Ok(exit)
}

async fn remove_files(host: &Arc<Host>, gate: &Gate, id: &SandboxId) -> Result<(), TeardownError> {
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

/// Closing the last copy of a tap takes its network down and blocks for tens of milliseconds, which is no work for a runtime
/// thread.
fn close_tap(tap: Option<OwnedFd>) {
    if let Some(tap) = tap {
        tokio::task::spawn_blocking(move || drop(tap));
    }
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

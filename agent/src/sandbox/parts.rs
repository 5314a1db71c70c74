//! What a sandbox that starts acquires on its host, whether it boots or is restored: a shim, a disk, a network, a VMM.
//!
//! ```text
//! shim --+--> open_disk (needs the shim's uid) --+--> launch
//!        +--> open_network ----------------------+
//! ```
//!
//! Shim and network may have been made ahead ([`crate::host::ready`]).
//!
//! What is acquired stands in [`Parts`] from the moment it is asked for. A start that fails or is told to stop waits for what is
//! under way and lets go of it with the rest before it ends, so that its answer comes when nothing is left but what the kernel
//! removes in its own time.

use std::fs::File;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::ipc::PassedFd;
use roost_common::privd::{Disk, Network, OpenDisk, OpenNetwork};
use roost_common::shim::{Launch, RestoreMode, Start, VmSpec};
use roost_common::units::Sectors;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use super::build::fill_random;
use super::plan::Plan;
use super::record::Record;
use crate::errors::FileError;
use crate::guest::{Guest, Identity, Nonces};
use crate::host::Host;
use crate::host::acl::{self, Access};
use crate::host::privd::CallError;
use crate::host::shim::{NewShim, ShimFault, ShimLink};
use crate::host::slots::SlotLease;
use crate::trace::step;

/// A running VM with everything it has on this host. The disk and the network are held by shim and VMM, not here.
#[derive(Debug)]
pub struct Vm {
    /// Ends the VMM, and hears of its end.
    pub shim: ShimLink,
    /// Reaches the guest.
    pub guest: Arc<Guest>,
    /// Whether its memory may still be on its way.
    pub memory: MemoryLoad,
    /// Its record, as it is on disk: *running*.
    pub record: Record,
    /// What is written of it while it runs goes through here, in turn: one that takes too long goes on, and must not be the last.
    pub(super) writes: Gate,
}

impl Vm {
    /// A VM that runs, and whose record says so.
    pub(crate) fn new(shim: ShimLink, guest: Arc<Guest>, memory: MemoryLoad, record: Record) -> Self {
        Self {
            shim,
            guest,
            memory,
            record,
            writes: Gate::default(),
        }
    }
}

/// Whether all of a VM's memory is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryLoad {
    /// It is.
    Complete,
    /// Some may still be loaded, and a snapshot would miss it.
    UnderWay,
}

impl MemoryLoad {
    /// Of a VM that was started so.
    pub fn of(start: &Start) -> Self {
        match start {
            Start::Restore {
                memory: RestoreMode::OnDemand,
                ..
            } => Self::UnderWay,
            Start::Boot { .. } | Start::Restore { .. } => Self::Complete,
        }
    }
}

/// Which versions run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The guest's kernel.
    pub kernel: String,
    /// The VMM.
    pub vmm: String,
    /// The guest's envd.
    pub envd: String,
    /// Whether that repeats nonces, as its last `/init` showed. Of records before this was looked at nobody knows.
    #[serde(default)]
    pub nonces: Nonces,
    /// How the sandbox began.
    #[serde(default)]
    pub began: Began,
}

/// How a sandbox began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Began {
    /// It was booted, from a template that has no memory.
    #[default]
    Booted,
    /// It was restored from its template's memory.
    Restored,
    /// It was booted although its template has memory, for this reason.
    BootedInstead(String),
}

/// What has been acquired so far, or is being acquired.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) gate: Gate,
    shim: Held<NewShim, ShimFault>,
    disk: Held<Disk, CallError>,
    network: Held<Network, CallError>,
}

/// Why a part is missing.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// privd.
    #[error("no disk or network for the sandbox")]
    Privd(#[from] CallError),
    /// The shim.
    #[error("the VMM could not be launched")]
    Shim(#[from] ShimFault),
    /// A directory could not be opened to the VM.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The files of a disk.
pub(super) struct DiskFiles {
    /// The template's root filesystem.
    pub(super) origin: File,
    /// The exception store.
    pub(super) cow: File,
    /// The size of the disk.
    pub(super) size: Sectors,
}

impl Parts {
    /// Starts a shim, which needs nothing of the sandbox's, so that it can be first.
    pub(super) fn start_shim(&mut self, host: &Arc<Host>) {
        self.shim = Held::start({
            let host = host.clone();
            async move { step("shim", host.shim()).await }
        });
    }

    /// The shim that was started.
    pub(super) async fn shim(&mut self) -> Result<&mut NewShim, PartError> {
        Ok(self.shim.here().await?)
    }

    /// Gets disk and network, both at once, for the uid of the shim that was started, and lets that uid into the sandbox's
    /// directories. The minor number of the disk's node.
    pub(super) async fn acquire(
        &mut self,
        host: &Arc<Host>,
        plan: &Plan,
        slot: &SlotLease,
        files: DiskFiles,
    ) -> Result<u32, PartError> {
        let uid = self.shim.here().await?.link.uid();
        self.disk = Held::start({
            let (host, sandbox) = (host.clone(), plan.id.clone());
            async move {
                let request = OpenDisk {
                    sandbox,
                    origin: PassedFd::from(OwnedFd::from(files.origin)),
                    cow: PassedFd::from(OwnedFd::from(files.cow)),
                    size: files.size,
                    owner: uid,
                };
                step("open_disk", host.privd.open_disk(request)).await
            }
        });
        self.network = match slot.take_network() {
            Some(ready) => Held::Here(ready),
            None => Held::start({
                let request = OpenNetwork {
                    slot: slot.slot(),
                    policy: plan.egress.policy(&host.resolvers()),
                };
                let host = host.clone();
                async move { step("open_network", host.privd.open_network(request)).await }
            }),
        };
        let admitted = self.gate.run({
            let (host, id) = (host.clone(), plan.id.clone());
            move || admit(&host, &id, uid)
        });
        let admitted = async { step("admit", admitted).await.map_err(PartError::from) };
        let disk = async { self.disk.here().await.map_err(PartError::from) };
        let network = async { self.network.here().await.map_err(PartError::from) };
        let (disk, _, ()) = tokio::try_join!(disk, network, admitted)?;
        Ok(disk.node.minor)
    }

    /// Launches the VMM on what was acquired. From here on the VMM and its shim hold disk and network, and we do not.
    pub(super) async fn launch(&mut self, host: &Host, plan: &Plan, start: Start) -> Result<&mut ShimLink, PartError> {
        let began = Instant::now();
        let (disk, network) = (self.disk.here().await?, self.network.here().await?);
        let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let launch = Launch {
            spec: VmSpec {
                sandbox: plan.id.clone(),
                vcpus: plan.vcpus,
                memory: plan.memory,
                disk_minor: disk.node.minor,
                limits: host.config().rate_limits.into(),
                start,
                run_dir: path(&host.layout.vm_run(&plan.id)),
                vm_dir: path(&host.layout.vm(&plan.id)),
            },
            tap: network.tap.clone(),
            disk: disk.device.clone(),
        };
        let vmm = step("launch", self.shim.here().await?.link.launch(launch)).await?;
        tracing::info!(sandbox_id = %plan.id, vmm_pid = vmm.pid, op = "launch", elapsed_ms = millis(began), "VMM started");
        let (disk, network) = (std::mem::take(&mut self.disk), std::mem::take(&mut self.network));
        // Not on a runtime thread: closing the last copy of a tap takes its network down, which takes tens of milliseconds. Nobody
        // waits for it.
        drop(tokio::task::spawn_blocking(move || drop((disk, network))));
        Ok(&mut self.shim.here().await?.link)
    }

    /// Waits for what is under way, and lets go of all of it. The gate is returned: file work of this start may still be behind
    /// it.
    pub(super) async fn let_go(self) -> (Gate, Result<(), ShimFault>) {
        let Self {
            gate,
            shim,
            disk,
            network,
        } = self;
        let (shim, disk, network) = tokio::join!(shim.settled(), disk.settled(), network.settled());
        let closed = tokio::task::spawn_blocking(move || drop((disk, network)));
        let killed = match shim {
            Some(shim) => shim.link.kill().await,
            None => Ok(()),
        };
        closed.await.expect("closing does not panic");
        (gate, killed)
    }

    /// What a start that succeeded keeps.
    pub(super) async fn into_shim(self) -> ShimLink {
        let shim = self.shim.settled().await;
        shim.expect("a start that succeeded has a shim").link
    }
}

/// Lets the VM's uid into the directories it needs. Where it is our own uid, as with a child shim, it is in already.
fn admit(host: &Host, id: &SandboxId, uid: u32) -> Result<(), FileError> {
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

/// Takes away what [`Parts::acquire`] gave to a uid, and what a restore from `generation` did, for the VM has ended and the uid will be
/// another's.
///
/// # Errors
/// [`FileError`] naming the directory.
pub(super) fn shut_out(host: &Host, id: &SandboxId, generation: Option<u32>) -> Result<(), FileError> {
    let offered = generation
        .map(|number| host.layout.generation(id, number))
        .filter(|dir| dir.exists());
    for dir in [host.layout.vm(id), host.layout.sandbox(id)].into_iter().chain(offered) {
        acl::revoke(&dir).map_err(|source| FileError::new("closing to the VM", &dir, source))?;
    }
    Ok(())
}

/// Something that a task of its own acquires. The task goes on when the start that asked for it is dropped, so that an undo can
/// wait for what was under way: a call of privd cannot be taken back, only its result.
#[derive(Default)]
pub(super) enum Held<T, E> {
    #[default]
    Nothing,
    Coming(JoinHandle<Result<T, E>>),
    Here(T),
}

impl<T: Send + 'static, E: Send + 'static> Held<T, E> {
    fn start(work: impl Future<Output = Result<T, E>> + Send + 'static) -> Self {
        Self::Coming(tokio::spawn(work.in_current_span()))
    }

    /// Waits for it. Safe to cancel.
    pub(super) async fn here(&mut self) -> Result<&mut T, E> {
        if let Self::Coming(task) = self {
            let outcome = task.await.expect("acquiring does not panic");
            *self = Self::Nothing;
            *self = Self::Here(outcome?);
        }
        match self {
            Self::Here(thing) => Ok(thing),
            Self::Nothing | Self::Coming(_) => unreachable!("it was started, and a failure ended the start"),
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

/// File work of one start or stop, a piece at a time. A piece runs on a blocking thread to its end even when whoever waits for it
/// is dropped; the undo that follows comes through the same gate, so it never overtakes that piece. So a start sets no limit to its
/// pieces, but where a piece keeps one itself: an undo would wait for what was given up all the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Gate(Arc<tokio::sync::Mutex<()>>);

impl Gate {
    pub(super) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let pass = self.0.clone().lock_owned().await;
        let piece = tokio::task::spawn_blocking(move || {
            let outcome = work();
            drop(pass);
            outcome
        });
        piece.await.expect("file work does not panic")
    }
}

/// How long a guest may take to come up: large memories take long to set up on a busy host.
pub(super) fn boot_limit(host: &Host, plan: &Plan) -> Duration {
    let least = u64::from(host.config().boot_timeout_sec);
    Duration::from_secs(least.max(8 * u64::from(plan.memory.0).div_ceil(1024)))
}

/// What a guest is told when it comes up: new entropy and a new lifecycle each time.
pub(super) fn identity(host: &Host, plan: &Plan) -> Identity {
    let mut entropy = vec![0; 256];
    fill_random(&mut entropy);
    Identity {
        sandbox: plan.id.clone(),
        template: plan.template.template.to_string(),
        user: plan.user.clone(),
        env: plan.env.clone(),
        resolvers: host.resolvers().to_vec(),
        entropy,
        lifecycle: super::build::random_hex(),
    }
}

pub(super) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

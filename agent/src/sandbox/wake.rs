//! Starting a VM from a snapshot of memory, be it a paused sandbox's or a copy of a template's: what is checked before, what the VMM is
//! given, and how its guest wakes. What comes after, and what a failure means, is the caller's.

use std::path::Path;
use std::time::Duration;

use roost_common::ids::SandboxId;
use roost_common::shim::{RestoreMode, Start};

use crate::config::RestoreMemory;
use crate::errors::FileError;
use crate::failpoint::reach;
use crate::host::acl::{self, Access};
use crate::host::{Host, kernels};
use crate::snapshot::{self, Cpu, HostFacts, Manifest, Misfit, RestoreConfig, Size};
use crate::trace::step;
use crate::vmm::{self, Vmm, VmmError};

/// How long a restored guest's envd may take to answer: it was running when the snapshot was taken.
pub(super) const WAKE_LIMIT: Duration = Duration::from_secs(60);
/// Whether a VMM that loads memory on demand can learn of what is missing. Not the device itself: the agent's own `/dev` has none.
const USERFAULTFD: &str = "/sys/class/misc/userfaultfd";

/// A snapshot of memory, and what it meets on this host.
pub(super) struct Memories {
    pub(super) manifest: Manifest,
    facts: HostFacts,
}

/// The names of a wake's steps, for tests.
pub(super) struct Steps {
    pub(super) restored: &'static str,
    pub(super) woken: &'static str,
}

impl Memories {
    /// Blocks.
    pub(super) fn new(host: &Host, manifest: Manifest) -> Result<Self, FileError> {
        let facts = HostFacts {
            cpu: Cpu::of_this_host()?,
            kernel: kernels::of_version(&host.layout.kernels(), &manifest.about.kernel_version),
        };
        Ok(Self { manifest, facts })
    }

    /// Whether it can wake here as a VM of this size, as far as can be told without a VMM.
    pub(super) fn fits(&self, size: Size) -> Result<(), Misfit> {
        self.manifest.fits(&self.facts, size)
    }

    /// Whether a VMM of this version can be given it: the last that is asked before anything of it is touched.
    pub(super) fn fits_vmm(&self, version: &str) -> Result<(), Misfit> {
        self.manifest.fits_vmm(version)
    }

    /// Writes the VMM's configuration beside the memory, a generation of the sandbox, and lets the VM's uid reach both. How the VMM is
    /// started then. Blocks.
    pub(super) fn offer(
        &self,
        host: &Host,
        id: &SandboxId,
        generation: u32,
        disk_minor: u32,
        uid: u32,
    ) -> Result<Start, FileError> {
        let kernel = self
            .facts
            .kernel
            .as_ref()
            .expect("a snapshot fits only where its kernel is");
        let about = &self.manifest.about;
        let directory = host.layout.generation(id, generation);
        let config = RestoreConfig {
            size: about.size,
            devices: about.devices,
            disk_minor,
            limits: host.config().rate_limits.into(),
            kernel: &kernel.kernel,
            initramfs: kernel.initramfs.as_deref(),
        };
        snapshot::write_config(&directory, &config)?;
        if uid != nix::unistd::geteuid().as_raw() {
            acl::grant(&directory, uid, Access::Enter)
                .map_err(|source| FileError::new("opening to the VM", &directory, source))?;
        }
        Ok(Start::Restore {
            attempt: generation,
            memory: mode(host.config().restore_memory, about.restore),
            initramfs: kernel
                .initramfs
                .as_ref()
                .map(|path| path.to_string_lossy().into_owned()),
        })
    }
}

/// Waits until a VMM has loaded what it was [offered](Memories::offer), and lets its guest run. The VMM's version.
pub(super) async fn wake<E>(api: &Vmm, steps: &Steps) -> Result<String, E>
where
    E: From<VmmError> + From<FileError>,
{
    step("load", api.restored()).await?;
    // Asked before it runs its guest, so the guest has no say in it.
    let version = api.version(vmm::CALL_LIMIT).await?;
    reach(steps.restored).await?;
    step("wake", api.resume()).await?;
    reach(steps.woken).await?;
    Ok(version)
}

/// On demand where that is wanted, and the snapshot and the host can.
fn mode(wanted: RestoreMemory, most: RestoreMode) -> RestoreMode {
    let on_demand = wanted == RestoreMemory::OnDemand && most == RestoreMode::OnDemand;
    if on_demand && Path::new(USERFAULTFD).exists() {
        RestoreMode::OnDemand
    } else {
        RestoreMode::Copy
    }
}

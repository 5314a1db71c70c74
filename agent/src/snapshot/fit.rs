//! Whether a snapshot can wake here, told before a VMM is given it.

use roost_common::units::{Mebibytes, Sectors, Vcpus};

use super::cpu::Cpu;
use super::manifest::{Manifest, Size};
use crate::host::kernels::Kernel;
use crate::vmm::version::reads_state;

/// Most flags that a [`Misfit`] names.
const MAX_NAMED: usize = 8;

/// What a snapshot meets on a host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// The CPU.
    pub cpu: Cpu,
    /// The kernel of the snapshot's version, where this host has it: [`kernels::of_version`](crate::host::kernels::of_version).
    pub kernel: Option<Kernel>,
}

/// Why a snapshot cannot wake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The VMM cannot be relied on to read its state.
    #[error("it was made by version {snapshot} of the VMM, whose state version {host} may not understand")]
    Vmm {
        /// That made it.
        snapshot: String,
        /// Of this host.
        host: String,
    },
    /// The guest's kernel is not there for the next reboot.
    #[error("its kernel, version {version}, is not on this host")]
    Kernel {
        /// The kernel's version.
        version: String,
    },
    /// The VMM opens the initramfs again when it restores.
    #[error("the initramfs of its kernel, version {version}, is not on this host")]
    Initramfs {
        /// The kernel's version.
        version: String,
    },
    /// Another kind of CPU.
    #[error("it was made on another CPU ({snapshot}) than this host has ({host})")]
    Cpu {
        /// That it ran on.
        snapshot: String,
        /// Of this host.
        host: String,
    },
    /// The guest may use what is not there.
    #[error("this host's CPU lacks features that the snapshot's had: {}{}", named.join(" "), more(*unnamed))]
    CpuFlags {
        /// Some of them.
        named: Vec<String>,
        /// How many others there are.
        unnamed: usize,
    },
    /// Other vCPUs.
    #[error("it has {snapshot} vCPUs, not {wanted}")]
    Vcpus {
        /// Its own.
        snapshot: Vcpus,
        /// The sandbox's.
        wanted: Vcpus,
    },
    /// Other memory.
    #[error("it has {snapshot} of memory, not {wanted}")]
    Memory {
        /// Its own.
        snapshot: Mebibytes,
        /// The sandbox's.
        wanted: Mebibytes,
    },
    /// Another disk.
    #[error("its disk has {snapshot}, not {wanted}")]
    Disk {
        /// Its own.
        snapshot: Sectors,
        /// The sandbox's.
        wanted: Sectors,
    },
}

fn more(unnamed: usize) -> String {
    match unnamed {
        0 => String::new(),
        others => format!(" and {others} more"),
    }
}

impl Manifest {
    /// Whether a VMM of this version can be given the snapshot.
    ///
    /// # Errors
    /// [`Misfit::Vmm`].
    pub fn fits_vmm(&self, version: &str) -> Result<(), Misfit> {
        let snapshot = &self.about.vmm_version;
        if reads_state(version, snapshot) {
            Ok(())
        } else {
            Err(Misfit::Vmm {
                snapshot: snapshot.clone(),
                host: version.to_owned(),
            })
        }
    }

    /// Whether the snapshot can wake on `host` as a sandbox of this size, whatever VMM that has.
    ///
    /// # Errors
    /// The first [`Misfit`].
    pub fn fits(&self, host: &HostFacts, wanted: Size) -> Result<(), Misfit> {
        let about = &self.about;
        let version = || about.kernel_version.clone();
        match &host.kernel {
            Some(kernel) if kernel.version == about.kernel_version => {
                if about.initramfs && kernel.initramfs.is_none() {
                    return Err(Misfit::Initramfs { version: version() });
                }
            }
            Some(_) | None => return Err(Misfit::Kernel { version: version() }),
        }
        cpu_fits(&about.cpu, &host.cpu)?;
        let size = about.size;
        if size.vcpus != wanted.vcpus {
            return Err(Misfit::Vcpus {
                snapshot: size.vcpus,
                wanted: wanted.vcpus,
            });
        }
        if size.memory != wanted.memory {
            return Err(Misfit::Memory {
                snapshot: size.memory,
                wanted: wanted.memory,
            });
        }
        if size.disk != wanted.disk {
            return Err(Misfit::Disk {
                snapshot: size.disk,
                wanted: wanted.disk,
            });
        }
        Ok(())
    }
}

/// A guest sees the host's CPU, and has chosen code by what it saw when it booted. The stepping may differ: what a guest could
/// tell by it is in the flags.
fn cpu_fits(snapshot: &Cpu, host: &Cpu) -> Result<(), Misfit> {
    fn kind(cpu: &Cpu) -> (&str, &str, u32, u32) {
        (&cpu.vendor, &cpu.model_name, cpu.family, cpu.model)
    }
    if kind(snapshot) != kind(host) {
        let name = |cpu: &Cpu| format!("{}, family {}, model {}", cpu.model_name, cpu.family, cpu.model);
        return Err(Misfit::Cpu {
            snapshot: name(snapshot),
            host: name(host),
        });
    }
    let mut missing: Vec<String> = snapshot.flags.difference(&host.flags).cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let unnamed = missing.len().saturating_sub(MAX_NAMED);
    missing.truncate(MAX_NAMED);
    Err(Misfit::CpuFlags {
        named: missing,
        unnamed,
    })
}

#[cfg(test)]
mod tests {
    use roost_common::units::Bytes;

    use super::*;
    use crate::snapshot::manifest::Files;
    use crate::snapshot::manifest::tests::about;

    fn manifest() -> Manifest {
        Manifest::new(about(), Files::new(b"{}", Bytes(0), Bytes(0), Bytes(0)))
    }

    fn host() -> HostFacts {
        HostFacts {
            cpu: about().cpu,
            kernel: Some(Kernel {
                version: "6.1.0-41".into(),
                kernel: "/kernels/vmlinux-6.1.0-41".into(),
                initramfs: Some("/kernels/initramfs-6.1.0-41".into()),
            }),
        }
    }

    fn misfit(change: impl FnOnce(&mut HostFacts, &mut Size)) -> String {
        let (mut host, mut size) = (host(), about().size);
        change(&mut host, &mut size);
        manifest().fits(&host, size).expect_err("it fits").to_string()
    }

    #[test]
    fn a_snapshot_fits_where_it_was_made() {
        assert_eq!(manifest().fits(&host(), about().size), Ok(()));
        assert_eq!(manifest().fits_vmm("v53.0"), Ok(()));
    }

    #[test]
    fn every_misfit_says_what_it_is() {
        for (found, clause) in [
            (
                manifest()
                    .fits_vmm("54.0.0")
                    .expect_err("another major version")
                    .to_string(),
                "it was made by version 53.0.0 of the VMM, whose state version 54.0.0 may not understand",
            ),
            (
                misfit(|host, _| host.kernel = None),
                "its kernel, version 6.1.0-41, is not on this host",
            ),
            (
                misfit(|host, _| host.kernel.as_mut().expect("set").version = "6.1.0-42".into()),
                "its kernel, version 6.1.0-41, is not on this host",
            ),
            (
                misfit(|host, _| host.kernel.as_mut().expect("set").initramfs = None),
                "the initramfs of its kernel, version 6.1.0-41, is not on this host",
            ),
            (
                misfit(|host, _| host.cpu.model = 106),
                "it was made on another CPU (Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz, family 6, model 85) than this host has \
                 (Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz, family 6, model 106)",
            ),
            (
                misfit(|host, _| host.cpu.flags.retain(|flag| flag != "avx512f")),
                "this host's CPU lacks features that the snapshot's had: avx512f",
            ),
            (misfit(|_, size| size.vcpus = Vcpus(4)), "it has 2 vCPUs, not 4"),
            (
                misfit(|_, size| size.memory = Mebibytes(128)),
                "it has 64 MiB of memory, not 128 MiB",
            ),
            (
                misfit(|_, size| size.disk = Sectors(8)),
                "its disk has 2097152 sectors, not 8 sectors",
            ),
        ] {
            assert_eq!(found, clause);
        }
        for change in [
            (|cpu| cpu.vendor = "AuthenticAMD".into()) as fn(&mut Cpu),
            |cpu| cpu.family = 25,
            |cpu| cpu.model_name = "another".into(),
        ] {
            assert!(misfit(|host, _| change(&mut host.cpu)).starts_with("it was made on another CPU"));
        }
    }

    #[test]
    fn at_most_eight_flags_are_named() {
        let mut manifest = manifest();
        manifest
            .about
            .cpu
            .flags
            .extend((10..30).map(|number| format!("x{number}")));
        let error = manifest.fits(&host(), about().size).expect_err("flags are missing");
        let clause =
            "this host's CPU lacks features that the snapshot's had: x10 x11 x12 x13 x14 x15 x16 x17 and 12 more";
        assert_eq!(error.to_string(), clause);
    }

    #[test]
    fn more_flags_another_stepping_and_no_initramfs_where_none_was_do_no_harm() {
        let (mut host, mut manifest) = (host(), manifest());
        host.cpu.flags.insert("amx".into());
        host.cpu.stepping += 1;
        manifest.about.initramfs = false;
        host.kernel.as_mut().expect("set").initramfs = None;
        assert_eq!(manifest.fits(&host, about().size), Ok(()));
    }
}

//! The VMM's own cgroup, and how much of the host it may use: memory for its guest and itself, processor time for its vCPUs, threads,
//! and where the host limits disks, its disk.
//!
//! ```text
//! …/roost-vmmshim@N.service   delegated by systemd to the uid of this VM
//! ├── shim                    this process: outside the limits, so that it lives to tell what they did
//! └── vmm                     the VMM, from before its program is executed
//! ```
//!
//! A cgroup that shares its controllers out may hold no processes itself, hence two. Nothing here needs removing: systemd removes
//! the unit's cgroup with all below it. Not here: how fast a guest's disk and network are, which its VMM keeps. What is here holds for
//! a VMM that was taken over too; of its network there is no such limit.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use roost_common::shim::{RateLimits, VmSpec};
use roost_common::units::{Mebibytes, Vcpus};
use serde::Deserialize;

use crate::spec::block_device;

const ROOT: &str = "/sys/fs/cgroup";
const SHIM: &str = "shim";
const VMM: &str = "vmm";
/// What the agent reads of a VM, and what is limited.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];
/// Length of the period in which processor time is counted, in µs: the kernel's default.
const PERIOD: u64 = 100_000;

/// What a kind of VMM needs beside its guest's memory and its vCPUs.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Overhead {
    /// In MiB, on top of a 32nd of the guest's memory, which the kernel's tables for it take.
    memory: u64,
    /// Threads other than vCPUs.
    threads: u64,
}

/// Where a VMM starts.
#[derive(Debug)]
pub(crate) struct VmmCgroup {
    /// As in `/proc/self/cgroup`.
    pub(crate) name: String,
    /// Its `cgroup.procs`: who writes `0` to it is in it.
    pub(crate) entrance: File,
}

impl VmmCgroup {
    /// Makes it, inside the cgroup of this process, or takes the one that an earlier attempt has made.
    ///
    /// # Errors
    /// Where there is no cgroup v2, it is not this uid's to divide, or `disk` is to be limited and the kernel cannot.
    pub(crate) fn make(spec: &VmSpec, overhead: Overhead, disk: BorrowedFd<'_>) -> io::Result<Self> {
        let own = own();
        let unit = own.strip_suffix(&format!("/{SHIM}")).unwrap_or(&own);
        let path = |name: &str| PathBuf::from(format!("{ROOT}{unit}/{name}"));
        make_directory(&path(SHIM))?;
        fs::write(path(SHIM).join("cgroup.procs"), "0")?;
        let available = fs::read_to_string(path("cgroup.controllers"))?;
        let shared = |name: &&&str| available.split_whitespace().any(|found| found == **name);
        for controller in CONTROLLERS.iter().filter(shared) {
            fs::write(path("cgroup.subtree_control"), format!("+{controller}"))?;
        }
        let vmm = path(VMM);
        make_directory(&vmm)?;
        for (file, limit) in limits(spec.vcpus, spec.memory, overhead) {
            fs::write(vmm.join(file), limit)?;
        }
        // Something else only under a foreign profile.
        if let Some(device) = block_device(disk)
            && let Some(limit) = disk_limit(spec.limits, device)
        {
            fs::write(vmm.join("io.max"), limit)?;
        }
        Ok(Self {
            name: format!("{unit}/{VMM}"),
            entrance: File::options().write(true).open(vmm.join("cgroup.procs"))?,
        })
    }
}

/// Files of a VMM's cgroup and what is written to them.
fn limits(vcpus: Vcpus, memory: Mebibytes, overhead: Overhead) -> [(&'static str, String); 3] {
    let (vcpus, memory) = (u64::from(vcpus.0), u64::from(memory.0));
    let memory = memory + memory / 32 + overhead.memory;
    // One processor more than vCPUs: its devices have threads of their own.
    let time = (vcpus + 1) * PERIOD;
    [
        ("memory.max", (memory << 20).to_string()),
        ("cpu.max", format!("{time} {PERIOD}")),
        ("pids.max", (vcpus + overhead.threads).to_string()),
    ]
}

/// The line of `io.max` for a disk with these limits, if there are any. The kernel counts reads and writes apart, so together they may be
/// twice what the VMM keeps its guest to.
fn disk_limit(limits: RateLimits, (major, minor): (u64, u64)) -> Option<String> {
    let pair = |unit: &str, limit: Option<NonZeroU64>| limit.map(|limit| format!(" r{unit}={limit} w{unit}={limit}"));
    let (bytes, operations) = (pair("bps", limits.disk_bytes), pair("iops", limits.disk_operations));
    if bytes.is_none() && operations.is_none() {
        return None;
    }
    let [bytes, operations] = [bytes, operations].map(Option::unwrap_or_default);
    Some(format!("{major}:{minor}{bytes}{operations}"))
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// This process's cgroup in the unified hierarchy; empty where there is none.
pub(crate) fn own() -> String {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or_default()
        .to_owned()
}

/// How often the kernel has killed for memory in a cgroup.
pub(crate) fn oom_kills(cgroup: &str) -> u64 {
    let events = fs::read_to_string(format!("{ROOT}{cgroup}/memory.events")).unwrap_or_default();
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_may_use_what_its_guest_was_given_and_its_own_overhead() {
        let (vcpus, memory) = (Vcpus(2), Mebibytes(1024));
        let overhead = Overhead {
            memory: 128,
            threads: 64,
        };
        let limits = limits(vcpus, memory, overhead);
        let wanted = [("memory.max", (1024_u64 + 32 + 128) << 20), ("pids.max", 66)];
        for (file, limit) in wanted {
            assert!(limits.contains(&(file, limit.to_string())), "{limits:?}");
        }
        assert!(limits.contains(&("cpu.max", "300000 100000".into())), "{limits:?}");
    }

    #[test]
    fn a_disk_has_limits_where_its_host_has_some() {
        let limits = |bytes, operations| RateLimits {
            disk_bytes: NonZeroU64::new(bytes),
            disk_operations: NonZeroU64::new(operations),
            network_bytes: NonZeroU64::new(1),
        };
        let line = |bytes, operations| disk_limit(limits(bytes, operations), (253, 7));
        assert_eq!(line(0, 0), None);
        assert_eq!(line(4096, 0).as_deref(), Some("253:7 rbps=4096 wbps=4096"));
        assert_eq!(line(0, 50).as_deref(), Some("253:7 riops=50 wiops=50"));
        assert_eq!(
            line(4096, 50).as_deref(),
            Some("253:7 rbps=4096 wbps=4096 riops=50 wiops=50")
        );
    }
}

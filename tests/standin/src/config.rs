//! The fields of cloud-hypervisor's `VmConfig` that matter here, under its JSON names: what `vm.info` answers, what a
//! snapshot's `config.json` holds, and what a restore reads. Fields that we do not know are skipped when reading, since
//! a `config.json` may have been written for the real one.

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmConfig {
    pub(crate) cpus: Cpus,
    pub(crate) memory: Memory,
    pub(crate) payload: Payload,
    pub(crate) disks: Vec<Disk>,
    pub(crate) net: Vec<Net>,
    pub(crate) rng: Rng,
    #[serde(default)]
    pub(crate) balloon: Option<Balloon>,
    pub(crate) serial: Console,
    pub(crate) console: Console,
}

/// `--cpus`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Cpus {
    pub(crate) boot_vcpus: u32,
    pub(crate) max_vcpus: u32,
    #[serde(default)]
    pub(crate) nested: bool,
}

/// `--memory`; the size in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Memory {
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) shared: bool,
    #[serde(default)]
    pub(crate) thp: bool,
}

/// `--kernel`, `--initramfs`, `--cmdline`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Payload {
    pub(crate) kernel: PathBuf,
    #[serde(default)]
    pub(crate) initramfs: Option<PathBuf>,
    #[serde(default)]
    pub(crate) cmdline: Option<String>,
}

/// `--disk`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) readonly: bool,
    #[serde(default)]
    pub(crate) id: Option<String>,
    #[serde(default)]
    pub(crate) image_type: Option<String>,
    #[serde(default)]
    pub(crate) rate_limiter_config: RateLimiter,
}

/// How fast a device may be.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct RateLimiter {
    /// Bytes.
    #[serde(default)]
    pub(crate) bandwidth: Option<Bucket>,
    /// Requests.
    #[serde(default)]
    pub(crate) ops: Option<Bucket>,
}

/// So much in so many milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Bucket {
    pub(crate) size: u64,
    pub(crate) refill_time: u64,
}

impl Bucket {
    /// How much a second.
    pub(crate) fn rate(self) -> u64 {
        self.size * 1000 / self.refill_time.max(1)
    }
}

/// `--net`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Net {
    #[serde(default)]
    pub(crate) id: Option<String>,
    pub(crate) mac: String,
    /// Numbers of taps. Those in a file mean nothing to another process: a restore passes its own.
    #[serde(default)]
    pub(crate) fds: Option<Vec<RawFd>>,
}

/// `--rng`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rng {
    pub(crate) src: PathBuf,
}

/// `--balloon`; the size in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Balloon {
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) free_page_reporting: bool,
}

/// `--serial`, `--console`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Console {
    /// `Off`, `Null`, `Tty`.
    pub(crate) mode: String,
}

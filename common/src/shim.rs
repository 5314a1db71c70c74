//! The messages between the agent and one vmmshim: packets of [`crate::ipc`], one request answered by one reply, and
//! [`FromShim::Exited`] whenever the VMM ends.
//!
//! ```text
//! connect --> Hello                     (the shim's first packet; its credentials tell the VM's uid)
//! Launch  --> Started | Refused         once
//! Status  --> Status
//! Kill    --> Killed                    then Exited when the VMM has gone
//! Lend    --> Lent | Refused
//! Publish --> Published | Refused
//!             Exited                    the last packet; also in the file `exit` of the sandbox's run directory
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::SandboxId;
use crate::ipc::PassedFd;
use crate::units::{Mebibytes, Vcpus};

/// Version of these messages; a shim of another version is told to end and counted as such.
pub const PROTOCOL: u32 = 1;

/// Where systemd listens for the agent and starts a shim for each connection.
pub const SOCKET: &str = "/run/roost/vmmshim.sock";

/// Name of the VMM's API socket in a sandbox's run directory.
pub const API_SOCKET: &str = "api.sock";
/// Name of the shim's own listener in a sandbox's run directory, for an agent that comes later.
pub const SHIM_SOCKET: &str = "shim.sock";
/// Name of the exit record in a sandbox's run directory.
pub const EXIT_FILE: &str = "exit";
/// Most bytes of a console or log tail in [`Exit`].
pub const MAX_TAIL: usize = 16 * 1024;

/// Agent to shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToShim {
    /// Launches the VMM; once in a shim's life.
    Launch(Box<Launch>),
    /// Asks what the shim holds.
    Status,
    /// Kills the VMM (SIGKILL through its pidfd), or ends a shim that has launched nothing.
    Kill,
    /// Asks for a copy of a descriptor that the shim holds.
    Lend(Lendable),
    /// Opens the files of a snapshot attempt (`vm/<n>/`) to the agent: mode 0640.
    Publish {
        /// Number of the attempt's directory.
        attempt: u32,
    },
}

/// Everything a VMM is launched with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Launch {
    /// What to run.
    pub spec: VmSpec,
    /// The sandbox's network.
    pub tap: PassedFd,
    /// The sandbox's disk.
    pub disk: PassedFd,
}

/// What to run. The shim builds the VMM's arguments from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The sandbox; names the directories.
    pub sandbox: SandboxId,
    /// Virtual CPUs.
    pub vcpus: Vcpus,
    /// Guest memory.
    pub memory: Mebibytes,
    /// Minor number of the disk's node, `/dev/dm-N`.
    pub disk_minor: u32,
    /// Boot or restore.
    pub start: Start,
    /// The sandbox's run directory, `/run/roost/vm/<sandbox>`: the shim makes its sockets and the exit file in it.
    pub run_dir: String,
    /// The sandbox's VM directory, `…/sandboxes/<sandbox>/vm`: the VMM's only writable place.
    pub vm_dir: String,
}

/// How a VM starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// Boots a kernel.
    Boot {
        /// The kernel's file.
        kernel: String,
        /// The initramfs's file.
        initramfs: Option<String>,
    },
    /// Restores a snapshot; the VM stays paused until it is resumed.
    Restore {
        /// Number of the attempt below the VM directory that holds it.
        attempt: u32,
        /// Whether guest memory is loaded page by page as it is touched, or up front.
        memory: RestoreMode,
    },
}

/// How guest memory comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoreMode {
    /// Copied before the guest runs.
    Copy,
    /// Loaded on demand through userfaultfd.
    OnDemand,
}

/// What a shim lends copies of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lendable {
    /// The disk's descriptor.
    Disk,
    /// The tap.
    Tap,
}

/// Shim to agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromShim {
    /// The first packet on every connection.
    Hello {
        /// [`PROTOCOL`] of the shim.
        protocol: u32,
    },
    /// The VMM runs: it has been executed under its confinement.
    Started(Started),
    /// Answer to [`ToShim::Status`].
    Status(Status),
    /// Answer to [`ToShim::Kill`]: the signal has been sent, or there was nothing to kill.
    Killed,
    /// Answer to [`ToShim::Lend`].
    Lent(PassedFd),
    /// Answer to [`ToShim::Publish`].
    Published,
    /// The request was refused or failed; nothing has changed.
    Refused(ShimError),
    /// The VMM has ended.
    Exited(Exit),
}

/// A launched VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Process id of the VMM, in the shim's pid namespace.
    pub pid: u32,
    /// The uid it runs as, as the shim sees it.
    pub uid: u32,
    /// The cgroup of the VMM, as in `/proc/self/cgroup` (`/system.slice/…`).
    pub cgroup: String,
}

/// What a shim holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// Nothing has been launched.
    Idle,
    /// The VMM runs.
    Running {
        /// What was launched.
        spec: VmSpec,
        /// The process.
        started: Started,
    },
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Its wait status.
    pub wait: WaitStatus,
    /// How often the kernel killed for memory in its cgroup; 0 also where there is no cgroup of its own.
    pub oom_kills: u64,
    /// The end of the guest's serial console, at most [`MAX_TAIL`] bytes, unparsed: a guest wrote it.
    pub console: Vec<u8>,
    /// The end of the VMM's own messages, at most [`MAX_TAIL`] bytes, unparsed.
    pub log: Vec<u8>,
}

/// A process's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitStatus {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
}

impl fmt::Display for WaitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Signaled(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Why a shim refuses, or what failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ShimError {
    /// A second Launch.
    #[error("this shim has launched its VMM already")]
    AlreadyLaunched,
    /// A request that needs a running VMM.
    #[error("no VMM runs under this shim")]
    NotRunning,
    /// A value of the spec is out of bounds.
    #[error("{field} of the spec is out of bounds")]
    BadSpec {
        /// Which field.
        field: SpecField,
    },
    /// A step of the launch failed, in the shim or in the child before exec.
    #[error("{step} failed (errno {errno})")]
    Step {
        /// Which step.
        step: LaunchStep,
        /// Its error.
        errno: i32,
    },
    /// The kernel offers no Landlock, or an ABI that is too old.
    #[error("Landlock is not available, and a VMM is not started without it")]
    NoLandlock,
    /// The confinement profile that the shim was started with cannot be used.
    #[error("the confinement profile cannot be used")]
    BadProfile,
}

/// A field of [`VmSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SpecField {
    /// `vcpus`.
    Vcpus,
    /// `memory`.
    Memory,
    /// `start`'s files.
    Start,
    /// `run_dir` or `vm_dir`.
    Directory,
    /// `disk_minor` is another device than the disk's descriptor.
    Disk,
}

impl fmt::Display for SpecField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::Start => "start",
            Self::Directory => "directory",
            Self::Disk => "disk",
        })
    }
}

/// The steps of a launch, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
#[expect(missing_docs, reason = "each variant is the step of that name; `Display` is the doc")]
pub enum LaunchStep {
    OpenFiles = 0,
    BindApiSocket = 1,
    BindShimSocket = 2,
    OpenPipes = 3,
    BuildRuleset = 4,
    Fork = 5,
    DeathSignal = 6,
    ResourceLimits = 7,
    DropCapabilities = 8,
    NoNewPrivileges = 9,
    Landlock = 10,
    Seccomp = 11,
    ArrangeDescriptors = 12,
    Exec = 13,
    WatchProcess = 14,
    PublishFiles = 15,
    LendDescriptor = 16,
}

impl fmt::Display for LaunchStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenFiles => "opening the files of the VMM",
            Self::BindApiSocket => "binding the VMM's API socket",
            Self::BindShimSocket => "binding the shim's socket",
            Self::OpenPipes => "opening pipes",
            Self::BuildRuleset => "building the Landlock ruleset",
            Self::Fork => "forking",
            Self::DeathSignal => "setting the death signal",
            Self::ResourceLimits => "setting resource limits",
            Self::DropCapabilities => "dropping capabilities",
            Self::NoNewPrivileges => "setting no_new_privs",
            Self::Landlock => "entering the Landlock domain",
            Self::Seccomp => "installing the seccomp filter",
            Self::ArrangeDescriptors => "arranging descriptors",
            Self::Exec => "executing the VMM",
            Self::WatchProcess => "watching the VMM",
            Self::PublishFiles => "opening snapshot files to the agent",
            Self::LendDescriptor => "lending a descriptor",
        })
    }
}

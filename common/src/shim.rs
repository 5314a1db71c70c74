//! The messages between the agent and one vmmshim: packets of [`crate::ipc`], one request answered by one reply, and
//! [`FromShim::Exited`] whenever the VMM ends.
//!
//! ```text
//! connect --> Hello                     (the shim's first packet; its credentials tell the VM's uid)
//! Version --> Version | Refused         before a launch
//! Program --> Program                   before a launch
//! Launch  --> Started | Refused         once
//! Status  --> Status
//! Kill    --> Killed                    then Exited when the VMM has gone
//! Lend    --> Lent | Refused
//! Publish --> Published | Refused
//!             Exited                    the last packet; also in the file `exit` of the sandbox's run directory
//! ```

use std::borrow::Cow;
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fmt, fs, io};

use serde::{Deserialize, Serialize};

use crate::ids::SandboxId;
use crate::ipc::PassedFd;
use crate::units::{Mebibytes, Vcpus};

/// Version of these messages. They reach beyond one version of roost: a shim stays what it was when an upgrade puts a new agent in front of it.
/// So a change that an earlier side would not understand raises this, and an agent leaves the VM of a shim of another version alone. `Hello`
/// with its `protocol`, and [`ToShim::Kill`], are the same in all versions.
pub const PROTOCOL: u32 = 1;

/// Where systemd listens for the agent and starts a shim for each connection.
pub const SOCKET: &str = "/run/roost/vmmshim.sock";

/// Name of the VMM's API socket in a sandbox's run directory.
pub const API_SOCKET: &str = "api.sock";
/// Name of the shim's own listener in a sandbox's run directory, for an agent that comes later.
pub const SHIM_SOCKET: &str = "shim.sock";
/// Name of the exit record in a sandbox's run directory; [`Exit::to_json`] and [`Exit::from_json`] are its format.
pub const EXIT_FILE: &str = "exit";
/// Longest exit record: two tails, each byte escaped at its worst, and the rest.
pub const MAX_EXIT_FILE: usize = 2 * 6 * MAX_TAIL + 4096;
/// Name of the guest's serial console in a sandbox's run directory, a [`crate::ring`].
pub const CONSOLE_FILE: &str = "console.log";
/// Name of the VMM's own messages and events in a sandbox's run directory, a [`crate::ring`].
pub const LOG_FILE: &str = "vmm.log";
/// Name of the guest's memory in a snapshot attempt's directory, as the VMM calls it.
pub const MEMORY_FILE: &str = "memory-ranges";
/// The guest kernel's command line: the console the shim records, the disk, the address that every guest has. Then what a boot need not
/// wait for: tests of the kernel's own ciphers, serial ports and a mouse that are not there.
pub const KERNEL_COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda rw ip=169.254.0.21::169.254.0.22:255.255.255.252::eth0:off \
                                       reboot=k panic=-1 quiet cryptomgr.notests 8250.nr_uarts=1 i8042.noaux";
/// What the VMM's event monitor says when the guest resets its machine: it asked for a reboot, or its kernel panicked (`panic=-1`) or
/// faulted three times over. cloud-hypervisor then boots the guest anew in place (`vm_reboot` in `vmm/src/lib.rs`, v53), as a machine
/// without an identity that nobody asked for. So a shim that reads this kills the VMM, and the end of [`Exit::log`] says why.
pub const RESET_EVENT: &str = "\"event\": \"rebooting\"";
/// The disk's id in the VMM. A restore finds the state of a device by the id that it was booted with.
pub const DISK_ID: &str = "rootfs";
/// The network device's id in the VMM.
pub const NET_ID: &str = "net0";
/// Guest memory that a shim accepts.
pub const MEMORY_RANGE: RangeInclusive<Mebibytes> = Mebibytes(64)..=Mebibytes(1 << 20);
/// Virtual CPUs that a shim accepts.
pub const VCPUS_RANGE: RangeInclusive<Vcpus> = Vcpus(1)..=Vcpus(64);
/// Most bytes of a console or log tail in [`Exit`].
pub const MAX_TAIL: usize = 16 * 1024;
/// Most bytes of [`FromShim::Version`].
pub const MAX_VERSION: usize = 256;

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
    /// Asks for the version of the VMM that it would launch.
    Version,
    /// Asks which file the program of that VMM is by now, where it could run a VM. A shim that was started ahead may have said hello long ago.
    Program,
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
    /// How fast its devices may be.
    pub limits: RateLimits,
    /// Boot or restore.
    pub start: Start,
    /// The sandbox's run directory, `…/vm/<sandbox>`: the shim makes its sockets, rings and the exit file in it. New for each
    /// launch: the shim removes nothing that it finds there, and a socket in the way refuses the launch.
    pub run_dir: String,
    /// The sandbox's VM directory, `…/sandboxes/<sandbox>/vm`: the VMM's only writable place.
    pub vm_dir: String,
}

/// How fast the devices of a VM may be; `None`: as fast as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    /// Bytes a second that are read from its disk and written to it, together.
    pub disk_bytes: Option<NonZeroU64>,
    /// Requests to its disk a second.
    pub disk_operations: Option<NonZeroU64>,
    /// Bytes a second of its network, each way.
    pub network_bytes: Option<NonZeroU64>,
}

/// Milliseconds after which a VM's devices may move as much again.
pub const RATE_PERIOD: u64 = 1000;

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
        /// The initramfs's file where the restored configuration names one: the VMM opens it again (the kernel it does not).
        initramfs: Option<String>,
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
    /// The memory file of a snapshot attempt, to read and write: it belongs to the VM's uid.
    Memory {
        /// Number of the attempt's directory.
        attempt: u32,
    },
}

/// Which file a program is. One that is exchanged, or written in place, is another: what it said before may hold no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramId {
    /// The device that it is on.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// When that last changed, in nanoseconds since 1970.
    pub changed_at: i128,
}

impl ProgramId {
    /// Of the file that a path leads to.
    ///
    /// # Errors
    /// Whatever `stat` fails with.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            changed_at: i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec()),
        })
    }
}

/// Shim to agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromShim {
    /// The first packet on every connection.
    Hello {
        /// [`PROTOCOL`] of the shim.
        protocol: u32,
        /// Which file its VMM's program is; `None` where there is none.
        vmm: Option<ProgramId>,
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
    /// Answer to [`ToShim::Version`]: the beginning of what the VMM's program writes for `--version`, at most [`MAX_VERSION`] bytes,
    /// unparsed.
    Version(Vec<u8>),
    /// Answer to [`ToShim::Program`]; `None` where there is none, or this shim may not open `/dev/kvm`.
    Program(Option<ProgramId>),
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

/// [`Exit`] in a file: JSON with the tails as text, for people too.
#[derive(Serialize, Deserialize)]
struct ExitRecord<'a> {
    wait: WaitStatus,
    oom_kills: u64,
    console: Cow<'a, str>,
    log: Cow<'a, str>,
}

impl Exit {
    /// The exit record's content, at most [`MAX_EXIT_FILE`] bytes. What is not UTF-8 in the tails becomes U+FFFD.
    pub fn to_json(&self) -> String {
        let record = ExitRecord {
            wait: self.wait,
            oom_kills: self.oom_kills,
            console: String::from_utf8_lossy(newest(&self.console)),
            log: String::from_utf8_lossy(newest(&self.log)),
        };
        serde_json::to_string(&record).expect("strings and numbers are JSON")
    }

    /// Reads an exit record. The file's writer ran beside a VMM, so the caller opens nothing but a regular file.
    ///
    /// # Errors
    /// Anything that is no record of at most [`MAX_EXIT_FILE`] bytes.
    pub fn from_json(json: &[u8]) -> Result<Self, BadExitRecord> {
        if json.len() > MAX_EXIT_FILE {
            return Err(BadExitRecord::TooLong);
        }
        let record: ExitRecord<'_> = serde_json::from_slice(json).map_err(|_| BadExitRecord::Malformed)?;
        Ok(Self {
            wait: record.wait,
            oom_kills: record.oom_kills,
            console: newest(record.console.as_bytes()).to_vec(),
            log: newest(record.log.as_bytes()).to_vec(),
        })
    }
}

/// The last [`MAX_TAIL`] bytes.
fn newest(bytes: &[u8]) -> &[u8] {
    &bytes[bytes.len().saturating_sub(MAX_TAIL)..]
}

/// Why a file is no exit record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadExitRecord {
    /// Longer than any record.
    #[error("the exit record is longer than {MAX_EXIT_FILE} bytes")]
    TooLong,
    /// Not JSON, or not a record.
    #[error("the exit record does not decode")]
    Malformed,
}

/// A process's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitStatus {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
}

/// Its number on every architecture that Linux has this for and we build on.
const SIGSYS: i32 = 31;

impl fmt::Display for WaitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Signaled(SIGSYS) => write!(
                f,
                "signal {SIGSYS} (SIGSYS: it made a system call that its filter forbids)"
            ),
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
    /// The disk's descriptor is not the device-mapper snapshot of this sandbox, or `disk_minor` is another device.
    Disk,
    /// The tap's descriptor is no tap.
    Tap,
}

impl fmt::Display for SpecField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::Start => "start",
            Self::Directory => "directory",
            Self::Disk => "disk",
            Self::Tap => "tap",
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
    AskVersion = 17,
    MakeCgroup = 18,
    EnterCgroup = 19,
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
            Self::AskVersion => "asking the VMM for its version",
            Self::MakeCgroup => "making the VMM's cgroup",
            Self::EnterCgroup => "entering the VMM's cgroup",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(console: &[u8], log: &[u8]) -> Exit {
        Exit {
            wait: WaitStatus::Signaled(9),
            oom_kills: 2,
            console: console.to_vec(),
            log: log.to_vec(),
        }
    }

    #[test]
    fn an_exit_record_comes_back_as_written() {
        let exit = exit("Linux\n\u{1b}[0m é\0".as_bytes(), b"killed");
        assert_eq!(Exit::from_json(exit.to_json().as_bytes()), Ok(exit));
    }

    #[test]
    fn the_worst_tails_fit_a_record_and_a_packet() {
        for byte in [0x00, 0xff, b'"', b'x'] {
            let worst = exit(&[byte; MAX_TAIL], &[byte; MAX_TAIL]);
            let json = worst.to_json();
            assert!(json.len() <= MAX_EXIT_FILE, "{byte:#x}: {} bytes", json.len());
            let read = Exit::from_json(json.as_bytes()).expect("a record");
            assert!(read.console.len() <= MAX_TAIL && read.log.len() <= MAX_TAIL);
            crate::ipc::Packet::encode(&FromShim::Exited(worst)).expect("fits a packet");
        }
    }

    #[test]
    fn what_is_no_exit_record_is_refused() {
        for bad in ["", "{}", "null", "{\"wait\":{\"Exited\":0}}", "\u{0}"] {
            assert_eq!(
                Exit::from_json(bad.as_bytes()),
                Err(BadExitRecord::Malformed),
                "{bad:?}"
            );
        }
        assert_eq!(
            Exit::from_json(&vec![b' '; MAX_EXIT_FILE + 1]),
            Err(BadExitRecord::TooLong)
        );
    }

    /// What a shim and an agent of an earlier version of roost have said to each other, a message a line: its name, its bytes in hexadecimal.
    const STORED: &str = include_str!("samples/shim-1.txt");

    fn hex(text: &str) -> Vec<u8> {
        let pair = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
        (0..text.len()).step_by(2).map(pair).collect()
    }

    /// A message that comes back as the bytes that it came from, and how it reads.
    fn read<T: serde::de::DeserializeOwned + Serialize + fmt::Debug>(bytes: &[u8]) -> String {
        let message: T = postcard::from_bytes(bytes).expect("a message");
        assert_eq!(postcard::to_stdvec(&message).expect("encoded"), bytes, "{message:?}");
        format!("{message:?}")
    }

    #[test]
    fn stored_messages_are_understood_by_both_sides() {
        let mut seen = 0;
        for line in STORED.lines().filter(|line| !line.starts_with('#')) {
            let [side, bytes, reads] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let found = match side {
                "agent" => read::<ToShim>(&hex(bytes)),
                "shim" => read::<FromShim>(&hex(bytes)),
                other => panic!("{other}"),
            };
            assert_eq!(found, reads);
            seen += 1;
        }
        assert!(seen > 8, "{seen}");
    }

    #[test]
    fn exit_records_that_are_stored_are_read() {
        let stored = include_str!("samples/exit-1.json");
        assert_eq!(
            Exit::from_json(stored.as_bytes()),
            Ok(exit(b"Linux\nlogin:", b"killed"))
        );
    }
}

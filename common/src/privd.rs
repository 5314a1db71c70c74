//! privd's narrow surface: five verbs. Requests carry ids, numbers and descriptors, never a path or a kernel name; the answer
//! *is* the resource, a descriptor that the kernel object lives by.

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::ids::{SandboxId, Slot};
use crate::ipc::PassedFd;
use crate::ipc::rpc::{ClientTransport, ServerTransport};
use crate::net::{Cidr, SlotAddresses};
use crate::units::Sectors;

/// Where privd listens.
pub const SOCKET: &str = "/run/roost/privd.sock";

/// The client's half of a connection to privd.
pub type PrivdClientTransport = ClientTransport<PrivdRequest, PrivdResponse>;
/// The server's half of a connection to privd.
pub type PrivdServerTransport = ServerTransport<PrivdRequest, PrivdResponse>;

/// The calls. Every one of them is complete or has changed nothing when it answers; a caller that goes away changes neither.
#[tarpc::service]
pub trait Privd {
    /// Opens the copy-on-write disk of a sandbox. It exists for as long as the returned descriptor, or a copy, or anybody's own
    /// open of its node.
    async fn open_disk(request: OpenDisk) -> Result<Disk, PrivdError>;
    /// Opens the network of a slot. It exists for as long as the returned tap descriptor or a copy.
    async fn open_network(request: OpenNetwork) -> Result<Network, PrivdError>;
    /// Replaces the egress policy of the network behind a tap, in one step.
    async fn set_policy(request: SetPolicy) -> Result<(), PrivdError>;
    /// Reads the counters of the network behind a tap.
    async fn network_counters(request: ReadCounters) -> Result<NetworkCounters, PrivdError>;
    /// Lists roost's own kernel objects, a page at a time.
    async fn inventory(cursor: InventoryCursor) -> Result<InventoryPage, PrivdError>;
}

/// Arguments of `open_disk`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OpenDisk {
    /// Names the disk; an id whose disk still exists is [`PrivdError::Busy`].
    pub sandbox: SandboxId,
    /// The image: a regular file opened read-only, owned by the caller or root, not writable by others.
    pub origin: PassedFd,
    /// The exception store: a regular file opened read-write, owned by the caller, one link, of at least
    /// [`Sectors::cow_length`] of `size`; new, or one that a disk has written before.
    pub cow: PassedFd,
    /// Size of the disk: at least the image's, whole chunks.
    pub size: Sectors,
    /// Whom the device node is given to: the VM's dynamic uid, or the caller's own.
    pub owner: u32,
}

/// A sandbox's disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct Disk {
    /// The node to open.
    pub node: DiskNode,
    /// The opened device; holding it keeps the disk.
    pub device: PassedFd,
}

/// A device-mapper node, by its minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskNode {
    /// The minor number.
    pub minor: u32,
}

/// Prints as the node's path, `/dev/dm-N`.
impl fmt::Display for DiskNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/dm-{}", self.minor)
    }
}

/// Arguments of `open_network`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OpenNetwork {
    /// A slot whose network still exists is [`PrivdError::Busy`].
    pub slot: Slot,
    /// What the guest may reach.
    pub policy: EgressPolicy,
}

/// A slot's network.
#[derive(Debug, Serialize, Deserialize)]
pub struct Network {
    /// The tap; holding it keeps namespace, veth pair, routes and rules.
    pub tap: PassedFd,
    /// The slot's addresses.
    pub addresses: SlotAddresses,
}

/// What a guest may reach. Host, other sandboxes and private ranges are closed in any case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressPolicy {
    /// Which public addresses are reachable at all.
    pub internet: Internet,
    /// Resolvers reachable on port 53 ahead of the closed ranges and of `denied`, at most [`MAX_RESOLVERS`]; unused where the internet is
    /// closed.
    pub resolvers: Vec<Ipv4Addr>,
    /// What is reachable where the internet is [`Internet::Listed`], at most [`MAX_NETWORKS`].
    pub allowed: Vec<Cidr>,
    /// What is not reachable, whatever else is said; at most [`MAX_NETWORKS`].
    pub denied: Vec<Cidr>,
    /// Whether connections to the ports of HTTP and HTTPS outside of `allowed` lead to the agent, at [`crate::net::PROXY_HTTP`] and
    /// [`crate::net::PROXY_TLS`] of the host's end of the veth pair.
    pub proxied: bool,
}

impl EgressPolicy {
    /// Without resolvers and lists.
    pub fn of(internet: Internet) -> Self {
        Self {
            internet,
            resolvers: vec![],
            allowed: vec![],
            denied: vec![],
            proxied: false,
        }
    }
}

/// Most resolvers in a policy.
pub const MAX_RESOLVERS: usize = 8;
/// Most ranges in each of a policy's lists.
pub const MAX_NETWORKS: usize = 64;

/// Whether a guest reaches public addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Internet {
    /// All of them.
    Open,
    /// Those that are listed, and resolvers.
    Listed,
    /// None, nor resolvers.
    Closed,
}

/// Arguments of `set_policy`.
#[derive(Debug, Serialize, Deserialize)]
pub struct SetPolicy {
    /// A tap that `open_network` made.
    pub tap: PassedFd,
    /// The new policy.
    pub policy: EgressPolicy,
}

/// Arguments of `network_counters`.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReadCounters {
    /// A tap that `open_network` made.
    pub tap: PassedFd,
}

/// Counters of one network since it was opened; a new policy begins its own at zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkCounters {
    /// At least one row a rule, in the order of [`Rule::ALL`]; one for each destination of those that have some.
    pub rules: Vec<RuleCounter>,
}

/// Packets and bytes that one rule has matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleCounter {
    /// Which rule.
    pub rule: Rule,
    /// Which of the rule's destinations, where it has some.
    pub network: Option<Cidr>,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl RuleCounter {
    /// A rule that has matched nothing.
    pub fn zero(rule: Rule) -> Self {
        Self {
            rule,
            network: None,
            packets: 0,
            bytes: 0,
        }
    }
}

/// The counted rules of a sandbox's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Rule {
    /// IPv6 of any kind.
    Ipv6,
    /// From the guest with a MAC or address other than its own.
    Spoofed,
    /// Neither a new connection nor part of one: it would leave untranslated.
    Invalid,
    /// From the guest to anything, while the internet is closed; connections made before it was closed among them.
    NoInternet,
    /// From the guest to what the policy denies; connections made before that among them.
    Denied,
    /// From the guest to what the policy does not list; connections made before that among them.
    NotListed,
    /// Packets of connections that were let through before.
    Established,
    /// New connections of the guest's that lead to the agent, which judges them by the name they ask for.
    ByName,
    /// New connections of the guest's while it has as many as it may have ([`MAX_CONNECTIONS`](crate::net::MAX_CONNECTIONS)).
    TooMany,
    /// From the guest to a resolver of the policy.
    Resolver,
    /// From the guest to the namespace itself: only ping to its gateway.
    Gateway,
    /// From the guest to a closed range.
    ClosedRange,
    /// From the guest to public addresses.
    Internet,
    /// New connections from the host to the guest.
    FromHost,
    /// New connections to the guest from anywhere else.
    FromElsewhere,
}

impl Rule {
    /// Whether it drops what it matches.
    pub fn drops(self) -> bool {
        match self {
            Self::Ipv6
            | Self::Spoofed
            | Self::Invalid
            | Self::NoInternet
            | Self::Denied
            | Self::NotListed
            | Self::TooMany
            | Self::ClosedRange
            | Self::FromElsewhere => true,
            Self::Established | Self::ByName | Self::Resolver | Self::Gateway | Self::Internet | Self::FromHost => {
                false
            }
        }
    }

    /// All of them, in the order in which they are asked.
    pub const ALL: [Self; 15] = [
        Self::Ipv6,
        Self::Spoofed,
        Self::Invalid,
        Self::NoInternet,
        Self::Denied,
        Self::NotListed,
        Self::Established,
        Self::ByName,
        Self::TooMany,
        Self::Resolver,
        Self::Gateway,
        Self::ClosedRange,
        Self::Internet,
        Self::FromHost,
        Self::FromElsewhere,
    ];
}

/// Prints as the rule's name in lower case, as a label of metrics has it.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv6 => "ipv6",
            Self::Spoofed => "spoofed",
            Self::Invalid => "invalid",
            Self::Established => "established",
            Self::NoInternet => "no-internet",
            Self::Denied => "denied",
            Self::NotListed => "not-listed",
            Self::ByName => "by-name",
            Self::TooMany => "too-many",
            Self::Resolver => "resolver",
            Self::Gateway => "gateway",
            Self::ClosedRange => "closed-range",
            Self::Internet => "internet",
            Self::FromHost => "from-host",
            Self::FromElsewhere => "from-elsewhere",
        })
    }
}

/// Where an inventory goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InventoryCursor(pub u64);

/// Most rows in a page of an inventory.
pub const INVENTORY_PAGE: usize = 256;

/// A page of roost's own kernel objects. Objects made or removed between two pages may be missed or listed twice.
#[derive(Debug, Serialize, Deserialize)]
pub struct InventoryPage {
    /// At most [`INVENTORY_PAGE`] rows.
    pub rows: Vec<InventoryRow>,
    /// Where to go on; `None` at the end.
    pub next: Option<InventoryCursor>,
}

/// One kernel object of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum InventoryRow {
    /// A device-mapper device.
    Device {
        /// Its name.
        name: String,
        /// Its node.
        node: DiskNode,
        /// How many descriptors and devices hold it.
        open_count: u32,
        /// The status line of a snapshot (`allocated/total metadata`, or what is wrong), empty for others.
        status: String,
    },
    /// A loop device whose backing file one of our devices uses.
    Loop {
        /// Number of the loop, `/dev/loopN`.
        number: u32,
    },
    /// The host end of a slot's veth pair.
    Veth {
        /// The slot.
        slot: Slot,
    },
}

/// What privd answers. Closed: the agent matches every variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum PrivdError {
    /// Not the kind of descriptor that the field asks for.
    #[error("{what} is not {wanted}")]
    WrongDescriptor {
        /// Which field.
        what: DescriptorRole,
        /// What it should be.
        wanted: Wanted,
    },
    /// A size out of bounds.
    #[error("a disk of {size} is refused: {reason}")]
    WrongSize {
        /// What was asked for.
        size: Sectors,
        /// Which bound it breaks.
        reason: SizeRefusal,
    },
    /// A range of addresses that is none.
    #[error("{range} is no range of addresses")]
    WrongRange {
        /// What it was.
        range: Cidr,
    },
    /// A uid that no VM of ours runs as.
    #[error("uid {uid} is neither in the dynamic range nor the caller's")]
    WrongOwner {
        /// What was asked for.
        uid: u32,
    },
    /// More than a limit allows.
    #[error("limit of {max} {what} reached")]
    TooMany {
        /// Of what.
        what: ResourceKind,
        /// The limit.
        max: u32,
    },
    /// The object of this id or slot still exists after five seconds.
    #[error("{what} is still in use")]
    Busy {
        /// Which kind.
        what: ResourceKind,
    },
    /// The kernel refused a step; what had been done before it has been undone.
    #[error("kernel refused {step} (errno {errno})")]
    Kernel {
        /// Which step.
        step: Step,
        /// Its error.
        errno: i32,
    },
}

/// The descriptor fields of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DescriptorRole {
    /// `OpenDisk::origin`.
    Origin,
    /// `OpenDisk::cow`.
    Cow,
    /// `SetPolicy::tap`, `ReadCounters::tap`.
    Tap,
}

/// What a descriptor should have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    /// A regular file.
    RegularFile,
    /// Opened read-only (and not `O_PATH`).
    ReadOnly,
    /// Opened read-write (and not `O_PATH`).
    ReadWrite,
    /// Owned by the caller, for the origin also by root.
    CallersOwn,
    /// Not writable by group or others.
    NotWritableByOthers,
    /// With one link.
    SingleLink,
    /// Whole sectors, not empty, within the disk.
    ProperLength,
    /// On a filesystem that can back a disk.
    BackedByDisk,
    /// Blank at its beginning, or with the header of an exception store in chunks of [`crate::units::CHUNK_SECTORS`].
    ExceptionStore,
    /// A tap of ours.
    OurTap,
}

/// Why a size is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SizeRefusal {
    /// Not a whole number of chunks, or none.
    NotWholeChunks,
    /// Above [`crate::units::MAX_DISK`].
    TooLarge,
    /// Smaller than the image.
    SmallerThanOrigin,
    /// The exception store could overflow.
    CowTooShort,
}

/// What privd counts and makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ResourceKind {
    /// Disks.
    Disk,
    /// Networks.
    Network,
    /// Resolvers of a policy.
    Resolvers,
    /// Ranges in one of a policy's lists.
    Ranges,
    /// Calls at a time.
    Calls,
}

/// The kernel steps of the verbs, in the order in which they are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each variant is the step of that name; `Display` is the doc")]
pub enum Step {
    InspectDescriptor,
    FindFreeLoop,
    AttachOriginLoop,
    CreateOrigin,
    LoadOrigin,
    ResumeOrigin,
    OpenOrigin,
    DeferOriginRemoval,
    AttachCowLoop,
    CreateSnapshot,
    LoadSnapshot,
    ResumeSnapshot,
    OpenSnapshot,
    DeferRemoval,
    GiveNode,
    MakeNamespace,
    MakeTap,
    MakeVeth,
    SetAddresses,
    SetRoutes,
    SetNeighbour,
    LoadRules,
    ReadRules,
    EnterNamespace,
    ListDevices,
    ListLinks,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InspectDescriptor => "inspecting a descriptor",
            Self::FindFreeLoop => "finding a free loop device",
            Self::AttachOriginLoop => "attaching the image's loop device",
            Self::CreateOrigin => "creating the origin",
            Self::LoadOrigin => "loading the origin's table",
            Self::ResumeOrigin => "activating the origin",
            Self::OpenOrigin => "opening the origin",
            Self::DeferOriginRemoval => "marking the origin for deferred removal",
            Self::AttachCowLoop => "attaching the cow file's loop device",
            Self::CreateSnapshot => "creating the snapshot",
            Self::LoadSnapshot => "loading the snapshot's table",
            Self::ResumeSnapshot => "activating the snapshot",
            Self::OpenSnapshot => "opening the snapshot",
            Self::DeferRemoval => "marking the device for deferred removal",
            Self::GiveNode => "giving the device node to its owner",
            Self::MakeNamespace => "making a network namespace",
            Self::MakeTap => "making the tap",
            Self::MakeVeth => "making the veth pair",
            Self::SetAddresses => "setting addresses",
            Self::SetRoutes => "setting routes",
            Self::SetNeighbour => "setting the guest's neighbour entry",
            Self::LoadRules => "loading packet filter rules",
            Self::ReadRules => "reading packet filter rules",
            Self::EnterNamespace => "entering the tap's namespace",
            Self::ListDevices => "listing device-mapper devices",
            Self::ListLinks => "listing network links",
        })
    }
}

impl fmt::Display for DescriptorRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Origin => "the origin",
            Self::Cow => "the cow",
            Self::Tap => "the tap",
        })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RegularFile => "a regular file",
            Self::ReadOnly => "opened read-only",
            Self::ReadWrite => "opened read-write",
            Self::CallersOwn => "owned by the caller",
            Self::NotWritableByOthers => "closed to writers other than its owner",
            Self::SingleLink => "a file of exactly one link",
            Self::ProperLength => "of whole sectors and no longer than the disk",
            Self::BackedByDisk => "on a filesystem that can back a disk",
            Self::ExceptionStore => "blank or an exception store of 8-sector chunks",
            Self::OurTap => "a tap of this daemon's making",
        })
    }
}

impl fmt::Display for SizeRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotWholeChunks => "it is not a whole number of 8-sector chunks",
            Self::TooLarge => "it is above 2 TiB",
            Self::SmallerThanOrigin => "the image is larger",
            Self::CowTooShort => "the cow file is too short to hold all of it",
        })
    }
}

impl fmt::Display for ResourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Network => "network",
            Self::Resolvers => "resolvers",
            Self::Ranges => "address ranges",
            Self::Calls => "calls",
        })
    }
}

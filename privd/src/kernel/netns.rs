//! Networks: one namespace per slot, held by nothing but its tap.
//!
//! ```text
//! host: roost-v<n> ==veth== eth0 :namespace: tap0 <-- descriptor <-- VMM
//! ```
//!
//! Holds: all work inside a namespace is done by a thread made for it that then ends; no thread that does anything else ever
//! changes its namespace. The namespace lives by the tap's descriptor alone, so there is nothing to undo: an early return closes
//! it, and with it go the tap, both ends of the veth pair, the host's route and every rule.
//! Not here: which slot, which policy (the agent decides). No sysctl: forwarding is inherited from the initial namespace.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::sched::{CloneFlags, setns, unshare};
use roost_common::ids::Slot;
use roost_common::names;
use roost_common::net::{GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, GUEST_PREFIX, SlotAddresses};
use roost_common::privd::{DescriptorRole, EgressPolicy, NetworkCounters, PrivdError, ResourceKind, Step, Wanted};

use super::link::{Index, LinkEvents, Links, VethEnd};
use super::nft::Rules;
use super::{BUSY, at, own, tap};
use crate::check::NetworkSpec;

/// Name of the veth pair's end in the namespace.
pub(super) const UPLINK: &str = "eth0";

/// A network: its addresses, and the tap that keeps it.
#[derive(Debug)]
pub(crate) struct OpenedNetwork {
    /// Keeps it.
    pub(crate) tap: OwnedFd,
    /// Its addresses.
    pub(crate) addresses: SlotAddresses,
}

/// Opens the network that `spec` describes.
///
/// # Errors
/// [`PrivdError::Busy`] when the slot's network still exists after [`BUSY`], [`PrivdError::Kernel`] with the step that failed.
/// Nothing is left of either.
pub(crate) fn open(spec: &NetworkSpec) -> Result<OpenedNetwork, PrivdError> {
    restore_host_table()?;
    // Opened here, so these act on and listen to the initial namespace, whichever thread uses them.
    let mut host = Links::open().map_err(at(Step::MakeVeth))?;
    let mut events = LinkEvents::open().map_err(at(Step::MakeVeth))?;
    let own = own::addresses().map_err(at(Step::ListLinks))?;
    on_a_thread(|| build(spec, &mut host, &mut events, &own))?
}

/// Replaces the egress policy of the network behind `tap`, in one step.
///
/// # Errors
/// [`PrivdError::WrongDescriptor`] when it is no tap of ours.
pub(crate) fn set_policy(tap: BorrowedFd<'_>, policy: &EgressPolicy) -> Result<(), PrivdError> {
    restore_host_table()?;
    let own = own::addresses().map_err(at(Step::ListLinks))?;
    inside(tap, || {
        let agent = Links::open()
            .and_then(|mut links| links.addresses())
            .map_err(at(Step::ListLinks))?
            .into_iter()
            .find_map(SlotAddresses::other_end)
            .ok_or_else(not_ours)?;
        let replaced = Rules::open().and_then(|mut rules| rules.replace_policy(policy, agent, &own));
        match replaced {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_ours()),
            outcome => outcome.map_err(at(Step::LoadRules)),
        }
    })
}

/// Reads the counters of the network behind `tap`.
///
/// # Errors
/// [`PrivdError::WrongDescriptor`] when it is no tap of ours.
pub(crate) fn counters(tap: BorrowedFd<'_>) -> Result<NetworkCounters, PrivdError> {
    inside(tap, || {
        let rules = Rules::open().and_then(|mut rules| rules.counters());
        rules.map_err(at(Step::ReadRules))?.ok_or_else(not_ours)
    })
}

fn not_ours() -> PrivdError {
    PrivdError::WrongDescriptor {
        what: DescriptorRole::Tap,
        wanted: Wanted::OurTap,
    }
}

/// Builds a network around the calling thread, which must be one made for it.
fn build(
    spec: &NetworkSpec,
    host: &mut Links,
    events: &mut LinkEvents,
    own: &[Ipv4Addr],
) -> Result<OpenedNetwork, PrivdError> {
    let addresses = SlotAddresses::of(spec.slot);
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| at(Step::MakeNamespace)(errno.into()))?;
    let tap = tap::make().map_err(at(Step::MakeTap))?;
    let namespace = tap::namespace(tap.as_fd())
        .map_err(at(Step::MakeTap))?
        .ok_or_else(not_ours)?;
    let mut links = Links::open().map_err(at(Step::MakeNamespace))?;
    // First of all the rules: nothing passes at any moment that they would not let pass.
    Rules::open()
        .and_then(|mut rules| rules.load_sandbox(&addresses, &spec.policy, own))
        .map_err(at(Step::LoadRules))?;

    let veth = names::veth(spec.slot);
    add_veth_when_free(host, events, spec.slot, &veth, namespace.as_fd())?;
    let outer = host.index(&veth).map_err(at(Step::MakeVeth))?;
    let inner = links.index(UPLINK).map_err(at(Step::MakeVeth))?;
    let guest = links.index("tap0").map_err(at(Step::MakeTap))?;
    links.set_mac(guest, GATEWAY_MAC).map_err(at(Step::MakeTap))?;

    set_up(host, outer, addresses.veth_host, 31)?;
    set_up(&mut links, inner, addresses.veth_namespace, 31)?;
    set_up(&mut links, guest, GATEWAY, GUEST_PREFIX)?;
    host.add_route((addresses.host, 32), addresses.veth_namespace, outer)
        .and_then(|()| links.add_route((Ipv4Addr::UNSPECIFIED, 0), addresses.veth_host, inner))
        .map_err(at(Step::SetRoutes))?;
    // Without it the first packet to the guest waits for an answer to ARP, and when the guest is late, for a retry a second on.
    links
        .add_neighbour(guest, GUEST, GUEST_MAC)
        .map_err(at(Step::SetNeighbour))?;
    Ok(OpenedNetwork { tap, addresses })
}

fn set_up(links: &mut Links, link: Index, address: Ipv4Addr, prefix: u8) -> Result<(), PrivdError> {
    links
        .close_ipv6(link)
        .and_then(|()| links.add_address(link, address, prefix))
        .and_then(|()| links.up(link))
        .map_err(at(Step::SetAddresses))
}

/// Makes the veth pair, waiting for one of the same name to go: removal is the kernel's and runs in its own time.
fn add_veth_when_free(
    host: &mut Links,
    events: &mut LinkEvents,
    slot: Slot,
    name: &str,
    namespace: BorrowedFd<'_>,
) -> Result<(), PrivdError> {
    let deadline = Instant::now() + BUSY;
    let [high, low] = slot.get().to_be_bytes();
    let here = VethEnd {
        name,
        mac: [0x02, 0xFC, 0x00, 0x01, high, low],
    };
    let there = VethEnd {
        name: UPLINK,
        mac: [0x02, 0xFC, 0x00, 0x02, high, low],
    };
    loop {
        match host.add_veth(&here, &there, namespace) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let left = deadline.saturating_duration_since(Instant::now());
                // Its removal may be a change of the route or address behind it: any event of a link is a reason to look again.
                if left.is_zero() || !events.wait(left).map_err(at(Step::MakeVeth))? {
                    return Err(PrivdError::Busy {
                        what: ResourceKind::Network,
                    });
                }
            }
            outcome => return outcome.map_err(at(Step::MakeVeth)),
        }
    }
}

/// Runs `work` in the namespace of `tap`, once that is a tap named as ours.
fn inside<T: Send>(tap: BorrowedFd<'_>, work: impl FnOnce() -> Result<T, PrivdError> + Send) -> Result<T, PrivdError> {
    let namespace = tap::namespace(tap)
        .map_err(at(Step::EnterNamespace))?
        .ok_or_else(not_ours)?;
    on_a_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| at(Step::EnterNamespace)(errno.into()))?;
        work()
    })?
}

/// Runs `work` on a thread made for it, which ends with it and takes its namespace along.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, PrivdError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("namespace".into())
            .spawn_scoped(scope, work)
            .map_err(at(Step::MakeNamespace))?;
        // A panic is our own bug and ends the process (`main`), so this is not reached after one.
        thread.join().or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The slots whose network exists.
///
/// # Errors
/// [`Step::ListLinks`].
pub(crate) fn list() -> Result<Vec<Slot>, PrivdError> {
    Links::open()
        .and_then(|mut links| links.veths())
        .map_err(at(Step::ListLinks))
}

/// Replaces the host's static table.
///
/// # Errors
/// The kernel's; the old table is untouched then.
pub(crate) fn ensure_host_table() -> io::Result<()> {
    Rules::open().and_then(|mut rules| rules.ensure_host())
}

/// Puts the host's static table back where somebody has removed it: `nft flush ruleset` does, and so does a restart of a
/// firewall's service. Asks for the table alone, not for what is in it.
fn restore_host_table() -> Result<(), PrivdError> {
    let mut rules = Rules::open().map_err(at(Step::ReadRules))?;
    if rules.has_host().map_err(at(Step::ReadRules))? {
        return Ok(());
    }
    tracing::warn!("the host's packet filter table is gone; it is put back");
    rules.ensure_host().map_err(at(Step::LoadRules))
}

//! The network plan: which addresses a slot has, and those that are the same in every sandbox.
//!
//! ```text
//! agent --> 10.11.0.0+n  --route--> roost-v<n> 10.12.0.0+2n ==veth== eth0 10.12.0.0+2n+1 --DNAT--> tap0 --> guest
//! guest 169.254.0.21 --> tap0 169.254.0.22 --SNAT to 10.12.0.0+2n+1--> eth0 ==veth== roost-v<n> --> host
//! ```

use std::net::Ipv4Addr;

use crate::ids::Slot;

/// The guest's address, the same in every sandbox so that a snapshot can wake in any slot.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's gateway: the tap's own address.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// Prefix length of the link between guest and gateway.
pub const GUEST_PREFIX: u8 = 30;
/// Netmask of the link between guest and gateway.
pub const GUEST_NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
/// The guest's MAC address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x05];
/// The gateway's MAC address, the same in every sandbox too: a guest that wakes elsewhere still has it in its neighbour cache.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x06];
/// Host addresses of sandboxes, one per slot: the network and its prefix length.
pub const HOST_NET: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 11, 0, 0), 16);
/// veth pairs, one /31 per slot: the network and its prefix length.
pub const VETH_NET: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 12, 0, 0), 16);

/// The addresses of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
pub struct SlotAddresses {
    /// Under which the host reaches the guest (/32).
    pub host: Ipv4Addr,
    /// Host end of the veth pair (/31).
    pub veth_host: Ipv4Addr,
    /// Namespace end of the veth pair (/31): what the host sees as the sender of the guest's packets.
    pub veth_namespace: Ipv4Addr,
}

impl SlotAddresses {
    /// The addresses of `slot`.
    pub fn of(slot: Slot) -> Self {
        let n = u32::from(slot);
        let at = |net: Ipv4Addr, offset: u32| Ipv4Addr::from_bits(net.to_bits() + offset);
        Self {
            host: at(HOST_NET.0, n),
            veth_host: at(VETH_NET.0, 2 * n),
            veth_namespace: at(VETH_NET.0, 2 * n + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_addresses_inside_the_plan_and_of_its_own() {
        let (mut hosts, mut veths) = (Vec::new(), Vec::new());
        for n in 1..=32767 {
            let addresses = SlotAddresses::of(Slot::try_from(n).expect("a slot of the plan"));
            assert_eq!(addresses.host.octets()[..2], [10, 11]);
            assert_eq!(addresses.veth_namespace.octets()[..2], [10, 12]);
            hosts.push(addresses.host);
            veths.extend([addresses.veth_host, addresses.veth_namespace]);
        }
        hosts.dedup();
        veths.dedup();
        assert_eq!((hosts.len(), veths.len()), (32767, 2 * 32767));
        assert_eq!(
            SlotAddresses::of(Slot::MAX).veth_namespace,
            Ipv4Addr::new(10, 12, 255, 255)
        );
    }
}

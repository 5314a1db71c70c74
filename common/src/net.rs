//! The network plan: which addresses a slot has, and those that are the same in every sandbox.
//!
//! ```text
//! agent --> 10.11.0.0+n  --route--> roost-v<n> 10.12.0.0+2n ==veth== eth0 10.12.0.0+2n+1 --DNAT--> tap0 --> guest
//! guest 169.254.0.21 --> tap0 169.254.0.22 --SNAT to 10.12.0.0+2n+1--> eth0 ==veth== roost-v<n> --> host
//! ```

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

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

/// Ports of the host's end of a veth pair on which the agent takes what a guest sends to port 80 and port 443 of servers that it may reach
/// by name alone. Below the range that the kernel takes ports of outgoing connections from.
pub const PROXY_HTTP: u16 = 19080;
/// As above, for port 443.
pub const PROXY_TLS: u16 = 19443;

/// A range of IPv4 addresses: all that have the first bits of another. Its text is `192.0.2.0/24`, or an address alone for one of a single
/// address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
pub struct Cidr {
    /// Its first address.
    pub network: Ipv4Addr,
    /// How many bits are given, at most 32.
    pub length: u8,
}

/// Not a range of IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CidrError;

impl fmt::Display for CidrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a range of IPv4 addresses: its first address, a slash and a number of bits up to 32")
    }
}

impl std::error::Error for CidrError {}

impl Cidr {
    /// The bits that are given.
    pub fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.length.min(32))).unwrap_or(0)
    }

    /// Whether an address is in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        (address.to_bits() ^ self.network.to_bits()) & self.mask() == 0
    }

    /// Whether it says what it means: at most 32 bits are given, and none beyond them is set.
    pub fn is_proper(self) -> bool {
        self.length <= 32 && self.network.to_bits() & !self.mask() == 0
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (network, length) = text.split_once('/').unwrap_or((text, "32"));
        // No sign, no leading zero: one text a range.
        let plain = length == "0" || (!length.starts_with('0') && length.bytes().all(|digit| digit.is_ascii_digit()));
        let range = Self {
            network: network.parse().map_err(|_| CidrError)?,
            length: length.parse().map_err(|_| CidrError)?,
        };
        if plain && range.is_proper() {
            Ok(range)
        } else {
            Err(CidrError)
        }
    }
}

/// What no guest reaches as a public address: its host, other sandboxes' and private networks, link-local (metadata services of clouds
/// among them), multicast, reserved, broadcast. 10/8 holds [`HOST_NET`] and [`VETH_NET`].
pub const CLOSED: [Cidr; 12] = [
    range([0, 0, 0, 0], 8),
    range([10, 0, 0, 0], 8),
    range([100, 64, 0, 0], 10),
    range([127, 0, 0, 0], 8),
    range([169, 254, 0, 0], 16),
    range([172, 16, 0, 0], 12),
    range([192, 0, 0, 0], 24),
    range([192, 88, 99, 0], 24),
    range([192, 168, 0, 0], 16),
    range([198, 18, 0, 0], 15),
    range([224, 0, 0, 0], 4),
    range([240, 0, 0, 0], 4),
];

const fn range([a, b, c, d]: [u8; 4], length: u8) -> Cidr {
    Cidr {
        network: Ipv4Addr::new(a, b, c, d),
        length,
    }
}

/// Connections of its own that a sandbox may have at a time, by the kernel's count of them: with those that end it, and a packet of UDP is
/// one for half a minute. The host has room for a hundred times as many (`net.netfilter.nf_conntrack_max`, from `packaging/sysctl.d`).
pub const MAX_CONNECTIONS: u32 = 8192;

/// Whether an address is in one of the [`CLOSED`] ranges.
pub fn is_closed(address: Ipv4Addr) -> bool {
    CLOSED.iter().any(|range| range.contains(address))
}

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

    /// The host's end of the veth pair whose other end has this address; `None` where it is none of the plan.
    pub fn other_end(veth_namespace: Ipv4Addr) -> Option<Ipv4Addr> {
        let (network, length) = VETH_NET;
        let is_ours = Cidr { network, length }.contains(veth_namespace) && veth_namespace.to_bits() & 1 == 1;
        is_ours.then(|| Ipv4Addr::from_bits(veth_namespace.to_bits() - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_one_text() {
        for text in ["192.0.2.0/24", "0.0.0.0/0", "192.0.2.1/32", "128.0.0.0/1"] {
            let range: Cidr = text.parse().expect(text);
            assert_eq!(range.to_string(), text);
        }
        assert_eq!("192.0.2.1".parse::<Cidr>().expect("an address").length, 32);
        for text in [
            "",
            "/",
            "192.0.2.1/24",
            "192.0.2.0/33",
            "192.0.2.0/-1",
            "192.0.2.0/+24",
            "192.0.2.0/024",
            "192.0.2.0/",
            "192.0.2/24",
            "192.0.2.0/24/24",
            " 192.0.2.0/24",
            "::/0",
            "example.com",
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(CidrError), "{text:?}");
        }
    }

    #[test]
    fn a_range_holds_what_has_its_first_bits() {
        let range: Cidr = "172.16.0.0/12".parse().expect("a range");
        assert!(range.contains([172, 16, 0, 0].into()) && range.contains([172, 31, 255, 255].into()));
        assert!(!range.contains([172, 32, 0, 0].into()) && !range.contains([172, 15, 255, 255].into()));
        let all: Cidr = "0.0.0.0/0".parse().expect("a range");
        assert!(all.contains(Ipv4Addr::UNSPECIFIED) && all.contains(Ipv4Addr::BROADCAST));
        assert!(CLOSED.iter().all(|range| range.is_proper()));
        assert!(is_closed([169, 254, 169, 254].into()) && !is_closed([1, 1, 1, 1].into()));
    }

    #[test]
    fn every_slot_has_addresses_inside_the_plan_and_of_its_own() {
        let (mut hosts, mut veths) = (Vec::new(), Vec::new());
        for n in 1..=32767 {
            let addresses = SlotAddresses::of(Slot::try_from(n).expect("a slot of the plan"));
            assert_eq!(addresses.host.octets()[..2], [10, 11]);
            assert_eq!(addresses.veth_namespace.octets()[..2], [10, 12]);
            assert_eq!(
                SlotAddresses::other_end(addresses.veth_namespace),
                Some(addresses.veth_host)
            );
            assert_eq!(SlotAddresses::other_end(addresses.veth_host), None);
            assert_eq!(SlotAddresses::other_end(addresses.host), None);
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

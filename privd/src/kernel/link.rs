//! Links, addresses, routes and neighbours, by rtnetlink.
//!
//! A [`Links`] acts on the network namespace in which it was opened, whichever thread uses it.
//! Built on the message types that `rtnetlink` is built on, without its tasks; see [`super::netlink`].

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NlasIterator};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sys::socket::SockProtocol;
use roost_common::ids::Slot;
use roost_common::names;

use super::netlink::{Kind, Netlink};

/// `RTMGRP_LINK`: links that come, change and go.
const LINK_EVENTS: u32 = 1;
/// `RTMGRP_IPV4_IFADDR`: IPv4 addresses that come, change and go.
const ADDRESS_EVENTS: u32 = 0x10;
/// Length of `struct ifinfomsg`, which the attributes of a link follow.
const LINK_HEADER: usize = 16;
/// Length of `struct ifaddrmsg`, which the attributes of an address follow.
const ADDRESS_HEADER: usize = 8;

/// One end of a veth pair to be made.
pub(crate) struct VethEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: [u8; 6],
}

/// A link of the namespace that a [`Links`] acts on, by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Index(u32);

/// The links of one network namespace.
pub(crate) struct Links(Netlink);

impl Links {
    /// The links of the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkRoute, 0).map(Self)
    }

    /// The link `name`.
    pub(crate) fn index(&mut self, name: &str) -> io::Result<Index> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let mut found = None;
        self.0
            .request(RouteNetlinkMessage::GetLink(message), Kind::Change(0), |payload| {
                found = payload
                    .get(4..)
                    .and_then(|rest| rest.first_chunk())
                    .map(|index| u32::from_ne_bytes(*index));
            })?;
        found.map(Index).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Makes a veth pair, one end here and the other in `namespace`: made there, not moved there, which would wait for RCU.
    pub(crate) fn add_veth(
        &mut self,
        here: &VethEnd<'_>,
        there: &VethEnd<'_>,
        namespace: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes.extend([
            LinkAttribute::IfName(there.name.to_owned()),
            LinkAttribute::Address(there.mac.to_vec()),
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
        ]);
        let mut message = LinkMessage::default();
        // With an address of our choice udev's policy for made-up addresses leaves the link alone.
        message.attributes.extend([
            LinkAttribute::IfName(here.name.to_owned()),
            LinkAttribute::Address(here.mac.to_vec()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ]);
        self.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Gives a link no IPv6 address of its own making. To be done before the link is up.
    pub(crate) fn close_ipv6(&mut self, link: Index) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = link.0;
        message
            .attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
                AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
            ])]));
        match self.change(RouteNetlinkMessage::SetLink(message), 0) {
            // A kernel without IPv6, or with it switched off: nothing to close.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(()),
            outcome => outcome,
        }
    }

    /// Sets a link's hardware address.
    pub(crate) fn set_mac(&mut self, link: Index, mac: [u8; 6]) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = link.0;
        message.attributes.push(LinkAttribute::Address(mac.to_vec()));
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Switches a link on.
    pub(crate) fn up(&mut self, link: Index) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = link.0;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Adds an address to a link.
    pub(crate) fn add_address(&mut self, link: Index, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix;
        message.header.index = link.0;
        message.attributes.extend([
            AddressAttribute::Local(IpAddr::V4(address)),
            AddressAttribute::Address(IpAddr::V4(address)),
        ]);
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a route to `destination` through `gateway`, which is reached over `link`.
    pub(crate) fn add_route(
        &mut self,
        (destination, prefix): (Ipv4Addr, u8),
        gateway: Ipv4Addr,
        link: Index,
    ) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: AddressFamily::Inet,
            destination_prefix_length: prefix,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        if prefix > 0 {
            message
                .attributes
                .push(RouteAttribute::Destination(RouteAddress::Inet(destination)));
        }
        message.attributes.extend([
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
            RouteAttribute::Oif(link.0),
        ]);
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a neighbour that is never asked for.
    pub(crate) fn add_neighbour(&mut self, link: Index, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = link.0;
        message.header.state = NeighbourState::Permanent;
        message.attributes.extend([
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ]);
        self.change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The slots whose veth pair has its host end here.
    pub(crate) fn veths(&mut self) -> io::Result<Vec<Slot>> {
        let mut slots = Vec::new();
        self.0.request(
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            Kind::List,
            |payload| {
                let name = attribute(payload, LINK_HEADER, libc::IFLA_IFNAME);
                let name = name.and_then(|bytes| String::from_utf8(bytes).ok());
                slots.extend(name.and_then(|name| names::veth_slot(name.trim_end_matches('\0'))));
            },
        )?;
        slots.sort_unstable();
        Ok(slots)
    }

    /// The IPv4 addresses of all links here.
    pub(crate) fn addresses(&mut self) -> io::Result<Vec<Ipv4Addr>> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        let mut addresses = Vec::new();
        self.0
            .request(RouteNetlinkMessage::GetAddress(message), Kind::List, |payload| {
                addresses.extend(local_address(payload));
            })?;
        Ok(addresses)
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.0.request(message, Kind::Change(flags), |_| {})
    }
}

/// Links of the calling thread's network namespace that come and go, from now on.
pub(crate) struct LinkEvents(Netlink);

impl LinkEvents {
    /// Listens.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkRoute, LINK_EVENTS).map(Self)
    }

    /// Waits until a link has come, changed or gone; `false` when none has in time.
    pub(crate) fn wait(&mut self, limit: Duration) -> io::Result<bool> {
        self.0.wait_for_event(limit)
    }
}

/// IPv4 addresses of the calling thread's network namespace that come and go, from now on.
pub(crate) struct AddressEvents(Netlink);

impl AddressEvents {
    /// Listens.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkRoute, ADDRESS_EVENTS).map(Self)
    }

    /// Whether an address for which `counts` holds has come, changed or gone since this was last asked, or may have. Does not wait.
    pub(crate) fn any(&mut self, counts: impl Fn(Ipv4Addr) -> bool) -> io::Result<bool> {
        let mut any = false;
        let is_whole = self
            .0
            .events(|payload| any |= local_address(payload).is_none_or(&counts))?;
        Ok(any || !is_whole)
    }
}

fn local_address(payload: &[u8]) -> Option<Ipv4Addr> {
    let local = attribute(payload, ADDRESS_HEADER, libc::IFA_LOCAL)?;
    <[u8; 4]>::try_from(local).ok().map(Ipv4Addr::from)
}

/// An attribute of a message with a header of `header` bytes.
fn attribute(payload: &[u8], header: usize, kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(payload.get(header..)?)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == kind)
        .map(|attribute| attribute.value().to_vec())
}

//! Networks, from both ends: sockets on the host and in an internet of our own, and a guest that is frames on a tap.

use super::*;

/// A guest that is nothing but frames on the tap.
struct Guest {
    tap: File,
}

/// A UDP or ICMP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    /// `None` is ICMP.
    ports: Option<(u16, u16)>,
    /// The first byte of what it carries, for ICMP the type.
    first: u8,
}

/// A part of a datagram that is sent in two.
#[derive(Debug, Clone, Copy)]
enum Half {
    /// With the ports.
    Head,
    /// Without.
    Rest,
}

/// `struct virtio_net_hdr`, which every frame of this tap begins with.
const VNET: usize = 10;

impl Guest {
    fn on(network: &Network) -> Self {
        let tap = network.tap.as_fd().try_clone_to_owned().expect("a copy");
        Self { tap: tap.into() }
    }

    fn send(&mut self, packet: Packet) {
        self.send_from(GUEST_MAC, packet);
    }

    fn send_from(&mut self, mac: [u8; 6], packet: Packet) {
        let (protocol, payload) = match packet.ports {
            Some((from, to)) => {
                let mut udp = [from.to_be_bytes(), to.to_be_bytes(), 9u16.to_be_bytes(), [0; 2]].concat();
                udp.push(packet.first);
                (17, udp)
            }
            None => {
                let mut icmp = vec![packet.first, 0, 0, 0, 0, 1, 0, 1];
                let sum = checksum(&icmp).to_be_bytes();
                icmp[2..4].copy_from_slice(&sum);
                (1, icmp)
            }
        };
        let length = u16::try_from(20 + payload.len()).expect("small").to_be_bytes();
        let mut ip = vec![0x45, 0, length[0], length[1], 0, 1, 0x40, 0, 64, protocol, 0, 0];
        ip.extend(packet.source.octets());
        ip.extend(packet.destination.octets());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        self.send_frame(mac, 0x0800, &[ip, payload].concat());
    }

    /// A fragment of a UDP datagram of 16 bytes: its head, or what it carries.
    fn send_fragment(&mut self, number: u8, packet: Packet, half: Half) {
        let (from, to) = packet.ports.expect("UDP");
        let (payload, place) = match half {
            // More follows.
            Half::Head => (
                [from.to_be_bytes(), to.to_be_bytes(), 16u16.to_be_bytes(), [0; 2]].concat(),
                0x2000_u16,
            ),
            // In units of eight bytes.
            Half::Rest => (vec![packet.first; 8], 1),
        };
        let length = u16::try_from(20 + payload.len()).expect("small").to_be_bytes();
        let place = place.to_be_bytes();
        let mut ip = vec![
            0x45, 0, length[0], length[1], 7, number, place[0], place[1], 64, 17, 0, 0,
        ];
        ip.extend(packet.source.octets());
        ip.extend(packet.destination.octets());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        self.send_frame(GUEST_MAC, 0x0800, &[ip, payload].concat());
    }

    fn send_frame(&mut self, mac: [u8; 6], ether_type: u16, payload: &[u8]) {
        let mut frame = vec![0; VNET];
        frame.extend(GATEWAY_MAC);
        frame.extend(mac);
        frame.extend(ether_type.to_be_bytes());
        frame.extend(payload);
        assert_eq!(self.tap.write(&frame).expect("sent"), frame.len());
    }

    /// The next packet that `wanted` holds for; others are passed over.
    fn receive(&mut self, wanted: impl Fn(&Packet) -> bool) -> Packet {
        eventually("a packet for the guest", || self.next().filter(|packet| wanted(packet)))
    }

    /// The host sends a packet to the guest's address, and that is the first one that comes, and the only one.
    fn hears_the_host_and_nobody_else(&mut self, address: Ipv4Addr) {
        let host = udp("0.0.0.0:0");
        host.send_to(b"h", (address, 49983)).expect("sent");
        let first = self.receive(|packet| packet.ports.is_some());
        assert_eq!(first.first, b'h', "somebody else got through: {first:?}");
        assert_eq!(self.next(), None);
    }

    fn next(&mut self) -> Option<Packet> {
        let mut frame = [0; 2048];
        let length = match self.tap.read(&mut frame) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        let frame = &frame[VNET..length];
        if frame[12..14] != [8, 0] {
            return None;
        }
        let (ip, payload) = frame[14..].split_at(20);
        let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
        let port = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
        let udp = ip[9] == 17;
        Some(Packet {
            source: address(12),
            destination: address(16),
            ports: udp.then(|| (port(0), port(2))),
            first: payload[if udp { 8 } else { 0 }],
        })
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

fn to(destination: Ipv4Addr, port: u16) -> Packet {
    Packet {
        source: GUEST,
        destination,
        ports: Some((5000, port)),
        first: b'x',
    }
}

fn server() -> Ipv4Addr {
    internet::SERVER.parse().expect("an address")
}

fn udp(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .expect("a limit");
    socket
}

/// A socket bound in the internet's namespace.
fn udp_in_the_internet(port: u16) -> UdpSocket {
    std::thread::spawn(move || {
        let namespace = File::open("/run/netns/internet").expect("the namespace");
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
        udp(&format!("0.0.0.0:{port}"))
    })
    .join()
    .expect("bound")
}

fn received(socket: &UdpSocket) -> io::Result<(u8, Ipv4Addr, u16)> {
    let mut byte = [0; 16];
    let (_, from) = socket.recv_from(&mut byte)?;
    match from.ip() {
        std::net::IpAddr::V4(address) => Ok((byte[0], address, from.port())),
        std::net::IpAddr::V6(_) => panic!("IPv6"),
    }
}

#[test]
fn the_host_reaches_the_guest_at_its_slots_address_and_gets_answers() {
    in_rig(|| {
        let rig = Rig::start();
        let network = rig.open_network(7, closed_policy()).expect("opened");
        let addresses = SlotAddresses::of(Slot::try_from(7).expect("a slot"));
        assert_eq!(network.addresses, addresses);
        let mut guest = Guest::on(&network);
        let socket = udp("0.0.0.0:0");
        // The very first packet: nothing waits for ARP.
        socket.send_to(b"h", (addresses.host, 49983)).expect("sent");
        let packet = guest.receive(|packet| packet.ports.is_some());
        assert_eq!((packet.source, packet.destination), (addresses.veth_host, GUEST));
        let (from, to) = packet.ports.expect("UDP");
        assert_eq!((to, packet.first), (49983, b'h'));
        guest.send(Packet {
            source: GUEST,
            destination: packet.source,
            ports: Some((to, from)),
            first: b'g',
        });
        assert_eq!(received(&socket).expect("an answer"), (b'g', addresses.host, 49983));
        assert_eq!(rig.count(&network.tap, Rule::FromHost), 1);
        assert_eq!(rig.count(&network.tap, Rule::Established), 1);
        assert_eq!(rig.count(&network.tap, Rule::NoInternet), 0);

        // Ping to the gateway is answered; that it is not ARP that answers shows in the type.
        let ping = Packet {
            source: GUEST,
            destination: GATEWAY,
            ports: None,
            first: 8,
        };
        guest.send(ping);
        let pong = guest.receive(|packet| packet.ports.is_none());
        assert_eq!((pong.source, pong.destination, pong.first), (GATEWAY, GUEST, 0));
        assert_eq!(rig.count(&network.tap, Rule::Gateway), 1);
    });
}

#[test]
fn an_open_policy_lets_the_guest_reach_the_internet_and_nothing_else() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let (one, two) = (
            rig.open_network(1, open_policy()).expect("opened"),
            rig.open_network(2, open_policy()).expect("opened"),
        );
        let (mut guest, mut other) = (Guest::on(&one), Guest::on(&two));
        let world = udp_in_the_internet(7000);
        guest.send(to(server(), 7000));
        let (byte, from, port) = received(&world).expect("it arrived");
        assert_eq!(
            (byte, from),
            (b'x', internet::HOST.parse().expect("an address")),
            "masqueraded as the host"
        );
        world.send_to(b"w", (from, port)).expect("sent");
        let answer = guest.receive(|packet| packet.ports.is_some());
        assert_eq!(
            (answer.source, answer.destination, answer.first),
            (server(), GUEST, b'w')
        );
        assert_eq!(rig.count(&one.tap, Rule::Internet), 1);

        // The host by each of its addresses, the other sandbox by each of its, private ranges, link-local, itself.
        let host = udp("0.0.0.0:7001");
        let (mine, others) = (one.addresses, two.addresses);
        let closed = [
            internet::HOST.parse().expect("an address"),
            mine.veth_host,
            mine.veth_namespace,
            mine.host,
            others.host,
            others.veth_host,
            others.veth_namespace,
            GATEWAY,
            Ipv4Addr::new(169, 254, 169, 254),
            Ipv4Addr::new(10, 0, 0, 1),
            Ipv4Addr::new(172, 16, 0, 1),
            Ipv4Addr::new(192, 168, 1, 1),
            Ipv4Addr::new(100, 64, 0, 1),
            Ipv4Addr::new(198, 18, 0, 1),
            Ipv4Addr::new(240, 0, 0, 1),
        ];
        for (n, destination) in (1..).zip(closed) {
            guest.send(to(destination, 7001));
            assert_eq!(rig.count(&one.tap, Rule::ClosedRange), n, "{destination} is open");
        }
        assert!(received(&host).is_err(), "the host was reached");
        assert_eq!(other.next(), None, "the other sandbox was reached");
        assert_eq!(rig.count(&two.tap, Rule::FromElsewhere), 0);

        // Martians never get as far as the policy.
        let multicast = Ipv4Addr::new(224, 0, 0, 251);
        for destination in [
            Ipv4Addr::LOCALHOST,
            Ipv4Addr::BROADCAST,
            Ipv4Addr::UNSPECIFIED,
            multicast,
        ] {
            guest.send(to(destination, 7001));
        }
        assert!(received(&host).is_err(), "the host was reached");

        // Neither does what another sandbox sends as somebody else, nor IPv6.
        let spoofed = Packet {
            source: others.veth_host,
            ..to(server(), 7000)
        };
        guest.send(spoofed);
        guest.send_from([2, 0, 0, 0, 0, 9], to(server(), 7000));
        assert_eq!(rig.count(&one.tap, Rule::Spoofed), 2);
        let mut ipv6 = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
        ipv6.extend([0x20; 32]);
        guest.send_frame(GUEST_MAC, 0x86DD, &ipv6);
        assert_eq!(rig.count(&one.tap, Rule::Ipv6), 1);
        assert!(received(&world).is_err(), "a spoofed packet got out");

        // A packet behind the tag of a VLAN, one that names its own way to the other sandbox, and a gateway at the guest's address.
        let to_world = ip_to(server(), &[], 7000);
        for tag in [0x8100, 0x88A8] {
            guest.send_frame(GUEST_MAC, tag, &[&[0, 7, 8, 0][..], &to_world].concat());
        }
        let [a, b, c, d] = others.host.octets();
        guest.send_frame(GUEST_MAC, 0x0800, &ip_to(GATEWAY, &[131, 7, 4, a, b, c, d, 0], 7001));
        let request = [0, 1, 8, 0, 6, 4, 0, 2];
        let arp = [
            &request[..],
            &GUEST_MAC,
            &GATEWAY.octets(),
            &GATEWAY_MAC,
            &GATEWAY.octets(),
        ]
        .concat();
        guest.send_frame(GUEST_MAC, 0x0806, &arp);
        assert!(received(&world).is_err(), "a tagged packet got out");
        assert!(received(&host).is_err(), "the host was reached");
        assert_eq!(other.next(), None, "the other sandbox was reached");
        guest.send(to(server(), 7000));
        assert_eq!(
            received(&world).expect("it arrived").0,
            b'x',
            "the gateway is where it was"
        );
        let caller = udp("0.0.0.0:0");
        caller.send_to(b"h", (mine.host, 49983)).expect("sent");
        assert_eq!(guest.receive(|packet| packet.first == b'h').destination, GUEST);
    });
}

/// An IP packet of the guest with options, and a datagram in it.
fn ip_to(destination: Ipv4Addr, options: &[u8], port: u16) -> Vec<u8> {
    let udp = [5000_u16.to_be_bytes(), port.to_be_bytes(), 9u16.to_be_bytes(), [0; 2]].concat();
    let head = u8::try_from(20 + options.len()).expect("short");
    let mut ip = vec![0x40 | (head / 4), 0, 0, head + 9, 0, 1, 0x40, 0, 64, 17, 0, 0];
    ip.extend(GUEST.octets());
    ip.extend(destination.octets());
    ip.extend(options);
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    [&ip[..], &udp, b"x"].concat()
}

#[test]
fn who_gets_a_slot_after_another_hears_nothing_of_what_that_had_open() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let world = udp_in_the_internet(7000);
        let first = rig.open_network(20, open_policy()).expect("opened");
        Guest::on(&first).send(to(server(), 7000));
        let (_, from, port) = received(&world).expect("it arrived");
        drop(first);
        let second = rig.open_network(20, open_policy()).expect("opened again");
        let mut guest = Guest::on(&second);
        world.send_to(b"w", (from, port)).expect("sent");
        // By the time the host gets through, the other would have.
        eventually("the answer to come as far as the sandbox", || {
            (rig.count(&second.tap, Rule::FromElsewhere) > 0).then_some(())
        });
        guest.hears_the_host_and_nobody_else(second.addresses.host);
    });
}

#[test]
fn a_flood_of_connections_ends_at_a_bound_and_costs_nobody_else_any() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let (one, two) = (
            rig.open_network(1, open_policy()).expect("opened"),
            rig.open_network(2, open_policy()).expect("opened"),
        );
        let (mut guest, mut other) = (Guest::on(&one), Guest::on(&two));
        let world = udp_in_the_internet(7000);
        let from_port = |port| Packet {
            ports: Some((port, 7000)),
            ..to(server(), 7000)
        };
        guest.send(from_port(1000));
        let (_, from, port) = received(&world).expect("it arrived");
        // Each port is a connection.
        let more = 50;
        for n in 1..u16::try_from(MAX_CONNECTIONS).expect("below ports") + more {
            guest.send(from_port(1000 + n));
        }
        let count = |rule| rig.count(&one.tap, rule);
        assert_eq!(count(Rule::Internet), u64::from(MAX_CONNECTIONS));
        assert_eq!(count(Rule::TooMany), u64::from(more));
        // A new policy is not a new count.
        rig.set_policy(&one.tap, open_policy()).expect("changed");
        guest.send(from_port(60_000));
        assert_eq!((count(Rule::TooMany), count(Rule::Internet)), (u64::from(more) + 1, 0));
        // What was there goes on, the host gets through, and so does another sandbox.
        while received(&world).is_ok() {}
        world.send_to(b"w", (from, port)).expect("sent");
        assert_eq!(guest.receive(|packet| packet.ports.is_some()).first, b'w');
        udp("0.0.0.0:0")
            .send_to(b"h", (one.addresses.host, 49983))
            .expect("sent");
        assert_eq!(guest.receive(|packet| packet.ports.is_some()).first, b'h');
        other.send(from_port(1000));
        assert_eq!(received(&world).expect("it arrived").0, b'x');
    });
}

#[test]
fn nobody_but_the_host_opens_connections_to_a_guest() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let network = rig.open_network(3, open_policy()).expect("opened");
        let mut guest = Guest::on(&network);
        // The neighbour routes to the guest through the host, once as itself and once as the host's end.
        run("ip -n internet route add 10.8.0.0/13 via 203.0.113.1");
        let world = udp_in_the_internet(7000);
        world.send_to(b"w", (network.addresses.host, 49983)).expect("sent");
        world
            .send_to(b"w", (network.addresses.veth_namespace, 49983))
            .expect("sent");
        run(&format!(
            "ip -n internet addr add {}/32 dev lo",
            network.addresses.veth_host
        ));
        let bound = network.addresses.veth_host;
        let forged = std::thread::spawn(move || {
            let namespace = File::open("/run/netns/internet").expect("the namespace");
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
            udp(&format!("{bound}:7002"))
        });
        let forged = forged.join().expect("bound");
        forged.send_to(b"f", (network.addresses.host, 49983)).expect("sent");
        // The host itself still gets through, and by then the others would have.
        guest.hears_the_host_and_nobody_else(network.addresses.host);
    });
}

#[test]
fn closing_the_internet_ends_what_was_open_and_keeps_the_host() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let network = rig.open_network(4, open_policy()).expect("opened");
        let mut guest = Guest::on(&network);
        let world = udp_in_the_internet(7000);
        guest.send(to(server(), 7000));
        let (_, from, port) = received(&world).expect("it arrived");
        world.send_to(b"w", (from, port)).expect("sent");
        guest.receive(|packet| packet.first == b'w');

        rig.set_policy(&network.tap, closed_policy()).expect("replaced");
        guest.send(to(server(), 7000));
        assert_eq!(rig.count(&network.tap, Rule::NoInternet), 1);
        assert!(received(&world).is_err(), "an open flow went on");
        let socket = udp("0.0.0.0:0");
        socket.send_to(b"h", (network.addresses.host, 49983)).expect("sent");
        let packet = guest.receive(|packet| packet.first == b'h');
        let (from, to_port) = packet.ports.expect("UDP");
        guest.send(Packet {
            source: GUEST,
            destination: packet.source,
            ports: Some((to_port, from)),
            first: b'g',
        });
        assert_eq!(received(&socket).expect("an answer").0, b'g');

        rig.set_policy(&network.tap, open_policy()).expect("replaced");
        guest.send(to(server(), 7000));
        assert!(received(&world).is_ok(), "open again");
    });
}

#[test]
fn lists_open_and_close_addresses_at_once_and_each_is_counted() {
    in_rig(|| {
        let rig = Rig::start();
        let internet = internet::Internet::connect();
        let other = Ipv4Addr::new(198, 51, 100, 7);
        internet.add_address(&other.to_string());
        let range = |text: &str| text.parse::<Cidr>().expect("a range");
        let network = rig.open_network(12, open_policy()).expect("opened");
        let mut guest = Guest::on(&network);
        let world = udp_in_the_internet(7000);
        guest.send(to(other, 7000));
        assert!(received(&world).is_ok(), "the control");

        // A flow that is open ends too.
        let denying = EgressPolicy {
            denied: vec![range("198.51.100.0/24"), range("203.0.113.99")],
            ..open_policy()
        };
        rig.set_policy(&network.tap, denying).expect("replaced");
        guest.send(to(other, 7000));
        assert!(received(&world).is_err(), "a denied address is reached");
        guest.send(to(server(), 7000));
        assert!(received(&world).is_ok(), "an address that is not denied is not reached");
        let rows = rig.rows(&network.tap, Rule::Denied);
        let counted: Vec<_> = rows.iter().map(|row| (row.network, row.packets)).collect();
        assert_eq!(
            counted,
            [(Some(range("198.51.100.0/24")), 1), (Some(range("203.0.113.99")), 0)]
        );

        let listing = EgressPolicy {
            allowed: vec![range("198.51.100.0/24")],
            ..EgressPolicy::of(Internet::Listed)
        };
        rig.set_policy(&network.tap, listing).expect("replaced");
        guest.send(to(server(), 7000));
        assert!(received(&world).is_err(), "what is not listed is reached");
        guest.send(to(other, 7000));
        assert!(received(&world).is_ok(), "what is listed is not reached");
        assert_eq!(rig.count(&network.tap, Rule::NotListed), 1);

        for (network_of, length) in [([192, 0, 2, 1], 24), ([0, 0, 0, 0], 33)] {
            let bad = Cidr {
                network: network_of.into(),
                length,
            };
            let policy = EgressPolicy {
                denied: vec![bad],
                ..open_policy()
            };
            let refused = rig.set_policy(&network.tap, policy).expect_err("refused");
            assert_eq!(refused, PrivdError::WrongRange { range: bad });
        }
        let many = EgressPolicy {
            denied: vec![range("192.0.2.0/24"); 65],
            ..open_policy()
        };
        let refused = rig.set_policy(&network.tap, many).expect_err("too many");
        let what = ResourceKind::Ranges;
        assert_eq!(refused, PrivdError::TooMany { what, max: 64 });
        // The most that there may be is taken, with all that the kernel is told of it.
        let most = EgressPolicy {
            allowed: (0..64).map(|n| range(&format!("11.0.{n}.0/24"))).collect(),
            denied: (0..64).map(|n| range(&format!("12.0.{n}.0/24"))).collect(),
            resolvers: vec![server(); 8],
            proxied: true,
            ..EgressPolicy::of(Internet::Listed)
        };
        rig.set_policy(&network.tap, most.clone()).expect("replaced");
        assert_eq!(rig.rows(&network.tap, Rule::Denied).len(), 64);
        rig.open_network(13, most).expect("opened");
    });
}

#[test]
fn a_datagram_in_pieces_is_judged_as_a_whole_and_half_of_one_goes_nowhere() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let resolver = Ipv4Addr::new(192, 168, 53, 53);
        run("ip -n internet addr add 192.168.53.53/32 dev lo");
        let policy = EgressPolicy {
            resolvers: vec![resolver],
            ..open_policy()
        };
        let network = rig.open_network(14, policy.clone()).expect("opened");
        let mut guest = Guest::on(&network);
        let (world, dns, other) = (
            udp_in_the_internet(7000),
            udp_in_the_internet(53),
            udp_in_the_internet(54),
        );
        // The control, in either order.
        for (number, [first, second]) in [(1, [Half::Head, Half::Rest]), (2, [Half::Rest, Half::Head])] {
            guest.send_fragment(number, to(server(), 7000), first);
            guest.send_fragment(number, to(server(), 7000), second);
            assert!(received(&world).is_ok(), "{first:?} first");
        }
        // The ports of what has none are nobody's guess.
        guest.send_fragment(3, to(resolver, 53), Half::Rest);
        assert_eq!(rig.count(&network.tap, Rule::Resolver), 0);
        guest.send_fragment(4, to(resolver, 54), Half::Head);
        guest.send_fragment(4, to(resolver, 54), Half::Rest);
        assert!(
            received(&other).is_err(),
            "a resolver's other port is reached in pieces"
        );
        assert_eq!(rig.count(&network.tap, Rule::ClosedRange), 1);
        // A second head with another port on top of the first.
        guest.send_fragment(5, to(resolver, 53), Half::Head);
        guest.send_fragment(5, to(resolver, 54), Half::Head);
        guest.send_fragment(5, to(resolver, 53), Half::Rest);
        assert!(received(&other).is_err(), "a head on top of a head counts");
        drop(received(&dns));

        let denying = EgressPolicy {
            denied: vec![Cidr {
                network: server(),
                length: 32,
            }],
            ..policy
        };
        rig.set_policy(&network.tap, denying).expect("replaced");
        guest.send_fragment(6, to(server(), 7000), Half::Head);
        guest.send_fragment(6, to(server(), 7000), Half::Rest);
        assert!(received(&world).is_err(), "a denied address is reached in pieces");
        rig.set_policy(&network.tap, closed_policy()).expect("replaced");
        for half in [Half::Rest, Half::Head] {
            guest.send_fragment(7, to(server(), 7000), half);
        }
        assert!(received(&world).is_err(), "the internet is reached in pieces");
    });
}

#[test]
fn a_resolver_is_reached_on_port_53_alone_even_in_a_closed_range() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let resolver = Ipv4Addr::new(192, 168, 53, 53);
        run("ip -n internet addr add 192.168.53.53/32 dev lo");
        let policy = |internet| EgressPolicy {
            resolvers: vec![resolver],
            ..EgressPolicy::of(internet)
        };
        let network = rig.open_network(5, policy(Internet::Open)).expect("opened");
        let mut guest = Guest::on(&network);
        let (dns, other) = (udp_in_the_internet(53), udp_in_the_internet(54));
        guest.send(to(resolver, 53));
        assert!(received(&dns).is_ok());
        guest.send(to(resolver, 54));
        assert!(received(&other).is_err());
        assert_eq!(
            (
                rig.count(&network.tap, Rule::Resolver),
                rig.count(&network.tap, Rule::ClosedRange)
            ),
            (1, 1)
        );
        rig.set_policy(&network.tap, policy(Internet::Closed))
            .expect("replaced");
        guest.send(to(resolver, 53));
        assert!(received(&dns).is_err(), "name servers are reachable without internet");
        let many = EgressPolicy {
            resolvers: vec![resolver; 9],
            ..open_policy()
        };
        let refused = rig.set_policy(&network.tap, many).expect_err("nine resolvers");
        let what = ResourceKind::Resolvers;
        assert_eq!(refused, PrivdError::TooMany { what, max: 8 });
    });
}

#[test]
fn a_slot_that_is_in_use_is_busy_and_one_on_its_way_out_is_waited_for() {
    in_rig(|| {
        let rig = Rig::start();
        let network = rig.open_network(6, open_policy()).expect("opened");
        let started = Instant::now();
        let what = ResourceKind::Network;
        assert_eq!(
            rig.open_network(6, open_policy()).expect_err("two of them"),
            PrivdError::Busy { what }
        );
        assert!(started.elapsed() >= Duration::from_secs(5), "it was not waited for");
        drop(network);
        let started = Instant::now();
        let again = rig.open_network(6, open_policy()).expect("opened at last");
        println!("opened {} ms after it was closed", started.elapsed().as_millis());
        drop(again);
        let started = Instant::now();
        eventually("the veth to be gone", || {
            (!Path::new("/sys/class/net/roost-v6").exists()).then_some(())
        });
        println!("gone {} ms after it was closed", started.elapsed().as_millis());
    });
}

#[test]
fn a_host_table_that_somebody_flushed_is_back_before_a_network_is_handed_out() {
    in_rig(|| {
        let rig = Rig::start();
        let before = host_table().expect("the table of privd's start");
        run("nft flush ruleset");
        assert_eq!(host_table(), None);
        let network = rig.open_network(8, open_policy()).expect("opened");
        assert_eq!(host_table().as_ref(), Some(&before));

        run("nft flush ruleset");
        rig.set_policy(&network.tap, open_policy()).expect("replaced");
        assert_eq!(host_table().as_ref(), Some(&before));
        // One that is there is left alone, and with it what it counts and who watches it.
        let handles = || run_for_text("nft", &["--handle", "list", "table", "inet", "roost"]);
        let untouched = handles();
        rig.set_policy(&network.tap, closed_policy()).expect("replaced");
        assert_eq!(handles(), untouched);
    });
}

#[test]
fn an_address_that_the_host_gets_or_loses_counts_from_the_next_network_on() {
    in_rig(|| {
        let rig = Rig::start();
        let address: Cidr = "198.51.100.9".parse().expect("an address");
        let is_closed = |network: &Network| {
            let rows = rig.rows(&network.tap, Rule::ClosedRange);
            rows.iter().any(|row| row.network == Some(address))
        };
        let opened = |slot| rig.open_network(slot, open_policy()).expect("opened");
        let before = opened(9);
        assert!(!is_closed(&before));
        for slot in [10, 12] {
            run("ip addr add 198.51.100.9/32 dev lo");
            assert!(is_closed(&opened(slot)));
            rig.set_policy(&before.tap, open_policy()).expect("replaced");
            assert!(is_closed(&before), "a policy is one of its time");
            // More changes than the kernel keeps for who does not ask.
            let others: String = (0..254)
                .map(|n| format!("addr add 198.51.102.{n}/32 dev lo\naddr del 198.51.102.{n}/32 dev lo\n"))
                .collect();
            std::fs::write("/run/addresses", others).expect("written");
            run("ip -batch /run/addresses");
            run("ip addr del 198.51.100.9/32 dev lo");
            assert!(!is_closed(&opened(slot + 1)));
            rig.set_policy(&before.tap, open_policy()).expect("replaced");
            assert!(!is_closed(&before), "a policy is one of its time");
        }
    });
}

fn host_table() -> Option<String> {
    run_for_text("nft", &["list", "table", "inet", "roost"])
}

fn run_for_text(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().expect("runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    output.status.success().then_some(text)
}

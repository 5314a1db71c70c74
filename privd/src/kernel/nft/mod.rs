//! Packet filter rules: as data, as what the kernel loads, and their counters.
//!
//! Two tables. `inet roost` on the host is static, the same for one sandbox or ten thousand. `inet roost-sandbox` lives in each
//! sandbox's namespace and dies with it; its chains `named`, `cut` and `egress` are the policy and can be replaced while it runs:
//!
//! ```text
//! prerouting: IPv6, spoofed --> drop         forward: invalid --> drop
//!             to the host address --> DNAT            from tap0 --> cut (all but answers to the host: internet closed, denied,
//!             from tap0 --> named (DNAT to                 not listed --> drop)
//!               the agent where names count)          established --> accept
//! input:      established; ping to the gateway        from tap0, more than it may have --> drop
//!             else drop                               from tap0 to eth0 --> egress (the agent where names count, resolvers,
//!                                                          closed ranges, internet)
//! postrouting: from the guest --> SNAT                from eth0 to tap0: the host's end only
//!                                                     else drop
//! ```
//!
//! What a policy forbids is asked for ahead of what is established, so that it ends connections that were made before.
//!
//! Rules are data ([`Chain`], [`Line`]) so that tests can ask them about packets without a kernel. Every counted rule carries its
//! [`Rule`]'s name as a comment, by which its counter is found again.
//! ARP is not of this family; the guest's neighbour entry is permanent (`netns`), so it has nothing to forge.

mod load;

use std::ffi::CStr;
use std::net::Ipv4Addr;

use nftnl::expr::States;
use nftnl::{ChainType, Hook};
use roost_common::net::{
    CLOSED, Cidr, GATEWAY, GUEST, GUEST_MAC, MAX_CONNECTIONS, PROXY_HTTP, PROXY_TLS, SlotAddresses, VETH_NET, is_closed,
};
use roost_common::privd::{EgressPolicy, Internet, Rule};

pub(crate) use load::Rules;

/// The host's table.
const HOST_TABLE: &CStr = c"roost";
/// A sandbox's table.
const SANDBOX_TABLE: &CStr = c"roost-sandbox";

/// Where chains of the same hook stand to each other; from `linux/netfilter_ipv4.h`.
mod priority {
    /// Before connection tracking.
    pub(super) const RAW: i32 = -300;
    pub(super) const DNAT: i32 = -100;
    pub(super) const FILTER: i32 = 0;
    pub(super) const SNAT: i32 = 100;
}

/// Most addresses of the host that get a rule each; its own table closes the host to sandboxes in any case.
const MAX_OWN: usize = 128;

/// Port of name servers.
const DNS: u16 = 53;
/// What is judged by name: a server's port, and the agent's.
const BY_NAME: [(u16, u16); 2] = [(80, PROXY_HTTP), (443, PROXY_TLS)];

/// A chain of rules.
#[derive(Debug, Clone)]
struct Chain {
    name: &'static CStr,
    base: Option<Base>,
    lines: Vec<Line>,
}

/// What makes a chain be asked.
#[derive(Debug, Clone, Copy)]
struct Base {
    hook: Hook,
    priority: i32,
    kind: ChainType,
    policy: nftnl::Policy,
}

/// One rule.
#[derive(Debug, Clone)]
struct Line {
    matches: Vec<Match>,
    count: Option<Rule>,
    verdict: Verdict,
}

/// A condition; all of a rule's have to hold.
#[derive(Debug, Clone, PartialEq)]
enum Match {
    In(Interface),
    Out(Interface),
    NotOut(Interface),
    Ipv6,
    SourceMacIsNot([u8; 6]),
    Source(Ipv4Addr, u8),
    SourceIsNot(Ipv4Addr, u8),
    Destination(Ipv4Addr, u8),
    Protocol(u8),
    DestinationPort(u16),
    IcmpType(u8),
    State(States),
    /// The connection was opened from outside, to the host address.
    Translated,
    /// This rule has been asked about more connections than so many, this one among them, that the kernel still knows.
    ConnectionsOver(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interface {
    Is(&'static CStr),
    StartsWith(&'static CStr),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(&'static CStr),
    Dnat(Ipv4Addr),
    DnatPort(Ipv4Addr, u16),
    Snat(Ipv4Addr),
    Masquerade,
}

const TAP: Interface = Interface::Is(crate::kernel::tap::NAME);
const UPLINK: Interface = Interface::Is(c"eth0");
const VETHS: Interface = Interface::StartsWith(c"roost-v");

const NAMED: &CStr = c"named";
const CUT: &CStr = c"cut";
const EGRESS: &CStr = c"egress";

/// `IPPROTO_*` and the ICMP type that rules name.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ECHO_REQUEST: u8 = 8;

fn line(matches: impl Into<Vec<Match>>, count: impl Into<Option<Rule>>, verdict: Verdict) -> Line {
    Line {
        matches: matches.into(),
        count: count.into(),
        verdict,
    }
}

fn chain(
    name: &'static CStr,
    hook: Hook,
    priority: i32,
    kind: ChainType,
    policy: nftnl::Policy,
    lines: Vec<Line>,
) -> Chain {
    let base = Base {
        hook,
        priority,
        kind,
        policy,
    };
    Chain {
        name,
        base: Some(base),
        lines,
    }
}

fn known() -> Match {
    Match::State(States::ESTABLISHED | States::RELATED)
}

/// From a sandbox to the agent's end of its veth pair.
fn to_agent(port: u16) -> Line {
    let (veths, length) = VETH_NET;
    let matches = [
        Match::In(VETHS),
        Match::Source(veths, length),
        Match::Destination(veths, length),
        Match::Protocol(TCP),
        Match::DestinationPort(port),
    ];
    line(matches, None, Verdict::Accept)
}

/// The host's table: sandboxes reach neither the host nor each other, and nobody but the host opens connections to them.
fn host_chains() -> Vec<Chain> {
    use nftnl::Policy::Accept;
    let (veths, length) = VETH_NET;
    vec![
        chain(
            c"input",
            Hook::In,
            priority::FILTER,
            ChainType::Filter,
            Accept,
            vec![
                // Answers come from the sandbox's host address, which is outside the veths' range.
                line([Match::In(VETHS), known()], None, Verdict::Accept),
                // Only what a sandbox's own rules have led there gets out of it to the host.
                to_agent(PROXY_HTTP),
                to_agent(PROXY_TLS),
                line([Match::In(VETHS)], None, Verdict::Drop),
            ],
        ),
        chain(
            c"forward",
            Hook::Forward,
            priority::FILTER,
            ChainType::Filter,
            Accept,
            vec![
                line([Match::In(VETHS), Match::Ipv6], None, Verdict::Drop),
                line(
                    [Match::In(VETHS), Match::SourceIsNot(veths, length)],
                    None,
                    Verdict::Drop,
                ),
                line([Match::In(VETHS), Match::Out(VETHS)], None, Verdict::Drop),
                line([Match::Out(VETHS), known()], None, Verdict::Accept),
                line([Match::Out(VETHS)], None, Verdict::Drop),
            ],
        ),
        chain(
            c"postrouting",
            Hook::PostRouting,
            priority::SNAT,
            ChainType::Nat,
            Accept,
            vec![line(
                [Match::Source(veths, length), Match::NotOut(VETHS)],
                None,
                Verdict::Masquerade,
            )],
        ),
    ]
}

/// The part of a sandbox's table that never changes.
fn sandbox_chains(addresses: &SlotAddresses) -> Vec<Chain> {
    use nftnl::Policy::{Accept, Drop};
    vec![
        chain(
            c"guard",
            Hook::PreRouting,
            priority::RAW,
            ChainType::Filter,
            Accept,
            vec![
                line([Match::Ipv6], Rule::Ipv6, Verdict::Drop),
                line(
                    [Match::In(TAP), Match::SourceMacIsNot(GUEST_MAC)],
                    Rule::Spoofed,
                    Verdict::Drop,
                ),
                line(
                    [Match::In(TAP), Match::SourceIsNot(GUEST, 32)],
                    Rule::Spoofed,
                    Verdict::Drop,
                ),
            ],
        ),
        chain(
            c"prerouting",
            Hook::PreRouting,
            priority::DNAT,
            ChainType::Nat,
            Accept,
            vec![
                line(
                    [Match::In(UPLINK), Match::Destination(addresses.host, 32)],
                    None,
                    Verdict::Dnat(GUEST),
                ),
                line([Match::In(TAP)], None, Verdict::Jump(NAMED)),
            ],
        ),
        chain(
            c"postrouting",
            Hook::PostRouting,
            priority::SNAT,
            ChainType::Nat,
            Accept,
            vec![line(
                [Match::Out(UPLINK), Match::Source(GUEST, 32)],
                None,
                Verdict::Snat(addresses.veth_namespace),
            )],
        ),
        chain(
            c"input",
            Hook::In,
            priority::FILTER,
            ChainType::Filter,
            Drop,
            vec![
                line(
                    [
                        Match::In(TAP),
                        Match::Destination(GATEWAY, 32),
                        Match::Protocol(ICMP),
                        Match::IcmpType(ECHO_REQUEST),
                    ],
                    Rule::Gateway,
                    Verdict::Accept,
                ),
                // All addresses of the namespace are in closed ranges.
                line([Match::In(TAP)], Rule::ClosedRange, Verdict::Drop),
                line([known()], Rule::Established, Verdict::Accept),
                line([Match::In(UPLINK)], Rule::FromElsewhere, Verdict::Drop),
            ],
        ),
        chain(
            c"forward",
            Hook::Forward,
            priority::FILTER,
            ChainType::Filter,
            Drop,
            vec![
                line([Match::State(States::INVALID)], Rule::Invalid, Verdict::Drop),
                line([Match::In(TAP)], None, Verdict::Jump(CUT)),
                line([known()], Rule::Established, Verdict::Accept),
                // Not in a chain that is replaced: the count would begin anew. The host keeps track of each of them too, for all sandboxes
                // in one table.
                line(
                    [Match::In(TAP), Match::ConnectionsOver(MAX_CONNECTIONS)],
                    Rule::TooMany,
                    Verdict::Drop,
                ),
                line([Match::In(TAP), Match::Out(UPLINK)], None, Verdict::Jump(EGRESS)),
                line(
                    [
                        Match::In(UPLINK),
                        Match::Out(TAP),
                        Match::Source(addresses.veth_host, 32),
                        Match::Translated,
                    ],
                    Rule::FromHost,
                    Verdict::Accept,
                ),
                line([Match::In(UPLINK)], Rule::FromElsewhere, Verdict::Drop),
            ],
        ),
    ]
}

/// The part of a sandbox's table that is its policy. `own` are the host's addresses.
fn policy_chains(policy: &EgressPolicy, agent: Ipv4Addr, own: &[Ipv4Addr]) -> [Chain; 3] {
    let [first, second, third] = match policy.internet {
        // Ahead of the rule for established connections, so that closing the internet ends those that are open.
        Internet::Closed => [vec![], cut(vec![line([], Rule::NoInternet, Verdict::Drop)]), vec![]],
        Internet::Open | Internet::Listed => [named(policy, agent), cut(listed(policy)), egress(policy, agent, own)],
    };
    [(NAMED, first), (CUT, second), (EGRESS, third)].map(|(name, lines)| Chain {
        name,
        base: None,
        lines,
    })
}

/// New connections of the guest's that lead to the agent.
fn named(policy: &EgressPolicy, agent: Ipv4Addr) -> Vec<Line> {
    if !policy.proxied {
        return vec![];
    }
    let denied = policy.denied.iter().map(|range| to(*range));
    let unjudged = policy.allowed.iter().map(|range| to(*range)).chain(denied);
    let unjudged = unjudged.map(|range| line([range], None, Verdict::Return));
    let judged = BY_NAME.map(|(port, proxy)| {
        let matches = [Match::Protocol(TCP), Match::DestinationPort(port)];
        line(matches, Rule::ByName, Verdict::DnatPort(agent, proxy))
    });
    unjudged.chain(judged).collect()
}

/// What ends connections whatever their state, but for answers to the host.
fn cut(lines: Vec<Line>) -> Vec<Line> {
    if lines.is_empty() {
        return lines;
    }
    let answers = line([Match::Translated], None, Verdict::Return);
    std::iter::once(answers).chain(lines).collect()
}

/// What the policy's lists forbid.
fn listed(policy: &EgressPolicy) -> Vec<Line> {
    let is_listed = policy.internet == Internet::Listed;
    if policy.denied.is_empty() && !is_listed {
        return vec![];
    }
    let resolvers = resolvers(policy).map(|matches| line(matches, None, Verdict::Return));
    let denied = policy.denied.iter();
    let denied = denied.map(|range| line([to(*range)], Rule::Denied, Verdict::Drop));
    let mut lines: Vec<Line> = resolvers.chain(denied).collect();
    if is_listed {
        let allowed = policy.allowed.iter();
        lines.extend(allowed.map(|range| line([to(*range)], None, Verdict::Return)));
        lines.push(line([], Rule::NotListed, Verdict::Drop));
    }
    lines
}

/// What new connections may lead to.
fn egress(policy: &EgressPolicy, agent: Ipv4Addr, own: &[Ipv4Addr]) -> Vec<Line> {
    let mut lines = Vec::new();
    if policy.proxied {
        // Translated, so none that the guest itself has sent there.
        lines.extend(BY_NAME.map(|(_, proxy)| {
            let matches = [
                Match::Translated,
                Match::Destination(agent, 32),
                Match::Protocol(TCP),
                Match::DestinationPort(proxy),
            ];
            line(matches, None, Verdict::Accept)
        }));
    }
    lines.extend(resolvers(policy).map(|matches| line(matches, Rule::Resolver, Verdict::Accept)));
    let own = own.iter().filter(|address| !is_closed(**address)).take(MAX_OWN);
    let own = own.map(|address| Cidr {
        network: *address,
        length: 32,
    });
    for range in CLOSED.into_iter().chain(own) {
        lines.push(line([to(range)], Rule::ClosedRange, Verdict::Drop));
    }
    lines.push(line([], Rule::Internet, Verdict::Accept));
    lines
}

fn resolvers(policy: &EgressPolicy) -> impl Iterator<Item = [Match; 3]> {
    policy.resolvers.iter().flat_map(|resolver| {
        [UDP, TCP].map(|protocol| {
            [
                Match::Destination(*resolver, 32),
                Match::Protocol(protocol),
                Match::DestinationPort(DNS),
            ]
        })
    })
}

fn to(range: Cidr) -> Match {
    Match::Destination(range.network, range.length)
}

#[cfg(test)]
mod tests {
    use roost_common::ids::Slot;

    use super::*;

    /// A packet as the rules see it.
    #[derive(Debug, Clone, Copy)]
    struct Packet {
        from: &'static CStr,
        to: &'static CStr,
        ipv6: bool,
        mac: [u8; 6],
        source: Ipv4Addr,
        destination: Ipv4Addr,
        protocol: u8,
        port: u16,
        state: States,
        translated: bool,
        connections: u32,
    }

    const UNKNOWN: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);

    /// A new connection of the guest's to a public address.
    const OUTGOING: Packet = Packet {
        from: c"tap0",
        to: c"eth0",
        ipv6: false,
        mac: GUEST_MAC,
        source: GUEST,
        destination: UNKNOWN,
        protocol: TCP,
        port: 443,
        state: States::NEW,
        translated: false,
        connections: 1,
    };

    fn matches(condition: &Match, packet: &Packet) -> bool {
        let is = |interface: Interface, name: &CStr| match interface {
            Interface::Is(exactly) => exactly == name,
            Interface::StartsWith(start) => name.to_bytes().starts_with(start.to_bytes()),
        };
        let v4 = |holds: bool| !packet.ipv6 && holds;
        match *condition {
            Match::In(interface) => is(interface, packet.from),
            Match::Out(interface) => is(interface, packet.to),
            Match::NotOut(interface) => !is(interface, packet.to),
            Match::Ipv6 => packet.ipv6,
            Match::SourceMacIsNot(mac) => packet.mac != mac,
            Match::Source(network, length) => v4(Cidr { network, length }.contains(packet.source)),
            Match::SourceIsNot(network, length) => v4(!Cidr { network, length }.contains(packet.source)),
            Match::Destination(network, length) => v4(Cidr { network, length }.contains(packet.destination)),
            Match::Protocol(protocol) => packet.protocol == protocol,
            Match::DestinationPort(port) => packet.port == port,
            Match::IcmpType(kind) => packet.protocol == ICMP && packet.port == u16::from(kind),
            Match::State(states) => states.contains(packet.state),
            Match::Translated => packet.translated,
            Match::ConnectionsOver(most) => packet.connections > most,
        }
    }

    /// What becomes of a packet in a chain, and which rule counted it last; `None` is the end of a chain that is no base chain.
    fn ask(chains: &[Chain], name: &CStr, packet: &Packet) -> (Option<Verdict>, Option<Rule>) {
        let chain = chains.iter().find(|chain| chain.name == name).expect("a chain");
        for line in &chain.lines {
            if !line.matches.iter().all(|condition| matches(condition, packet)) {
                continue;
            }
            match line.verdict {
                Verdict::Return => break,
                Verdict::Jump(to) => {
                    if let (Some(verdict), count) = ask(chains, to, packet) {
                        return (Some(verdict), count);
                    }
                }
                verdict => return (Some(verdict), line.count),
            }
        }
        let policy = chain.base.map(|base| match base.policy {
            nftnl::Policy::Accept => Verdict::Accept,
            nftnl::Policy::Drop => Verdict::Drop,
        });
        (policy, None)
    }

    const HOSTS_OWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

    fn sandbox(internet: Internet, resolvers: &[Ipv4Addr]) -> Vec<Chain> {
        under(&EgressPolicy {
            resolvers: resolvers.to_vec(),
            ..EgressPolicy::of(internet)
        })
    }

    fn under(policy: &EgressPolicy) -> Vec<Chain> {
        let mut chains = sandbox_chains(&addresses());
        let own = [HOSTS_OWN, Ipv4Addr::LOCALHOST];
        chains.extend(policy_chains(policy, addresses().veth_host, &own));
        chains
    }

    fn addresses() -> SlotAddresses {
        SlotAddresses::of(Slot::try_from(7).expect("a slot"))
    }

    fn forwarded(chains: &[Chain], packet: &Packet) -> (Verdict, Option<Rule>) {
        // Two base chains are asked; the first drop ends it.
        let (guard, count) = ask(chains, c"guard", packet);
        if guard == Some(Verdict::Drop) {
            return (Verdict::Drop, count);
        }
        let (verdict, count) = ask(chains, c"forward", packet);
        (verdict.expect("a base chain decides"), count)
    }

    #[test]
    fn an_open_policy_accepts_public_addresses_alone() {
        let chains = sandbox(Internet::Open, &[]);
        assert_eq!(forwarded(&chains, &OUTGOING), (Verdict::Accept, Some(Rule::Internet)));
        for closed in CLOSED.map(|range| range.network).into_iter().chain([
            HOSTS_OWN,
            addresses().host,
            addresses().veth_host,
            Ipv4Addr::new(169, 254, 169, 254),
            Ipv4Addr::new(172, 31, 255, 255),
            Ipv4Addr::new(100, 127, 255, 255),
            Ipv4Addr::new(239, 255, 255, 250),
            Ipv4Addr::BROADCAST,
        ]) {
            // GRE and SCTP among them.
            for protocol in [ICMP, TCP, UDP, 47, 132] {
                let packet = Packet {
                    destination: closed,
                    protocol,
                    ..OUTGOING
                };
                let dropped = (Verdict::Drop, Some(Rule::ClosedRange));
                assert_eq!(forwarded(&chains, &packet), dropped, "{closed}, protocol {protocol}");
            }
        }
        for open in [
            [1, 1, 1, 1],
            [11, 0, 0, 0],
            [172, 32, 0, 0],
            [100, 128, 0, 0],
            [203, 0, 113, 2],
            [223, 255, 255, 255],
        ] {
            let packet = Packet {
                destination: open.into(),
                ..OUTGOING
            };
            assert_eq!(forwarded(&chains, &packet).0, Verdict::Accept, "{open:?}");
        }
    }

    #[test]
    fn a_guest_has_so_many_connections_and_keeps_those() {
        let chains = sandbox(Internet::Open, &[]);
        let with = |connections, state| {
            let packet = Packet {
                connections,
                state,
                ..OUTGOING
            };
            forwarded(&chains, &packet)
        };
        let passes = (Verdict::Accept, Some(Rule::Internet));
        assert_eq!(with(MAX_CONNECTIONS, States::NEW), passes);
        let over = MAX_CONNECTIONS + 1;
        assert_eq!(with(over, States::NEW), (Verdict::Drop, Some(Rule::TooMany)));
        let established = (Verdict::Accept, Some(Rule::Established));
        assert_eq!(with(over, States::ESTABLISHED), established);
        let from_host = Packet {
            from: c"eth0",
            to: c"tap0",
            source: addresses().veth_host,
            destination: GUEST,
            translated: true,
            connections: over,
            ..OUTGOING
        };
        assert_eq!(forwarded(&chains, &from_host), (Verdict::Accept, Some(Rule::FromHost)));
    }

    #[test]
    fn a_closed_policy_lets_nothing_of_the_guests_own_out_whatever_its_state() {
        let chains = sandbox(Internet::Closed, &[UNKNOWN]);
        for state in [States::NEW, States::ESTABLISHED, States::RELATED, States::UNTRACKED] {
            for (protocol, port) in [(TCP, 443), (UDP, DNS), (TCP, DNS), (ICMP, 8)] {
                let packet = Packet {
                    state,
                    protocol,
                    port,
                    ..OUTGOING
                };
                assert_eq!(forwarded(&chains, &packet), (Verdict::Drop, Some(Rule::NoInternet)));
            }
        }
        let answer = Packet {
            destination: addresses().veth_host,
            state: States::ESTABLISHED,
            translated: true,
            ..OUTGOING
        };
        assert_eq!(forwarded(&chains, &answer), (Verdict::Accept, Some(Rule::Established)));
        // That it goes to where the host is does not make it an answer.
        let opened = Packet {
            state: States::NEW,
            ..answer
        };
        assert_eq!(forwarded(&chains, &opened).0, Verdict::Drop);
    }

    /// What becomes of a new connection of the guest's to an address, and of one that was made before.
    fn outcomes(chains: &[Chain], destination: [u8; 4]) -> [(Verdict, Option<Rule>); 2] {
        [States::NEW, States::ESTABLISHED].map(|state| {
            let packet = Packet {
                destination: destination.into(),
                state,
                ..OUTGOING
            };
            forwarded(chains, &packet)
        })
    }

    fn ranges(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().expect("a range")).collect()
    }

    const LET_THROUGH: [(Verdict, Option<Rule>); 2] = [
        (Verdict::Accept, Some(Rule::Internet)),
        (Verdict::Accept, Some(Rule::Established)),
    ];

    #[test]
    fn what_is_denied_is_closed_to_connections_that_were_made_before_too() {
        let chains = under(&EgressPolicy {
            denied: ranges(&["203.0.113.0/25", "8.8.4.4"]),
            ..EgressPolicy::of(Internet::Open)
        });
        let denied = [(Verdict::Drop, Some(Rule::Denied)); 2];
        assert_eq!(outcomes(&chains, [203, 0, 113, 127]), denied);
        assert_eq!(outcomes(&chains, [8, 8, 4, 4]), denied);
        assert_eq!(outcomes(&chains, [203, 0, 113, 128]), LET_THROUGH);
        let [closed, _] = outcomes(&chains, [192, 168, 0, 1]);
        assert_eq!(closed, (Verdict::Drop, Some(Rule::ClosedRange)));
        assert_answers_reach_the_host(&chains);
    }

    #[test]
    fn a_list_opens_what_is_on_it_and_nothing_that_is_denied_or_closed() {
        let chains = under(&EgressPolicy {
            resolvers: vec![UNKNOWN],
            allowed: ranges(&["203.0.113.0/24", "10.0.0.0/8", "11.0.0.0/8"]),
            denied: ranges(&["203.0.113.7"]),
            ..EgressPolicy::of(Internet::Listed)
        });
        assert_eq!(outcomes(&chains, [203, 0, 113, 8]), LET_THROUGH);
        assert_eq!(outcomes(&chains, [11, 255, 0, 0]), LET_THROUGH);
        let not_listed = [(Verdict::Drop, Some(Rule::NotListed)); 2];
        assert_eq!(outcomes(&chains, [1, 1, 1, 1]), not_listed);
        assert_eq!(
            outcomes(&chains, UNKNOWN.octets()),
            not_listed,
            "a resolver's other ports"
        );
        let denied = [(Verdict::Drop, Some(Rule::Denied)); 2];
        assert_eq!(outcomes(&chains, [203, 0, 113, 7]), denied);
        // A list opens no private range.
        for closed in [[10, 0, 0, 1], addresses().veth_host.octets(), addresses().host.octets()] {
            let [new, _] = outcomes(&chains, closed);
            assert_eq!(new, (Verdict::Drop, Some(Rule::ClosedRange)), "{closed:?}");
        }
        for protocol in [UDP, TCP] {
            let question = Packet {
                protocol,
                port: DNS,
                ..OUTGOING
            };
            assert_eq!(forwarded(&chains, &question), (Verdict::Accept, Some(Rule::Resolver)));
        }
        let nothing = under(&EgressPolicy::of(Internet::Listed));
        assert_eq!(outcomes(&nothing, [203, 0, 113, 8]), not_listed);
        assert_answers_reach_the_host(&chains);
    }

    fn assert_answers_reach_the_host(chains: &[Chain]) {
        let answer = Packet {
            destination: addresses().veth_host,
            state: States::ESTABLISHED,
            translated: true,
            ..OUTGOING
        };
        assert_eq!(forwarded(chains, &answer), (Verdict::Accept, Some(Rule::Established)));
    }

    #[test]
    fn what_is_reached_by_name_leads_to_the_agent_and_nothing_else_does() {
        let chains = under(&EgressPolicy {
            allowed: ranges(&["203.0.113.0/24"]),
            denied: ranges(&["8.8.4.4"]),
            proxied: true,
            ..EgressPolicy::of(Internet::Listed)
        });
        let agent = addresses().veth_host;
        let led = |packet: &Packet| ask(&chains, c"prerouting", packet);
        let untouched = (Some(Verdict::Accept), None);
        let proxied = |port| (Some(Verdict::DnatPort(agent, port)), Some(Rule::ByName));
        assert_eq!(led(&OUTGOING), proxied(PROXY_TLS));
        assert_eq!(led(&Packet { port: 80, ..OUTGOING }), proxied(PROXY_HTTP));
        for other in [
            Packet { port: 8443, ..OUTGOING },
            Packet {
                protocol: UDP,
                ..OUTGOING
            },
            Packet {
                destination: [203, 0, 113, 1].into(),
                ..OUTGOING
            },
            Packet {
                destination: [8, 8, 4, 4].into(),
                ..OUTGOING
            },
            Packet {
                from: c"eth0",
                ..OUTGOING
            },
        ] {
            assert_eq!(led(&other), untouched, "{other:?}");
        }
        let there = Packet {
            destination: agent,
            port: PROXY_TLS,
            translated: true,
            ..OUTGOING
        };
        assert_eq!(forwarded(&chains, &there).0, Verdict::Accept);
        for wrong in [
            // Of the guest's own accord: not judged by name.
            Packet {
                translated: false,
                ..there
            },
            Packet { port: 22, ..there },
            Packet {
                destination: Ipv4Addr::new(10, 12, 0, 4),
                ..there
            },
        ] {
            assert_eq!(forwarded(&chains, &wrong).0, Verdict::Drop, "{wrong:?}");
        }
        // Without names nothing does.
        let plain = sandbox(Internet::Open, &[]);
        assert_eq!(ask(&plain, c"prerouting", &OUTGOING), untouched);
        assert_eq!(forwarded(&plain, &there).0, Verdict::Drop);
        // The host takes it from its sandboxes alone.
        let host = host_chains();
        let arrived = Packet {
            from: c"roost-v7",
            source: addresses().veth_namespace,
            ..there
        };
        assert_eq!(ask(&host, c"input", &arrived).0, Some(Verdict::Accept));
        for wrong in [
            Packet { port: 22, ..arrived },
            Packet {
                source: UNKNOWN,
                ..arrived
            },
            Packet {
                destination: HOSTS_OWN,
                ..arrived
            },
        ] {
            assert_eq!(ask(&host, c"input", &wrong).0, Some(Verdict::Drop), "{wrong:?}");
        }
    }

    #[test]
    fn a_guest_is_only_who_it_is() {
        let chains = sandbox(Internet::Open, &[]);
        for spoofed in [
            Packet {
                mac: [2, 0, 0, 0, 0, 1],
                ..OUTGOING
            },
            Packet {
                source: addresses().veth_namespace,
                ..OUTGOING
            },
        ] {
            for state in [States::NEW, States::ESTABLISHED] {
                let packet = Packet { state, ..spoofed };
                assert_eq!(forwarded(&chains, &packet), (Verdict::Drop, Some(Rule::Spoofed)));
            }
        }
        let invalid = Packet {
            state: States::INVALID,
            ..OUTGOING
        };
        assert_eq!(forwarded(&chains, &invalid), (Verdict::Drop, Some(Rule::Invalid)));
    }

    #[test]
    fn ipv6_goes_nowhere() {
        let chains = sandbox(Internet::Open, &[]);
        for from in [c"tap0", c"eth0", c"lo"] {
            let packet = Packet {
                ipv6: true,
                from,
                state: States::ESTABLISHED,
                ..OUTGOING
            };
            assert_eq!(forwarded(&chains, &packet), (Verdict::Drop, Some(Rule::Ipv6)));
        }
        let host = host_chains();
        let packet = Packet {
            ipv6: true,
            from: c"roost-v7",
            ..OUTGOING
        };
        assert_eq!(ask(&host, c"forward", &packet).0, Some(Verdict::Drop));
        assert_eq!(ask(&host, c"input", &packet).0, Some(Verdict::Drop));
    }

    #[test]
    fn resolvers_are_open_on_their_port_alone() {
        let resolver = Ipv4Addr::new(10, 0, 0, 53);
        let chains = sandbox(Internet::Open, &[resolver]);
        for (protocol, port, verdict) in [
            (UDP, DNS, (Verdict::Accept, Some(Rule::Resolver))),
            (TCP, DNS, (Verdict::Accept, Some(Rule::Resolver))),
            (TCP, 80, (Verdict::Drop, Some(Rule::ClosedRange))),
            (ICMP, DNS, (Verdict::Drop, Some(Rule::ClosedRange))),
        ] {
            let packet = Packet {
                destination: resolver,
                protocol,
                port,
                ..OUTGOING
            };
            assert_eq!(forwarded(&chains, &packet), verdict);
        }
    }

    #[test]
    fn only_the_hosts_end_opens_connections_to_a_guest() {
        let chains = sandbox(Internet::Open, &[]);
        let incoming = Packet {
            from: c"eth0",
            to: c"tap0",
            mac: [2, 0, 0, 0, 0, 1],
            source: addresses().veth_host,
            destination: GUEST,
            translated: true,
            ..OUTGOING
        };
        assert_eq!(forwarded(&chains, &incoming), (Verdict::Accept, Some(Rule::FromHost)));
        for source in [UNKNOWN, HOSTS_OWN, addresses().host, Ipv4Addr::new(10, 12, 0, 4)] {
            let packet = Packet { source, ..incoming };
            assert_eq!(forwarded(&chains, &packet), (Verdict::Drop, Some(Rule::FromElsewhere)));
        }
    }

    #[test]
    fn the_namespace_itself_answers_ping_at_the_gateway_and_nothing_else() {
        let chains = sandbox(Internet::Open, &[]);
        let ping = Packet {
            destination: GATEWAY,
            protocol: ICMP,
            port: u16::from(ECHO_REQUEST),
            ..OUTGOING
        };
        assert_eq!(
            ask(&chains, c"input", &ping),
            (Some(Verdict::Accept), Some(Rule::Gateway))
        );
        for other in [
            Packet { port: 13, ..ping },
            Packet { protocol: TCP, ..ping },
            Packet {
                destination: addresses().veth_namespace,
                ..ping
            },
            Packet {
                protocol: TCP,
                state: States::ESTABLISHED,
                ..ping
            },
        ] {
            assert_eq!(
                ask(&chains, c"input", &other),
                (Some(Verdict::Drop), Some(Rule::ClosedRange)),
                "{other:?}"
            );
        }
        let outside = Packet {
            from: c"eth0",
            source: UNKNOWN,
            ..ping
        };
        assert_eq!(
            ask(&chains, c"input", &outside),
            (Some(Verdict::Drop), Some(Rule::FromElsewhere))
        );
    }

    #[test]
    fn the_host_keeps_sandboxes_from_itself_and_from_each_other() {
        let chains = host_chains();
        let out = Packet {
            from: c"roost-v7",
            to: c"uplink",
            source: addresses().veth_namespace,
            ..OUTGOING
        };
        let verdict = |chain, packet: &Packet| ask(&chains, chain, packet).0.expect("decided");
        assert_eq!(verdict(c"forward", &out), Verdict::Accept);
        assert_eq!(verdict(c"postrouting", &out), Verdict::Masquerade);
        assert_eq!(verdict(c"input", &out), Verdict::Drop);
        let answer = Packet {
            state: States::ESTABLISHED,
            ..out
        };
        assert_eq!(verdict(c"input", &answer), Verdict::Accept);
        for state in [States::NEW, States::ESTABLISHED] {
            let across = Packet {
                to: c"roost-v8",
                state,
                ..out
            };
            assert_eq!(verdict(c"forward", &across), Verdict::Drop);
            let forged = Packet {
                source: UNKNOWN,
                state,
                ..out
            };
            assert_eq!(verdict(c"forward", &forged), Verdict::Drop);
        }
        // What the host asked at the sandbox's host address is answered from there.
        let from_host_address = Packet {
            source: addresses().host,
            ..answer
        };
        assert_eq!(verdict(c"input", &from_host_address), Verdict::Accept);
        let into = Packet {
            from: c"uplink",
            to: c"roost-v7",
            ..OUTGOING
        };
        assert_eq!(verdict(c"forward", &into), Verdict::Drop);
        let reply = Packet {
            state: States::ESTABLISHED,
            ..into
        };
        assert_eq!(verdict(c"forward", &reply), Verdict::Accept);
        let unrelated = Packet {
            to: c"docker0",
            from: c"uplink",
            ..OUTGOING
        };
        assert_eq!(verdict(c"forward", &unrelated), Verdict::Accept, "not our traffic");
        assert_eq!(verdict(c"postrouting", &unrelated), Verdict::Accept);
    }
}

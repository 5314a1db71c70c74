//! Rules into the kernel, as one transaction each, and their counters out of it.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io;
use std::net::Ipv4Addr;

use netlink_packet_core::{NLM_F_ACK, NetlinkSerializable, NlasIterator};
use nftnl::expr::{
    Bitwise, Cmp, CmpOp, Conntrack, Counter, Immediate, InterfaceName, Ipv4HeaderField, LLHeaderField, Masquerade,
    Meta, Nat, NatType, NetworkHeaderField, Payload, Register, TransportHeaderField,
};
use nftnl::{Batch, FinalizedBatch, MsgType, ProtoFamily};
use nix::sys::socket::SockProtocol;
use roost_common::net::{Cidr, SlotAddresses};
use roost_common::privd::{EgressPolicy, NetworkCounters, Rule, RuleCounter};

use super::{
    Chain, HOST_TABLE, Interface, Line, Match, SANDBOX_TABLE, Verdict, host_chains, policy_chains, sandbox_chains,
};
use crate::kernel::netlink::{Kind, Netlink, messages};
use crate::kernel::sys::ConnectionsOver;

/// The connection's destination was translated; from `linux/netfilter/nf_conntrack_common.h`.
const IPS_DST_NAT: u32 = 1 << 5;

/// The packet filter of the network namespace in which it was opened.
pub(crate) struct Rules(Netlink);

impl Rules {
    /// The packet filter of the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkNetFilter, 0).map(Self)
    }

    /// Puts the host's table in place of whatever is there, in one step.
    pub(crate) fn ensure_host(&mut self) -> io::Result<()> {
        let table = nftnl::Table::new(HOST_TABLE, ProtoFamily::Inet);
        let mut batch = Batch::new();
        // Made first so that deleting it cannot fail.
        batch.add(&table, MsgType::Add);
        batch.add(&table, MsgType::Del);
        batch.add(&table, MsgType::Add);
        add_chains(&mut batch, &table, &host_chains());
        self.commit(&batch.finalize())
    }

    /// Whether the host's table is there.
    pub(crate) fn has_host(&mut self) -> io::Result<bool> {
        let (mut found, request) = (false, Ask::table(HOST_TABLE));
        match self.0.request(request, Kind::Change(0), |_| found = true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            outcome => outcome.map(|()| found),
        }
    }

    /// Loads a sandbox's table into a namespace that has none.
    pub(crate) fn load_sandbox(
        &mut self,
        addresses: &SlotAddresses,
        policy: &EgressPolicy,
        own: &[Ipv4Addr],
    ) -> io::Result<()> {
        let table = nftnl::Table::new(SANDBOX_TABLE, ProtoFamily::Inet);
        let mut batch = Batch::new();
        batch.add(&table, MsgType::Add);
        let mut chains = policy_chains(policy, addresses.veth_host, own).to_vec();
        chains.extend(sandbox_chains(addresses));
        add_chains(&mut batch, &table, &chains);
        self.commit(&batch.finalize())
    }

    /// Replaces a sandbox's policy, in one step; `NotFound` where there is none. `agent` is the host's end of its veth pair.
    pub(crate) fn replace_policy(
        &mut self,
        policy: &EgressPolicy,
        agent: Ipv4Addr,
        own: &[Ipv4Addr],
    ) -> io::Result<()> {
        let table = nftnl::Table::new(SANDBOX_TABLE, ProtoFamily::Inet);
        let mut batch = Batch::new();
        for chain in policy_chains(policy, agent, own) {
            let target = nftnl::Chain::new(chain.name, &table);
            // A rule without a handle stands for all rules of its chain.
            batch.add(&nftnl::Rule::new(&target), MsgType::Del);
            for line in &chain.lines {
                batch.add(&line.rule(&target), MsgType::Add);
            }
        }
        self.commit(&batch.finalize())
    }

    /// The counters of a sandbox's table, added up by rule and destination; `None` where there is no such table.
    pub(crate) fn counters(&mut self) -> io::Result<Option<NetworkCounters>> {
        let mut found: BTreeMap<(Rule, Option<Cidr>), RuleCounter> = BTreeMap::new();
        self.0.request(Ask::rules_of(SANDBOX_TABLE), Kind::List, |payload| {
            let Some(one) = rule_counter(payload) else { return };
            let sum = found.entry((one.rule, one.network)).or_insert(RuleCounter {
                network: one.network,
                ..RuleCounter::zero(one.rule)
            });
            sum.packets = sum.packets.saturating_add(one.packets);
            sum.bytes = sum.bytes.saturating_add(one.bytes);
        })?;
        if found.is_empty() {
            return Ok(None);
        }
        let rules = Rule::ALL.into_iter().flat_map(|rule| {
            let rows: Vec<_> = found.values().filter(|row| row.rule == rule).copied().collect();
            if rows.is_empty() {
                vec![RuleCounter::zero(rule)]
            } else {
                rows
            }
        });
        Ok(Some(NetworkCounters { rules: rules.collect() }))
    }

    /// Has the kernel take all of a batch, or nothing of it.
    fn commit(&mut self, batch: &FinalizedBatch) -> io::Result<()> {
        let mut bytes = batch.iter().collect::<Vec<_>>().concat();
        acknowledge_the_last(&mut bytes)?;
        self.0.send(&bytes)?;
        // What fails is answered for by itself, ahead of it.
        self.0.acknowledgements(1)
    }
}

/// Leaves one message of a batch to be acknowledged, the last that was to be. A large policy has hundreds, and acknowledgements of all of
/// them do not fit the socket's queue.
fn acknowledge_the_last(batch: &mut [u8]) -> io::Result<()> {
    // Behind the length, of 32 bits, and the type, of 16.
    const FLAGS: usize = 6;
    let (mut at, mut asking) = (0, Vec::new());
    for message in messages(batch) {
        let message = message?;
        if message.flags() & NLM_F_ACK != 0 {
            asking.push((at + FLAGS, message.flags() & !NLM_F_ACK));
        }
        at += usize::try_from(message.length()).map_or(usize::MAX, |length| length.next_multiple_of(4));
    }
    asking.pop();
    for (at, flags) in asking {
        let place = batch.get_mut(at..at + size_of::<u16>());
        place
            .ok_or(io::ErrorKind::InvalidData)?
            .copy_from_slice(&flags.to_ne_bytes());
    }
    Ok(())
}

fn add_chains(batch: &mut Batch, table: &nftnl::Table, chains: &[Chain]) {
    let targets: Vec<_> = chains.iter().map(|chain| chain.target(table)).collect();
    // All chains first: a rule may jump to any of them.
    for target in &targets {
        batch.add(target, MsgType::Add);
    }
    for (chain, target) in chains.iter().zip(&targets) {
        for line in &chain.lines {
            batch.add(&line.rule(target), MsgType::Add);
        }
    }
}

impl Chain {
    fn target<'a>(&self, table: &'a nftnl::Table) -> nftnl::Chain<'a> {
        let mut target = nftnl::Chain::new(self.name, table);
        if let Some(base) = self.base {
            target.set_hook(base.hook, base.priority);
            target.set_type(base.kind);
            target.set_policy(base.policy);
        }
        target
    }
}

impl Line {
    fn rule<'a>(&self, chain: &'a nftnl::Chain<'_>) -> nftnl::Rule<'a> {
        let mut rule = nftnl::Rule::new(chain);
        for condition in &self.matches {
            condition.add_to(&mut rule);
        }
        if let Some(count) = self.count {
            rule.add_expr(&Counter);
            let destination = self.matches.iter().find_map(|condition| match condition {
                Match::Destination(network, length) => Some(format!(" {network}/{length}")),
                _ => None,
            });
            let comment = format!("{count}{}", destination.unwrap_or_default());
            let comment = CString::new(comment).expect("names of rules have no NUL");
            rule.set_comment(comment).expect("names of rules are short");
        }
        self.verdict.add_to(&mut rule);
        rule
    }
}

impl Match {
    fn add_to(&self, rule: &mut nftnl::Rule<'_>) {
        match *self {
            Self::In(interface) => {
                rule.add_expr(&Meta::IifName);
                rule.add_expr(&Cmp::new(CmpOp::Eq, interface.name()));
            }
            Self::Out(interface) => {
                rule.add_expr(&Meta::OifName);
                rule.add_expr(&Cmp::new(CmpOp::Eq, interface.name()));
            }
            Self::NotOut(interface) => {
                rule.add_expr(&Meta::OifName);
                rule.add_expr(&Cmp::new(CmpOp::Neq, interface.name()));
            }
            Self::Ipv6 => family(rule, libc::NFPROTO_IPV6),
            Self::SourceMacIsNot(mac) => {
                rule.add_expr(&Payload::LinkLayer(LLHeaderField::Saddr));
                rule.add_expr(&Cmp::new(CmpOp::Neq, &mac[..]));
            }
            Self::Source(network, length) => address(rule, Ipv4HeaderField::Saddr, CmpOp::Eq, network, length),
            Self::SourceIsNot(network, length) => address(rule, Ipv4HeaderField::Saddr, CmpOp::Neq, network, length),
            Self::Destination(network, length) => address(rule, Ipv4HeaderField::Daddr, CmpOp::Eq, network, length),
            Self::Protocol(protocol) => {
                rule.add_expr(&Meta::L4Proto);
                rule.add_expr(&Cmp::new(CmpOp::Eq, protocol));
            }
            Self::DestinationPort(port) => {
                // At the same place in TCP and UDP; a rule names the protocol before it.
                transport(rule, 2, 2);
                rule.add_expr(&Cmp::new(CmpOp::Eq, &port.to_be_bytes()[..]));
            }
            Self::IcmpType(kind) => {
                transport(rule, 0, 1);
                rule.add_expr(&Cmp::new(CmpOp::Eq, kind));
            }
            Self::State(states) => {
                rule.add_expr(&Conntrack::State);
                any_of(rule, states.bits());
            }
            Self::Translated => {
                rule.add_expr(&Conntrack::Status);
                any_of(rule, IPS_DST_NAT);
            }
            Self::ConnectionsOver(most) => rule.add_expr(&ConnectionsOver(most)),
        }
    }
}

fn family(rule: &mut nftnl::Rule<'_>, family: i32) {
    rule.add_expr(&Meta::NfProto);
    rule.add_expr(&Cmp::new(CmpOp::Eq, u8::try_from(family).expect("NFPROTO_* are small")));
}

fn address(rule: &mut nftnl::Rule<'_>, field: Ipv4HeaderField, op: CmpOp, network: Ipv4Addr, length: u8) {
    family(rule, libc::NFPROTO_IPV4);
    rule.add_expr(&Payload::Network(NetworkHeaderField::Ipv4(field)));
    if length < 32 {
        let mask = Cidr { network, length }.mask();
        rule.add_expr(&Bitwise::new(&mask.to_be_bytes()[..], &[0u8; 4][..]));
    }
    rule.add_expr(&Cmp::new(op, network));
}

fn transport(rule: &mut nftnl::Rule<'_>, offset: u32, length: u32) {
    // Bytes, whatever the fields are called: they go into the expression as they are.
    rule.add_expr(&Payload::Transport(TransportHeaderField::Raw {
        offset_bits: offset,
        length_bits: length,
    }));
}

fn any_of(rule: &mut nftnl::Rule<'_>, bits: u32) {
    rule.add_expr(&Bitwise::new(bits, 0u32));
    rule.add_expr(&Cmp::new(CmpOp::Neq, 0u32));
}

impl Interface {
    fn name(self) -> InterfaceName {
        match self {
            Self::Is(name) => InterfaceName::Exact(name.to_owned()),
            Self::StartsWith(name) => InterfaceName::StartingWith(name.to_owned()),
        }
    }
}

impl Verdict {
    fn add_to(self, rule: &mut nftnl::Rule<'_>) {
        match self {
            Self::Accept => rule.add_expr(&nftnl::expr::Verdict::Accept),
            Self::Drop => rule.add_expr(&nftnl::expr::Verdict::Drop),
            Self::Return => rule.add_expr(&nftnl::expr::Verdict::Return),
            Self::Jump(chain) => rule.add_expr(&nftnl::expr::Verdict::Jump {
                chain: chain.to_owned(),
            }),
            Self::Dnat(to) => translate(rule, NatType::DNat, to, None),
            Self::DnatPort(to, port) => translate(rule, NatType::DNat, to, Some(port)),
            Self::Snat(to) => translate(rule, NatType::SNat, to, None),
            Self::Masquerade => rule.add_expr(&Masquerade),
        }
    }
}

fn translate(rule: &mut nftnl::Rule<'_>, nat_type: NatType, to: Ipv4Addr, port: Option<u16>) {
    rule.add_expr(&Immediate::new(to.octets(), Register::Reg1));
    if let Some(port) = port {
        rule.add_expr(&Immediate::new(port.to_be_bytes(), Register::Reg2));
    }
    rule.add_expr(&Nat {
        nat_type,
        family: ProtoFamily::Ipv4,
        ip_register: Register::Reg1,
        port_register: port.map(|_| Register::Reg2),
    });
}

/// Asks for what there is of one table.
struct Ask {
    message: libc::c_int,
    attribute: u16,
    table: &'static CStr,
}

impl Ask {
    /// The table itself.
    fn table(table: &'static CStr) -> Self {
        Self {
            message: libc::NFT_MSG_GETTABLE,
            attribute: attributes::TABLE_NAME,
            table,
        }
    }

    /// Its rules, counters included.
    fn rules_of(table: &'static CStr) -> Self {
        Self {
            message: libc::NFT_MSG_GETRULE,
            attribute: attributes::RULE_TABLE,
            table,
        }
    }

    /// `struct nfgenmsg`, then the table's name as an attribute.
    fn payload(&self) -> Vec<u8> {
        let name = self.table.to_bytes_with_nul();
        let length = u16::try_from(4 + name.len()).expect("names of tables are short");
        let mut bytes = vec![ProtoFamily::Inet as u8, 0, 0, 0];
        bytes.extend(length.to_ne_bytes());
        bytes.extend(self.attribute.to_ne_bytes());
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }
}

impl NetlinkSerializable for Ask {
    fn message_type(&self) -> u16 {
        u16::try_from(libc::NFNL_SUBSYS_NFTABLES << 8 | self.message).expect("subsystem and message are a byte each")
    }

    fn buffer_len(&self) -> usize {
        self.payload().len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.payload());
    }
}

/// Attribute numbers of `linux/netfilter/nf_tables.h`.
mod attributes {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const RULE_USERDATA: u16 = 7;
    pub(super) const LIST_ELEM: u16 = 1;
    pub(super) const EXPR_NAME: u16 = 1;
    pub(super) const EXPR_DATA: u16 = 2;
    pub(super) const COUNTER_BYTES: u16 = 1;
    pub(super) const COUNTER_PACKETS: u16 = 2;
    /// In user data, a format of nft's own: type and length in a byte each, then a NUL-terminated comment.
    pub(super) const USERDATA_COMMENT: u8 = 0;
}

/// The counter of a rule that the kernel listed, if it is one of ours that counts.
fn rule_counter(payload: &[u8]) -> Option<RuleCounter> {
    // Behind `struct nfgenmsg`.
    let rule = payload.get(4..)?;
    let (kind, length, comment) = match attribute(rule, attributes::RULE_USERDATA)? {
        [kind, length, comment @ ..] => (*kind, usize::from(*length), comment),
        _ => return None,
    };
    let comment = comment.get(..length).filter(|_| kind == attributes::USERDATA_COMMENT)?;
    let text = CStr::from_bytes_until_nul(comment).ok()?.to_str().ok()?;
    let (name, network) = match text.split_once(' ') {
        Some((name, network)) => (name, Some(network.parse().ok()?)),
        None => (text, None),
    };
    let rule_is = Rule::ALL.into_iter().find(|rule| rule.to_string() == name)?;

    let expressions = attribute(rule, attributes::RULE_EXPRESSIONS)?;
    let counter = nested(expressions, attributes::LIST_ELEM)
        .find(|expression| attribute(expression, attributes::EXPR_NAME) == Some(b"counter\0"))?;
    let data = attribute(counter, attributes::EXPR_DATA)?;
    let number = |kind| attribute(data, kind)?.try_into().ok().map(u64::from_be_bytes);
    Some(RuleCounter {
        rule: rule_is,
        network,
        packets: number(attributes::COUNTER_PACKETS)?,
        bytes: number(attributes::COUNTER_BYTES)?,
    })
}

fn nested(bytes: &[u8], kind: u16) -> impl Iterator<Item = &[u8]> {
    NlasIterator::new(bytes)
        .map_while(Result::ok)
        .filter(move |attribute| attribute.kind() == kind)
        .filter_map(|attribute| attribute.into_inner().get(4..usize::from(attribute.length())))
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    nested(bytes, kind).next()
}

#[cfg(test)]
mod tests {
    use roost_common::privd::{Internet, MAX_NETWORKS};

    use super::*;

    #[test]
    fn one_message_of_a_batch_is_acknowledged() {
        let table = nftnl::Table::new(SANDBOX_TABLE, ProtoFamily::Inet);
        let mut batch = Batch::new();
        let policy = EgressPolicy {
            denied: vec!["192.0.2.0/24".parse().expect("a range"); MAX_NETWORKS],
            ..EgressPolicy::of(Internet::Open)
        };
        add_chains(&mut batch, &table, &policy_chains(&policy, Ipv4Addr::LOCALHOST, &[]));
        let batch = batch.finalize();
        let before = batch.iter().collect::<Vec<_>>().concat();
        let mut after = before.clone();
        acknowledge_the_last(&mut after).expect("a batch");
        let flags =
            |bytes: &[u8]| -> Vec<u16> { messages(bytes).map(|message| message.expect("one").flags()).collect() };
        let (before, after) = (flags(&before), flags(&after));
        assert!(before.iter().filter(|flags| **flags & NLM_F_ACK != 0).count() > MAX_NETWORKS);
        let asking: Vec<usize> = (0..after.len()).filter(|at| after[*at] & NLM_F_ACK != 0).collect();
        let last = before
            .iter()
            .rposition(|flags| flags & NLM_F_ACK != 0)
            .expect("one asks");
        assert_eq!(asking, [last]);
        assert!(
            before
                .iter()
                .zip(&after)
                .all(|(before, after)| before & !NLM_F_ACK == after & !NLM_F_ACK)
        );
    }
}

//! Rules into the kernel, as one transaction each, and their counters out of it.

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
use roost_common::net::SlotAddresses;
use roost_common::privd::{EgressPolicy, Rule, RuleCounter};

use super::{
    Chain, HOST_TABLE, Interface, Line, Match, SANDBOX_TABLE, Verdict, host_chains, mask, policy_chains, sandbox_chains,
};
use crate::kernel::netlink::{Kind, Netlink, messages};

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
        let mut chains = policy_chains(policy, own).to_vec();
        chains.extend(sandbox_chains(addresses));
        add_chains(&mut batch, &table, &chains);
        self.commit(&batch.finalize())
    }

    /// Replaces a sandbox's policy, in one step; `NotFound` where there is none.
    pub(crate) fn replace_policy(&mut self, policy: &EgressPolicy, own: &[Ipv4Addr]) -> io::Result<()> {
        let table = nftnl::Table::new(SANDBOX_TABLE, ProtoFamily::Inet);
        let mut batch = Batch::new();
        for chain in policy_chains(policy, own) {
            let target = nftnl::Chain::new(chain.name, &table);
            // A rule without a handle stands for all rules of its chain.
            batch.add(&nftnl::Rule::new(&target), MsgType::Del);
            for line in &chain.lines {
                batch.add(&line.rule(&target), MsgType::Add);
            }
        }
        self.commit(&batch.finalize())
    }

    /// The counters of a sandbox's table, added up by rule; empty where there is no such table.
    pub(crate) fn counters(&mut self) -> io::Result<Vec<RuleCounter>> {
        let mut found = Vec::new();
        self.0.request(Ask::rules_of(SANDBOX_TABLE), Kind::List, |payload| {
            found.extend(rule_counter(payload));
        })?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let total = |rule| {
            let counters = found.iter().filter(|counter| counter.rule == rule);
            counters.fold(
                RuleCounter {
                    rule,
                    packets: 0,
                    bytes: 0,
                },
                |sum, one| RuleCounter {
                    rule,
                    packets: sum.packets.saturating_add(one.packets),
                    bytes: sum.bytes.saturating_add(one.bytes),
                },
            )
        };
        Ok(Rule::ALL.map(total).to_vec())
    }

    /// Has the kernel take all of a batch, or nothing of it.
    fn commit(&mut self, batch: &FinalizedBatch) -> io::Result<()> {
        let bytes = batch.iter().collect::<Vec<_>>().concat();
        let mut expected = 0;
        for message in messages(&bytes) {
            expected += usize::from(message?.flags() & NLM_F_ACK != 0);
        }
        self.0.send(&bytes)?;
        self.0.acknowledgements(expected)
    }
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
            let comment = CString::new(count.to_string()).expect("names of rules have no NUL");
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
        rule.add_expr(&Bitwise::new(&mask(length).to_be_bytes()[..], &[0u8; 4][..]));
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
            Self::Dnat(to) => translate(rule, NatType::DNat, to),
            Self::Snat(to) => translate(rule, NatType::SNat, to),
            Self::Masquerade => rule.add_expr(&Masquerade),
        }
    }
}

fn translate(rule: &mut nftnl::Rule<'_>, nat_type: NatType, to: Ipv4Addr) {
    rule.add_expr(&Immediate::new(to.octets(), Register::Reg1));
    rule.add_expr(&Nat {
        nat_type,
        family: ProtoFamily::Ipv4,
        ip_register: Register::Reg1,
        port_register: None,
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
    let name = CStr::from_bytes_until_nul(comment).ok()?.to_str().ok()?;
    let rule_is = Rule::ALL.into_iter().find(|rule| rule.to_string() == name)?;

    let expressions = attribute(rule, attributes::RULE_EXPRESSIONS)?;
    let counter = nested(expressions, attributes::LIST_ELEM)
        .find(|expression| attribute(expression, attributes::EXPR_NAME) == Some(b"counter\0"))?;
    let data = attribute(counter, attributes::EXPR_DATA)?;
    let number = |kind| attribute(data, kind)?.try_into().ok().map(u64::from_be_bytes);
    Some(RuleCounter {
        rule: rule_is,
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

//! Policies of what a sandbox may reach, between the wire and [`crate::egress`].

use roost_common::privd::RuleCounter;
use roost_hostagent::hostagent::v1::EgressPolicy;
use roost_hostagent::roost::v1::{EgressResponse, EgressRule, RefusedName};

use crate::egress::by_name::Counts;
use crate::egress::{Egress, Wish};

/// A policy as it came; one that did not is the default.
pub(super) fn wish(policy: Option<EgressPolicy>) -> Wish {
    let policy = policy.unwrap_or_default();
    Wish {
        no_internet: policy.no_internet,
        no_dns: policy.no_dns,
        allow: policy.allow,
        deny: policy.deny,
        allow_names: policy.allow_names,
    }
}

/// A policy, and what became of what its sandbox sent.
pub(super) fn explained(egress: &Egress, rules: Vec<RuleCounter>, names: Counts) -> EgressResponse {
    fn texts<T: ToString>(list: &[T]) -> Vec<String> {
        list.iter().map(T::to_string).collect()
    }
    let policy = EgressPolicy {
        no_internet: !egress.internet,
        no_dns: !egress.dns,
        allow: texts(&egress.allowed),
        deny: texts(&egress.denied),
        allow_names: texts(&egress.names),
        ..EgressPolicy::default()
    };
    let rules = rules.into_iter().map(|row| EgressRule {
        rule: row.rule.to_string(),
        network: row.network.map(|network| network.to_string()).unwrap_or_default(),
        drops: row.rule.drops(),
        packets: row.packets,
        bytes: row.bytes,
        ..EgressRule::default()
    });
    let last = names.last.into_iter().map(|refused| RefusedName {
        name: refused.name,
        why: refused.why,
        times: refused.times,
        at_unix: refused.at_unix,
        ..RefusedName::default()
    });
    EgressResponse {
        egress: policy.into(),
        rules: rules.collect(),
        names_passed: names.passed,
        names_refused: names.refused,
        last_refused_names: last.collect(),
        ..EgressResponse::default()
    }
}

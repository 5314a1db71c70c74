//! `roost egress`: what a sandbox may reach, and what became of what it sent.

use clap::Args;
use roost_hostagent::hostagent::v1::EgressPolicy;
use roost_hostagent::roost::v1::{EgressRequest, EgressResponse, UpdateSandboxPolicyRequest};

use super::client::Operator;
use super::{CliError, age};
use crate::sandbox::unix_now;

/// What a sandbox may reach.
#[derive(Args, Default)]
pub(super) struct Policy {
    /// Nothing outside is reachable, name servers neither
    #[arg(long)]
    no_internet: bool,
    /// Name servers are not reachable
    #[arg(long)]
    no_dns: bool,
    /// A range of addresses that is reachable, and nothing that is not listed; may be given several times
    #[arg(long, value_name = "CIDR")]
    allow: Vec<String>,
    /// A range of addresses that is not reachable, whatever else is said; may be given several times
    #[arg(long, value_name = "CIDR")]
    deny: Vec<String>,
    /// A server that is reachable by name over HTTP and HTTPS, or *.NAME for all below it, and nothing that is not listed; may be given
    /// several times
    #[arg(long, value_name = "NAME")]
    allow_name: Vec<String>,
}

impl Policy {
    fn is_empty(&self) -> bool {
        let lists = [&self.allow, &self.deny, &self.allow_name];
        !self.no_internet && !self.no_dns && lists.iter().all(|list| list.is_empty())
    }

    /// As the agent is told; `None` where nothing is said.
    pub(super) fn into_message(self) -> Option<EgressPolicy> {
        (!self.is_empty()).then(|| EgressPolicy {
            no_internet: self.no_internet,
            no_dns: self.no_dns,
            allow: self.allow,
            deny: self.deny,
            allow_names: self.allow_name,
            ..EgressPolicy::default()
        })
    }
}

#[derive(Args)]
pub(super) struct Egress {
    #[command(flatten)]
    policy: Policy,
    /// All of the public internet is reachable, with name servers
    #[arg(long, conflicts_with_all = ["no_internet", "no_dns", "allow", "deny", "allow_name"])]
    open: bool,
    /// The sandbox
    id: String,
}

/// Changes what a sandbox may reach, where anything is said about that; what holds now.
pub(super) async fn egress(client: &Operator, wish: Egress) -> Result<EgressResponse, CliError> {
    let Egress { policy, open, id } = wish;
    let policy = policy.into_message();
    if open || policy.is_some() {
        let request = UpdateSandboxPolicyRequest {
            sandbox_id: id.clone(),
            egress: policy.into(),
            ..UpdateSandboxPolicyRequest::default()
        };
        client.update_sandbox_policy(request).await?;
    }
    let request = EgressRequest {
        sandbox_id: id,
        ..EgressRequest::default()
    };
    Ok(client.egress(request).await?.into_owned())
}

/// For a person: the policy, then what the rules have matched, then the names that led nowhere.
pub(super) fn text(answer: &EgressResponse) -> String {
    let policy = answer.egress.as_option().cloned().unwrap_or_default();
    let mut lines = vec![in_words(&policy)];
    let matched: Vec<_> = answer.rules.iter().filter(|row| row.packets > 0).collect();
    if !matched.is_empty() {
        lines.push(format!(
            "\n{:<16} {:<20} {:<8} {:>10} {:>14}",
            "RULE", "TO", "VERDICT", "PACKETS", "BYTES"
        ));
    }
    for row in matched {
        let (network, verdict) = (row.network.as_str(), if row.drops { "drop" } else { "pass" });
        lines.push(format!(
            "{:<16} {:<20} {verdict:<8} {:>10} {:>14}",
            row.rule,
            if network.is_empty() { "-" } else { network },
            row.packets,
            row.bytes
        ));
    }
    if answer.names_passed + answer.names_refused > 0 {
        let (passed, refused) = (answer.names_passed, answer.names_refused);
        lines.push(format!("\nby name: {passed} passed, {refused} refused"));
    }
    for refused in &answer.last_refused_names {
        // A guest has said it; the terminal is not its to write to.
        let name = refused.name.replace(char::is_control, "?");
        let name = if name.is_empty() { "(no name)" } else { &name };
        lines.push(format!(
            "  {name}: {} ({} x, last {} ago)",
            refused.why,
            refused.times,
            age(unix_now().saturating_sub(refused.at_unix))
        ));
    }
    lines.join("\n") + "\n"
}

fn in_words(policy: &EgressPolicy) -> String {
    let mut words = Vec::new();
    if policy.no_internet {
        words.push("nothing outside".to_owned());
    } else if policy.allow.is_empty() && policy.allow_names.is_empty() {
        words.push("the public internet".to_owned());
    } else {
        words.push(format!(
            "only {}",
            [&policy.allow[..], &policy.allow_names].concat().join(", ")
        ));
    }
    if !policy.deny.is_empty() {
        words.push(format!("without {}", policy.deny.join(", ")));
    }
    if !policy.no_internet {
        words.push(
            if policy.no_dns {
                "no name servers"
            } else {
                "the host's name servers"
            }
            .to_owned(),
        );
    }
    format!("reaches {}", words.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_said_in_words() {
        let lists = |allow: &[&str], deny: &[&str], names: &[&str]| {
            let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
            EgressPolicy {
                allow: texts(allow),
                deny: texts(deny),
                allow_names: texts(names),
                ..EgressPolicy::default()
            }
        };
        assert_eq!(
            in_words(&lists(&[], &[], &[])),
            "reaches the public internet; the host's name servers"
        );
        let listed = EgressPolicy {
            no_dns: true,
            ..lists(&["192.0.2.0/24"], &["192.0.2.7/32"], &["example.com"])
        };
        assert_eq!(
            in_words(&listed),
            "reaches only 192.0.2.0/24, example.com; without 192.0.2.7/32; no name servers"
        );
        let closed = EgressPolicy {
            no_internet: true,
            ..EgressPolicy::default()
        };
        assert_eq!(in_words(&closed), "reaches nothing outside");
    }

    #[test]
    fn nothing_is_asked_for_where_nothing_is_said() {
        assert!(Policy::default().into_message().is_none());
        let policy = Policy {
            deny: vec!["192.0.2.0/24".to_owned()],
            ..Policy::default()
        };
        assert_eq!(policy.into_message().expect("asked").deny, ["192.0.2.0/24"]);
    }
}

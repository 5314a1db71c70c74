//! What a sandbox may reach: as its caller says it, as its record keeps it, as privd is told.
//!
//! ```text
//! CreateSandbox, UpdateSandboxPolicy --> Egress --> record
//!                                          |------> privd: addresses, by rules in the sandbox's namespace
//!                                          '------> by_name: names, on the connections that those rules lead here
//! ```
//!
//! Holds: what is closed for every sandbox (its host, other sandboxes, private ranges) no policy opens; a policy that forbids something
//! ends the connections to it that are open; names are checked on each connection, and lead to what *we* resolve them to, so neither an
//! address that a name once had nor a name that a guest made up opens anything.

pub mod by_name;
pub mod name;

use std::net::Ipv4Addr;

use roost_common::net::Cidr;
use roost_common::privd::{EgressPolicy, Internet, MAX_NETWORKS};
use serde::{Deserialize, Serialize};

pub use name::{Name, NameError};

/// Most names in a policy.
pub const MAX_NAMES: usize = 64;
/// Most characters of a bad value that an error repeats.
const SHOWN: usize = 64;

/// A sandbox's policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Egress {
    /// Whether anything outside is reachable at all.
    pub internet: bool,
    /// Whether the host's resolvers are, on port 53.
    pub dns: bool,
    /// Ranges of public addresses that are reachable; with none here and no names, all are.
    pub allowed: Vec<Cidr>,
    /// Ranges that are not, whatever else is said.
    pub denied: Vec<Cidr>,
    /// Servers that are reachable by their name, over HTTP and HTTPS on their own ports.
    pub names: Vec<Name>,
}

/// All public addresses, and the resolvers.
impl Default for Egress {
    fn default() -> Self {
        Self {
            internet: true,
            dns: true,
            allowed: vec![],
            denied: vec![],
            names: vec![],
        }
    }
}

/// A policy as it came.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Nothing outside is reachable.
    pub no_internet: bool,
    /// No resolver is.
    pub no_dns: bool,
    /// Ranges, as text.
    pub allow: Vec<String>,
    /// Ranges, as text.
    pub deny: Vec<String>,
    /// Names of hosts, or patterns of them.
    pub allow_names: Vec<String>,
}

/// Why there is no such policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// Not a range.
    #[error(
        "{field} {value:?} is no range of IPv4 addresses, such as 192.0.2.0/24 (its first address, and how many bits are given)"
    )]
    Range {
        /// Which list.
        field: &'static str,
        /// What it was, cut short.
        value: String,
    },
    /// Not a name.
    #[error("allow_names {value:?} is no name of a host, such as example.com or *.example.com: {why}")]
    Name {
        /// What it was, cut short.
        value: String,
        /// What is wrong with it.
        why: NameError,
    },
    /// More than there may be.
    #[error("{field} has {count} entries, more than {max}")]
    TooMany {
        /// Which list.
        field: &'static str,
        /// How many it has.
        count: usize,
        /// How many it may have.
        max: usize,
    },
    /// It takes back what it gives.
    #[error("no_internet leaves nothing that allow or allow_names could allow: leave out one or the other")]
    Contradiction,
}

impl Egress {
    /// Checks a wish.
    ///
    /// # Errors
    /// Any [`EgressError`], naming the field.
    pub fn check(wish: Wish) -> Result<Self, EgressError> {
        if wish.no_internet && !(wish.allow.is_empty() && wish.allow_names.is_empty()) {
            return Err(EgressError::Contradiction);
        }
        let names = at_most("allow_names", MAX_NAMES, wish.allow_names)?;
        let names = names.into_iter().map(|text| {
            text.parse().map_err(|why| EgressError::Name {
                value: shown(&text),
                why,
            })
        });
        Ok(Self {
            internet: !wish.no_internet,
            dns: !wish.no_dns,
            allowed: ranges("allow", wish.allow)?,
            denied: ranges("deny", wish.deny)?,
            names: names.collect::<Result<_, _>>()?,
        })
    }

    /// What privd is told.
    pub fn policy(&self, resolvers: &[Ipv4Addr]) -> EgressPolicy {
        let is_listed = !self.allowed.is_empty() || !self.names.is_empty();
        EgressPolicy {
            internet: match (self.internet, is_listed) {
                (false, _) => Internet::Closed,
                (true, false) => Internet::Open,
                (true, true) => Internet::Listed,
            },
            resolvers: if self.dns { resolvers.to_vec() } else { vec![] },
            allowed: self.allowed.clone(),
            denied: self.denied.clone(),
            proxied: self.goes_by_name(),
        }
    }

    /// Whether connections are judged by name.
    pub fn goes_by_name(&self) -> bool {
        self.internet && !self.names.is_empty()
    }

    /// Whether an address is among those that are not reachable, whatever else is said.
    pub fn denies(&self, address: Ipv4Addr) -> bool {
        self.denied.iter().any(|range| range.contains(address))
    }

    /// Whether a server of this name may be reached.
    pub fn permits(&self, host: &str) -> bool {
        self.internet && self.names.iter().any(|name| name.matches(host))
    }
}

fn ranges(field: &'static str, texts: Vec<String>) -> Result<Vec<Cidr>, EgressError> {
    let texts = at_most(field, MAX_NETWORKS, texts)?;
    let range = |text: String| {
        text.parse().map_err(|_| EgressError::Range {
            field,
            value: shown(&text),
        })
    };
    texts.into_iter().map(range).collect()
}

fn at_most(field: &'static str, max: usize, list: Vec<String>) -> Result<Vec<String>, EgressError> {
    let count = list.len();
    if count <= max {
        Ok(list)
    } else {
        Err(EgressError::TooMany { field, count, max })
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

    fn texts(all: &[&str]) -> Vec<String> {
        all.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_wish_for_nothing_is_the_open_internet() {
        let egress = Egress::check(Wish::default()).expect("checked");
        assert_eq!(egress, Egress::default());
        let policy = egress.policy(&[RESOLVER]);
        assert_eq!(policy.internet, Internet::Open);
        assert_eq!(policy.resolvers, [RESOLVER]);
        assert!(!policy.proxied && !egress.permits("example.com"));
    }

    #[test]
    fn any_list_of_what_is_allowed_closes_the_rest() {
        for (allow, names) in [(vec!["192.0.2.0/24"], vec![]), (vec![], vec!["example.com"])] {
            let egress = Egress::check(Wish {
                allow: texts(&allow),
                allow_names: texts(&names),
                no_dns: true,
                ..Wish::default()
            });
            let policy = egress.expect("checked").policy(&[RESOLVER]);
            assert_eq!((policy.internet, policy.proxied), (Internet::Listed, !names.is_empty()));
            assert!(policy.resolvers.is_empty());
        }
        let closed = Egress::check(Wish {
            no_internet: true,
            deny: texts(&["192.0.2.0/24"]),
            ..Wish::default()
        });
        assert_eq!(closed.expect("checked").policy(&[RESOLVER]).internet, Internet::Closed);
    }

    #[test]
    fn what_is_no_policy_is_refused_by_field() {
        let with = |change: &dyn Fn(&mut Wish)| {
            let mut wish = Wish::default();
            change(&mut wish);
            Egress::check(wish).expect_err("refused").to_string()
        };
        let bad = "192.0.2.1/24";
        assert!(with(&|wish| wish.allow = texts(&[bad])).starts_with("allow \"192.0.2.1/24\" is no range"));
        assert!(with(&|wish| wish.deny = texts(&["::/0"])).starts_with("deny \"::/0\" is no range"));
        let long = with(&|wish| wish.deny = vec!["9".repeat(5000)]);
        assert!(long.len() < 300, "{long}");
        assert!(
            with(&|wish| wish.allow_names = texts(&["exa mple"])).starts_with("allow_names \"exa mple\" is no name")
        );
        let many = with(&|wish| wish.deny = vec!["192.0.2.1".to_owned(); 65]);
        assert_eq!(many, "deny has 65 entries, more than 64");
        assert!(with(&|wish| wish.allow_names = vec!["a.b".to_owned(); 65]).starts_with("allow_names has 65"));
        let closed = with(&|wish| {
            wish.no_internet = true;
            wish.allow = texts(&["192.0.2.0/24"]);
        });
        assert!(closed.starts_with("no_internet leaves nothing"), "{closed}");
    }

    #[test]
    fn a_policy_is_read_back_as_it_was_written() {
        let egress = Egress::check(Wish {
            allow: texts(&["192.0.2.0/24"]),
            deny: texts(&["192.0.2.7"]),
            allow_names: texts(&["*.Example.com"]),
            ..Wish::default()
        });
        let egress = egress.expect("checked");
        let text = serde_json::to_string(&egress).expect("JSON");
        assert_eq!(serde_json::from_str::<Egress>(&text).expect("read"), egress);
        assert!(text.contains("*.example.com"), "{text}");
    }
}

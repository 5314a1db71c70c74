//! What is there of sandboxes that are not. The kernel removes what nobody holds, and the agent its files; where something is left all the
//! same, either somebody else holds it, or there is a fault in roost.
//!
//! What is being made or removed looks the same for a moment, so only what two looks have seen counts ([`confirmed`]).

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::Path;

use roost_common::names::{DISK_PREFIX, veth_slot};
use roost_common::net::SlotAddresses;

use super::host::Unseen;
use super::{Finding, Host};

const CHECK: &str = "left over";

/// A sandbox of the agent's list, or the network of one to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its id; `None` where there is none yet.
    pub id: Option<String>,
    /// Where it is reached, which tells its slot.
    pub address: Option<Ipv4Addr>,
}

/// Something that seems to belong to nobody.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Suspect {
    what: What,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Disk,
    Origin,
    Loop,
    Network,
    RunDirectory,
    Files,
}

impl What {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Disk => (
                "the disk of a sandbox that the agent does not list",
                "find who has it open (fuser -v on its node in /dev) and end that; it goes with its last open",
            ),
            Self::Origin => (
                "an image's device without a disk on it",
                "find who has it open (fuser -v on its node in /dev) and end that; a start of roost-privd removes what nobody has open",
            ),
            Self::Loop => (
                "a loop device over a file of roost's that nothing uses",
                "losetup -d it, if nobody has it open (fuser -v)",
            ),
            Self::Network => (
                "the network of a slot that no sandbox has",
                "find who holds its tap (fuser -v /dev/net/tun) and end that; it goes with its last descriptor",
            ),
            Self::RunDirectory => (
                "the run directory of a VM that the agent does not list",
                "systemctl restart roost-agent: a start takes over what runs and removes what does not",
            ),
            Self::Files => (
                "files of a sandbox that the agent does not list",
                "systemctl restart roost-agent: a start finishes what was left half-done; it says why it leaves what it leaves",
            ),
        }
    }
}

/// What seems to belong to nobody, by the agent's list. Where that could not be had, why.
pub fn suspects(host: &Host, list: &Result<Vec<Listed>, String>) -> Result<BTreeSet<Suspect>, String> {
    let list = list
        .as_ref()
        .map_err(|why| format!("the agent's list of sandboxes is not to be had: {why}"))?;
    let is_listed = |id: &str| list.iter().any(|listed| listed.id.as_deref() == Some(id));
    let mut found = BTreeSet::new();
    let mut suspect = |what, name: &str| {
        found.insert(Suspect {
            what,
            name: name.into(),
        });
    };
    let blocks = host.names("/sys/block").map_err(|unseen| unseen.to_string())?;
    for block in blocks {
        let dir = format!("/sys/block/{block}");
        let is_held = || {
            host.names(format!("{dir}/holders"))
                .is_ok_and(|holders| !holders.is_empty())
        };
        if let Ok(name) = host.read(format!("{dir}/dm/name")) {
            match name.strip_prefix(DISK_PREFIX) {
                Some(id) if !is_listed(id) => suspect(What::Disk, &format!("{name} ({block})")),
                None if name.starts_with("roost-o-") && !is_held() => {
                    suspect(What::Origin, &format!("{name} ({block})"))
                }
                Some(_) | None => {}
            }
        }
        if let Ok(file) = host.read(format!("{dir}/loop/backing_file"))
            && Path::new(&file).starts_with(&host.config.dir)
            && !is_held()
        {
            suspect(What::Loop, &format!("{block} ({file})"));
        }
    }
    for interface in host.names("/sys/class/net").map_err(|unseen| unseen.to_string())? {
        let Some(slot) = veth_slot(&interface) else { continue };
        let address = SlotAddresses::of(slot).host;
        if !list.iter().any(|listed| listed.address == Some(address)) {
            suspect(What::Network, &interface);
        }
    }
    let visible = |names: Result<Vec<String>, Unseen>| match names {
        // Nothing was made yet.
        Err(unseen) if unseen.is_missing() => Ok(Vec::new()),
        names => names.map_err(|unseen| unseen.to_string()),
    };
    for id in visible(host.names(&host.config.vm_run_dir))? {
        if !is_listed(&id) {
            suspect(
                What::RunDirectory,
                &host.config.vm_run_dir.join(&id).display().to_string(),
            );
        }
    }
    let sandboxes = host.config.dir.join("sandboxes");
    for name in visible(host.names(&sandboxes))? {
        if !is_listed(&name) {
            suspect(What::Files, &sandboxes.join(&name).display().to_string());
        }
    }
    Ok(found)
}

/// What two looks have found.
pub fn confirmed(first: Result<BTreeSet<Suspect>, String>, second: Result<BTreeSet<Suspect>, String>) -> Vec<Finding> {
    let (first, second) = match (first, second) {
        (Ok(first), Ok(second)) => (first, second),
        (Err(why), _) | (_, Err(why)) => return vec![Finding::not_checked(CHECK, why)],
    };
    let both: Vec<_> = first.intersection(&second).collect();
    if both.is_empty() {
        return vec![Finding::ok(CHECK, "nothing of sandboxes that are not there")];
    }
    both.into_iter()
        .map(|Suspect { what, name }| {
            let (is, advice) = what.words();
            Finding::warning(CHECK, format!("{name}: {is}"), advice)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::super::host::fake::Fake;
    use super::*;

    fn with_a_sandbox() -> (Fake, Vec<Listed>) {
        let fake = Fake::good();
        fake.write("sys/block/dm-0/dm/name", "roost-o-8-1-16\n");
        fake.write("sys/block/dm-0/holders/dm-1", "");
        fake.write("sys/block/dm-1/dm/name", "roost-s-one\n");
        fake.write("sys/block/dm-2/dm/name", "vg-root\n");
        fake.write(
            "sys/block/loop0/loop/backing_file",
            "/var/lib/roost/sandboxes/one/rootfs.cow\n",
        );
        fake.write("sys/block/loop0/holders/dm-1", "");
        fake.write("sys/block/loop1/loop/backing_file", "/home/somebody/image\n");
        fake.write("sys/class/net/roost-v3/mtu", "1500\n");
        fake.write("sys/class/net/eth0/mtu", "1500\n");
        fake.write("run/roost/vm/one/shim.sock", "");
        fake.write("var/lib/roost/sandboxes/one/sandbox.json", "{}");
        let listed = Listed {
            id: Some("one".into()),
            address: Some(Ipv4Addr::new(10, 11, 0, 3)),
        };
        (fake, vec![listed])
    }

    #[test]
    fn what_belongs_to_a_sandbox_of_the_list_is_no_suspect_and_all_else_is() {
        let (fake, list) = with_a_sandbox();
        assert_eq!(suspects(&fake.host(), &Ok(list.clone())), Ok(BTreeSet::new()));
        let found = suspects(&fake.host(), &Ok(vec![])).expect("seen");
        let what: Vec<_> = found.iter().map(|suspect| suspect.what).collect();
        assert_eq!(what, [What::Disk, What::Network, What::RunDirectory, What::Files]);
        let ready = Listed {
            id: None,
            ..list[0].clone()
        };
        let found = suspects(&fake.host(), &Ok(vec![ready])).expect("seen");
        assert!(found.iter().all(|suspect| suspect.what != What::Network), "{found:?}");
        fake.remove("sys/block/dm-0/holders/dm-1");
        fake.remove("sys/block/loop0/holders/dm-1");
        let found = suspects(&fake.host(), &Ok(vec![])).expect("seen");
        let what: Vec<_> = found.iter().map(|suspect| suspect.what).collect();
        assert_eq!(
            what,
            [
                What::Disk,
                What::Origin,
                What::Loop,
                What::Network,
                What::RunDirectory,
                What::Files
            ]
        );
    }

    #[test]
    fn only_what_was_seen_twice_counts_and_without_a_list_nothing_is_judged() {
        let (fake, list) = with_a_sandbox();
        let host = fake.host();
        let (left, none) = (suspects(&host, &Ok(vec![])), suspects(&host, &Ok(list)));
        let states = |findings: Vec<Finding>| findings.iter().map(|finding| finding.state).collect::<Vec<_>>();
        assert_eq!(states(confirmed(left.clone(), none.clone())), [State::Ok]);
        assert_eq!(states(confirmed(left.clone(), left.clone())), [State::Warning; 4]);
        let unlisted = suspects(&host, &Err("no certificate".into()));
        assert_eq!(states(confirmed(unlisted.clone(), unlisted)), [State::NotChecked]);
    }
}

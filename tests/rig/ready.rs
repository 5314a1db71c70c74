//! What is made ahead of the sandboxes that take it: shims and networks.

use std::collections::BTreeSet;

use roost_common::names::veth_slot;
use roost_common::net::SlotAddresses;
use roost_tests::census::Census;
use roost_tests::counts::Counts;
use roost_tests::roost::{self, AgentConfig, Sandbox, has_vm, kill_9, kill_9_pid, pids, vmm_command, wait_for_agent};
use roost_tests::{eventually, in_rig};

const READY: usize = 2;

/// Waits until all is there that is to be, and no more: the shims, and the networks' links.
fn made(sandboxes: usize) -> BTreeSet<i32> {
    eventually("what is made ahead", || {
        let census = Census::take();
        let all = READY + sandboxes;
        (census.count("unit") == all && census.count("veth") == all)
            .then(|| pids("roost-vmmshim").into_iter().collect())
    })
}

/// The links of all networks.
fn links_of_networks() -> BTreeSet<String> {
    let links = std::fs::read_dir("/sys/class/net").expect("there is one").flatten();
    let links = links.map(|link| link.file_name().to_string_lossy().into_owned());
    links.filter(|link| veth_slot(link).is_some()).collect()
}

/// What doctor says of what is left over.
fn left_over() -> String {
    let said = roost::roost(&["doctor", "--json"]).stdout;
    let report: serde_json::Value = serde_json::from_slice(&said).expect("JSON");
    let findings = report["findings"].as_array().expect("findings").iter();
    let of_leaks = findings.filter(|finding| finding["check"] == "left over");
    of_leaks.map(|finding| finding["state"].to_string()).collect()
}

#[test]
fn shim_and_network_are_there_before_the_sandbox_and_go_with_it_or_with_the_agent() {
    in_rig(|| {
        // The first one has the shim ask the VMM its version, once for each file that is one.
        drop(Sandbox::create(&["--memory", "128"]));
        let ready = AgentConfig::with(&format!("ready_sandboxes = {READY}\n"));
        let (shims, links) = (made(0), links_of_networks());
        assert_eq!(left_over(), "\"ok\"", "what is ready is no leak");

        let (sandbox, create) = Counts::of(|| {
            let sandbox = Sandbox::create(&["--memory", "128"]);
            made(1);
            sandbox
        });
        assert_eq!(
            create.privd.values().sum::<u64>(),
            2,
            "one more network, for the next one: {create:?}"
        );
        let with_vm = |pids: &BTreeSet<i32>| pids.iter().copied().filter(|pid| has_vm(*pid)).collect::<Vec<_>>();
        let [shim] = with_vm(&made(1))[..] else {
            panic!("one VM runs")
        };
        assert!(shims.contains(&shim), "its shim was made for it: {shims:?}");
        let network = sandbox.host_ip();
        let taken: Vec<&String> = links.iter().filter(|link| address_of(link) == network).collect();
        assert_eq!(taken.len(), 1, "its network, {network}, was made for it: {links:?}");
        assert_eq!(sandbox.sh("echo it works"), "it works");

        // A policy of its own has a network of its own.
        let links = links_of_networks();
        let closed = Sandbox::create(&["--memory", "128", "--no-internet"]);
        let network = closed.host_ip();
        assert!(
            links.iter().all(|link| address_of(link) != network),
            "{network}: {links:?}"
        );
        drop(closed);

        // What has died meanwhile is not given to anybody.
        for shim in made(1) {
            if !has_vm(shim) {
                kill_9_pid(shim);
            }
        }
        drop(Sandbox::create(&["--memory", "128"]));
        // Nor is a shim that was started for another VMM than there is now.
        let old = made(1);
        let vmm = "/usr/share/roost-tests/vmm";
        let mode = std::fs::metadata(vmm).expect("the VMM").permissions();
        std::fs::set_permissions(vmm, mode).expect("its inode has changed");
        let new = Sandbox::create(&["--memory", "128"]);
        let with_vm = with_vm(&made(2));
        assert_eq!(
            with_vm.iter().filter(|shim| old.contains(*shim)).count(),
            1,
            "{with_vm:?} of {old:?}"
        );
        drop(new);

        // Many at once take what there is, and the rest is made for them.
        let at_once: Vec<_> = std::thread::scope(|scope| {
            let creating: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| Sandbox::create(&["--memory", "128"])))
                .collect();
            creating.into_iter().map(|made| made.join().expect("made")).collect()
        });
        let networks: BTreeSet<_> = at_once.iter().map(Sandbox::host_ip).collect();
        assert_eq!(networks.len(), at_once.len());
        drop(at_once);

        // It lives by the agent's descriptors.
        let (old, links) = (made(1), links_of_networks());
        kill_9("roost-agent");
        wait_for_agent();
        let kept: Vec<i32> = made(1).intersection(&old).copied().collect();
        assert_eq!(kept, [shim], "of the shims that of the sandbox alone outlives an agent");
        assert_eq!(links_of_networks().intersection(&links).count(), 1);
        assert_eq!(sandbox.sh("echo it still does"), "it still does");
        drop((sandbox, ready));
        assert_eq!(pids(vmm_command()), [0; 0]);
    });
}

/// The address by which the host reaches the guest of a link, `roost-v<slot>`.
fn address_of(link: &str) -> String {
    SlotAddresses::of(veth_slot(link).expect("a slot")).host.to_string()
}

//! Many at once, one after another, and callers that change their mind.

use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use roost_tests::roost::{self, Sandbox, call, find};
use roost_tests::{eventually, in_rig, is_full_size};
use serde_json::json;

#[test]
fn many_in_a_row_leave_nothing_not_even_a_descriptor() {
    let rounds = if is_full_size() { 20 } else { 4 };
    in_rig(|| {
        drop(Sandbox::create(&["--memory", "256"]));
        let descriptors = |command| {
            let pid = *roost::pids(command).first().expect("it runs");
            std::fs::read_dir(format!("/proc/{pid}/fd"))
                .expect("root may look")
                .count()
        };
        let daemons = ["roost-agent", "roost-privd"];
        let before = daemons.map(descriptors);
        for round in 0..rounds {
            let sandbox = Sandbox::create(&["--memory", "256"]);
            assert_eq!(sandbox.sh(&format!("echo {round}")), round.to_string());
        }
        // A connection or two may be in another phase than before; all these sandboxes' worth may not.
        eventually("descriptors to be closed", || {
            let now = daemons.map(descriptors);
            now.iter()
                .zip(&before)
                .all(|(now, before)| *now <= before + 3)
                .then_some(())
        });
    });
}

#[test]
fn six_at_once_are_six_sandboxes() {
    in_rig(|| {
        let creates: Vec<_> = (0..6)
            .map(|n| thread::spawn(move || Sandbox::create(&["--memory", "192", "--id", &format!("many-{n}")])))
            .collect();
        let sandboxes: Vec<Sandbox> = creates
            .into_iter()
            .map(|create| create.join().expect("created"))
            .collect();
        let mut addresses: Vec<String> = sandboxes.iter().map(Sandbox::host_ip).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 6);
        for (n, sandbox) in sandboxes.iter().enumerate() {
            assert_eq!(sandbox.sh("echo $E2B_SANDBOX_ID"), format!("many-{n}"));
        }
        let removals: Vec<_> = sandboxes
            .into_iter()
            .map(|sandbox| thread::spawn(move || drop(sandbox)))
            .collect();
        for removal in removals {
            removal.join().expect("removed");
        }
    });
}

#[test]
fn of_two_creates_with_one_id_one_wins() {
    in_rig(|| {
        let create = || roost::start(&["create", "--memory", "256", "--id", "twice"]);
        let (first, second) = (create(), create());
        let outputs: Vec<Output> = [first, second]
            .into_iter()
            .map(|create| create.wait_with_output().expect("it ends"))
            .collect();
        assert_eq!(
            outputs.iter().filter(|output| output.status.success()).count(),
            1,
            "{outputs:?}"
        );
        let lost = outputs
            .iter()
            .find(|output| !output.status.success())
            .expect("one lost");
        assert!(String::from_utf8_lossy(&lost.stderr).contains("exists already"));
        roost::ok(&["rm", "twice"]);
    });
}

/// How long a create takes here and now, to spread moments over.
fn create_time() -> Duration {
    let start = Instant::now();
    drop(Sandbox::create(&["--memory", "256"]));
    // A boot that had to be started over says nothing about the others.
    start.elapsed().min(Duration::from_secs(20))
}

#[test]
fn a_destroy_during_a_create_wins_at_any_moment() {
    let moments = if is_full_size() { 10 } else { 4 };
    in_rig(|| {
        let whole = create_time();
        for moment in 0..moments {
            let create = roost::start(&["create", "--memory", "256", "--id", "doomed"]);
            eventually("the create to be accepted", || find("doomed"));
            thread::sleep(whole * moment / (moments + 2));
            let destroyed = call("DestroySandbox", &json!({"sandboxId": "doomed"}));
            assert_eq!(destroyed.status, 200, "moment {moment}: {destroyed:?}");
            assert!(find("doomed").is_none(), "moment {moment}: still listed");
            let output = create.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            // A create that was answered just before is a create that succeeded.
            assert!(
                output.status.success() || said.contains("destroyed while"),
                "moment {moment}: {said}"
            );
        }
    });
}

#[test]
fn a_create_whose_caller_goes_away_is_undone_at_any_moment() {
    let moments = if is_full_size() { 5 } else { 3 };
    in_rig(|| {
        let whole = create_time();
        for moment in 0..moments {
            let mut create = roost::start(&["create", "--memory", "256", "--id", "orphan"]);
            eventually("the create to be accepted", || find("orphan"));
            thread::sleep(whole * moment / (moments + 2));
            create.kill().expect("killed");
            create.wait().expect("reaped");
            eventually("the orphan to be undone", || find("orphan").is_none().then_some(()));
        }
        // The id is free again.
        drop(Sandbox::create(&["--memory", "256", "--id", "orphan"]));
    });
}

#[test]
fn many_destroys_of_one_sandbox_all_succeed_or_find_it_gone() {
    in_rig(|| {
        let id = Sandbox::create(&["--memory", "256"]).forget();
        let calls: Vec<_> = (0..8)
            .map(|_| {
                let id = id.clone();
                thread::spawn(move || call("DestroySandbox", &json!({"sandboxId": id})))
            })
            .collect();
        for answer in calls.into_iter().map(|call| call.join().expect("no panic")) {
            assert!(answer.status == 200 || answer.body["code"] == "not_found", "{answer:?}");
        }
        assert!(find(&id).is_none());
    });
}

//! Where a sandbox's or a host's room ends: guests that end themselves, hosts that fill up, guests that are at work although nobody
//! calls, and hosts that are given up.

use roost_tests::roost::{self, Sandbox, find};
use roost_tests::{eventually, in_rig};

/// The tombstone of a sandbox, once it has ended.
fn tombstone(id: &str) -> serde_json::Value {
    eventually("the sandbox to be gone", || find(id).is_none().then_some(()));
    eventually("the tombstone", || {
        let text = std::fs::read(format!("/var/lib/roost/tombstones/{id}.json")).ok()?;
        serde_json::from_slice(&text).ok()
    })
}

#[test]
fn a_guest_that_panics_or_reboots_is_a_sandbox_gone_and_says_which() {
    in_rig(|| {
        for (trigger, reason, said) in [
            ("c", "guest_panic", "kernel panicked"),
            ("b", "guest_reset", "rebooted"),
        ] {
            let sandbox = Sandbox::create(&["--memory", "256"]);
            // The answer is lost with the guest.
            drop(sandbox.exec(&[
                "/bin/bash",
                "-c",
                &format!("echo 1 > /proc/sys/kernel/sysrq; echo {trigger} > /proc/sysrq-trigger; sleep 60"),
            ]));
            let id = sandbox.forget();
            let tombstone = tombstone(&id);
            assert_eq!(tombstone["reason"], reason, "{tombstone}");
            let console = tombstone["console_tail"].as_str().expect("a console");
            assert_eq!(
                console.contains("Kernel panic - not syncing"),
                reason == "guest_panic",
                "{console}"
            );
            let why = roost::ok(&["why", &id]);
            assert!(why.contains(said) && why.contains(reason), "{why}");
            let events = std::fs::read_to_string("/var/lib/roost/outbox/events.log").expect("an outbox");
            assert!(events.contains("sandbox.error") && events.contains(&id), "{events}");
        }
    });
}

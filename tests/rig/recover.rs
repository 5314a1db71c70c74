//! What an agent does with sandboxes of an earlier one that it cannot reach or understand: they are listed, keep their place, and go
//! on once they can.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_tests::roost::{self, Sandbox, call, find, find_paused, kill_9, kill_9_pid, pids, tombstone, wait_for_agent};
use roost_tests::{eventually, in_rig};
use serde_json::{Value, json};

#[test]
fn a_vm_whose_shim_does_not_answer_is_listed_and_keeps_its_place_until_it_does() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "128"]);
        let (id, ip) = (sandbox.id.clone(), sandbox.host_ip());
        sandbox.sh("setsid sleep 12345 >/dev/null 2>&1 & echo started");
        let [shim] = pids("roost-vmmshim")[..] else {
            panic!("one shim runs")
        };
        let signal = |signal| kill(Pid::from_raw(shim), signal).expect("it runs");
        signal(Signal::SIGSTOP);
        kill_9("roost-agent");
        wait_for_agent();
        let listed = find(&id).expect("a control plane would take it for stopped");
        assert_eq!(
            (&listed["status"], &listed["hostIp"]),
            (&json!("unreachable"), &json!(ip))
        );
        for (procedure, request) in [
            ("Exec", json!({"sandboxId": id, "cmd": "true"})),
            ("PauseSandbox", json!({"sandboxId": id})),
            ("ResumeSandbox", json!({"sandboxId": id})),
            (
                "FlattenRootfs",
                json!({"sandboxId": id, "teamId": roost::TEAM, "templateId": roost::TEAM}),
            ),
        ] {
            let answer = call(procedure, &request);
            assert_eq!(answer.body["code"], "unavailable", "{procedure}: {answer:?}");
        }
        let error = roost::fails(&["exec", &id, "--", "true"]);
        assert!(error.contains("cannot be reached"), "{error}");
        assert!(roost::fails(&["create", "--id", &id]).contains("exists already"));
        let other = Sandbox::create(&["--memory", "128"]);
        assert_ne!(other.host_ip(), ip, "its slot was given away");

        signal(Signal::SIGCONT);
        eventually("it to be reached", || {
            (find(&id).expect("listed")["status"] == "running").then_some(())
        });
        assert_eq!(sandbox.sh("pgrep -c -x sleep"), "1");

        signal(Signal::SIGSTOP);
        kill_9("roost-agent");
        wait_for_agent();
        assert_eq!(find(&id).expect("listed")["status"], "unreachable");
        kill_9_pid(shim);
        sandbox.forget();
        eventually("its end to be noticed", || find(&id).is_none().then_some(()));
        assert_eq!(tombstone(&id)["reason"], "vmm_lost");
        other.sh("true");
    });
}

#[test]
fn a_record_that_cannot_be_used_hides_no_sandbox_and_one_slot_is_given_once() {
    in_rig(|| {
        let (running, paused) = (
            Sandbox::create(&["--memory", "128"]),
            Sandbox::create(&["--memory", "128"]),
        );
        paused.plant();
        let id = paused.id.clone();
        paused.pause();
        let stopped = StoppedAgent::new();
        let slot = record(&running.id)["slot"].clone();
        let mut taken_twice = record(&id);
        taken_twice["slot"] = slot;
        write(&id, taken_twice.to_string().as_bytes());
        drop(stopped);
        running.sh("true");
        paused.resume();
        assert_ne!(paused.host_ip(), running.host_ip());
        paused.is_whole();
        assert_ne!(
            record(&id)["slot"],
            record(&running.id)["slot"],
            "the next agent would take them for one"
        );
        paused.pause();

        let stopped = StoppedAgent::new();
        let whole = record(&id).to_string();
        write(&id, &whole.as_bytes()[..whole.len() / 2]);
        drop(stopped);
        assert_eq!(find(&id).expect("listed")["status"], "unreachable");
        assert!(roost::fails(&["resume", &id]).contains("its record cannot be used"));
        let stopped = StoppedAgent::new();
        write(&id, whole.as_bytes());
        drop(stopped);
        assert!(find_paused(&id).is_some());
        paused.resume();
        paused.is_whole();
        paused.pause();

        let stopped = StoppedAgent::new();
        write(&id, b"");
        drop(stopped);
        assert_eq!(find(&id).expect("listed")["status"], "unreachable");
        // Whoever destroys it is heard, whatever it was; that nothing of it stays the census sees.
        drop(paused);
        assert!(find(&id).is_none());
        let again = Sandbox::create(&["--memory", "128", "--id", &id]);
        again.sh("true");
    });
}

fn path(id: &str) -> PathBuf {
    PathBuf::from(format!("/var/lib/roost/sandboxes/{id}/sandbox.json"))
}

fn record(id: &str) -> Value {
    serde_json::from_reader(File::open(path(id)).expect("opened")).expect("JSON")
}

/// Into the file as it is, so that its owner and mode stay.
fn write(id: &str, content: &[u8]) {
    std::fs::write(path(id), content).expect("written");
}

/// No agent, until this value is dropped; VMs run on.
struct StoppedAgent(());

impl StoppedAgent {
    fn new() -> Self {
        systemctl("stop");
        Self(())
    }
}

impl Drop for StoppedAgent {
    fn drop(&mut self) {
        systemctl("start");
        if !std::thread::panicking() {
            wait_for_agent();
        }
    }
}

fn systemctl(verb: &str) {
    let status = Command::new("systemctl").args([verb, "roost-agent.service"]).status();
    // A test that fails anyway says why itself.
    assert!(std::thread::panicking() || status.expect("systemctl runs").success());
}

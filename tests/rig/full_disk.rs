//! A data directory without room, and one whose disk fails: the error is named, what runs runs on, what is paused stays so.

use std::path::{Path, PathBuf};
use std::process::Command;

use roost_tests::census::Census;
use roost_tests::disk::{FaultyDisk, Filler, Health, preallocate, run};
use roost_tests::roost::{self, Sandbox, Template, find, find_paused, wait_for_agent};
use roost_tests::{eventually, in_rig};

const DATA: &str = "/var/lib/roost";
/// Room for the minimal image, kernels, two disks written all over, the memory of two guests, a template, and what is kept free.
const MEBIBYTES: u64 = 2200;

/// A data directory on a disk of its own, with copies of the host's images and kernels, until it is dropped.
struct DataDirectory {
    /// Gone before the agent is started again.
    disk: Option<FaultyDisk>,
}

impl DataDirectory {
    fn new() -> Self {
        systemctl("stop");
        let mut this = Self {
            disk: Some(FaultyDisk::new(MEBIBYTES)),
        };
        this.disk().take_over(Path::new(DATA));
        systemctl("start");
        wait_for_agent();
        this
    }

    fn disk(&mut self) -> &mut FaultyDisk {
        self.disk.as_mut().expect("it goes with this value")
    }

    /// What an operator does once a failed disk works again.
    fn repair(&mut self) {
        systemctl("stop");
        self.disk().repair();
        systemctl("start");
        wait_for_agent();
    }
}

impl Drop for DataDirectory {
    fn drop(&mut self) {
        // A test that fails anyway says why itself, and the next one needs an agent.
        let agent = |verb| Command::new("systemctl").args([verb, "roost-agent.service"]).output();
        drop(agent("stop"));
        drop(self.disk.take());
        drop(agent("start"));
        if !std::thread::panicking() {
            wait_for_agent();
        }
    }
}

fn systemctl(verb: &str) {
    run("systemctl", &[verb, "roost-agent.service"]);
}

/// A small sandbox with canaries that needs no more room for its disk. A guest that wants to write where the host has no room loses its
/// disk, whatever it is that roost is doing: that there is room for it is for whoever fills the disk to see to. Here it is looked at
/// what roost wants to write itself.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::create(&["--memory", "128"]);
    sandbox.plant();
    preallocate(Path::new(&format!("{DATA}/sandboxes/{}/rootfs.cow", sandbox.id)));
    sandbox
}

fn status(sandbox: &Sandbox) -> String {
    let listed = find(&sandbox.id).or_else(|| find_paused(&sandbox.id)).expect("listed");
    listed["status"].as_str().expect("a status").to_owned()
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn without_room_a_pause_a_snapshot_and_a_flatten_fail_by_name_and_the_sandbox_runs_on() {
    in_rig(|| {
        let data = DataDirectory::new();
        let (running, paused) = (sandbox(), sandbox());
        paused.pause();
        let template = Template::named(1);
        let calls = [
            vec!["pause", running.id.as_str()],
            [&["snapshot", running.id.as_str()], &template.arguments()[..]].concat(),
            [&["flatten", running.id.as_str()], &template.arguments()[..]].concat(),
            [&["snapshot", paused.id.as_str()], &template.arguments()[..]].concat(),
            [&["flatten", paused.id.as_str()], &template.arguments()[..]].concat(),
        ];
        // Not a block, so that the first directory fails; and so little that it is the VMM that cannot write, or the copy.
        for left in [0, 6 << 20] {
            let filler = Filler::fill_all_but(Path::new(DATA), left);
            for call in &calls {
                let error = roost::fails(call);
                // What can wait is refused as soon as the agent has seen how little there is.
                let is_refused = call[0] != "pause" && error.contains("this host's disk has no room");
                let is_full = error.contains("No space left on device") || error.contains("os error 28");
                assert!(is_refused || is_full, "{left} bytes left, {call:?}: {error}");
                assert!(
                    is_refused || left > 0 || error.contains(DATA),
                    "no file is named: {error}"
                );
                assert_eq!((status(&running), status(&paused)), ("running".into(), "paused".into()));
                assert_eq!(
                    Census::take().count("template"),
                    0,
                    "half a template stays after {call:?}"
                );
                running.is_whole();
            }
            drop(filler);
        }
        // With room again everything works, and nothing has to be started anew for it.
        for call in &calls[1..2] {
            let output = roost::once_there_is_room(call);
            assert!(
                output.status.success(),
                "{call:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        running.pause();
        for sandbox in [&running, &paused] {
            sandbox.resume();
            sandbox.is_whole();
        }
        drop((template, running, paused));
        drop(data);
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn a_pause_whose_disk_fails_is_an_error_by_name_and_the_sandbox_runs_on() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "128"]);
        sandbox.plant();
        // Its snapshots alone are on the disk that fails. Their place is exchanged while no VM of it runs: a VMM may write in the directory
        // that was there when it was started.
        sandbox.pause();
        let snapshots = PathBuf::from(format!("{DATA}/sandboxes/{}/vm", sandbox.id));
        let mut disk = FaultyDisk::new(600);
        disk.take_over(&snapshots);
        sandbox.resume();

        for _ in 0..2 {
            disk.becomes(Health::FailsData);
            let error = roost::fails(&["pause", &sandbox.id]);
            disk.becomes(Health::Good);
            assert!(error.contains("(os error 5)"), "{error}");
            let place = snapshots.to_str().expect("ASCII");
            assert!(error.contains(place), "no file is named: {error}");
            assert_eq!(status(&sandbox), "running");
            sandbox.is_whole();
            let left: Vec<_> = std::fs::read_dir(&snapshots).expect("read").flatten().collect();
            assert!(left.is_empty(), "half a snapshot stays: {left:?}");
        }

        // Once the disk works again so does the pause, and nothing has to be started anew for it.
        sandbox.pause();
        disk.give_back();
        drop(disk);
        sandbox.resume();
        sandbox.is_whole();
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn a_template_whose_disk_fails_is_an_error_by_name_and_its_sandbox_stays_as_it_was() {
    in_rig(|| {
        let (running, paused) = (
            Sandbox::create(&["--memory", "128"]),
            Sandbox::create(&["--memory", "128"]),
        );
        running.plant();
        paused.plant();
        paused.pause();
        // The team's directory is there from its first template on.
        let template = Template::named(2);
        roost::ok(&[&["flatten", &running.id], &template.arguments()[..]].concat());
        drop(template);
        eventually("the template to be gone", || {
            (Census::take().count("template") == 0).then_some(())
        });
        let team = std::fs::read_dir(format!("{DATA}/images/teams")).expect("a team");
        let team = team.flatten().next().expect("a team").path();
        for (call, sandbox) in [
            ("snapshot", &running),
            ("flatten", &running),
            ("snapshot", &paused),
            ("flatten", &paused),
        ] {
            let mut disk = FaultyDisk::new(600);
            disk.mount(&team);
            run("rmdir", &[&format!("{}/lost+found", team.display())]);
            run("chown", &["roost:roost-vm", team.to_str().expect("ASCII")]);
            // What is not on the disk when it fails is not there after its repair.
            run("sync", &[]);
            disk.becomes(Health::FailsWrites);
            let template = Template::named(3);
            let error = roost::fails(&[&[call, sandbox.id.as_str()], &template.arguments()[..]].concat());
            assert!(
                error.contains("(os error 5)") || error.contains("(os error 30)"),
                "{call}: {error}"
            );
            assert!(error.contains("images/teams"), "{call}: no file is named: {error}");
            assert_eq!((status(&running), status(&paused)), ("running".into(), "paused".into()));
            running.is_whole();
            disk.becomes(Health::Good);
            // What could not be removed is removed by an agent that starts.
            disk.repair();
            systemctl("restart");
            wait_for_agent();
            eventually("half a template to be gone", || {
                (Census::take().count("template") <= usize::from(team.join("lost+found").exists())).then_some(())
            });
            roost::ok(&[&[call, sandbox.id.as_str()], &template.arguments()[..]].concat());
            drop(template);
            eventually("the template to be gone", || {
                (!Census::take().lists("template", "/.deleted-")).then_some(())
            });
        }
        running.pause();
        for sandbox in [&running, &paused] {
            sandbox.resume();
            sandbox.is_whole();
        }
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn what_was_paused_before_a_disk_failed_resumes_once_it_works_again() {
    in_rig(|| {
        let mut data = DataDirectory::new();
        let (paused, running) = (sandbox(), sandbox());
        paused.pause();
        run("sync", &[]);

        // A disk that cannot be read fails the resume before anything is started, so nothing is lost by it: it is as paused as
        // before, and once the disk works again the same agent resumes it.
        std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root may");
        data.disk().becomes(Health::Fails);
        let error = roost::fails(&["resume", &paused.id]);
        data.disk().becomes(Health::Good);
        assert!(error.contains("(os error 5)"), "{error}");
        assert_eq!(status(&paused), "paused");
        paused.resume();
        paused.is_whole();
        paused.pause();
        run("sync", &[]);

        // A disk that cannot be written fails the pause of another. That one's own disk is on it: it may have lost that by writing to it,
        // and so nothing is asked of it but that nobody calls it paused.
        data.disk().becomes(Health::FailsWrites);
        let error = roost::fails(&["pause", &running.id]);
        assert!(
            ["(os error 5)", "(os error 30)"]
                .iter()
                .any(|named| error.contains(named)),
            "{error}"
        );
        assert!(
            find_paused(&running.id).is_none(),
            "paused, to a disk that cannot be written"
        );
        assert_eq!(status(&paused), "paused");
        data.disk().becomes(Health::Good);
        let id = running.forget();
        if find(&id).is_some() {
            // An ext4 whose journal could not be written takes no more changes until it is mounted again.
            drop(roost::roost(&["rm", &id]));
        }
        kill_all_vms();
        data.repair();
        eventually("the other to be gone", || find(&id).is_none().then_some(()));
        paused.resume();
        paused.is_whole();
        drop(paused);
        drop(data);
    });
}

/// Ends what could keep the filesystem from being unmounted.
fn kill_all_vms() {
    for pid in roost::pids("roost-vmmshim") {
        roost::kill_9_pid(pid);
    }
    eventually("their disks to be gone", || {
        // The failing disk itself is one of each.
        let census = Census::take();
        (census.count("dm device") == 1 && census.count("loop") == 1).then_some(())
    });
}

//! Power cuts, and an orderly shutdown. The xtask outside boots the rig again and again over one data disk and runs this test in each
//! boot: it looks at what the last one's end has left, brings the sandboxes to the next moment, and has the power cut, which kills the
//! rig's QEMU at once, or has the host shut down, which ends the QEMU by itself.
//!
//! One sandbox is cut; another one was paused before the first cut and is resumed after the last. What the records on disk promise
//! of the first (`agent/src/sandbox/record.rs`):
//!
//! | cut | its record says | after the next boot it is |
//! |---|---|---|
//! | while it runs | running | gone, with a tombstone |
//! | by a shutdown, for which `roost-drain.service` pauses it | paused | paused |
//! | during a pause, up to where its snapshot is sealed | running | gone, with a tombstone |
//! | from there on, so also once the pause is acknowledged | paused | paused |
//! | during a resume, until its memory is offered to a VMM | paused | paused |
//! | from there until its guest may write | resuming | paused |
//! | from there until it has thawed and that is on record | thawing | paused, its memory given up: nobody can say whether its disk was written |
//! | from there on | running | gone, with a tombstone |

use std::fs::{self, File};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use roost_tests::census::Census;
use roost_tests::disk::run;
use roost_tests::roost::{self, Sandbox, find_paused, status, wait_for_agent};
use roost_tests::{PATIENCE, eventually, is_full_size};
use serde::{Deserialize, Serialize};

/// A line here has the power cut (`cut` and the moment), or says that this boot ends by itself (`off` and the moment). There only in a
/// series of boots.
const CUT: &str = "/run/rig-cut";
/// What is remembered from one boot to the next.
const DIARY: &str = "/var/lib/roost/power-cuts.json";
const ARMED: &str = "/var/lib/roost/failpoint";
const REACHED: &str = "/var/lib/roost/failpoint.reached";

/// When the power is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// As soon as a pause has been acknowledged.
    Acknowledged,
    /// While it runs.
    Running,
    /// No cut: the host is shut down while it runs.
    Shutdown,
    /// While a pause waits at a step.
    Pause(&'static str),
    /// While a resume of an acknowledged pause waits at a step.
    Resume(&'static str),
}

/// What has become of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Became {
    /// Paused, and it goes on where it was.
    Paused,
    /// Paused, and its memory is refused, since its guest has written, or may have: it boots from its disk.
    Disk,
    /// Not there any more, with a tombstone that says why.
    Gone,
}

/// Every moment, what must become of the sandbox, and whether an ordinary run has it too.
const MOMENTS: &[(Moment, Became, bool)] = &[
    (Moment::Acknowledged, Became::Paused, true),
    (Moment::Resume("resume.ready"), Became::Paused, false),
    (Moment::Resume("resume.acquired"), Became::Paused, false),
    (Moment::Resume("resume.offered"), Became::Paused, false),
    (Moment::Resume("resume.launched"), Became::Paused, false),
    (Moment::Resume("resume.restored"), Became::Paused, false),
    (Moment::Resume("resume.woken"), Became::Paused, false),
    (Moment::Resume("resume.gated"), Became::Paused, true),
    (Moment::Shutdown, Became::Paused, true),
    (Moment::Pause("pause.recorded"), Became::Paused, false),
    (Moment::Pause("pause.sealed"), Became::Gone, false),
    (Moment::Pause("pause.written"), Became::Gone, false),
    (Moment::Pause("pause.synced"), Became::Gone, false),
    (Moment::Pause("pause.stopped"), Became::Gone, false),
    (Moment::Pause("pause.frozen"), Became::Gone, false),
    (Moment::Pause("pause.prepared"), Became::Gone, false),
    (Moment::Running, Became::Gone, false),
    // Nobody has been told of these resumes, but from its record on the guest may write, and thawing its filesystem is writing to it.
    (Moment::Resume("resume.recorded"), Became::Disk, false),
    (Moment::Resume("resume.thawed"), Became::Disk, false),
    // Its record says that it runs, and its memory is spent.
    (Moment::Resume("resume.running"), Became::Gone, false),
];

/// A file in memory, one on disk, and a program whose count is in memory and, number by number, in a file on disk.
const CANARIES: &str =
    "mkdir -p /dev/shm; head -c 2000000 /dev/urandom > /dev/shm/canary; sha256sum < /dev/shm/canary > /root/memory.sum
    head -c 3000000 /dev/urandom > /root/disk; sha256sum < /root/disk > /root/disk.sum
    setsid bash -c 'i=0; exec 9<> <(:); until read -rt 0.2 -u 9; do i=$((i+1)); echo $i >> /root/count; done' >/dev/null 2>&1 &
    until test -s /root/count; do sleep 0.1; done; cat /proc/sys/kernel/random/boot_id";
/// A file that is written just ahead of a pause, and that nobody in the guest syncs.
const LATE: &str = "head -c 1000000 /dev/urandom > /root/late; sha256sum < /root/late > /root/late.sum";
/// Whether all of it is there, read from disk and not from what memory keeps of it: the count on disk goes on without a gap where the
/// one in memory does, which it would not if they were of two moments. The guest's boot id.
const CHECK: &str = "set -e; echo 3 > /proc/sys/vm/drop_caches; cd /root
    for sum in disk late; do sha256sum < $sum | diff - $sum.sum; done; sha256sum < /dev/shm/canary | diff - memory.sum
    before=$(wc -l < count); until test $(wc -l < count) -gt $((before + 1)); do sleep 0.1; done
    awk '$1 != NR { print \"line \" NR \" of the count is \" $1; exit 1 }' count
    echo written > after; sync; if dmesg | grep -i 'ext4.*error'; then exit 1; fi; cat /proc/sys/kernel/random/boot_id";
/// The same of a guest that has booted from its disk: what was there when it was paused, and of what came later no more than its beginning.
const CHECK_BOOTED: &str = "set -e; cd /root; for sum in disk late; do sha256sum < $sum | diff - $sum.sum; done
    awk '$1 != NR { print \"line \" NR \" of the count is \" $1; exit 1 }' count
    echo written > after; sync; if dmesg | grep -i 'ext4.*error'; then exit 1; fi; cat /proc/sys/kernel/random/boot_id";

/// Checks a paused sandbox's disk as its VMM would see it, from a copy of its exception store: `$1` is its id. `$2` is `-n` where it
/// is to be clean as it is, and `-p` where its journal is to be replayed first, and no more than that is mended.
const FSCK: &str = "set -eu
    dir=/var/lib/roost; copy=/var/tmp/power-fsck; size=$(jq .disk $dir/sandboxes/$1/sandbox.json)
    cp --sparse=always $dir/sandboxes/$1/rootfs.cow $copy
    image=$(losetup --find --show --read-only $dir/images/minimal/rootfs.ext4); store=$(losetup --find --show $copy)
    cleanup() {
        dmsetup remove --retry power-disk; dmsetup remove --retry power-origin; losetup --detach $store; losetup --detach $image; rm $copy
    }
    trap cleanup EXIT
    there=$(blockdev --getsz $image)
    { echo 0 $there linear $image 0; [ $there = $size ] || echo $there $((size - there)) zero; } | dmsetup create power-origin
    echo 0 $size snapshot /dev/mapper/power-origin $store P 8 | dmsetup create power-disk
    e2fsck -f $2 /dev/mapper/power-disk 2>&1 || [ $2 = -p -a $? = 1 ]";

/// What is remembered.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Diary {
    /// How many moments have had their cut.
    cuts: usize,
    /// What the host had of its own before the first sandbox: firewall lines and routes.
    clean: (usize, usize),
    bystander: Option<Subject>,
    subject: Option<Subject>,
    rows: Vec<Row>,
}

/// A sandbox, and the boot id of its guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Subject {
    id: String,
    boot: String,
}

/// A line of the table.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    moment: String,
    became: String,
    ok: bool,
}

impl Diary {
    fn read() -> Self {
        match fs::read(DIARY) {
            Ok(text) => serde_json::from_slice(&text).expect("a diary of ours"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => panic!("the diary cannot be read: {error}"),
        }
    }

    /// Writes it, so that a power cut leaves the new or the old one.
    fn write(&self) {
        let new = Path::new(DIARY).with_extension("new");
        let mut file = File::create(&new).expect("made");
        file.write_all(&serde_json::to_vec(self).expect("serialises"))
            .expect("written");
        file.sync_all().expect("synced");
        fs::rename(&new, DIARY).expect("replaced");
        let folder = Path::new(DIARY).parent().expect("it lies in a folder");
        File::open(folder).expect("opened").sync_all().expect("synced");
    }

    /// The sandbox that is cut, running; made anew where the last cut has ended it.
    fn running(&mut self) -> Subject {
        let subject = self.subject.take().unwrap_or_else(make);
        roost::ok(&["resume", &subject.id]);
        self.subject = Some(subject.clone());
        subject
    }
}

#[test]
fn every_acknowledged_pause_outlives_a_power_cut_at_any_moment() {
    if !Path::new(CUT).exists() {
        say("NOTE: power cuts are tested by `cargo xtask test --power`, which boots the rig again after each\n");
        return;
    }
    let moments = chosen();
    wait_for_agent();
    assert!(!moments.is_empty(), "no moment is called that");
    let mut diary = Diary::read();
    if diary.cuts == 0 {
        let census = Census::take();
        diary.clean = (census.count("nft"), census.count("route"));
        let bystander = make();
        prepare_pause(&bystander);
        roost::ok(&["pause", &bystander.id]);
        diary.bystander = Some(bystander);
        diary.write();
    } else {
        let (moment, promised, _) = moments[diary.cuts - 1];
        let row = look(&mut diary, *moment, *promised);
        say(&format!("  {} | {} | {}\n", row.moment, row.became, verdict(row.ok)));
        diary.rows.push(row);
        diary.write();
    }
    match moments.get(diary.cuts) {
        Some((moment, ..)) => reach(&mut diary, *moment),
        None => end(&diary),
    }
}

/// The moments of this run: those that were asked for by a part of their name, or all, or few.
fn chosen() -> Vec<&'static (Moment, Became, bool)> {
    let all = is_full_size();
    let asked = std::env::var("ROOST_TESTS_MOMENTS").unwrap_or_default();
    let asked: Vec<&str> = asked.split_whitespace().collect();
    let wanted = |moment: &Moment, few: bool| {
        let name = format!("{moment:?}");
        match asked.is_empty() {
            true => all || few,
            false => asked.iter().any(|part| name.contains(part)),
        }
    };
    MOMENTS.iter().filter(|(moment, _, few)| wanted(moment, *few)).collect()
}

/// Brings the sandbox to a moment, and has the power cut, or the host shut down.
fn reach(diary: &mut Diary, moment: Moment) {
    let subject = diary.running();
    prepare_pause(&subject);
    // From here on the next boot looks for what this one's cut has left.
    diary.cuts += 1;
    diary.write();
    match moment {
        Moment::Acknowledged => drop(roost::ok(&["pause", &subject.id])),
        Moment::Running => {}
        Moment::Shutdown => return shut_down(moment),
        Moment::Pause(step) => wait_at(step, &["pause", &subject.id]),
        Moment::Resume(step) => {
            roost::ok(&["pause", &subject.id]);
            wait_at(step, &["resume", &subject.id]);
        }
    }
    fs::write(CUT, format!("cut {moment:?}\n")).expect("the xtask listens");
    eventually("the power to be cut", || None)
}

/// Has the host shut down, as an operator does. This program is one of those that are ended for it, and does not let that wait.
fn shut_down(moment: Moment) {
    // Enabled, as on a host, it is started at boot.
    run("systemctl", &["start", "roost-drain.service"]);
    fs::write(CUT, format!("off {moment:?}\n")).expect("the xtask listens");
    eventually("the shutdown to begin", || {
        let state = Command::new("systemctl").arg("is-system-running").output();
        (state.expect("systemctl runs").stdout == b"stopping\n").then_some(())
    });
}

/// Starts an operation that then waits at a step.
fn wait_at(step: &str, call: &[&str]) {
    fs::write(ARMED, format!("{step} wait")).expect("armed");
    let user = nix::unistd::User::from_name("roost")
        .expect("users can be read")
        .expect("a user roost");
    // The agent renames it.
    std::os::unix::fs::chown(ARMED, Some(user.uid.as_raw()), None).expect("given");
    // It ends with the power.
    drop(roost::start(call));
    eventually(step, || Path::new(REACHED).exists().then_some(()));
}

/// What a cut has left of the sandbox, and of all else.
fn look(diary: &mut Diary, moment: Moment, promised: Became) -> Row {
    let subject = diary.subject.clone().expect("a cut has its sandbox");
    let bystander = diary.bystander.clone().expect("made in the first boot");
    let seen = catch_unwind(AssertUnwindSafe(|| {
        let became = became(&subject.id);
        assert_eq!(became, promised, "after {moment:?}");
        assert!(find_paused(&bystander.id).is_some(), "the other paused sandbox is gone");
        let kept: &[&Subject] = match became {
            Became::Paused | Became::Disk => &[&bystander, &subject],
            Became::Gone => &[&bystander],
        };
        nothing_but(kept, diary.clean);
        match became {
            Became::Paused => {
                check_disk(&subject, "-n");
                check(&subject);
            }
            Became::Disk => {
                check_disk(&subject, "-p");
                check_booted(&subject);
                roost::ok(&["rm", &subject.id]);
            }
            Became::Gone => {}
        }
        became
    }));
    match seen {
        Ok(became) => {
            if became != Became::Paused {
                diary.subject = None;
            }
            let became = match became {
                Became::Paused => "paused; fsck clean; goes on where it was, files and memory as they were",
                Became::Disk => {
                    "paused; fsck clean, its journal replayed; its memory is refused; boots, files as they were"
                }
                Became::Gone => "gone, with a tombstone",
            };
            Row {
                moment: format!("{moment:?}"),
                became: became.to_owned(),
                ok: true,
            }
        }
        Err(panic) => {
            // The later moments are looked at all the same, with another sandbox.
            roost::roost(&["rm", &subject.id]);
            diary.subject = None;
            say(&journal());
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Row {
                moment: format!("{moment:?}"),
                became: text
                    .or(panic.downcast_ref::<&str>().copied())
                    .unwrap_or("a panic")
                    .to_owned(),
                ok: false,
            }
        }
    }
}

/// After the last cut: the sandbox that was paused before the first one.
fn end(diary: &Diary) {
    let bystander = diary.bystander.as_ref().expect("made in the first boot");
    check_disk(bystander, "-n");
    check(bystander);
    for sandbox in [Some(bystander), diary.subject.as_ref()].into_iter().flatten() {
        roost::ok(&["rm", &sandbox.id]);
    }
    nothing_but(&[], diary.clean);
    say("\nmoment | what became of the sandbox | ok\n");
    for row in &diary.rows {
        say(&format!("  {} | {} | {}\n", row.moment, row.became, verdict(row.ok)));
    }
    let wrong = diary.rows.iter().filter(|row| !row.ok).count();
    say(&format!(
        "NOTE: {} of {} power cuts and shutdowns, {wrong} of them wrong; a sandbox paused before the first was resumed after the last\n",
        diary.rows.len(),
        MOMENTS.len(),
    ));
    assert_eq!(wrong, 0, "power cuts that left something else than promised");
    assert!(!diary.rows.is_empty(), "no power cut");
}

fn verdict(ok: bool) -> &'static str {
    if ok { "ok" } else { "WRONG" }
}

/// A sandbox with everything in it that a pause is to keep.
fn make() -> Subject {
    let sandbox = Sandbox::create(&["--memory", "128"]);
    let boot = sandbox.sh(CANARIES);
    Subject {
        id: sandbox.forget(),
        boot,
    }
}

fn prepare_pause(subject: &Subject) {
    sh(&subject.id, LATE);
}

/// What has become of a sandbox that a cut has met.
fn became(id: &str) -> Became {
    let status = status(id);
    if status.as_deref() == Some("paused") {
        return if is_spent(id) { Became::Disk } else { Became::Paused };
    }
    assert!(status.is_none(), "neither paused nor gone: {status:?}");
    let why = roost::ok(&["why", id]);
    assert!(why.contains("vmm_lost"), "another reason: {why}");
    Became::Gone
}

/// Whether the record of a paused sandbox says that its memory is of no use any more.
fn is_spent(id: &str) -> bool {
    let record = fs::read(format!("/var/lib/roost/sandboxes/{id}/sandbox.json")).expect("a record");
    let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
    let memory = record["phase"]["paused"]["memory"].as_str();
    memory.expect("a paused sandbox's record") == "spent"
}

/// Resumes a sandbox, and looks at everything in it.
fn check(subject: &Subject) {
    roost::ok(&["resume", &subject.id]);
    assert_eq!(sh(&subject.id, CHECK), subject.boot, "the guest booted anew");
}

/// Boots a sandbox whose memory is refused, and looks at its disk.
fn check_booted(subject: &Subject) {
    let error = roost::fails(&["resume", &subject.id]);
    assert!(error.contains("from its disk alone"), "{error}");
    roost::ok(&["resume", "--disk-only", &subject.id]);
    assert_ne!(sh(&subject.id, CHECK_BOOTED), subject.boot, "the guest did not boot");
}

/// Checks a paused sandbox's filesystem from outside.
fn check_disk(subject: &Subject, how: &str) {
    let output = Command::new("bash")
        .args(["-c", FSCK, "fsck", &subject.id, how])
        .output();
    let output = output.expect("bash runs");
    assert!(
        output.status.success(),
        "fsck of its disk: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Waits until the host has these paused sandboxes' files, and nothing else that roost makes.
fn nothing_but(kept: &[&Subject], clean: (usize, usize)) {
    const NONE_OF: [&str; 8] = [
        "dm device",
        "loop",
        "veth",
        "network namespace",
        "process",
        "unit",
        "cgroup",
        "socket",
    ];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let census = Census::take();
        let quiet = NONE_OF.iter().all(|kind| census.count(kind) == 0)
            && (census.count("nft"), census.count("route")) == clean
            && census.count("file") == kept.len()
            && kept
                .iter()
                .all(|subject| census.lists("file", &format!("/var/lib/roost/sandboxes/{}", subject.id)));
        if quiet {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "more or less than the paused sandboxes' files: {census:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a shell script in a sandbox that outlives this boot.
fn sh(id: &str, script: &str) -> String {
    let sandbox = Sandbox { id: id.to_owned() };
    let said = sandbox.sh(script);
    drop(sandbox.forget());
    said
}

/// The end of what the daemons have said in this boot.
fn journal() -> String {
    let output = Command::new("journalctl")
        .args(["-b", "--no-pager", "-o", "short-monotonic", "-n", "120"])
        .output();
    output.map_or_else(
        |error| format!("journalctl: {error}\n"),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// Past libtest, which would keep it to itself until an end that most boots do not have.
fn say(text: &str) {
    std::io::stderr().write_all(text.as_bytes()).expect("written");
}

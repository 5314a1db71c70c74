//! Power cuts. The xtask outside boots the rig again and again over one data disk and runs this test in each boot: it looks at what
//! the last cut has left, brings the sandboxes to the next moment, and has the power cut, which kills the rig's QEMU at once.
//!
//! One sandbox is cut; another one was paused before the first cut and is resumed after the last. What the records on disk promise
//! of the first (`agent/src/sandbox/record.rs`):
//!
//! | cut | its record says | after the next boot it is |
//! |---|---|---|
//! | during a pause, up to where its snapshot is sealed | running | gone, with a tombstone |
//! | from there on, so also once the pause is acknowledged | paused | paused |
//! | during a resume, until its memory is offered to a VMM | paused | paused |
//! | from there until its guest may write | resuming | paused |
//! | from there until it has thawed | thawing | paused, with its memory where its disk was not written |
//! | from there on | running | gone, with a tombstone |

use std::fs::{self, File};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use roost_tests::census::Census;
use roost_tests::roost::{self, Sandbox, find, find_paused, wait_for_agent};
use roost_tests::{PATIENCE, eventually, is_full_size};
use serde::{Deserialize, Serialize};

/// A line here has the power cut. There only in a series of boots.
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
    (Moment::Pause("pause.recorded"), Became::Paused, false),
    (Moment::Pause("pause.sealed"), Became::Gone, false),
    (Moment::Pause("pause.written"), Became::Gone, false),
    (Moment::Pause("pause.synced"), Became::Gone, false),
    (Moment::Pause("pause.stopped"), Became::Gone, false),
    (Moment::Pause("pause.frozen"), Became::Gone, false),
    (Moment::Pause("pause.prepared"), Became::Gone, false),
    // Nobody has been told of this resume, and its guest is frozen: it is as paused as it was. From the thaw on its memory may be of no
    // use, so what comes after that is no moment here.
    (Moment::Resume("resume.recorded"), Became::Paused, false),
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

/// Checks a paused sandbox's disk as its VMM would see it, from a copy of its exception store: `$1` is its id.
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
    e2fsck -f -n /dev/mapper/power-disk 2>&1";

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

/// Brings the sandbox to a moment, and has the power cut.
fn reach(diary: &mut Diary, moment: Moment) {
    let subject = diary.running();
    prepare_pause(&subject);
    // From here on the next boot looks for what this one's cut has left.
    diary.cuts += 1;
    diary.write();
    match moment {
        Moment::Acknowledged => drop(roost::ok(&["pause", &subject.id])),
        Moment::Pause(step) => wait_at(step, &["pause", &subject.id]),
        Moment::Resume(step) => {
            roost::ok(&["pause", &subject.id]);
            wait_at(step, &["resume", &subject.id]);
        }
    }
    fs::write(CUT, format!("{moment:?}\n")).expect("the xtask listens");
    eventually("the power to be cut", || None)
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
        assert_eq!(became, promised, "after the cut");
        assert!(find_paused(&bystander.id).is_some(), "the other paused sandbox is gone");
        let kept: &[&Subject] = match became {
            Became::Paused => &[&bystander, &subject],
            Became::Gone => &[&bystander],
        };
        nothing_but(kept, diary.clean);
        if became == Became::Paused {
            check_disk(&subject);
            check(&subject);
        }
        became
    }));
    match seen {
        Ok(became) => {
            if became == Became::Gone {
                diary.subject = None;
            }
            let became = match became {
                Became::Paused => "paused; fsck clean; goes on where it was, files and memory as they were",
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
    check_disk(bystander);
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
        "NOTE: {} of {} power cuts, {wrong} of them wrong; a sandbox paused before the first was resumed after the last\n",
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
    if find_paused(id).is_some() {
        return Became::Paused;
    }
    let listed = find(id);
    assert!(listed.is_none(), "neither paused nor gone: {listed:?}");
    let why = roost::ok(&["why", id]);
    assert!(why.contains("vmm_lost"), "another reason: {why}");
    Became::Gone
}

/// Resumes a sandbox, and looks at everything in it.
fn check(subject: &Subject) {
    roost::ok(&["resume", &subject.id]);
    assert_eq!(sh(&subject.id, CHECK), subject.boot, "the guest booted anew");
}

/// Checks a paused sandbox's filesystem from outside.
fn check_disk(subject: &Subject) {
    let output = Command::new("bash").args(["-c", FSCK, "fsck", &subject.id]).output();
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

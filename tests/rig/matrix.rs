//! The kill matrix: every step of every operation × everything that can happen there. Each case arms a failpoint of the agent's,
//! starts the operation, does its harm while the agent waits at the step, lets go, and looks at what has become of the sandbox, of its
//! data, and of the kernel's objects.
//!
//! Some of the cases run with all tests, one of each operation; `cargo xtask faults` runs every one of them. `ROOST_MATRIX` names
//! others (see [`steps::choose`]). A case that fails is told of at once and again at the end; the others run all the same.

mod fault;
mod steps;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use roost_tests::census::Census;
use roost_tests::disk::preallocate;
use roost_tests::roost::{self, Sandbox, Template, find, find_paused, status, wait_for_agent};
use roost_tests::{eventually, in_rig, is_full_size, show};

use fault::Fault;
use steps::{Operation, Point, Step};

const ARMED: &str = "/var/lib/roost/failpoint";
const REACHED: &str = "/var/lib/roost/failpoint.reached";
const GO: &str = "/var/lib/roost/failpoint.go";
const LOSE: &str = "/var/lib/roost/failpoint.lose";

/// The sandbox that creates are to make.
const CREATED: &str = "matrix";

/// What the agent removes, or the kernel, when the last of a sandbox is gone. Sockets are not among them: there is one for each
/// connection of the moment.
const KINDS: [&str; 8] = [
    "dm device",
    "loop",
    "veth",
    "network namespace",
    "route",
    "unit",
    "process",
    "file",
];

#[test]
fn whatever_happens_at_any_step_of_anything_nothing_is_lost_and_nothing_stays() {
    let is_all = is_full_size();
    let wish = std::env::var("ROOST_MATRIX").unwrap_or(if is_all { "all" } else { "sample 0" }.to_owned());
    let cases = steps::cases();
    assert!(cases.len() >= 400, "only {} cases", cases.len());
    let chosen = steps::choose(&cases, &wish);
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    in_rig(|| {
        let mut host = Host::new(chosen.len() > 30);
        for number in chosen {
            let (step, fault) = cases[number];
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                // Another one each time: the agent answers for the last one that nobody has heard of.
                let template = Template::named(u8::try_from(number % 200).expect("less than 200"));
                case(step, fault, &mut host, template)
            }));
            let became = outcome.unwrap_or_else(|panic| {
                let what = words_of(panic.as_ref());
                show(&what);
                failures.push(format!("{:?} {} {fault:?}: {what}", step.operation, step.name));
                host.start_over();
                "FAILED"
            });
            show(&format!(
                "{number:>5} | {:?} | {} | {fault:?} | {became}",
                step.operation, step.name
            ));
            done.push((step.operation, fault));
        }
        host.end();
    });
    table(&done);
    show(&format!(
        "NOTE: {} of {} cases (ROOST_MATRIX={wish:?})",
        done.len(),
        cases.len()
    ));
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// How many cases there were of each operation and fault.
fn table(done: &[(Operation, Fault)]) {
    let heads: String = Fault::ALL
        .map(|fault| format!(" {:>11}", format!("{fault:?}")))
        .concat();
    show(&format!("{:<14}{heads}", ""));
    for operation in steps::operations() {
        let counts = Fault::ALL.map(|fault| {
            let count = done.iter().filter(|case| **case == (operation, fault)).count();
            format!(" {count:>11}")
        });
        show(&format!("{:<14}{}", format!("{operation:?}"), counts.concat()));
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words")
        .to_owned()
}

/// How many there are of each of [`KINDS`].
type Counts = BTreeMap<&'static str, usize>;

fn counts() -> Counts {
    let census = Census::take();
    KINDS.map(|kind| (kind, census.count(kind))).into()
}

/// What the cases are done to, and what must be there meanwhile.
struct Host {
    /// The sandbox of the case before, where that survived.
    subject: Option<Sandbox>,
    /// A paused one that nobody touches.
    bystander: Option<Sandbox>,
    /// A template that carries memory.
    template: Option<Template>,
    /// Without a subject.
    empty: Counts,
    /// With a running one.
    with_one: Option<Counts>,
}

impl Host {
    fn new(with_bystander: bool) -> Self {
        let mut host = Self {
            subject: None,
            bystander: None,
            template: None,
            empty: counts(),
            with_one: None,
        };
        if with_bystander {
            let bystander = Sandbox::create(&["--memory", "128"]);
            bystander.plant();
            bystander.pause();
            *host.empty.get_mut("file").expect("one of them") += 1;
            host.is_as_it_must_be("gone");
            host.bystander = Some(bystander);
        }
        host
    }

    /// A sandbox that runs, with what is to be found in it again.
    fn running(&mut self) -> &Sandbox {
        let is_there = |sandbox: &Sandbox| status(&sandbox.id).is_some();
        if let Some(gone) = self.subject.take_if(|sandbox| !is_there(sandbox)) {
            gone.forget();
        }
        let subject = self.subject.get_or_insert_with(|| {
            let made = Sandbox::create(&["--memory", "128"]);
            made.plant();
            made
        });
        subject.resume();
        self.with_one.get_or_insert_with(counts);
        subject
    }

    fn paused(&mut self) -> &Sandbox {
        self.running().pause();
        self.subject.as_ref().expect("made just now")
    }

    /// The template, and no other sandbox: whatever is done to all shims or VMMs is done to the one that is made of it.
    fn template(&mut self) -> &Template {
        if self.template.is_none() {
            let template = Template::named(255);
            let source = self.running();
            roost::ok(&[&["snapshot", &source.id], &template.arguments()[..]].concat());
            self.template = Some(template);
        }
        self.subject = None;
        self.template.as_ref().expect("made just now")
    }

    /// What the kernel has is what `became` needs, once it has had its time.
    fn is_as_it_must_be(&self, became: &str) {
        let mut wanted = self.empty.clone();
        match became {
            "running" => wanted.clone_from(self.with_one.as_ref().expect("it was made running")),
            "paused" => *wanted.get_mut("file").expect("one of them") += 1,
            _ => {}
        }
        let mut last = Counts::new();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            eventually("the kernel to have what is needed", || {
                last = counts();
                (last == wanted).then_some(())
            });
        }));
        assert!(
            outcome.is_ok(),
            "{became}: {last:?} instead of {wanted:?}: {:?}",
            Census::take()
        );
        if let Some(bystander) = &self.bystander {
            assert!(
                find_paused(&bystander.id).is_some(),
                "a paused sandbox is not paused any more"
            );
        }
    }

    /// After a case that failed: away with what it left, as far as that is possible.
    fn start_over(&mut self) {
        disarm();
        wait_for_agent();
        let subject = self.subject.take().map(Sandbox::forget);
        for id in subject.iter().map(String::as_str).chain([CREATED]) {
            // The end of the test sees what stays.
            drop(roost::roost(&["rm", id]));
        }
    }

    fn end(mut self) {
        self.subject = None;
        self.template = None;
        if let Some(bystander) = self.bystander {
            bystander.resume();
            bystander.is_whole();
        }
    }
}

/// Runs one case; what became of the sandbox.
fn case(step: Step, fault: Fault, host: &mut Host, template: Template) -> &'static str {
    let Step { operation, name, point } = step;
    if operation != Operation::Clone {
        host.template = None;
    }
    if fault == Fault::Enospc && !matches!(operation, Operation::Create | Operation::Clone) {
        // A guest that writes to a new place of its disk while the host has no room loses that disk, whatever roost does at that
        // moment; that there is room is another promise. What is looked at here is what roost itself needs.
        let id = host.running().id.clone();
        preallocate(Path::new(&format!("/var/lib/roost/sandboxes/{id}/rootfs.cow")));
    }
    let id = match operation {
        Operation::Create | Operation::Clone => {
            host.subject = None;
            CREATED.to_owned()
        }
        Operation::Pause | Operation::Destroy | Operation::Snapshot | Operation::Flatten => host.running().id.clone(),
        Operation::Resume | Operation::ResumeDisk | Operation::SnapshotPaused | Operation::FlattenPaused => {
            host.paused().id.clone()
        }
    };
    let call = match operation {
        Operation::Create => vec!["create", "--memory", "128", "--id", &id],
        Operation::Clone => [&["create", "--id", &id], &host.template().arguments()[..]].concat(),
        Operation::Pause => vec!["pause", &id],
        Operation::Resume => vec!["resume", &id],
        Operation::ResumeDisk => vec!["resume", "--disk-only", &id],
        Operation::Destroy => vec!["rm", &id],
        Operation::Snapshot | Operation::SnapshotPaused => [&["snapshot", &id], &template.arguments()[..]].concat(),
        Operation::Flatten | Operation::FlattenPaused => [&["flatten", &id], &template.arguments()[..]].concat(),
    };
    arm(name, fault);
    let mut caller = roost::start(&call);
    eventually("the step", || {
        let ended = caller.try_wait().expect("it can be waited for");
        if let Some(status) = ended.filter(|_| Path::new(ARMED).exists()) {
            let mut said = String::new();
            let mut stderr = caller.stderr.take().expect("it is kept");
            stderr.read_to_string(&mut said).expect("it is text");
            // A step that is never reached is a mistake of the table. That there is room again after a case before this one, the agent
            // sees at its next look.
            assert!(
                roost::is_refused_for_room(&said),
                "{call:?} ended with {status} before the step: {said}"
            );
            caller = roost::start(&call);
        }
        let reached = if fault == Fault::LostReply {
            !Path::new(ARMED).exists()
        } else {
            Path::new(REACHED).exists()
        };
        reached.then_some(())
    });
    let harm = fault.strike(&id, &mut caller);
    std::fs::write(GO, "").expect("let go");
    if !matches!(fault, Fault::Eio | Fault::KillAgent | Fault::LostReply) {
        // Taken away too early, the word to go on would not be seen.
        eventually("the agent to go on", || (!Path::new(REACHED).exists()).then_some(()));
    }
    harm.last(&mut caller);
    let output = caller.wait_with_output().expect("it ends");
    disarm();
    wait_for_agent();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut became = settled(&id);
    let mut has_lost_vm = fault.ends_the_vm();
    if became == "running" && fault == Fault::Enospc {
        // The agent may have held its guest meanwhile, and sees at its next look that there is room again. A guest that has just been
        // made may have written to a new place of its disk before, and lost that disk.
        eventually("its guest to run on, or its disk to be known as lost", || {
            let output = roost::roost(&["exec", "--timeout", "30", &id, "--", "/bin/true"]);
            (output.status.success() || find(&id).is_none()).then_some(())
        });
        became = settled(&id);
        if became == "gone" {
            assert!(
                matches!(operation, Operation::Create | Operation::Clone),
                "its disk had all its blocks"
            );
            assert_eq!(roost::tombstone(&id)["reason"], "disk_lost");
            has_lost_vm = true;
        }
    }
    let is_success = output.status.success();
    let acceptable = acceptable(operation, point, has_lost_vm);
    assert!(
        acceptable.contains(&became),
        "{became} instead of {acceptable:?}; {said}"
    );
    let promised = match operation {
        Operation::Create
        | Operation::Clone
        | Operation::Resume
        | Operation::ResumeDisk
        | Operation::Snapshot
        | Operation::Flatten => "running",
        Operation::Pause | Operation::SnapshotPaused | Operation::FlattenPaused => "paused",
        Operation::Destroy => "gone",
    };
    // What a caller takes it for that was told of a failure.
    let undone = match operation {
        Operation::Create | Operation::Clone => Some("gone"),
        Operation::Pause | Operation::Snapshot | Operation::Flatten => Some("running"),
        Operation::Resume | Operation::ResumeDisk | Operation::SnapshotPaused | Operation::FlattenPaused => {
            Some("paused")
        }
        // It is repeated.
        Operation::Destroy => None,
    };
    if is_success {
        assert!(
            !fault.fails_the_step(),
            "answered with success, though a step had failed"
        );
        // A VM that was lost as the answer was on its way.
        let fell = became == "gone" && has_lost_vm;
        assert!(became == promised || fell, "answered with success, and it is {became}");
    } else {
        assert!(!fault.is_no_matter(), "it should not have mattered: {said}");
        // The error is told by name.
        assert!(fault != Fault::Eio || said.contains("(os error 5)"), "{said}");
        let fell = became == "gone" && has_lost_vm;
        let is_as_told = undone.is_none_or(|undone| became == undone) || fell;
        assert!(
            is_as_told || fault.cuts_the_answer_off(),
            "answered with a failure, and it is {became}: {said}"
        );
    }
    let makes_template = matches!(
        operation,
        Operation::Snapshot | Operation::SnapshotPaused | Operation::Flatten | Operation::FlattenPaused
    );
    if makes_template {
        look_at(template, is_success);
    }
    match (operation, became) {
        (Operation::Create | Operation::Destroy, "gone") | (Operation::Clone, "gone") => {}
        (Operation::Clone, _) => {
            let clone = Sandbox { id };
            if fault != Fault::Enospc {
                clone.has_whole_disk();
            }
        }
        (Operation::Create | Operation::Destroy, _) => drop(roost::ok(&["rm", &id])),
        (_, "gone") => {}
        // After its thaw the guest may have written, and then nobody can say any more that its memory fits its disk.
        (Operation::Resume, "paused") if matches!(point, Point::Recorded | Point::Thawed) => {
            recovered(host, has_lost_vm)
        }
        (Operation::ResumeDisk, _) => from_disk(host, became),
        _ => host.running().is_whole(),
    }
    if let Some(gone) = host.subject.take_if(|sandbox| find(&sandbox.id).is_none()) {
        // `rm` was the operation, or the VM was lost.
        gone.forget();
    }
    let left = if host.subject.is_some() { "running" } else { "gone" };
    host.is_as_it_must_be(left);
    became
}

/// What may have become of the sandbox.
fn acceptable(operation: Operation, point: Point, has_lost_vm: bool) -> &'static [&'static str] {
    match (operation, point, has_lost_vm) {
        // What nobody was told of is gone, or it runs.
        (Operation::Create | Operation::Clone, ..) => &["gone", "running"],
        (Operation::Pause, Point::Open, true) => &["gone"],
        (Operation::Pause, Point::Whole, true) => &["paused"],
        (Operation::Pause, Point::Open | Point::Whole, false) => &["running", "paused"],
        (Operation::Pause, _, _) => &["paused"],
        (Operation::Resume | Operation::ResumeDisk, Point::Open, _) => &["paused", "running"],
        (Operation::ResumeDisk, Point::Booted, true) => &["paused"],
        (Operation::ResumeDisk, Point::Booted, false) => &["paused", "running"],
        (Operation::Resume, Point::Recorded, true) => &["paused"],
        (Operation::Resume, Point::Thawed, true) => &["paused", "gone"],
        (Operation::Resume | Operation::ResumeDisk, _, true) => &["gone"],
        (Operation::Resume | Operation::ResumeDisk, _, false) => &["running"],
        // A destroy that was cut off is gone on with by whoever repeats it.
        (Operation::Destroy, ..) => &["gone", "running", "stopping"],
        (Operation::Snapshot | Operation::Flatten, _, true) => &["gone"],
        (Operation::Snapshot | Operation::Flatten, _, false) => &["running"],
        (Operation::SnapshotPaused | Operation::FlattenPaused, ..) => &["paused"],
    }
}

/// A sandbox that was paused again after its thaw: its memory fits its disk, or it says so and has its disk.
fn recovered(host: &mut Host, has_lost_vm: bool) {
    let sandbox = host.subject.as_ref().expect("it is there");
    let output = roost::roost(&["resume", &sandbox.id]);
    if output.status.success() {
        return sandbox.is_whole();
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(has_lost_vm && said.contains("from its disk alone"), "{said}");
    roost::ok(&["resume", "--disk-only", &sandbox.id]);
    sandbox.has_whole_disk();
    // The next case is to find memory too.
    host.subject = None;
}

/// A sandbox that was to boot from its disk: whatever came of that, its disk is as it was.
fn from_disk(host: &mut Host, became: &str) {
    let sandbox = host.subject.as_ref().expect("it is there");
    if became == "paused" {
        roost::ok(&["resume", "--disk-only", &sandbox.id]);
    }
    sandbox.has_whole_disk();
    // The next case is to find memory too.
    host.subject = None;
}

/// A template is whole or not there; one that was answered for is there.
fn look_at(template: Template, is_promised: bool) {
    let images = || {
        let found = std::process::Command::new("find")
            .args(["/var/lib/roost/images/teams", "-path", "*/teams/*/*/rootfs.ext4"])
            .args(["-not", "-path", "*/.*"])
            .output()
            .expect("find runs");
        let text = String::from_utf8_lossy(&found.stdout).into_owned();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let checked = |image: &String| {
        let output = std::process::Command::new("e2fsck")
            .args(["-f", "-n", image])
            .output()
            .expect("e2fsck runs");
        assert!(
            output.status.success(),
            "{image}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    };
    // A capture whose caller has gone away goes on.
    eventually("the template to be made, or not", || {
        (!Census::take().lists("template", "/.making-")).then_some(())
    });
    let found = images();
    assert!(
        !is_promised || !found.is_empty(),
        "answered with success, and there is none"
    );
    found.iter().for_each(checked);
    drop(template);
    eventually("its files to go", || {
        (Census::take().count("template") == 0).then_some(())
    });
}

fn arm(step: &str, fault: Fault) {
    disarm();
    std::fs::write(ARMED, format!("{step} {}", fault.wish())).expect("armed");
    // The agent takes it away again.
    std::os::unix::fs::chown(ARMED, uid_of_roost(), None).expect("given");
}

fn disarm() {
    for file in [ARMED, REACHED, GO, LOSE] {
        // Of most cases only some are there.
        drop(std::fs::remove_file(file));
    }
}

fn uid_of_roost() -> Option<u32> {
    let user = nix::unistd::User::from_name("roost").expect("users can be read");
    Some(user.expect("a user roost").uid.as_raw())
}

/// What a sandbox has come to once nothing is under way.
fn settled(id: &str) -> &'static str {
    eventually("it to come to rest", || match status(id).as_deref() {
        None => Some("gone"),
        Some("running") => Some("running"),
        Some("paused") => Some("paused"),
        // A teardown that failed is tried again in half a minute.
        Some(_) => None,
    })
}

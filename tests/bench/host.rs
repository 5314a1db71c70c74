//! `host`: a sandbox's disk and network through privd, against the command-line tools of such hosts, and against the bare system calls.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use roost_common::ids::Slot;
use roost_common::privd::{Disk, EgressPolicy, Internet};
use roost_common::units::{Mebibytes, Sectors};
use roost_tests::eventually;
use roost_tests::privd::Rig;

use crate::figure::{Figure, Goal, Samples};
use crate::tools::Tools;
use crate::{Bench, RIG_SLOTS};

/// Where the C program is, see `tests/bench/bare.c`.
const BARE: &str = "/root/bench-bare";

/// How a batch of nf_tables begins: a message of 20 bytes of type `NFNL_MSG_BATCH_BEGIN`. Those of rtnetlink with this number are longer.
const BATCH_BEGIN: [u8; 6] = [20, 0, 0, 0, 0x10, 0];

pub(crate) fn run(bench: &Bench) {
    let rig = Rig::start();
    let size = Mebibytes(1024).sectors();
    let image = rig.image("bench.img", 64 << 20, 1);
    let policy = || EgressPolicy::of(Internet::Open);
    let (_first, mut bare) = Bare::beside(&rig, &image, size);
    // The tools need it by number.
    let origin = fs::read_to_string(format!("/sys/block/dm-{}/dev", bare.origin)).expect("a device");
    let origin = origin.trim();

    let [mut by_privd, mut by_tools, mut by_bare, mut removal, mut removal_tools] = <[Samples; 5]>::default();
    let [mut disk, mut network, mut bare_disk, mut bare_network] = <[Samples; 4]>::default();
    let [mut at_once, mut network_tools] = <[Samples; 2]>::default();
    for n in 0..bench.samples(20) {
        let slot = RIG_SLOTS + n;
        let cow = |who: &str| rig.cow(&format!("{who}-{n}.cow"), size);

        // At once, as the agent asks for them.
        let request = rig.request(&format!("bench-{n}"), &image, &cow("at-once"), size);
        let both = at_once.time(|| {
            std::thread::scope(|scope| {
                let network = scope.spawn(|| rig.open_network(slot, policy()).expect("opened"));
                (rig.open_disk(request).expect("opened"), network.join().expect("opened"))
            })
        });
        let minor = both.0.node.minor;
        drop(both);
        gone(minor, &format!("roost-v{slot}"));

        // And one after the other, as the others do.
        let request = rig.request(&format!("bench-{n}"), &image, &cow("privd"), size);
        let began = Instant::now();
        let made = disk.time(|| rig.open_disk(request).expect("opened"));
        let net = network.time(|| rig.open_network(slot, policy()).expect("opened"));
        by_privd.add_time(began.elapsed());
        let minor = made.node.minor;
        removal.time(|| {
            drop((made, net));
            gone(minor, &format!("roost-v{slot}"));
        });

        let cow_file = cow("tools");
        let mut tools = Tools::prepare(n, Slot::try_from(slot).expect("a slot"), &rig.place);
        by_tools.time(|| {
            tools.make_disk(origin, &cow_file, size);
            network_tools.time(|| tools.make_network());
        });
        removal_tools.time(|| tools.remove());

        let took = bare.make(&format!("bench-b{n}"), &cow("bare"), size, slot);
        bare_disk.add_time(took.disk);
        bare_network.add_time(took.network);
        by_bare.add_time(took.disk + took.network);
        bare.let_go();
    }
    let tell = |name, subject, baseline, goal, unmet| {
        Figure {
            name,
            unit: "ms",
            subject,
            baseline: Some(baseline),
            goal,
            unmet,
        }
        .tell();
    };
    tell(
        "host.tools",
        &at_once,
        ("losetup, dmsetup, ip, sysctl, nft", &by_tools),
        Goal::Faster(20.0),
        "most of what is left is the kernel's own work: see host.bare for how far the system calls alone are from the tools, and host.ready for \
         a create whose network was made ahead",
    );
    tell(
        "host.ready",
        &disk,
        ("the same for both; the network was made ahead", &by_tools),
        Goal::Faster(20.0),
        "a disk takes as long as the kernel takes to attach its loop and load its table: see host.disk",
    );
    tell(
        "host.network.tools",
        &network,
        ("ip, sysctl, nft", &network_tools),
        Goal::Seen,
        "",
    );
    tell(
        "host.bare",
        &by_privd,
        ("the bare system calls, in C", &by_bare),
        Goal::AtMostTimes(2.0),
        "see host.disk and host.network for which of the two",
    );
    let seen = "";
    tell(
        "host.disk",
        &disk,
        ("the bare system calls, in C", &bare_disk),
        Goal::AtMostTimes(2.0),
        "privd looks the origin up and asks for the \
         device after each step, which the bare system calls do not. Next: see which of these take the time",
    );
    tell(
        "host.network",
        &network,
        ("the bare system calls, in C", &bare_network),
        Goal::AtMostTimes(2.0),
        "a thread, a question for the host's \
         addresses and one for its table at each network. Next: keep the netlink sockets and listen to changes of addresses",
    );
    tell(
        "host.remove",
        &removal,
        ("dmsetup, losetup, ip", &removal_tools),
        Goal::Seen,
        seen,
    );
    drop(bare);
}

/// Waits until a device and a link are no more. Asks for these two alone: there may be thousands of others.
pub(crate) fn gone(minor: u32, link: &str) {
    let places = [format!("/sys/block/dm-{minor}"), format!("/sys/class/net/{link}")];
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Some(there) = places.iter().find(|place| Path::new(place).exists()) {
        assert!(Instant::now() < deadline, "{there} is still there");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The netlink batch with which privd loads a sandbox's packet filter, as it is seen from outside.
fn batch(rig: &Rig) -> Vec<u8> {
    let log = rig.place.join("strace");
    // Whatever is sent to one of these, as it is; strace would show what it takes the messages for.
    let descriptors: Vec<String> = (3..100).map(|descriptor| descriptor.to_string()).collect();
    let mut strace = Command::new("strace")
        .args(["-f", "-e", "trace=sendto", "-e", "raw=sendto", "-e"])
        .arg(format!("write={}", descriptors.join(",")))
        .arg("-o")
        .arg(&log)
        .args(["-p", &rig.child.id().to_string()])
        .stderr(Stdio::null())
        .spawn()
        .expect("strace runs");
    eventually("strace to be attached", || {
        let status = fs::read_to_string(format!("/proc/{}/status", rig.child.id())).expect("it runs");
        (!status.contains("TracerPid:\t0\n")).then_some(())
    });
    let network = rig
        .open_network(RIG_SLOTS, EgressPolicy::of(Internet::Open))
        .expect("opened");
    let pid = nix::unistd::Pid::from_raw(strace.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("strace runs");
    strace.wait().expect("it ends");
    drop(network);
    eventually("the network to be gone", || {
        let link = format!("/sys/class/net/roost-v{RIG_SLOTS}");
        (!Path::new(&link).exists()).then_some(())
    });
    let text = fs::read_to_string(&log).expect("a log");
    let batches: Vec<_> = dumps(&text)
        .into_iter()
        .filter(|sent| sent.starts_with(&BATCH_BEGIN))
        .collect();
    assert_eq!(batches.len(), 1, "batches in {text}");
    batches.into_iter().next().expect("one")
}

/// What was sent, as strace dumps it below each call: ` | 00010  6e 61 6d 65 64 00 00 00  10 00 00 00 14 00 00 00  named........... |`.
fn dumps(text: &str) -> Vec<Vec<u8>> {
    /// Sixteen bytes of three letters, and a space between the halves.
    const WIDTH: usize = 16 * 3 + 1;
    let mut sent = Vec::new();
    for line in text.lines() {
        let Some((offset, rest)) = line.strip_prefix(" | ").and_then(|line| line.split_once("  ")) else {
            continue;
        };
        if offset.bytes().all(|digit| digit == b'0') {
            sent.push(Vec::new());
        }
        let digits = rest.get(..WIDTH).expect("a line of a dump").split_whitespace();
        let bytes = digits.map(|digits| u8::from_str_radix(digits, 16).expect("two digits"));
        sent.last_mut().expect("a dump begins at 0").extend(bytes);
    }
    sent
}

/// The program of bare system calls.
pub(crate) struct Bare {
    pub(crate) child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Minor number of the origin below its disks, which is privd's.
    origin: u32,
    /// What it has made last: its disk's minor number, and its network's slot.
    made: Option<(u32, u32)>,
}

/// How long the bare system calls took.
pub(crate) struct Took {
    pub(crate) disk: Duration,
    pub(crate) network: Duration,
}

impl Bare {
    /// Starts it beside a sandbox's disk of the same image, as on any host at work: the origin is shared. That disk keeps the origin.
    pub(crate) fn beside(rig: &Rig, image: &Path, size: Sectors) -> (Disk, Self) {
        let before = origins();
        let request = rig.request("bench-first", image, &rig.cow("bench-first.cow", size), size);
        let first = rig.open_disk(request).expect("opened");
        let origin = *origins().difference(&before).next().expect("a new origin");
        let rules = rig.place.join("rules");
        fs::write(&rules, batch(rig)).expect("written");
        let mut child = Command::new(BARE)
            .arg(origin.to_string())
            .arg(rules)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{BARE}: {error}"));
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let bare = Self {
            child,
            input,
            output,
            origin,
            made: None,
        };
        (first, bare)
    }

    /// Makes a disk and a network.
    pub(crate) fn make(&mut self, name: &str, cow: &Path, size: Sectors, slot: u32) -> Took {
        let [disk, network, minor] = self.ask(&format!("{name} {} {} {slot}", cow.display(), size.0));
        self.made = Some((u32::try_from(minor).expect("a minor number"), slot));
        Took {
            disk: Duration::from_nanos(disk),
            network: Duration::from_nanos(network),
        }
    }

    /// Lets go of both, and waits until they are no more.
    pub(crate) fn let_go(&mut self) {
        self.ask("");
        if let Some((minor, slot)) = self.made.take() {
            gone(minor, &format!("benchv{slot}"));
        }
    }

    fn ask(&mut self, line: &str) -> [u64; 3] {
        writeln!(self.input, "{line}").expect("written");
        let mut answer = String::new();
        self.output.read_line(&mut answer).expect("an answer");
        let numbers: Vec<u64> = answer
            .split_whitespace()
            .map(|number| number.parse().expect("a number"))
            .collect();
        numbers
            .try_into()
            .expect("bare has said on standard error why it ended")
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Minor numbers of the origins that there are.
fn origins() -> BTreeSet<u32> {
    let blocks = fs::read_dir("/sys/block").expect("there is one").flatten();
    blocks
        .filter_map(|block| {
            let minor = block.file_name().to_str()?.strip_prefix("dm-")?.parse().ok()?;
            let name = fs::read_to_string(block.path().join("dm/name")).ok()?;
            name.starts_with("roost-o-").then_some(minor)
        })
        .collect()
}

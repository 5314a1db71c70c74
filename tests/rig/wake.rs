//! How a guest wakes: no program of it runs before it has been told the time, and drawn numbers of its own.

use std::path::Path;
use std::time::{Duration, SystemTime};

use roost_tests::roost::{self, Sandbox, Template};
use roost_tests::{eventually, in_rig};

/// Where a test says that the agent is to wait, as `agent/src/failpoint.rs` has it.
const ARMED: &str = "/var/lib/roost/failpoint";
const REACHED: &str = "/var/lib/roost/failpoint.reached";
const GO: &str = "/var/lib/roost/failpoint.go";

/// Programs that draw numbers all the time, each to a file in memory, a line each time: the clock, the seconds that the kernel
/// has run, the number. The second has put itself into the root cgroup, and the third into one that it has made. A pipe that
/// nobody writes to gives them a pause without a process for it.
const DRAWERS: &str = r#"mkdir -p /dev/shm; mkfifo /dev/shm/never; cat > /dev/shm/draw <<'END'
test -z "$2" || echo $$ > $2/cgroup.procs || exit 1
exec 9<>/dev/shm/never
while true; do
    read -r uptime idle < /proc/uptime; read -r number < /proc/sys/kernel/random/uuid
    echo "$EPOCHREALTIME $uptime $number"
    read -rt 0.05 -u 9
done > /dev/shm/$1
END
mkdir -p /sys/fs/cgroup/own/inner
setsid bash /dev/shm/draw first >/dev/null 2>&1 &
setsid bash /dev/shm/draw second /sys/fs/cgroup >/dev/null 2>&1 &
setsid bash /dev/shm/draw third /sys/fs/cgroup/own/inner >/dev/null 2>&1 &
until test -s /dev/shm/first && test -s /dev/shm/second && test -s /dev/shm/third; do sleep 0.1; done"#;

/// How long the woken guest is left without `/init`: far longer than a drawer takes for a line.
const UNTOLD: Duration = Duration::from_secs(3);

/// A line of a drawer's.
#[derive(Debug)]
struct Drawn {
    clock: f64,
    uptime: f64,
    number: String,
}

/// What a drawer has written so far; its last line may be half a line.
fn drawn(sandbox: &Sandbox, drawer: &str) -> Vec<Drawn> {
    let text = sandbox.sh(&format!("cat /dev/shm/{drawer}"));
    let mut lines: Vec<&str> = text.lines().collect();
    lines.pop();
    lines
        .into_iter()
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [clock, uptime, number] = fields[..] else {
                panic!("a line is {line:?}")
            };
            Drawn {
                clock: clock.parse().expect("a time"),
                uptime: uptime.parse().expect("seconds"),
                number: number.to_owned(),
            }
        })
        .collect()
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs_f64()
}

#[test]
fn no_program_runs_between_the_wake_and_the_host_s_word() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(DRAWERS);
        sandbox.pause();
        let paused = now();
        std::thread::sleep(UNTOLD);
        std::fs::write(ARMED, "resume.woken wait").expect("armed");
        let resume = roost::start(&["resume", &sandbox.id]);
        eventually("the guest to wake", || Path::new(REACHED).exists().then_some(()));
        // It runs, with the clock and the generator of the snapshot.
        std::thread::sleep(UNTOLD);
        let told = now();
        std::fs::write(GO, "").expect("let go");
        let output = resume.wait_with_output().expect("it ends");
        std::fs::remove_file(GO).expect("removed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

        for drawer in ["first", "second", "third"] {
            let (lines, woken) = eventually(&format!("the {drawer} program to go on"), || {
                let lines = drawn(&sandbox, drawer);
                let woken = lines.iter().position(|line| line.clock > paused)?;
                (woken + 1 < lines.len()).then_some((lines, woken))
            });
            // One line is of both: begun before the program was stopped, with the clock of when it was written.
            let [before, between, after] = [woken - 1, woken, woken + 1].map(|at| &lines[at]);
            // The first line since the wake has the host's time, and the guest's kernel has run for a while since the last.
            assert!(between.clock > told - 1.0, "{drawer}: told at {told}, {between:?}");
            let untold = after.uptime - before.uptime;
            assert!(
                untold >= UNTOLD.as_secs_f64(),
                "{drawer}: it ran {untold} s after {before:?}: {after:?}"
            );
            let mut numbers: Vec<_> = lines.iter().map(|line| &line.number).collect();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), lines.len(), "{drawer}: a number came twice");
        }
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn no_two_guests_that_wake_from_one_snapshot_draw_the_same_numbers() {
    in_rig(|| {
        let template = Template::named(6);
        let of_template = template.arguments();
        {
            let original = Sandbox::create(&["--memory", "256"]);
            original.sh(DRAWERS);
            roost::ok(&[&["snapshot", &original.id], &of_template[..]].concat());
        }
        let clones = [0, 1].map(|_| Sandbox::create(&of_template));
        for drawer in ["first", "second", "third"] {
            let [one, other] = clones.each_ref().map(|clone| {
                // Well behind the wake, wherever in the file that is.
                let woken = drawn(clone, drawer).len();
                eventually("the clone to draw numbers", || {
                    let lines = drawn(clone, drawer);
                    (lines.len() > woken + 20).then_some(lines)
                })
            });
            // What both have in common is the file as it was in the snapshot, and then nothing any more.
            let common = one.iter().zip(&other).take_while(|(a, b)| a.number == b.number).count();
            assert!(common > 0, "{drawer}: the clones do not come from one guest");
            let numbers: std::collections::BTreeSet<_> = one[common..].iter().map(|line| &line.number).collect();
            let twice = other[common..].iter().find(|line| numbers.contains(&line.number));
            assert!(twice.is_none(), "{drawer}: both drew {twice:?}");
            // The snapshot's part ends where the clock leaps, in both; the number of the line that is of both times may be of either.
            for lines in [&one, &other] {
                let leaps = |at: usize| {
                    let (before, after) = (&lines[at - 1], &lines[at]);
                    after.clock - before.clock > after.uptime - before.uptime + 1.0
                };
                let leap = (1..lines.len()).find(|at| leaps(*at)).expect("the clock was set");
                assert!(
                    [common - 1, common].contains(&leap),
                    "{drawer}: the clock leaps at {leap}, and {common} numbers are the same: {:?}",
                    &lines[common - 1..=common]
                );
            }
        }
    });
}

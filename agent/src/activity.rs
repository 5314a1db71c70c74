//! When a sandbox is idle: what counts as use, and whether its guest is at work although nobody calls.
//!
//! Plain functions with the time as an argument; [`read_cgroup`] alone touches files. Not here: timers and what happens at the
//! deadline (the sandbox's task), and where samples come from ([`crate::host::counters`]).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Config;

/// Largest `cpu.stat` or `io.stat` that is read. Each is a few lines: `io.stat` has one for each device that the VM has used.
const MAX_STAT: u64 = 64 << 10;
/// Samples that are looked at.
pub const WINDOW: u32 = 5;
/// As many of them above a floor are a busy guest. Three in five, because what an idle guest does by itself comes in single bursts:
/// ext4 commits its journal every 5 s, timers of the system wake now and then. Work goes on for longer.
const BUSY: u32 = 3;

/// A moment on both clocks: the steady one for deadlines, the other for people and files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// On the steady clock.
    pub at: Instant,
    /// In seconds since 1970.
    pub unix: i64,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            unix: crate::sandbox::unix_now(),
        }
    }
}

/// When a sandbox was last used, and for how long it may go without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    last_used: Moment,
    limit: Option<Duration>,
}

impl Activity {
    /// Used just now; `limit_sec` is how many seconds it may go unused, 0 for ever.
    pub fn new(limit_sec: u32, now: Moment) -> Self {
        Self {
            last_used: now,
            limit: (limit_sec > 0).then(|| Duration::from_secs(limit_sec.into())),
        }
    }

    /// Counts as use. A moment before the last use changes nothing: callers on several threads may come in any order.
    pub fn touch(&mut self, now: Moment) {
        if now.at > self.last_used.at {
            self.last_used = now;
        }
    }

    /// How many seconds it may go unused; 0 for ever.
    pub fn limit_sec(&self) -> u32 {
        self.limit
            .map_or(0, |limit| u32::try_from(limit.as_secs()).expect("made from a u32"))
    }

    /// When it was last used, in seconds since 1970.
    pub fn last_used_unix(&self) -> i64 {
        self.last_used.unix
    }

    /// When it has gone unused for as long as it may; `None`: never.
    pub fn deadline(&self) -> Option<Instant> {
        self.limit.map(|limit| self.last_used.at + limit)
    }

    /// Whether the deadline has come.
    pub fn is_idle(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| now >= deadline)
    }
}

/// Counters of a VM. Each only grows, but for those of a new VM, which begin anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sample {
    /// Time on a CPU, in microseconds, of all vCPUs and of the VMM's other threads.
    pub cpu_usec: Option<u64>,
    /// Bytes from and to the guest's network.
    pub network_bytes: Option<u64>,
    /// Bytes read from and written to block devices. One that passes stacked devices may be counted once for each.
    pub disk_bytes: Option<u64>,
}

/// Above which rates a guest is at work; at them it is not.
///
/// They are meant to lie between what an idle guest does by itself and the least that work does. An idle guest takes timer
/// interrupts, and the agent itself asks it for metrics every second: a little CPU in guest and VMM, a request and an answer of a
/// few KiB; its network also has ARP and what resolvers answer. Its disk sees journal commits and logs, in bursts, which the window
/// of five samples is for. Whoever computes, downloads or writes files is far above: a compiler takes a whole CPU. A guest that
/// stays below all three while somebody needs it, such as one that waits for a webhook, must be kept by use, or by a limit of 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Floors {
    /// Percent of one vCPU.
    pub cpu_percent: u32,
    /// Bytes a second.
    pub network_bytes: u64,
    /// Bytes a second.
    pub disk_bytes: u64,
}

impl Floors {
    /// Those of the configuration.
    pub fn new(config: &Config) -> Self {
        Self {
            cpu_percent: config.busy_cpu_percent,
            network_bytes: config.busy_network_bytes,
            disk_bytes: config.busy_disk_bytes,
        }
    }
}

/// The last seconds of a guest. Takes a sample a second; rates are over the time that really lies between two.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pulse {
    last: Option<(Instant, Sample)>,
    /// The newest in the lowest bit: whether it was above a floor.
    recent: u8,
}

impl Pulse {
    /// Takes a sample, `None` where there is none this second. Whether the guest is at work: at least three of the last five
    /// samples were above a floor. A counter that is missing, has no predecessor, or went back says nothing, and a sample in which
    /// none says anything is not above.
    pub fn take(&mut self, now: Instant, sample: Option<Sample>, floors: &Floors) -> bool {
        let above = match (self.last, sample) {
            (Some((then, before)), Some(sample)) => is_above(&before, &sample, now.duration_since(then), floors),
            (None, _) | (_, None) => false,
        };
        if let Some(sample) = sample {
            self.last = Some((now, sample));
        }
        self.recent = ((self.recent << 1) | u8::from(above)) & ((1 << WINDOW) - 1);
        self.recent.count_ones() >= BUSY
    }
}

fn is_above(before: &Sample, after: &Sample, time: Duration, floors: &Floors) -> bool {
    // More than `floor` a second, without a division: growth / time > floor.
    let exceeds = |before: Option<u64>, after: Option<u64>, floor: u64| {
        let growth = before.zip(after).and_then(|(before, after)| after.checked_sub(before));
        growth.is_some_and(|growth| u128::from(growth) * 1_000_000 > u128::from(floor) * time.as_micros())
    };
    // A percent of a second is 10,000 µs.
    exceeds(before.cpu_usec, after.cpu_usec, u64::from(floors.cpu_percent) * 10_000)
        || exceeds(before.network_bytes, after.network_bytes, floors.network_bytes)
        || exceeds(before.disk_bytes, after.disk_bytes, floors.disk_bytes)
}

/// Reads the counters of a cgroup (version 2): `cpu.stat` and `io.stat`. The second is absent where the io controller is not
/// enabled; then there is no `disk_bytes`. There is never `network_bytes`. Blocks, but not on a disk.
///
/// # Errors
/// When `cpu.stat` cannot be read, and when either is none as the kernel writes it (`InvalidData`, `FileTooLarge`).
pub fn read_cgroup(path: &Path) -> io::Result<Sample> {
    let disk_bytes = match read_stat(&path.join("io.stat")) {
        Ok(text) => Some(disk_bytes(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(Sample {
        cpu_usec: Some(cpu_usec(&read_stat(&path.join("cpu.stat"))?)?),
        network_bytes: None,
        disk_bytes,
    })
}

fn read_stat(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_STAT + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_STAT {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(text)
}

/// `usage_usec 123` among other lines of that form.
fn cpu_usec(stat: &str) -> io::Result<u64> {
    let usage = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
    number(usage.unwrap_or_default())
}

/// `253:3 rbytes=1 wbytes=2 rios=3 …` for each device; a device without counters has its number alone.
fn disk_bytes(stat: &str) -> io::Result<u64> {
    let fields = stat.split_ascii_whitespace();
    let bytes = fields.filter_map(|field| field.strip_prefix("rbytes=").or_else(|| field.strip_prefix("wbytes=")));
    bytes
        .map(number)
        .try_fold(0, |sum: u64, bytes| Ok(sum.saturating_add(bytes?)))
}

fn number(text: &str) -> io::Result<u64> {
    text.trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOORS: Floors = Floors {
        cpu_percent: 5,
        network_bytes: 1000,
        disk_bytes: 2000,
    };

    fn sample(cpu: u64, network: u64, disk: u64) -> Option<Sample> {
        Some(Sample {
            cpu_usec: Some(cpu),
            network_bytes: Some(network),
            disk_bytes: Some(disk),
        })
    }

    /// What each of these samples, a second apart, says.
    fn pulse(samples: &[Option<Sample>]) -> Vec<bool> {
        let (mut pulse, start) = (Pulse::default(), Instant::now());
        (0..)
            .zip(samples)
            .map(|(second, sample)| pulse.take(start + Duration::from_secs(second), *sample, &FLOORS))
            .collect()
    }

    /// Seven samples, each grown by this.
    fn steady(cpu: u64, network: u64, disk: u64) -> Vec<bool> {
        let samples: Vec<_> = (1..=7).map(|n| sample(n * cpu, n * network, n * disk)).collect();
        pulse(&samples)
    }

    #[test]
    fn a_sandbox_is_idle_when_its_limit_has_passed_since_its_last_use() {
        let start = Instant::now();
        let at = |seconds: u64| Moment {
            at: start + Duration::from_secs(seconds),
            unix: 1000 + i64::try_from(seconds).expect("small"),
        };
        let mut activity = Activity::new(60, at(0));
        assert_eq!(activity.deadline(), Some(at(60).at));
        assert!(!activity.is_idle(at(59).at));
        assert!(activity.is_idle(at(60).at));
        activity.touch(at(50));
        activity.touch(at(40));
        assert_eq!(
            (activity.deadline(), activity.last_used_unix()),
            (Some(at(110).at), 1050)
        );
        assert!(!activity.is_idle(at(109).at));
        let mut unlimited = Activity::new(0, at(0));
        unlimited.touch(at(7));
        assert_eq!((unlimited.deadline(), unlimited.last_used_unix()), (None, 1007));
        assert!(!unlimited.is_idle(at(1 << 30).at));
    }

    #[test]
    fn a_guest_is_at_work_above_any_floor_and_not_at_it() {
        for (cpu, network, disk, busy) in [
            (0, 0, 0, false),
            (50_000, 1000, 2000, false),
            (50_001, 0, 0, true),
            (0, 1001, 0, true),
            (0, 0, 2001, true),
            (4_000_000, 1 << 40, 1 << 40, true),
        ] {
            // The first has no predecessor, and three must be above.
            let expected = [false, false, false, busy, busy, busy, busy];
            assert_eq!(
                steady(cpu, network, disk),
                expected,
                "{cpu} µs, {network} and {disk} bytes"
            );
        }
    }

    #[test]
    fn three_of_the_last_five_samples_decide() {
        for (work, expected) in [
            ("-11100000", "---###---"),
            ("-10101000", "-----#---"),
            ("-10010010", "---------"),
            ("-11000110", "---------"),
            ("-11001011", "-----#--#"),
            ("-11111111", "---######"),
        ] {
            let mut cpu = 0;
            let samples: Vec<_> = work
                .bytes()
                .map(|byte| {
                    cpu += if byte == b'1' { 500_000 } else { 0 };
                    sample(cpu, 0, 0)
                })
                .collect();
            let said: String = pulse(&samples)
                .iter()
                .map(|busy| if *busy { '#' } else { '-' })
                .collect();
            assert_eq!(said, expected, "{work}");
        }
    }

    #[test]
    fn counters_that_are_missing_or_went_back_say_nothing() {
        let busy = |second: u64| sample(second * 500_000, 0, 0);
        let nothing = Some(Sample::default());
        for (samples, expected) in [
            // A new VM after the fourth: its first sample is no growth, its second is.
            (vec![busy(1), busy(2), busy(3), busy(4), busy(0), busy(1)], "---###"),
            (vec![busy(9), busy(0), busy(9), busy(0), busy(9), busy(0)], "------"),
            // A gap is not above, and what comes after it is spread over the gap.
            (vec![busy(1), None, busy(2), busy(3), None, busy(4)], "-----#"),
            (vec![busy(1), None, None, None, None, sample(600_000, 0, 0)], "------"),
            (vec![busy(1), nothing, busy(3), nothing, busy(5), nothing], "------"),
            (vec![None, None, busy(1), busy(2), busy(3), busy(4)], "-----#"),
            (vec![nothing, nothing, nothing, nothing, nothing, nothing], "------"),
        ] {
            let said: String = pulse(&samples)
                .iter()
                .map(|busy| if *busy { '#' } else { '-' })
                .collect();
            assert_eq!(said, expected, "{samples:?}");
        }
        // The network is not known, the disk is.
        let disk = |second: u64| {
            Some(Sample {
                disk_bytes: Some(second * 4096),
                ..Sample::default()
            })
        };
        assert_eq!(
            pulse(&[disk(1), disk(2), disk(3), disk(4)]),
            [false, false, false, true]
        );
    }

    #[test]
    fn rates_are_over_the_time_between_samples() {
        for (millis, expected) in [(500, true), (1000, false), (3000, false)] {
            let (mut pulse, start) = (Pulse::default(), Instant::now());
            let mut busy = false;
            for n in 0..6 {
                let now = start + Duration::from_millis(millis) * n;
                busy = pulse.take(now, sample(u64::from(n) * 40_000, 0, 0), &FLOORS);
            }
            assert_eq!(busy, expected, "40 ms of CPU every {millis} ms");
        }
    }

    #[test]
    fn a_cgroup_is_read_with_or_without_its_io() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(
            read_cgroup(dir.path()).expect_err("no cpu.stat").kind(),
            io::ErrorKind::NotFound
        );
        let cpu = "usage_usec 1234\nuser_usec 1000\nsystem_usec 234\n";
        let read = |cpu: &str, io: Option<&str>| {
            std::fs::write(dir.path().join("cpu.stat"), cpu).expect("written");
            match io {
                Some(io) => std::fs::write(dir.path().join("io.stat"), io).expect("written"),
                None => drop(std::fs::remove_file(dir.path().join("io.stat"))),
            }
            read_cgroup(dir.path()).map(|sample| (sample.cpu_usec, sample.network_bytes, sample.disk_bytes))
        };
        for (io, disk) in [
            (None, None),
            (Some(""), Some(0)),
            (
                Some("8:0 rbytes=1 wbytes=20 rios=5 wios=6 dbytes=7 dios=8\n253:3\n7:1 rbytes=300 wbytes=0\n"),
                Some(321),
            ),
            (Some("8:0 rbytes=18446744073709551615 wbytes=1\n"), Some(u64::MAX)),
        ] {
            assert_eq!(read(cpu, io).expect("read"), (Some(1234), None, disk), "{io:?}");
        }
        let long = "8:0 rbytes=1 wbytes=1\n".repeat(4096);
        for (cpu, io, kind) in [
            ("user_usec 1\n", None, io::ErrorKind::InvalidData),
            ("usage_usec -1\n", None, io::ErrorKind::InvalidData),
            (cpu, Some("8:0 rbytes=x\n"), io::ErrorKind::InvalidData),
            (cpu, Some(long.as_str()), io::ErrorKind::FileTooLarge),
        ] {
            assert_eq!(read(cpu, io).expect_err("no sample").kind(), kind, "{cpu:?} {io:?}");
        }
    }
}

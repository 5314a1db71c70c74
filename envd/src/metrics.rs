//! `GET /metrics`: processors, memory and the root filesystem, as the kernel counts them.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;

use nix::sys::statvfs::statvfs;
use roost_common::guest::Metrics;

/// Remembers the counters of the call before, so that the use of processors is that of the time between.
#[derive(Default)]
pub(crate) struct Sampler {
    last: Mutex<CpuTime>,
}

/// Ticks since boot, of all processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTime {
    busy: u64,
    all: u64,
}

impl Sampler {
    /// Reads all counters. Those that cannot be read are 0.
    pub(crate) fn sample(&self, root: &Path) -> Metrics {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let now = cpu_time(&stat);
        let before = std::mem::replace(&mut *self.last.lock().expect("no holder of the sampler panics"), now);
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let mem_total = meminfo(&memory, "MemTotal");
        let mem_used = mem_total.saturating_sub(meminfo(&memory, "MemAvailable"));
        let (disk_used, disk_total) = disk(root);
        Metrics {
            ts: SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX)),
            cpu_count: cpu_count(&stat),
            cpu_used_pct: used_percent(before, now),
            mem_total,
            mem_used,
            mem_cache: meminfo(&memory, "Cached") + meminfo(&memory, "Buffers"),
            mem_total_mib: mem_total >> 20,
            mem_used_mib: mem_used >> 20,
            disk_used,
            disk_total,
        }
    }
}

/// The first line of `/proc/stat`: user nice system idle iowait irq softirq steal; guest time is within user time.
fn cpu_time(stat: &str) -> CpuTime {
    let Some(line) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else {
        return CpuTime::default();
    };
    let ticks: Vec<u64> = line
        .split_whitespace()
        .take(8)
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    let all = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    CpuTime { busy: all - idle, all }
}

fn cpu_count(stat: &str) -> u32 {
    let is_cpu = |line: &&str| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    stat.lines().filter(is_cpu).count() as u32
}

fn used_percent(before: CpuTime, now: CpuTime) -> f64 {
    let all = now.all.saturating_sub(before.all);
    let busy = now.busy.saturating_sub(before.busy);
    if all == 0 {
        0.0
    } else {
        (busy as f64 / all as f64 * 100.0).clamp(0.0, 100.0)
    }
}

/// A line of `/proc/meminfo`, in bytes.
pub(crate) fn meminfo(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// Used and total bytes, as df(1) counts them: what only root may use is in neither.
fn disk(root: &Path) -> (u64, u64) {
    let Ok(stat) = statvfs(root) else { return (0, 0) };
    let used = stat.blocks().saturating_sub(stat.blocks_free());
    let total = used.saturating_add(stat.blocks_available());
    (
        used.saturating_mul(stat.fragment_size()),
        total.saturating_mul(stat.fragment_size()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str =
        "cpu  100 0 50 800 50 0 0 0 7 0\ncpu0 50 0 25 400 25 0 0 0 7 0\ncpu1 50 0 25 400 25 0 0 0 0 0\nintr 5\n";

    #[test]
    fn the_use_of_processors_is_that_since_the_sample_before() {
        let first = cpu_time(STAT);
        assert_eq!(first, CpuTime { busy: 150, all: 1000 });
        assert_eq!(cpu_count(STAT), 2);
        assert_eq!(used_percent(CpuTime::default(), first), 15.0);
        assert_eq!(used_percent(first, CpuTime { busy: 250, all: 1100 }), 100.0);
        assert_eq!(used_percent(first, first), 0.0);
        assert_eq!(used_percent(first, CpuTime::default()), 0.0);
    }

    #[test]
    fn memory_is_read_in_kibibytes_and_told_in_bytes() {
        let text = "MemTotal:        2048 kB\nMemAvailable:    1024 kB\nSwapCached: 1 kB\nCached: 3 kB\n";
        assert_eq!(
            (
                meminfo(text, "MemTotal"),
                meminfo(text, "Cached"),
                meminfo(text, "Nothing")
            ),
            (2 << 20, 3072, 0)
        );
    }

    #[test]
    fn a_running_machine_has_processors_memory_and_a_disk() {
        let metrics = Sampler::default().sample(Path::new("/"));
        assert!(
            metrics.cpu_count > 0 && metrics.mem_total > metrics.mem_used && metrics.mem_used > 0,
            "{metrics:?}"
        );
        assert!(
            metrics.disk_total >= metrics.disk_used && metrics.disk_total > 0,
            "{metrics:?}"
        );
    }
}

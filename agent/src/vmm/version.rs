//! Versions of cloud-hypervisor: which one a program says it is, and what that allows.

use std::cmp::Ordering;

/// The oldest major version that may run. One before it writes a snapshot while it still loads the memory of a restore, with holes for
/// what it has not loaded: nobody would notice before the next resume. (And 52 mended CVE-2026-45782.)
pub const OLDEST: u32 = 53;
/// Letters of a version that are kept.
const MAX_TEXT: usize = 64;

/// The version in what `cloud-hypervisor --version` writes: the last word of its first line, `v53.0` of `cloud-hypervisor v53.0`.
pub fn of_words(said: &[u8]) -> String {
    let line = said.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let word = line.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
    printable(&String::from_utf8_lossy(word))
}

/// What can be printed of a version.
pub(super) fn printable(version: &str) -> String {
    version.chars().filter(char::is_ascii_graphic).take(MAX_TEXT).collect()
}

/// Whether a VMM of this version may run; one whose version says nothing may not.
pub fn may_run(version: &str) -> bool {
    numbers(version).is_some_and(|numbers| numbers[0] >= OLDEST)
}

/// Whether a VMM of version `host` reads a state that `snapshot` wrote: the same one always, a newer one of the same major
/// version. Cloud-hypervisor promises nothing across major versions (`docs/releases.md`), and within one it releases fixes alone;
/// a fix may add to the state what an older one ignores, so there is no way back.
pub fn reads_state(host: &str, snapshot: &str) -> bool {
    if host == snapshot {
        return true;
    }
    match (numbers(host), numbers(snapshot)) {
        (Some(host), Some(snapshot)) => host[0] == snapshot[0] && host.cmp(&snapshot) != Ordering::Less,
        _ => false,
    }
}

/// The numbers of a version such as `53.0.1`, `v53.1` or `53.0.0-dirty`, without zeros at the end; one at least.
fn numbers(version: &str) -> Option<Vec<u32>> {
    let version = version.strip_prefix('v').unwrap_or(version);
    let end = version.find(['-', '+']).unwrap_or(version.len());
    let mut numbers = version[..end]
        .split('.')
        .map(|number| number.parse().ok())
        .collect::<Option<Vec<u32>>>()?;
    while numbers.len() > 1 && numbers.last() == Some(&0) {
        numbers.pop();
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_last_word_of_the_first_line() {
        for (said, version) in [
            (&b"cloud-hypervisor v53.0\n"[..], "v53.0"),
            (
                b"cloud-hypervisor v53.0-12-g0a1b2c-dirty\nEnabled features: []\n",
                "v53.0-12-g0a1b2c-dirty",
            ),
            (b"cloud-hypervisor v5\x07\xff3.0", "v53.0"),
            (b"", ""),
            (b"\n", ""),
            (&[b'9'; 200], &"9".repeat(MAX_TEXT)),
        ] {
            assert_eq!(of_words(said), version, "{}", said.escape_ascii());
        }
    }

    #[test]
    fn a_vmm_before_53_may_not_run_nor_one_that_does_not_say() {
        for version in [
            "53",
            "v53.0",
            "53.0.0",
            "v53.0-dirty",
            "53.0.0-standin",
            "v54.1+local",
            "100.0",
        ] {
            assert!(may_run(version), "{version}");
        }
        for version in [
            "v52.0",
            "52.9.9-dirty",
            "v52.0-300-g0a1b2c",
            "0.53",
            "",
            "v",
            "a build of ours",
            "-53",
            "99999999999.0",
        ] {
            assert!(!may_run(version), "{version}");
        }
    }

    #[test]
    fn a_state_is_read_by_the_same_version_or_a_newer_one_of_its_major() {
        for (host, snapshot) in [
            ("53.0.0", "53.0.0"),
            ("53.0.1", "53.0.0"),
            ("v53.1", "53.0.9"),
            ("53.0", "v53.0.0"),
            ("53.0.0-dirty", "53.0.0"),
            ("a build of ours", "a build of ours"),
        ] {
            assert!(reads_state(host, snapshot), "{host} reads {snapshot}");
        }
        for (host, snapshot) in [
            ("53.0.0", "53.0.1"),
            ("54.0.0", "53.0.0"),
            ("52.9.0", "53.0.0"),
            ("53.0.0", "a build of ours"),
            ("", "53.0.0"),
            ("53..0", "53.0.0"),
            ("99999999999.0", "53.0.0"),
        ] {
            assert!(!reads_state(host, snapshot), "{host} does not read {snapshot}");
        }
    }
}

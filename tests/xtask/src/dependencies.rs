//! How much code of others is in the privileged daemon and in the one that confines VMMs: counted, shown, and bounded, so that a
//! dependency more is somebody's decision. What runs in the compiler alone (macros) does not count.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail, ensure};

use crate::binaries::cargo;
use crate::step::quiet;

/// A program and how many crates it may be made of, our own among them.
const BOUNDS: [(&str, usize); 2] = [("roost-privd", 80), ("roost-vmmshim", 19)];

/// Counts, and compares with the bounds.
///
/// # Errors
/// A program that has more, or two versions of one crate that are not compatible.
pub(crate) fn check() -> Result<()> {
    for (program, most) in BOUNDS {
        let listed = quiet(cargo().args([
            "tree",
            "--locked",
            "--edges",
            "normal,no-proc-macro",
            "--prefix",
            "none",
            "--package",
            program,
        ]))?;
        let listed = String::from_utf8(listed)?;
        let crates = parse(&listed);
        let doubled = doubled(&crates);
        eprintln!("{program}: {} crates of at most {most}", crates.len());
        if !doubled.is_empty() {
            bail!("{program} has incompatible versions of {doubled:?}");
        }
        ensure!(
            crates.len() <= most,
            "{program} is made of {} crates, {most} are allowed",
            crates.len()
        );
    }
    Ok(())
}

/// Names and versions.
fn parse(listed: &str) -> BTreeSet<(&str, &str)> {
    let lines = listed.lines();
    lines
        .filter_map(|line| {
            let (name, rest) = line.split_once(" v")?;
            Some((name, rest.split(' ').next()?))
        })
        .collect()
}

/// Crates of which there are versions that do not stand in for each other.
fn doubled<'a>(crates: &BTreeSet<(&'a str, &'a str)>) -> Vec<&'a str> {
    let mut majors: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (name, version) in crates {
        let parts: Vec<&str> = version.split('.').collect();
        // Below 1.0 the second number counts.
        let major = match parts.as_slice() {
            ["0", minor, ..] => format!("0.{minor}"),
            [major, ..] => (*major).to_owned(),
            [] => String::new(),
        };
        majors.entry(name).or_default().insert(major);
    }
    let several = majors.into_iter().filter(|(_, majors)| majors.len() > 1);
    several.map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_counted_once_and_two_majors_are_seen() {
        let listed =
            "a v1.2.0 (/x)\nb v0.3.1\nb v0.3.1 (*)\nc v2.0.0 (proc-macro)\nc v1.9.0\nb v0.4.0\nd v1.0.0\nd v1.1.0\n\n";
        let crates = parse(listed);
        assert_eq!(crates.len(), 7);
        assert_eq!(doubled(&crates), ["b", "c"]);
    }
}

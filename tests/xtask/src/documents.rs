//! What the documents name of this tree is there: SECURITY.md and `tests/rig/elsewhere.txt` the tests that prove what they say, the pages the tasks
//! of xtask.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use clap::Parser as _;

use crate::Cli;
use crate::cache::workspace;

/// All tests of the tree by name, and whether each is passed over by an ordinary run.
fn tests(directory: &Path, found: &mut BTreeMap<String, bool>) {
    for entry in fs::read_dir(directory).expect("listed") {
        let entry = entry.expect("an entry");
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            if name != "target" && name != "node_modules" && !name.to_string_lossy().starts_with('.') {
                tests(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("UTF-8");
            let mut attributes = Vec::new();
            for line in text.lines().map(str::trim_start) {
                if line.starts_with("#[") {
                    attributes.push(line);
                    continue;
                }
                let function = line.trim_start_matches("async ").strip_prefix("fn ");
                let is_test =
                    |attribute: &&str| attribute.starts_with("#[test") || attribute.starts_with("#[tokio::test");
                if let Some((name, _)) = function.and_then(|rest| rest.split_once('('))
                    && attributes.iter().any(is_test)
                {
                    let is_ignored = attributes.iter().any(|attribute| attribute.starts_with("#[ignore"));
                    found.insert(name.to_owned(), is_ignored);
                }
                attributes.clear();
            }
        }
    }
}

fn read(page: &str) -> String {
    fs::read_to_string(workspace().join(page)).expect(page)
}

/// Whether a line of a page is one of xtask's.
fn is_a_task(line: &str) -> bool {
    let command = line.split(" #").next().unwrap_or_default();
    let words = command.split_once("cargo xtask ").map(|(_, words)| words);
    words.is_some_and(|words| Cli::try_parse_from(["xtask"].into_iter().chain(words.split_whitespace())).is_ok())
}

#[test]
fn every_test_that_security_md_names_is_there_and_runs() {
    let page = read("SECURITY.md");
    let (mut named, mut unproven) = (BTreeSet::new(), Vec::new());
    for row in page
        .lines()
        .filter(|line| line.starts_with("| ") && *line != "| threat | defence | proof |")
    {
        let cells: Vec<&str> = row.split(" | ").collect();
        assert_eq!(cells.len(), 3, "{row}");
        let proofs: Vec<&str> = cells[2].split('`').skip(1).step_by(2).collect();
        if proofs.is_empty() {
            unproven.push(cells[0]);
        }
        named.extend(proofs);
    }
    assert!(named.len() > 80, "{named:?}");
    assert_eq!(unproven, [""; 0], "rows without a test");
    let mut there = BTreeMap::new();
    tests(&workspace(), &mut there);
    let wrong: Vec<_> = named.iter().filter(|name| there.get(**name) != Some(&false)).collect();
    assert!(
        wrong.is_empty(),
        "no tests, or passed over by an ordinary run: {wrong:#?}"
    );
}

/// A line of a page without its comment.
fn command(line: &str) -> &str {
    line.split(" # ").next().unwrap_or_default().trim()
}

#[test]
fn what_the_pages_name_in_place_of_a_run_is_there_and_does_run() {
    let readmes = read("README.md") + &read("packaging/README.md");
    let manual = read("packaging/man/roost-mkinitramfs.8").replace('\\', "");
    let (_, examples) = manual.split_once(".EX\n").expect("examples");
    let (examples, _) = examples.split_once(".EE").expect("their end");
    let list = read("tests/rig/elsewhere.txt");
    let listed: BTreeMap<_, _> = list
        .lines()
        .map(|line| line.split_once(": ").expect(line))
        .map(|(runner, command)| (command, runner))
        .collect();
    let mut there = BTreeMap::new();
    tests(&workspace(), &mut there);
    for (named, runner) in &listed {
        assert!(
            there.get(*runner) == Some(&false) || is_a_task(runner),
            "{named}: {runner}"
        );
        let is_there = readmes
            .lines()
            .chain(examples.lines())
            .any(|line| command(line) == *named);
        assert!(is_there, "{named:?} is on no page any more");
    }
    // Those of the READMEs that are not on the list are run in the rig.
    assert!(examples.lines().all(|line| listed.contains_key(line)), "{examples}");
}

#[test]
fn every_task_that_a_page_has_run_is_one() {
    let pages = ["README.md", "packaging/README.md", "tests/README.md"]
        .map(read)
        .concat();
    let blocks = pages.split("```").skip(1).step_by(2);
    let lines: Vec<_> = blocks
        .flat_map(str::lines)
        .filter(|line| line.contains("cargo xtask "))
        .collect();
    assert!(lines.len() > 25, "{lines:?}");
    let wrong: Vec<_> = lines.into_iter().filter(|line| !is_a_task(line)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(!is_a_task("cargo xtask tests") && !is_a_task("cargo xtask test --no-such-option"));
}

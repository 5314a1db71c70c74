//! SECURITY.md names the test that tries each of its threats. That those are there, and run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

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

#[test]
fn every_test_that_security_md_names_is_there_and_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = fs::read_to_string(root.join("SECURITY.md")).expect("read");
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
    tests(&root, &mut there);
    let wrong: Vec<_> = named.iter().filter(|name| there.get(**name) != Some(&false)).collect();
    assert!(
        wrong.is_empty(),
        "no tests, or passed over by an ordinary run: {wrong:#?}"
    );
}

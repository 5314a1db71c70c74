//! The operator's guide and the READMEs, as who follows them from top to bottom.

use std::process::Command;

use roost_tests::in_rig;
use roost_tests::roost::{Sandbox, find_paused, ok, wait_for_agent};
use serde_json::Value;

use crate::api::examples;

const GUIDE: &str = include_str!("../../docs/operate.md");
const READMES: [&str; 2] = [
    include_str!("../../README.md"),
    include_str!("../../packaging/README.md"),
];

/// Commands of the READMEs that a rig cannot run as they stand, or that boot a guest as another test does: a line each, behind that test. That
/// both are there is a test of xtask's, and so is that tasks of `cargo xtask` are some.
const ELSEWHERE: &str = include_str!("elsewhere.txt");

/// Where the READMEs' commands are run.
const DIR: &str = "/var/tmp/readme";

/// What their commands take for granted: a project to copy, files of an image, the guest's agent where the package has it. Docker and
/// mmdebstrap, which need a network, are played by the archive that would come of them.
const PREPARE: &str = r#"
mkdir -p bin project rootfs/{dev,proc,run,sys,tmp} /usr/lib/roost
echo text > project/file
printf '#!/bin/sh\nexec tar -C rootfs -c .\n' | tee bin/docker > bin/mmdebstrap
chmod 755 bin/*
debugfs -R "dump /usr/bin/envd /usr/lib/roost/envd" /var/lib/roost/images/minimal/rootfs.ext4
"#;

/// Runs a script that must succeed; its output and its errors.
fn follow(script: &str, dir: &str, id: &str) -> String {
    let output = Command::new("timeout")
        .args(["240", "bash", "-euo", "pipefail", "-c", script])
        .current_dir(dir)
        .env("id", id)
        .env("PATH", format!("{dir}/bin:/usr/sbin:/usr/bin:/sbin:/bin"))
        .output()
        .expect("bash runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{script}\n{}: {said}", output.status);
    said
}

#[test]
fn every_command_of_the_operators_guide_does_what_it_says() {
    let examples = examples(GUIDE);
    assert!(examples.len() >= 5, "the guide has lost its commands");
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        for example in examples {
            follow(example.script, "/", &sandbox.id);
        }
        // The last of them empties the host.
        wait_for_agent();
        assert!(find_paused(&sandbox.id).is_some(), "{}", ok(&["ls"]));
    });
}

#[test]
fn every_command_of_the_readmes_works_here_or_is_named_with_its_test() {
    let examples: Vec<_> = READMES.into_iter().flat_map(examples).collect();
    assert!(examples.len() >= 12, "the READMEs have lost their commands");
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        std::fs::create_dir(DIR).expect("made");
        follow(PREPARE, DIR, &sandbox.id);
        for example in examples {
            let script: String = example.script.lines().filter_map(as_run_here).collect();
            let said = follow(&script, DIR, &sandbox.id);
            assert!(!said.contains("{\"code\":"), "{script}\n{said}");
            for id in all_but(&sandbox.id) {
                ok(&["rm", &id]);
            }
        }
        for made in ["files", "deb"] {
            ok(&["template", "rm", made]);
        }
        std::fs::remove_dir_all(DIR).expect("removed");
        std::fs::remove_dir_all("/usr/lib/roost").expect("removed");
    });
}

/// A line of a README as the rig runs it, if it does. One for somebody at a terminal gets one, and an `exit` is typed.
fn as_run_here(line: &str) -> Option<String> {
    let command = line.split(" # ").next().unwrap_or_default().trim();
    let is_elsewhere = |listed: &str| listed.split_once(": ").is_some_and(|(_, listed)| listed == command);
    if command.starts_with("cargo ") || ELSEWHERE.lines().any(is_elsewhere) {
        return None;
    }
    if command.contains(" -it ") {
        return Some(format!(
            "script --quiet --return --command '{command}' /dev/null <<< exit\n"
        ));
    }
    Some(format!("{line}\n"))
}

/// Ids of the sandboxes that run, but for one.
fn all_but(id: &str) -> Vec<String> {
    let listed: Value = serde_json::from_str(&ok(&["ls", "--json"])).expect("JSON");
    let sandboxes = listed["sandboxes"].as_array().expect("a list");
    let ids = sandboxes
        .iter()
        .filter_map(|sandbox| sandbox["sandboxId"].as_str().map(str::to_owned));
    ids.filter(|there| there != id).collect()
}

//! The operator's guide, as who follows it from top to bottom.

use std::process::Command;

use roost_tests::in_rig;
use roost_tests::roost::{Sandbox, find_paused, ok, wait_for_agent};

use crate::api::examples;

const GUIDE: &str = include_str!("../../docs/operate.md");

#[test]
fn every_command_of_the_operators_guide_does_what_it_says() {
    let examples = examples(GUIDE);
    assert!(examples.len() >= 5, "the guide has lost its commands");
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        for example in examples {
            let output = Command::new("timeout")
                .args(["240", "bash", "-euo", "pipefail", "-c", example.script])
                .output()
                .expect("bash runs");
            let said = String::from_utf8_lossy(&output.stdout);
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success(),
                "{}\n{}: {error}{said}",
                example.script,
                output.status
            );
        }
        // The last of them empties the host.
        wait_for_agent();
        assert!(find_paused(&sandbox.id).is_some(), "{}", ok(&["ls"]));
    });
}

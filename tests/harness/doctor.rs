//! What `roost doctor` says of a host.

use serde_json::Value;

use crate::roost::roost;

/// One look at the host.
#[derive(Debug)]
pub struct Report {
    /// Exit status: 0, 1 for warnings, 2 for problems.
    pub status: Option<i32>,
    findings: Vec<Value>,
}

impl Report {
    /// Looks at the host as root.
    ///
    /// # Panics
    /// When nothing is told.
    pub fn take() -> Self {
        let output = roost(&["doctor", "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        Self {
            status: output.status.code(),
            findings: report["findings"].as_array().expect("findings").clone(),
        }
    }

    /// Checks that came out as `ok`, `not_checked`, `warning` or `problem`, and what was said of each.
    ///
    /// # Panics
    /// When a finding is none.
    pub fn said(&self, state: &str) -> Vec<(&str, &str)> {
        let of_state = self.findings.iter().filter(|finding| finding["state"] == state);
        of_state
            .map(|finding| {
                let text = |field: &str| finding[field].as_str().expect("a text");
                (text("check"), text("said"))
            })
            .collect()
    }
}

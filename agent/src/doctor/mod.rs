//! What is wrong with a host, or could be better: small checks of what can be read of it, each with what to do.
//!
//! Holds: nothing is changed, and no program runs but the VMM's, which is asked for its version. What cannot be seen, mostly without being
//! root, is said to be so. Every check is a function of a [`Host`], which in tests is a directory.

mod certificates;
mod hardening;
mod host;
mod install;
mod kernel;
mod leaks;

use std::fmt;

use serde::Serialize;

pub use host::Host;
pub use leaks::{Listed, Suspect, confirmed, suspects};

/// How a check came out, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Not seen; why is said.
    NotChecked,
    /// Works, and should be better.
    Warning,
    /// Something does not work, or is open that must not be.
    Problem,
}

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check, in a word or two.
    pub check: &'static str,
    /// How it came out.
    pub state: State,
    /// What was seen.
    pub said: String,
    /// What to do; none where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, said: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Ok,
            said: said.into(),
            advice: None,
        }
    }

    fn warning(check: &'static str, said: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Warning,
            said: said.into(),
            advice: Some(advice.into()),
        }
    }

    fn problem(check: &'static str, said: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            state: State::Problem,
            ..Self::warning(check, said, advice)
        }
    }

    fn not_checked(check: &'static str, why: impl fmt::Display) -> Self {
        Self {
            check,
            state: State::NotChecked,
            said: why.to_string(),
            advice: None,
        }
    }
}

/// All checks but that for what is left over, which wants two looks ([`suspects`]).
pub fn examine(host: &Host) -> Vec<Finding> {
    let checks: &[fn(&Host) -> Vec<Finding>] = &[
        install::configuration,
        kernel::version,
        kernel::cgroups,
        kernel::landlock,
        kernel::modules,
        kernel::devices,
        kernel::on_demand,
        kernel::forwarding,
        install::vmm,
        install::users,
        install::directories,
        install::sockets,
        install::agent,
        install::space,
        install::clock,
        certificates::own,
        certificates::control_plane,
        hardening::swap,
        hardening::switches,
        hardening::vulnerabilities,
    ];
    checks.iter().flat_map(|check| check(host)).collect()
}

/// Those of the checks that an agent can make of its own host: its unit and its own confinement hide the others' objects from it.
pub fn examine_own(host: &Host) -> Vec<Finding> {
    let checks: &[fn(&Host) -> Vec<Finding>] = &[
        install::configuration,
        kernel::version,
        install::space,
        certificates::own,
        certificates::control_plane,
        hardening::swap,
        hardening::switches,
        hardening::vulnerabilities,
    ];
    checks.iter().flat_map(|check| check(host)).collect()
}

/// The worst state among findings. What was not checked is no worse than what is well.
pub fn worst(findings: &[Finding]) -> State {
    let states = findings.iter().map(|finding| finding.state);
    states
        .filter(|state| *state != State::NotChecked)
        .max()
        .unwrap_or(State::Ok)
}

/// Findings for people: the worst first, and how many there are of each kind.
#[derive(Debug)]
pub struct Text<'a>(pub &'a [Finding]);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names of files are among what is said.
        let shown = |text: &str| text.replace(char::is_control, "?");
        let count = |state| self.0.iter().filter(|finding| finding.state == state).count();
        for (state, word) in [
            (State::Problem, "PROBLEM"),
            (State::Warning, "warning"),
            (State::NotChecked, "not seen"),
            (State::Ok, "ok"),
        ] {
            for finding in self.0.iter().filter(|finding| finding.state == state) {
                writeln!(f, "{word:<8}  {}: {}", finding.check, shown(&finding.said))?;
                if let Some(advice) = &finding.advice {
                    writeln!(f, "          -> {}", shown(advice))?;
                }
            }
        }
        writeln!(
            f,
            "problems: {}, warnings: {}, ok: {}, not seen: {}",
            count(State::Problem),
            count(State::Warning),
            count(State::Ok),
            count(State::NotChecked)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::host::fake::Fake;
    use super::*;

    #[test]
    fn a_host_as_it_should_be_has_no_findings() {
        let fake = Fake::good();
        let findings = examine(&fake.host());
        assert_eq!(worst(&findings), State::Ok, "{}", Text(&findings));
        assert!(
            findings.iter().all(|finding| finding.state == State::Ok),
            "{}",
            Text(&findings)
        );
        assert!(findings.len() > 25);
    }

    #[test]
    fn an_empty_machine_is_told_all_that_is_missing_and_nothing_panics() {
        let fake = Fake::empty();
        let findings = examine(&fake.host());
        assert_eq!(worst(&findings), State::Problem);
        let advised = |finding: &Finding| finding.advice.as_deref().is_some_and(|advice| !advice.is_empty());
        for finding in &findings {
            let is_bad = matches!(finding.state, State::Warning | State::Problem);
            assert_eq!(advised(finding), is_bad, "{finding:?}");
        }
    }

    #[test]
    fn the_worst_comes_first_and_what_was_not_seen_counts_for_nothing() {
        let findings = [
            Finding::ok("a", "well"),
            Finding::not_checked("b", "no right"),
            Finding::warning("c", "odd\x1b[2J", "mend it"),
            Finding::problem("d", "broken", "replace it"),
        ];
        assert_eq!(worst(&findings), State::Problem);
        assert_eq!(worst(&findings[..3]), State::Warning);
        assert_eq!(worst(&findings[..2]), State::Ok);
        let text = Text(&findings).to_string();
        let first: Vec<_> = text
            .lines()
            .map(|line| line.split_whitespace().next().unwrap_or_default())
            .collect();
        assert_eq!(first, ["PROBLEM", "->", "warning", "->", "not", "ok", "problems:"]);
        assert!(text.contains("odd?[2J") && text.ends_with("problems: 1, warnings: 1, ok: 1, not seen: 1\n"));
        let json = serde_json::to_value(&findings).expect("JSON");
        assert_eq!(
            json[1],
            serde_json::json!({"check": "b", "state": "not_checked", "said": "no right"})
        );
        assert_eq!(json[3]["advice"], "replace it");
    }
}

//! `cargo xtask test`: everything that CI checks, each part with its time; the end-to-end tests in the rig come last.
//!
//! Holds: a part that fails or cannot run fails the whole, and later parts run all the same, so that one run tells all. The
//! last line is libtest's own.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use crate::binaries::{self, Binaries, cargo};
use crate::rig::{self, STATUS_RIG_FAILED};
use crate::step::{shown, step};
use crate::{cache, series, setup};

/// Time for all rig tests, and for those of full size.
const RIG_SECONDS: u64 = 3000;
const RIG_SECONDS_ALL: u64 = 4 * 3600;

/// Time for each boot of the power cuts.
const CUT_SECONDS: u64 = 1200;

/// The modules of the rig's tests that run in a second rig, beside the others.
const FIRST_HALF: &[&str] = &["bad_input::", "concurrency::", "faults::", "isolation::", "matrix::"];

/// The module of the rig's tests that cuts the power.
const POWER_TESTS: &str = "power::";

/// What is tested without systemd too.
const DIRECT_TESTS: &[&str] = &[
    "lifecycle::a_sandbox_lives",
    "faults::a_killed_shim",
    "faults::a_killed_vmm",
];

/// Arguments of `cargo xtask test`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Run the rig's tests at full size, which takes long
    #[arg(long)]
    all: bool,
    /// Run the rig's tests alone
    #[arg(long)]
    rig: bool,
    /// Run everything but the rig's tests
    #[arg(long, conflicts_with = "rig")]
    no_rig: bool,
    /// Run the power cuts; with --rig the rig's tests before them, else nothing but them
    #[arg(long, conflicts_with = "no_rig")]
    power: bool,
    /// Start the rig's daemons without systemd
    #[arg(long)]
    direct: bool,
    /// The rig's memory
    #[arg(long, value_name = "MB", default_value_t = 4096)]
    memory: u64,
    /// Arguments for the rig's test program, such as a part of a test's name
    #[arg(last = true, value_name = "ARGUMENTS")]
    arguments: Vec<String>,
}

impl Options {
    /// The rig's tests of what may happen at any step, at full size: the kill matrix, then the power cuts.
    pub(crate) fn all_faults() -> Self {
        Self {
            all: true,
            rig: true,
            no_rig: false,
            power: true,
            direct: false,
            memory: 4096,
            arguments: vec!["matrix::".to_owned()],
        }
    }
}

/// A check and the cargo calls that it consists of.
struct Check {
    title: &'static str,
    calls: &'static [&'static [&'static str]],
}

const CHECKS: &[Check] = &[
    Check {
        title: "formatting",
        calls: &[&["fmt", "--all", "--check"]],
    },
    Check {
        title: "clippy",
        calls: &[
            &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
            // Not among all targets: a plain `cargo test` leaves the rig's tests alone.
            &[
                "clippy",
                "--package",
                "roost-tests",
                "--test",
                "rig",
                "--",
                "-D",
                "warnings",
            ],
            &[
                "clippy",
                "--package",
                "roost-vmmshim",
                "--all-targets",
                "--features",
                "foreign-profiles",
                "--",
                "-D",
                "warnings",
            ],
        ],
    },
    Check {
        title: "unit tests",
        calls: &[
            &["test", "--workspace"],
            // What launches something: a build that takes the probe's profile.
            &["test", "--package", "roost-vmmshim", "--features", "foreign-profiles"],
        ],
    },
    Check {
        // In the workspace features of all crates add up; each must also build with what it asks for alone.
        title: "each crate by itself",
        calls: &[
            &["check", "--package", "roost-common"],
            &["check", "--package", "roost-privd"],
            &["check", "--package", "roost-vmmshim"],
            &["check", "--package", "roost-agent"],
            &["check", "--package", "roost-envd"],
        ],
    },
];

/// One line of the summary.
struct Line {
    title: &'static str,
    took: Duration,
    failure: Option<String>,
}

/// Runs the checks; 0 when all of them passed.
pub(crate) fn run(options: &Options) -> Result<u8> {
    setup::run()?;
    let mut summary = Vec::new();
    if !options.rig && !options.power {
        for check in CHECKS {
            record(&mut summary, check.title, || {
                check
                    .calls
                    .iter()
                    .try_for_each(|arguments| shown(cargo().args(*arguments)))
            });
        }
    }
    let mut closing = None;
    let rig_tests = !options.no_rig && (options.rig || !options.power);
    let whole = rig_tests && !options.direct && options.arguments.is_empty();
    if rig_tests {
        // A rig keeps one core busy, so two of them share the tests. The power cuts are part of the other one's.
        let mut first_half = None;
        if whole {
            record(&mut summary, "building for the rig", || {
                binaries::build()?;
                build_tests()?;
                first_half = Some(FirstHalf::start(options)?);
                Ok(())
            });
        }
        record(&mut summary, "rig tests", || {
            let mut options = options.clone();
            if whole {
                options.arguments = FIRST_HALF.iter().map(|module| format!("--skip={module}")).collect();
            }
            let end = run_in_rig(&options)?;
            closing = closing_lines(&end.tail);
            verdict(&end)
        });
        if whole {
            // The same promises where there is no systemd to start the daemons.
            let direct = Options {
                direct: true,
                arguments: DIRECT_TESTS.iter().map(|name| (*name).to_owned()).collect(),
                ..options.clone()
            };
            record(&mut summary, "rig tests, direct", || verdict(&run_in_rig(&direct)?));
        }
        if let Some(first_half) = first_half {
            record(&mut summary, "rig tests, other half", || first_half.finish());
        }
    }
    if options.power && !whole {
        record(&mut summary, "power cuts", || {
            let end = cut_power(options)?;
            let cuts = closing_lines(&end.tail);
            // A failure of the tests ahead of this is not to be hidden by it.
            closing = match (closing.take(), cuts) {
                (Some(tests), Some(cuts)) => Some(tests + &cuts),
                (tests, cuts) => cuts.or(tests),
            };
            verdict(&end)
        });
    }
    eprintln!("\nsummary:");
    for line in &summary {
        let verdict = line
            .failure
            .as_deref()
            .map_or("ok".to_owned(), |failure| format!("FAILED: {failure}"));
        eprintln!("  {:<22} {:>7.1} s  {verdict}", line.title, line.took.as_secs_f64());
    }
    if let Some(closing) = closing {
        print!("{closing}");
    }
    Ok(u8::from(summary.iter().any(|line| line.failure.is_some())))
}

fn record(summary: &mut Vec<Line>, title: &'static str, work: impl FnOnce() -> Result<()>) {
    let start = Instant::now();
    let failure = step(title, work).err().map(|error| format!("{error:#}"));
    if let Some(failure) = &failure {
        eprintln!("    {title}: {failure}");
    }
    summary.push(Line {
        title,
        took: start.elapsed(),
        failure,
    });
}

/// Another run of this program, for some of the rig's tests. Its output waits in a file, so that two runs do not mix theirs.
struct FirstHalf {
    process: Child,
    output: PathBuf,
}

impl FirstHalf {
    fn start(options: &Options) -> Result<Self> {
        let output = cache::dir()?.join("other-half.log");
        let log = File::create(&output).with_context(|| format!("cannot make {}", output.display()))?;
        let mut command = Command::new(std::env::current_exe().context("this program has no path")?);
        command.args(["test", "--rig", "--power", "--memory", &options.memory.to_string()]);
        if options.all {
            command.arg("--all");
        }
        command.arg("--").args(FIRST_HALF);
        let process = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run this program again")?;
        Ok(Self { process, output })
    }

    /// Waits for its end, and shows what it wrote.
    fn finish(mut self) -> Result<()> {
        let status = self.process.wait()?;
        let output = std::fs::read(&self.output)?;
        std::io::stdout().write_all(&output)?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

impl Drop for FirstHalf {
    fn drop(&mut self) {
        // It has ended where it was waited for.
        self.process.kill().ok();
    }
}

fn run_in_rig(options: &Options) -> Result<rig::End> {
    let (binaries, mut rig) = tests_in_rig(options, if options.all { RIG_SECONDS_ALL } else { RIG_SECONDS })?;
    // They make sense in a series of boots alone.
    rig.command.extend(["--skip".to_owned(), POWER_TESTS.to_owned()]);
    rig.command.extend(options.arguments.iter().cloned());
    rig::run_with(&rig, Some(&binaries))
}

/// Runs the power cuts, in as many boots as it takes; how the last one ended.
fn cut_power(options: &Options) -> Result<rig::End> {
    let (binaries, mut rig) = tests_in_rig(options, CUT_SECONDS)?;
    rig.command.push(POWER_TESTS.to_owned());
    series::run(&rig, &binaries)
}

/// Builds what the rig's tests need; a rig that runs them.
fn tests_in_rig(options: &Options, timeout: u64) -> Result<(Binaries, rig::Options)> {
    let binaries = binaries::build()?;
    let program = step("building the rig's tests", build_tests)?;
    let mut rig = rig::Options {
        add: vec![format!("{}:/usr/lib/roost-tests/rig", program.display())],
        timeout,
        memory: options.memory,
        direct: options.direct,
        ..rig::Options::command(&["/usr/lib/roost-tests/rig", "--test-threads=1"])
    };
    if options.all {
        rig.env.push("ROOST_TESTS_ALL=1".to_owned());
        rig.command.push("--include-ignored".to_owned());
    }
    Ok((binaries, rig))
}

/// Whether a run is one in which tests ran and passed.
fn verdict(end: &rig::End) -> Result<()> {
    match end.status {
        0 => ensure!(
            closing_lines(&end.tail).is_some(),
            "the test program ended without a result"
        ),
        STATUS_RIG_FAILED => return Err(anyhow!("the rig failed")),
        status => return Err(anyhow!("status {status}")),
    }
    Ok(())
}

/// Builds the test program and returns where cargo says it is.
fn build_tests() -> Result<PathBuf> {
    let output = cargo()
        .args(["test", "--package", "roost-tests", "--test", "rig", "--no-run"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo test --no-run: {}", output.status);
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let messages = lines.filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
    let mut executables = messages.filter_map(|message| {
        let ours = message.pointer("/target/name")? == "rig" && message.pointer("/profile/test")? == true;
        ours.then(|| message.get("executable")?.as_str().map(PathBuf::from))
            .flatten()
    });
    executables
        .next_back()
        .ok_or_else(|| anyhow!("cargo built no rig tests"))
}

/// libtest's result, and the failures it lists ahead of it.
fn closing_lines(tail: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(tail);
    let at = text.rfind("\ntest result:")?;
    let from = text[..at].rfind("\nfailures:\n").unwrap_or(at);
    let end = text[at + 1..]
        .find('\n')
        .map_or(text.len(), |length| at + 1 + length + 1);
    Some(text[from..end].trim_end().to_owned() + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_lines_are_the_last_list_of_failures_and_the_result() {
        let output = "failures:\n\n---- a stdout ----\nx\n\nfailures:\n    a\n    b\n\ntest result: FAILED. 0 passed; 2 failed\n\nmore\n";
        let closing = closing_lines(output.as_bytes()).unwrap();
        assert_eq!(
            closing,
            "\nfailures:\n    a\n    b\n\ntest result: FAILED. 0 passed; 2 failed\n"
        );
        assert_eq!(
            closing_lines(b"\n\ntest result: ok. 3 passed\n").unwrap(),
            "\ntest result: ok. 3 passed\n"
        );
        assert_eq!(closing_lines(b"killed\n"), None);
    }
}

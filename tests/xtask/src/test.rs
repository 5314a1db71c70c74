//! `cargo xtask test`: everything that CI checks, each part with its time; the end-to-end tests in the rig come last.
//!
//! Holds: a part that fails or cannot run fails the whole, and later parts run all the same, so that one run tells all. The
//! last lines are libtest's own, of every rig.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use crate::binaries::{self, Binaries, cargo};
use crate::rig::{self, Boot, DEFAULT_PROCESSORS, STATUS_RIG_FAILED};
use crate::step::{shown, step};
use crate::{bench, cache, deny, dependencies, fleet, page, sdk, series, setup};

/// Time for all rig tests, and for those of full size.
const RIG_SECONDS: u64 = 3600;
const RIG_SECONDS_ALL: u64 = 8 * 3600;

/// Tells tests of all kinds that they are to run at full size.
const FULL_SIZE: (&str, &str) = ("ROOST_TESTS_ALL", "1");

/// Processors of each of two rigs that share the tests: this machine may have two, and a rig with two of its own that gets one of them
/// spends a quarter of its time on waiting for itself.
const PROCESSORS_BESIDE: u8 = 1;

/// Time for each boot of the power cuts.
const CUT_SECONDS: u64 = 1200;

/// The modules of the rig's tests that run in a second rig, beside the others.
const FIRST_HALF: &[&str] = &[
    "bad_input::",
    "concurrency::",
    "egress::",
    "faults::",
    "isolation::",
    "limits::",
    "matrix::",
    "random::",
    "templates::",
];

/// Most tests that are run once more where they failed.
const MOST_REPEATED: usize = 2;

/// The module of the rig's tests that cuts the power.
const POWER_TESTS: &str = "power::";

/// The module of the rig's tests that installs the packages, in a rig that has nothing installed.
const PACKAGE_TESTS: &str = "package::";
/// Time for them.
const PACKAGE_SECONDS: u64 = 1800;

/// What is tested without systemd too.
const DIRECT_TESTS: &[&str] = &[
    "lifecycle::a_sandbox_lives",
    "faults::a_killed_shim",
    "faults::a_killed_vmm",
];

/// Arguments of `cargo xtask test`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Run everything at full size, which takes long
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
    /// Run the packages' tests, in a rig of their own; with --rig the rig's tests before them, else nothing but them
    #[arg(long, conflicts_with_all = ["no_rig", "power"])]
    packages: bool,
    /// Start the rig's daemons without systemd
    #[arg(long)]
    direct: bool,
    /// The rig's memory
    #[arg(long, value_name = "MB", default_value_t = 4096)]
    memory: u64,
    /// The rig's processors [default: 1 where two rigs share the tests, else 2]
    #[arg(long, value_name = "N")]
    processors: Option<u8>,
    /// Arguments for the rig's test program, such as a part of a test's name; with --power alone parts of moments' names
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
            packages: false,
            direct: false,
            memory: 4096,
            processors: None,
            arguments: vec!["matrix::".to_owned()],
        }
    }
}

/// What test builds have. Packaged ones have neither faults at steps of the agent's work, nor profiles for programs that are no VMM.
pub(crate) const TEST_FEATURES: &str = "roost-vmmshim/foreign-profiles,roost-agent/failpoints,roost-agent/otlp";

/// A check and the cargo calls that it consists of.
struct Check {
    title: &'static str,
    calls: &'static [&'static [&'static str]],
}

/// Each for the whole workspace, and less of it by targets and not by packages: fewer packages have fewer features of what they use,
/// which would all be compiled once more.
const CHECKS: &[Check] = &[
    Check {
        title: "formatting",
        calls: &[&["fmt", "--all", "--check"]],
    },
    Check {
        title: "clippy",
        calls: &[
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--features",
                TEST_FEATURES,
                "--",
                "-D",
                "warnings",
            ],
            // Not among all targets: a plain `cargo test` leaves what runs in the rig alone.
            &[
                "clippy",
                "--workspace",
                "--test",
                "rig",
                "--test",
                "bench",
                "--features",
                TEST_FEATURES,
                "--",
                "-D",
                "warnings",
            ],
        ],
    },
    Check {
        title: "unit tests",
        calls: &[
            // The build that the rig has too.
            &["test", "--workspace", "--features", TEST_FEATURES],
            // What a packaged shim refuses.
            &["test", "--workspace", "--test", "idle"],
        ],
    },
    Check {
        // As it is packaged, and clippy once more for what is not there in a build for tests. In the workspace features of all crates
        // add up; each must also build with what it asks for alone.
        title: "each program by itself",
        calls: &[
            &["clippy", "--package", "roost-privd", "--", "-D", "warnings"],
            &["clippy", "--package", "roost-vmmshim", "--", "-D", "warnings"],
            &["clippy", "--package", "roost-agent", "--", "-D", "warnings"],
            &["clippy", "--package", "roost-envd", "--", "-D", "warnings"],
            &["clippy", "--package", "roost-initramfs", "--", "-D", "warnings"],
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
    let checks = !options.rig && !options.power && !options.packages;
    let mut images = if checks && !options.no_rig {
        Some(Beside::images()?)
    } else {
        None
    };
    if checks {
        for check in CHECKS {
            record(&mut summary, check.title, || {
                check
                    .calls
                    .iter()
                    .try_for_each(|arguments| shown(cargo().args(*arguments).envs(options.all.then_some(FULL_SIZE))))
            });
        }
    }
    if checks {
        record(&mut summary, "dependencies", dependencies::check);
    }
    if checks && options.all {
        record(&mut summary, "licences and sources", deny::run);
        record(&mut summary, "client libraries", sdk::run);
        record(&mut summary, "status page", page::run);
        record(&mut summary, "fleet manifests", fleet::run);
    }
    let mut closing = Vec::new();
    let rig_tests = !options.no_rig && (options.rig || !(options.power || options.packages));
    let whole = rig_tests && !options.direct && options.arguments.is_empty();
    if rig_tests {
        if let Some(images) = images.take() {
            record(&mut summary, "Debian images", || images.finish()?.1);
        }
        // A rig keeps one core busy, so two of them share the tests. The power cuts are part of the other one's.
        let mut first_half = None;
        if whole {
            record(&mut summary, "building for the rig", || {
                binaries::build()?;
                first_half = Some(Beside::first_half(options)?);
                Ok(())
            });
        }
        record(&mut summary, "rig tests", || {
            let mut options = options.clone();
            if whole {
                options.processors = options.processors.or(Some(PROCESSORS_BESIDE));
                options.arguments = FIRST_HALF.iter().map(|module| format!("--skip={module}")).collect();
            }
            let end = run_in_rig(&options)?;
            closing.extend(closing_lines(&end.tail));
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
        if whole {
            record(&mut summary, "bench, one sample", || {
                bench::smoke(options.processors.unwrap_or(PROCESSORS_BESIDE))
            });
        }
        if whole || options.packages {
            record(&mut summary, "packages", || {
                let mut options = options.clone();
                options.processors = options.processors.or(whole.then_some(PROCESSORS_BESIDE));
                let end = install_packages(&options)?;
                closing.extend(closing_lines(&end.tail));
                verdict(&end)
            });
        }
        if let Some(first_half) = first_half {
            record(&mut summary, "rig tests, other half", || {
                let (output, verdict) = first_half.finish()?;
                closing.extend(summed_up(&output));
                verdict
            });
        }
    }
    if options.packages && !rig_tests {
        record(&mut summary, "packages", || {
            let end = install_packages(options)?;
            closing.extend(closing_lines(&end.tail));
            verdict(&end)
        });
    }
    if options.power && !whole {
        record(&mut summary, "power cuts", || {
            let end = cut_power(options)?;
            closing.extend(closing_lines(&end.tail));
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
    for closing in closing {
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

/// Another run of this program, beside this one. Its output waits in a file, so that two runs do not mix theirs.
struct Beside {
    process: Child,
    output: PathBuf,
}

impl Beside {
    /// Starts it; `name` is its output's.
    fn start(name: &str, arguments: &[&str]) -> Result<Self> {
        let output = cache::dir()?.join(format!("{name}.log"));
        let log = File::create(&output).with_context(|| format!("cannot make {}", output.display()))?;
        let process = Command::new(std::env::current_exe().context("this program has no path")?)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run this program again")?;
        Ok(Self { process, output })
    }

    /// The Debian images, which wait for the network and for one processor at a time.
    fn images() -> Result<Self> {
        Self::start("images", &["images"])
    }

    /// Some of the rig's tests, and the power cuts.
    fn first_half(options: &Options) -> Result<Self> {
        let memory = options.memory.to_string();
        let processors = options.processors.unwrap_or(PROCESSORS_BESIDE).to_string();
        let mut arguments = vec![
            "test",
            "--rig",
            "--power",
            "--memory",
            &memory,
            "--processors",
            &processors,
        ];
        if options.all {
            arguments.push("--all");
        }
        arguments.push("--");
        arguments.extend(FIRST_HALF);
        Self::start("other-half", &arguments)
    }

    /// Waits for its end, and shows what it wrote; that, and whether it succeeded.
    fn finish(mut self) -> Result<(Vec<u8>, Result<()>)> {
        let status = self.process.wait()?;
        let output = std::fs::read(&self.output)?;
        std::io::stdout().write_all(&output)?;
        let verdict = if status.success() {
            Ok(())
        } else {
            Err(anyhow!("{status}"))
        };
        Ok((output, verdict))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It has ended where it was waited for.
        self.process.kill().ok();
    }
}

fn run_in_rig(options: &Options) -> Result<rig::End> {
    let (binaries, mut rig) = tests_in_rig(options, if options.all { RIG_SECONDS_ALL } else { RIG_SECONDS })?;
    // They make sense in a series of boots, and in a rig without this build.
    for elsewhere in [POWER_TESTS, PACKAGE_TESTS] {
        rig.command.extend(["--skip".to_owned(), elsewhere.to_owned()]);
    }
    let program = rig.command.clone();
    rig.command.extend(options.arguments.iter().cloned());
    let tail = match rig::boot_once(&rig, Some(&binaries))? {
        Boot::Ended(end) if options.all => return Ok(end),
        Boot::Ended(end) => {
            rig.command = program;
            return once_more(end, rig, &binaries);
        }
        Boot::Crashed(tail) => tail,
        Boot::Cut(moment) => return Err(rig::no_series(&moment)),
    };
    // Once, and said aloud: what has passed is not run again; what was running is, and what failed as after an end ([`once_more`]).
    let passed = passed(&tail);
    let text = String::from_utf8_lossy(&tail);
    let failures = text.lines().filter(|line| tells_of_failure(line)).count();
    ensure!(
        failures <= if options.all { 0 } else { MOST_REPEATED },
        "{failures} tests failed, and then the rig's own kernel crashed or hung"
    );
    eprintln!(
        "NOTE: THE RIG'S OWN KERNEL CRASHED OR HUNG after {} tests that passed and {failures} that failed; all but those that passed run \
         in another rig",
        passed.len()
    );
    rig.command
        .extend(passed.into_iter().flat_map(|name| ["--skip".to_owned(), name]));
    rig::run_with(&rig, Some(&binaries))
}

/// Emulated virtualisation loses a guest once in some 170, and an ordinary run boots as many. So the one or two tests that failed run
/// once more, in another rig and said aloud; a run in which more failed, or in which they fail again, has failed. At full size nothing is
/// run again.
fn once_more(end: rig::End, mut rig: rig::Options, binaries: &Binaries) -> Result<rig::End> {
    let failed = failed(&end.tail);
    if end.status == 0 || failed.is_empty() || failed.len() > MOST_REPEATED {
        return Ok(end);
    }
    let names = failed.join(", ");
    eprintln!("NOTE: FAILED, AND RUN ONCE MORE IN ANOTHER RIG: {names}");
    rig.command.push("--exact".to_owned());
    rig.command.extend(failed);
    let second = rig::run_with(&rig, Some(binaries))?;
    if second.status != 0 {
        return Ok(end);
    }
    eprintln!("NOTE: PASSED ONLY IN A SECOND RIG: {names}");
    Ok(second)
}

/// The tests in libtest's last list of failures.
fn failed(output: &[u8]) -> Vec<String> {
    let closing = closing_lines(output).unwrap_or_default();
    let names = closing.lines().filter_map(|line| line.strip_prefix("    "));
    names.map(str::to_owned).collect()
}

/// The tests that libtest has told of as passed.
fn passed(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let name = |line: &str| Some(line.strip_prefix("test ")?.split_once(" ... ")?.0.to_owned());
    text.lines()
        .filter(|line| line.ends_with("ok"))
        .filter_map(name)
        .collect()
}

/// Whether a line is libtest's of a test that failed, or the end of one where the test wrote something before. Tests may write lines of
/// their own that end so.
fn tells_of_failure(line: &str) -> bool {
    line == "FAILED" || (line.starts_with("test ") && line.ends_with(" ... FAILED"))
}

/// Has the packages installed in a rig that has nothing of ours; how that ended.
fn install_packages(options: &Options) -> Result<rig::End> {
    let (binaries, mut rig) = tests_in_rig(options, PACKAGE_SECONDS)?;
    rig.bare = true;
    rig.packages = true;
    let program = rig.command.clone();
    rig.command.push(PACKAGE_TESTS.to_owned());
    let end = rig::run_with(&rig, Some(&binaries))?;
    rig.command = program;
    if options.all {
        Ok(end)
    } else {
        once_more(end, rig, &binaries)
    }
}

/// Runs the power cuts, in as many boots as it takes; how the last one ended.
fn cut_power(options: &Options) -> Result<rig::End> {
    let (binaries, mut rig) = tests_in_rig(options, CUT_SECONDS)?;
    rig.command.push(POWER_TESTS.to_owned());
    if !options.rig && !options.arguments.is_empty() {
        rig.env
            .push(format!("ROOST_TESTS_MOMENTS={}", options.arguments.join(" ")));
    }
    series::run(&rig, &binaries)
}

/// Builds what the rig's tests need; a rig that runs them.
fn tests_in_rig(options: &Options, timeout: u64) -> Result<(Binaries, rig::Options)> {
    let binaries = binaries::build()?;
    let mut rig = rig::Options {
        add: vec![format!("{}:/usr/lib/roost-tests/rig", binaries.tests.display())],
        timeout,
        memory: options.memory,
        processors: options.processors.unwrap_or(DEFAULT_PROCESSORS),
        direct: options.direct,
        ..rig::Options::command(&["/usr/lib/roost-tests/rig", "--test-threads=1"])
    };
    if options.all {
        let (name, value) = FULL_SIZE;
        rig.env.push(format!("{name}={value}"));
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

/// The closing lines of all that another run of this program has tested, which stand behind its summary.
fn summed_up(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    let summary = text.rfind("\nsummary:\n")?;
    let rest = &text[summary + 1..];
    let from = rest
        .find("\nfailures:\n")
        .into_iter()
        .chain(rest.find("\ntest result:"))
        .min()?;
    Some(rest[from..].trim_end().to_owned() + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_run_sums_up_is_all_of_its_closing_lines() {
        let output = "test result: ok. 1 passed\n\nsummary:\n  rig tests   1.0 s  ok\n\nfailures:\n    a\n\ntest result: FAILED\n\ntest result: ok\n";
        assert_eq!(
            summed_up(output.as_bytes()).unwrap(),
            "\nfailures:\n    a\n\ntest result: FAILED\n\ntest result: ok\n"
        );
        assert_eq!(summed_up(b"killed\n"), None);
    }

    #[test]
    fn what_has_passed_is_what_libtest_says_so_of() {
        let output = b"running 3 tests\ntest a::b ... ok\ntest c ...   NOTE: x\nok\ntest d ... FAILED\ntest e ... ignored\ntest f ... ";
        assert_eq!(passed(output), ["a::b"]);
        let text =
            "test d ... FAILED\ntest e ...    1 | Create | FAILED\n   2 | Pause | FAILED\nFAILED\ntest f ... ok\n";
        assert_eq!(text.lines().filter(|line| tells_of_failure(line)).count(), 2);
    }

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
        assert_eq!(failed(output.as_bytes()), ["a", "b"]);
        assert_eq!(failed(b"\n\ntest result: ok. 3 passed\n"), [""; 0]);
    }
}

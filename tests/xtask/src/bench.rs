//! `cargo xtask bench`: figures of this build's speed in the rig, as a table and as `target/bench.json`.
//!
//! Not here: what is measured and against what (`tests/bench`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::binaries::{self, Binaries, Profile};
use crate::rig;
use crate::step::quiet;
use crate::{cache, setup};

/// How the line of a figure begins.
const MARK: &str = "BENCH ";
/// The programs in C: `NAME.c` is `/root/bench-NAME` in the rig.
const PROGRAMS: [&str; 2] = ["bare", "server"];

/// The groups that an ordinary `cargo xtask test` shows to work, and how long they may take: those whose parts no test has.
const SMOKE: [&str; 3] = ["host", "proxy", "scale"];
const SMOKE_SECONDS: u64 = 900;

/// Arguments of `cargo xtask bench`.
#[derive(Args)]
pub(crate) struct Options {
    /// How what is measured is built
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// One sample of each figure, to see that all of it works
    #[arg(long)]
    smoke: bool,
    /// A quarter of the samples
    #[arg(long, conflicts_with = "smoke")]
    quick: bool,
    /// The rig's memory
    #[arg(long, value_name = "MB", default_value_t = 6144)]
    memory: u64,
    /// The rig's processors
    #[arg(long, value_name = "N", default_value_t = rig::DEFAULT_PROCESSORS)]
    processors: u8,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 7200)]
    timeout: u64,
    /// Groups of figures; without any all of them
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// Shows that these groups of figures can be measured; of each one sample, which is no measure of anything.
pub(crate) fn smoke(processors: u8) -> Result<()> {
    let options = Options {
        profile: Profile::Dev,
        smoke: true,
        quick: false,
        memory: 4096,
        processors,
        timeout: SMOKE_SECONDS,
        names: SMOKE.map(str::to_owned).to_vec(),
    };
    let status = run(&options)?;
    ensure!(status == 0, "status {status}");
    Ok(())
}

/// Runs it; the program's exit status. With one sample of each figure, one that is missing is an error.
pub(crate) fn run(options: &Options) -> Result<u8> {
    setup::run()?;
    let binaries = binaries::build_as(options.profile, "bench")?;
    let mut add = vec![format!("{}:/root/bench", binaries.tests.display())];
    for program in PROGRAMS {
        add.push(format!("{}:/root/bench-{program}", build(program)?.display()));
    }
    // Thousands of disks and networks are a descriptor each, and more.
    let mut command = ["prlimit", "--nofile=65536", "/root/bench"].map(str::to_owned).to_vec();
    command.extend(options.smoke.then(|| "--smoke".to_owned()));
    command.extend(options.quick.then(|| "--quick".to_owned()));
    command.extend(options.names.iter().cloned());
    let rig = rig::Options {
        add,
        timeout: options.timeout,
        memory: options.memory,
        processors: options.processors,
        command,
        ..rig::Options::command(&[])
    };
    let end = rig::run_with(&rig, Some(&binaries))?;
    let figures = figures(&end.tail)?;
    ensure!(!figures.is_empty(), "no figure was measured (status {})", end.status);
    let about = about(options, &binaries);
    let path = cache::target().join("bench.json");
    let file = json!({ "about": about, "figures": figures });
    fs::write(&path, format!("{file:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\n{about}");
    table(&figures).iter().for_each(|line| println!("{line}"));
    println!("{}", path.display());
    let missing: Vec<_> = figures.iter().filter(|figure| figure["missing"].is_string()).collect();
    ensure!(
        !options.smoke || missing.is_empty(),
        "figures that could not be measured: {missing:?}"
    );
    Ok(end.status)
}

/// Builds a program in C, statically: it runs in the rig, or in a guest.
fn build(name: &str) -> Result<PathBuf> {
    let program = cache::dir()?.join(format!("bench-{name}"));
    let source = cache::workspace().join(format!("tests/bench/{name}.c"));
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o"]);
    quiet(compiler.arg(&program).arg(source))?;
    Ok(program)
}

/// What was measured, and on what.
fn about(options: &Options, binaries: &Binaries) -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu.map_or("an unknown processor", |name| name.trim_start_matches([' ', '\t', ':']));
    let accelerator = match std::env::var("RIG_ACCEL").as_deref() {
        Ok("kvm") => "nested KVM",
        _ => "emulation, where only ratios mean anything",
    };
    format!(
        "{:?} build; VMM: {}; rig of {} processors and {} MiB by {accelerator}; machine: {cpu}",
        options.profile,
        binaries.vmm(),
        options.processors,
        options.memory
    )
}

/// The figures in a program's output.
fn figures(output: &[u8]) -> Result<Vec<Value>> {
    let text = String::from_utf8_lossy(output);
    let lines = text.lines().filter_map(|line| line.strip_prefix(MARK));
    lines
        .map(|line| serde_json::from_str(line).with_context(|| format!("no figure: {line}")))
        .collect()
}

/// The table: a line for each figure, and below it what it is measured against, and why it is not met.
fn table(figures: &[Value]) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<24} {:>16} {:>18}  {:<4} {}",
        "figure", "goal", "measured", "met", "min / median / p99, n"
    )];
    for figure in figures {
        let text = |name: &str| figure[name].as_str().unwrap_or_default();
        if let Some(why) = figure["missing"].as_str() {
            lines.push(format!("{:<24} NOT MEASURED: {why}", text("figure")));
            continue;
        }
        let met = match figure["met"].as_bool() {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        lines.push(format!(
            "{:<24} {:>16} {:>18}  {met:<4} {}",
            text("figure"),
            text("goal"),
            text("measured"),
            summary(&figure["subject"], text("unit")),
        ));
        if let Some(of) = figure["baseline"]["of"].as_str() {
            let summary = summary(&figure["baseline"], text("unit"));
            lines.push(format!("{:66} {summary}: {of}", ""));
        }
        if let Some(why) = figure["why"].as_str() {
            lines.push(format!("    {why}"));
        }
    }
    lines
}

fn summary(of: &Value, unit: &str) -> String {
    let number = |name: &str| of[name].as_f64().unwrap_or(f64::NAN);
    format!(
        "{:.2} / {:.2} / {:.2} {unit}, {}",
        number("min"),
        number("median"),
        number("p99"),
        of["n"]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_met_what_is_not_and_what_is_missing_are_told_apart() {
        let output = b"noise\nBENCH {\"figure\":\"a\",\"unit\":\"ms\",\"goal\":\"<= 2 x\",\"measured\":\"3.00 x\",\"met\":false,\
            \"why\":\"because\",\"subject\":{\"min\":1,\"median\":3,\"p99\":4,\"n\":5},\"baseline\":{\"of\":\"b\",\"min\":1,\"median\":1,\"p99\":1,\"n\":5}}\n\
            BENCH {\"figure\":\"c\",\"missing\":\"no nginx\"}\n";
        let figures = figures(output).unwrap();
        let text = table(&figures).join("\n");
        for words in [
            "NO ",
            "1.00 / 3.00 / 4.00 ms, 5",
            ": b",
            "    because",
            "NOT MEASURED: no nginx",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_line_that_is_no_figure_is_an_error() {
        assert!(figures(b"BENCH {\"figure\":").is_err());
    }
}

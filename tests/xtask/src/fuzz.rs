//! `cargo xtask fuzz`: what the agent reads of others, by libFuzzer, from the corpora in `fuzz/corpus` on. By command and of no ordinary run;
//! what an ordinary one does is to play the corpora, with some thousand changes to each (`agent/src/fuzz.rs`).

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::binaries::cargo;
use crate::cache;
use crate::step::{shown, step};

/// What cargo-fuzz has the compiler do, but for sanitizers, which only a nightly one has.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";

/// Arguments of `cargo xtask fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// The target [default: each in turn]
    target: Option<String>,
    /// Time for each
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Builds the fuzzers and runs them. What is new and interesting goes to `target/fuzz/corpus`, what fails to `fuzz/artifacts`.
///
/// # Errors
/// A target that failed, or that is none.
pub(crate) fn run(options: &Options) -> Result<()> {
    let fuzz = cache::workspace().join("fuzz");
    let target = cache::target().join("fuzz");
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut names = targets(&fuzz)?;
    if let Some(wanted) = &options.target {
        ensure!(names.contains(wanted), "{wanted} is none of {names:?}");
        names.retain(|name| name == wanted);
    }
    step("building the fuzzers", || {
        shown(
            cargo()
                .args(["build", "--release", "--bins", "--manifest-path"])
                .arg(fuzz.join("Cargo.toml"))
                // A target of its own, so that build scripts and macros are not instrumented.
                .args(["--target", &triple])
                .env("CARGO_TARGET_DIR", &target)
                .env("RUSTFLAGS", FLAGS),
        )
    })?;
    for name in names {
        let found = target.join("corpus").join(&name);
        let artifacts = fuzz.join("artifacts").join(&name);
        for dir in [&found, &artifacts] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        step(&format!("fuzzing {name}"), || {
            let program = target.join(&triple).join("release").join(&name);
            shown(
                Command::new(program)
                    .arg(found)
                    .arg(fuzz.join("corpus").join(&name))
                    .arg(format!("-max_total_time={}", options.seconds))
                    .arg(format!("-artifact_prefix={}/", artifacts.display()))
                    .args(["-print_final_stats=1", "-timeout=10", "-rss_limit_mb=2048"]),
            )
        })?;
    }
    Ok(())
}

/// Those that have a corpus.
fn targets(fuzz: &Path) -> Result<Vec<String>> {
    let corpora = fs::read_dir(fuzz.join("corpus")).context("no corpora")?;
    let mut names: Vec<String> = corpora
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

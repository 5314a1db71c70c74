//! Progress on stderr, and child processes that report what they said when they fail.
//!
//! stdout belongs to the command in the rig; nothing here writes to it.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Runs `work` under a title and prints how long it took.
pub(crate) fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {title}");
    let start = Instant::now();
    let outcome = work();
    let seconds = start.elapsed().as_secs_f64();
    match &outcome {
        Ok(_) => eprintln!("    {title}: {seconds:.1} s"),
        Err(_) => eprintln!("    {title}: failed after {seconds:.1} s"),
    }
    outcome
}

/// Runs a command whose own output is the progress; it goes to stderr.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let name = name_of(command);
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// Runs a command whose output matters only when it fails, and returns its stdout.
pub(crate) fn quiet(command: &mut Command) -> Result<Vec<u8>> {
    let name = name_of(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let mut stderr = std::io::stderr().lock();
        stderr.write_all(&output.stdout)?;
        stderr.write_all(&output.stderr)?;
        bail!("{name}: {}", output.status);
    }
    Ok(output.stdout)
}

fn name_of(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .take(3)
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

//! Faults that a test injects at a step: the agent fails there, or waits there while something is done to it or to what it talks to.
//!
//! Compiled into test builds alone (feature `failpoints`); elsewhere a step is passed without a trace.

use crate::errors::FileError;

/// Where a test says what it wants: the step's name and `wait`, or `error` with a number of the kernel's. Gone once the step is reached; then there is
/// `failpoint.reached`, and who waits does so until there is `failpoint.go`, and takes `failpoint.reached` away as it goes on.
#[cfg(feature = "failpoints")]
const ARMED: &str = "/var/lib/roost/failpoint";

/// Passes a step, unless a test wants something else of it.
///
/// # Errors
/// What a test asked for.
#[cfg(feature = "failpoints")]
pub(crate) async fn reach(step: &'static str) -> Result<(), FileError> {
    use std::path::Path;
    let armed = Path::new(ARMED);
    let Ok(text) = std::fs::read_to_string(armed) else {
        return Ok(());
    };
    let Some(wish) = text.trim().strip_prefix(step).and_then(|rest| rest.strip_prefix(' ')) else {
        return Ok(());
    };
    tracing::warn!(step, wish, "a test's fault");
    let failed = |source| FileError::new("passing", Path::new(step), source);
    std::fs::rename(armed, armed.with_extension("reached")).map_err(failed)?;
    match wish {
        "wait" => {
            while !armed.with_extension("go").exists() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            std::fs::remove_file(armed.with_extension("reached")).map_err(failed)
        }
        _ => {
            let errno = wish.strip_prefix("error ").and_then(|number| number.parse().ok());
            Err(failed(match errno {
                Some(errno @ 1..) => std::io::Error::from_raw_os_error(errno),
                _ => std::io::Error::other("a test wants it to fail"),
            }))
        }
    }
}

/// Passes a step.
///
/// # Errors
/// None.
#[cfg(not(feature = "failpoints"))]
pub(crate) async fn reach(_step: &'static str) -> Result<(), FileError> {
    Ok(())
}

/// Passes a step behind which nothing is undone: a test can have it waited at, not failed.
pub(crate) async fn pass(step: &'static str) {
    if let Err(error) = reach(step).await {
        tracing::error!(%error, "a step that cannot fail was told to");
    }
}

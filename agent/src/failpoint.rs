//! Faults that a test injects at a step: the agent fails there, waits there while something is done to it or to what it talks to, or
//! loses the next answer that it is given.
//!
//! Compiled into test builds alone (feature `failpoints`); elsewhere a step is passed without a trace, and no answer is lost.

use crate::errors::FileError;

/// Where a test says what it wants: the step's name and a wish. Gone once the step is reached.
///
/// | wish | what happens |
/// |---|---|
/// | `error N` | the step fails with this errno |
/// | `wait` | the agent waits until there is `failpoint.go`; until it goes on or is stopped there is `failpoint.reached` |
/// | `lose` | there is `failpoint.lose`, and whoever is answered next takes it away and believes that the answer never came |
///
/// Answers are those of privd, of a shim, of a VMM, and of a guest's envd outside its process service: what was asked has been done
/// by then, and only the asker does not know.
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
    if wish == "lose" {
        return std::fs::rename(armed, armed.with_extension("lose")).map_err(failed);
    }
    std::fs::rename(armed, armed.with_extension("reached")).map_err(failed)?;
    if wish == "wait" {
        let _left = Left;
        while !armed.with_extension("go").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        return Ok(());
    }
    let errno = wish.strip_prefix("error ").and_then(|number| number.parse().ok());
    Err(failed(errno.map_or_else(
        || std::io::Error::other("a test wants something unknown"),
        std::io::Error::from_raw_os_error,
    )))
}

/// Leaves a step that was waited at. A create whose caller has gone away is stopped there.
#[cfg(feature = "failpoints")]
struct Left;

#[cfg(feature = "failpoints")]
impl Drop for Left {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(std::path::Path::new(ARMED).with_extension("reached")) {
            tracing::error!(%error, "a test cannot see that its step was left");
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

/// Whether a test wants the answer that has just come to be lost.
#[cfg(feature = "failpoints")]
pub(crate) fn loses(of: &'static str) -> bool {
    let lost = std::fs::remove_file(std::path::Path::new(ARMED).with_extension("lose")).is_ok();
    if lost {
        tracing::warn!(of, "an answer is lost, as a test wants it");
    }
    lost
}

/// Whether an answer is lost.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn loses(_of: &'static str) -> bool {
    false
}

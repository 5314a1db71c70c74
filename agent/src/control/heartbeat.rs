//! Heartbeats: at once, then every 30 s. They say that this host is there, and their answers whether it is still the control plane's.
//!
//! | answer | what follows |
//! |---|---|
//! | success | paused sandboxes may be listed as paused (see [`listing`](super::listing)); credentials are refreshed when due |
//! | 401, 403 | credentials are refreshed, and the heartbeat is sent again |
//! | 404 in the control plane's own words | once that was said [`SAID`] times in a row over [`SAID_OVER`]: this host was deleted |
//! | anything else, or none | sent again soon; nothing else, however long it goes on |

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio::time::Instant;

use super::client::{Answer, CallError};
use super::clock::Moment;
use super::credentials::Credentials;
use super::listing::Listing;
use super::retry;
use super::session::Session;
use crate::errors::Chain;
use crate::sandbox::unix_now;

/// From one heartbeat to the next.
pub const INTERVAL: Duration = Duration::from_secs(30);
/// Time for one.
const LIMIT: Duration = Duration::from_secs(10);
/// How often it must be said that this host was deleted, with nothing else said in between: whoever stands in for a control plane while
/// it is replaced must not empty a host.
pub const SAID: u32 = 3;
/// Over how long.
pub const SAID_OVER: Duration = Duration::from_secs(90);

/// What has been said of this host's end.
#[derive(Debug, Default)]
struct Deletion {
    first: Option<Moment>,
    said: u32,
}

impl Deletion {
    /// It was said once more; whether that is enough.
    fn said(&mut self, now: Moment) -> bool {
        let first = *self.first.get_or_insert(now);
        self.said += 1;
        self.said >= SAID && now.since(first) >= SAID_OVER
    }

    /// Something else was said, or nothing.
    fn not_said(&mut self) {
        *self = Self::default();
    }
}

/// What became of a heartbeat.
#[derive(Debug)]
enum Beat {
    Acknowledged,
    Deleted,
    Failed(String),
}

/// Sends heartbeats until the control plane has deleted this host.
pub async fn run(session: &Arc<Session>, listing: &Listing) {
    let mut deletion = Deletion::default();
    let mut failures = 0;
    let mut silent_since = Moment::now();
    loop {
        let (began, sent) = (Instant::now(), Moment::now());
        let beat = beat(session).await;
        let now = Moment::now();
        match beat {
            Beat::Acknowledged => {
                listing.acknowledged(sent, now);
                deletion.not_said();
                if failures > 0 {
                    let elapsed_ms = now.since(silent_since).as_millis();
                    tracing::info!(elapsed_ms, "the control plane acknowledges heartbeats again");
                }
                (failures, silent_since) = (0, now);
                session.refresh_if_due(unix_now()).await;
                tokio::time::sleep_until(began + INTERVAL).await;
            }
            Beat::Deleted => {
                if deletion.said(now) {
                    return;
                }
                tracing::error!(
                    said = deletion.said,
                    "the control plane says that it has no such host; sandboxes are paused once it has said so for 90 s"
                );
                tokio::time::sleep_until(began + INTERVAL).await;
            }
            Beat::Failed(reason) => {
                deletion.not_said();
                failures += 1;
                if failures == 1 {
                    tracing::warn!(
                        reason,
                        "a heartbeat was not acknowledged; sandboxes run on, and it is sent again"
                    );
                } else {
                    tracing::debug!(reason, failures, "a heartbeat was not acknowledged");
                }
                tokio::time::sleep(retry::pause(failures, INTERVAL)).await;
            }
        }
    }
}

async fn beat(session: &Arc<Session>) -> Beat {
    let used = session.credentials();
    let answer = match send(session, &used).await {
        Ok(answer) if matches!(answer.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            match session.refresh(&used).await {
                Ok(credentials) => send(session, &credentials).await,
                Err(error) => return Beat::Failed(Chain(&error).to_string()),
            }
        }
        other => other,
    };
    match answer {
        Ok(answer) if answer.status.is_success() => Beat::Acknowledged,
        Ok(answer) if answer.status == StatusCode::NOT_FOUND && answer.fault().is_some() => Beat::Deleted,
        Ok(answer) => Beat::Failed(answer.summary()),
        Err(error) => Beat::Failed(Chain(&error).to_string()),
    }
}

async fn send(session: &Session, credentials: &Credentials) -> Result<Answer, CallError> {
    let path = format!("/v1/hosts/{}/heartbeat", credentials.host_id);
    session.post(credentials, &path, Bytes::new(), LIMIT).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_deleted_once_that_was_said_three_times_in_a_row_over_90_s() {
        enum Step {
            Said(u64, bool),
            Other,
        }
        use Step::{Other, Said};
        for (name, steps) in [
            (
                "every 30 s",
                vec![Said(0, false), Said(30, false), Said(60, false), Said(90, true)],
            ),
            ("two are not enough", vec![Said(0, false), Said(200, false)]),
            (
                "three within 60 s",
                vec![Said(0, false), Said(30, false), Said(60, false)],
            ),
            ("three over 90 s", vec![Said(0, false), Said(45, false), Said(90, true)]),
            (
                "something else in between",
                vec![
                    Said(0, false),
                    Said(60, false),
                    Other,
                    Said(90, false),
                    Said(120, false),
                    Said(180, true),
                ],
            ),
        ] {
            let (mut deletion, began) = (Deletion::default(), Moment::now());
            for step in steps {
                match step {
                    Said(second, enough) => {
                        let now = began.after(Duration::from_secs(second));
                        assert_eq!(deletion.said(now), enough, "{name}, at {second} s");
                    }
                    Other => deletion.not_said(),
                }
            }
        }
    }
}

//! Lifecycle events to the control plane: one call for each. Which comes first, and when one is tried again, is the outbox's affair.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde::Serialize;

use super::client::json;
use super::session::Session;
use crate::errors::Chain;
use crate::outbox::{Deliver, Delivery, Event};

/// Time for one.
const LIMIT: Duration = Duration::from_secs(10);

/// Delivers events as a registered host.
#[derive(Debug, Clone)]
pub struct Events(pub Arc<Session>);

/// An event in the control plane's words.
#[derive(Debug, Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    event: &'a Event,
    host_id: &'a str,
}

impl Deliver for Events {
    async fn deliver(&self, event: &Event) -> Delivery {
        let mut credentials = self.0.credentials();
        // The second time with new credentials, where the first were not accepted.
        for _ in 0..2 {
            let body = json(&Body {
                event,
                host_id: &credentials.host_id,
            });
            let answer = self.0.post(&credentials, "/v1/hosts/sandbox-events", body, LIMIT);
            let answer = match answer.await {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::debug!(sandbox_id = %event.sandbox_id, error = %Chain(&error), "an event was not delivered");
                    return Delivery::Later;
                }
            };
            match answer.status {
                status if status.is_success() => return Delivery::Delivered,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => match self.0.refresh(&credentials).await {
                    Ok(next) => credentials = next,
                    Err(_) => return Delivery::Later,
                },
                _ if answer.is_judgement() => return Delivery::Refused(answer.summary()),
                _ => return Delivery::Later,
            }
        }
        Delivery::Later
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::EventKind;

    #[test]
    fn an_event_has_the_control_planes_field_names() {
        let event = Event {
            error: Some("why".into()),
            host_ip: Some("10.11.0.1".into()),
            ..Event::new(EventKind::AutoPaused, "cl-1".parse().expect("an id"), 17)
        };
        let body = json(&Body {
            event: &event,
            host_id: "h",
        });
        let expected = serde_json::json!({
            "event": "sandbox.auto_paused", "sandbox_id": "cl-1", "host_id": "h", "host_ip": "10.11.0.1", "error": "why", "timestamp": 17
        });
        let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(body, expected);
    }
}

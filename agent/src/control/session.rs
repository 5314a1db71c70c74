//! A registered host's standing with its control plane: the credentials in use, and how they are replaced.
//!
//! Holds: credentials are on disk before they are used, and taken by everyone at once: the next call carries the new token, the next
//! connection sees the new certificate. One refresh at a time, however many calls were refused, and it goes on to its end whoever
//! stops waiting for it, for the old refresh token is spent once it was sent. An answer that could not be kept is kept at the next
//! attempt, without another refresh.
//!
//! A refresh whose answer is lost on the way cannot be repeated by us: the control plane then has a token that we have not. So it is
//! tried just after a heartbeat was acknowledged, over the same connection, with a third of the old token's life left to notice.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::client::{Answer, CallError, Client, json};
use super::credentials::{Credentials, Granted, Store};
use super::retry;
use crate::errors::{Chain, FileError};
use crate::host::files::blocking;
use crate::tls::{Identities, Registered, TlsError};

/// Time for a refresh. It is worth more patience than a heartbeat: its answer must not be missed.
const REFRESH_LIMIT: Duration = Duration::from_secs(30);
/// The longest pause between two refreshes that fail, and the pause after one that did not: where credentials are refused that are
/// newer than that, it is not for their age.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Why there are no new credentials.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// They could not be kept; where they were granted already, they will be.
    #[error("there is no room for new credentials")]
    File(#[from] FileError),
    /// The control plane did not answer.
    #[error("no answer to a refresh")]
    Call(#[from] CallError),
    /// It cannot grant them now.
    #[error("the control plane has trouble: {0}")]
    Trouble(String),
    /// It does not grant them.
    #[error("the control plane does not refresh this host's credentials: {0}")]
    Refused(String),
    /// It granted something else.
    #[error("the control plane's answer to a refresh is none")]
    Malformed(#[source] serde_json::Error),
    /// There was an attempt a moment ago.
    #[error("a refresh was tried a moment ago")]
    TooSoon,
}

impl RefreshError {
    /// Whether it may succeed by itself at another time.
    fn may_pass(&self) -> bool {
        match self {
            Self::File(_) | Self::Call(_) | Self::Trouble(_) | Self::TooSoon => true,
            Self::Refused(_) | Self::Malformed(_) => false,
        }
    }
}

/// The standing.
#[derive(Debug)]
pub struct Session {
    client: Client,
    store: Store,
    identities: Arc<Identities>,
    current: ArcSwap<Credentials>,
    refreshing: Mutex<Refreshing>,
    /// How much earlier than at two thirds of their life credentials are refreshed.
    early: f64,
}

#[derive(Debug, Default)]
struct Refreshing {
    /// Granted, and not on disk yet.
    unkept: Option<Credentials>,
    failures: u32,
    not_before: Option<Instant>,
}

/// What the API is known by with these credentials.
///
/// # Errors
/// [`TlsError`], which names the file.
pub fn identity(store: &Store, credentials: &Credentials) -> Result<Registered, TlsError> {
    let Credentials {
        cert_pem,
        key_pem,
        ca_cert_pem,
        ..
    } = credentials;
    Registered::new(store.path(), cert_pem, key_pem.expose(), ca_cert_pem)
}

impl Session {
    /// The standing of a host with these credentials, which are those in the store.
    pub fn new(client: Client, store: Store, credentials: Credentials, identities: Arc<Identities>) -> Arc<Self> {
        Arc::new(Self {
            client,
            store,
            identities,
            current: ArcSwap::from_pointee(credentials),
            refreshing: Mutex::default(),
            early: retry::chance(),
        })
    }

    /// The credentials in use.
    pub fn credentials(&self) -> Arc<Credentials> {
        self.current.load_full()
    }

    /// Who the API is.
    pub fn identities(&self) -> &Arc<Identities> {
        &self.identities
    }

    /// Where they are kept.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where the control plane is.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A call as this host.
    pub(super) async fn post(
        &self,
        credentials: &Credentials,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Answer, CallError> {
        self.client.post(path, Some(&credentials.jwt), body, limit).await
    }

    /// Replaces credentials whose time has come.
    pub async fn refresh_if_due(self: &Arc<Self>, now_unix: i64) {
        let credentials = self.credentials();
        if credentials.is_due(now_unix, self.early) {
            // What failed has been logged, and the old ones are good for a while.
            drop(self.refresh(&credentials).await);
        }
    }

    /// Replaces credentials that `used` were until now, unless they have been replaced since. Once begun it goes on to its end.
    ///
    /// # Errors
    /// [`RefreshError`], which has been logged; `used` are still in use.
    pub async fn refresh(self: &Arc<Self>, used: &Arc<Credentials>) -> Result<Arc<Credentials>, RefreshError> {
        let (session, used) = (self.clone(), used.clone());
        let refreshed = tokio::spawn(async move { session.refresh_once(&used).await });
        refreshed.await.expect("a refresh does not panic")
    }

    async fn refresh_once(&self, used: &Arc<Credentials>) -> Result<Arc<Credentials>, RefreshError> {
        let mut refreshing = self.refreshing.lock().await;
        let current = self.credentials();
        if !Arc::ptr_eq(&current, used) {
            return Ok(current);
        }
        if refreshing.not_before.is_some_and(|end| Instant::now() < end) {
            return Err(RefreshError::TooSoon);
        }
        match self.attempt(&mut refreshing).await {
            Ok(next) => {
                *refreshing = Refreshing {
                    not_before: Some(Instant::now() + LONGEST_PAUSE),
                    ..Refreshing::default()
                };
                Ok(self.use_from_now(next))
            }
            Err(error) => {
                refreshing.failures += 1;
                refreshing.not_before = Some(Instant::now() + retry::pause(refreshing.failures, LONGEST_PAUSE));
                if error.may_pass() {
                    tracing::warn!(error = %Chain(&error), "credentials not refreshed; tried again");
                } else {
                    tracing::error!(
                        error = %Chain(&error),
                        "credentials not refreshed; sandboxes run on, but once the old credentials end this host must be deleted at the \
                         control plane and registered anew"
                    );
                }
                Err(error)
            }
        }
    }

    async fn attempt(&self, refreshing: &mut Refreshing) -> Result<Credentials, RefreshError> {
        let store = self.store.clone();
        let draft = blocking(move || store.draft()).await?;
        let next = match &refreshing.unkept {
            Some(next) => next.clone(),
            None => {
                let next = self.ask().await?;
                refreshing.unkept.insert(next).clone()
            }
        };
        blocking({
            let next = next.clone();
            move || draft.keep(&next)
        })
        .await?;
        Ok(next)
    }

    async fn ask(&self) -> Result<Credentials, RefreshError> {
        #[derive(Serialize)]
        struct Request<'a> {
            refresh_token: &'a str,
        }
        let current = self.credentials();
        let body = json(&Request {
            refresh_token: current.refresh_token.expose(),
        });
        let answer = self.client.post("/v1/hosts/auth/refresh", None, body, REFRESH_LIMIT);
        let answer = answer.await?;
        if !answer.status.is_success() {
            let refusal = if answer.is_judgement() {
                RefreshError::Refused
            } else {
                RefreshError::Trouble
            };
            return Err(refusal(answer.summary()));
        }
        let granted: Granted = answer.json().map_err(RefreshError::Malformed)?;
        Ok(current.next(granted))
    }

    fn use_from_now(&self, next: Credentials) -> Arc<Credentials> {
        match identity(&self.store, &next) {
            Ok(identity) => self.identities.swap(identity),
            Err(error) => {
                tracing::error!(error = %Chain(&error), "the new certificate cannot be used; the old one is shown on");
            }
        }
        let next = Arc::new(next);
        self.current.store(next.clone());
        tracing::info!(host_id = %next.host_id, "credentials refreshed");
        next
    }
}

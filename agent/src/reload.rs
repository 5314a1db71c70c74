//! What a running agent does when it is told to read its configuration again (SIGHUP; `systemctl reload`): nothing, where anything in it is
//! wrong; else it goes by what can change while it serves, reads its own certificates anew, and says which changes wait for a restart.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::signal::unix::Signal;

use crate::config::keys::{Applies, KEYS};
use crate::config::{Config, Problems, Sources};
use crate::host::Host;
use crate::serve::Access;
use crate::tls::TlsError;
use crate::trace::Lines;

/// What goes by the configuration, and where that is from.
#[derive(Debug)]
pub struct Reload {
    /// Where it is read from.
    pub sources: Sources,
    /// Goes by most of it.
    pub host: Arc<Host>,
    /// Goes by who may call.
    pub access: Arc<Access>,
    /// Go by which there are.
    pub lines: Lines,
}

/// Why everything stays as it was.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    Config(#[from] Problems),
    #[error(transparent)]
    Certificates(#[from] TlsError),
}

/// What a reload changes.
struct Change {
    /// All that holds from now on.
    config: Config,
    /// Which keys are other than before.
    changed: Vec<&'static str>,
    /// Which keys would be, and keep their old value until the agent is started anew.
    waiting: Vec<&'static str>,
}

impl Change {
    fn new(now: &Config, wanted: &Config) -> Self {
        let (mut config, mut changed, mut waiting) = (now.clone(), Vec::new(), Vec::new());
        for key in KEYS.iter().filter(|key| !key.is_same(now, wanted)) {
            match key.applies {
                Applies::AtReload => {
                    key.copy(wanted, &mut config);
                    changed.push(key.name);
                }
                Applies::AtStart => waiting.push(key.name),
            }
        }
        Self {
            config,
            changed,
            waiting,
        }
    }
}

impl Reload {
    /// Reads it again at each signal, until the process ends.
    pub async fn run(self, mut hangup: Signal) -> Infallible {
        let this = Arc::new(self);
        loop {
            if hangup.recv().await.is_none() {
                return std::future::pending().await;
            }
            let reload = this.clone();
            let work = tokio::task::spawn_blocking(move || reload.again());
            match work.await.expect("file work does not panic") {
                Ok(Change { changed, waiting, .. }) => {
                    tracing::info!(changed = changed.join(" "), "the configuration was read again");
                    if !waiting.is_empty() {
                        tracing::warn!(
                            keys = waiting.join(" "),
                            "changes of these keys wait until the agent is started anew"
                        );
                    }
                }
                Err(ReloadError::Config(problems)) => {
                    for problem in &problems.problems {
                        tracing::error!(error = %problem, "the configuration is wrong, and the one from before holds");
                    }
                }
                Err(ReloadError::Certificates(error)) => tracing::error!(
                    error = %crate::errors::Chain(&error),
                    "the certificates cannot be used: they and the configuration from before hold"
                ),
            }
        }
    }

    /// Blocks.
    fn again(&self) -> Result<Change, ReloadError> {
        let wanted = self.sources.load()?.config;
        let change = Change::new(&self.host.config(), &wanted);
        // Where certificates are is a key that waits; what is there is not.
        self.access.tls.reload_local(&change.config.pki_dir)?;
        self.access.reconfigure(&change.config);
        self.lines.reconfigure(&change.config);
        self.host.reconfigure(change.config.clone());
        Ok(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_change_changes_and_the_rest_waits() {
        let now = Config::default();
        let wanted = Config {
            max_vcpus: 2,
            listen: ([127, 0, 0, 1], 1).into(),
            rate_limits: crate::config::RateLimits {
                network_mb_per_sec: std::num::NonZeroU32::new(7),
                ..now.rate_limits
            },
            ..now.clone()
        };
        let Change {
            config,
            changed,
            waiting,
        } = Change::new(&now, &wanted);
        assert_eq!(changed, ["max_vcpus", "rate_limits.network_mb_per_sec"]);
        assert_eq!(waiting, ["listen"]);
        assert_eq!((config.max_vcpus, config.listen), (2, now.listen));
        assert_eq!(config.rate_limits, wanted.rate_limits);
        let back = Change::new(&config, &now);
        assert_eq!((back.changed.len(), back.waiting.len()), (2, 0));
    }
}

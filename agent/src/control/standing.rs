//! Whether this host is under a control plane, and what it does there: heartbeats and events, until it is told that it was deleted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::client::{Client, ClientError};
use super::credentials::{CredentialsError, Store};
use super::events::Events;
use super::heartbeat;
use super::session::{Session, identity};
use super::url::{Url, UrlError};
use crate::config::Config;
use crate::drain::drain;
use crate::errors::Chain;
use crate::host::files::{Layout, blocking};
use crate::outbox::{self, Outbox};
use crate::registry::Registry;
use crate::sandbox::unix_now;
use crate::tls::{self, Identities, TlsError};

/// Pause between two attempts to bring everything to rest.
const DRAIN_PAUSE: Duration = Duration::from_secs(60);

/// Whether there is a control plane.
#[derive(Debug)]
pub enum Standing {
    /// There is none, or this host is not registered there.
    Standalone(Arc<Identities>),
    /// This host is registered.
    Registered(Arc<Session>),
}

/// Why an agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum StandingError {
    /// A host without a control plane needs certificates of its own.
    #[error("no API without certificates (`roost pki init` makes some, or register this host at a control plane)")]
    Local(#[source] TlsError),
    /// What the control plane gave cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Or used.
    #[error(transparent)]
    Identity(TlsError),
    /// A host that is registered nobody knows where.
    #[error("{} does not say where the control plane is; set url in [control_plane]", path.display())]
    NoUrl {
        /// The credentials.
        path: PathBuf,
    },
    /// Or at no address.
    #[error("{} has no usable control_plane; set url in [control_plane]", path.display())]
    Url {
        /// The credentials.
        path: PathBuf,
        /// Why.
        #[source]
        source: UrlError,
    },
    /// There is no way to call the control plane.
    #[error("the control plane cannot be called")]
    Client(#[from] ClientError),
}

impl Standing {
    /// Reads what there is. Blocks.
    ///
    /// # Errors
    /// [`StandingError`].
    pub fn load(config: &Config) -> Result<Self, StandingError> {
        let local = tls::server(&config.pki_dir);
        let store = Store::new(&Layout::new(&config.dir, &config.vm_run_dir).credentials());
        let Some(credentials) = store.load()? else {
            if config.control_plane.url.is_some() {
                tracing::error!(
                    "not registered at the control plane (`roost-agent --register TOKEN`): only callers of our own are served"
                );
            }
            return local
                .map(|local| Self::Standalone(Identities::standalone(local)))
                .map_err(StandingError::Local);
        };
        let path = || store.path().to_owned();
        let url = match (&config.control_plane.url, &credentials.control_plane) {
            (Some(url), _) => url.clone(),
            (None, Some(url)) => url
                .parse()
                .map_err(|source| StandingError::Url { path: path(), source })?,
            (None, None) => return Err(StandingError::NoUrl { path: path() }),
        };
        let identity = identity(&store, &credentials).map_err(StandingError::Identity)?;
        let local = local.inspect_err(|error| {
            tracing::info!(error = %Chain(error), "no certificates of our own: only the control plane's callers are served");
        });
        let identities = Identities::registered(identity, local.ok());
        let client = client(config, url)?;
        Ok(Self::Registered(Session::new(client, store, credentials, identities)))
    }

    /// Who this host is to its callers.
    pub fn identities(&self) -> &Arc<Identities> {
        match self {
            Self::Standalone(identities) => identities,
            Self::Registered(session) => session.identities(),
        }
    }
}

/// A client of the control plane as it is configured. Blocks.
///
/// # Errors
/// [`ClientError`].
pub fn client(config: &Config, url: Url) -> Result<Client, ClientError> {
    if url.is_in_the_clear() {
        tracing::warn!(%url, "the control plane is called without transport security: tokens and keys can be read on the way");
    }
    Client::new(url, config.control_plane.ca_file.as_deref())
}

/// Sends heartbeats and events until the control plane has deleted this host; then, once recovery is complete, everything is paused and
/// the credentials are set aside. What is on disk stays.
pub async fn run(
    session: Arc<Session>,
    registry: Arc<Registry>,
    outbox: Option<Outbox>,
    recovered: impl Future<Output = ()>,
) {
    let events = async {
        match outbox {
            Some(outbox) => match outbox::run(outbox, Events(session.clone())).await {},
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = events => {}
        () = heartbeat::run(&session, &registry.host().listing) => {}
    }
    tracing::error!(
        host_id = %session.credentials().host_id,
        "the control plane has deleted this host; everything is paused and stays on disk"
    );
    recovered.await;
    loop {
        let failed = drain(&registry).await.failed.len();
        if failed == 0 {
            break;
        }
        // Left to run with nobody to ask for it, it would be lost with the host.
        tracing::error!(failed, "sandboxes could not be paused; see to them; tried again");
        tokio::time::sleep(DRAIN_PAUSE).await;
    }
    let store = session.store().clone();
    match blocking(move || store.set_aside(unix_now())).await {
        Ok(path) => tracing::warn!(path = %path.display(), "the credentials were set aside"),
        Err(error) => tracing::error!(error = %Chain(&error), "the credentials could not be set aside"),
    }
}

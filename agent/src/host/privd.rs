//! The agent's side of privd: one connection, made when it is needed and again when it has gone.
//!
//! A call whose connection breaks is made once more on a new one. That is safe for every verb: what the lost call made lives by a
//! descriptor in a reply that nobody read, so the kernel has removed it or is about to, and privd waits for that.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use roost_common::ipc::PassedFd;
use roost_common::ipc::rpc::MAX_IN_FLIGHT;
use roost_common::privd::{
    Disk, EgressPolicy, InventoryCursor, InventoryRow, Network, NetworkCounters, OpenDisk, OpenNetwork, PrivdClient,
    PrivdClientTransport, PrivdError, ReadCounters, SetPolicy,
};
use tarpc::client::{self, RpcError};
use tarpc::context::Context;
use tokio::sync::{Mutex, Semaphore};

use crate::failpoint;
use crate::status::Timings;

/// How long one call may take: longer than privd waits for a name that is still in use (5 s), and for a busy host.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Why a call of privd has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// privd cannot be reached.
    #[error("cannot connect to privd at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke twice, or the time ran out.
    #[error("the call of privd's {verb} was lost")]
    Lost {
        /// Which verb.
        verb: &'static str,
        /// What the transport said.
        #[source]
        source: RpcError,
    },
    /// privd's answer.
    #[error("privd refused {verb}")]
    Refused {
        /// Which verb.
        verb: &'static str,
        /// The answer.
        #[source]
        source: PrivdError,
    },
}

/// privd, as the agent calls it. At most as many calls at a time as privd admits; others wait here.
#[derive(Debug)]
pub struct PrivdClientHandle {
    path: PathBuf,
    connection: Mutex<Option<PrivdClient>>,
    calls: Arc<Semaphore>,
    timings: Timings,
}

impl PrivdClientHandle {
    /// A handle for privd at `path`; connects with the first call.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            connection: Mutex::new(None),
            calls: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            timings: Timings::default(),
        }
    }

    /// How long its calls take.
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// Opens a sandbox's disk; see [`roost_common::privd::Privd::open_disk`].
    ///
    /// # Errors
    /// Any [`CallError`]; nothing is left.
    pub async fn open_disk(&self, request: OpenDisk) -> Result<Disk, CallError> {
        self.call("open_disk", move |privd, context| {
            let request = request.clone();
            async move { privd.open_disk(context, request).await }
        })
        .await
    }

    /// Opens a slot's network; see [`roost_common::privd::Privd::open_network`].
    ///
    /// # Errors
    /// Any [`CallError`]; nothing is left.
    pub async fn open_network(&self, request: OpenNetwork) -> Result<Network, CallError> {
        self.call("open_network", move |privd, context| {
            let request = request.clone();
            async move { privd.open_network(context, request).await }
        })
        .await
    }

    /// Replaces the policy of the network behind a tap; see [`roost_common::privd::Privd::set_policy`].
    ///
    /// # Errors
    /// Any [`CallError`]; the old one is in force, but where the call was lost.
    pub async fn set_policy(&self, tap: PassedFd, policy: EgressPolicy) -> Result<(), CallError> {
        self.call("set_policy", move |privd, context| {
            let request = SetPolicy {
                tap: tap.clone(),
                policy: policy.clone(),
            };
            async move { privd.set_policy(context, request).await }
        })
        .await
    }

    /// The counters of the network behind a tap; see [`roost_common::privd::Privd::network_counters`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn network_counters(&self, tap: PassedFd) -> Result<NetworkCounters, CallError> {
        self.call("network_counters", move |privd, context| {
            let request = ReadCounters { tap: tap.clone() };
            async move { privd.network_counters(context, request).await }
        })
        .await
    }

    /// Bytes from and to the network behind a tap, whatever became of them; see
    /// [`roost_common::privd::Privd::network_counters`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn network_bytes(&self, tap: PassedFd) -> Result<u64, CallError> {
        let rules = self.network_counters(tap).await?.rules;
        Ok(rules.iter().map(|rule| rule.bytes).fold(0, u64::saturating_add))
    }

    /// All kernel objects of ours; see [`roost_common::privd::Privd::inventory`]. What is made or removed meanwhile may be missing, or
    /// there twice.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn inventory(&self) -> Result<Vec<InventoryRow>, CallError> {
        let (mut rows, mut next) = (Vec::new(), Some(InventoryCursor::default()));
        while let Some(cursor) = next {
            let page = self.call("inventory", move |privd, context| async move {
                privd.inventory(context, cursor).await
            });
            let page = page.await?;
            rows.extend(page.rows);
            next = page.next;
        }
        Ok(rows)
    }

    async fn call<T, F>(&self, verb: &'static str, attempt: impl Fn(PrivdClient, Context) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Result<T, PrivdError>, RpcError>>,
    {
        let _permit = self.calls.acquire().await.expect("never closed");
        self.timings.of(verb, self.call_until_answered(verb, attempt)).await
    }

    async fn call_until_answered<T, F>(
        &self,
        verb: &'static str,
        attempt: impl Fn(PrivdClient, Context) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<Result<T, PrivdError>, RpcError>>,
    {
        let mut retried = false;
        loop {
            let privd = self.connected().await?;
            let mut context = tarpc::context::current();
            context.deadline = Instant::now() + CALL_LIMIT;
            let outcome = match attempt(privd, context).await {
                Ok(_) if failpoint::loses(verb) => Err(RpcError::Shutdown),
                outcome => outcome,
            };
            match outcome {
                Ok(outcome) => return outcome.map_err(|source| CallError::Refused { verb, source }),
                Err(RpcError::Shutdown | RpcError::Channel(_) | RpcError::Send(_)) if !retried => {
                    tracing::warn!(op = verb, "connection to privd lost, calling again");
                    *self.connection.lock().await = None;
                    retried = true;
                }
                Err(source) => {
                    *self.connection.lock().await = None;
                    return Err(CallError::Lost { verb, source });
                }
            }
        }
    }

    async fn connected(&self) -> Result<PrivdClient, CallError> {
        let mut connection = self.connection.lock().await;
        if let Some(privd) = &*connection {
            return Ok(privd.clone());
        }
        let path = self.path.clone();
        let failed = |source| CallError::Connect {
            path: self.path.clone(),
            source,
        };
        let socket = tokio::task::spawn_blocking(move || connect_packets(&path, Credentials::NotWanted))
            .await
            .expect("connecting does not panic")
            .map_err(failed)?;
        let transport = PrivdClientTransport::new(socket).map_err(failed)?;
        let privd = PrivdClient::new(client::Config::default(), transport).spawn();
        *connection = Some(privd.clone());
        Ok(privd)
    }
}

/// Whether packets should come with who sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Credentials {
    /// `SO_PASSCRED`, set before connecting, so that the first packet has them too.
    Wanted,
    /// Without.
    NotWanted,
}

/// Connects a SEQPACKET socket and makes it non-blocking. Blocks for at most ten seconds, while the listener's backlog is full.
pub(super) fn connect_packets(path: &Path, credentials: Credentials) -> io::Result<OwnedFd> {
    let address = UnixAddr::new(path)?;
    let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    if credentials == Credentials::Wanted {
        setsockopt(&connection, sockopt::PassCred, &true)?;
    }
    setsockopt(&connection, sockopt::SendTimeout, &TimeVal::new(10, 0))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&connection), &address)?;
    nix::fcntl::fcntl(
        &connection,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )?;
    Ok(connection)
}

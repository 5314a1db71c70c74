//! Connections of a guest's that are judged by the name they ask for.
//!
//! Rules in the sandbox's namespace lead what its guest sends to port 80 or 443 of a server outside of its ranges to the host's end of its
//! veth pair, where this listens. A connection says whom it wants (TLS: the server's name in the first message; HTTP: the host of each
//! request), and is led to what that name resolves to *here*: the address that the guest meant is not looked at, so a name that it made up
//! opens nothing, and neither does an address that the name once had. TLS is passed on as it is, unread behind its first message.
//!
//! Holds: what a guest says is read to a bound, in a bounded time, by rustls' and hyper's own parsers; a connection lives no longer than
//! its policy permits its name; where a name leads to a closed or denied address or to this host itself, nothing is connected.
//! Known and left: a server that is permitted may serve other names too, on connections whose inside nobody here can read.

mod http;
mod tls;

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use nix::sys::socket::{setsockopt, sockopt};
use roost_common::ids::SandboxId;
use roost_common::net::{PROXY_HTTP, PROXY_TLS, SlotAddresses, is_closed};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::{Egress, name};
use crate::errors::Chain;
use crate::sandbox::unix_now;
use crate::serve;

/// Most connections of one sandbox at a time, and of all of them.
const MAX_CONNECTIONS: usize = 128;
static PLACES: Semaphore = Semaphore::const_new(4096);
/// How long a guest may take to say whom it wants.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a name may take to be resolved, and a server to answer.
const RESOLVE_LIMIT: Duration = Duration::from_secs(10);
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// Most addresses of a name that are tried.
const MAX_DIALS: usize = 4;
/// Most refused names that are remembered.
const MAX_REMEMBERED: usize = 32;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 64;

/// Why a guest's connection leads nowhere.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// It does not speak the port's protocol, or not in time.
    #[error("it asks for no server: {0}")]
    Unreadable(&'static str),
    /// The policy does not have it.
    #[error("the sandbox's policy does not list it")]
    NotListed,
    /// Nobody knows the name.
    #[error("the name was not resolved")]
    Unresolved(#[source] io::Error),
    /// It leads where no guest may go.
    #[error("the name leads to no public address that the policy permits")]
    Closed,
    /// Nobody is there.
    #[error("the server was not reached")]
    Unreached(#[source] io::Error),
    /// The sandbox, or all of them, have as many as they may.
    #[error("too many connections by name are open")]
    TooMany,
}

/// What became of a sandbox's connections by name.
#[derive(Debug, Default)]
pub struct Tally(Mutex<Counts>);

/// Counts since the agent took the sandbox over.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Connections and requests that were led to their server.
    pub passed: u64,
    /// Those that were not.
    pub refused: u64,
    /// The last ones of those, the latest first.
    pub last: VecDeque<Refused>,
}

/// A name, as a guest has asked for it, that led nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The name; empty where none could be read.
    pub name: String,
    /// Why.
    pub why: String,
    /// How often in a row of all that are remembered.
    pub times: u64,
    /// The last time, in seconds since 1970.
    pub at_unix: i64,
}

impl Tally {
    /// The counts so far.
    pub fn counts(&self) -> Counts {
        self.0.lock().expect("nothing panics while it holds this").clone()
    }

    fn passed(&self) {
        self.0.lock().expect("nothing panics while it holds this").passed += 1;
    }

    fn refused(&self, name: &str, refusal: &Refusal) {
        let why = Chain(refusal).to_string();
        let mut counts = self.0.lock().expect("nothing panics while it holds this");
        counts.refused += 1;
        let at = counts
            .last
            .iter()
            .position(|known| known.name == name && known.why == why);
        let known = at.and_then(|at| counts.last.remove(at));
        counts.last.push_front(Refused {
            times: known.map_or(0, |known| known.times) + 1,
            name: name.to_owned(),
            why,
            at_unix: unix_now(),
        });
        counts.last.truncate(MAX_REMEMBERED);
    }
}

/// Leads to a server: a permitted name, its port, and the policy.
type Lead = dyn Fn(String, u16, Arc<Egress>) -> BoxFuture<'static, Result<TcpStream, Refusal>> + Send + Sync;

/// What all connections of a sandbox share.
#[derive(Clone)]
struct Way {
    sandbox: SandboxId,
    policy: watch::Receiver<Arc<Egress>>,
    tally: Arc<Tally>,
    places: Arc<Semaphore>,
    lead: Arc<Lead>,
    /// Its sender goes with the listeners.
    serving: watch::Receiver<()>,
}

/// The listeners of a sandbox and all of its connections; dropping it ends them.
#[derive(Debug)]
pub(crate) struct ByName {
    _tasks: JoinSet<()>,
    /// For what has tasks of its own.
    _serving: watch::Sender<()>,
}

impl ByName {
    /// Listens at the host's end of a slot's veth pair, whether or not that is there yet.
    ///
    /// # Errors
    /// When somebody else listens there.
    pub(crate) fn start(
        sandbox: SandboxId,
        addresses: &SlotAddresses,
        policy: watch::Receiver<Arc<Egress>>,
        tally: Arc<Tally>,
    ) -> io::Result<Self> {
        let listeners = [
            (listen(addresses.veth_host, PROXY_TLS)?, Protocol::Tls),
            (listen(addresses.veth_host, PROXY_HTTP)?, Protocol::Http),
        ];
        let lead: Arc<Lead> = Arc::new(|name, port, policy| Box::pin(lead(name, port, policy)));
        let (alive, serving) = watch::channel(());
        let way = Way {
            sandbox,
            policy,
            tally,
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            lead,
            serving,
        };
        Ok(Self::on(listeners, addresses.veth_namespace, &way, alive))
    }

    fn on(listeners: [(TcpListener, Protocol); 2], guest: Ipv4Addr, way: &Way, serving: watch::Sender<()>) -> Self {
        let mut tasks = JoinSet::new();
        for (listener, protocol) in listeners {
            tasks.spawn(accept(listener, protocol, guest, way.clone()));
        }
        Self {
            _tasks: tasks,
            _serving: serving,
        }
    }
}

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy)]
enum Protocol {
    Tls,
    Http,
}

fn listen(address: Ipv4Addr, port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    // The network is made while its sandbox is, and made anew at each resume.
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    socket.bind(SocketAddrV4::new(address, port).into())?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, protocol: Protocol, guest: Ipv4Addr, way: Way) {
    let mut connections = JoinSet::new();
    loop {
        // What has ended is forgotten.
        while connections.try_join_next().is_some() {}
        let (stream, peer) = serve::accept(&listener).await;
        // The host's own programs reach it too; it is no way out for them.
        if peer.ip() != IpAddr::V4(guest) {
            continue;
        }
        let places = (way.places.clone().try_acquire_owned(), PLACES.try_acquire());
        let (Ok(place), Ok(hosts_place)) = places else {
            way.tally.refused("", &Refusal::TooMany);
            continue;
        };
        let way = way.clone();
        connections.spawn(async move {
            // Held to the connection's end.
            let _places: (OwnedSemaphorePermit, _) = (place, hosts_place);
            match protocol {
                Protocol::Tls => tls::serve(stream, way).await,
                Protocol::Http => http::serve(stream, way).await,
            }
        });
    }
}

impl Way {
    /// Leads to the server that a guest asks for, and counts what became of that.
    async fn follow(&self, name: &str, port: u16) -> Result<TcpStream, Refusal> {
        let outcome = self.try_follow(name, port).await;
        match &outcome {
            Ok(_) => self.tally.passed(),
            Err(refusal) => self.refuse(name, refusal),
        }
        outcome
    }

    async fn try_follow(&self, name: &str, port: u16) -> Result<TcpStream, Refusal> {
        let policy = self.policy.borrow().clone();
        let host = name.strip_suffix('.').unwrap_or(name);
        name::check(host).map_err(|_| Refusal::Unreadable("it is no name of a host"))?;
        if !policy.permits(host) {
            return Err(Refusal::NotListed);
        }
        (self.lead)(host.to_ascii_lowercase(), port, policy).await
    }

    fn refuse(&self, name: &str, refusal: &Refusal) {
        tracing::debug!(sandbox_id = %self.sandbox, name, error = %Chain(refusal), "refused by name");
        self.tally.refused(name, refusal);
    }

    /// Waits until a name, or where it led to, may be reached no more, or nobody is served any more.
    async fn ends(&self, name: &str, server: Option<Ipv4Addr>) {
        let (mut policy, mut serving) = (self.policy.clone(), self.serving.clone());
        let is_denied = |policy: &Egress| server.is_some_and(|server| policy.denies(server));
        tokio::select! {
            // A sandbox that has gone permits nothing.
            _ = policy.wait_for(|policy| !policy.permits(name) || is_denied(policy)) => {}
            // Nothing is ever sent.
            _ = serving.changed() => {}
        }
    }
}

/// Where a connection leads; `None` where it has ended already.
fn address_of(server: &TcpStream) -> Option<Ipv4Addr> {
    match server.peer_addr().ok()?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// Connects to what a name resolves to.
async fn lead(name: String, port: u16, policy: Arc<Egress>) -> Result<TcpStream, Refusal> {
    let found = tokio::time::timeout(RESOLVE_LIMIT, tokio::net::lookup_host((name, port))).await;
    let found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let found: Vec<SocketAddr> = found.map_err(Refusal::Unresolved)?.collect();
    let mut outcome = Err(Refusal::Closed);
    let public = found.into_iter().filter_map(|address| match address {
        SocketAddr::V4(address) => Some(address),
        SocketAddr::V6(_) => None,
    });
    for address in public
        .filter(|address| is_permitted(*address.ip(), &policy))
        .take(MAX_DIALS)
    {
        if is_this_host(address).await {
            continue;
        }
        let dialled = tokio::time::timeout(DIAL_LIMIT, TcpStream::connect(address)).await;
        match dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                // Best effort: it is slower without.
                drop(stream.set_nodelay(true));
                return Ok(stream);
            }
            Err(error) => outcome = Err(Refusal::Unreached(error)),
        }
    }
    outcome
}

fn is_permitted(address: Ipv4Addr, policy: &Egress) -> bool {
    !is_closed(address) && !policy.denies(address)
}

/// Whether an address is one of this host's own: the kernel sends to those from themselves. Nothing is sent to find out; what cannot be
/// found out is taken for it.
async fn is_this_host(address: SocketAddrV4) -> bool {
    let source = async {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        socket.connect(address).await?;
        socket.local_addr()
    };
    source
        .await
        .map_or(true, |source| source.ip() == IpAddr::V4(*address.ip()))
}

/// For [`crate::fuzz`]: whether the first bytes of a connection name a server, and what it is then.
#[cfg(any(test, fuzzing))]
pub(crate) fn judge_hello(mut bytes: &[u8]) -> bool {
    let whole = bytes;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    match runtime.block_on(tls::hello(&mut bytes)) {
        Ok((name, seen)) => {
            // What is passed on is what came.
            assert!(whole.starts_with(&seen) && !name.is_empty());
            true
        }
        Err(refusal) => {
            assert!(matches!(refusal, Refusal::Unreadable(_)), "{refusal}");
            false
        }
    }
}

#[cfg(test)]
mod tests;

//! The proxied connections of one incarnation of a guest: how many there are, which are idle, and when they end.
//!
//! A [`Guest`](crate::guest::Guest) owns one [`Connections`], so none is used again across a pause, a boot or a slot: what runs after is
//! another guest with connections of its own, and the end of a guest ends all of its own. Each connection is one task, which owns its
//! socket and drops it as soon as its *epoch* has ended, whatever else is waiting for what: nothing here is asked to end, and may not.
//!
//! ```text
//! enter --> Call --> dial or take --> Upstream --> keep (idle, at most IDLE_LIMIT) --> take ...
//!             |                          '--> a tunnel
//!             '-- refused once a drain has begun; counted until it is dropped
//! ```

use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::MAX_CALLS;
use super::error::ProxyError;
use super::upstream::Upstream;

/// How long a connection is kept that nobody uses: less than most servers keep theirs for, as far as that is known.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// How often those are looked for, while there are any.
const IDLE_PAUSE: Duration = Duration::from_secs(10);
/// Most idle connections of a guest: as many as a busy page's callers have at a time, who would else have one made for most requests.
const MAX_IDLE: usize = 128;
/// How long requests that are under way may take to end once a pause has begun.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// How long sockets may take to be closed: as long as a busy runtime takes to come to it.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// The proxied connections of one guest. Dropping it ends them.
#[derive(Debug)]
pub struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    counts: watch::Sender<Counts>,
    /// Connections of an earlier one than this end. Apart from the counts, which change all the time.
    epoch: watch::Sender<u64>,
    idle: Mutex<Pool>,
}

#[derive(Debug, Clone, Copy)]
struct Counts {
    /// Whether calls are taken.
    is_open: bool,
    requests: usize,
    tunnels: usize,
    sockets: usize,
}

#[derive(Debug, Default)]
struct Pool {
    idle: Vec<Idle>,
    /// Whether somebody looks for those that have been idle for too long.
    is_watched: bool,
}

#[derive(Debug)]
struct Idle {
    port: u16,
    since: Instant,
    upstream: Upstream,
    _place: OwnedSemaphorePermit,
}

impl Default for Connections {
    fn default() -> Self {
        Self(Arc::new(Shared {
            counts: watch::Sender::new(Counts {
                is_open: true,
                requests: 0,
                tunnels: 0,
                sockets: 0,
            }),
            epoch: watch::Sender::new(0),
            idle: Mutex::default(),
        }))
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.0.close();
        self.0.end_epoch();
    }
}

impl Connections {
    /// Takes no call from now on, waits a little for the requests under way, and closes all connections. Until [`Connections::open`].
    pub(crate) async fn drain(&self) {
        let shared = &self.0;
        shared.close();
        let mut counts = shared.counts.subscribe();
        // What is not done by then ends with its connection, and its caller sees that it did.
        drop(tokio::time::timeout(DRAIN_LIMIT, counts.wait_for(|counts| counts.requests == 0)).await);
        shared.end_epoch();
        drop(tokio::time::timeout(CLOSE_LIMIT, counts.wait_for(|counts| counts.sockets == 0)).await);
    }

    /// Takes calls again, after a drain: the guest runs on.
    pub(crate) fn open(&self) {
        self.0.counts.send_modify(|counts| counts.is_open = true);
    }

    /// Begins a call.
    ///
    /// # Errors
    /// [`ProxyError::Draining`], [`ProxyError::TooMany`].
    pub(super) fn enter(&self) -> Result<Call, ProxyError> {
        let mut outcome = Ok(());
        // Before it is counted: a drain that begins between the two ends it.
        let epoch = *self.0.epoch.borrow();
        self.0.counts.send_if_modified(|counts| {
            if !counts.is_open {
                outcome = Err(ProxyError::Draining);
            } else if counts.requests + counts.tunnels >= MAX_CALLS {
                outcome = Err(ProxyError::TooMany);
            } else {
                counts.requests += 1;
            }
            outcome.is_ok()
        });
        outcome.map(|()| Call {
            shared: self.0.clone(),
            epoch,
            is_tunnel: false,
        })
    }
}

impl Shared {
    /// Held for moments.
    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.idle.lock().expect("nothing panics while it holds this")
    }

    fn close(&self) {
        self.counts.send_modify(|counts| counts.is_open = false);
        self.lock().idle.clear();
    }

    fn end_epoch(&self) {
        self.epoch.send_modify(|epoch| *epoch += 1);
        self.lock().idle.clear();
    }

    fn is_over(&self, epoch: u64) -> bool {
        *self.epoch.borrow() != epoch
    }
}

/// A request or a tunnel that is under way.
#[derive(Debug)]
pub(super) struct Call {
    shared: Arc<Shared>,
    epoch: u64,
    is_tunnel: bool,
}

impl Call {
    /// It goes on as a tunnel, which no drain waits for.
    pub(super) fn becomes_tunnel(&mut self) {
        self.is_tunnel = true;
        self.shared.counts.send_modify(|counts| {
            counts.requests -= 1;
            counts.tunnels += 1;
        });
    }

    /// Counts a socket, for as long as what this returns lives.
    pub(super) fn opens_socket(&self) -> Socket {
        self.shared.counts.send_modify(|counts| counts.sockets += 1);
        Socket(self.shared.clone())
    }

    /// Waits until the connections of its time must be closed.
    pub(super) fn is_over(&self) -> impl Future<Output = ()> + Send + use<> {
        let (mut seen, epoch) = (self.shared.epoch.subscribe(), self.epoch);
        async move {
            // A sender that is dropped is over too.
            drop(seen.wait_for(|now| *now != epoch).await);
        }
    }

    /// An idle connection to a port.
    pub(super) fn take(&self, port: u16) -> Option<Upstream> {
        let mut pool = self.shared.lock();
        // The one that was used last: the others may end.
        while let Some(at) = pool.idle.iter().rposition(|idle| idle.port == port) {
            let idle = pool.idle.remove(at);
            if idle.upstream.is_usable() {
                return Some(idle.upstream);
            }
        }
        None
    }

    /// Where a connection of this call's may be kept once it is idle.
    pub(super) fn home(&self) -> Home {
        Home {
            shared: Arc::downgrade(&self.shared),
            epoch: self.epoch,
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let is_tunnel = self.is_tunnel;
        self.shared.counts.send_modify(|counts| {
            let count = if is_tunnel {
                &mut counts.tunnels
            } else {
                &mut counts.requests
            };
            *count -= 1;
        });
    }
}

/// A socket that is open, or about to be.
#[derive(Debug)]
pub(super) struct Socket(Arc<Shared>);

impl Drop for Socket {
    fn drop(&mut self) {
        self.0.counts.send_modify(|counts| counts.sockets -= 1);
    }
}

/// Where idle connections of one epoch are kept.
#[derive(Debug)]
pub(super) struct Home {
    shared: Weak<Shared>,
    epoch: u64,
}

impl Home {
    /// Keeps a connection until it is used again, or has been idle for too long; or closes it, where there are enough or its time is over.
    pub(super) fn keep(&self, upstream: Upstream, port: u16, place: OwnedSemaphorePermit) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut pool = shared.lock();
        // Under the lock, which whoever closes them takes after it has said so.
        let is_open = shared.counts.borrow().is_open && !shared.is_over(self.epoch);
        if !is_open || pool.idle.len() >= MAX_IDLE {
            return;
        }
        pool.idle.push(Idle {
            port,
            since: Instant::now(),
            upstream,
            _place: place,
        });
        if !std::mem::replace(&mut pool.is_watched, true) {
            tokio::spawn(watch_idle(self.shared.clone()));
        }
    }
}

/// Closes what has been idle for too long, until nothing is idle.
async fn watch_idle(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(IDLE_PAUSE).await;
        let Some(shared) = shared.upgrade() else { return };
        let mut pool = shared.lock();
        pool.idle
            .retain(|idle| idle.since.elapsed() < IDLE_LIMIT && idle.upstream.is_usable());
        if pool.idle.is_empty() {
            pool.is_watched = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_refuses_what_comes_waits_for_what_is_there_and_then_ends_it() {
        let connections = Connections::default();
        let request = connections.enter().expect("open");
        let mut tunnel = connections.enter().expect("open");
        tunnel.becomes_tunnel();
        let began = Instant::now();
        let drain = connections.drain();
        let refused = async {
            tokio::task::yield_now().await;
            assert!(matches!(connections.enter(), Err(ProxyError::Draining)));
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(request);
        };
        tokio::join!(drain, refused);
        let over = tunnel.is_over();
        over.await;
        assert_eq!(began.elapsed().as_secs(), 1, "it waits for requests, and for no tunnel");
        assert!(matches!(connections.enter(), Err(ProxyError::Draining)));

        connections.open();
        let late = connections.enter().expect("open again");
        let socket = late.opens_socket();
        let (began, over) = (Instant::now(), late.is_over());
        let close = async {
            over.await;
            drop(socket);
        };
        tokio::join!(connections.drain(), close);
        assert_eq!(
            began.elapsed().as_secs(),
            DRAIN_LIMIT.as_secs(),
            "it waits for no request for longer"
        );
    }

    #[tokio::test]
    async fn the_end_of_a_guest_ends_its_connections() {
        let connections = Connections::default();
        let call = connections.enter().expect("open");
        drop(connections);
        call.is_over().await;
        assert!(call.take(80).is_none());
    }

    #[test]
    fn a_guest_has_so_many_calls_and_no_more() {
        let connections = Connections::default();
        let mut calls: Vec<Call> = (0..MAX_CALLS).map(|_| connections.enter().expect("open")).collect();
        calls[0].becomes_tunnel();
        assert!(matches!(connections.enter(), Err(ProxyError::TooMany)));
        calls.truncate(MAX_CALLS - 1);
        connections.enter().expect("one has gone");
        drop(calls);
        let counts = *connections.0.counts.borrow();
        assert_eq!((counts.requests, counts.tunnels, counts.sockets), (0, 0, 0));
    }
}

//! The socket: who may speak, how much at a time, and the five verbs behind it.
//!
//! Holds: a peer is judged by its uid before a byte of its is read; a call, once begun, runs to its end on a blocking thread
//! whatever becomes of its caller, and what it made for a caller that is gone is dropped, which removes it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::time::Instant;

use futures::{StreamExt, TryStreamExt};
use roost_common::ipc::IpcError;
use roost_common::privd::{
    Disk, InventoryCursor, InventoryPage, Network, NetworkCounters, OpenDisk, OpenNetwork, Privd, PrivdError,
    PrivdServerTransport, ReadCounters, SetPolicy, Step,
};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::audit::Entry;
use crate::check::{self, DiskSpec, Limits, NetworkSpec, Peer};
use crate::inventory;
use crate::kernel::{at, dm, netns};

/// Most connections at a time. The agent has one; others of its uid are its command line and its successor.
const MAX_CONNECTIONS: usize = 16;
/// Most calls at work at a time, over all connections; the rest wait their turn.
pub(crate) const MAX_WORKING: usize = 8;

/// Accepts connections of `uid` until the task is dropped.
///
/// # Errors
/// When the listener cannot be watched, or accepting fails for good.
pub(crate) async fn serve(listener: StdListener, uid: u32, limits: Limits) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let work = Arc::new(Semaphore::new(MAX_WORKING));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // The peer gave up first.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        let Ok(credentials) = stream.peer_cred() else {
            tracing::warn!("refused a connection: nobody knows whose it is");
            continue;
        };
        let peer = Peer {
            uid: credentials.uid(),
            pid: credentials.pid().unwrap_or(0),
        };
        if peer.uid != uid {
            tracing::warn!(
                peer_uid = peer.uid,
                peer_pid = peer.pid,
                "refused a connection: not the permitted uid"
            );
            continue;
        }
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            tracing::warn!(
                peer_uid = peer.uid,
                peer_pid = peer.pid,
                "refused a connection: too many are open"
            );
            continue;
        };
        let session = Session {
            peer,
            limits,
            work: Arc::clone(&work),
        };
        tokio::spawn(async move {
            if let Err(error) = session.run(stream).await {
                tracing::warn!(peer_pid = peer.pid, %error, "cannot serve a connection");
            }
            drop(permit);
        });
    }
}

/// One connection.
#[derive(Clone)]
struct Session {
    peer: Peer,
    limits: Limits,
    work: Arc<Semaphore>,
}

impl Session {
    /// Serves the connection to its end. A message that does not decode, or breaks a rule, is the end.
    async fn run(self, stream: UnixStream) -> io::Result<()> {
        let transport = PrivdServerTransport::new(stream.into_std()?.into())?;
        let Peer { uid, pid } = self.peer;
        let transport = transport.inspect_err(move |error| match error {
            IpcError::Closed => tracing::debug!(peer_uid = uid, peer_pid = pid, "a connection is closed"),
            error => tracing::warn!(peer_uid = uid, peer_pid = pid, %error, "ended a connection"),
        });
        let channel = BaseChannel::with_defaults(transport);
        let calls = channel.execute(self.serve());
        calls.for_each(|call| async { drop(tokio::spawn(call)) }).await;
        Ok(())
    }

    /// Runs `work` on a blocking thread to its end, even if the caller, and with it this future, goes away; then writes the
    /// call's line. Waits its turn when [`MAX_WORKING`] calls are at work; a caller that goes away while it waits has done nothing.
    async fn run_to_completion<T: Send + 'static>(
        self,
        mut entry: Entry,
        work: impl FnOnce(&Self, &mut Entry) -> Result<T, PrivdError> + Send + 'static,
    ) -> Result<T, PrivdError> {
        let turn = Arc::clone(&self.work).acquire_owned().await;
        let turn = turn.expect("the semaphore is never closed");
        let done = tokio::task::spawn_blocking(move || {
            // Held by the work, not by the future: a peer that cancels calls cannot pile up threads.
            let _turn: OwnedSemaphorePermit = turn;
            let started = Instant::now();
            let outcome = work(&self, &mut entry);
            entry.write(self.peer, outcome.as_ref().map(|_| ()), started.elapsed());
            outcome
        });
        done.await
            .expect("blocking work is never aborted, and a panic ends the process")
    }
}

impl Privd for Session {
    async fn open_disk(self, context: Context, request: OpenDisk) -> Result<Disk, PrivdError> {
        let entry = Entry::new("open_disk", &context)
            .with("sandbox_id", &request.sandbox)
            .with("sectors", request.size.0)
            .with("owner", request.owner);
        self.run_to_completion(entry, |session, entry| {
            let spec = DiskSpec::check(&session.limits, session.peer, request)?;
            entry.add("image", format_args!("{}:{}", spec.image.device, spec.image.inode));
            let kernel = dm::RealKernel::open().map_err(at(Step::ListDevices))?;
            let limits = &session.limits;
            let existing = kernel.count_disks(limits.disks).map_err(at(Step::ListDevices))?;
            check::room_for_a_disk(limits, existing)?;
            let disk = dm::open_snapshot(&kernel, &spec)?;
            entry.add("node", disk.node);
            Ok(Disk {
                node: disk.node,
                device: disk.device.into(),
            })
        })
        .await
    }

    async fn open_network(self, context: Context, request: OpenNetwork) -> Result<Network, PrivdError> {
        let entry = Entry::new("open_network", &context)
            .with("slot", request.slot)
            .with_policy(&request.policy);
        self.run_to_completion(entry, |_, _| {
            let network = netns::open(&NetworkSpec::check(request)?)?;
            Ok(Network {
                tap: network.tap.into(),
                addresses: network.addresses,
            })
        })
        .await
    }

    async fn set_policy(self, context: Context, request: SetPolicy) -> Result<(), PrivdError> {
        let entry = Entry::new("set_policy", &context).with_policy(&request.policy);
        self.run_to_completion(entry, move |_, _| {
            let policy = check::policy(request.policy)?;
            netns::set_policy(request.tap.as_fd(), &policy)
        })
        .await
    }

    async fn network_counters(self, context: Context, request: ReadCounters) -> Result<NetworkCounters, PrivdError> {
        self.run_to_completion(Entry::looking("network_counters", &context), move |_, _| {
            netns::counters(request.tap.as_fd())
        })
        .await
    }

    async fn inventory(self, context: Context, cursor: InventoryCursor) -> Result<InventoryPage, PrivdError> {
        let entry = Entry::looking("inventory", &context).with("cursor", cursor.0);
        self.run_to_completion(entry, move |_, entry| {
            let page = inventory::page(cursor)?;
            entry.add("rows", page.rows.len());
            Ok(page)
        })
        .await
    }
}

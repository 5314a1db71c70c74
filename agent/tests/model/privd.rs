//! A privd whose disks and networks are files. What it makes lives by the descriptors that it hands out, as the real one's does.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use roost_common::ipc::PassedFd;
use roost_common::names;
use roost_common::net::SlotAddresses;
use roost_common::privd::{
    Disk, DiskNode, InventoryCursor, InventoryPage, InventoryRow, Network, NetworkCounters, OpenDisk, OpenNetwork,
    Privd, PrivdError, PrivdServerTransport, ReadCounters, ResourceKind, Rule, RuleCounter, SetPolicy, Step,
};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::dice::Fault;
use crate::world::{World, listening};

/// How long a name that is in use is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves for as long as the runtime lives.
pub(crate) async fn serve(world: Arc<World>) {
    let listener = listening(&world.privd);
    loop {
        let (stream, _) = listener.accept().await.expect("accepted");
        let stream = stream.into_std().expect("taken out of the runtime");
        let transport = PrivdServerTransport::new(stream.into()).expect("registered");
        let session = Session {
            world: world.clone(),
            broken: Arc::default(),
        };
        tokio::spawn(async move {
            let broken = session.broken.clone();
            let calls = BaseChannel::with_defaults(transport).execute(session.serve());
            tokio::select! {
                () = calls.for_each_concurrent(None, |call| call) => {}
                // With all calls that are under way, and the descriptors in their answers.
                () = broken.notified() => {}
            }
        });
    }
}

#[derive(Clone)]
struct Session {
    world: Arc<World>,
    /// The connection is to end.
    broken: Arc<Notify>,
}

impl Session {
    /// One call, and what goes wrong with it.
    async fn answer<T>(self, work: impl Future<Output = Result<T, PrivdError>>) -> Result<T, PrivdError> {
        let outcome = match self.world.called().await {
            Fault::None => return work.await,
            Fault::Refuse => {
                return Err(PrivdError::Kernel {
                    step: Step::CreateSnapshot,
                    errno: nix::libc::ENOMEM,
                });
            }
            Fault::Hang => None,
            Fault::DoAndHang => Some(work.await),
            Fault::Lose => {
                let outcome = work.await;
                self.broken.notify_one();
                Some(outcome)
            }
            Fault::Die => {
                self.broken.notify_one();
                None
            }
        };
        // Held until the caller's deadline, or the end of the connection.
        std::future::pending::<()>().await;
        drop(outcome);
        unreachable!("nobody waits for ever")
    }

    /// Makes something under a name that may still be in use.
    async fn make<T>(&self, what: ResourceKind, make: impl Fn() -> Option<T>) -> Result<T, PrivdError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match make() {
                Some(made) => return Ok(made),
                None if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(20)).await,
                None => return Err(PrivdError::Busy { what }),
            }
        }
    }
}

/// A file of a request, as the kernel has it: a reference of its own to what is open.
fn file(descriptor: &PassedFd) -> File {
    File::from(descriptor.as_fd().try_clone_to_owned().expect("duplicated"))
}

impl Privd for Session {
    async fn open_disk(self, _: Context, request: OpenDisk) -> Result<Disk, PrivdError> {
        let session = self.clone();
        self.answer(async move {
            let made = session.make(ResourceKind::Disk, || {
                let files = (file(&request.origin), file(&request.cow));
                let dir = session.world.path("tmp");
                let mut inner = session.world.lock();
                inner.make_disk(&dir, &request.sandbox, files, request.size.bytes().0)
            });
            let (minor, device) = made.await?;
            Ok(Disk {
                node: DiskNode { minor },
                device: device.into(),
            })
        })
        .await
    }

    async fn open_network(self, _: Context, request: OpenNetwork) -> Result<Network, PrivdError> {
        let session = self.clone();
        self.answer(async move {
            let slot = request.slot;
            let made = session.make(ResourceKind::Network, || {
                let dir = session.world.path("tmp");
                let policy = request.policy.clone();
                session.world.lock().make_network(&dir, slot, policy)
            });
            let made = made.await;
            if made.is_err() {
                session
                    .world
                    .wrong(format!("slot {slot} was to be used while it was in use"));
            }
            Ok(Network {
                tap: made?.into(),
                addresses: SlotAddresses::of(slot),
            })
        })
        .await
    }

    async fn set_policy(self, _: Context, request: SetPolicy) -> Result<(), PrivdError> {
        let world = self.world.clone();
        self.answer(async move {
            let mut inner = world.lock();
            match inner.network_of(&file(&request.tap)) {
                Some(network) => network.policy = request.policy,
                None => inner.wrong.push("a policy was to be set of what is no tap".into()),
            }
            Ok(())
        })
        .await
    }

    async fn network_counters(self, _: Context, request: ReadCounters) -> Result<NetworkCounters, PrivdError> {
        let world = self.world.clone();
        self.answer(async move {
            let mut inner = world.lock();
            let is_ours = inner.network_of(&file(&request.tap)).is_some();
            if !is_ours {
                inner.wrong.push("counters were asked of what is no tap".into());
            }
            let rules = vec![RuleCounter {
                network: None,
                rule: Rule::Internet,
                packets: 1,
                bytes: inner.dice.roll(1 << 10),
            }];
            Ok(NetworkCounters { rules })
        })
        .await
    }

    async fn inventory(self, _: Context, _: InventoryCursor) -> Result<InventoryPage, PrivdError> {
        let world = self.world.clone();
        self.answer(async move {
            let mut inner = world.lock();
            inner.collect();
            let rows = inner.disks.iter().map(|disk| InventoryRow::Device {
                name: names::disk(&disk.id),
                node: DiskNode { minor: disk.minor },
                open_count: 1,
                status: "16/4096 8".into(),
            });
            Ok(InventoryPage {
                rows: rows.collect(),
                next: None,
            })
        })
        .await
    }
}

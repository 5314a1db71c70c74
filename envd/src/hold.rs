//! Holding the guest's programs over a snapshot: from before it is taken until the guest that wakes is told who it is.
//!
//! A guest that wakes has the clock and the random generator of the snapshot until `/init` has set them, and several may
//! wake from one. A program that ran before would draw the numbers that its twin draws.
//!
//! Holds: while programs are held, none is started; a start waits for the release, on no thread.
//! Not here: how programs are stopped (`cgroups`), what else a snapshot needs (`filesystems`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::guest::Held;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::cgroups::{CgroupError, Cgroups};
use crate::console::{chain, say};
use crate::guest::Machine;

/// How long programs have to stop. They do at once, but for those that wait in the kernel for a disk or a network.
const PATIENCE: Duration = Duration::from_secs(2);

/// The programs of the machine, as far as they are held.
#[derive(Default)]
pub(crate) struct Hold {
    starts: watch::Sender<Starts>,
    /// `None` where programs cannot be stopped, or are not ours.
    cgroups: Option<Arc<Cgroups>>,
}

#[derive(Default)]
struct Starts {
    held: bool,
    under_way: usize,
}

/// One start that is under way; programs are not held before it has gone.
pub(crate) struct Start(Arc<Hold>);

impl Hold {
    pub(crate) fn of(machine: Machine) -> Self {
        let cgroups = match machine {
            Machine::Borrowed => None,
            Machine::Own => match Cgroups::of_machine() {
                Ok(cgroups) => Some(Arc::new(cgroups)),
                Err(error) => {
                    say!("programs will run while snapshots are taken: {}", chain(&error));
                    None
                }
            },
        };
        Self {
            starts: watch::Sender::default(),
            cgroups,
        }
    }

    /// Waits until programs may be started.
    pub(crate) async fn start(self: &Arc<Self>) -> Start {
        let mut starts = self.starts.subscribe();
        loop {
            // The sender is ours: no error.
            starts.wait_for(|starts| !starts.held).await.ok();
            let admitted = self.starts.send_if_modified(|starts| {
                if !starts.held {
                    starts.under_way += 1;
                }
                !starts.held
            });
            if admitted {
                return Start(Arc::clone(self));
            }
        }
    }

    /// Waits until programs may run. For work that writes to disks and can wait: begun while these are frozen, it would
    /// take a thread until they thaw.
    pub(crate) async fn released(&self) {
        // The sender is ours: no error.
        self.starts.subscribe().wait_for(|starts| !starts.held).await.ok();
    }

    /// Stops all programs; may be repeated. To be run to its end: a caller that leaves it must call [`Hold::release`].
    ///
    /// What cannot be stopped in time is said and passed over, because a snapshot is whole all the same: its memory and its
    /// disk agree. Whoever means to wake it more than once is told by the answer. All but the programs that could not be
    /// moved are told to stop even then, and run no instruction of their own after the call that they wait in.
    pub(crate) async fn hold(&self) -> Held {
        self.starts.send_modify(|starts| starts.held = true);
        let mut starts = self.starts.subscribe();
        // Between fork and exec a child is still in the root. A start in a directory on a dead network never comes back.
        let idle = timeout(PATIENCE, starts.wait_for(|starts| starts.under_way == 0))
            .await
            .is_ok();
        let Some(cgroups) = self.cgroups.clone() else {
            return Held::None;
        };
        let stopped = spawn_blocking(move || {
            cgroups.leave()?;
            cgroups.freeze(Instant::now() + PATIENCE)
        });
        match stopped.await.expect("stopping programs does not panic") {
            Ok(()) if idle => Held::All,
            Ok(()) => {
                say!("programs held, but one was being started all the while");
                Held::Some
            }
            Err(error) => {
                say!("programs held, but perhaps not all: {}", chain(&error));
                Held::Some
            }
        }
    }

    /// Lets all programs go on; may be repeated.
    ///
    /// # Errors
    /// [`CgroupError::Thaw`]: some are still stopped. Programs can be started.
    pub(crate) async fn release(&self) -> Result<(), CgroupError> {
        let released = match self.cgroups.clone() {
            Some(cgroups) => spawn_blocking(move || cgroups.thaw())
                .await
                .expect("letting programs go on does not panic"),
            None => Ok(()),
        };
        self.starts.send_modify(|starts| starts.held = false);
        released
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.0.starts.send_modify(|starts| starts.under_way -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn starts_wait_while_programs_are_held() {
        let hold = Arc::new(Hold::default());
        assert_eq!(hold.hold().await, Held::None);
        hold.hold().await;
        let mut start = Box::pin(hold.start());
        assert!(start.as_mut().now_or_never().is_none());
        // One that gives up is not counted.
        drop(hold.start().now_or_never());
        hold.release().await.unwrap();
        drop(start.await);
        assert_eq!(hold.starts.borrow().under_way, 0);
        assert!(hold.start().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_start_that_is_under_way_is_waited_for() {
        let hold = Arc::new(Hold::default());
        let start = hold.start().await;
        let mut holding = Box::pin(hold.hold());
        assert!(holding.as_mut().now_or_never().is_none());
        drop(start);
        assert_eq!(holding.await, Held::None);
    }

    #[tokio::test]
    async fn a_start_that_does_not_come_back_is_not_waited_for_for_ever() {
        let hold = Arc::new(Hold::default());
        let _start = hold.start().await;
        assert_eq!(hold.hold().await, Held::None);
        assert!(hold.start().now_or_never().is_none());
    }
}

//! Tells systemd that the agent lives, where its unit asks for that (`WatchdogSec=`).
//!
//! Alive means that a task that was just started gets its turn and can take the registry's lock. An agent whose threads all wait for something,
//! or in which somebody holds that lock, tells nothing, and is ended and started anew; VMs do not notice.
//!
//! Not here: whether sandboxes, privd or the disk do what they should. A slow disk is no reason to end an agent, which would only wait for it again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::registry::Registry;

/// How often in a watchdog's time the agent tells that it lives: one that is told late is not the end.
const TIMES: u32 = 3;

/// Tells it for as long as the process lives; never returns where a watchdog is there, and at once where there is none.
pub async fn run(registry: Arc<Registry>) {
    if let Some(limit) = sd_notify::watchdog_enabled() {
        let look = move || drop(registry.list());
        watch(look, limit / TIMES, tell).await;
    }
}

async fn watch(look: impl Fn() + Clone + Send + 'static, pause: Duration, tell: impl Fn()) {
    let mut ticks = tokio::time::interval(pause);
    // What was missed is not made up for: one that comes late says as much.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let look = look.clone();
        // A task of its own: that it gets its turn is half of what is told.
        if tokio::spawn(async move { look() }).await.is_ok() {
            tell();
        }
    }
}

fn tell() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
        tracing::warn!(%error, "the service manager was not told that the agent lives");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use super::*;

    const PAUSE: Duration = Duration::from_millis(5);

    fn told_until(told: &AtomicUsize, wanted: usize) -> bool {
        let deadline = Instant::now() + Duration::from_secs(30);
        while told.load(Ordering::SeqCst) < wanted && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        told.load(Ordering::SeqCst) >= wanted
    }

    #[test]
    fn an_agent_whose_list_of_sandboxes_cannot_be_had_does_not_say_that_it_lives() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let list = Arc::new(Mutex::new(()));
        let told = Arc::new(AtomicUsize::new(0));
        let (looked_at, count) = (list.clone(), told.clone());
        let look = move || drop(looked_at.lock());
        runtime.spawn(watch(look, PAUSE, move || {
            count.fetch_add(1, Ordering::SeqCst);
        }));
        assert!(told_until(&told, 3), "a healthy agent says that it lives");
        let held = list.lock().expect("a lock");
        // One may have been under way.
        std::thread::sleep(PAUSE * 10);
        let before = told.load(Ordering::SeqCst);
        std::thread::sleep(PAUSE * 40);
        assert_eq!(told.load(Ordering::SeqCst), before, "a stuck agent says that it lives");
        drop(held);
        assert!(told_until(&told, before + 3), "it does not say so again");
        runtime.shutdown_background();
    }
}

//! Heartbeats in simulated time: when they come, what ends them, and what never does.

use std::sync::Arc;
use std::time::Duration;

use roost_agent::config::Config;
use roost_agent::control::heartbeat;
use roost_agent::control::listing::Listing;
use roost_agent::control::standing;
use roost_agent::host::Host;
use roost_agent::registry::Registry;
use tokio::time::Instant;

use crate::plane::{Fate, HEARTBEAT, Plane, TOKEN, store};

/// How long it takes until the agent has it that its host was deleted; `None`: not within `limit`.
async fn deleted_after(plane: &Plane, limit: Duration) -> Option<Duration> {
    let dir = tempfile::tempdir().expect("a directory");
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let (session, listing, began) = (
        plane.session(dir.path()),
        Listing::under_control_plane(),
        Instant::now(),
    );
    plane.lock().is_deleted = true;
    let ended = tokio::time::timeout(limit, heartbeat::run(&session, &listing)).await;
    ended.ok().map(|()| began.elapsed())
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn heartbeats_come_at_once_and_every_30_s() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let (session, listing) = (plane.session(dir.path()), Listing::under_control_plane());
    let times = Arc::new(std::sync::Mutex::new(Vec::new()));
    let began = Instant::now();
    plane.judge({
        let times = times.clone();
        move |_| {
            times.lock().expect("not poisoned").push(began.elapsed().as_secs());
            Fate::Slow(Duration::from_secs(7))
        }
    });
    let ended = tokio::time::timeout(Duration::from_secs(100), heartbeat::run(&session, &listing)).await;
    assert!(ended.is_err());
    assert_eq!(*times.lock().expect("not poisoned"), [0, 30, 60, 90]);
}

#[tokio::test(start_paused = true)]
async fn a_host_is_deleted_once_the_control_plane_has_said_so_for_90_s() {
    let plane = Plane::start().await;
    let after = deleted_after(&plane, HOUR).await.expect("deleted").as_secs();
    assert!((90..=92).contains(&after), "{after} s");
    assert_eq!(plane.answers(HEARTBEAT), [404; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_proxys_404_never_counts() {
    let plane = Plane::start().await;
    plane.judge(|path| {
        if path == HEARTBEAT {
            Fate::Proxy(404)
        } else {
            Fate::Answered
        }
    });
    assert_eq!(deleted_after(&plane, 6 * HOUR).await, None);
    assert!(plane.answers(HEARTBEAT).len() > 500);
}

#[tokio::test(start_paused = true)]
async fn a_404_counts_only_where_nothing_else_is_said_in_between() {
    for other in [
        Fate::Proxy(404),
        Fate::Proxy(502),
        Fate::Lost,
        Fate::Hangs,
        Fate::AnswerLost,
    ] {
        let plane = Plane::start().await;
        let mut calls = 0;
        plane.judge(move |path| {
            calls += u32::from(path == HEARTBEAT);
            // Two in a row are not enough, nor are three within 60 s.
            if path == HEARTBEAT && calls % 4 == 0 {
                other
            } else {
                Fate::Answered
            }
        });
        assert_eq!(deleted_after(&plane, HOUR).await, None, "{other:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_outage_ends_heartbeats_and_they_go_on_after_it() {
    for outage in [
        Fate::Lost,
        Fate::Hangs,
        Fate::AnswerLost,
        Fate::Proxy(502),
        Fate::Proxy(403),
    ] {
        let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
        plane.register(dir.path(), TOKEN).await.expect("registered");
        let (session, listing) = (plane.session(dir.path()), Listing::under_control_plane());
        plane.judge(move |_| outage);
        let ended = tokio::time::timeout(6 * HOUR, heartbeat::run(&session, &listing)).await;
        assert!(ended.is_err(), "{outage:?}");
        // One every 40 s at least, every 15 s at most.
        let tries = plane.answers(HEARTBEAT).len();
        assert!((540..1450).contains(&tries), "{outage:?}: {tries}");
        plane.judge(|_| Fate::Answered);
        let ended = tokio::time::timeout(HOUR, heartbeat::run(&session, &listing)).await;
        assert!(ended.is_err() && plane.answers(HEARTBEAT).contains(&204), "{outage:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_deleted_host_is_emptied_once_it_has_recovered_and_its_credentials_are_set_aside() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    plane.lock().is_deleted = true;
    let config = Config {
        dir: dir.path().into(),
        vm_run_dir: dir.path().into(),
        ..Config::default()
    };
    let registry = Registry::new(Arc::new(Host::new(config).under_control_plane()));
    let began = Instant::now();
    let recovered = tokio::time::sleep(Duration::from_secs(600));
    standing::run(plane.session(dir.path()), registry.clone(), None, recovered).await;
    assert_eq!(began.elapsed().as_secs(), 600);
    assert_eq!(store(dir.path()).load().expect("read"), None);
    assert!(registry.takes_work(0).is_err(), "new work is refused");
    let names = std::fs::read_dir(dir.path().join("credentials")).expect("read");
    let names: Vec<_> = names
        .map(|entry| entry.expect("read").file_name().into_string().expect("UTF-8"))
        .collect();
    assert!(
        names.iter().any(|name| name.starts_with("credentials.json.deleted-")),
        "{names:?}"
    );
}

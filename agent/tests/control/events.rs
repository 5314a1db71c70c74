//! Events through an outage of an hour: none is lost, and each sandbox's come in order.

use std::collections::BTreeMap;
use std::time::Duration;

use roost_agent::control::events::Events;
use roost_agent::outbox::{Deliver, Delivery, Event, EventKind, Limits, Outbox, run};

use crate::plane::{EVENTS, Fate, Plane, REFRESH, TOKEN};

fn event(id: &str, at: i64) -> Event {
    Event::new(EventKind::AutoPaused, id.parse().expect("an id"), at)
}

#[tokio::test(start_paused = true)]
async fn events_outlast_an_hour_without_a_control_plane_and_come_in_order() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let outbox = Outbox::open(&dir.path().join("outbox"), Limits::default()).expect("opened");
    let mut calls = 0;
    plane.judge(move |_| {
        calls += 1;
        match calls % 5 {
            0 => Fate::Hangs,
            1 => Fate::AnswerLost,
            2 => Fate::Proxy(503),
            3 => Fate::Proxy(429),
            _ => Fate::Lost,
        }
    });
    let play = async {
        for at in 0..60 {
            for id in ["a", "b", "c"] {
                outbox.put(event(id, at)).await.expect("kept");
            }
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        // The token has ended meanwhile, too.
        plane.lock().is_expired = true;
        plane.judge(|_| Fate::Answered);
        while outbox.depth() > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        never = run(outbox.clone(), Events(plane.session(dir.path()))) => match never {},
        done = tokio::time::timeout(Duration::from_secs(7200), play) => done.expect("delivered in time"),
    }
    let mut order: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for event in &plane.lock().events {
        let of = order
            .entry(event["sandbox_id"].as_str().expect("an id").into())
            .or_default();
        of.push(event["timestamp"].as_i64().expect("a time"));
    }
    assert_eq!(order.len(), 3);
    for (id, mut times) in order {
        assert!(times.is_sorted(), "{id}: {times:?}");
        // Those whose answers were lost came more than once.
        times.dedup();
        assert_eq!(times, Vec::from_iter(0..60), "{id}");
    }
    assert_eq!((outbox.dropped(), outbox.refused()), (0, 0));
    assert_eq!(plane.answers(REFRESH), [200]);
}

#[tokio::test]
async fn what_becomes_of_an_event_is_what_the_answer_says() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.register(dir.path(), TOKEN).await.expect("registered");
    let events = Events(plane.session(dir.path()));
    for (fate, expected) in [
        (Fate::Refused(400), None),
        (Fate::Refused(404), None),
        (Fate::Refused(408), Some(Delivery::Later)),
        (Fate::Refused(429), Some(Delivery::Later)),
        (Fate::Refused(500), Some(Delivery::Later)),
        // What somebody on the way says is no reason to forget an event.
        (Fate::Proxy(404), Some(Delivery::Later)),
        (Fate::Proxy(503), Some(Delivery::Later)),
        (Fate::Proxy(302), Some(Delivery::Later)),
        (Fate::Lost, Some(Delivery::Later)),
        (Fate::Proxy(200), Some(Delivery::Delivered)),
    ] {
        plane.judge(move |_| fate);
        let delivery = events.deliver(&event("a", 1)).await;
        match expected {
            Some(expected) => assert_eq!(delivery, expected, "{fate:?}"),
            None => assert!(matches!(delivery, Delivery::Refused(_)), "{fate:?}: {delivery:?}"),
        }
    }
    plane.judge(|_| Fate::Answered);
    plane.lock().is_expired = true;
    assert_eq!(events.deliver(&event("a", 2)).await, Delivery::Delivered);
    // A host whose credentials are refused for good keeps its events.
    plane.judge(|path| {
        if path == EVENTS {
            Fate::Proxy(403)
        } else {
            Fate::Answered
        }
    });
    assert_eq!(events.deliver(&event("a", 3)).await, Delivery::Later);
}

//! Two hosts of one control plane: each is called, heard and given up for itself.

use std::sync::Arc;
use std::time::Duration;

use roost_agent::control::events::Events;
use roost_agent::control::heartbeat;
use roost_agent::control::listing::Listing;
use roost_agent::outbox::{Event, EventKind, Limits, Outbox, run};
use serde_json::json;

use crate::plane::{HOST, OTHER_HOST, OTHER_TOKEN, Plane, TOKEN};
use crate::swap::Agent;

#[tokio::test]
async fn each_host_is_called_as_itself_and_lists_its_own() {
    let plane = Arc::new(Plane::start().await);
    let agents = [
        Agent::under(plane.clone(), 0, "127.0.0.1", "one").await,
        Agent::under(plane.clone(), 1, "127.0.0.1", "two").await,
    ];
    let mut shown = Vec::new();
    for (agent, sandbox) in agents.iter().zip(["one", "two"]) {
        let mut caller = agent.connect_as_control_plane().await;
        let (status, list) = caller.list().await;
        assert_eq!(status, 200);
        let listed = list["sandboxes"].as_array().expect("it is listed as alive at first");
        assert!(listed.len() == 1 && listed[0]["sandboxId"] == sandbox, "{list}");
        shown.push(caller.shown);
    }
    assert_ne!(shown[0], shown[1], "one certificate for two hosts");
    let ids = agents
        .each_ref()
        .map(|agent| agent.session().credentials().host_id.clone());
    assert_eq!(ids, [HOST, OTHER_HOST]);
    // A token is good for one host, once.
    let again = tempfile::tempdir().expect("a directory");
    for token in [TOKEN, OTHER_TOKEN] {
        plane.register(again.path(), token).await.expect_err("it was used");
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_deleted_hears_so_and_the_other_goes_on() {
    let plane = Plane::start().await;
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    for (dir, token) in dirs.iter().zip([TOKEN, OTHER_TOKEN]) {
        plane.register(dir.path(), token).await.expect("registered");
    }
    let [one, two] = dirs.each_ref().map(|dir| plane.session(dir.path()));
    let [first, second] = [(); 2].map(|()| Listing::under_control_plane());
    plane.of(1).is_deleted = true;
    let hour = Duration::from_secs(3600);
    let (goes_on, ends) = tokio::join!(
        tokio::time::timeout(hour, heartbeat::run(&one, &first)),
        tokio::time::timeout(hour, heartbeat::run(&two, &second)),
    );
    assert!(goes_on.is_err(), "a host ends with another");
    ends.expect("it hears that it was deleted");

    // What happens on the other is told, and told as that one's.
    let outbox = Outbox::open(&dirs[0].path().join("outbox"), Limits::default()).expect("opened");
    let event = Event::new(EventKind::AutoPaused, "one".parse().expect("an id"), 7);
    outbox.put(event).await.expect("kept");
    let told = async {
        while outbox.depth() > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        never = run(outbox.clone(), Events(one)) => match never {},
        done = tokio::time::timeout(hour, told) => done.expect("told"),
    }
    let told: Vec<_> = plane
        .of(0)
        .events
        .iter()
        .map(|event| event["host_id"].clone())
        .collect();
    assert_eq!(told, [json!(HOST)]);
    assert!(plane.of(1).events.is_empty());
}

//! Proxied connections while their sandbox is paused, resumed, destroyed and lost.

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use roost_agent::sandbox::task::View;
use roost_agent::sandbox::{PauseReason, ResumeWish};
use roost_common::shim::WaitStatus;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::guests::{Agent, get, soon, text, until, whole};
use crate::shim;
use crate::tunnels::{Kind, accept, open};
use crate::upstream::{Upstream, read_head, read_to_close};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_used_again_and_never_by_another_incarnation() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let hello = |_| async { Response::new(text("hello")) };
    let upstream = Upstream::http(agent.address_of(&sandbox), hello).await;
    let path = format!("/proxy/x/{}/", upstream.port);
    let asks = async || {
        // It is kept a moment after its answer.
        let (status, _, body) = agent.get(&path).await;
        assert_eq!((status, body), (StatusCode::OK, Some(Bytes::from("hello"))));
    };
    asks().await;
    until(async || {
        let before = upstream.came();
        asks().await;
        upstream.came() == before
    })
    .await;
    let first = upstream.came();
    assert_eq!(upstream.ended(), 0, "what was kept is open");

    soon(sandbox.pause(PauseReason::Requested)).await.expect("paused");
    until(async || upstream.ended() == first).await;
    let (status, ..) = agent.get(&path).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    soon(sandbox.resume(ResumeWish::default())).await.expect("resumed");
    asks().await;
    assert_eq!(upstream.came(), first + 1, "a resumed guest has connections of its own");

    soon(sandbox.destroy()).await.expect("destroyed");
    until(async || upstream.ended() == upstream.came()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_ends_what_is_under_way_and_says_so() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let address = agent.address_of(&sandbox);
    let slow = Upstream::start(address, |mut stream| async move {
        let head = read_head(&mut stream).await;
        if head.contains("/begun") {
            let answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
            drop(stream.write_all(answer).await);
        }
        read_to_close(&mut stream).await;
    })
    .await;
    let echo = Upstream::start(address, |mut stream| async move {
        accept(&mut stream, Kind::WebSocket, "").await;
        read_to_close(&mut stream).await;
    })
    .await;
    let waits = agent.send(get(&format!("/proxy/x/{}/waits", slow.port)));
    let mut begun = agent
        .send(get(&format!("/proxy/x/{}/begun", slow.port)))
        .await
        .into_body();
    soon(begun.frame()).await.expect("a frame").expect("half of it");
    let mut tunnel = open(&agent, Kind::WebSocket, "x", echo.port).await;
    let pause = async {
        until(async || slow.came() == 2).await;
        sandbox.pause(PauseReason::Requested).await
    };
    let (waited, paused) = soon(async { tokio::join!(waits, pause) }).await;
    paused.expect("paused");
    assert!(matches!(sandbox.view(), View::Paused(_)));
    let (status, _, body) = whole(waited).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    let body = String::from_utf8(body.expect("whole").into()).expect("UTF-8");
    assert!(body.contains("stopped running"), "{body}");
    assert!(soon(begun.collect()).await.is_err(), "half a body is no whole one");
    let mut rest = Vec::new();
    // Broken off or ended: it is over.
    drop(soon(tunnel.read_to_end(&mut rest)).await);
    until(async || slow.ended() == 2 && echo.ended() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_waits_for_a_request_that_ends() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let go = Arc::new(tokio::sync::Notify::new());
    let goes = go.clone();
    let upstream = Upstream::http(agent.address_of(&sandbox), move |_| {
        let goes = goes.clone();
        async move {
            goes.notified().await;
            Response::new(text("done"))
        }
    })
    .await;
    let path = format!("/proxy/x/{}/", upstream.port);
    let call = agent.get(&path);
    let pause = async {
        until(async || upstream.came() == 1).await;
        let pausing = sandbox.pause(PauseReason::Requested);
        let goes_on = async {
            until(async || matches!(sandbox.view(), View::Pausing)).await;
            go.notify_one();
        };
        tokio::join!(pausing, goes_on).0
    };
    let ((status, _, body), paused) = soon(async { tokio::join!(call, pause) }).await;
    paused.expect("paused");
    assert_eq!((status, body), (StatusCode::OK, Some(Bytes::from("done"))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_whose_pause_failed_is_reached_as_before() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let hello = |_| async { Response::new(text("hello")) };
    let upstream = Upstream::http(agent.address_of(&sandbox), hello).await;
    let path = format!("/proxy/x/{}/", upstream.port);
    assert_eq!(agent.get(&path).await.0, StatusCode::OK);
    // Nowhere to write to.
    let vm = agent.registry.host().layout.vm(&sandbox.plan.id);
    let aside = vm.with_extension("aside");
    std::fs::rename(&vm, &aside).expect("renamed");
    soon(sandbox.pause(PauseReason::Requested)).await.expect_err("it fails");
    std::fs::rename(&aside, &vm).expect("renamed");
    assert!(matches!(sandbox.view(), View::Running(..)), "{}", sandbox.view().name());
    let (status, _, body) = agent.get(&path).await;
    assert_eq!((status, body), (StatusCode::OK, Some(Bytes::from("hello"))));
    assert_eq!(upstream.came(), 2, "what was open was closed for the pause");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_end_with_their_sandbox() {
    let agent = Agent::start().await;
    for kind in Kind::ALL {
        for is_killed in [false, true] {
            let sandbox = agent.create("x", 0).await;
            let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| async move {
                accept(&mut stream, kind, "").await;
                read_to_close(&mut stream).await;
            })
            .await;
            let mut tunnel = open(&agent, kind, "x", upstream.port).await;
            until(async || upstream.came() == 1).await;
            if is_killed {
                let numbers: Vec<u64> = agent.world.lock().shims.keys().copied().collect();
                for number in numbers {
                    shim::end(&agent.world, number, shim::report(WaitStatus::Exited(1)));
                }
            } else {
                soon(sandbox.destroy()).await.expect("destroyed");
            }
            let mut rest = Vec::new();
            soon(tunnel.read_to_end(&mut rest)).await.expect("an orderly end");
            until(async || upstream.ended() == 1).await;
            // Nothing of the proxy's keeps what the sandbox had.
            until(async || agent.registry.find(&sandbox.plan.id).is_none()).await;
            let (slot, id) = (sandbox.slot.clone(), sandbox.plan.id.clone());
            drop(sandbox);
            until(async || Arc::strong_count(&slot) == 1).await;
            assert!(agent.registry.find(&id).is_none());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_end_in_an_orderly_way_before_the_agent_does() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| async move {
        accept(&mut stream, Kind::WebSocket, "hello").await;
        read_to_close(&mut stream).await;
    })
    .await;
    let mut tunnel = open(&agent, Kind::WebSocket, "x", upstream.port).await;
    let ending = tokio::spawn({
        let service = agent.service.clone();
        async move { service.end_tunnels().await }
    });
    let mut rest = String::new();
    soon(tunnel.read_to_string(&mut rest)).await.expect("an orderly end");
    assert!(rest.is_empty() || rest == "hello", "{rest:?}");
    soon(ending).await.expect("it returns once they have ended");
    until(async || upstream.ended() == 1).await;
    // The sandbox is none the worse for it.
    assert!(matches!(sandbox.view(), View::Running(..)), "{}", sandbox.view().name());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_that_is_silent_keeps_no_sandbox_from_its_pause_and_a_request_does() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 1).await;
    let address = agent.address_of(&sandbox);
    let tunnelled = Upstream::start(address, |mut stream| async move {
        accept(&mut stream, Kind::Forward, "hello").await;
        read_to_close(&mut stream).await;
    })
    .await;
    let go = Arc::new(tokio::sync::Notify::new());
    let goes = go.clone();
    let slow = Upstream::http(address, move |_| {
        let goes = goes.clone();
        async move {
            goes.notified().await;
            Response::new(text("done"))
        }
    })
    .await;
    let mut tunnel = open(&agent, Kind::Forward, "x", tunnelled.port).await;
    let path = format!("/proxy/x/{}/", slow.port);
    let call = agent.get(&path);
    let used = async {
        until(async || slow.came() == 1).await;
        let began = sandbox.last_active_at_unix();
        // Several of its limits, as its own clock has it.
        until(async || sandbox.last_active_at_unix() > began + 3).await;
        assert!(matches!(sandbox.view(), View::Running(..)));
        go.notify_one();
    };
    let ((status, ..), ()) = soon(async { tokio::join!(call, used) }).await;
    assert_eq!(status, StatusCode::OK);
    until(async || matches!(sandbox.view(), View::Paused(_))).await;
    let mut rest = Vec::new();
    drop(soon(tunnel.read_to_end(&mut rest)).await);
    assert_eq!(rest, b"hello");
}

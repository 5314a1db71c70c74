//! Guests that answer as no program should.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode};
use tokio::io::AsyncWriteExt;

use crate::guests::{Agent, get, soon, text, until, whole};
use crate::upstream::{Upstream, read_head, read_to_close};

/// What a caller sees.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Refused(StatusCode),
    Whole(&'static str),
    /// An answer whose body breaks off.
    Broken,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_or_false_answer_is_never_a_success() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let many_headers = "X: y\r\n".repeat(200);
    let bad_gateway = || Seen::Refused(StatusCode::BAD_GATEWAY);
    for (answer, expected) in [
        ("", bad_gateway()),
        ("HTTP/1.1 200", bad_gateway()),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", bad_gateway()),
        ("\u{16}\u{3}\u{1} this is no HTTP\r\n\r\n", bad_gateway()),
        ("SSH-2.0-OpenSSH_9.6\r\n", bad_gateway()),
        ("HTTP/1.1 200 OK\r\nbad header\r\n\r\n", bad_gateway()),
        ("HTTP/1.1 200 OK\r\nA : b\r\nContent-Length: 0\r\n\r\n", bad_gateway()),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", bad_gateway()),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            bad_gateway(),
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            bad_gateway(),
        ),
        (
            "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n",
            bad_gateway(),
        ),
        (&format!("HTTP/1.1 200 OK\r\n{many_headers}\r\n"), bad_gateway()),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", Seen::Broken),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Seen::Broken),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n",
            Seen::Broken,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\nzz\r\n",
            Seen::Broken,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
            Seen::Broken,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more",
            Seen::Whole("hello"),
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            Seen::Whole("hello"),
        ),
        ("HTTP/1.0 200 OK\r\n\r\nhello", Seen::Whole("hello")),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            Seen::Whole("hello"),
        ),
    ] {
        let upstream = Upstream::says(agent.address_of(&sandbox), answer.into()).await;
        for h2 in [false, true] {
            let path = format!("/proxy/x/{}/", upstream.port);
            let answered = if h2 {
                let request = get(&format!("https://roost.example{path}"));
                let mut caller = agent.h2_caller().await;
                soon(caller.send_request(request)).await
            } else {
                let mut caller = agent.caller().await;
                soon(caller.send_request(get(&path))).await
            };
            // A body that breaks off at once may take the head with it that was not sent yet.
            let Ok(answered) = answered else {
                assert_eq!(expected, Seen::Broken, "{answer:?}, h2: {h2}");
                continue;
            };
            let (status, headers, body) = whole(answered).await;
            let seen = match (&expected, body) {
                (_, None) => Seen::Broken,
                (Seen::Whole(text), Some(body)) if status == StatusCode::OK && body == *text => Seen::Whole(text),
                (_, Some(_)) => {
                    assert_eq!(headers["content-type"], "application/json", "{answer}");
                    Seen::Refused(status)
                }
            };
            assert_eq!(seen, expected, "{answer:?}, h2: {h2}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_an_end_is_given_up() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    for piece in ["X-Filler: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n", "y"] {
        let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| async move {
            read_head(&mut stream).await;
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\nX: ").await);
            while stream.write_all(piece.as_bytes()).await.is_ok() {}
        })
        .await;
        let (status, ..) = agent.get(&format!("/proxy/x/{}/", upstream.port)).await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        until(async || upstream.ended() == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_after_an_answer_is_the_answer_to_nothing() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::start(agent.address_of(&sandbox), |mut stream| async move {
        read_head(&mut stream).await;
        let answer =
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirstHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond";
        drop(stream.write_all(answer).await);
        read_to_close(&mut stream).await;
    })
    .await;
    for number in 1..=3 {
        let (status, _, body) = agent.get(&format!("/proxy/x/{}/", upstream.port)).await;
        assert_eq!((status, body), (StatusCode::OK, Some(Bytes::from("first"))));
        until(async || upstream.ended() == number).await;
        assert_eq!(upstream.came(), number, "each has a connection of its own");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_could_be_read_two_ways_are_made_anew() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = heads.clone();
    let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| {
        let seen = seen.clone();
        async move {
            let head = read_head(&mut stream).await;
            seen.lock().expect("no panic").push(head);
            drop(
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    .await,
            );
            read_to_close(&mut stream).await;
        }
    })
    .await;
    for (frame, body) in [
        (
            "Content-Length: 6\r\nTransfer-Encoding: chunked",
            "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 6",
            "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        ),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "0\r\n\r\n"),
        ("Transfer-Encoding: \x0bchunked", "0\r\n\r\n"),
        ("Content-Length: 3\r\nContent-Length: 4", "abcd"),
        ("Connection: content-length\r\nContent-Length: 4", "abcd"),
    ] {
        let mut stream = agent.connect("http/1.1").await;
        let request = format!(
            "POST /proxy/x/{}/ HTTP/1.1\r\nHost: a\r\n{frame}\r\n\r\n{body}",
            upstream.port
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        let head = soon(read_head(&mut stream)).await;
        assert!(head.starts_with("HTTP/1.1 "), "{frame}: {head}");
    }
    for head in heads.lock().expect("no panic").iter() {
        let lower = head.to_lowercase();
        let frames = lower.matches("content-length").count() + lower.matches("transfer-encoding").count();
        assert!(frames <= 1 && !lower.contains("smuggled"), "{head}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_comes_before_the_request_has_ended_is_passed_on() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let answer = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmore";
    let upstream = Upstream::says(agent.address_of(&sandbox), answer.into()).await;
    let request = Request::post(format!("/proxy/x/{}/", upstream.port)).header("host", "a");
    let answer = agent.send(request.body(text("a body")).expect("a request")).await;
    let (status, _, body) = whole(answer).await;
    assert_eq!(
        (status, body),
        (StatusCode::PAYLOAD_TOO_LARGE, Some(Bytes::from("more")))
    );
}

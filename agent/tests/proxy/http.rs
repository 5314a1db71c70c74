//! Requests and answers on their way through.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use crate::guests::{Agent, Body, get, nothing, soon, text, until, whole};
use crate::upstream::{Upstream, read_head, read_to_close};

/// Most bytes that large bodies may take of the agent's memory.
const HELD: usize = 32 << 20;
/// Bytes of a piece of it.
const PIECE: usize = 64 << 10;

/// Bytes of a large body: of a gibibyte with `cargo xtask test --all`.
fn large_size() -> usize {
    let is_full_size = std::env::var_os("ROOST_TESTS_ALL").is_some();
    if is_full_size { 1 << 30 } else { 64 << 20 }
}

/// A body of so many bytes, in pieces, and how many of them have been taken.
fn large(length: usize) -> (Body, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = taken.clone();
    let pieces = futures::stream::iter(0..length / PIECE).map(move |_| {
        counted.fetch_add(PIECE, Ordering::AcqRel);
        Ok(Frame::data(Bytes::from_static(&[b'x'; PIECE])))
    });
    (StreamBody::new(pieces).boxed_unsync(), taken)
}

/// Most memory that this process has had, in bytes.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("read");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: usize = line
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse().ok())
        .expect("a number");
    kib << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_sees_method_path_and_headers_as_they_were_sent() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let address = agent.address_of(&sandbox);
    let upstream = Upstream::start(address, |mut stream| async move {
        loop {
            let head = read_head(&mut stream).await;
            if head.is_empty() {
                return;
            }
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nKeep-Alive: timeout=5\r\n\r\n{head}",
                head.len()
            );
            drop(stream.write_all(answer.as_bytes()).await);
        }
    })
    .await;
    let port = upstream.port;
    for (method, rest, line) in [
        ("GET", "", "GET / HTTP/1.1"),
        ("GET", "?", "GET /? HTTP/1.1"),
        (
            "DELETE",
            "//a/../%2e%2E/%00?x=%20&&y",
            "DELETE //a/../%2e%2E/%00?x=%20&&y HTTP/1.1",
        ),
        ("PURGE", "/", "PURGE / HTTP/1.1"),
        ("OPTIONS", "/", "OPTIONS / HTTP/1.1"),
    ] {
        let mut stream = agent.connect("http/1.1").await;
        let request = format!(
            "{method} /proxy/x/{port}{rest} HTTP/1.1\r\nHost: roost.example\r\nX-Kept: 1\r\nX-Dropped: 2\r\nConnection: close, x-dropped\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        soon(stream.read_to_string(&mut answer)).await.expect("read");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(
            head.starts_with("HTTP/1.1 200") && !head.contains("keep-alive"),
            "{head}"
        );
        let mut lines: Vec<&str> = body.trim_end().split("\r\n").collect();
        assert_eq!(lines.remove(0), line);
        lines.sort_unstable();
        let host = format!("host: {address}:{port}");
        let prefix = format!("x-forwarded-prefix: /proxy/x/{port}");
        assert_eq!(
            lines,
            [
                &host,
                "x-forwarded-host: roost.example",
                &prefix,
                "x-forwarded-proto: https",
                "x-kept: 1"
            ]
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_pass_both_ways_and_stay_nowhere() {
    let size = large_size();
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::http(agent.address_of(&sandbox), move |request| async move {
        let mut received = 0;
        let mut body = request.into_body();
        while let Some(frame) = body.frame().await {
            received += frame.expect("whole").data_ref().map_or(0, Bytes::len);
        }
        let mut answer = Response::new(large(size).0);
        answer.headers_mut().insert("x-received", received.into());
        answer
    })
    .await;
    let path = format!("/proxy/x/{}/", upstream.port);
    let before = peak_memory();
    for h2 in [false, true] {
        let (body, _) = large(size);
        let request = Request::post(if h2 {
            format!("https://roost.example{path}")
        } else {
            path.clone()
        });
        let request = request.header("host", "a").body(body).expect("a request");
        let answer = if h2 {
            let mut caller = agent.h2_caller().await;
            soon(caller.send_request(request)).await.expect("an answer")
        } else {
            agent.send(request).await
        };
        assert_eq!(answer.headers()["x-received"], size.to_string());
        let mut body = answer.into_body();
        let mut received = 0;
        while let Some(frame) = soon(body.frame()).await {
            received += frame.expect("whole").data_ref().map_or(0, Bytes::len);
        }
        assert_eq!(received, size);
    }
    let grown = peak_memory() - before;
    println!("4 bodies of {} MiB: the peak grew by {} KiB", size >> 20, grown >> 10);
    assert!(grown < HELD, "{grown} bytes more than before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_holds_back_who_writes() {
    const ALL: usize = 1 << 30;
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let written = Arc::new(AtomicUsize::new(0));
    let counter = written.clone();
    let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| {
        let counter = counter.clone();
        async move {
            read_head(&mut stream).await;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {ALL}\r\n\r\n");
            drop(stream.write_all(head.as_bytes()).await);
            while stream.write_all(&[b'x'; PIECE]).await.is_ok() {
                counter.fetch_add(PIECE, Ordering::AcqRel);
            }
        }
    })
    .await;
    // Down: nobody reads the answer's body.
    let answer = agent.send(get(&format!("/proxy/x/{}/", upstream.port))).await;
    let held = stalls(&written).await;
    println!("{held} bytes on their way down");
    assert!(held < ALL / 4, "{held} bytes were taken that nobody wants");
    drop(answer);
    until(async || upstream.ended() == 1).await;
    // Up: the guest reads no further than the head.
    let go = Arc::new(Notify::new());
    let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| {
        let go = go.clone();
        async move {
            read_head(&mut stream).await;
            go.notified().await;
        }
    })
    .await;
    let (body, taken) = large(ALL);
    let path = format!("/proxy/x/{}/", upstream.port);
    let request = Request::post(path).header("host", "a").body(body).expect("a request");
    let mut caller = agent.caller().await;
    let sending = tokio::spawn(async move { caller.send_request(request).await.is_ok() });
    until(async || taken.load(Ordering::Acquire) > 0).await;
    let held = stalls(&taken).await;
    println!("{held} bytes on their way up");
    assert!(held < ALL / 4, "{held} bytes were taken that nobody wants");
    sending.abort();
}

/// Waits until a count does not grow any more; what it is then. One that is looked at too early is too small, which proves less.
async fn stalls(count: &AtomicUsize) -> usize {
    let mut before = 0;
    until(async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = count.load(Ordering::Acquire);
        std::mem::replace(&mut before, now) == now && now > 0
    })
    .await;
    before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_pass_both_ways() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::http(agent.address_of(&sandbox), |request| async move {
        assert_eq!(request.headers()["te"], "trailers");
        let body = request.into_body().collect().await.expect("whole");
        let mut trailers = HeaderMap::new();
        let sum = body.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
        trailers.insert("x-sum", sum.unwrap_or(HeaderValue::from_static("none")));
        let frames = [Ok(Frame::data(body.to_bytes())), Ok(Frame::trailers(trailers))];
        let mut answer = Response::new(StreamBody::new(futures::stream::iter(frames)).boxed_unsync());
        answer
            .headers_mut()
            .insert("trailer", HeaderValue::from_static("x-sum"));
        answer
    })
    .await;
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("7"));
    let frames = [Ok(Frame::data(Bytes::from("body"))), Ok(Frame::trailers(trailers))];
    let request = Request::post(format!("/proxy/x/{}/", upstream.port))
        .header("host", "a")
        .header("te", "trailers")
        .header("connection", "te")
        .header("trailer", "x-sum")
        .body(StreamBody::new(futures::stream::iter(frames)).boxed_unsync())
        .expect("a request");
    let answer = agent.send(request).await;
    let body = soon(answer.into_body().collect()).await.expect("whole");
    assert_eq!(body.trailers().expect("trailers")["x-sum"], "7");
    assert_eq!(body.to_bytes(), "body");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_asks_first_is_told_to_go_on_and_one_that_is_refused_is_not() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::http(agent.address_of(&sandbox), |request| async move {
        assert!(!request.headers().contains_key("expect"));
        Response::new(request.into_body().map_err(std::io::Error::other).boxed_unsync())
    })
    .await;
    let mut stream = agent.connect("http/1.1").await;
    let request = format!(
        "POST /proxy/x/{}/ HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n",
        upstream.port
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let head = soon(read_head(&mut stream)).await;
    assert!(head.starts_with("HTTP/1.1 100"), "{head}");
    stream.write_all(b"body").await.expect("sent");
    let mut answer = String::new();
    soon(stream.read_to_string(&mut answer)).await.expect("read");
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nbody"),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_without_a_body_are_answers() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::start(agent.address_of(&sandbox), |mut stream| async move {
        loop {
            let head = read_head(&mut stream).await;
            let answer = if head.starts_with("HEAD") {
                "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"
            } else if head.contains("/304") {
                "HTTP/1.1 304 Not Modified\r\nContent-Length: 1234\r\nETag: e\r\n\r\n"
            } else if head.contains("/204") {
                "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"
            } else if head.contains("/early") {
                "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
            } else {
                return;
            };
            drop(stream.write_all(answer.as_bytes()).await);
        }
    })
    .await;
    let mut caller = agent.caller().await;
    for (method, rest, status, length) in [
        (Method::HEAD, "/", 200, Some("1234")),
        (Method::GET, "/304", 304, None),
        (Method::GET, "/204", 204, None),
        (Method::GET, "/early", 200, Some("0")),
        (Method::HEAD, "/", 200, Some("1234")),
    ] {
        let mut request = get(&format!("/proxy/x/{}{rest}", upstream.port));
        *request.method_mut() = method.clone();
        let answer = soon(caller.send_request(request)).await.expect("an answer");
        let (status_there, headers, body) = whole(answer).await;
        assert_eq!(status_there, status, "{method} {rest}");
        assert_eq!(body.expect("whole").len(), 0);
        let found = headers.get("content-length").map(HeaderValue::as_bytes);
        assert_eq!(found, length.map(str::as_bytes), "{method} {rest}");
        soon(caller.ready()).await.expect("it goes on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn references_to_the_guest_keep_the_prefix() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let address = agent.address_of(&sandbox);
    let upstream = Upstream::http(address, |request| async move {
        let mut answer = Response::new(nothing());
        *answer.status_mut() = StatusCode::FOUND;
        answer
            .headers_mut()
            .insert("location", request.headers()["x-location"].clone());
        answer
    })
    .await;
    let port = upstream.port;
    for (said, seen) in [
        ("/login?a".to_owned(), format!("/proxy/x/{port}/login?a")),
        (format!("http://{address}:{port}/a"), format!("/proxy/x/{port}/a")),
        (format!("http://localhost:{port}/a"), format!("/proxy/x/{port}/a")),
        ("https://example.com/".to_owned(), "https://example.com/".to_owned()),
    ] {
        let mut request = get(&format!("/proxy/x/{port}/"));
        request
            .headers_mut()
            .insert("x-location", said.parse().expect("a value"));
        let answer = agent.send(request).await;
        assert_eq!(answer.status(), StatusCode::FOUND);
        assert_eq!(answer.headers()["location"], seen);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h2_callers_are_served_and_cannot_upgrade() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::http(agent.address_of(&sandbox), |request| async move {
        let cookies: Vec<_> = request.headers().get_all("cookie").iter().collect();
        assert_eq!(cookies, ["a=1; b=2"]);
        assert_eq!(request.headers()["x-forwarded-host"], "roost.example");
        Response::new(text("hello"))
    })
    .await;
    let mut caller = agent.h2_caller().await;
    let request = Request::get(format!("https://roost.example/proxy/x/{}/", upstream.port))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(nothing())
        .expect("a request");
    let answer = soon(caller.send_request(request)).await.expect("an answer");
    assert_eq!(answer.version(), Version::HTTP_2);
    let (status, _, body) = whole(answer).await;
    assert_eq!((status, body.expect("whole").as_ref()), (StatusCode::OK, &b"hello"[..]));
    let request = Request::get(format!("https://roost.example/forward/x/{}", upstream.port))
        .body(nothing())
        .expect("a request");
    let answer = soon(caller.send_request(request)).await.expect("an answer");
    let (status, _, body) = whole(answer).await;
    assert_eq!(status, StatusCode::HTTP_VERSION_NOT_SUPPORTED);
    assert!(String::from_utf8_lossy(&body.expect("whole")).contains("HTTP/1.1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_reached_says_why() {
    let agent = Agent::start_recovering().await;
    let (status, ..) = agent.get("/proxy/x/8080/").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "an agent that recovers");
    roost_agent::recover::recover(&agent.registry).await.expect("recovered");
    agent.service.recovered();
    agent.create("x", 0).await;
    let envd = agent.world.guest_net.port;
    // A port that was just free is so still, mostly: nobody else listens at a guest's address.
    for (path, status, code, says) in [
        ("/proxy/x/0/".to_owned(), 400, "invalid_argument", "port"),
        ("/proxy/x/070/".to_owned(), 400, "invalid_argument", "port"),
        ("/proxy/X/80/".to_owned(), 400, "invalid_argument", "sandbox id"),
        ("/forward/x/80/a".to_owned(), 400, "invalid_argument", "forward"),
        (
            "/proxy/x/49983/health".to_owned(),
            403,
            "permission_denied",
            "not proxied",
        ),
        (
            "/proxy/nobody/49983/".to_owned(),
            403,
            "permission_denied",
            "not proxied",
        ),
        (
            format!("/proxy/x/{envd}/health"),
            403,
            "permission_denied",
            "not proxied",
        ),
        ("/forward/x/49983".to_owned(), 403, "permission_denied", "not proxied"),
        ("/forward/x/80".to_owned(), 426, "invalid_argument", "Upgrade: tcp"),
        ("/proxy/nobody/80/".to_owned(), 503, "unavailable", "no sandbox nobody"),
        ("/proxy/x/1/".to_owned(), 502, "unavailable", "port 1"),
    ] {
        let (found, headers, body) = agent.get(&path).await;
        assert_eq!(found, status, "{path}");
        assert_eq!(headers["content-type"], "application/json");
        let body: serde_json::Value = serde_json::from_slice(&body.expect("whole")).expect("JSON");
        assert_eq!(body["code"], code, "{path}");
        assert!(body["message"].as_str().expect("text").contains(says), "{path}: {body}");
    }
    let (status, ..) = agent.get("/proxy").await;
    assert_eq!(status, StatusCode::NOT_FOUND, "what is not the proxy's");
    for target in ["/proxy/x/80", "x:80", "127.0.0.1:22"] {
        let mut stream = agent.connect("http/1.1").await;
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let head = soon(read_head(&mut stream)).await;
        assert!(head.starts_with("HTTP/1.1 4"), "CONNECT {target}: {head}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_begins_to_listen_a_moment_later_is_reached() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let address = agent.address_of(&sandbox);
    // Taken, and let go of without having listened: so its port is refused until somebody does.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("set");
    socket.bind((address, 0).into()).expect("bound");
    let port = socket.local_addr().expect("an address").port();
    let path = format!("/proxy/x/{port}/");
    // Which of the three attempts finds it is as may be; that the last one can is enough, and one that came too late is asked again.
    let answers = async {
        let mut asked = 0;
        loop {
            asked += 1;
            let (status, ..) = agent.get(&path).await;
            if status == StatusCode::OK {
                return asked;
            }
            assert_eq!(status, StatusCode::BAD_GATEWAY);
        }
    };
    let listens = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let listener = socket.listen(16).expect("it listens");
        loop {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            read_head(&mut stream).await;
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
            drop(stream.write_all(answer).await);
        }
    };
    tokio::select! {
        asked = soon(answers) => assert!(asked >= 1),
        () = listens => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_has_so_many_connections_and_no_more() {
    const MOST: usize = 512;
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    agent.create("y", 0).await;
    // Nobody takes these: they stand in the listener's queue.
    let address = agent.address_of(&sandbox);
    let silent = tokio::net::TcpSocket::new_v4().expect("a socket");
    silent.bind((address, 0).into()).expect("bound");
    let silent = silent.listen(2048).expect("it listens");
    let port = silent.local_addr().expect("an address").port();
    let ok = |_: Request<hyper::body::Incoming>| async { Response::new(nothing()) };
    let upstream = Upstream::http(address, ok).await;
    let mut callers = Vec::new();
    for _ in 0..5 {
        callers.push(agent.h2_caller().await);
    }
    let mut calls = FuturesUnordered::new();
    for number in 0..MOST + 8 {
        let mut caller = callers[number % callers.len()].clone();
        let request = Request::get(format!("https://roost.example/proxy/x/{port}/"));
        let request = request.body(nothing()).expect("a request");
        calls.push(async move { caller.send_request(request).await });
    }
    for _ in 0..8 {
        let answer = soon(calls.next()).await.expect("one of them").expect("an answer");
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        let (_, _, body) = whole(answer).await;
        let body = String::from_utf8(body.expect("whole").into()).expect("UTF-8");
        assert!(body.contains("resource_exhausted") && body.contains("512"), "{body}");
    }
    assert_eq!(calls.len(), MOST);
    let path = format!("/proxy/x/{}/", upstream.port);
    let (status, ..) = agent.get(&path).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    drop((calls, callers));
    until(async || agent.get(&path).await.0 == StatusCode::OK).await;
    drop(silent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_goes_away_ends_its_request_at_the_guest() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let upstream = Upstream::start(agent.address_of(&sandbox), |mut stream| async move {
        let head = read_head(&mut stream).await;
        if head.contains("/begun") {
            drop(
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
                    .await,
            );
        }
        read_to_close(&mut stream).await;
    })
    .await;
    for (number, h2, rest) in [
        (1, false, "/"),
        (2, false, "/begun"),
        (3, true, "/"),
        (4, true, "/begun"),
    ] {
        let path = format!("https://roost.example/proxy/x/{}{rest}", upstream.port);
        let (mut h1_caller, mut h2_caller) = (agent.caller().await, agent.h2_caller().await);
        let request = Request::get(&path)
            .header("host", "a")
            .body(nothing())
            .expect("a request");
        let call = async {
            let answer = if h2 {
                h2_caller.send_request(request).await
            } else {
                h1_caller.send_request(request).await
            };
            let mut body = answer.expect("an answer").into_body();
            assert!(!body.is_end_stream());
            body.frame().await.expect("a frame").expect("half of it");
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = call => {}
            () = until(async || upstream.came() == number) => {}
        }
        drop((h1_caller, h2_caller));
        until(async || upstream.ended() == number).await;
    }
}

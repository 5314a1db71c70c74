//! The plain HTTP calls of a real envd, and what it does with requests that are none.
#![allow(missing_docs)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{Envd, PATIENCE, bash, exists, run};
use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use roost_common::guest::process::StartResponse;
use roost_common::guest::process::process_event::Event;

const STREAM_JSON: (&str, &str) = ("content-type", "application/connect+json");
const JSON: (&str, &str) = ("content-type", "application/json");

#[test]
fn health_is_204_with_a_version() {
    let envd = Envd::start();
    let answer = envd.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    assert!(answer.contains("x-envd-version: 0.6.4\r\n"), "{answer}");
    assert_eq!(envd.http("POST", "/health", &[], "").0, 405);
}

#[tokio::test]
async fn init_sets_environment_identity_and_resolvers() {
    let envd = Envd::start();
    let body = r#"{"envVars": {"LANG": "C.UTF-8"}, "sandboxID": "s-1", "templateID": "t-1", "timestamp": 1700000000,
        "entropy": "AAECAw==", "lifecycleID": "l1", "dns": ["192.0.2.53"], "unknown": {"a": [1]}}"#;
    assert_eq!(envd.http("POST", "/init", &[JSON], body), (204, String::new()));
    let read = |path: &str| std::fs::read_to_string(envd.root.join(path)).unwrap();
    assert_eq!(read("run/e2b/.E2B_SANDBOX_ID"), "s-1");
    assert_eq!(read("run/wrenn/.WRENN_TEMPLATE_ID"), "t-1");
    assert_eq!(read("etc/resolv.conf"), "nameserver 192.0.2.53\n");
    let ran = run(
        &envd,
        bash("echo $LANG $E2B_SANDBOX_ID $WRENN_TEMPLATE_ID"),
        CallOptions::default(),
    )
    .await
    .unwrap();
    assert_eq!(ran.out(), "C.UTF-8 s-1 t-1\n");
    // What is absent stays.
    assert_eq!(envd.http("POST", "/init", &[], "").0, 204);
    let (status, envs) = envd.http("GET", "/envs", &[], "");
    assert_eq!(
        (
            status,
            envs.contains(r#""LANG":"C.UTF-8""#),
            envs.contains(r#""E2B_SANDBOX_ID":"s-1""#)
        ),
        (200, true, true)
    );
}

#[tokio::test]
async fn the_default_user_and_directory_are_those_of_init() {
    let envd = Envd::start();
    assert_eq!(envd.http("POST", "/init", &[], r#"{"defaultWorkdir": "/usr"}"#).0, 204);
    assert_eq!(
        run(&envd, bash("pwd"), CallOptions::default()).await.unwrap().out(),
        "/usr\n"
    );
    assert_eq!(
        envd.http("POST", "/init", &[], r#"{"defaultUser": "no-such-user"}"#).0,
        204
    );
    let refusal = run(&envd, bash("pwd"), CallOptions::default()).await.unwrap_err();
    assert_eq!(refusal.code, connectrpc::ErrorCode::InvalidArgument);
}

#[test]
fn once_there_is_a_token_it_is_needed_for_all_but_health() {
    let envd = Envd::start();
    assert_eq!(envd.http("GET", "/envs", &[], "").0, 200);
    assert_eq!(envd.http("POST", "/init", &[], r#"{"accessToken": "secret"}"#).0, 204);
    let list = ("/process.Process/List", "{}");
    for (token, expected) in [(None, 401), (Some("wrong"), 401), (Some("secret"), 200)] {
        let token: Vec<_> = token.map(|token| ("x-access-token", token)).into_iter().collect();
        assert_eq!(envd.http("GET", "/envs", &token, "").0, expected);
        assert_eq!(envd.http("GET", "/metrics", &token, "").0, expected);
        let headers = [token.as_slice(), &[JSON]].concat();
        assert_eq!(envd.http("POST", list.0, &headers, list.1).0, expected);
    }
    assert_eq!(envd.http("GET", "/health", &[], "").0, 204);
    // Neither another token nor none gets past the first, and the first still holds.
    for body in [r#"{"accessToken": "other"}"#, r#"{"accessToken": ""}"#, "{}", ""] {
        assert_eq!(envd.http("POST", "/init", &[], body).0, 401, "{body}");
    }
    assert_eq!(envd.http("POST", "/init", &[], r#"{"accessToken": "secret"}"#).0, 204);
    let header = [("x-access-token", "secret")];
    assert_eq!(
        envd.http("POST", "/init", &header, r#"{"accessToken": "second"}"#).0,
        204
    );
    assert_eq!(envd.http("GET", "/envs", &header, "").0, 401);
    assert_eq!(envd.http("GET", "/envs", &[("x-access-token", "second")], "").0, 200);
}

#[test]
fn an_init_that_is_not_valid_changes_nothing() {
    let envd = Envd::start();
    let long = format!(r#"{{"entropy": "{}"}}"#, "AAAA".repeat(1366));
    let bodies = [
        "{",
        "[]",
        "\"x\"",
        "nonsense",
        r#"{"envVars": {"A": 1}}"#,
        r#"{"envVars": {"": "x"}}"#,
        r#"{"envVars": {"A=B": "x"}}"#,
        r#"{"sandboxID": "a\nb"}"#,
        r#"{"dns": ["not an address"]}"#,
        r#"{"timestamp": "yesterday"}"#,
        r#"{"entropy": "*"}"#,
        r#"{"timestamp": "1969-01-01T00:00:00Z"}"#,
        r#"{"nonce": "a b"}"#,
        r#"{"nonce": 5}"#,
        &long,
    ];
    for body in bodies {
        let merged = body.replacen('{', r#"{"envVars": {"CHANGED": "yes"}, "#, 1);
        assert_eq!(envd.http("POST", "/init", &[JSON], body).0, 400, "{body}");
        assert!(
            matches!(envd.http("POST", "/init", &[JSON], &merged).0, 400),
            "{merged}"
        );
    }
    assert!(!envd.http("GET", "/envs", &[], "").1.contains("CHANGED"));
    assert!(!envd.root.join("run/e2b").exists());
}

#[test]
fn bodies_beyond_the_limits_are_refused() {
    let envd = Envd::start();
    let big = "x".repeat(5 << 20);
    assert_eq!(envd.http("POST", "/init", &[], &big).0, 413);
    let (status, body) = envd.http("POST", "/process.Process/List", &[JSON], &big);
    assert!(status == 413 || status == 429, "{status} {body}");
    // Compressed, it is small on the way and large when it arrives.
    let mut zeros = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    (0..64).for_each(|_| zeros.write_all(&[0; 1 << 20]).unwrap());
    let zeros = zeros.finish().unwrap();
    let head = format!(
        "POST /process.Process/SendInput HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/proto\r\n\
         Content-Encoding: gzip\r\nContent-Length: {}\r\n\r\n",
        zeros.len()
    );
    let before = envd.peak_memory();
    let answer = envd.raw(&[head.as_bytes(), &zeros].concat());
    assert!(answer.contains("resource_exhausted"), "{answer}");
    assert!(envd.peak_memory() - before < 32 << 10);
    assert_eq!(envd.http("GET", "/health", &[], "").0, 204);
}

#[test]
fn requests_that_are_none_end_their_connection_and_nothing_else() {
    let envd = Envd::start();
    let random: Vec<u8> = (0..4096_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let long_header = format!("GET /health HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    let requests: [&[u8]; 8] = [
        b"garbage\r\n\r\n",
        &random,
        long_header.as_bytes(),
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /init HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{\"short\"",
        b"POST /init HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nthis is not a frame at all, is it?",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ];
    std::thread::scope(|scope| {
        for request in requests {
            scope.spawn(|| {
                let answer = envd.raw(request);
                assert!(!answer.contains("HTTP/1.1 2"), "{answer}");
            });
        }
    });
    assert_eq!(envd.http("GET", "/health", &[], "").0, 204);
}

/// Requests that change nothing, whatever becomes of them.
fn harmless() -> Vec<String> {
    let post = |path: &str, headers: &str, body: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let json = "Content-Type: application/json\r\n";
    vec![
        "GET /metrics HTTP/1.1\r\nHost: x\r\nX-Access-Token: a\r\nConnection: close\r\n\r\n".into(),
        "GET /files?path=%2Fetc%2Fhostname&username=tester&signature=v1_a&signature_expiration=9 HTTP/1.1\r\nHost: x\r\n\
         Range: bytes=0-9\r\nIf-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\nAccept-Encoding: gzip;q=0.5\r\nConnection: close\r\n\r\n"
            .into(),
        post(
            "/init",
            json,
            r#"{"envVars": {"A": "b"}, "timestamp": "2001-02-03T04:05:06Z", "entropy": "AAECAw=="}"#,
        ),
        post("/filesystem.Filesystem/ListDir", json, r#"{"path": "/etc", "depth": 1}"#),
        post("/process.Process/List", json, "{}"),
        post(
            "/process.Process/Connect",
            "Content-Type: application/connect+proto\r\nConnect-Protocol-Version: 1\r\nConnect-Timeout-Ms: 9\r\n",
            "\0\0\0\0\x04\n\x02\x08\x07",
        ),
    ]
}

#[test]
fn what_is_nearly_a_request_is_answered_or_ends_its_connection_and_nothing_else() {
    let envd = Envd::start();
    let send = |request: &[u8]| {
        let mut stream = TcpStream::connect(envd.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may be refused before all of it was read.
        stream.write_all(request).ok();
        stream.shutdown(std::net::Shutdown::Write).ok();
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("never answered: {:?}", String::from_utf8_lossy(request))
            }
            Ok(_) | Err(_) => {}
        }
    };
    let before = envd.open_files();
    for request in harmless() {
        let request = request.as_bytes();
        send(request);
        for at in (0..request.len()).step_by(3) {
            send(&request[..at]);
            for other in [0, b'"', b'9', 0xff] {
                let mut changed = request.to_vec();
                changed[at] = other;
                send(&changed);
            }
        }
        assert_eq!(envd.http("GET", "/health", &[], "").0, 204);
    }
    let began = Instant::now();
    while envd.open_files() > before {
        assert!(
            began.elapsed() < PATIENCE,
            "{} descriptors, {before} before",
            envd.open_files()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(envd.peak_memory() < 64 << 10, "{} KiB", envd.peak_memory());
}

#[test]
fn messages_that_are_none_are_invalid_arguments() {
    let envd = Envd::start();
    let (status, body) = envd.http("POST", "/process.Process/SendSignal", &[JSON], "{\"process\": 5");
    assert_eq!((status, body.contains("invalid_argument")), (400, true), "{body}");
    let (status, body) = envd.http("POST", "/process.Process/SendSignal", &[JSON], "{}");
    assert_eq!((status, body.contains("invalid_argument")), (400, true), "{body}");
    // A stream answers 200 and says what is wrong in its last message.
    let (status, body) = envd.http("POST", "/process.Process/Start", &[STREAM_JSON], "\0\0\0\0\u{5}{\"a\":");
    assert!(status >= 400 || body.contains("invalid_argument"), "{status} {body}");
    assert_eq!(envd.http("GET", "/health", &[], "").0, 204);
}

#[test]
fn json_clients_get_json() {
    let envd = Envd::start();
    let message = r#"{"process": {"cmd": "/bin/echo", "args": ["hi"]}, "stdin": false}"#;
    let body = format!("\0\0\0\0{}{message}", char::from(u8::try_from(message.len()).unwrap()));
    let (status, answer) = envd.http("POST", "/process.Process/Start", &[STREAM_JSON], &body);
    assert_eq!(status, 200);
    for part in [
        r#""start":{"pid":"#,
        r#""data":{"stdout":"aGkK"}"#,
        r#""end":{"exited":true,"status":"exit status 0"}"#,
    ] {
        assert!(answer.contains(part), "{part} is not in {answer}");
    }
}

#[test]
fn what_is_not_there_is_told_apart_from_what_is_not_built() {
    let envd = Envd::start();
    assert_eq!(envd.http("GET", "/", &[], "").0, 404);
    assert_eq!(envd.http("GET", "/file?path=/etc/passwd", &[], "").0, 404);
    let (_, body) = envd.http("POST", "/filesystem.Filesystem/Upload", &[JSON], "{}");
    assert!(body.contains("unimplemented"), "{body}");
}

#[test]
fn browsers_may_call_from_anywhere() {
    let envd = Envd::start();
    let answer = envd.raw(b"OPTIONS /process.Process/List HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(
        answer.starts_with("HTTP/1.1 204 ") && answer.contains("access-control-allow-origin: *"),
        "{answer}"
    );
}

#[test]
fn metrics_are_of_this_machine() {
    let envd = Envd::start();
    let (status, body) = envd.http("GET", "/metrics", &[], "");
    let metrics: roost_common::guest::Metrics = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 200);
    assert!(
        metrics.cpu_count > 0 && metrics.mem_total_mib == metrics.mem_total >> 20 && metrics.disk_total > 0,
        "{body}"
    );
}

/// A call that would keep its connection.
fn kept_call(method: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: envd\r\nContent-Length: 0\r\n\r\n")
}

/// A connection that has had one answer and is kept.
fn idle_connection(envd: &Envd) -> TcpStream {
    let mut stream = TcpStream::connect(envd.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(kept_call("GET", "/health").as_bytes()).unwrap();
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    assert!(
        answer.ends_with("\r\n\r\n") && !answer.contains("connection: close"),
        "{answer}"
    );
    stream
}

/// What the server still says before it closes.
fn rest_of(mut stream: TcpStream) -> String {
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    rest
}

const SNAPSHOT_CALLS: [&str; 3] = ["/snapshot/prepare", "/fsfreeze", "/fsthaw"];

#[test]
fn the_calls_around_a_snapshot_are_posts_and_may_be_repeated() {
    let envd = Envd::start();
    for path in SNAPSHOT_CALLS.iter().chain(&SNAPSHOT_CALLS) {
        assert_eq!(envd.http("GET", path, &[], "").0, 405, "{path}");
        assert_eq!(envd.http("POST", path, &[], ""), (204, String::new()), "{path}");
        assert_eq!(envd.http("POST", path, &[], ""), (204, String::new()), "{path}");
    }
}

#[test]
fn the_calls_around_a_snapshot_need_the_token() {
    let envd = Envd::start();
    assert_eq!(envd.http("POST", "/init", &[], r#"{"accessToken": "secret"}"#).0, 204);
    for path in SNAPSHOT_CALLS {
        assert_eq!(envd.http("POST", path, &[], "").0, 401, "{path}");
        assert_eq!(
            envd.http("POST", path, &[("x-access-token", "wrong")], "").0,
            401,
            "{path}"
        );
        assert_eq!(
            envd.http("POST", path, &[("x-access-token", "secret")], "").0,
            204,
            "{path}"
        );
    }
}

#[test]
fn a_preparation_ends_the_connections_that_are_open() {
    let envd = Envd::start();
    let idle = idle_connection(&envd);
    let silent = TcpStream::connect(envd.address).unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut asking = TcpStream::connect(envd.address).unwrap();
    asking.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = kept_call("GET", "/envs");
    let (first, second) = request.split_at(20);
    asking.write_all(first.as_bytes()).unwrap();
    // Connections are served beside each other: this one is only sure to be when it has been read from.
    let deadline = Instant::now() + PATIENCE;
    while !has_read(&envd, &asking) {
        assert!(Instant::now() < deadline, "envd does not read");
        std::thread::sleep(Duration::from_millis(5));
    }
    let answer = envd.raw(kept_call("POST", "/snapshot/prepare").as_bytes());
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    assert_eq!(rest_of(idle), "");
    assert_eq!(rest_of(silent), "");
    // It had asked already, or nearly: it is answered, and then ends.
    asking.write_all(second.as_bytes()).unwrap();
    let answer = rest_of(asking);
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("connection: close"),
        "{answer}"
    );
    // Those that come later are as ever.
    idle_connection(&envd);
}

/// Whether envd has taken all that `client` has sent: its socket's receive queue is empty.
fn has_read(envd: &Envd, client: &TcpStream) -> bool {
    let (server, client) = (envd.address.port(), client.local_addr().unwrap().port());
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
    sockets.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.len() > 4
            && fields[1].ends_with(&format!(":{server:04X}"))
            && fields[2].ends_with(&format!(":{client:04X}"))
            && fields[4].ends_with(":00000000")
    })
}

#[tokio::test]
async fn a_stream_outlives_a_preparation_and_ends_when_the_guest_has_woken() {
    let envd = Envd::start();
    let init = |lifecycle: &str| {
        envd.http("POST", "/init", &[], &format!(r#"{{"lifecycleID": "{lifecycle}"}}"#))
            .0
    };
    assert_eq!(init("first"), 204);
    let client = envd.client();
    let script = bash("echo one; while [ ! -e $HOME/go ]; do sleep 0.05; done; echo two; sleep 600");
    let mut stream = client.start(script).await.unwrap();
    let mut next = async || {
        let message = tokio::time::timeout(PATIENCE, stream.message::<StartResponse>())
            .await
            .unwrap();
        message.map(|message| message.and_then(|message| message.to_owned_message().event.into_option()?.event))
    };
    let Some(Event::Start(start)) = next().await.unwrap() else {
        panic!("no start")
    };
    assert!(matches!(next().await, Ok(Some(Event::Data(_)))));
    assert_eq!(envd.http("POST", "/snapshot/prepare", &[], "").0, 204);
    assert_eq!(init("first"), 204);
    std::fs::write(envd.root.join("home/go"), "").unwrap();
    assert!(matches!(next().await, Ok(Some(Event::Data(_)))));
    assert_eq!(init("second"), 204);
    assert!(!matches!(next().await, Ok(Some(_))), "the stream goes on");
    // Its process goes on all the same.
    assert!(exists(start.pid));
    assert_eq!(envd.http("POST", "/init", &[], "").0, 204);
}

#[test]
fn a_new_life_ends_the_connections_of_the_one_before() {
    let envd = Envd::start();
    let init = |body: &str| envd.http("POST", "/init", &[], body).0;
    let mut idle = idle_connection(&envd);
    // The first life has none before it, and one that stays or is not told is not new.
    for body in [r#"{"lifecycleID": "a"}"#, r#"{"lifecycleID": "a"}"#, "{}"] {
        assert_eq!(init(body), 204);
    }
    idle.write_all(kept_call("GET", "/health").as_bytes()).unwrap();
    assert!(idle.read(&mut [0; 4096]).unwrap() > 0);
    assert_eq!(init(r#"{"lifecycleID": "b"}"#), 204);
    assert_eq!(rest_of(idle), "");
}

#[test]
fn an_init_repeats_its_nonce() {
    let envd = Envd::start();
    let init = |body: &str| {
        let head = "POST /init HTTP/1.1\r\nHost: envd\r\nConnection: close";
        envd.raw(format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes())
    };
    let answer = init(r#"{"nonce": "Proof-1", "sandboxID": "s-1", "entropy": "AAECAw=="}"#);
    assert!(
        answer.starts_with("HTTP/1.1 204 ") && answer.contains("x-roost-nonce: Proof-1\r\n"),
        "{answer}"
    );
    let answer = init(r#"{"sandboxID": "s-1"}"#);
    assert!(
        answer.starts_with("HTTP/1.1 204 ") && !answer.contains("x-roost-nonce"),
        "{answer}"
    );
    for bad in [&"n".repeat(65), "", "a b", "a\\r\\nx: y", "\u{e9}"] {
        let answer = init(&format!(r#"{{"nonce": "{bad}"}}"#));
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("nonce"),
            "{bad:?}: {answer}"
        );
        assert!(!answer.contains("x-roost-nonce"), "{answer}");
    }
}

#[tokio::test]
async fn a_frozen_guest_answers_and_writes_resolvers_when_it_is_thawed() {
    let envd = Envd::start();
    let init = |resolver: &str| {
        let body = format!(r#"{{"dns": ["{resolver}"], "nonce": "n", "envVars": {{"RESOLVER": "{resolver}"}}}}"#);
        assert_eq!(envd.http("POST", "/init", &[], &body).0, 204);
    };
    let resolvers = || std::fs::read_to_string(envd.root.join("etc/resolv.conf")).unwrap();
    init("192.0.2.1");
    assert_eq!(envd.http("POST", "/fsfreeze", &[], "").0, 204);
    init("192.0.2.2");
    init("192.0.2.3");
    assert_eq!(resolvers(), "nameserver 192.0.2.1\n");
    assert_eq!(envd.http("GET", "/health", &[], "").0, 204);
    assert_eq!(envd.http("GET", "/metrics", &[], "").0, 200);
    assert_eq!(envd.http("POST", "/snapshot/prepare", &[], "").0, 204);
    assert_eq!(envd.http("POST", "/fsthaw", &[], "").0, 204);
    assert_eq!(resolvers(), "nameserver 192.0.2.3\n");
    let ran = run(&envd, bash("echo $RESOLVER"), CallOptions::default())
        .await
        .unwrap();
    assert_eq!(ran.out(), "192.0.2.3\n");
}

#[tokio::test]
async fn nothing_is_started_in_a_frozen_guest_before_it_is_thawed() {
    let envd = Envd::start();
    let frozen = envd.raw(b"POST /fsfreeze HTTP/1.1\r\nHost: envd\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    // On a machine that is not envd's no program is stopped, and the answer says so.
    assert!(frozen.contains("x-roost-held: none"), "{frozen}");
    let file = envd.root.join("ran");
    let script = format!("echo $NEW > {}", file.display());
    let body = r#"{"envVars": {"NEW": "after"}}"#;
    let impatient = CallOptions::default().with_header("connect-timeout-ms", "100");
    let error = run(&envd, bash(&script), impatient).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error:?}");
    let started = async {
        let ran = run(&envd, bash(&script), CallOptions::default()).await.unwrap();
        assert_eq!(ran.end.exit_code, 0);
    };
    let thawed = async {
        assert_eq!(envd.http("POST", "/init", &[], body).0, 204);
        assert!(!file.exists() && envd.children().is_empty());
        assert_eq!(envd.http("POST", "/fsthaw", &[], "").0, 204);
    };
    tokio::join!(started, thawed);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "after\n");
}

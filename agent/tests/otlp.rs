//! Traces of an agent that has a collector to send them to.

use std::convert::Infallible;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_agent::{pki, tls};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const TRACE_ID: [u8; 16] = *b"\x0a\xf7\x65\x19\x16\xcd\x43\xdd\x84\x48\xeb\x21\x1c\x80\x31\x9c";

/// A collector that is no more than its port: the path of each export, and its message, whole.
async fn collect(listener: TcpListener, exports: mpsc::UnboundedSender<(String, Bytes)>) {
    while let Ok((stream, _)) = listener.accept().await {
        let exports = exports.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request: Request<Incoming>| {
                let exports = exports.clone();
                async move {
                    let path = request.uri().path().to_owned();
                    let body = request.into_body().collect().await.expect("whole").to_bytes();
                    exports.send((path, body)).expect("the test waits");
                    let answer = Response::builder()
                        .header("content-type", "application/grpc")
                        .header("grpc-status", "0")
                        .body(Full::new(Bytes::from_static(&[0; 5])));
                    Ok::<_, Infallible>(answer.expect("an answer"))
                }
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            drop(server.serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

#[tokio::test]
async fn a_collector_has_the_spans_of_calls_as_part_of_their_callers_traces() {
    let collector = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let endpoint = format!("http://{}", collector.local_addr().expect("an address"));
    let (exports, mut exported) = mpsc::unbounded_channel();
    tokio::spawn(collect(collector, exports));

    let dir = tempfile::tempdir().expect("a directory");
    let below = |name: &str| dir.path().join(name);
    for name in ["kernels", "images", "sandboxes", "tombstones", "run"] {
        std::fs::create_dir_all(below(name)).expect("made");
    }
    pki::init(&below("pki"), &[]).expect("certificates");
    let free = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        listener.local_addr().expect("an address")
    };
    let (address, status) = (free(), free());
    let config = format!(
        "listen = \"{address}\"\nstatus_listen = \"{status}\"\nlog_format = \"json\"\ndir = {:?}\nvm_run_dir = {:?}\npki_dir = {:?}\n\
         privd_socket = {:?}\nshim_socket = {:?}\nclient_names = [\"roost-cli\"]\n",
        dir.path(),
        below("run"),
        below("pki"),
        below("no-privd"),
        below("no-shim"),
    );
    std::fs::write(below("agent.toml"), config).expect("written");
    let mut agent = Command::new(env!("CARGO_BIN_EXE_roost-agent"))
        .arg("--config")
        .arg(below("agent.toml"))
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the agent starts");

    let config = Arc::new((*tls::client(&below("pki")).expect("usable")).clone());
    let stream = loop {
        match TcpStream::connect(address).await {
            Ok(stream) => break stream,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let stream = tokio_rustls::TlsConnector::from(config).connect(address.ip().into(), stream);
    let stream = TokioIo::new(stream.await.expect("trusted"));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.expect("HTTP");
    tokio::spawn(connection);
    let request = Request::post("/hostagent.v1.HostAgentService/ListSandboxes")
        .header("host", address.to_string())
        .header("content-type", "application/json")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .body(Full::new(Bytes::from_static(b"{}")))
        .expect("a request");
    let answer = sender.send_request(request).await.expect("answered");
    drop(answer.into_body().collect().await);

    // What is left goes out at the end.
    kill(
        Pid::from_raw(i32::try_from(agent.id()).expect("a pid")),
        Signal::SIGTERM,
    )
    .expect("told to end");
    let (path, message) = exported.recv().await.expect("an export");
    assert_eq!(path, "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    let has = |bytes: &[u8]| message.windows(bytes.len()).any(|window| window == bytes);
    assert!(has(&TRACE_ID), "the caller's trace");
    assert!(has(b"\xb7\xad\x6b\x71\x69\x20\x33\x31"), "the caller's span as parent");
    assert!(has(b"ListSandboxes") && has(b"roost-agent"));
    let status = tokio::task::spawn_blocking(move || agent.wait())
        .await
        .expect("no panic");
    assert_eq!(status.expect("it ends").code(), Some(0));
}

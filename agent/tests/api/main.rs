//! The API from outside, over real TLS, on a host that has no image, no privd and no shim: who may call, and what is refused before
//! anything of the host is needed. What needs a host is tested in the rig.

mod debian;
mod templates;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use roost_agent::api::service::Service;
use roost_agent::config::Config;
use roost_agent::guest::Token;
use roost_agent::host::Host;
use roost_agent::outbox::{self, Outbox};
use roost_agent::registry::Registry;
use roost_agent::sandbox::plan::{Plan, Wish};
use roost_agent::sandbox::record::{Kept, Memory, PauseReason, Phase, Record};
use roost_agent::serve::{Access, serve};
use roost_agent::{pki, recover, tls};
use roost_common::units::Sectors;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

struct Agent {
    address: SocketAddr,
    dir: tempfile::TempDir,
    service: Arc<Service>,
    host: Arc<Host>,
    registry: Arc<Registry>,
}

impl Agent {
    /// An agent that has recovered, on a port of its own.
    async fn start() -> Self {
        Self::start_recovering(&["roost-cli"], &[]).await.recover().await
    }

    async fn recover(self) -> Self {
        recover::recover(&self.registry).await.expect("recovered");
        self.service.recovered();
        self
    }

    /// An agent that is not there yet.
    async fn start_recovering(client_names: &[&str], viewer_names: &[&str]) -> Self {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self::start_as(Config {
            client_names: names(client_names),
            viewer_names: names(viewer_names),
            ..Config::default()
        })
        .await
    }

    /// The same with a configuration, whose paths are made its own.
    async fn start_as(config: Config) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let below = |name: &str| dir.path().join(name);
        for name in ["lib/kernels", "lib/images", "lib/sandboxes", "lib/tombstones", "run"] {
            std::fs::create_dir_all(below(name)).expect("made");
        }
        pki::init(&below("pki"), &[]).expect("certificates");
        let config = Config {
            dir: below("lib"),
            vm_run_dir: below("run"),
            pki_dir: below("pki"),
            privd_socket: below("no-privd.sock"),
            shim_socket: below("no-shim.sock"),
            ..config
        };
        let identities = tls::Identities::standalone(tls::server(&config.pki_dir).expect("usable"));
        let access = Access::new(identities, &config);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let host = Host::new(config);
        let outbox = Outbox::open(&host.layout.outbox(), outbox::Limits::default()).expect("opened");
        let host = Arc::new(host.with_outbox(outbox));
        let registry = Registry::new(host.clone());
        let service = Service::new(registry.clone());
        tokio::spawn(serve(listener, access, service.clone()));
        Self {
            address,
            dir,
            service,
            host,
            registry,
        }
    }

    fn pki(&self) -> std::path::PathBuf {
        self.dir.path().join("pki")
    }

    /// Runs the command line against this agent, with the certificates of a directory.
    async fn roost_with(&self, pki: &Path, args: &[&str]) -> Output {
        let (address, pki) = (self.address.to_string(), pki.to_owned());
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let run = tokio::task::spawn_blocking(move || {
            Command::new(env!("CARGO_BIN_EXE_roost"))
                .args(["--host", &address, "--pki"])
                .arg(pki)
                .args(args)
                .output()
                .expect("roost runs")
        });
        run.await.expect("no panic")
    }

    async fn roost(&self, args: &[&str]) -> Output {
        self.roost_with(&self.pki(), args).await
    }

    /// The answer to a POST by h2.
    async fn post(&self, path: &str, content_type: &str, body: Vec<u8>) -> (http::StatusCode, bytes::Bytes) {
        let mut config = (*tls::client(&self.pki()).expect("usable")).clone();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(self.address).await.expect("connected");
        let name = self.address.ip().into();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream);
        let stream = TokioIo::new(stream.await.expect("trusted"));
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
            .await
            .expect("h2");
        tokio::spawn(connection);
        let request = http::Request::post(format!("https://{}{path}", self.address))
            .header("content-type", content_type)
            .body(Full::new(bytes::Bytes::from(body)))
            .expect("a request");
        let answer = sender.send_request(request).await.expect("answered");
        let status = answer.status();
        let body = answer.into_body().collect().await.expect("whole").to_bytes();
        (status, body)
    }

    /// Standard error of an invocation that must fail.
    async fn refusal(&self, args: &[&str]) -> String {
        let output = self.roost(args).await;
        assert!(!output.status.success(), "roost {args:?} succeeded");
        String::from_utf8(output.stderr).expect("UTF-8")
    }
}

const TEAM: &str = "11111111-2222-3333-4444-555555555555";

/// A message of a stream, in Connect's envelope.
fn enveloped(message: &str) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("small").to_be_bytes();
    [&[0][..], &length, message.as_bytes()].concat()
}

#[tokio::test]
async fn health_checkers_hear_when_calls_are_served() {
    let agent = Agent::start_recovering(&["roost-cli"], &[]).await;
    let names = ["", "hostagent.v1.HostAgentService", "roost.v1.RoostService"];
    let ask = async |name: &str| {
        let body = format!("{{\"service\":\"{name}\"}}").into_bytes();
        let (status, answer) = agent
            .post("/grpc.health.v1.Health/Check", "application/json", body)
            .await;
        (status.as_u16(), String::from_utf8_lossy(&answer).into_owned())
    };
    for name in names {
        assert_eq!(ask(name).await, (200, r#"{"status":"NOT_SERVING"}"#.into()), "{name:?}");
    }
    let watch = enveloped(r#"{"service":"roost.v1.RoostService"}"#);
    let watch = agent.post("/grpc.health.v1.Health/Watch", "application/connect+json", watch);
    let seen = tokio::time::timeout(std::time::Duration::from_millis(300), watch).await;
    assert!(seen.is_err(), "a watch goes on: {seen:?}");
    recover::recover(&agent.registry).await.expect("recovered");
    agent.service.recovered();
    for name in names {
        while ask(name).await.1.contains("NOT_SERVING") {
            tokio::task::yield_now().await;
        }
        assert_eq!(ask(name).await, (200, r#"{"status":"SERVING"}"#.into()), "{name:?}");
    }
    let (status, said) = ask("no.such.Service").await;
    assert_eq!(status, 404, "{said}");
    // The limit of this service's own.
    assert!(ask(&"x".repeat(20 << 10)).await.1.contains("resource_exhausted"));
}

#[tokio::test]
async fn clients_can_ask_which_calls_there_are() {
    let agent = Agent::start().await;
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let questions = [
            enveloped(r#"{"listServices":""}"#),
            enveloped(r#"{"fileContainingSymbol":"hostagent.v1.HostAgentService.CreateSandbox"}"#),
            enveloped(r#"{"fileContainingSymbol":"no.Such"}"#),
        ];
        let (status, answer) = agent.post(&path, "application/connect+json", questions.concat()).await;
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(status, 200, "{answer}");
        for part in [
            r#""name":"hostagent.v1.HostAgentService""#,
            r#""name":"roost.v1.RoostService""#,
            "fileDescriptorProto",
            "errorResponse",
        ] {
            assert!(answer.contains(part), "no {part} in {answer}");
        }
    }
}

#[tokio::test]
async fn a_listed_client_is_served() {
    let agent = Agent::start().await;
    let output = agent.roost(&["ls"]).await;
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.starts_with(b"ID"));
    let output = agent.roost(&["ls", "--json"]).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "{}");
}

#[tokio::test]
async fn an_agent_that_recovers_says_so() {
    let agent = Agent::start_recovering(&["roost-cli"], &[]).await;
    let template = ["--team", TEAM, "--template", TEAM];
    for args in [
        &["ls"][..],
        &["create"],
        &["ping", "x"],
        &["rm", "x"],
        &["exec", "x", "true"],
        &["pause", "x"],
        &["resume", "x"],
        &[&["snapshot", "x"], &template[..]].concat(),
        &[&["flatten", "x"], &template[..]].concat(),
        &[&["rmi"], &template[..]].concat(),
        &["why", "x"],
        &["drain"],
    ] {
        let said = agent.refusal(args).await;
        assert!(
            said.contains("recovering") && said.contains("unavailable"),
            "{args:?}: {said}"
        );
    }
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_and_the_person_told() {
    let agent = Agent::start().await;
    let other = agent.dir.path().join("other");
    pki::init(&other, &[]).expect("certificates");
    // Their CA does not sign our server.
    let output = agent.roost_with(&other, &["ls"]).await;
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("certificate"),
        "{output:?}"
    );
    // With our CA, so that it is the server that refuses.
    std::fs::copy(agent.pki().join("ca.pem"), other.join("ca.pem")).expect("copied");
    let output = agent.roost_with(&other, &["ls"]).await;
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("certificate"),
        "{output:?}"
    );
}

#[tokio::test]
async fn only_certificates_that_our_ca_has_signed_and_that_hold_now_are_let_in() {
    let agent = Agent::start().await;
    let read = |name: &str| std::fs::read_to_string(agent.pki().join(name)).expect("read");
    let of_ca = KeyPair::from_pem(&read("ca-key.pem")).expect("a key");
    let ours = Issuer::from_ca_cert_pem(&read("ca.pem"), of_ca).expect("a CA");
    let others_key = KeyPair::generate().expect("a key");
    let mut others = CertificateParams::default();
    others.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = others.self_signed(&others_key).expect("signed").pem();
    let others = Issuer::new(others, others_key);

    let key = KeyPair::generate().expect("a key");
    let now = time::OffsetDateTime::now_utc();
    let client = |from: i64, until: i64| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, pki::CLIENT_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = now + time::Duration::days(from);
        params.not_after = now + time::Duration::days(until);
        params
    };
    let mut of_a_server = client(-1, 1);
    of_a_server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let signed = |params: &CertificateParams, by| params.signed_by(&key, by).expect("signed").pem();
    let dir = agent.dir.path().join("caller");
    std::fs::create_dir(&dir).expect("made");
    std::fs::copy(agent.pki().join("ca.pem"), dir.join("ca.pem")).expect("copied");
    std::fs::write(dir.join("client-key.pem"), key.serialize_pem()).expect("written");
    for (what, chain, is_let_in) in [
        ("ours", signed(&client(-1, 1), &ours), true),
        ("expired", signed(&client(-2, -1), &ours), false),
        ("not yet", signed(&client(1, 2), &ours), false),
        ("a server's", signed(&of_a_server, &ours), false),
        ("its own", client(-1, 1).self_signed(&key).expect("signed").pem(), false),
        // What a verifier believes that takes its roots from whom it verifies.
        ("with a root of its own", signed(&client(-1, 1), &others) + &root, false),
    ] {
        std::fs::write(dir.join("client.pem"), chain).expect("written");
        let output = agent.roost_with(&dir, &["ls"]).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), is_let_in, "{what}: {said}");
        assert!(is_let_in || said.contains("certificate"), "{what}: {said}");
    }
}

#[tokio::test]
async fn who_never_ends_a_handshake_a_head_or_a_nesting_is_given_up_and_holds_up_nobody() {
    let agent = Agent::start().await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(agent.address).await.expect("connected");
        // A handshake's first bytes.
        stream.write_all(&[0x16, 3, 1, 2]).await.expect("sent");
        silent.push(stream);
    }
    assert!(agent.roost(&["ls"]).await.status.success());
    let path = "/hostagent.v1.HostAgentService/CreateSandbox";
    let deep = [&b"{\"defaultEnv\":"[..], &[b'['; 100_000]].concat();
    let (status, said) = agent.post(path, "application/json", deep).await;
    assert_eq!(status, http::StatusCode::BAD_REQUEST, "{said:?}");

    let mut config = (*tls::client(&agent.pki()).expect("usable")).clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = TcpStream::connect(agent.address).await.expect("connected");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(agent.address.ip().into(), stream);
    let mut stream = stream.await.expect("trusted");
    let head = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(80 << 10));
    // It may be closed before all of it is sent.
    drop(stream.write_all(head.as_bytes()).await);
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await);
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");

    // Longer than a handshake may take.
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(11)).await;
    tokio::time::resume();
    for mut stream in silent {
        let read = tokio::time::timeout(Duration::from_secs(30), stream.read(&mut [0; 1])).await;
        assert!(matches!(read, Ok(Ok(0) | Err(_))), "{read:?}");
    }
    assert!(agent.roost(&["ls"]).await.status.success());
}

#[tokio::test]
async fn a_certificate_of_our_ca_with_another_name_is_refused() {
    let agent = Agent::start_recovering(&["somebody-else"], &[]).await;
    let said = agent.refusal(&["ls"]).await;
    assert!(
        said.contains("client_names") && said.contains("permission_denied"),
        "{said}"
    );
}

#[tokio::test]
async fn a_viewer_may_look_and_nothing_else() {
    let agent = Agent::start_recovering(&["somebody-else"], &["roost-cli"])
        .await
        .recover()
        .await;
    for list in [&["ls"][..], &["template", "ls"]] {
        let listed = agent.roost(list).await;
        assert!(listed.status.success(), "{listed:?}");
    }
    // The one that it may ask has its own answer: there is no such sandbox.
    let said = agent.refusal(&["why", "nobody"]).await;
    assert!(!said.contains("permission_denied"), "{said}");
    for call in [
        &["create"][..],
        &["rm", "nobody"],
        &["pause", "nobody"],
        &["exec", "nobody", "--", "true"],
        &["logs", "nobody"],
        &["ping", "nobody"],
        &["drain"],
    ] {
        let said = agent.refusal(call).await;
        assert!(
            said.contains("permission_denied") && said.contains("viewer_names"),
            "{call:?}: {said}"
        );
    }
    for path in [
        "/proxy/nobody/8080/",
        "/forward/nobody/8080",
        "/hostagent.v1.HostAgentService/listsandboxes",
        "/roost.v1.RoostService/ImportTemplate",
        "/roost.v1.RoostService/VerifyTemplate",
    ] {
        let (status, _) = agent.post(path, "application/json", b"{}".to_vec()).await;
        assert_eq!(status, http::StatusCode::FORBIDDEN, "{path}");
    }
}

#[tokio::test]
async fn a_client_that_calls_too_often_is_held_off() {
    let agent = Agent::start_as(Config {
        max_calls_per_sec: std::num::NonZeroU32::new(1),
        ..Config::default()
    });
    let agent = agent.await.recover().await;
    let path = "/hostagent.v1.HostAgentService/ListSandboxes";
    // All at once, and far more than a slow machine could space out to one a second.
    let calls = (0..40).map(|_| agent.post(path, "application/json", b"{}".to_vec()));
    let answers = futures::future::join_all(calls).await;
    let with = |wanted: http::StatusCode| answers.iter().filter(move |(status, _)| *status == wanted);
    assert!(with(http::StatusCode::OK).count() >= 2, "{answers:?}");
    let held_off: Vec<_> = with(http::StatusCode::TOO_MANY_REQUESTS)
        .map(|(_, body)| String::from_utf8_lossy(body).into_owned())
        .collect();
    assert!(
        !held_off.is_empty() && held_off.iter().all(|said| said.contains("max_calls_per_sec")),
        "{answers:?}"
    );
    // What goes through the proxy is not counted: it has its own answer.
    let (status, _) = agent
        .post("/proxy/nobody/8080/", "application/json", b"{}".to_vec())
        .await;
    assert_eq!(status, http::StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn an_agent_that_is_not_there_is_named() {
    let agent = Agent::start().await;
    let output = Command::new(env!("CARGO_BIN_EXE_roost"))
        .args(["--host", "127.0.0.1:1", "ls", "--pki"])
        .arg(agent.pki())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("127.0.0.1:1") && said.contains("is roost-agent running"),
        "{said}"
    );
    let output = Command::new(env!("CARGO_BIN_EXE_roost"))
        .args(["exec", "--pki", "/nonexistent", "x", "true"])
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(125));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("roost pki init"),
        "{output:?}"
    );
}

#[tokio::test]
async fn plain_http_gets_one_clear_answer() {
    let agent = Agent::start().await;
    let mut stream = TcpStream::connect(agent.address).await.expect("connected");
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read to the end");
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("HTTPS"),
        "{answer}"
    );
}

#[tokio::test]
async fn creates_that_cannot_be_are_refused_and_leave_nothing() {
    let agent = Agent::start().await;
    let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    for (args, says) in [
        (&["create", "--id", "../x"][..], "sandbox_id"),
        (&["create", "--template", "x"], "no template \"x\" on this host"),
        (&["create", "--template", uuid], uuid),
        (&["create", "--vcpus", "1000"], "vcpus"),
        (&["create", "--memory=-1"], "memory_mb"),
        // An image is missing here, which is the host's fault and named as such.
        (&["create"], "no template"),
    ] {
        let said = agent.refusal(args).await;
        assert!(said.contains(says), "{args:?}: {said}");
    }
    let lib = agent.dir.path().join("lib");
    for dir in [
        lib.join("sandboxes"),
        lib.join("tombstones"),
        agent.dir.path().join("run"),
    ] {
        assert_eq!(
            std::fs::read_dir(&dir).expect("read").count(),
            0,
            "{} is not empty",
            dir.display()
        );
    }
    assert_eq!(agent.roost(&["ls", "--json"]).await.stdout, b"{}\n");
}

#[tokio::test]
async fn a_host_without_privd_or_shims_says_which_socket_and_undoes_the_create() {
    let agent = Agent::start().await;
    let lib = agent.dir.path().join("lib");
    std::fs::create_dir(lib.join("images/minimal")).expect("made");
    std::fs::write(lib.join("images/minimal/rootfs.ext4"), vec![0; 8192]).expect("written");
    let said = agent.refusal(&["create"]).await;
    assert!(said.contains("vmlinux-<version>"), "{said}");
    std::fs::write(lib.join("kernels/vmlinux-6.1"), "").expect("written");
    let said = agent.refusal(&["create", "--id", "x"]).await;
    assert!(said.contains("no-shim.sock"), "{said}");
    assert_eq!(std::fs::read_dir(lib.join("sandboxes")).expect("read").count(), 0);
    assert!(agent.refusal(&["ping", "x"]).await.contains("no sandbox x"));
}

/// The record of a sandbox that was never made.
fn record(id: &str, slot: u32) -> Record {
    let wish = Wish {
        id: id.into(),
        ..Wish::default()
    };
    let plan = Plan::check(wish, &Config::default(), |_| None, || unreachable!("it has an id"));
    Record::new(slot, plan.expect("checked"), Sectors(8), 5, Token::random())
}

#[tokio::test]
async fn recovery_removes_what_an_earlier_agent_left_and_says_why_it_ended() {
    let agent = Agent::start_recovering(&["roost-cli"], &[]).await;
    let lib = agent.dir.path().join("lib");
    for dir in [
        "lib/sandboxes/ran/vm",
        "lib/sandboxes/half",
        "lib/sandboxes/.removing-gone/vm",
        "run/ran",
        "run/lost",
    ] {
        std::fs::create_dir_all(agent.dir.path().join(dir)).expect("made");
    }
    let record = record("ran", 1).with(Phase::Running);
    record.write(&agent.host.layout).expect("written");
    recover::recover(&agent.registry).await.expect("recovered");
    agent.service.recovered();
    assert_eq!(std::fs::read_dir(lib.join("sandboxes")).expect("read").count(), 0);
    assert_eq!(
        std::fs::read_dir(agent.dir.path().join("run")).expect("read").count(),
        0
    );
    let said = agent.refusal(&["ping", "ran"]).await;
    assert!(said.contains("restart of the host"), "{said}");
    assert!(!agent.refusal(&["ping", "half"]).await.contains("restart of the host"));
}

#[tokio::test]
async fn recovery_keeps_what_is_paused_and_tidies_it() {
    let agent = Agent::start_recovering(&["roost-cli"], &[]).await;
    let layout = &agent.host.layout;
    let record = record("kept", 7);
    let id = &record.plan.id;
    for number in [1, 2, 3] {
        std::fs::create_dir_all(layout.generation(id, number)).expect("made");
    }
    std::fs::create_dir_all(layout.vm_run(id)).expect("made");
    std::fs::write(layout.cow(id), "").expect("written");
    let kept = Kept {
        generation: 2,
        memory: Memory::Whole,
        told: false,
        reason: PauseReason::Idle,
        paused_at_unix: 9,
        disk_written_at: 1,
    };
    // Its resume was under way, and somebody wrote to its disk: the file is younger than the record says.
    record.with(Phase::Resuming(kept)).write(layout).expect("written");
    recover::recover(&agent.registry).await.expect("recovered");
    agent.service.recovered();
    let names = std::fs::read_dir(layout.vm(id)).expect("read");
    let names: Vec<_> = names.map(|entry| entry.expect("read").file_name()).collect();
    assert_eq!(names, ["2"]);
    assert!(!layout.vm_run(id).exists());
    let spent = Kept {
        memory: Memory::Spent,
        told: true,
        ..kept
    };
    assert_eq!(
        Record::read(layout, id).expect("read").phase,
        Phase::Paused(spent),
        "a memory that the disk has left behind is not offered"
    );
    let listed = agent.roost(&["ls", "--json"]).await.stdout;
    let listed: serde_json::Value = serde_json::from_slice(&listed).expect("JSON");
    assert_eq!(listed["autoPausedSandboxIds"], serde_json::json!(["kept"]));
    assert_eq!(listed["pausedSandboxes"][0]["hostIp"], "10.11.0.7");
    assert!(listed.get("sandboxes").is_none(), "{listed}");
    let said = agent.refusal(&["resume", "kept"]).await;
    assert!(said.contains("from its disk alone"), "{said}");
    assert!(agent.refusal(&["exec", "kept", "true"]).await.contains("paused"));
    let rm = agent.roost(&["rm", "kept"]).await;
    assert!(rm.status.success(), "{rm:?}");
    assert!(!layout.sandbox(id).exists());
}

#[tokio::test]
async fn recovery_lists_what_it_cannot_read_and_no_create_takes_its_place() {
    let agent = Agent::start_recovering(&["roost-cli"], &[]).await;
    let layout = &agent.host.layout;
    let record = record("newer", 7);
    let id = &record.plan.id;
    std::fs::create_dir_all(layout.vm(id)).expect("made");
    std::fs::write(layout.cow(id), "somebody's data").expect("written");
    for unusable in ["{\"version\": 2}", "", "{\"version\": 1"] {
        std::fs::write(layout.record(id), unusable).expect("written");
        recover::recover(&agent.registry).await.expect("recovered");
        assert_eq!(
            std::fs::read(layout.cow(id)).expect("kept"),
            b"somebody's data",
            "{unusable}"
        );
    }
    agent.service.recovered();
    let lib = agent.dir.path().join("lib");
    std::fs::create_dir(lib.join("images/minimal")).expect("made");
    std::fs::write(lib.join("images/minimal/rootfs.ext4"), vec![0; 8192]).expect("written");
    std::fs::write(lib.join("kernels/vmlinux-6.1"), "").expect("written");
    let said = agent.refusal(&["create", "--id", "newer"]).await;
    assert!(said.contains("exists already"), "{said}");
    let listed = agent.roost(&["ls", "--json"]).await.stdout;
    let listed: serde_json::Value = serde_json::from_slice(&listed).expect("JSON");
    assert_eq!(listed["sandboxes"][0]["status"], "unreachable", "{listed}");
    let said = agent.refusal(&["resume", "newer"]).await;
    assert!(
        said.contains("cannot be reached") && said.contains("unavailable"),
        "{said}"
    );
    assert_eq!(std::fs::read(layout.cow(id)).expect("kept"), b"somebody's data");
    // Whoever destroys it is heard, whatever it was.
    let rm = agent.roost(&["rm", "newer"]).await;
    assert!(rm.status.success(), "{rm:?}");
    assert!(!layout.sandbox(id).exists());
}

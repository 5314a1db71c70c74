//! Registration: once, with room for its answer, and with an error that says what to do.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use roost_agent::control::client::Client;
use roost_agent::control::credentials::Secret;
use roost_agent::control::register::{RegisterError, register};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::pki::Ca;
use crate::plane::{Fate, HOST, Plane, REGISTER, TOKEN, store};

#[tokio::test]
async fn a_host_is_registered_once_and_keeps_what_it_was_given() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    let credentials = plane.register(dir.path(), TOKEN).await.expect("registered");
    assert_eq!(credentials.host_id, HOST);
    assert_eq!(store(dir.path()).load().expect("read"), Some(credentials));
    let wish = plane.lock().registered[0].clone();
    assert!(["amd64", "arm64"].contains(&wish["arch"].as_str().expect("a name")));
    for number in ["cpu_cores", "memory_mb", "disk_gb"] {
        assert!(wish[number].as_u64().is_some_and(|number| number > 0), "{wish}");
    }
    assert_eq!(wish["address"], "127.0.0.1:50051");
    let again = plane.register(dir.path(), TOKEN).await.expect_err("registered already");
    assert!(again.to_string().contains(HOST), "{again}");
    assert_eq!(plane.answers(REGISTER), [201], "nothing more was sent");
}

#[tokio::test]
async fn each_refusal_says_what_to_do_and_leaves_no_credentials() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    let refused = async |token: &str, address: &str| {
        let token = Secret::new(token.into());
        let error = register(&plane.client(), &store(dir.path()), dir.path(), &token, address).await;
        assert_eq!(store(dir.path()).load().expect("read"), None);
        error.expect_err("refused")
    };
    let error = refused(TOKEN, "nowhere").await;
    assert!(
        matches!(&error, RegisterError::Unacceptable(said) if said.contains("said by the control plane")),
        "{error}"
    );
    let error = refused("another", "127.0.0.1:1").await;
    assert!(
        matches!(error, RegisterError::Token(_)) && error.to_string().contains("create another"),
        "{error}"
    );
    plane.judge(|_| Fate::Proxy(502));
    assert!(matches!(refused(TOKEN, "127.0.0.1:1").await, RegisterError::Trouble(_)));
    plane.judge(|_| Fate::Proxy(404));
    assert!(matches!(refused(TOKEN, "127.0.0.1:1").await, RegisterError::Missing(_)));
    plane.judge(|_| Fate::Answered);
    plane.lock().is_deleted = true;
    assert!(matches!(refused(TOKEN, "127.0.0.1:1").await, RegisterError::Missing(_)));
    plane.lock().is_deleted = false;
    plane.judge(|_| Fate::AnswerLost);
    let error = refused(TOKEN, "127.0.0.1:1").await;
    assert!(
        matches!(error, RegisterError::Unanswered(_)) && error.to_string().contains("deleted"),
        "{error}"
    );
}

#[tokio::test]
async fn a_control_plane_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let client = Client::new("http://127.0.0.1:1".parse().expect("a URL"), None).expect("a client");
    let error = register(
        &client,
        &store(dir.path()),
        dir.path(),
        &Secret::new(TOKEN.into()),
        "127.0.0.1:2",
    )
    .await;
    let error = anyhow::Error::new(error.expect_err("nobody there"));
    let said = format!("{error:#}");
    assert!(
        said.contains("nothing was sent") && said.contains("http://127.0.0.1:1"),
        "{said}"
    );
}

#[tokio::test]
async fn nothing_is_sent_where_the_answer_could_not_be_kept() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    // Not a matter of permissions, which are none to root.
    let store = store(&dir.path().join("nowhere"));
    let token = Secret::new(TOKEN.into());
    let error = register(&plane.client(), &store, dir.path(), &token, "127.0.0.1:1")
        .await
        .expect_err("no room");
    assert!(matches!(error, RegisterError::NoRoom(_)), "{error}");
    assert!(plane.answers(REGISTER).is_empty());
}

#[tokio::test]
async fn room_for_the_answer_is_taken_before_the_call() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    plane.judge(|_| Fate::Proxy(503));
    plane.register(dir.path(), TOKEN).await.expect_err("trouble");
    let draft = dir.path().join("credentials/credentials.json.new");
    let metadata = std::fs::metadata(&draft).expect("made before the call");
    assert!(metadata.len() >= 64 << 10, "{} bytes", metadata.len());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
}

/// A server that speaks HTTPS with a certificate of a CA and accepts no token.
async fn https(ca: &Ca) -> SocketAddr {
    let leaf = ca.server("control plane", "127.0.0.1");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("supported")
        .with_no_client_auth()
        .with_single_cert(vec![leaf.certificate.clone()], leaf.key())
        .expect("a key");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("accepted");
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut request = [0; 16 << 10];
            // Head and body of a registration come in one piece or two, and nobody asks for more before the answer.
            drop(stream.read(&mut request).await);
            let body = r#"{"error":{"code":"unauthorized","message":"over TLS"}}"#;
            let length = body.len();
            let answer =
                format!("HTTP/1.1 401 Unauthorized\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
            drop(stream.write_all(answer.as_bytes()).await);
            drop(stream.shutdown().await);
        }
    });
    address
}

#[tokio::test]
async fn https_is_trusted_by_the_configured_ca_and_by_no_other() {
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    let url = format!("https://{}", https(&ca).await);
    let file = dir.path().join("ca.pem");
    let token = Secret::new(TOKEN.into());
    let attempt = async |pem: &str| {
        std::fs::write(&file, pem).expect("written");
        let client = Client::new(url.parse().expect("a URL"), Some(&file)).expect("a client");
        let error = register(&client, &store(dir.path()), dir.path(), &token, "127.0.0.1:1").await;
        error.expect_err("refused")
    };
    let error = attempt(&ca.pem).await;
    assert!(
        matches!(&error, RegisterError::Token(said) if said.contains("over TLS")),
        "{error}"
    );
    let error = attempt(&Ca::new().pem).await;
    assert!(matches!(&error, RegisterError::Unreached(_)), "{error}");
    assert!(format!("{:#}", anyhow::Error::new(error)).contains("ca_file"));
}

/// What `roost-agent` says, and whether it succeeded.
async fn roost_agent(dir: &Path, args: &[&str], token: Option<&str>) -> (bool, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roost-agent"));
    command.arg("--config").arg(dir.join("agent.toml")).args(args);
    command.env_remove("ROOST_DIR").env_remove("ROOST_REGISTRATION_TOKEN");
    if let Some(token) = token {
        command.env("ROOST_REGISTRATION_TOKEN", token);
    }
    let output = command.output().await.expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).expect("UTF-8"))
}

#[tokio::test]
async fn the_program_registers_its_host_and_then_needs_no_other_certificates() {
    let (plane, dir) = (Plane::start().await, tempfile::tempdir().expect("a directory"));
    let below = |name: &str| dir.path().join(name).display().to_string();
    let config = format!(
        "dir = {:?}\npki_dir = {:?}\n[control_plane]\nurl = {:?}\n",
        below(""),
        below("no-pki"),
        plane.url
    );
    std::fs::write(dir.path().join("agent.toml"), config).expect("written");
    std::fs::write(dir.path().join("token"), format!("{TOKEN}\n")).expect("written");
    let at = ["--address", "127.0.0.1:50051"];
    let (ok, said) = roost_agent(dir.path(), &["--check-config"], None).await;
    assert!(
        !ok && said.contains("--register") && said.contains("roost pki init"),
        "{said}"
    );
    let (ok, said) = roost_agent(dir.path(), &["--register"], Some(TOKEN)).await;
    assert!(!ok && said.contains("--address"), "{said}");
    let (ok, said) = roost_agent(dir.path(), &["--address", "0.0.0.0:1"], None).await;
    assert!(!ok && said.contains("0.0.0.0:1"), "{said}");
    let (ok, said) = roost_agent(dir.path(), &[&at[..], &["--register"]].concat(), None).await;
    assert!(!ok && said.contains("ROOST_REGISTRATION_TOKEN"), "{said}");
    let (ok, said) = roost_agent(dir.path(), &[&at[..], &["--register"]].concat(), Some("wrong")).await;
    assert!(!ok && said.contains("create another"), "{said}");
    let file = below("token");
    let (ok, said) = roost_agent(
        dir.path(),
        &[&at[..], &["--register", "--token-file", &file]].concat(),
        None,
    )
    .await;
    assert!(ok && said.contains(HOST) && !said.contains(TOKEN), "{said}");
    let (ok, said) = roost_agent(dir.path(), &[&at[..], &["--register", TOKEN]].concat(), None).await;
    assert!(!ok && said.contains("registered already"), "{said}");
    let (ok, said) = roost_agent(dir.path(), &["--check-config"], None).await;
    assert!(ok, "{said}");
}

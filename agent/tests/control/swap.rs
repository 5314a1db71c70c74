//! The API of a registered host: whom it is to whom, and that it becomes another without a connection ending.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use roost_agent::api::service::Service;
use roost_agent::config::Config;
use roost_agent::control::clock::Moment;
use roost_agent::control::session::Session;
use roost_agent::control::standing::Standing;
use roost_agent::guest::Token;
use roost_agent::host::Host;
use roost_agent::recover;
use roost_agent::registry::Registry;
use roost_agent::sandbox::plan::{Plan, Wish};
use roost_agent::sandbox::record::{Kept, Memory, PauseReason, Phase, Record};
use roost_agent::serve::{Access, serve};
use roost_common::units::Sectors;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use crate::pki::{Ca, Leaf};
use crate::plane::{OTHER_TOKEN, Plane, TOKEN};

const CALLER: &str = "wrenn-cp";

pub(crate) struct Agent {
    address: SocketAddr,
    host: Arc<Host>,
    session: Arc<Session>,
    plane: Arc<Plane>,
    /// Which of the control plane's hosts it is.
    number: usize,
    dir: tempfile::TempDir,
}

impl Agent {
    /// A registered host that has recovered, with certificates of its own too, and a paused sandbox.
    async fn start(dialled: &str) -> Self {
        Self::under(Arc::new(Plane::start().await), 0, dialled, "kept").await
    }

    /// The same as one host of a control plane that may have others, with the id of its paused sandbox.
    pub(crate) async fn under(plane: Arc<Plane>, number: usize, dialled: &str, sandbox: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let below = |name: &str| dir.path().join(name);
        for name in [
            "kernels",
            "images",
            &format!("sandboxes/{sandbox}/vm/1"),
            "tombstones",
            "outbox",
            "run",
        ] {
            std::fs::create_dir_all(below(name)).expect("made");
        }
        roost_agent::pki::init(&below("pki"), &[]).expect("certificates");
        plane.of(number).address = dialled.into();
        let token = [TOKEN, OTHER_TOKEN][number];
        plane.register(dir.path(), token).await.expect("registered");
        let config = Config {
            dir: dir.path().into(),
            vm_run_dir: below("run"),
            pki_dir: below("pki"),
            client_names: vec![CALLER.into(), "roost-cli".into()],
            ..Config::default()
        };
        let standing = Standing::load(&config).expect("usable");
        let Standing::Registered(session) = &standing else {
            panic!("this host is registered");
        };
        assert_eq!(
            session.client().url().to_string(),
            plane.url,
            "known from the registration"
        );
        let host = Arc::new(Host::new(config).under_control_plane());
        paused(sandbox).write(&host.layout).expect("written");
        std::fs::write(below(&format!("sandboxes/{sandbox}/rootfs.cow")), "").expect("written");
        let registry = Registry::new(host.clone());
        let service = Service::new(registry.clone());
        recover::recover(&registry).await.expect("recovered");
        service.recovered();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let access = Access::new(standing.identities().clone(), &host.config());
        tokio::spawn(serve(listener, access, service));
        Self {
            address,
            host,
            session: session.clone(),
            plane,
            number,
            dir,
        }
    }

    /// A caller of the control plane's.
    pub(crate) async fn connect_as_control_plane(&self) -> Caller {
        let (ca, caller) = {
            let state = self.plane.of(self.number);
            (state.ca.pem.clone(), state.ca.client(CALLER))
        };
        self.connect(&ca, &caller).await.expect("connected")
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// A caller with a certificate of a CA, who trusts another, or the same.
    async fn connect(&self, trusts: &str, caller: &Leaf) -> std::io::Result<Caller> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(trusts.as_bytes()) {
            roots.add(certificate.expect("a certificate")).expect("a CA");
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("supported")
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![caller.certificate.clone()], caller.key())
            .expect("a key");
        // The address that the certificate names is not where this test can call.
        let name = self.plane.of(self.number).address.clone();
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from(name).expect("a name");
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        let shown = stream.get_ref().1.peer_certificates().expect("shown")[0].clone();
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
        tokio::spawn(connection);
        Ok(Caller {
            shown: shown.into_owned(),
            sender,
        })
    }

    async fn roost(&self, pki: &Path, args: &[&str]) -> std::process::Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roost"));
        command
            .args(["--host", &self.address.to_string(), "--pki"])
            .arg(pki)
            .args(args);
        command.output().await.expect("it runs")
    }
}

fn paused(id: &str) -> Record {
    let wish = Wish {
        id: id.into(),
        ..Wish::default()
    };
    let plan = Plan::check(wish, &Config::default(), |_| None, || unreachable!("it has an id"));
    let kept = Kept {
        generation: 1,
        memory: Memory::Whole,
        told: true,
        reason: PauseReason::Idle,
        paused_at_unix: 9,
        disk_written_at: 1,
    };
    Record::new(1, plan.expect("checked"), Sectors(8), 5, Token::random()).with(Phase::Paused(kept))
}

pub(crate) struct Caller {
    pub(crate) shown: CertificateDer<'static>,
    sender: SendRequest<Full<Bytes>>,
}

impl Caller {
    pub(crate) async fn list(&mut self) -> (StatusCode, Value) {
        let request = Request::post("/hostagent.v1.HostAgentService/ListSandboxes")
            .header("host", "agent")
            .header("content-type", "application/json")
            .body(Full::from("{}"))
            .expect("a request");
        let answer = self.sender.send_request(request).await.expect("answered");
        let status = answer.status();
        let body = answer.into_body().collect().await.expect("read").to_bytes();
        (status, serde_json::from_slice(&body).expect("JSON"))
    }
}

#[tokio::test]
async fn a_certificate_is_replaced_and_open_connections_go_on() {
    let agent = Agent::start("127.0.0.1").await;
    let first_ca = std::mem::replace(&mut agent.plane.lock().ca, Ca::new());
    let mut open = agent
        .connect(&first_ca.pem, &first_ca.client(CALLER))
        .await
        .expect("connected");
    assert_eq!(open.list().await.0, StatusCode::OK);
    let (status, said) = {
        let mut stranger = agent
            .connect(&first_ca.pem, &first_ca.client("somebody"))
            .await
            .expect("connected");
        stranger.list().await
    };
    assert_eq!(status, StatusCode::FORBIDDEN, "{said}");

    agent
        .session
        .refresh(&agent.session.credentials())
        .await
        .expect("refreshed");
    let next_ca = agent.plane.lock().ca.pem.clone();
    assert_eq!(
        open.list().await.0,
        StatusCode::OK,
        "a connection across the swap goes on"
    );
    let caller = agent.plane.lock().ca.client(CALLER);
    let mut new = agent.connect(&next_ca, &caller).await.expect("connected");
    assert_eq!(new.list().await.0, StatusCode::OK);
    assert_ne!(new.shown, open.shown);
    assert_eq!(open.list().await.0, StatusCode::OK);
    // The old CA is neither shown nor believed any more.
    assert!(agent.connect(&first_ca.pem, &caller).await.is_err());
    let refused = async {
        let mut late = agent.connect(&next_ca, &first_ca.client(CALLER)).await?;
        late.sender.ready().await.map_err(std::io::Error::other)?;
        let request = Request::get("/").body(Full::default()).expect("a request");
        late.sender.send_request(request).await.map_err(std::io::Error::other)
    };
    assert!(refused.await.is_err());
}

#[tokio::test]
async fn this_hosts_own_callers_are_served_beside_the_control_plane() {
    // Which calls at another address.
    let agent = Agent::start("192.0.2.1").await;
    let pki = agent.dir.path().join("pki");
    let output = agent.roost(&pki, &["ls"]).await;
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("paused"), "{output:?}");
    // The control plane's CA names nobody there.
    let (ca, caller) = {
        let state = agent.plane.lock();
        (state.ca.pem.clone(), state.ca.client("roost-cli"))
    };
    assert!(agent.connect(&ca, &caller).await.is_err());
}

#[tokio::test]
async fn a_paused_sandbox_is_listed_as_alive_until_the_lists_since_the_start_were_read() {
    let agent = Agent::start("127.0.0.1").await;
    let (ca, caller) = {
        let state = agent.plane.lock();
        (state.ca.pem.clone(), state.ca.client(CALLER))
    };
    let mut connection = agent.connect(&ca, &caller).await.expect("connected");
    let alive = serde_json::json!("kept");
    for _ in 0..5 {
        let (_, list) = connection.list().await;
        assert_eq!(
            list["sandboxes"][0]["sandboxId"], alive,
            "no heartbeat was acknowledged: {list}"
        );
        assert!(list.get("autoPausedSandboxIds").is_none(), "{list}");
    }
    let now = Moment::now();
    agent.host.listing.acknowledged(now, now);
    for _ in 0..5 {
        let (_, list) = agent.connect(&ca, &caller).await.expect("connected").list().await;
        assert_eq!(
            list["sandboxes"][0]["sandboxId"], alive,
            "nobody has shown that he read one: {list}"
        );
    }
    for _ in 0..3 {
        let (_, list) = connection.list().await;
        assert_eq!(list["sandboxes"][0]["sandboxId"], alive, "{list}");
    }
    let (_, list) = connection.list().await;
    assert_eq!(list["autoPausedSandboxIds"], serde_json::json!(["kept"]));
    assert!(list.get("sandboxes").is_none(), "{list}");
    // A gap, however it came.
    agent
        .host
        .listing
        .acknowledged(now.after(Duration::from_secs(300)), now.after(Duration::from_secs(300)));
    let (_, list) = connection.list().await;
    assert_eq!(list["sandboxes"][0]["status"], "paused", "{list}");
}

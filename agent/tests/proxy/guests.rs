//! An agent with its API, whose host is the model's, and callers of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use roost_agent::api::service::Service;
use roost_agent::config::Config;
use roost_agent::host::Host;
use roost_agent::host::slots::SlotLease;
use roost_agent::outbox::{self, Outbox};
use roost_agent::registry::Registry;
use roost_agent::sandbox::plan::{Plan, Wish};
use roost_agent::sandbox::task::Handle;
use roost_agent::serve::{Access, serve};
use roost_agent::{pki, recover, tls};
use roost_common::ids::Slot;
use rustls_pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::vmm::MEMORY;
use crate::world::{SLOTS, World};
use crate::{guest, privd, shim};

/// Reached by what hangs, and by nothing else.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What must come.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it hangs")
}

/// Waits until something holds.
pub(crate) async fn until(mut holds: impl AsyncFnMut() -> bool) {
    soon(async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// An agent.
pub(crate) struct Agent {
    pub(crate) world: Arc<World>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) service: Arc<Service>,
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    /// Those of the network plan that have no guests here.
    _taken: Vec<SlotLease>,
}

impl Agent {
    /// One that has recovered.
    pub(crate) async fn start() -> Self {
        let agent = Self::start_recovering().await;
        recover::recover(&agent.registry).await.expect("recovered");
        agent.service.recovered();
        agent
    }

    pub(crate) async fn start_recovering() -> Self {
        // Not those of the model, which may run beside this.
        static SEED: AtomicU64 = AtomicU64::new(1 << 32);
        let world = World::new(SEED.fetch_add(1, Ordering::Relaxed));
        tokio::spawn(privd::serve(world.clone()));
        tokio::spawn(shim::serve(world.clone()));
        for (slot, listener) in &world.guests {
            let listener = listener.try_clone().expect("duplicated");
            tokio::spawn(guest::serve(world.clone(), *slot, listener));
        }
        pki::init(&world.path("pki"), &[]).expect("certificates");
        let config = Config {
            dir: world.path("lib"),
            vm_run_dir: world.path("run"),
            pki_dir: world.path("pki"),
            privd_socket: world.path("privd.sock"),
            shim_socket: world.path("shim.sock"),
            dns: Some(Vec::new()),
            disk_reserve_mb: 0,
            guests: world.guest_net,
            ..Config::default()
        };
        let identities = tls::Identities::standalone(tls::server(&config.pki_dir).expect("usable"));
        let access = Access::new(identities, &config);
        let tls = tls::client(&config.pki_dir).expect("usable");
        let host = Host::new(config);
        let outbox = Outbox::open(&host.layout.outbox(), outbox::Limits::default()).expect("an outbox");
        let host = Arc::new(host.with_outbox(outbox));
        let taken = (SLOTS + 1..=u32::from(Slot::MAX))
            .filter_map(|number| host.slots.lease_this(Slot::try_from(number).expect("a slot")))
            .collect();
        let registry = Registry::new(host);
        let service = Service::new(registry.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(serve(listener, access, service.clone()));
        Self {
            world,
            registry,
            service,
            address,
            tls,
            _taken: taken,
        }
    }

    /// A sandbox that runs, and is paused when nobody has used it for so many seconds, of which callers may not ask for so few; 0 is never.
    pub(crate) async fn create(&self, id: &str, timeout_sec: u32) -> Handle {
        let wish = Wish {
            id: id.into(),
            memory_mb: i32::try_from(MEMORY >> 20).expect("MiB"),
            ..Wish::default()
        };
        let config = &self.registry.host().config();
        let mut plan = Plan::check(wish, config, |_| None, || unreachable!("it has an id")).expect("checked");
        plan.timeout_sec = timeout_sec;
        let (handle, outcome) = self.registry.create(plan).expect("accepted");
        soon(outcome).await.expect("answered").expect("created");
        handle
    }

    /// Where the guest of a sandbox is reached.
    pub(crate) fn address_of(&self, sandbox: &Handle) -> IpAddr {
        self.world.guest_net.address_of(sandbox.slot.slot()).ip()
    }

    /// A connection to the API, of this application protocol.
    pub(crate) async fn connect(&self, protocol: &str) -> TlsStream<TcpStream> {
        let mut config = (*self.tls).clone();
        config.alpn_protocols = vec![protocol.into()];
        let stream = TcpStream::connect(self.address).await.expect("connected");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream);
        soon(stream).await.expect("shaken hands")
    }

    /// A caller by HTTP/1.1.
    pub(crate) async fn caller(&self) -> http1::SendRequest<Body> {
        let io = TokioIo::new(self.connect("http/1.1").await);
        let (sender, connection) = http1::handshake(io).await.expect("a connection");
        // Its end is told by answers and bodies.
        tokio::spawn(connection.with_upgrades());
        sender
    }

    /// A caller by HTTP/2.
    pub(crate) async fn h2_caller(&self) -> http2::SendRequest<Body> {
        let io = TokioIo::new(self.connect("h2").await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.expect("a connection");
        tokio::spawn(connection);
        sender
    }

    /// The answer to a request by a connection of its own, without its body.
    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        let mut caller = self.caller().await;
        let answer = soon(caller.send_request(request)).await;
        answer.expect("an answer")
    }

    /// The answer to a GET, with its body where that is whole.
    pub(crate) async fn get(&self, path: &str) -> (StatusCode, HeaderMap, Option<Bytes>) {
        whole(self.send(get(path)).await).await
    }
}

/// An answer with its body, where that is whole.
pub(crate) async fn whole(answer: Response<Incoming>) -> (StatusCode, HeaderMap, Option<Bytes>) {
    let (head, body) = answer.into_parts();
    let body = soon(body.collect()).await.ok().map(|body| body.to_bytes());
    (head.status, head.headers, body)
}

pub(crate) fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn text(text: &'static str) -> Body {
    Full::from(text).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn get(path: &str) -> Request<Body> {
    let request = Request::get(path).header("host", "roost.example");
    request.body(nothing()).expect("a request")
}

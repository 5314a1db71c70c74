//! A control plane: its HTTP side, and what it knows of two hosts, of which most tests have the first alone. What goes wrong with a call is
//! decided by whoever plays it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use roost_agent::control::client::Client;
use roost_agent::control::credentials::{Credentials, Secret, Store};
use roost_agent::control::register::{RegisterError, register};
use roost_agent::control::session::{Session, identity};
use roost_agent::tls::Identities;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::pki::Ca;

/// The registration token that a plane takes once.
pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
pub(crate) const HOST: &str = "0a1b2c3d-host";
/// Those of the second host.
pub(crate) const OTHER_TOKEN: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
pub(crate) const OTHER_HOST: &str = "4e5f6a7b-host";

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is done and answered.
    Answered,
    /// It is done and answered, so much later.
    Slow(Duration),
    /// Nothing is done, and the connection ends.
    Lost,
    /// It is done, and the connection ends.
    AnswerLost,
    /// Nothing is done, and nothing answered.
    Hangs,
    /// Somebody on the way answers.
    Proxy(u16),
    /// It is refused, and nothing is done.
    Refused(u16),
}

/// What it makes of auto-pause events, which is not said anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnAutoPaused {
    Ignored,
    IfRunning,
    IfRunningOrMissing,
}

/// What it has a sandbox for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Belief {
    Running,
    Missing,
    Pausing,
    Paused,
    Resuming,
    Stopped,
}

type Judge = Box<dyn FnMut(&str) -> Fate + Send>;

/// What is known of a host.
pub(crate) struct State {
    host: &'static str,
    pub(crate) ca: Ca,
    /// Where its host is reached, as it said.
    pub(crate) address: String,
    registration: Option<&'static str>,
    generation: u32,
    jwt: String,
    refresh: String,
    /// The one before, where that is good for once more.
    grace: Option<String>,
    pub(crate) keeps_grace: bool,
    pub(crate) is_expired: bool,
    /// Tokens look as if most of their life were over.
    pub(crate) is_old: bool,
    pub(crate) is_deleted: bool,
    pub(crate) heard: Option<Instant>,
    pub(crate) on_auto_paused: OnAutoPaused,
    pub(crate) sandboxes: BTreeMap<String, Belief>,
    /// Registrations, as they came.
    pub(crate) registered: Vec<Value>,
    pub(crate) events: Vec<Value>,
    /// Path and answer, 0 for none.
    pub(crate) calls: Vec<(String, u16)>,
    judge: Judge,
}

type Hosts = [Arc<Mutex<State>>; 2];

pub(crate) struct Plane {
    pub(crate) url: String,
    hosts: Hosts,
    _serving: JoinSet<()>,
}

impl Plane {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let known = [(HOST, TOKEN), (OTHER_HOST, OTHER_TOKEN)];
        let hosts = known.map(|(host, token)| Arc::new(Mutex::new(State::new(host, token))));
        let mut serving = JoinSet::new();
        serving.spawn({
            let hosts = hosts.clone();
            async move { match serve(listener, hosts).await {} }
        });
        Self {
            url,
            hosts,
            _serving: serving,
        }
    }

    /// What is known of the first host.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.hosts[0])
    }

    /// What is known of a host.
    pub(crate) fn of(&self, host: usize) -> MutexGuard<'_, State> {
        locked(&self.hosts[host])
    }

    pub(crate) fn state(&self) -> Arc<Mutex<State>> {
        self.hosts[0].clone()
    }

    pub(crate) fn judge(&self, judge: impl FnMut(&str) -> Fate + Send + 'static) {
        self.lock().judge = Box::new(judge);
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.url.parse().expect("a URL"), None).expect("a client")
    }

    pub(crate) async fn register(&self, dir: &Path, token: &str) -> Result<Credentials, RegisterError> {
        let store = store(dir);
        register(
            &self.client(),
            &store,
            dir,
            &Secret::new(token.into()),
            "127.0.0.1:50051",
        )
        .await
    }

    /// A session of what is in the store.
    pub(crate) fn session(&self, dir: &Path) -> Arc<Session> {
        let store = store(dir);
        let credentials = store.load().expect("read").expect("registered");
        let identity = identity(&store, &credentials).expect("usable");
        Session::new(
            self.client(),
            store,
            credentials,
            Identities::registered(identity, None),
        )
    }

    /// The answers to calls of a path so far.
    pub(crate) fn answers(&self, path: &str) -> Vec<u16> {
        let state = self.lock();
        let calls = state.calls.iter().filter(|(called, _)| called == path);
        calls.map(|(_, status)| *status).collect()
    }
}

pub(crate) fn store(dir: &Path) -> Store {
    Store::new(&dir.join("credentials"))
}

pub(crate) const HEARTBEAT: &str = "/v1/hosts/0a1b2c3d-host/heartbeat";
pub(crate) const REFRESH: &str = "/v1/hosts/auth/refresh";
pub(crate) const REGISTER: &str = "/v1/hosts/register";
pub(crate) const EVENTS: &str = "/v1/hosts/sandbox-events";

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("not poisoned")
}

async fn serve(listener: TcpListener, hosts: Hosts) -> Infallible {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.expect("accepted");
        stream.set_nodelay(true).expect("set");
        let hosts = hosts.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| answer(hosts.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // One that was broken off is meant to be.
            drop(connection.await);
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(hosts: Hosts, request: Request<Incoming>) -> io::Result<Response<Full<Bytes>>> {
    let broken = || io::Error::from(io::ErrorKind::ConnectionReset);
    let path = request.uri().path().to_owned();
    let token = request
        .headers()
        .get("x-host-token")
        .map(|token| token.to_str().expect("ASCII").to_owned());
    let body = request.into_body().collect().await.map_err(|_| broken())?.to_bytes();
    let is_whose = |state: &&Arc<Mutex<State>>| locked(state).is_of(&path, token.as_deref(), &body);
    // What is nobody's is the first one's to refuse.
    let state = hosts.iter().find(is_whose).unwrap_or(&hosts[0]);
    let fate = {
        let mut state = locked(state);
        let fate = (state.judge)(&path);
        if matches!(fate, Fate::Lost | Fate::Hangs) {
            state.calls.push((path.clone(), 0));
        }
        fate
    };
    match fate {
        Fate::Lost => return Err(broken()),
        Fate::Hangs => std::future::pending().await,
        Fate::Proxy(status) => {
            locked(state).calls.push((path, status));
            let body = Full::from("<html><body><h1>nothing here</h1></body></html>");
            return Ok(Response::builder().status(status).body(body).expect("an answer"));
        }
        Fate::Answered | Fate::Slow(_) | Fate::AnswerLost | Fate::Refused(_) => {}
    }
    let (status, body) = {
        let mut state = locked(state);
        let (status, body) = match fate {
            Fate::Refused(status) => fault(status, "refused"),
            _ => state.handle(&path, token.as_deref(), &body),
        };
        state.calls.push((path, status));
        (status, body)
    };
    match fate {
        Fate::AnswerLost => return Err(broken()),
        Fate::Slow(time) => tokio::time::sleep(time).await,
        _ => {}
    }
    let status = StatusCode::from_u16(status).expect("a status");
    let body = Full::from(body.map_or_else(String::new, |body| body.to_string()));
    Ok(Response::builder().status(status).body(body).expect("an answer"))
}

fn fault(status: u16, code: &str) -> (u16, Option<Value>) {
    (
        status,
        Some(json!({"error": {"code": code, "message": "said by the control plane"}})),
    )
}

impl State {
    /// A host that may be registered by a token.
    fn new(host: &'static str, token: &'static str) -> Self {
        Self {
            host,
            ca: Ca::new(),
            address: "127.0.0.1".into(),
            registration: Some(token),
            generation: 0,
            jwt: String::new(),
            refresh: String::new(),
            grace: None,
            keeps_grace: false,
            is_expired: false,
            is_old: false,
            is_deleted: false,
            heard: None,
            on_auto_paused: OnAutoPaused::IfRunning,
            sandboxes: BTreeMap::new(),
            registered: Vec::new(),
            events: Vec::new(),
            calls: Vec::new(),
            judge: Box::new(|_| Fate::Answered),
        }
    }

    /// Whether a call is of this host.
    fn is_of(&self, path: &str, token: Option<&str>, body: &[u8]) -> bool {
        let said = |field: &str| {
            let body = serde_json::from_slice::<Value>(body).ok()?;
            Some(body[field].as_str()?.to_owned())
        };
        match path {
            REGISTER => said("token").as_deref() == self.registration,
            REFRESH => said("refresh_token").is_some_and(|shown| self.refreshes(&shown)),
            EVENTS => token == Some(&self.jwt),
            path => path.split('/').any(|part| part == self.host),
        }
    }

    fn refreshes(&self, shown: &str) -> bool {
        shown == self.refresh || self.grace.as_deref() == Some(shown)
    }

    fn handle(&mut self, path: &str, token: Option<&str>, body: &[u8]) -> (u16, Option<Value>) {
        let body = || serde_json::from_slice::<Value>(body).expect("JSON");
        let heartbeat = format!("/v1/hosts/{}/heartbeat", self.host);
        match path {
            REGISTER => self.register(body()),
            REFRESH => self.refresh(&body()),
            path if path != EVENTS && path != heartbeat => panic!("the control plane has no {path}"),
            _ if token != Some(&self.jwt) || self.is_expired => fault(401, "unauthorized"),
            _ if self.is_deleted => fault(404, "not_found"),
            EVENTS => {
                let event = body();
                self.take(&event);
                self.events.push(event);
                (204, None)
            }
            _ => {
                self.heard = Some(Instant::now());
                (204, None)
            }
        }
    }

    fn register(&mut self, wish: Value) -> (u16, Option<Value>) {
        if !wish["address"].as_str().is_some_and(|address| address.contains(':')) {
            return fault(400, "bad_request");
        }
        if self.registration.is_none() || wish["token"].as_str() != self.registration {
            return fault(401, "unauthorized");
        }
        if self.is_deleted {
            return fault(404, "not_found");
        }
        self.registration = None;
        self.registered.push(wish);
        (201, Some(self.grant()))
    }

    fn refresh(&mut self, wish: &Value) -> (u16, Option<Value>) {
        let shown = wish["refresh_token"].as_str().expect("a token");
        if !self.refreshes(shown) {
            return fault(401, "unauthorized");
        }
        self.grace = self.keeps_grace.then(|| shown.to_owned());
        (200, Some(self.grant()))
    }

    fn grant(&mut self) -> Value {
        self.generation += 1;
        self.is_expired = false;
        let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs()).expect("fits");
        let week = 7 * 24 * 3600;
        let from = if self.is_old { now - week + 3600 } else { now };
        let host = self.host;
        let claims = json!({"typ": "host", "host_id": host, "sub": host, "iat": from, "exp": from + week, "jti": self.generation});
        let part = |json: &str| URL_SAFE_NO_PAD.encode(json);
        self.jwt = format!("{}.{}.c2ln", part(r#"{"alg":"HS256"}"#), part(&claims.to_string()));
        let whose = if host == HOST { "" } else { "-other" };
        self.refresh = format!("refresh-{}{whose}", self.generation);
        let leaf = self.ca.server(host, &self.address);
        json!({
            "host": {"id": host}, "token": self.jwt, "refresh_token": self.refresh,
            "cert_pem": leaf.pem, "key_pem": leaf.key_pem, "ca_cert_pem": self.ca.pem,
        })
    }

    fn take(&mut self, event: &Value) {
        let id = event["sandbox_id"].as_str().expect("an id");
        assert_eq!(event["host_id"], self.host);
        let Some(belief) = self.sandboxes.get_mut(id) else {
            return;
        };
        match event["event"].as_str().expect("a name") {
            "sandbox.auto_paused" => {
                let paused = match self.on_auto_paused {
                    OnAutoPaused::Ignored => false,
                    OnAutoPaused::IfRunning => *belief == Belief::Running,
                    OnAutoPaused::IfRunningOrMissing => matches!(belief, Belief::Running | Belief::Missing),
                };
                if paused {
                    *belief = Belief::Paused;
                }
            }
            "sandbox.error" | "sandbox.stopped" => *belief = Belief::Stopped,
            other => panic!("no event of ours: {other}"),
        }
    }
}

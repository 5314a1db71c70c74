//! The HTTPS listener: accepts, shakes hands, and gives each request to the service or the proxy. Everything before the handshake's end is
//! bounded, and a client whose certificate is not listed gets one answer and no further.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use connectrpc::{ConnectError, ConnectRpcService, Limits, Router};
use connectrpc_health::Status;
use connectrpc_reflection::Reflector;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;
use tracing::{Instrument as _, Span};

use crate::api::files;
use crate::api::operator::Operator;
use crate::api::service::Service;
use crate::config::Config;
use crate::control::listing::Connection;
use crate::errors::Chain;
use crate::proxy::{Body, Proxy};
use crate::throttle::{Client, Throttle};
use crate::tls::{self, Identities};
use crate::trace;
use roost_hostagent::DESCRIPTORS;
use roost_hostagent::hostagent::v1::{HOST_AGENT_SERVICE_SERVICE_NAME, HostAgentServiceExt};
use roost_hostagent::roost::v1::{ROOST_SERVICE_SERVICE_NAME, RoostServiceExt};

/// Most connections at a time; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 4096;
/// Connections that wait in the kernel to be accepted, as far as `net.core.somaxconn` lets them.
const BACKLOG: i32 = 4096;
/// Time that a client has for its handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Time for the headers of a request, counted from the answer before it: so it is also how long a connection may be idle. Control
/// planes keep idle connections for 90 s, and must not find one closed.
const IDLE_LIMIT: Duration = Duration::from_secs(120);
/// Seconds of silence after which the kernel asks a client whether it is there, and between its questions; how many it leaves
/// unanswered. A tunnel that is silent has nothing else that tells.
const PROBE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(15), 4);
/// How often an h2 client is asked whether it is there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long it has to say so.
const KEEPALIVE_LIMIT: Duration = Duration::from_secs(20);
/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Largest request, and largest message in it: a whole file, in JSON, where its bytes take a third more.
const MAX_REQUEST: usize = files::MAX_WHOLE * 3 / 2;
/// Most bytes of a refused request that are read only to be thrown away.
const MAX_UNWANTED: usize = 64 << 20;
/// The first byte of every TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;
/// What a client gets that speaks plain HTTP.
const PLAIN_HTTP: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 70\r\nConnection: close\r\n\r\n\
This port speaks HTTPS with client certificates. Use https:// instead.";

/// Our services.
const SERVICES: [&str; 2] = [HOST_AGENT_SERVICE_SERVICE_NAME, ROOST_SERVICE_SERVICE_NAME];

/// Who may call, and how they are known.
#[derive(Debug)]
pub struct Access {
    /// Our certificates and their CAs.
    pub tls: Arc<Identities>,
    callers: ArcSwap<Callers>,
}

/// What the configuration says of callers.
#[derive(Debug)]
struct Callers {
    /// Names of clients that may call everything.
    clients: Vec<String>,
    /// Names of clients that may look, and change nothing.
    viewers: Vec<String>,
    /// How many calls each of them may make in a second, where that is limited.
    max_calls: Option<NonZeroU32>,
    throttle: Option<Arc<Throttle>>,
}

/// What a client may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Everything.
    Caller,
    /// What is among [`VIEWS`].
    Viewer,
    /// Nothing: its certificate is of our CA, and its name on no list.
    Stranger,
}

impl Access {
    /// As a configuration has it.
    pub fn new(tls: Arc<Identities>, config: &Config) -> Self {
        let callers = Callers::new(config, None);
        Self {
            tls,
            callers: ArcSwap::from_pointee(callers),
        }
    }

    /// Goes by another configuration from the next request on, also on connections that are open. What has been answered with a stream
    /// or a tunnel goes on.
    pub fn reconfigure(&self, config: &Config) {
        let callers = Callers::new(config, Some(&self.callers.load()));
        self.callers.store(Arc::new(callers));
    }
}

impl Callers {
    /// As a configuration has it. A limit that was there before goes on counting where it was.
    fn new(config: &Config, before: Option<&Self>) -> Self {
        let max_calls = config.max_calls_per_sec;
        let before = before.filter(|before| before.max_calls == max_calls);
        Self {
            clients: config.client_names.clone(),
            viewers: config.viewer_names.clone(),
            max_calls,
            throttle: match before {
                Some(before) => before.throttle.clone(),
                None => max_calls.map(|calls| Arc::new(Throttle::new(calls))),
            },
        }
    }

    /// Of a caller whose certificate carries these names.
    fn role(&self, names: &[String]) -> Role {
        let is_among = |listed: &[String]| names.iter().any(|name| listed.contains(name));
        if is_among(&self.clients) {
            Role::Caller
        } else if is_among(&self.viewers) {
            Role::Viewer
        } else {
            Role::Stranger
        }
    }
}

/// Calls that change nothing, are no use of a sandbox, and show nothing of what is in one.
const VIEWS: [&str; 10] = [
    "/hostagent.v1.HostAgentService/ListSandboxes",
    "/hostagent.v1.HostAgentService/GetSandboxMetrics",
    "/roost.v1.RoostService/Why",
    "/roost.v1.RoostService/ListTemplates",
    "/roost.v1.RoostService/InspectTemplate",
    "/roost.v1.RoostService/Ready",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// What answers requests.
#[derive(Clone)]
struct Services {
    rpc: ConnectRpcService,
    proxy: Proxy,
}

impl Services {
    /// The span of a call. What is asked of a guest through the proxy has no name of ours, and its path is the guest's business.
    fn span<B>(&self, request: &Request<B>) -> Span {
        trace::of_call(request, self.proxy.takes(request.uri()).then_some("proxy"))
    }
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, access: impl Into<Arc<Access>>, service: Arc<Service>) -> Infallible {
    let limits = Limits::default()
        .with_max_request_body_size(MAX_REQUEST)
        .with_max_message_size(MAX_REQUEST);
    let operator = Arc::new(Operator(service.clone()));
    let proxy = Proxy::new(service.clone());
    let router = operator.register(service.clone().register(Router::new()));
    let router = health(described(router), &service);
    let rpc = ConnectRpcService::new(router).with_limits(limits);
    let services = Services { rpc, proxy };
    let access = access.into();
    let mut number = 0;
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Asked for once more: the library's own wish is 128.
    if let Err(error) = rustix::net::listen(&listener, BACKLOG) {
        tracing::warn!(%error, "few clients can wait for a connection at a time");
    }
    if let Err(error) = probe(&listener) {
        tracing::warn!(%error, "clients that have gone without a word are not noticed");
    }
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let (stream, peer) = accept(&listener).await;
        number += 1;
        let (services, access) = (services.clone(), access.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, Connection(number), services, &access).await {
                tracing::info!(%peer, error = %Chain(error.as_ref()), "connection ended");
            }
            drop(place);
        });
    }
}

/// The next connection. Where there is one that cannot be had, for want of descriptors mostly, those that are open must close before another
/// attempt makes sense.
pub(crate) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::error!(listener = ?listener.local_addr(), %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Lets clients ask which calls there are: `grpc.reflection.v1`, for who may call them.
fn described(router: Router) -> Router {
    let descriptors = Reflector::from_descriptor_set_bytes(DESCRIPTORS).expect("the descriptors that our build made");
    connectrpc_reflection::install(router, descriptors)
}

/// Tells health checkers whether calls are served yet: `grpc.health.v1`.
fn health(router: Router, service: &Arc<Service>) -> Router {
    let (router, health) = connectrpc_health::install_static(router, SERVICES);
    health.shutdown();
    let service = service.clone();
    tokio::spawn(async move {
        service.until_recovered().await;
        for name in SERVICES.into_iter().chain([""]) {
            health.set_status(name, Status::Serving).expect("one that is there");
        }
    });
    router
}

/// Has the kernel notice clients that have gone without a word: connections have this from their listener.
fn probe(listener: &TcpListener) -> rustix::io::Result<()> {
    let (silence, pause, questions) = PROBE;
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, silence)?;
    sockopt::set_tcp_keepintvl(listener, pause)?;
    sockopt::set_tcp_keepcnt(listener, questions)
}

async fn connection(
    stream: TcpStream,
    number: Connection,
    services: Services,
    access: &Arc<Access>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let acceptor = TlsAcceptor::from(access.tls.on(stream.local_addr()?.ip()));
    let handshake = async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Ok(None);
        }
        if first[0] != TLS_HANDSHAKE {
            let mut stream = stream;
            stream.write_all(PLAIN_HTTP).await?;
            stream.shutdown().await?;
            return Ok(None);
        }
        acceptor.accept(stream).await.map(Some)
    };
    let Some(stream) = tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await?? else {
        return Ok(());
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let client = certificate.map(Client::of);
    let names = certificate.map(tls::client_names).unwrap_or_default();
    let is_stranger = access.callers.load().role(&names) == Role::Stranger;
    let access = access.clone();
    // By what was agreed on, not by what the first bytes look like: waiting for those has no limit of its own.
    let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        // Each time: a reload may have changed who may call.
        let callers = access.callers.load_full();
        let role = callers.role(&names);
        // Of a viewer's connection nothing follows: what it has read no control plane has.
        if !h2 && role == Role::Caller {
            request.extensions_mut().insert(number);
        }
        let services = services.clone();
        async move {
            let refused = match role {
                Role::Caller => None,
                Role::Viewer if VIEWS.contains(&request.uri().path()) => None,
                Role::Viewer => Some(
                    "the client certificate's name is among this agent's viewer_names, which may not make this call",
                ),
                Role::Stranger => Some("the client certificate's name is not among this agent's client_names"),
            };
            let is_call = !services.proxy.takes(request.uri());
            let throttle = callers.throttle.as_ref().filter(|_| is_call);
            let taken = match (throttle, client) {
                (Some(throttle), Some(client)) => throttle.take(client, Instant::now()),
                _ => Ok(()),
            };
            Ok::<_, Infallible>(match (refused, taken) {
                (Some(why), _) => refuse(why),
                (None, Err(wait)) => hold_off(wait),
                (None, Ok(())) => {
                    let span = services.span(&request);
                    // Boxed: it is of 5 KiB, and would be moved with each of the futures around it.
                    Box::pin(answer(services, request)).instrument(span).await
                }
            })
        }
    });
    let io = TokioIo::new(stream);
    if h2 {
        let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        server
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_LIMIT)
            .max_concurrent_streams(128)
            .max_header_list_size(64 << 10);
        server.serve_connection(io, service).await?;
    } else {
        let mut server = hyper::server::conn::http1::Builder::new();
        server
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_LIMIT)
            .max_buf_size(64 << 10)
            .keep_alive(!is_stranger);
        server.serve_connection(io, service).with_upgrades().await?;
    }
    Ok(())
}

async fn answer(services: Services, request: Request<Incoming>) -> Response<Body> {
    let request = request.map(ReadToTheEnd::new);
    if services.proxy.takes(request.uri()) {
        return services.proxy.answer(request).await;
    }
    let answer = services
        .rpc
        .oneshot(request)
        .await
        .unwrap_or_else(|never: Infallible| match never {});
    answer.map(|body| body.map_err(|never| match never {}).boxed_unsync())
}

/// A request's body of which the rest is read and thrown away, within bounds, when the service wants no more of it. A connection that
/// is closed with unread data in it is reset, and the client then does not get to see why it was refused.
struct ReadToTheEnd(Option<Incoming>);

impl ReadToTheEnd {
    fn new(body: Incoming) -> Self {
        Self(Some(body))
    }
}

impl hyper::body::Body for ReadToTheEnd {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.0 {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
    }
}

impl Drop for ReadToTheEnd {
    fn drop(&mut self) {
        let Some(mut body) = self.0.take().filter(|body| !body.is_end_stream()) else {
            return;
        };
        tokio::spawn(async move {
            let rest = async {
                let mut left = MAX_UNWANTED;
                while let Some(Ok(frame)) = body.frame().await {
                    left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                    if left == 0 {
                        break;
                    }
                }
            };
            // A client that takes longer has its connection reset after all.
            drop(tokio::time::timeout(HANDSHAKE_LIMIT, rest).await);
        });
    }
}

/// The answer to a client whose certificate is of our CA but not of a name that may make this call.
fn refuse(why: &str) -> Response<Body> {
    told(StatusCode::FORBIDDEN, &ConnectError::permission_denied(why))
}

/// The answer to a client that calls too often.
fn hold_off(wait: Duration) -> Response<Body> {
    let error =
        ConnectError::resource_exhausted("this client makes more calls a second than this agent's max_calls_per_sec");
    let mut response = told(StatusCode::TOO_MANY_REQUESTS, &error);
    // In whole seconds.
    let seconds = wait.as_secs() + 1;
    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    response
}

fn told(status: StatusCode, error: &ConnectError) -> Response<Body> {
    let body = Full::new(error.to_json())
        .map_err(|never| match never {})
        .boxed_unsync();
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body)
        .expect("constant parts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_plain_http_has_the_length_it_says() {
        let text = std::str::from_utf8(PLAIN_HTTP).expect("ASCII");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len())),
            "the body has {} bytes",
            body.len()
        );
    }
}

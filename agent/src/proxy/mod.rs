//! The proxy: HTTP, WebSockets and raw TCP to the ports of a sandbox, on the listener of the API.
//!
//! ```text
//! /proxy/{sandbox_id}/{port}/{path…}    any method and any upgrade of HTTP/1.1      path, headers, location
//! /forward/{sandbox_id}/{port}          Upgrade: tcp, then the port's own bytes     path, tunnel
//!
//! caller --TLS--> serve --> here --> Connections of the Guest --> one Upstream for a request at a time --> guest
//!                             '----> tunnel, once a side has been upgraded
//! ```
//!
//! - Bodies are streamed: nothing is held but what a socket's reader has read and its writer not yet written.
//! - A connection belongs to one incarnation of a guest, and ends with it, or before its guest is paused ([`connections`]).
//! - A request is use of its sandbox until its answer's last byte; of a tunnel only its bytes are ([`tunnel`]).
//! - envd's port is nobody's: whoever can reach a sandbox's pages must not reach its commands. Its paths at other ports are those of
//!   whatever listens there: envd does not, and a `/health` or `/metrics` of an application is its own.
//! - Informational answers stay between guest and agent: hyper has no way to pass them on.
//!
//! Not here: who may call ([`crate::serve`]), and whether a sandbox runs ([`crate::api`]).

mod connections;
mod error;
pub(crate) mod headers;
mod location;
mod path;
pub(crate) mod tunnel;
mod upstream;

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, request};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

pub use self::connections::Connections;
use self::connections::{Call, Home, Socket};
use self::error::ProxyError;
use self::location::Locator;
use self::path::{Place, Way};
use self::upstream::{Upstream, dial};
use crate::api::service::Service;
use crate::errors::Chain;
use crate::guest::Guest;
use crate::sandbox::task::{Handle, InUse};

/// Most requests and tunnels of one sandbox.
const MAX_CALLS: usize = 512;
/// Most of all sandboxes, below what the listener has connections, so that there is always one left for the API.
const MAX_PROXIED: usize = 3072;
/// Most idle connections to all guests.
const MAX_IDLE: usize = 1024;
/// What a forward upgrades to.
const FORWARD_PROTOCOL: &str = "tcp";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of an answer, and of a request on its way to a guest.
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// The proxy.
#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    service: Arc<Service>,
    places: Arc<Semaphore>,
    idle_places: Arc<Semaphore>,
}

impl Proxy {
    pub(crate) fn new(service: Arc<Service>) -> Self {
        Self {
            service,
            places: Arc::new(Semaphore::new(MAX_PROXIED)),
            idle_places: Arc::new(Semaphore::new(MAX_IDLE)),
        }
    }

    /// Whether a request is the proxy's.
    pub(crate) fn takes(&self, uri: &Uri) -> bool {
        path::is_ours(uri)
    }

    /// Answers a request that is.
    pub(crate) async fn answer<B>(&self, request: Request<B>) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        self.pass_on(request).await.unwrap_or_else(|error| {
            tracing::debug!(error = %Chain(&error), "not proxied");
            error.into_response()
        })
    }

    async fn pass_on<B>(&self, request: Request<B>) -> Result<Response<Body>, ProxyError>
    where
        B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let place = path::parse(request.uri())?;
        if request.method() == Method::CONNECT {
            return Err(ProxyError::Connect);
        }
        match place.way.clone() {
            Way::Http(path) => self.request(request, &place, path).await,
            Way::Tcp => {
                is_forward(&request)?;
                self.forward(request, &place).await
            }
        }
    }

    /// Begins a call of a port.
    fn visit(&self, place: &Place) -> Result<Visit, ProxyError> {
        let (handle, guest) = self.service.running(place.sandbox.as_str())?;
        let envd = guest.address();
        if place.port == envd.port() {
            return Err(ProxyError::Envd);
        }
        let host_place = self.places.clone().try_acquire_owned();
        let host_place = host_place.map_err(|_| ProxyError::HostIsFull)?;
        Ok(Visit {
            call: guest.connections().enter()?,
            in_use: handle.begin_use(),
            handle,
            guest,
            address: SocketAddr::new(envd.ip(), place.port),
            host_place,
        })
    }

    async fn request<B>(
        &self,
        mut request: Request<B>,
        place: &Place,
        path: PathAndQuery,
    ) -> Result<Response<Body>, ProxyError>
    where
        B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let visit = self.visit(place)?;
        let locator = Locator {
            address: visit.address.ip(),
            port: place.port,
            prefix: place.prefix(),
        };
        let upgrade =
            headers::wanted_upgrade(request.version(), request.headers()).map(|_| hyper::upgrade::on(&mut request));
        let (head, body) = request.into_parts();
        let method = head.method.clone();
        let mut outgoing = Outgoing::new(&head, path, &visit, &locator.prefix)?;
        // Nothing is lost by sending it twice, and no body would have to be had twice.
        let may_repeat = method.is_safe() && body.is_end_stream();
        let mut request = outgoing.with(body.map_err(Into::into).boxed_unsync());
        let (answer, upstream) = loop {
            let (mut upstream, was_idle) = match visit.call.take(place.port) {
                Some(upstream) => (upstream, true),
                None => (visit.connect().await?, false),
            };
            let mut error = match upstream.send(request).await {
                Ok(answer) => break (answer, upstream),
                Err(error) => error,
            };
            if upstream.was_cut() {
                return Err(ProxyError::Ended);
            }
            // A guest may close an idle connection at the moment it is used. Each was idle, so this ends.
            request = match error.take_message() {
                Some(unsent) if was_idle => unsent,
                None if was_idle && may_repeat => outgoing.with(nothing()),
                Some(_) | None => {
                    let port = place.port;
                    let source = error.into_error();
                    return Err(ProxyError::Broken { port, source });
                }
            };
        };
        let status = answer.status();
        let headers = headers::from_guest(&method, status, answer.headers(), &locator)?;
        let body = if status == StatusCode::SWITCHING_PROTOCOLS {
            let upgrade = upgrade.ok_or(ProxyError::BadAnswer("it switches protocols unasked"))?;
            let guest = async { Ok(TokioIo::new(hyper::upgrade::on(answer).await?)) };
            visit.tunnel(upgrade, guest, upstream.socket(), self.service.ending());
            nothing()
        } else {
            let answer = Answer {
                rest: Some(Rest {
                    home: visit.call.home(),
                    port: place.port,
                    idle_places: self.idle_places.clone(),
                    upstream,
                }),
                body: answer.into_body(),
                visit: Some(visit),
            };
            answer.boxed_unsync()
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }

    async fn forward<B>(&self, mut request: Request<B>, place: &Place) -> Result<Response<Body>, ProxyError> {
        let visit = self.visit(place)?;
        let socket = Arc::new(visit.call.opens_socket());
        let stream = visit.unless_over(dial(visit.address)).await?;
        let upgrade = hyper::upgrade::on(&mut request);
        visit.tunnel(upgrade, std::future::ready(Ok(stream)), socket, self.service.ending());
        let mut response = Response::new(nothing());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static(FORWARD_PROTOCOL));
        Ok(response)
    }
}

fn is_forward<B: hyper::body::Body>(request: &Request<B>) -> Result<(), ProxyError> {
    if request.version() != Version::HTTP_11 {
        return Err(ProxyError::NotHttp11);
    }
    let wanted = headers::wanted_upgrade(request.version(), request.headers());
    let is_tcp = wanted.is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(FORWARD_PROTOCOL.as_bytes()));
    if request.method() == Method::GET && is_tcp && request.body().is_end_stream() {
        Ok(())
    } else {
        Err(ProxyError::NotAForward)
    }
}

/// For [`crate::fuzz`]: whether a path is a place of the proxy's, and what must hold of one.
#[cfg(any(test, fuzzing))]
pub(crate) fn judge_path(uri: &Uri) -> bool {
    let Ok(place) = path::parse(uri) else { return false };
    assert!(path::is_ours(uri) && place.port != 0 && place.port != roost_common::guest::PORT);
    // One spelling: what was asked for is the prefix and the rest, byte for byte.
    let asked = uri.path_and_query().map_or("", PathAndQuery::as_str);
    match place.way.clone() {
        Way::Http(rest) => {
            let behind = asked.strip_prefix(&place.prefix()).expect("the prefix");
            assert!(rest.as_str().starts_with('/'));
            assert!(
                behind == rest.as_str() || format!("/{behind}") == rest.as_str(),
                "{asked}"
            );
        }
        Way::Tcp => assert!(asked.starts_with("/forward/")),
    }
    true
}

/// For [`crate::fuzz`]: what a reference of a guest's becomes leads to its own prefix, if it becomes anything.
#[cfg(any(test, fuzzing))]
pub(crate) fn judge_location(reference: &str) {
    let prefix = "/proxy/cl-a/3000";
    let locator = Locator {
        address: std::net::Ipv4Addr::new(10, 11, 0, 1).into(),
        port: 3000,
        prefix: prefix.to_owned(),
    };
    if let Some(rewritten) = locator.rewrite(reference) {
        let rest = rewritten.strip_prefix(prefix).expect("below its prefix");
        assert!(
            rest.is_empty() || rest.starts_with(['/', '?', '#']),
            "{reference}: {rewritten}"
        );
    }
}

fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// The head of a request as its guest gets it.
struct Outgoing {
    method: Method,
    uri: Uri,
    headers: http::HeaderMap,
}

impl Outgoing {
    fn new(head: &request::Parts, path: PathAndQuery, visit: &Visit, prefix: &str) -> Result<Self, ProxyError> {
        let host = HeaderValue::try_from(visit.address.to_string()).expect("an address is a header's value");
        let mut uri = http::uri::Parts::default();
        uri.path_and_query = Some(path);
        Ok(Self {
            method: head.method.clone(),
            uri: Uri::from_parts(uri).expect("a path alone is a URI"),
            headers: headers::to_guest(head, host, prefix)?,
        })
    }

    fn with(&mut self, body: Body) -> Request<Body> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }
}

/// A call of a guest's port that is under way.
#[derive(Debug)]
struct Visit {
    call: Call,
    in_use: InUse,
    handle: Handle,
    guest: Arc<Guest>,
    address: SocketAddr,
    host_place: OwnedSemaphorePermit,
}

impl Visit {
    /// Waits until its guest has ended, or is about to be paused.
    fn over(&self) -> impl Future<Output = ()> + Send + use<> {
        let (drained, handle, guest) = (self.call.is_over(), self.handle.clone(), self.guest.clone());
        async move {
            tokio::select! {
                () = drained => {}
                // A guest that has ended is held by whatever takes it down, for as long as that takes.
                () = handle.stopped_running(&guest) => {}
            }
        }
    }

    async fn unless_over<T>(&self, work: impl Future<Output = Result<T, ProxyError>>) -> Result<T, ProxyError> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            () = self.over() => Err(ProxyError::Ended),
        }
    }

    async fn connect(&self) -> Result<Upstream, ProxyError> {
        let socket = self.call.opens_socket();
        let stream = self.unless_over(dial(self.address)).await?;
        let port = self.address.port();
        let upstream = Upstream::new(stream, socket, self.over()).await;
        upstream.map_err(|source| ProxyError::Broken { port, source })
    }

    /// Passes bytes on between a caller that is being upgraded and its guest, in a task of its own.
    fn tunnel<G: AsyncRead + AsyncWrite + Send + 'static>(
        self,
        caller: OnUpgrade,
        guest: impl Future<Output = hyper::Result<G>> + Send + 'static,
        socket: Arc<Socket>,
        mut ending: watch::Receiver<bool>,
    ) {
        let over = self.over();
        let Self {
            mut call,
            in_use,
            handle,
            host_place,
            ..
        } = self;
        call.becomes_tunnel();
        // Only what moves is use from here on.
        drop(in_use);
        tokio::spawn(async move {
            let over = async {
                tokio::select! {
                    () = over => {}
                    // A service that has gone is an end too.
                    _ = ending.wait_for(|is| *is) => {}
                }
            };
            let relay = async {
                let (caller, guest) = tokio::try_join!(caller, guest)?;
                tunnel::relay(TokioIo::new(caller), guest, || handle.touch(), over).await?;
                Ok::<_, BoxError>(())
            };
            if let Err(error) = relay.await {
                tracing::debug!(sandbox_id = %handle.plan.id, error = %Chain(error.as_ref()), "a tunnel broke");
            }
            drop((socket, call, host_place));
        });
    }
}

/// The body of a guest's answer. Its connection is used again once it has ended, and closed where it is dropped before.
struct Answer {
    body: Incoming,
    rest: Option<Rest>,
    /// Until the body's end.
    visit: Option<Visit>,
}

/// What is left of a request whose answer is under way.
struct Rest {
    home: Home,
    port: u16,
    idle_places: Arc<Semaphore>,
    upstream: Upstream,
}

impl Rest {
    /// Keeps the connection for another request.
    fn keep(self) {
        let Self {
            home,
            port,
            idle_places,
            mut upstream,
        } = self;
        let Ok(place) = idle_places.try_acquire_owned() else {
            return;
        };
        // As it mostly is by the time that an answer has been passed on.
        if upstream.is_usable() {
            return home.keep(upstream, port, place);
        }
        tokio::spawn(async move {
            if upstream.becomes_ready().await {
                home.keep(upstream, port, place);
            }
        });
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match frame {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            Some(Err(error)) => {
                self.rest = None;
                self.visit = None;
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                if let Some(rest) = self.rest.take() {
                    rest.keep();
                }
                self.visit = None;
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Who knows that a body has ended need not ask for more of it.
        if self.body.is_end_stream()
            && let Some(rest) = self.rest.take()
        {
            rest.keep();
        }
    }
}

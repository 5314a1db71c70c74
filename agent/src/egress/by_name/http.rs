//! HTTP/1.1: each request names its host, so each is judged and sent on by itself. Heads are parsed and written anew by hyper, as the
//! proxy's are ([`crate::proxy`]): guest and server see the same messages.

use std::convert::Infallible;

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

use super::{HEAD_LIMIT, Refusal, Way, address_of};
use crate::errors::Chain;
use crate::proxy::{headers, tunnel};

/// The port of servers.
const PORT: u16 = 80;
/// Largest head, and most headers in one.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 128;

type Body = BoxBody<Bytes, hyper::Error>;

/// Serves a connection to its end, or until the policy changes: it may have asked for names of any kind.
pub(super) async fn serve(stream: TcpStream, way: Way) {
    let mut policy = way.policy.clone();
    policy.mark_unchanged();
    let requests = service_fn(|request| {
        let way = way.clone();
        async move { Ok::<_, Infallible>(answer(request, &way).await) }
    });
    let connection = server::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), requests)
        .with_upgrades();
    tokio::select! {
        biased;
        _ = policy.changed() => {}
        // How it ended is between the two.
        outcome = connection => drop(outcome),
    }
}

async fn answer(request: Request<Incoming>, way: &Way) -> Response<Body> {
    let name = match name_of(&request) {
        Ok(name) => name,
        Err(refusal) => {
            way.refuse("", &refusal);
            return refused(StatusCode::BAD_REQUEST, "", &refusal);
        }
    };
    let stream = match way.follow(&name, PORT).await {
        Ok(stream) => stream,
        Err(refusal) => {
            let status = match refusal {
                Refusal::Unreadable(_) => StatusCode::BAD_REQUEST,
                Refusal::NotListed | Refusal::Closed => StatusCode::FORBIDDEN,
                Refusal::Unresolved(_) | Refusal::Unreached(_) => StatusCode::BAD_GATEWAY,
                Refusal::TooMany => StatusCode::SERVICE_UNAVAILABLE,
            };
            return refused(status, &name, &refusal);
        }
    };
    match pass_on(request, stream, name.clone(), way).await {
        Ok(response) => response,
        Err(error) => {
            let refusal = Refusal::Unreached(std::io::Error::other(error));
            refused(StatusCode::BAD_GATEWAY, &name, &refusal)
        }
    }
}

/// The host that a request is for, which it says once or twice alike.
fn name_of<B>(request: &Request<B>) -> Result<String, Refusal> {
    if request.method() == Method::CONNECT {
        return Err(Refusal::Unreadable("CONNECT is for proxies"));
    }
    if !headers::is_chunked_or_plain(request.headers()) {
        return Err(Refusal::Unreadable(
            "its body is in another transfer coding than chunked",
        ));
    }
    let mut said = request.headers().get_all(header::HOST).iter();
    let said = match (said.next(), said.next()) {
        (Some(host), None) => host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()),
        _ => None,
    };
    let said = said.ok_or(Refusal::Unreadable("it has no header Host, or more than one"))?;
    let asked = request.uri().authority();
    if asked.is_some_and(|asked| asked != &said) {
        return Err(Refusal::Unreadable("its header Host is not its address"));
    }
    // Of anything but a host and a port: a user's name.
    if said.as_str().contains('@') || said.port().is_some_and(|port| port.as_u16() != PORT) {
        return Err(Refusal::Unreadable("its header Host is not one of a server at port 80"));
    }
    Ok(said.host().to_owned())
}

async fn pass_on(
    mut request: Request<Incoming>,
    stream: TcpStream,
    name: String,
    way: &Way,
) -> Result<Response<Body>, hyper::Error> {
    let address = address_of(&stream);
    let (mut sender, connection) = client::Builder::new()
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await?;
    // It ends with the sender and the answer's body, which the guest's own connection holds.
    tokio::spawn(async move { drop(connection.with_upgrades().await) });
    let upgrade = headers::wanted_upgrade(request.version(), request.headers());
    let guest = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    let (head, body) = request.into_parts();
    let is_head = head.method == Method::HEAD;
    let mut onward = Request::new(body);
    *onward.method_mut() = head.method;
    *onward.uri_mut() = path_of(&head.uri);
    *onward.headers_mut() = of_hop(&head.headers, upgrade);
    // hyper says "continue" to the guest once the server's connection takes the body.
    onward.headers_mut().remove(header::EXPECT);
    let mut response = sender.send_request(onward).await?;
    let switched = (response.status() == StatusCode::SWITCHING_PROTOCOLS)
        .then(|| response.headers().get(header::UPGRADE).cloned())
        .flatten();
    if let (Some(_), Some(guest)) = (&switched, guest) {
        let (server, way) = (hyper::upgrade::on(&mut response), way.clone());
        tokio::spawn(async move {
            let relay = async {
                let (guest, server) = tokio::try_join!(guest, server)?;
                drop(tunnel::relay(TokioIo::new(guest), TokioIo::new(server), || (), std::future::pending()).await);
                Ok::<_, hyper::Error>(())
            };
            tokio::select! {
                biased;
                () = way.ends(&name, address) => {}
                // How it ended is between the two.
                outcome = relay => drop(outcome),
            }
        });
    }
    let mut kept = of_hop(response.headers(), switched);
    // Of an answer to HEAD it is no frame, but what a GET would bring.
    if is_head && let Some(length) = headers::one_length(response.headers()) {
        kept.insert(header::CONTENT_LENGTH, length);
    }
    *response.headers_mut() = kept;
    Ok(response.map(BodyExt::boxed))
}

/// The headers of a message on its next hop.
fn of_hop(all: &HeaderMap, upgrade: Option<HeaderValue>) -> HeaderMap {
    let mut kept = headers::of_message(all);
    if let Some(protocol) = upgrade {
        kept.insert(header::UPGRADE, protocol);
        kept.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    kept
}

fn path_of(uri: &Uri) -> Uri {
    let path = uri.path_and_query().cloned();
    path.map_or_else(|| Uri::from_static("/"), Uri::from)
}

/// What a person in the guest reads.
fn refused(status: StatusCode, name: &str, refusal: &Refusal) -> Response<Body> {
    let server = if name.is_empty() { "this request" } else { name };
    let text = format!("This sandbox does not reach {server}: {}.\n", Chain(refusal));
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {});
    let mut response = Response::new(body.boxed());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

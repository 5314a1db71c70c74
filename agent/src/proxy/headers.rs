//! The heads of requests and answers on their way through: what is for one hop stays there, and framing is made anew for each.
//!
//! Why nothing can be smuggled: no byte of a message's frame is copied. Heads are parsed by hyper and written by hyper from names and
//! values that can hold no line break; `Content-Length` and `Transfer-Encoding` of either side are dropped, and written anew from the
//! body as it was decoded, which ends where its own frame says or is an error that breaks the connection; and a coding that would
//! outlive its header is refused. So both ends see the same messages, whatever a third would make of those.

use http::header::{self, Entry, HeaderName};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, request};

use super::error::ProxyError;
use super::location::Locator;

const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");

/// Headers of one hop, and of the body's frame; beside those that `Connection` names. Not `Trailer`: trailers are passed on, and it says
/// which they are.
fn is_hops(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONNECTION | header::TE | header::TRANSFER_ENCODING | header::CONTENT_LENGTH | header::UPGRADE
    ) || name.as_str() == "keep-alive"
        || name.as_str().starts_with("proxy-")
}

/// The protocol that a request asks to go on with. Not HTTP/2: it is negotiated for one hop, and we speak it with the caller or not at all.
pub(crate) fn wanted_upgrade(version: Version, headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = headers.get(header::UPGRADE)?;
    let is_h2 = tokens(headers, &header::UPGRADE).any(|token| token.eq_ignore_ascii_case("h2c"));
    let is_wanted = version == Version::HTTP_11 && lists(headers, &header::CONNECTION, "upgrade") && !is_h2;
    is_wanted.then(|| wanted.clone())
}

/// Headers of a request as its guest gets them. `host` is where the guest is reached.
///
/// # Errors
/// [`ProxyError::Coding`].
pub(super) fn to_guest(head: &request::Parts, host: HeaderValue, prefix: &str) -> Result<HeaderMap, ProxyError> {
    if !is_chunked_or_plain(&head.headers) {
        return Err(ProxyError::Coding);
    }
    let mut headers = of_message(&head.headers);
    let asked_for = headers.remove(header::HOST);
    // hyper says "continue" once the guest's connection takes the body; a guest is not asked, as its answer would not be waited for.
    headers.remove(header::EXPECT);
    headers.insert(header::HOST, host);
    let mut hop = Vec::new();
    if lists(&head.headers, &header::TE, "trailers") {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        hop.push("te");
    }
    if let Some(protocol) = wanted_upgrade(head.version, &head.headers) {
        headers.insert(header::UPGRADE, protocol);
        hop.push("upgrade");
    }
    if !hop.is_empty() {
        let hop = HeaderValue::from_str(&hop.join(", ")).expect("constant words");
        headers.insert(header::CONNECTION, hop);
    }
    // A program that makes links to itself needs the outermost address, which is not its `Host`. The caller is on our list, and where it is
    // a proxy itself it knows better than we do: what it says is left as it is.
    let authority = head
        .uri
        .authority()
        .and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    for (name, value) in [
        (FORWARDED_HOST, authority.or(asked_for)),
        (FORWARDED_PROTO, Some(HeaderValue::from_static("https"))),
        (FORWARDED_PREFIX, HeaderValue::from_str(prefix).ok()),
    ] {
        if let (Entry::Vacant(vacant), Some(value)) = (headers.entry(name), value) {
            vacant.insert(value);
        }
    }
    join_cookies(&mut headers);
    Ok(headers)
}

/// Headers of a guest's answer as the caller gets them.
///
/// # Errors
/// [`ProxyError::BadAnswer`].
pub(super) fn from_guest(
    method: &Method,
    status: StatusCode,
    answered: &HeaderMap,
    locator: &Locator,
) -> Result<HeaderMap, ProxyError> {
    if !is_chunked_or_plain(answered) {
        return Err(ProxyError::BadAnswer(
            "its body is in another transfer coding than chunked",
        ));
    }
    let mut headers = of_message(answered);
    if status == StatusCode::SWITCHING_PROTOCOLS {
        let protocol = answered
            .get(header::UPGRADE)
            .ok_or(ProxyError::BadAnswer("it switches to no protocol"))?;
        headers.insert(header::UPGRADE, protocol.clone());
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    // Of an answer to HEAD it is no frame, but what a GET would bring.
    if *method == Method::HEAD
        && let Some(length) = one_length(answered)
    {
        headers.insert(header::CONTENT_LENGTH, length);
    }
    // `Content-Location` too: who keeps or edits what it got would do so elsewhere.
    for name in [header::LOCATION, header::CONTENT_LOCATION] {
        let Entry::Occupied(mut entry) = headers.entry(name) else {
            continue;
        };
        for value in entry.iter_mut() {
            let rewritten = value.to_str().ok().and_then(|reference| locator.rewrite(reference));
            if let Some(rewritten) = rewritten.and_then(|reference| HeaderValue::try_from(reference).ok()) {
                *value = rewritten;
            }
        }
    }
    Ok(headers)
}

/// The headers that are the message's.
pub(crate) fn of_message(all: &HeaderMap) -> HeaderMap {
    let named: Vec<&str> = tokens(all, &header::CONNECTION).collect();
    let mut kept = HeaderMap::with_capacity(all.len() + 4);
    for (name, value) in all {
        let is_named = named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str()));
        if !is_named && !is_hops(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// HTTP/2 may send a cookie in pieces, which in HTTP/1.1 is one header.
fn join_cookies(headers: &mut HeaderMap) {
    let pieces: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if pieces.len() > 1 {
        let whole = HeaderValue::from_bytes(&pieces.join(&b"; "[..])).expect("of what were values");
        headers.insert(header::COOKIE, whole);
    }
}

/// A length that is one.
pub(crate) fn one_length(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let length = lengths.next()?;
    let is_number = !length.is_empty() && length.as_bytes().iter().all(u8::is_ascii_digit);
    (is_number && lengths.next().is_none()).then(|| length.clone())
}

/// Whether a body comes in no other transfer coding than chunked.
pub(crate) fn is_chunked_or_plain(headers: &HeaderMap) -> bool {
    tokens(headers, &header::TRANSFER_ENCODING).all(|coding| coding.eq_ignore_ascii_case("chunked"))
}

fn lists(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(wanted))
}

/// What a header lists.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let name: HeaderName = name.parse().expect("a name");
            headers.append(name, value.parse().expect("a value"));
        }
        headers
    }

    fn sent(version: Version, uri: &str, lines: &[(&str, &str)]) -> Result<HeaderMap, ProxyError> {
        let (mut head, ()) = Request::builder()
            .uri(uri)
            .version(version)
            .body(())
            .expect("a request")
            .into_parts();
        head.headers = map(lines);
        to_guest(&head, HeaderValue::from_static("10.11.0.7:80"), "/proxy/x/80")
    }

    /// What every guest is told.
    fn with_ours(host: &str, lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = map(&[
            ("host", "10.11.0.7:80"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-prefix", "/proxy/x/80"),
        ]);
        if !host.is_empty() {
            headers.insert(FORWARDED_HOST, host.parse().expect("a value"));
        }
        headers.extend(map(lines));
        headers
    }

    #[test]
    fn a_request_leaves_what_is_its_hops_behind() {
        let websocket = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-key", "k"),
        ];
        for (lines, expected) in [
            (&[][..], &[][..]),
            (&[("accept", "a"), ("accept", "b")], &[("accept", "a"), ("accept", "b")]),
            (
                &[("connection", "close, X-Secret"), ("x-secret", "1"), ("x-other", "2")],
                &[("x-other", "2")],
            ),
            (
                &[
                    ("keep-alive", "timeout=5"),
                    ("proxy-authorization", "a"),
                    ("proxy-connection", "b"),
                ],
                &[],
            ),
            (&[("content-length", "5"), ("transfer-encoding", "chunked")], &[]),
            (&[("te", "gzip")], &[]),
            (
                &[("te", "gzip, trailers"), ("trailer", "x-sum")],
                &[("te", "trailers"), ("connection", "te"), ("trailer", "x-sum")],
            ),
            (&[("expect", "100-continue")], &[]),
            (&[("upgrade", "websocket")], &[]),
            (
                &[
                    ("upgrade", "h2c"),
                    ("connection", "upgrade, http2-settings"),
                    ("http2-settings", "a"),
                ],
                &[],
            ),
            (
                &websocket,
                &[
                    ("connection", "upgrade"),
                    ("upgrade", "websocket"),
                    ("sec-websocket-key", "k"),
                ],
            ),
            (&[("cookie", "a=1"), ("cookie", "b=2")], &[("cookie", "a=1; b=2")]),
            (&[("x-forwarded-for", "192.0.2.1")], &[("x-forwarded-for", "192.0.2.1")]),
            // What a hop is said to be must not undo what we say.
            (
                &[("connection", "host, x-forwarded-proto"), ("x-forwarded-proto", "a")],
                &[],
            ),
        ] {
            let headers = sent(Version::HTTP_11, "/", lines).expect("taken");
            assert_eq!(headers, with_ours("", expected), "{lines:?}");
        }
        let headers = sent(Version::HTTP_10, "/", &websocket).expect("taken");
        assert_eq!(
            headers,
            with_ours("", &[("sec-websocket-key", "k")]),
            "an upgrade of HTTP/1.0"
        );
    }

    #[test]
    fn a_guest_is_told_where_its_caller_thinks_it_is() {
        let headers = sent(Version::HTTP_11, "/", &[("host", "a.example:1")]).expect("taken");
        assert_eq!(headers, with_ours("a.example:1", &[]));
        let headers = sent(Version::HTTP_2, "https://b.example/", &[("host", "a.example")]).expect("taken");
        assert_eq!(headers, with_ours("b.example", &[]));
        let said = [
            ("x-forwarded-host", "public.example"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-prefix", ""),
        ];
        let headers = sent(Version::HTTP_11, "/", &[&said[..], &[("host", "a.example")]].concat()).expect("taken");
        assert_eq!(headers, map(&[&said[..], &[("host", "10.11.0.7:80")]].concat()));
    }

    #[test]
    fn a_coding_that_would_outlive_its_header_is_refused() {
        for coding in ["gzip, chunked", "identity", "xchunked", "chunked;a=b"] {
            let lines = [("transfer-encoding", coding)];
            let outcome = sent(Version::HTTP_11, "/", &lines);
            assert!(matches!(outcome, Err(ProxyError::Coding)), "{coding}");
            let outcome = from_guest(&Method::GET, StatusCode::OK, &map(&lines), &locator());
            assert!(matches!(outcome, Err(ProxyError::BadAnswer(_))), "{coding}");
        }
    }

    fn locator() -> Locator {
        Locator {
            address: [10, 11, 0, 7].into(),
            port: 80,
            prefix: "/proxy/x/80".into(),
        }
    }

    #[test]
    fn an_answer_leaves_what_is_its_hops_behind() {
        let upgraded = [
            ("connection", "Upgrade, a"),
            ("upgrade", "websocket"),
            ("a", "1"),
            ("b", "2"),
        ];
        for (method, status, lines, expected) in [
            (
                Method::GET,
                200,
                &[("content-length", "5"), ("etag", "e")][..],
                &[("etag", "e")][..],
            ),
            (
                Method::HEAD,
                200,
                &[("content-length", "5")],
                &[("content-length", "5")],
            ),
            (
                Method::HEAD,
                200,
                &[("content-length", "5"), ("content-length", "6")],
                &[],
            ),
            (Method::HEAD, 200, &[("content-length", "+5")], &[]),
            (Method::GET, 304, &[("content-length", "5")], &[]),
            (
                Method::GET,
                200,
                &[
                    ("transfer-encoding", "chunked"),
                    ("trailer", "x-sum"),
                    ("connection", "x-a"),
                    ("x-a", "1"),
                ],
                &[("trailer", "x-sum")],
            ),
            (
                Method::GET,
                200,
                &[("upgrade", "h2c"), ("keep-alive", "a"), ("proxy-authenticate", "b")],
                &[],
            ),
            (
                Method::GET,
                101,
                &upgraded,
                &[("connection", "upgrade"), ("upgrade", "websocket"), ("b", "2")],
            ),
            (
                Method::GET,
                302,
                &[("location", "/a"), ("content-location", "http://localhost/b")],
                &[("location", "/proxy/x/80/a"), ("content-location", "/proxy/x/80/b")],
            ),
            (
                Method::GET,
                302,
                &[("location", "https://example.com/")],
                &[("location", "https://example.com/")],
            ),
            (
                Method::GET,
                200,
                &[("set-cookie", "a"), ("set-cookie", "b")],
                &[("set-cookie", "a"), ("set-cookie", "b")],
            ),
        ] {
            let status = StatusCode::from_u16(status).expect("a status");
            let headers = from_guest(&method, status, &map(lines), &locator()).expect("passed on");
            assert_eq!(headers, map(expected), "{method} {status} {lines:?}");
        }
        let outcome = from_guest(&Method::GET, StatusCode::SWITCHING_PROTOCOLS, &map(&[]), &locator());
        assert!(matches!(outcome, Err(ProxyError::BadAnswer(_))));
    }
}

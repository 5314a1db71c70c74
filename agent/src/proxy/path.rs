//! What a request asks for, by its path alone: `/proxy/{sandbox_id}/{port}/{path…}` or `/forward/{sandbox_id}/{port}`.
//!
//! A place has one spelling. Nothing is decoded or normalised before it is looked at, and nothing after it: what is not literally the
//! prefix, an id and a decimal port is refused, and the rest goes to the guest as it came, byte for byte.

use http::Uri;
use http::uri::PathAndQuery;
use roost_common::guest;
use roost_common::ids::SandboxId;

use super::error::ProxyError;

const PROXY: &str = "/proxy/";
const FORWARD: &str = "/forward/";

/// How a port is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// By HTTP, with this path and query.
    Http(PathAndQuery),
    /// By a connection of its own.
    Tcp,
}

/// A port of a sandbox, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) sandbox: SandboxId,
    pub(super) port: u16,
    pub(super) way: Way,
}

impl Place {
    /// What is before the guest's own paths, without a slash at its end.
    pub(super) fn prefix(&self) -> String {
        format!("{PROXY}{}/{}", self.sandbox, self.port)
    }
}

/// Whether a path is one of the proxy's.
pub(super) fn is_ours(uri: &Uri) -> bool {
    let path = uri.path();
    path.starts_with(PROXY) || path.starts_with(FORWARD)
}

/// What a path of the proxy's asks for.
///
/// # Errors
/// [`ProxyError::BadPath`], [`ProxyError::Envd`].
pub(super) fn parse(uri: &Uri) -> Result<Place, ProxyError> {
    let whole = uri.path_and_query().map_or("", PathAndQuery::as_str);
    let (is_http, rest) = match whole.strip_prefix(PROXY) {
        Some(rest) => (true, rest),
        None => (false, whole.strip_prefix(FORWARD).unwrap_or_default()),
    };
    let (sandbox, rest) = rest.split_at(end_of_segment(rest));
    let sandbox = sandbox
        .parse()
        .map_err(|_| ProxyError::BadPath("the path names no sandbox id: /proxy/{sandbox_id}/{port}/..."))?;
    let rest = rest.strip_prefix('/').unwrap_or_default();
    let (port, rest) = rest.split_at(end_of_segment(rest));
    let port = parse_port(port).ok_or(ProxyError::BadPath(
        "the path names no port: a decimal number from 1 to 65535, without leading zeros",
    ))?;
    if port == guest::PORT {
        return Err(ProxyError::Envd);
    }
    let way = match rest {
        _ if is_http => Way::Http(of_guest(rest)?),
        "" => Way::Tcp,
        _ => return Err(ProxyError::BadPath("nothing comes after the port of a forward")),
    };
    Ok(Place { sandbox, port, way })
}

fn end_of_segment(text: &str) -> usize {
    text.find(['/', '?']).unwrap_or(text.len())
}

/// A port in its one spelling: that of envd must not be reached by another one.
fn parse_port(text: &str) -> Option<u16> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    if is_plain { text.parse().ok() } else { None }
}

/// The guest's part, which begins with a slash whether or not the caller wrote one: HTTP has no request without.
fn of_guest(rest: &str) -> Result<PathAndQuery, ProxyError> {
    let parsed = if rest.starts_with('/') {
        PathAndQuery::try_from(rest)
    } else {
        PathAndQuery::try_from(format!("/{rest}"))
    };
    parsed.map_err(|_| ProxyError::BadPath("the path is none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Result<Place, ProxyError> {
        let uri: Uri = text.parse().expect("a URI");
        assert!(is_ours(&uri), "{text}");
        parse(&uri)
    }

    #[test]
    fn path_and_query_are_kept_byte_for_byte() {
        for (rest, expected) in [
            ("", "/"),
            ("/", "/"),
            ("?", "/?"),
            ("/?", "/?"),
            ("?a=b", "/?a=b"),
            ("//", "//"),
            ("//a//b/", "//a//b/"),
            ("/../..", "/../.."),
            ("/./a/../b", "/./a/../b"),
            ("/%2e%2E/%2f%00%zz", "/%2e%2E/%2f%00%zz"),
            ("/a?b=c?d/e&f=%20+", "/a?b=c?d/e&f=%20+"),
            ("/a;b=c,d@e:f!$&'()*+~", "/a;b=c,d@e:f!$&'()*+~"),
            ("/proxy/x/80/", "/proxy/x/80/"),
            ("/init", "/init"),
        ] {
            let place = place(&format!("/proxy/cl-1/8080{rest}")).expect(rest);
            assert_eq!((place.sandbox.as_str(), place.port), ("cl-1", 8080));
            let Way::Http(path) = &place.way else {
                panic!("{rest} is no request")
            };
            assert_eq!(path.as_str(), expected);
            // As it is written to a guest.
            let mut parts = http::uri::Parts::default();
            parts.path_and_query = Some(path.clone());
            assert_eq!(Uri::from_parts(parts).expect("a URI").to_string(), expected);
            assert_eq!(place.prefix(), "/proxy/cl-1/8080");
        }
    }

    #[test]
    fn only_plain_ids_and_ports_are_taken() {
        for text in [
            "/proxy/",
            "/proxy//8080/",
            "/proxy/x",
            "/proxy/x/",
            "/proxy/x?/8080",
            "/proxy/X/8080/",
            "/proxy/../8080/",
            "/proxy/%78/8080/",
            "/proxy/x//8080/",
            "/proxy/x/0/",
            "/proxy/x/00/",
            "/proxy/x/080/",
            "/proxy/x/+80/",
            "/proxy/x/-80/",
            "/proxy/x/80a/",
            "/proxy/x/8%30/",
            "/proxy/x/0x50/",
            "/proxy/x/65536/",
            "/proxy/x/99999999999999999999/",
            "/proxy/x/80;a/",
            "/proxy/x/049983/",
            "/proxy/x/+49983/",
            "/proxy/x/49983%20/",
            "/forward/x/80/",
            "/forward/x/80?",
            "/forward/x/80/a",
            "/forward/x/080",
        ] {
            assert!(matches!(place(text), Err(ProxyError::BadPath(_))), "{text} was taken");
        }
        for port in [1, 80, 49982, 49984, 65535] {
            assert_eq!(place(&format!("/proxy/x/{port}")).expect("taken").port, port);
            assert_eq!(place(&format!("/forward/x/{port}")).expect("taken").way, Way::Tcp);
        }
    }

    #[test]
    fn envds_port_is_nobodys() {
        for text in [
            "/proxy/x/49983",
            "/proxy/x/49983/",
            "/proxy/x/49983/init",
            "/proxy/x/49983?",
            "/proxy/x/49983//process.Process/Start",
            "/forward/x/49983",
            "/forward/x/49983/",
        ] {
            assert!(matches!(place(text), Err(ProxyError::Envd)), "{text}");
        }
    }

    #[test]
    fn other_paths_are_left_to_others() {
        for text in [
            "/",
            "/proxy",
            "/proxyx/a/1/",
            "//proxy/x/80/",
            "/./proxy/x/80/",
            "/%70roxy/x/80/",
            "/a/../proxy/x/80/",
            "/hostagent.v1.HostAgentService/Exec",
            "*",
        ] {
            assert!(!is_ours(&text.parse().expect("a URI")), "{text}");
        }
    }
}

//! References in a guest's answers, so that who follows one comes back to the same guest.
//!
//! A guest does not know that it is behind a prefix, so its `/login` is somebody else's to a browser, and its `http://localhost:3000/`
//! nobody's. Those are given the prefix; what leads anywhere else, or is relative to the request, is left as it is. A guest that does
//! know, by `X-Forwarded-Prefix`, has its references left alone too.

use std::net::IpAddr;

use roost_common::net::GUEST;

/// Where a guest's references lead.
#[derive(Debug)]
pub(super) struct Locator {
    /// Its address on this host.
    pub(super) address: IpAddr,
    pub(super) port: u16,
    /// As [`super::path::Place::prefix`].
    pub(super) prefix: String,
}

impl Locator {
    /// A reference as the caller must see it; `None` where that is as it is.
    pub(super) fn rewrite(&self, reference: &str) -> Option<String> {
        let path = match split_scheme(reference) {
            Some((scheme, rest)) => self.below(scheme.default_port(), rest)?,
            None if reference.starts_with("//") => self.below(None, reference)?,
            None if reference.starts_with('/') => reference,
            None => return None,
        };
        let is_prefixed = path
            .strip_prefix(self.prefix.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']));
        match (is_prefixed, path.starts_with('/')) {
            // Whoever is told the internal address cannot follow it, whatever path is behind.
            (true, _) => (path.len() != reference.len()).then(|| path.to_owned()),
            (false, true) => Some(format!("{}{path}", self.prefix)),
            (false, false) => Some(format!("{}/{path}", self.prefix)),
        }
    }

    /// What comes after the authority in `//authority…`, where that is the guest.
    fn below<'a>(&self, default_port: Option<u16>, rest: &'a str) -> Option<&'a str> {
        let rest = rest.strip_prefix("//")?;
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        // As a whole: with a user before the host, or a backslash, which browsers take for a slash, it is not ours.
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()),
            _ => (authority, default_port),
        };
        (port == Some(self.port) && self.is_guest(host)).then_some(path)
    }

    fn is_guest(&self, host: &str) -> bool {
        if host.eq_ignore_ascii_case("localhost") {
            return true;
        }
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        // What a program says of itself that listens at any address is among them.
        bare.parse().is_ok_and(|address: IpAddr| {
            address == self.address || address == IpAddr::V4(GUEST) || address.is_loopback() || address.is_unspecified()
        })
    }
}

enum Scheme {
    Plain,
    /// A guest behind HTTPS, as `X-Forwarded-Proto` says it is, may say so of its own address.
    Secure,
}

impl Scheme {
    fn default_port(&self) -> Option<u16> {
        match self {
            Self::Plain => Some(80),
            Self::Secure => Some(443),
        }
    }
}

/// A scheme that is ours to rewrite, and what comes after its colon.
fn split_scheme(reference: &str) -> Option<(Scheme, &str)> {
    let (scheme, rest) = reference.split_once(':')?;
    let is = |name: &str| scheme.eq_ignore_ascii_case(name);
    if is("http") || is("ws") {
        Some((Scheme::Plain, rest))
    } else if is("https") || is("wss") {
        Some((Scheme::Secure, rest))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(port: u16, reference: &str) -> Option<String> {
        let locator = Locator {
            address: [10, 11, 0, 7].into(),
            port,
            prefix: format!("/proxy/cl-1/{port}"),
        };
        locator.rewrite(reference)
    }

    #[test]
    fn what_leads_to_the_guest_keeps_the_prefix() {
        for (reference, expected) in [
            ("/", "/proxy/cl-1/8080/"),
            ("/a/b?c=d#e", "/proxy/cl-1/8080/a/b?c=d#e"),
            ("/../x", "/proxy/cl-1/8080/../x"),
            ("/\\elsewhere", "/proxy/cl-1/8080/\\elsewhere"),
            ("/proxy/cl-1/80801/", "/proxy/cl-1/8080/proxy/cl-1/80801/"),
            ("/proxy/cl-2/8080/", "/proxy/cl-1/8080/proxy/cl-2/8080/"),
            ("http://10.11.0.7:8080/a", "/proxy/cl-1/8080/a"),
            ("http://10.11.0.7:8080", "/proxy/cl-1/8080/"),
            ("http://10.11.0.7:8080?a", "/proxy/cl-1/8080/?a"),
            ("http://10.11.0.7:8080//a", "/proxy/cl-1/8080//a"),
            ("HTTP://LocalHost:8080/a", "/proxy/cl-1/8080/a"),
            ("ws://127.0.0.1:8080/s", "/proxy/cl-1/8080/s"),
            ("https://169.254.0.21:8080/a", "/proxy/cl-1/8080/a"),
            ("wss://[::1]:8080/a", "/proxy/cl-1/8080/a"),
            ("http://0.0.0.0:8080/", "/proxy/cl-1/8080/"),
            ("//localhost:8080/a", "/proxy/cl-1/8080/a"),
            ("http://localhost:8080/proxy/cl-1/8080/a", "/proxy/cl-1/8080/a"),
        ] {
            assert_eq!(rewritten(8080, reference).as_deref(), Some(expected), "{reference}");
        }
        for (port, reference) in [
            (80, "http://localhost/a"),
            (443, "https://localhost/a"),
            (80, "ws://[::1]/a"),
        ] {
            let expected = format!("/proxy/cl-1/{port}/a");
            assert_eq!(rewritten(port, reference), Some(expected), "{reference}");
        }
    }

    #[test]
    fn what_leads_elsewhere_is_left_alone() {
        for reference in [
            "",
            "a",
            "../a",
            "?a",
            "#a",
            "a:8080/b",
            "mailto:a@localhost:8080",
            "ftp://localhost:8080/a",
            "http:/a",
            "http:a",
            "https://example.com/",
            "http://localhost/a",
            "http://localhost:8081/a",
            "http://localhost:08080x/a",
            "http://10.11.0.8:8080/",
            "http://localhost:8080@example.com/",
            "http://localhost:8080\\@example.com/",
            "http://a@localhost:8080/",
            "http://localhost.example.com:8080/",
            "http://[::2]:8080/",
            "http://[::1]/",
            "//example.com/a",
            "//localhost/a",
            "///localhost:8080/a",
            "/proxy/cl-1/8080",
            "/proxy/cl-1/8080/a",
            "/proxy/cl-1/8080?a",
        ] {
            assert_eq!(rewritten(8080, reference), None, "{reference}");
        }
    }
}

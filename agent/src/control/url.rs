//! The address of a control plane: `http` or `https`, a host, perhaps a port and a path below which its calls are.

use std::fmt;
use std::str::FromStr;

use http::Uri;
use serde::{Deserialize, Deserializer, de};

/// Where a control plane is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Without the slash at its end.
    base: String,
    scheme: Scheme,
    is_loopback: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

/// Why a text is no such address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not an address of the web at all.
    #[error("{0:?} is no URL, as in https://control.example")]
    Malformed(String),
    /// An address of something else.
    #[error("{0:?} is neither an http:// nor an https:// URL")]
    Scheme(String),
    /// There is more in it than host, port and path.
    #[error("{0:?} has a query or a user in it, which a control plane's URL must not")]
    Extra(String),
}

impl Url {
    /// The URL of one of its calls; `path` begins with a slash.
    pub(super) fn of(&self, path: &str) -> Result<Uri, http::uri::InvalidUri> {
        format!("{}{path}", self.base).parse()
    }

    /// Whether whoever is on the way can read what is sent there.
    pub fn is_in_the_clear(&self) -> bool {
        self.scheme == Scheme::Http && !self.is_loopback
    }
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let malformed = || UrlError::Malformed(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| malformed())?;
        let scheme = match uri.scheme_str() {
            Some("http") => Scheme::Http,
            Some("https") => Scheme::Https,
            Some(_) => return Err(UrlError::Scheme(text.to_owned())),
            None => return Err(malformed()),
        };
        let authority = uri.authority().filter(|authority| !authority.host().is_empty());
        let authority = authority.ok_or_else(malformed)?;
        if uri.query().is_some() || authority.as_str().contains('@') || text.contains('#') {
            return Err(UrlError::Extra(text.to_owned()));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let address = host.parse::<std::net::IpAddr>();
        Ok(Self {
            base: text.trim_end_matches('/').to_owned(),
            scheme,
            is_loopback: host == "localhost" || address.is_ok_and(|address| address.is_loopback()),
        })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base)
    }
}

impl<'de> Deserialize<'de> for Url {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_below_the_url_whether_it_ends_in_a_slash_or_not() {
        for (url, call) in [
            ("https://control.example", "https://control.example/v1/x"),
            ("https://control.example/", "https://control.example/v1/x"),
            ("http://[::1]:8080/api/", "http://[::1]:8080/api/v1/x"),
        ] {
            let url: Url = url.parse().expect("a URL");
            assert_eq!(url.of("/v1/x").expect("a URI").to_string(), call);
        }
    }

    #[test]
    fn what_is_no_control_planes_url_is_refused() {
        for text in [
            "",
            "control.example",
            "/x",
            "ftp://control.example",
            "https://",
            "https://control.example?x=1",
            "https://user@control.example",
            "https://control.example/#x",
        ] {
            assert!(text.parse::<Url>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn plain_http_is_in_the_clear_but_for_this_host() {
        for (url, clear) in [
            ("http://control.example", true),
            ("http://192.0.2.1:80", true),
            ("https://control.example", false),
            ("http://localhost:8080", false),
            ("http://127.0.0.1:8080", false),
            ("http://[::1]", false),
        ] {
            assert_eq!(url.parse::<Url>().expect("a URL").is_in_the_clear(), clear, "{url}");
        }
    }
}

//! Names of servers as a policy lists them, and as a connection asks for them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name of a host, and longest part of one between two dots.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// A name of a host, or `*.` and one, which stands for all names below it and not for itself. In lower case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// What is wrong with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, or longer than DNS has them.
    #[error("it has no or more than 253 characters, or a part of none or more than 63")]
    Length,
    /// Something else than letters, digits and hyphens.
    #[error(
        "names have letters, digits, hyphens and dots (an international one in its ASCII form), and an asterisk only as the whole first part"
    )]
    Characters,
    /// An address.
    #[error("addresses are for allow")]
    Address,
    /// A pattern of everything below a top-level domain.
    #[error("an asterisk needs two parts behind it")]
    TooWide,
}

impl Name {
    /// Whether a host of this name, in any case, is meant.
    pub fn matches(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        match self.0.strip_prefix('*') {
            // With its dot, so that it ends where a part begins.
            Some(suffix) => {
                host.len() > suffix.len()
                    && host.is_char_boundary(host.len() - suffix.len())
                    && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
            }
            None => host.eq_ignore_ascii_case(&self.0),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let host = text.strip_prefix("*.").unwrap_or(text);
        check(host)?;
        if host.len() < text.len() && !host.contains('.') {
            return Err(NameError::TooWide);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

/// Checks the name of a host, as a connection or a policy has it.
///
/// # Errors
/// Any [`NameError`].
pub fn check(host: &str) -> Result<(), NameError> {
    let has_length = |part: &str| (1..=MAX_LABEL).contains(&part.len());
    if !(1..=MAX_NAME).contains(&host.len()) || !host.split('.').all(has_length) {
        return Err(NameError::Length);
    }
    let is_part = |part: &str| {
        part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if !host.split('.').all(is_part) {
        return Err(NameError::Characters);
    }
    // No top-level domain is a number, and resolvers take such names for addresses, in more forms than one.
    let last = host.rsplit('.').next().unwrap_or_default();
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit())
        || last
            .strip_prefix("0x")
            .or(last.strip_prefix("0X"))
            .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if is_number { Err(NameError::Address) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_itself_in_any_case_and_nothing_else() {
        let name: Name = "Example.com".parse().expect("a name");
        assert_eq!(name.to_string(), "example.com");
        for same in ["example.com", "EXAMPLE.COM", "example.com."] {
            assert!(name.matches(same), "{same}");
        }
        for other in [
            "example.com.evil.org",
            "www.example.com",
            "xexample.com",
            "example.co",
            "",
            ".",
            "example.com..",
        ] {
            assert!(!name.matches(other), "{other}");
        }
    }

    #[test]
    fn a_pattern_is_what_is_below_a_name() {
        let name: Name = "*.example.com".parse().expect("a pattern");
        for below in ["www.example.com", "a.b.Example.COM", "www.example.com."] {
            assert!(name.matches(below), "{below}");
        }
        for other in [
            "example.com",
            "evilexample.com",
            "www.example.com.evil.org",
            "ü.example.co",
        ] {
            assert!(!name.matches(other), "{other}");
        }
        // It would match, but nothing asks for it: it is no name.
        assert_eq!(check(".example.com"), Err(NameError::Length));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = format!("{}.com", "a".repeat(64));
        let longer = vec!["abcdefgh"; 32].join(".");
        for (text, why) in [
            ("", NameError::Length),
            (".", NameError::Length),
            ("a..b", NameError::Length),
            (".example.com", NameError::Length),
            ("example.com.", NameError::Length),
            (&long, NameError::Length),
            (&longer, NameError::Length),
            ("exa_mple.com", NameError::Characters),
            ("-a.com", NameError::Characters),
            ("a-.com", NameError::Characters),
            ("bücher.example", NameError::Characters),
            ("a.*.com", NameError::Characters),
            ("*a.com", NameError::Characters),
            ("**.com", NameError::Characters),
            ("example.com:443", NameError::Characters),
            ("example.com/", NameError::Characters),
            ("a b", NameError::Characters),
            ("a\0b.com", NameError::Characters),
            ("192.0.2.1", NameError::Address),
            ("3221225985", NameError::Address),
            ("192.0x2.0x1", NameError::Address),
            ("*.com", NameError::TooWide),
            ("*", NameError::Characters),
        ] {
            assert_eq!(text.parse::<Name>(), Err(why), "{text:?}");
        }
        for text in ["localhost", "xn--bcher-kva.example", "a.b.c.d", "*.b.c", "1.example"] {
            text.parse::<Name>().unwrap_or_else(|why| panic!("{text}: {why}"));
        }
    }
}

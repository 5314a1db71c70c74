//! Signatures of single file transfers: whoever has one may read or write one path, without knowing the token.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use sha2::{Digest as _, Sha256};

/// What a signature permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
}

impl Operation {
    fn word(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

/// What is signed. Path and user are as the query has them; a user that it does not name is the empty string.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Signed<'a> {
    pub(crate) path: &'a str,
    pub(crate) operation: Operation,
    pub(crate) user: &'a str,
    /// Seconds since 1970.
    pub(crate) expiration: Option<i64>,
}

impl Signed<'_> {
    /// The signature that `token` makes of it.
    pub(crate) fn signature(&self, token: &str) -> String {
        let Self {
            path,
            operation,
            user,
            expiration,
        } = self;
        let mut text = format!("{path}:{}:{user}:{token}", operation.word());
        if let Some(expiration) = expiration {
            text += &format!(":{expiration}");
        }
        format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(Sha256::digest(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_that_clients_make() {
        let signed = Signed {
            path: "/home/user/file.txt",
            operation: Operation::Read,
            user: "user",
            expiration: None,
        };
        // printf %s /home/user/file.txt:read:user:token | openssl dgst -sha256 -binary | base64
        assert_eq!(
            signed.signature("token"),
            "v1_e9Od/h234N3IsxQ3KJ6vej/5L6+kpmggV/L3FLxr+y0"
        );
        let signed = Signed {
            operation: Operation::Write,
            user: "",
            expiration: Some(1_700_000_000),
            ..signed
        };
        assert_eq!(
            signed.signature("token"),
            "v1_XonT1/8Y75gjIQxALbn9CDzxHFfI5q5waUAebmUYY2o"
        );
    }
}

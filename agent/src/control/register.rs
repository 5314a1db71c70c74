//! Registration: a token that an operator was given, for credentials. It is good once, and so is its answer: that there is room for
//! credentials is made sure before the control plane is asked, and each error says what is to be done next.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::client::{Answer, CallError, Client, json};
use super::credentials::{Credentials, CredentialsError, Granted, Secret, Store};
use crate::errors::{Chain, FileError};
use crate::host::files::blocking;

/// Time for the answer.
const LIMIT: Duration = Duration::from_secs(30);
/// How often it is tried to keep an answer.
const KEEP_ATTEMPTS: u32 = 10;
/// Pause between two attempts.
const KEEP_PAUSE: Duration = Duration::from_secs(1);

/// Why a host is not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// It is.
    #[error(
        "this host is registered already as {host_id}; where the control plane has deleted that host, move {} away and try again",
        path.display()
    )]
    Registered {
        /// As whom.
        host_id: String,
        /// The credentials.
        path: PathBuf,
    },
    /// What is there cannot be read.
    #[error(
        "there are credentials already that cannot be used; mend them, or move them away where their host is deleted"
    )]
    Existing(#[source] CredentialsError),
    /// There would be no place for the answer.
    #[error("nothing was sent: credentials could not be kept")]
    NoRoom(#[source] FileError),
    /// This host cannot be described.
    #[error("nothing was sent: this host's {what} cannot be read")]
    Host {
        /// What of it.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nobody was reached.
    #[error("nothing was sent: is the URL of the control plane right, and its certificate trusted (ca_file)?")]
    Unreached(#[source] CallError),
    /// It may have been done.
    #[error(
        "the answer did not arrive; try again, and where the token is then not accepted any more, have the host deleted at the control \
         plane and created anew, with another token"
    )]
    Unanswered(#[source] CallError),
    /// 400.
    #[error(
        "the control plane does not take this host as it is: {0}; is the address one under which it can call this host?"
    )]
    Unacceptable(String),
    /// 401, 403.
    #[error(
        "the control plane does not accept the token: {0}; it is good once and for an hour, so create another one there"
    )]
    Token(String),
    /// 404.
    #[error(
        "the control plane has no such host, or nothing at this URL: {0}; was the host deleted there, and is the URL right?"
    )]
    Missing(String),
    /// Any other status.
    #[error("the control plane has trouble: {0}; try again")]
    Trouble(String),
    /// A success that is none.
    #[error(
        "the control plane's answer is not understood, and the token is spent; have the host deleted there, and see that both are of \
         versions that go together"
    )]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It could not be kept after all.
    #[error(
        "registered as {host_id}, but the credentials could not be kept; have the host deleted at the control plane and created anew"
    )]
    NotKept {
        /// As whom.
        host_id: String,
        /// Why.
        #[source]
        source: FileError,
    },
}

#[derive(Serialize)]
struct Request<'a> {
    token: &'a str,
    arch: &'static str,
    cpu_cores: usize,
    memory_mb: u64,
    disk_gb: u64,
    address: &'a str,
}

/// Registers this host, which is reached at `address` by the control plane and has its data in `dir`.
///
/// # Errors
/// [`RegisterError`], which says what to do.
pub async fn register(
    client: &Client,
    store: &Store,
    dir: &Path,
    token: &Secret,
    address: &str,
) -> Result<Credentials, RegisterError> {
    let draft = blocking({
        let store = store.clone();
        move || match store.load() {
            Ok(Some(Credentials { host_id, .. })) => Err(RegisterError::Registered {
                host_id,
                path: store.path().to_owned(),
            }),
            Ok(None) => store.draft().map_err(RegisterError::NoRoom),
            Err(error) => Err(RegisterError::Existing(error)),
        }
    });
    let draft = draft.await?;
    let body = json(&request(dir, token, address)?);
    let answer = client.post("/v1/hosts/register", None, body, LIMIT).await;
    let answer = answer.map_err(|error| {
        if error.is_unsent() {
            RegisterError::Unreached(error)
        } else {
            RegisterError::Unanswered(error)
        }
    })?;
    let granted = granted(&answer)?;
    let credentials = Credentials::new(granted, client.url().to_string());
    let credentials = credentials.map_err(|error| RegisterError::Malformed(error.into()))?;
    let mut draft = Ok(draft);
    for attempt in 1.. {
        let kept = blocking({
            let credentials = credentials.clone();
            move || draft.and_then(|draft| draft.keep(&credentials))
        });
        match kept.await {
            Ok(()) => break,
            Err(source) if attempt == KEEP_ATTEMPTS => {
                let host_id = credentials.host_id;
                return Err(RegisterError::NotKept { host_id, source });
            }
            Err(error) => tracing::error!(error = %Chain(&error), "the credentials could not be kept; tried again"),
        }
        tokio::time::sleep(KEEP_PAUSE).await;
        let store = store.clone();
        draft = blocking(move || store.draft()).await;
    }
    Ok(credentials)
}

fn request<'a>(dir: &Path, token: &'a Secret, address: &'a str) -> Result<Request<'a>, RegisterError> {
    let unread = |what| move |source| RegisterError::Host { what, source };
    let cores = std::thread::available_parallelism().map_err(unread("number of processors"))?;
    let memory = std::fs::read_to_string("/proc/meminfo").map_err(unread("memory"))?;
    let disk = rustix::fs::statvfs(dir).map_err(|errno| unread("disk")(errno.into()))?;
    Ok(Request {
        token: token.expose(),
        arch: match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        },
        cpu_cores: cores.get(),
        memory_mb: memory_mb(&memory).ok_or_else(|| unread("memory")(std::io::ErrorKind::InvalidData.into()))?,
        disk_gb: disk.f_blocks.saturating_mul(disk.f_frsize) >> 30,
        address,
    })
}

/// MiB of `/proc/meminfo`'s `MemTotal`.
fn memory_mb(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

fn granted(answer: &Answer) -> Result<Granted, RegisterError> {
    let said = answer.summary();
    match answer.status.as_u16() {
        200..=299 => answer.json().map_err(|error| RegisterError::Malformed(error.into())),
        400 | 422 => Err(RegisterError::Unacceptable(said)),
        401 | 403 => Err(RegisterError::Token(said)),
        404 => Err(RegisterError::Missing(said)),
        _ => Err(RegisterError::Trouble(said)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_memory_is_in_mib() {
        let meminfo = "MemTotal:       16384000 kB\nMemFree:  1 kB\n";
        assert_eq!(memory_mb(meminfo), Some(16000));
        assert_eq!(memory_mb("MemFree: 1 kB\n"), None);
    }
}

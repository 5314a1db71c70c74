//! What a control plane gives a host: who it is, its tokens, its certificate. And the one file in which that is kept.
//!
//! ```text
//! <dir>/credentials/                  0700
//!     credentials.json                0600: version, host_id, jwt, refresh_token, cert_pem, key_pem, ca_cert_pem
//!     credentials.json.new            a draft: room for what is being asked for, made before it is asked for
//!     credentials.json.deleted-<t>    set aside at second <t>, when the control plane had deleted this host
//! ```
//!
//! Holds: the file is either the old or the new, also after a power failure. It exists once, at the control plane as well, for a
//! registration token is good for one host and a refresh token for one refresh: so that there is room for an answer is made sure
//! before it is asked for ([`Store::draft`]). Secrets are wiped from memory when they go, as far as the parsers' own copies allow,
//! and are not in `Debug`.
//!
//! Functions here block; callers put them on a blocking thread.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::errors::FileError;
use crate::host::files::{read_small, sync_dir};

/// Version of the file's format.
const VERSION: u32 = 1;
/// Room that a draft takes: more than any answer of a control plane (see [`super::client`]).
const DRAFT: usize = 64 << 10;
/// Longest id of a host.
const MAX_HOST_ID: usize = 128;

/// A text that is not to be seen.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes a text in.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text, for what is written and sent.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(...)")
    }
}

/// What a control plane answers to a registration and to a refresh, as far as it is of use.
#[derive(Debug, Deserialize)]
pub(super) struct Granted {
    token: Secret,
    refresh_token: Secret,
    cert_pem: String,
    key_pem: Secret,
    ca_cert_pem: String,
}

/// The credentials of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Version of this format, 1. At first it was not written.
    #[serde(default = "first_version")]
    version: u32,
    /// Its id at the control plane.
    pub host_id: String,
    /// Shown with each call.
    pub jwt: Secret,
    /// Good for one refresh.
    pub refresh_token: Secret,
    /// Its server certificate, and what is between that and the CA.
    pub cert_pem: String,
    /// The key of that, SEC1.
    pub key_pem: Secret,
    /// The CA of that, and of those who call us.
    pub ca_cert_pem: String,
    /// Where the control plane is, as it was registered; the configuration's comes first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_plane: Option<String>,
}

/// The version of files that do not say theirs.
fn first_version() -> u32 {
    1
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file holds something else.
    #[error("{} does not hold a host's credentials", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Names line and field, not what is in it.
        #[source]
        source: serde_json::Error,
    },
    /// Another version wrote it.
    #[error("{} is of version {version}, not {VERSION}: a newer roost has written it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The token is none of a host.
    #[error("the control plane's token does not say which host it is of")]
    NoHostId,
}

/// From when until when something holds, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// Its first second.
    pub from: i64,
    /// Its last.
    pub until: i64,
}

#[derive(Debug, Deserialize)]
struct Claims {
    host_id: Option<String>,
    iat: Option<i64>,
    exp: Option<i64>,
}

impl Credentials {
    /// Those of a host that is registered just now.
    ///
    /// # Errors
    /// [`CredentialsError::NoHostId`].
    pub(super) fn new(granted: Granted, control_plane: String) -> Result<Self, CredentialsError> {
        let host_id = host_id(&granted.token).ok_or(CredentialsError::NoHostId)?;
        Ok(Self::of(granted, host_id, Some(control_plane)))
    }

    /// The next ones of the same host. Whatever else is in them, the next refresh is possible with them alone.
    pub(super) fn next(&self, granted: Granted) -> Self {
        let host_id = host_id(&granted.token).unwrap_or_else(|| self.host_id.clone());
        Self::of(granted, host_id, self.control_plane.clone())
    }

    fn of(granted: Granted, host_id: String, control_plane: Option<String>) -> Self {
        let Granted {
            token,
            refresh_token,
            cert_pem,
            key_pem,
            ca_cert_pem,
        } = granted;
        Self {
            version: VERSION,
            host_id,
            jwt: token,
            refresh_token,
            cert_pem,
            key_pem,
            ca_cert_pem,
            control_plane,
        }
    }

    /// Whether two thirds of the life of token or certificate are over. `early`, of [0, 1], spreads hosts that were registered
    /// together over the twentieth of that life before.
    pub fn is_due(&self, now_unix: i64, early: f64) -> bool {
        let lives = [token_life(&self.jwt), certificate_life(&self.cert_pem)];
        lives.into_iter().flatten().any(|life| life.is_due(now_unix, early))
    }
}

impl Life {
    fn is_due(self, now: i64, early: f64) -> bool {
        // By the clock of this host; one that is wrong has the control plane refuse us in the end, and that is a reason of its own.
        let length = self.until.saturating_sub(self.from) as f64;
        let part = 2.0 / 3.0 - early / 20.0;
        now.saturating_sub(self.from) as f64 >= length * part
    }
}

/// Claims of a token whose signature is the control plane's own affair: it is shown to nobody else.
fn claims(jwt: &Secret) -> Option<Claims> {
    let payload = jwt.expose().split('.').nth(1)?;
    let json = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    serde_json::from_slice(&json).ok()
}

/// It becomes part of a path, so it is nothing but a name.
fn host_id(jwt: &Secret) -> Option<String> {
    let id = claims(jwt)?.host_id?;
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (!id.is_empty() && id.len() <= MAX_HOST_ID && id.bytes().all(is_name)).then_some(id)
}

fn token_life(jwt: &Secret) -> Option<Life> {
    let claims = claims(jwt)?;
    Some(Life {
        from: claims.iat?,
        until: claims.exp?,
    })
}

fn certificate_life(pem: &str) -> Option<Life> {
    life_of(&CertificateDer::from_pem_slice(pem.as_bytes()).ok()?)
}

/// How long a certificate holds; `None` for one that cannot be read.
pub fn life_of(certificate: &CertificateDer<'_>) -> Option<Life> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    Some(Life {
        from: validity.not_before.timestamp(),
        until: validity.not_after.timestamp(),
    })
}

/// Where credentials are kept.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
}

/// Room for credentials that are about to be asked for.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    file: File,
}

impl Store {
    /// The one in a directory, which need not exist.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join("credentials.json"),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn dir(&self) -> &Path {
        self.path.parent().expect("joined to a directory")
    }

    /// What is kept; `None`: this host is not registered.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn load(&self) -> Result<Option<Credentials>, CredentialsError> {
        let content = match read_small(&self.path) {
            Ok(content) => Zeroizing::new(content),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        #[derive(Deserialize)]
        struct Versioned {
            #[serde(default = "first_version")]
            version: u32,
        }
        let format = |source| CredentialsError::Format {
            path: self.path.clone(),
            source,
        };
        let Versioned { version } = serde_json::from_slice(&content).map_err(format)?;
        if version != VERSION {
            let path = self.path.clone();
            return Err(CredentialsError::Version { path, version });
        }
        serde_json::from_slice(&content).map(Some).map_err(format)
    }

    /// Makes sure that credentials can be kept: a file of their size is on disk, in the same directory, and belongs to the owner of
    /// what is around that, whoever we are: a registration by root is for the agent's user.
    ///
    /// # Errors
    /// [`FileError`]; nothing that counts has changed.
    pub fn draft(&self) -> Result<Draft, FileError> {
        let dir = self.dir();
        let owner = self.make_dir()?;
        let path = self.draft_path();
        // One that was left is of no use: what it was for has not been answered, or was and is lost.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::new("removing", &path, error));
            }
            _ => {}
        }
        let failed = |doing| move |error| FileError::new(doing, dir, error);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("making a file in"))?;
        let written = match owner {
            Some((user, group)) => fchown(&file, Some(user), Some(group)),
            None => Ok(()),
        };
        let written = written.and_then(|()| file.write_all(&[b' '; DRAFT]));
        let written = written.and_then(|()| file.sync_all()).and_then(|()| file.rewind());
        let draft = Draft {
            store: self.clone(),
            file,
        };
        written
            .map(|()| draft)
            .map_err(failed("keeping room for credentials in"))
    }

    /// Makes the directory; whom what is in it is to belong to, where that is not us anyway.
    fn make_dir(&self) -> Result<Option<(u32, u32)>, FileError> {
        let dir = self.dir();
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |error| FileError::new(doing, &path, error)
        };
        let around = dir.parent().unwrap_or(Path::new("/"));
        let made = match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            outcome => {
                outcome.map_err(failed("making", dir))?;
                true
            }
        };
        if !nix::unistd::geteuid().is_root() {
            return Ok(None);
        }
        let owner = fs::metadata(around).map_err(failed("inspecting", around))?;
        let owner = (owner.uid(), owner.gid());
        if made {
            std::os::unix::fs::chown(dir, Some(owner.0), Some(owner.1)).map_err(failed("giving away", dir))?;
        }
        Ok(Some(owner))
    }

    fn draft_path(&self) -> PathBuf {
        self.path.with_extension("json.new")
    }

    /// Sets the credentials of a host that is no more aside: an agent that starts is not registered then.
    ///
    /// # Errors
    /// [`FileError`]; they are still in their place.
    pub fn set_aside(&self, now_unix: i64) -> Result<PathBuf, FileError> {
        let aside = self.path.with_extension(format!("json.deleted-{now_unix}"));
        fs::rename(&self.path, &aside).map_err(|error| FileError::new("renaming", &self.path, error))?;
        sync_dir(self.dir())?;
        Ok(aside)
    }
}

impl Draft {
    /// Puts credentials in the place of the old ones.
    ///
    /// # Errors
    /// [`FileError`]; the old ones are intact, or these are in their place already. Another draft is another attempt.
    pub fn keep(mut self, credentials: &Credentials) -> Result<(), FileError> {
        let content = serde_json::to_vec_pretty(credentials).expect("strings serialise");
        let content = Zeroizing::new(content);
        let path = &self.store.path;
        let failed = |doing| move |error| FileError::new(doing, path, error);
        let file = &mut self.file;
        let written = file.write_all(&content);
        let written = written.and_then(|()| file.set_len(content.len() as u64));
        written
            .and_then(|()| file.sync_all())
            .map_err(failed("writing the new version of"))?;
        fs::rename(self.store.draft_path(), path).map_err(failed("replacing"))?;
        sync_dir(self.store.dir())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A token with claims, and a signature of nobody.
    pub(crate) fn token(claims: &serde_json::Value) -> Secret {
        let part = |json: &str| URL_SAFE_NO_PAD.encode(json);
        let header = part(r#"{"alg":"HS256","typ":"JWT"}"#);
        Secret::new(format!("{header}.{}.c2ln", part(&claims.to_string())))
    }

    pub(crate) fn sample(number: u32) -> Credentials {
        Credentials {
            version: VERSION,
            host_id: "host-1".into(),
            jwt: token(&serde_json::json!({"host_id": "host-1", "iat": 1000, "exp": 4000})),
            refresh_token: Secret::new(format!("refresh-{number}")),
            cert_pem: "no certificate".into(),
            key_pem: Secret::new("secret key".into()),
            ca_cert_pem: "no certificate".into(),
            control_plane: Some("http://127.0.0.1:1".into()),
        }
    }

    #[test]
    fn credentials_are_read_as_they_were_written_and_only_we_can_read_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::new(&dir.path().join("credentials"));
        assert_eq!(store.load().expect("nothing"), None);
        for number in [1, 2] {
            let credentials = sample(number);
            store.draft().expect("room").keep(&credentials).expect("kept");
            assert_eq!(store.load().expect("read"), Some(credentials));
        }
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(store.dir()), 0o700);
        assert_eq!(mode(store.path()), 0o600);
        assert_eq!(fs::read_dir(store.dir()).expect("read").count(), 1, "no draft is left");
        let aside = store.set_aside(77).expect("set aside");
        assert!(aside.ends_with("credentials.json.deleted-77") && aside.exists());
        assert_eq!(store.load().expect("nothing"), None);
    }

    #[test]
    fn what_a_crash_leaves_behind_never_counts_and_is_in_nobodys_way() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::new(&dir.path().join("credentials"));
        store.draft().expect("room").keep(&sample(1)).expect("kept");
        drop(store.draft().expect("room"));
        fs::write(store.draft_path(), "{\"host_id\": \"ha").expect("written");
        assert_eq!(store.load().expect("read"), Some(sample(1)));
        store.draft().expect("room").keep(&sample(2)).expect("kept");
        assert_eq!(store.load().expect("read"), Some(sample(2)));
    }

    #[test]
    fn where_there_is_no_room_that_is_known_before() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("written");
        let error = Store::new(&file.join("credentials")).draft().expect_err("no directory");
        assert!(error.to_string().contains("credentials"), "{error}");
    }

    #[test]
    fn a_file_of_something_else_is_an_error_without_what_is_in_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::new(dir.path());
        fs::write(store.path(), r#"{"host_id": "h", "jwt": {"s3cret": 1}}"#).expect("written");
        let error = anyhow::Error::new(store.load().expect_err("not ours"));
        assert!(format!("{error:#}").contains("credentials.json") && !format!("{error:#}").contains("s3cret"));
    }

    #[test]
    fn stored_files_are_read_and_one_of_a_newer_version_is_left_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::new(dir.path());
        for stored in [
            // Before there was a version in it.
            include_str!("samples/credentials-first.json"),
            include_str!("samples/credentials-1.json"),
        ] {
            fs::write(store.path(), stored).expect("written");
            assert_eq!(store.load().expect("read"), Some(sample(1)));
        }
        let newer = r#"{"version": 2, "host": "h"}"#;
        fs::write(store.path(), newer).expect("written");
        let error = store.load().expect_err("refused");
        assert!(error.to_string().contains("is of version 2, not 1"), "{error}");
        assert_eq!(fs::read_to_string(store.path()).expect("there"), newer);
    }

    #[test]
    fn secrets_are_not_in_debug() {
        let shown = format!("{:?}", sample(7));
        assert!(!shown.contains("refresh-7") && !shown.contains("secret key"), "{shown}");
        assert!(shown.contains("host-1"));
    }

    #[test]
    fn who_we_are_is_read_from_the_token_and_is_a_name() {
        let of = |claims: serde_json::Value| host_id(&token(&claims));
        assert_eq!(
            of(serde_json::json!({"host_id": "0f-A_9", "typ": "host"})),
            Some("0f-A_9".into())
        );
        for id in ["", "../x", "a/b", "a b", "a?b", &"x".repeat(200)] {
            assert_eq!(of(serde_json::json!({"host_id": id})), None, "{id}");
        }
        assert_eq!(of(serde_json::json!({})), None);
        for text in ["", "a.b.c", "only", "a.!.c"] {
            assert_eq!(host_id(&Secret::new(text.into())), None, "{text}");
        }
    }

    #[test]
    fn a_refresh_is_due_at_two_thirds_of_a_life_or_a_little_earlier() {
        let credentials = sample(1);
        for (now, early, due) in [
            (0, 0.0, false),
            (2999, 0.0, false),
            (3000, 0.0, true),
            (2849, 1.0, false),
            (2851, 1.0, true),
            (9000, 0.0, true),
        ] {
            assert_eq!(credentials.is_due(now, early), due, "{now} {early}");
        }
        let endless = Credentials {
            jwt: token(&serde_json::json!({"host_id": "x"})),
            ..credentials
        };
        assert!(
            !endless.is_due(i64::MAX, 1.0),
            "of neither is it known how long it holds"
        );
    }
}

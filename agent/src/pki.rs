//! Certificates of a standalone host: a CA of its own, a server certificate, and one client certificate for the command line.
//! A host under a control plane gets its certificates there instead.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::errors::FileError;

/// Common name of the command line's client certificate.
pub const CLIENT_NAME: &str = "roost-cli";
/// How long certificates hold. Nothing renews them by itself on a standalone host, so they hold as long as such a host may.
const VALID: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Clocks of client and server may differ by as much.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// The files that [`init`] writes, keys with mode 0600.
pub const FILES: [&str; 6] = [
    "ca.pem",
    "ca-key.pem",
    "server.pem",
    "server-key.pem",
    "client.pem",
    "client-key.pem",
];

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// There are some already.
    #[error("{} exists; move the old certificates away first, or keep them", .0.display())]
    Exists(PathBuf),
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// A name that no certificate can have.
    #[error("{0:?} is no host name or address")]
    Name(String),
    /// Making a certificate.
    #[error("a certificate could not be made")]
    Certificate(#[from] rcgen::Error),
}

/// Makes the certificates in `dir`, which is made where it is missing. `names` are host names and addresses under which clients
/// reach the server, besides `localhost` and the loopback addresses.
///
/// # Errors
/// Any [`PkiError`]; existing files are never touched.
pub fn init(dir: &Path, names: &[String]) -> Result<(), PkiError> {
    for name in FILES {
        let path = dir.join(name);
        if path.exists() {
            return Err(PkiError::Exists(path));
        }
    }
    std::fs::create_dir_all(dir).map_err(|source| FileError::new("making", dir, source))?;

    let ca_key = KeyPair::generate()?;
    let mut ca = params("roost local CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_cert = ca.self_signed(&ca_key)?;
    let issuer = Issuer::new(ca, ca_key);

    let mut server = params("roost-host");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let always = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    server.subject_alt_names = always
        .iter()
        .chain(names)
        .map(|name| alternative(name))
        .collect::<Result<_, _>>()?;
    let server_key = KeyPair::generate()?;
    let server_cert = server.signed_by(&server_key, &issuer)?;

    let mut client = params(CLIENT_NAME);
    client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    client.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let client_key = KeyPair::generate()?;
    let client_cert = client.signed_by(&client_key, &issuer)?;

    write(dir, "ca.pem", 0o644, &ca_cert.pem())?;
    write(dir, "ca-key.pem", 0o600, &issuer.key().serialize_pem())?;
    write(dir, "server.pem", 0o644, &server_cert.pem())?;
    write(dir, "server-key.pem", 0o600, &server_key.serialize_pem())?;
    write(dir, "client.pem", 0o644, &client_cert.pem())?;
    write(dir, "client-key.pem", 0o600, &client_key.serialize_pem())
}

/// Gives the server's key to the user that the agent runs as, and to nobody else.
///
/// # Errors
/// [`PkiError::File`].
pub fn give_server_key(dir: &Path, user: &nix::unistd::User) -> Result<(), PkiError> {
    let path = dir.join("server-key.pem");
    std::os::unix::fs::chown(&path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
        .map_err(|source| FileError::new("giving away", &path, source).into())
}

fn params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + VALID;
    params
}

fn alternative(name: &str) -> Result<SanType, PkiError> {
    if let Ok(address) = name.parse() {
        return Ok(SanType::IpAddress(address));
    }
    name.try_into()
        .map(SanType::DnsName)
        .map_err(|_| PkiError::Name(name.to_owned()))
}

fn write(dir: &Path, name: &str, mode: u32, content: &str) -> Result<(), PkiError> {
    let path = dir.join(name);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let write = || options.open(&path)?.write_all(content.as_bytes());
    write().map_err(|source| FileError::new("writing", &path, source).into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_for_their_owner_only_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().expect("a directory");
        let pki = dir.path().join("pki");
        init(&pki, &["host.example".into(), "192.0.2.1".into()]).expect("made");
        for name in FILES {
            let mode = std::fs::metadata(pki.join(name)).expect("written").permissions().mode() & 0o777;
            assert_eq!(mode == 0o600, name.ends_with("-key.pem"), "{name} has mode {mode:o}");
        }
        let before = std::fs::read(pki.join("ca.pem")).expect("read");
        assert!(matches!(init(&pki, &[]), Err(PkiError::Exists(_))));
        assert_eq!(std::fs::read(pki.join("ca.pem")).expect("read"), before);
    }

    #[test]
    fn a_name_that_is_none_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(init(&dir.path().join("pki"), &["späce".into()]).is_err());
        assert_eq!(std::fs::read_dir(dir.path().join("pki")).expect("read").count(), 0);
    }
}

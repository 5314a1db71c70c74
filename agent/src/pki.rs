//! Certificates of a standalone host: a CA of its own, a server certificate, one client certificate for the command line, and others for
//! whom else its operator lets in.
//! A host under a control plane gets its certificates there instead.

use std::io::Write;
use std::num::NonZeroU16;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use zeroize::Zeroizing;

use crate::errors::FileError;

/// Common name of the command line's client certificate.
pub const CLIENT_NAME: &str = "roost-cli";
/// How long certificates hold. Nothing renews them by itself on a standalone host, so they hold as long as such a host may.
const VALID: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Clocks of client and server may differ by as much.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// Most characters of a client's name, as X.509 has it.
const MAX_NAME: usize = 64;

/// The files that [`client`] writes: what `roost --pki` is given.
pub const CLIENT_FILES: [&str; 3] = ["ca.pem", "client.pem", "client-key.pem"];

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
    /// A name that no client can have.
    #[error("{0:?} is no name of a client: 1 to 64 letters, digits, `-`, `_` and `.`")]
    ClientName(String),
    /// A CA that cannot issue: not one of ours, or its key is another's.
    #[error("{} and ca-key.pem beside it are no CA that can issue certificates", .0.display())]
    Ca(PathBuf),
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

    let client = Client::issue(CLIENT_NAME, VALID, &issuer)?;

    write(dir, "ca.pem", 0o644, &ca_cert.pem())?;
    write(dir, "ca-key.pem", 0o600, &issuer.key().serialize_pem())?;
    write(dir, "server.pem", 0o644, &server_cert.pem())?;
    write(dir, "server-key.pem", 0o600, &server_key.serialize_pem())?;
    client.write(dir)
}

/// Makes a certificate with the common name `name` by the CA in `ca`, and writes it to `dir` with its key and that CA: what `roost --pki` is
/// given. `dir` is made where it is missing.
///
/// # Errors
/// Any [`PkiError`]; existing files are never touched.
pub fn client(ca: &Path, dir: &Path, name: &str, days: NonZeroU16) -> Result<(), PkiError> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_fit) {
        return Err(PkiError::ClientName(name.to_owned()));
    }
    if let Some(there) = CLIENT_FILES
        .map(|file| dir.join(file))
        .into_iter()
        .find(|path| path.exists())
    {
        return Err(PkiError::Exists(there));
    }
    let read = |file: &str| {
        let path = ca.join(file);
        std::fs::read_to_string(&path).map_err(|source| FileError::new("reading", &path, source))
    };
    let (certificate, key) = (read("ca.pem")?, Zeroizing::new(read("ca-key.pem")?));
    let none = |_| PkiError::Ca(ca.join("ca.pem"));
    let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&key).map_err(none)?).map_err(none)?;
    let client = Client::issue(name, Duration::from_secs(u64::from(days.get()) * 24 * 60 * 60), &issuer)?;
    // Signed by a key that is not the certificate's, it would be refused by everybody.
    if !is_of(&client.certificate, &certificate) {
        return Err(none(rcgen::Error::CouldNotParseCertificate));
    }
    std::fs::create_dir_all(dir).map_err(|source| FileError::new("making", dir, source))?;
    write(dir, "ca.pem", 0o644, &certificate)?;
    client.write(dir)
}

/// Whether a certificate's signature is that of the CA.
fn is_of(certificate: &rcgen::Certificate, ca: &str) -> bool {
    let Ok((_, ca)) = x509_parser::pem::parse_x509_pem(ca.as_bytes()) else {
        return false;
    };
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate.der()) else {
        return false;
    };
    ca.parse_x509()
        .is_ok_and(|ca| certificate.verify_signature(Some(ca.public_key())).is_ok())
}

/// A client's certificate and its key.
struct Client {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Client {
    fn issue(name: &str, valid: Duration, issuer: &Issuer<'_, KeyPair>) -> Result<Self, PkiError> {
        let mut client = params(name);
        client.not_after = client.not_before + CLOCK_SKEW + valid;
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        client.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = client.signed_by(&key, issuer)?;
        Ok(Self { certificate, key })
    }

    fn write(&self, dir: &Path) -> Result<(), PkiError> {
        write(dir, "client.pem", 0o644, &self.certificate.pem())?;
        write(dir, "client-key.pem", 0o600, &self.key.serialize_pem())
    }
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
    fn a_client_gets_a_certificate_of_the_ca_and_what_it_needs_to_use_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let (pki, other) = (dir.path().join("pki"), dir.path().join("other"));
        init(&pki, &[]).expect("made");
        init(&other, &[]).expect("made");
        let days = NonZeroU16::new(30).expect("some");
        let laptop = dir.path().join("laptop");
        client(&pki, &laptop, "ops.laptop", days).expect("made");
        let read = |path: PathBuf| std::fs::read_to_string(path).expect("read");
        assert_eq!(read(laptop.join("ca.pem")), read(pki.join("ca.pem")));
        let (_, pem) = x509_parser::pem::parse_x509_pem(read(laptop.join("client.pem")).as_bytes()).expect("PEM");
        let certificate = pem.parse_x509().expect("a certificate");
        let name = certificate.subject().iter_common_name().next().expect("a name");
        assert_eq!(name.as_str().expect("text"), "ops.laptop");
        let left = certificate.validity().time_to_expiration().expect("it is valid");
        assert!(left.whole_days() == 29 || left.whole_days() == 30, "{left}");
        let mode = std::fs::metadata(laptop.join("client-key.pem"))
            .expect("written")
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);

        let refused = |ca: &Path, to: &str, name: &str| client(ca, &dir.path().join(to), name, days).expect_err(name);
        assert!(matches!(refused(&pki, "laptop", "again"), PkiError::Exists(_)));
        for name in ["", "a b", "a\0", "../x", &"x".repeat(65), "späce"] {
            assert!(
                matches!(refused(&pki, "new", name), PkiError::ClientName(_)),
                "{name:?}"
            );
        }
        // Another's key beside it, none, and no certificate.
        std::fs::copy(other.join("ca-key.pem"), pki.join("ca-key.pem")).expect("copied");
        assert!(matches!(refused(&pki, "new", "a"), PkiError::Ca(_)));
        std::fs::remove_file(pki.join("ca-key.pem")).expect("removed");
        assert!(matches!(refused(&pki, "new", "a"), PkiError::File(_)));
        std::fs::write(other.join("ca.pem"), "none").expect("written");
        assert!(matches!(refused(&other, "new", "a"), PkiError::Ca(_)));
        assert!(
            !dir.path().join("new").exists(),
            "something is left of what was refused"
        );
    }

    #[test]
    fn a_name_that_is_none_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(init(&dir.path().join("pki"), &["späce".into()]).is_err());
        assert_eq!(std::fs::read_dir(dir.path().join("pki")).expect("read").count(), 0);
    }
}

//! Transport security: TLS 1.3 only, both sides with certificates of one private CA, and of the clients only those of a listed
//! name. The verifiers are rustls' own; nothing here judges a chain.

use std::path::Path;
use std::sync::Arc;

use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Why there is no transport security.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file cannot be read, or holds nothing of the kind.
    #[error("{} holds no {what} that can be read", path.display())]
    Pem {
        /// The file.
        path: std::path::PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// Certificate, key and CA do not fit together.
    #[error("the certificates in {} cannot be used", dir.display())]
    Unusable {
        /// Their directory.
        dir: std::path::PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The server's side: `ca.pem`, `server.pem` and `server-key.pem` of a directory. Offers h2 and HTTP/1.1.
///
/// # Errors
/// Any [`TlsError`].
pub fn server(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let unusable = |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Unusable {
        dir: dir.into(),
        source,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(dir)?), provider.clone())
        .build()
        .map_err(|error| unusable(error.into()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(error.into()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(&dir.join("server.pem"))?, key(&dir.join("server-key.pem"))?)
        .map_err(|error| unusable(error.into()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A client's side: `ca.pem`, `client.pem` and `client-key.pem` of a directory. Speaks HTTP/1.1.
///
/// # Errors
/// Any [`TlsError`].
pub fn client(dir: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let unusable = |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Unusable {
        dir: dir.into(),
        source,
    };
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(error.into()))?
        .with_root_certificates(roots(dir)?)
        .with_client_auth_cert(chain(&dir.join("client.pem"))?, key(&dir.join("client-key.pem"))?)
        .map_err(|error| unusable(error.into()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Whether a verified client certificate carries one of `names`, as its common name or a DNS name.
pub fn client_is_listed(certificate: &CertificateDer<'_>, names: &[String]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    let listed = |name: &str| names.iter().any(|listed| listed == name);
    let common = certificate
        .subject()
        .iter_common_name()
        .filter_map(|name| name.as_str().ok())
        .any(listed);
    let alternative = || match certificate.subject_alternative_name() {
        Ok(Some(extension)) => extension.value.general_names.iter().any(|name| match name {
            GeneralName::DNSName(name) => listed(name),
            _ => false,
        }),
        Ok(None) | Err(_) => false,
    };
    common || alternative()
}

fn roots(dir: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(&dir.join("ca.pem"))? {
        roots.add(certificate).map_err(|error| TlsError::Unusable {
            dir: dir.into(),
            source: error.into(),
        })?;
    }
    Ok(roots)
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Pem {
        path: path.into(),
        what: "certificate",
        source,
    };
    let all: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    if all.is_empty() {
        Err(failed(rustls_pki_types::pem::Error::NoItemsFound))
    } else {
        Ok(all)
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| TlsError::Pem {
        path: path.into(),
        what: "key",
        source,
    })
}

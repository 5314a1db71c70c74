//! Transport security: TLS 1.3 only, both sides with certificates of one private CA, and of the clients only those of a listed
//! name. The verifiers are rustls' own; nothing here judges a chain.
//!
//! A host under a control plane has two identities ([`Identities`]): the control plane's, which is swapped while connections are
//! served, and its own for whoever calls from this host. Each comes with its own CA for clients, so neither CA can name callers of the
//! other's.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
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

/// Where a service manager keeps the files that it was told to hand to this service alone, where it was.
pub fn credentials_directory() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// The server's side: `ca.pem`, `server.pem` and `server-key.pem`, each of the service manager's credentials where it is among those, else
/// of a directory. Offers h2 and HTTP/1.1.
///
/// # Errors
/// Any [`TlsError`].
pub fn server(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let credentials = credentials_directory();
    let of = |name| file_of(credentials.as_deref(), dir, name);
    let (certificates, key) = (chain(&of("server.pem"))?, key(&of("server-key.pem"))?);
    server_of(dir, roots(&of("ca.pem"))?, certificates, key)
}

fn file_of(credentials: Option<&Path>, dir: &Path, name: &str) -> PathBuf {
    let given = credentials.map(|credentials| credentials.join(name));
    given.filter(|path| path.exists()).unwrap_or_else(|| dir.join(name))
}

/// `from` is where that is from, for an error.
fn server_of(
    from: &Path,
    roots: RootCertStore,
    certificates: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let unusable = |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Unusable {
        dir: from.into(),
        source,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| unusable(error.into()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(error.into()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key)
        .map_err(|error| unusable(error.into()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What a control plane has given a host to be known by.
#[derive(Debug)]
pub struct Registered {
    config: Arc<ServerConfig>,
    /// Which addresses its certificate names.
    addresses: Vec<IpAddr>,
}

impl Registered {
    /// Of texts in PEM; `from` is the file that they are from, for an error.
    ///
    /// # Errors
    /// Any [`TlsError`].
    pub fn new(from: &Path, certificate: &str, key: &str, ca: &str) -> Result<Self, TlsError> {
        let failed = |what| {
            move |source| TlsError::Pem {
                path: from.into(),
                what,
                source,
            }
        };
        let certificates = |pem: &str| {
            let all = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
            all.map_err(failed("certificate"))
        };
        let chain = certificates(certificate)?;
        let addresses = match chain.first() {
            Some(leaf) => addresses_of(leaf),
            None => return Err(failed("certificate")(rustls_pki_types::pem::Error::NoItemsFound)),
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca)? {
            roots.add(certificate).map_err(|error| TlsError::Unusable {
                dir: from.into(),
                source: error.into(),
            })?;
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(failed("key"))?;
        Ok(Self {
            config: server_of(from, roots, chain, key)?,
            addresses,
        })
    }
}

/// Who this host is to those who connect. Configurations are swapped as a whole and taken by new connections, with a cache of sessions
/// of their own: so no session goes on under a certificate or a CA that has been replaced, and no connection ends for it.
#[derive(Debug)]
pub struct Identities {
    local: Option<ArcSwap<ServerConfig>>,
    registered: Option<ArcSwap<Registered>>,
}

impl Identities {
    /// A host without a control plane.
    pub fn standalone(local: Arc<ServerConfig>) -> Arc<Self> {
        Arc::new(Self {
            local: Some(ArcSwap::new(local)),
            registered: None,
        })
    }

    /// A host under a control plane, and what it is to callers of its own, if anything.
    pub fn registered(registered: Registered, local: Option<Arc<ServerConfig>>) -> Arc<Self> {
        Arc::new(Self {
            local: local.map(ArcSwap::new),
            registered: Some(ArcSwap::from_pointee(registered)),
        })
    }

    /// Replaces what the control plane gave, for connections from now on.
    pub fn swap(&self, next: Registered) {
        if let Some(registered) = &self.registered {
            registered.store(Arc::new(next));
        }
    }

    /// Reads our own certificates anew, for connections from now on; where a start found none, there are none until the next. Blocks.
    ///
    /// # Errors
    /// Any [`TlsError`]; those from before hold.
    pub fn reload_local(&self, dir: &Path) -> Result<(), TlsError> {
        if let Some(local) = &self.local {
            local.store(server(dir)?);
        }
        Ok(())
    }

    /// Who we are on a connection to this address of ours. The loopback is for this host's own callers, unless it is where the control
    /// plane calls too, which is what its certificate says.
    pub fn on(&self, dialled: IpAddr) -> Arc<ServerConfig> {
        let registered = self.registered.as_ref().map(ArcSwap::load);
        match (registered, &self.local) {
            (Some(registered), Some(local)) => {
                let dialled = dialled.to_canonical();
                if dialled.is_loopback() && !registered.addresses.contains(&dialled) {
                    local.load_full()
                } else {
                    registered.config.clone()
                }
            }
            (Some(registered), None) => registered.config.clone(),
            (None, local) => local.as_ref().expect("it is made with one of the two").load_full(),
        }
    }
}

fn addresses_of(certificate: &CertificateDer<'_>) -> Vec<IpAddr> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let address = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let names = names.value.general_names.iter();
    names
        .filter_map(|name| match name {
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        })
        .collect()
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
        .with_root_certificates(roots(&dir.join("ca.pem"))?)
        .with_client_auth_cert(chain(&dir.join("client.pem"))?, key(&dir.join("client-key.pem"))?)
        .map_err(|error| unusable(error.into()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The names that a verified client certificate carries: its common name and its DNS names. None of what does not parse.
pub fn client_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let common = certificate.subject().iter_common_name();
    let mut names: Vec<String> = common
        .filter_map(|name| name.as_str().ok().map(str::to_owned))
        .collect();
    if let Ok(Some(extension)) = certificate.subject_alternative_name() {
        names.extend(extension.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        }));
    }
    names
}

fn roots(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(file)? {
        roots.add(certificate).map_err(|error| TlsError::Unusable {
            dir: file.parent().unwrap_or(file).into(),
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

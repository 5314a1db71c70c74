//! Certificates as a control plane makes them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A CA.
pub(crate) struct Ca {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate of it.
pub(crate) struct Leaf {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) pem: String,
    /// SEC1, as control planes send it.
    pub(crate) key_pem: String,
    key: Vec<u8>,
}

impl Leaf {
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone().into())
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut ca = params("control plane CA");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = ca.self_signed(&key).expect("signed");
        Self {
            pem: certificate.pem(),
            issuer: Issuer::new(ca, key),
        }
    }

    /// Of a server at an address.
    pub(crate) fn server(&self, name: &str, address: &str) -> Leaf {
        let mut server = params(name);
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.subject_alt_names = vec![SanType::IpAddress(address.parse().expect("an address"))];
        self.sign(&server)
    }

    /// Of a client.
    pub(crate) fn client(&self, name: &str) -> Leaf {
        let mut client = params(name);
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(&client)
    }

    fn sign(&self, params: &CertificateParams) -> Leaf {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let pkcs8 = key.serialize_der();
        Leaf {
            pem: certificate.pem(),
            certificate: certificate.der().clone(),
            key_pem: pem("EC PRIVATE KEY", sec1(&pkcs8)),
            key: pkcs8,
        }
    }
}

/// The ECPrivateKey in a PKCS#8 document: its last octet string, of less than 128 bytes.
fn sec1(pkcs8: &[u8]) -> &[u8] {
    let start = (0..pkcs8.len() - 1).find(|&at| pkcs8[at] == 4 && usize::from(pkcs8[at + 1]) == pkcs8.len() - at - 2);
    &pkcs8[start.expect("an octet string to the end") + 2..]
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).expect("ASCII"))
        .collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

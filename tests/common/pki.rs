//! A certificate authority of the tests' own.

use std::path::Path;

use cloudletd::config::{Config, Tls};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// An authority, and what it signs with.
pub struct Authority {
    pub pem: String,
    pub issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key, PEM, for a host name or a client that is called so.
    pub fn issue(&self, name: &str) -> (String, String) {
        self.issue_with(name, |_| ())
    }

    /// The same after changing what is signed.
    pub fn issue_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        (params.signed_by(&key, &self.issuer).expect("a certificate").pem(), key.serialize_pem())
    }

    /// A list of revoked serial numbers, PEM, that is good until the beginning of a year.
    pub fn revoking(&self, serials: &[u64], until: i32) -> String {
        let revoked = |serial: &u64| rcgen::RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: rcgen::date_time_ymd(2024, 1, 1),
            reason_code: Some(rcgen::RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let params = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2024, 1, 1),
            next_update: rcgen::date_time_ymd(until, 1, 1),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).expect("a list").pem().expect("PEM")
    }

    /// Writes a server's certificate and the authority to `dir`, and has the daemon listen with them at an address that was free a moment ago.
    pub fn serve(&self, config: &mut Config, dir: &Path) -> std::net::SocketAddr {
        self.write(dir);
        let address = super::server::free_port();
        config.listen.tcp = Some(address);
        config.listen.tls = Some(Tls::new(dir.join("server.pem"), dir.join("server.key"), dir.join("ca.pem")));
        address
    }

    /// Writes a new server's certificate and the authority to `dir`.
    pub fn write(&self, dir: &Path) {
        let (certificate, key) = self.issue("localhost");
        for (name, text) in [("server.pem", &certificate), ("server.key", &key), ("ca.pem", &self.pem)] {
            std::fs::write(dir.join(name), text).expect("write");
        }
    }

    /// Where a daemon of this authority is, for a client with this identity or none.
    pub fn endpoint(&self, address: std::net::SocketAddr, identity: Option<(String, String)>) -> Endpoint {
        let mut tls = ClientTlsConfig::new().domain_name("localhost").ca_certificate(Certificate::from_pem(&self.pem));
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        Endpoint::from_shared(format!("https://{address}")).expect("an address").tls_config(tls).expect("valid")
    }
}

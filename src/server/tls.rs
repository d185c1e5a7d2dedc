//! TLS of the TCP listener: only clients with a certificate of the configured authorities get as far as a call.

use std::{fs, path::Path, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    config::Tls,
    error::{Error, Kind, Result, Stage},
};

/// Largest PEM file, bytes; a bundle of all public authorities has a quarter of it.
const PEM_LEN_MAX: u64 = 1 << 20;

/// Reads the files of a configuration and makes an acceptor of them.
pub fn acceptor(tls: &Tls) -> Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&tls.client_ca)? {
        roots.add(certificate).map_err(|error| unfit(&tls.client_ca, "is not the certificate of an authority", error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| unfit(&tls.client_ca, "can't be used to verify clients", error))?;
    let chain = certificates(&tls.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&tls.key)?).map_err(|error| unfit(&tls.key, "has no private key in PEM form", error))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unfit(&tls.certificate, "can't be used", error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| unfit(&tls.certificate, "does not fit its key", error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would not look at the client's certificate again: revoked or ended, it would still open the door.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let certificates = certificates.map_err(|error| unfit(path, "is not a PEM file", error))?;
    if certificates.is_empty() {
        return Err(Error::new(Kind::InvalidRequest, Stage::Config, path.display().to_string(), "has no certificate in PEM form"));
    }
    Ok(certificates)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let object = || path.display().to_string();
    let failed = |error| Error::io(Stage::Config, object(), "read the PEM file", error);
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > PEM_LEN_MAX {
        return Err(Error::new(Kind::InvalidRequest, Stage::Config, object(), format!("has {len} bytes, at most {PEM_LEN_MAX} are read")));
    }
    fs::read(path).map_err(failed)
}

fn unfit(path: &Path, why: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Kind::InvalidRequest, Stage::Config, path.display().to_string(), why).with_source(error)
}

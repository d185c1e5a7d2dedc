//! TLS of the TCP listeners: only clients with a certificate of the configured authorities get as far as a call.
//!
//! Certificate, key, authorities and revocations are read again when one of the files changes (looked at every `listen.tls.reload_interval_secs`) and on
//! SIGHUP, all or nothing: files that can't be read, don't fit together or have ended leave what was there in force, which the log and GetHostInfo say. A
//! connection keeps the keys it was made with; its client's certificate is verified again when something was loaded since ([`Vouched`]).

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustls::{
    RootCertStore, ServerConfig, SupportedProtocolVersion,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    config::{Tls, TlsVersion},
    error::{Error, Kind, Result, Stage},
    names::Digest,
    render::now_secs,
};

/// Largest PEM file, bytes; a bundle of all public authorities has a quarter of it, a list of 10,000 revocations half.
const PEM_LEN_MAX: u64 = 1 << 20;
/// A certificate that ends sooner is warned of.
const ENDS_SOON_SECS: i64 = 7 * 24 * 3600;

/// What the listener shows clients and holds them to, and how it came to be.
pub struct Certificates {
    config: Tls,
    state: Mutex<State>,
    /// Counts what was loaded.
    generation: AtomicU64,
}

/// The certificate of a connection's client, as long as it is vouched for.
pub struct Vouched {
    certificates: Arc<Certificates>,
    chain: Vec<CertificateDer<'static>>,
    /// By what was loaded then.
    generation: AtomicU64,
}

impl Vouched {
    /// Of a client that has just shown it. `generation` is from before the handshake.
    pub fn new(certificates: &Arc<Certificates>, chain: &[CertificateDer<'_>], generation: u64) -> Vouched {
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        Vouched { certificates: Arc::clone(certificates), chain, generation: AtomicU64::new(generation) }
    }

    /// Whether authorities and revocations that are in force now let it in. Looks at the certificate only when they are others than the last time.
    pub fn is_good(&self) -> bool {
        let now = self.certificates.generation();
        if self.generation.load(Ordering::Acquire) == now {
            return true;
        }
        let verifier = Arc::clone(&self.certificates.state().loaded.verifier);
        let Some((leaf, others)) = self.chain.split_first() else { return false };
        match verifier.verify_client_cert(leaf, others, UnixTime::now()) {
            Ok(_) => {
                self.generation.store(now, Ordering::Release);
                true
            }
            Err(error) => {
                tracing::info!(%error, "a connected client is not vouched for any more");
                false
            }
        }
    }
}

struct State {
    loaded: Loaded,
    /// The files when they were last tried, well or not.
    tried: Vec<Option<Stamp>>,
    /// Why the last try was in vain.
    error: Option<String>,
}

struct Loaded {
    acceptor: TlsAcceptor,
    http1: TlsAcceptor,
    verifier: Arc<dyn ClientCertVerifier>,
    fingerprint: Digest,
    not_before: i64,
    not_after: i64,
    at: i64,
}

/// What tells a file from the one that was there: modification time, inode and length.
type Stamp = (i64, i64, u64, u64);

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// SHA-256 of the server's certificate.
    pub fingerprint: Digest,
    /// When it ends, seconds since 1970.
    pub not_after: i64,
    /// When it was loaded, seconds since 1970.
    pub loaded: i64,
    /// Why newer files are not in force; nothing when they are.
    pub error: Option<String>,
}

impl Certificates {
    /// Loads the files; they have to be right when the daemon starts, but for a certificate that has ended: that is warned of, the unix socket needs none.
    pub fn load(config: &Tls) -> Result<Arc<Certificates>> {
        let tried = stamps(config);
        let loaded = load(config)?;
        warn_of_end(&loaded);
        Ok(Arc::new(Certificates { config: config.clone(), state: Mutex::new(State { loaded, tried, error: None }), generation: AtomicU64::new(0) }))
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.state().loaded.acceptor.clone()
    }

    /// The same for readers of shared files, who speak HTTP/1.1.
    pub fn http1_acceptor(&self) -> TlsAcceptor {
        self.state().loaded.http1.clone()
    }

    /// Changes whenever something is loaded.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether a file is another than at the last try. Blocking.
    pub fn have_changed(&self) -> bool {
        let now = stamps(&self.config);
        self.state().tried != now
    }

    /// Reads the files again. Blocking. What was there stays in force when they are wrong.
    pub fn reload(&self) -> Result<()> {
        // Before reading: what is written meanwhile is noticed the next time.
        let tried = stamps(&self.config);
        let result = load(&self.config).and_then(|loaded| loaded.is_in_time().map(|()| loaded));
        let mut state = self.state();
        state.tried = tried;
        match result {
            Ok(loaded) => {
                warn_of_end(&loaded);
                tracing::info!(fingerprint = %loaded.fingerprint, not_after = loaded.not_after, "certificates reloaded");
                state.loaded = loaded;
                state.error = None;
                self.generation.fetch_add(1, Ordering::AcqRel);
                Ok(())
            }
            Err(error) => {
                tracing::error!(error = %error.chain(), "certificates not reloaded; the former ones stay in force");
                state.error = Some(error.chain());
                Err(error)
            }
        }
    }

    /// What is in force.
    pub fn status(&self) -> Status {
        let state = self.state();
        let Loaded { fingerprint, not_after, at, .. } = state.loaded;
        Status { fingerprint, not_after, loaded: at, error: state.error.clone() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Each change is one assignment: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loaded {
    fn is_in_time(&self) -> Result<()> {
        let now = now_secs();
        if now < self.not_before || now > self.not_after {
            let why = format!("is valid from {} to {} (seconds since 1970), now is {now}", self.not_before, self.not_after);
            return Err(Error::new(Kind::InvalidRequest, Stage::Config, "listen.tls.certificate", why));
        }
        Ok(())
    }
}

fn warn_of_end(loaded: &Loaded) {
    let left = loaded.not_after.saturating_sub(now_secs());
    if left < ENDS_SOON_SECS {
        tracing::warn!(fingerprint = %loaded.fingerprint, days = left / (24 * 3600), "the server's certificate ends soon, or has ended");
    }
}

fn files(tls: &Tls) -> impl Iterator<Item = &Path> {
    [Some(&tls.certificate), Some(&tls.key), Some(&tls.client_ca), tls.client_crl.as_ref()].into_iter().flatten().map(|path| path.as_path())
}

fn stamps(tls: &Tls) -> Vec<Option<Stamp>> {
    let stamp = |path| fs::metadata(path).ok().map(|metadata| (metadata.mtime(), metadata.mtime_nsec(), metadata.ino(), metadata.len()));
    files(tls).map(stamp).collect()
}

fn load(tls: &Tls) -> Result<Loaded> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[&SupportedProtocolVersion] = match tls.min_version {
        TlsVersion::V1_2 => &[&rustls::version::TLS13, &rustls::version::TLS12],
        TlsVersion::V1_3 => &[&rustls::version::TLS13],
    };
    let chain = certificates(&tls.certificate)?;
    let leaf = chain.first().cloned().ok_or_else(|| Error::internal(Stage::Config, "listen.tls.certificate", "an empty chain passed"))?;
    let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|error| unfit(&tls.certificate, "is not a certificate", error))?;
    let key = PrivateKeyDer::from_pem_slice(&read(&tls.key)?).map_err(|error| unfit(&tls.key, "has no private key in PEM form", error))?;
    let verifier = verifier(tls, Arc::clone(&provider))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| unfit(&tls.certificate, "can't be used", error))?
        .with_client_cert_verifier(Arc::clone(&verifier))
        .with_single_cert(chain, key)
        .map_err(|error| unfit(&tls.certificate, "does not fit its key", error))?;
    // A resumed session would not look at the client's certificate again: revoked or ended, it would still open the door.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let acceptor = |protocol: &[u8]| {
        let mut config = config.clone();
        config.alpn_protocols = vec![protocol.to_vec()];
        TlsAcceptor::from(Arc::new(config))
    };
    Ok(Loaded {
        acceptor: acceptor(b"h2"),
        http1: acceptor(b"http/1.1"),
        verifier,
        fingerprint: Digest::of(&leaf),
        not_before: parsed.validity().not_before.timestamp(),
        not_after: parsed.validity().not_after.timestamp(),
        at: now_secs(),
    })
}

/// Demands a certificate of one of the authorities. With a list of revocations each client has to be covered by one that has not ended: who is not known to
/// be good is not let in.
fn verifier(tls: &Tls, provider: Arc<rustls::crypto::CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&tls.client_ca)? {
        roots.add(certificate).map_err(|error| unfit(&tls.client_ca, "is not the certificate of an authority", error))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    if let Some(path) = &tls.client_crl {
        let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&read(path)?).collect();
        let lists = lists.map_err(|error| unfit(path, "is not a PEM file", error))?;
        if lists.is_empty() {
            return Err(Error::new(Kind::InvalidRequest, Stage::Config, path.display().to_string(), "has no list of revocations in PEM form"));
        }
        builder = builder.with_crls(lists).only_check_end_entity_revocation().enforce_revocation_expiration();
    }
    builder.build().map_err(|error| unfit(&tls.client_ca, "can't be used to verify clients", error))
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

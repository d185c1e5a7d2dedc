//! Whoever has golden images: another host, a registry, a bucket.

use std::{path::Path, time::Duration};

use futures_util::future::BoxFuture;
use reqwest::{Certificate, Client, Identity, Response};

use super::manifest::Chunk;
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
};

/// For connecting and the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A blob of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Their number.
    pub size: u64,
}

/// What a holder says about a golden.
#[derive(Debug)]
pub struct Offer {
    /// The manifest (`share::manifest`), unread.
    pub manifest: Vec<u8>,
    /// Where its chunks are, one for each in the order of the manifest; empty when the holder finds them by themselves.
    pub layers: Vec<Layer>,
}

/// A chunk that is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'w> {
    /// The golden.
    pub key: &'w Digest,
    /// The chunk.
    pub chunk: &'w Chunk,
    /// Where it is, when the offer said so.
    pub layer: Option<&'w Layer>,
}

/// Asked for a golden, then for its chunks. Nothing that it gives is believed: see `share`.
pub trait Holder: Send + Sync {
    /// Its name in messages; unique.
    fn name(&self) -> &str;

    /// What it has under a key. `Kind::NotFound` when that is nothing.
    fn offer<'h>(&'h self, key: &'h Digest) -> BoxFuture<'h, Result<Offer>>;

    /// A chunk, one zstd frame; never many more bytes than a chunk can have.
    fn chunk<'h>(&'h self, wanted: Wanted<'h>) -> BoxFuture<'h, Result<Vec<u8>>>;
}

/// A client for a host that the operator named, which may be at any address: no redirects, no proxies, no certificates but the ones given. `Kind::InvalidRequest` when the
/// certificates are none.
pub(super) fn client(name: &str, is_https: bool, ca: Option<&Path>, identity: Option<&Path>) -> Result<Client> {
    // Whoever comes first installs it; ring is the only provider that is compiled in.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let wrong =
        |error: reqwest::Error| Error::new(Kind::InvalidRequest, Stage::Config, name, "the certificates of share do not fit").with_source(error);
    let read = |path: &Path| std::fs::read(path).map_err(|error| Error::io(Stage::Config, path.display().to_string(), "read the PEM file", error));
    let mut builder = Client::builder()
        .user_agent(concat!("cloudletd/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT);
    builder = match (ca, is_https) {
        (Some(path), _) => builder.tls_certs_only(Certificate::from_pem_bundle(&read(path)?).map_err(wrong)?),
        (None, true) => builder,
        // A host without TLS certificates can ask over http.
        (None, false) => builder.tls_certs_only([]),
    };
    if let Some(path) = identity {
        builder = builder.identity(Identity::from_pem(&read(path)?).map_err(wrong)?);
    }
    builder.build().map_err(wrong)
}

/// A body of at most `len_max` bytes. `Kind::Corrupt` (`reason`) when it has more.
pub(super) async fn body(mut response: Response, object: &str, len_max: u64, reason: &'static str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(part) = response.chunk().await.map_err(|error| failed(object, "receive it", error))? {
        if bytes.len() as u64 + part.len() as u64 > len_max {
            return Err(Error::new(Kind::Corrupt, Stage::Golden, object, format!("has more than {len_max} bytes")).with_reason(reason));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

/// An error of the client, whose text has the whole URL in it, so that is taken out.
pub(super) fn failed(object: &str, doing: &str, error: reqwest::Error) -> Error {
    let kind = if error.is_timeout() { Kind::Timeout } else { Kind::Unavailable };
    Error::new(kind, Stage::Golden, object, doing).with_source(error.without_url())
}

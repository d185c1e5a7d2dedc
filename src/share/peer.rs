//! Asking another host.

use std::time::Duration;

use reqwest::{Client, Response, StatusCode, Url};

use crate::{
    config,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    share::manifest::{CHUNK_LEN, MANIFEST_LEN_MAX},
    source,
};

/// For connecting and the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For a manifest: a peer that is asked for it the first time reads its whole golden.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(120);
/// For a chunk: 4 MiB at some 100 KB/s.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(40);
/// What compression adds to bytes that can't be compressed, and more.
const COMPRESSED_SLACK: u64 = 64 * 1024;

/// Another host's `share.listen`.
#[derive(Debug)]
pub struct Peer {
    /// Its URL as it is configured, without a slash at the end.
    pub name: String,
    client: Client,
}

impl Peer {
    /// Reads the certificates. `Kind::InvalidRequest` when they are none.
    pub fn new(config: &config::share::Peer) -> Result<Peer> {
        // Whoever comes first installs it; ring is the only provider that is compiled in.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let name = config.url.trim_end_matches('/').to_owned();
        let wrong = |error: reqwest::Error| {
            Error::new(Kind::InvalidRequest, Stage::Config, name.clone(), "the certificates of share.peer do not fit").with_source(error)
        };
        let read = |path: &std::path::Path| {
            std::fs::read(path).map_err(|error| Error::io(Stage::Config, path.display().to_string(), "read the PEM file", error))
        };
        let mut builder = Client::builder()
            .user_agent(concat!("cloudletd/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT);
        let given = match &config.ca {
            Some(path) => reqwest::Certificate::from_pem_bundle(&read(path)?).map_err(wrong)?,
            None => Vec::new(),
        };
        builder = match (config.ca.is_some(), name.starts_with("https:")) {
            (true, _) => builder.tls_certs_only(given),
            (false, true) => builder,
            // A host without TLS certificates can ask over http.
            (false, false) => builder.tls_certs_only([]),
        };
        if let Some(path) = &config.identity {
            builder = builder.identity(reqwest::Identity::from_pem(&read(path)?).map_err(wrong)?);
        }
        let client = builder.build().map_err(wrong)?;
        Ok(Peer { name, client })
    }

    /// The manifest of a golden, unread. `Kind::NotFound` when the peer does not have it.
    pub async fn manifest(&self, key: &Digest) -> Result<Vec<u8>> {
        self.get(&format!("v1/goldens/{}/manifest", key.hex()), MANIFEST_TIMEOUT, MANIFEST_LEN_MAX).await
    }

    /// A chunk, compressed.
    pub async fn chunk(&self, key: &Digest, index: u64) -> Result<Vec<u8>> {
        self.get(&format!("v1/goldens/{}/chunks/{index}", key.hex()), CHUNK_TIMEOUT, CHUNK_LEN + COMPRESSED_SLACK).await
    }

    async fn get(&self, path: &str, patience: Duration, len_max: u64) -> Result<Vec<u8>> {
        let url = format!("{}/{path}", self.name);
        let unavailable = |doing: &str, error: reqwest::Error| {
            let kind = if error.is_timeout() { Kind::Timeout } else { Kind::Unavailable };
            Error::new(kind, Stage::Golden, url.clone(), doing).with_source(error.without_url())
        };
        let target: Url = source::parse_url(&url)?;
        let mut response = self.client.get(target).timeout(patience).send().await.map_err(|error| unavailable("ask the peer", error))?;
        check_status(&url, &response)?;
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| unavailable("receive it", error))? {
            if bytes.len() as u64 + chunk.len() as u64 > len_max {
                return Err(Error::new(Kind::Corrupt, Stage::Golden, url, format!("has more than {len_max} bytes")).with_reason("PEER_ANSWER"));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }
}

fn check_status(url: &str, response: &Response) -> Result<()> {
    let status = response.status();
    let kind = match status {
        StatusCode::OK => return Ok(()),
        StatusCode::NOT_FOUND => Kind::NotFound,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Kind::PermissionDenied,
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => Kind::Unavailable,
        _ => Kind::Corrupt,
    };
    Err(Error::new(kind, Stage::Golden, url, format!("the peer answers {status}")).with_reason("PEER_ANSWER"))
}

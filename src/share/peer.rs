//! Asking another host.

use std::time::Duration;

use futures_util::future::BoxFuture;
use reqwest::{Client, Response, StatusCode, Url};

use super::{
    holder::{self, Holder, Offer, Wanted},
    manifest::{CHUNK_LEN, COMPRESSED_SLACK, MANIFEST_LEN_MAX},
};
use crate::{
    config,
    error::{Error, Kind, Result, Stage},
    names::Digest,
    source,
};

/// For a manifest: a peer that is asked for it the first time reads its whole golden.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(120);
/// For a chunk: 4 MiB at some 100 KB/s.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(40);

/// Another host's `share.listen`.
#[derive(Debug)]
pub struct Peer {
    /// Its URL as it is configured, without a slash at the end.
    name: String,
    client: Client,
}

impl Peer {
    /// Reads the certificates. `Kind::InvalidRequest` when they are none.
    pub fn new(config: &config::share::Peer) -> Result<Peer> {
        let name = config.url.trim_end_matches('/').to_owned();
        let client = holder::client(&name, name.starts_with("https:"), config.ca.as_deref(), config.identity.as_deref())?;
        Ok(Peer { name, client })
    }

    async fn get(&self, path: &str, patience: Duration, len_max: u64) -> Result<Vec<u8>> {
        let url = format!("{}/{path}", self.name);
        let target: Url = source::parse_url(&url)?;
        let sent = self.client.get(target).timeout(patience).send().await;
        let response = sent.map_err(|error| holder::failed(&url, "ask the peer", error))?;
        check_status(&url, &response)?;
        holder::body(response, &url, len_max, "PEER_ANSWER").await
    }
}

impl Holder for Peer {
    fn name(&self) -> &str {
        &self.name
    }

    fn offer<'h>(&'h self, key: &'h Digest) -> BoxFuture<'h, Result<Offer>> {
        Box::pin(async move {
            let manifest = self.get(&format!("v1/goldens/{}/manifest", key.hex()), MANIFEST_TIMEOUT, MANIFEST_LEN_MAX).await?;
            Ok(Offer { manifest, layers: Vec::new() })
        })
    }

    fn chunk<'h>(&'h self, wanted: Wanted<'h>) -> BoxFuture<'h, Result<Vec<u8>>> {
        Box::pin(async move {
            let path = format!("v1/goldens/{}/chunks/{}", wanted.key.hex(), wanted.chunk.index);
            self.get(&path, CHUNK_TIMEOUT, CHUNK_LEN + COMPRESSED_SLACK).await
        })
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

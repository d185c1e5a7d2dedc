//! Blobs and golden images between the hosts of a provider.
//!
//! ```text
//! serve     GET /v1/blobs/sha256:HEX             a tarball, with ranges; fetched first if `pull_through` and an image of the catalogue names it
//!           GET /v1/goldens/KEY/manifest         what the golden consists of (manifest)
//!           GET /v1/goldens/KEY/chunks/INDEX     4 MiB of the disk, one zstd frame
//! holder    whoever has goldens: asked for one, then for its chunks
//!   peer      the other end of `serve`
//!   oci       a repository of a registry
//!   bucket    objects of S3
//! remote    registries and buckets by name
//! push      goldens and tarballs into a remote, tarballs out of it
//! pull      a golden from holders: manifest, missing chunks, each verified, the digest of all of it, then the same end as a build
//! ```
//!
//! A golden's key is a hash of everything that decides its bytes, so a host knows what to ask for before it has the tarball. What the key does not
//! say is the digest of the result: that a holder names it is believed (the operator named the holder), unless `share.agree` wants several to name the
//! same, which reproducible goldens make possible. Whatever was named, what arrives is held against it, piece by piece and as a whole.

pub mod bucket;
pub mod holder;
pub mod manifest;
pub mod oci;
pub mod peer;
pub mod pull;
pub mod push;
pub mod remote;
pub mod serve;

use std::{collections::HashMap, sync::Arc, sync::Mutex, time::Duration};

use crate::{
    config::share::Share,
    error::Result,
    names::Digest,
    render::flight::Flights,
    source::{Fetcher, mirror::Health},
};
use holder::Holder;
use remote::Remote;

/// How long a holder is put aside after its first failure.
const BACK_OFF: Duration = Duration::from_secs(30);
/// Manifests kept in memory: each is some hundred kilobytes, and a provider renders from a handful of images.
const MANIFESTS_MAX: usize = 16;

/// What sharing remembers. One per daemon.
pub struct State {
    /// Those who are asked for goldens that are missing here: peers, then remotes.
    holders: Vec<Arc<dyn Holder>>,
    remotes: Vec<Remote>,
    health: Health,
    /// Encoded manifests of goldens that were asked for.
    manifests: Mutex<HashMap<Digest, Arc<Vec<u8>>>>,
    making: Flights<Digest>,
}

impl State {
    /// For a checked configuration; `fetcher` follows the redirects of registries. Fails when a certificate can't be read.
    pub fn new(config: &Share, fetcher: &Arc<Fetcher>) -> Result<State> {
        let mut holders: Vec<Arc<dyn Holder>> = Vec::new();
        for peer in &config.peers {
            holders.push(Arc::new(peer::Peer::new(peer)?));
        }
        let remotes = Remote::all(config, fetcher)?;
        holders.extend(remotes.iter().filter(|(_, is_asked)| *is_asked).map(|(remote, _)| remote.holder()));
        Ok(State {
            holders,
            remotes: remotes.into_iter().map(|(remote, _)| remote).collect(),
            health: Health::new(BACK_OFF),
            manifests: Mutex::default(),
            making: Flights::default(),
        })
    }

    fn manifest(&self, key: &Digest) -> Option<Arc<Vec<u8>>> {
        self.manifests.lock().expect("no panic while holding manifests").get(key).map(Arc::clone)
    }

    fn keep_manifest(&self, key: Digest, bytes: &Arc<Vec<u8>>) {
        let mut manifests = self.manifests.lock().expect("no panic while holding manifests");
        if manifests.len() >= MANIFESTS_MAX {
            manifests.clear();
        }
        manifests.insert(key, Arc::clone(bytes));
    }
}

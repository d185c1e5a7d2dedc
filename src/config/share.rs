//! `[share]`: what other hosts of the provider may take from this one, and whom it takes from.

use std::{net::SocketAddr, path::PathBuf};

use serde::Deserialize;

use super::{
    Listen,
    remote::{self, Bucket, Registry},
};
use crate::{
    error::{Error, Result, Stage},
    source::{self, Network},
};

/// Peers asked at most; more are a fleet, which wants a registry or a mirror.
const PEERS_MAX: usize = 64;

/// What comes first when a golden image is not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// Build it from the tarball; nobody is asked.
    #[default]
    Build,
    /// Ask the peers, then the registries and buckets for it, and build it when none has it.
    Pull,
}

/// Sharing between hosts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Share {
    /// Address and port at which other hosts read blobs and golden images. Default: none.
    pub listen: Option<SocketAddr>,
    /// Addresses that may read (`10.0.0.0/8`, `192.0.2.7`). Required without `tls`; empty with it: whoever has a certificate.
    pub allow: Vec<String>,
    /// Whether readers come by mutual TLS, with the certificates of `listen.tls`.
    pub tls: bool,
    /// Whether a blob that is missing here, and known from an image of the catalogue, is fetched when another host asks for it.
    pub pull_through: bool,
    /// Connections at the same time; more wait to be accepted.
    pub max_connections: usize,
    /// Peers, registries and buckets that have to name the same bytes before a golden image is taken from them.
    pub agree: usize,
    /// Hosts that golden images are taken from, asked in order.
    #[serde(rename = "peer")]
    pub peers: Vec<Peer>,
    /// Registries that golden images and tarballs are put into and taken from.
    #[serde(rename = "registry")]
    pub registries: Vec<Registry>,
    /// Buckets that golden images and tarballs are put into and taken from.
    #[serde(rename = "bucket")]
    pub buckets: Vec<Bucket>,
}

/// Another host's `share.listen`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// `http://HOST:PORT` or `https://HOST:PORT`. The operator names it, so it may be at any address.
    pub url: String,
    /// PEM file with the authorities of the peer's certificate. Default: the host's.
    pub ca: Option<PathBuf>,
    /// PEM file with the certificate chain and the key that this host shows.
    pub identity: Option<PathBuf>,
}

impl Default for Share {
    fn default() -> Self {
        Share {
            listen: None,
            allow: Vec::new(),
            tls: false,
            pull_through: false,
            max_connections: 64,
            agree: 1,
            peers: Vec::new(),
            registries: Vec::new(),
            buckets: Vec::new(),
        }
    }
}

impl Share {
    /// The addresses that may read. `Kind::InvalidRequest` when one is none.
    pub fn networks(&self) -> Result<Vec<Network>> {
        let network = |(index, text): (usize, &String)| {
            text.parse().map_err(|why: String| Error::field(Stage::Config, format!("share.allow[{index}]"), format!("share.allow[{index}]: {why}")))
        };
        self.allow.iter().enumerate().map(network).collect()
    }
}

/// Checks the section against the rest of the configuration.
pub fn check(share: &Share, listen: &Listen, prefer: Prefer) -> Result<()> {
    let wrong = |field: &str, why: String| Err(Error::field(Stage::Config, field, format!("{field}: {why}")));
    let networks = share.networks()?;
    if share.listen.is_some() {
        if share.tls && listen.tls.is_none() {
            return wrong("share.tls", "needs the certificates of listen.tls".into());
        }
        if !share.tls && networks.is_empty() {
            return wrong("share.allow", "says who may read, or share.tls = true whose certificates are asked for".into());
        }
    }
    if share.max_connections == 0 || share.max_connections > 4096 {
        return wrong("share.max_connections", format!("{} is not between 1 and 4096", share.max_connections));
    }
    if share.peers.len() > PEERS_MAX {
        return wrong("share.peer", format!("there are {}, the limit is {PEERS_MAX}", share.peers.len()));
    }
    for (index, peer) in share.peers.iter().enumerate() {
        let at = |key: &str| format!("share.peer[{index}].{key}");
        let url = match source::parse_url(&peer.url) {
            Ok(url) => url,
            Err(error) => return wrong(&at("url"), error.message().to_owned()),
        };
        if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() {
            return wrong(&at("url"), format!("{:?} is not an http or https URL without user and query", peer.url));
        }
        for (key, path) in [("ca", &peer.ca), ("identity", &peer.identity)] {
            if let Some(path) = path {
                if url.scheme() != "https" {
                    return wrong(&at(key), "goes with https".into());
                }
                if !path.is_absolute() {
                    return wrong(&at(key), format!("{path:?} is not an absolute path"));
                }
            }
        }
    }
    remote::check(&share.registries, &share.buckets)?;
    let remotes = share.registries.iter().map(|registry| registry.goldens).chain(share.buckets.iter().map(|bucket| bucket.goldens));
    let holders = share.peers.len() + remotes.filter(|asked| *asked).count();
    if prefer == Prefer::Pull && holders == 0 {
        return wrong("golden.prefer", "\"pull\" needs a share.peer, share.registry or share.bucket".into());
    }
    if share.agree == 0 || (prefer == Prefer::Pull && share.agree > holders) {
        return wrong("share.agree", format!("{} is not between 1 and the number of those that are asked ({holders})", share.agree));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn contradictions_are_named_and_nothing_is_shared_by_default() {
        let config = Config::parse("").expect("valid");
        assert_eq!((config.share.listen, config.share.pull_through, config.golden.prefer), (None, false, super::Prefer::Build));
        Config::parse("[golden]\nprefer='pull'\n[share]\nlisten='127.0.0.1:1'\nallow=['10.0.0.0/8']\n[[share.peer]]\nurl='http://10.0.0.2:1'")
            .expect("valid");
        for (text, want) in [
            ("[share]\nlisten='127.0.0.1:1'", "share.allow"),
            ("[share]\nlisten='127.0.0.1:1'\ntls=true", "share.tls"),
            ("[share]\nallow=['everybody']", "share.allow[0]"),
            ("[share]\nmax_connections=0", "share.max_connections"),
            ("[share]\nagree=0", "share.agree"),
            ("[golden]\nprefer='pull'", "golden.prefer"),
            ("[golden]\nprefer='pull'\n[share]\nagree=2\n[[share.peer]]\nurl='http://a'", "share.agree"),
            ("[[share.peer]]\nurl='ftp://a'", "share.peer[0].url"),
            ("[[share.peer]]\nurl='http://u:p@a'", "share.peer[0].url"),
            ("[[share.peer]]\nurl='http://a'\nca='/b'", "share.peer[0].ca"),
            ("[[share.peer]]\nurl='https://a'\nidentity='b'", "share.peer[0].identity"),
        ] {
            let error = Config::parse(text).expect_err(text);
            assert!(error.chain().contains(want), "{text}: {}", error.chain());
        }
    }
}

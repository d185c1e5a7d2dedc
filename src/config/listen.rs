//! `[listen]`: sockets, and who may call without an entry of `[[access]]`.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;

use super::SOCKET_DEFAULT;
use crate::error::{Error, Result, Stage};

/// What `listen.tcp_without_tls` has to say, word for word.
pub const TCP_WITHOUT_TLS_CONSENT: &str = "anybody who reaches this port controls this host";

/// Sockets and who may call.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Path of the unix socket; absolute.
    pub unix: PathBuf,
    /// Users that may call on the unix socket. Root always may.
    pub allow_uids: BTreeSet<u32>,
    /// Groups that may call on the unix socket: the caller's own, or one that the host's user database puts the caller in.
    pub allow_gids: BTreeSet<u32>,
    /// Address and port to listen on besides, e.g. `127.0.0.1:7443`. Default: none.
    pub tcp: Option<std::net::SocketAddr>,
    /// Certificates for `tcp`.
    pub tls: Option<Tls>,
    /// Consent to `tcp` without `tls`; has to be the sentence of the documentation.
    pub tcp_without_tls: Option<String>,
    /// Connections of callers at one time, on each of the sockets; more are closed at once.
    pub max_connections: usize,
}

/// Mutual TLS.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// PEM file with the server's certificate chain.
    pub certificate: PathBuf,
    /// PEM file with its key.
    pub key: PathBuf,
    /// PEM file with the authorities whose clients may call.
    pub client_ca: PathBuf,
    /// PEM file with lists of revoked client certificates, one of each authority. A client that no list covers, or only one whose time is over, is refused.
    /// Default: none is revoked.
    pub client_crl: Option<PathBuf>,
    /// Least version that is spoken: 1.2 or 1.3.
    #[serde(default)]
    pub min_version: TlsVersion,
    /// Seconds between two looks at the files: those that changed are loaded. 0: only on SIGHUP.
    #[serde(default = "reload_interval_secs")]
    pub reload_interval_secs: u64,
}

/// Versions of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2 or later.
    #[default]
    #[serde(rename = "1.2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    V1_3,
}

fn reload_interval_secs() -> u64 {
    10
}

impl Tls {
    /// From the three files that there have to be.
    pub fn new(certificate: PathBuf, key: PathBuf, client_ca: PathBuf) -> Tls {
        Tls { certificate, key, client_ca, client_crl: None, min_version: TlsVersion::default(), reload_interval_secs: reload_interval_secs() }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Listen {
            unix: SOCKET_DEFAULT.into(),
            allow_uids: BTreeSet::new(),
            allow_gids: BTreeSet::new(),
            tcp: None,
            tls: None,
            tcp_without_tls: None,
            max_connections: 4096,
        }
    }
}

impl Listen {
    /// Refuses what does not fit together.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |field: &str, why: String| Err(Error::field(Stage::Config, field, format!("{field}: {why}")));
        if !self.unix.is_absolute() {
            return wrong("listen.unix", format!("{:?} is not an absolute path", self.unix));
        }
        if self.tcp.is_some() && self.tls.is_none() && self.tcp_without_tls.as_deref() != Some(TCP_WITHOUT_TLS_CONSENT) {
            return wrong("listen.tcp", format!("needs listen.tls, or listen.tcp_without_tls = {TCP_WITHOUT_TLS_CONSENT:?}"));
        }
        if !(1..=1 << 20).contains(&self.max_connections) {
            return wrong("listen.max_connections", format!("{} is not between 1 and 1048576", self.max_connections));
        }
        Ok(())
    }
}

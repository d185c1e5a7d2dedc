//! `[fetch]`: where root filesystems may come from.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    source::Network,
    units::{Bytes, GIB},
};

/// Fetching root filesystems.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fetch {
    /// Directories that `file://` URLs may name files below. Default: none.
    pub file_roots: Vec<PathBuf>,
    /// URL schemes that may be used, besides file.
    pub schemes: BTreeSet<String>,
    /// Hosts that may be asked (exact names, or `*.example.com`). Default: every host.
    pub allow_hosts: Vec<String>,
    /// Hosts that may not be asked; stronger than `allow_hosts`.
    pub deny_hosts: Vec<String>,
    /// Ports that may be asked. Default: every port.
    pub ports: BTreeSet<u16>,
    /// Whether loopback, link-local and private addresses may be asked.
    pub allow_private_addresses: bool,
    /// Ranges of addresses that may be asked although they are not public, e.g. `10.1.0.0/16`.
    pub allow_addresses: Vec<Network>,
    /// Ranges of addresses that may not be asked; stronger than everything that allows them.
    pub deny_addresses: Vec<Network>,
    /// PEM file with authorities whose certificates are accepted besides those of the host. Absolute.
    pub ca_file: Option<PathBuf>,
    /// Seconds for resolving a name, connecting and the TLS handshake.
    pub connect_timeout_secs: u64,
    /// Redirects followed per request; each is a new URL that is checked. From https to http none is.
    pub max_redirects: usize,
    /// Largest tarball, bytes as transferred.
    pub max_size: Bytes,
    /// Seconds without a byte before a transfer counts as stalled.
    pub idle_timeout_secs: u64,
    /// Seconds for the whole transfer, retries included.
    pub total_timeout_secs: u64,
    /// Attempts per transfer.
    pub attempts: u32,
    /// Mirrors: URLs with this prefix are fetched from these instead, in order.
    #[serde(rename = "mirror")]
    pub mirrors: Vec<Mirror>,
}

/// A rewrite rule.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// URL prefix that is replaced; without a scheme a host and the beginning of a path, for http and https.
    pub prefix: String,
    /// What it is replaced with, tried in order. `{digest}` and `{sha256}` are replaced by the file's digest, with and without `sha256:` before it.
    #[serde(default)]
    pub replace: Vec<String>,
    /// A `mirrors:1.0` document of simplestreams on this host whose mirrors come after those of `replace`. Absolute.
    pub mirrors_json: Option<PathBuf>,
    /// Whether these may be asked for files whose digest nobody knows. Default: only the original URL is.
    #[serde(default)]
    pub trusted: bool,
}

impl Default for Fetch {
    fn default() -> Self {
        Fetch {
            file_roots: Vec::new(),
            schemes: ["http", "https"].map(String::from).into(),
            allow_hosts: Vec::new(),
            deny_hosts: Vec::new(),
            ports: BTreeSet::new(),
            allow_private_addresses: false,
            allow_addresses: Vec::new(),
            deny_addresses: Vec::new(),
            ca_file: None,
            connect_timeout_secs: 10,
            max_redirects: 5,
            max_size: Bytes(16 * GIB),
            idle_timeout_secs: 30,
            total_timeout_secs: 3600,
            attempts: 5,
            mirrors: Vec::new(),
        }
    }
}

/// `[[source]]`: rules for certain hosts, in place of those of `[fetch]`. The first entry that has a host is used. `fetch.allow_hosts` and `deny_hosts` hold
/// for its hosts too, what else is not given is as in `[fetch]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Hosts it is for: exact names, `*.example.com`, or addresses. At least one.
    pub hosts: Vec<String>,
    /// URL schemes.
    pub schemes: Option<BTreeSet<String>>,
    /// Ports.
    pub ports: Option<BTreeSet<u16>>,
    /// Whether loopback, link-local and private addresses may be asked.
    pub allow_private_addresses: Option<bool>,
    /// Ranges of addresses that may be asked although they are not public.
    pub allow_addresses: Option<Vec<Network>>,
    /// Ranges of addresses that may not be asked, besides those of `[fetch]`.
    #[serde(default)]
    pub deny_addresses: Vec<Network>,
    /// PEM file with the authorities whose certificates are accepted, and no others. Absolute.
    pub ca_file: Option<PathBuf>,
    /// Seconds for resolving a name, connecting and the TLS handshake.
    pub connect_timeout_secs: Option<u64>,
    /// Seconds without a byte before a transfer counts as stalled.
    pub idle_timeout_secs: Option<u64>,
    /// Redirects followed per request.
    pub max_redirects: Option<usize>,
}

/// More redirects than any server needs that means to answer.
const REDIRECTS_MAX: usize = 20;

/// Refuses rules that could never hold, or never end. `at` is where they stand.
fn check_rules(at: &str, schemes: &BTreeSet<String>, redirects: usize, timeouts: [(&str, u64); 2], ca_file: Option<&PathBuf>) -> Result<()> {
    let wrong = |key: &str, why: String| {
        let field = format!("{at}.{key}");
        Err(Error::field(Stage::Config, &field, format!("{field}: {why}")))
    };
    if let Some(scheme) = schemes.iter().find(|scheme| !matches!(scheme.as_str(), "http" | "https")) {
        return wrong("schemes", format!("{scheme:?} is not http or https"));
    }
    if redirects > REDIRECTS_MAX {
        return wrong("max_redirects", format!("{redirects} is more than {REDIRECTS_MAX}"));
    }
    if let Some((key, _)) = timeouts.into_iter().find(|(_, secs)| *secs == 0) {
        return wrong(key, "is 0: nothing would ever arrive".into());
    }
    if ca_file.is_some_and(|path| !path.is_absolute()) {
        return wrong("ca_file", "is not an absolute path".into());
    }
    Ok(())
}

impl Source {
    /// Refuses what does not fit together; `index` is where it stands.
    pub(super) fn check(&self, index: usize, fetch: &Fetch) -> Result<()> {
        let at = format!("source[{index}]");
        if self.hosts.is_empty() || self.hosts.iter().any(String::is_empty) {
            let field = format!("{at}.hosts");
            return Err(Error::field(Stage::Config, &field, format!("{field}: names no host")));
        }
        let timeouts = [
            ("connect_timeout_secs", self.connect_timeout_secs.unwrap_or(fetch.connect_timeout_secs)),
            ("idle_timeout_secs", self.idle_timeout_secs.unwrap_or(fetch.idle_timeout_secs)),
        ];
        let schemes = self.schemes.as_ref().unwrap_or(&fetch.schemes);
        check_rules(&at, schemes, self.max_redirects.unwrap_or(fetch.max_redirects), timeouts, self.ca_file.as_ref())
    }
}

impl Fetch {
    /// Refuses what does not fit together.
    pub(super) fn check(&self) -> Result<()> {
        let timeouts = [("connect_timeout_secs", self.connect_timeout_secs), ("idle_timeout_secs", self.idle_timeout_secs)];
        check_rules("fetch", &self.schemes, self.max_redirects, timeouts, self.ca_file.as_ref())?;
        for (index, root) in self.file_roots.iter().enumerate() {
            if !root.is_absolute() {
                let field = format!("fetch.file_roots[{index}]");
                return Err(Error::field(Stage::Config, &field, format!("{field}: {root:?} is not an absolute path")));
            }
        }
        Ok(())
    }
}

//! HTTP clients: one for what the policy allows and one for mirrors, for the general rules and for each source that has its own.

use std::{fs, path::PathBuf, sync::Arc, sync::OnceLock, time::Duration};

use reqwest::{Certificate, Client, Url};

use super::{
    Config,
    policy::{UrlPolicy, host_matches},
    resolver::GuardedResolver,
};
use crate::error::{Error, Kind, Result, Stage};

/// Rules for certain hosts, in place of the general ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRules {
    /// Hosts they are for: names, `*.example.com` for everything below a name, or addresses.
    pub hosts: Vec<String>,
    /// How they are asked.
    pub rules: Rules,
}

/// How hosts are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// What may be asked.
    pub policy: UrlPolicy,
    /// For name resolution, connecting and the TLS handshake of one request.
    pub connect_timeout: Duration,
    /// Without a byte for so long, a transfer counts as stalled.
    pub idle_timeout: Duration,
    /// Redirects followed per request.
    pub redirects_max: usize,
    /// Whose certificates are accepted.
    pub authorities: Authorities,
}

/// Whose certificates servers may have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Authorities {
    /// Those of the host.
    #[default]
    Host,
    /// Those of the host and of a PEM file.
    HostAnd(PathBuf),
    /// Those of a PEM file and no others.
    Only(PathBuf),
}

/// Clients are made at their first use: a host that only has files needs no certificates.
#[derive(Debug)]
pub(super) struct Clients {
    /// For guarded and for trusted requests; the general rules last.
    made: Vec<[OnceLock<Client>; 2]>,
}

impl Config {
    /// The rules for a URL: of the first source that fits its host, else the general ones. The index is that of their clients.
    pub(super) fn rules(&self, url: &Url) -> (usize, &Rules) {
        let host = url.host_str().unwrap_or_default();
        let position = self.sources.iter().position(|source| source.hosts.iter().any(|pattern| host_matches(pattern, host)));
        position.map_or((self.sources.len(), &self.rules), |index| (index, &self.sources[index].rules))
    }
}

impl Clients {
    pub(super) fn new(config: &Config) -> Clients {
        Clients { made: (0..=config.sources.len()).map(|_| Default::default()).collect() }
    }

    /// The client for a URL; one that is `trusted` may be at any address.
    pub(super) fn of(&self, config: &Config, url: &Url, trusted: bool) -> Result<&Client> {
        let (index, rules) = config.rules(url);
        let slot = &self.made[index][usize::from(trusted)];
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        let client = client(rules, trusted)?;
        Ok(slot.get_or_init(|| client))
    }
}

fn client(rules: &Rules, trusted: bool) -> Result<Client> {
    // Whoever comes first installs it; ring is the only provider that is compiled in.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let policy = (!trusted).then(|| Arc::new(rules.policy.clone()));
    let builder = Client::builder()
        .user_agent(concat!("cloudletd/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        // Whatever the environment says: a proxy would see everything, and connect where the policy can't look.
        .no_proxy()
        .connect_timeout(rules.connect_timeout)
        .dns_resolver(GuardedResolver { policy });
    let builder = match &rules.authorities {
        Authorities::Host => builder,
        Authorities::HostAnd(path) => builder.tls_certs_merge(certificates(path)?),
        Authorities::Only(path) => builder.tls_certs_only(certificates(path)?),
    };
    builder
        .build()
        .map_err(|error| Error::new(Kind::Unavailable, Stage::Fetch, "http client", "set up TLS with the host's certificates").with_source(error))
}

fn certificates(path: &std::path::Path) -> Result<Vec<Certificate>> {
    let object = || path.display().to_string();
    let pem = fs::read(path).map_err(|error| Error::io(Stage::Fetch, object(), "read the authorities of a source", error))?;
    let certificates = Certificate::from_pem_bundle(&pem)
        .map_err(|error| Error::new(Kind::Unavailable, Stage::Fetch, object(), "is not a PEM file of certificates").with_source(error))?;
    if certificates.is_empty() {
        return Err(Error::new(Kind::Unavailable, Stage::Fetch, object(), "has no certificate in PEM form"));
    }
    Ok(certificates)
}

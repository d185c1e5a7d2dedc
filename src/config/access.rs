//! `[[access]]`: which callers may do what, where.
//!
//! An entry names callers and what they get. A caller that several entries name gets everything that they give together: for each pool the highest role of
//! the entries that cover it. What a caller owns and the limits it has come from the first entry that names it.

use std::{collections::BTreeSet, fmt, num::NonZeroU32, str::FromStr};

use serde::Deserialize;

use crate::{
    error::{Error, Result, Stage},
    names::{Digest, PoolName},
    units::Bytes,
};

/// What a caller may do; each role includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Look at what is there.
    Read,
    /// Make, change and remove images' uploads, renders and volumes.
    Render,
    /// Everything, also what other callers depend on: images and golden images are removed.
    Admin,
}

impl Role {
    /// The name in configuration and messages.
    pub fn name(self) -> &'static str {
        match self {
            Role::Read => "read",
            Role::Render => "render",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// SHA-256 of a certificate (DER): 64 hexadecimal digits, with or without `sha256:` before and colons between, as OpenSSL prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Fingerprint(pub Digest);

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex: String = text.trim_start_matches("sha256:").chars().filter(|c| *c != ':').collect();
        format!("sha256:{}", hex.to_ascii_lowercase()).parse().map(Fingerprint).map_err(|_| format!("{text:?} is not the SHA-256 of a certificate"))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// One entry. Patterns have `*` for anything, also nothing, and `?` for one character; a caller is named when any of the six kinds of names fits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// What the callers are called together: owner of their volumes, name in the audit log. Default: each caller has its own name, such as `uid:1000` or
    /// `cn:web1.example.com`.
    pub name: Option<String>,
    /// Users on the unix socket.
    #[serde(default)]
    pub uids: BTreeSet<u32>,
    /// Groups on the unix socket: the caller's own, or one that the host's user database puts the caller in.
    #[serde(default)]
    pub gids: BTreeSet<u32>,
    /// Patterns of the common name of a certificate's subject.
    #[serde(default)]
    pub common_names: Vec<String>,
    /// Patterns of a certificate's alternative DNS names.
    #[serde(default)]
    pub dns_names: Vec<String>,
    /// Patterns of a certificate's alternative URIs, e.g. `spiffe://example.com/cloud/*`.
    #[serde(default)]
    pub uris: Vec<String>,
    /// Certificates by their SHA-256.
    #[serde(default)]
    pub fingerprints: BTreeSet<Fingerprint>,
    /// What they may do: read, render or admin. Required.
    pub role: Role,
    /// The pools in which they may. Default: all, and what concerns the whole host.
    pub pools: Option<BTreeSet<PoolName>>,
    /// Patterns of the platforms whose machine forms they get. Default: all.
    pub platforms: Option<Vec<String>>,
    /// Patterns of the hosts that their images' root filesystems may come from, besides what `[fetch]` says. Default: all.
    pub image_hosts: Option<Vec<String>>,
    /// What each owner may have and ask for.
    #[serde(default)]
    pub limits: CallerLimits,
}

/// What an owner may have and ask for; what is not given is not limited. All callers with the same owner share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CallerLimits {
    /// Volumes, data, swap and scratch volumes among them.
    pub volumes: Option<u64>,
    /// Virtual sizes of all volumes together.
    pub virtual_size: Option<Bytes>,
    /// What is allocated for them: as published, and for a render that runs what it will write.
    pub allocated_size: Option<Bytes>,
    /// Renders that wait or run, prerenders among them.
    pub concurrent_renders: Option<u32>,
    /// Calls a second in the long run, of all methods.
    pub calls_per_second: Option<NonZeroU32>,
    /// Calls at once after a pause. Default: those of one second.
    pub burst: Option<NonZeroU32>,
}

impl Access {
    /// An entry that names nobody yet, for tests and programs that make a configuration.
    pub fn new(role: Role) -> Access {
        Access {
            name: None,
            uids: BTreeSet::new(),
            gids: BTreeSet::new(),
            common_names: Vec::new(),
            dns_names: Vec::new(),
            uris: Vec::new(),
            fingerprints: BTreeSet::new(),
            role,
            pools: None,
            platforms: None,
            image_hosts: None,
            limits: CallerLimits::default(),
        }
    }

    /// Whether it names callers by group.
    pub fn names_groups(&self) -> bool {
        !self.gids.is_empty()
    }

    /// Whether it names callers by certificate.
    pub fn names_certificates(&self) -> bool {
        !(self.common_names.is_empty() && self.dns_names.is_empty() && self.uris.is_empty() && self.fingerprints.is_empty())
    }

    /// Refuses an entry that names nobody, names nothing, or names pools that there are not. `index` is where it stands.
    pub(super) fn check(&self, index: usize, pools: &BTreeSet<PoolName>) -> Result<()> {
        let wrong = |key: &str, why: String| {
            let field = format!("access[{index}].{key}");
            Err(Error::field(Stage::Config, &field, format!("{field}: {why}")))
        };
        if self.uids.is_empty() && self.gids.is_empty() && !self.names_certificates() {
            return wrong("uids", "the entry names no caller: give uids, gids, common_names, dns_names, uris or fingerprints".into());
        }
        if let Some(name) = &self.name
            && (name.is_empty() || name.len() > OWNER_LEN_MAX || !name.chars().all(|c| c.is_ascii_graphic()))
        {
            return wrong("name", format!("{name:?} is not 1 to {OWNER_LEN_MAX} visible ASCII characters"));
        }
        let patterns = [("common_names", &self.common_names), ("dns_names", &self.dns_names), ("uris", &self.uris)];
        for (key, list) in patterns {
            if list.iter().any(String::is_empty) {
                return wrong(key, "an empty pattern fits nobody".into());
            }
        }
        if self.limits.burst.is_some() && self.limits.calls_per_second.is_none() {
            return wrong("limits.burst", "goes with limits.calls_per_second".into());
        }
        if let Some(named) = &self.pools {
            if named.is_empty() {
                return wrong("pools", "is empty; leave it out for all pools".into());
            }
            if let Some(unknown) = named.iter().find(|pool| !pools.contains(*pool)) {
                return wrong("pools", format!("{unknown} is not a configured pool"));
            }
        }
        Ok(())
    }
}

/// Longest name of an owner, bytes.
pub const OWNER_LEN_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn entries_that_name_nobody_or_nothing_are_refused_by_name() {
        for (text, want) in [
            ("[[access]]\nrole='admin'", "access[0].uids"),
            ("[[access]]\nuids=[1]\nrole='root'", "role"),
            ("[[access]]\nuids=[1]", "role"),
            ("[[access]]\nuids=[1]\nrole='read'\npools=[]", "access[0].pools"),
            ("[[access]]\nuids=[1]\nrole='read'\npools=['nowhere']", "access[0].pools"),
            ("[[access]]\nuids=[1]\nrole='read'\nname=''", "access[0].name"),
            ("[[access]]\ncommon_names=['']\nrole='read'", "access[0].common_names"),
            ("[[access]]\nfingerprints=['abc']\nrole='read'", "SHA-256"),
            ("[[access]]\nuids=[1]\nrole='read'\nlimits={burst=5}", "access[0].limits.burst"),
            ("[[access]]\nuids=[1]\nrole='read'\nlimits={calls_per_second=0}", "calls_per_second"),
            ("[[access]]\nuid=[1]\nrole='read'", "uid"),
        ] {
            let error = Config::parse(text).expect_err(text);
            assert!(error.chain().contains(want), "{text}: {}", error.chain());
        }
        let hex = "AB".repeat(32);
        let colons: Vec<&str> = (0..32).map(|_| "AB").collect();
        let text = format!("[[access]]\nfingerprints=['sha256:{hex}', '{}']\nrole='render'\npools=['default']", colons.join(":"));
        let config = Config::parse(&text).expect("both forms are read");
        assert_eq!(config.access[0].fingerprints.len(), 1);
    }
}

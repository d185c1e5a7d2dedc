//! What an identity is granted: `listen.allow_uids`, `listen.allow_gids` and the entries of `[[access]]`, put together.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    api::authorise::identity::Identity,
    config::{Access, CallerLimits, Config, Role},
    host::block::glob_matches,
    names::PoolName,
};

/// The rules of a configuration.
#[derive(Debug)]
pub struct Rules {
    uids: BTreeSet<u32>,
    gids: BTreeSet<u32>,
    own_uid: u32,
    tcp_without_tls: bool,
    entries: Vec<Access>,
}

/// What a caller is granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grants {
    /// What the caller's volumes belong to.
    pub owner: String,
    /// Role in all pools and for what concerns the whole host.
    pub everywhere: Option<Role>,
    /// Roles in single pools.
    pub pools: BTreeMap<PoolName, Role>,
    /// Patterns of platforms; none for all.
    pub platforms: Option<Vec<String>>,
    /// Patterns of the hosts of root filesystems; none for all.
    pub image_hosts: Option<Vec<String>>,
    /// What the owner may have and ask for.
    pub limits: CallerLimits,
}

impl Rules {
    /// Root, the daemon's own user and those of `listen` are administrators, as is everybody on TCP when the configuration gave up TLS in so many words.
    /// While there is no entry at all, so is every client whose certificate is verified.
    pub fn new(config: &Config) -> Rules {
        Rules {
            uids: config.listen.allow_uids.clone(),
            gids: config.listen.allow_gids.clone(),
            own_uid: nix::unistd::geteuid().as_raw(),
            tcp_without_tls: config.listen.tls.is_none() && config.listen.tcp_without_tls.is_some(),
            entries: config.access.clone(),
        }
    }

    /// Whether groups decide anything, so that they have to be looked up.
    pub fn need_groups(&self) -> bool {
        !self.gids.is_empty() || self.entries.iter().any(Access::names_groups)
    }

    /// Whether processes beside root's and the daemon's own may call.
    pub fn let_others_in(&self) -> bool {
        !self.uids.is_empty() || self.need_groups() || self.entries.iter().any(|entry| !entry.uids.is_empty())
    }

    /// What an identity is granted; nothing when nothing names it.
    pub fn grants(&self, identity: &Identity) -> Option<Arc<Grants>> {
        let matching: Vec<&Access> = self.entries.iter().filter(|entry| names(entry, identity)).collect();
        let is_administrator = self.is_administrator(identity);
        if matching.is_empty() && !is_administrator {
            return None;
        }
        let owner = matching.iter().find_map(|entry| entry.name.clone()).unwrap_or_else(|| identity.name());
        let mut grants = Grants {
            owner,
            everywhere: is_administrator.then_some(Role::Admin),
            pools: BTreeMap::new(),
            platforms: together(is_administrator, matching.iter().map(|entry| entry.platforms.as_ref())),
            image_hosts: together(is_administrator, matching.iter().map(|entry| entry.image_hosts.as_ref())),
            limits: matching.first().map(|entry| entry.limits).unwrap_or_default(),
        };
        for entry in &matching {
            match &entry.pools {
                None => grants.everywhere = grants.everywhere.max(Some(entry.role)),
                Some(pools) => {
                    for pool in pools {
                        let role = grants.pools.entry(pool.clone()).or_insert(entry.role);
                        *role = (*role).max(entry.role);
                    }
                }
            }
        }
        Some(Arc::new(grants))
    }

    fn is_administrator(&self, identity: &Identity) -> bool {
        match identity {
            Identity::Unix { uid, gid, groups, .. } => {
                *uid == 0
                    || *uid == self.own_uid
                    || self.uids.contains(uid)
                    || self.gids.contains(gid)
                    || groups.iter().any(|group| self.gids.contains(group))
            }
            Identity::Certificate(_) => self.entries.is_empty(),
            Identity::Tcp { .. } => self.tcp_without_tls,
        }
    }
}

/// Whether an entry names the caller.
fn names(entry: &Access, identity: &Identity) -> bool {
    let fits = |patterns: &[String], name: &str| patterns.iter().any(|pattern| glob_matches(pattern.as_bytes(), name.as_bytes()));
    match identity {
        Identity::Unix { uid, gid, groups, .. } => {
            entry.uids.contains(uid) || entry.gids.contains(gid) || groups.iter().any(|group| entry.gids.contains(group))
        }
        Identity::Certificate(certificate) => {
            certificate.common_name.as_ref().is_some_and(|name| fits(&entry.common_names, name))
                || certificate.dns_names.iter().any(|name| fits(&entry.dns_names, name))
                || certificate.uris.iter().any(|name| fits(&entry.uris, name))
                || entry.fingerprints.iter().any(|fingerprint| fingerprint.0 == certificate.fingerprint)
        }
        Identity::Tcp { .. } => false,
    }
}

/// Several lists of patterns as one; one that is not given stands for everything.
fn together<'p>(everything: bool, lists: impl Iterator<Item = Option<&'p Vec<String>>>) -> Option<Vec<String>> {
    if everything {
        return None;
    }
    lists.collect::<Option<Vec<_>>>().map(|lists| lists.into_iter().flatten().cloned().collect())
}

impl Grants {
    /// The role in one pool.
    pub fn role_in(&self, pool: &PoolName) -> Option<Role> {
        self.everywhere.max(self.pools.get(pool).copied())
    }

    /// The highest role anywhere.
    pub fn role_anywhere(&self) -> Option<Role> {
        self.everywhere.max(self.pools.values().copied().max())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Rules {
        let pools = "[[pool]]\nname='a'\nkind='directory'\npath='/a'\n[[pool]]\nname='b'\nkind='directory'\npath='/b'\n";
        Rules { own_uid: 5, ..Rules::new(&Config::parse(&format!("{text}\n{pools}")).expect("a configuration")) }
    }

    fn process(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        Identity::Unix { uid, gid, pid: Some(1), groups: groups.to_vec() }
    }

    #[test]
    fn nobody_is_let_in_by_default() {
        let rules = rules("[listen]\nallow_uids=[1000]\nallow_gids=[44]");
        for (uid, gid, groups, allowed) in
            [(0, 0, &[][..], true), (5, 9, &[], true), (1000, 1, &[], true), (7, 44, &[], true), (7, 7, &[44], true), (7, 7, &[7], false)]
        {
            let grants = rules.grants(&process(uid, gid, groups));
            assert_eq!(grants.as_ref().and_then(|grants| grants.everywhere), allowed.then_some(Role::Admin), "{uid}:{gid}");
            assert_eq!(grants.is_some(), allowed);
        }
        assert_eq!(rules.grants(&Identity::Tcp { address: None }), None);
    }

    #[test]
    fn roles_of_several_entries_add_up_pool_by_pool() {
        let rules = rules(
            "[[access]]\nuids=[7]\nrole='read'\n[[access]]\nname='team'\ngids=[70]\nrole='render'\npools=['a']\nplatforms=['m1.*']
             [[access]]\nuids=[8]\nrole='admin'\npools=['b']",
        );
        let (a, b) = ("a".parse().expect("valid"), "b".parse().expect("valid"));
        let grants = rules.grants(&process(7, 7, &[70])).expect("named twice");
        assert_eq!((grants.role_in(&a), grants.role_in(&b)), (Some(Role::Render), Some(Role::Read)));
        assert_eq!((grants.owner.as_str(), grants.everywhere, grants.role_anywhere()), ("team", Some(Role::Read), Some(Role::Render)));
        assert_eq!(grants.platforms, None, "one of the entries has no patterns");
        let grants = rules.grants(&process(9, 70, &[])).expect("named by group");
        assert_eq!((grants.role_in(&a), grants.role_in(&b), grants.everywhere), (Some(Role::Render), None, None));
        assert_eq!(grants.platforms.as_deref(), Some(&["m1.*".to_owned()][..]));
        let grants = rules.grants(&process(8, 8, &[])).expect("named by user");
        assert_eq!((grants.owner.as_str(), grants.role_in(&b), grants.role_in(&a)), ("uid:8", Some(Role::Admin), None));
        assert_eq!(rules.grants(&process(10, 10, &[10])), None);
        assert!(rules.need_groups() && rules.let_others_in());
    }

    #[test]
    fn certificates_are_named_by_pattern_and_only_once_there_are_entries() {
        let certificate = crate::api::authorise::Certificate {
            fingerprint: crate::names::Digest::of(b"x"),
            subject: "CN=web1".into(),
            common_name: Some("web1".into()),
            dns_names: vec!["web1.example.com".into()],
            uris: vec!["spiffe://example.com/cloud/web1".into()],
            not_after: 0,
            address: None,
        };
        let identity = Identity::Certificate(Box::new(certificate));
        assert_eq!(rules("").grants(&identity).expect("every verified client").everywhere, Some(Role::Admin));
        for (entry, named) in [
            ("common_names=['web*']", true),
            ("common_names=['web']", false),
            ("dns_names=['*.example.com']", true),
            ("dns_names=['*.example.org']", false),
            ("uris=['spiffe://example.com/cloud/*']", true),
            ("uris=['spiffe://example.com/']", false),
            (&format!("fingerprints=['{}']", crate::names::Digest::of(b"x").hex()), true),
            (&format!("fingerprints=['{}']", crate::names::Digest::of(b"y").hex()), false),
            ("uids=[0]", false),
        ] {
            let grants = rules(&format!("[[access]]\nrole='read'\n{entry}")).grants(&identity);
            assert_eq!(grants.map(|grants| grants.everywhere), named.then_some(Some(Role::Read)), "{entry}");
        }
    }
}

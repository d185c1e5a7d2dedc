//! The caller of one request, as services see it.

use std::sync::{Arc, Mutex, PoisonError};

use tonic::{Request, Status};

use crate::{
    api::authorise::{Grants, Identity},
    config::Role,
    error::{Error, Kind, Result, Stage},
    host::block::glob_matches,
    names::PoolName,
    render::quota::Claim,
};

/// Whether the certificate of a connection's client is still vouched for; asked before each call.
pub type StillGood = Arc<dyn Fn() -> bool + Send + Sync>;

/// The other end of a connection with what it is granted: found out once, when the connection is made.
#[derive(Clone)]
pub struct Peer {
    /// Who it is.
    pub identity: Arc<Identity>,
    /// What it may do; nothing for somebody whom no rule names.
    pub grants: Option<Arc<Grants>>,
    /// Whether it may go on; nothing for those who showed no certificate.
    pub still_good: Option<StillGood>,
}

/// What services note of a call for the audit log: names and digests, no content.
#[derive(Debug, Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<(&'static str, String)>>>);

/// Longest text that is noted, characters.
const NOTE_LEN_MAX: usize = 256;

impl Notes {
    /// Takes what was noted.
    pub fn take(&self) -> Vec<(&'static str, String)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The caller of one request; there is none unless the layer has let it through.
#[derive(Debug, Clone)]
pub struct Caller {
    identity: Arc<Identity>,
    grants: Arc<Grants>,
    notes: Notes,
}

impl Caller {
    /// For the layer only: the role was checked.
    pub(super) fn new(identity: Arc<Identity>, grants: Arc<Grants>) -> Caller {
        Caller { identity, grants, notes: Notes::default() }
    }

    /// Whose request this is.
    pub fn of<T>(request: &Request<T>) -> Result<Caller, Status> {
        request.extensions().get::<Caller>().cloned().ok_or_else(|| Status::unauthenticated("nobody has checked who calls"))
    }

    /// Notes what the call is about, for the audit log.
    pub fn note(&self, name: &'static str, value: impl std::fmt::Display) {
        let value = value.to_string().chars().take(NOTE_LEN_MAX).collect();
        self.notes.0.lock().unwrap_or_else(PoisonError::into_inner).push((name, value));
    }

    /// What is noted; shared with whoever notes.
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    /// What the caller's volumes belong to.
    pub fn owner(&self) -> &str {
        &self.grants.owner
    }

    /// What renders of the caller are held to.
    pub fn claim(&self) -> Claim {
        Claim { owner: self.grants.owner.clone(), limits: self.grants.limits }
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What it is granted.
    pub fn grants(&self) -> &Grants {
        &self.grants
    }

    /// `Kind::PermissionDenied` (`POOL_NOT_ALLOWED`, `ROLE_TOO_LOW`) unless the caller has at least `role` in the pool. `field` is where the pool stands in
    /// the request. Whether there is such a pool is not told.
    pub fn check_pool(&self, pool: &PoolName, role: Role, field: &str) -> Result<()> {
        let denied = |why: String, reason| {
            Err(Error::new(Kind::PermissionDenied, Stage::Request, pool.as_str(), why).with_reason(reason).with_violation(field, "is not allowed"))
        };
        match self.grants.role_in(pool) {
            Some(has) if has >= role => Ok(()),
            Some(has) => denied(format!("{} has the role {has} in this pool, {role} is needed", self.identity), "ROLE_TOO_LOW"),
            None => denied(format!("{} may not use this pool", self.identity), "POOL_NOT_ALLOWED"),
        }
    }

    /// Whether the caller sees what lies in a pool. What has none is seen by everybody.
    pub fn sees(&self, pool: Option<&str>) -> bool {
        let Some(pool) = pool else { return true };
        // A pool that is no longer a name a pool can have is nobody's but who sees all.
        pool.parse().map_or(self.grants.everywhere.is_some(), |pool| self.grants.role_in(&pool).is_some())
    }

    /// The pools to look into; none for all.
    pub fn pools(&self) -> Option<Vec<&str>> {
        self.grants.everywhere.is_none().then(|| self.grants.pools.keys().map(PoolName::as_str).collect())
    }

    /// Whether the caller gets the machine forms of a platform.
    pub fn may_use_platform(&self, platform: &str) -> bool {
        fits(self.grants.platforms.as_deref(), platform)
    }

    /// `Kind::PermissionDenied` (`IMAGE_HOST_NOT_ALLOWED`) unless the caller's root filesystems may come from this URL. What is no URL passes: it is refused
    /// as that.
    pub fn check_image_url(&self, url: &str) -> Result<()> {
        let Some(patterns) = self.grants.image_hosts.as_deref() else { return Ok(()) };
        let Ok(url) = reqwest::Url::parse(url) else { return Ok(()) };
        let host = url.host_str().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
        if fits(Some(patterns), &host) {
            return Ok(());
        }
        let why = format!("{} may not take root filesystems from there", self.identity);
        Err(Error::new(Kind::PermissionDenied, Stage::Request, host, why)
            .with_reason("IMAGE_HOST_NOT_ALLOWED")
            .with_violation("rootfs_url", "is not allowed"))
    }
}

fn fits(patterns: Option<&[String]>, name: &str) -> bool {
    patterns.is_none_or(|patterns| patterns.iter().any(|pattern| glob_matches(pattern.as_bytes(), name.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(grants: Grants) -> Caller {
        Caller::new(Arc::new(Identity::of_process(7, 7, None, false)), Arc::new(grants))
    }

    fn of_pool_a() -> Grants {
        Grants {
            owner: "uid:7".into(),
            everywhere: None,
            pools: [("a".parse().expect("valid"), Role::Read)].into(),
            platforms: Some(vec!["m1.*".into()]),
            image_hosts: Some(vec!["*.example.com".into()]),
            limits: Default::default(),
        }
    }

    #[test]
    fn a_request_that_nobody_checked_has_no_caller() {
        assert_eq!(Caller::of(&Request::new(())).expect_err("denied").code(), tonic::Code::Unauthenticated);
    }

    #[test]
    fn a_pool_is_refused_by_its_name_and_a_role_by_its_own() {
        let caller = caller(of_pool_a());
        let (a, b) = ("a".parse().expect("valid"), "b".parse().expect("valid"));
        assert!(caller.check_pool(&a, Role::Read, "pool").is_ok());
        assert_eq!(caller.check_pool(&a, Role::Render, "pool").expect_err("too low").reason(), "ROLE_TOO_LOW");
        assert_eq!(caller.check_pool(&b, Role::Read, "pool").expect_err("another's").reason(), "POOL_NOT_ALLOWED");
        assert!(caller.sees(None) && caller.sees(Some("a")) && !caller.sees(Some("b")) && !caller.sees(Some("../a")));
        assert_eq!(caller.pools(), Some(vec!["a"]));
    }

    #[test]
    fn patterns_hold_for_platforms_and_for_hosts_of_images() {
        let narrow = caller(of_pool_a());
        assert!(narrow.may_use_platform("m1.small") && !narrow.may_use_platform("m2.small"));
        for (url, allowed) in [
            ("https://images.example.com/x", true),
            ("https://IMAGES.example.com./x", true),
            ("https://example.org/?images.example.com", false),
            ("https://images.example.com@example.org/", false),
            ("file:///images.example.com", false),
            ("no URL", true),
        ] {
            assert_eq!(narrow.check_image_url(url).is_ok(), allowed, "{url}");
        }
        let wide = caller(Grants { platforms: None, image_hosts: None, ..of_pool_a() });
        assert!(wide.may_use_platform("m2.small") && wide.check_image_url("file:///x").is_ok());
    }
}

//! Name resolution that only gives addresses which the policy allows. The connector gets nothing else, so a name that resolves to something
//! else the second time ("DNS rebinding") is checked the second time too.

use std::{net::SocketAddr, sync::Arc};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::policy::UrlPolicy;
use crate::error::{Error, Kind, Stage};

/// See the module.
pub(super) struct GuardedResolver {
    /// Nothing for mirrors: the operator named them, where they are is the operator's business.
    pub(super) policy: Option<Arc<UrlPolicy>>,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = self.policy.clone();
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            let Some(policy) = policy else {
                return Ok(Box::new(found.into_iter()) as Addrs);
            };
            let (allowed, denied): (Vec<SocketAddr>, Vec<SocketAddr>) = found.into_iter().partition(|address| policy.allows_address(address.ip()));
            if allowed.is_empty() && !denied.is_empty() {
                let addresses: Vec<String> = denied.iter().map(|address| address.ip().to_string()).collect();
                let message = format!("the name leads to {}, which is not allowed", addresses.join(", "));
                let error = Error::new(Kind::PermissionDenied, Stage::Fetch, host, message).with_reason("URL_NOT_ALLOWED");
                return Err(error.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

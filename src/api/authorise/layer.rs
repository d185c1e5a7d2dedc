//! What every call passes before a service sees it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tonic::{Code, Status, body::Body, codegen::http};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service};

use crate::{
    api::{
        audit::Audit,
        authorise::{
            Caller, Peer, Rates,
            table::{self, Effect, Rule, Scope},
        },
        status::ERROR_DOMAIN,
    },
    error::{Error, Kind, Stage},
    render::now_secs,
};

/// Puts [`AccessService`] before all services of a server.
#[derive(Clone)]
pub struct AccessLayer {
    rates: Rates,
    audit: Option<Arc<Audit>>,
}

impl AccessLayer {
    /// A layer; those of all listeners are clones of one, so that owners have one rate.
    pub fn new(rates: Rates, audit: Option<Arc<Audit>>) -> AccessLayer {
        AccessLayer { rates, audit }
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = AccessService<S>;

    fn layer(&self, inner: S) -> AccessService<S> {
        AccessService { inner, layer: self.clone() }
    }
}

/// Lets through who may call what is called, with a [`Caller`] among the request's extensions.
#[derive(Clone)]
pub struct AccessService<S> {
    inner: S,
    layer: AccessLayer,
}

impl<S, B> Service<http::Request<B>> for AccessService<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let path = request.uri().path();
        let peer = request.extensions().get::<Peer>();
        let admitted = admit(path, peer).and_then(|(caller, rule)| self.layer.rates.check(caller.grants()).map(|()| (caller, rule)));
        let (caller, rule) = match admitted {
            Ok(admitted) => admitted,
            Err(status) => {
                if let Some(audit) = &self.layer.audit {
                    audit.deny(path, peer.map(|peer| &*peer.identity), &status);
                }
                return Box::pin(async move { Ok(status.into_http()) });
            }
        };
        let audit = self.layer.audit.as_ref().map(Arc::clone);
        let method = path.to_owned();
        request.extensions_mut().insert(caller.clone());
        // The one that was asked whether it is ready is the one that is called.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        Box::pin(async move {
            let Some(audit) = audit else { return inner.call(request).await };
            if rule.effect == Effect::Reads {
                let response = inner.call(request).await?;
                // A service may know better than the table whether it may be looked at.
                if let Some(status) = denied(response.headers()) {
                    audit.deny(&method, Some(caller.identity()), &status);
                }
                return Ok(response);
            }
            let entry = match audit.begin(&method, caller.identity(), caller.owner(), caller.notes()).await {
                Ok(entry) => entry,
                Err(error) => return Ok(Status::from(error).into_http()),
            };
            let response = inner.call(request).await?;
            entry.end(response.headers());
            Ok(response)
        })
    }
}

/// What an answer denies, if it does.
fn denied(headers: &http::HeaderMap) -> Option<Status> {
    // Most answers have no code in their headers, and nothing is parsed for them.
    headers.get("grpc-status")?;
    Status::from_header_map(headers).filter(|status| matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated))
}

/// Decides on a call as far as its method tells.
fn admit(path: &str, peer: Option<&Peer>) -> Result<(Caller, &'static Rule), Status> {
    let peer = peer.ok_or_else(|| unauthenticated("the caller's credentials are not known", "NO_CREDENTIALS"))?;
    if peer.identity.has_expired(now_secs()) {
        return Err(unauthenticated("the client certificate has ended since the connection was made", "CERTIFICATE_EXPIRED"));
    }
    if peer.still_good.as_ref().is_some_and(|still_good| !still_good()) {
        let why = "the client certificate has been revoked, or its authority is no longer one, since the connection was made";
        return Err(unauthenticated(why, "CERTIFICATE_REVOKED"));
    }
    let Some(grants) = &peer.grants else {
        let why = format!("{} may not call cloudletd", peer.identity);
        let error = Error::new(Kind::PermissionDenied, Stage::Request, path, why).with_reason("CALLER_NOT_ALLOWED");
        return Err(error.with_hint("see listen.allow_uids, listen.allow_gids and [[access]] of the configuration").into());
    };
    // Clients of a later protocol see this code for what is not there, and so does whoever calls what the table forgot.
    let rule = table::find(path).ok_or_else(|| Status::unimplemented(format!("there is no method {path}")))?;
    check_role(rule, grants.role_anywhere(), grants.everywhere, path, peer)?;
    Ok((Caller::new(Arc::clone(&peer.identity), Arc::clone(grants)), rule))
}

fn check_role(
    rule: &Rule,
    anywhere: Option<crate::config::Role>,
    everywhere: Option<crate::config::Role>,
    path: &str,
    peer: &Peer,
) -> Result<(), Status> {
    let (has, place) = match rule.scope {
        Scope::Host | Scope::Pool => (anywhere, "a pool"),
        Scope::Everywhere => (everywhere, "all pools"),
    };
    if has >= Some(rule.role) {
        return Ok(());
    }
    let has = has.map_or("none".to_owned(), |role| role.to_string());
    let why = format!("needs the role {} in {place}; {} has {has}", rule.role, peer.identity);
    Err(Error::new(Kind::PermissionDenied, Stage::Request, path, why).with_reason("ROLE_TOO_LOW").into())
}

/// `UNAUTHENTICATED`, which no [`Kind`] stands for: it is only ever said here.
fn unauthenticated(message: &str, reason: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, ERROR_DOMAIN, std::collections::HashMap::<String, String>::new());
    Status::with_error_details(Code::Unauthenticated, message, details)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::authorise::{Grants, Identity},
        config::Role,
    };

    const INFO: &str = "/cloudlet.v1.HostService/GetHostInfo";

    fn peer(everywhere: Option<Role>, pool: Option<Role>) -> Peer {
        let pools = pool.map(|role| ("a".parse().expect("valid"), role)).into_iter().collect();
        let grants = Grants { owner: "x".into(), everywhere, pools, platforms: None, image_hosts: None, limits: Default::default() };
        Peer { identity: Arc::new(Identity::of_process(7, 7, None, false)), grants: Some(Arc::new(grants)), still_good: None }
    }

    fn code(path: &str, peer: Option<&Peer>) -> Code {
        admit(path, peer).map_or_else(|status| status.code(), |_| Code::Ok)
    }

    #[test]
    fn without_peer_grants_role_or_rule_nothing_passes() {
        assert_eq!(code(INFO, None), Code::Unauthenticated);
        let stranger = Peer { grants: None, ..peer(None, None) };
        assert_eq!(code(INFO, Some(&stranger)), Code::PermissionDenied);
        assert_eq!(code("/cloudlet.v1.HostService/Nothing", Some(&stranger)), Code::PermissionDenied, "strangers are not told what there is");
        assert_eq!(code("/cloudlet.v1.HostService/Nothing", Some(&peer(Some(Role::Admin), None))), Code::Unimplemented);
        assert_eq!(code(INFO, Some(&peer(None, None))), Code::PermissionDenied, "no role at all");
        assert_eq!(code(INFO, Some(&peer(None, Some(Role::Read)))), Code::Ok);
    }

    #[test]
    fn what_all_depend_on_takes_the_role_everywhere() {
        let path = "/cloudlet.v1.ImageService/DeleteImage";
        assert_eq!(code(path, Some(&peer(None, Some(Role::Admin)))), Code::PermissionDenied);
        assert_eq!(code(path, Some(&peer(Some(Role::Render), Some(Role::Admin)))), Code::PermissionDenied);
        assert_eq!(code(path, Some(&peer(Some(Role::Admin), None))), Code::Ok);
        assert_eq!(code("/cloudlet.v1.ImageService/CreateImage", Some(&peer(Some(Role::Read), Some(Role::Render)))), Code::Ok);
    }
}

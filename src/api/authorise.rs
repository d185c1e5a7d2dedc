//! Who may call. The unix socket identifies callers by their peer credentials (SO_PEERCRED, unix(7)), TCP by client certificate. Default is deny.

use std::{collections::BTreeSet, ffi::CString};

use nix::unistd::{Uid, User, getgrouplist};

use tonic::{
    Request, Status,
    service::Interceptor,
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};

/// What the sockets let in.
#[derive(Debug, Clone)]
pub struct Authoriser {
    uids: BTreeSet<u32>,
    gids: BTreeSet<u32>,
    own_uid: u32,
    tcp_without_tls: bool,
}

impl Authoriser {
    /// Root, the daemon's own user and the listed users and groups may call on the unix socket. On TCP a verified client certificate is needed, unless the
    /// configuration gave up TLS in so many words.
    pub fn new(uids: BTreeSet<u32>, gids: BTreeSet<u32>, tcp_without_tls: bool) -> Self {
        Authoriser { uids, gids, own_uid: nix::unistd::geteuid().as_raw(), tcp_without_tls }
    }

    fn unix_allowed(&self, uid: u32, gid: u32) -> bool {
        uid == 0 || uid == self.own_uid || self.uids.contains(&uid) || self.gids.contains(&gid) || self.is_member(uid)
    }

    /// Whether the user's further groups, as the host's user database has them, let the caller in; peer credentials hold the primary group only.
    fn is_member(&self, uid: u32) -> bool {
        if self.gids.is_empty() {
            return false;
        }
        let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return false };
        let Ok(name) = CString::new(user.name) else { return false };
        getgrouplist(&name, user.gid).is_ok_and(|groups| groups.iter().any(|group| self.gids.contains(&group.as_raw())))
    }
}

impl Interceptor for Authoriser {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let extensions = request.extensions();
        if let Some(info) = extensions.get::<UdsConnectInfo>() {
            return match info.peer_cred {
                Some(peer) if self.unix_allowed(peer.uid(), peer.gid()) => Ok(request),
                Some(peer) => Err(Status::permission_denied(format!(
                    "user {} (group {}) may not call cloudletd; see listen.allow_uids and listen.allow_gids",
                    peer.uid(),
                    peer.gid()
                ))),
                None => Err(Status::unauthenticated("the caller's credentials are not known")),
            };
        }
        let certified = extensions
            .get::<TlsConnectInfo<TcpConnectInfo>>()
            .and_then(|info| info.peer_certs())
            .is_some_and(|certificates| !certificates.is_empty());
        if certified || (self.tcp_without_tls && extensions.get::<TcpConnectInfo>().is_some()) {
            return Ok(request);
        }
        Err(Status::unauthenticated("a client certificate is needed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_let_in_by_default() {
        let authoriser = Authoriser { uids: [1000].into(), gids: [44].into(), own_uid: 5, tcp_without_tls: false };
        for (uid, gid, allowed) in [(0, 0, true), (5, 9, true), (1000, 1, true), (7, 44, true), (7, 7, false)] {
            assert_eq!(authoriser.unix_allowed(uid, gid), allowed, "{uid}:{gid}");
        }
        assert_eq!(authoriser.clone().call(Request::new(())).expect_err("no credentials").code(), tonic::Code::Unauthenticated);
    }
}

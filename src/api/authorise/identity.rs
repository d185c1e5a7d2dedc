//! Who is at the other end of a connection.

use std::{ffi::CString, fmt, net::SocketAddr};

use nix::unistd::{Uid, User, getgrouplist};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use crate::{
    config::OWNER_LEN_MAX,
    error::{Error, Kind, Result, Stage},
    names::Digest,
};

/// Names of one kind that are taken from a certificate; the rest is left out. Ours have one or two.
const NAMES_MAX: usize = 64;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// A process on this host.
    Unix {
        /// User, as the kernel had it when the process connected.
        uid: u32,
        /// Primary group.
        gid: u32,
        /// Process, when the kernel says; for the audit log only, numbers are used again.
        pid: Option<i32>,
        /// Further groups of the user, as the host's user database has them.
        groups: Vec<u32>,
    },
    /// A client whose certificate was verified.
    Certificate(Box<Certificate>),
    /// Anybody, on TCP without TLS.
    Tcp {
        /// Where from.
        address: Option<SocketAddr>,
    },
}

/// What is known of a verified client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// SHA-256 of the certificate (DER).
    pub fingerprint: Digest,
    /// The whole subject, RFC 4514 style, for people.
    pub subject: String,
    /// Common name of the subject, when it has exactly one.
    pub common_name: Option<String>,
    /// Alternative DNS names.
    pub dns_names: Vec<String>,
    /// Alternative URIs.
    pub uris: Vec<String>,
    /// When it ends, seconds since 1970.
    pub not_after: i64,
    /// Where the client is.
    pub address: Option<SocketAddr>,
}

impl Certificate {
    /// Reads a certificate that TLS has verified already. `Kind::Corrupt` when it can't be read: then nobody knows who calls.
    pub fn of(der: &[u8], address: Option<SocketAddr>) -> Result<Certificate> {
        let unreadable = |why: String| Error::new(Kind::Corrupt, Stage::Request, "client certificate", why).with_reason("BAD_CERTIFICATE");
        let (_, parsed) = X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
        let mut common_names = parsed.subject().iter_common_name();
        let common_name = match (common_names.next(), common_names.next()) {
            (Some(name), None) => name.as_str().ok().filter(|name| is_plain(name)).map(str::to_owned),
            _ => None,
        };
        let alternative = parsed.subject_alternative_name().map_err(|error| unreadable(error.to_string()))?;
        let (mut dns_names, mut uris) = (Vec::new(), Vec::new());
        for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
            let (list, name) = match name {
                GeneralName::DNSName(name) => (&mut dns_names, *name),
                GeneralName::URI(name) => (&mut uris, *name),
                _ => continue,
            };
            if list.len() < NAMES_MAX && is_plain(name) {
                list.push(name.to_owned());
            }
        }
        Ok(Certificate {
            fingerprint: Digest::of(der),
            subject: parsed.subject().to_string().chars().filter(|c| !c.is_control()).take(OWNER_LEN_MAX).collect(),
            common_name,
            dns_names,
            uris,
            not_after: parsed.validity().not_after.timestamp(),
            address,
        })
    }
}

/// Names that patterns and logs take: nothing empty, nothing endless, no control characters and no white space.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.len() + "uri:".len() <= OWNER_LEN_MAX && !name.chars().any(|c| c.is_control() || c.is_whitespace())
}

impl Identity {
    /// A process, with its user's further groups when `with_groups` asks for them. Then it blocks: the user database may be anywhere.
    pub fn of_process(uid: u32, gid: u32, pid: Option<i32>, with_groups: bool) -> Identity {
        Identity::Unix { uid, gid, pid, groups: if with_groups { groups_of(uid) } else { Vec::new() } }
    }

    /// A name that stays the same when the caller connects again, and with a certificate that follows on another: the common name, else the first URI, else
    /// the first DNS name, else the fingerprint.
    pub fn name(&self) -> String {
        match self {
            Identity::Unix { uid, .. } => format!("uid:{uid}"),
            Identity::Certificate(certificate) => {
                let named = [("cn", certificate.common_name.as_ref()), ("uri", certificate.uris.first()), ("dns", certificate.dns_names.first())];
                let name = named.into_iter().find_map(|(kind, name)| name.map(|name| format!("{kind}:{name}")));
                name.unwrap_or_else(|| certificate.fingerprint.to_string())
            }
            Identity::Tcp { .. } => "anybody".to_owned(),
        }
    }

    /// Whether it is one that ended since the connection was made.
    pub fn has_expired(&self, now_secs: i64) -> bool {
        matches!(self, Identity::Certificate(certificate) if certificate.not_after < now_secs)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Unix { uid, gid, .. } => write!(f, "user {uid} (group {gid})"),
            Identity::Certificate(certificate) => write!(f, "certificate {} ({})", certificate.subject, certificate.fingerprint),
            Identity::Tcp { .. } => f.write_str("anybody on TCP"),
        }
    }
}

/// The groups that the host's user database puts a user in; peer credentials hold the primary group only.
fn groups_of(uid: u32) -> Vec<u32> {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return Vec::new() };
    let Ok(name) = CString::new(user.name) else { return Vec::new() };
    getgrouplist(&name, user.gid).map(|groups| groups.iter().map(|group| group.as_raw()).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(change: impl FnOnce(&mut rcgen::CertificateParams)) -> Certificate {
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        let der = params.self_signed(&rcgen::KeyPair::generate().expect("a key")).expect("a certificate");
        Certificate::of(der.der(), None).expect("readable")
    }

    #[test]
    fn a_certificate_is_known_by_its_names_in_order() {
        use rcgen::{DnType, SanType};
        let uri = || SanType::URI("spiffe://example.com/cloud/one".try_into().expect("ASCII"));
        let dns = || SanType::DnsName("one.example.com".try_into().expect("ASCII"));
        let all = certificate(|params| {
            params.distinguished_name.push(DnType::CommonName, "one");
            params.subject_alt_names = vec![dns(), uri()];
        });
        assert_eq!(all.uris, ["spiffe://example.com/cloud/one"]);
        assert_eq!(all.dns_names, ["one.example.com"]);
        assert_eq!(Identity::Certificate(Box::new(all)).name(), "cn:one");
        let without_cn = certificate(|params| params.subject_alt_names = vec![dns(), uri()]);
        assert_eq!(Identity::Certificate(Box::new(without_cn)).name(), "uri:spiffe://example.com/cloud/one");
        let dns_only = certificate(|params| params.subject_alt_names = vec![dns()]);
        assert_eq!(Identity::Certificate(Box::new(dns_only)).name(), "dns:one.example.com");
        let nameless = certificate(|_| ());
        let fingerprint = nameless.fingerprint.to_string();
        assert_eq!(Identity::Certificate(Box::new(nameless)).name(), fingerprint);
    }

    #[test]
    fn names_that_could_be_taken_for_others_in_a_log_are_no_names() {
        use rcgen::DnType;
        for name in ["one\nadmin", "one two", "", &"x".repeat(300)] {
            let certificate = certificate(|params| params.distinguished_name.push(DnType::CommonName, name));
            assert_eq!(certificate.common_name, None, "{name:?}");
            assert!(!certificate.subject.contains('\n'));
        }
        assert_eq!(Certificate::of(b"not a certificate", None).expect_err("garbage").reason(), "BAD_CERTIFICATE");
    }

    #[test]
    fn an_ended_certificate_is_noticed_on_an_open_connection() {
        let certificate = certificate(|params| params.not_after = rcgen::date_time_ymd(2020, 1, 2));
        let end = certificate.not_after;
        let identity = Identity::Certificate(Box::new(certificate));
        assert!(!identity.has_expired(end) && identity.has_expired(end + 1));
        assert!(!Identity::of_process(0, 0, None, false).has_expired(i64::MAX));
    }
}

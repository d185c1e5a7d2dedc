//! What injection did and why, for the caller and for the plan that is shown before anything is written. Never holds a secret.

use serde::Serialize;

use crate::{
    fs::edit::{Edit, EditOp},
    guest::{plan::printable, selinux::XATTR},
    names::Digest,
};

/// The account of one injection.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    /// The host name the guest gets, FQDN if there is one; `None` when the image's own is left.
    pub hostname: Option<String>,
    /// The machine-id, 32 lower-case hexadecimal digits.
    pub machine_id: String,
    /// The network back-end written for, and why this one; `None` when the network was left alone.
    pub network: Option<NetworkReport>,
    /// The SSH host keys that were made.
    pub ssh_host_keys: Vec<HostKeyReport>,
    /// Users that were made or changed.
    pub users: Vec<UserReport>,
    /// Every change in order.
    pub changes: Vec<Change>,
    /// What was left to somebody else, and what to know about the result; nothing to act on.
    pub notes: Vec<String>,
    /// What probably is not as the caller wanted it.
    pub warnings: Vec<String>,
}

/// What the guest's network will be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkReport {
    /// The back-end's name ([`crate::guest::config::BackendKind::name`]), or `template` when the manifest's templates write it.
    pub backend: String,
    /// What in the tree decided for it.
    pub why: String,
    /// Interfaces in the caller's order.
    pub interfaces: Vec<InterfaceReport>,
    /// What happens to /etc/resolv.conf, and why.
    pub resolv_conf: String,
    /// What the kernel has to be started with for the network to come up (`ip=…`), for boot descriptions; empty but for the back-end `kernel-ip`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernel_arguments: Vec<String>,
}

/// One interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InterfaceReport {
    /// Name in the guest.
    pub name: String,
    /// `ethernet`, `bond`, `bridge` or `vlan`.
    pub kind: &'static str,
    /// Hardware address: what a NIC is bound to, what anything else gets.
    pub mac: Option<String>,
    /// Static addresses with their prefix.
    pub addresses: Vec<String>,
    /// Which protocols give it further addresses: `dhcp4`, `dhcp6`, `slaac`.
    pub dynamic: Vec<String>,
}

/// One SSH host key, its public half only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostKeyReport {
    /// Algorithm as OpenSSH writes it, e.g. `ssh-ed25519`.
    pub algorithm: String,
    /// `SHA256:…` as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    /// A line for known_hosts with all names and static addresses of the instance.
    pub known_hosts: String,
    /// The key as a DNS record (RFC 4255) with its SHA-256 fingerprint, in a zone file's syntax; `None` without a host name.
    pub sshfp: Option<String>,
}

/// One user that was made or changed. Never a hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UserReport {
    /// Login name.
    pub name: String,
    /// Numeric id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Home.
    pub home: String,
    /// Login shell.
    pub shell: String,
    /// Whether the image did not have the user.
    pub created: bool,
    /// `hash` (one was given), `locked` or `kept`.
    pub password: &'static str,
    /// `no`, `password` or `nopasswd`.
    pub sudo: &'static str,
}

/// One change of the guest's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The path.
    pub path: String,
    /// `write`, `remove`, `mkdir`, `symlink`, …
    pub verb: &'static str,
    /// Why.
    pub why: String,
    /// Permission bits, four octal digits, when the change sets them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// `uid:gid`, when the change sets them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// SELinux label, when the change sets one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Digest of the content, or `redacted` when the content is secret (a digest of a short secret gives it away).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

impl Change {
    /// The account of one edit.
    pub fn of(edit: &Edit) -> Self {
        let attrs = match &edit.op {
            EditOp::WriteFile { attrs, .. } | EditOp::MakeDir { attrs } => Some((attrs.mode, attrs.uid, attrs.gid)),
            _ => None,
        };
        let is_label = |name: &[u8]| name == XATTR.as_bytes();
        let label = match &edit.op {
            EditOp::WriteFile { attrs, .. } | EditOp::MakeDir { attrs } | EditOp::Symlink { attrs, .. } => {
                attrs.xattrs.iter().find(|xattr| is_label(&xattr.name)).map(|xattr| &xattr.value)
            }
            EditOp::SetXattr { name, value } if is_label(name) => value.as_ref(),
            _ => None,
        };
        let content = match &edit.op {
            EditOp::WriteFile { .. } | EditOp::AppendFile { .. } if edit.secret => Some("redacted".to_owned()),
            EditOp::WriteFile { content, .. } | EditOp::AppendFile { content } => Some(Digest::of(content).to_string()),
            EditOp::Symlink { target, .. } => Some(format!("-> {}", printable(&String::from_utf8_lossy(target)))),
            _ => None,
        };
        Change {
            path: printable(&edit.path.display()),
            verb: edit.op.verb(),
            why: edit.why.clone(),
            mode: attrs.map(|(mode, ..)| format!("{mode:04o}")),
            owner: attrs.map(|(_, uid, gid)| format!("{uid}:{gid}")),
            label: label.map(|value| printable(String::from_utf8_lossy(value).trim_end_matches('\0'))),
            content,
        }
    }
}

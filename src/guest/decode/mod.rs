//! JSON to [`InstanceConfig`].
//!
//! Two documents are understood. Ours:
//!
//! ```json
//! {
//!   "instance": "web1",
//!   "hostname": "web1.example.com",
//!   "args": {"title": "hello"},
//!   "network": {
//!     "interfaces": [{
//!       "name": "eth0", "mac": "52:54:00:12:34:56", "addresses": ["192.0.2.10/24", "2001:db8::10/64"],
//!       "gateway4": "192.0.2.1", "gateway6": "fe80::1", "metric": 100, "mtu": 1500,
//!       "routes": [{"to": "10.0.0.0/8", "via": "192.0.2.254", "metric": 5, "on_link": false}],
//!       "dhcp4": false, "dhcp6": false, "accept_ra": false, "nameservers": [], "search": []
//!     }, {
//!       "name": "bond0", "dhcp4": true,
//!       "bond": {"members": ["eth1", "eth2"], "mode": "active-backup", "primary": "eth1", "miimon_ms": 100}
//!     }, {
//!       "name": "bond0.5", "vlan": {"id": 5, "link": "bond0"}
//!     }],
//!     "nameservers": ["192.0.2.53"], "search": ["example.com"], "backend": "netplan"
//!   },
//!   "authorized_keys": {"root": ["ssh-ed25519 AAAA… me"]},
//!   "root_password_hash": "$6$…", "machine_id": "…", "ssh_host_keys": "fresh",
//!   "files": [{"path": "/etc/motd", "content": "hi\n", "mode": "0644", "uid": 0, "gid": 0}],
//!   "users": [{"name": "ada", "uid": 1000, "full_name": "Ada L", "home": "/home/ada", "shell": "/bin/bash", "groups": ["adm"], "sudo": "nopasswd",
//!              "password_hash": "$6$…"}, {"name": "bob", "lock_password": true}],
//!   "root_login": "keys-only", "ssh_host_key_types": ["ed25519", "ecdsa"],
//!   "timezone": "Europe/Berlin", "locale": "de_DE.UTF-8", "keymap": "de", "hardware_clock": "utc",
//!   "units": [{"name": "nginx.service", "state": "enabled"}, {"name": "apt-daily.timer", "state": "masked"}],
//!   "first_boot_script": "#!/bin/sh\n…", "cloud_init": {"user_data": "#cloud-config\n…", "vendor_data": "…", "meta_data": {}},
//!   "selinux": "auto",
//!   "scrub_skip": ["dhcp"], "scrub_also": ["logs", "shell-history"]
//! }
//! ```
//!
//! Instead of `interfaces`, `nameservers` and `search`, `network` may have a `document`: netplan's or cloud-init's own ([`document`]).
//!
//! Every field is optional (`instance` too, when the caller names the instance otherwise); a field that is not known is an error with its path.
//! `content_base64` stands for `content` where it is not text; a file may have `user` and `group` by name, and `xattrs` by name, in base64. And the form of 2010 (`legacy`), recognised by its `ip` or `dns`.

mod cursor;
pub(crate) mod document;
mod legacy;
mod network;
mod setup;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Map, Value};

use self::cursor::{Cursor, Fields};
pub use self::{
    document::{DOCUMENT_LEN_MAX as NETWORK_DOCUMENT_LEN_MAX, from_text as network_document},
    network::parse_cidr,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        config::{AuthorizedKeys, HostKeys, InjectedFile, InstanceConfig, Secret},
        validate::validate,
    },
    names::InstanceName,
};

/// A document is at most this long, bytes: all files of a request in base64, and room for the rest.
pub const DOCUMENT_LEN_MAX: usize = 24 << 20;

/// A decoded configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Valid as [`validate`] sees it.
    pub config: InstanceConfig,
    /// What the document said that has no meaning here (fields of the 2010 form only; ours refuses them).
    pub notes: Vec<String>,
}

/// Decodes and validates a document. `instance` is the name that the caller knows the instance by; it must agree with the document's own.
/// `Kind::InvalidRequest` with the dotted path of the field.
pub fn from_json(text: &[u8], instance: Option<&InstanceName>) -> Result<Decoded> {
    if text.len() > DOCUMENT_LEN_MAX {
        let message = format!("the instance configuration has {} bytes, the limit is {DOCUMENT_LEN_MAX}", text.len());
        return Err(Error::new(Kind::InvalidRequest, Stage::Request, "config", message));
    }
    let value: Value = serde_json::from_slice(text).map_err(|error| {
        // The message of serde_json names line and column, never content: secrets stay out of it.
        Error::new(Kind::InvalidRequest, Stage::Request, "config", format!("is not JSON at line {}, column {}", error.line(), error.column()))
    })?;
    from_value(&value, instance)
}

/// As [`from_json`], for a document that is parsed already.
pub fn from_value(value: &Value, instance: Option<&InstanceName>) -> Result<Decoded> {
    let root = Cursor::root(value);
    let is_legacy = value.as_object().is_some_and(|fields| fields.contains_key("ip") || fields.contains_key("dns"));
    let decoded = if is_legacy { legacy::decode(root, instance)? } else { Decoded { config: ours(root, instance)?, notes: Vec::new() } };
    validate(&decoded.config)?;
    Ok(decoded)
}

/// The name of the instance: the caller's, the document's, or both when they are the same.
fn instance_name(given: Option<InstanceName>, caller: Option<&InstanceName>) -> Result<InstanceName> {
    match (given, caller) {
        (Some(given), Some(caller)) if given != *caller => {
            Err(Error::field(Stage::Request, "instance", format!("is {given}, but the instance is called {caller} outside of the document")))
        }
        (Some(given), _) => Ok(given),
        (None, Some(caller)) => Ok(caller.clone()),
        (None, None) => Err(Error::field(Stage::Request, "instance", "is missing, and no name is given outside of the document")),
    }
}

fn ours(root: Cursor<'_>, instance: Option<&InstanceName>) -> Result<InstanceConfig> {
    let mut fields = root.fields()?;
    let config = InstanceConfig {
        instance: instance_name(fields.optional("instance", Cursor::parse)?, instance)?,
        hostname: fields.optional("hostname", Cursor::parse)?,
        args: fields.optional("args", Cursor::map)?.unwrap_or_default(),
        network: fields.optional("network", network::network)?,
        authorized_keys: fields.optional("authorized_keys", authorized_keys)?.unwrap_or_default(),
        root_password_hash: fields.optional("root_password_hash", |cursor| Ok(Secret::new(cursor.text()?)))?,
        machine_id: fields.optional("machine_id", |cursor| Ok(cursor.text()?.to_owned()))?,
        ssh_host_keys: fields.optional("ssh_host_keys", host_keys)?.unwrap_or_default(),
        files: fields.optional("files", |cursor| cursor.list(file))?.unwrap_or_default(),
        setup: setup::setup(&mut fields)?,
    };
    fields.finish()?;
    Ok(config)
}

fn host_keys(cursor: Cursor<'_>) -> Result<HostKeys> {
    match cursor.text()? {
        "fresh" => Ok(HostKeys::Fresh),
        "remove" => Ok(HostKeys::Remove),
        "keep" => Ok(HostKeys::Keep),
        _ => Err(cursor.error("must be fresh, remove or keep")),
    }
}

/// `{"user": [keys]}`, or a list of `{"user": …, "keys": […]}`.
fn authorized_keys(cursor: Cursor<'_>) -> Result<Vec<AuthorizedKeys>> {
    let keys = |cursor: Cursor<'_>| cursor.list(|line| Ok(line.text()?.trim_end_matches('\n').to_owned()));
    if cursor.is_list() {
        return cursor.list(|entry| {
            let mut fields = entry.fields()?;
            let user = fields.required("user", |cursor| Ok(cursor.text()?.to_owned()))?;
            let keys = fields.required("keys", keys)?;
            fields.finish()?;
            Ok(AuthorizedKeys { user, keys })
        });
    }
    cursor.fields()?.each(|user, cursor| Ok(AuthorizedKeys { user: user.to_owned(), keys: keys(cursor)? }))
}

fn file(cursor: Cursor<'_>) -> Result<InjectedFile> {
    let mut fields = cursor.fields()?;
    let path = fields.required("path", Cursor::parse)?;
    let text = fields.optional("content", |cursor| Ok(cursor.text()?.as_bytes().to_vec()))?;
    let base64 = fields.optional("content_base64", |cursor| BASE64.decode(cursor.text()?).map_err(|_| cursor.error("is not base64")))?;
    let content = match (text, base64) {
        (Some(content), None) | (None, Some(content)) => content,
        (Some(_), Some(_)) => return Err(cursor.error("has content and content_base64, give one of them")),
        (None, None) => return Err(cursor.error("has neither content nor content_base64")),
    };
    let mode = fields.optional("mode", mode)?.unwrap_or(0o644);
    let uid = fields.optional("uid", Cursor::number)?.unwrap_or_default();
    let gid = fields.optional("gid", Cursor::number)?.unwrap_or_default();
    let user = fields.optional("user", |cursor| Ok(cursor.text()?.to_owned()))?;
    let group = fields.optional("group", |cursor| Ok(cursor.text()?.to_owned()))?;
    let xattrs = fields.optional("xattrs", setup::xattrs)?.unwrap_or_default();
    fields.finish()?;
    Ok(InjectedFile { path, content: Secret::new(content), mode, uid, gid, user, group, xattrs })
}

/// A string of octal digits: JSON has no octal numbers, and 644 would be another mode.
fn mode(cursor: Cursor<'_>) -> Result<u16> {
    let text = cursor.text()?;
    let octal = (3..=5).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    match u16::from_str_radix(text, 8) {
        Ok(mode) if octal && mode <= 0o7777 => Ok(mode),
        _ => Err(cursor.error("must be a string of octal digits such as \"0644\"")),
    }
}

/// The map type of `args`.
type Args = Map<String, Value>;

#[cfg(test)]
mod tests;

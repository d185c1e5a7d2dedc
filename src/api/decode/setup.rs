//! The part of an instance's configuration that becomes a [`GuestSetup`].

use std::collections::HashMap;

use prost::Message;
use serde_json::{Value, json};

use super::{list, optional, parsed};
use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::Secret,
        setup::{CloudInitSeed, GuestSetup, Password, UnitSetup, UserSetup},
    },
    names::GuestPath,
    proto,
    tree::Xattr,
};

/// Decodes it; `field` is where the configuration stands in the request.
pub(super) fn setup(field: &str, message: &proto::InstanceConfig) -> Result<GuestSetup> {
    let at = |rest: &str| format!("{field}.{rest}");
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Ok(GuestSetup {
        users: list(&at("users"), &message.users, user)?,
        root_login: optional(&at("root_login"), &message.root_login)?.unwrap_or_default(),
        ssh_host_key_types: list(&at("ssh_host_key_types"), &message.ssh_host_key_types, |field, text| parsed(field, text))?,
        timezone: text(&message.timezone),
        locale: text(&message.locale),
        keymap: text(&message.keymap),
        hardware_clock: optional(&at("hardware_clock"), &message.hardware_clock)?,
        scrub_skip: list(&at("scrub_skip"), &message.scrub_skip, |field, text| parsed(field, text))?,
        scrub_also: list(&at("scrub_also"), &message.scrub_also, |field, text| parsed(field, text))?,
        units: list(&at("units"), &message.units, |field, unit| {
            Ok(UnitSetup { name: unit.name.clone(), state: parsed(&format!("{field}.state"), &unit.state)? })
        })?,
        first_boot_script: (!message.first_boot_script.is_empty()).then(|| Secret::new(message.first_boot_script.clone())),
        selinux: optional(&at("selinux"), &message.selinux)?.unwrap_or_default(),
        cloud_init: message.cloud_init.as_ref().map(|seed| CloudInitSeed {
            user_data: Secret::new(seed.user_data.clone()),
            vendor_data: (!seed.vendor_data.is_empty()).then(|| Secret::new(seed.vendor_data.clone())),
            meta_data: seed.meta_data.as_ref().map(super::struct_of).unwrap_or_default(),
        }),
    })
}

/// Extended attributes of a file, in the order of their names.
pub(super) fn xattrs(message: &HashMap<String, Vec<u8>>) -> Vec<Xattr> {
    let mut xattrs: Vec<Xattr> = message.iter().map(|(name, value)| Xattr { name: name.as_bytes().to_vec(), value: value.clone() }).collect();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    xattrs
}

/// What of it is compared between two requests: one digest per field, as any of them may hold a secret.
pub(super) fn canonical(message: &proto::InstanceConfig, hidden: &dyn Fn(&[u8]) -> Value) -> Value {
    let digest = |part: proto::InstanceConfig| hidden(&part.encode_to_vec());
    json!({
        "users": digest(proto::InstanceConfig { users: message.users.clone(), ..Default::default() }),
        "root_login": message.root_login,
        "ssh_host_key_types": message.ssh_host_key_types,
        "timezone": message.timezone,
        "locale": message.locale,
        "keymap": message.keymap,
        "hardware_clock": message.hardware_clock,
        "scrub_skip": message.scrub_skip,
        "scrub_also": message.scrub_also,
        "units": message.units.iter().map(|unit| format!("{} {}", unit.name, unit.state)).collect::<Vec<_>>(),
        "selinux": message.selinux,
        "first_boot_script": hidden(&message.first_boot_script),
        // A map has no order: the JSON of a Struct does.
        "cloud_init": message.cloud_init.as_ref().map(|seed| json!([
            hidden(&seed.user_data),
            hidden(&seed.vendor_data),
            hidden(Value::Object(seed.meta_data.as_ref().map(super::struct_of).unwrap_or_default()).to_string().as_bytes()),
        ])),
    })
}

fn user(field: &str, message: &proto::UserSetup) -> Result<UserSetup> {
    let at = |rest: &str| format!("{field}.{rest}");
    let path = |name: &str, text: &str| -> Result<Option<GuestPath>> { if text.is_empty() { Ok(None) } else { parsed(&at(name), text).map(Some) } };
    let password = match (message.password_hash.as_str(), message.lock_password) {
        ("", false) => Password::Keep,
        ("", true) => Password::Locked,
        (hash, false) => Password::Hash(Secret::new(hash)),
        (_, true) => return Err(Error::field(Stage::Request, at("lock_password"), "is exclusive with password_hash")),
    };
    Ok(UserSetup {
        name: message.name.clone(),
        uid: message.uid,
        full_name: (!message.full_name.is_empty()).then(|| message.full_name.clone()),
        home: path("home", &message.home)?,
        shell: path("shell", &message.shell)?,
        groups: message.groups.clone(),
        sudo: optional(&at("sudo"), &message.sudo)?.unwrap_or_default(),
        password,
    })
}

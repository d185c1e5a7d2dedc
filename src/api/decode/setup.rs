//! The part of an instance's configuration that becomes a [`GuestSetup`].

use prost::Message;
use serde_json::{Value, json};

use super::{list, optional, parsed};
use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::Secret,
        setup::{GuestSetup, Password, UserSetup},
    },
    names::GuestPath,
    proto,
};

/// Decodes it; `field` is where the configuration stands in the request.
pub(super) fn setup(field: &str, message: &proto::InstanceConfig) -> Result<GuestSetup> {
    let at = |rest: &str| format!("{field}.{rest}");
    Ok(GuestSetup {
        users: list(&at("users"), &message.users, user)?,
        root_login: optional(&at("root_login"), &message.root_login)?.unwrap_or_default(),
    })
}

/// What of it is compared between two requests: one digest per field, as any of them may hold a secret.
pub(super) fn canonical(message: &proto::InstanceConfig, hidden: &dyn Fn(&[u8]) -> Value) -> Value {
    let digest = |part: proto::InstanceConfig| hidden(&part.encode_to_vec());
    json!({
        "users": digest(proto::InstanceConfig { users: message.users.clone(), ..Default::default() }),
        "root_login": message.root_login,
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

//! The part of a document that becomes a [`GuestSetup`].

use std::{fmt::Display, str::FromStr};

use super::cursor::{Cursor, Fields};
use crate::{
    error::Result,
    guest::{
        config::Secret,
        setup::{GuestSetup, Password, UserSetup},
    },
};

/// Takes the fields of a setup out of the document's own.
pub(super) fn setup(fields: &mut Fields<'_>) -> Result<GuestSetup> {
    Ok(GuestSetup {
        users: fields.optional("users", |cursor| cursor.list(user))?.unwrap_or_default(),
        root_login: fields.optional("root_login", Cursor::parse)?.unwrap_or_default(),
        ssh_host_key_types: parsed_list(fields, "ssh_host_key_types")?,
        timezone: text(fields, "timezone")?,
        locale: text(fields, "locale")?,
        keymap: text(fields, "keymap")?,
        hardware_clock: fields.optional("hardware_clock", Cursor::parse)?,
        scrub_skip: parsed_list(fields, "scrub_skip")?,
        scrub_also: parsed_list(fields, "scrub_also")?,
    })
}

fn text(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<String>> {
    fields.optional(name, |cursor| Ok(cursor.text()?.to_owned()))
}

fn parsed_list<T: FromStr<Err: Display>>(fields: &mut Fields<'_>, name: &'static str) -> Result<Vec<T>> {
    Ok(fields.optional(name, |cursor| cursor.list(Cursor::parse))?.unwrap_or_default())
}

fn user(cursor: Cursor<'_>) -> Result<UserSetup> {
    let mut fields = cursor.fields()?;
    let hash = fields.optional("password_hash", |cursor| Ok(Secret::new(cursor.text()?)))?;
    let locked = fields.optional("lock_password", Cursor::boolean)?.unwrap_or_default();
    let password = match (hash, locked) {
        (Some(_), true) => return Err(cursor.error("has password_hash and lock_password, give one of them")),
        (Some(hash), false) => Password::Hash(hash),
        (None, true) => Password::Locked,
        (None, false) => Password::Keep,
    };
    let user = UserSetup {
        name: fields.required("name", |cursor| Ok(cursor.text()?.to_owned()))?,
        uid: fields.optional("uid", Cursor::number)?,
        full_name: fields.optional("full_name", |cursor| Ok(cursor.text()?.to_owned()))?,
        home: fields.optional("home", Cursor::parse)?,
        shell: fields.optional("shell", Cursor::parse)?,
        groups: fields.optional("groups", |cursor| cursor.list(|group| Ok(group.text()?.to_owned())))?.unwrap_or_default(),
        sudo: fields.optional("sudo", Cursor::parse)?.unwrap_or_default(),
        password,
    };
    fields.finish()?;
    Ok(user)
}

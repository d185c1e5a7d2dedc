//! The part of a document that becomes a [`GuestSetup`].

use std::{fmt::Display, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use super::cursor::{Cursor, Fields};
use crate::{
    error::Result,
    guest::{
        config::Secret,
        setup::{CloudInitSeed, GuestSetup, Password, UnitSetup, UserSetup},
    },
    tree::Xattr,
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
        units: fields.optional("units", |cursor| cursor.list(unit))?.unwrap_or_default(),
        first_boot_script: fields.optional("first_boot_script", |cursor| Ok(Secret::new(cursor.text()?)))?,
        cloud_init: fields.optional("cloud_init", cloud_init)?,
        selinux: fields.optional("selinux", Cursor::parse)?.unwrap_or_default(),
    })
}

fn unit(cursor: Cursor<'_>) -> Result<UnitSetup> {
    let mut fields = cursor.fields()?;
    let unit = UnitSetup { name: fields.required("name", |cursor| Ok(cursor.text()?.to_owned()))?, state: fields.required("state", Cursor::parse)? };
    fields.finish()?;
    Ok(unit)
}

fn cloud_init(cursor: Cursor<'_>) -> Result<CloudInitSeed> {
    let mut fields = cursor.fields()?;
    let seed = CloudInitSeed {
        user_data: fields.required("user_data", |cursor| Ok(Secret::new(cursor.text()?)))?,
        vendor_data: fields.optional("vendor_data", |cursor| Ok(Secret::new(cursor.text()?)))?,
        meta_data: fields.optional("meta_data", Cursor::map)?.unwrap_or_default(),
    };
    fields.finish()?;
    Ok(seed)
}

/// `{"user.name": "base64"}`; a JSON object's members are sorted by name already.
pub(super) fn xattrs(cursor: Cursor<'_>) -> Result<Vec<Xattr>> {
    let mut xattrs = cursor.fields()?.each(|name, cursor| {
        let value = BASE64.decode(cursor.text()?).map_err(|_| cursor.error("is not base64"))?;
        Ok(Xattr { name: name.as_bytes().to_vec(), value })
    })?;
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(xattrs)
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

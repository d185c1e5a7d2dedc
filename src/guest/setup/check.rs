//! Checks of a [`super::GuestSetup`] that need no image. Every value here ends up in a file with a syntax of its own: what could end a field, a
//! line or a word there is refused.

use serde_json::Value;

use super::{GuestSetup, Password, RootLogin, Sudo, UserSetup};
use crate::guest::{
    accounts::check_crypt_hash,
    config::{InjectedFile, InstanceConfig},
    validate::{USERS_MAX, check_user},
};

/// Groups of one user.
const GROUPS_MAX: usize = 64;
/// Units of one request.
const UNITS_MAX: usize = 256;
/// Bytes of a first-boot script, and of each part of a cloud-init seed.
const SCRIPT_LEN_MAX: usize = 1 << 20;
/// Bytes of one file's extended attributes: what ext4 has room for in a block of 4 KiB, and some.
const XATTRS_LEN_MAX: usize = 3 << 10;
/// Bytes of a name in a comment field.
const FULL_NAME_MAX: usize = 256;

/// Tells `add` every violation: field and description.
pub(crate) fn check(config: &InstanceConfig, add: &mut dyn FnMut(String, String)) {
    let setup = &config.setup;
    if setup.users.len() > USERS_MAX {
        add("users".into(), format!("has {} entries, the limit is {USERS_MAX}", setup.users.len()));
    }
    for (index, user) in setup.users.iter().enumerate() {
        let field = format!("users[{index}]");
        if setup.users[..index].iter().any(|earlier| earlier.name == user.name) {
            add(format!("{field}.name"), format!("{:?} is given twice", user.name));
        }
        if user.name == "root" && user.password != Password::Keep && config.root_password_hash.is_some() {
            add(format!("{field}.password_hash"), "root's password is given in root_password_hash too".into());
        }
        check_account(&field, user, add);
    }
    for (field, value, more) in [("timezone", &setup.timezone, "_/+-"), ("locale", &setup.locale, "_.@-"), ("keymap", &setup.keymap, "_.-")] {
        let Some(value) = value else { continue };
        if let Err(why) = check_word(value, more) {
            add(field.into(), why);
        }
    }
    for (field, list) in [("scrub_skip", &setup.scrub_skip), ("scrub_also", &setup.scrub_also)] {
        let wanted = field == "scrub_skip";
        for (index, operation) in list.iter().enumerate().filter(|(_, operation)| operation.is_default() != wanted) {
            let why = if wanted { "is not done unless it is in scrub_also" } else { "is done unless it is in scrub_skip" };
            add(format!("{field}[{index}]"), format!("{} {why}", operation.word()));
        }
    }
    check_units(setup, add);
    if setup.root_login == RootLogin::No {
        if config.root_password_hash.is_some() {
            add("root_password_hash".into(), "is of no use: root_login is \"no\"".into());
        }
        if config.authorized_keys.iter().any(|keys| keys.user == "root" && !keys.keys.is_empty()) {
            add("authorized_keys.root".into(), "are of no use: root_login is \"no\"".into());
        }
    }
}

fn check_units(setup: &GuestSetup, add: &mut dyn FnMut(String, String)) {
    if setup.units.len() > UNITS_MAX {
        add("units".into(), format!("has {} entries, the limit is {UNITS_MAX}", setup.units.len()));
    }
    for (index, unit) in setup.units.iter().enumerate() {
        if let Err(why) = check_unit_name(&unit.name) {
            add(format!("units[{index}].name"), why);
        }
        if setup.units[..index].iter().any(|earlier| earlier.name == unit.name) {
            add(format!("units[{index}].name"), format!("{:?} is given twice", unit.name));
        }
    }
    if let Some(script) = &setup.first_boot_script {
        let bytes = script.expose();
        if bytes.len() > SCRIPT_LEN_MAX || !bytes.starts_with(b"#!") || bytes.contains(&0) {
            add("first_boot_script".into(), format!("must begin with #!, have no NUL and at most {SCRIPT_LEN_MAX} bytes ({} given)", bytes.len()));
        }
    }
    if let Some(seed) = &setup.cloud_init {
        let meta = Value::Object(seed.meta_data.clone()).to_string().len();
        for (name, len) in [
            ("user_data", seed.user_data.expose().len()),
            ("vendor_data", seed.vendor_data.as_ref().map_or(0, |data| data.expose().len())),
            ("meta_data", meta),
        ] {
            if len > SCRIPT_LEN_MAX {
                add(format!("cloud_init.{name}"), format!("has {len} bytes, the limit is {SCRIPT_LEN_MAX}"));
            }
        }
    }
}

/// A unit's name as systemd takes it (systemd.unit(5), DESCRIPTION), of the kinds that can be enabled.
pub(crate) fn check_unit_name(name: &str) -> Result<(), String> {
    const SUFFIXES: [&str; 9] = ["service", "socket", "target", "timer", "path", "mount", "automount", "swap", "slice"];
    let right = name.rsplit_once('.').is_some_and(|(stem, suffix)| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
        !stem.is_empty() && !stem.starts_with(['.', '@']) && stem.chars().all(allowed) && SUFFIXES.contains(&suffix)
    });
    if right && name.len() <= 255 {
        return Ok(());
    }
    Err(format!("{:?} is not the name of a unit, such as nginx.service", name.chars().take(64).collect::<String>()))
}

/// Owner and attributes of a file of the request.
pub(crate) fn check_file(file: &InjectedFile, add: &mut dyn FnMut(&str, String)) {
    for (name, value, number) in [("user", &file.user, file.uid), ("group", &file.group, file.gid)] {
        if let Some(value) = value {
            if let Err(why) = check_user(value) {
                add(name, why);
            }
            if number != 0 {
                add(name, "is given by name and by number".into());
            }
        }
    }
    let total: usize = file.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    if total > XATTRS_LEN_MAX {
        add("xattrs", format!("have {total} bytes, the limit is {XATTRS_LEN_MAX}"));
    }
    for xattr in &file.xattrs {
        let name = String::from_utf8_lossy(&xattr.name);
        let rest = ["user.", "trusted.", "security."].iter().find_map(|prefix| name.strip_prefix(prefix));
        if name.len() > 255 || name.chars().any(char::is_control) || rest.is_none_or(str::is_empty) {
            add("xattrs", format!("{:?} is not a name in user., trusted. or security.", name.chars().take(64).collect::<String>()));
        }
    }
}

/// A word that needs no quotes in any file it goes to, and leads nowhere as part of a path.
fn check_word(text: &str, more: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
    let parts_are_names = text.split('/').all(|part| part.starts_with(|c: char| c.is_ascii_alphanumeric()));
    if text.len() <= 64 && text.chars().all(allowed) && parts_are_names {
        return Ok(());
    }
    let shown: String = text.chars().take(64).collect();
    Err(format!("{shown:?} must have 1 to 64 letters, digits or any of {more:?}, and begin with a letter or digit"))
}

fn check_account(field: &str, user: &UserSetup, add: &mut dyn FnMut(String, String)) {
    if let Err(why) = check_new_user(&user.name) {
        add(format!("{field}.name"), why);
    }
    // -1 means "no change" to chown(2), and 65534 is the overflow id.
    if user.uid.is_some_and(|uid| matches!(uid, u32::MAX | 65_534 | 65_535) || (uid == 0) != (user.name == "root")) {
        add(format!("{field}.uid"), "must not be 0 (root's), 65534, 65535 or 4294967295".into());
    }
    if let Some(name) = &user.full_name
        && (name.len() > FULL_NAME_MAX || name.contains([':', ',', '\\']) || name.chars().any(char::is_control))
    {
        add(format!("{field}.full_name"), format!("must have at most {FULL_NAME_MAX} bytes, without ':', ',', '\\' and control characters"));
    }
    for (name, path) in [("home", &user.home), ("shell", &user.shell)] {
        let Some(path) = path else { continue };
        let text = path.display();
        if path.is_root()
            || text.len() > 255
            || text.chars().any(|c| c.is_control() || c.is_whitespace() || c == ':' || c == char::REPLACEMENT_CHARACTER)
        {
            add(format!("{field}.{name}"), "must be a path of at most 255 bytes without ':', white space and control characters".into());
        }
    }
    if user.groups.len() > GROUPS_MAX {
        add(format!("{field}.groups"), format!("has {} entries, the limit is {GROUPS_MAX}", user.groups.len()));
    }
    for (index, group) in user.groups.iter().enumerate() {
        if let Err(why) = check_user(group) {
            add(format!("{field}.groups[{index}]"), why.replace("user name", "group name"));
        }
    }
    if let Password::Hash(hash) = &user.password {
        let text = std::str::from_utf8(hash.expose()).map_err(|_| "is not text".to_owned());
        if let Err(why) = text.and_then(check_crypt_hash) {
            add(format!("{field}.password_hash"), why);
        }
    }
    if user.sudo != Sudo::No && (user.name.contains('$') || user.name == "ALL" || user.name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')) {
        add(format!("{field}.sudo"), "the name would be an alias in sudoers(5): it has no lower-case letter, or a '$'".into());
    }
}

/// A name that useradd(8) would make: a letter or `_` first, and no `$`. Names with digits only are taken for ids by many tools.
fn check_new_user(name: &str) -> Result<(), String> {
    check_user(name)?;
    if name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && !name.contains('$') && !name.ends_with('.') {
        return Ok(());
    }
    Err(format!("{name:?} is not a name for a user: the first character must be a letter or '_', and '$' is not taken"))
}

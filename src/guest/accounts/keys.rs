//! Authorized keys.

use super::database::Database;
use crate::{
    error::{Error, Result, Stage},
    fs::edit::Attrs,
    guest::{
        config::{AuthorizedKeys, InstanceConfig},
        facts::{GuestFacts, NodeKind},
        plan::{Plan, Visibility, guest_path},
        ssh::keyword,
    },
};

/// Homes that packages give to accounts which have none.
const NO_HOMES: [&str; 5] = ["/", "/nonexistent", "/dev/null", "/var/empty", "/proc"];

/// Writes the keys of every user named. `Kind::InvalidRequest` names the field when a user does not exist or has no home.
pub(super) fn write_all(plan: &mut Plan<'_>, facts: &GuestFacts, database: &Database, config: &InstanceConfig) -> Result<()> {
    if config.authorized_keys.iter().any(|keys| !keys.keys.is_empty()) {
        warn_of_other_key_files(plan, facts);
    }
    config.authorized_keys.iter().try_for_each(|keys| write_authorized_keys(plan, facts, database, keys))
}

/// Whether an account can have files of its own there.
pub(super) fn is_home(path: &str) -> bool {
    let home = path.trim_end_matches('/');
    !home.is_empty() && !NO_HOMES.contains(&home) && guest_path(home).is_ok()
}

/// Writes `~user/.ssh/authorized_keys`. The file is written as given and **replaces** what the image had: a key of the image's builder must not
/// stay valid on an instance whose keys are managed. The directory becomes 0700 and the file 0600, both the user's (sshd's StrictModes).
fn write_authorized_keys(plan: &mut Plan<'_>, facts: &GuestFacts, database: &Database, keys: &AuthorizedKeys) -> Result<()> {
    let field = format!("authorized_keys.{}", keys.user);
    let account = account(database, &keys.user).ok_or_else(|| {
        Error::field(Stage::Inject, field.clone(), format!("the image's /etc/passwd has no user {:?}", keys.user)).with_reason("NO_SUCH_USER")
    })?;
    let home = account.home.trim_end_matches('/');
    if !is_home(home) {
        let message = format!("the user's home is {:?}, where no keys can be kept", account.home);
        return Err(Error::field(Stage::Inject, field, message).with_reason("USER_WITHOUT_HOME"));
    }
    let attrs = |mode| Attrs { mode, uid: account.uid, gid: account.gid, xattrs: Vec::new() };
    let directory = format!("{home}/.ssh");
    let file = format!("{directory}/authorized_keys");
    if let Some(who) = plan.claimant(&file) {
        plan.notes.push(format!("{file} is left to {who}"));
        return Ok(());
    }
    // Only there do the facts list homes; elsewhere one that is not listed may well exist, and its mode must stay.
    if (home == "/root" || home.starts_with("/home/")) && facts.resolve(home).is_none() && !plan.writes_to(home) {
        plan.make_dir(home, attrs(0o700), format!("the home of {} is not in the image", keys.user))?;
    }
    if facts.node(&directory).is_some_and(|node| node.kind != NodeKind::Directory) {
        // A link here could lead the write, and its mode, to somewhere else in the tree.
        plan.remove(&directory, "keys go into a directory, not through a link or file")?;
    }
    plan.make_dir(&directory, attrs(0o700), format!("authorized keys of {}", keys.user))?;
    if facts.node(&file).is_some() {
        plan.notes.push(format!("{file} of the image is replaced: only the keys of the request stay valid"));
    }
    let mut content = keys.keys.join("\n");
    if !content.is_empty() {
        content.push('\n');
    }
    plan.write_as(&file, content, attrs(0o600), format!("{} authorized key(s) of {}", keys.keys.len(), keys.user), Visibility::Open)?;
    if ["nologin", "false", "true", "sync"].contains(&account.shell.rsplit('/').next().unwrap_or_default()) {
        plan.warnings.push(format!("{} has the shell {}: the keys give no shell", keys.user, account.shell));
    }
    Ok(())
}

/// One line of passwd(5), as far as it is needed.
struct Account<'t> {
    uid: u32,
    gid: u32,
    home: &'t str,
    shell: &'t str,
}

fn account<'t>(database: &'t Database, user: &str) -> Option<Account<'t>> {
    match database.get(super::Which::Passwd)?.row(user)?[..] {
        [_, _, uid, gid, _, home, shell] => Some(Account { uid: uid.parse().ok()?, gid: gid.parse().ok()?, home, shell }),
        _ => None,
    }
}

/// sshd_config(5) AuthorizedKeysFile elsewhere means that the file written here is never read.
fn warn_of_other_key_files(plan: &mut Plan<'_>, facts: &GuestFacts) {
    let Some(text) = facts.text("/etc/ssh/sshd_config") else { return };
    let elsewhere = text.lines().filter_map(|line| keyword(line, "AuthorizedKeysFile")).find(|value| !value.contains(".ssh/authorized_keys"));
    if let Some(value) = elsewhere {
        plan.warnings.push(format!("sshd_config reads keys from {value:?}, not from ~/.ssh/authorized_keys where they are written"));
    }
}

//! Accounts of the image: users that are made or changed, root's password and how root may log in, authorized keys, sudo.
//!
//! ```text
//!  users            passwd, shadow, group, gshadow, subuid, subgid as data (table, database), ids and homes by the image's defaults (create)
//!  root             hash or lock, sshd's PermitRootLogin (root)
//!  authorized keys  ~/.ssh/authorized_keys of any user, those just made too (keys)
//!  sudo             one file in sudoers.d, or doas.d (sudo)
//! ```
//!
//! No NSS, crypt or locale of the tree is ever used (failures.md 4). Nothing is decided by names that the image does not have. A password is only
//! ever taken as a crypt(5) hash: a cleartext password is refused, and without a hash an account stays as the image has it. A locked account has
//! `*`, not `!`: sshd without PAM takes a `!` for a locked account and refuses its keys too (sshd(8), LOCKED_PASSWD_PREFIX).

mod create;
mod crypt;
mod database;
mod defaults;
mod keys;
mod root;
mod sudo;
mod table;

pub use crypt::check_crypt_hash;

use self::database::{Database, Which};
use crate::{
    error::{Error, Result, Stage},
    guest::{
        config::{InjectedFile, InstanceConfig},
        facts::GuestFacts,
        plan::Plan,
        report::UserReport,
        setup::{Password, RootLogin},
        tree::musl,
    },
    units::Timestamp,
};

/// Writes all that concerns accounts and gives the account of users made or changed. `Kind::InvalidRequest` names the field when a user does not
/// exist (`NO_SUCH_USER`), has no home (`USER_WITHOUT_HOME`), is another one in the image (`USER_EXISTS`, `UID_TAKEN`), or a group, sudo is missing
/// (`NO_SUCH_GROUP`, `NO_SUDO`). `now` gives the day of the password's last change.
pub fn write_accounts<'f>(plan: &mut Plan<'f>, facts: &'f GuestFacts, config: &InstanceConfig, now: Timestamp) -> Result<(Vec<UserReport>, Owners)> {
    let mut database = Database::of(facts);
    // Day 0 means that the password must be changed at once (shadow(5)).
    let today = (now.secs / 86400).max(1);
    let mut accounts = Accounts { plan, facts, database: &mut database, today };
    let root = accounts.write_root(config)?;
    let mut made = Vec::new();
    for (index, user) in config.setup.users.iter().enumerate() {
        made.push(accounts.write_user(&format!("users[{index}]"), user)?);
    }
    warn_of_nss(accounts.plan, facts, !config.setup.users.is_empty());
    let why = match (root, made.is_empty()) {
        (true, true) => "root password hash",
        (true, false) => "accounts and root's password of the request",
        (false, _) => "accounts of the request",
    };
    database.write(plan, facts, why)?;
    sudo::write(plan, facts, config)?;
    root::write_login_policy(plan, facts, config.setup.root_login)?;
    for user in &made {
        create::write_home(plan, facts, user)?;
    }
    keys::write_all(plan, facts, &database, config)?;
    let owners = Owners { database };
    Ok((made, owners))
}

/// The accounts as the guest will have them, for finding owners by name.
pub struct Owners {
    database: Database,
}

impl Owners {
    /// Owner and group of a file of the request; `field` is where it stands. `Kind::InvalidRequest`, `NO_SUCH_USER` or `NO_SUCH_GROUP`.
    pub fn of(&self, field: &str, file: &InjectedFile) -> Result<(u32, u32)> {
        let find = |which: Which, name: &Option<String>, otherwise: u32, what: &str, reason: &'static str| -> Result<u32> {
            let Some(name) = name else { return Ok(otherwise) };
            let id = self.database.get(which).and_then(|table| table.field(name, 2)).and_then(|id| id.parse().ok());
            id.ok_or_else(|| Error::field(Stage::Inject, format!("{field}.{what}"), format!("the image has no {what} {name:?}")).with_reason(reason))
        };
        let uid = find(Which::Passwd, &file.user, file.uid, "user", "NO_SUCH_USER")?;
        Ok((uid, find(Which::Group, &file.group, file.gid, "group", "NO_SUCH_GROUP")?))
    }
}

/// The accounts while they are changed.
struct Accounts<'p, 'f, 'd> {
    plan: &'p mut Plan<'f>,
    facts: &'f GuestFacts,
    database: &'d mut Database,
    /// Days since 1970-01-01, for shadow(5).
    today: i64,
}

impl Accounts<'_, '_, '_> {
    /// Root's password; says whether it changes.
    fn write_root(&mut self, config: &InstanceConfig) -> Result<bool> {
        let wanted = match (&config.root_password_hash, config.setup.root_login) {
            (Some(hash), _) => Password::Hash(hash.clone()),
            (None, RootLogin::No) => Password::Locked,
            (None, _) => Password::Keep,
        };
        if wanted == Password::Keep {
            let user_given = config.setup.users.iter().any(|user| user.name == "root" && user.password != Password::Keep);
            if !user_given {
                self.warn_of_empty_root_password();
            }
            return Ok(false);
        }
        self.set_password("root_password_hash", "root", &wanted)?;
        Ok(true)
    }

    fn warn_of_empty_root_password(&mut self) {
        let inline = self.database.passwd_field("root", 1) == Some("");
        let shadow = self.database.get(Which::Shadow).and_then(|table| table.field("root", 1)) == Some("");
        if inline || shadow {
            self.plan.warnings.push("root has an empty password in the image and no hash is given: it stays empty".into());
        }
    }

    /// Puts a password into the user's line of /etc/shadow; all other lines, their order and the line's other fields stay byte for byte.
    fn set_password(&mut self, field: &str, user: &str, password: &Password) -> Result<()> {
        let value = match password {
            Password::Keep => return Ok(()),
            Password::Locked => "*",
            Password::Hash(hash) => std::str::from_utf8(hash.expose())
                .ok()
                .filter(|hash| check_crypt_hash(hash).is_ok())
                .ok_or_else(|| Error::field(Stage::Inject, field, "is not a crypt(5) hash"))?,
        };
        let shadow = self.database.change(Which::Shadow)?;
        if !shadow.set(user, 1, value) {
            shadow.push(&[user, value, "19000", "0", "99999", "7", "", "", ""]);
        }
        if shadow.field(user, 2) == Some("0") {
            self.plan.notes.push(format!("{user}'s password is marked as expired in the image: the first login has to change it"));
        }
        // passwd(5): only "x" makes the shadow entry count.
        if self.database.passwd_field(user, 1).is_some_and(|inline| inline != "x") {
            self.database.change(Which::Passwd)?.set(user, 1, "x");
        }
        if value.starts_with("$y$") && musl(self.facts) {
            self.plan.warnings.push("the image uses musl, whose crypt does not know yescrypt ($y$): use $6$ or $2b$".into());
        }
        Ok(())
    }
}

/// Accounts in files are seen only by a guest that looks there (nsswitch.conf(5)).
fn warn_of_nss(plan: &mut Plan<'_>, facts: &GuestFacts, matters: bool) {
    let Some(text) = facts.text("/etc/nsswitch.conf").filter(|_| matters) else { return };
    let sources = text.lines().find_map(|line| line.trim().strip_prefix("passwd:"));
    if let Some(sources) = sources.filter(|sources| !sources.split_whitespace().any(|source| matches!(source, "files" | "compat"))) {
        plan.warnings.push(format!("nsswitch.conf of the image takes users from {:?}, not from the files that are written here", sources.trim()));
    }
}

//! Making users and changing those there are, after useradd(8) and usermod(8): private group, subordinate ids where the image has them, a home
//! with the skeleton's files.

use super::{Accounts, database::Which, defaults::Defaults, keys::is_home};
use crate::{
    error::{Error, Result, Stage},
    fs::edit::Attrs,
    guest::{
        facts::{GuestFacts, Node, NodeKind},
        plan::{Plan, Visibility},
        report::UserReport,
        setup::{Password, Sudo, UserSetup},
    },
};

impl Accounts<'_, '_, '_> {
    /// One user of the request; `field` is where it stands there.
    pub(super) fn write_user(&mut self, field: &str, user: &UserSetup) -> Result<UserReport> {
        let exists = self.database.get(Which::Passwd).is_some_and(|table| table.row(&user.name).is_some());
        if exists {
            self.change(field, user)?;
        } else {
            self.create(field, user)?;
        }
        for (index, group) in user.groups.iter().enumerate() {
            let known = self.database.change(Which::Group)?.add_member(group, &user.name);
            if !known {
                let message = format!("the image's /etc/group has no group {group:?}");
                return Err(Error::field(Stage::Inject, format!("{field}.groups[{index}]"), message).with_reason("NO_SUCH_GROUP"));
            }
            if self.database.has(Which::Gshadow) {
                self.database.change(Which::Gshadow)?.add_member(group, &user.name);
            }
        }
        if user.sudo == Sudo::WithPassword && !matches!(user.password, Password::Hash(_)) && !exists {
            self.plan.warnings.push(format!("{} may use sudo with a password but has none", user.name));
        }
        self.set_password(&format!("{field}.password_hash"), &user.name, &user.password)?;
        self.report(user, !exists)
    }

    fn report(&self, user: &UserSetup, made: bool) -> Result<UserReport> {
        let fields = self.database.get(Which::Passwd).and_then(|table| table.row(&user.name)).unwrap_or_default();
        let number = |at: usize| fields.get(at).and_then(|text| text.parse().ok());
        let (Some(uid), Some(gid)) = (number(2), number(3)) else {
            return Err(Error::internal(Stage::Inject, "/etc/passwd", format!("the line of {} has no ids", user.name)));
        };
        let text = |at: usize| fields.get(at).map(|text| (*text).to_owned()).unwrap_or_default();
        let password = match user.password {
            Password::Hash(_) => "hash",
            Password::Locked => "locked",
            Password::Keep if made => "locked",
            Password::Keep => "kept",
        };
        Ok(UserReport { name: user.name.clone(), uid, gid, home: text(5), shell: text(6), created: made, password, sudo: user.sudo.word() })
    }

    fn change(&mut self, field: &str, user: &UserSetup) -> Result<()> {
        let is = |at: usize| self.database.passwd_field(&user.name, at).unwrap_or_default();
        let other = |name: &str, what: &str, has: &str| {
            let message = format!("the image has a user {} with {what} {has:?}, which stays", user.name);
            Err(Error::field(Stage::Inject, format!("{field}.{name}"), message).with_reason("USER_EXISTS"))
        };
        if user.uid.is_some_and(|uid| is(2).parse() != Ok(uid)) {
            return other("uid", "the uid", is(2));
        }
        if user.home.as_ref().is_some_and(|home| home.display() != is(5).trim_end_matches('/')) {
            return other("home", "the home", is(5));
        }
        let passwd = self.database.change(Which::Passwd)?;
        if let Some(name) = &user.full_name {
            passwd.set(&user.name, 4, name);
        }
        if let Some(shell) = &user.shell {
            passwd.set(&user.name, 6, &shell.display());
            self.warn_of_unknown_shell(&user.name, &shell.display());
        }
        Ok(())
    }

    fn create(&mut self, field: &str, user: &UserSetup) -> Result<()> {
        let defaults = Defaults::of(self.facts);
        let name = user.name.as_str();
        let uid = match user.uid {
            None => defaults.next_uid(self.database)?,
            Some(uid) => {
                let holder = self.database.change(Which::Passwd)?.rows().find(|row| row[2].parse() == Ok(uid)).map(|row| row[0].to_owned());
                if let Some(holder) = holder {
                    let message = format!("{uid} is the uid of {holder} in the image");
                    return Err(Error::field(Stage::Inject, format!("{field}.uid"), message).with_reason("UID_TAKEN"));
                }
                uid
            }
        };
        let gid = self.primary_group(&defaults, name, uid)?;
        let home = match &user.home {
            Some(home) => home.display().into_owned(),
            None => format!("{}/{name}", defaults.home_base()),
        };
        if !is_home(&home) || home.matches('/').count() < 2 && self.facts.exists(&home) {
            let message = format!("{home:?} can't be the home of a user: it belongs to the system");
            return Err(Error::field(Stage::Inject, format!("{field}.home"), message).with_reason("USER_WITHOUT_HOME"));
        }
        let shell = user.shell.as_ref().map_or_else(|| defaults.shell().to_owned(), |shell| shell.display().into_owned());
        self.warn_of_unknown_shell(name, &shell);
        let shadow = self.database.has(Which::Shadow);
        let inline = if shadow { "x" } else { "*" };
        let gecos = user.full_name.as_deref().unwrap_or_default();
        self.database.change(Which::Passwd)?.push(&[name, inline, &uid.to_string(), &gid.to_string(), gecos, &home, &shell]);
        if shadow {
            let today = self.today.to_string();
            let table = self.database.change(Which::Shadow)?;
            // A line left over from a user who is gone would give the new one that password.
            if !table.set(name, 1, "*") {
                table.push(&[name, "*", &today, "0", "99999", "7", "", "", ""]);
            }
        }
        self.subordinate_ids(&defaults, name)
    }

    /// The user's own group, made where the image has none of that name.
    fn primary_group(&mut self, defaults: &Defaults<'_>, name: &str, uid: u32) -> Result<u32> {
        if let Some(gid) = defaults.shared_group() {
            return Ok(gid);
        }
        if let Some(gid) = self.database.change(Which::Group)?.field(name, 2).and_then(|gid| gid.parse().ok()) {
            return Ok(gid);
        }
        let gid = defaults.next_gid(self.database, uid)?;
        self.database.change(Which::Group)?.push(&[name, "x", &gid.to_string(), ""]);
        if self.database.has(Which::Gshadow) {
            let gshadow = self.database.change(Which::Gshadow)?;
            if gshadow.row(name).is_none() {
                gshadow.push(&[name, "!", "", ""]);
            }
        }
        Ok(gid)
    }

    /// Ranges for user namespaces, where the image has the files (subuid(5)).
    fn subordinate_ids(&mut self, defaults: &Defaults<'_>, name: &str) -> Result<()> {
        for (which, what) in [(Which::Subuid, "UID"), (Which::Subgid, "GID")] {
            if !self.database.has(which) {
                continue;
            }
            let table = self.database.change(which)?;
            if table.row(name).is_some() {
                continue;
            }
            match defaults.next_subordinate(table, what) {
                Some((start, count)) => table.push(&[name, &start.to_string(), &count.to_string()]),
                None => self.plan.warnings.push(format!("no range of subordinate ids is left in the image for {name}")),
            }
        }
        Ok(())
    }

    fn warn_of_unknown_shell(&mut self, user: &str, shell: &str) {
        let Some(text) = self.facts.text("/etc/shells") else { return };
        let listed = text.lines().any(|line| line.trim() == shell);
        if !listed && !shell.ends_with("/nologin") && !shell.ends_with("/false") {
            self.plan.warnings.push(format!("{user} gets the shell {shell}, which /etc/shells of the image does not name"));
        }
    }
}

/// The home of a user that was made, with the skeleton's files. A home that is in the image already is left as it is.
pub(super) fn write_home(plan: &mut Plan<'_>, facts: &GuestFacts, user: &UserReport) -> Result<()> {
    if !user.created || facts.exists(&user.home) {
        return Ok(());
    }
    let attrs = |mode| Attrs { mode, uid: user.uid, gid: user.gid, xattrs: Vec::new() };
    plan.make_dir(&user.home, attrs(Defaults::of(facts).home_mode()), format!("home of {}", user.name))?;
    copy_skeleton(plan, facts, "/etc/skel", &user.home, &attrs, 0)
}

/// Copies what the facts have of a directory, two levels deep; larger files of a skeleton are not worth a place in every block patch.
fn copy_skeleton(plan: &mut Plan<'_>, facts: &GuestFacts, from: &str, to: &str, attrs: &dyn Fn(u16) -> Attrs, depth: u8) -> Result<()> {
    let Some((directory, _)) = facts.resolve(from) else { return Ok(()) };
    let nodes: Vec<(&str, &Node)> = facts.children(&directory).filter(|(name, _)| !name.contains(char::is_control)).collect();
    for (name, node) in nodes {
        let path = format!("{to}/{name}");
        let why = "from /etc/skel of the image";
        match &node.kind {
            NodeKind::File { content: Some(content), .. } => plan.write_as(&path, content.clone(), attrs(node.mode), why, Visibility::Open)?,
            NodeKind::Directory if depth == 0 => {
                plan.make_dir(&path, attrs(node.mode), why)?;
                copy_skeleton(plan, facts, &format!("{directory}/{name}"), &path, attrs, depth + 1)?;
            }
            NodeKind::Symlink { target } => plan.symlink(&path, target, why)?,
            _ => plan.notes.push(format!("{from}/{name} is not copied to {to}: it is large, deep or special")),
        }
    }
    Ok(())
}

//! What the image's own tools would choose for a new account: login.defs(5), useradd(8)'s defaults, the skeleton directory.

use super::{database::Database, database::Which, table::Table};
use crate::{
    error::{Error, Kind, Result, Stage},
    guest::{
        facts::GuestFacts,
        tree::{present, shell_variable},
    },
};

/// Defaults of the image.
pub(super) struct Defaults<'f> {
    facts: &'f GuestFacts,
}

impl<'f> Defaults<'f> {
    pub(super) fn of(facts: &'f GuestFacts) -> Self {
        Defaults { facts }
    }

    /// A setting of login.defs(5): name, white space, value.
    fn login_def(&self, name: &str) -> Option<&'f str> {
        self.facts.text("/etc/login.defs")?.lines().find_map(|line| {
            let (key, value) = line.trim().split_once(char::is_whitespace)?;
            (key == name).then(|| value.trim())
        })
    }

    fn number(&self, name: &str, otherwise: u32) -> u32 {
        self.login_def(name).and_then(|value| value.parse().ok()).unwrap_or(otherwise)
    }

    /// A setting of /etc/default/useradd.
    fn useradd(&self, name: &str) -> Option<&'f str> {
        shell_variable(self.facts.text("/etc/default/useradd")?, name)
    }

    /// The mode of a new home (HOME_MODE, else what UMASK leaves of 0777).
    pub(super) fn home_mode(&self) -> u16 {
        let octal = |name| self.login_def(name).and_then(|text| u16::from_str_radix(text, 8).ok()).filter(|mode| *mode <= 0o777);
        octal("HOME_MODE").unwrap_or_else(|| octal("UMASK").map_or(0o700, |mask| 0o777 & !mask))
    }

    /// Where homes are.
    pub(super) fn home_base(&self) -> &'f str {
        self.useradd("HOME").filter(|path| path.starts_with('/') && path.len() > 1).map_or("/home", |path| path.trim_end_matches('/'))
    }

    /// The login shell: bash where it is, as adduser(8) and every cloud image have it, else what useradd would take.
    pub(super) fn shell(&self) -> &'f str {
        if present(self.facts, "/usr/bin/bash") {
            "/bin/bash"
        } else {
            self.useradd("SHELL").filter(|path| path.starts_with('/')).unwrap_or("/bin/sh")
        }
    }

    /// The primary group of all users, where the image does not give each its own (USERGROUPS_ENAB no, as on SUSE).
    pub(super) fn shared_group(&self) -> Option<u32> {
        (self.login_def("USERGROUPS_ENAB") == Some("no")).then(|| self.useradd("GROUP").and_then(|gid| gid.parse().ok()).unwrap_or(100))
    }

    /// The next free uid: one more than the largest in the range, or the first hole (useradd(8)).
    pub(super) fn next_uid(&self, database: &Database) -> Result<u32> {
        let (min, max) = (self.number("UID_MIN", 1000), self.number("UID_MAX", 60000));
        next(database.get(Which::Passwd), min, max).ok_or_else(|| exhausted("uid", min, max))
    }

    /// The gid for a user's own group: the uid when it is free, as useradd(8) does, else the next free one.
    pub(super) fn next_gid(&self, database: &Database, uid: u32) -> Result<u32> {
        let taken = |gid: u32| database.get(Which::Group).into_iter().flat_map(Table::rows).any(|row| row[2].parse() == Ok(gid));
        if !taken(uid) {
            return Ok(uid);
        }
        let (min, max) = (self.number("GID_MIN", 1000), self.number("GID_MAX", 60000));
        next(database.get(Which::Group), min, max).ok_or_else(|| exhausted("gid", min, max))
    }

    /// The next free range of subordinate ids (subuid(5)): start and count. `None` when there is no room.
    pub(super) fn next_subordinate(&self, table: &Table, what: &str) -> Option<(u32, u32)> {
        let setting = |name: &str, otherwise| self.number(&format!("SUB_{what}_{name}"), otherwise);
        let (min, max, count) = (setting("MIN", 100_000), setting("MAX", 600_100_000), setting("COUNT", 65_536));
        let end = |row: Vec<&str>| row[1].parse::<u32>().ok()?.checked_add(row[2].parse().ok()?);
        let start = table.rows().filter_map(end).max().unwrap_or(min).max(min);
        let last = start.checked_add(count)?.checked_sub(1)?;
        (count > 0 && last <= max).then_some((start, count))
    }
}

fn exhausted(what: &str, min: u32, max: u32) -> Error {
    let message = format!("no {what} from {min} to {max} is free in the image");
    Error::new(Kind::Unsupported, Stage::Inject, "/etc/login.defs", message).with_reason("NO_FREE_ID")
}

fn next(table: Option<&Table>, min: u32, max: u32) -> Option<u32> {
    let mut used: Vec<u32> = table?.rows().filter_map(|row| row[2].parse().ok()).filter(|id| (min..=max).contains(id)).collect();
    used.sort_unstable();
    let Some(largest) = used.last() else { return (min <= max).then_some(min) };
    if *largest < max {
        return Some(largest + 1);
    }
    used.dedup();
    used.iter().zip(min..=max).find(|(id, wanted)| **id != *wanted).map(|(_, wanted)| wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_id_follows_the_largest_and_then_fills_holes() {
        let table = |text: &str| Table::parse(text, (4, 4));
        assert_eq!(next(Some(&table("")), 1000, 1003), Some(1000));
        assert_eq!(next(Some(&table("a:x:0:\nb:x:1001:\nc:x:x:\nd:x:65534:\n")), 1000, 1003), Some(1002));
        assert_eq!(next(Some(&table("b:x:1003:\na:x:1000:\n")), 1000, 1003), Some(1001));
        assert_eq!(next(Some(&table("b:x:5:\nb2:x:5:\na:x:4:\n")), 4, 5), None);
        assert_eq!(next(Some(&table("")), 5, 4), None);
    }
}

//! All account files of an image together, read from the facts and written as edits: each file once, whole, and all of them or none, because a
//! block patch is. Nothing is looked up through NSS (failures.md 4), nothing is locked: no other program sees the tree.

use super::table::Table;
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::edit::Attrs,
    guest::{
        facts::GuestFacts,
        plan::{Plan, Visibility},
    },
};

/// The account files that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Passwd,
    Shadow,
    Group,
    Gshadow,
    Subuid,
    Subgid,
}

/// Path, fields of a line at least and at most, whether its content is secret.
const FILES: [(Which, &str, (usize, usize), Visibility); 6] = [
    (Which::Passwd, "/etc/passwd", (7, 7), Visibility::Open),
    (Which::Shadow, "/etc/shadow", (2, 9), Visibility::Secret),
    (Which::Group, "/etc/group", (4, 4), Visibility::Open),
    (Which::Gshadow, "/etc/gshadow", (4, 4), Visibility::Secret),
    (Which::Subuid, "/etc/subuid", (3, 3), Visibility::Open),
    (Which::Subgid, "/etc/subgid", (3, 3), Visibility::Open),
];

/// One file as the image has it.
enum State {
    Missing(Table),
    Read(Table),
    Unreadable,
}

/// The files.
pub(super) struct Database {
    files: Vec<State>,
}

impl Database {
    /// Reads what the facts have.
    pub(super) fn of(facts: &GuestFacts) -> Self {
        let files = FILES.iter().map(|(_, path, width, _)| match (facts.exists(path), facts.text(path)) {
            (false, _) => State::Missing(Table::parse("", *width)),
            (true, Some(text)) => State::Read(Table::parse(text, *width)),
            (true, None) => State::Unreadable,
        });
        Database { files: files.collect() }
    }

    /// A file to look things up in; empty when the image does not have it or it can't be read.
    pub(super) fn get(&self, which: Which) -> Option<&Table> {
        match &self.files[which as usize] {
            State::Read(table) | State::Missing(table) => Some(table),
            State::Unreadable => None,
        }
    }

    /// Whether the image has the file.
    pub(super) fn has(&self, which: Which) -> bool {
        !matches!(self.files[which as usize], State::Missing(_))
    }

    /// A file to change; `Kind::Unsupported`, `GUEST_FILE_UNREADABLE` when the image has one that is not text or too large.
    pub(super) fn change(&mut self, which: Which) -> Result<&mut Table> {
        match &mut self.files[which as usize] {
            State::Read(table) | State::Missing(table) => Ok(table),
            State::Unreadable => {
                let path = FILES[which as usize].1;
                let message = "is too large or not UTF-8 text, it can't be edited";
                Err(Error::new(Kind::Unsupported, Stage::Inject, path, message).with_reason("GUEST_FILE_UNREADABLE"))
            }
        }
    }

    /// A field of a user's line in passwd(5).
    pub(super) fn passwd_field(&self, user: &str, at: usize) -> Option<&str> {
        self.get(Which::Passwd)?.field(user, at)
    }

    /// Writes the files that were changed, with the owner and mode they have. Those with hashes are never readable by others, whatever the image
    /// thought (shadow-utils makes them 0640 root:shadow, Fedora 0000).
    pub(super) fn write(&self, plan: &mut Plan<'_>, facts: &GuestFacts, why: &str) -> Result<()> {
        for ((_, path, _, seen), file) in FILES.iter().zip(&self.files) {
            let (table, missing) = match file {
                State::Read(table) => (table, false),
                State::Missing(table) => (table, true),
                State::Unreadable => continue,
            };
            if !table.is_changed() {
                continue;
            }
            let secret = *seen == Visibility::Secret;
            let mut attrs = match facts.resolve(path) {
                Some((_, node)) if !missing => Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() },
                _ => Attrs::root(if secret { 0o600 } else { 0o644 }),
            };
            if secret {
                attrs.mode &= 0o640;
            }
            plan.write_as(path, table.text(), attrs, why, *seen)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_in_the_order_of_their_names() {
        for (index, (which, ..)) in FILES.iter().enumerate() {
            assert_eq!(*which as usize, index);
        }
    }
}

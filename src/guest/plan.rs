//! The list of edits while it is being made. Every part of injection writes through it, so that the rules that hold for all paths are in one
//! place: what a template or the caller writes is not written, a removal that a later write makes pointless is dropped, and every path is a
//! [`GuestPath`].
//!
//! Symlinks: an edit never follows a link at the last component; writing replaces the link (`fs::edit`). Where that would be wrong (a resolv.conf
//! that somebody else maintains) the part that writes decides from the facts, before it gets here.

use std::collections::BTreeSet;

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::edit::{Attrs, Edit, EditOp},
    guest::{facts::GuestFacts, report::Change, selinux::Labeller},
    names::GuestPath,
};

/// Edits, notes and warnings under construction.
pub struct Plan<'a> {
    facts: &'a GuestFacts,
    /// Canonical paths that somebody else writes, with who that is.
    claimed: Vec<(String, &'static str)>,
    removals: Vec<Edit>,
    writes: Vec<Edit>,
    /// See [`crate::guest::report::Report::notes`].
    pub notes: Vec<String>,
    /// See [`crate::guest::report::Report::warnings`].
    pub warnings: Vec<String>,
}

impl<'a> Plan<'a> {
    /// Starts with the paths that the manifest's templates write.
    pub fn new(facts: &'a GuestFacts, templates: &BTreeSet<String>) -> Self {
        let claimed = templates.iter().map(|path| (canonical(facts, path), "a template of the manifest")).collect();
        Plan { facts, claimed, removals: Vec::new(), writes: Vec::new(), notes: Vec::new(), warnings: Vec::new() }
    }

    /// Adds a path that the caller's own `files` write.
    pub fn claim_for_caller(&mut self, path: &str) {
        self.claimed.push((canonical(self.facts, path), "the request's files"));
    }

    /// Who writes `path`, when it is not injection.
    pub fn claimant(&self, path: &str) -> Option<&'static str> {
        let path = canonical(self.facts, path);
        self.claimed.iter().find(|(claimed, _)| *claimed == path).map(|(_, who)| *who)
    }

    /// Whether an edit that is planned so far makes something at `path`.
    pub fn writes_to(&self, path: &str) -> bool {
        self.writes.iter().any(|edit| edit.path.display() == path)
    }

    /// The claimed paths, canonical.
    pub fn claimed(&self) -> impl Iterator<Item = &str> {
        self.claimed.iter().map(|(path, _)| path.as_str())
    }

    /// Writes a file owned by root.
    pub fn write(&mut self, path: &str, content: impl Into<Vec<u8>>, mode: u16, why: impl Into<String>) -> Result<()> {
        self.write_as(path, content, Attrs::root(mode), why, Visibility::Open)
    }

    /// Writes a file; returns without doing so, with a note, when somebody else writes it.
    pub fn write_as(&mut self, path: &str, content: impl Into<Vec<u8>>, attrs: Attrs, why: impl Into<String>, seen: Visibility) -> Result<()> {
        if let Some(who) = self.claimant(path) {
            self.notes.push(format!("{path} is left to {who}"));
            return Ok(());
        }
        self.push_write(path, EditOp::WriteFile { content: content.into(), attrs }, why.into(), seen)
    }

    /// Writes a file of the caller's; it is never held back.
    pub fn write_callers(&mut self, path: &GuestPath, content: &[u8], attrs: Attrs) {
        let op = EditOp::WriteFile { content: content.to_vec(), attrs };
        self.writes.push(Edit { path: path.clone(), op, why: "given in the request".into(), secret: true });
    }

    /// Drops the write that is planned for `path`, for a part that writes a whole document in its place. Says whether there was one.
    pub fn supersede(&mut self, path: &str) -> bool {
        let before = self.writes.len();
        self.writes.retain(|edit| edit.path.display() != path || !matches!(edit.op, EditOp::WriteFile { .. }));
        self.writes.len() != before
    }

    /// Makes a directory, or sets owner and mode of one that is there.
    pub fn make_dir(&mut self, path: &str, attrs: Attrs, why: impl Into<String>) -> Result<()> {
        self.push_write(path, EditOp::MakeDir { attrs }, why.into(), Visibility::Open)
    }

    /// Makes a symlink.
    pub fn symlink(&mut self, path: &str, target: &str, why: impl Into<String>) -> Result<()> {
        if let Some(who) = self.claimant(path) {
            self.notes.push(format!("{path} is left to {who}"));
            return Ok(());
        }
        self.push_write(path, EditOp::Symlink { target: target.as_bytes().to_vec(), attrs: Attrs::root(0o777) }, why.into(), Visibility::Open)
    }

    /// Removes what is at `path`, unless somebody else writes it. Removals come before all writes.
    pub fn remove(&mut self, path: &str, why: impl Into<String>) -> Result<()> {
        let why = why.into();
        if let Some(who) = self.claimant(path) {
            self.notes.push(format!("{path} would be removed ({why}) but {who} writes it"));
            return Ok(());
        }
        // A name of the image's own may hold anything that a file name can.
        let path = GuestPath::new(path).map_err(|why| Error::new(Kind::Corrupt, Stage::Inject, path.escape_default().to_string(), why))?;
        if !self.removals.iter().any(|edit| edit.path == path) {
            self.removals.push(Edit { path, op: EditOp::Remove, why, secret: false });
        }
        Ok(())
    }

    fn push_write(&mut self, path: &str, op: EditOp, why: String, seen: Visibility) -> Result<()> {
        self.writes.push(Edit { path: guest_path(path)?, op, why, secret: seen == Visibility::Secret });
        Ok(())
    }

    /// The edits in order, labelled: removals, then writes. A file that is written anyway is not removed first, but a directory's symlink in the way is.
    pub fn finish(self, labeller: &mut Labeller<'_>) -> (Vec<Edit>, Vec<Change>, Vec<String>, Vec<String>) {
        let written: BTreeSet<&GuestPath> =
            self.writes.iter().filter(|edit| !matches!(edit.op, EditOp::MakeDir { .. })).map(|edit| &edit.path).collect();
        let keep: Vec<bool> = self.removals.iter().map(|edit| !written.contains(&edit.path)).collect();
        let mut edits: Vec<Edit> = self.removals.into_iter().zip(keep).filter_map(|(edit, keep)| keep.then_some(edit)).collect();
        edits.extend(self.writes);
        labeller.label(&mut edits);
        for edit in &mut edits {
            edit.why = printable(&edit.why);
        }
        let changes = edits.iter().map(Change::of).collect();
        let clean = |texts: Vec<String>| texts.iter().map(|text| printable(text)).collect();
        (edits, changes, clean(self.notes), clean(self.warnings))
    }
}

/// Whether reports may tell the digest of a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Nothing secret in it.
    Open,
    /// Redacted everywhere.
    Secret,
}

/// `path` with the links of its parent directories followed, as far as the facts know them; the last component stays.
pub fn canonical(facts: &GuestFacts, path: &str) -> String {
    match path.rsplit_once('/') {
        Some((parent, name)) if !parent.is_empty() => match facts.resolve(parent) {
            Some((parent, _)) if parent == "/" => format!("/{name}"),
            Some((parent, _)) => format!("{parent}/{name}"),
            None => path.to_owned(),
        },
        _ => path.to_owned(),
    }
}

/// `text` without control characters: reports quote names and contents of the image, and end up on terminals and in logs.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A path that injection made itself or took from the image, checked.
pub fn guest_path(path: &str) -> Result<GuestPath> {
    let refuse = |why: String| Error::new(Kind::InvalidRequest, Stage::Inject, path.escape_default().to_string(), why);
    if path.chars().any(char::is_control) {
        return Err(refuse("the path contains control characters".into()));
    }
    GuestPath::new(path).map_err(refuse)
}

//! SELinux: the labels of what is written, by the image's own policy, so that a guest that enforces it needs no relabelling at its first boot.
//!
//! Labels are `security.selinux` attributes. They are written when the image uses SELinux, its tree came with labels and its policy's file_contexts(5)
//! are there; else, where SELinux is used, the guest is asked to relabel everything itself (/.autorelabel, read by selinux-autorelabel-generator),
//! which takes a restart. A path that the policy does not name gets the label of the directory above it, as a program in the guest would give it.

pub mod contexts;

use std::collections::BTreeSet;

use self::contexts::{FileContexts, FileKind, Label};
use crate::{
    error::Result,
    fs::edit::{Edit, EditOp},
    guest::{
        facts::GuestFacts,
        plan::{Plan, canonical},
        setup::Selinux,
        tree::shell_variable,
    },
    names::GuestPath,
    tree::Xattr,
};

/// The attribute.
pub const XATTR: &str = "security.selinux";

/// How labels are made for an image.
pub enum Labeller<'f> {
    /// By its policy.
    Policy(&'f GuestFacts, Box<FileContexts>),
    /// Not at all: the image does not use SELinux, the guest relabels itself, or the caller leaves it.
    Nobody,
}

impl<'f> Labeller<'f> {
    /// What the image and the request ask for. The reason is given when the guest has to relabel itself.
    pub fn of(facts: &'f GuestFacts, wish: Selinux) -> (Self, Option<&'static str>) {
        let config = facts.text("/etc/selinux/config");
        let in_use = config.and_then(|text| shell_variable(text, "SELINUX")).is_some_and(|mode| matches!(mode, "enforcing" | "permissive"));
        if !in_use || wish == Selinux::Leave {
            return (Labeller::Nobody, None);
        }
        if wish == Selinux::Relabel {
            return (Labeller::Nobody, Some("the request asks for it"));
        }
        if facts.labels.is_empty() {
            return (Labeller::Nobody, Some("the image's tree came without labels"));
        }
        let policy = config.and_then(|text| shell_variable(text, "SELINUXTYPE")).unwrap_or("targeted");
        let text = |suffix: &str| facts.text(&format!("/etc/selinux/{policy}/contexts/files/file_contexts{suffix}"));
        let Some(base) = text("") else { return (Labeller::Nobody, Some("the policy's file_contexts can't be read")) };
        let part = |suffix| text(suffix).unwrap_or_default();
        let contexts = FileContexts::parse(&[base, part(".homedirs"), part(".local")], part(".subs"), part(".subs_dist"));
        (Labeller::Policy(facts, Box::new(contexts)), None)
    }

    /// Labels everything that the edits make, and the directories that are made on the way to it.
    pub fn label(&mut self, edits: &mut Vec<Edit>) {
        let Labeller::Policy(facts, contexts) = self else { return };
        let mut made: BTreeSet<GuestPath> = BTreeSet::new();
        let mut on_the_way: BTreeSet<GuestPath> = BTreeSet::new();
        for edit in edits.iter_mut() {
            let (attrs, kind) = match &mut edit.op {
                EditOp::WriteFile { attrs, .. } => (attrs, FileKind::File),
                EditOp::MakeDir { attrs } => (attrs, FileKind::Directory),
                EditOp::Symlink { attrs, .. } => (attrs, FileKind::Symlink),
                _ => continue,
            };
            made.insert(edit.path.clone());
            let mut parent = edit.path.parent();
            while let Some(directory) = parent.filter(|path| !path.is_root() && facts.node(&path.display()).is_none()) {
                parent = directory.parent();
                on_the_way.insert(directory);
            }
            if !attrs.xattrs.iter().any(|xattr| xattr.name == XATTR.as_bytes())
                && let Some(value) = value(facts, contexts, &edit.path, kind)
            {
                attrs.xattrs.push(Xattr { name: XATTR.as_bytes().to_vec(), value });
                attrs.xattrs.sort_by(|a, b| a.name.cmp(&b.name));
            }
        }
        for path in on_the_way.difference(&made) {
            // The facts do not say whether it was there; its label is the policy's in both cases.
            if let Some(value) = value(facts, contexts, path, FileKind::Directory) {
                let op = EditOp::SetXattr { name: XATTR.as_bytes().to_vec(), value: Some(value) };
                edits.push(Edit { path: path.clone(), op, why: "label of a directory on the way to a file".into(), secret: false });
            }
        }
    }
}

/// The attribute's value: the context and a NUL, as setfilecon(3) writes it.
fn value(facts: &GuestFacts, contexts: &mut FileContexts, path: &GuestPath, kind: FileKind) -> Option<Vec<u8>> {
    let path = canonical(facts, &path.display());
    let context = match contexts.lookup(&path, kind) {
        Label::Context(context) => context,
        Label::None => return None,
        Label::Unknown => {
            let above = path.rmatch_indices('/').find_map(|(at, _)| facts.labels.get(&path[..at]));
            above.or_else(|| facts.labels.get("/"))?.clone()
        }
    };
    let mut value = context.into_bytes();
    value.push(0);
    Some(value)
}

/// Asks the guest to relabel itself, where that is needed.
pub fn relabel(plan: &mut Plan<'_>, reason: Option<&str>) -> Result<()> {
    let Some(reason) = reason else { return Ok(()) };
    plan.notes.push("the image uses SELinux: the guest relabels its files at the first boot and restarts once".into());
    plan.write("/.autorelabel", "", 0o644, format!("files written here have no SELinux labels yet: {reason}"))
}

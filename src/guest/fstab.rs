//! /etc/fstab: the line for the root filesystem, and those for the instance's further devices. Every other line stays as it is; those that name a device
//! the instance may not have are reported, because systemd waits 90 s for each and then stops in emergency mode.

use crate::{
    error::{Error, Result, Stage},
    fs::{FsKind, edit::Attrs},
    guest::{facts::GuestFacts, hostname::attrs_of, plan::Plan, plan::Visibility},
    names::GuestPath,
};

/// What fstab says about `/` and further devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootMount {
    /// First field: `UUID=…`, `LABEL=…`, `/dev/…`.
    pub source: String,
    /// The filesystem on it.
    pub fs: FsKind,
    /// What the further devices of the instance add.
    pub mounts: Mounts,
}

/// What the further devices of an instance add.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mounts {
    /// Lines in the order they are mounted.
    pub lines: Vec<MountLine>,
    /// Mount points that the image does not have.
    pub directories: Vec<GuestPath>,
}

/// A line of fstab(5). All fields are free of control characters; blanks are escaped when the line is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    /// First field: `UUID=…`, or a path of the guest for a bind mount.
    pub source: String,
    /// Second field: the mount point, `none` for swap.
    pub target: String,
    /// Third field: `ext4`, `swap`, `none` for a bind mount.
    pub kind: String,
    /// Fourth field.
    pub options: String,
    /// Sixth field: in which pass fsck looks at it, 0 for never.
    pub pass: u8,
}

/// Makes missing mount points; writes the root line, which a file without one gets at the end, and those of further devices, which take the place of lines
/// with the same mount point.
pub fn write_fstab(plan: &mut Plan<'_>, facts: &GuestFacts, root: &RootMount) -> Result<()> {
    let mounts = &root.mounts;
    for path in &mounts.directories {
        plan.make_dir(&path.display(), Attrs::root(0o755), "mount point")?;
    }
    if root.source.is_empty() || root.source.starts_with('#') || root.source.chars().any(char::is_control) {
        return Err(Error::internal(Stage::Inject, "/etc/fstab", format!("{:?} can't name the root filesystem", root.source)));
    }
    let old = match (facts.exists("/etc/fstab"), facts.text("/etc/fstab")) {
        (false, _) => "",
        (true, Some(text)) => text,
        (true, None) => {
            plan.warnings.push("/etc/fstab is left as it is: it is too large or not UTF-8 text".into());
            return Ok(());
        }
    };
    for line in old.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [source, target, ..] = fields[..]
            && target != "/"
            && !is_replaced(&fields, mounts)
            && is_device(source)
            && !fields.get(3).is_some_and(|options| options.split(',').any(|option| matches!(option, "nofail" | "noauto")))
        {
            plan.warnings.push(format!("/etc/fstab of the image mounts {source} on {target}: the guest waits for it at boot if it is not attached"));
        }
    }
    let mut text = String::new();
    for line in fstab_with(old, root).lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if is_replaced(&fields, mounts) {
            plan.notes.push(format!("/etc/fstab of the image: the line for {} gave way to this instance's device", fields[1]));
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    for MountLine { source, target, kind, options, pass } in &mounts.lines {
        text.push_str(&format!("{} {} {kind} {} 0 {pass}\n", escape(source), escape(target), escape(options)));
    }
    plan.write_as("/etc/fstab", text, attrs_of(facts, "/etc/fstab"), "filesystems of this instance", Visibility::Open)
}

/// Whether a line of the image gives way to one of `mounts`: it has the same mount point, or both are swap space.
fn is_replaced(fields: &[&str], mounts: &Mounts) -> bool {
    let [source, target, kind, ..] = fields[..] else { return false };
    if source.starts_with('#') {
        return false;
    }
    mounts.lines.iter().any(|line| if line.kind == "swap" { kind == "swap" && is_device(source) } else { escape(&line.target) == target })
}

fn is_device(source: &str) -> bool {
    ["/dev/", "UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=", "ID="].iter().any(|prefix| source.starts_with(prefix)) && !source.starts_with("/dev/fd")
}

/// `old` with its line for `/` replaced. Mount options are kept when the type stays, because they may be wanted (`noatime`) and were right for it.
fn fstab_with(old: &str, root: &RootMount) -> String {
    let line = |options: &str| {
        // fsck in pass 1 only makes sense for ext: fsck.xfs and fsck.btrfs do nothing.
        let pass = if root.fs == FsKind::Ext4 { 1 } else { 0 };
        format!("{} / {} {options} 0 {pass}", escape(&root.source), root.fs.name())
    };
    let default = if root.fs == FsKind::Ext4 { "errors=remount-ro" } else { "defaults" };
    let mut lines: Vec<String> = Vec::new();
    let mut done = false;
    for text in old.lines() {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let is_root = fields.first().is_some_and(|first| !first.starts_with('#')) && fields.get(1) == Some(&"/");
        if !is_root {
            lines.push(text.to_owned());
        } else if !std::mem::replace(&mut done, true) {
            let same_type = fields.get(2).is_some_and(|kind| *kind == root.fs.name() || *kind == "auto");
            lines.push(line(fields.get(3).filter(|_| same_type).unwrap_or(&default)));
        }
    }
    if !done {
        lines.push(line(default));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// fstab(5): blanks are written as octal escapes.
fn escape(text: &str) -> String {
    text.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_line_is_replaced_in_place_and_others_stay() {
        let root = RootMount { source: "UUID=1234".into(), fs: FsKind::Ext4, mounts: Mounts::default() };
        let old = "# fstab\nLABEL=old / ext4 noatime 0 1\ntmpfs /tmp tmpfs defaults 0 0\n/dev/sda1 / xfs defaults 0 0\n";
        assert_eq!(fstab_with(old, &root), "# fstab\nUUID=1234 / ext4 noatime 0 1\ntmpfs /tmp tmpfs defaults 0 0\n");
        assert_eq!(fstab_with("# UNCONFIGURED\n", &root), "# UNCONFIGURED\nUUID=1234 / ext4 errors=remount-ro 0 1\n");
    }

    #[test]
    fn options_of_another_type_are_not_kept() {
        let root = RootMount { source: "LABEL=my root".into(), fs: FsKind::Xfs, mounts: Mounts::default() };
        assert_eq!(fstab_with("/dev/sda / ext4 errors=remount-ro 0 1", &root), "LABEL=my\\040root / xfs defaults 0 0\n");
    }
}

//! The host's own tools for the three filesystems: making, growing, naming. Identities are always given.

use std::{ffi::OsString, path::Path, time::Duration};

use uuid::Uuid;

use super::wire::BuildJob;
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{FsKind, Profile},
    host::command::{run, run_any_status},
};

/// For making and growing filesystems: they write metadata only, but a busy disk may make them wait.
const TIMEOUT: Duration = Duration::from_secs(300);

fn text(uuid: &[u8; 16]) -> String {
    Uuid::from_bytes(*uuid).hyphenated().to_string()
}

fn run_on(tool: &str, arguments: &[&str], device: &Path) -> Result<()> {
    let arguments = arguments.iter().map(OsString::from).chain([device.as_os_str().to_owned()]);
    run(tool, arguments, TIMEOUT).map(drop)
}

/// Makes the filesystem on `device`, which reads as zeros: nothing is discarded.
pub(super) fn make(job: &BuildJob, device: &Path) -> Result<()> {
    let uuid = text(&job.uuid);
    // "No label" is not the same as an empty one to every tool.
    let label: &[&str] = if job.label.is_empty() { &[] } else { &["-L", &job.label] };
    match job.kind {
        FsKind::Xfs => run_on("mkfs.xfs", &[&["-q", "-f", "-K", "-m", &format!("crc=1,uuid={uuid}")], label].concat(), device),
        FsKind::Btrfs => run_on("mkfs.btrfs", &[&["-q", "-f", "-K", "-U", &uuid], label].concat(), device),
        FsKind::Ext4 => {
            let features = match job.profile {
                Profile::Modern => "64bit,metadata_csum,metadata_csum_seed,^orphan_file",
                Profile::Grub206 => "64bit,metadata_csum,^metadata_csum_seed,^orphan_file",
                Profile::Compat => "^64bit,^metadata_csum,^metadata_csum_seed,^orphan_file",
            };
            let seed = text(&job.hash_seed);
            let extended = format!("nodiscard,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={seed}");
            let ratio = job.bytes_per_inode.to_string();
            let arguments = ["-q", "-F", "-b", "4096", "-I", "256", "-i", &ratio, "-O", features, "-E", &extended, "-U", &uuid];
            run_on("mkfs.ext4", &[&arguments, label].concat(), device)
        }
    }
}

/// Options of the mount. A clone has its origin's identity until it gets its own, which XFS would take for a mistake; btrfs must not answer the
/// discards that the devices below refuse.
pub(super) fn mount_options(kind: FsKind) -> &'static str {
    match kind {
        FsKind::Xfs => "nouuid",
        FsKind::Btrfs => "nodiscard",
        FsKind::Ext4 => "",
    }
}

/// Options of a mount that only reads. A finished build was unmounted, so no log has anything to say.
pub(super) fn read_options(kind: FsKind) -> &'static str {
    match kind {
        FsKind::Xfs => "nouuid,norecovery",
        FsKind::Btrfs => "rescue=nologreplay",
        FsKind::Ext4 => "noload",
    }
}

/// New identity of a filesystem that is not mounted. XFS is done by `xfs_identity`: its own tool would rewrite the whole log.
///
/// Before the mount: two copies of one golden may be edited at a time, and the kernel does not take two btrfs of one identity.
pub(super) fn identify(kind: FsKind, device: &Path, uuid: Option<&[u8; 16]>, label: Option<&str>) -> Result<()> {
    match kind {
        FsKind::Xfs => Ok(()),
        FsKind::Btrfs => {
            if let Some(uuid) = uuid {
                // -M changes superblocks only and leaves the old one in the metadata (METADATA_UUID, Linux 5.0).
                run_on("btrfstune", &["-f", "-M", &text(uuid)], device)?;
            }
            match label {
                Some(label) => run("btrfs", ["filesystem".as_ref(), "label".as_ref(), device.as_os_str(), label.as_ref()], TIMEOUT).map(drop),
                None => Ok(()),
            }
        }
        FsKind::Ext4 => {
            if let Some(uuid) = uuid {
                // Without a checksum seed all metadata is rewritten, for which tune2fs wants a check to have been made.
                check_ext4(device)?;
                run_on("tune2fs", &["-f", "-U", &text(uuid)], device)?;
            }
            match label {
                Some(label) => run_on("tune2fs", &["-L", label], device),
                None => Ok(()),
            }
        }
    }
}

/// e2fsck, which exits with 1 when it has put something right.
fn check_ext4(device: &Path) -> Result<()> {
    let (status, output) = run_any_status("e2fsck", ["-f".as_ref(), "-p".as_ref(), device.as_os_str()], TIMEOUT)?;
    match status.code() {
        Some(0 | 1) => Ok(()),
        _ => {
            let said = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
            Err(Error::new(Kind::Corrupt, Stage::Edit, "ext4", format!("e2fsck ended with {status}: {said}")))
        }
    }
}

/// Grows a filesystem that is not mounted to the size of `device`, where the tool for it works like that. On-line growth of ext4 needs
/// CAP_SYS_RESOURCE, which the daemon may not have.
pub(super) fn grow_unmounted(kind: FsKind, device: &Path) -> Result<()> {
    match kind {
        FsKind::Xfs | FsKind::Btrfs => Ok(()),
        FsKind::Ext4 => check_ext4(device).and_then(|()| run_on("resize2fs", &[], device)),
    }
}

/// Grows the filesystem mounted at `target` to the size of its device, if [`grow_unmounted`] has not done it.
pub(super) fn grow_mounted(kind: FsKind, target: &Path) -> Result<()> {
    match kind {
        FsKind::Xfs => run_on("xfs_growfs", &["-d"], target),
        FsKind::Btrfs => run_on("btrfs", &["filesystem", "resize", "max"], target),
        FsKind::Ext4 => Ok(()),
    }
}

/// Refuses labels that the filesystem has no room for; in bytes.
pub(super) fn check_label(kind: FsKind, stage: Stage, label: &str) -> Result<()> {
    let len_max = match kind {
        FsKind::Xfs => 12,
        FsKind::Btrfs => 255,
        FsKind::Ext4 => 16,
    };
    if label.len() > len_max || label.chars().any(char::is_control) || label.starts_with('-') || (kind == FsKind::Btrfs && label.contains('/')) {
        let text = format!("{label:?} is not a label for {}: at most {len_max} bytes, no control characters, not starting with '-'", kind.name());
        return Err(Error::field(stage, "label", text));
    }
    Ok(())
}

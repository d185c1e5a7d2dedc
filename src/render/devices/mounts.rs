//! What the root's fstab says about the further devices.

use uuid::Uuid;

use crate::{
    error::Result,
    ext4::read::Image,
    fs::{FsKind, Region},
    guest::fstab::{MountLine, Mounts},
    mapping::Role,
    names::GuestPath,
    render::devices::{Content, PERSISTENT_MOUNT, ResolvedDevice},
};

/// How the persistent paths of an image get to the device that holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PersistentLayout {
    /// The one path is a directory: the device's root is that directory.
    Direct(GuestPath),
    /// The device is mounted at [`PERSISTENT_MOUNT`] and has every path below it, each bound to its place.
    Bound(Vec<GuestPath>),
}

/// The layout for these paths of `golden` (its root filesystem, if it is one that can be read here).
pub fn persistent_layout(paths: &[GuestPath], golden: Option<&Image>) -> Result<PersistentLayout> {
    if let [only] = paths
        && is_directory(golden, only)?.unwrap_or(true)
    {
        return Ok(PersistentLayout::Direct(only.clone()));
    }
    Ok(PersistentLayout::Bound(paths.to_vec()))
}

/// Whether there is a directory at `path`; nothing when nothing is there, or nobody knows.
fn is_directory(golden: Option<&Image>, path: &GuestPath) -> Result<Option<bool>> {
    let Some(image) = golden else { return Ok(None) };
    let Some(ino) = image.resolve(path)? else { return Ok(None) };
    Ok(Some(image.stat(ino)?.is_dir()))
}

/// Opens the root filesystem of a golden, when it is one that is read without the kernel.
pub fn open_golden(kind: FsKind, region: &Region) -> Result<Option<Image>> {
    if kind == FsKind::Ext4 { Image::open(region).map(Some) } else { Ok(None) }
}

/// The lines for `devices`; `uuid_of` gives the UUID that a new device gets.
pub fn mounts(devices: &[ResolvedDevice], golden: Option<&Image>, uuid_of: impl Fn(&ResolvedDevice) -> Uuid) -> Result<Mounts> {
    let mut mounts = Mounts::default();
    for device in devices {
        let uuid = match device.kept().and_then(|kept| kept.mapping.devices.first()).and_then(|device| device.filesystem.as_ref()) {
            Some(filesystem) => filesystem.uuid.clone(),
            None => uuid_of(device).to_string(),
        };
        let source = format!("UUID={uuid}");
        let options = |default: &str| device.mount_options.clone().unwrap_or_else(|| default.to_owned());
        match &device.content {
            Content::Empty | Content::Seed(_) => {}
            // A guest without its swap or scratch space still works; one without its data had better not start the services that write there.
            Content::Swap { .. } => {
                let options = options("sw,nofail");
                mounts.lines.push(MountLine { source, target: "none".into(), kind: "swap".into(), options, pass: 0 });
            }
            Content::Filesystem { kind, .. } => {
                let options = options(if device.role == Role::Scratch { "defaults,nofail" } else { "defaults" });
                let pass = if *kind == FsKind::Ext4 { 2 } else { 0 };
                let line = |target: &GuestPath| MountLine { source, target: target.to_string(), kind: kind.name().into(), options, pass };
                if let Some(mount) = &device.mount {
                    mounts.lines.push(line(mount));
                    need_directory(&mut mounts, golden, mount)?;
                } else if !device.persistent.is_empty() {
                    persistent_lines(&mut mounts, persistent_layout(&device.persistent, golden)?, golden, line)?;
                }
            }
        }
    }
    // A mount point inside another comes after it, a bind mount after what it binds.
    mounts.lines.sort_by_key(|line| (line.options == "bind", line.target.matches('/').count()));
    Ok(mounts)
}

fn persistent_lines(mounts: &mut Mounts, layout: PersistentLayout, golden: Option<&Image>, line: impl FnOnce(&GuestPath) -> MountLine) -> Result<()> {
    match layout {
        PersistentLayout::Direct(path) => {
            mounts.lines.push(line(&path));
            need_directory(mounts, golden, &path)
        }
        PersistentLayout::Bound(paths) => {
            let top: GuestPath = PERSISTENT_MOUNT.parse().expect("a constant path");
            mounts.lines.push(line(&top));
            need_directory(mounts, golden, &top)?;
            for path in paths {
                let bind =
                    MountLine { source: format!("{top}{path}"), target: path.to_string(), kind: "none".into(), options: "bind".into(), pass: 0 };
                mounts.lines.push(bind);
                if is_directory(golden, &path)?.is_none() {
                    need_directory(mounts, golden, &path)?;
                }
            }
            Ok(())
        }
    }
}

fn need_directory(mounts: &mut Mounts, golden: Option<&Image>, path: &GuestPath) -> Result<()> {
    if is_directory(golden, path)?.is_none() {
        mounts.directories.push(path.clone());
    }
    Ok(())
}

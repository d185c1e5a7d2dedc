//! What a new device holds: a disk file in the store's `tmp` and a block patch, from which a target makes the volume.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    disk::fat,
    error::{Error, Kind, Result, Stage},
    ext4::read::Image,
    fs::{BuildParams, FsKind, Profile, Region, TreeBuilder, patch::BlockPatch},
    guest::{cloud_seed, config::InstanceConfig, identity::Identity},
    mapping::Filesystem,
    names::{Digest, GuestPath, MacAddr},
    progress::Progress,
    render::{
        devices::{
            Content, ResolvedDevice,
            mounts::{PersistentLayout, persistent_layout},
        },
        golden::filesystem,
    },
    store::Store,
    target::GoldenDisk,
    tree::{Entry, EntryKind, Meta},
    units::{PATCH_BLOCK, Timestamp},
};

/// Bytes of a page of the guests this makes swap space for: x86 and, by distributions' default, arm64.
const PAGE: usize = 4096;

/// The content of a new device. The file is removed when this is dropped.
pub struct Prepared {
    /// What the target takes for a golden.
    pub disk: GoldenDisk,
    /// The changes on it.
    pub patch: BlockPatch,
    /// The filesystem, if there is one.
    pub filesystem: Option<Filesystem>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // What stays behind is removed when the store is opened next.
        if let Err(error) = std::fs::remove_file(&self.disk.path) {
            tracing::warn!(path = %self.disk.path.display(), %error, "a temporary disk could not be removed");
        }
    }
}

/// What [`prepare`] looks at beside the device.
pub struct Source<'a> {
    /// Where unfinished files go.
    pub store: &'a Store,
    /// Unique per render.
    pub render: &'a str,
    /// The root filesystem of the image, when it can be read here: where persistent content comes from.
    pub golden: Option<&'a Image>,
    /// Features of the root filesystem, which those of a device follow.
    pub profile: Profile,
    /// Stamped on what is made.
    pub now: Timestamp,
    /// What the instance is told.
    pub config: &'a InstanceConfig,
    /// Who it is.
    pub identity: &'a Identity,
    /// UUID of the instance.
    pub instance_uuid: &'a str,
    /// Addresses of its NICs, by interface name.
    pub macs: &'a BTreeMap<String, MacAddr>,
}

/// Makes the content of a device of `size_bytes`; `uuid` is the identity of its filesystem or swap space.
pub fn prepare(device: &ResolvedDevice, size_bytes: u64, uuid: Uuid, source: &Source<'_>, progress: &Progress) -> Result<Prepared> {
    let path = source.store.tmp().join(format!("device-{}-{}", source.render, device.name));
    let (file, mut prepared) = empty(path, size_bytes)?;
    match &device.content {
        Content::Empty => {}
        Content::Seed(spec) => {
            let inputs =
                cloud_seed::Inputs { spec, config: source.config, identity: source.identity, instance_uuid: source.instance_uuid, macs: source.macs };
            let volume = cloud_seed::volume(&inputs).map_err(|error| error.under_field(&device.field))?;
            prepared.patch = fat::build(size_bytes, &volume).map_err(|error| error.under_field(&device.field))?;
        }
        Content::Swap { label } => prepared.patch.insert(0, swap_header(size_bytes, uuid, label).into()),
        Content::Filesystem { kind, label, profile, bytes_per_inode } => {
            let params = BuildParams {
                uuid: uuid.into_bytes(),
                hash_seed: Uuid::new_v5(&uuid, b"hash-seed").into_bytes(),
                label: label.clone(),
                profile: profile.unwrap_or(source.profile),
                epoch_secs: source.now.secs,
                bytes_per_inode: *bytes_per_inode,
            };
            // A block device may have any number of sectors; a filesystem has whole blocks.
            let region = Region { file: Arc::new(file), offset: 0, len: size_bytes };
            let mut builder = filesystem(*kind).builder(&params, region, progress)?;
            fill(device, *kind, source, &mut *builder, progress)?;
            builder.finish()?;
            prepared.filesystem = Some(Filesystem { kind: *kind, uuid: uuid.to_string(), label: label.clone(), offset_bytes: 0, size_bytes });
        }
    }
    Ok(prepared)
}

fn empty(path: PathBuf, size_bytes: u64) -> Result<(File, Prepared)> {
    let failed = |doing: &'static str, path: &Path, error: io::Error| Error::io(Stage::Target, path.display().to_string(), doing, error);
    let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(|error| failed("create", &path, error))?;
    // From here on dropping removes the file.
    let disk = GoldenDisk { path, size_bytes, digest: Digest::of(b"") };
    let prepared = Prepared { disk, patch: BlockPatch::new(size_bytes), filesystem: None };
    file.set_len(size_bytes).map_err(|error| failed("set the size", &prepared.disk.path, error))?;
    Ok((file, prepared))
}

/// The root directory, and what the image has at the persistent paths.
fn fill(device: &ResolvedDevice, kind: FsKind, source: &Source<'_>, builder: &mut dyn TreeBuilder, progress: &Progress) -> Result<()> {
    let root = GuestPath::root();
    let meta = Meta { mode: 0o755, mtime: source.now, ..Meta::default() };
    let directory = |path: &GuestPath| Entry { path: path.clone(), kind: EntryKind::Directory, meta: meta.clone() };
    builder.entry(&directory(&root), &mut io::empty())?;
    if device.persistent.is_empty() {
        return Ok(());
    }
    let Some(image) = source.golden else {
        let why = format!("what is at the persistent paths can only be moved from an ext4 root to the {} device", kind.name());
        return Err(Error::new(Kind::Unsupported, Stage::Target, device.field.clone(), why).with_reason("PERSISTENT_NEEDS_EXT4"));
    };
    match persistent_layout(&device.persistent, Some(image))? {
        PersistentLayout::Direct(path) => {
            image.copy_tree(&path, &root, builder, progress)?;
        }
        PersistentLayout::Bound(paths) => {
            for path in paths {
                if image.copy_tree(&path, &path, builder, progress)?.is_none() {
                    builder.entry(&directory(&path), &mut io::empty())?;
                }
            }
        }
    }
    Ok(())
}

/// The first page of swap space: `union swap_header` of include/linux/swap.h, version 1, little endian, as mkswap(8) writes it.
fn swap_header(size_bytes: u64, uuid: Uuid, label: &str) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    // A count of pages has 32 bits; the kernel uses no more than it can address anyway.
    let last_page = u32::try_from(size_bytes / PAGE as u64 - 1).unwrap_or(u32::MAX);
    page[1024..1028].copy_from_slice(&1u32.to_le_bytes());
    page[1028..1032].copy_from_slice(&last_page.to_le_bytes());
    page[1036..1052].copy_from_slice(uuid.as_bytes());
    page[1052..1052 + label.len()].copy_from_slice(label.as_bytes());
    page[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    page
}

/// The size of a device whose size nobody gave: that of the block device, in whole blocks.
pub fn size_of(device: &ResolvedDevice) -> Result<u64> {
    match device.size_bytes {
        Some(size) => Ok(size),
        None => Ok(crate::target::block::size_bytes(&device.pool, &device.volume)? / PATCH_BLOCK * PATCH_BLOCK),
    }
}

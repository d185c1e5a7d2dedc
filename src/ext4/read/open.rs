//! Opening: the superblock is read and checked; features outside the supported set are refused by name.

use std::{cell::RefCell, collections::BTreeMap, collections::HashMap};

use super::{Image, Sums, unsupported};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        csum,
        layout::{
            compat, corrupt,
            geometry::Geometry,
            incompat, ro_compat,
            superblock::{CHECKSUM_CRC32C, OFFSET, STATE_ERROR, STATE_VALID, Superblock},
        },
    },
    fs::View,
};

/// What the superblock is called in messages.
const OBJECT: &str = "ext4 superblock";

/// Incompatible features that are handled. `recover` and the ones below are refused by name.
const INCOMPAT_READ: u32 =
    incompat::FILETYPE | incompat::EXTENTS | incompat::BIT64 | incompat::FLEX_BG | incompat::CSUM_SEED | incompat::LARGEDIR | incompat::MMP;

const INCOMPAT_NAMES: [(u32, &str); 11] = [
    (0x1, "compression"),
    (incompat::RECOVER, "a journal that needs recovery (needs_recovery)"),
    (incompat::JOURNAL_DEV, "an external journal device (journal_dev)"),
    (incompat::META_BG, "meta_bg"),
    (incompat::EA_INODE, "ea_inode"),
    (incompat::DIRDATA, "dirdata"),
    (incompat::INLINE_DATA, "inline_data"),
    (incompat::ENCRYPT, "encrypt"),
    (incompat::CASEFOLD, "casefold"),
    (incompat::MMP, "mmp"),
    (incompat::LARGEDIR, "large_dir"),
];

/// Read-only compatible features that the editor keeps right.
const RO_COMPAT_EDIT: u32 = ro_compat::SPARSE_SUPER
    | ro_compat::LARGE_FILE
    | 0x4 // btree_dir, set by nothing since 2001
    | ro_compat::HUGE_FILE
    | ro_compat::GDT_CSUM
    | ro_compat::DIR_NLINK
    | ro_compat::EXTRA_ISIZE
    | ro_compat::METADATA_CSUM;

const RO_COMPAT_NAMES: [(u32, &str); 9] = [
    (0x80, "snapshot"),
    (ro_compat::QUOTA, "quota"),
    (ro_compat::BIGALLOC, "bigalloc"),
    (0x800, "replica"),
    (ro_compat::READONLY, "read-only"),
    (ro_compat::PROJECT, "project"),
    (0x4000, "shared_blocks"),
    (ro_compat::VERITY, "verity"),
    (ro_compat::ORPHAN_PRESENT, "a non-empty orphan file (orphan_present)"),
];

pub(super) fn open(view: View) -> Result<Image> {
    if view.len < OFFSET + Superblock::SIZE as u64 {
        return Err(corrupt(OBJECT, format!("does not fit a region of {} bytes", view.len)));
    }
    let mut raw = [0; Superblock::SIZE];
    view.disk.read_all_at(&mut raw, view.offset + OFFSET).map_err(|error| Error::io(Stage::Edit, OBJECT, "reading 1024 bytes", error))?;
    let sb = Superblock::parse(&raw)?;
    refuse_unknown(&sb)?;
    let sums = if sb.has_ro_compat(ro_compat::METADATA_CSUM) {
        if sb.checksum_type != CHECKSUM_CRC32C {
            return Err(unsupported(OBJECT, format!("checksum type {}", sb.checksum_type)));
        }
        let sum = csum::superblock(&raw);
        if sum != sb.checksum {
            return Err(corrupt(OBJECT, format!("has checksum {:#010x}, computed {sum:#010x}", sb.checksum)));
        }
        Sums::Metadata
    } else if sb.has_ro_compat(ro_compat::GDT_CSUM) {
        Sums::Groups
    } else {
        Sums::None
    };
    let seed = if sb.has_incompat(incompat::CSUM_SEED) { sb.checksum_seed } else { csum::seed_of(&sb.uuid) };
    let geo = Geometry::of(&sb)?;
    if geo.block_size > 4096 {
        return Err(unsupported(OBJECT, format!("a block size of {}", geo.block_size)));
    }
    if geo.blocks_count > view.len / u64::from(geo.block_size) {
        return Err(corrupt(OBJECT, format!("has {} blocks of {} bytes in a region of {} bytes", geo.blocks_count, geo.block_size, view.len)));
    }
    check_shape(&geo)?;
    Ok(Image { view, sb, geo, sums, seed, cache: RefCell::new(HashMap::new()), overlay: BTreeMap::new() })
}

/// What later arithmetic relies on beyond what [`Geometry::of`] checks.
fn check_shape(geo: &Geometry) -> Result<()> {
    // A bitmap's checksum covers whole bytes, and groups are handled as such (mke2fs makes multiples of 8 only).
    if !geo.blocks_per_group.is_multiple_of(8) || !geo.inodes_per_group.is_multiple_of(8) {
        return Err(corrupt(
            OBJECT,
            format!("has {} blocks and {} inodes per group, not multiples of 8", geo.blocks_per_group, geo.inodes_per_group),
        ));
    }
    // The first group must hold the descriptor table.
    let base = u64::from(geo.base_blocks_in(0));
    if base > u64::from(geo.blocks_per_group) || u64::from(geo.first_data_block) + base > geo.blocks_count {
        return Err(corrupt(OBJECT, format!("has {base} blocks of descriptors, more than group 0 holds")));
    }
    Ok(())
}

fn refuse_unknown(sb: &Superblock) -> Result<()> {
    let unknown = sb.feature_incompat & !INCOMPAT_READ;
    if let Some((_, name)) = INCOMPAT_NAMES.iter().find(|(bit, _)| unknown & bit != 0) {
        return Err(unsupported(OBJECT, *name));
    }
    if unknown != 0 {
        return Err(unsupported(OBJECT, format!("incompatible feature bit {:#x}", unknown & unknown.wrapping_neg())));
    }
    // Clusters change what a bit of a bitmap means: not even free space could be read.
    if sb.has_ro_compat(ro_compat::BIGALLOC) {
        return Err(unsupported(OBJECT, "bigalloc"));
    }
    Ok(())
}

pub(super) fn check_editable(sb: &Superblock) -> Result<()> {
    let unknown = sb.feature_ro_compat & !RO_COMPAT_EDIT;
    if let Some((_, name)) = RO_COMPAT_NAMES.iter().find(|(bit, _)| unknown & bit != 0) {
        return Err(unsupported(OBJECT, format!("editing with {name}")));
    }
    if unknown != 0 {
        return Err(unsupported(OBJECT, format!("editing with read-only compatible feature bit {:#x}", unknown & unknown.wrapping_neg())));
    }
    if sb.has_incompat(incompat::MMP) {
        return Err(unsupported(OBJECT, "editing with mmp"));
    }
    if sb.has_compat(compat::STABLE_INODES) {
        return Err(unsupported(OBJECT, "editing with stable_inodes"));
    }
    let dirty = |what: &str| {
        Err(Error::new(Kind::Conflict, Stage::Edit, OBJECT, what.to_owned())
            .with_reason("EXT4_NOT_CLEAN")
            .with_hint("check it with e2fsck, or build the golden image again"))
    };
    if sb.state & STATE_ERROR != 0 || sb.error_count != 0 {
        return dirty("records errors in the filesystem");
    }
    if sb.state & STATE_VALID == 0 {
        return dirty("was not cleanly unmounted");
    }
    if sb.last_orphan != 0 {
        return dirty("has orphaned inodes");
    }
    Ok(())
}

//! The ext4 engine: formats a tree of entries into a disk region and computes edits, in safe Rust, without mounting anything.
//!
//! ```text
//! layout/   on-disk structures, constants and the geometry; shared by everything below
//! csum.rs   checksums (crc32c for metadata_csum, crc16 for uninit_bg)     hash.rs   directory hashes
//! profile   which features a new filesystem has, and why
//! format/   entries in archive order -> filesystem, one pass              read/     lookups in an existing image
//! edit/     a list of edits -> the blocks that change (never writes)
//! ```
//!
//! Multi-byte fields are little endian except in the journal (jbd2 is big endian). Everything read from an image is checked before use: an
//! image is foreign data.

pub mod csum;
pub mod edit;
pub mod format;
pub mod hash;
pub mod layout;
pub mod profile;
pub mod read;

use crate::{
    error::Result,
    fs::{BuildParams, Filesystem, FsKind, Region, TreeBuilder, edit::EditRequest, patch::BlockPatch},
    progress::Progress,
};

/// ext4, written and edited in user space.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ext4;

impl Filesystem for Ext4 {
    fn kind(&self) -> FsKind {
        FsKind::Ext4
    }

    fn size_min(&self) -> u64 {
        format::SIZE_MIN
    }

    fn builder(&self, params: &BuildParams, region: Region, progress: &Progress) -> Result<Box<dyn TreeBuilder>> {
        format::builder(params, region, progress)
    }

    fn edit(&self, region: Region, request: &EditRequest, progress: &Progress) -> Result<BlockPatch> {
        edit::edit(&region, request, progress)
    }
}

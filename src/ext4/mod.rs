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
    error::{Kind, Result},
    ext4::read::Image,
    fs::{BuildParams, Filesystem, FsKind, Region, TreeBuilder, TreeReader, edit::EditRequest, patch::BlockPatch},
    names::GuestPath,
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
    fn tree(&self, region: &Region) -> Result<Box<dyn TreeReader>> {
        Ok(Box::new(Image::open(region)?))
    }
}

impl TreeReader for Image {
    fn read(&self, path: &str, len_max: u64) -> Result<Option<Vec<u8>>> {
        let Ok(path) = GuestPath::new(path) else { return Ok(None) };
        match self.resolve(&path) {
            Ok(Some(ino)) if self.stat(ino)?.is_file() => self.read_file(ino, len_max).map(Some),
            Ok(_) => Ok(None),
            // A loop of links in the image is no file.
            Err(error) if error.kind() == Kind::Conflict => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        let Ok(path) = GuestPath::new(path) else { return Ok(Vec::new()) };
        let ino = match self.resolve(&path) {
            Ok(Some(ino)) if self.stat(ino)?.is_dir() => ino,
            Ok(_) => return Ok(Vec::new()),
            Err(error) if error.kind() == Kind::Conflict => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names: Vec<String> = self.read_dir(ino)?.into_iter().filter_map(|item| String::from_utf8(item.name).ok()).collect();
        names.sort_unstable();
        Ok(names)
    }
}

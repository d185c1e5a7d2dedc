//! Editing: a list of edits becomes the blocks that change. Only the golden is read, nothing is written.
//!
//! ```text
//! Editor           an Image whose changed blocks lie over the golden, plus the state of the groups touched so far
//!  ├─ ops.rs       the edits themselves: write, append, mkdir, symlink, remove, attributes, rename
//!  ├─ names.rs     directory entries: insert, delete, replace, new directory blocks
//!  ├─ htree.rs     indexed directories: leaf and index splits, conversion of a full linear directory
//!  ├─ inodes.rs    making, writing and freeing inodes
//!  ├─ content.rs   data blocks of files: new, appended, freed
//!  ├─ maps.rs      writing extent trees and indirect blocks
//!  ├─ xattrs.rs    extended attributes
//!  ├─ alloc.rs     block and inode bitmaps, group by group
//!  ├─ identity.rs  UUID, label and what depends on them
//!  ├─ resum.rs     every checksum of a filesystem, when the seed changes
//!  ├─ grow/        more blocks and groups
//!  └─ commit.rs    bitmap, descriptor and superblock checksums; the overlay as a patch
//! ```
//!
//! The order is: grow (so that edits have the room), the edits one after another, then UUID and label, then commit. The journal is not
//! involved: the golden's is empty, and a patch is applied to a volume that nobody has mounted. All checksums except those of bitmaps,
//! descriptors and superblock are right after each step; those three are computed once at the end. Everything is deterministic: block and
//! inode numbers follow from the golden and the request, times come from the request, generations of new inodes from both.
//!
//! Cost: a fixed number of blocks per edit (the inode-table block, the directory leaf, bitmaps and descriptors of the groups touched) and one
//! block per 4 KiB of content. Group descriptors and bitmaps are read when a group is first considered.

mod alloc;
mod commit;
mod content;
mod grow;
mod htree;
mod identity;
mod inodes;
mod maps;
mod names;
mod ops;
mod resum;
mod xattrs;

use std::{collections::BTreeMap, sync::Arc};

use super::{layout::inode::clamp_time, read::Image};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{
        Region, View,
        edit::{Edit, EditRequest},
        patch::BlockPatch,
    },
    progress::Progress,
    units::Timestamp,
};

/// Computes the blocks that `request` changes in the filesystem of `region`; block 0 of the patch is the region's first.
///
/// `Kind::Unsupported` names a feature that is not handled; `Kind::Corrupt` what is wrong with the image; `Kind::NoSpace` what ran out (blocks,
/// inodes, room in an index, reserved descriptor blocks for growth); `Kind::NotFound`, `Kind::Conflict` and `Kind::InvalidRequest` which edit
/// does not apply and why. After an error there is no patch: edits are all or nothing. Cancellation is checked between edits.
pub fn edit(region: &Region, request: &EditRequest, progress: &Progress) -> Result<BlockPatch> {
    edit_view(View::from(region), request, progress)
}

/// The same for a filesystem on any disk that can be read.
pub fn edit_view(view: View, request: &EditRequest, progress: &Progress) -> Result<BlockPatch> {
    progress.check()?;
    let mut editor = Editor::new(view, request.now)?;
    if let Some(size_bytes) = request.size_bytes {
        editor.grow(size_bytes)?;
    }
    for edit in &request.edits {
        progress.check()?;
        editor.apply(edit)?;
    }
    progress.check()?;
    editor.set_identity(request.uuid, request.label.as_deref())?;
    editor.commit()?;
    editor.into_patch(request.size_bytes)
}

/// The state of one edit request.
pub(crate) struct Editor {
    pub(crate) image: Image,
    /// Groups touched so far.
    groups: BTreeMap<u32, alloc::Group>,
    /// Stamped on everything touched.
    now: Timestamp,
    /// Inodes made so far; goes into their generations.
    inodes_made: u32,
    /// What the backups of superblock and descriptors need in the end.
    backups: Backups,
}

/// Which backups must be written at commit. Counts change without them, as in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Backups {
    /// None.
    Keep,
    /// Superblocks (label or UUID changed).
    Super,
    /// Superblocks and descriptor tables (descriptors or their checksums changed for good).
    Tables,
}

impl Editor {
    fn new(view: View, now: Timestamp) -> Result<Editor> {
        let image = Image::open_view(view)?;
        image.check_editable()?;
        Ok(Editor { image, groups: BTreeMap::new(), now: clamp_time(now), inodes_made: 0, backups: Backups::Keep })
    }

    /// Applies one edit; an error names its path.
    fn apply(&mut self, edit: &Edit) -> Result<()> {
        self.apply_op(&edit.path, &edit.op).map_err(|error| {
            if error.object().starts_with('/') {
                return error;
            }
            // The cause names an inode or a block; what the caller knows is the path.
            let mut named =
                Error::new(error.kind(), error.stage(), edit.path.to_string(), format!("can't {}", edit.op.verb())).with_reason(error.reason());
            if let Some(hint) = error.hint() {
                named = named.with_hint(hint);
            }
            named.with_source(error)
        })
    }

    /// A block of the overlay to change in place; taken from the golden the first time.
    fn block_mut(&mut self, number: u64) -> Result<&mut [u8]> {
        if !self.image.overlay.contains_key(&number) {
            let block = self.image.block(number)?;
            self.image.overlay.insert(number, block);
        }
        let block = self.image.overlay.get_mut(&number).expect("it was just put there");
        Ok(Arc::make_mut(block))
    }

    /// A whole new block.
    fn put_block(&mut self, number: u64, mut data: Vec<u8>) {
        data.resize(self.image.block_size(), 0);
        self.image.overlay.insert(number, data.into());
    }
}

/// `Kind::NoSpace`.
fn no_space(object: impl Into<String>, message: impl Into<String>) -> Error {
    Error::new(Kind::NoSpace, Stage::Edit, object, message)
}

#[cfg(test)]
mod tests;

//! Study: the part of a reconfiguration that reads what a guest has written.
//!
//! The filesystem is the guest's: it may have been made, byte by byte, for whoever reads it (failures.md, 5). It is read by our own ext4 reader and editor, in
//! a process that can do nothing else (`crate::worker`); the disk's bytes are handed to it, so that it does not have the volume open either.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        edit::edit_view,
        layout::{
            incompat,
            superblock::{OFFSET as SUPERBLOCK_AT, Superblock},
        },
        read::Image,
    },
    fs::{ReadAt, View, edit::EditRequest, patch::BlockPatch},
    guest::{facts::GuestFacts, from_image::facts_of_image, watch::Watch},
    names::GuestPath,
    progress::Progress,
};

/// Where a root filesystem is, and which it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The disk's name in errors.
    pub object: String,
    /// Where it starts on the disk, bytes; a multiple of 4096.
    pub offset: u64,
    /// How far it may reach, bytes.
    pub len: u64,
    /// Its UUID when it was made.
    pub uuid: String,
    /// Size of the disk, bytes.
    pub disk_len: u64,
}

/// The root filesystem, when it is clean and the one that was made.
///
/// `Conflict`: `ROOT_CHANGED`, `JOURNAL_DIRTY`, `EXT4_NOT_CLEAN`.
pub fn open(disk: Arc<dyn ReadAt>, root: &Root) -> Result<(View, Image)> {
    let object = root.object.as_str();
    let changed = |why: String| Error::new(Kind::Conflict, Stage::Edit, object, why).with_reason("ROOT_CHANGED");
    let view = View { disk, offset: root.offset, len: root.len };
    let mut raw = [0; Superblock::SIZE];
    view.disk
        .read_all_at(&mut raw, view.offset.saturating_add(SUPERBLOCK_AT))
        .map_err(|error| Error::io(Stage::Edit, object, "read the root filesystem's superblock", error))?;
    let superblock = Superblock::parse(&raw).map_err(|error| changed("has no ext4 filesystem where its root was".into()).with_source(error))?;
    if superblock.has_incompat(incompat::RECOVER) {
        return Err(Error::new(Kind::Conflict, Stage::Edit, object, "the root filesystem's journal needs recovery: the guest was not shut down")
            .with_reason("JOURNAL_DIRTY")
            .with_hint("start the instance and shut it down, or run e2fsck on its root"));
    }
    let uuid = uuid::Uuid::from_bytes(superblock.uuid).to_string();
    if uuid != root.uuid {
        return Err(changed(format!("the root filesystem has UUID {uuid}, the one that was made has {}", root.uuid)));
    }
    let image = Image::open_view(view.clone())?;
    image.check_editable().map_err(not_clean)?;
    Ok((view, image))
}

/// What injection has to know of the tree.
pub fn facts(image: &Image, watched: &[GuestPath], progress: &Progress) -> Result<GuestFacts> {
    facts_of_image(image, &Watch::new(watched), progress)
}

/// The blocks of the root filesystem that change.
pub fn edit(view: View, request: &EditRequest, progress: &Progress) -> Result<BlockPatch> {
    edit_view(view, request, progress).map_err(not_clean)
}

/// The editor's hints are about golden images.
fn not_clean(error: Error) -> Error {
    match error.reason() {
        "EXT4_NOT_CLEAN" => error.with_hint("start the instance and shut it down, or run e2fsck on its root"),
        _ => error,
    }
}

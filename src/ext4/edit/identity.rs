//! UUID and label, in the superblock and its backups, as `tune2fs -U` and `tune2fs -L` set them.
//!
//! What a new UUID costs depends on what is derived from it: nothing but superblocks without checksums and with `metadata_csum_seed`; all group
//! descriptors with `uninit_bg`; every checksum of the filesystem with `metadata_csum` alone (see `resum`). The journal's superblock holds a
//! UUID only for external journals, so tune2fs leaves an internal one alone, and so does this.

use super::{Backups, Editor};
use crate::{
    error::{Error, Result, Stage},
    ext4::{layout::incompat, read::Sums},
};

/// Longest label, bytes.
const LABEL_MAX: usize = 16;

impl Editor {
    pub(super) fn set_identity(&mut self, uuid: Option<[u8; 16]>, label: Option<&str>) -> Result<()> {
        if let Some(label) = label {
            if label.len() > LABEL_MAX || label.contains('\0') {
                return Err(Error::field(Stage::Edit, "label", format!("{label:?} is not a label of at most {LABEL_MAX} bytes without NUL")));
            }
            let mut name = [0; LABEL_MAX];
            name[..label.len()].copy_from_slice(label.as_bytes());
            if name != self.image.sb.volume_name {
                self.image.sb.volume_name = name;
                self.backups = self.backups.max(Backups::Super);
            }
        }
        let Some(uuid) = uuid.filter(|uuid| *uuid != self.image.sb.uuid) else { return Ok(()) };
        match self.image.sums {
            Sums::None => {}
            Sums::Groups => {
                // Each is read, and its old checksum verified, before the UUID changes.
                for group in 0..self.image.geo.groups {
                    self.group(group)?.dirty = true;
                }
                self.backups = Backups::Tables;
            }
            Sums::Metadata if self.image.sb.has_incompat(incompat::CSUM_SEED) => {}
            Sums::Metadata => {
                self.resum(crate::ext4::csum::seed_of(&uuid))?;
                self.backups = Backups::Tables;
            }
        }
        self.image.sb.uuid = uuid;
        self.backups = self.backups.max(Backups::Super);
        Ok(())
    }
}

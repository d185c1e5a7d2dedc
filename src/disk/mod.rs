//! Disks: where the filesystem lies, and the partition table around it.
//!
//! ```text
//! bare   | filesystem ....................................................... |
//! gpt    | MBR GPT | p14 BIOS boot | p15 ESP | p1 root ............. | GPT'   |
//!        0         1 MiB           2 MiB     66 MiB         end − 1 MiB     end      (ESP of the usual size)
//! ```
//!
//! A hybrid disk has in its MBR, besides what protects the table, the root as a partition of its own.
//!
//! The root is partition 1, as Debian's cloud images have it, and lies last so that it can grow: an instance with a larger disk gets the backup
//! table at the new end and a longer root, and nothing else moves. Sectors have 512 bytes; every partition starts at a multiple of 1 MiB and
//! has a length that is a multiple of 4096, so that the disk is as good on storage with 4 KiB sectors. All GUIDs are inputs, nothing here draws
//! one: the same inputs give the same bytes. The first 440 bytes of the disk (boot code) and the contents of the BIOS boot and ESP partitions
//! belong to the boot loaders and are kept as they are.

pub mod fat;
mod gpt;
mod image;
#[cfg(test)]
mod tests;
pub mod types;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{Region, patch::BlockPatch},
    mapping::Partition,
    units::{Bytes, MIB, PATCH_BLOCK},
};

/// Bytes per logical sector of a rendered disk.
pub const SECTOR: u64 = 512;
/// Every partition starts at a multiple of this, bytes: erase blocks, RAID stripes and 4 KiB sectors divide it.
pub const ALIGNMENT: u64 = MIB;
/// Size of the BIOS boot partition, bytes. GRUB's core image has 125 to 200 KB; one alignment unit is the least that can be given.
pub const BIOS_BOOT_SIZE: u64 = MIB;
/// Size of the EFI system partition when nobody says, bytes: room for two boot loaders and a kernel with its initrd, and enough 512-byte clusters (65525) for
/// FAT32. Also the least.
pub const ESP_SIZE: u64 = 64 * MIB;
/// The largest EFI system partition, bytes: room for a dozen kernels with their initrds. It is made in memory, of which only what holds data is taken.
pub const ESP_SIZE_MAX: u64 = 1024 * MIB;
/// Where the EFI system partition starts on a disk with a partition table, bytes.
const ESP_OFFSET: u64 = ALIGNMENT + BIOS_BOOT_SIZE;
/// What is left free after the root partition for the backup table (33 sectors), bytes: a whole alignment unit, so that on a disk of whole MiB the
/// root also ends at a multiple of 1 MiB, as partitioning tools want it.
pub const GPT_TAIL: u64 = ALIGNMENT;
/// Number of the root partition in the table.
pub const ROOT_NUMBER: u32 = 1;
/// Number of the BIOS boot partition in the table.
pub const BIOS_BOOT_NUMBER: u32 = 14;
/// Number of the EFI system partition in the table.
pub const ESP_NUMBER: u32 = 15;

/// How a disk is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// The filesystem is the whole device: Xen PV, microVMs, direct kernel boot.
    #[default]
    Bare,
    /// GPT: BIOS boot partition, EFI system partition, root last so that it can grow.
    Gpt,
    /// The same with the root, active, in the MBR too: for firmware that starts a disk only if its MBR has such a partition. At most 2 TiB.
    Hybrid,
}

impl Layout {
    /// Whether there is a partition table.
    pub fn is_partitioned(self) -> bool {
        self != Layout::Bare
    }
}

/// Sectors that an MBR can count.
const MBR_SECTORS_MAX: u64 = 1 << 32;

/// The GUIDs of a disk with a partition table, in the byte order they are written in as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiskIds {
    /// The disk's own.
    pub disk: Uuid,
    /// Of the root partition (`PARTUUID=`).
    pub root: Uuid,
    /// Of the EFI system partition.
    pub esp: Uuid,
    /// Of the BIOS boot partition.
    pub bios_boot: Uuid,
}

impl DiskIds {
    /// Derives the four from one (UUIDv5): the same identity gives the same GUIDs.
    pub fn derived(identity: Uuid) -> Self {
        let of = |name: &str| Uuid::new_v5(&identity, name.as_bytes());
        DiskIds { disk: of("disk"), root: of("partition-root"), esp: of("partition-esp"), bios_boot: of("partition-bios-boot") }
    }
}

/// A part of a disk, bytes from its start; both are multiples of 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// Where everything on a disk is. A value of this type is consistent: partitions do not overlap and fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    layout: Layout,
    size_bytes: u64,
    esp_bytes: u64,
    root_type: Uuid,
    ids: DiskIds,
}

impl DiskPlan {
    /// Plans a disk of `size_bytes` (a multiple of 4096) with an ESP of `esp_bytes` (whole MiB from [`ESP_SIZE`] to [`ESP_SIZE_MAX`]). `root_type` is the root partition's type GUID, see [`types::root_of`]; it and `ids` do
    /// not matter for [`Layout::Bare`]. `Kind::InvalidRequest` for a size that is not aligned, too small for the layout, or beyond 8 EiB.
    pub fn new(layout: Layout, size_bytes: u64, esp_bytes: u64, root_type: Uuid, ids: DiskIds) -> Result<Self> {
        let refuse = |why: String| Err(Error::field(Stage::Golden, "disk.size_bytes", why));
        if !size_bytes.is_multiple_of(PATCH_BLOCK) {
            return refuse(format!("a disk's size is a multiple of {PATCH_BLOCK} bytes, {size_bytes} is not"));
        }
        if !esp_bytes.is_multiple_of(ALIGNMENT) || !(ESP_SIZE..=ESP_SIZE_MAX).contains(&esp_bytes) {
            let (least, most) = (Bytes(ESP_SIZE), Bytes(ESP_SIZE_MAX));
            return Err(Error::field(Stage::Golden, "disk.esp_size", format!("{esp_bytes} bytes are not whole MiB from {least} to {most}")));
        }
        let size_min = Self::overhead(layout, esp_bytes) + PATCH_BLOCK;
        if size_bytes < size_min {
            return refuse(format!("a disk with this layout has at least {size_min} bytes, this has {size_bytes}"));
        }
        if i64::try_from(size_bytes).is_err() {
            return refuse(format!("a file has at most {} bytes, the disk would have {size_bytes}", i64::MAX));
        }
        if layout == Layout::Hybrid && size_bytes / SECTOR > MBR_SECTORS_MAX {
            return refuse(format!("a hybrid MBR reaches {}, the disk has {}", Bytes(MBR_SECTORS_MAX * SECTOR), Bytes(size_bytes)));
        }
        if layout.is_partitioned() {
            let all = [ids.disk, ids.root, ids.esp, ids.bios_boot];
            if all.iter().any(Uuid::is_nil) || (1..all.len()).any(|i| all[..i].contains(&all[i])) {
                return Err(Error::internal(Stage::Golden, "disk", "the GUIDs of a disk and its partitions have to be set and different"));
            }
        }
        Ok(DiskPlan { layout, size_bytes, esp_bytes, root_type, ids })
    }

    /// Bytes that a layout takes beside the root filesystem. The disk for a filesystem of `n` bytes (a multiple of 4096) has `n + overhead`.
    pub fn overhead(layout: Layout, esp_bytes: u64) -> u64 {
        match layout {
            Layout::Bare => 0,
            Layout::Gpt | Layout::Hybrid => ESP_OFFSET + esp_bytes + GPT_TAIL,
        }
    }

    /// How the disk is laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Size of the disk, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The identities it was planned with.
    pub fn ids(&self) -> &DiskIds {
        &self.ids
    }

    /// Where the root filesystem is.
    pub fn root(&self) -> Extent {
        let offset = match self.layout {
            Layout::Bare => 0,
            Layout::Gpt | Layout::Hybrid => ESP_OFFSET + self.esp_bytes,
        };
        Extent { offset, len: self.size_bytes - Self::overhead(self.layout, self.esp_bytes) }
    }

    /// Where the BIOS boot partition is, if there is one. The boot loader's image goes there as it is.
    pub fn bios_boot(&self) -> Option<Extent> {
        self.layout.is_partitioned().then_some(Extent { offset: ALIGNMENT, len: BIOS_BOOT_SIZE })
    }

    /// Where the EFI system partition is, if there is one. It reads as zeros until a boot loader's file system is put there.
    pub fn esp(&self) -> Option<Extent> {
        self.layout.is_partitioned().then_some(Extent { offset: ESP_OFFSET, len: self.esp_bytes })
    }

    /// `gpt`, or nothing for a bare filesystem; as `mapping::Device::partition_table` has it.
    pub fn partition_table(&self) -> Option<&'static str> {
        self.layout.is_partitioned().then_some("gpt")
    }

    /// The disk's GUID in text, if it has one; as `mapping::Device::disk_uuid` has it.
    pub fn disk_uuid(&self) -> Option<String> {
        self.layout.is_partitioned().then(|| self.ids.disk.hyphenated().to_string())
    }

    /// The partitions in table order; none for a bare filesystem.
    pub fn describe(&self) -> Vec<Partition> {
        let (Some(bios_boot), Some(esp)) = (self.bios_boot(), self.esp()) else { return Vec::new() };
        let partition = |number, extent: Extent, type_uuid: Uuid, uuid: Uuid, name: &str| Partition {
            number,
            offset_bytes: extent.offset,
            size_bytes: extent.len,
            type_uuid: type_uuid.hyphenated().to_string(),
            uuid: uuid.hyphenated().to_string(),
            name: name.to_owned(),
        };
        vec![
            partition(ROOT_NUMBER, self.root(), self.root_type, self.ids.root, "root"),
            partition(BIOS_BOOT_NUMBER, bios_boot, types::BIOS_BOOT, self.ids.bios_boot, "bios-boot"),
            partition(ESP_NUMBER, esp, types::ESP, self.ids.esp, "esp"),
        ]
    }

    /// Writes the partition table (protective MBR, both copies of the GPT) into `disk`, a file of the planned size opened for reading and writing,
    /// whose other bytes stay as they are. Does nothing for a bare filesystem. Durability is the caller's.
    pub fn write_table(&self, disk: &Region) -> Result<()> {
        use std::os::unix::fs::FileExt;
        if disk.len != self.size_bytes {
            return Err(Error::internal(Stage::Golden, "disk", format!("the disk has {} bytes, the plan {}", disk.len, self.size_bytes)));
        }
        if self.layout == Layout::Bare {
            return Ok(());
        }
        let patch = gpt::create(self, disk)?;
        for (number, block) in patch.iter() {
            let offset = disk.offset + number * PATCH_BLOCK;
            disk.file
                .write_all_at(block, offset)
                .map_err(|error| Error::io(Stage::Golden, "disk", format!("write the partition table at {offset}"), error))?;
        }
        Ok(())
    }

    /// The changed blocks of `golden` (the whole golden disk, same layout) for a disk of this plan's size and identities whose root filesystem
    /// changes by `root` (block 0 is the filesystem's first; as [`crate::fs::Filesystem::edit`] gives it).
    ///
    /// A larger disk gets its backup table at the new end, the place of the old one is cleared since it now lies in the root partition, and the
    /// root partition is extended. `Kind::Corrupt` when the golden's table is not one that [`DiskPlan::write_table`] made, `Kind::InvalidRequest`
    /// for a disk smaller than the golden or than the filesystem. Only reads.
    pub fn patch(&self, golden: &Region, root: BlockPatch) -> Result<BlockPatch> {
        if self.size_bytes < golden.len {
            let text = format!("a disk of {} can't hold a golden image of {}", Bytes(self.size_bytes), Bytes(golden.len));
            return Err(Error::field(Stage::Edit, "disk.size_bytes", text));
        }
        let extent = self.root();
        if root.size_bytes() > extent.len {
            let text = format!("the filesystem has {} bytes, its place on the disk {}", root.size_bytes(), extent.len);
            return Err(Error::new(Kind::NoSpace, Stage::Edit, "disk", text));
        }
        if let Some((last, _)) = root.iter().next_back()
            && last >= extent.len / PATCH_BLOCK
        {
            return Err(Error::internal(Stage::Edit, "disk", format!("the filesystem's patch changes block {last}, beyond its end")));
        }
        let mut patch = match self.layout {
            Layout::Bare => BlockPatch::new(self.size_bytes),
            Layout::Gpt | Layout::Hybrid => gpt::update(self, golden)?,
        };
        // After the table's blocks: where the old backup table was there may be data of the grown filesystem now.
        patch.merge_at(extent.offset, root);
        Ok(patch)
    }
}

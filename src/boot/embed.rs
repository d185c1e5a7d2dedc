//! Puts boot loaders on a golden disk with a partition table.
//!
//! ```text
//! sector 0             boot.img's code, 440 bytes: loads the first sector of the BIOS boot partition
//! BIOS boot partition  core.img: its first sector holds a list of the sectors that follow
//! ESP                  FAT32: EFI/BOOT/BOOTX64.EFI and what belongs to it
//! ```
//!
//! What `grub-bios-setup` does with a device, done with bytes (GRUB 2.06, util/setup.c and include/grub/i386/pc/boot.h): three fields of the boot
//! sector, three of the core image. No identity of the disk is in any of it: an instance's disk with other UUIDs and another size starts the same way.

use std::os::unix::fs::FileExt;

use crate::{
    boot::loaders::BiosLoader,
    disk::{DiskPlan, Extent, SECTOR},
    error::{Error, Kind, Result, Stage},
    fs::{Region, patch::BlockPatch},
    units::PATCH_BLOCK,
};

/// Bytes of code in the boot sector; behind them are disk signature and partition table.
pub const BOOT_CODE_LEN: usize = 440;
/// GRUB_BOOT_MACHINE_KERNEL_SECTOR: where the core image is, 64-bit sector number.
const KERNEL_SECTOR_AT: usize = 0x5c;
/// GRUB_BOOT_MACHINE_BOOT_DRIVE: 0xff means the drive the firmware started from.
const BOOT_DRIVE_AT: usize = 0x64;
/// GRUB_BOOT_MACHINE_DRIVE_CHECK: a jump over a work-around for firmware that gives a wrong drive number; on hard disks two NOPs.
const DRIVE_CHECK_AT: usize = 0x66;
/// The first entry of the block list at the end of the core image's first sector: 64-bit sector, 16-bit count, 16-bit segment.
const BLOCK_LIST_AT: usize = SECTOR as usize - 12;
/// GRUB_BOOT_MACHINE_KERNEL_SEG (0x800) and the sector that is loaded already.
const FIRST_SEGMENT: u16 = 0x820;

/// Boot code and contents of the BIOS boot partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BiosArea {
    /// The first [`BOOT_CODE_LEN`] bytes of the disk.
    pub boot_code: Vec<u8>,
    /// What the BIOS boot partition starts with, whole sectors.
    pub partition: Vec<u8>,
}

/// Prepares GRUB for a BIOS boot partition at `partition`. `Kind::Corrupt` (reason `BOOT_LOADER_UNKNOWN`) when the images are not what GRUB makes,
/// `Kind::NoSpace` (`BOOT_LOADER_TOO_LARGE`) when the core image does not fit.
pub fn bios_area(loader: &BiosLoader, partition: Extent) -> Result<BiosArea> {
    let unknown = |what: &str| Error::new(Kind::Corrupt, Stage::Golden, "grub", what.to_owned()).with_reason("BOOT_LOADER_UNKNOWN");
    let mut boot_sector = loader.boot_image.clone();
    if boot_sector.len() != SECTOR as usize || boot_sector[510..] != [0x55, 0xaa] {
        return Err(unknown("boot.img is not a boot sector"));
    }
    // A short jump, or what an earlier setup left there.
    if !matches!(boot_sector[DRIVE_CHECK_AT..DRIVE_CHECK_AT + 2], [0xeb, _] | [0x90, 0x90]) {
        return Err(unknown("boot.img has no drive check where GRUB 2 has it"));
    }
    let sector = partition.offset / SECTOR;
    boot_sector[KERNEL_SECTOR_AT..KERNEL_SECTOR_AT + 8].copy_from_slice(&sector.to_le_bytes());
    boot_sector[BOOT_DRIVE_AT] = 0xff;
    boot_sector[DRIVE_CHECK_AT..DRIVE_CHECK_AT + 2].copy_from_slice(&[0x90, 0x90]);
    boot_sector.truncate(BOOT_CODE_LEN);

    let mut core = loader.core_image.clone();
    if core.len() as u64 > partition.len {
        let text = format!("the core image has {} bytes, the BIOS boot partition {}", core.len(), partition.len);
        return Err(Error::new(Kind::NoSpace, Stage::Golden, "grub", text).with_reason("BOOT_LOADER_TOO_LARGE"));
    }
    if core.len() <= SECTOR as usize {
        return Err(unknown("the core image has nothing behind its first sector"));
    }
    core.resize(core.len().next_multiple_of(SECTOR as usize), 0);
    let rest = u16::try_from(core.len() / SECTOR as usize - 1).map_err(|_| unknown("the core image is too large for one block list entry"))?;
    core[BLOCK_LIST_AT..BLOCK_LIST_AT + 8].copy_from_slice(&(sector + 1).to_le_bytes());
    core[BLOCK_LIST_AT + 8..BLOCK_LIST_AT + 10].copy_from_slice(&rest.to_le_bytes());
    core[BLOCK_LIST_AT + 10..BLOCK_LIST_AT + 12].copy_from_slice(&FIRST_SEGMENT.to_le_bytes());
    Ok(BiosArea { boot_code: boot_sector, partition: core })
}

/// Writes boot code and BIOS boot partition into `disk`, whose table is there already. Durability is the caller's.
pub fn write_bios(plan: &DiskPlan, disk: &Region, area: &BiosArea) -> Result<()> {
    let partition = bios_partition(plan)?;
    write(disk, 0, &area.boot_code, "the boot sector")?;
    write(disk, partition.offset, &area.partition, "the BIOS boot partition")
}

/// Writes a FAT volume into the ESP of `disk`, which reads as zeros.
pub fn write_esp(plan: &DiskPlan, disk: &Region, volume: &BlockPatch) -> Result<()> {
    let esp = plan.esp().ok_or_else(|| Error::internal(Stage::Golden, "disk", "a disk without an EFI system partition gets one written"))?;
    if volume.size_bytes() != esp.len {
        return Err(Error::internal(Stage::Golden, "esp", format!("the volume has {} bytes, the partition {}", volume.size_bytes(), esp.len)));
    }
    for (number, block) in volume.iter() {
        write(disk, esp.offset + number * PATCH_BLOCK, block, "the EFI system partition")?;
    }
    Ok(())
}

/// Where the BIOS boot partition is.
pub fn bios_partition(plan: &DiskPlan) -> Result<Extent> {
    plan.bios_boot().ok_or_else(|| Error::internal(Stage::Golden, "disk", "a disk without a BIOS boot partition gets a boot loader"))
}

fn write(disk: &Region, offset: u64, bytes: &[u8], what: &str) -> Result<()> {
    disk.file.write_all_at(bytes, disk.offset + offset).map_err(|error| Error::io(Stage::Golden, "disk", format!("write {what}"), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTITION: Extent = Extent { offset: 1 << 20, len: 1 << 20 };

    fn loader() -> BiosLoader {
        let mut boot_image = vec![0x11; 512];
        boot_image[DRIVE_CHECK_AT..DRIVE_CHECK_AT + 2].copy_from_slice(&[0xeb, 0x05]);
        boot_image[510..].copy_from_slice(&[0x55, 0xaa]);
        BiosLoader { boot_image, core_image: vec![0x22; 1300] }
    }

    #[test]
    fn the_fields_are_where_grub_looks_for_them() {
        let area = bios_area(&loader(), PARTITION).expect("embedded");
        assert_eq!((area.boot_code.len(), area.partition.len()), (440, 1536));
        assert_eq!(area.boot_code[0x5c..0x64], 2048u64.to_le_bytes());
        assert_eq!((area.boot_code[0x64], &area.boot_code[0x66..0x68]), (0xff, &[0x90, 0x90][..]));
        assert_eq!(area.partition[500..508], 2049u64.to_le_bytes());
        assert_eq!(area.partition[508..512], [2, 0, 0x20, 0x08]);
        assert_eq!(area.partition[1299..1302], [0x22, 0, 0]);
    }

    #[test]
    fn what_grub_does_not_make_is_refused() {
        let refused = |change: &dyn Fn(&mut BiosLoader)| {
            let mut loader = loader();
            change(&mut loader);
            bios_area(&loader, PARTITION).expect_err("refused").reason()
        };
        assert_eq!(refused(&|loader| loader.boot_image[511] = 0), "BOOT_LOADER_UNKNOWN");
        assert_eq!(refused(&|loader| loader.boot_image.truncate(100)), "BOOT_LOADER_UNKNOWN");
        assert_eq!(refused(&|loader| loader.boot_image[DRIVE_CHECK_AT] = 0), "BOOT_LOADER_UNKNOWN");
        assert_eq!(refused(&|loader| loader.core_image.truncate(512)), "BOOT_LOADER_UNKNOWN");
        assert_eq!(refused(&|loader| loader.core_image.resize((1 << 20) + 1, 0)), "BOOT_LOADER_TOO_LARGE");
    }
}

//! The partition table's bytes, by `gptman`: UEFI specification 5.3.
//!
//! `gptman` trusts the numbers of a header it reads (counts decide about allocations, positions about subtractions), and falls back to the
//! backup header by itself; so the header is checked here before it is given to it, and an existing table must be exactly one of ours.

use std::io::{self, Seek, SeekFrom, Write};

use gptman::{GPT, GPTPartitionEntry};
use uuid::Uuid;

use super::{DiskPlan, Layout, SECTOR, image::DiskImage, image::read_full_at};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{Region, patch::BlockPatch},
    units::PATCH_BLOCK,
};

/// What a table of ours has: the numbers of the specification's usual table.
const ENTRIES: u32 = 128;
/// Bytes per entry.
const ENTRY_SIZE: u32 = 128;
/// First sector that a partition may have: MBR, header, 32 sectors of entries.
const FIRST_USABLE: u64 = 34;
/// Sectors of entries and header at the end.
const TAIL_SECTORS: u64 = 33;
/// Whole blocks that hold them, on a disk whose size is a multiple of 4096.
const TAIL_BLOCKS: u64 = (TAIL_SECTORS * SECTOR).div_ceil(PATCH_BLOCK);

/// The table of a new disk over what `disk` holds now.
pub(super) fn create(plan: &DiskPlan, disk: &Region) -> Result<BlockPatch> {
    let mut image = DiskImage::new(disk, plan.size_bytes());
    let mut gpt = GPT::new_from(&mut image, SECTOR, plan.ids().disk.to_bytes_le()).map_err(|error| failed(Stage::Golden, "lay out", error))?;
    set(plan, &mut gpt);
    write(plan, &mut gpt, &mut image, Stage::Golden)?;
    image.into_patch().map_err(|error| Error::io(Stage::Golden, "disk", "read the disk for its partition table", error))
}

/// The table of `golden` with the plan's size and identities.
pub(super) fn update(plan: &DiskPlan, golden: &Region) -> Result<BlockPatch> {
    let read = |error| Error::io(Stage::Edit, "golden", "read the partition table", error);
    check_header(golden)?;
    let mut image = DiskImage::new(golden, plan.size_bytes());
    let mut gpt = GPT::read_from(&mut image, SECTOR).map_err(|error| failed(Stage::Edit, "read", error).with_reason("PARTITION_TABLE_CORRUPT"))?;
    if !gpt.is_primary() {
        return Err(corrupt("the checksum of its primary copy is wrong"));
    }
    check_partitions(plan, golden, &gpt)?;
    if plan.size_bytes() > golden.len {
        let blocks = golden.len / PATCH_BLOCK;
        image.zero_blocks(blocks - TAIL_BLOCKS..blocks);
    }
    gpt.header.disk_guid = plan.ids().disk.to_bytes_le();
    gpt.header.update_from(&mut image, SECTOR).map_err(|error| failed(Stage::Edit, "resize", error))?;
    set(plan, &mut gpt);
    write(plan, &mut gpt, &mut image, Stage::Edit)?;
    image.into_patch().map_err(read)
}

fn set(plan: &DiskPlan, gpt: &mut GPT) {
    for partition in plan.describe() {
        // The texts were made from GUIDs a moment ago.
        let guid = |text: &str| Uuid::parse_str(text).expect("a partition is described with valid GUIDs").to_bytes_le();
        gpt[partition.number] = GPTPartitionEntry {
            partition_type_guid: guid(&partition.type_uuid),
            unique_partition_guid: guid(&partition.uuid),
            starting_lba: partition.offset_bytes / SECTOR,
            ending_lba: (partition.offset_bytes + partition.size_bytes) / SECTOR - 1,
            attribute_bits: 0,
            partition_name: partition.name.as_str().into(),
        };
    }
}

fn write(plan: &DiskPlan, gpt: &mut GPT, image: &mut DiskImage<'_>, stage: Stage) -> Result<()> {
    gpt.write_into(image).map_err(|error| failed(stage, "write", error))?;
    // From byte 446 on: the boot code before it stays. The partition is not marked active, which some firmware takes for a reason to refuse UEFI.
    GPT::write_protective_mbr_into(image, SECTOR).map_err(|error| failed(stage, "write", error))?;
    if plan.layout() == Layout::Hybrid {
        write_hybrid_mbr(plan, image).map_err(|error| Error::io(stage, "disk", "write the hybrid MBR", error))?;
    }
    Ok(())
}

/// Where the MBR's four entries of 16 bytes are.
const MBR_ENTRIES_AT: u64 = 446;
/// A cylinder, head and sector that say: count sectors.
const CHS_TOO_FAR: [u8; 3] = [0xfe, 0xff, 0xff];

/// Two entries in place of the one that protects all: what lies before the root (type 0xee, first, by which GPT is recognised), and the root, active.
fn write_hybrid_mbr(plan: &DiskPlan, image: &mut DiskImage<'_>) -> io::Result<()> {
    // A hybrid disk has at most 2^32 sectors.
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let (start, len) = (sectors(plan.root().offset)?, sectors(plan.root().len)?);
    let entry = |status: u8, kind: u8, start: u32, len: u32| {
        let mut entry = [0; 16];
        entry[0] = status;
        entry[1..4].copy_from_slice(&CHS_TOO_FAR);
        entry[4] = kind;
        entry[5..8].copy_from_slice(&CHS_TOO_FAR);
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&len.to_le_bytes());
        entry
    };
    image.seek(SeekFrom::Start(MBR_ENTRIES_AT))?;
    image.write_all(&[entry(0, 0xee, 1, start - 1), entry(0x80, 0x83, start, len)].concat())
}

fn failed(stage: Stage, doing: &str, error: gptman::Error) -> Error {
    let kind = match error {
        gptman::Error::Io(ref io) => crate::error::kind_of_io(io),
        _ => Kind::Corrupt,
    };
    Error::new(kind, stage, "disk", format!("{doing} the partition table")).with_source(error)
}

/// Refuses a primary header whose numbers are not those of a table made by [`create`] for a disk of this size.
fn check_header(golden: &Region) -> Result<()> {
    let mut header = [0; 92];
    read_full_at(golden, &mut header, SECTOR).map_err(|error| Error::io(Stage::Edit, "golden", "read the partition table", error))?;
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
    if &header[..8] != b"EFI PART" {
        return Err(corrupt("there is no GPT header at sector 1"));
    }
    let sectors = golden.len / SECTOR;
    let expected = [
        ("position", u64_at(24), 1),
        ("position of the backup", u64_at(32), sectors.saturating_sub(1)),
        ("first usable sector", u64_at(40), FIRST_USABLE),
        ("last usable sector", u64_at(48), sectors.saturating_sub(TAIL_SECTORS + 1)),
        ("position of the entries", u64_at(72), 2),
        ("number of entries", u32_at(80).into(), ENTRIES.into()),
        ("size of an entry", u32_at(84).into(), ENTRY_SIZE.into()),
    ];
    match expected.iter().find(|(_, found, wanted)| found != wanted) {
        Some((what, found, wanted)) => Err(corrupt(&format!("the {what} in its header is {found}, expected {wanted}"))),
        None => Ok(()),
    }
}

/// Refuses a table whose partitions are not where a golden of this size has them.
fn check_partitions(plan: &DiskPlan, golden: &Region, gpt: &GPT) -> Result<()> {
    let before = DiskPlan::new(plan.layout(), golden.len, plan.esp_bytes, plan.root_type, *plan.ids())?;
    let expected = before.describe();
    for (number, entry) in gpt.iter() {
        let wanted = expected.iter().find(|partition| partition.number == number);
        let wanted = wanted.map(|p| (p.offset_bytes / SECTOR, (p.offset_bytes + p.size_bytes) / SECTOR - 1));
        let found = entry.is_used().then_some((entry.starting_lba, entry.ending_lba));
        if wanted != found {
            return Err(corrupt(&format!("partition {number} covers sectors {found:?}, expected {wanted:?}")));
        }
    }
    Ok(())
}

fn corrupt(what: &str) -> Error {
    Error::new(Kind::Corrupt, Stage::Edit, "golden", format!("its partition table is not one made here: {what}"))
        .with_reason("PARTITION_TABLE_CORRUPT")
}

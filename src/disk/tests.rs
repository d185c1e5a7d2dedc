use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::units::GIB;

fn ids(seed: u8) -> DiskIds {
    DiskIds::derived(Uuid::from_bytes([seed; 16]))
}

fn plan(size_bytes: u64, seed: u8) -> DiskPlan {
    DiskPlan::new(Layout::Gpt, size_bytes, ESP_SIZE, types::root_of("amd64"), ids(seed)).expect("a valid disk")
}

fn disk(size_bytes: u64) -> Region {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(size_bytes).expect("sparse file");
    Region { file: Arc::new(file), offset: 0, len: size_bytes }
}

fn apply(golden: &Region, patch: &BlockPatch) -> Region {
    let copy = disk(patch.size_bytes());
    let mut bytes = vec![0; golden.len as usize];
    golden.file.read_exact_at(&mut bytes, 0).expect("read");
    copy.file.write_all_at(&bytes, 0).expect("copy");
    for (number, block) in patch.iter() {
        copy.file.write_all_at(block, number * PATCH_BLOCK).expect("patch");
    }
    copy
}

fn bytes(file: &File, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

#[test]
fn partitions_are_aligned_and_do_not_overlap() {
    let plan = plan(GIB, 1);
    let mut partitions = plan.describe();
    assert_eq!(partitions.iter().map(|p| p.number).collect::<Vec<_>>(), [1, 14, 15]);
    partitions.sort_by_key(|p| p.offset_bytes);
    let mut end = 34 * SECTOR;
    for partition in &partitions {
        assert!(partition.offset_bytes.is_multiple_of(ALIGNMENT) && partition.size_bytes.is_multiple_of(PATCH_BLOCK), "{partition:?}");
        assert!(partition.offset_bytes >= end, "{partition:?}");
        end = partition.offset_bytes + partition.size_bytes;
    }
    assert!(end + 33 * SECTOR <= GIB);
    assert_eq!(partitions.last().map(|p| p.number), Some(1), "the root lies last");
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for (layout, size) in [(Layout::Bare, 0), (Layout::Bare, 4095), (Layout::Gpt, 66 * MIB), (Layout::Gpt, 1 << 63), (Layout::Gpt, u64::MAX - 4095)] {
        let error = DiskPlan::new(layout, size, ESP_SIZE, types::LINUX_DATA, ids(1)).expect_err("refused");
        assert_eq!(error.kind(), Kind::InvalidRequest, "{size}");
    }
    assert!(DiskPlan::new(Layout::Gpt, DiskPlan::overhead(Layout::Gpt, ESP_SIZE) + 4096, ESP_SIZE, types::LINUX_DATA, ids(1)).is_ok());
    let same = DiskIds { root: Uuid::from_bytes([1; 16]), ..DiskIds::derived(Uuid::from_bytes([2; 16])) };
    let same = DiskIds { disk: same.root, ..same };
    assert!(DiskPlan::new(Layout::Gpt, GIB, ESP_SIZE, types::LINUX_DATA, same).is_err());
}

#[test]
fn same_inputs_give_the_same_bytes_and_boot_code_is_kept() {
    let (one, two) = (disk(80 * MIB), disk(80 * MIB));
    for region in [&one, &two] {
        region.file.write_all_at(&[0xeb; 440], 0).expect("boot code");
        plan(80 * MIB, 1).write_table(region).expect("written");
    }
    let bytes = bytes(&one.file, one.len);
    assert!(bytes == self::bytes(&two.file, two.len));
    assert!(bytes[..440].iter().all(|b| *b == 0xeb));
    // Disk signature and the two bytes after it are left alone: the table starts at 446.
    assert_eq!(bytes[440..446], [0; 6]);
}

#[test]
fn a_patch_gives_what_a_new_table_of_that_size_and_identity_would() {
    for size in [80 * MIB, 80 * MIB + 4096, 81 * MIB, 200 * MIB] {
        let golden = disk(80 * MIB);
        plan(80 * MIB, 1).write_table(&golden).expect("written");
        let before = bytes(&golden.file, golden.len);
        let patch = plan(size, 2).patch(&golden, BlockPatch::new(8 * MIB)).expect("patched");
        assert!(patch.len() <= 16, "{} blocks for a table", patch.len());
        let fresh = disk(size);
        plan(size, 2).write_table(&fresh).expect("written");
        assert!(bytes(&apply(&golden, &patch).file, size) == bytes(&fresh.file, size), "{size}");
        assert!(bytes(&golden.file, golden.len) == before, "the golden was written to");
    }
}

#[test]
fn the_filesystems_blocks_win_over_the_cleared_backup_table() {
    let golden = disk(80 * MIB);
    plan(80 * MIB, 1).write_table(&golden).expect("written");
    let large = plan(160 * MIB, 1);
    let first = 80 * MIB / PATCH_BLOCK - 5;
    let old_tail = first - (ESP_OFFSET + ESP_SIZE) / PATCH_BLOCK;
    let mut root = BlockPatch::new(large.root().len);
    root.insert(old_tail + 1, vec![7; 4096].into());
    let patch = large.patch(&golden, root).expect("patched");
    assert_eq!(patch.get(first + 1).map(|block| block[9]), Some(7));
    assert_eq!(patch.get(first + 4).map(|block| block.iter().all(|b| *b == 0)), Some(true), "the old backup header is cleared");
}

#[test]
fn an_unchanged_disk_needs_no_blocks() {
    let golden = disk(80 * MIB);
    plan(80 * MIB, 1).write_table(&golden).expect("written");
    assert!(plan(80 * MIB, 1).patch(&golden, BlockPatch::default()).expect("patched").is_empty());
}

#[test]
fn smaller_disks_and_filesystems_beyond_the_end_are_refused() {
    let golden = disk(80 * MIB);
    plan(80 * MIB, 1).write_table(&golden).expect("written");
    assert_eq!(plan(79 * MIB, 1).patch(&golden, BlockPatch::default()).expect_err("smaller").kind(), Kind::InvalidRequest);
    assert_eq!(plan(80 * MIB, 1).patch(&golden, BlockPatch::new(80 * MIB)).expect_err("too long").kind(), Kind::NoSpace);
    let mut beyond = BlockPatch::new(MIB);
    beyond.insert(1 << 20, vec![0; 4096].into());
    assert!(plan(80 * MIB, 1).patch(&golden, beyond).is_err());
}

#[test]
fn a_hybrid_disk_has_its_root_in_the_mbr_and_keeps_it_there_when_it_grows() {
    let hybrid = |size, seed| DiskPlan::new(Layout::Hybrid, size, ESP_SIZE, types::root_of("amd64"), ids(seed)).expect("valid");
    let golden = disk(80 * MIB);
    hybrid(80 * MIB, 1).write_table(&golden).expect("written");
    let large = hybrid(160 * MIB, 2);
    let grown = apply(&golden, &large.patch(&golden, BlockPatch::default()).expect("patched"));
    for (disk, size) in [(&golden, 80 * MIB), (&grown, 160 * MIB)] {
        let sector = bytes(&disk.file, 512);
        let number = |at: usize| u64::from(u32::from_le_bytes(sector[at..at + 4].try_into().expect("four bytes")));
        let root = hybrid(size, 1).root();
        assert_eq!((sector[450], number(454), number(458)), (0xee, 1, root.offset / SECTOR - 1));
        assert_eq!((sector[462], sector[466], number(470), number(474)), (0x80, 0x83, root.offset / SECTOR, root.len / SECTOR));
        assert_eq!((&sector[478..510], &sector[510..]), (&[0; 32][..], &[0x55, 0xaa][..]));
    }
    assert!(DiskPlan::new(Layout::Hybrid, 2 << 40, ESP_SIZE, types::LINUX_DATA, ids(1)).is_ok());
    assert!(DiskPlan::new(Layout::Hybrid, (2 << 40) + 4096, ESP_SIZE, types::LINUX_DATA, ids(1)).is_err());
}

#[test]
fn a_bare_disk_is_its_filesystem() {
    let bare = DiskPlan::new(Layout::Bare, 8 * MIB, ESP_SIZE, types::LINUX_DATA, ids(1)).expect("valid");
    assert_eq!((bare.root(), bare.describe().len(), bare.disk_uuid()), (Extent { offset: 0, len: 8 * MIB }, 0, None));
    let golden = disk(8 * MIB);
    bare.write_table(&golden).expect("nothing to do");
    assert!(bytes(&golden.file, golden.len).iter().all(|b| *b == 0));
    let mut root = BlockPatch::new(8 * MIB);
    root.insert(3, vec![1; 4096].into());
    assert_eq!(bare.patch(&golden, root.clone()).expect("patched"), root);
}

proptest! {
    #[test]
    fn damaged_tables_are_refused_and_never_panic(at in 440usize..17408, value in 1u8..=255) {
        let golden = disk(70 * MIB);
        plan(70 * MIB, 1).write_table(&golden).expect("written");
        let mut byte = [0];
        golden.file.read_exact_at(&mut byte, at as u64).expect("read");
        golden.file.write_all_at(&[byte[0] ^ value], at as u64).expect("damage");
        let result = plan(70 * MIB, 2).patch(&golden, BlockPatch::default());
        // The MBR and the header's padding are not covered by a checksum; everything else is.
        let covered = (512..512 + 92).contains(&at) || at >= 1024;
        prop_assert_eq!(result.is_err(), covered, "byte {} ", at);
    }

    #[test]
    fn hostile_headers_never_panic(header in proptest::collection::vec(any::<u8>(), 84), good_crc in any::<bool>()) {
        let golden = disk(70 * MIB);
        let mut block = b"EFI PART".to_vec();
        block.extend(&header);
        if good_crc {
            block[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
            block[16..20].fill(0);
            let crc = crc32fast::hash(&block);
            block[16..20].copy_from_slice(&crc.to_le_bytes());
        }
        golden.file.write_all_at(&block, 512).expect("write");
        prop_assert!(plan(70 * MIB, 2).patch(&golden, BlockPatch::default()).is_err());
    }
}

#[test]
fn a_larger_system_partition_moves_the_root_and_odd_ones_are_refused() {
    let with = |esp: u64| DiskPlan::new(Layout::Gpt, GIB, esp, types::root_of("amd64"), ids(1));
    let (usual, larger) = (with(ESP_SIZE).expect("valid"), with(512 * MIB).expect("valid"));
    assert_eq!(larger.esp().map(|esp| (esp.offset, esp.len)), Some((2 * MIB, 512 * MIB)));
    assert_eq!(larger.root().offset, usual.root().offset + 448 * MIB);
    assert_eq!(larger.root().offset + larger.root().len, usual.root().offset + usual.root().len);
    for odd in [0, 63 * MIB, ESP_SIZE + 4096, ESP_SIZE_MAX + MIB, u64::MAX] {
        assert_eq!(with(odd).expect_err("refused").kind(), Kind::InvalidRequest, "{odd}");
    }
}

use proptest::prelude::*;

use super::{
    dir::{self, DirEntry},
    extent::{Extent, ExtentHeader, ExtentIndex},
    geometry::{Backups, Geometry},
    group::GroupDesc,
    inode::{self, Inode},
    journal::JournalSuperblock,
    superblock::{MAGIC, Superblock},
    xattr::{self, XattrEntry},
};
use crate::units::Timestamp;

fn geometry() -> Geometry {
    Geometry {
        block_size: 4096,
        blocks_count: 40 * 32768 + 5,
        first_data_block: 0,
        blocks_per_group: 32768,
        inodes_per_group: 8192,
        inode_size: 256,
        desc_size: 64,
        gdt_blocks: 1,
        reserved_gdt_blocks: 7,
        groups: 41,
        flex_log: Some(4),
        backups: Backups::Sparse,
        first_meta_bg: None,
    }
}

#[test]
fn every_byte_of_a_superblock_belongs_to_a_field() {
    let mut raw: Vec<u8> = (0..1024u32).map(|i| (i * 7 + i / 256) as u8).collect();
    raw[0x38..0x3A].copy_from_slice(&MAGIC.to_le_bytes());
    let mut copy = vec![0; 1024];
    Superblock::parse(&raw).expect("the magic is right").write(&mut copy);
    assert_eq!(copy, raw);
}

#[test]
fn backups_are_in_powers_of_three_five_and_seven() {
    let groups: Vec<u32> = (0..41).filter(|group| geometry().has_super(*group)).collect();
    assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27]);
    let two = Geometry { backups: Backups::Two([1, 40]), ..geometry() };
    assert_eq!((0..41).filter(|group| two.has_super(*group)).collect::<Vec<_>>(), [0, 1, 40]);
}

#[test]
fn positions_follow_from_the_geometry() {
    let shape = geometry();
    assert_eq!((shape.group_start(40), shape.group_blocks(40), shape.group_of_block(32768)), (40 * 32768, 5, 1));
    assert_eq!((shape.base_blocks_in(1), shape.base_blocks_in(2)), (9, 0));
    assert_eq!(shape.desc_location(3), (1, 192));
    assert_eq!((shape.inode_group(8193), shape.inode_location(1000, 17)), ((1, 0), (1001, 256)));
    let meta = Geometry { first_meta_bg: Some(0), reserved_gdt_blocks: 0, desc_size: 1024, gdt_blocks: 11, ..shape };
    assert_eq!(meta.desc_location(6), (4 * 32768, 2048), "group 4 has no superblock, so its descriptors come first");
    assert_eq!(meta.desc_location(9), (8 * 32768, 1024));
    assert_eq!((0..8).map(|group| meta.base_blocks_in(group)).collect::<Vec<_>>(), [2, 2, 0, 2, 1, 2, 0, 2]);
}

#[test]
fn times_reach_from_1901_to_2446() {
    for (secs, nanos) in [(inode::TIME_MIN, 0), (-1, 999_999_999), (0, 1), (2_147_483_647, 2), (2_147_483_648, 3), (1 << 32, 4), (inode::TIME_MAX, 5)]
    {
        let time = Timestamp { secs, nanos };
        let mut raw = [0; 256];
        Inode { mtime: time, crtime: time, ..Inode::zeroed() }.write(&mut raw);
        let back = Inode::parse(&raw).expect("just written");
        assert_eq!((back.mtime, back.crtime), (time, time));
        assert_eq!(inode::clamp_time(time), time);
    }
    assert_eq!(inode::clamp_time(Timestamp { secs: i64::MAX, nanos: 0 }).secs, inode::TIME_MAX);
    assert_eq!(inode::clamp_time(Timestamp { secs: i64::MIN, nanos: 9 }), Timestamp { secs: inode::TIME_MIN, nanos: 0 });
}

#[test]
fn devices_keep_their_numbers_in_both_encodings() {
    for (major, minor) in [(0, 0), (1, 3), (255, 255), (256, 0), (8, 256), (4095, 0xfffff)] {
        assert_eq!(inode::decode_device(&inode::encode_device(major, minor)), (major, minor));
    }
}

#[test]
fn xattr_names_split_by_namespace() {
    for (full, index, rest) in
        [("user.a", 1, "a"), ("security.capability", 6, "capability"), ("system.posix_acl_access", 2, ""), ("trusted.x.y", 4, "x.y")]
    {
        assert_eq!(xattr::split_name(full.as_bytes()), Some((index, rest.as_bytes())));
        assert_eq!(xattr::join_name(index, rest.as_bytes()), Some(full.as_bytes().to_vec()));
    }
    for bad in ["user.", "nothing", "system.posix_acl_accessible", "btrfs.compression"] {
        assert!(xattr::split_name(bad.as_bytes()).is_none_or(|(index, _)| index == 7), "{bad}");
    }
}

#[test]
fn acls_lose_meaningless_ids_and_get_them_back() {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, id) in [(0x01u16, u32::MAX), (0x02, 1000), (0x04, u32::MAX), (0x08, 70_000), (0x10, u32::MAX), (0x20, u32::MAX)] {
        value.extend(tag.to_le_bytes().into_iter().chain([6, 0]).chain(id.to_le_bytes()));
    }
    let disk = xattr::acl_to_disk(&value).expect("a good ACL");
    assert_eq!(disk.len(), 4 + 4 * 4 + 2 * 8);
    assert_eq!(xattr::acl_from_disk(&disk), Ok(value.clone()));
    assert!(xattr::acl_to_disk(&value[..value.len() - 1]).is_err());
    assert!(xattr::acl_from_disk(&disk[..disk.len() - 1]).is_err());
}

proptest! {
    #[test]
    fn foreign_bytes_are_refused_or_read_but_never_panic(mut raw in prop::collection::vec(any::<u8>(), 0..2048), at in 0usize..2100, magic: bool) {
        if magic && raw.len() > 0x40 {
            raw[0..2].copy_from_slice(&0xF30Au16.to_le_bytes());
            raw[0x38..0x3A].copy_from_slice(&MAGIC.to_le_bytes());
        }
        if let Ok(sb) = Superblock::parse(&raw) {
            let _ = Geometry::of(&sb);
        }
        let _ = (GroupDesc::parse(&raw), Inode::parse(&raw), JournalSuperblock::parse(&raw));
        let _ = (DirEntry::parse(&raw, at), dir::read_tail(&raw), dir::DxRootInfo::parse(&raw), dir::dx_count_limit(&raw, at));
        let _ = (XattrEntry::parse(&raw, at), xattr::XattrBlockHeader::parse(&raw), xattr::acl_to_disk(&raw), xattr::acl_from_disk(&raw));
        if let Ok(header) = ExtentHeader::parse(&raw) {
            for i in 0..usize::from(header.entries) {
                let _ = (Extent::get(&raw, i), ExtentIndex::get(&raw, i));
            }
        }
    }

    #[test]
    fn descriptors_inodes_and_entries_survive_writing(raw in prop::collection::vec(any::<u8>(), 256)) {
        let desc = GroupDesc::parse(&raw[..64]).expect("long enough");
        let mut copy = [0; 64];
        desc.write(&mut copy);
        prop_assert_eq!(GroupDesc::parse(&copy).expect("just written"), desc);
        let mut raw = raw;
        raw[0x80..0x82].copy_from_slice(&32u16.to_le_bytes());
        let inode = Inode::parse(&raw).expect("the extra size fits");
        let mut copy = raw.clone();
        inode.write(&mut copy);
        prop_assert_eq!(Inode::parse(&copy).expect("just written"), inode);
        let extent = Extent { block: 7, len: 1 + u32::from(raw[0]), start: 0xABCD_1234_5678, unwritten: raw[1] % 2 == 0 };
        let mut node = [0; 24];
        extent.put(&mut node, 0);
        prop_assert_eq!(Extent::get(&node, 0), extent);
    }
}

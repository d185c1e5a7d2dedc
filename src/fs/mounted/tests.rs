//! The parts that need neither root nor a mount: the view, the wire, and an XFS's numbers when they are hostile.

use std::{io::Cursor, os::unix::fs::FileExt, sync::Arc};

use proptest::prelude::*;

use super::{
    overlay::Overlay,
    wire::{self, Reply, Request, WireEntry, WireError, WireOp},
    xfs_identity::set_identity,
};
use crate::{
    error::{Error, Kind, Stage},
    fs::{
        Region,
        edit::{Attrs, EditOp},
    },
    names::GuestPath,
    tree::{Entry, EntryKind, Meta, Span, Xattr},
    units::Timestamp,
};

fn region(content: &[u8], len: u64) -> Region {
    let file = tempfile::tempfile().expect("temporary file");
    file.write_all_at(&[0xee; 4096], 0).expect("what is before the region");
    file.write_all_at(content, 4096).expect("content");
    Region { file: Arc::new(file), offset: 4096, len }
}

#[test]
fn the_view_reads_its_own_writes_and_the_patch_has_only_what_differs() {
    let golden = region(&[7; 8192], 16384);
    let view = Overlay::new(golden.clone(), 32768, 1 << 20);
    view.write_at(&[1; 10], 4090).expect("across two blocks");
    view.write_at(&[2; 512], 20480).expect("beyond the golden");
    view.write_at(&[7; 4096], 0).expect("back to what it was");
    let mut bytes = vec![0; 32768];
    view.read_at(&mut bytes, 0).expect("read");
    assert_eq!((bytes[4089], bytes[4090], bytes[4099], bytes[4100]), (7, 7, 1, 7));
    assert_eq!((bytes[8192], bytes[20480], bytes[20992]), (0, 2, 0));
    let patch = view.into_patch();
    assert_eq!(patch.iter().map(|(number, _)| number).collect::<Vec<_>>(), [1, 5]);
    assert_eq!(patch.size_bytes(), 32768);
    let mut golden_bytes = vec![0; 8192];
    golden.file.read_exact_at(&mut golden_bytes, 4096).expect("read");
    assert!(golden_bytes.iter().all(|byte| *byte == 7), "the golden was written to");
}

#[test]
fn the_view_refuses_what_is_outside_and_more_than_its_limit() {
    let view = Overlay::new(region(&[], 16384), 16384, 8192);
    assert!(view.write_at(&[1; 2], 16383).is_err() && view.read_at(&mut [0; 1], u64::MAX).is_err());
    assert!(view.cause().is_none());
    view.write_at(&[1; 8192], 0).expect("up to the limit");
    view.write_at(&[2; 8192], 0).expect("the same blocks again");
    assert_eq!(view.write_at(&[1; 1], 8192).expect_err("one more").raw_os_error(), Some(libc::ENOSPC));
    let cause = view.cause().expect("the limit");
    assert_eq!(cause.kind(), Kind::NoSpace);
    assert!(cause.message().contains("8 KiB"), "{cause}");
}

#[test]
fn everything_survives_the_wire() {
    let xattrs = vec![Xattr { name: b"user.\xff".to_vec(), value: vec![0, 1, 255] }];
    let meta = Meta { mode: 0o7777, uid: u32::MAX - 1, gid: 5, mtime: Timestamp { secs: -1, nanos: 999_999_999 }, xattrs: xattrs.clone() };
    let path = |text: &[u8]| GuestPath::new(text).expect("valid");
    let kinds = [
        EntryKind::Directory,
        EntryKind::File { size: u64::MAX, spans: vec![Span { offset: 1, len: 2 }] },
        EntryKind::Symlink { target: b"\xfe/..".to_vec() },
        EntryKind::HardLink { target: path(b"/\xff") },
        EntryKind::CharDevice { major: 1, minor: 2 },
        EntryKind::BlockDevice { major: 3, minor: 4 },
        EntryKind::Fifo,
        EntryKind::Socket,
    ];
    for kind in kinds {
        let entry = Entry { path: path(b"/a\n\xff"), kind, meta: meta.clone() };
        let mut frame = Vec::new();
        wire::send(&mut frame, Some(&Request::Entry(WireEntry::from(&entry))), b"data").expect("sent");
        let Ok(Some((Some(Request::Entry(back)), data))) = wire::receive::<Request>(&mut Cursor::new(frame), 4) else { panic!("{entry:?}") };
        assert_eq!((Entry::try_from(back).expect("valid"), &data[..]), (entry, &b"data"[..]));
    }
    let attrs = Attrs { mode: 1, uid: 2, gid: 3, xattrs };
    let ops = [
        EditOp::WriteFile { content: b"secret".to_vec(), attrs: attrs.clone() },
        EditOp::AppendFile { content: b"more".to_vec() },
        EditOp::MakeDir { attrs: attrs.clone() },
        EditOp::Symlink { target: b"t".to_vec(), attrs },
        EditOp::Remove,
        EditOp::SetAttrs { mode: Some(1), owner: None },
        EditOp::SetXattr { name: b"user.a".to_vec(), value: None },
        EditOp::Rename { to: path(b"/to") },
    ];
    for op in ops {
        let (wire_op, content) = WireOp::new(&path(b"/p"), &op);
        assert!(!format!("{wire_op:?}").contains("secret"));
        let (at, back) = wire_op.into_op(content.to_vec()).expect("valid");
        assert!(at == path(b"/p") && back == op, "{}", op.verb());
    }
}

#[test]
fn an_error_keeps_kind_reason_hint_and_cause_on_the_wire() {
    let cause = std::io::Error::from_raw_os_error(libc::ENOSPC);
    let error = Error::io(Stage::Host, "/dev/loop0", "write", cause).with_reason("TOOL_FAILED").with_hint("more disk");
    let back = WireError::from(&error).into_error(Stage::Edit);
    assert_eq!((back.kind(), back.stage(), back.reason(), back.hint()), (Kind::NoSpace, Stage::Edit, "TOOL_FAILED", Some("more disk")));
    assert!(back.to_string().starts_with("/dev/loop0: write: No space left"), "{back}");
}

proptest! {
    #[test]
    fn frames_from_anywhere_never_panic_or_take_memory(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        // The result is an error, an end, or a frame that was there.
        let _any = wire::receive::<Reply>(&mut Cursor::new(&bytes), 16);
    }

    #[test]
    fn hostile_superblocks_are_refused_without_panic(
        numbers in proptest::collection::vec((0usize..256, any::<u8>()), 0..64), valid_crc in any::<bool>()
    ) {
        let mut sector = vec![0u8; 512];
        sector[..4].copy_from_slice(b"XFSB");
        sector[4..8].copy_from_slice(&4096u32.to_be_bytes());
        sector[48..56].copy_from_slice(&1u64.to_be_bytes());
        sector[84..88].copy_from_slice(&16u32.to_be_bytes());
        sector[88..92].copy_from_slice(&1u32.to_be_bytes());
        sector[96..100].copy_from_slice(&4u32.to_be_bytes());
        sector[100..104].copy_from_slice(&[0xb4, 0xa5, 2, 0]);
        sector[124] = 4;
        for (at, value) in numbers {
            sector[at] = value;
        }
        if valid_crc {
            sector[224..228].fill(0);
            let crc = crc32c::crc32c(&sector);
            sector[224..228].copy_from_slice(&crc.to_le_bytes());
        }
        let view = Overlay::new(region(&sector, 65536), 65536, 1 << 20);
        match set_identity(&view, Some(&[1; 16]), Some("label")) {
            Ok(()) => prop_assert!(valid_crc, "a superblock with a wrong checksum was taken"),
            Err(error) => prop_assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "{:?}", error),
        }
    }
}

//! Damaged images: every answer is an error or a result, never a panic, and it comes soon.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc, time::Instant};

use cloudletd::{
    ext4::{edit::edit, read::Image},
    fs::{Region, edit::EditRequest},
    progress::Progress,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::{support::*, typical};

/// Damaged images tried for each feature set.
const CASES: u32 = 150;
/// More than any honest image of this size needs, by far, also on a busy machine.
const SECONDS_MAX: u64 = 10;

/// Numbers of 1 KiB pieces that hold metadata. Planted contents are either a pattern, which has few zeros, or a few bytes.
fn metadata_blocks(bytes: &[u8]) -> Vec<usize> {
    let block_is_metadata = |block: &[u8]| {
        let zeros = block.iter().filter(|byte| **byte == 0).count();
        zeros > block.len() / 8 && zeros < block.len()
    };
    bytes.chunks(1024).enumerate().filter(|(_, block)| block_is_metadata(block)).map(|(i, _)| i).collect()
}

/// Everything a caller can do with an image.
fn exercise(file: &Arc<File>, len: u64) {
    let region = Region { file: file.clone(), offset: 0, len };
    let Ok(image) = Image::open(&region) else { return };
    let _ = image.walk(&mut |_, ino, inode| {
        let _ = image.xattrs(ino);
        if inode.is_symlink() {
            let _ = image.read_link(ino);
        } else if inode.is_file() {
            let _ = image.read_file(ino, 16 << 20);
        }
        Ok(())
    });
    for path in ["/etc/os-release", "/many/a-file-with-a-rather-long-name-00100", "/etc/loop/x", "/var/run/x"] {
        let _ = image.resolve(&guest(path));
    }
    let grown = EditRequest { size_bytes: Some(700 << 20), ..typical() };
    for request in [typical(), grown, EditRequest { uuid: Some([9; 16]), label: Some("x".into()), ..EditRequest::default() }] {
        if let Ok(patch) = edit(&region, &request, &Progress::default()) {
            assert!(patch.iter().all(|(number, _)| (number + 1) * 4096 <= patch.size_bytes()), "a block behind the end");
        }
    }
}

#[test]
fn damaged_images_give_errors_and_no_panics() {
    for (name, args) in FEATURE_SETS.iter().filter(|(name, _)| ["default", "no-checksums", "1k-ext3-like", "uninit-bg"].contains(name)) {
        let golden = Golden::make(&[args, &["-N", "2048"][..]].concat(), "24M");
        let bytes = std::fs::read(&golden.path).expect("read");
        let places = metadata_blocks(&bytes);
        assert!(places.len() > 50, "{name}: {} blocks of metadata", places.len());
        let file = Arc::new(File::options().read(true).write(true).open(&golden.path).expect("open"));
        let value = prop_oneof![Just(0_u8), Just(0xff), Just(1), any::<u8>()];
        let damage = prop::collection::vec((0..places.len(), prop_oneof![0..1024_usize, 0..128_usize], 1..5_usize, value), 1..6);
        let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
        let start = Instant::now();
        let outcome = runner.run(&damage, |damage| {
            for (place, at, len, value) in &damage {
                let at = places[*place] * 1024 + (*at).min(1024 - len);
                file.write_all_at(&vec![*value; *len], at as u64).expect("damage");
            }
            let start = Instant::now();
            exercise(&file, bytes.len() as u64);
            let seconds = start.elapsed().as_secs();
            for (place, ..) in &damage {
                let at = places[*place] * 1024;
                file.write_all_at(&bytes[at..at + 1024], at as u64).expect("repair");
            }
            prop_assert!(seconds <= SECONDS_MAX, "took {} s", seconds);
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("{name}: {error}");
        }
        note(&format!("{name}: {CASES} damaged images in {:?}, {} places", start.elapsed(), places.len()));
    }
}

/// An empty golden whose superblock says that it has a feature.
fn with_feature(feature: &str) -> Golden {
    let golden = Golden::make_with(&["-O", "^has_journal"], "4M", |_| {});
    run("debugfs", &["-w", "-R", &format!("feature {feature}"), golden.path.to_str().expect("utf-8")]);
    golden
}

#[test]
fn features_that_are_not_handled_are_refused_by_name() {
    for (features, name) in [
        ("inline_data", "inline_data"),
        ("encrypt", "encrypt"),
        ("casefold", "casefold"),
        ("bigalloc", "bigalloc"),
        ("meta_bg", "meta_bg"),
        ("ea_inode", "ea_inode"),
    ] {
        let golden = with_feature(features);
        let error = golden.edit(&typical()).expect_err(name);
        assert_eq!((error.kind(), error.reason()), (cloudletd::error::Kind::Unsupported, "EXT4_FEATURE_UNSUPPORTED"), "{}", error.chain());
        assert!(error.chain().contains(name), "{}", error.chain());
    }
    for (features, name) in [("quota", "quota"), ("project", "project"), ("mmp", "mmp"), ("stable_inodes", "stable_inodes"), ("verity", "verity")] {
        let golden = with_feature(features);
        Image::open(&golden.region()).expect("can be read").walk(&mut |_, _, _| Ok(())).expect("walk");
        let error = golden.edit(&typical()).expect_err(name);
        assert!(error.kind() == cloudletd::error::Kind::Unsupported && error.chain().contains(name), "{}", error.chain());
    }
}

#[test]
fn filesystems_that_are_not_clean_are_not_edited() {
    let golden = Golden::make_with(&[], "64M", |_| {});
    let path = golden.path.to_str().expect("utf-8");
    let edits = request(vec![("/etc/hostname", write("x"))]);
    let expect = |what: &str| {
        let error = golden.edit(&edits).expect_err(what);
        assert!(error.chain().contains(what), "{}", error.chain());
    };
    run("debugfs", &["-w", "-R", "ssv state 3", path]);
    expect("errors");
    run("debugfs", &["-w", "-R", "ssv state 0", path]);
    expect("not cleanly unmounted");
    run("debugfs", &["-w", "-R", "ssv state 1", path]);
    golden.edit(&edits).expect("clean again");
    run("debugfs", &["-w", "-R", "feature needs_recovery", path]);
    expect("needs_recovery");
}

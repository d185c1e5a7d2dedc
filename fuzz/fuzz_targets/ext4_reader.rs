//! A damaged ext4 image: opened, walked, everything in it read. Errors are fine; panics, loops and memory without bound are not. An image without
//! damage is read without an error.

#![no_main]

use arbitrary::Unstructured;
use cloudletd::{ext4::read::Image, names::GuestPath};
use fuzz_kit::damage::Damaged;
use libfuzzer_sys::fuzz_target;

/// Files are read up to this size, bytes.
const FILE_LEN_MAX: u64 = 1 << 20;

const PATHS: [&str; 9] = [
    "/",
    "/etc/hostname",
    "/etc/fast/deep/er/file",
    "/etc/slow/x",
    "/etc/loop/x",
    "/var/run/x",
    "/var/sparse",
    "/many/a-file-with-a-name-that-is-long-enough-to-fill-blocks-100",
    "/many/not-there",
];

fuzz_target!(|bytes: &[u8]| {
    let Ok(damaged) = Damaged::from_input(&mut Unstructured::new(bytes)) else { return };
    let whole = damaged.is_whole();
    let image = match Image::open(&damaged.golden.region()) {
        Ok(image) => image,
        Err(error) => {
            assert!(!whole, "{}", error.chain());
            return;
        }
    };
    let _ = image.check_editable();
    let mut seen = 0;
    let walked = image.walk(&mut |_, ino, inode| {
        seen += 1;
        let content = if inode.is_symlink() {
            image.read_link(ino).map(|target| assert!((1..=4095).contains(&target.len())))
        } else if inode.is_file() {
            image.read_file(ino, FILE_LEN_MAX).map(|content| assert_eq!(content.len() as u64, inode.size))
        } else {
            Ok(())
        };
        let xattrs = image.xattrs(ino).map(|xattrs| assert!(xattrs.windows(2).all(|pair| pair[0].name < pair[1].name)));
        if whole {
            content.and(xattrs)?;
        }
        Ok(())
    });
    assert!(!whole || walked.is_ok() && seen > 150);
    // A hard link is walked as often as it has names, so the count of inodes is no bound; the number of directory entries that fit is.
    assert!(seen <= damaged.golden.bytes.len() / 12);
    for path in PATHS {
        let path = GuestPath::new(path).expect("a path");
        for found in [image.lookup(&path), image.resolve(&path)].into_iter().flatten().flatten() {
            let _ = (image.stat(found), image.read_dir(found));
        }
    }
});

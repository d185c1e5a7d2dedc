//! Limits, refusals and the rules for repeated names.

use std::{
    io::{self, Read},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
};

use cloudletd::{
    error::{Error, Kind},
    ext4::hash::{DirHasher, HashVersion, Signedness},
    fs::{BuildParams, Profile, Region},
    progress::Progress,
    tree::EntryKind,
    units::{GIB, MIB},
};
use proptest::prelude::*;

use crate::support::{Image, Item, Model, dir, feed, file, link, node, params, sparse, start, symlink};

fn many_inodes() -> BuildParams {
    BuildParams { bytes_per_inode: 4096, ..params(Profile::Modern) }
}

/// The error that feeding the items to a small filesystem gives.
#[track_caller]
fn refusal(items: &[Item]) -> Error {
    match Image::with(16 * MIB, &params(Profile::Modern), |sink| feed(sink, items)) {
        Ok(_) => panic!("nothing was refused"),
        Err(error) => error,
    }
}

#[track_caller]
fn reads_back(size: u64, profile: Profile, items: &[Item]) -> Image {
    let image = Image::of(size, profile, items);
    image.assert_clean();
    let mounted = image.mount("ro");
    Model::of(items).assert_at(&mounted.at);
    mounted.unmount();
    image
}

#[test]
fn directories_become_trees_when_they_exceed_a_block() {
    for profile in [Profile::Modern, Profile::Compat] {
        // Entries of 12 bytes: 338 fit behind "." and ".." with a checksum tail, 339 without.
        for count in [337, 338, 339, 340, 700] {
            let mut items = vec![dir("/d")];
            items.extend((0..count).map(|i| file(format!("/d/{i:04}"), "")));
            let image = reads_back(16 * MIB, profile, &items);
            let indexed = image.debugfs("stat /d").contains("Flags: 0x81000");
            assert_eq!(indexed, count > if profile == Profile::Compat { 339 } else { 338 }, "{count} {profile:?}");
        }
    }
}

#[test]
fn large_directories_have_two_levels_and_count_links_as_the_kernel_does() {
    let long = |i: u32| format!("/long/{i:05}-{}", "x".repeat(249));
    let image = Image::with(GIB, &many_inodes(), |sink| {
        feed(sink, &(0..8000).map(|i| file(long(i), "")).collect::<Vec<_>>())?;
        feed(sink, &(0..64_998).map(|i| dir(format!("/most/{i}"))).collect::<Vec<_>>())?;
        feed(sink, &(0..64_999).map(|i| dir(format!("/more/{i}"))).collect::<Vec<_>>())
    })
    .expect("build");
    image.assert_clean();
    assert!(image.debugfs("htree_dump /long").contains("Indirect levels: 1"));
    let mounted = image.mount("rw");
    let links = |name: &str| mounted.at.join(name).metadata().expect("stat").nlink();
    assert_eq!((links("most"), links("more")), (65_000, 1));
    for i in (0..8000).step_by(97) {
        assert!(mounted.at.join(&long(i)[1..]).exists(), "{i}");
        std::fs::write(mounted.at.join(format!("{}y", &long(i)[1..200])), "").expect("the kernel adds a name");
    }
    for i in (0..64_999).step_by(501) {
        assert!(mounted.at.join(format!("more/{i}")).is_dir());
    }
    mounted.unmount();
    image.assert_clean();
}

#[test]
fn names_with_equal_hashes_are_found_on_both_sides_of_a_leaf_border() {
    let params = params(Profile::Modern);
    let hasher = DirHasher { version: HashVersion::HalfMd4, signedness: Signedness::Signed, seed: DirHasher::seed_words(&params.hash_seed) };
    let mut names: Vec<(u32, u32, String)> = (0..300_000u32)
        .map(|i| format!("{i:08}"))
        .map(|name| (hasher.hash_both(name.as_bytes()), name))
        .map(|((hash, minor), name)| (hash, minor, name))
        .collect();
    names.sort();
    // Entries of 16 bytes: 204 in each leaf filled to four fifths of 4084 bytes.
    let pair = (204..names.len() - 1000).find(|i| names[*i].0 == names[*i + 1].0).expect("300000 names of 31 hash bits collide");
    let items: Vec<Item> = names[pair - 203..pair + 800].iter().map(|(_, _, name)| file(format!("/d/{name}"), name.as_bytes())).collect();
    let image = reads_back(16 * MIB, Profile::Modern, &items);
    let continued = format!("0x{:08x}", names[pair].0 | 1);
    assert!(image.debugfs("htree_dump /d").contains(&continued), "the second leaf continues hash {continued}");
}

#[test]
fn files_of_many_pieces_have_extent_trees() {
    let pieces = |count: u64| -> Vec<(u64, Vec<u8>)> { (0..count).map(|i| (i * 8192 + 5, format!("piece {i}").into_bytes())).collect() };
    let items: Vec<Item> = [4, 5, 340, 341, 1360, 1361, 3000].iter().map(|n| sparse(format!("/{n}"), 30 * MIB, &pieces(*n))).collect();
    for profile in [Profile::Modern, Profile::Compat] {
        let image = reads_back(128 * MIB, profile, &items);
        assert!(!image.debugfs("dump_extents /4").contains("1/ 1"));
        assert!(image.debugfs("dump_extents /5").contains("1/ 1"));
        assert!(image.debugfs("dump_extents /1361").contains("2/ 2"));
    }
}

#[test]
fn a_file_larger_than_a_group_goes_around_what_is_in_its_way() {
    let data: Vec<u8> = (0..200 * MIB / 8).flat_map(|i: u64| i.to_le_bytes()).collect();
    reads_back(GIB, Profile::Modern, &[file("/large", data)]);
}

#[test]
fn a_file_has_at_most_65000_names() {
    let names = |count: u32| (1..count).map(|i| link(format!("/d/{i}"), "/d/first"));
    let mut items = vec![file("/d/first", "x")];
    items.extend(names(65_000));
    let image = Image::with(64 * MIB, &params(Profile::Modern), |sink| feed(sink, &items)).expect("65000 names");
    image.assert_clean();
    items.push(link("/d/last", "/d/first"));
    let error = Image::with(64 * MIB, &params(Profile::Modern), |sink| feed(sink, &items)).err().expect("65001 names");
    assert_eq!((error.kind(), error.reason(), error.object()), (Kind::Unsupported, "TOO_MANY_LINKS", "/d/last"));
}

#[test]
fn equal_attributes_share_blocks_of_at_most_1024_inodes() {
    let items: Vec<Item> = (0..2500).map(|i| file(format!("/{i}"), "").xattr("user.big", vec![5; 1000])).collect();
    let image = Image::with(64 * MIB, &many_inodes(), |sink| feed(sink, &items)).expect("build");
    image.assert_clean();
    let mounted = image.mount("rw");
    rustix::fs::setxattr(mounted.at.join("7"), "user.big", &[6; 1000], rustix::fs::XattrFlags::empty()).expect("the kernel unshares the block");
    assert_eq!(crate::support::xattrs(&mounted.at.join("8"))[0].value, vec![5; 1000]);
    mounted.unmount();
    image.assert_clean();
}

#[test]
fn more_different_attribute_blocks_than_are_kept_in_memory_are_right_too() {
    let mut items: Vec<Item> =
        (0..5000u32).map(|i| file(format!("/{i}"), "").xattr("user.big", [&i.to_le_bytes()[..], &[5; 100]].concat())).collect();
    items.extend((4500..4600).map(|i| file(format!("/{i}"), "replaced")));
    let image = Image::with(64 * MIB, &many_inodes(), |sink| feed(sink, &items)).expect("build");
    image.assert_clean();
    let mounted = image.mount("ro");
    Model::of(&items).assert_at(&mounted.at);
    mounted.unmount();
}

#[test]
fn repeated_names_keep_the_documented_rules() {
    reads_back(
        16 * MIB,
        Profile::Modern,
        &[
            file("/a/file", vec![1; 50_000]),
            file("/a/file", "second"),
            dir("/a").with(|meta| (meta.mode, meta.uid) = (0o700, 5)),
            file("/becomes-dir", vec![2; 100_000]).xattr("user.big", vec![1; 500]),
            dir("/becomes-dir"),
            file("/becomes-dir/child", "c"),
            dir("/becomes-file"),
            file("/becomes-file", "was a directory"),
            symlink("/link", vec![b'l'; 100]),
            node("/link", EntryKind::Fifo),
            file("/one", "one"),
            link("/two", "/one"),
            file("/one", "new one"),
            link("/two", "/two"),
            dir("/lost+found").with(|meta| meta.mode = 0o711),
            file("/lost+found/kept", "x"),
        ],
    );
}

#[test]
fn what_the_rules_forbid_is_refused() {
    let cases: Vec<(Kind, Vec<Item>)> = vec![
        (Kind::Corrupt, vec![symlink("/l", "/etc"), file("/l/passwd", "x")]),
        (Kind::Corrupt, vec![file("/f", "x"), dir("/f/g/h")]),
        (Kind::Corrupt, vec![file("/d/child", "x"), file("/d", "x")]),
        (Kind::Corrupt, vec![dir("/d"), file("/d/child", "x"), symlink("/d", "x")]),
        (Kind::Corrupt, vec![link("/a", "/missing")]),
        (Kind::Corrupt, vec![dir("/d"), link("/a", "/d")]),
        (Kind::Corrupt, vec![dir("/d"), link("/d", "/d")]),
        (Kind::Corrupt, vec![file("/", "x")]),
        (Kind::Corrupt, vec![file("/lost+found", "x")]),
        (Kind::Corrupt, vec![symlink("/l", "")]),
        (Kind::Corrupt, vec![symlink("/l", vec![b'x'; 4096])]),
        (Kind::Corrupt, vec![file("/f", "x").xattr("system.posix_acl_access", "nonsense")]),
        (Kind::Unsupported, vec![file("/f", "x").xattr("user.big", vec![1; 4100])]),
        (Kind::Unsupported, vec![file("/f", "x").xattr("strange.name", "x")]),
        (Kind::Unsupported, vec![node("/n", EntryKind::CharDevice { major: 4096, minor: 0 })]),
        (Kind::Unsupported, vec![sparse("/f", 16 << 40, &[])]),
        (Kind::NoSpace, vec![file("/ok", "x"), file("/f", vec![1; 20 * MIB as usize])]),
    ];
    for (kind, items) in cases {
        let error = refusal(&items);
        let last = items.last().expect("not empty").entry.path.to_string();
        assert_eq!((error.kind(), error.object()), (kind, last.as_str()), "{error:?}");
    }
}

#[test]
fn exhausted_inodes_and_blocks_are_named() {
    let image_inodes = 1024;
    let items: Vec<Item> = (0..image_inodes - 11).map(|i| file(format!("/{i}"), "")).collect();
    Image::of(16 * MIB, Profile::Modern, &items).assert_clean();
    let error = refusal(&(0..image_inodes - 10).map(|i| file(format!("/{i}"), "")).collect::<Vec<_>>());
    assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "INODES_EXHAUSTED"));
    assert!(error.message().contains("1024") && error.message().contains("16384"), "{error}");

    let error = refusal(&(0..20).map(|i| file(format!("/{i}"), vec![1; MIB as usize])).collect::<Vec<_>>());
    assert_eq!((error.kind(), error.message().contains("1 MiB")), (Kind::NoSpace, true), "{error}");
}

#[test]
fn blocks_of_replaced_files_are_used_again() {
    let items: Vec<Item> = (0..30).map(|i| file("/again", vec![i; 3 * MIB as usize])).collect();
    reads_back(16 * MIB, Profile::Modern, &items);
}

/// A reader that breaks off.
struct Broken(io::ErrorKind);

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(self.0.into())
    }
}

#[test]
fn data_that_does_not_match_its_size_or_breaks_off_is_an_error() {
    let directory = tempfile::tempdir().expect("make a temporary directory");
    let entry = file("/f", vec![0; 10_000]).entry;
    let cases: [(Box<dyn Read>, Kind); 3] = [
        (Box::new(&[1u8; 9_999][..]), Kind::Corrupt),
        (Box::new(&[1u8; 10_001][..]), Kind::Corrupt),
        (Box::new(Broken(io::ErrorKind::TimedOut)), Kind::Timeout),
    ];
    for (mut data, kind) in cases {
        let mut builder = start(&directory.path().join("disk"), 0, 16 * MIB, &params(Profile::Modern)).expect("start");
        assert_eq!(builder.entry(&entry, &mut data).expect_err("refused").kind(), kind);
    }
}

#[test]
fn cancelling_and_failing_writes_end_the_build() {
    let directory = tempfile::tempdir().expect("make a temporary directory");
    let path = directory.path().join("disk");
    std::fs::write(&path, "").expect("make a file");
    let read_only = Region { file: Arc::new(std::fs::File::open(&path).expect("open read-only")), offset: 0, len: 16 * MIB };
    let progress = Progress::default();
    let mut builder = cloudletd::ext4::format::builder(&params(Profile::Modern), read_only.clone(), &progress).expect("start");
    feed(&mut *builder, &[file("/f", "x")]).expect("nothing is written yet");
    let error = builder.finish().expect_err("the file is not writable");
    assert!(error.message().starts_with("write"), "{error:?}");

    let mut builder = cloudletd::ext4::format::builder(&params(Profile::Modern), read_only, &progress).expect("start");
    progress.cancel();
    assert_eq!(feed(&mut *builder, &[dir("/d")]).expect_err("cancelled").kind(), Kind::Cancelled);
}

/// Items from a small set of names, so that they meet each other.
fn any_item() -> impl Strategy<Value = Item> {
    let name = prop::sample::select(vec!["a", "b", "c", "d", "long-name-of-a-file", "\u{fc}"]);
    let path = prop::collection::vec(name, 1..4).prop_map(|names| format!("/{}", names.join("/")));
    let target = path.clone();
    (path, target, 0..9, 0..20_000u32, any::<u16>()).prop_map(|(path, target, kind, len, bits)| {
        let item = match kind {
            0 | 1 => dir(&path),
            2 | 3 => file(&path, vec![bits as u8; len as usize]),
            4 => symlink(&path, vec![b't'; (len % 4095) as usize + 1]),
            5 => link(&path, &target),
            6 => node(&path, EntryKind::Fifo),
            7 => sparse(&path, u64::from(len) * 1000 + 70_000, &[(u64::from(bits), vec![1; 777]), (67_000, vec![2; 3000])]),
            _ => node(&path, EntryKind::CharDevice { major: u32::from(bits) % 4096, minor: len }),
        };
        let item = item.with(|meta| {
            (meta.mode, meta.uid) = (bits & 0o7777, len * 7);
            meta.mtime.secs = i64::from(len) * 800_000 - 2_000_000_000;
            if matches!(kind, 4) {
                meta.mode = 0o777;
            }
        });
        if bits % 3 == 0 && kind < 4 { item.xattr("user.x", vec![3; (len % 1500) as usize]) } else { item }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_is_clean_and_reads_back(items in prop::collection::vec(any_item(), 0..60), compat: bool) {
        let mut model = Model::of(&[]);
        let items: Vec<Item> = items.into_iter().filter(|item| model.accept(item)).collect();
        reads_back(16 * MIB, if compat { Profile::Compat } else { Profile::Modern }, &items);
    }
}

//! Bugs that other programs which make ext4 from a tree have or had, one test each: tar2ext4, Apple's formatter, genext2fs, `mke2fs -d`. Judged by
//! e2fsck of three releases, debugfs and the kernel, never by our own reader alone.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use cloudletd::{
    error::Result,
    ext4::{
        edit::edit,
        layout::{
            BLOCK_SIZE,
            extent::{ExtentHeader, ExtentIndex},
        },
        read,
    },
    fs::{
        BuildParams, Profile, Region,
        edit::{Attrs, Edit, EditOp, EditRequest},
    },
    names::GuestPath,
    progress::Progress,
    tree::{Entry, TreeSink, Xattr, archive, decompress, model},
    units::{GIB, KIB, MIB, Timestamp},
};

use crate::{
    common::e2fsck,
    support::{Image, Item, Model, dir, file, link, params, run, sparse, start, symlink},
};

const PROFILES: [Profile; 3] = [Profile::Modern, Profile::Grub206, Profile::Compat];
const GROUP: u64 = 128 * MIB;
const BLOCK: u64 = BLOCK_SIZE as u64;

fn with_inodes(profile: Profile) -> BuildParams {
    BuildParams { bytes_per_inode: 4096, ..params(profile) }
}

/// Members of a tar archive in the order given; directories end in a slash, links have a target.
fn tar(members: &[(&str, Option<&str>, u64, u64)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, link, uid, mtime) in members {
        let mut header = tar::Header::new_gnu();
        header.set_uid(*uid);
        header.set_gid(uid + 1);
        header.set_mtime(*mtime);
        header.set_mode(if path.ends_with('/') { 0o750 } else { 0o640 });
        let data = if link.is_none() && !path.ends_with('/') { path.as_bytes() } else { &[] };
        header.set_size(data.len() as u64);
        match link {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Link);
                archive.append_link(&mut header, path, target).expect("append");
            }
            None => {
                header.set_entry_type(if path.ends_with('/') { tar::EntryType::Directory } else { tar::EntryType::Regular });
                archive.append_data(&mut header, path, data).expect("append");
            }
        }
    }
    archive.into_inner().expect("finish")
}

fn read_tar(bytes: Vec<u8>, sink: &mut dyn TreeSink) -> Result<()> {
    let mut input = decompress::open(Box::new(std::io::Cursor::new(bytes)), decompress::Compression::None)?;
    archive::read(&mut input, &archive::Limits::default(), &|_| false, sink, &Progress::default())?;
    Ok(())
}

fn of_tar(profile: Profile, members: &[(&str, Option<&str>, u64, u64)]) -> Image {
    let image = Image::with(16 * MIB, &params(profile), |sink| read_tar(tar(members), sink)).expect("build");
    image.assert_clean();
    image
}

/// tar2ext4 made no parents for a hard link whose directory came later in the archive, and failed.
#[test]
fn a_hard_link_may_come_before_its_parent_directory() {
    for profile in PROFILES {
        let image = of_tar(
            profile,
            &[
                ("bin/tool", None, 1, 100),
                ("opt/later/links/tool", Some("bin/tool"), 0, 0),
                ("opt/later/links/", None, 7, 700),
                ("opt/later/", None, 8, 800),
                ("opt/", None, 9, 900),
                ("bin/", None, 10, 1000),
            ],
        );
        assert!(image.debugfs("stat /opt/later/links/tool").contains("Links: 2"));
        let mounted = image.mount("ro");
        let stat = |path: &str| mounted.at.join(path).metadata().unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!((stat("bin/tool").ino(), stat("bin/tool").nlink()), (stat("opt/later/links/tool").ino(), 2));
        for (path, uid, links) in [("opt/later/links", 7, 2), ("opt/later", 8, 3), ("opt", 9, 3), ("bin", 10, 2)] {
            let seen = (stat(path).uid(), stat(path).mtime(), stat(path).mode() & 0o7777, stat(path).nlink());
            assert_eq!(seen, (uid, i64::from(uid) * 100, 0o750, links), "{path} is what its own member says");
        }
        mounted.unmount();
    }
}

/// Nanoseconds that this thread has been on a CPU: unlike the clock, not much changed by what else the machine does.
fn cpu_ns() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstat");
    text.split(' ').next().and_then(|field| field.parse().ok()).expect("a number")
}

/// How many times the work for `8 * count` is the work for `count`: about 8 when it is linear, up to 64 when it is quadratic. The least of three.
fn growth(count: u32, work: &dyn Fn(u32)) -> f64 {
    let spent = |count| {
        let begun = cpu_ns();
        work(count);
        (cpu_ns() - begun) as f64
    };
    (0..3).map(|_| spent(8 * count) / spent(count)).fold(f64::INFINITY, f64::min)
}

/// Between linear, with some cache misses more, and quadratic.
const GROWTH_MAX: f64 = 24.0;

/// What `mke2fs -d`, debugfs and genext2fs do: look through a directory for each name that is added.
#[derive(Default)]
struct Quadratic(Vec<GuestPath>);

impl TreeSink for Quadratic {
    fn entry(&mut self, entry: &Entry, _: &mut dyn std::io::Read) -> Result<()> {
        assert!(!self.0.contains(&entry.path));
        self.0.push(entry.path.clone());
        Ok(())
    }
}

/// With 60,000 files in one directory `mke2fs -d` takes minutes.
#[test]
fn a_flat_directory_costs_no_square_of_its_names() {
    let items: Vec<Item> = (0..120_000).map(|i| file(format!("/flat/a-file-with-some-name-{i}"), "")).collect();
    let feed_to =
        |sink: &mut dyn TreeSink, count: u32| items[..count as usize].iter().try_for_each(|item| sink.entry(&item.entry, &mut std::io::empty()));
    let ratio = growth(2500, &|count| feed_to(&mut Quadratic::default(), count).expect("entries"));
    assert!(ratio > GROWTH_MAX, "the measure would not notice: {ratio}");

    let format = |count| Image::with(GIB, &with_inodes(Profile::Modern), |sink| feed_to(sink, count)).expect("build");
    let ratio = growth(15_000, &|count| drop(format(count)));
    assert!(ratio < GROWTH_MAX, "formatting 8 times as many names took {ratio} times as long");
    let image = format(120_000);
    image.assert_clean();
    let mounted = image.mount("ro");
    assert_eq!(fs::read_dir(mounted.at.join("flat")).expect("read the directory").count(), 120_000);
    mounted.unmount();

    let golden = Image::with(GIB, &with_inodes(Profile::Modern), |_| Ok(())).expect("build");
    let region = region_of(&golden);
    let add = |count: u32| {
        let op = EditOp::WriteFile { content: Vec::new(), attrs: Attrs::root(0o644) };
        let edits =
            items[..count as usize].iter().map(|item| Edit { path: item.entry.path.clone(), op: op.clone(), why: String::new(), secret: false });
        edit(&region, &EditRequest { edits: edits.collect(), ..EditRequest::default() }, &Progress::default()).expect("edit");
    };
    let ratio = growth(2000, &|count| add(count));
    assert!(ratio < GROWTH_MAX, "editing 8 times as many names took {ratio} times as long");
}

/// genext2fs writes the low 16 bits of owners and drops the rest; tar's octal field ends at 2,097,151, and what is above comes in base 256.
#[test]
fn owners_above_16_bits_are_kept() {
    let owners = [0, 65_534, 65_535, 65_536, 65_537, 70_000, 2_097_151, 2_097_152, 0x7fff_ffff, 0x8000_0000, 0xffff_fffd];
    let names: Vec<String> = owners.iter().map(|uid| format!("owned-by-{uid}")).collect();
    let members: Vec<_> = names.iter().zip(owners).map(|(name, uid)| (name.as_str(), None, uid, 1)).collect();
    for profile in PROFILES {
        let image = of_tar(profile, &members);
        let mounted = image.mount("ro");
        for (name, uid) in names.iter().zip(owners) {
            let stat = mounted.at.join(name).metadata().expect("stat");
            assert_eq!((u64::from(stat.uid()), u64::from(stat.gid())), (uid, uid + 1), "{name}");
        }
        mounted.unmount();
        let shown = image.debugfs("stat /owned-by-70000");
        assert!(shown.contains("User: 70000 ") && shown.contains("Group: 70001 "), "{shown}");
    }
}

/// Formatters that count a file's names when they write its inode miss those that come later, and those that are replaced.
#[test]
fn every_name_of_a_file_is_counted_and_no_other() {
    let items = [
        file("/a/one", "content"),
        link("/b/two", "/a/one"),
        link("/c/d/e/three", "/b/two"),
        link("/b/two", "/a/one"),
        file("/other", "1"),
        link("/c/lost", "/a/one"),
        file("/c/lost", "took over the name"),
        link("/c/four", "/c/d/e/three"),
        file("/gone", vec![1; 100_000]),
        link("/left", "/gone"),
        symlink("/gone", "left"),
        symlink("/s", "target"),
        link("/s2", "/s"),
        dir("/c/d/f"),
        dir("/c/d/g"),
    ];
    for profile in PROFILES {
        let image = Image::of(16 * MIB, profile, &items);
        image.assert_clean();
        for (path, links) in [("/a/one", 4), ("/c/four", 4), ("/c/lost", 1), ("/left", 1), ("/s", 2), ("/c/d", 5)] {
            let shown = image.debugfs(&format!("stat {path}"));
            assert!(shown.contains(&format!("Links: {links} ")), "{path}: {shown}");
        }
        let mounted = image.mount("rw");
        Model::of(&items).assert_at(&mounted.at);
        // The last name takes the data along.
        for name in ["a/one", "b/two", "c/d/e/three"] {
            fs::remove_file(mounted.at.join(name)).expect("remove");
        }
        assert_eq!(fs::read(mounted.at.join("c/four")).expect("still there"), b"content");
        fs::remove_file(mounted.at.join("c/four")).expect("remove");
        mounted.unmount();
        image.assert_clean();
    }
}

/// The kernel stops looking in a block of extended attributes where a sorted one would have had the name (ext4_xattr_find_entry): attributes in the
/// order of the archive are there and can't be found.
#[test]
fn xattrs_are_in_the_order_the_kernel_searches_in() {
    // By name they are in another order than by number of the namespace, length, name.
    let names = ["security.z", "trusted.b", "trusted.long-name", "user.a", "user.a-longer-one", "user.b", "user.bb", "user.zzz", "user.Z"];
    for profile in PROFILES {
        for len in [0, 5, 300] {
            let with_all = |item: Item| names.iter().fold(item, |item, name| item.xattr(name, vec![name.len() as u8; len]));
            let items = [with_all(file("/f", "x")), with_all(dir("/d")), with_all(file("/same", "y"))];
            let image = Image::of(16 * MIB, profile, &items);
            image.assert_clean();
            let mounted = image.mount("rw");
            Model::of(&items).assert_at(&mounted.at);
            // The kernel's own changes find their place.
            for (name, change) in [("user.ab", Some([1; 40])), ("user.a", None), ("user.zzz", Some([2; 40])), ("trusted.b", None)] {
                let path = mounted.at.join("f");
                match change {
                    Some(value) => rustix::fs::lsetxattr(&path, name, &value, rustix::fs::XattrFlags::empty()).expect("set"),
                    None => rustix::fs::lremovexattr(&path, name).expect("remove"),
                }
            }
            let kept: Vec<Xattr> = crate::support::xattrs(&mounted.at.join("f"));
            assert_eq!(kept.len(), names.len() - 1, "{kept:?}");
            mounted.unmount();
            image.assert_clean();
        }
    }
}

/// Sizes in bytes, in blocks of the filesystem and in units of 512 bytes (`i_blocks`) are easily taken for one another, above 4 GiB above all.
#[test]
fn sizes_are_bytes_and_blocks_are_those_the_kernel_would_count() {
    let lens = [1, 511, 512, 513, 4095, 4096, 4097, 8192, 3 * MIB as usize + 17];
    let mut items: Vec<Item> = lens.iter().map(|len| file(format!("/len-{len}"), vec![b'x'; *len])).collect();
    items.extend([
        file("/empty", ""),
        sparse("/hole-of-5-gib", 5 * GIB + 1, &[]),
        sparse("/ends-above-4-gib", 4 * GIB + 8192, &[(4 * GIB + 4096, vec![b'e'; 4096])]),
        sparse("/many-pieces", 32 * MIB, &(0..700).map(|i| (i * 40_960, vec![b'p'; 4096])).collect::<Vec<_>>()),
        symlink("/short", "s".repeat(59)),
        symlink("/long", "l".repeat(60)),
    ]);
    for profile in PROFILES {
        let size = 200 * MIB + 5 * KIB;
        let image = Image::of(size, profile, &items);
        image.assert_clean();
        assert_eq!(image.path.metadata().expect("stat").len(), size);
        assert_eq!(image.built.size_bytes, size / BLOCK * BLOCK);
        let shown = image.debugfs("show_super_stats -h");
        assert!(shown.lines().any(|line| line.replace(' ', "") == format!("Blockcount:{}", size / BLOCK)), "{shown}");
        let mounted = image.mount("rw");
        Model::of(&items).assert_at(&mounted.at);
        let copies = mounted.at.join("copies");
        fs::create_dir(&copies).expect("make a directory");
        let usage = || {
            let usage = nix::sys::statvfs::statvfs(&mounted.at).expect("statvfs");
            (usage.blocks() - usage.blocks_free()) * usage.fragment_size()
        };
        let before = usage();
        for item in &items {
            let name = &item.entry.path.to_string()[1..];
            let copied = run(
                "cp",
                &["-a", "--sparse=always", mounted.at.join(name).to_str().expect("text"), copies.to_str().expect("text")].map(AsRef::as_ref),
            );
            assert!(copied.status.success(), "cp: {}", String::from_utf8_lossy(&copied.stderr));
        }
        // Blocks are counted when they are allocated.
        assert!(run("sync", &["--file-system".as_ref(), copies.as_os_str()]).status.success());
        let mut total = 0;
        for item in &items {
            let name = &item.entry.path.to_string()[1..];
            let [ours, kernels] = [mounted.at.join(name), copies.join(name)].map(|path| fs::symlink_metadata(path).expect("stat"));
            assert_eq!((ours.len(), ours.blocks()), (kernels.len(), kernels.blocks()), "{name}, {profile:?}");
            total += ours.blocks() * 512;
        }
        assert_eq!(usage() - before, total, "what df shows");
        mounted.unmount();
        image.assert_clean();
    }
}

/// A last group with fewer blocks than the others: its bitmap has to say that what lies behind the end is in use, and counts are not those of a group.
#[test]
fn the_last_group_may_be_partial() {
    for (n, profile) in PROFILES.into_iter().enumerate() {
        for blocks in [700, 1023, 1024 + 7, 4096 + 8 * n as u64 + 1, GROUP / BLOCK - 1] {
            let size = GROUP + blocks * BLOCK;
            let image = Image::of(size, profile, &[file("/big", vec![b'b'; 100 * MIB as usize]), file("/small", "s")]);
            image.assert_clean();
            assert_eq!(image.built.size_bytes, size, "the group is kept");
            let mounted = image.mount("rw");
            // To the last block, by the kernel; it keeps some back (ext4_calculate_resv_clusters) unless told otherwise.
            let device = run("findmnt", &["-n".as_ref(), "-o".as_ref(), "SOURCE".as_ref(), mounted.at.as_os_str()]).stdout;
            let device = String::from_utf8_lossy(&device).trim().replace("/dev/", "");
            let told = fs::write(format!("/sys/fs/ext4/{device}/reserved_clusters"), "0");
            // A few blocks are always reserved for the extent tree of what is being written.
            let kept = if told.is_ok() { 8 } else { size / BLOCK / 50 };
            let fill = File::create(mounted.at.join("fill")).expect("create");
            let mut at = 0;
            for chunk in [vec![b'f'; 256 << 10], vec![b'f'; BLOCK as usize]] {
                while let Ok(written) = fill.write_at(&chunk, at) {
                    at += written as u64;
                }
            }
            fill.sync_all().expect("what was written has its blocks");
            drop(fill);
            let free = nix::sys::statvfs::statvfs(&mounted.at).expect("statvfs").blocks_free();
            assert!(free <= kept, "{free} blocks are left, told: {told:?}");
            assert!(fs::read(mounted.at.join("big")).expect("read").iter().all(|byte| *byte == b'b'));
            mounted.unmount();
            image.assert_clean();
        }
    }
}

fn region_of(image: &Image) -> Region {
    let file = File::options().read(true).write(true).open(&image.path).expect("open");
    Region { file: Arc::new(file), offset: 0, len: image.path.metadata().expect("stat").len() }
}

/// Runs `work` for each of `inputs` on a thread of its own; each has a minute.
#[track_caller]
fn each_ends<I: Send + 'static, T: Send + 'static>(inputs: Vec<(String, I)>, work: impl Fn(I) -> T + Send + 'static) -> Vec<T> {
    let names: Vec<String> = inputs.iter().map(|(name, _)| name.clone()).collect();
    let (send, receive) = mpsc::channel();
    thread::spawn(move || inputs.into_iter().try_for_each(|(_, input)| send.send(work(input))));
    let received = |name: &String| receive.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| panic!("{name}: no end: {error}"));
    names.iter().map(received).collect()
}

/// Archives cut off anywhere, and with each byte of their headers changed, come to an end: a tree or an error.
#[test]
fn corrupt_archives_come_to_an_end() {
    let long = "long/".repeat(40);
    let whole = tar(&[("a/", None, 0, 0), ("a/f", None, 0, 1), (&format!("{long}name"), None, 0, 1), ("a/l", Some("a/f"), 0, 0), ("z", None, 0, 0)]);
    let mut archives: Vec<(String, Vec<u8>)> = (0..whole.len()).step_by(128).map(|len| (format!("cut to {len}"), whole[..len].to_vec())).collect();
    for at in (0..whole.len()).filter(|at| whole[*at] != 0 || at % 512 > 120 && at % 512 < 160) {
        for value in [0, b'7', 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            // The sum is right again, or nothing would get any further.
            let header = at / 512 * 512;
            if !(148..156).contains(&(at - header)) {
                bytes[header + 148..header + 156].fill(b' ');
                let sum: u32 = bytes[header..header + 512].iter().map(|byte| u32::from(*byte)).sum();
                bytes[header + 148..header + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            }
            archives.push((format!("byte {at} is {value}"), bytes));
        }
    }
    let dir = tempfile::tempdir().expect("make a temporary directory");
    let number = std::cell::Cell::new(0);
    let outcomes = each_ends(archives, move |bytes| {
        number.set(number.get() + 1);
        // Not all of them into a filesystem, which costs a thread and a file.
        if number.get() % 16 != 0 {
            return read_tar(bytes, &mut model::Model::default()).is_ok();
        }
        let mut builder = start(&dir.path().join("disk"), 0, 16 * MIB, &params(Profile::Modern)).expect("start");
        read_tar(bytes, &mut *builder).and_then(|()| builder.finish()).is_ok()
    });
    let trees = outcomes.iter().filter(|is_tree| **is_tree).count();
    assert!(trees > 20 && outcomes.len() - trees > 100, "{trees} trees of {} archives", outcomes.len());
}

/// Makes an image without checksums, so that damage is believed; damages it in one place; e2fsck has to agree that it is damage.
fn damaged(at: impl FnOnce(&Image, &read::Image) -> (u64, Vec<u8>)) -> Image {
    let mut items = vec![dir("/one/two/three"), symlink("/loop", "loop"), file("/linear/f", "x")];
    items.extend((0..1000).map(|i| file(format!("/indexed/a-name-that-takes-some-room-{i}"), "")));
    items.push(sparse("/pieces", 30 * MIB, &(0..1000).map(|i| (i * 8192, vec![b'p'; 4096])).collect::<Vec<_>>()));
    items.push(file("/attrs", "x").xattr("user.large", vec![b'v'; 1000]));
    let image = Image::of(64 * MIB, Profile::Compat, &items);
    image.assert_clean();
    let (at, bytes) = at(&image, &read::Image::open(&region_of(&image)).expect("open"));
    region_of(&image).file.write_all_at(&bytes, at).expect("damage");
    e2fsck::assert_damaged(&image.path);
    image
}

/// Number of a block of a path, as debugfs lists them.
fn block_of(image: &Image, path: &str, n: usize) -> u64 {
    let shown = image.debugfs(&format!("blocks {path}"));
    shown.split_whitespace().nth(n).and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{path}: {shown}"))
}

fn ino_of(image: &read::Image, path: &str) -> u32 {
    image.lookup(&GuestPath::new(path).expect("a path")).expect("lookup").expect("there")
}

/// Everything that is done with an image.
fn exercise(region: &Region) -> Result<()> {
    let image = read::Image::open(region)?;
    let walked = image.walk(&mut |_, ino, inode| {
        let _ = (image.xattrs(ino), image.read_dir(ino), inode.is_symlink().then(|| image.read_link(ino)));
        if inode.is_file() {
            let _ = image.read_file(ino, GIB);
        }
        Ok(())
    });
    let paths = ["/loop/x", "/one/two/three/four", "/indexed/a-name-that-takes-some-room-700", "/indexed/new", "/linear/new", "/pieces", "/attrs"];
    for path in paths.map(|path| GuestPath::new(path).expect("a path")) {
        let _ = (image.lookup(&path), image.resolve(&path));
        for op in [
            EditOp::WriteFile { content: vec![1; 10_000], attrs: Attrs::root(0o600) },
            EditOp::AppendFile { content: vec![2; 10_000] },
            EditOp::SetXattr { name: b"user.large".to_vec(), value: None },
            EditOp::Remove,
        ] {
            let edits = vec![Edit { path: path.clone(), op, why: String::new(), secret: false }];
            let now = Timestamp { secs: 1_800_000_000, nanos: 0 };
            let _ = edit(region, &EditRequest { edits, now, size_bytes: Some(300 * MIB), ..EditRequest::default() }, &Progress::default());
        }
    }
    walked
}

/// Directories, indexes and extent trees that lead back to themselves: a reader that follows them without counting never ends.
#[test]
fn corrupt_images_come_to_an_end() {
    let cases: Vec<(&str, Image)> = vec![
        ("a record of no length", damaged(|image, _| (block_of(image, "/linear", 0) * BLOCK + 4, vec![0, 0]))),
        // The inode number of the entry behind "." and "..".
        ("a directory in itself", damaged(|image, read| (block_of(image, "/one/two", 0) * BLOCK + 24, ino_of(read, "/one").to_le_bytes().to_vec()))),
        (
            "an index that is its own inner node",
            damaged(|image, _| {
                // One level more (dx_root_info.indirect_levels), and the first entry leads to the root of the index.
                let at = block_of(image, "/indexed", 0) * BLOCK;
                let mut root = vec![0; 0x28];
                region_of(image).file.read_exact_at(&mut root, at).expect("read");
                root[0x1e] = 1;
                root[0x24..0x28].fill(0);
                (at, root)
            }),
        ),
        (
            "an extent tree that is its own child",
            damaged(|_, read| {
                let inode = read.stat(ino_of(read, "/pieces")).expect("stat");
                let depth = ExtentHeader::parse(&inode.block).expect("a header").depth;
                let leaf = ExtentIndex::get(&inode.block, 0).leaf;
                assert!(depth > 0);
                let mut node = vec![0; 24];
                ExtentHeader { entries: 1, max: 340, depth, generation: 0 }.write(&mut node);
                ExtentIndex { block: 0, leaf }.put(&mut node, 0);
                (leaf * BLOCK, node)
            }),
        ),
        (
            "an attribute without an end",
            damaged(|_, read| (read.stat(ino_of(read, "/attrs")).expect("stat").file_acl * BLOCK + 32, vec![0xff; BLOCK as usize - 32])),
        ),
    ];
    let regions = cases.iter().map(|(what, image)| ((*what).to_owned(), region_of(image))).collect();
    for ((what, _), outcome) in cases.iter().zip(each_ends(regions, |region| exercise(&region))) {
        eprintln!("{what}: {:?}", outcome.map_err(|error| error.chain()));
    }
}

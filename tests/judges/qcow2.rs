//! qcow2 images made, written to and judged by QEMU's tools: what is read is what they read, and what is changed in place they find without error or leak.
//! Needs qemu-img and qemu-io.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use cloudletd::{
    error::{Kind, Result},
    fs::{ReadAt, patch::BlockPatch},
    volume::{
        patch::FilePatch,
        qcow2::{Qcow2, Source},
    },
};
use proptest::prelude::*;

#[track_caller]
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("run {program}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A generator that repeats itself.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn block(&mut self) -> Vec<u8> {
        // Some blocks are zeros, some compress, some do not.
        match self.below(4) {
            0 => vec![0; 4096],
            1 => vec![self.next() as u8; 4096],
            _ => (0..512).flat_map(|_| self.next().to_le_bytes()).collect(),
        }
    }
}

/// What an image is made with.
#[derive(Debug, Clone)]
struct Shape {
    cluster_bits: u32,
    extended: bool,
    zstd: bool,
    version_2: bool,
    refcount_bits: u32,
    lazy: bool,
    /// 0: none, 1: raw, 2: qcow2 on raw.
    backing: u32,
    size: u64,
    seed: u64,
}

impl Shape {
    fn plain(cluster_bits: u32, seed: u64) -> Shape {
        Shape { cluster_bits, extended: false, zstd: false, version_2: false, refcount_bits: 16, lazy: false, backing: 0, size: 12 << 20, seed }
    }

    fn options(&self) -> String {
        let mut options = format!("cluster_size={},refcount_bits={}", 1 << self.cluster_bits, self.refcount_bits);
        if self.version_2 {
            return options + ",compat=0.10";
        }
        if self.extended {
            options += ",extended_l2=on";
        }
        if self.zstd {
            options += ",compression_type=zstd";
        }
        if self.lazy {
            options += ",lazy_refcounts=on";
        }
        options
    }
}

struct Case {
    directory: tempfile::TempDir,
    image: PathBuf,
    backing: Vec<PathBuf>,
}

/// Runs qemu-io with all these commands on an image.
fn qemu_io(image: &Path, commands: &[String]) {
    let arguments: Vec<&str> =
        ["-f", "qcow2"].into_iter().chain(commands.iter().flat_map(|command| ["-c", command.as_str()])).chain([text(image)]).collect();
    tool("qemu-io", &arguments);
}

/// Writes compressed clusters. In a session of its own: QEMU 7.2 gives the rest of a host cluster to the next compressed one also when the first was freed
/// and the host cluster holds something else by then, and qemu-img check finds the damage.
fn compress(image: &Path, size: u64, cluster: u64, noise: &mut Noise) {
    let mut guests: Vec<u64> = (0..12).map(|_| noise.below(size / cluster)).collect();
    guests.sort_unstable();
    guests.dedup();
    let commands: Vec<String> = guests.iter().map(|guest| format!("write -c -P {} {} {cluster}", 1 + noise.below(250), guest * cluster)).collect();
    qemu_io(image, &commands);
}

/// Writes, discards and zeroes at random.
fn scribble(image: &Path, size: u64, noise: &mut Noise, times: u32) {
    let mut commands = Vec::new();
    for _ in 0..times {
        let at = noise.below(size / 512) * 512;
        let len = (512 + noise.below(300) * 512).min(size - at);
        commands.push(match noise.below(6) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 1 + noise.below(250)),
        });
    }
    qemu_io(image, &commands);
}

#[track_caller]
fn check(image: &Path, shape: &Shape) {
    let said = tool("qemu-img", &["check", "-f", "qcow2", text(image)]);
    assert!(said.contains("No errors were found"), "{shape:?}: {said}");
}

impl Case {
    fn new(shape: &Shape) -> Case {
        let directory = tempfile::tempdir().expect("a directory");
        let mut noise = Noise(shape.seed | 1);
        let image = directory.path().join("image.qcow2");
        let mut backing = Vec::new();
        if shape.backing > 0 {
            let golden = directory.path().join("golden.raw");
            let file = File::create(&golden).expect("create");
            // Shorter than the image.
            let size = shape.size / 4096 * 4096 - (1 << 20);
            file.set_len(size).expect("size");
            for _ in 0..400 {
                file.write_all_at(&noise.block(), noise.below(size / 4096) * 4096).expect("write");
            }
            backing.push(golden);
        }
        if shape.backing > 1 {
            let middle = directory.path().join("middle.qcow2");
            let size = (shape.size / 4096 * 4096).to_string();
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&backing[0]), "-o", "cluster_size=16k", text(&middle), &size]);
            scribble(&middle, shape.size / 4096 * 4096, &mut noise, 20);
            backing.push(middle);
        }
        let (options, size) = (shape.options(), shape.size.to_string());
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some(behind) = backing.last() {
            arguments.extend(["-b", text(behind), "-F", if shape.backing > 1 { "qcow2" } else { "raw" }]);
        }
        arguments.extend([text(&image), &size]);
        tool("qemu-img", &arguments);
        compress(&image, shape.size, 1 << shape.cluster_bits, &mut noise);
        scribble(&image, shape.size, &mut noise, 40);
        check(&image, shape);
        Case { directory, image, backing }
    }

    fn open(&self) -> Result<Qcow2> {
        open(&self.image)
    }

    /// The disk as QEMU reads it.
    fn expected(&self) -> Vec<u8> {
        let raw = self.directory.path().join("expected.raw");
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&self.image), text(&raw)]);
        fs::read(raw).expect("read")
    }
}

fn source(path: &Path) -> Source {
    let file = File::open(path).expect("open");
    let len = file.metadata().expect("stat").len();
    Source { name: text(path).to_owned(), file: Arc::new(file), len }
}

fn open(path: &Path) -> Result<Qcow2> {
    Qcow2::open(source(path), &|_, backing| Ok(source(Path::new(std::str::from_utf8(&backing.path).expect("UTF-8")))))
}

fn random_patch(size: u64, blocks: u64, noise: &mut Noise) -> BlockPatch {
    let mut patch = BlockPatch::new(size);
    let count = size.div_ceil(4096);
    for _ in 0..blocks {
        let at = noise.below(count);
        for number in at..(at + 1 + noise.below(4)).min(count) {
            patch.insert(number, noise.block().into());
        }
    }
    patch
}

fn apply(patch: &FilePatch, path: &Path) {
    let file = File::options().read(true).write(true).open(path).expect("open");
    patch.reserve(&file).expect("reserves");
    patch.apply(&file).expect("applies");
}

/// Reads it, changes it, reads it again; QEMU is the judge each time.
#[track_caller]
fn judge(shape: &Shape) {
    let case = Case::new(shape);
    let mut expected = case.expected();
    let image = case.open().unwrap_or_else(|error| panic!("{shape:?}: {}", error.chain()));
    assert_eq!(image.virtual_size(), shape.size);
    let mut got = vec![0; shape.size as usize];
    image.read_all_at(&mut got, 0).unwrap_or_else(|error| panic!("{shape:?}: {error:?}"));
    assert!(got == expected, "{shape:?}: reads what QEMU reads");
    let mut noise = Noise(shape.seed.rotate_left(17) | 1);
    for _ in 0..40 {
        let at = noise.below(shape.size);
        let len = noise.below(200_000).min(shape.size - at) as usize;
        let mut part = vec![1; len];
        image.read_all_at(&mut part, at).expect("reads a part");
        assert!(part == expected[at as usize..at as usize + len], "{shape:?}: {len} bytes at {at}");
    }
    assert!(image.read_all_at(&mut [0; 2], shape.size - 1).is_err(), "nothing is beyond the end");

    let behind: Vec<Vec<u8>> = case.backing.iter().map(|path| fs::read(path).expect("read")).collect();
    let patch = random_patch(shape.size, 60, &mut noise);
    let plan = image.plan(&patch).unwrap_or_else(|error| panic!("{shape:?}: {}", error.chain()));
    assert_eq!(image.plan(&patch).expect("again"), plan, "a plan depends on nothing else");
    // Half of it, as a crash leaves it, then all of it, twice.
    let file = File::options().write(true).open(&case.image).expect("open");
    for (offset, bytes) in plan.iter().step_by(2) {
        file.write_all_at(bytes, offset).expect("write");
    }
    apply(&plan, &case.image);
    apply(&plan, &case.image);
    for (number, block) in patch.iter() {
        let at = number as usize * 4096;
        let len = block.len().min(expected.len() - at);
        expected[at..at + len].copy_from_slice(&block[..len]);
    }
    check(&case.image, shape);
    assert!(case.expected() == expected, "{shape:?}: QEMU reads golden, guest and patch");
    let changed = case.open().expect("opens");
    changed.read_all_at(&mut got, 0).expect("reads");
    assert!(got == expected, "{shape:?}: and so is it read here");
    for (path, before) in case.backing.iter().zip(&behind) {
        assert!(fs::read(path).expect("read") == *before, "{shape:?}: {} is only read", path.display());
    }
    // The image goes on to work.
    scribble(&case.image, shape.size, &mut noise, 10);
    check(&case.image, shape);
}

#[test]
fn every_cluster_size_is_read_and_changed() {
    for (seed, cluster_bits) in (9..=21).enumerate() {
        judge(&Shape::plain(cluster_bits, seed as u64 * 77 + 3));
    }
}

#[test]
fn subclusters_are_taken_one_by_one() {
    for (seed, cluster_bits) in (14..=21).enumerate() {
        judge(&Shape { extended: true, backing: seed as u32 % 3, ..Shape::plain(cluster_bits, seed as u64 * 99 + 5) });
    }
}

#[test]
fn every_width_of_refcounts_is_kept() {
    for (seed, order) in (0..=6).enumerate() {
        judge(&Shape { refcount_bits: 1 << order, lazy: order == 4, ..Shape::plain(12, seed as u64 * 55 + 7) });
    }
}

#[test]
fn old_images_and_odd_sizes_are_read_and_changed() {
    judge(&Shape { version_2: true, backing: 1, ..Shape::plain(16, 11) });
    judge(&Shape { version_2: true, ..Shape::plain(12, 12) });
    judge(&Shape { size: (12 << 20) + 4096 * 5 + 512, backing: 2, ..Shape::plain(16, 13) });
    judge(&Shape { size: (12 << 20) + 512, extended: true, ..Shape::plain(17, 14) });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn what_qemu_wrote_is_read_and_changed_as_qemu_would(
        cluster_bits in 9u32..=18, extended: bool, zstd: bool, order in 0u32..=6, lazy: bool, backing in 0u32..=2, seed: u64,
    ) {
        judge(&Shape { extended: extended && cluster_bits >= 14, zstd, refcount_bits: 1 << order, lazy, backing, ..Shape::plain(cluster_bits, seed) });
    }
}

#[test]
fn the_refcount_table_grows_when_it_has_no_room() {
    // 512-byte clusters with 64-bit counts: a table cluster covers 64 blocks of 64 clusters, 2 MiB.
    let shape = Shape { refcount_bits: 64, size: 16 << 20, ..Shape::plain(9, 21) };
    let case = Case::new(&shape);
    let mut patch = BlockPatch::new(shape.size);
    let mut noise = Noise(99);
    for number in 0..shape.size / 4096 {
        patch.insert(number, noise.block().into());
    }
    apply(&case.open().expect("opens").plan(&patch).expect("plans"), &case.image);
    check(&case.image, &shape);
    let want: Vec<u8> = patch.iter().flat_map(|(_, block)| block.to_vec()).collect();
    assert!(case.expected() == want);
}

#[test]
fn what_is_not_handled_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image.qcow2");
    let create = |options: &[&str]| tool("qemu-img", &[&["create", "-q", "-f", "qcow2"], options, &[text(&path), "4M"]].concat());
    let refused = |what: &str| {
        let error = open(&path).err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert_eq!(error.kind(), Kind::Unsupported, "{what}: {error:?}");
        assert!(error.message().contains(what), "{what}: {error:?}");
    };
    let data = directory.path().join("data.raw");
    create(&["-o", &format!("data_file={}", text(&data))]);
    refused("external data file");
    // qemu-img times its key derivation, and gives up ("Unable to get accurate CPU usage") where a coarse clock of its thread has not moved meanwhile.
    let luks =
        ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"];
    let made = || Command::new("qemu-img").args(luks).args([text(&path), "4M"]).output().expect("run qemu-img").status.success();
    assert!((0..50).any(|_| made()), "qemu-img made no encrypted image in 50 attempts");
    refused("LUKS");
    create(&[]);
    tool("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    refused("1 internal snapshots");
    create(&[]);
    let bits = |at: u64, value: u64| File::options().write(true).open(&path).expect("open").write_all_at(&value.to_be_bytes(), at).expect("write");
    for (value, what) in [(1, "dirty"), (2, "corrupt"), (1 << 5, "bit 5"), (1 << 63, "bit 63")] {
        bits(72, value);
        refused(what);
    }
    create(&[]);
    tool("qemu-img", &["bitmap", "--add", text(&path), "backup"]);
    let error = open(&path).expect("can be read").plan(&random_patch(4 << 20, 3, &mut Noise(5))).expect_err("would miss a change");
    assert!(error.message().contains("bitmaps"), "{error:?}");
    // A backing file of a format that nobody declared: QEMU would probe it.
    let golden = directory.path().join("golden.raw");
    fs::write(&golden, vec![0; 1 << 20]).expect("write");
    create(&["-b", text(&golden), "-F", "raw"]);
    let mut bytes = fs::read(&path).expect("read");
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).expect("the extension");
    bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    fs::write(&path, bytes).expect("write");
    refused("no declared format");
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    for (seed, shape) in [
        Shape { backing: 1, extended: true, ..Shape::plain(14, 31) },
        Shape { zstd: true, ..Shape::plain(12, 32) },
        Shape { backing: 2, ..Shape::plain(9, 33) },
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case::new(&shape);
        let whole = fs::read(&case.image).expect("read");
        let mut noise = Noise(seed as u64 * 1000 + 1);
        let patch = random_patch(shape.size, 20, &mut noise);
        let mut buffer = vec![0; shape.size as usize];
        for round in 0..150 {
            let mut bytes = whole.clone();
            for _ in 0..1 + noise.below(8) {
                // Mostly where the tables are.
                let bound = if round % 3 == 0 { 512 } else { bytes.len() as u64 };
                let at = noise.below(bound) as usize;
                bytes[at] = noise.next() as u8;
            }
            if round % 10 == 9 {
                bytes.truncate(noise.below(whole.len() as u64) as usize);
            }
            let damaged = Source { name: "damaged".into(), len: bytes.len() as u64, file: Arc::new(Memory(bytes)) };
            let opened = Qcow2::open(damaged, &|_, backing| {
                Ok(source(case.backing.iter().find(|path| text(path).as_bytes() == backing.path).unwrap_or(&case.backing[0])))
            });
            let Ok(image) = opened else { continue };
            let len = image.virtual_size().min(buffer.len() as u64) as usize;
            let _ = image.read_all_at(&mut buffer[..len], 0);
            let _ = image.plan(&patch);
        }
    }
}

struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn read_all_at(&self, into: &mut [u8], offset: u64) -> std::io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = self.0.get(start..).and_then(|rest| rest.get(..into.len())).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(part);
        Ok(())
    }
}

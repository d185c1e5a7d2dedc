//! Small golden images, made once per process: by our own formatter, and by mke2fs for what our formatter never makes (1 KiB blocks, indirect
//! blocks, CRC-16 descriptors); the latter are kept compressed in `goldens/`, see `goldens/make.sh`.
//!
//! Every piece of metadata of a golden is listed with the checksum that it carries, so that damage can be made to look right.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    sync::{Arc, OnceLock},
};

use cloudletd::{
    ext4::{
        Ext4, csum,
        layout::{
            extent::{Extent, ExtentHeader, ExtentIndex},
            get_u16, get_u32,
            group::GroupDesc,
            inode::{Inode, flags},
            ro_compat,
        },
        read::Image,
    },
    fs::{BuildParams, Filesystem, Profile, Region},
    names::GuestPath,
    progress::Progress,
    tree::{Entry, EntryKind, Meta, Span, TreeSink, Xattr},
    units::Timestamp,
};

/// Bytes of the goldens that our formatter makes: the least it takes.
const OURS_LEN: u64 = 8 << 20;
/// Made by mke2fs.
const FOREIGN: [&[u8]; 4] = [
    include_bytes!("../goldens/1k-ext3-like.img.gz"),
    include_bytes!("../goldens/1k.img.gz"),
    include_bytes!("../goldens/uninit-bg.img.gz"),
    include_bytes!("../goldens/no-flex-bg.img.gz"),
];

/// A piece of metadata.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Where it lies, bytes.
    pub at: usize,
    /// How long it is.
    pub len: usize,
    /// How it is protected.
    pub sum: Sum,
}

/// The checksum of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sum {
    None,
    Super,
    Desc { group: u32 },
    BlockBitmap { group: u32 },
    InodeBitmap { group: u32 },
    Inode { ino: u32 },
    Extents { ino: u32 },
    Leaf { ino: u32 },
    Index { ino: u32, count_at: usize },
    Xattrs { block: u64 },
}

/// A golden image in a file of its own that lives in memory.
pub struct Golden {
    /// The image; damaged while an input runs, and repaired afterwards.
    pub file: Arc<File>,
    /// What it is when it is whole.
    pub bytes: Vec<u8>,
    /// Its metadata.
    pub pieces: Vec<Piece>,
    /// Whether it has checksums in all metadata.
    pub has_sums: bool,
    pub seed: u32,
}

impl Golden {
    pub fn region(&self) -> Region {
        Region { file: Arc::clone(&self.file), offset: 0, len: self.bytes.len() as u64 }
    }

    fn of(bytes: Vec<u8>) -> Golden {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).expect("a temporary file");
        file.set_len(bytes.len() as u64).expect("set the length");
        for (number, block) in bytes.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|byte| *byte != 0)) {
            file.write_all_at(block, number as u64 * 4096).expect("write");
        }
        let mut golden = Golden { file: Arc::new(file), bytes, pieces: Vec::new(), has_sums: false, seed: 0 };
        let image = Image::open(&golden.region()).expect("the golden is right");
        let sb = image.superblock();
        golden.has_sums = sb.has_ro_compat(ro_compat::METADATA_CSUM);
        golden.seed = if sb.checksum_seed != 0 { sb.checksum_seed } else { csum::seed_of(&sb.uuid) };
        golden.pieces = Survey { bytes: &golden.bytes, image: &image, pieces: Vec::new() }.all();
        golden
    }
}

/// All goldens.
pub fn all() -> &'static [Golden] {
    static GOLDENS: OnceLock<Vec<Golden>> = OnceLock::new();
    GOLDENS.get_or_init(|| {
        let ours = [Profile::Modern, Profile::Compat].map(|profile| Golden::of(format(profile)));
        let foreign = FOREIGN.iter().map(|compressed| {
            let mut bytes = Vec::new();
            flate2::read::GzDecoder::new(*compressed).read_to_end(&mut bytes).expect("gzip");
            Golden::of(bytes)
        });
        ours.into_iter().chain(foreign).collect()
    })
}

/// The metadata of one image, found by walking it.
struct Survey<'a> {
    bytes: &'a [u8],
    image: &'a Image,
    pieces: Vec<Piece>,
}

impl Survey<'_> {
    fn all(mut self) -> Vec<Piece> {
        let geo = self.image.geometry().clone();
        self.pieces.push(Piece { at: 1024, len: 0x180, sum: Sum::Super });
        for group in 0..geo.groups {
            let (block, at) = geo.desc_location(group);
            let (at, len) = (block as usize * geo.block_size as usize + at, usize::from(geo.desc_size));
            let desc = GroupDesc::parse(&self.bytes[at..at + len]).expect("a descriptor");
            self.pieces.push(Piece { at, len, sum: Sum::Desc { group } });
            self.block(desc.block_bitmap, geo.blocks_per_group as usize / 8, Sum::BlockBitmap { group });
            self.block(desc.inode_bitmap, geo.inodes_per_group as usize / 8, Sum::InodeBitmap { group });
        }
        let mut inodes = vec![7, 8];
        self.image
            .walk(&mut |_, ino, _| {
                inodes.push(ino);
                Ok(())
            })
            .expect("the golden is right");
        inodes.sort_unstable();
        inodes.dedup();
        for ino in inodes {
            let (group, index) = geo.inode_group(ino);
            let (block, at) = geo.desc_location(group);
            let at = block as usize * geo.block_size as usize + at;
            let desc = GroupDesc::parse(&self.bytes[at..at + usize::from(geo.desc_size)]).expect("a descriptor");
            let (block, at) = geo.inode_location(desc.inode_table, index);
            let (at, len) = (block as usize * geo.block_size as usize + at, usize::from(geo.inode_size));
            self.pieces.push(Piece { at, len, sum: Sum::Inode { ino } });
            let inode = Inode::parse(&self.bytes[at..at + len]).expect("an inode");
            self.inode(ino, &inode);
        }
        self.pieces
    }

    fn block(&mut self, number: u64, len: usize, sum: Sum) {
        let block_size = self.image.geometry().block_size as usize;
        self.pieces.push(Piece { at: number as usize * block_size, len: len.min(block_size), sum });
    }

    fn inode(&mut self, ino: u32, inode: &Inode) {
        let block_size = self.image.geometry().block_size as usize;
        if inode.file_acl != 0 {
            self.block(inode.file_acl, block_size, Sum::Xattrs { block: inode.file_acl });
        }
        let mut data = Vec::new();
        if inode.flags & flags::EXTENTS != 0 {
            self.extents(ino, &inode.block, &mut data);
        } else if inode.is_dir() || inode.is_file() && inode.blocks > 0 {
            for i in 0..12 {
                data.extend(Some(u64::from(get_u32(&inode.block, i * 4))).filter(|block| *block != 0));
            }
            for (i, depth) in [(12, 1), (13, 2), (14, 3)] {
                self.indirect(get_u32(&inode.block, i * 4), depth, &mut data);
            }
        }
        if !inode.is_dir() {
            return;
        }
        for (i, number) in data.into_iter().enumerate() {
            let block = &self.bytes[number as usize * block_size..][..block_size];
            let indexed = inode.flags & flags::INDEX != 0;
            let spans = get_u32(block, 0) == 0 && usize::from(get_u16(block, 4)) == block_size;
            let sum = match (indexed, i, spans) {
                (true, 0, _) => Sum::Index { ino, count_at: 0x20 },
                (true, _, true) => Sum::Index { ino, count_at: 8 },
                _ => Sum::Leaf { ino },
            };
            self.block(number, block_size, sum);
        }
    }

    fn extents(&mut self, ino: u32, node: &[u8], data: &mut Vec<u64>) {
        let block_size = self.image.geometry().block_size as usize;
        let header = ExtentHeader::parse(node).expect("an extent header");
        for i in 0..usize::from(header.entries) {
            if header.depth == 0 {
                let extent = Extent::get(node, i);
                data.extend(extent.start..extent.start + u64::from(extent.len));
            } else {
                let leaf = ExtentIndex::get(node, i).leaf;
                self.block(leaf, block_size, Sum::Extents { ino });
                let bytes = self.bytes;
                self.extents(ino, &bytes[leaf as usize * block_size..][..block_size], data);
            }
        }
    }

    fn indirect(&mut self, number: u32, depth: u32, data: &mut Vec<u64>) {
        if number == 0 {
            return;
        }
        let block_size = self.image.geometry().block_size as usize;
        self.block(number.into(), block_size, Sum::None);
        let bytes = self.bytes;
        let block = &bytes[number as usize * block_size..][..block_size];
        for pointer in (0..block_size / 4).map(|i| get_u32(block, i * 4)).filter(|pointer| *pointer != 0) {
            match depth {
                1 => data.push(pointer.into()),
                _ => self.indirect(pointer, depth - 1, data),
            }
        }
    }
}

/// A tree with one of everything, in the shape of a root filesystem.
fn format(profile: Profile) -> Vec<u8> {
    let file = Arc::new(tempfile::tempfile().expect("a temporary file"));
    file.set_len(OURS_LEN).expect("set the length");
    let params = BuildParams {
        uuid: *b"0123456789abcdef",
        hash_seed: *b"fedcba9876543210",
        label: "golden".into(),
        profile,
        epoch_secs: 1_700_000_000,
        bytes_per_inode: 16384,
    };
    let region = Region { file: Arc::clone(&file), offset: 0, len: OURS_LEN };
    let mut builder = Ext4.builder(&params, region, &Progress::default()).expect("a builder");
    plant(builder.as_mut());
    builder.finish().expect("a filesystem");
    let mut bytes = vec![0; OURS_LEN as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

fn plant(sink: &mut dyn TreeSink) {
    let mut put = |path: &str, kind: EntryKind, xattrs: Vec<Xattr>, mut data: &[u8]| {
        let mtime = Timestamp { secs: 1_600_000_000, nanos: 1 };
        let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime, xattrs };
        sink.entry(&Entry { path: GuestPath::new(path).expect("a path"), kind, meta }, &mut data).expect("an entry");
    };
    let spans = |len: u64| if len == 0 { Vec::new() } else { vec![Span { offset: 0, len }] };
    let text = |text: &str| EntryKind::File { size: text.len() as u64, spans: spans(text.len() as u64) };
    let link = |target: &str| EntryKind::Symlink { target: target.as_bytes().to_vec() };
    let xattr = |name: &str, len: usize| Xattr { name: name.as_bytes().to_vec(), value: vec![b'v'; len] };
    put("/etc/hostname", text("golden\n"), vec![xattr("user.small", 3)], b"golden\n");
    put("/etc/hosts", text("127.0.0.1 localhost\n"), vec![xattr("user.large", 300)], b"127.0.0.1 localhost\n");
    put("/etc/hosts.link", EntryKind::HardLink { target: GuestPath::new("/etc/hosts").expect("a path") }, Vec::new(), b"");
    put("/etc/fast", link("../usr/lib"), Vec::new(), b"");
    put("/etc/slow", link(&"x/".repeat(200)), Vec::new(), b"");
    put("/etc/loop", link("loop"), Vec::new(), b"");
    put("/var/run", link("/run"), Vec::new(), b"");
    put("/run", EntryKind::Directory, Vec::new(), b"");
    put("/dev/null", EntryKind::CharDevice { major: 1, minor: 3 }, Vec::new(), b"");
    put("/usr/lib/deep/er/file", text("x"), Vec::new(), b"x");
    // Every other block of a file: more extents than an inode holds.
    let spans: Vec<Span> = (0..20).map(|i| Span { offset: i * 8192, len: 4096 }).collect();
    put("/var/sparse", EntryKind::File { size: 200_000, spans }, Vec::new(), &[b's'; 20 * 4096]);
    for i in 0..150 {
        put(&format!("/many/a-file-with-a-name-that-is-long-enough-to-fill-blocks-{i:03}"), text(""), Vec::new(), b"");
    }
}

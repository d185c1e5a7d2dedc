//! Squashfs images: a filesystem image to [`Entry`] values, under the same limits as a tar archive.
//!
//! Version 4.0 with the compressors gzip, xz, zstd and lz4, as `mksquashfs` and `tar2sqfs` make it (the kernel's `fs/squashfs/squashfs_fs.h`; "Squashfs binary format" of
//! squashfs-tools-ng). Owners, modes, times, devices, extended attributes, sparse blocks and hard links are read; whoever has the same tree as a tarball gets the same
//! entries, directories before what is in them.
//!
//! ```text
//! table    superblock, metadata blocks, the tables of owners, fragments and attributes
//! inode    one inode of the inode table
//! xattr    its extended attributes
//! data     its content: blocks and the piece of a fragment, as a reader
//! ```
//!
//! Nothing is mounted: the kernel's reader would see a stranger's image (failures.md, rule 5). The crate `backhand` is not used, because its reader has no extended attributes
//! and gives a hard link as another file.
//!
//! # Rules
//!
//! - Names are ascending in a directory, as the kernel relies on; a directory has one place in the tree; `.`, `..`, `/` and NUL are refused.
//! - What the filter leaves out is left out with everything below it. A hard link whose other name is left out is the file itself: every name has the data.
//! - A hole is a block that is not stored.
//! - What is behind the image in the file is not looked at.

mod data;
mod inode;
mod table;
mod xattr;

use std::collections::{HashMap, HashSet};

pub use self::table::ReadAt;
use self::{
    data::FileData,
    inode::{Inode, InodeKind},
    table::Image,
};
use super::{
    Entry, EntryKind, Meta, TreeSink,
    archive::{Limits, Summary},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
    progress::Progress,
    units::{GIB, Timestamp},
};

/// The first bytes of an image.
pub const MAGIC: [u8; 4] = *b"hsqs";
/// Longest name in a directory.
const NAME_LEN_MAX: usize = 256;
/// All blocks that are read may have so many times the bytes that the content may have: blocks of metadata and of the ends of files are needed again now and then, and an image that makes every
/// name need another of them would keep a processor busy for days.
const WORK_FACTOR: u64 = 4;
/// Blocks of all files together, holes among them.
const BLOCKS_TOTAL_MAX: u64 = 64 << 20;
/// Bytes that come out per byte of the image, once more than [`RATIO_FREE_BYTES`] came out; as of compressed archives.
const RATIO_MAX: u64 = 1000;
const RATIO_FREE_BYTES: u64 = GIB;

/// Why something is not taken, before its name is known.
#[derive(Debug)]
struct Refusal {
    kind: Kind,
    reason: &'static str,
    message: String,
    source: Option<Error>,
}

impl Refusal {
    fn corrupt(message: impl Into<String>) -> Self {
        Refusal { kind: Kind::Corrupt, reason: "ARCHIVE_CORRUPT", message: message.into(), source: None }
    }

    fn limit(message: impl Into<String>) -> Self {
        Refusal { kind: Kind::NoSpace, reason: "ARCHIVE_LIMIT", message: message.into(), source: None }
    }

    fn unsupported(message: impl Into<String>) -> Self {
        Refusal { kind: Kind::Unsupported, reason: "ARCHIVE_UNSUPPORTED", message: message.into(), source: None }
    }

    fn at(self, path: &GuestPath) -> Error {
        match self.source {
            // What the reader below had to say, not the image's fault.
            Some(source) => source,
            None => Error::new(self.kind, Stage::Golden, format!("squashfs {}", path.display()), self.message).with_reason(self.reason),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal { kind: error.kind(), reason: "ARCHIVE_CORRUPT", message: String::new(), source: Some(error) }
    }
}

type Checked<T> = std::result::Result<T, Refusal>;

/// A name in a directory.
#[derive(Debug)]
struct Name {
    name: Vec<u8>,
    /// Where its inode is.
    inode: u64,
}

/// Reads a whole image into `sink`.
///
/// `filter` is asked with absolute guest paths and says `true` for what to leave out; what is below such a path is left out too, and `/` itself never is. `progress` is asked
/// whether to stop; it is not advanced.
///
/// Errors carry the name as object: `Kind::Corrupt` for damage (`ARCHIVE_CORRUPT`, `ARCHIVE_TRUNCATED`), `Kind::Unsupported` for what this reader does not know
/// (`ARCHIVE_UNSUPPORTED`), `Kind::NoSpace` for limits (`ARCHIVE_LIMIT`), and what the input and the sink fail with.
pub fn read(
    input: &dyn ReadAt,
    limits: &Limits,
    filter: &dyn Fn(&GuestPath) -> bool,
    sink: &mut dyn TreeSink,
    progress: &Progress,
) -> Result<Summary> {
    let root = GuestPath::root();
    let mut image = Image::open(input, limits.archive_bytes.saturating_mul(WORK_FACTOR)).map_err(|refusal| refusal.at(&root))?;
    let mut walk = Walk {
        limits,
        filter,
        sink,
        progress,
        summary: Summary::default(),
        links: HashMap::new(),
        directories: HashSet::new(),
        seen: 0,
        out: 0,
        blocks: 0,
    };
    let place = image.root();
    let names = walk.node(&mut image, &root, place)?;
    let mut stack = vec![(root, names.unwrap_or_default().into_iter())];
    while let Some((directory, names)) = stack.last_mut() {
        let Some(Name { name, inode }) = names.next() else {
            stack.pop();
            continue;
        };
        progress.check()?;
        let path = directory.join(&name).map_err(|why| Refusal::corrupt(why).at(directory))?;
        if (walk.filter)(&path) {
            walk.summary.left_out += 1;
            continue;
        }
        if let Some(names) = walk.node(&mut image, &path, inode)? {
            stack.push((path, names.into_iter()));
            if stack.len() > limits.depth {
                let (directory, _) = &stack[stack.len() - 1];
                return Err(Refusal::limit(format!("more than {} directories deep", limits.depth)).at(directory));
            }
        }
    }
    walk.summary.archive_bytes = image.len();
    Ok(walk.summary)
}

/// The way through an image.
struct Walk<'w> {
    limits: &'w Limits,
    filter: &'w dyn Fn(&GuestPath) -> bool,
    sink: &'w mut dyn TreeSink,
    progress: &'w Progress,
    summary: Summary,
    /// The first names of inodes that have several.
    links: HashMap<u64, GuestPath>,
    /// Directories that have been entered.
    directories: HashSet<u64>,
    seen: u64,
    /// Bytes of content so far.
    out: u64,
    /// Blocks of files so far.
    blocks: u64,
}

impl Walk<'_> {
    /// Gives what is at `path` to the sink. The names in it, of a directory.
    fn node(&mut self, image: &mut Image<'_>, path: &GuestPath, place: u64) -> Result<Option<Vec<Name>>> {
        let refuse = |refusal: Refusal| refusal.at(path);
        self.seen += 1;
        if self.seen > self.limits.entries {
            return Err(refuse(Refusal::limit(format!("the image has more than {} names", self.limits.entries))));
        }
        let inode = Inode::read(image, place, self.limits).map_err(refuse)?;
        if let InodeKind::Directory(listing) = &inode.kind {
            if !self.directories.insert(place) {
                return Err(refuse(Refusal::corrupt("the directory has a second place in the tree")));
            }
            let names = image.names(listing, self.limits.entries - self.seen).map_err(refuse)?;
            let entry = Entry { path: path.clone(), kind: EntryKind::Directory, meta: self.meta(image, &inode).map_err(refuse)? };
            self.sink.entry(&entry, &mut std::io::empty())?;
            self.summary.entries += 1;
            return Ok(Some(names));
        }
        if path.is_root() {
            return Err(refuse(Refusal::corrupt("the root is no directory")));
        }
        let target = if inode.links > 1 { self.links.get(&place).cloned() } else { None };
        let meta = self.meta(image, &inode).map_err(refuse)?;
        self.summary.entries += 1;
        if let Some(target) = target {
            let entry = Entry { path: path.clone(), kind: EntryKind::HardLink { target }, meta };
            self.sink.entry(&entry, &mut std::io::empty())?;
            return Ok(None);
        }
        match inode.kind {
            InodeKind::File(content) => {
                self.blocks += content.blocks.len() as u64;
                if self.blocks > BLOCKS_TOTAL_MAX {
                    return Err(refuse(Refusal::limit(format!("the files have more than {BLOCKS_TOTAL_MAX} blocks"))));
                }
                let (kind, stored) = content.describe(self.limits).map_err(refuse)?;
                self.out = self.out.saturating_add(stored);
                self.check_output(image.len()).map_err(refuse)?;
                self.summary.data_bytes += stored;
                let entry = Entry { path: path.clone(), kind, meta };
                let mut data = FileData::new(image, content, self.progress);
                let taken = self.sink.entry(&entry, &mut data);
                // When reading failed, that is the cause of whatever the sink reports.
                if let Some(failure) = data.take_failure() {
                    return Err(refuse(failure));
                }
                taken?;
            }
            InodeKind::Other(kind) => self.sink.entry(&Entry { path: path.clone(), kind, meta }, &mut std::io::empty())?,
            InodeKind::Directory(_) => return Err(Error::internal(Stage::Golden, path.display(), "a directory was taken for something else")),
        }
        if inode.links > 1 {
            self.links.insert(place, path.clone());
        }
        Ok(None)
    }

    fn meta(&mut self, image: &mut Image<'_>, inode: &Inode) -> Checked<Meta> {
        let (xattrs, dropped) = image.xattrs(inode.xattrs, self.limits)?;
        self.summary.xattrs_dropped += dropped;
        let (uid, gid) = (image.owner(inode.owner)?, image.owner(inode.group)?);
        Ok(Meta { mode: inode.mode & 0o7777, uid, gid, mtime: Timestamp { secs: i64::from(inode.mtime), nanos: 0 }, xattrs })
    }

    fn check_output(&self, image_len: u64) -> Checked<()> {
        if self.out > self.limits.archive_bytes {
            return Err(Refusal::limit(format!("the content has more than {} bytes", self.limits.archive_bytes)));
        }
        if self.out > RATIO_FREE_BYTES && self.out / RATIO_MAX > image_len {
            let refusal = Refusal::limit(format!("more than {RATIO_MAX} bytes come out of each byte of the image"));
            return Err(Refusal { reason: "DECOMPRESS_LIMIT", ..refusal });
        }
        Ok(())
    }
}

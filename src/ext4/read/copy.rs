//! Copying a part of the tree into a sink, such as another filesystem's builder.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Read},
};

use super::{Image, Node};
use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::layout::{
        corrupt,
        extent::Extent,
        inode::{decode_device, mode},
    },
    names::GuestPath,
    progress::Progress,
    tree::{Entry, EntryKind, Meta, Span, TreeSink},
};

/// Deepest tree that is copied; paths have at most 4096 bytes.
const DEPTH_MAX: usize = 2048;

impl Image {
    /// Gives what is at `from` (links followed) and everything below it to `sink`, with `to` in place of `from`, a directory before its entries. Names
    /// that share an inode become hard links; holes stay holes. Gives the entry at the top, or nothing when there is nothing at `from`.
    ///
    /// Reads the image as it lies in its region: not for one that the editor has changed.
    pub fn copy_tree(&self, from: &GuestPath, to: &GuestPath, sink: &mut dyn TreeSink, progress: &Progress) -> Result<Option<EntryKind>> {
        let Some(top) = self.resolve(from)? else { return Ok(None) };
        let (mut seen, mut names) = (HashSet::new(), HashMap::new());
        let mut todo = vec![(to.clone(), top, 0)];
        let mut first = None;
        while let Some((path, ino, depth)) = todo.pop() {
            progress.check()?;
            let node = self.node(ino)?;
            let kind = match names.get(&ino) {
                Some(earlier) => EntryKind::HardLink { target: GuestPath::clone(earlier) },
                None => self.entry_kind(&node)?,
            };
            if node.inode.is_dir() {
                // A directory has one name; another one closes a loop.
                if !seen.insert(ino) || depth >= DEPTH_MAX {
                    return Err(corrupt(format!("directory inode {ino}"), "is part of a loop"));
                }
                for item in self.dir_items(&node)?.into_iter().rev() {
                    let below = path.join(&item.name).map_err(|why| Error::new(Kind::Corrupt, Stage::Edit, path.to_string(), why))?;
                    todo.push((below, item.ino, depth + 1));
                }
            } else if node.inode.links > 1 {
                names.entry(ino).or_insert_with(|| path.clone());
            }
            let mut data = self.spans_reader(&node, &kind, progress)?;
            let entry = Entry { path, kind, meta: self.meta_of(&node)? };
            sink.entry(&entry, &mut data)?;
            first.get_or_insert(entry.kind);
        }
        Ok(first)
    }

    fn meta_of(&self, node: &Node) -> Result<Meta> {
        let inode = &node.inode;
        Ok(Meta { mode: inode.mode & !mode::TYPE, uid: inode.uid, gid: inode.gid, mtime: inode.mtime, xattrs: self.node_xattrs(node)? })
    }

    fn entry_kind(&self, node: &Node) -> Result<EntryKind> {
        let (major, minor) = decode_device(&node.inode.block);
        Ok(match node.inode.mode & mode::TYPE {
            mode::DIR => EntryKind::Directory,
            mode::FILE => EntryKind::File { size: node.inode.size, spans: self.spans(node)?.into_iter().map(|(span, _)| span).collect() },
            mode::SYMLINK => EntryKind::Symlink { target: self.link_target(node)? },
            mode::CHAR => EntryKind::CharDevice { major, minor },
            mode::BLOCK => EntryKind::BlockDevice { major, minor },
            mode::FIFO => EntryKind::Fifo,
            mode::SOCKET => EntryKind::Socket,
            other => return Err(corrupt(format!("inode {}", node.ino), format!("has file type {other:#o}"))),
        })
    }

    /// Where a file has data, and where on the filesystem (byte) each piece lies.
    fn spans(&self, node: &Node) -> Result<Vec<(Span, u64)>> {
        let block_size = u64::from(self.geo.block_size);
        let mut spans: Vec<(Span, u64)> = Vec::new();
        for Extent { block, len, start, .. } in self.mapping(node)?.runs.into_iter().filter(|run| !run.unwritten) {
            let offset = u64::from(block) * block_size;
            let len = (u64::from(len) * block_size).min(node.inode.size.saturating_sub(offset));
            if len > 0 {
                spans.push((Span { offset, len }, start * block_size));
            }
        }
        Ok(spans)
    }

    fn spans_reader<'a>(&'a self, node: &Node, kind: &EntryKind, progress: &'a Progress) -> Result<SpansReader<'a>> {
        let spans = if matches!(kind, EntryKind::File { .. }) { self.spans(node)? } else { Vec::new() };
        Ok(SpansReader { image: self, pieces: spans.into_iter().map(|(span, at)| (at, span.len)).rev().collect(), progress })
    }
}

/// The bytes of a file's spans one after another.
struct SpansReader<'a> {
    image: &'a Image,
    /// Place on the filesystem and bytes left of each piece, the first one last.
    pieces: Vec<(u64, u64)>,
    progress: &'a Progress,
}

impl Read for SpansReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some((at, left)) = self.pieces.last_mut() else { return Ok(0) };
        let len = usize::try_from(*left).unwrap_or(usize::MAX).min(into.len());
        // The sink gets back what happened by `error_of_read`.
        self.progress.check().and_then(|()| self.image.read_golden(*at, &mut into[..len])).map_err(io::Error::other)?;
        (*at, *left) = (*at + len as u64, *left - len as u64);
        if *left == 0 {
            self.pieces.pop();
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        ext4::Ext4,
        fs::{BuildParams, Filesystem, Profile, Region},
        tree::{Xattr, model::Model},
        units::{MIB, Timestamp},
    };

    fn path(text: &str) -> GuestPath {
        text.parse().expect("a path")
    }

    fn entries() -> Vec<(Entry, Vec<u8>)> {
        let meta = |mode| Meta { mode, uid: 70_000, gid: 5, mtime: Timestamp { secs: 1_700_000_000, nanos: 7 }, xattrs: Vec::new() };
        let entry = |name: &str, kind, mode| Entry { path: path(name), kind, meta: meta(mode) };
        let holes = EntryKind::File { size: 9_000_000, spans: vec![Span { offset: 4096, len: 8192 }, Span { offset: 8_000_000, len: 1_000 }] };
        let mut marked = entry("/srv/app/marked", EntryKind::File { size: 3, spans: vec![Span { offset: 0, len: 3 }] }, 0o600);
        marked.meta.xattrs = vec![Xattr { name: b"user.mark".to_vec(), value: vec![9; 200] }];
        vec![
            (entry("/srv", EntryKind::Directory, 0o755), vec![]),
            (entry("/srv/app", EntryKind::Directory, 0o2750), vec![]),
            (entry("/srv/app/holes", holes, 0o644), (0..9_192u32).map(|byte| byte as u8 | 1).collect()),
            (marked, b"abc".to_vec()),
            (entry("/srv/app/other-name", EntryKind::HardLink { target: path("/srv/app/marked") }, 0), vec![]),
            (entry("/srv/app/link", EntryKind::Symlink { target: vec![b'x'; 300] }, 0o777), vec![]),
            (entry("/srv/app/sub", EntryKind::Directory, 0o700), vec![]),
            (entry("/srv/app/sub/fifo", EntryKind::Fifo, 0o600), vec![]),
            (entry("/srv/app/sub/null", EntryKind::CharDevice { major: 1, minor: 3 }, 0o666), vec![]),
            (entry("/short", EntryKind::Symlink { target: b"srv/app".to_vec() }, 0o777), vec![]),
        ]
    }

    fn image() -> Image {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(32 * MIB).expect("sized");
        let region = Region { file: Arc::new(file), offset: 0, len: 32 * MIB };
        let params =
            BuildParams { uuid: [1; 16], hash_seed: [2; 16], label: String::new(), profile: Profile::Modern, epoch_secs: 1, bytes_per_inode: 16384 };
        let mut builder = Ext4.builder(&params, region.clone(), &Progress::default()).expect("begins");
        for (entry, data) in entries() {
            builder.entry(&entry, &mut data.as_slice()).expect("takes it");
        }
        builder.finish().expect("finishes");
        Image::open(&region).expect("opens")
    }

    #[test]
    fn a_copied_tree_is_the_tree_with_links_holes_and_attributes() {
        let (mut copy, mut want) = (Model::default(), Model::default());
        for (mut entry, data) in entries().into_iter().filter(|(entry, _)| entry.path.is_within(&path("/srv/app"))) {
            let renamed = |path: &GuestPath| GuestPath::new(path.to_string().replacen("/srv/app", "/data", 1)).expect("a path");
            entry.path = renamed(&entry.path);
            if let EntryKind::HardLink { target } = &mut entry.kind {
                *target = renamed(target);
            }
            want.entry(&entry, &mut data.as_slice()).expect("takes it");
        }
        // The top is named through a link.
        let kind = image().copy_tree(&path("/short"), &path("/data"), &mut copy, &Progress::default()).expect("copies");
        assert_eq!(kind, Some(EntryKind::Directory));
        let listed = |model: &Model| -> Vec<(GuestPath, Meta, Option<Vec<u8>>)> {
            model.iter().map(|(path, node)| (path.clone(), node.meta.clone(), node.content(u64::MAX))).collect()
        };
        assert_eq!(listed(&copy), listed(&want));
        assert_eq!(copy.links(&path("/data/marked")).len(), 2);
        let EntryKind::File { spans, .. } = &copy.get(&path("/data/holes")).expect("is there").kind else { panic!("a file") };
        assert!(spans.iter().map(|span| span.len).sum::<u64>() < 32_768, "holes stay holes: {spans:?}");
        assert_eq!(image().copy_tree(&path("/nowhere"), &path("/data"), &mut copy, &Progress::default()).expect("looks"), None);
    }

    #[test]
    fn a_cancelled_copy_stops_inside_a_file() {
        let progress = Progress::default();
        progress.cancel();
        let error = image().copy_tree(&path("/srv"), &path("/x"), &mut Model::default(), &progress).expect_err("stops");
        assert_eq!(error.kind(), Kind::Cancelled);
    }
}

//! Facts of a filesystem that is there already, as a guest left it.
//!
//! A golden's facts are gathered while its tarball streams by; an instance's volume has been written to by its guest since, and only the filesystem itself says
//! what is in it now. Nothing in it is trusted: the walk goes only into directories below which the policy could list something, and what it reads is bounded
//! in entries, directory bytes, depth and content. Symlinks are recorded, not followed, but for the way to the homes that `/etc/passwd` names: anywhere in the
//! tree there may be one, and only there is `.ssh` looked for.
//!
//! For the same tree the facts are those that [`crate::tree::collect::Collector`] gathers, with two exceptions that no injection depends on: a `.ssh` that is
//! nobody's home is not found here, and a hard link to a path that is not listed has its content here.

use std::collections::{BTreeSet, VecDeque};

use crate::{
    error::{Error, Kind, Result, Stage},
    ext4::{
        layout::inode::{Inode, mode},
        read::Image,
    },
    guest::facts::{CONTENT_LEN_MAX, CONTENT_TOTAL_MAX, FactsPolicy, GuestFacts, Node, NodeKind},
    names::GuestPath,
    progress::Progress,
};

/// Names looked at, at most. A full desktop has 20 000 in the directories that matter.
const ENTRIES_MAX: usize = 1 << 20;
/// Bytes of one directory, at most: some 500 000 names.
const DIRECTORY_BYTES_MAX: u64 = 32 << 20;
/// Bytes of all directories that are read, at most.
const DIRECTORIES_BYTES_MAX: u64 = 256 << 20;
/// Paths that become facts, at most.
const NODES_MAX: usize = 1 << 17;
/// Components of a path, at most; patterns have up to seven, homes are short.
const DEPTH_MAX: usize = 64;
/// Homes that are looked into, at most.
const HOMES_MAX: usize = 4096;
/// Symlinks followed on the way to one home, as Linux (MAXSYMLINKS).
const LINKS_MAX: usize = 40;

/// The facts of the tree in `image` under `policy`. `Kind::Corrupt` says what is wrong with the filesystem, `Kind::NoSpace` (reason `GUEST_TREE_TOO_LARGE`)
/// which bound the tree does not keep.
pub fn facts_of_image(image: &Image, policy: &dyn FactsPolicy, progress: &Progress) -> Result<GuestFacts> {
    let mut survey = Survey { image, policy, progress, facts: GuestFacts::default(), entries: 0, directory_bytes: 0, content_total: 0 };
    survey.walk()?;
    survey.homes()?;
    Ok(survey.facts)
}

struct Survey<'a> {
    image: &'a Image,
    policy: &'a dyn FactsPolicy,
    progress: &'a Progress,
    facts: GuestFacts,
    entries: usize,
    directory_bytes: u64,
    content_total: u64,
}

/// `directory` without its final slash, which only the root has, then `/name`.
fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

fn too_large(object: &str, what: impl Into<String>) -> Error {
    Error::new(Kind::NoSpace, Stage::Inject, object, what).with_reason("GUEST_TREE_TOO_LARGE")
}

impl Survey<'_> {
    fn walk(&mut self) -> Result<()> {
        let mut todo = VecDeque::from([("/".to_owned(), crate::ext4::layout::ino::ROOT, 0)]);
        let mut seen = BTreeSet::new();
        while let Some((path, ino, depth)) = todo.pop_front() {
            self.progress.check()?;
            // A directory has one name; another one closes a loop.
            if !seen.insert(ino) || depth > DEPTH_MAX {
                return Err(Error::new(Kind::Corrupt, Stage::Inject, path, format!("directory inode {ino} is part of a loop")));
            }
            for (name, below) in self.names(&path, ino)? {
                let at = join(&path, &name);
                if !self.policy.lists(&at) {
                    continue;
                }
                let inode = self.image.stat(below)?;
                if inode.is_dir() {
                    todo.push_back((at.clone(), below, depth + 1));
                }
                self.list(at, below, &inode)?;
            }
        }
        // A golden's facts have the root when anything is below it.
        if !self.facts.nodes.is_empty() {
            let root = self.image.stat(crate::ext4::layout::ino::ROOT)?;
            self.list("/".to_owned(), crate::ext4::layout::ino::ROOT, &root)?;
        }
        Ok(())
    }

    /// The names in a directory that are text, with their inodes.
    fn names(&mut self, path: &str, ino: u32) -> Result<Vec<(String, u32)>> {
        let size = self.image.stat(ino)?.size;
        self.directory_bytes = self.directory_bytes.saturating_add(size);
        if size > DIRECTORY_BYTES_MAX || self.directory_bytes > DIRECTORIES_BYTES_MAX {
            return Err(too_large(
                path,
                format!("the directory has {size} bytes, the limit is {DIRECTORY_BYTES_MAX}, and {DIRECTORIES_BYTES_MAX} for all"),
            ));
        }
        let items = self.image.read_dir(ino)?;
        self.entries = self.entries.saturating_add(items.len());
        if self.entries > ENTRIES_MAX {
            return Err(too_large(path, format!("more than {ENTRIES_MAX} names in the directories that are read")));
        }
        Ok(items.into_iter().filter_map(|item| Some((String::from_utf8(item.name).ok()?, item.ino))).collect())
    }

    fn list(&mut self, path: String, ino: u32, inode: &Inode) -> Result<()> {
        if self.facts.nodes.len() >= NODES_MAX {
            return Err(too_large(&path, format!("more than {NODES_MAX} paths matter")));
        }
        let kind = match inode.mode & mode::TYPE {
            mode::DIR => NodeKind::Directory,
            mode::FILE => NodeKind::File { size: inode.size, content: self.content(&path, ino, inode)? },
            // A target that is not text leads to a path that is not in the facts anyway.
            mode::SYMLINK => match String::from_utf8(self.image.read_link(ino)?) {
                Ok(target) => NodeKind::Symlink { target },
                Err(_) => NodeKind::Other,
            },
            _ => NodeKind::Other,
        };
        self.facts.nodes.insert(path, Node { kind, mode: inode.mode & !mode::TYPE, uid: inode.uid, gid: inode.gid });
        Ok(())
    }

    fn content(&mut self, path: &str, ino: u32, inode: &Inode) -> Result<Option<Vec<u8>>> {
        let fits = inode.size <= CONTENT_LEN_MAX && self.content_total + inode.size <= CONTENT_TOTAL_MAX;
        if !fits || !self.policy.keeps_content(path) {
            return Ok(None);
        }
        self.content_total += inode.size;
        self.image.read_file(ino, CONTENT_LEN_MAX).map(Some)
    }

    /// Lists `.ssh` and what is in it that the policy wants, in every home that passwd(5) has.
    fn homes(&mut self) -> Result<()> {
        let text = self.facts.text("/etc/passwd").unwrap_or_default();
        let homes: BTreeSet<String> =
            text.lines().filter_map(|line| line.split(':').nth(5)).filter(|home| home.starts_with('/')).map(str::to_owned).collect();
        for home in homes.iter().take(HOMES_MAX) {
            self.progress.check()?;
            let Some(real) = self.real_directory(home)? else { continue };
            for name in [".ssh", ".ssh/authorized_keys"] {
                let path = join(&real, name);
                if self.facts.nodes.contains_key(&path) || !self.policy.lists(&path) {
                    continue;
                }
                let Some((ino, inode)) = self.stat(&path)? else { break };
                self.list_parents(&path)?;
                let is_dir = inode.is_dir();
                self.list(path, ino, &inode)?;
                if !is_dir {
                    break;
                }
            }
        }
        Ok(())
    }

    /// What is at a path, links not followed. Nothing for what can't be a path.
    fn stat(&self, path: &str) -> Result<Option<(u32, Inode)>> {
        let Ok(path) = GuestPath::new(path) else { return Ok(None) };
        match self.image.lookup(&path) {
            Ok(Some(ino)) => Ok(Some((ino, self.image.stat(ino)?))),
            Ok(None) => Ok(None),
            // Links that loop or climb lead nowhere.
            Err(error) if error.kind() == Kind::Conflict => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The path of a directory without symlinks in it, if it is there.
    fn real_directory(&self, path: &str) -> Result<Option<String>> {
        let mut rest: VecDeque<String> = path.split('/').map(str::to_owned).collect();
        let (mut at, mut links) = (String::new(), 0);
        while let Some(name) = rest.pop_front() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    at.truncate(at.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = format!("{at}/{name}");
            let Some((ino, inode)) = self.stat(&next)? else { return Ok(None) };
            if inode.is_symlink() {
                links += 1;
                let Ok(target) = String::from_utf8(self.image.read_link(ino)?) else { return Ok(None) };
                if links > LINKS_MAX || rest.len() > DEPTH_MAX {
                    return Ok(None);
                }
                if target.starts_with('/') {
                    at.clear();
                }
                for part in target.rsplit('/') {
                    rest.push_front(part.to_owned());
                }
                continue;
            }
            if !inode.is_dir() {
                return Ok(None);
            }
            at = next;
        }
        Ok(Some(if at.is_empty() { "/".to_owned() } else { at }))
    }

    /// The directories above a path that are not facts yet.
    fn list_parents(&mut self, path: &str) -> Result<()> {
        let ends: Vec<usize> = path.char_indices().filter(|(at, c)| *c == '/' && *at > 0).map(|(at, _)| at).collect();
        for parent in std::iter::once("/").chain(ends.into_iter().map(|end| &path[..end])) {
            if !self.facts.nodes.contains_key(parent)
                && let Some((ino, inode)) = self.stat(parent)?
            {
                self.list(parent.to_owned(), ino, &inode)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, sync::Arc};

    use super::*;
    use crate::{
        ext4::Ext4,
        fs::{BuildParams, Filesystem, Profile, Region},
        guest::watch::Watch,
        tree::{Entry, EntryKind, Meta, Span, TreeSink, collect::Collector},
        units::MIB,
    };

    fn path(text: &str) -> GuestPath {
        GuestPath::new(text).expect("a path")
    }

    fn file(path: &str, content: &[u8]) -> (String, EntryKind, u16, Vec<u8>) {
        let len = content.len() as u64;
        (path.to_owned(), EntryKind::File { size: len, spans: vec![Span { offset: 0, len }] }, 0o640, content.to_vec())
    }

    fn link(path: &str, target: &str) -> (String, EntryKind, u16, Vec<u8>) {
        (path.to_owned(), EntryKind::Symlink { target: target.into() }, 0o777, Vec::new())
    }

    fn directory(path: &str, mode: u16) -> (String, EntryKind, u16, Vec<u8>) {
        (path.to_owned(), EntryKind::Directory, mode, Vec::new())
    }

    /// The tree's filesystem, and the facts that its stream gave.
    fn built(entries: &[(String, EntryKind, u16, Vec<u8>)], watch: &Watch) -> (Region, GuestFacts) {
        let disk = tempfile::tempfile().expect("a file");
        disk.set_len(32 * MIB).expect("sized");
        let region = Region { file: Arc::new(disk), offset: 0, len: 32 * MIB };
        let params =
            BuildParams { uuid: [1; 16], hash_seed: [2; 16], label: String::new(), profile: Profile::Modern, epoch_secs: 1, bytes_per_inode: 16384 };
        let mut builder = Ext4.builder(&params, region.clone(), &Progress::default()).expect("begins");
        let mut collector = Collector::new(&mut *builder, watch);
        for (at, kind, mode, data) in entries {
            let entry = Entry { path: path(at), kind: kind.clone(), meta: Meta { mode: *mode, uid: 7, gid: 8, ..Meta::default() } };
            collector.entry(&entry, &mut data.as_slice()).expect("takes it");
        }
        let facts = collector.finish();
        builder.finish().expect("finishes");
        (region, facts)
    }

    fn facts(region: &Region, watch: &Watch) -> Result<GuestFacts> {
        facts_of_image(&Image::open(region)?, watch, &Progress::default())
    }

    fn guest() -> Vec<(String, EntryKind, u16, Vec<u8>)> {
        let passwd = b"root:x:0:0::/root:/bin/sh\nu:x:1:1::/srv/people/u:/bin/sh\nl:x:2:2::/export/l:/bin/sh\nn:x:3:3::/nowhere:/bin/sh\nbroken\nd:x:4:4::/../etc/..:/x\n";
        vec![
            directory("/etc", 0o755),
            file("/etc/passwd", passwd),
            file("/etc/hosts", b"127.0.0.1 localhost\n"),
            file("/etc/ssh/ssh_host_rsa_key", b"secret"),
            file("/etc/netplan/10.yaml", b"network: {}\n"),
            file("/etc/moduli", b"not listed"),
            directory("/usr/lib/systemd/system", 0o711),
            file("/usr/lib/systemd/systemd", b"ELF"),
            file("/usr/lib/systemd/system/ssh.service", b"[Unit]\n"),
            directory("/usr/share", 0o755),
            file("/usr/share/doc/x", b"not listed"),
            link("/lib", "usr/lib"),
            link("/export", "/srv/real/"),
            directory("/srv/people/u", 0o700),
            directory("/srv/people/u/.ssh", 0o700),
            file("/srv/people/u/.ssh/authorized_keys", b"ssh-ed25519 AAAA\n"),
            file("/srv/people/u/.ssh/id_ed25519", b"not listed"),
            file("/srv/real/l/.ssh/authorized_keys", b"ssh-ed25519 BBBB\n"),
            directory("/root/.ssh", 0o700),
            ("/etc/systemd/network/fifo".to_owned(), EntryKind::Fifo, 0o600, Vec::new()),
            ("/etc/hostname".to_owned(), EntryKind::HardLink { target: path("/etc/hosts") }, 0, Vec::new()),
        ]
    }

    #[test]
    fn an_image_gives_the_facts_that_its_stream_gave() {
        let watch = Watch::new(&[path("/srv/app/conf.tmpl")]);
        let mut entries = guest();
        entries.push(file("/srv/app/conf.tmpl", b"<%= 1 %>"));
        // Enough names for an index.
        entries.extend((0..2_000).map(|number| file(&format!("/etc/init.d/service-{number:05}"), b"#!")));
        let (region, want) = built(&entries, &watch);
        let got = facts(&region, &watch).expect("reads");
        let differ: Vec<_> = want.nodes.iter().filter(|(path, node)| got.nodes.get(*path) != Some(node)).collect();
        assert!(differ.is_empty(), "{differ:#?}");
        let more: Vec<_> = got.nodes.keys().filter(|path| !want.nodes.contains_key(*path)).collect();
        assert!(more.is_empty(), "{more:?}");
        assert!(got.exists("/export/l/.ssh/authorized_keys") || got.exists("/srv/real/l/.ssh/authorized_keys"));
    }

    #[test]
    fn a_damaged_image_is_an_error_or_other_facts_and_never_a_panic() {
        let watch = Watch::new(&[]);
        let (region, want) = built(&guest(), &watch);
        let mut bytes = vec![0; region.len as usize];
        region.file.read_exact_at(&mut bytes, 0).expect("reads");
        let used: Vec<usize> =
            bytes.chunks(512).enumerate().filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0)).map(|(number, _)| number * 512).collect();
        let (mut failed, mut state) = (0, 0x9e37_79b9_7f4a_7c15u64);
        for round in 0..400 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = used[(state >> 33) as usize % used.len()] + (state >> 20) as usize % 512;
            region.file.write_all_at(&[bytes[at] ^ (1 << (round % 8))], at as u64).expect("writes");
            failed += u32::from(facts(&region, &watch).is_err());
            region.file.write_all_at(&bytes[at..=at], at as u64).expect("writes");
        }
        assert!(failed > 20, "checksums see most of it: {failed}");
        assert_eq!(facts(&region, &watch).expect("whole again").nodes, want.nodes);
    }

    #[test]
    fn too_many_names_are_refused_by_name() {
        let watch = Watch::new(&[]);
        let (region, _) = built(&guest(), &watch);
        let image = Image::open(&region).expect("opens");
        let mut survey = Survey {
            image: &image,
            policy: &watch,
            progress: &Progress::default(),
            facts: GuestFacts::default(),
            entries: ENTRIES_MAX,
            directory_bytes: 0,
            content_total: 0,
        };
        assert_eq!(survey.walk().expect_err("too many").reason(), "GUEST_TREE_TOO_LARGE");
        (survey.entries, survey.directory_bytes) = (0, DIRECTORIES_BYTES_MAX);
        assert_eq!(survey.walk().expect_err("too large").reason(), "GUEST_TREE_TOO_LARGE");
    }
}

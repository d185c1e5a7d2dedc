//! What the tests share: entries made by code, a reference model of the sink's rules, an image in a temporary directory, and its judges.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use cloudletd::{
    error::Result,
    ext4::format::builder,
    fs::{BuildParams, BuiltFs, Profile, Region, TreeBuilder},
    names::GuestPath,
    progress::Progress,
    tree::{Entry, EntryKind, Meta, Span, Xattr},
    units::Timestamp,
};

use crate::common::e2fsck;

/// An entry with its data.
#[derive(Clone)]
pub struct Item {
    pub entry: Entry,
    pub data: Vec<u8>,
}

impl std::fmt::Debug for Item {
    /// Without contents: failing property tests print many items.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Entry { path, kind, meta }, data) = (&self.entry, self.data.len());
        let kind = format!("{kind:.60?}");
        write!(f, "{path} {kind:.60} {data} bytes, {:o} {}:{} {:?} {} xattrs", meta.mode, meta.uid, meta.gid, meta.mtime, meta.xattrs.len())
    }
}

pub fn meta(mode: u16) -> Meta {
    Meta { mode, uid: 0, gid: 0, mtime: Timestamp { secs: 1_400_000_000, nanos: 123_456_789 }, xattrs: Vec::new() }
}

fn item(path: impl AsRef<[u8]>, kind: EntryKind, mode: u16, data: Vec<u8>) -> Item {
    Item { entry: Entry { path: GuestPath::new(path.as_ref()).expect("a valid path"), kind, meta: meta(mode) }, data }
}

pub fn dir(path: impl AsRef<[u8]>) -> Item {
    item(path, EntryKind::Directory, 0o755, Vec::new())
}

pub fn file(path: impl AsRef<[u8]>, data: impl Into<Vec<u8>>) -> Item {
    let data = data.into();
    let len = data.len() as u64;
    let spans = if len > 0 { vec![Span { offset: 0, len }] } else { Vec::new() };
    item(path, EntryKind::File { size: len, spans }, 0o644, data)
}

/// A file of `size` bytes with one span of `data` at each offset.
pub fn sparse(path: impl AsRef<[u8]>, size: u64, spans: &[(u64, Vec<u8>)]) -> Item {
    let list = spans.iter().map(|(offset, data)| Span { offset: *offset, len: data.len() as u64 }).collect();
    let data = spans.iter().flat_map(|(_, data)| data.clone()).collect();
    item(path, EntryKind::File { size, spans: list }, 0o600, data)
}

pub fn symlink(path: impl AsRef<[u8]>, target: impl Into<Vec<u8>>) -> Item {
    item(path, EntryKind::Symlink { target: target.into() }, 0o777, Vec::new())
}

pub fn link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
    item(path, EntryKind::HardLink { target: GuestPath::new(target.as_ref()).expect("a valid path") }, 0o644, Vec::new())
}

pub fn node(path: impl AsRef<[u8]>, kind: EntryKind) -> Item {
    item(path, kind, 0o640, Vec::new())
}

impl Item {
    pub fn with(mut self, change: impl FnOnce(&mut Meta)) -> Self {
        change(&mut self.entry.meta);
        self
    }

    pub fn xattr(self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        let value = value.into();
        self.with(|meta| {
            meta.xattrs.push(Xattr { name: name.as_bytes().to_vec(), value });
            meta.xattrs.sort();
        })
    }
}

pub fn params(profile: Profile) -> BuildParams {
    BuildParams {
        uuid: *b"\x12\x34UUID-of-tests!",
        hash_seed: *b"seed of hashes!!",
        label: "tests".into(),
        profile,
        epoch_secs: 1_600_000_000,
        bytes_per_inode: 16384,
    }
}

/// A filesystem in a sparse file of a temporary directory.
pub struct Image {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
    pub built: BuiltFs,
}

/// A builder that writes at `offset` of a new sparse file.
pub fn start(path: &Path, offset: u64, size: u64, params: &BuildParams) -> Result<Box<dyn TreeBuilder>> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).expect("create the disk file");
    file.set_len(offset + size).expect("set the disk's size");
    builder(params, Region { file: Arc::new(file), offset, len: size }, &Progress::default())
}

pub fn feed(sink: &mut dyn TreeBuilder, items: &[Item]) -> Result<()> {
    items.iter().try_for_each(|item| sink.entry(&item.entry, &mut &item.data[..]))
}

impl Image {
    pub fn with(size: u64, params: &BuildParams, fill: impl FnOnce(&mut dyn TreeBuilder) -> Result<()>) -> Result<Image> {
        let dir = tempfile::tempdir().expect("make a temporary directory");
        let path = dir.path().join("disk.img");
        let mut builder = start(&path, 0, size, params)?;
        fill(&mut *builder)?;
        let built = builder.finish()?;
        Ok(Image { dir, path, built })
    }

    pub fn of(size: u64, profile: Profile, items: &[Item]) -> Image {
        Image::with(size, &params(profile), |sink| feed(sink, items)).expect("build the filesystem")
    }

    #[track_caller]
    pub fn assert_clean(&self) {
        e2fsck::assert_clean(&self.path);
    }

    #[track_caller]
    pub fn debugfs(&self, request: &str) -> String {
        String::from_utf8_lossy(&run("debugfs", &["-R".as_ref(), request.as_ref(), self.path.as_os_str()]).stdout).into_owned()
    }

    pub fn mount(&self, options: &str) -> Mounted {
        assert!(nix::unistd::geteuid().is_root(), "this test mounts loop devices and needs root");
        let at = self.dir.path().join("mnt");
        fs::create_dir_all(&at).expect("make the mount point");
        let output =
            run("mount", &["-t".as_ref(), "ext4".as_ref(), "-o".as_ref(), format!("loop,{options}").as_ref(), self.path.as_os_str(), at.as_os_str()]);
        assert!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr));
        Mounted { at, mounted: true }
    }
}

/// A mounted image; unmounted when dropped.
pub struct Mounted {
    pub at: PathBuf,
    mounted: bool,
}

impl Mounted {
    /// Retries for a while: a process that another test has just forked holds this one's files until it executes its program.
    pub fn unmount(mut self) {
        let mut tries = 0;
        loop {
            let output = run("umount", &[self.at.as_os_str()]);
            if output.status.success() {
                break;
            }
            tries += 1;
            assert!(tries < 250, "umount: {}", String::from_utf8_lossy(&output.stderr));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        self.mounted = false;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            // A test is failing already: say so instead of a second panic.
            let status = Command::new("umount").arg("--lazy").arg(&self.at).status();
            if !status.as_ref().is_ok_and(|status| status.success()) {
                eprintln!("{} stays mounted: {status:?}", self.at.display());
            }
        }
    }
}

/// Runs a tool of the host; its absence fails the test.
#[track_caller]
pub fn run(tool: &str, args: &[&std::ffi::OsStr]) -> Output {
    let sbin = Path::new("/usr/sbin").join(tool);
    let program = if sbin.exists() { sbin } else { PathBuf::from(tool) };
    Command::new(program).args(args).env("LC_ALL", "C").output().unwrap_or_else(|e| panic!("{tool} is needed by this test: {e}"))
}

/// What the sink's rules make of a list of items, in the plainest way.
#[derive(Debug, Default)]
pub struct Model {
    /// Path without leading slash (the root is empty) to inode.
    pub names: BTreeMap<Vec<u8>, usize>,
    pub inodes: Vec<Item>,
}

impl Model {
    pub fn of(items: &[Item]) -> Model {
        let mut model = Model::default();
        let root = dir("/").with(|meta| *meta = Meta { mtime: Timestamp { secs: 1_600_000_000, nanos: 0 }, ..self::meta(0o755) });
        let found = dir("/lost+found").with(|meta| *meta = Meta { mtime: Timestamp { secs: 1_600_000_000, nanos: 0 }, ..self::meta(0o700) });
        model.inodes.extend([root, found]);
        model.names.insert(Vec::new(), 0);
        model.names.insert(b"lost+found".to_vec(), 1);
        for item in items {
            model.add(item);
        }
        model
    }

    /// Adds an item unless the rules refuse it.
    pub fn accept(&mut self, item: &Item) -> bool {
        let path = key(&item.entry.path);
        let is_dir = |inode: &usize| self.inodes[*inode].entry.kind == EntryKind::Directory;
        let slashes = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| &path[..i]);
        let through_other = slashes.into_iter().any(|prefix| self.names.get(prefix).is_some_and(|inode| !is_dir(inode)));
        let below = [&path[..], b"/"].concat();
        let replaces_tree = item.entry.kind != EntryKind::Directory && self.names.keys().any(|name| name.starts_with(&below));
        let bad_link = match &item.entry.kind {
            EntryKind::HardLink { target } => self.names.get(&key(target)).is_none_or(is_dir),
            _ => false,
        };
        let accepted = !through_other && !replaces_tree && !bad_link;
        if accepted {
            self.add(item);
        }
        accepted
    }

    fn add(&mut self, item: &Item) {
        let path = key(&item.entry.path);
        let mut at = 0;
        while let Some(slash) = path[at..].iter().position(|b| *b == b'/') {
            at += slash;
            if !self.names.contains_key(&path[..at]) {
                let implied = dir([b"/", &path[..at]].concat()).with(|meta| *meta = Meta { mode: 0o755, ..Meta::default() });
                self.inodes.push(implied);
                self.names.insert(path[..at].to_vec(), self.inodes.len() - 1);
            }
            at += 1;
        }
        if let EntryKind::HardLink { target } = &item.entry.kind {
            let inode = self.names[&key(target)];
            self.names.insert(path, inode);
            return;
        }
        let existing = self.names.get(&path).copied();
        if let Some(existing) = existing.filter(|i| item.entry.kind == EntryKind::Directory && self.inodes[*i].entry.kind == EntryKind::Directory) {
            self.inodes[existing] = item.clone();
            return;
        }
        self.inodes.push(item.clone());
        self.names.insert(path, self.inodes.len() - 1);
    }

    fn links(&self, path: &[u8], inode: usize) -> u64 {
        if self.inodes[inode].entry.kind != EntryKind::Directory {
            return self.names.values().filter(|i| **i == inode).count() as u64;
        }
        let below = |name: &[u8]| {
            let rest = if path.is_empty() { Some(name) } else { name.strip_prefix(path).and_then(|rest| rest.strip_prefix(b"/")) };
            rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(&b'/'))
        };
        2 + self.names.iter().filter(|(name, i)| below(name) && self.inodes[**i].entry.kind == EntryKind::Directory).count() as u64
    }

    /// Compares everything below a mount point with the model.
    #[track_caller]
    pub fn assert_at(&self, root: &Path) {
        let mut found = Vec::new();
        walk(root, &mut |path| {
            found.push(relative(root, path));
            Ok(())
        })
        .expect("walk the mounted tree");
        found.sort();
        let wanted: Vec<&Vec<u8>> = self.names.keys().collect();
        assert_eq!(found.iter().collect::<Vec<_>>(), wanted, "names differ");
        for (path, inode) in &self.names {
            self.assert_one(root, path, *inode);
        }
    }

    fn assert_one(&self, root: &Path, path: &[u8], inode: usize) {
        let item = &self.inodes[inode];
        let at = root.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path));
        let stat = fs::symlink_metadata(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        let meta = &item.entry.meta;
        let shown = at.display();
        assert_eq!((stat.uid(), stat.gid()), (meta.uid, meta.gid), "owner of {shown}");
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (meta.mtime.secs, meta.mtime.nanos.into()), "mtime of {shown}");
        assert_eq!(stat.nlink(), self.links(path, inode), "links of {shown}");
        assert_eq!(stat.mode() & 0o7777, u32::from(meta.mode), "mode of {shown}");
        assert_eq!(xattrs(&at), meta.xattrs, "xattrs of {shown}");
        let kind = stat.file_type();
        match &item.entry.kind {
            EntryKind::Directory => assert!(kind.is_dir(), "{shown}"),
            EntryKind::File { size, spans } => {
                assert!(kind.is_file(), "{shown}");
                assert_content(&at, *size, spans, &item.data);
            }
            EntryKind::Symlink { target } => {
                let got = fs::read_link(&at).expect("a symlink");
                assert_eq!(std::os::unix::ffi::OsStrExt::as_bytes(got.as_os_str()), target, "{shown}");
            }
            EntryKind::CharDevice { major, minor } => {
                assert!(kind.is_char_device(), "{shown}");
                assert_eq!((nix::libc::major(stat.rdev()), nix::libc::minor(stat.rdev())), (*major, *minor), "{shown}");
            }
            EntryKind::BlockDevice { major, minor } => {
                assert!(kind.is_block_device(), "{shown}");
                assert_eq!((nix::libc::major(stat.rdev()), nix::libc::minor(stat.rdev())), (*major, *minor), "{shown}");
            }
            EntryKind::Fifo => assert!(kind.is_fifo(), "{shown}"),
            EntryKind::Socket => assert!(kind.is_socket(), "{shown}"),
            EntryKind::HardLink { .. } => unreachable!("the model resolves hard links"),
        }
    }
}

fn key(path: &GuestPath) -> Vec<u8> {
    path.as_bytes()[1..].to_vec()
}

pub fn relative(root: &Path, path: &Path) -> Vec<u8> {
    std::os::unix::ffi::OsStrExt::as_bytes(path.strip_prefix(root).expect("below the root").as_os_str()).to_vec()
}

/// Calls `visit` for `at` and everything below it, directories before their content.
pub fn walk(at: &Path, visit: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    visit(at)?;
    if fs::symlink_metadata(at)?.is_dir() {
        let mut below = fs::read_dir(at)?.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
        below.sort();
        below.iter().try_for_each(|path| walk(path, visit))?;
    }
    Ok(())
}

/// The xattrs of a path, symlinks not followed, sorted.
pub fn xattrs(path: &Path) -> Vec<Xattr> {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).expect("list xattrs");
    let mut list: Vec<Xattr> = names[..len]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).expect("get an xattr");
            Xattr { name: name.to_vec(), value: value[..len].to_vec() }
        })
        .collect();
    list.sort();
    list
}

fn assert_content(at: &Path, size: u64, spans: &[Span], data: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let shown = at.display();
    let file = File::open(at).expect("open a file");
    assert_eq!(file.metadata().expect("stat").len(), size, "size of {shown}");
    let mut used = 0;
    let mut end = 0;
    for span in spans {
        assert_zeros(&file, end, (span.offset - end).min(8192), at);
        let mut got = vec![0; span.len as usize];
        file.read_exact_at(&mut got, span.offset).expect("read a span");
        assert!(got == data[used..used + got.len()], "data of {shown} at {}", span.offset);
        (used, end) = (used + got.len(), span.offset + span.len);
    }
    assert_zeros(&file, end, (size - end).min(8192), at);
}

fn assert_zeros(file: &File, from: u64, len: u64, at: &Path) {
    use std::os::unix::fs::FileExt as _;
    let mut got = vec![1; len as usize];
    file.read_exact_at(&mut got, from).expect("read a hole");
    assert!(got.iter().all(|b| *b == 0), "hole of {} at {from}", at.display());
}

/// Feeds a directory of the host to a sink as an archive of it would.
pub fn feed_directory(sink: &mut dyn TreeBuilder, root: &Path, prefix: &str) -> Result<()> {
    let mut seen: BTreeMap<(u64, u64), GuestPath> = BTreeMap::new();
    let mut result = Ok(());
    walk(root, &mut |path| {
        if result.is_ok() {
            result = feed_path(sink, root, prefix, path, &mut seen);
        }
        Ok(())
    })
    .expect("walk a directory of the host");
    result
}

fn feed_path(sink: &mut dyn TreeBuilder, root: &Path, prefix: &str, path: &Path, seen: &mut BTreeMap<(u64, u64), GuestPath>) -> Result<()> {
    let stat = fs::symlink_metadata(path).expect("stat");
    let guest = GuestPath::new([prefix.as_bytes(), b"/", &relative(root, path)].concat()).expect("a valid path");
    let kind = stat.file_type();
    let meta = Meta {
        mode: (stat.mode() & 0o7777) as u16,
        uid: stat.uid(),
        gid: stat.gid(),
        mtime: Timestamp { secs: stat.mtime(), nanos: stat.mtime_nsec() as u32 },
        xattrs: xattrs(path),
    };
    let mut data: Box<dyn Read> = Box::new(io::empty());
    let known = (stat.nlink() > 1 && !kind.is_dir()).then(|| seen.insert((stat.dev(), stat.ino()), guest.clone())).flatten();
    let kind = if let Some(target) = known {
        seen.insert((stat.dev(), stat.ino()), target.clone());
        EntryKind::HardLink { target }
    } else if kind.is_dir() {
        EntryKind::Directory
    } else if kind.is_symlink() {
        let target = fs::read_link(path).expect("read a link");
        EntryKind::Symlink { target: std::os::unix::ffi::OsStrExt::as_bytes(target.as_os_str()).to_vec() }
    } else if kind.is_file() {
        data = Box::new(File::open(path).expect("open").take(stat.len()));
        let spans = if stat.len() > 0 { vec![Span { offset: 0, len: stat.len() }] } else { Vec::new() };
        EntryKind::File { size: stat.len(), spans }
    } else {
        return Ok(());
    };
    sink.entry(&Entry { path: guest, kind, meta }, &mut data)
}

//! What of a golden's build reads foreign bytes: blob → (decrypt) → decompress → tar (or squashfs) → facts → filesystem → boot loaders → digest.
//!
//! Everything it touches is passed open: it runs in a confined process (`crate::worker`) that can open nothing. What it gives back is what the daemon
//! keeps beside the disk.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    boot::{
        loaders::HostLoaders,
        prepare::{self, DiskBoot},
    },
    error::{Error, Kind, Result, Stage},
    fs::{BuildParams, BuiltFs, Filesystem, Region, WriteObserver},
    guest::{facts::GuestFacts, watch::Watch},
    manifest::{BootSpec, volatile::Volatile},
    names::{Digest, GuestPath},
    progress::Progress,
    render::golden::{self, GoldenIds},
    store::{digest::Follower, records::GoldenSpec},
    tree::{
        TreeSink, archive, below,
        collect::Collector,
        decompress::{self, Compression},
        error_of_read, squashfs,
    },
    trust::age::{self, FileKey},
};

/// What a build starts from.
pub struct Inputs<'a> {
    /// The tarball, at its start.
    pub blob: File,
    /// Its name in errors.
    pub blob_name: &'a str,
    /// How it is said to be compressed; the bytes decide when nobody said.
    pub declared: Option<Compression>,
    /// The key that opens it, when it is encrypted.
    pub file_key: Option<FileKey>,
    /// The disk, open for reading and writing, of its full size and without data.
    pub disk: Arc<File>,
    /// Its name in errors.
    pub disk_name: &'a str,
    /// What to make.
    pub spec: &'a GoldenSpec,
    /// The boot loaders that the spec names.
    pub loaders: &'a HostLoaders,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Filled {
    /// The root filesystem.
    pub filesystem: BuiltFs,
    /// Digest over the disk's content.
    pub digest: Digest,
    /// What the tree contains.
    pub facts: GuestFacts,
    /// How the disk can be started.
    pub boot: DiskBoot,
}

/// Holds a writer back, so that the next writes come no faster than they may.
pub trait Brake: Send + Sync {
    /// Waits until `bytes` more may be written. A cancelled build is stopped by the one who writes, not here.
    fn take(&self, bytes: u64);
}

/// Shows writes to the digest and to the brake. Writes go through the page cache, so the kernel's threads do the I/O: a priority of this one would mean
/// nothing.
struct Observed {
    follower: Arc<Follower>,
    brake: Arc<dyn Brake>,
}

impl WriteObserver for Observed {
    fn written(&self, offset: u64, bytes: &[u8]) {
        self.follower.written(offset, bytes);
        self.brake.take(bytes.len() as u64);
    }
}

/// Fills the disk, which is flushed when this returns. On an error its content is undefined.
pub fn fill(inputs: Inputs<'_>, filesystem: &dyn Filesystem, brake: Arc<dyn Brake>, progress: &Progress) -> Result<Filled> {
    fill_from(inputs, filesystem, brake, progress, &mut |archive, sink| read_archive(archive, sink, progress))
}

/// An archive that is to be read.
pub struct Archive<'a> {
    /// The tarball, at its start.
    pub blob: File,
    /// Its name in errors.
    pub name: &'a str,
    /// How it is said to be compressed; the bytes decide when nobody said.
    pub declared: Option<Compression>,
    /// The key that opens it, when it is encrypted.
    pub file_key: Option<FileKey>,
    /// What it is read for.
    pub spec: &'a GoldenSpec,
}

/// Reads an archive: its entries go to the sink, what injection has to know of them is the answer.
pub type ReadArchive<'r> = dyn FnMut(Archive<'_>, &mut dyn TreeSink) -> Result<GuestFacts> + 'r;

/// [`fill`] with an archive that somebody else reads.
pub fn fill_from(
    inputs: Inputs<'_>,
    filesystem: &dyn Filesystem,
    brake: Arc<dyn Brake>,
    progress: &Progress,
    read: &mut ReadArchive<'_>,
) -> Result<Filled> {
    let Inputs { blob, blob_name, declared, file_key, disk, disk_name, spec, loaders } = inputs;
    let ids = GoldenIds::of(&spec.key());
    let plan = golden::disk_plan(spec, spec.size_bytes, ids.disk)?;
    let root = plan.root();
    let region = Region { file: Arc::clone(&disk), offset: root.offset, len: root.len };
    let params = BuildParams {
        uuid: ids.filesystem.into_bytes(),
        hash_seed: ids.hash_seed.into_bytes(),
        label: spec.label.clone(),
        profile: spec.profile,
        // A fixed time: the same bytes today and tomorrow. 1970 itself would look like a clock that was never set.
        epoch_secs: 1,
        bytes_per_inode: spec.bytes_per_inode,
    };
    let mut builder = filesystem.builder(&params, region, progress)?;
    let follower = Arc::new(Follower::new(spec.size_bytes));
    builder.observe(Arc::new(Observed { follower: Arc::clone(&follower), brake }));
    let facts = read(Archive { blob, name: blob_name, declared, file_key, spec }, &mut *builder)?;
    let built = builder.finish()?;
    let whole = Region { file: Arc::clone(&disk), offset: 0, len: spec.size_bytes };
    plan.write_table(&whole)?;
    let boot = prepare::prepare(&plan, &whole, filesystem, &facts, &boot_spec(spec), loaders, ids.disk)?;
    follower.forget(0..root.offset);
    follower.forget(root.offset + root.len..spec.size_bytes);
    // The digest needs the bytes, not the disk: what of it is left is computed while the kernel writes them out.
    let digest = std::thread::scope(|scope| -> Result<Digest> {
        let flush = scope.spawn(|| disk.sync_all());
        let digest = follower.finish(&disk, disk_name)?;
        let flushed = flush.join().map_err(|_| Error::internal(Stage::Golden, disk_name, "the flushing thread panicked"))?;
        flushed.map_err(|error| Error::io(Stage::Golden, disk_name, "flush the disk", error))?;
        Ok(digest)
    })?;
    Ok(Filled { filesystem: built, digest, facts, boot })
}

/// What the manifest said about the kernel, as far as it is part of the key.
fn boot_spec(spec: &GoldenSpec) -> BootSpec {
    let path = |text: &Option<String>| text.as_deref().and_then(|text| GuestPath::new(text).ok());
    BootSpec { kernel: path(&spec.boot.kernel), initrd: path(&spec.boot.initrd), cmdline: None }
}

fn stream_tree(mut input: Opened, spec: &GoldenSpec, progress: &Progress, sink: &mut dyn TreeSink) -> Result<GuestFacts> {
    let volatile = Volatile::compile(&spec.volatile)?;
    // The archive's filter can't fail; a pattern that does (too much backtracking) is remembered and fails the build at the end.
    let failure = std::cell::RefCell::new(None);
    let prefix = spec.prefix.as_ref().map(GuestPath::new).transpose().map_err(|why| Error::internal(Stage::Golden, "rootfs.prefix", why))?;
    let filter = |path: &GuestPath| {
        let stripped = match &prefix {
            Some(prefix) if below::is_beside(prefix, path) => return true,
            Some(prefix) => below::strip(prefix, path),
            None => None,
        };
        // The directories above the root are no part of the tree: the sink drops them.
        let Some(path) = (if prefix.is_some() { stripped.as_ref() } else { Some(path) }) else { return false };
        volatile.matches(path).unwrap_or_else(|error| {
            failure.borrow_mut().get_or_insert(error);
            true
        })
    };
    let templates: Vec<GuestPath> = spec.templates.iter().filter_map(|path| GuestPath::new(path).ok()).collect();
    let watch = Watch::new(&templates);
    let mut collector = Collector::new(sink, &watch);
    let limits = archive::Limits::default();
    let summary = match &prefix {
        None => input.read(&limits, &filter, &mut collector, progress)?,
        Some(prefix) => {
            let mut below = below::Below::new(prefix.clone(), &mut collector);
            let summary = input.read(&limits, &filter, &mut below, progress)?;
            below.finish()?;
            summary
        }
    };
    if let Some(error) = failure.into_inner() {
        return Err(error);
    }
    tracing::debug!(entries = summary.entries, left_out = summary.left_out, "tree read");
    Ok(collector.finish())
}

/// Reads an archive in this process.
pub fn read_archive(archive: Archive<'_>, sink: &mut dyn TreeSink, progress: &Progress) -> Result<GuestFacts> {
    let Archive { blob, name, declared, file_key, spec } = archive;
    let input = match file_key {
        None => Opened::new(blob, name, declared, progress)?,
        Some(key) => Opened::decrypted(blob, name, declared, &key, progress)?,
    };
    stream_tree(input, spec, progress, sink)
}

/// A root filesystem, opened as what it is.
enum Opened {
    Archive(Box<dyn Read + Send>),
    Squashfs(File),
}

impl Opened {
    fn new(blob: File, name: &str, declared: Option<Compression>, progress: &Progress) -> Result<Opened> {
        let compression = declared.map_or_else(|| detected(&blob, name), Ok)?;
        if compression != Compression::Squashfs {
            return Ok(Opened::Archive(decompress::open_with(Box::new(blob), compression, decompress::Limits::default(), progress)?));
        }
        // As an archive's: what was declared is compared with what is there.
        match detected(&blob, name)? {
            Compression::Squashfs => Ok(Opened::Squashfs(blob)),
            other => {
                let message = format!("declared is squashfs, the bytes are a tar archive ({})", other.name());
                Err(Error::new(Kind::InvalidRequest, Stage::Golden, name, message).with_reason("FORMAT_MISMATCH"))
            }
        }
    }

    fn decrypted(blob: File, name: &str, declared: Option<Compression>, key: &FileKey, progress: &Progress) -> Result<Opened> {
        let mut plain = age::open(blob, key, name)?;
        let mut first = Vec::new();
        let read = plain.by_ref().take(decompress::DETECT_LEN as u64).read_to_end(&mut first);
        read.map_err(|error| error_of_read(error, Stage::Golden, name, "decrypt its beginning"))?;
        let compression = declared.map_or_else(|| compression_of(&first, name), Ok)?;
        if compression == Compression::Squashfs {
            let message = "is a squashfs image, which is read here and there; what is encrypted is read from its beginning to its end";
            return Err(Error::new(Kind::Unsupported, Stage::Golden, name, message)
                .with_reason("ENCRYPTED_SQUASHFS")
                .with_hint("encrypt a tar archive of it, compressed or not"));
        }
        let input = Box::new(io::Cursor::new(first).chain(plain));
        Ok(Opened::Archive(decompress::open_with(input, compression, decompress::Limits::default(), progress)?))
    }

    fn read(
        &mut self,
        limits: &archive::Limits,
        filter: &dyn Fn(&GuestPath) -> bool,
        sink: &mut dyn TreeSink,
        progress: &Progress,
    ) -> Result<archive::Summary> {
        match self {
            Opened::Archive(input) => archive::read(&mut **input, limits, filter, sink, progress),
            Opened::Squashfs(image) => squashfs::read(image, limits, filter, sink, progress),
        }
    }
}

/// What the first bytes say, for a tarball that nobody declared a media type for. Its position stays where it is.
pub fn detected(blob: &File, name: &str) -> Result<Compression> {
    let mut first = [0; decompress::DETECT_LEN];
    let mut len = 0;
    while len < first.len() {
        match blob.read_at(&mut first[len..], len as u64) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(Stage::Golden, name, "read the tarball", error)),
        }
    }
    compression_of(&first[..len], name)
}

fn compression_of(first: &[u8], name: &str) -> Result<Compression> {
    Compression::detect(first).ok_or_else(|| {
        let what = "is neither a tar archive, plain or compressed by gzip, xz, zstd or bzip2, nor a squashfs image";
        Error::new(Kind::InvalidRequest, Stage::Golden, name, what).with_reason("ROOTFS_FORMAT_UNKNOWN")
    })
}

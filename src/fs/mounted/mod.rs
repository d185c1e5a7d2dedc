//! Filesystems that the host's kernel writes: XFS and btrfs, and ext4 as the oracle that our own engine is compared with.
//!
//! ```text
//!  daemon                                     mount worker (child, own mount namespace)
//!  build   golden file ── stdin ────────────► loop device ─► mkfs ─► mount ◄─ entries over a socket
//!  read    golden file ── stdin ────────────► loop device ─► mount, both read-only ─► files over a socket
//!  edit    golden file ◄─ reads ─┐
//!          changed blocks ◄ writes ┴ FUSE ◄── file ◄─ loop device ◄─ mount ◄─ edits over a socket
//! ```
//!
//! Only filesystems that were made by this daemon are mounted, with nodev, nosuid and noexec, where nobody else sees them. The golden is only read:
//! an edit mounts a copy-on-write view of it, and the blocks the kernel writes are the patch. If either process dies, the kernel unmounts and
//! detaches; nothing is left. Guest paths never become host paths (`confined`).
//!
//! Reproducibility ends where the tools and the kernel draw numbers of their own (inode generations, change times, btrfs's device UUID): two builds
//! hold the same tree and identities, but are not the same bytes.

mod build;
mod confined;
mod edits;
mod entries;
mod overlay;
mod reads;
#[cfg(test)]
mod tests;
mod tools;
pub(crate) mod wire;
pub mod worker;
mod xfs_identity;

use std::{
    fs::File,
    io::{BufReader, BufWriter, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    time::Duration,
};

use fuser::{Config, Session, SessionACL};

use self::{
    build::MountedBuilder,
    overlay::Overlay,
    wire::{BuildJob, EditJob, Reply, Request, WireOp},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{BuildParams, Filesystem, FsKind, Profile, Region, TreeBuilder, TreeReader, edit::EditRequest, patch::BlockPatch},
    host::namespace::Worker,
    progress::Progress,
    units::{MIB, PATCH_BLOCK},
};

/// Changed blocks that one edit may hold in memory, unless told otherwise. An instance's configuration changes well under 1 MiB; growing a small XFS
/// to terabytes makes headers for thousands of allocation groups.
pub const PATCH_BYTES_MAX: u64 = 128 * MIB;
/// How long a worker may take to end after its last answer; it has unmounted everything by then.
const WORKER_EXIT_TIMEOUT: Duration = Duration::from_secs(30);

/// A filesystem made and edited by the host's kernel and tools.
#[derive(Debug, Clone)]
pub struct Mounted {
    kind: FsKind,
    program: PathBuf,
    patch_bytes_max: u64,
}

impl Mounted {
    /// Workers are this program, started again.
    pub fn new(kind: FsKind) -> Self {
        Mounted { kind, program: "/proc/self/exe".into(), patch_bytes_max: PATCH_BYTES_MAX }
    }

    /// Workers are `program`, called with [`worker::SUBCOMMAND`]: for tests, whose own program is not the daemon.
    #[must_use]
    pub fn with_program(self, program: impl Into<PathBuf>) -> Self {
        Mounted { program: program.into(), ..self }
    }

    /// Another limit than [`PATCH_BYTES_MAX`].
    #[must_use]
    pub fn with_patch_bytes_max(self, patch_bytes_max: u64) -> Self {
        Mounted { patch_bytes_max, ..self }
    }

    /// Makes an empty filesystem in the file `path`, which reads as zeros, with the features that a build gets: to ask other programs whether they read it.
    pub fn sample(&self, path: &std::path::Path) -> Result<()> {
        let len = std::fs::metadata(path).map_err(|error| Error::io(Stage::Host, path.display().to_string(), "look at a file", error))?.len();
        let (profile, label) = (Profile::Modern, String::new());
        let params = BuildParams { uuid: [1; 16], hash_seed: [2; 16], label, profile, epoch_secs: 1, bytes_per_inode: 16384 };
        tools::make(&BuildJob::new(self.kind, 0, len, &params), path)
    }

    fn check_region(&self, stage: Stage, region: &Region) -> Result<()> {
        if !region.offset.is_multiple_of(PATCH_BLOCK) || !region.len.is_multiple_of(PATCH_BLOCK) {
            return Err(Error::internal(stage, "region", format!("{} bytes at {} are not whole blocks", region.len, region.offset)));
        }
        if region.len < self.size_min() {
            let text = format!("{} has at least {} bytes, there is room for {}", self.kind.name(), self.size_min(), region.len);
            return Err(Error::new(Kind::NoSpace, stage, "filesystem", text));
        }
        Ok(())
    }
}

impl Filesystem for Mounted {
    fn kind(&self) -> FsKind {
        self.kind
    }

    fn size_min(&self) -> u64 {
        match self.kind {
            // mkfs.xfs refuses less since 5.19 ("Filesystem must be larger than 300MB").
            FsKind::Xfs => 300 * MIB,
            // mkfs.btrfs wants 109 MiB with duplicated metadata.
            FsKind::Btrfs => 128 * MIB,
            // Room for a journal.
            FsKind::Ext4 => 16 * MIB,
        }
    }

    fn builder(&self, params: &BuildParams, region: Region, progress: &Progress) -> Result<Box<dyn TreeBuilder>> {
        self.check_region(Stage::Golden, &region)?;
        tools::check_label(self.kind, Stage::Golden, &params.label)?;
        progress.check()?;
        Ok(Box::new(MountedBuilder::start(&self.program, self.kind, params, &region, progress)?))
    }

    fn edit(&self, region: Region, request: &EditRequest, progress: &Progress) -> Result<BlockPatch> {
        self.check_region(Stage::Edit, &region)?;
        if let Some(label) = &request.label {
            tools::check_label(self.kind, Stage::Edit, label)?;
        }
        let size_bytes = request.size_bytes.map_or(region.len, |size| size / PATCH_BLOCK * PATCH_BLOCK);
        if size_bytes < region.len {
            let text = format!("a filesystem of {} bytes does not shrink to {size_bytes}", region.len);
            return Err(Error::field(Stage::Edit, "size_bytes", text));
        }
        let grow = size_bytes > region.len;
        let overlay = Overlay::new(region, size_bytes, self.patch_bytes_max);
        // A worker that fails because the view refused a write knows only that the disk is broken.
        self.run_edit(&overlay, grow, request, progress).map_err(|error| match overlay.cause() {
            Some(cause) => cause.with_source(error),
            None => error,
        })?;
        if self.kind == FsKind::Xfs && (request.uuid.is_some() || request.label.is_some()) {
            let changed = xfs_identity::set_identity(&overlay, request.uuid.as_ref(), request.label.as_deref());
            changed.map_err(|error| overlay.cause().unwrap_or(error))?;
        }
        Ok(overlay.into_patch())
    }

    fn tree(&self, region: &Region) -> Result<Box<dyn TreeReader>> {
        self.check_region(Stage::Golden, region)?;
        Ok(Box::new(reads::MountedTree::open(&self.program, self.kind, region)?))
    }
}

impl Mounted {
    fn run_edit(&self, overlay: &Overlay, grow: bool, request: &EditRequest, progress: &Progress) -> Result<()> {
        progress.check()?;
        let device = "/dev/fuse";
        let open = File::options().read(true).write(true).open(device);
        let ours = open.map_err(|error| {
            Error::io(Stage::Host, device, "open", error).with_hint("load the fuse module and allow /dev/fuse in the unit's DeviceAllow")
        })?;
        let theirs = ours.try_clone().map_err(|error| Error::io(Stage::Host, device, "duplicate", error))?;
        let mut worker = Conversation::start(&self.program, theirs.into())?;
        let (uuid, label) = (request.uuid, request.label.clone());
        let job = EditJob { kind: self.kind, uuid, label, grow, now: (request.now.secs, request.now.nanos) };
        worker.send(&Request::Edit(job), &[])?;
        match worker.answer(Stage::Edit)? {
            Reply::Ready => {}
            other => return Err(unexpected(&other)),
        }
        let session = Session::from_fd(overlay.clone(), ours.into(), SessionACL::All, Config::default()).and_then(Session::spawn);
        let session = session.map_err(|error| Error::io(Stage::Host, device, "serve the copy-on-write view", error))?;
        let result = drive_edit(worker, request, progress);
        // The worker has unmounted the file or is dead and the kernel has: either ends the session.
        let ended = session.join().map_err(|error| Error::io(Stage::Host, device, "serve the copy-on-write view", error));
        result.and(ended)
    }
}

fn drive_edit(mut worker: Conversation, request: &EditRequest, progress: &Progress) -> Result<()> {
    worker.expect_ok(Stage::Edit)?;
    for edit in &request.edits {
        progress.check()?;
        let (op, content) = WireOp::new(&edit.path, &edit.op);
        if content.len() > worker::CONTENT_BYTES_MAX {
            let text = format!("has {} bytes, the limit for one edit is {}", content.len(), worker::CONTENT_BYTES_MAX);
            return Err(Error::new(Kind::NoSpace, Stage::Edit, edit.path.to_string(), text));
        }
        worker.send(&Request::Op(op), content)?;
        worker.expect_ok(Stage::Edit)?;
    }
    worker.send(&Request::Finish, &[])?;
    worker.expect_ok(Stage::Edit)?;
    worker.finish()
}

fn unexpected(reply: &Reply) -> Error {
    Error::internal(Stage::Host, worker::SUBCOMMAND, format!("the worker's answer was {reply:?}"))
}

/// Talking to a worker. Dropping it makes the worker unmount and go.
struct Conversation {
    // Closed before the worker is waited for.
    from: BufReader<UnixStream>,
    to: BufWriter<UnixStream>,
    worker: Worker,
}

impl Conversation {
    fn start(program: &std::path::Path, input: OwnedFd) -> Result<Self> {
        let worker = Worker::spawn(program, &[worker::SUBCOMMAND], input)?;
        let clone = || worker.socket().try_clone().map_err(|error| Error::io(Stage::Host, worker::SUBCOMMAND, "duplicate its socket", error));
        let (from, to) = (BufReader::new(clone()?), BufWriter::with_capacity(256 << 10, clone()?));
        Ok(Conversation { from, to, worker })
    }

    fn send(&mut self, request: &Request, data: &[u8]) -> Result<()> {
        let sent = wire::send(&mut self.to, Some(request), data).and_then(|()| self.to.flush());
        sent.or_else(|error| self.send_failed(error))
    }

    /// A worker that fails says why before it goes.
    fn send_failed(&mut self, error: std::io::Error) -> Result<()> {
        match error.raw_os_error() {
            Some(libc::EPIPE | libc::ECONNRESET) => Ok(()),
            _ => Err(Error::io(Stage::Host, worker::SUBCOMMAND, "send", error)),
        }
    }

    fn answer(&mut self, stage: Stage) -> Result<Reply> {
        match wire::receive(&mut self.from, 0) {
            Ok(Some((Some(Reply::Failed(error)), _))) => Err(error.into_error(stage)),
            Ok(Some((Some(reply), _))) => Ok(reply),
            Ok(Some((None, _))) => Err(Error::internal(Stage::Host, worker::SUBCOMMAND, "an answer was empty")),
            Ok(None) => Err(Error::internal(stage, worker::SUBCOMMAND, "the worker died without an answer").with_reason("WORKER_DIED")),
            Err(error) => Err(Error::io(stage, worker::SUBCOMMAND, "receive its answer", error).with_reason("WORKER_DIED")),
        }
    }

    fn expect_ok(&mut self, stage: Stage) -> Result<()> {
        match self.answer(stage)? {
            Reply::Ok => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn finish(self) -> Result<()> {
        let Conversation { from, to, worker } = self;
        drop((from, to));
        let status = worker.finish(WORKER_EXIT_TIMEOUT)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::internal(Stage::Host, worker::SUBCOMMAND, format!("the worker ended with {status}")).with_reason("WORKER_DIED"))
    }
}

//! A copy-on-write view of a golden's filesystem: reads fall through, writes stay in memory.
//!
//! It is served as the only file of a FUSE filesystem, which the mount worker puts under a loop device. The server runs in the daemon and the mount
//! is in the worker: were they one process and it got killed, a thread waiting for the disk would keep the connection open that it waits for. The
//! server must never touch what is mounted on the file, and serves without allocating through it (PR_SET_IO_FLUSHER).

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};

use crate::{
    error::{Error, Kind, Stage},
    fs::{Region, patch::BlockPatch},
    units::{Bytes, PATCH_BLOCK},
};

const BLOCK: usize = PATCH_BLOCK as usize;
/// How long the kernel may keep the attributes: they never change.
const TTL: Duration = Duration::from_secs(3600);

/// The view. Clones share it.
#[derive(Clone)]
pub(super) struct Overlay(Arc<Inner>);

struct Inner {
    golden: Region,
    len: u64,
    bytes_max: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Blocks that differ from the golden.
    blocks: BTreeMap<u64, Box<[u8]>>,
    /// What the filesystem above was refused, as the first cause of whatever it reports.
    refused: Option<Refused>,
}

enum Refused {
    Full,
    Golden(io::Error),
}

impl Overlay {
    /// A view of `golden` as `len` bytes (a multiple of 4096, at least the golden's) that takes changes to at most `bytes_max` bytes of blocks.
    pub fn new(golden: Region, len: u64, bytes_max: u64) -> Self {
        Overlay(Arc::new(Inner { golden, len, bytes_max, state: Mutex::default() }))
    }

    /// Size of the view, bytes.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is a single insertion or removal: a panicking holder leaves it whole.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the golden has at `offset`; zeros beyond its end.
    fn read_golden(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let golden = &self.0.golden;
        let have = usize::try_from(golden.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        buffer[have..].fill(0);
        let mut done = 0;
        while done < have {
            match golden.file.read_at(&mut buffer[done..have], golden.offset + offset + done as u64) {
                // A sparse disk file may be shorter than its region.
                Ok(0) => {
                    buffer[done..have].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fills `buffer` from `offset`, which with its length lies inside the view.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(buffer.len(), offset)?;
        self.read_golden(buffer, offset)?;
        let end = offset + buffer.len() as u64;
        for (number, block) in self.state().blocks.range(offset / PATCH_BLOCK..end.div_ceil(PATCH_BLOCK)) {
            let start = number * PATCH_BLOCK;
            let (from, to) = (start.max(offset), (start + PATCH_BLOCK).min(end));
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&block[(from - start) as usize..(to - start) as usize]);
        }
        Ok(())
    }

    /// Takes `data` at `offset`, which with its length lies inside the view. ENOSPC when more blocks differ than may.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(data.len(), offset)?;
        if data.is_empty() {
            return Ok(());
        }
        let first = offset / PATCH_BLOCK;
        let end = offset + data.len() as u64;
        let count = (end.div_ceil(PATCH_BLOCK) - first) as usize;
        let mut golden = vec![0; count * BLOCK];
        self.read_golden(&mut golden, first * PATCH_BLOCK)?;
        let mut state = self.state();
        for (number, base) in (first..).zip(golden.chunks_exact(BLOCK)) {
            let start = number * PATCH_BLOCK;
            let (from, to) = (start.max(offset), (start + PATCH_BLOCK).min(end));
            let mut block: Box<[u8]> = state.blocks.remove(&number).unwrap_or_else(|| base.into());
            block[(from - start) as usize..(to - start) as usize].copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            // What was changed back is no change.
            if *block == *base {
                continue;
            }
            if (state.blocks.len() as u64 + 1) * PATCH_BLOCK > self.0.bytes_max {
                state.refused.get_or_insert(Refused::Full);
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            state.blocks.insert(number, block);
        }
        Ok(())
    }

    fn check(&self, len: usize, offset: u64) -> io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.0.len => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    /// The cause below an error that the filesystem above reported, if the view is the cause.
    pub fn cause(&self) -> Option<Error> {
        match self.state().refused.take()? {
            Refused::Full => {
                let text = format!("the edits change more than {} of blocks, the limit for one instance", Bytes(self.0.bytes_max));
                Some(Error::new(Kind::NoSpace, Stage::Edit, "block patch", text))
            }
            Refused::Golden(error) => Some(Error::io(Stage::Edit, "golden", "read", error)),
        }
    }

    /// The changed blocks.
    pub fn into_patch(self) -> BlockPatch {
        let mut patch = BlockPatch::new(self.0.len);
        for (number, block) in std::mem::take(&mut self.state().blocks) {
            patch.insert(number, block);
        }
        patch
    }

    fn attributes(&self) -> FileAttr {
        FileAttr {
            ino: INodeNo::ROOT,
            size: self.0.len,
            blocks: self.0.len / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Remembers that the golden could not be read, and gives what the kernel is told.
    fn failed(&self, error: io::Error) -> Errno {
        let errno = Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO));
        if error.raw_os_error() != Some(libc::ENOSPC) {
            self.state().refused.get_or_insert(Refused::Golden(error));
        }
        errno
    }
}

/// The file is the root of its filesystem: there is nothing to look up.
impl Filesystem for Overlay {
    fn getattr(&self, _request: &Request, _inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes());
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, _name: &std::ffi::OsStr, reply: ReplyEntry) {
        reply.error(Errno::ENOTDIR);
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // This thread now writes what the kernel wants to get rid of: its allocations must not wait for that. EPERM without CAP_SYS_RESOURCE.
        if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
            tracing::debug!(%errno, "the server of a copy-on-write view is not marked as an I/O flusher");
        }
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; usize::try_from(self.0.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(size as usize)];
        match self.read_at(&mut buffer, offset) {
            Ok(()) => reply.data(&buffer),
            Err(error) => reply.error(self.failed(error)),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_at(data, offset) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(self.failed(error)),
        }
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _offset: u64, _len: u64, _mode: i32, reply: ReplyEmpty) {
        // No discards and no zeroing without data: either would put blocks into the patch that the instance does not need.
        reply.error(Errno::EOPNOTSUPP);
    }
}

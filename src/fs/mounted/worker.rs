//! The mount worker: `cloudletd mount-worker`, started by [`super::Mounted`] and by nobody else.
//!
//! Standard input is the disk file (build) or an unused FUSE connection (edit), standard output the socket to the daemon. Before anything else it
//! moves to a mount namespace of its own. It has one thread; it ends when the daemon closes the socket, with everything unmounted and detached, or
//! is killed, and then the kernel does that.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::ExitCode,
};

use rustix::fs::Mode;

use super::{
    confined::open_root,
    edits::Editor,
    entries::Filler,
    reads, tools,
    wire::{self, BuildJob, DATA_BYTES_MAX, EditJob, ReadJob, Reply, Request, WireError},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    host::{
        loops::{LoopDevice, Options},
        namespace::{PrivateMount, enter_private},
    },
    tree::Entry,
    units::Timestamp,
};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "mount-worker";
/// Bytes of the content of one edit; more does not belong into an edit.
pub(super) const CONTENT_BYTES_MAX: usize = 256 << 20;
/// A directory that every host has, covered in the private namespace.
const SCRATCH: &str = "/tmp";
/// Where the FUSE file is.
const DISK: &str = "/tmp/disk";
/// Where the filesystem is.
const ROOT: &str = "/tmp/root";

/// The conversation, from the worker's side.
struct Daemon {
    from: BufReader<UnixStream>,
    to: BufWriter<UnixStream>,
}

/// Serves one build, look or edit; call it before the process has a second thread. The exit status says whether the conversation came to its end.
pub fn main() -> ExitCode {
    match serve() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // The conversation itself is broken, so this is the only place left for it.
            let _closed = writeln!(io::stderr(), "{SUBCOMMAND}: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn protocol(doing: &str, error: io::Error) -> Error {
    Error::io(Stage::Host, SUBCOMMAND, doing, error)
}

fn serve() -> Result<bool> {
    rustix::process::umask(Mode::empty());
    let socket = io::stdout().as_fd().try_clone_to_owned().map(UnixStream::from).map_err(|error| protocol("take the socket", error))?;
    let clone = socket.try_clone().map_err(|error| protocol("take the socket", error))?;
    let mut daemon = Daemon { from: BufReader::with_capacity(DATA_BYTES_MAX / 4, socket), to: BufWriter::new(clone) };
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(|error| protocol("take the file", error))?;
    let result = match daemon.request()? {
        Some((Request::Build(job), _)) => enter_private().and_then(|()| build(&mut daemon, &job, input)),
        Some((Request::Read(job), _)) => enter_private().and_then(|()| read(&mut daemon, &job, input)),
        Some((Request::Edit(job), _)) => enter_private().and_then(|()| edit(&mut daemon, &job, input)),
        Some((other, _)) => Err(Error::internal(Stage::Host, SUBCOMMAND, format!("a conversation does not start with {other:?}"))),
        None => return Ok(false),
    };
    match result {
        Ok(Some(reply)) => daemon.reply(&reply).map(|()| true),
        // The daemon gave up; everything is unmounted.
        Ok(None) => Ok(false),
        Err(error) => daemon.reply(&Reply::Failed(WireError::from(&error))).map(|()| false),
    }
}

impl Daemon {
    fn request(&mut self) -> Result<Option<(Request, Vec<u8>)>> {
        match wire::receive(&mut self.from, CONTENT_BYTES_MAX) {
            Ok(Some((Some(request), data))) => Ok(Some((request, data))),
            Ok(Some((None, _))) => Err(Error::internal(Stage::Host, SUBCOMMAND, "data came where a request belongs")),
            Ok(None) => Ok(None),
            // The daemon is gone, and the rest of what it was saying with it.
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => Ok(None),
            Err(error) => Err(protocol("receive", error)),
        }
    }

    fn reply(&mut self, reply: &Reply) -> Result<()> {
        let sent = wire::send(&mut self.to, Some(reply), &[]).and_then(|()| self.to.flush());
        sent.map_err(|error| protocol("reply", error))
    }

    /// A file's length and its bytes. One that can't be read to its end breaks the conversation: the daemon is waiting for the rest.
    fn content(&mut self, mut file: &File, len: u64) -> Result<()> {
        self.reply(&Reply::Content { len })?;
        let mut chunk = vec![0; DATA_BYTES_MAX];
        let mut left = len;
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            file.read_exact(&mut chunk[..count]).map_err(|error| protocol("read a file of the tree", error))?;
            let nothing: Option<&Reply> = None;
            wire::send(&mut self.to, nothing, &chunk[..count]).map_err(|error| protocol("reply", error))?;
            left -= count as u64;
        }
        self.to.flush().map_err(|error| protocol("reply", error))
    }

    fn outcome(&mut self, result: Result<()>) -> Result<()> {
        match result {
            Ok(()) => self.reply(&Reply::Ok),
            Err(error) => self.reply(&Reply::Failed(WireError::from(&error))),
        }
    }
}

/// The data of one entry, out of the frames that follow it.
struct Incoming<'a> {
    daemon: &'a mut Daemon,
    chunk: Vec<u8>,
    used: usize,
    left: u64,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.chunk.len() {
            if self.left == 0 {
                return Ok(0);
            }
            match wire::receive::<Request>(&mut self.daemon.from, DATA_BYTES_MAX)? {
                Some((None, data)) if !data.is_empty() && data.len() as u64 <= self.left => {
                    self.left -= data.len() as u64;
                    (self.chunk, self.used) = (data, 0);
                }
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let len = buffer.len().min(self.chunk.len() - self.used);
        buffer[..len].copy_from_slice(&self.chunk[self.used..self.used + len]);
        self.used += len;
        Ok(len)
    }
}

/// A small tmpfs to mount on. Nothing of it is visible outside.
fn scratch() -> Result<PrivateMount> {
    let mount = PrivateMount::new(Path::new("tmpfs"), Path::new(SCRATCH), "tmpfs", "size=1m,mode=700")?;
    std::fs::create_dir(ROOT).map_err(|error| protocol("make a mount point", error))?;
    File::create_new(DISK).map_err(|error| protocol("make a mount point", error))?;
    Ok(mount)
}

fn build(daemon: &mut Daemon, job: &BuildJob, input: OwnedFd) -> Result<Option<Reply>> {
    let scratch = scratch()?;
    let disk = File::from(input);
    let options = Options { offset: job.offset, size_limit: job.len, ..Options::guarded() };
    let device = LoopDevice::attach(&disk, Path::new("cloudletd-build"), &options)?;
    // mkfs.btrfs locks the device itself.
    device.unlock()?;
    let devices = PrivateMount::only_device(device.path())?;
    tools::make(job, device.path())?;
    let mount = PrivateMount::new(device.path(), Path::new(ROOT), job.kind.name(), tools::mount_options(job.kind))?;
    let root = open_root(mount.target()).map_err(|errno| protocol("open the root", errno.into()))?;
    let mut filler = Filler::new(root, Timestamp { secs: job.epoch_secs, nanos: 0 })?;
    daemon.reply(&Reply::Ok)?;
    loop {
        match daemon.request()? {
            Some((Request::Entry(entry), _)) => {
                let entry = Entry::try_from(entry)?;
                let left = match &entry.kind {
                    crate::tree::EntryKind::File { spans, .. } => spans.iter().try_fold(0u64, |sum, span| sum.checked_add(span.len)),
                    _ => Some(0),
                };
                let left =
                    left.ok_or_else(|| Error::new(Kind::Corrupt, Stage::Golden, entry.path.to_string(), "has more than 2^64 bytes of data"))?;
                let mut incoming = Incoming { daemon, chunk: Vec::new(), used: 0, left };
                let result = filler.entry(&entry, &mut incoming);
                // After a refusal the rest of the data is still on its way.
                if io::copy(&mut incoming, &mut io::sink()).is_err() {
                    return Ok(None);
                }
                daemon.outcome(result)?;
            }
            Some((Request::Finish, _)) => break,
            Some((other, _)) => return Err(Error::internal(Stage::Host, SUBCOMMAND, format!("{other:?} does not belong into a build"))),
            None => return Ok(None),
        }
    }
    let inodes = filler.inodes();
    let free = filler.finish()?;
    mount.unmount()?;
    device.close()?;
    devices.unmount()?;
    scratch.unmount()?;
    Ok(Some(Reply::Built { used_bytes: job.len.saturating_sub(free), inodes }))
}

fn read(daemon: &mut Daemon, job: &ReadJob, input: OwnedFd) -> Result<Option<Reply>> {
    let scratch = scratch()?;
    let disk = File::from(input);
    let options = Options { read_only: true, offset: job.offset, size_limit: job.len, ..Options::guarded() };
    let device = LoopDevice::attach(&disk, Path::new("cloudletd-read"), &options)?;
    let devices = PrivateMount::only_device(device.path())?;
    let mount = PrivateMount::read_only(device.path(), Path::new(ROOT), job.kind.name(), tools::read_options(job.kind))?;
    let root = open_root(mount.target()).map_err(|errno| protocol("open the root", errno.into()))?;
    daemon.reply(&Reply::Ok)?;
    loop {
        match daemon.request()? {
            Some((Request::Get { path, len_max }, _)) => match reads::open(&root, &path, len_max) {
                Ok(Some((file, len))) => daemon.content(&file, len)?,
                Ok(None) => daemon.reply(&Reply::Nothing)?,
                Err(error) => daemon.reply(&Reply::Failed(WireError::from(&error)))?,
            },
            Some((Request::List { path }, _)) => match reads::names(&root, &path) {
                Ok(names) => daemon.reply(&Reply::Names(names))?,
                Err(error) => daemon.reply(&Reply::Failed(WireError::from(&error)))?,
            },
            Some((Request::Finish, _)) => break,
            Some((other, _)) => return Err(Error::internal(Stage::Host, SUBCOMMAND, format!("{other:?} does not belong into a look"))),
            None => return Ok(None),
        }
    }
    drop(root);
    mount.unmount()?;
    device.close()?;
    devices.unmount()?;
    scratch.unmount()?;
    Ok(Some(Reply::Ok))
}

fn edit(daemon: &mut Daemon, job: &EditJob, connection: OwnedFd) -> Result<Option<Reply>> {
    let scratch = scratch()?;
    let file = serve_file(daemon, connection)?;
    let disk = File::options().read(true).write(true).open(file.target()).map_err(|error| protocol("open the copy-on-write view", error))?;
    let device = LoopDevice::attach(&disk, Path::new("cloudletd-edit"), &Options::guarded())?;
    drop(disk);
    device.unlock()?;
    let devices = PrivateMount::only_device(device.path())?;
    tools::identify(job.kind, device.path(), job.uuid.as_ref(), job.label.as_deref())?;
    // Growth comes before the edits: they may need the room.
    if job.grow {
        tools::grow_unmounted(job.kind, device.path())?;
    }
    let mount = PrivateMount::new(device.path(), Path::new(ROOT), job.kind.name(), tools::mount_options(job.kind))?;
    if job.grow {
        tools::grow_mounted(job.kind, mount.target())?;
    }
    let root = open_root(mount.target()).map_err(|errno| protocol("open the root", errno.into()))?;
    let editor = Editor::new(root, Timestamp { secs: job.now.0, nanos: job.now.1 });
    daemon.reply(&Reply::Ok)?;
    loop {
        match daemon.request()? {
            Some((Request::Op(op), content)) => {
                let (path, op) = op.into_op(content)?;
                daemon.outcome(editor.apply(&path, &op))?;
            }
            Some((Request::Finish, _)) => break,
            Some((other, _)) => return Err(Error::internal(Stage::Host, SUBCOMMAND, format!("{other:?} does not belong into an edit"))),
            None => return Ok(None),
        }
    }
    editor.finish()?;
    mount.unmount()?;
    device.close()?;
    devices.unmount()?;
    file.unmount()?;
    scratch.unmount()?;
    Ok(Some(Reply::Ok))
}

/// Mounts the FUSE connection as a file, and tells the daemon to serve it.
fn serve_file(daemon: &mut Daemon, connection: OwnedFd) -> Result<PrivateMount> {
    // Both copies of the connection must go: the daemon's has to be the last, or requests would wait for ever after its death.
    drop(connection);
    let options = "fd=0,rootmode=100600,user_id=0,group_id=0,default_permissions,allow_other";
    let mount = PrivateMount::new(Path::new("cloudletd"), Path::new(DISK), "fuse", options)?;
    let null = File::open("/dev/null").map_err(|error| protocol("open /dev/null", error))?;
    nix::unistd::dup2_stdin(&null).map_err(|errno| protocol("close the FUSE connection", errno.into()))?;
    daemon.reply(&Reply::Ready)?;
    Ok(mount)
}

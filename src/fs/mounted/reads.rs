//! Looking things up in a mounted tree: the worker's part, and the daemon's.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::{Mutex, PoisonError},
};

use rustix::fs::{Dir, FileType, fstat};

use super::{
    Conversation,
    confined::open_to_read,
    unexpected,
    wire::{self, DATA_BYTES_MAX, ReadJob, Reply, Request, path_in},
    worker::SUBCOMMAND,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{FsKind, Region, TreeReader},
    names::GuestPath,
    units::Bytes,
};

/// Names of one directory that are told; more is nothing that anybody looks for.
const NAMES_MAX: usize = 10_000;

fn failed(path: &GuestPath, doing: &str, errno: rustix::io::Errno) -> Error {
    Error::io(Stage::Golden, path.to_string(), doing, errno.into())
}

/// The regular file at `path` and its length. `Kind::NoSpace` when it has more than `len_max` bytes.
pub(super) fn open(root: &OwnedFd, path: &[u8], len_max: u64) -> Result<Option<(File, u64)>> {
    let path = path_in(path)?;
    let Some(opened) = open_to_read(root, &path).map_err(|errno| failed(&path, "open", errno))? else { return Ok(None) };
    let stat = fstat(&opened).map_err(|errno| failed(&path, "stat", errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let len = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if len > len_max {
        let text = format!("has {}, the limit is {}", Bytes(len), Bytes(len_max));
        return Err(Error::new(Kind::NoSpace, Stage::Golden, path.to_string(), text));
    }
    Ok(Some((File::from(opened), len)))
}

/// The names in the directory at `path` that are text, in order.
pub(super) fn names(root: &OwnedFd, path: &[u8]) -> Result<Vec<String>> {
    let path = path_in(path)?;
    let Some(opened) = open_to_read(root, &path).map_err(|errno| failed(&path, "open", errno))? else { return Ok(Vec::new()) };
    let stat = fstat(&opened).map_err(|errno| failed(&path, "stat", errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in Dir::read_from(&opened).map_err(|errno| failed(&path, "list", errno))? {
        let entry = entry.map_err(|errno| failed(&path, "list", errno))?;
        match entry.file_name().to_str() {
            Ok("." | "..") | Err(_) => {}
            Ok(_) if names.len() == NAMES_MAX => {
                return Err(Error::new(Kind::NoSpace, Stage::Golden, path.to_string(), format!("has more than {NAMES_MAX} names")));
            }
            Ok(name) => names.push(name.to_owned()),
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A finished filesystem that a worker has mounted for reading; it goes when this is dropped.
pub(super) struct MountedTree(Mutex<Conversation>);

impl MountedTree {
    pub(super) fn open(program: &Path, kind: FsKind, region: &Region) -> Result<Self> {
        let file = region.file.try_clone().map_err(|error| Error::io(Stage::Golden, "disk", "duplicate its descriptor", error))?;
        let mut worker = Conversation::start(program, file.into())?;
        worker.send(&Request::Read(ReadJob { kind, offset: region.offset, len: region.len }), &[])?;
        worker.expect_ok(Stage::Golden)?;
        Ok(MountedTree(Mutex::new(worker)))
    }

    fn ask<T>(&self, request: &Request, take: impl FnOnce(&mut Conversation, Reply) -> Result<T>) -> Result<T> {
        let mut worker = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        worker.send(request, &[])?;
        let reply = worker.answer(Stage::Golden)?;
        take(&mut worker, reply)
    }
}

impl TreeReader for MountedTree {
    fn read(&self, path: &str, len_max: u64) -> Result<Option<Vec<u8>>> {
        let Ok(path) = GuestPath::new(path) else { return Ok(None) };
        self.ask(&Request::Get { path: path.as_bytes().to_vec(), len_max }, |worker, reply| match reply {
            Reply::Content { len } if len <= len_max => content(worker, len).map(Some),
            Reply::Nothing => Ok(None),
            other => Err(unexpected(&other)),
        })
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        let Ok(path) = GuestPath::new(path) else { return Ok(Vec::new()) };
        self.ask(&Request::List { path: path.as_bytes().to_vec() }, |_, reply| match reply {
            Reply::Names(names) => Ok(names),
            other => Err(unexpected(&other)),
        })
    }
}

/// The bytes that follow their length.
fn content(worker: &mut Conversation, len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        match wire::receive::<Reply>(&mut worker.from, DATA_BYTES_MAX) {
            Ok(Some((None, data))) if !data.is_empty() && (bytes.len() + data.len()) as u64 <= len => bytes.extend_from_slice(&data),
            Ok(_) => return Err(Error::internal(Stage::Golden, SUBCOMMAND, "a file of the tree was cut off").with_reason("WORKER_DIED")),
            Err(error) => return Err(Error::io(Stage::Golden, SUBCOMMAND, "receive a file of the tree", error).with_reason("WORKER_DIED")),
        }
    }
    Ok(bytes)
}

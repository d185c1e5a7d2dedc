//! `file://` below configured directories. The kernel keeps the path beneath the root (openat2(2), `RESOLVE_BENEATH`): no symlink, `..` or mount
//! trick leads out of it, whoever may write there.

use std::{
    fs::File,
    io::{self, Read},
    path::{Component, PathBuf},
};

use reqwest::Url;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use super::{
    partial::{DigestWriter, too_large},
    policy::{refused, shown},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    progress::Progress,
};

const COPY_LEN: usize = 1024 * 1024;

/// A place below a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    root: PathBuf,
    below: PathBuf,
}

/// Finds the root that a URL is below, by its text alone.
pub(super) fn place(url: &Url, roots: &[PathBuf]) -> Result<Place> {
    if url.host_str().is_some_and(|host| !host.is_empty() && host != "localhost") {
        return Err(refused(url, "a file URL with a host is not allowed".into()));
    }
    let path = url.to_file_path().map_err(|()| refused(url, "the URL has no path of this host".into()))?;
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let found = roots.iter().find_map(|root| path.strip_prefix(root).ok().map(|below| Place { root: root.clone(), below: below.to_owned() }));
    match found {
        Some(place) if plain && !place.below.as_os_str().is_empty() => Ok(place),
        _ => Err(refused(url, "the path is not below a directory that is configured for files".into())),
    }
}

/// Copies the file into `writer`, which is empty. Blocking.
pub(super) fn copy(url: &Url, place: &Place, writer: &mut DigestWriter, size_max: u64, progress: &Progress) -> Result<()> {
    let mut file = open(url, place)?;
    let failed = |doing: &str, error| Error::io(Stage::Fetch, shown(url), doing, error);
    let metadata = file.metadata().map_err(|error| failed("read its metadata", error))?;
    if !metadata.is_file() {
        return Err(refused(url, "it is not a regular file".into()));
    }
    if metadata.len() > size_max {
        return Err(too_large(&shown(url), Some(metadata.len()), size_max));
    }
    progress.enter(Stage::Fetch, metadata.len());
    let mut buffer = vec![0; COPY_LEN];
    loop {
        progress.check()?;
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                writer.take(&buffer[..len])?;
                progress.add(len as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read", error)),
        }
    }
}

fn open(url: &Url, place: &Place) -> Result<File> {
    let root = openat(CWD, &place.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::io(Stage::Fetch, place.root.display().to_string(), "open the root for files", errno.into()))?;
    // Without NONBLOCK a fifo would keep us waiting for its writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    match openat2(&root, &place.below, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS) {
        Ok(file) => Ok(file.into()),
        Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => Err(refused(url, "a symlink leads out of the directory for files".into())),
        Err(rustix::io::Errno::NXIO) => Err(refused(url, "it is not a regular file".into())),
        Err(errno) => {
            let error = Error::io(Stage::Fetch, shown(url), "open", errno.into());
            Err(if error.kind() == Kind::NotFound { error.with_reason("ROOTFS_NOT_FOUND") } else { error })
        }
    }
}

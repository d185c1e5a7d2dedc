//! The daemon's side of a build: entries go to the worker one at a time, and each is answered before the next.

use std::{io::Read, path::Path};

use super::{
    Conversation, unexpected,
    wire::{self, BuildJob, DATA_BYTES_MAX, Reply, Request, WireEntry},
};
use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{BuildParams, BuiltFs, FsKind, Region, TreeBuilder},
    progress::Progress,
    tree::{Entry, EntryKind, TreeSink},
};

/// A build in progress. Dropping it makes the worker unmount, detach and go.
pub(super) struct MountedBuilder {
    worker: Conversation,
    kind: FsKind,
    size_bytes: u64,
    progress: Progress,
    buffer: Vec<u8>,
    /// After a failure in the middle of an entry the worker is waiting for data that will not come.
    broken: bool,
}

impl MountedBuilder {
    pub fn start(program: &Path, kind: FsKind, params: &BuildParams, region: &Region, progress: &Progress) -> Result<Self> {
        let file = region.file.try_clone().map_err(|error| Error::io(Stage::Golden, "disk", "duplicate its descriptor", error))?;
        let mut worker = Conversation::start(program, file.into())?;
        worker.send(&Request::Build(BuildJob::new(kind, region.offset, region.len, params)), &[])?;
        worker.expect_ok(Stage::Golden)?;
        Ok(MountedBuilder { worker, kind, size_bytes: region.len, progress: progress.clone(), buffer: Vec::new(), broken: false })
    }

    fn send_entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        let sent = wire::send(&mut self.worker.to, Some(&Request::Entry(WireEntry::from(entry))), &[]);
        sent.or_else(|error| self.worker.send_failed(error))?;
        let EntryKind::File { spans, .. } = &entry.kind else { return Ok(()) };
        let total = spans.iter().try_fold(0u64, |sum, span| sum.checked_add(span.len));
        let mut left = total.ok_or_else(|| Error::new(Kind::Corrupt, Stage::Golden, entry.path.to_string(), "has more than 2^64 bytes of data"))?;
        self.buffer.resize(DATA_BYTES_MAX / 4, 0);
        while left > 0 {
            self.progress.check()?;
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let read = data.read_exact(&mut self.buffer[..want]);
            read.map_err(|error| Error::io(Stage::Golden, entry.path.to_string(), "read its data", error))?;
            let nothing: Option<&Request> = None;
            let sent = wire::send(&mut self.worker.to, nothing, &self.buffer[..want]);
            sent.or_else(|error| self.worker.send_failed(error))?;
            left -= want as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        use std::io::Write;
        self.worker.to.flush().or_else(|error| self.worker.send_failed(error))
    }
}

impl TreeSink for MountedBuilder {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        self.progress.check()?;
        if self.broken {
            return Err(Error::internal(Stage::Golden, entry.path.to_string(), "the build has failed before"));
        }
        self.broken = true;
        self.send_entry(entry, data)?;
        self.flush()?;
        let answer = self.worker.answer(Stage::Golden);
        // A refused entry leaves the conversation in step.
        self.broken = matches!(&answer, Err(error) if error.reason() == "WORKER_DIED");
        match answer? {
            Reply::Ok => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

impl TreeBuilder for MountedBuilder {
    fn finish(mut self: Box<Self>) -> Result<BuiltFs> {
        self.progress.check()?;
        if self.broken {
            return Err(Error::internal(Stage::Golden, "filesystem", "the build has failed before"));
        }
        self.worker.send(&Request::Finish, &[])?;
        match self.worker.answer(Stage::Golden)? {
            Reply::Built { used_bytes, inodes } => {
                self.worker.finish()?;
                Ok(BuiltFs { kind: self.kind, used_bytes, inodes, size_bytes: self.size_bytes })
            }
            other => Err(unexpected(&other)),
        }
    }
}

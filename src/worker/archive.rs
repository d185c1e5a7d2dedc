//! An archive whose filesystem somebody else writes: XFS and btrfs, which the kernel writes for a mount worker that is root.
//!
//! ```text
//!  Launcher::archive ── Tree {spec} ─►   confined; decrypts, decompresses and reads the archive on standard input
//!                    ◄─ Entry, data…     each goes on to the mount worker; nothing is answered
//!                    ◄─ Walked {facts}   exit
//! ```
//!
//! The daemon passes on entries whose paths are guest paths again, and bytes; it unpacks nothing.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
};

use serde::{Deserialize, Serialize};

use super::{
    Conversation, Launcher, POLL, child, died,
    wire::{Reply, Request, WireError},
};
use crate::{
    error::{Error, Result, Stage},
    fs::mounted::wire::{WireEntry, receive},
    guest::facts::GuestFacts,
    host::confine::{Limits, Withdrawn},
    progress::Progress,
    render::fill::{Archive, read_archive},
    store::records::GoldenSpec,
    tree::{Entry, EntryKind, TreeSink, decompress::Compression, error_of_read},
    trust::age::FileKey,
};

/// Bytes of data per frame.
const DATA_BYTES_MAX: usize = 256 << 10;

/// What to read.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TreeJob {
    spec: GoldenSpec,
    declared: Option<Compression>,
    name: String,
    /// Whether the frame's data is the key of an encrypted tarball.
    pub is_encrypted: bool,
    memory_bytes: u64,
    misdeed: Option<String>,
}

impl Launcher {
    /// Reads an archive in a worker and gives its entries to `sink`, as [`read_archive`] does here.
    pub(super) fn archive(&self, archive: Archive<'_>, sink: &mut dyn TreeSink, progress: &Progress) -> Result<GuestFacts> {
        let nothing = File::open("/dev/null").map_err(super::failed("open /dev/null"))?;
        let mut conversation = Conversation::start(&self.program, &archive.blob, nothing.as_fd())?;
        let job = TreeJob {
            spec: archive.spec.clone(),
            declared: archive.declared,
            name: archive.name.to_owned(),
            is_encrypted: archive.file_key.is_some(),
            memory_bytes: self.settings.memory_max.0,
            misdeed: self.misdeed.clone(),
        };
        let key = archive.file_key.as_ref().map(|key| key.expose().to_vec()).unwrap_or_default();
        let sent = conversation.send(&Request::Tree(Box::new(job)), &key);
        match sent.and_then(|()| conversation.pass_on(&archive.blob, sink, progress)) {
            Ok(facts) => conversation.finish().map(|()| facts),
            Err(error) => Err(conversation.abort(error)),
        }
    }
}

impl Conversation {
    fn pass_on(&mut self, blob: &File, sink: &mut dyn TreeSink, progress: &Progress) -> Result<GuestFacts> {
        let mut read = 0;
        loop {
            self.set_timeout(POLL)?;
            self.wait(Some(blob), &mut read, progress)?;
            self.set_timeout(super::FRAME_TIMEOUT)?;
            match receive(&mut self.from, 0) {
                Ok(Some((Some(Reply::Confined { missing }), _))) => self.note_missing(missing),
                Ok(Some((Some(Reply::Entry(entry)), _))) => {
                    let entry = Entry::try_from(*entry)?;
                    let mut data = Data { left: len_of(&entry)?, from: self, frame: Vec::new(), at: 0, failure: None };
                    let taken = sink.entry(&entry, &mut data).and_then(|()| {
                        // What the sink had no use for is in the way of the next entry.
                        let rest = io::copy(&mut data, &mut io::sink());
                        rest.map(|_| ()).map_err(|error| Error::io(Stage::Golden, super::SUBCOMMAND, "receive a file's data", error))
                    });
                    // What the worker said comes before what became of it.
                    data.failure.map_or(taken, Err)?;
                }
                Ok(Some((Some(Reply::Walked(facts)), _))) => return Ok(*facts),
                Ok(Some((Some(Reply::Failed(error)), _))) => return Err(error.into_error()),
                Ok(Some(_)) => return Err(died("its answer is to another question")),
                Ok(None) => return Err(died("ended without an answer")),
                Err(error) => return Err(died("its answer can't be read").with_source(error)),
            }
        }
    }
}

/// How many bytes of data follow an entry.
fn len_of(entry: &Entry) -> Result<u64> {
    let EntryKind::File { spans, .. } = &entry.kind else { return Ok(0) };
    let total = spans.iter().try_fold(0u64, |sum, span| sum.checked_add(span.len));
    total.ok_or_else(|| died("an entry of more than 2^64 bytes"))
}

/// The data of one entry on its way.
struct Data<'c> {
    from: &'c mut Conversation,
    left: u64,
    frame: Vec<u8>,
    at: usize,
    /// Why there is no more.
    failure: Option<Error>,
}

impl Read for Data<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.frame.len() && self.left > 0 {
            let failure = match receive::<Reply>(&mut self.from.from, DATA_BYTES_MAX) {
                Ok(Some((None, data))) if !data.is_empty() && data.len() as u64 <= self.left => {
                    self.frame = data;
                    None
                }
                Ok(Some((Some(Reply::Failed(error)), _))) => Some(error.into_error()),
                Ok(_) => Some(died("ended in the middle of a file")),
                Err(error) => Some(died("a file's data can't be read").with_source(error)),
            };
            if failure.is_some() {
                self.failure = failure;
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            (self.at, self.left) = (0, self.left - self.frame.len() as u64);
        }
        let len = out.len().min(self.frame.len() - self.at);
        out[..len].copy_from_slice(&self.frame[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

/// The worker's side.
pub(super) fn serve(job: &TreeJob, data: &[u8], blob: File, mut daemon: child::Daemon, withdrawn: Withdrawn) -> Result<()> {
    let file_key = match (job.is_encrypted, <[u8; _]>::try_from(data)) {
        (false, _) => None,
        (true, Ok(key)) => Some(FileKey::new(key)),
        (true, Err(_)) => return Err(Error::internal(Stage::Host, super::SUBCOMMAND, "the key is not as long as a key")),
    };
    child::prepare(job.is_encrypted)?;
    let misdeed = job.misdeed.as_deref();
    match withdrawn.confine(Limits { memory_bytes: job.memory_bytes, file_bytes: None }, || child::misdeed::before_the_filter(misdeed)) {
        Ok(confined) => daemon.reply(&Reply::Confined { missing: confined.missing })?,
        Err(error) => return daemon.reply(&Reply::Failed(WireError::from(&error))),
    }
    child::misdeed::behind_the_filter(misdeed);
    let archive = Archive { blob, name: &job.name, declared: job.declared, file_key, spec: &job.spec };
    let progress = Progress::default();
    progress.enter(Stage::Golden, 0);
    let mut sink = PassOn { daemon, buffer: vec![0; DATA_BYTES_MAX] };
    let reply = match read_archive(archive, &mut sink, &progress) {
        Ok(facts) => Reply::Walked(Box::new(facts)),
        Err(error) => Reply::Failed(WireError::from(&error)),
    };
    sink.daemon.reply(&reply)
}

/// Entries on their way to the daemon.
struct PassOn {
    daemon: child::Daemon,
    buffer: Vec<u8>,
}

impl TreeSink for PassOn {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        let mut left = len_of(entry)?;
        self.daemon.put(Some(&Reply::Entry(Box::new(WireEntry::from(entry)))), &[])?;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let read = data.read_exact(&mut self.buffer[..want]);
            read.map_err(|error| error_of_read(error, Stage::Golden, &entry.path.to_string(), "read its data"))?;
            self.daemon.put(None, &self.buffer[..want])?;
            left -= want as u64;
        }
        Ok(())
    }
}

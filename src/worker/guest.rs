//! A guest's filesystem, read in a worker.
//!
//! ```text
//!  Launcher::study ── Study {where, what to look at} ─►   confined; opens the ext4 filesystem
//!                  ◄─ Read {offset, len} ─ Bytes ─►        as often as it likes; it has no descriptor of the volume
//!                  ◄─ Studied {facts}
//!  Study::edit     ── Edit {operations, contents} ─►       (Read, Bytes …)
//!                  ◄─ Patched {blocks, contents}           exit
//! ```
//!
//! What comes back is facts, which injection takes as a guest's word anyway, and blocks inside the root filesystem, which the guest could have written itself. The
//! format of the volume (qcow2) stays with the daemon: it is the hypervisor's to write, and whoever may rewrite its header may name another backing file.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::AsFd,
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};

use super::{
    Conversation, Launcher, POLL, SUBCOMMAND, child, died,
    wire::{Reply, Request, WireError},
};
use crate::{
    config::worker::Confine,
    error::{Error, Result, Stage},
    fs::{
        ReadAt, View,
        edit::{Edit, EditRequest},
        mounted::wire::{WireOp, receive},
        patch::BlockPatch,
    },
    guest::facts::GuestFacts,
    host::confine::{Limits, Withdrawn},
    names::GuestPath,
    progress::Progress,
    render::study::{self, Root},
    units::{PATCH_BLOCK, Timestamp},
};

/// Bytes of the disk that are read and kept at a time: directories and inode tables lie in runs.
const READ_LEN: u64 = 64 << 10;
/// Runs that are kept; all are forgotten when there are more.
const RUNS_MAX: usize = 1024;
/// Blocks of one patch: what injection writes is some tens of files, most of them small.
const BLOCKS_MAX: usize = 32 << 10;
/// Bytes of all contents that are written: those of the blocks.
const CONTENTS_BYTES_MAX: usize = BLOCKS_MAX * 4096;

/// What to look at.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StudyJob {
    root: Root,
    watched: Vec<Vec<u8>>,
    memory_bytes: u64,
    misdeed: Option<String>,
}

/// What to change. Contents are not in it: they may be secret, and documents are shown when something is wrong with them.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct EditJob {
    ops: Vec<(WireOp, String, usize)>,
    now: (i64, u32),
}

/// A guest's filesystem whose facts are known. Dropping it ends the process.
pub struct Study {
    facts: GuestFacts,
    root: Root,
    way: Way,
}

enum Way {
    /// In this process.
    Here(View),
    /// In a worker that waits.
    Confined(Box<Conversation>, Arc<dyn ReadAt>),
}

impl Launcher {
    /// Reads the root filesystem of a stopped guest, in a worker unless configured otherwise. Errors as [`study::open`], and `WORKER_DIED`.
    pub fn study(&self, disk: Arc<dyn ReadAt>, root: &Root, watched: &[GuestPath], progress: &Progress) -> Result<Study> {
        if self.settings.confine == Confine::Off {
            let (view, image) = study::open(disk, root)?;
            return Ok(Study { facts: study::facts(&image, watched, progress)?, root: root.clone(), way: Way::Here(view) });
        }
        let nothing = File::open("/dev/null").map_err(super::failed("open /dev/null"))?;
        let mut conversation = Box::new(Conversation::start(&self.program, &nothing, nothing.as_fd())?);
        let job = StudyJob {
            root: root.clone(),
            watched: watched.iter().map(|path| path.as_bytes().to_vec()).collect(),
            memory_bytes: self.settings.memory_max.0,
            misdeed: self.misdeed.clone(),
        };
        let sent = conversation.send(&Request::Study(Box::new(job)), &[]);
        match sent.and_then(|()| conversation.serve_reads(&*disk, root, progress)) {
            Ok((Reply::Studied(facts), _)) => Ok(Study { facts: *facts, root: root.clone(), way: Way::Confined(conversation, disk) }),
            Ok(_) => Err(conversation.abort(died("its answer is to another question"))),
            Err(error) => Err(conversation.abort(error)),
        }
    }
}

impl Study {
    /// What the tree contains.
    pub fn facts(&self) -> &GuestFacts {
        &self.facts
    }

    /// The blocks of the root filesystem that change. All or nothing.
    pub fn edit(self, request: &EditRequest, progress: &Progress) -> Result<BlockPatch> {
        let (mut conversation, disk) = match self.way {
            Way::Here(view) => return study::edit(view, request, progress),
            Way::Confined(conversation, disk) => (conversation, disk),
        };
        let mut data = Vec::new();
        let ops = request.edits.iter().map(|edit| {
            let (op, content) = WireOp::new(&edit.path, &edit.op);
            data.extend_from_slice(content);
            (op, edit.why.clone(), content.len())
        });
        let job = EditJob { ops: ops.collect(), now: (request.now.secs, request.now.nanos) };
        let sent = conversation.send(&Request::Edit(Box::new(job)), &data);
        let patch = match sent.and_then(|()| conversation.serve_reads(&*disk, &self.root, progress)) {
            Ok((Reply::Patched { blocks }, data)) => patch_of(&blocks, &data, self.root.len),
            Ok(_) => Err(died("its answer is to another question")),
            Err(error) => Err(error),
        };
        match patch {
            Ok(patch) => conversation.finish().map(|()| patch),
            Err(error) => Err(conversation.abort(error)),
        }
    }
}

/// The patch that a worker gave: whole blocks, ascending, inside the filesystem.
fn patch_of(blocks: &[u64], data: &[u8], len: u64) -> Result<BlockPatch> {
    let (contents, rest) = data.as_chunks::<{ PATCH_BLOCK as usize }>();
    let is_ascending = blocks.windows(2).all(|pair| pair[0] < pair[1]);
    if contents.len() != blocks.len() || !rest.is_empty() || !is_ascending || blocks.last().is_some_and(|last| *last >= len / PATCH_BLOCK) {
        return Err(died("its patch is not one of this filesystem"));
    }
    let mut patch = BlockPatch::new(len);
    for (number, content) in blocks.iter().zip(contents) {
        patch.insert(*number, content.to_vec().into());
    }
    Ok(patch)
}

impl Conversation {
    /// Gives the worker what it reads of the disk until it has an answer.
    fn serve_reads(&mut self, disk: &dyn ReadAt, root: &Root, progress: &Progress) -> Result<(Reply, Vec<u8>)> {
        loop {
            self.set_timeout(POLL)?;
            self.wait(None, &mut 0, progress)?;
            self.set_timeout(super::FRAME_TIMEOUT)?;
            match receive(&mut self.from, CONTENTS_BYTES_MAX) {
                Ok(Some((Some(Reply::Confined { missing }), _))) => self.note_missing(missing),
                Ok(Some((Some(Reply::Read { offset, len }), _))) => {
                    let len = u64::from(len);
                    if len > READ_LEN || offset.checked_add(len).is_none_or(|end| end > root.disk_len) {
                        return Err(died("it wants to read what is not on the disk"));
                    }
                    let mut bytes = vec![0; len as usize];
                    match disk.read_all_at(&mut bytes, offset) {
                        Ok(()) => self.send(&Request::Bytes, &bytes)?,
                        Err(error) => self.send(&Request::Unreadable { errno: error.raw_os_error().unwrap_or(libc::EIO) }, &[])?,
                    }
                }
                Ok(Some((Some(Reply::Failed(error)), _))) => return Err(error.into_error()),
                Ok(Some((Some(reply), data))) => return Ok((reply, data)),
                Ok(Some((None, _))) => return Err(died("an answer was empty")),
                Ok(None) => return Err(died("ended without an answer")),
                Err(error) => return Err(died("its answer can't be read").with_source(error)),
            }
        }
    }
}

/// The guest's disk as the worker sees it.
struct Remote {
    daemon: Mutex<child::Daemon>,
    runs: Mutex<HashMap<u64, Arc<[u8]>>>,
    len: u64,
}

impl Remote {
    fn run(&self, start: u64) -> io::Result<Arc<[u8]>> {
        let broken = || io::Error::from_raw_os_error(libc::EIO);
        let mut runs = self.runs.lock().map_err(|_| broken())?;
        if let Some(run) = runs.get(&start) {
            return Ok(Arc::clone(run));
        }
        let len = READ_LEN.min(self.len - start) as usize;
        let mut daemon = self.daemon.lock().map_err(|_| broken())?;
        let asked = daemon.reply(&Reply::Read { offset: start, len: len as u32 });
        let run: Arc<[u8]> = match asked.and_then(|()| daemon.request()) {
            Ok(Some((Request::Bytes, bytes))) if bytes.len() == len => bytes.into(),
            Ok(Some((Request::Unreadable { errno }, _))) => return Err(io::Error::from_raw_os_error(errno)),
            _ => return Err(broken()),
        };
        if runs.len() >= RUNS_MAX {
            runs.clear();
        }
        runs.insert(start, Arc::clone(&run));
        Ok(run)
    }
}

impl ReadAt for Remote {
    fn read_all_at(&self, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while !into.is_empty() {
            let start = offset / READ_LEN * READ_LEN;
            let run = self.run(start)?;
            let from = (offset - start) as usize;
            let len = into.len().min(run.len() - from);
            into[..len].copy_from_slice(&run[from..from + len]);
            into = &mut into[len..];
            offset += len as u64;
        }
        Ok(())
    }
}

/// The worker's side.
pub(super) fn serve(job: &StudyJob, mut daemon: child::Daemon, withdrawn: Withdrawn) -> Result<()> {
    let limits = Limits { memory_bytes: job.memory_bytes, file_bytes: None };
    let misdeed = job.misdeed.as_deref();
    match withdrawn.confine(limits, || child::misdeed::before_the_filter(misdeed)) {
        Ok(confined) => daemon.reply(&Reply::Confined { missing: confined.missing })?,
        Err(error) => return daemon.reply(&Reply::Failed(WireError::from(&error))),
    }
    child::misdeed::behind_the_filter(misdeed);
    let remote = Arc::new(Remote { daemon: Mutex::new(daemon), runs: Mutex::default(), len: job.root.disk_len });
    let said = |reply: &Reply, data: &[u8]| remote.locked(|daemon| daemon.reply_with(reply, data));
    let studied = look(job, Arc::clone(&remote) as Arc<dyn ReadAt>);
    let view = match studied {
        Ok((view, facts)) => {
            said(&Reply::Studied(Box::new(facts)), &[])?;
            view
        }
        Err(error) => return said(&Reply::Failed(WireError::from(&error)), &[]),
    };
    let (edit, contents) = match remote.locked(child::Daemon::request)? {
        Some((Request::Edit(edit), contents)) => (*edit, contents),
        // The daemon has found something that it refuses.
        None => return Ok(()),
        Some(_) => return Err(Error::internal(Stage::Host, SUBCOMMAND, "after facts come edits")),
    };
    match change(edit, &contents, view) {
        Ok(patch) => {
            let data = patch.iter().flat_map(|(_, block)| block).copied().collect::<Vec<u8>>();
            said(&Reply::Patched { blocks: patch.iter().map(|(number, _)| number).collect() }, &data)
        }
        Err(error) => said(&Reply::Failed(WireError::from(&error)), &[]),
    }
}

impl Remote {
    fn locked<T>(&self, work: impl FnOnce(&mut child::Daemon) -> Result<T>) -> Result<T> {
        work(&mut *self.daemon.lock().map_err(|_| Error::internal(Stage::Host, SUBCOMMAND, "a reading thread panicked"))?)
    }
}

fn look(job: &StudyJob, disk: Arc<dyn ReadAt>) -> Result<(View, GuestFacts)> {
    let (view, image) = study::open(disk, &job.root)?;
    let path = |path: &Vec<u8>| GuestPath::new(path).map_err(|why| Error::internal(Stage::Host, SUBCOMMAND, why));
    let watched = job.watched.iter().map(path).collect::<Result<Vec<_>>>()?;
    let facts = study::facts(&image, &watched, &Progress::default())?;
    Ok((view, facts))
}

fn change(job: EditJob, mut contents: &[u8], view: View) -> Result<BlockPatch> {
    let mut edits = Vec::new();
    for (op, why, len) in job.ops {
        let (content, rest) = contents
            .split_at_checked(len)
            .ok_or_else(|| Error::internal(Stage::Host, SUBCOMMAND, "the contents are not as long as the edits say"))?;
        contents = rest;
        let (path, op) = op.into_op(content.to_vec())?;
        edits.push(Edit { path, op, why, secret: true });
    }
    let now = Timestamp { secs: job.now.0, nanos: job.now.1 };
    let patch = study::edit(view, &EditRequest { edits, uuid: None, label: None, size_bytes: None, now }, &Progress::default())?;
    if patch.len() > BLOCKS_MAX {
        return Err(Error::new(crate::error::Kind::NoSpace, Stage::Edit, SUBCOMMAND, "the edits change too much").with_reason("GUEST_TREE_TOO_LARGE"));
    }
    Ok(patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_outside_the_filesystem_is_not_believed() {
        let block = [7; 4096];
        assert_eq!(patch_of(&[0, 9], &[block, block].concat(), 40960).expect("inside").len(), 2);
        for (blocks, data) in [
            (&[10][..], block.to_vec()),
            (&[u64::MAX], block.to_vec()),
            (&[1, 1], [block, block].concat()),
            (&[2, 1], [block, block].concat()),
            (&[1], [block, block].concat()),
            (&[1, 2], block.to_vec()),
            (&[1], block[1..].to_vec()),
        ] {
            assert_eq!(patch_of(blocks, data.as_slice(), 40960).expect_err("refused").reason(), "WORKER_DIED", "{blocks:?}");
        }
    }
}

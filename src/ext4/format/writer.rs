//! Writes the region from a second thread, in large pieces, so that copying into the page cache overlaps with reading the archive.
//!
//! The formatter fills a buffer; adjacent writes share it. A full buffer, or one whose successor is not adjacent, goes through a bounded channel
//! to the thread, which writes it and sends it back empty: memory is `BUFFERS` pieces. Writes happen in the order they were made, so blocks may
//! be written twice. An error of the thread surfaces at the next hand-over or at [`Writer::finish`].
//!
//! What is behind the front of a long run of writes is sent to storage at once, so that the flush at the end finds little left to do.

use std::{
    os::unix::fs::FileExt as _,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use crate::{
    error::{Error, Result, Stage},
    fs::{Region, WriteObserver},
    host::sys,
    progress::Progress,
};

const BUFFER_LEN: usize = 1 << 20;
const BUFFERS: usize = 4;
/// Sent to storage at once: large requests, and large extents where the host's filesystem allocates as it writes.
const WRITEBACK_LEN: u64 = 16 << 20;

struct Piece {
    at: u64,
    len: usize,
    buffer: Vec<u8>,
}

/// A sequential view of the region.
pub struct Writer {
    piece: Piece,
    to_thread: Option<SyncSender<Piece>>,
    from_thread: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Result<()>>>,
    progress: Progress,
    written: u64,
    observer: Arc<OnceLock<Arc<dyn WriteObserver>>>,
}

/// The run of adjacent writes that has not been sent to storage yet, in bytes of the disk file.
#[derive(Default)]
struct Front {
    start: u64,
    end: u64,
}

impl Front {
    fn written(&mut self, region: &Region, at: u64, len: u64) {
        if at != self.end {
            self.start = at;
        }
        self.end = at + len;
        if self.end - self.start >= WRITEBACK_LEN {
            // Only for speed: where it is not supported, the flush at the end does all of it.
            let _ = sys::start_writeback(&*region.file, self.start, self.end - self.start);
            self.start = self.end;
        }
    }
}

impl Writer {
    /// Starts the thread.
    pub fn new(region: Region, progress: &Progress) -> Result<Self> {
        let (to_thread, pieces) = sync_channel::<Piece>(BUFFERS);
        let (give_back, from_thread) = sync_channel(BUFFERS);
        for _ in 1..BUFFERS {
            give_back.send(vec![0; BUFFER_LEN]).map_err(|_| lost())?;
        }
        let observer = Arc::new(OnceLock::<Arc<dyn WriteObserver>>::new());
        let observing = Arc::clone(&observer);
        let write_all = move || {
            let mut front = Front::default();
            for piece in pieces {
                let (at, bytes) = (region.offset + piece.at, &piece.buffer[..piece.len]);
                region
                    .file
                    .write_all_at(bytes, at)
                    .map_err(|e| Error::io(Stage::Golden, "disk file", format!("write {} bytes at {} of the filesystem", piece.len, piece.at), e))?;
                front.written(&region, at, piece.len as u64);
                if let Some(observer) = observing.get() {
                    observer.written(at, bytes);
                }
                // The other side may have stopped listening; that is not an error here.
                let _ = give_back.send(piece.buffer);
            }
            Ok(())
        };
        let thread = std::thread::Builder::new()
            .name("ext4-write".into())
            .spawn(write_all)
            .map_err(|e| Error::io(Stage::Golden, "ext4", "start the writing thread", e))?;
        Ok(Writer {
            piece: Piece { at: 0, len: 0, buffer: vec![0; BUFFER_LEN] },
            to_thread: Some(to_thread),
            from_thread,
            thread: Some(thread),
            progress: progress.clone(),
            written: 0,
            observer,
        })
    }

    /// Shows the writes from now on to `observer`; the first one given stays.
    pub fn observe(&self, observer: Arc<dyn WriteObserver>) {
        let _ = self.observer.set(observer);
    }

    /// The next write goes to byte `at` of the region.
    pub fn seek(&mut self, at: u64) -> Result<()> {
        if self.piece.at + self.piece.len as u64 != at {
            self.hand_over()?;
            self.piece.at = at;
        }
        Ok(())
    }

    /// Room to put bytes into, not empty; [`Writer::advance`] says how many were put.
    pub fn room(&mut self) -> Result<&mut [u8]> {
        if self.piece.len == BUFFER_LEN {
            self.hand_over()?;
        }
        Ok(&mut self.piece.buffer[self.piece.len..])
    }

    /// Counts `len` bytes of the room as written.
    pub fn advance(&mut self, len: usize) {
        self.piece.len += len;
        debug_assert!(self.piece.len <= BUFFER_LEN);
    }

    /// Writes `bytes`.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let len = room.len().min(bytes.len());
            room[..len].copy_from_slice(&bytes[..len]);
            self.advance(len);
            bytes = &bytes[len..];
        }
        Ok(())
    }

    /// Writes `bytes` at byte `at` of the region.
    pub fn put_at(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.seek(at)?;
        self.put(bytes)
    }

    /// Writes `len` zeros.
    pub fn zeros(&mut self, mut len: u64) -> Result<()> {
        while len > 0 {
            let room = self.room()?;
            let now = len.min(room.len() as u64) as usize;
            room[..now].fill(0);
            self.advance(now);
            len -= now as u64;
        }
        Ok(())
    }

    /// Bytes written so far, those in the buffer included.
    pub fn written(&self) -> u64 {
        self.written + self.piece.len as u64
    }

    /// Writes what is left and ends the thread.
    pub fn finish(mut self) -> Result<()> {
        self.hand_over()?;
        self.to_thread = None;
        self.join()
    }

    fn hand_over(&mut self) -> Result<()> {
        self.progress.check()?;
        if self.piece.len == 0 {
            return Ok(());
        }
        let Ok(empty) = self.from_thread.recv() else { return Err(self.failed()) };
        let next = Piece { at: self.piece.at + self.piece.len as u64, len: 0, buffer: empty };
        self.written += self.piece.len as u64;
        let full = std::mem::replace(&mut self.piece, next);
        match self.to_thread.as_ref().map(|sender| sender.send(full)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.failed()),
        }
    }

    /// Why the thread has ended early.
    fn failed(&mut self) -> Error {
        self.to_thread = None;
        self.join().err().unwrap_or_else(lost)
    }

    fn join(&mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Err(lost()),
        }
    }
}

impl Drop for Writer {
    /// Waits for the thread: an abandoned build must not go on writing.
    fn drop(&mut self) {
        self.to_thread = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lost() -> Error {
    Error::internal(Stage::Golden, "ext4", "the writing thread ended without saying why")
}

//! The decoder's thread. It fills buffers and gets them back empty, so that decoding and laying out go on at the same time and nothing is
//! allocated once it runs. At most [`CHUNKS`] buffers exist: a slow consumer holds the decoder back.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
};

use super::{Compression, Limits, OBJECT, STAGE, error_of_decoder};
use crate::error::{Error, Kind, Result};

/// Large enough that handing over costs nothing against decoding it, small enough that what was decoded is still in the cache when it is read.
const CHUNK_LEN: usize = 256 * 1024;
/// One being filled, one being read, two in between to even out their speeds.
const CHUNKS: usize = 4;

enum Message {
    Chunk(Vec<u8>),
    Failed(Error),
    End,
}

/// The reading end.
pub(super) struct Pumped {
    /// Absent once closed.
    full: Option<Receiver<Message>>,
    empty: SyncSender<Vec<u8>>,
    chunk: Vec<u8>,
    position: usize,
    ended: bool,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread.
pub(super) fn start(decoder: Box<dyn Read + Send>, media: Compression, limits: Limits, consumed: Arc<AtomicU64>) -> Result<Pumped> {
    let (send_full, full) = sync_channel(CHUNKS);
    let (empty, receive_empty) = sync_channel(CHUNKS);
    let pump = Pump { decoder, media, limits, consumed, produced: 0, empty: receive_empty, chunks: 0 };
    let thread = thread::Builder::new()
        .name("decompress".into())
        .spawn(move || pump.run(&send_full))
        .map_err(|error| Error::io(STAGE, OBJECT, "start the thread that decompresses", error))?;
    Ok(Pumped { full: Some(full), empty, chunk: Vec::new(), position: 0, ended: false, thread: Some(thread) })
}

struct Pump {
    decoder: Box<dyn Read + Send>,
    media: Compression,
    limits: Limits,
    consumed: Arc<AtomicU64>,
    produced: u64,
    empty: Receiver<Vec<u8>>,
    chunks: usize,
}

impl Pump {
    fn run(mut self, full: &SyncSender<Message>) {
        loop {
            let Some(mut chunk) = self.next_empty() else { return };
            let message = match self.fill(&mut chunk) {
                Ok(0) => Message::End,
                Ok(len) => {
                    chunk.truncate(len);
                    Message::Chunk(chunk)
                }
                Err(error) => Message::Failed(error),
            };
            let last = !matches!(message, Message::Chunk(_));
            // An error here means that nobody reads any more.
            if full.send(message).is_err() || last {
                return;
            }
        }
    }

    fn next_empty(&mut self) -> Option<Vec<u8>> {
        let mut chunk = match self.empty.try_recv() {
            Ok(chunk) => chunk,
            Err(_) if self.chunks < CHUNKS => {
                self.chunks += 1;
                Vec::new()
            }
            Err(_) => self.empty.recv().ok()?,
        };
        chunk.resize(CHUNK_LEN, 0);
        Some(chunk)
    }

    fn fill(&mut self, chunk: &mut [u8]) -> Result<usize> {
        let mut len = 0;
        while len < chunk.len() {
            match self.decoder.read(&mut chunk[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error_of_decoder(error, self.media)),
            }
        }
        self.produced += len as u64;
        self.check_limits()?;
        Ok(len)
    }

    fn check_limits(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(Kind::NoSpace, STAGE, OBJECT, message).with_reason("DECOMPRESS_LIMIT"));
        let (produced, consumed) = (self.produced, self.consumed.load(Ordering::Relaxed));
        if produced > self.limits.output_bytes {
            return refuse(format!("decompressed, it has more than {} bytes", self.limits.output_bytes));
        }
        if produced > self.limits.ratio_free_bytes && produced / self.limits.ratio.max(1) > consumed {
            return refuse(format!("{consumed} compressed bytes became {produced}, more than {} to one", self.limits.ratio));
        }
        Ok(())
    }
}

impl Pumped {
    /// Gets the next chunk; nothing at the end.
    fn next_chunk(&mut self) -> io::Result<bool> {
        let used = std::mem::take(&mut self.chunk);
        self.position = 0;
        if used.capacity() > 0 {
            match self.empty.try_send(used) {
                // Full cannot be, as there are no more chunks than places; disconnected means that the thread has finished.
                Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
            }
        }
        let message = self.full.as_ref().and_then(|full| full.recv().ok());
        match message {
            Some(Message::Chunk(chunk)) => {
                self.chunk = chunk;
                Ok(true)
            }
            Some(Message::End) => {
                self.ended = true;
                Ok(false)
            }
            Some(Message::Failed(error)) => Err(io::Error::other(error)),
            None => Err(io::Error::other(Error::internal(STAGE, OBJECT, "the thread that decompresses went away, or failed before"))),
        }
    }
}

impl Read for Pumped {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() || self.ended {
            return Ok(0);
        }
        if self.position == self.chunk.len() && !self.next_chunk()? {
            return Ok(0);
        }
        let len = out.len().min(self.chunk.len() - self.position);
        out[..len].copy_from_slice(&self.chunk[self.position..self.position + len]);
        self.position += len;
        Ok(len)
    }
}

impl Drop for Pumped {
    fn drop(&mut self) {
        // The thread's next send fails, or its wait for an empty chunk ends.
        self.full = None;
        let (nobody, _) = sync_channel(0);
        drop(std::mem::replace(&mut self.empty, nobody));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(stage = STAGE.name(), "the thread that decompresses has panicked");
        }
    }
}

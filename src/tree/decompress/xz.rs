//! xz with several threads. liblzma's parallel decoder stops at the end of one stream, so the ones that follow (`pxz`, or `cat` of two files) and
//! the padding between them (four zero bytes or a multiple, "The .xz File Format" 2.2) are handled here. Parallel means: blocks that say how long
//! they are (`xz -T`, `--block-size`) are decoded at the same time; others one after another with no loss.

use std::{
    io::{self, BufRead, Read},
    sync::OnceLock,
    thread,
};

use liblzma::stream::{Action, MtStreamBuilder, Status, Stream};

/// More threads than this would only fill memory with blocks that wait for their turn.
const THREADS_MAX: usize = 4;

pub(super) struct XzStreams<R> {
    input: R,
    memory_bytes: u64,
    stream: Stream,
    /// Between two streams: how many bytes of padding were seen.
    padding: Option<u64>,
}

impl<R: BufRead> XzStreams<R> {
    pub(super) fn new(input: R, memory_bytes: u64) -> io::Result<Self> {
        Ok(XzStreams { input, memory_bytes, stream: new_stream(memory_bytes)?, padding: None })
    }

    /// Skips padding; whether another stream follows.
    fn next_stream(&mut self, mut padding: u64) -> io::Result<bool> {
        loop {
            let bytes = self.input.fill_buf()?;
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            if zeros == 0 {
                let more = !bytes.is_empty();
                if !padding.is_multiple_of(4) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the padding after an xz stream is not a multiple of four bytes"));
                }
                if more {
                    self.stream = new_stream(self.memory_bytes)?;
                    self.padding = None;
                }
                return Ok(more);
            }
            self.input.consume(zeros);
            padding += zeros as u64;
            self.padding = Some(padding);
        }
    }
}

/// How many threads are worth it. Finding out reads files of the cgroup, which a confined process can't: it asks once before.
pub(super) fn threads() -> u32 {
    static THREADS: OnceLock<u32> = OnceLock::new();
    *THREADS.get_or_init(|| thread::available_parallelism().map_or(1, |count| count.get().min(THREADS_MAX)) as u32)
}

fn new_stream(memory_bytes: u64) -> io::Result<Stream> {
    let threads = threads();
    // Above the first limit it goes on with fewer threads, above the second it fails.
    let stream = MtStreamBuilder::new().threads(threads).memlimit_threading(memory_bytes).memlimit_stop(memory_bytes).decoder()?;
    Ok(stream)
}

impl<R: BufRead> Read for XzStreams<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(padding) = self.padding
                && !self.next_stream(padding)?
            {
                return Ok(0);
            }
            let bytes = self.input.fill_buf()?;
            let at_end = bytes.is_empty();
            let (in_before, out_before) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.process(bytes, out, if at_end { Action::Finish } else { Action::Run });
            self.input.consume((self.stream.total_in() - in_before) as usize);
            let len = (self.stream.total_out() - out_before) as usize;
            match status? {
                Status::StreamEnd => self.padding = Some(0),
                // LZMA_BUF_ERROR: two calls in a row could do nothing.
                Status::MemNeeded if len == 0 => {
                    return Err(if at_end {
                        io::Error::new(io::ErrorKind::UnexpectedEof, "the xz stream is not complete")
                    } else {
                        io::Error::new(io::ErrorKind::InvalidData, "the xz stream makes no progress")
                    });
                }
                Status::Ok | Status::GetCheck | Status::MemNeeded => {}
            }
            if len > 0 {
                return Ok(len);
            }
        }
    }
}

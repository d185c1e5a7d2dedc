//! The bytes of the archive: one buffer, the offset for messages, and the data of one member as a reader.

use std::io::{self, Read};

use super::{Refusal, STAGE};
use crate::{
    error::{Error, Result},
    progress::Progress,
    tree::error_of_read,
};

/// The unit of the format, bytes.
pub(super) const BLOCK: usize = 512;

/// Large enough that a member of usual size costs one read of the input, small enough to stay in the second-level cache.
const BUFFER_LEN: usize = 128 * 1024;

/// Zero bytes read per step while looking for something after the end of the archive.
const DRAIN_LEN: usize = 64 * 1024;

/// A buffered reader that knows where in the archive it is.
pub(super) struct Stream<'a> {
    input: &'a mut dyn Read,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    offset: u64,
    bytes_max: u64,
}

impl<'a> Stream<'a> {
    pub(super) fn new(input: &'a mut dyn Read, bytes_max: u64) -> Self {
        Stream { input, buffer: vec![0; BUFFER_LEN].into_boxed_slice(), start: 0, end: 0, offset: 0, bytes_max }
    }

    /// How many bytes were handed out.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next block; nothing at the end of the input. An input that ends inside a block is truncated.
    pub(super) fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let len = self.read_full(&mut block)?;
        match len {
            BLOCK => Ok(Some(block)),
            0 => Ok(None),
            _ => Err(self.truncated(&format!("inside a block: {len} of {BLOCK} bytes"))),
        }
    }

    /// Exactly `len` bytes and the padding up to the next block. The caller has checked `len` against a limit.
    pub(super) fn padded(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len.next_multiple_of(BLOCK)];
        let have = self.read_full(&mut bytes)?;
        if have < bytes.len() {
            return Err(self.truncated(&format!("inside an extended header of {len} bytes")));
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Reads until `out` is full or the input ends.
    fn read_full(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut have = 0;
        while have < out.len() {
            match self.read_some(&mut out[have..]).map_err(|error| self.read_error(error))? {
                0 => break,
                len => have += len,
            }
        }
        Ok(have)
    }

    fn read_some(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end {
            if out.len() >= self.buffer.len() {
                let len = retry_interrupted(|| self.input.read(out))?;
                return self.count(len);
            }
            self.end = retry_interrupted(|| self.input.read(&mut self.buffer))?;
            self.start = 0;
        }
        let len = out.len().min(self.end - self.start);
        out[..len].copy_from_slice(&self.buffer[self.start..self.start + len]);
        self.start += len;
        self.count(len)
    }

    fn count(&mut self, len: usize) -> io::Result<usize> {
        self.offset = self.offset.saturating_add(len as u64);
        if self.offset > self.bytes_max {
            let refusal = Refusal::limit(format!("the archive has more than {} bytes", self.bytes_max));
            return Err(io::Error::other(refusal.at(self.offset, "")));
        }
        Ok(len)
    }

    /// Reads to the end of the input (so that checksums at the end of a compressed stream are checked too) and demands zeros.
    pub(super) fn drain_zeros(&mut self, progress: &Progress) -> Result<()> {
        let mut bytes = vec![0; DRAIN_LEN];
        loop {
            progress.check()?;
            let at = self.offset;
            let len = self.read_full(&mut bytes)?;
            if let Some(position) = bytes[..len].iter().position(|byte| *byte != 0) {
                let text = "there is data after the end-of-archive blocks, which most readers would not see";
                let hint = "archives that were joined with cat have to be joined with tar --concatenate instead";
                return Err(Refusal::corrupt(text).hint(hint).at(at + position as u64, ""));
            }
            if len < bytes.len() {
                return Ok(());
            }
        }
    }

    fn read_error(&self, error: io::Error) -> Error {
        error_of_read(error, STAGE, "", &format!("read the archive at byte {}", self.offset))
    }

    pub(super) fn truncated(&self, place: &str) -> Error {
        Refusal::corrupt(format!("the archive ends {place}")).reason("ARCHIVE_TRUNCATED").at(self.offset, "")
    }
}

fn retry_interrupted(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => return other,
        }
    }
}

/// The stored bytes of one member. Remembers the first failure with its kind: a sink sees an `io::Error` only and may report it as its own.
pub(super) struct MemberData<'s, 'a> {
    stream: &'s mut Stream<'a>,
    progress: &'s Progress,
    name: &'s str,
    left: u64,
    padding: u64,
    failure: Option<Error>,
}

impl<'s, 'a> MemberData<'s, 'a> {
    pub(super) fn new(stream: &'s mut Stream<'a>, progress: &'s Progress, name: &'s str, len: u64) -> Self {
        let padding = (BLOCK as u64 - len % BLOCK as u64) % BLOCK as u64;
        MemberData { stream, progress, name, left: len, padding, failure: None }
    }

    /// What went wrong while somebody was reading.
    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    /// Moves to the next header, whatever was read until now.
    pub(super) fn skip_rest(mut self) -> Result<()> {
        self.left += self.padding;
        let mut scratch = vec![0; if self.left == 0 { 0 } else { (self.left as usize).min(DRAIN_LEN) }];
        while self.left > 0 {
            let len = self.left.min(scratch.len() as u64) as usize;
            if let Err(error) = self.read_exact(&mut scratch[..len]) {
                return Err(self.failure.unwrap_or_else(|| error_of_read(error, STAGE, self.name, "skip the data of the member")));
            }
        }
        Ok(())
    }

    fn read_or_fail(&mut self, out: &mut [u8]) -> Result<usize> {
        self.progress.check()?;
        let len = self.stream.read_some(out).map_err(|error| self.stream.read_error(error))?;
        if len == 0 {
            let text = format!("the archive ends inside the data of the member, {} bytes are missing", self.left);
            return Err(Refusal::corrupt(text).reason("ARCHIVE_TRUNCATED").at(self.stream.offset, self.name));
        }
        Ok(len)
    }
}

impl Read for MemberData<'_, '_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let want = out.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        match self.read_or_fail(&mut out[..want]) {
            Ok(len) => {
                self.left -= len as u64;
                Ok(len)
            }
            Err(error) => {
                let told = io::Error::new(io::ErrorKind::UnexpectedEof, error.chain());
                self.failure.get_or_insert(error);
                Err(told)
            }
        }
    }
}

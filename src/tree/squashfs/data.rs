//! The content of a file.

use std::io::{self, Read};

use super::{
    super::{EntryKind, Span, archive::Limits},
    Checked, Refusal,
    table::{Image, Stored},
};
use crate::progress::Progress;

/// Where the content of a file is.
#[derive(Debug)]
pub(super) struct Content {
    pub size: u64,
    pub block_len: u64,
    pub blocks: Vec<Stored>,
    /// The number of the fragment block that has the end, and where in it.
    pub tail: Option<(u32, u32)>,
}

impl Content {
    /// Bytes that block `index` has.
    fn len_of(&self, index: usize) -> u64 {
        self.block_len.min(self.size.saturating_sub(index as u64 * self.block_len))
    }

    /// The entry's kind, and how many bytes of data it has.
    pub fn describe(&self, limits: &Limits) -> Checked<(EntryKind, u64)> {
        let mut spans: Vec<Span> = Vec::new();
        let tail = self.tail.map(|_| self.blocks.len());
        let there = self.blocks.iter().enumerate().filter(|(_, stored)| stored.len() > 0).map(|(index, _)| index).chain(tail);
        let mut data_len = 0;
        for index in there {
            let (offset, len) = (index as u64 * self.block_len, self.len_of(index));
            data_len += len;
            match spans.last_mut() {
                Some(last) if last.offset + last.len == offset => last.len += len,
                _ => spans.push(Span { offset, len }),
            }
        }
        if spans.len() as u64 > limits.sparse_pairs {
            return Err(Refusal::limit(format!("the file has {} pieces, the limit is {}", spans.len(), limits.sparse_pairs)));
        }
        Ok((EntryKind::File { size: self.size, spans }, data_len))
    }
}

/// Reads what is not a hole, one block after another.
pub(super) struct FileData<'d, 'i> {
    image: &'d mut Image<'i>,
    content: Content,
    progress: &'d Progress,
    /// The next block; the tail comes after the last.
    next: usize,
    block: Vec<u8>,
    at: usize,
    failure: Option<Refusal>,
}

impl<'d, 'i> FileData<'d, 'i> {
    pub fn new(image: &'d mut Image<'i>, content: Content, progress: &'d Progress) -> Self {
        FileData { image, content, progress, next: 0, block: Vec::new(), at: 0, failure: None }
    }

    /// What went wrong while somebody was reading.
    pub fn take_failure(&mut self) -> Option<Refusal> {
        self.failure.take()
    }

    /// Decompresses the next block. False at the end.
    fn advance(&mut self) -> Checked<bool> {
        self.progress.check()?;
        while self.content.blocks.get(self.next).is_some_and(|stored| stored.len() == 0) {
            self.next += 1;
        }
        let index = self.next;
        self.at = 0;
        self.block.clear();
        self.next += 1;
        let wanted = self.content.len_of(index) as usize;
        if let Some(stored) = self.content.blocks.get(index) {
            self.block = self.image.block(*stored, wanted)?;
            self.image.used(stored.offset + u64::from(stored.len()));
            if self.block.len() != wanted {
                return Err(Refusal::corrupt(format!("block {index} of the file has {} bytes, expected {wanted}", self.block.len())));
            }
            return Ok(true);
        }
        let Some((number, offset)) = self.content.tail.filter(|_| index == self.content.blocks.len()) else { return Ok(false) };
        let fragment = self.image.fragment(number)?;
        let piece = fragment.get(offset as usize..).and_then(|rest| rest.get(..wanted));
        let piece = piece.ok_or_else(|| Refusal::corrupt(format!("the end of the file is not in fragment {number}")))?;
        self.block.extend_from_slice(piece);
        Ok(true)
    }
}

impl Read for FileData<'_, '_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        while self.at == self.block.len() {
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return Ok(0),
                Err(refusal) => {
                    let told = io::Error::new(io::ErrorKind::UnexpectedEof, refusal.message.clone());
                    self.failure.get_or_insert(refusal);
                    return Err(told);
                }
            }
        }
        let len = out.len().min(self.block.len() - self.at);
        out[..len].copy_from_slice(&self.block[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

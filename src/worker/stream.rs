//! Documents of simplestreams sources.

use serde::{Deserialize, Serialize};

use super::{
    Launcher, died,
    manifest::json,
    small::{QUESTION_BYTES_MAX, Task},
};
use crate::{
    config::worker::Confine,
    error::{Error, Kind, Result, Stage},
    streams::document::{self, Document, Limits, Products},
};

/// What a document may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Wanted {
    Any,
    Products,
}

impl Launcher {
    /// Reads a document as [`document::parse`] does, in a worker unless configured otherwise.
    pub fn stream_document(&self, bytes: &[u8], limits: &Limits) -> Result<Document> {
        self.stream(bytes, limits, Wanted::Any)
    }

    /// Reads a document as [`Products::parse`] does, in a worker unless configured otherwise.
    pub fn stream_products(&self, bytes: &[u8], limits: &Limits) -> Result<Products> {
        match self.stream(bytes, limits, Wanted::Products)? {
            Document::Products(products) => Ok(products),
            Document::Index(_) => Err(died("its answer is to another question")),
        }
    }

    fn stream(&self, bytes: &[u8], limits: &Limits, wanted: Wanted) -> Result<Document> {
        // What is too long is refused before it is looked at.
        if self.settings.confine == Confine::Off || bytes.len() as u64 > limits.bytes_max {
            return read(bytes, limits, wanted);
        }
        if bytes.len() > QUESTION_BYTES_MAX {
            let why = format!("has {} bytes, the limit is {QUESTION_BYTES_MAX}", bytes.len());
            return Err(Error::new(Kind::NoSpace, Stage::Fetch, "simplestreams document", why).with_reason("STREAM_TOO_LARGE"));
        }
        // The document itself, what its aliases stand for, and names of fields.
        let answer_max = 2 * (bytes.len() + usize::try_from(limits.bytes_max).unwrap_or(QUESTION_BYTES_MAX).min(QUESTION_BYTES_MAX)) + (1 << 20);
        self.described(Task::Stream { limits: *limits, wanted }, bytes, None, answer_max)
    }
}

fn read(bytes: &[u8], limits: &Limits, wanted: Wanted) -> Result<Document> {
    match wanted {
        Wanted::Any => document::parse(bytes, limits),
        Wanted::Products => Products::parse(bytes, limits).map(Document::Products),
    }
}

/// The reader's side.
pub(super) fn answer(bytes: &[u8], limits: &Limits, wanted: Wanted) -> Result<Vec<u8>> {
    json(&read(bytes, limits, wanted)?)
}

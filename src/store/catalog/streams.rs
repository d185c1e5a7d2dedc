//! What was seen of each simplestreams source, so that it never goes backwards, and which images came from it.

use rusqlite::{OptionalExtension, params};

use super::{Catalog, failed, rows::all};
use crate::error::{Error, Kind, Result, Stage};

pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS stream_documents (
  stream TEXT NOT NULL, path TEXT NOT NULL, updated INTEGER, digest TEXT NOT NULL, signer TEXT NOT NULL, checked INTEGER NOT NULL,
  PRIMARY KEY (stream, path)
) STRICT;
CREATE TABLE IF NOT EXISTS stream_images (
  stream TEXT NOT NULL, product TEXT NOT NULL, version TEXT NOT NULL, image_id TEXT NOT NULL, imported INTEGER NOT NULL,
  PRIMARY KEY (stream, product, version)
) STRICT;
CREATE INDEX IF NOT EXISTS stream_images_by_image ON stream_images (image_id);
";

/// A document of a source, as it was last accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamDocument {
    /// Its path in the tree.
    pub path: String,
    /// Its `updated`, seconds since 1970, if it had one.
    pub updated: Option<i64>,
    /// SHA-256 of the bytes that were parsed.
    pub digest: String,
    /// The key that signed it; empty for one without signature.
    pub signer: String,
    /// When it was last looked at, seconds since 1970.
    pub checked: i64,
}

/// An image that came from a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamImage {
    /// Product.
    pub product: String,
    /// Version of it.
    pub version: String,
    /// The image.
    pub image_id: String,
    /// Seconds since 1970.
    pub imported: i64,
}

impl Catalog {
    /// Notes documents that were accepted together. All or none: `Kind::Conflict` (`STREAM_STALE`) when one is older than what was accepted before.
    pub fn put_stream_documents(&self, stream: &str, documents: Vec<StreamDocument>) -> Result<()> {
        let stream = stream.to_owned();
        self.write(move |connection| {
            for document in documents {
                let before: Option<Option<i64>> = connection
                    .query_row("SELECT updated FROM stream_documents WHERE stream=?1 AND path=?2", params![stream, document.path], |row| row.get(0))
                    .optional()
                    .map_err(failed("read stream document"))?;
                check_freshness(&stream, &document, before.flatten())?;
                connection
                    .execute(
                        "INSERT OR REPLACE INTO stream_documents VALUES (?1,?2,?3,?4,?5,?6)",
                        params![stream, document.path, document.updated, document.digest, document.signer, document.checked],
                    )
                    .map_err(failed("save stream document"))?;
            }
            Ok(())
        })
    }

    /// The documents of a source that were accepted, by path.
    pub fn stream_documents(&self, stream: &str) -> Result<Vec<StreamDocument>> {
        self.read(|connection| {
            all(
                connection,
                "SELECT path, updated, digest, signer, checked FROM stream_documents WHERE stream=?1 ORDER BY path",
                params![stream],
                |row| Ok(StreamDocument { path: row.get(0)?, updated: row.get(1)?, digest: row.get(2)?, signer: row.get(3)?, checked: row.get(4)? }),
            )
        })
    }

    /// Notes that a version of a product is this image.
    pub fn put_stream_image(&self, stream: &str, image: StreamImage) -> Result<()> {
        let stream = stream.to_owned();
        self.write(move |connection| {
            connection
                .execute(
                    "INSERT OR REPLACE INTO stream_images VALUES (?1,?2,?3,?4,?5)",
                    params![stream, image.product, image.version, image.image_id, image.imported],
                )
                .map(drop)
                .map_err(failed("save stream image"))
        })
    }

    /// The images that came from a source; by product, then newest first.
    pub fn stream_images(&self, stream: &str) -> Result<Vec<StreamImage>> {
        self.read(|connection| {
            all(
                connection,
                "SELECT product, version, image_id, imported FROM stream_images WHERE stream=?1 ORDER BY product, version DESC",
                params![stream],
                |row| Ok(StreamImage { product: row.get(0)?, version: row.get(1)?, image_id: row.get(2)?, imported: row.get(3)? }),
            )
        })
    }
}

/// Refuses a document that is older than the one accepted before, or no longer says how old it is: someone serves yesterday's images again.
pub fn check_freshness(stream: &str, document: &StreamDocument, before: Option<i64>) -> Result<()> {
    let Some(before) = before else { return Ok(()) };
    let when = crate::streams::date::format;
    let why = match document.updated {
        Some(updated) if updated >= before => return Ok(()),
        Some(updated) => format!("is of {}, older than the one of {} that was accepted before", when(updated), when(before)),
        None => format!("does not say when it was updated; the one accepted before is of {}", when(before)),
    };
    Err(Error::new(Kind::Conflict, Stage::Fetch, format!("stream {stream}: {}", document.path), why).with_reason("STREAM_STALE"))
}

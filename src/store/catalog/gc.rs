//! Removing goldens and blobs, so that a crash in between leaves nothing that is half there.
//!
//! ```text
//!  begin_removal  nobody refers to it? ─► journal row      from here on nobody is given it any more
//!  (files)        unlinked by the caller
//!  end_removal    its row and the journal row, together
//! ```
//!
//! A journal row that is found at start is a removal that was interrupted: the files are unlinked (again) and it is ended.

use rusqlite::{Connection, OptionalExtension, params};

use super::{Catalog, failed, journal::readable, leases, rows::all};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
    store::gc::{Keep, Kept},
};

/// A blob's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRow {
    /// Digest of its bytes.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// When it was fetched, used to build, or uploaded last; seconds since 1970.
    pub last_used: i64,
}

/// Whether a removal was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// It is marked: its files may go.
    Marked,
    /// Somebody refers to it; nothing was changed.
    Refused(Keep),
}

fn journal_word(kind: Kept) -> &'static str {
    match kind {
        Kept::Golden => "remove-golden",
        Kept::Blob => "remove-blob",
    }
}

/// How the tables name it.
fn row_name(kind: Kept, object: Digest) -> String {
    match kind {
        Kept::Golden => object.hex(),
        Kept::Blob => object.to_string(),
    }
}

impl Catalog {
    /// Marks a golden or blob as being removed, unless a volume is backed by it or an unexpired lease holds it: from now on it is not found.
    pub fn begin_removal(&self, kind: Kept, object: Digest, now: i64) -> Result<Begun> {
        self.write(move |connection| {
            let name = row_name(kind, object);
            if kind == Kept::Golden {
                let volumes: u32 = connection
                    .query_row("SELECT count(*) FROM volumes WHERE golden_key=?1", [&name], |row| row.get(0))
                    .map_err(failed("count volumes of golden"))?;
                if volumes > 0 {
                    return Ok(Begun::Refused(Keep::Volumes(volumes)));
                }
            }
            if let Some(lease) = leases::holding(connection, kind, object, now)? {
                return Ok(Begun::Refused(Keep::Lease { owner: lease.owner, reason: lease.reason }));
            }
            connection
                .execute(
                    "INSERT OR REPLACE INTO journal (what, subject, detail, since) VALUES (?1, ?2, '{}', ?3)",
                    params![journal_word(kind), name, now],
                )
                .map_err(failed("mark for removal"))?;
            Ok(Begun::Marked)
        })
    }

    /// Forgets what was marked, after its files are gone.
    pub fn end_removal(&self, kind: Kept, object: Digest) -> Result<()> {
        self.write(move |connection| {
            let name = row_name(kind, object);
            let row = match kind {
                Kept::Golden => "DELETE FROM goldens WHERE key=?1",
                Kept::Blob => "DELETE FROM blobs WHERE digest=?1",
            };
            connection.execute(row, [&name]).map_err(failed("remove a row"))?;
            unmark(connection, kind, &name)
        })
    }

    /// Takes a mark back; nothing may have been unlinked.
    pub fn cancel_removal(&self, kind: Kept, object: Digest) -> Result<()> {
        self.write(move |connection| unmark(connection, kind, &row_name(kind, object)))
    }

    /// Removals that were begun and not ended.
    pub fn removals(&self) -> Result<Vec<(Kept, Digest)>> {
        let names = self.read(|connection| {
            all(connection, "SELECT what, subject FROM journal WHERE what IN ('remove-golden','remove-blob') ORDER BY seq", [], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
            })
        })?;
        let parse = |(what, name): (String, String)| {
            let (kind, text) = if what == "remove-golden" { (Kept::Golden, format!("sha256:{name}")) } else { (Kept::Blob, name) };
            let object: Digest =
                text.parse().map_err(|why: String| Error::new(Kind::Corrupt, Stage::Store, "catalogue", format!("journal: {why}")))?;
            Ok((kind, object))
        };
        Ok(names.into_iter().filter_map(|name| readable(parse(name))).collect())
    }

    /// All blobs, the longest unused first.
    pub fn blobs(&self) -> Result<Vec<BlobRow>> {
        self.read(|connection| {
            let rows = all(connection, "SELECT digest, size, last_used FROM blobs ORDER BY last_used, digest", [], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
            })?;
            let parse = |(digest, size, last_used): (String, i64, i64)| {
                let digest = digest.parse().map_err(|why: String| Error::new(Kind::Corrupt, Stage::Store, "catalogue", format!("a blob: {why}")))?;
                Ok(BlobRow { digest, size: size.max(0) as u64, last_used })
            };
            rows.into_iter().map(parse).collect()
        })
    }

    /// Corrects times of use that lie ahead, as a clock left them that was wrong: what has them would stay for years.
    pub fn use_was_not_after(&self, now: i64) -> Result<()> {
        self.write(move |connection| {
            for table in ["goldens", "blobs"] {
                connection.execute(&format!("UPDATE {table} SET last_used=?1 WHERE last_used>?1"), [now]).map_err(failed("correct times of use"))?;
            }
            Ok(())
        })
    }

    /// Notes that a blob was used.
    pub fn touch_blob(&self, digest: Digest, now: i64) -> Result<()> {
        self.write(move |connection| {
            let touched = connection.execute("UPDATE blobs SET last_used=max(last_used, ?2) WHERE digest=?1", params![digest.to_string(), now]);
            touched.map(|_| ()).map_err(failed("note the use of a blob"))
        })
    }
}

fn unmark(connection: &Connection, kind: Kept, name: &str) -> Result<()> {
    let removed = connection.execute("DELETE FROM journal WHERE what=?1 AND subject=?2", [journal_word(kind), name]);
    removed.map(|_| ()).map_err(failed("remove a mark"))
}

/// Fails with `Unavailable` (reason `GOLDEN_GONE`) when a golden that a new volume is backed by is not there (any more): the last look before the volume
/// counts.
pub(super) fn require_golden(connection: &Connection, key: Digest) -> Result<()> {
    let found: Option<i64> = connection
        .prepare_cached("SELECT 1 FROM goldens WHERE key=?1 AND NOT EXISTS (SELECT 1 FROM journal WHERE what='remove-golden' AND subject=?1)")
        .and_then(|mut statement| statement.query_row([key.hex()], |row| row.get(0)).optional())
        .map_err(failed("look for the golden behind a volume"))?;
    if found.is_some() {
        return Ok(());
    }
    let why = "the golden image behind the volume was removed while the volume was made";
    Err(Error::new(Kind::Unavailable, Stage::Store, key.hex(), why).with_reason("GOLDEN_GONE"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::catalog::leases::Lease;

    fn catalog() -> (tempfile::TempDir, Catalog) {
        let dir = tempfile::tempdir().expect("a directory");
        let catalog = Catalog::open(&dir.path().join("catalog.sqlite")).expect("opens");
        (dir, catalog)
    }

    #[test]
    fn what_is_marked_is_not_found_until_it_is_gone_or_unmarked() {
        let (dir, catalog) = catalog();
        let digest = Digest::of(b"x");
        catalog.put_blob(digest, 7, 100).expect("added");
        assert_eq!(catalog.begin_removal(Kept::Blob, digest, 200).expect("asked"), Begun::Marked);
        assert_eq!(catalog.blob_size(digest).expect("read"), None);
        drop(catalog);
        // As after a crash: the mark is still there.
        let catalog = Catalog::open(&dir.path().join("catalog.sqlite")).expect("opens");
        assert_eq!(catalog.removals().expect("read"), [(Kept::Blob, digest)]);
        catalog.cancel_removal(Kept::Blob, digest).expect("unmarked");
        assert_eq!(catalog.blob_size(digest).expect("read"), Some(7));
        catalog.begin_removal(Kept::Blob, digest, 200).expect("marked");
        catalog.end_removal(Kept::Blob, digest).expect("ended");
        assert!(catalog.removals().expect("read").is_empty() && catalog.blobs().expect("read").is_empty());
    }

    #[test]
    fn a_lease_holds_until_it_expires_or_is_released() {
        let (_dir, catalog) = catalog();
        let digest = Digest::of(b"x");
        catalog.put_blob(digest, 7, 100).expect("added");
        let lease = |id: &str, expires| Lease {
            id: id.into(),
            kind: leases::Held::Blob,
            object: digest.to_string(),
            owner: "ops".into(),
            reason: "audit".into(),
            created: 100,
            expires,
        };
        catalog.add_lease(lease("a", Some(150))).expect("added");
        let refused = Begun::Refused(Keep::Lease { owner: "ops".into(), reason: "audit".into() });
        assert_eq!(catalog.begin_removal(Kept::Blob, digest, 149).expect("asked"), refused);
        assert_eq!(catalog.drop_expired_leases(150).expect("asked"), 1);
        catalog.add_lease(lease("b", None)).expect("added");
        assert_eq!(catalog.begin_removal(Kept::Blob, digest, i64::MAX).expect("asked"), refused);
        assert!(catalog.release_lease("b").expect("released") && !catalog.release_lease("b").expect("asked"));
        assert_eq!(catalog.begin_removal(Kept::Blob, digest, 151).expect("asked"), Begun::Marked);
    }

    #[test]
    fn an_image_under_lease_holds_its_blob() {
        let (_dir, catalog) = catalog();
        let digest = Digest::of(b"x");
        catalog.put_blob(digest, 7, 100).expect("added");
        let image = crate::store::records::ImageRecord {
            id: "img-1".into(),
            manifest: "{}".into(),
            rootfs_url: Some("https://example.com/x".into()),
            rootfs_digest: Some(digest),
            rootfs_size: Some(7),
            media_type: None,
            created: 1,
        };
        let judged = crate::manifest::Judged { document: serde_json::json!({}), secret_args: Default::default() };
        catalog.insert_image(image, &judged).expect("added");
        assert_eq!(catalog.reading("img-1").expect("read"), Some(judged.clone()));
        catalog.put_reading("img-2", &judged).expect("of no image");
        assert_eq!(catalog.reading("img-2").expect("read"), None);
        let lease = Lease {
            id: "a".into(),
            kind: leases::Held::Image,
            object: "img-1".into(),
            owner: "ops".into(),
            reason: "audit".into(),
            created: 100,
            expires: None,
        };
        catalog.add_lease(lease).expect("added");
        assert!(matches!(catalog.begin_removal(Kept::Blob, digest, 200).expect("asked"), Begun::Refused(Keep::Lease { .. })));
    }
}

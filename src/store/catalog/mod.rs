//! The catalogue: SQLite, because an operator can open it, it survives power loss, and nothing here needs more.
//!
//! One thread owns the writing connection. Writes that arrive while it is busy are put into one transaction (each under its own savepoint) and share its
//! flush: hundreds of renders a second cost a few dozen flushes. A caller gets its answer after the flush. Reads use a second connection (WAL: they never wait
//! for the writer).

pub mod backup;
pub mod gc;
pub mod journal;
pub mod leases;
pub mod names;
pub mod owners;
mod rows;
mod schema;
pub mod streams;
mod volumes;

use std::{
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Mutex, mpsc},
    thread,
};

use rusqlite::{Connection, OptionalExtension, params};

use self::rows::{all, golden_of, image_of, json, render_of};

use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::Judged,
    names::Digest,
    store::records::{FailureRecord, GoldenRecord, ImageRecord, RenderRecord, RenderState},
    trust::Signer,
};

/// Writes that share one transaction at most, so that the first of them does not wait long.
const BATCH_LEN_MAX: usize = 256;

/// Answer of [`Catalog::admit_render`].
#[derive(Debug, Clone, PartialEq)]
pub enum Admitted {
    /// It is to be run.
    Started(RenderRecord),
    /// The key belongs to this render.
    Existing(RenderRecord),
}

type Write = Box<dyn FnOnce(&Connection) -> Result<Reply> + Send>;
type Reply = Box<dyn FnOnce(Result<()>) + Send>;

/// The opened catalogue.
pub struct Catalog {
    reader: Mutex<Connection>,
    writer: Option<mpsc::Sender<Write>>,
    thread: Option<thread::JoinHandle<()>>,
}

fn failed(doing: &str) -> impl Fn(rusqlite::Error) -> Error + '_ {
    move |error| Error::new(kind_of(&error), Stage::Store, "catalogue", doing.to_owned()).with_source(error)
}

fn kind_of(error: &rusqlite::Error) -> Kind {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => Kind::NoSpace,
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => Kind::Corrupt,
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => Kind::Busy,
        Some(rusqlite::ErrorCode::ReadOnly) => Kind::Conflict,
        _ => Kind::Internal,
    }
}

fn connect(path: &Path) -> Result<Connection> {
    // Nobody else may read it: SQLite gives the files beside it the same mode.
    let made = std::fs::File::options().create(true).append(true).mode(0o600).open(path);
    made.map_err(|error| Error::io(Stage::Store, path.display().to_string(), "open the catalogue", error))?;
    let connection = Connection::open(path).map_err(failed("open"))?;
    connection.busy_timeout(std::time::Duration::from_secs(10)).map_err(failed("set busy timeout"))?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(failed("set WAL mode"))?;
    // FULL: a transaction that was answered survives power loss.
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed("set synchronous"))?;
    Ok(connection)
}

impl Catalog {
    /// Opens or makes the catalogue at `path`. `Kind::Unsupported` when a newer cloudletd made it, `Kind::Corrupt` when it is damaged.
    pub fn open(path: &Path) -> Result<Catalog> {
        let object = path.display().to_string();
        let writer = connect(path).map_err(|error| backup::told_apart(&object, error))?;
        backup::require_whole(&writer, &object)?;
        schema::prepare(&writer, &object)?;
        for tables in [names::TABLES, streams::TABLES] {
            writer.execute_batch(tables).map_err(failed("make the tables of names and streams"))?;
        }
        let reader = connect(path)?;
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("catalogue".into())
            .spawn(move || write_loop(&writer, &receiver))
            .map_err(|error| Error::io(Stage::Store, "catalogue", "start the writer thread", error))?;
        Ok(Catalog { reader: Mutex::new(reader), writer: Some(sender), thread: Some(thread) })
    }

    fn write<T: Send + 'static>(&self, change: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let job: Write = Box::new(move |connection| {
            let value = match change(connection) {
                Ok(value) => value,
                Err(error) => {
                    // The answer goes out now; the savepoint is rolled back by the caller.
                    let _ = sender.send(Err(error));
                    return Err(Error::new(Kind::Cancelled, Stage::Store, "catalogue", "change refused"));
                }
            };
            Ok(Box::new(move |committed: Result<()>| {
                let _ = sender.send(committed.map(|()| value));
            }) as Reply)
        });
        let gone = || Error::internal(Stage::Store, "catalogue", "the writer thread is gone");
        self.writer.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        receiver.recv().map_err(|_| gone())?
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let connection = self.reader.lock().map_err(|_| Error::internal(Stage::Store, "catalogue", "a reader panicked"))?;
        query(&connection)
    }

    /// Adds an image with what the reader of its manifest found; `false` when that id is there already.
    pub fn insert_image(&self, image: ImageRecord, judged: &Judged) -> Result<bool> {
        let judged = json(judged)?;
        self.write(move |connection| {
            let rows = connection
                .prepare_cached("INSERT INTO images VALUES (?1,?2,?3,?4,?5,?6,?7) ON CONFLICT (id) DO NOTHING")
                .and_then(|mut statement| {
                    statement.execute(params![
                        image.id,
                        image.manifest,
                        image.rootfs_url,
                        image.rootfs_digest.map(|digest| digest.to_string()),
                        image.rootfs_size.map(|size| size as i64),
                        image.media_type,
                        image.created
                    ])
                })
                .map_err(failed("add image"))?;
            if rows == 1 {
                connection.execute("INSERT OR REPLACE INTO readings VALUES (?1,?2)", params![image.id, judged]).map_err(failed("note a reading"))?;
            }
            Ok(rows == 1)
        })
    }

    /// What the reader of an image's manifest found; nothing when that is not noted, or in other words than today's.
    pub fn reading(&self, image_id: &str) -> Result<Option<Judged>> {
        let text: Option<String> = self.read(|connection| {
            connection
                .prepare_cached("SELECT judged FROM readings WHERE image_id=?1")
                .and_then(|mut statement| statement.query_row([image_id], |row| row.get(0)).optional())
                .map_err(failed("look for a reading"))
        })?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Notes it for an image that is there.
    pub fn put_reading(&self, image_id: &str, judged: &Judged) -> Result<()> {
        let (image_id, judged) = (image_id.to_owned(), json(judged)?);
        self.write(move |connection| {
            connection
                .execute("INSERT OR REPLACE INTO readings SELECT id, ?2 FROM images WHERE id=?1", params![image_id, judged])
                .map_err(failed("note a reading"))?;
            Ok(())
        })
    }

    /// Notes what the first fetch of an image's root filesystem found.
    pub fn set_image_rootfs(&self, id: &str, digest: Digest, size: u64) -> Result<()> {
        let id = id.to_owned();
        self.write(move |connection| {
            connection
                .execute("UPDATE images SET rootfs_digest=?2, rootfs_size=?3 WHERE id=?1", params![id, digest.to_string(), size as i64])
                .map_err(failed("update image"))?;
            Ok(())
        })
    }

    /// Who vouches for the bytes with this digest, as they come from `url`.
    pub fn signer(&self, digest: &Digest, url: &str) -> Result<Option<Signer>> {
        let text: Option<String> = self.read(|connection| {
            connection
                .prepare_cached("SELECT signer FROM signers WHERE digest=?1 AND url=?2")
                .and_then(|mut statement| statement.query_row([&digest.to_string(), url], |row| row.get(0)).optional())
                .map_err(failed("read signer"))
        })?;
        let parse = |text: String| {
            serde_json::from_str(&text)
                .map_err(|error| Error::new(Kind::Corrupt, Stage::Store, "signers", "a row is not readable").with_source(error))
        };
        text.map(parse).transpose()
    }

    /// Notes who vouches for the bytes with this digest, as they come from `url`.
    pub fn put_signer(&self, digest: &Digest, url: &str, signer: &Signer) -> Result<()> {
        let (digest, url, signer) = (digest.to_string(), url.to_owned(), json(signer)?);
        self.write(move |connection| {
            connection
                .execute("INSERT INTO signers VALUES (?1,?2,?3) ON CONFLICT (digest, url) DO UPDATE SET signer=?3", params![digest, url, signer])
                .map_err(failed("note signer"))?;
            Ok(())
        })
    }

    /// One image.
    pub fn image(&self, id: &str) -> Result<Option<ImageRecord>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT * FROM images WHERE id=?1")
                .and_then(|mut statement| statement.query_row([id], image_of).optional())
                .map_err(failed("read image"))
        })
    }

    /// An image that is made from the root filesystem with this digest, and says where it is.
    pub fn image_with_rootfs(&self, digest: Digest) -> Result<Option<ImageRecord>> {
        self.read(|connection| {
            connection
                .query_row(
                    "SELECT * FROM images WHERE rootfs_digest=?1 AND rootfs_url IS NOT NULL ORDER BY created, id LIMIT 1",
                    [digest.to_string()],
                    image_of,
                )
                .optional()
                .map_err(failed("find an image by its root filesystem"))
        })
    }

    /// Images, newest first, after skipping `offset`.
    pub fn images(&self, limit: u32, offset: u64) -> Result<Vec<ImageRecord>> {
        self.read(|connection| {
            all(connection, "SELECT * FROM images ORDER BY created DESC, id LIMIT ?1 OFFSET ?2", params![limit, offset as i64], image_of)
        })
    }

    /// Removes an image's row, unless a volume was made from it or a lease holds it at `now`: then `Kind::Conflict`.
    pub fn delete_image(&self, id: &str, now: i64) -> Result<bool> {
        let id = id.to_owned();
        self.write(move |connection| {
            let volumes: i64 = connection
                .query_row("SELECT count(*) FROM volumes WHERE image_id=?1", [&id], |row| row.get(0))
                .map_err(failed("count volumes of image"))?;
            if volumes > 0 {
                return Err(Error::new(Kind::Conflict, Stage::Store, id, format!("{volumes} volumes were made from it")).with_reason("IMAGE_IN_USE"));
            }
            let leased: Option<String> = connection
                .query_row(
                    "SELECT owner FROM leases WHERE kind='image' AND object=?1 AND (expires IS NULL OR expires > ?2)",
                    params![id, now],
                    |row| row.get(0),
                )
                .optional()
                .map_err(failed("look for leases of an image"))?;
            if let Some(owner) = leased {
                return Err(Error::new(Kind::Conflict, Stage::Store, id, format!("{owner} holds a lease on it")).with_reason("IMAGE_LEASED"));
            }
            names::forget(connection, &id)?;
            let deleted = connection.execute("DELETE FROM images WHERE id=?1", [&id]).map(|rows| rows > 0).map_err(failed("delete image"))?;
            connection.execute("DELETE FROM readings WHERE image_id=?1", [&id]).map_err(failed("forget a reading"))?;
            // Who signed tarballs of URLs that no image names any more.
            let of_no_image = "DELETE FROM signers WHERE url LIKE '%://%' AND NOT EXISTS (SELECT 1 FROM images WHERE rootfs_url=signers.url)";
            connection.execute(of_no_image, []).map_err(failed("forget signers"))?;
            Ok(deleted)
        })
    }

    /// Adds or refreshes a blob.
    pub fn put_blob(&self, digest: Digest, size: u64, now: i64) -> Result<()> {
        self.write(move |connection| {
            connection
                .execute(
                    "INSERT INTO blobs VALUES (?1,?2,?3,?3) ON CONFLICT (digest) DO UPDATE SET last_used=?3",
                    params![digest.to_string(), size as i64, now],
                )
                .map_err(failed("add blob"))?;
            Ok(())
        })
    }

    /// Size of a blob, if the catalogue has it and it is not being removed.
    pub fn blob_size(&self, digest: Digest) -> Result<Option<u64>> {
        self.read(|connection| {
            connection
                .query_row(
                    "SELECT size FROM blobs WHERE digest=?1 AND NOT EXISTS (SELECT 1 FROM journal WHERE what='remove-blob' AND subject=?1)",
                    [digest.to_string()],
                    |row| row.get::<_, i64>(0),
                )
                .optional()
                .map(|size| size.map(|size| size as u64))
                .map_err(failed("read blob"))
        })
    }

    /// Adds a golden that is complete in the store.
    pub fn put_golden(&self, golden: GoldenRecord) -> Result<()> {
        self.write(move |connection| {
            connection
                .execute(
                    "INSERT OR REPLACE INTO goldens VALUES (?1,?2,?3,?4,?5,?6,?7,?8)",
                    params![
                        golden.key.hex(),
                        json(&golden.spec)?,
                        golden.image_id,
                        golden.digest.to_string(),
                        golden.allocated as i64,
                        json(&golden.built)?,
                        golden.created,
                        golden.last_used
                    ],
                )
                .map_err(failed("add golden"))?;
            Ok(())
        })
    }

    /// One golden, unless it is being removed.
    pub fn golden(&self, key: Digest) -> Result<Option<GoldenRecord>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT * FROM goldens WHERE key=?1 AND NOT EXISTS (SELECT 1 FROM journal WHERE what='remove-golden' AND subject=?1)")
                .and_then(|mut statement| statement.query_row([key.hex()], golden_of).optional())
                .map_err(failed("read golden"))
        })
    }

    /// Goldens, newest first, each with the number of volumes backed by it.
    pub fn goldens(&self, image_id: Option<&str>) -> Result<Vec<(GoldenRecord, u32)>> {
        self.read(|connection| {
            all(
                connection,
                "SELECT *, (SELECT count(*) FROM volumes WHERE volumes.golden_key = goldens.key) FROM goldens
                 WHERE ?1 IS NULL OR image_id=?1 ORDER BY created DESC, key",
                params![image_id],
                |row| Ok((golden_of(row)?, row.get::<_, u32>(8)?)),
            )
        })
    }

    /// Admits a render under its idempotency key. A key that is free, or whose render failed or was cancelled and had the same spec, starts it (again: under the
    /// id it had); otherwise the render that has the key is returned untouched. `intents`: the volumes it will make, for the journal.
    pub fn admit_render(&self, render: RenderRecord, intents: Vec<journal::Intent>) -> Result<Admitted> {
        self.write(move |connection| {
            let existing = connection
                .prepare_cached("SELECT * FROM renders WHERE key=?1")
                .and_then(|mut statement| statement.query_row([&render.key], render_of).optional())
                .map_err(failed("look up idempotency key"))?;
            match existing {
                Some(existing) => {
                    let ended_without_volume = matches!(existing.state, RenderState::Failed | RenderState::Cancelled);
                    if !ended_without_volume || existing.spec != render.spec {
                        return Ok(Admitted::Existing(existing));
                    }
                    let again = RenderRecord { id: existing.id, ..render };
                    journal::admit(connection, &again.id, intents)?;
                    save_render(connection, &again)?;
                    Ok(Admitted::Started(again))
                }
                None => {
                    journal::admit(connection, &render.id, intents)?;
                    save_render(connection, &render)?;
                    Ok(Admitted::Started(render))
                }
            }
        })
    }

    /// Marks every render that a stopped daemon left queued or running as failed; returns how many there were.
    pub fn fail_interrupted(&self, failure: FailureRecord, now_ms: i64) -> Result<usize> {
        self.write(move |connection| {
            connection
                .execute(
                    "UPDATE renders SET state='failed', failure=?1, finished_ms=?2 WHERE state IN ('queued','running')",
                    params![json(&failure)?, now_ms],
                )
                .map_err(failed("fail interrupted renders"))
        })
    }

    /// Replaces a render's row.
    pub fn update_render(&self, render: RenderRecord) -> Result<()> {
        self.write(move |connection| save_render(connection, &render))
    }

    /// One render by id.
    pub fn render(&self, id: &str) -> Result<Option<RenderRecord>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT * FROM renders WHERE id=?1")
                .and_then(|mut statement| statement.query_row([id], render_of).optional())
                .map_err(failed("read render"))
        })
    }

    /// The render that has an idempotency key.
    pub fn render_by_key(&self, key: &str) -> Result<Option<RenderRecord>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT * FROM renders WHERE key=?1")
                .and_then(|mut statement| statement.query_row([key], render_of).optional())
                .map_err(failed("read render by key"))
        })
    }

    /// Renders, newest first, of one state or all; of these pools and of none, when some are given.
    pub fn renders(&self, pools: Option<&[&str]>, state: Option<RenderState>, limit: u32, offset: u64) -> Result<Vec<RenderRecord>> {
        self.read(|connection| {
            all(
                connection,
                "SELECT * FROM renders WHERE (?1 IS NULL OR state=?1) AND (?4 IS NULL OR pool IS NULL OR pool IN (SELECT value FROM json_each(?4)))
                 ORDER BY created_ms DESC, id LIMIT ?2 OFFSET ?3",
                params![state.map(RenderState::name), limit, offset as i64, pools.map(|pools| json(&pools)).transpose()?],
                render_of,
            )
        })
    }
}

impl Drop for Catalog {
    fn drop(&mut self) {
        // Closing the channel ends the thread after what is queued.
        self.writer = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_loop(connection: &Connection, receiver: &mpsc::Receiver<Write>) {
    while let Ok(first) = receiver.recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH_LEN_MAX {
            match receiver.try_recv() {
                Ok(next) => batch.push(next),
                Err(_) => break,
            }
        }
        if let Err(error) = connection.execute_batch("BEGIN IMMEDIATE") {
            // Dropping the batch answers every caller that the writer failed; the cause goes to the log.
            tracing::error!(%error, "the catalogue can't begin a transaction");
            continue;
        }
        let mut replies = Vec::with_capacity(batch.len());
        for change in batch {
            if connection.execute_batch("SAVEPOINT change").is_err() {
                break;
            }
            let end = match change(connection) {
                Ok(reply) => {
                    replies.push(reply);
                    "RELEASE change"
                }
                Err(_) => "ROLLBACK TO change; RELEASE change",
            };
            if let Err(error) = connection.execute_batch(end) {
                tracing::error!(%error, "the catalogue can't end a savepoint");
            }
        }
        let committed = connection.execute_batch("COMMIT");
        if committed.is_err() {
            let _ = connection.execute_batch("ROLLBACK");
        }
        for reply in replies {
            reply(match &committed {
                Ok(()) => Ok(()),
                Err(error) => Err(Error::new(kind_of(error), Stage::Store, "catalogue", format!("commit: {error}"))),
            });
        }
    }
}

fn save_render(connection: &Connection, render: &RenderRecord) -> Result<()> {
    let (pool, volume) = match &render.volume {
        Some((pool, volume)) => (Some(pool), Some(volume)),
        None => (None, None),
    };
    connection
        .prepare_cached("INSERT OR REPLACE INTO renders VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14)")
        .map_err(failed("prepare saving a render"))?
        .execute(params![
            render.id,
            render.key,
            render.spec.to_string(),
            render.image_id,
            render.instance,
            pool,
            volume,
            render.state.name(),
            render.stage,
            render.failure.as_ref().map(json).transpose()?,
            render.golden_key.map(|key| key.hex()),
            render.created_ms,
            render.started_ms,
            render.finished_ms
        ])
        .map(|_| ())
        .map_err(failed("save render"))
}

//! The journal: what is begun on the host and not finished. An entry is durable before the thing is made, and goes in the transaction that makes it count.
//!
//! | entry           | written                                        | goes with                                    | at the next start                                  |
//! |-----------------|------------------------------------------------|----------------------------------------------|----------------------------------------------------|
//! | `render`        | with the render's row: names of its volumes    | the volumes' rows, or the failed render's    | what it published is taken back, or recorded       |
//! | `render` sealed | before the first volume is published: its rows | as above                                     | published to the last one: recorded; else taken back |
//! | `remove-volume` | before anything of the volume goes             | the volume's row                             | the removal is finished                            |
//! | `remove-golden`, `remove-blob` | before its files go             | its row                                      | the removal is finished                            |
//!
//! Kernel objects need no entries of their own: temporary files and the loop devices on them are found by their names, mounts live in the private namespace of a
//! child that dies with the daemon, claims on devices end with the process.

use rusqlite::{Connection, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::{
    Catalog, failed,
    rows::{all, json},
    save_render,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    guest::config::Secret,
    mapping::{Mapping, Role},
    names::{Digest, PoolName, VolumeName},
    store::records::{RenderRecord, VolumeKey, VolumeRecord},
    target::{Proof, Volume, VolumeFormat},
};

/// A volume that a render will make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Its pool.
    pub pool: PoolName,
    /// Its name there.
    pub name: VolumeName,
    /// How it is stored.
    pub format: VolumeFormat,
}

/// What a render is about to publish.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sealed {
    /// Its volumes, the root first.
    pub volumes: Vec<SealedVolume>,
    /// What the replaced root had and the new one has not.
    pub leftover: Vec<VolumeKey>,
    /// Golden it was made from.
    pub golden_key: Option<Digest>,
}

/// A volume's row before the volume is published, without its secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SealedVolume {
    /// How to tell that it was published; none for one that is kept as it is.
    pub proof: Option<Proof>,
    /// Whether it takes the place of a row.
    pub replaces: bool,
    /// As in [`VolumeRecord`]; what is only known when it is published is missing.
    pub volume: Volume,
    /// As in [`VolumeRecord`].
    pub mapping: Mapping,
    /// As in [`VolumeRecord`].
    pub golden_key: Option<Digest>,
    /// As in [`VolumeRecord`].
    pub created: i64,
    /// As in [`VolumeRecord`].
    pub role: Role,
    /// As in [`VolumeRecord`].
    pub root: Option<VolumeKey>,
}

impl SealedVolume {
    /// Of a row.
    pub fn of(record: VolumeRecord, proof: Option<Proof>, replaces: bool) -> Self {
        let VolumeRecord { volume, mapping, golden_key, created, role, root, seed: _ } = record;
        SealedVolume { proof, replaces, volume, mapping, golden_key, created, role, root }
    }

    /// The row.
    pub fn record(&self, volume: Volume, seed: Option<Secret>) -> VolumeRecord {
        let SealedVolume { proof: _, replaces: _, volume: foreseen, mapping, golden_key, created, role, root } = self.clone();
        let mut mapping = mapping;
        for device in mapping.devices.iter_mut().filter(|device| (&device.volume.pool, &device.volume.name) == (&foreseen.pool, &foreseen.name)) {
            device.volume = volume.clone();
        }
        VolumeRecord { volume, mapping, golden_key, created, role, root, seed }
    }
}

/// A render's entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenderEntry {
    /// What it will make.
    pub intents: Vec<Intent>,
    /// What it is about to publish, once it is.
    pub sealed: Option<Sealed>,
}

impl Catalog {
    /// Entries of renders, oldest first, each with the id of its render and the secret of its root. One that can't be read stays and is logged: it is no reason
    /// not to look after the others.
    pub fn render_entries(&self) -> Result<Vec<(String, RenderEntry, Option<Secret>)>> {
        let rows = self.read(|connection| {
            all(connection, "SELECT subject, detail, secret FROM journal WHERE what='render' ORDER BY seq", [], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, Option<Vec<u8>>>(2)?))
            })
        })?;
        let parse = |(id, detail, secret): (String, String, Option<Vec<u8>>)| {
            let unreadable = |error| Error::new(Kind::Corrupt, Stage::Store, id.clone(), "its journal entry is not readable").with_source(error);
            Ok((id.clone(), serde_json::from_str(&detail).map_err(unreadable)?, secret.map(Secret::new)))
        };
        Ok(rows.into_iter().filter_map(|row| readable(parse(row))).collect())
    }

    /// Adds to a render's entry what it is about to publish; `seed` is the root's.
    pub fn seal_render(&self, id: &str, entry: RenderEntry, seed: Option<Secret>) -> Result<()> {
        let id = id.to_owned();
        self.write(move |connection| insert(connection, "render", &id, &json(&entry)?, seed.as_ref()))
    }

    /// The end of a render without volumes. Its entry goes too when it left nothing; else the next start looks after it.
    pub fn end_render(&self, render: RenderRecord, left_nothing: bool) -> Result<()> {
        self.write(move |connection| {
            if left_nothing {
                remove(connection, "render", &render.id)?;
            }
            save_render(connection, &render)
        })
    }

    /// Forgets a render's entry: nothing of it is left to be looked after.
    pub fn forget_render_entry(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        self.write(move |connection| remove(connection, "render", &id))
    }

    /// Marks volumes that are about to be removed, in that order.
    pub fn begin_volume_removal(&self, keys: Vec<VolumeKey>) -> Result<()> {
        self.write(move |connection| mark_volumes(connection, &keys))
    }

    /// Takes marks back, of volumes that stay.
    pub fn cancel_volume_removal(&self, keys: Vec<VolumeKey>) -> Result<()> {
        self.write(move |connection| keys.iter().try_for_each(|key| remove(connection, "remove-volume", &subject(key))))
    }

    /// Volumes whose removal was begun and not finished, in order.
    pub fn volume_removals(&self) -> Result<Vec<VolumeKey>> {
        let rows = self.read(|connection| {
            all(connection, "SELECT subject FROM journal WHERE what='remove-volume' ORDER BY seq", [], |row| row.get::<_, String>(0))
        })?;
        let parse = |text: String| {
            let parts = text.split_once('/').and_then(|(pool, name)| Some((pool.parse().ok()?, name.parse().ok()?)));
            parts.ok_or_else(|| Error::new(Kind::Corrupt, Stage::Store, text.clone(), "the journal names no volume with this"))
        };
        Ok(rows.into_iter().filter_map(|row| readable(parse(row))).collect())
    }
}

/// What of the journal can be read.
pub(super) fn readable<T>(entry: Result<T>) -> Option<T> {
    entry.inspect_err(|error| tracing::error!(error = %error.chain(), "an entry of the journal is left alone")).ok()
}

fn subject(key: &VolumeKey) -> String {
    format!("{}/{}", key.0, key.1)
}

pub(super) fn mark_volumes(connection: &Connection, keys: &[VolumeKey]) -> Result<()> {
    keys.iter().try_for_each(|key| insert(connection, "remove-volume", &subject(key), "{}", None))
}

/// Puts a volume's mark away, with its row.
pub(super) fn unmark_volume(connection: &Connection, pool: &str, name: &str) -> Result<()> {
    remove(connection, "remove-volume", &format!("{pool}/{name}"))
}

/// Writes the entry of a render that is admitted. One that makes nothing has none.
pub(super) fn admit(connection: &Connection, id: &str, intents: Vec<Intent>) -> Result<()> {
    if intents.is_empty() {
        return Ok(());
    }
    insert(connection, "render", id, &json(&RenderEntry { intents, sealed: None })?, None)
}

pub(super) fn remove(connection: &Connection, what: &str, subject: &str) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM journal WHERE what=?1 AND subject=?2")
        .and_then(|mut statement| statement.execute([what, subject]))
        .map(|_| ())
        .map_err(failed("remove a journal entry"))
}

fn insert(connection: &Connection, what: &str, subject: &str, detail: &str, secret: Option<&Secret>) -> Result<()> {
    // An entry of the same subject is continued: it keeps its place.
    let seq: Option<i64> = connection
        .prepare_cached("SELECT seq FROM journal WHERE what=?1 AND subject=?2")
        .and_then(|mut statement| statement.query_row([what, subject], |row| row.get(0)).optional())
        .map_err(failed("look up a journal entry"))?;
    connection
        .prepare_cached("INSERT OR REPLACE INTO journal (seq, what, subject, detail, since, secret) VALUES (?1, ?2, ?3, ?4, unixepoch(), ?5)")
        .and_then(|mut statement| statement.execute(params![seq, what, subject, detail, secret.map(Secret::expose)]))
        .map(|_| ())
        .map_err(failed("write a journal entry"))
}

//! Rows of volumes.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, params};

use super::{
    Catalog, failed, journal,
    rows::{all, json, volume_of},
    save_render,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    guest::config::Secret,
    mapping::Role,
    store::records::{RenderRecord, VolumeKey, VolumeRecord},
    volume::redo::Row,
};

impl Catalog {
    /// Adds the volumes of an instance and its render's final row in one transaction: all or none survive. `volumes` starts with the root. A row whose name is
    /// in `replaced` takes the place of the one that is there; for any other name that is taken it is `Kind::AlreadyExists`. What was attached to the root
    /// before and is not among `volumes` is detached; `leftover` of it is marked for removal.
    pub fn finish_render(
        &self,
        volumes: Vec<VolumeRecord>,
        replaced: BTreeSet<VolumeKey>,
        leftover: Vec<VolumeKey>,
        render: RenderRecord,
    ) -> Result<()> {
        self.write(move |connection| {
            if let Some(root) = volumes.first() {
                connection
                    .prepare_cached("UPDATE volumes SET root_pool=NULL, root_name=NULL WHERE root_pool=?1 AND root_name=?2")
                    .and_then(|mut statement| statement.execute([root.volume.pool.as_str(), root.volume.name.as_str()]))
                    .map_err(failed("detach former volumes"))?;
                if let Some(key) = render.golden_key {
                    connection
                        .prepare_cached("UPDATE goldens SET last_used=?2 WHERE key=?1")
                        .and_then(|mut statement| statement.execute(params![key.hex(), root.created]))
                        .map_err(failed("note the use of a golden"))?;
                }
            }
            for volume in &volumes {
                if let Some(key) = volume.golden_key {
                    super::gc::require_golden(connection, key)?;
                }
                save_volume(connection, volume, replaced.contains(&volume.key()))?;
            }
            journal::mark_volumes(connection, &leftover)?;
            journal::remove(connection, "render", &render.id)?;
            save_render(connection, &render)
        })
    }

    /// Replaces the stored form of a volume, after it was re-adopted.
    pub fn update_volume(&self, record: VolumeRecord) -> Result<()> {
        self.write(move |connection| {
            connection
                .execute(
                    "UPDATE volumes SET volume=?3, mapping=?4 WHERE pool=?1 AND name=?2",
                    params![record.volume.pool.as_str(), record.volume.name.as_str(), json(&record.volume)?, json(&record.mapping)?],
                )
                .map_err(failed("update volume"))?;
            Ok(())
        })
    }

    /// Records what a reconfiguration changed, the rows of one instance in one transaction. Rows that are gone stay gone.
    pub fn reconfigure_volumes(&self, rows: Vec<Row>) -> Result<()> {
        self.write(move |connection| {
            for row in &rows {
                let mapping = json(&row.mapping)?;
                connection
                    .prepare_cached("UPDATE volumes SET mapping=?3, secret=coalesce(?4, secret) WHERE pool=?1 AND name=?2")
                    .and_then(|mut statement| statement.execute(params![row.pool, row.name, mapping, row.seed]))
                    .map_err(failed("record a reconfiguration"))?;
            }
            Ok(())
        })
    }

    /// One volume.
    pub fn volume(&self, pool: &str, name: &str) -> Result<Option<VolumeRecord>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT * FROM volumes WHERE pool=?1 AND name=?2")
                .and_then(|mut statement| statement.query_row([pool, name], volume_of).optional())
                .map_err(failed("read volume"))
        })
    }

    /// The root volume that a render made.
    pub fn volume_of_render(&self, render_id: &str) -> Result<Option<VolumeRecord>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT * FROM volumes WHERE render_id=?1 AND role='root'")
                .and_then(|mut statement| statement.query_row([render_id], volume_of).optional())
                .map_err(failed("read volume of render"))
        })
    }

    /// Volumes, newest first; of these pools, when some are given.
    pub fn volumes(&self, pools: Option<&[&str]>, limit: u32, offset: u64) -> Result<Vec<VolumeRecord>> {
        self.read(|connection| {
            all(
                connection,
                "SELECT * FROM volumes WHERE ?1 IS NULL OR pool IN (SELECT value FROM json_each(?1))
                 ORDER BY created DESC, pool, name LIMIT ?2 OFFSET ?3",
                params![pools.map(|pools| json(&pools)).transpose()?, limit, offset as i64],
                volume_of,
            )
        })
    }

    /// The further volumes of the instance whose root this is.
    pub fn volumes_of_root(&self, pool: &str, name: &str) -> Result<Vec<VolumeRecord>> {
        self.read(|connection| {
            all(connection, "SELECT * FROM volumes WHERE root_pool=?1 AND root_name=?2 ORDER BY name", params![pool, name], volume_of)
        })
    }

    /// Volumes of one format, for re-adoption at start.
    pub fn volumes_of_format(&self, format: crate::target::VolumeFormat) -> Result<Vec<VolumeRecord>> {
        self.read(|connection| {
            all(connection, "SELECT * FROM volumes WHERE json_extract(volume, '$.format')=?1 ORDER BY created", params![format.name()], volume_of)
        })
    }

    /// Replaces a volume's row.
    pub fn replace_volume(&self, record: VolumeRecord) -> Result<()> {
        self.write(move |connection| save_volume(connection, &record, true))
    }

    /// Forgets a volume; what was attached to it is detached.
    pub fn delete_volume(&self, pool: &str, name: &str) -> Result<bool> {
        let (pool, name) = (pool.to_owned(), name.to_owned());
        self.write(move |connection| {
            connection
                .execute("UPDATE volumes SET root_pool=NULL, root_name=NULL WHERE root_pool=?1 AND root_name=?2", [&pool, &name])
                .map_err(failed("detach volumes"))?;
            journal::unmark_volume(connection, &pool, &name)?;
            connection.execute("DELETE FROM volumes WHERE pool=?1 AND name=?2", [pool, name]).map(|rows| rows > 0).map_err(failed("delete volume"))
        })
    }
}

fn save_volume(connection: &Connection, record: &VolumeRecord, replace: bool) -> Result<()> {
    let taken = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::ConstraintViolation) => Error::new(
            Kind::AlreadyExists,
            Stage::Store,
            format!("{}/{}", record.volume.pool, record.volume.name),
            "the catalogue has this volume already",
        )
        .with_reason("VOLUME_EXISTS"),
        _ => failed("add volume")(error),
    };
    let verb = if replace { "INSERT OR REPLACE" } else { "INSERT" };
    let (root_pool, root_name) = record.root.as_ref().map(|(pool, name)| (pool.as_str(), name.as_str())).unzip();
    connection
        .prepare_cached(&format!("{verb} INTO volumes VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12)"))
        .map_err(failed("prepare adding a volume"))?
        .execute(params![
            record.volume.pool.as_str(),
            record.volume.name.as_str(),
            json(&record.volume)?,
            json(&record.mapping)?,
            // Only a root holds its image: what else an instance has was copied or made anew.
            if record.role == Role::Root { record.mapping.image_id.as_str() } else { "" },
            record.mapping.render_id,
            record.golden_key.map(|key| key.hex()),
            record.created,
            record.role.name(),
            root_pool,
            root_name,
            record.seed.as_ref().map(Secret::expose),
        ])
        .map(|_| ())
        .map_err(taken)
}

//! Rows as values.

use rusqlite::{Connection, Row};

use super::failed;
use crate::{
    error::{Error, Result, Stage},
    guest::config::Secret,
    names::{Digest, PoolName, VolumeName},
    store::records::{GoldenRecord, ImageRecord, RenderRecord, VolumeRecord},
};

/// All rows of a query.
pub(super) fn all<T>(connection: &Connection, sql: &str, params: impl rusqlite::Params, row: fn(&Row<'_>) -> rusqlite::Result<T>) -> Result<Vec<T>> {
    let mut statement = connection.prepare_cached(sql).map_err(failed("prepare a list"))?;
    let rows = statement.query_map(params, row).map_err(failed("list"))?;
    rows.collect::<rusqlite::Result<Vec<T>>>().map_err(failed("read a list"))
}

/// A value as the text of a column.
pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::internal(Stage::Store, "catalogue", "encode a row").with_source(error))
}

/// Reads column `index` as whatever its text parses to.
fn parsed<T, E>(row: &Row<'_>, index: usize, parse: impl Fn(&str) -> Result<T, E>) -> rusqlite::Result<Option<T>>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let text: Option<String> = row.get(index)?;
    text.map(|text| parse(&text).map_err(|error| rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, error.into())))
        .transpose()
}

fn required<T>(index: usize, value: Option<T>) -> rusqlite::Result<T> {
    value.ok_or(rusqlite::Error::InvalidColumnType(index, "not null".into(), rusqlite::types::Type::Null))
}

/// Reads column `index`, which is never null, as JSON.
fn json_column<T: serde::de::DeserializeOwned>(row: &Row<'_>, index: usize) -> rusqlite::Result<T> {
    required(index, parsed(row, index, |text| serde_json::from_str(text))?)
}

fn hex_digest(text: &str) -> Result<Digest, String> {
    format!("sha256:{text}").parse()
}

/// A value of an enumeration by its name.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> serde_json::Result<T> {
    serde_json::from_value(serde_json::Value::String(text.to_owned()))
}

pub(super) fn image_of(row: &Row<'_>) -> rusqlite::Result<ImageRecord> {
    Ok(ImageRecord {
        id: row.get(0)?,
        manifest: row.get(1)?,
        rootfs_url: row.get(2)?,
        rootfs_digest: parsed(row, 3, str::parse::<Digest>)?,
        rootfs_size: row.get::<_, Option<i64>>(4)?.map(|size| size as u64),
        media_type: row.get(5)?,
        created: row.get(6)?,
    })
}

pub(super) fn golden_of(row: &Row<'_>) -> rusqlite::Result<GoldenRecord> {
    Ok(GoldenRecord {
        key: required(0, parsed(row, 0, hex_digest)?)?,
        spec: json_column(row, 1)?,
        image_id: row.get(2)?,
        digest: required(3, parsed(row, 3, str::parse::<Digest>)?)?,
        allocated: row.get::<_, i64>(4)? as u64,
        built: json_column(row, 5)?,
        created: row.get(6)?,
        last_used: row.get(7)?,
    })
}

pub(super) fn render_of(row: &Row<'_>) -> rusqlite::Result<RenderRecord> {
    let (pool, volume): (Option<String>, Option<String>) = (row.get(5)?, row.get(6)?);
    Ok(RenderRecord {
        id: row.get(0)?,
        key: row.get(1)?,
        spec: json_column(row, 2)?,
        image_id: row.get(3)?,
        instance: row.get(4)?,
        volume: pool.zip(volume),
        state: required(7, parsed(row, 7, word)?)?,
        stage: row.get(8)?,
        failure: parsed(row, 9, |text| serde_json::from_str(text))?,
        golden_key: parsed(row, 10, hex_digest)?,
        created_ms: row.get(11)?,
        started_ms: row.get(12)?,
        finished_ms: row.get(13)?,
    })
}

pub(super) fn volume_of(row: &Row<'_>) -> rusqlite::Result<VolumeRecord> {
    let root_name = parsed(row, 10, str::parse::<VolumeName>)?;
    Ok(VolumeRecord {
        volume: json_column(row, 2)?,
        mapping: json_column(row, 3)?,
        golden_key: parsed(row, 6, hex_digest)?,
        created: row.get(7)?,
        role: required(8, parsed(row, 8, word)?)?,
        root: parsed(row, 9, str::parse::<PoolName>)?.zip(root_name),
        seed: row.get::<_, Option<Vec<u8>>>(11)?.map(Secret::new),
    })
}

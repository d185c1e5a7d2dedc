//! Names, versions, channels, aliases and labels of images, and which of them are deprecated.
//!
//! The tables are made when they are not there, whatever the version of the others: an older cloudletd does not look at them.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Catalog, failed, rows::all};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::Digest,
};

pub(super) const TABLES: &str = "
CREATE TABLE IF NOT EXISTS image_versions (
  name TEXT NOT NULL, version TEXT NOT NULL, image_id TEXT NOT NULL, created INTEGER NOT NULL, PRIMARY KEY (name, version)
) STRICT;
CREATE INDEX IF NOT EXISTS image_versions_by_image ON image_versions (image_id);
CREATE TABLE IF NOT EXISTS image_channels (
  name TEXT NOT NULL, channel TEXT NOT NULL, version TEXT NOT NULL, moved INTEGER NOT NULL, PRIMARY KEY (name, channel)
) STRICT;
CREATE TABLE IF NOT EXISTS image_aliases (alias TEXT PRIMARY KEY, name TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS image_labels (image_id TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (image_id, key)) STRICT;
CREATE TABLE IF NOT EXISTS image_deprecations (image_id TEXT PRIMARY KEY, since INTEGER NOT NULL, reason TEXT NOT NULL, replacement TEXT NOT NULL) STRICT;
";

/// A version of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionRow {
    /// The name, e.g. `debian/12`.
    pub name: String,
    /// The version, e.g. `20261101`; versions order as bytes.
    pub version: String,
    /// The image.
    pub image_id: String,
    /// Seconds since 1970.
    pub created: i64,
    /// Whether the image is deprecated.
    pub deprecated: bool,
}

/// A channel of a name: the version that those who follow it get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelRow {
    /// The name.
    pub name: String,
    /// The channel, e.g. `stable`.
    pub channel: String,
    /// The version it points to.
    pub version: String,
    /// When it was moved there, seconds since 1970.
    pub moved: i64,
}

/// Why an image should no longer be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deprecation {
    /// Since when, seconds since 1970.
    pub since: i64,
    /// Why, for people.
    pub reason: String,
    /// A reference to what to use instead; may be empty.
    pub replacement: String,
}

/// Something that keeps an image from being deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// What kind: `volume`, `channel`, `lease`.
    pub kind: &'static str,
    /// Which one.
    pub object: String,
}

fn version_of(row: &Row<'_>) -> rusqlite::Result<VersionRow> {
    Ok(VersionRow { name: row.get(0)?, version: row.get(1)?, image_id: row.get(2)?, created: row.get(3)?, deprecated: row.get(4)? })
}

fn channel_of(row: &Row<'_>) -> rusqlite::Result<ChannelRow> {
    Ok(ChannelRow { name: row.get(0)?, channel: row.get(1)?, version: row.get(2)?, moved: row.get(3)? })
}

const VERSIONS: &str = "SELECT name, version, image_id, created, EXISTS (SELECT 1 FROM image_deprecations d WHERE d.image_id = v.image_id)
                        FROM image_versions v";

impl Catalog {
    /// Gives an image a name and version. The same again changes nothing; a version that is another image is `Kind::AlreadyExists` (`VERSION_TAKEN`): what
    /// somebody pinned never changes. `Kind::NotFound` when there is no such image.
    pub fn put_version(&self, name: &str, version: &str, image_id: &str, now: i64) -> Result<bool> {
        let (name, version, image_id) = (name.to_owned(), version.to_owned(), image_id.to_owned());
        self.write(move |connection| {
            let known: bool = connection
                .query_row("SELECT EXISTS (SELECT 1 FROM images WHERE id=?1)", [&image_id], |row| row.get(0))
                .map_err(failed("look for image"))?;
            if !known {
                return Err(Error::new(Kind::NotFound, Stage::Store, image_id, "there is no such image").with_reason("IMAGE_NOT_FOUND"));
            }
            if alias_target(connection, &name)?.is_some() {
                return Err(Error::new(Kind::AlreadyExists, Stage::Store, name, "is an alias of another name").with_reason("NAME_IS_ALIAS"));
            }
            let there: Option<String> = connection
                .query_row("SELECT image_id FROM image_versions WHERE name=?1 AND version=?2", params![name, version], |row| row.get(0))
                .optional()
                .map_err(failed("look up version"))?;
            match there {
                Some(there) if there == image_id => Ok(false),
                Some(there) => {
                    let what = format!("{name}@{version}");
                    Err(Error::new(Kind::AlreadyExists, Stage::Store, what, format!("is image {there}")).with_reason("VERSION_TAKEN"))
                }
                None => {
                    connection
                        .execute("INSERT INTO image_versions VALUES (?1,?2,?3,?4)", params![name, version, image_id, now])
                        .map_err(failed("add version"))?;
                    Ok(true)
                }
            }
        })
    }

    /// Points a channel at a version; gives the version it pointed at before. `Kind::NotFound` when there is no such version.
    pub fn set_channel(&self, name: &str, channel: &str, version: &str, now: i64) -> Result<Option<String>> {
        let (name, channel, version) = (name.to_owned(), channel.to_owned(), version.to_owned());
        self.write(move |connection| {
            let known: bool = connection
                .query_row("SELECT EXISTS (SELECT 1 FROM image_versions WHERE name=?1 AND version=?2)", params![name, version], |row| row.get(0))
                .map_err(failed("look for version"))?;
            if !known {
                let what = format!("{name}@{version}");
                return Err(Error::new(Kind::NotFound, Stage::Store, what, "there is no such version").with_reason("VERSION_NOT_FOUND"));
            }
            let before: Option<String> = connection
                .query_row("SELECT version FROM image_channels WHERE name=?1 AND channel=?2", params![name, channel], |row| row.get(0))
                .optional()
                .map_err(failed("read channel"))?;
            if before.as_ref() != Some(&version) {
                connection
                    .execute("INSERT OR REPLACE INTO image_channels VALUES (?1,?2,?3,?4)", params![name, channel, version, now])
                    .map_err(failed("move channel"))?;
            }
            Ok(before)
        })
    }

    /// Makes an alias of a name, or moves it. `Kind::AlreadyExists` when the alias is itself a name with versions.
    pub fn set_alias(&self, alias: &str, name: &str) -> Result<()> {
        let (alias, name) = (alias.to_owned(), name.to_owned());
        self.write(move |connection| {
            let count =
                |sql: &str, value: &str| -> Result<bool> { connection.query_row(sql, [value], |row| row.get(0)).map_err(failed("look for name")) };
            if count("SELECT EXISTS (SELECT 1 FROM image_versions WHERE name=?1)", &alias)? {
                return Err(Error::new(Kind::AlreadyExists, Stage::Store, alias, "is a name of its own").with_reason("ALIAS_IS_NAME"));
            }
            if !count("SELECT EXISTS (SELECT 1 FROM image_versions WHERE name=?1)", &name)? {
                return Err(Error::new(Kind::NotFound, Stage::Store, name, "there is no image of this name").with_reason("NAME_NOT_FOUND"));
            }
            connection.execute("INSERT OR REPLACE INTO image_aliases VALUES (?1,?2)", params![alias, name]).map_err(failed("set alias"))?;
            Ok(())
        })
    }

    /// Takes an alias away; whether it was there.
    pub fn delete_alias(&self, alias: &str) -> Result<bool> {
        let alias = alias.to_owned();
        self.write(move |connection| {
            connection.execute("DELETE FROM image_aliases WHERE alias=?1", [&alias]).map(|rows| rows > 0).map_err(failed("delete alias"))
        })
    }

    /// Takes a version's name from its image, which stays. `Kind::Conflict` (`VERSION_IN_CHANNEL`) while a channel points at it.
    pub fn delete_version(&self, name: &str, version: &str) -> Result<bool> {
        let (name, version) = (name.to_owned(), version.to_owned());
        self.write(move |connection| {
            let channel: Option<String> = connection
                .query_row("SELECT channel FROM image_channels WHERE name=?1 AND version=?2", params![name, version], |row| row.get(0))
                .optional()
                .map_err(failed("look for channels"))?;
            if let Some(channel) = channel {
                let what = format!("{name}@{version}");
                return Err(
                    Error::new(Kind::Conflict, Stage::Store, what, format!("channel {channel} points at it")).with_reason("VERSION_IN_CHANNEL")
                );
            }
            let rows = connection
                .execute("DELETE FROM image_versions WHERE name=?1 AND version=?2", params![name, version])
                .map_err(failed("delete version"))?;
            connection
                .execute("DELETE FROM image_aliases WHERE name NOT IN (SELECT name FROM image_versions)", [])
                .map_err(failed("delete aliases without names"))?;
            Ok(rows > 0)
        })
    }

    /// The name that an alias stands for.
    pub fn alias(&self, alias: &str) -> Result<Option<String>> {
        self.read(|connection| alias_target(connection, alias))
    }

    /// All aliases: alias and name, in order.
    pub fn aliases(&self) -> Result<Vec<(String, String)>> {
        self.read(|connection| all(connection, "SELECT alias, name FROM image_aliases ORDER BY alias", [], |row| Ok((row.get(0)?, row.get(1)?))))
    }

    /// The versions of a name, or of all names; by name, then newest first.
    pub fn versions(&self, name: Option<&str>) -> Result<Vec<VersionRow>> {
        let sql = format!("{VERSIONS} WHERE ?1 IS NULL OR name=?1 ORDER BY name, version DESC");
        self.read(|connection| all(connection, &sql, params![name], version_of))
    }

    /// The names and versions of one image.
    pub fn versions_of_image(&self, image_id: &str) -> Result<Vec<VersionRow>> {
        let sql = format!("{VERSIONS} WHERE image_id=?1 ORDER BY name, version DESC");
        self.read(|connection| all(connection, &sql, params![image_id], version_of))
    }

    /// The channels of a name, or of all.
    pub fn channels(&self, name: Option<&str>) -> Result<Vec<ChannelRow>> {
        self.read(|connection| {
            all(
                connection,
                "SELECT name, channel, version, moved FROM image_channels WHERE ?1 IS NULL OR name=?1 ORDER BY name, channel",
                params![name],
                channel_of,
            )
        })
    }

    /// Sets a label of an image, or takes it away.
    pub fn set_label(&self, image_id: &str, key: &str, value: Option<&str>) -> Result<()> {
        let (image_id, key, value) = (image_id.to_owned(), key.to_owned(), value.map(str::to_owned));
        self.write(move |connection| {
            match value {
                Some(value) => connection.execute("INSERT OR REPLACE INTO image_labels VALUES (?1,?2,?3)", params![image_id, key, value]),
                None => connection.execute("DELETE FROM image_labels WHERE image_id=?1 AND key=?2", params![image_id, key]),
            }
            .map(drop)
            .map_err(failed("label image"))
        })
    }

    /// The labels of an image, in order.
    pub fn labels(&self, image_id: &str) -> Result<Vec<(String, String)>> {
        self.read(|connection| {
            all(connection, "SELECT key, value FROM image_labels WHERE image_id=?1 ORDER BY key", params![image_id], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
        })
    }

    /// Says that an image should no longer be used, or takes that back.
    pub fn set_deprecation(&self, image_id: &str, deprecation: Option<Deprecation>) -> Result<()> {
        let image_id = image_id.to_owned();
        self.write(move |connection| {
            match deprecation {
                Some(of) => connection.execute(
                    "INSERT INTO image_deprecations VALUES (?1,?2,?3,?4) ON CONFLICT (image_id) DO UPDATE SET reason=?3, replacement=?4",
                    params![image_id, of.since, of.reason, of.replacement],
                ),
                None => connection.execute("DELETE FROM image_deprecations WHERE image_id=?1", params![image_id]),
            }
            .map(drop)
            .map_err(failed("deprecate image"))
        })
    }

    /// Why an image should no longer be used.
    pub fn deprecation(&self, image_id: &str) -> Result<Option<Deprecation>> {
        self.read(|connection| {
            connection
                .query_row("SELECT since, reason, replacement FROM image_deprecations WHERE image_id=?1", [image_id], |row| {
                    Ok(Deprecation { since: row.get(0)?, reason: row.get(1)?, replacement: row.get(2)? })
                })
                .optional()
                .map_err(failed("read deprecation"))
        })
    }

    /// An image whose root filesystem has this digest.
    pub fn image_of_rootfs(&self, digest: &Digest) -> Result<Option<String>> {
        self.read(|connection| {
            connection
                .query_row("SELECT id FROM images WHERE rootfs_digest=?1 ORDER BY created LIMIT 1", [digest.to_string()], |row| row.get(0))
                .optional()
                .map_err(failed("look for a root filesystem"))
        })
    }

    /// What keeps an image from being deleted at `now`: its volumes, the channels that point at it, and leases.
    pub fn uses_of_image(&self, image_id: &str, now: i64) -> Result<Vec<Use>> {
        self.read(|connection| {
            let mut uses = all(
                connection,
                "SELECT pool || '/' || name FROM volumes WHERE image_id=?1 ORDER BY pool, name LIMIT 100",
                params![image_id],
                |row| Ok(Use { kind: "volume", object: row.get(0)? }),
            )?;
            uses.extend(channels_of_image(connection, image_id)?);
            uses.extend(all(
                connection,
                "SELECT id || ' of ' || owner FROM leases WHERE kind='image' AND object=?1 AND (expires IS NULL OR expires > ?2) ORDER BY id LIMIT 100",
                params![image_id, now],
                |row| Ok(Use { kind: "lease", object: row.get(0)? }),
            )?);
            Ok(uses)
        })
    }
}

fn alias_target(connection: &Connection, alias: &str) -> Result<Option<String>> {
    connection.query_row("SELECT name FROM image_aliases WHERE alias=?1", [alias], |row| row.get(0)).optional().map_err(failed("look up alias"))
}

fn channels_of_image(connection: &Connection, image_id: &str) -> Result<Vec<Use>> {
    all(
        connection,
        "SELECT c.name || ':' || c.channel FROM image_channels c JOIN image_versions v ON v.name=c.name AND v.version=c.version
         WHERE v.image_id=?1 ORDER BY 1 LIMIT 100",
        params![image_id],
        |row| Ok(Use { kind: "channel", object: row.get(0)? }),
    )
}

/// What goes with an image that is deleted. `Kind::Conflict` (`IMAGE_IN_CHANNEL`) while a channel points at it.
pub(super) fn forget(connection: &Connection, image_id: &str) -> Result<()> {
    if let Some(channel) = channels_of_image(connection, image_id)?.into_iter().next() {
        let why = format!("channel {} points at it", channel.object);
        return Err(Error::new(Kind::Conflict, Stage::Store, image_id, why)
            .with_reason("IMAGE_IN_CHANNEL")
            .with_hint("move the channel to another version first"));
    }
    for table in ["image_versions", "image_labels", "image_deprecations", "stream_images"] {
        connection.execute(&format!("DELETE FROM {table} WHERE image_id=?1"), [image_id]).map_err(failed("forget what the image was called"))?;
    }
    connection
        .execute("DELETE FROM image_aliases WHERE name NOT IN (SELECT name FROM image_versions)", [])
        .map_err(failed("delete aliases without names"))?;
    Ok(())
}

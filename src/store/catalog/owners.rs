//! Who owns what. A render belongs to the caller who started it, and the volumes that it makes to the same; a volume that takes the place of another stays its
//! owner's. Triggers see to it, in the transaction of what they follow. What was made before there were owners, and by the daemon itself, has none.

use rusqlite::{OptionalExtension, params};

use super::{Catalog, Reply, Write, failed};
use crate::error::{Error, Result, Stage};

/// The step of the schema that brings owners. A trigger's conflict clause gives way to that of the statement it follows (SQLite, CREATE TRIGGER), which may be
/// INSERT OR REPLACE: hence NOT EXISTS.
pub(super) const TABLES: &str = "
CREATE TABLE render_owners (key TEXT PRIMARY KEY, owner TEXT NOT NULL) STRICT;
CREATE TABLE volume_owners (pool TEXT NOT NULL, name TEXT NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (pool, name)) STRICT;
CREATE INDEX volume_owners_by_owner ON volume_owners (owner);
CREATE TRIGGER volume_gets_owner AFTER INSERT ON volumes BEGIN
  INSERT INTO volume_owners SELECT NEW.pool, NEW.name, owner FROM renders JOIN render_owners USING (key)
    WHERE renders.id = NEW.render_id AND NOT EXISTS (SELECT 1 FROM volume_owners WHERE pool = NEW.pool AND name = NEW.name);
END;
CREATE TRIGGER volume_loses_owner AFTER DELETE ON volumes BEGIN
  DELETE FROM volume_owners WHERE pool = OLD.pool AND name = OLD.name;
END;
CREATE TRIGGER render_loses_owner AFTER DELETE ON renders BEGIN
  DELETE FROM render_owners WHERE key = OLD.key;
END;
";

/// The step of the schema that makes idempotency keys their owners' (see [`owned_key`]). Those of renders without an owner stay as they are.
pub(super) const OWNED_KEYS: &str = "
UPDATE renders SET key = (SELECT owner FROM render_owners WHERE render_owners.key = renders.key) || char(31) || key
  WHERE key IN (SELECT key FROM render_owners);
UPDATE render_owners SET key = owner || char(31) || key;
";

/// Ends the owner in the key of a render. Nothing that a caller may choose as a key contains it.
const OWNER_END: char = '\u{1f}';

/// An idempotency key as the catalogue has it: two callers who choose the same one do not meet.
pub fn owned_key(owner: &str, key: &str) -> String {
    format!("{owner}{OWNER_END}{key}")
}

/// The caller's part of an idempotency key.
pub fn callers_key(key: &str) -> &str {
    key.rsplit(OWNER_END).next().unwrap_or(key)
}

/// What an owner has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Volumes of all roles.
    pub volumes: u64,
    /// Their virtual sizes together, bytes.
    pub virtual_bytes: u64,
    /// What was allocated for them when they were published, bytes.
    pub allocated_bytes: u64,
}

impl Catalog {
    /// Notes who starts the render of an idempotency key, for the admission that follows: writes keep their order, so that it is durable with that one at the
    /// latest and costs no flush of its own. A key whose render waits, runs or has succeeded keeps its owner.
    pub fn note_render_owner(&self, key: &str, owner: &str) -> Result<()> {
        let (key, owner) = (key.to_owned(), owner.to_owned());
        let note: Write = Box::new(move |connection| {
            connection
                .prepare_cached(
                    "INSERT OR REPLACE INTO render_owners SELECT ?1, ?2
                     WHERE NOT EXISTS (SELECT 1 FROM renders WHERE key=?1 AND state NOT IN ('failed','cancelled'))",
                )
                .and_then(|mut statement| statement.execute([key, owner]))
                .map_err(failed("note the owner of a render"))?;
            Ok(Box::new(|_| ()) as Reply)
        });
        let gone = || Error::internal(Stage::Store, "catalogue", "the writer thread is gone");
        self.writer.as_ref().ok_or_else(gone)?.send(note).map_err(|_| gone())
    }

    /// The owner of a volume.
    pub fn volume_owner(&self, pool: &str, name: &str) -> Result<Option<String>> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT owner FROM volume_owners WHERE pool=?1 AND name=?2")
                .and_then(|mut statement| statement.query_row([pool, name], |row| row.get(0)).optional())
                .map_err(failed("read the owner of a volume"))
        })
    }

    /// What an owner has.
    pub fn usage(&self, owner: &str) -> Result<Usage> {
        self.read(|connection| {
            connection
                .prepare_cached(
                    "SELECT count(*), coalesce(sum(json_extract(volume, '$.virtual_size_bytes')), 0),
                       coalesce(sum(json_extract(volume, '$.allocated_size_bytes')), 0)
                     FROM volume_owners JOIN volumes USING (pool, name) WHERE owner=?1",
                )
                .and_then(|mut statement| {
                    statement.query_row(params![owner], |row| {
                        let number = |index| row.get::<_, i64>(index).map(|value| u64::try_from(value).unwrap_or(0));
                        Ok(Usage { volumes: number(0)?, virtual_bytes: number(1)?, allocated_bytes: number(2)? })
                    })
                })
                .map_err(failed("add up what an owner has"))
        })
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    fn rows(connection: &Connection) -> Vec<(String, String)> {
        let mut statement = connection.prepare("SELECT name, owner FROM volume_owners ORDER BY name").expect("a statement");
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).expect("rows");
        rows.collect::<Result<_, _>>().expect("rows")
    }

    #[test]
    fn a_volume_is_its_renders_owners_and_stays_so_when_it_is_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("catalog.sqlite");
        let catalog = Catalog::open(&path).expect("opens");
        let volume = r#"{"virtual_size_bytes":4096,"allocated_size_bytes":1024}"#;
        let connection = Connection::open(&path).expect("opens");
        let render = |id: &str, key: &str, state: &str| {
            connection
                .execute(
                    "INSERT OR REPLACE INTO renders (id, key, spec, image_id, state, stage, created_ms) VALUES (?1,?2,'{}','img',?3,'',0)",
                    [id, key, state],
                )
                .expect("a render");
        };
        let make = |verb: &str, name: &str, render: &str| {
            let sql = format!("{verb} INTO volumes (pool, name, volume, mapping, image_id, render_id, created) VALUES ('a',?1,?2,'{{}}','img',?3,0)");
            connection.execute(&sql, [name, volume, render]).expect("a volume");
        };
        // Reading waits for what was written: usage() is asked behind each note.
        let note = |key: &str, owner: &str| {
            catalog.note_render_owner(key, owner).expect("noted");
            catalog.write(|_| Ok(())).expect("written");
        };
        note("k1", "one");
        render("r1", "k1", "running");
        note("k1", "thief");
        make("INSERT", "web1", "r1");
        make("INSERT", "web1-data", "r1");
        render("r0", "k0", "running");
        make("INSERT", "nobodys", "r0");
        assert_eq!(catalog.usage("one").expect("adds up"), Usage { volumes: 2, virtual_bytes: 8192, allocated_bytes: 2048 });
        assert_eq!(catalog.usage("thief").expect("adds up"), Usage::default());
        assert_eq!(catalog.volume_owner("a", "nobodys").expect("reads"), None);
        note("k2", "two");
        render("r2", "k2", "running");
        make("INSERT OR REPLACE", "web1", "r2");
        make("INSERT", "web2", "r2");
        assert_eq!(rows(&connection), [("web1", "one"), ("web1-data", "one"), ("web2", "two")].map(|(name, owner)| (name.into(), owner.into())));
        connection.execute("DELETE FROM volumes WHERE name='web1'", []).expect("deleted");
        make("INSERT", "web1", "r2");
        assert_eq!(catalog.volume_owner("a", "web1").expect("reads").as_deref(), Some("two"), "the name was free in between");
        render("r1", "k1", "failed");
        note("k1", "second");
        render("r1", "k1", "running");
        make("INSERT", "web3", "r1");
        assert_eq!(catalog.volume_owner("a", "web3").expect("reads").as_deref(), Some("second"), "whoever tries again makes it");
    }
}

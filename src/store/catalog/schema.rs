//! The tables, and how older ones become them.

use rusqlite::Connection;

use super::{failed, owners};
use crate::error::{Error, Kind, Result, Stage};

/// Version of the tables, kept in `user_version`: every step adds one.
const SCHEMA_VERSION: i64 = 7;

const SCHEMA: &str = "
CREATE TABLE images (
  id TEXT PRIMARY KEY, manifest TEXT NOT NULL, rootfs_url TEXT, rootfs_digest TEXT, rootfs_size INTEGER, media_type TEXT, created INTEGER NOT NULL
) STRICT;
CREATE TABLE blobs (digest TEXT PRIMARY KEY, size INTEGER NOT NULL, created INTEGER NOT NULL, last_used INTEGER NOT NULL) STRICT;
CREATE TABLE goldens (
  key TEXT PRIMARY KEY, spec TEXT NOT NULL, image_id TEXT NOT NULL, digest TEXT NOT NULL, allocated INTEGER NOT NULL, built TEXT NOT NULL,
  created INTEGER NOT NULL, last_used INTEGER NOT NULL
) STRICT;
CREATE TABLE renders (
  id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, image_id TEXT NOT NULL, instance TEXT, pool TEXT, volume TEXT,
  state TEXT NOT NULL, stage TEXT NOT NULL, failure TEXT, golden_key TEXT, created_ms INTEGER NOT NULL, started_ms INTEGER, finished_ms INTEGER
) STRICT;
CREATE INDEX renders_by_time ON renders (created_ms, id);
CREATE INDEX renders_by_state ON renders (state);
CREATE TABLE volumes (
  pool TEXT NOT NULL, name TEXT NOT NULL, volume TEXT NOT NULL, mapping TEXT NOT NULL, image_id TEXT NOT NULL, render_id TEXT NOT NULL,
  golden_key TEXT, created INTEGER NOT NULL, role TEXT NOT NULL DEFAULT 'root', root_pool TEXT, root_name TEXT, secret BLOB,
  PRIMARY KEY (pool, name)
) STRICT;
CREATE INDEX volumes_by_time ON volumes (created);
CREATE INDEX volumes_by_golden ON volumes (golden_key);
CREATE INDEX volumes_by_render ON volumes (render_id);
CREATE INDEX volumes_by_image ON volumes (image_id);
CREATE INDEX volumes_by_root ON volumes (root_pool, root_name);
";

/// From version 1 to 2: an instance has further volumes, which refer to its root.
const FROM_1: &str = "
ALTER TABLE volumes ADD COLUMN role TEXT NOT NULL DEFAULT 'root';
ALTER TABLE volumes ADD COLUMN root_pool TEXT;
ALTER TABLE volumes ADD COLUMN root_name TEXT;
ALTER TABLE volumes ADD COLUMN secret BLOB;
CREATE INDEX volumes_by_root ON volumes (root_pool, root_name);
";

/// From version 2 to 3: what is begun and not finished (`journal`), and who wants what to stay (`leases`).
const FROM_2: &str = "
CREATE TABLE journal (
  seq INTEGER PRIMARY KEY, what TEXT NOT NULL, subject TEXT NOT NULL, detail TEXT NOT NULL, since INTEGER NOT NULL, secret BLOB,
  UNIQUE (what, subject)
) STRICT;
CREATE TABLE leases (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, object TEXT NOT NULL, owner TEXT NOT NULL, reason TEXT NOT NULL, created INTEGER NOT NULL, expires INTEGER
) STRICT;
CREATE INDEX leases_by_object ON leases (kind, object);
";

/// From version 5 to 6: who vouches for the bytes of a digest as they come from a place.
const FROM_5: &str = "
CREATE TABLE signers (digest TEXT NOT NULL, url TEXT NOT NULL, signer TEXT NOT NULL, PRIMARY KEY (digest, url)) STRICT;
";

/// From version 6 to 7: what the reader of an image's manifest found.
const FROM_6: &str = "
CREATE TABLE readings (image_id TEXT PRIMARY KEY, judged TEXT NOT NULL) STRICT;
";

/// Makes the tables of a new catalogue, or brings those of an older cloudletd up to date. `Kind::Unsupported` when a newer one made them.
pub(super) fn prepare(connection: &Connection, object: &str) -> Result<()> {
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed("read schema version"))?;
    // A new catalogue has the tables of version 2 at once; what came later is added to either.
    let steps: &[&str] = match version {
        0 => &[SCHEMA, FROM_2, owners::TABLES, FROM_5, FROM_6],
        1 => &[FROM_1, FROM_2, owners::TABLES, FROM_5, FROM_6],
        2 => &[FROM_2, owners::TABLES, FROM_5, FROM_6],
        3 => &[owners::TABLES, FROM_5, FROM_6],
        4 => &[owners::OWNED_KEYS, FROM_5, FROM_6],
        5 => &[FROM_5, FROM_6],
        6 => &[FROM_6],
        SCHEMA_VERSION => return Ok(()),
        other => {
            let message = format!("the catalogue has schema version {other}, this cloudletd knows {SCHEMA_VERSION}");
            return Err(Error::new(Kind::Unsupported, Stage::Store, object, message).with_hint("use the cloudletd that wrote it, or a newer one"));
        }
    };
    let change = steps.concat();
    connection.execute_batch(&format!("BEGIN; {change} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")).map_err(failed("make tables"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::catalog::Catalog;

    /// The volumes table of version 1, as the first cloudletd made it.
    const VOLUMES_1: &str = "CREATE TABLE volumes (
        pool TEXT NOT NULL, name TEXT NOT NULL, volume TEXT NOT NULL, mapping TEXT NOT NULL, image_id TEXT NOT NULL, render_id TEXT NOT NULL,
        golden_key TEXT, created INTEGER NOT NULL, PRIMARY KEY (pool, name)
    ) STRICT;";

    #[test]
    fn a_catalogue_of_the_first_version_keeps_its_volumes() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("catalog.sqlite");
        let mapping = r#"{"version":1,"instance":"web1","render_id":"rnd-1","image_id":"img-1","devices":[],"injected":null,"created_secs":7,
            "identity":{"instance_uuid":"u","machine_id":"m","hostname":null,"ssh_fingerprints":[],"known_hosts":[]}}"#;
        let volume = r#"{"pool":"default","name":"web1","format":"raw","path":"/p/web1.raw","device":"/p/web1.raw","virtual_size_bytes":4096,
            "allocated_size_bytes":0,"backing":null,"pinned":null}"#;
        let old = Connection::open(&path).expect("opens");
        old.execute_batch(VOLUMES_1).expect("tables");
        old.execute_batch("CREATE TABLE renders (id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE) STRICT;").expect("tables");
        old.execute("INSERT INTO volumes VALUES ('default','web1',?1,?2,'img-1','rnd-1',NULL,7)", [volume, mapping]).expect("a row");
        old.pragma_update(None, "user_version", 1).expect("a version");
        drop(old);
        let catalog = Catalog::open(&path).expect("is brought up to date");
        let record = catalog.volume("default", "web1").expect("reads").expect("is there");
        assert_eq!((record.role.name(), record.root, record.seed), ("root", None, None));
        assert!(catalog.volumes_of_root("default", "web1").expect("reads").is_empty());
        drop(catalog);
        assert!(Catalog::open(&path).is_ok(), "and stays so");
    }

    #[test]
    fn keys_become_their_owners() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("catalog.sqlite");
        let old = Connection::open(&path).expect("opens");
        old.execute_batch(&[SCHEMA, FROM_2, owners::TABLES].concat()).expect("tables");
        for (id, key) in [("rnd-1", "deploy-1"), ("rnd-2", "deploy-2")] {
            let sql = "INSERT INTO renders (id, key, spec, image_id, state, stage, created_ms) VALUES (?1,?2,'{}','img-1','succeeded','commit',0)";
            old.execute(sql, [id, key]).expect("a row");
        }
        old.execute("INSERT INTO render_owners VALUES ('deploy-1','uid:0')", []).expect("a row");
        old.pragma_update(None, "user_version", 4).expect("a version");
        drop(old);
        let catalog = Catalog::open(&path).expect("is brought up to date");
        let id_of = |key: &str| catalog.render_by_key(key).expect("reads").map(|render| render.id);
        assert_eq!(id_of(&owners::owned_key("uid:0", "deploy-1")).as_deref(), Some("rnd-1"));
        assert_eq!(id_of("deploy-1"), None);
        assert_eq!(id_of("deploy-2").as_deref(), Some("rnd-2"), "nobody's");
        let owner: String = catalog
            .read(|connection| {
                connection.query_row("SELECT owner FROM render_owners JOIN renders USING (key)", [], |row| row.get(0)).map_err(failed("read"))
            })
            .expect("an owner");
        assert_eq!(owner, "uid:0");
    }

    #[test]
    fn a_catalogue_of_the_future_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("catalog.sqlite");
        Connection::open(&path).and_then(|db| db.pragma_update(None, "user_version", SCHEMA_VERSION + 1)).expect("a version");
        let error = Catalog::open(&path).err().expect("refused");
        assert_eq!(error.kind(), Kind::Unsupported);
    }
}

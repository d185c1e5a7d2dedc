//! Leases: somebody wants an image, a golden or a blob to stay, says who and why, and perhaps until when.
//!
//! Volumes need none: that an overlay lies over a golden is in its own row.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Catalog, failed, rows::all};
use crate::{error::Result, names::Digest, store::gc::Kept};

/// What a lease holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// An image: its blob and every golden that was first built for it.
    Image,
    /// A golden.
    Golden,
    /// A blob.
    Blob,
}

impl Held {
    /// The name in the catalogue and the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Held::Image => "image",
            Held::Golden => "golden",
            Held::Blob => "blob",
        }
    }

    fn of(name: &str) -> Held {
        match name {
            "image" => Held::Image,
            "golden" => Held::Golden,
            _ => Held::Blob,
        }
    }
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// `lse-` and 20 hexadecimal digits.
    pub id: String,
    /// What kind of thing it holds.
    pub kind: Held,
    /// Image id, golden key (64 hexadecimal digits) or blob digest (`sha256:…`).
    pub object: String,
    /// Who wants it.
    pub owner: String,
    /// Why.
    pub reason: String,
    /// Seconds since 1970.
    pub created: i64,
    /// When it ends, seconds since 1970; none for never.
    pub expires: Option<i64>,
}

const COLUMNS: &str = "id, kind, object, owner, reason, created, expires";

fn lease_of(row: &Row<'_>) -> rusqlite::Result<Lease> {
    Ok(Lease {
        id: row.get(0)?,
        kind: Held::of(&row.get::<_, String>(1)?),
        object: row.get(2)?,
        owner: row.get(3)?,
        reason: row.get(4)?,
        created: row.get(5)?,
        expires: row.get(6)?,
    })
}

impl Catalog {
    /// Adds a lease.
    pub fn add_lease(&self, lease: Lease) -> Result<()> {
        self.write(move |connection| {
            let Lease { id, kind, object, owner, reason, created, expires } = &lease;
            connection
                .execute("INSERT INTO leases VALUES (?1,?2,?3,?4,?5,?6,?7)", params![id, kind.name(), object, owner, reason, created, expires])
                .map(|_| ())
                .map_err(failed("add a lease"))
        })
    }

    /// Ends a lease; `false` when there was none of that id.
    pub fn release_lease(&self, id: &str) -> Result<bool> {
        let id = id.to_owned();
        self.write(move |connection| {
            connection.execute("DELETE FROM leases WHERE id=?1", [id]).map(|rows| rows > 0).map_err(failed("release a lease"))
        })
    }

    /// All leases, oldest first, those that ended and are not swept yet included.
    pub fn leases(&self) -> Result<Vec<Lease>> {
        self.read(|connection| all(connection, &format!("SELECT {COLUMNS} FROM leases ORDER BY created, id"), [], lease_of))
    }

    /// Forgets the leases that ended by `now`; returns how many.
    pub fn drop_expired_leases(&self, now: i64) -> Result<usize> {
        self.write(move |connection| connection.execute("DELETE FROM leases WHERE expires <= ?1", [now]).map_err(failed("drop ended leases")))
    }
}

/// A lease that holds this golden or blob now, directly or through an image.
pub(super) fn holding(connection: &Connection, kind: Kept, object: Digest, now: i64) -> Result<Option<Lease>> {
    let (own, name, images) = match kind {
        Kept::Golden => ("golden", object.hex(), "SELECT image_id FROM goldens WHERE key=?1"),
        Kept::Blob => ("blob", object.to_string(), "SELECT id FROM images WHERE rootfs_digest=?1"),
    };
    let sql = format!(
        "SELECT {COLUMNS} FROM leases WHERE (expires IS NULL OR expires > ?3) AND ((kind=?2 AND object=?1) OR (kind='image' AND object IN ({images}))) LIMIT 1"
    );
    connection
        .prepare_cached(&sql)
        .and_then(|mut statement| statement.query_row(params![name, own, now], lease_of).optional())
        .map_err(failed("look for leases"))
}

//! simplestreams: the catalogue format that Ubuntu, linuxcontainers.org and OpenStack's tools publish and read, in both directions.
//!
//! ```text
//! index:1.0 ──▶ products:1.0 ──▶ product ─ version ─ item {path, sha256, size, ftype}
//!   document  what a tree says, bounded, with inheritance and aliases resolved
//!   filter    which items of it are wanted, in sstream-query's words
//!   path      where an item is: below the mirror's root and nowhere else
//!   date      `updated`, which only ever moves forward
//!   tree      a source's documents: fetched, verified, fresh, kept
//!   import    a version of a product as an image
//!   sync      the catalogue in step with a source
//!
//! names ─ blobs ─ platforms ──▶ publish ──▶ DIRECTORY ──▶ serve, or any web server
//!   publish   the host's own tree, swapped in as a whole
//!   platforms instance types as a products document
//!   signing   clear-signatures
//! ```
//!
//! A tree is a stranger's, even when it is signed: every document has a limit on its bytes, depth and number of entries, names are data, paths are
//! refused rather than repaired. What the format leaves open is decided as simplestreams' own Python does it, because that is what publishers test with.

pub mod date;
pub mod document;
pub mod filter;
pub mod import;
pub mod path;
pub mod platforms;
pub mod publish;
pub mod serve;
pub mod signing;
pub mod sync;
pub mod tree;

pub use document::{Index, ItemRef, Limits, Products};
pub use filter::Filters;
pub use path::StreamPath;
pub use reqwest::Url;

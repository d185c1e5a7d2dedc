//! cloudletd: a cloudlet (a JSON manifest naming a root filesystem tarball) plus an instance's configuration become a bootable disk on local storage,
//! and the answer is the block-device mapping of what was made.
//!
//! # The pipeline
//!
//! A render is a sequence of values; each stage consumes the previous one, so a skipped step does not compile.
//!
//! ```text
//!  gRPC (api) ──▶ spec::RenderSpec      validated once; nothing after it re-checks
//!                      │  render::jobs  admitted under an idempotency key, durable before the caller has an answer
//!                      ▼
//!  render::resolve  Resolved            image → manifest, pool, args, golden spec
//!  render::fetch    Fetched             tarball in the store, its digest checked as it arrived (source, store::blobs)
//!  render::golden   LoadedGolden        tar stream → filesystem in one pass, built once per key, the same bytes everywhere (tree, ext4, fs, disk)
//!  render::inject   Injected            facts + instance configuration → edits and report; pure but for templates (guest, worker)
//!  fs edit          BlockPatch          the 4 KiB blocks that edits, identity and size change; the golden is only read (ext4::edit, fs::mounted)
//!  target           Volume              golden + patch → staged → published, durable; the only writer of volumes
//!  render::volume   Mapping             what exists now; kept, and given in the dialects of hypervisors' tools (mapping)
//! ```
//!
//! # Invariants
//!
//! - Nothing outside [`host`] imports `std::process`, mount or ioctl code, but for the mount worker that [`fs::mounted`] starts through it; nothing outside
//!   [`target`] writes to a volume. `unsafe` is in `host::sys` only.
//! - What strangers wrote (archives, manifests, templates, signatures, documents of streams, filesystems of guests) is read by processes of [`worker`], which can
//!   do nothing else; what one of them says is believed of the object it was asked about and of no other.
//! - A daemon with a keeper ([`host::keeper`]) has no privileges: it asks that process, which opens what its own configuration names.
//! - A guest's path ([`names::GuestPath`]) never becomes a path of the host. The only filesystems that are ever mounted were made by mkfs on this host a moment
//!   ago, in the private mount namespace of a child.
//! - Golden images are immutable, named by the hash of everything that decides their bytes ([`store::records::GoldenSpec`]).
//! - Identities are inputs, derived (UUIDv5) or given; only the seed of SSH host keys and render ids are drawn, at the edge.
//! - A volume is absent, staged under a temporary name, or complete and durable.
//! - A dropped call stops nothing. Cancel is explicit, and what it leaves behind is nothing.
//!
//! # Reading order
//!
//! [`error`], [`names`], [`units`]; [`spec`], [`render`]; [`tree`], [`fs`], [`ext4`]; [`guest`], [`manifest`]; [`target`], [`disk`], [`mapping`]; [`store`],
//! [`source`], [`share`], [`host`]; [`api`], [`server`], [`config`].

#![deny(unsafe_code, missing_docs)]

pub mod api;
pub mod boot;
pub mod config;
pub mod disk;
pub mod error;
pub mod ext4;
pub mod failpoint;
pub mod fs;
pub mod guest;
pub mod host;
pub mod images;
pub mod manifest;
pub mod mapping;
pub mod matching;
pub mod names;
pub mod progress;
pub mod proto;
pub mod render;
pub mod server;
pub mod share;
pub mod source;
pub mod spec;
pub mod store;
pub mod streams;
pub mod target;
pub mod telemetry;
pub mod tree;
pub mod trust;
pub mod units;
pub mod volume;
pub mod worker;

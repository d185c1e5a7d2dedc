//! What the daemon and its mount worker say to each other over a socket.
//!
//! ```text
//! frame    length of document, u32 LE | length of data, u32 LE | document, JSON | data
//! build    ► Build             ◄ Ok     ► Entry (► data…)   ◄ Ok | Failed   …   ► Finish  ◄ Built
//! read     ► Read              ◄ Ok     ► Get | List        ◄ Content (◄ data…) | Nothing | Names | Failed   …   ► Finish  ◄ Ok
//! edit     ► Edit              ◄ Ready (the FUSE file is mounted)   ► Op (► data)   ◄ Ok | Failed   …   ► Finish  ◄ Ok
//! ```
//!
//! Every request gets one answer. File data follows its entry in frames without a document. The daemon closing the socket means: give up. Both ends
//! are the same program, so the format has no versions; the limits are there all the same.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{BuildParams, FsKind, Profile, edit::Attrs, edit::EditOp},
    names::GuestPath,
    tree::{Entry, EntryKind, Meta, Span, Xattr},
    units::Timestamp,
};

/// Bytes of a document: an entry with the largest set of xattrs Linux allows has under 1 MiB of values, a few bytes of text each.
const DOCUMENT_BYTES_MAX: u32 = 64 << 20;
/// Bytes of data per frame.
pub(super) const DATA_BYTES_MAX: usize = 1 << 20;

/// From the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Make a filesystem in the file on standard input.
    Build(BuildJob),
    /// Change a filesystem through the FUSE connection on standard input.
    Edit(EditJob),
    /// Look things up in the finished filesystem on standard input.
    Read(ReadJob),
    /// The content of a file, unless it has more bytes than `len_max`.
    Get { path: Vec<u8>, len_max: u64 },
    /// The names in a directory.
    List { path: Vec<u8> },
    /// One member of the tree.
    Entry(WireEntry),
    /// One edit; contents are in the frame's data.
    Op(WireOp),
    /// Complete it.
    Finish,
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// Done.
    Ok,
    /// The FUSE file is mounted: serve it.
    Ready,
    /// The filesystem is complete and unmounted.
    Built {
        /// See [`crate::fs::BuiltFs`].
        used_bytes: u64,
        /// See [`crate::fs::BuiltFs`].
        inodes: u64,
    },
    /// A file of so many bytes, which follow.
    Content {
        /// Bytes.
        len: u64,
    },
    /// There is no such file.
    Nothing,
    /// What is in a directory.
    Names(Vec<String>),
    /// Not done.
    Failed(WireError),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct BuildJob {
    pub kind: FsKind,
    pub offset: u64,
    pub len: u64,
    pub uuid: [u8; 16],
    pub hash_seed: [u8; 16],
    pub label: String,
    pub profile: Profile,
    pub epoch_secs: i64,
    pub bytes_per_inode: u32,
}

impl BuildJob {
    pub fn new(kind: FsKind, offset: u64, len: u64, params: &BuildParams) -> Self {
        let BuildParams { uuid, hash_seed, label, profile, epoch_secs, bytes_per_inode } = params.clone();
        BuildJob { kind, offset, len, uuid, hash_seed, label, profile, epoch_secs, bytes_per_inode }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ReadJob {
    pub kind: FsKind,
    pub offset: u64,
    pub len: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct EditJob {
    pub kind: FsKind,
    pub uuid: Option<[u8; 16]>,
    pub label: Option<String>,
    pub grow: bool,
    pub now: (i64, u32),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WireKind {
    Directory,
    File { size: u64, spans: Vec<(u64, u64)> },
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

type WireXattrs = Vec<(Vec<u8>, Vec<u8>)>;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WireEntry {
    path: Vec<u8>,
    kind: WireKind,
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: WireXattrs,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WireAttrs {
    mode: u16,
    uid: u32,
    gid: u32,
    xattrs: WireXattrs,
}

/// An edit without its content, which may be large and secret.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WireOp {
    WriteFile { path: Vec<u8>, attrs: WireAttrs },
    AppendFile { path: Vec<u8> },
    MakeDir { path: Vec<u8>, attrs: WireAttrs },
    Symlink { path: Vec<u8>, target: Vec<u8>, attrs: WireAttrs },
    Remove { path: Vec<u8> },
    SetAttrs { path: Vec<u8>, mode: Option<u16>, owner: Option<(u32, u32)> },
    SetXattr { path: Vec<u8>, name: Vec<u8>, value: Option<Vec<u8>> },
    Rename { path: Vec<u8>, to: Vec<u8> },
}

fn xattrs_out(xattrs: &[Xattr]) -> WireXattrs {
    xattrs.iter().map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect()
}

fn xattrs_in(xattrs: WireXattrs) -> Vec<Xattr> {
    xattrs.into_iter().map(|(name, value)| Xattr { name, value }).collect()
}

pub(super) fn path_in(path: &[u8]) -> Result<GuestPath> {
    GuestPath::new(path).map_err(|why| Error::internal(Stage::Host, "mount worker", why))
}

impl From<&Attrs> for WireAttrs {
    fn from(attrs: &Attrs) -> Self {
        WireAttrs { mode: attrs.mode, uid: attrs.uid, gid: attrs.gid, xattrs: xattrs_out(&attrs.xattrs) }
    }
}

impl From<WireAttrs> for Attrs {
    fn from(attrs: WireAttrs) -> Self {
        Attrs { mode: attrs.mode, uid: attrs.uid, gid: attrs.gid, xattrs: xattrs_in(attrs.xattrs) }
    }
}

impl From<&Entry> for WireEntry {
    fn from(entry: &Entry) -> Self {
        let kind = match &entry.kind {
            EntryKind::Directory => WireKind::Directory,
            EntryKind::File { size, spans } => WireKind::File { size: *size, spans: spans.iter().map(|span| (span.offset, span.len)).collect() },
            EntryKind::Symlink { target } => WireKind::Symlink(target.clone()),
            EntryKind::HardLink { target } => WireKind::HardLink(target.as_bytes().to_vec()),
            EntryKind::CharDevice { major, minor } => WireKind::Char(*major, *minor),
            EntryKind::BlockDevice { major, minor } => WireKind::Block(*major, *minor),
            EntryKind::Fifo => WireKind::Fifo,
            EntryKind::Socket => WireKind::Socket,
        };
        let Meta { mode, uid, gid, mtime, xattrs } = &entry.meta;
        let (path, mtime) = (entry.path.as_bytes().to_vec(), (mtime.secs, mtime.nanos));
        WireEntry { path, kind, mode: *mode, uid: *uid, gid: *gid, mtime, xattrs: xattrs_out(xattrs) }
    }
}

impl TryFrom<WireEntry> for Entry {
    type Error = Error;

    fn try_from(wire: WireEntry) -> Result<Self> {
        let kind = match wire.kind {
            WireKind::Directory => EntryKind::Directory,
            WireKind::File { size, spans } => EntryKind::File { size, spans: spans.into_iter().map(|(offset, len)| Span { offset, len }).collect() },
            WireKind::Symlink(target) => EntryKind::Symlink { target },
            WireKind::HardLink(target) => EntryKind::HardLink { target: path_in(&target)? },
            WireKind::Char(major, minor) => EntryKind::CharDevice { major, minor },
            WireKind::Block(major, minor) => EntryKind::BlockDevice { major, minor },
            WireKind::Fifo => EntryKind::Fifo,
            WireKind::Socket => EntryKind::Socket,
        };
        let mtime = Timestamp { secs: wire.mtime.0, nanos: wire.mtime.1 };
        let meta = Meta { mode: wire.mode, uid: wire.uid, gid: wire.gid, mtime, xattrs: xattrs_in(wire.xattrs) };
        Ok(Entry { path: path_in(&wire.path)?, kind, meta })
    }
}

impl WireOp {
    /// The edit's form on the wire, and the content that goes beside it.
    pub fn new<'a>(path: &GuestPath, op: &'a EditOp) -> (Self, &'a [u8]) {
        let path = path.as_bytes().to_vec();
        match op {
            EditOp::WriteFile { content, attrs } => (WireOp::WriteFile { path, attrs: attrs.into() }, content),
            EditOp::AppendFile { content } => (WireOp::AppendFile { path }, content),
            EditOp::MakeDir { attrs } => (WireOp::MakeDir { path, attrs: attrs.into() }, &[]),
            EditOp::Symlink { target, attrs } => (WireOp::Symlink { path, target: target.clone(), attrs: attrs.into() }, &[]),
            EditOp::Remove => (WireOp::Remove { path }, &[]),
            EditOp::SetAttrs { mode, owner } => (WireOp::SetAttrs { path, mode: *mode, owner: *owner }, &[]),
            EditOp::SetXattr { name, value } => (WireOp::SetXattr { path, name: name.clone(), value: value.clone() }, &[]),
            EditOp::Rename { to } => (WireOp::Rename { path, to: to.as_bytes().to_vec() }, &[]),
        }
    }

    /// The edit again.
    pub fn into_op(self, content: Vec<u8>) -> Result<(GuestPath, EditOp)> {
        Ok(match self {
            WireOp::WriteFile { path, attrs } => (path_in(&path)?, EditOp::WriteFile { content, attrs: attrs.into() }),
            WireOp::AppendFile { path } => (path_in(&path)?, EditOp::AppendFile { content }),
            WireOp::MakeDir { path, attrs } => (path_in(&path)?, EditOp::MakeDir { attrs: attrs.into() }),
            WireOp::Symlink { path, target, attrs } => (path_in(&path)?, EditOp::Symlink { target, attrs: attrs.into() }),
            WireOp::Remove { path } => (path_in(&path)?, EditOp::Remove),
            WireOp::SetAttrs { path, mode, owner } => (path_in(&path)?, EditOp::SetAttrs { mode, owner }),
            WireOp::SetXattr { path, name, value } => (path_in(&path)?, EditOp::SetXattr { name, value }),
            WireOp::Rename { path, to } => (path_in(&path)?, EditOp::Rename { to: path_in(&to)? }),
        })
    }
}

/// An error on its way to the daemon. Sources become text: their errnos were classified where they happened.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireError {
    kind: String,
    object: String,
    message: String,
    reason: String,
    hint: Option<String>,
}

/// Reasons that come from a worker beside those that follow from the kind.
const REASONS: [&str; 6] = ["TOOL_MISSING", "TOOL_FAILED", "TOOL_KILLED", "DEVICE_IN_USE", "GUEST_LINK_REFUSED", "XATTR_REFUSED"];

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        let chain = error.chain();
        let message = chain.strip_prefix(&format!("{}: ", error.object())).unwrap_or(&chain).to_owned();
        let (kind, reason) = (format!("{:?}", error.kind()), error.reason().to_owned());
        WireError { kind, object: error.object().to_owned(), message, reason, hint: error.hint().map(str::to_owned) }
    }
}

impl WireError {
    pub fn into_error(self, stage: Stage) -> Error {
        let error = Error::new(Kind::told(&self.kind), stage, self.object, self.message).with_told_reason(&REASONS, &self.reason);
        match self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

/// Sends one frame.
pub(crate) fn send(to: &mut impl Write, document: Option<&impl Serialize>, data: &[u8]) -> io::Result<()> {
    let document = match document {
        Some(document) => serde_json::to_vec(document)?,
        None => Vec::new(),
    };
    let too_long = |_| io::Error::from_raw_os_error(libc::EMSGSIZE);
    to.write_all(&u32::try_from(document.len()).map_err(too_long)?.to_le_bytes())?;
    to.write_all(&u32::try_from(data.len()).map_err(too_long)?.to_le_bytes())?;
    to.write_all(&document)?;
    to.write_all(data)
}

/// Receives one frame; nothing when the other end has closed. The data is of at most `data_max` bytes.
pub(crate) fn receive<T: DeserializeOwned>(from: &mut impl Read, data_max: usize) -> io::Result<Option<(Option<T>, Vec<u8>)>> {
    let mut lengths = [0; 8];
    let mut got = 0;
    while got < lengths.len() {
        match from.read(&mut lengths[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let [a, b, c, d, e, f, g, h] = lengths;
    let (document_len, data_len) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    if document_len > DOCUMENT_BYTES_MAX || data_len as usize > data_max {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let mut document = vec![0; document_len as usize];
    from.read_exact(&mut document)?;
    let mut data = vec![0; data_len as usize];
    from.read_exact(&mut data)?;
    let document = if document.is_empty() { None } else { Some(serde_json::from_slice(&document)?) };
    Ok(Some((document, data)))
}

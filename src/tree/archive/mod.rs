//! Tar archives: bytes to [`Entry`] values, front to back, under limits.
//!
//! v7, ustar, GNU (long names, base-256 numbers, old sparse) and PAX (names, sizes, owners, nanoseconds, extended attributes, access control
//! lists, sparse 0.0, 0.1 and 1.0, global headers).
//!
//! ```text
//! stream   blocks and offsets ─┬─ header   one 512-byte header
//!                              ├─ pax      extended headers
//!                              ├─ sparse   maps to spans
//!                              ├─ member   header + extended headers → Entry
//!                              └─ data     handed to the sink as a reader
//! ```
//!
//! The header layout is tar-core's; its `Parser` is not used, because it keeps no sign and no nanoseconds of times, takes the size of a sparse
//! 1.0 member of more than 8 GiB wrongly, ends an extended header silently where its length is not a number, and goes on behind a lone zero block.
//!
//! # What is refused, and why
//!
//! One archive has to mean one tree. Wherever GNU tar, Python's tarfile and libarchive read the same bytes differently, the member is refused
//! with its name and offset instead of choosing a side (failures.md, rule 18): a key twice in an extended header, two extended headers, a GNU
//! long name beside a different PAX path, a size on something that has no data, extension types in v7 headers, blocks after the end.
//!
//! # Rules
//!
//! - A leading `/` is dropped; `..` and NUL are refused wherever they stand.
//! - A file of type `0`, `\0` or `7` whose name ends in a slash and which is empty is a directory, as v7 wrote them.
//! - What the filter leaves out is left out with everything below it. A hard link that is kept but whose target was left out is refused, naming
//!   both: the data is gone, and promoting the link would make the result depend on the order of members.
//! - Extended attributes outside `security.`, `trusted.`, `user.` and the two access control lists can't be stored on Linux (macOS archives have
//!   them); they are dropped and counted.
//! - The permission bits follow the access control list, as the kernel would make them on `setxattr`.
//! - An archive may end without its two zero blocks at the boundary of a member, as GNU tar accepts; inside a member it is truncated.

mod acl;
mod header;
mod left_out;
mod member;
mod pax;
mod sparse;
mod stream;
#[cfg(test)]
mod tests;

use std::io::Read;

use left_out::LeftOut;
use member::Members;
use stream::MemberData;

use super::{EntryKind, TreeSink};
use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
    progress::Progress,
    units::{GIB, KIB, MIB},
};

pub(super) use header::checksum_is_right;

/// Archives are read while a golden image is built.
const STAGE: Stage = Stage::Golden;

/// What an archive may cost. Going beyond is `Kind::NoSpace` with reason `ARCHIVE_LIMIT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Members, counting those left out. Every inode costs memory while the disk is laid out.
    pub entries: u64,
    /// Directories above a member. Nothing real comes near; deeper trees break the guest's own tools.
    pub depth: usize,
    /// Bytes of extended headers and long names of one member. They are held in memory.
    pub extension_bytes: u64,
    /// Bytes of one extended attribute: what Linux takes (`XATTR_SIZE_MAX`).
    pub xattr_value_bytes: usize,
    /// Bytes of names and values of all extended attributes of one member; ext4 keeps them in one block anyway, larger ones in inodes of their own.
    pub xattr_total_bytes: usize,
    /// Pairs in the sparse map of one member.
    pub sparse_pairs: u64,
    /// Size of one file with its holes. A sparse `/var/log/lastlog` has hundreds of gigabytes in honest archives.
    pub file_bytes: u64,
    /// Bytes of the whole archive, uncompressed.
    pub archive_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries: 2_000_000,
            depth: 512,
            extension_bytes: MIB,
            xattr_value_bytes: (64 * KIB) as usize,
            xattr_total_bytes: (256 * KIB) as usize,
            sparse_pairs: 200_000,
            file_bytes: 1024 * GIB,
            archive_bytes: 64 * GIB,
        }
    }
}

impl Limits {
    fn check_sparse_pairs(&self, count: u64) -> Result<(), Refusal> {
        if count > self.sparse_pairs {
            return Err(Refusal::limit(format!("the sparse map has {count} pairs or more, the limit is {}", self.sparse_pairs)));
        }
        Ok(())
    }
}

/// What an archive consisted of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Members given to the sink.
    pub entries: u64,
    /// Members left out by the filter.
    pub left_out: u64,
    /// Stored bytes of the files given to the sink, holes not counted.
    pub data_bytes: u64,
    /// Bytes of the archive, to its very end.
    pub archive_bytes: u64,
    /// Extended attributes that Linux has no place for.
    pub xattrs_dropped: u64,
}

/// Reads a whole archive into `sink`.
///
/// `filter` is asked with absolute guest paths and says `true` for what to leave out; what is below such a path is left out too, and `/` itself
/// never is. `progress` is asked whether to stop; it is not advanced, because only the reader below knows how long the input is.
///
/// Errors carry the member's name as object and its offset in the message: `Kind::Corrupt` for damage and ambiguity (reasons `ARCHIVE_CORRUPT`,
/// `ARCHIVE_TRUNCATED`, `ARCHIVE_AMBIGUOUS`), `Kind::Unsupported` for what this reader does not know (`ARCHIVE_UNSUPPORTED`, `ACL_NAME`),
/// `Kind::NoSpace` for limits (`ARCHIVE_LIMIT`), `Kind::InvalidRequest` for a hard link into what was left out (`HARD_LINK_LEFT_OUT`), and what
/// the input and the sink fail with. On success the input was read to its end.
pub fn read(
    input: &mut dyn Read,
    limits: &Limits,
    filter: &dyn Fn(&GuestPath) -> bool,
    sink: &mut dyn TreeSink,
    progress: &Progress,
) -> Result<Summary> {
    let mut summary = Summary::default();
    let mut left_out = LeftOut::new(filter);
    let mut members = Members::new(input, limits);
    let mut seen = 0;
    while let Some(member) = members.next(progress)? {
        let (entry, at) = (&member.entry, member.at);
        progress.check()?;
        seen += 1;
        if seen > limits.entries {
            return Err(Refusal::limit(format!("the archive has more than {} members", limits.entries)).at(at, &member.name));
        }
        let keep = !left_out.contains(&entry.path);
        if let EntryKind::HardLink { target } = &entry.kind
            && keep
            && left_out.contains(target)
        {
            return Err(hard_link_left_out(&entry.path, target, at));
        }
        let mut data = MemberData::new(members.stream(), progress, &member.name, member.stored);
        if keep {
            let taken = sink.entry(entry, &mut data);
            // When reading failed, that is the cause of whatever the sink reports.
            if let Some(failure) = data.take_failure() {
                return Err(failure);
            }
            taken?;
            summary.entries += 1;
            summary.data_bytes += member.stored;
            summary.xattrs_dropped += member.xattrs_dropped;
        } else {
            summary.left_out += 1;
        }
        data.skip_rest()?;
    }
    summary.archive_bytes = members.stream().offset();
    Ok(summary)
}

fn hard_link_left_out(path: &GuestPath, target: &GuestPath, at: u64) -> Error {
    let message = format!("the header at byte {at} of the archive: is a hard link to {target}, which the image's volatile patterns leave out");
    Error::new(Kind::InvalidRequest, STAGE, path.to_string(), message)
        .with_reason("HARD_LINK_LEFT_OUT")
        .with_hint("leave both names out, or none of them")
}

/// Why a member is not taken, before its name and offset are known.
#[derive(Debug)]
struct Refusal {
    kind: Kind,
    reason: &'static str,
    message: String,
    hint: Option<&'static str>,
}

impl Refusal {
    fn corrupt(message: impl Into<String>) -> Self {
        Refusal { kind: Kind::Corrupt, reason: "ARCHIVE_CORRUPT", message: message.into(), hint: None }
    }

    fn ambiguous(message: impl Into<String>) -> Self {
        Refusal::corrupt(message).reason("ARCHIVE_AMBIGUOUS")
    }

    fn unsupported(message: impl Into<String>) -> Self {
        Refusal { kind: Kind::Unsupported, reason: "ARCHIVE_UNSUPPORTED", message: message.into(), hint: None }
    }

    fn limit(message: impl Into<String>) -> Self {
        Refusal { kind: Kind::NoSpace, reason: "ARCHIVE_LIMIT", message: message.into(), hint: None }
    }

    fn reason(mut self, reason: &'static str) -> Self {
        self.reason = reason;
        self
    }

    fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }

    /// The error for the member `name` (may be unknown) whose header is at `offset`.
    fn at(self, offset: u64, name: &str) -> Error {
        let object = if name.is_empty() { "archive".to_owned() } else { format!("archive member {name:?}") };
        let error = Error::new(self.kind, STAGE, object, format!("at byte {offset}: {}", self.message)).with_reason(self.reason);
        match self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }
}

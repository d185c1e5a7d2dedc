//! From headers to members: collects the extended headers in front of a header and puts an [`Entry`] together.

use std::io::Read;

use super::{
    Limits, Refusal,
    acl::Acl,
    header::{Fields, Format, GnuSparse, device_numbers, until_nul},
    pax::{Pax, Scope, lossy},
    sparse::{self, PaxSparse, Sparse},
    stream::Stream,
};
use crate::{
    error::Result,
    names::GuestPath,
    progress::Progress,
    tree::{Entry, EntryKind, Meta, Span, Xattr},
};

/// Longest symlink target, bytes: `PATH_MAX` without its NUL (symlink(7)).
const SYMLINK_LEN_MAX: usize = 4095;

/// A member whose data comes next in the stream.
pub(super) struct Member {
    pub(super) entry: Entry,
    /// The name as the archive has it, for messages.
    pub(super) name: String,
    /// Where its header is.
    pub(super) at: u64,
    /// Bytes of data that follow.
    pub(super) stored: u64,
    pub(super) xattrs_dropped: u64,
}

/// What stands in front of a header.
#[derive(Default)]
struct Extensions {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Option<Pax>,
    bytes: u64,
}

impl Extensions {
    fn is_empty(&self) -> bool {
        self.long_name.is_none() && self.long_link.is_none() && self.pax.is_none()
    }
}

/// The members of an archive, one after another. The caller moves the stream over the data of each before asking for the next.
pub(super) struct Members<'a> {
    stream: Stream<'a>,
    limits: &'a Limits,
    global: Pax,
}

impl<'a> Members<'a> {
    pub(super) fn new(input: &'a mut dyn Read, limits: &'a Limits) -> Self {
        Members { stream: Stream::new(input, limits.archive_bytes), limits, global: Pax::default() }
    }

    pub(super) fn stream(&mut self) -> &mut Stream<'a> {
        &mut self.stream
    }

    /// The next member, or nothing after the end, when the input was read to its end.
    pub(super) fn next(&mut self, progress: &Progress) -> Result<Option<Member>> {
        let mut extensions = Extensions::default();
        loop {
            let at = self.stream.offset();
            let Some(block) = self.stream.block()? else {
                return self.at_end_of_input(at, &extensions);
            };
            if block == [0; 512] {
                return self.at_zero_block(at, &extensions, progress);
            }
            let fields = Fields::new(&block).map_err(|refusal| refusal.at(at, ""))?;
            if !self.take_extension(&fields, &mut extensions, at)? {
                return self.member(&fields, extensions, at).map(Some);
            }
            progress.check()?;
        }
    }

    fn at_end_of_input(&self, at: u64, extensions: &Extensions) -> Result<Option<Member>> {
        if at == 0 {
            return Err(Refusal::corrupt("the archive is empty").reason("ARCHIVE_TRUNCATED").at(0, ""));
        }
        if !extensions.is_empty() {
            return Err(self.stream.truncated("after an extended header, before its member"));
        }
        Ok(None)
    }

    /// One zero block announces the end, the second confirms it. GNU tar and Python stop at a lone one, others go on: only zeros may follow.
    fn at_zero_block(&mut self, at: u64, extensions: &Extensions, progress: &Progress) -> Result<Option<Member>> {
        if !extensions.is_empty() {
            return Err(Refusal::corrupt("an extended header is followed by the end of the archive").at(at, ""));
        }
        self.stream.drain_zeros(progress)?;
        Ok(None)
    }

    /// Takes the header if it only describes the next one, or all that follow.
    fn take_extension(&mut self, fields: &Fields, extensions: &mut Extensions, at: u64) -> Result<bool> {
        let flag = fields.type_flag();
        if !matches!(flag, b'L' | b'K' | b'x' | b'g') {
            return Ok(false);
        }
        let refuse = |refusal: Refusal| refusal.at(at, &lossy(&fields.name()));
        if fields.format == Format::V7 {
            return Err(refuse(Refusal::ambiguous(format!("an extension of type {:?} in a v7 header", char::from(flag)))));
        }
        let size = fields.size().map_err(refuse)?;
        extensions.bytes = extensions.bytes.saturating_add(size);
        if extensions.bytes > self.limits.extension_bytes {
            let (bytes, max) = (extensions.bytes, self.limits.extension_bytes);
            return Err(refuse(Refusal::limit(format!("the extended headers of one member have {bytes} bytes, the limit is {max}"))));
        }
        let data = self.stream.padded(usize::try_from(size).unwrap_or(usize::MAX))?;
        let again = || refuse(Refusal::ambiguous(format!("two extensions of type {:?} for one member", char::from(flag))));
        match flag {
            b'L' => set_once(&mut extensions.long_name, c_string(&data).map_err(refuse)?).ok_or_else(again)?,
            b'K' => set_once(&mut extensions.long_link, c_string(&data).map_err(refuse)?).ok_or_else(again)?,
            b'x' => set_once(&mut extensions.pax, Pax::parse(&data, Scope::Member, self.limits).map_err(refuse)?).ok_or_else(again)?,
            _ if !extensions.is_empty() => {
                return Err(refuse(Refusal::ambiguous("a global header between an extended header and its member")));
            }
            _ => self.global.update_global(Pax::parse(&data, Scope::Global, self.limits).map_err(refuse)?),
        }
        Ok(true)
    }

    fn member(&mut self, fields: &Fields, extensions: Extensions, at: u64) -> Result<Member> {
        // Before the other fields, which such members may leave blank.
        if !is_known_type(fields.type_flag()) {
            return Err(unknown_type(fields.type_flag()).at(at, &shown(&fields.name())));
        }
        let Extensions { long_name, long_link, pax, .. } = extensions;
        let mut pax = pax.unwrap_or_default();
        let early_name = lossy(&fields.name());
        let refuse = |refusal: Refusal| refusal.at(at, &early_name);
        let raw_name = one_name("path", fields.name(), long_name, pax.sparse.name.take().or(pax.path.take())).map_err(refuse)?;
        let name = shown(&raw_name);
        let refuse = |refusal: Refusal| refusal.at(at, &name);
        let link = one_name("linkpath", fields.link_name().to_vec(), long_link, pax.linkpath.take()).map_err(refuse)?;
        let path = GuestPath::from_member(&raw_name).map_err(|text| refuse(Refusal::corrupt(text)))?;
        let depth = path.components().count();
        if depth > self.limits.depth {
            return Err(refuse(Refusal::limit(format!("{depth} directories deep, the limit is {}", self.limits.depth))));
        }
        let size = size(fields, &pax).map_err(refuse)?;
        let (kind, stored) = self.kind(fields, &pax, &raw_name, link, size, (at, &name))?;
        let (meta, xattrs_dropped) = meta(fields, pax, &self.global, &kind, self.limits).map_err(refuse)?;
        Ok(Member { entry: Entry { path, kind, meta }, at, stored, xattrs_dropped, name })
    }

    /// What the member is, and how many bytes of data it has.
    fn kind(&mut self, fields: &Fields, pax: &Pax, raw_name: &[u8], link: Vec<u8>, size: u64, place: (u64, &str)) -> Result<(EntryKind, u64)> {
        let refuse = |refusal: Refusal| refusal.at(place.0, place.1);
        let flag = fields.type_flag();
        if pax.sparse.is_used() && !matches!(flag, b'0' | 0 | b'7') {
            return Err(refuse(Refusal::ambiguous(format!("a sparse map on a member of type {}", type_name(flag)))));
        }
        let kind = match flag {
            b'0' | 0 | b'7' if raw_name.last() == Some(&b'/') => {
                // v7 had no type for directories. With data in it, some would skip the data and others read it as headers.
                no_data(size, "directory").map_err(refuse)?;
                EntryKind::Directory
            }
            b'0' | 0 | b'7' => return self.file(pax, size, place),
            b'S' => return self.gnu_sparse_file(fields, size, place),
            b'1' => {
                EntryKind::HardLink { target: GuestPath::from_member(&link).map_err(|text| refuse(Refusal::corrupt(format!("hard link: {text}"))))? }
            }
            b'2' => EntryKind::Symlink { target: symlink_target(link).map_err(refuse)? },
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'3' | b'4' => {
                let (major, minor) = fields.device().map_err(refuse)?;
                let (major, minor) = device_numbers((pax.dev_major.unwrap_or(major), pax.dev_minor.unwrap_or(minor))).map_err(refuse)?;
                if flag == b'3' { EntryKind::CharDevice { major, minor } } else { EntryKind::BlockDevice { major, minor } }
            }
            _ => return Err(refuse(unknown_type(flag))),
        };
        no_data(size, type_name(flag)).map_err(refuse)?;
        Ok((kind, 0))
    }

    fn file(&mut self, pax: &Pax, stored: u64, place: (u64, &str)) -> Result<(EntryKind, u64)> {
        let refuse = |refusal: Refusal| refusal.at(place.0, place.1);
        if !pax.sparse.is_used() {
            let spans = if stored == 0 { Vec::new() } else { vec![Span { offset: 0, len: stored }] };
            return self.checked_file(Sparse { size: stored, spans }, stored, place);
        }
        let size = pax.sparse.size.ok_or_else(|| refuse(Refusal::corrupt("a sparse member without its real size")))?;
        let (pairs, map_len) = match sparse::pax_format(&pax.sparse).map_err(refuse)? {
            PaxSparse::InData => sparse::map_in_data(&mut self.stream, stored, self.limits, place.1)?,
            PaxSparse::InKeys => (pax.sparse.pairs.clone().unwrap_or_default(), 0),
        };
        if pax.sparse.numblocks.is_some_and(|count| count != pairs.len() as u64) {
            return Err(refuse(Refusal::ambiguous("GNU.sparse.numblocks does not agree with the sparse map")));
        }
        let stored = stored.checked_sub(map_len).ok_or_else(|| refuse(Refusal::corrupt("the sparse map is longer than its member")))?;
        let sparse = sparse::checked(&pairs, size, stored).map_err(refuse)?;
        self.checked_file(sparse, stored, place)
    }

    fn gnu_sparse_file(&mut self, fields: &Fields, stored: u64, place: (u64, &str)) -> Result<(EntryKind, u64)> {
        let refuse = |refusal: Refusal| refusal.at(place.0, place.1);
        let GnuSparse { mut pairs, more, size } = fields.gnu_sparse().map_err(refuse)?;
        if more {
            sparse::gnu_extensions(&mut self.stream, &mut pairs, self.limits, place.1)?;
        }
        let sparse = sparse::checked(&pairs, size, stored).map_err(refuse)?;
        self.checked_file(sparse, stored, place)
    }

    fn checked_file(&self, Sparse { size, spans }: Sparse, stored: u64, place: (u64, &str)) -> Result<(EntryKind, u64)> {
        if size > self.limits.file_bytes {
            let text = format!("the file has {size} bytes, the limit is {}", self.limits.file_bytes);
            return Err(Refusal::limit(text).at(place.0, place.1));
        }
        Ok((EntryKind::File { size, spans }, stored))
    }
}

/// The size in force. A PAX size exists for what eleven octal digits can't hold (8 GiB and more); the field then has nothing, the most it can
/// hold, the low digits, or the number in base 256. Any other difference would make readers without PAX take data for headers.
fn size(fields: &Fields, pax: &Pax) -> Result<u64, Refusal> {
    const OCTAL_MAX: u64 = (1 << 33) - 1;
    let in_header = fields.size()?;
    match pax.size {
        Some(size) if size == in_header => Ok(size),
        Some(size) if size > OCTAL_MAX && [0, OCTAL_MAX, size & OCTAL_MAX].contains(&in_header) => Ok(size),
        Some(size) => Err(Refusal::ambiguous(format!("the extended header says {size} bytes, the header {in_header}"))),
        None => Ok(in_header),
    }
}

fn meta(fields: &Fields, pax: Pax, global: &Pax, kind: &EntryKind, limits: &Limits) -> Result<(Meta, u64), Refusal> {
    let (uid, gid) = match (pax.uid.or(global.uid), pax.gid.or(global.gid)) {
        (Some(uid), Some(gid)) => (uid, gid),
        (uid, gid) => {
            let (header_uid, header_gid) = fields.owner()?;
            (uid.unwrap_or(header_uid), gid.unwrap_or(header_gid))
        }
    };
    let mtime = match pax.mtime.or(global.mtime) {
        Some(mtime) => mtime,
        None => fields.mtime()?,
    };
    let mut mode = fields.mode()?;
    let mut dropped = 0;
    let mut xattrs = Vec::new();
    let (mut access, mut default) = (None, None);
    for (name, value) in pax.xattrs {
        match name.as_slice() {
            b"system.posix_acl_access" => access = Some(Acl::from_xattr(&value)?),
            b"system.posix_acl_default" => default = Some(Acl::from_xattr(&value)?),
            _ if has_place_on_linux(&name) => xattrs.push(Xattr { name, value }),
            _ => dropped += 1,
        }
    }
    access = one_acl(access, pax.acl_access.as_deref())?;
    default = one_acl(default, pax.acl_default.as_deref())?;
    if let Some(acl) = access
        && !matches!(kind, EntryKind::Symlink { .. })
    {
        mode = acl.mode(mode);
        if !acl.is_minimal() {
            xattrs.push(Xattr { name: b"system.posix_acl_access".to_vec(), value: acl.to_xattr() });
        }
    }
    if let Some(acl) = default
        && *kind == EntryKind::Directory
    {
        xattrs.push(Xattr { name: b"system.posix_acl_default".to_vec(), value: acl.to_xattr() });
    }
    xattrs.sort_unstable();
    let total: usize = xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    if total > limits.xattr_total_bytes {
        return Err(Refusal::limit(format!("the extended attributes have {total} bytes, the limit is {}", limits.xattr_total_bytes)));
    }
    Ok((Meta { mode, uid, gid, mtime, xattrs }, dropped))
}

/// The namespaces of xattr(7), without `system.`, whose only stored members are the access control lists.
fn has_place_on_linux(name: &[u8]) -> bool {
    [b"security.".as_slice(), b"trusted.", b"user."].iter().any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
}

fn one_acl(from_xattr: Option<Acl>, text: Option<&[u8]>) -> Result<Option<Acl>, Refusal> {
    let from_text = text.map(Acl::from_text).transpose()?;
    match (from_xattr, from_text) {
        (Some(one), Some(other)) if one != other => Err(Refusal::ambiguous("two different access control lists of one kind")),
        (one, other) => Ok(one.or(other)),
    }
}

/// The name in force. GNU and PAX extensions may not contradict each other.
fn one_name(what: &str, in_header: Vec<u8>, gnu: Option<Vec<u8>>, pax: Option<Vec<u8>>) -> Result<Vec<u8>, Refusal> {
    match (gnu, pax) {
        (Some(gnu), Some(pax)) if gnu != pax => {
            Err(Refusal::ambiguous(format!("the {what} is {:?} in a GNU and {:?} in a PAX extension", shown(&gnu), shown(&pax))))
        }
        (gnu, pax) => Ok(pax.or(gnu).unwrap_or(in_header)),
    }
}

fn no_data(size: u64, what: &str) -> Result<(), Refusal> {
    if size != 0 {
        // Some readers skip that many bytes, others expect the next header there.
        return Err(Refusal::ambiguous(format!("a {what} with a size of {size} bytes")));
    }
    Ok(())
}

fn symlink_target(target: Vec<u8>) -> Result<Vec<u8>, Refusal> {
    if target.is_empty() || target.len() > SYMLINK_LEN_MAX || target.contains(&0) {
        let len = target.len();
        return Err(Refusal::corrupt(format!("a symlink target of {len} bytes: 1 to {SYMLINK_LEN_MAX} without NUL are allowed")));
    }
    Ok(target)
}

/// The value of a GNU long name: ended by a NUL, and nothing but NULs after it.
fn c_string(data: &[u8]) -> Result<Vec<u8>, Refusal> {
    let name = until_nul(data);
    if name.is_empty() || data[name.len()..].iter().any(|byte| *byte != 0) {
        return Err(Refusal::corrupt("a GNU long name is empty or contains a NUL byte"));
    }
    Ok(name.to_vec())
}

fn set_once<T>(slot: &mut Option<T>, value: T) -> Option<()> {
    slot.is_none().then(|| *slot = Some(value))
}

/// A name for messages, shortened.
fn shown(name: &[u8]) -> String {
    lossy(&name[..name.len().min(256)])
}

fn is_known_type(flag: u8) -> bool {
    matches!(flag, 0 | b'0'..=b'7' | b'S')
}

fn unknown_type(flag: u8) -> Refusal {
    Refusal::unsupported(format!("a member of type {}, which is not known here", type_name(flag)))
        .hint("make the archive with tar --format=pax or --format=gnu, of one volume and not incremental")
}

fn type_name(flag: u8) -> &'static str {
    match flag {
        b'0' | 0 => "file",
        b'1' => "hard link",
        b'2' => "symlink",
        b'3' => "character device",
        b'4' => "block device",
        b'5' => "directory",
        b'6' => "fifo",
        b'7' => "contiguous file",
        b'S' => "sparse file",
        b'D' => "D (directory listing of an incremental GNU archive)",
        b'M' => "M (continuation from another GNU volume)",
        b'N' => "N (old GNU long name)",
        b'V' => "V (GNU volume label)",
        b'X' => "X (extended header of old Solaris)",
        b'A' => "A (access control list of Solaris)",
        b'E' => "E (extended attribute file of Solaris)",
        b'I' => "I (inode metadata of star)",
        _ => "that no standard knows, or a vendor's own",
    }
}

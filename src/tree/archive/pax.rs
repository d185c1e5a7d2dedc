//! Extended headers (pax(1), "pax Header Block"): records of `length key=value`, for one member (`x`) or all that follow (`g`).
//!
//! A key twice in one header, a length that does not fit, or a key that changes what a member is without our knowing it, are refused: such
//! archives are read differently by different tools (RUSTSEC-2025-0111 and its relatives). Keys that only describe are ignored.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;

use super::{Limits, Refusal, header::owner_id};
use crate::units::Timestamp;

/// Longest name of an extended attribute, bytes (include/uapi/linux/limits.h, `XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;

/// Whose header it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Type `x`: the next member.
    Member,
    /// Type `g`: every member that follows.
    Global,
}

/// What an extended header says. An absent value leaves the header block's value in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) dev_major: Option<u64>,
    pub(super) dev_minor: Option<u64>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Text form of `system.posix_acl_access`.
    pub(super) acl_access: Option<Vec<u8>>,
    /// Text form of `system.posix_acl_default`.
    pub(super) acl_default: Option<Vec<u8>>,
    pub(super) sparse: SparseKeys,
}

/// The `GNU.sparse.*` keys of the three PAX sparse formats.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SparseKeys {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    /// Size with the holes.
    pub(super) size: Option<u64>,
    pub(super) numblocks: Option<u64>,
    /// Format 0.0: repeated offset and numbytes. Format 0.1: the comma-separated map.
    pub(super) pairs: Option<Vec<(u64, u64)>>,
    pending_offset: Option<u64>,
}

impl SparseKeys {
    /// Whether any of them was there.
    pub(super) fn is_used(&self) -> bool {
        *self != SparseKeys::default()
    }
}

impl Pax {
    /// Reads the records. `global` keys are the few that make sense for every member.
    pub(super) fn parse(data: &[u8], scope: Scope, limits: &Limits) -> Result<Pax, Refusal> {
        let mut pax = Pax::default();
        let mut seen = BTreeSet::new();
        let mut rest = data;
        while !rest.is_empty() {
            let Record { key, value, after } = record(rest)?;
            rest = after;
            let repeats = matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes");
            if !repeats && !seen.insert(key) {
                return Err(Refusal::corrupt(format!("the extended header has {:?} twice", lossy(key))).reason("ARCHIVE_AMBIGUOUS"));
            }
            match scope {
                Scope::Member => pax.take_member(key, value, limits)?,
                Scope::Global => pax.take_global(key, value)?,
            }
        }
        if pax.sparse.pending_offset.is_some() {
            return Err(Refusal::corrupt("a GNU.sparse.offset without its GNU.sparse.numbytes"));
        }
        Ok(pax)
    }

    /// Lays a later global header over an earlier one.
    pub(super) fn update_global(&mut self, later: Pax) {
        self.uid = later.uid.or(self.uid);
        self.gid = later.gid.or(self.gid);
        self.mtime = later.mtime.or(self.mtime);
    }

    fn take_global(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        match key {
            b"uid" | b"gid" | b"mtime" => self.take_owner_or_time(key, value),
            b"hdrcharset" | b"charset" => check_charset(value),
            // Labels and names that don't change what a member is. git-archive writes the commit as a comment.
            b"comment" | b"uname" | b"gname" | b"atime" | b"ctime" | b"GNU.volume.label" => Ok(()),
            _ => Err(Refusal::unsupported(format!("a global extended header sets {:?} for every member", lossy(key)))),
        }
    }

    fn take_member(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Result<(), Refusal> {
        // An empty value deletes the record of a global header; ours has none of these keys but owner and time, where it means the same.
        match key {
            b"path" => self.path = name_value(key, value)?,
            b"linkpath" => self.linkpath = name_value(key, value)?,
            b"size" => self.size = Some(decimal(key, value)?),
            b"uid" | b"gid" | b"mtime" => self.take_owner_or_time(key, value)?,
            b"SCHILY.devmajor" => self.dev_major = Some(decimal(key, value)?),
            b"SCHILY.devminor" => self.dev_minor = Some(decimal(key, value)?),
            b"SCHILY.acl.access" => self.acl_access = Some(value.to_vec()).filter(|text| !text.is_empty()),
            b"SCHILY.acl.default" => self.acl_default = Some(value.to_vec()).filter(|text| !text.is_empty()),
            // GNU tar --selinux: the context as text; the attribute holds it with its final NUL, as libselinux writes it.
            b"RHT.security.selinux" => {
                let text = value.strip_suffix(b"\0").unwrap_or(value);
                self.add_xattr(b"security.selinux".to_vec(), [text, b"\0"].concat(), limits)?;
            }
            b"hdrcharset" | b"charset" => check_charset(value)?,
            b"SCHILY.realsize" | b"SCHILY.filetype" | b"GNU.dumpdir" | b"GNU.volume.filename" | b"GNU.volume.size" | b"GNU.volume.offset" => {
                return Err(Refusal::unsupported(format!("the extended header has {:?}, which changes what the member is", lossy(key))));
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.add_xattr(name.to_vec(), value.to_vec(), limits)?;
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    self.add_xattr(percent_decoded(name)?, base64_decoded(key, value)?, limits)?;
                } else if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.take(name, key, value, limits)?;
                }
            }
        }
        Ok(())
    }

    fn take_owner_or_time(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        if value.is_empty() {
            return Ok(());
        }
        match key {
            b"uid" => self.uid = Some(owner_id("uid", decimal(key, value)?.into())?),
            b"gid" => self.gid = Some(owner_id("gid", decimal(key, value)?.into())?),
            _ => self.mtime = Some(time(value)?),
        }
        Ok(())
    }

    /// bsdtar writes each attribute twice, in its own encoding and in star's; the same value twice is one attribute.
    fn add_xattr(&mut self, name: Vec<u8>, value: Vec<u8>, limits: &Limits) -> Result<(), Refusal> {
        if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains(&0) {
            return Err(Refusal::corrupt(format!(
                "an extended attribute's name has {} bytes; 1 to {XATTR_NAME_MAX} without NUL are allowed",
                name.len()
            )));
        }
        if value.len() > limits.xattr_value_bytes {
            let (len, max) = (value.len(), limits.xattr_value_bytes);
            return Err(Refusal::limit(format!("the extended attribute {:?} has {len} bytes, the limit is {max}", lossy(&name))));
        }
        match self.xattrs.get(&name) {
            Some(old) if *old != value => {
                Err(Refusal::corrupt(format!("the extended attribute {:?} has two values", lossy(&name))).reason("ARCHIVE_AMBIGUOUS"))
            }
            _ => {
                self.xattrs.insert(name, value);
                Ok(())
            }
        }
    }
}

impl SparseKeys {
    fn take(&mut self, name: &[u8], key: &[u8], value: &[u8], limits: &Limits) -> Result<(), Refusal> {
        match name {
            b"major" => self.major = Some(decimal(key, value)?),
            b"minor" => self.minor = Some(decimal(key, value)?),
            b"name" => self.name = name_value(key, value)?,
            b"size" | b"realsize" => {
                let size = decimal(key, value)?;
                if self.size.is_some_and(|other| other != size) {
                    return Err(Refusal::corrupt("GNU.sparse.size and GNU.sparse.realsize differ").reason("ARCHIVE_AMBIGUOUS"));
                }
                self.size = Some(size);
            }
            b"numblocks" => self.numblocks = Some(decimal(key, value)?),
            b"offset" => {
                if self.pending_offset.replace(decimal(key, value)?).is_some() {
                    return Err(Refusal::corrupt("two GNU.sparse.offset without a GNU.sparse.numbytes between them"));
                }
            }
            b"numbytes" => {
                let offset = self.pending_offset.take().ok_or_else(|| Refusal::corrupt("a GNU.sparse.numbytes without its GNU.sparse.offset"))?;
                let len = decimal(key, value)?;
                let pairs = self.pairs.get_or_insert_default();
                pairs.push((offset, len));
                limits.check_sparse_pairs(pairs.len() as u64)?;
            }
            b"map" => {
                if self.pairs.is_some() {
                    return Err(Refusal::corrupt("both a GNU.sparse.map and GNU.sparse.offset").reason("ARCHIVE_AMBIGUOUS"));
                }
                self.pairs = Some(comma_separated_map(key, value, limits)?);
            }
            _ => return Err(Refusal::unsupported(format!("the extended header has {:?}, an unknown sparse key", lossy(key)))),
        }
        Ok(())
    }
}

fn comma_separated_map(key: &[u8], value: &[u8], limits: &Limits) -> Result<Vec<(u64, u64)>, Refusal> {
    let mut pairs = Vec::new();
    if value.is_empty() {
        return Ok(pairs);
    }
    let mut numbers = value.split(|byte| *byte == b',');
    while let Some(offset) = numbers.next() {
        let len = numbers.next().ok_or_else(|| Refusal::corrupt("GNU.sparse.map has an odd number of values"))?;
        pairs.push((decimal(key, offset)?, decimal(key, len)?));
        limits.check_sparse_pairs(pairs.len() as u64)?;
    }
    Ok(pairs)
}

struct Record<'d> {
    key: &'d [u8],
    value: &'d [u8],
    after: &'d [u8],
}

/// Splits the first record off.
fn record(data: &[u8]) -> Result<Record<'_>, Refusal> {
    let bad = |why: &str| Refusal::corrupt(format!("a record of the extended header {why}"));
    let digits = data.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 || digits > 10 || data.get(digits) != Some(&b' ') {
        return Err(bad("does not start with its length and a space"));
    }
    let len = data[..digits].iter().fold(0usize, |len, digit| len * 10 + usize::from(digit - b'0'));
    if len < digits + 2 || len > data.len() {
        return Err(bad(&format!("says it has {len} bytes, of {} that are left", data.len())));
    }
    let (record, rest) = data.split_at(len);
    let text = record[digits + 1..].strip_suffix(b"\n").ok_or_else(|| bad("does not end with a newline"))?;
    let equals = text.iter().position(|byte| *byte == b'=').ok_or_else(|| bad("has no equals sign"))?;
    if equals == 0 {
        return Err(bad("has an empty key"));
    }
    Ok(Record { key: &text[..equals], value: &text[equals + 1..], after: rest })
}

fn name_value(key: &[u8], value: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    if value.contains(&0) {
        return Err(Refusal::corrupt(format!("the {} in the extended header contains a NUL byte", lossy(key))));
    }
    Ok(Some(value.to_vec()).filter(|name| !name.is_empty()))
}

/// Digits only: no sign, no spaces, below 2^63.
pub(super) fn decimal(key: &[u8], value: &[u8]) -> Result<u64, Refusal> {
    let number = match value {
        [] => None,
        digits if digits.iter().all(u8::is_ascii_digit) => {
            digits.iter().try_fold(0i64, |number, digit| number.checked_mul(10)?.checked_add(i64::from(digit - b'0')))
        }
        _ => None,
    };
    number
        .and_then(|number| u64::try_from(number).ok())
        .ok_or_else(|| Refusal::corrupt(format!("the value {:?} of {} is not a number below 2^63", lossy(&value[..value.len().min(64)]), lossy(key))))
}

/// Seconds with sign and fraction; digits beyond nanoseconds are dropped towards the past, as filesystems do.
fn time(value: &[u8]) -> Result<Timestamp, Refusal> {
    let bad = || Refusal::corrupt(format!("the mtime {:?} of the extended header is no time", lossy(&value[..value.len().min(64)])));
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let (whole, fraction) = match digits.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, [].as_slice()),
    };
    if whole.is_empty() || !whole.iter().chain(fraction).all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let whole = whole.iter().try_fold(0i64, |secs, digit| secs.checked_mul(10)?.checked_add(i64::from(digit - b'0'))).ok_or_else(bad)?;
    let nanos = (0..9).fold(0u32, |nanos, place| nanos * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0')));
    let beyond = fraction.iter().skip(9).any(|digit| *digit != b'0');
    if !negative {
        return Ok(Timestamp { secs: whole, nanos });
    }
    // -1.25 is 0.75 seconds after -2.
    let nanos = nanos + u32::from(beyond);
    Ok(if nanos == 0 { Timestamp { secs: -whole, nanos: 0 } } else { Timestamp { secs: -whole - 1, nanos: 1_000_000_000 - nanos } })
}

/// Names are bytes to us; a header that says they are in something else than UTF-8 or raw bytes would have to be converted.
fn check_charset(value: &[u8]) -> Result<(), Refusal> {
    match value {
        b"" | b"BINARY" | b"ISO-IR 10646 2000 UTF-8" | b"ISO-IR 646 1990" => Ok(()),
        _ => Err(Refusal::unsupported(format!("the extended header is in the character set {:?}", lossy(value)))),
    }
}

/// bsdtar percent-encodes attribute names (archive_write_set_format_pax.c, `url_encode`).
fn percent_decoded(name: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte =
            hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).ok_or_else(|| Refusal::corrupt("a bad escape in the name of a LIBARCHIVE.xattr"))?;
        out.push(byte);
        rest = &after[2..];
    }
    Ok(out)
}

/// bsdtar leaves the padding out.
fn base64_decoded(key: &[u8], value: &[u8]) -> Result<Vec<u8>, Refusal> {
    let end = value.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    base64::engine::general_purpose::STANDARD_NO_PAD
        .decode(&value[..end])
        .map_err(|_| Refusal::corrupt(format!("the value of {} is not base64", lossy(key))))
}

pub(super) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(records: &[(&str, &[u8])]) -> Result<Pax, Refusal> {
        Pax::parse(&super::super::tests::pax_records(records), Scope::Member, &Limits::default())
    }

    #[test]
    fn times_keep_nanoseconds_and_round_to_the_past() {
        for (text, secs, nanos) in [
            ("0", 0, 0),
            ("1700000000.123456789", 1_700_000_000, 123_456_789),
            ("1.5", 1, 500_000_000),
            ("1.1234567899", 1, 123_456_789),
            ("-1", -1, 0),
            ("-1.25", -2, 750_000_000),
            ("-0.0000000001", -1, 999_999_999),
            ("-0.9999999999", -1, 0),
            ("9223372036854775807", i64::MAX, 0),
        ] {
            assert_eq!(time(text.as_bytes()).ok(), Some(Timestamp { secs, nanos }), "{text}");
        }
        for bad in ["", "-", ".5", "1e9", "+1", "1.-5", "9223372036854775808", " 1"] {
            assert!(time(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_twice_is_refused_even_with_the_same_value() {
        assert!(parse(&[("path", b"a"), ("path", b"a")]).is_err());
        assert!(parse(&[("comment", b"a"), ("comment", b"b")]).is_err());
        assert!(
            parse(&[("GNU.sparse.offset", b"0"), ("GNU.sparse.numbytes", b"1"), ("GNU.sparse.offset", b"5"), ("GNU.sparse.numbytes", b"1")]).is_ok()
        );
    }

    #[test]
    fn records_with_wrong_lengths_are_refused() {
        for bad in ["5 a=b", "6 a=b", "7 a=b\n", "0 a=b\n", "6 a-b\n", "x a=b\n", " 6 a=b\n", "5 =b\n", "99999999999 a=b\n", "06 a=b\nx"] {
            assert!(Pax::parse(bad.as_bytes(), Scope::Member, &Limits::default()).is_err(), "{bad:?}");
        }
        assert!(Pax::parse(b"6 a=b\n", Scope::Member, &Limits::default()).is_ok());
    }

    #[test]
    fn attributes_of_bsdtar_and_star_are_one() {
        let pax = parse(&[("LIBARCHIVE.xattr.user.a%20b", b"AQI"), ("SCHILY.xattr.user.a b", b"\x01\x02")]).expect("agree");
        assert_eq!(pax.xattrs, BTreeMap::from([(b"user.a b".to_vec(), vec![1, 2])]));
        assert!(parse(&[("LIBARCHIVE.xattr.user.a", b"AQI"), ("SCHILY.xattr.user.a", b"\x01\x03")]).is_err());
    }

    #[test]
    fn global_headers_may_not_rename_or_resize_members() {
        let global = |records: &[(&str, &[u8])]| Pax::parse(&super::super::tests::pax_records(records), Scope::Global, &Limits::default());
        assert!(global(&[("comment", b"0123456789abcdef")]).is_ok());
        assert_eq!(global(&[("mtime", b"5"), ("uid", b"7")]).ok().and_then(|pax| pax.uid), Some(7));
        for key in ["path", "size", "linkpath", "SCHILY.xattr.user.a", "GNU.sparse.major"] {
            assert!(global(&[(key, b"1")]).is_err(), "{key}");
        }
    }
}

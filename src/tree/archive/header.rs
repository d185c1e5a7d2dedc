//! The fields of one 512-byte header (POSIX.1-1988 ustar, v7 and GNU, see tar(5) and the "Tar Internals" part of the GNU tar manual).
//!
//! The layout comes from `tar_core::Header`. Its number reader is not used: it drops the sign of base-256 numbers, lets them wrap, and takes
//! base-256 device numbers for damage. Where readers in the field disagree about a field, the field is refused (failures.md, rule 18).

use tar_core::Header;

use super::{Refusal, stream::BLOCK};
use crate::units::Timestamp;

/// Linux keeps 12 bits of major and 20 bits of minor number (include/linux/kdev_t.h, `MINORBITS`).
const MAJOR_MAX: u64 = 0xfff;
/// See [`MAJOR_MAX`].
const MINOR_MAX: u64 = 0xf_ffff;

/// Which of the three header layouts it is; they differ in what follows byte 257.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    V7,
    Ustar,
    Gnu,
}

/// What an old GNU sparse header says.
pub(super) struct GnuSparse {
    /// Offset and length of data.
    pub(super) pairs: Vec<(u64, u64)>,
    /// Whether extension blocks follow.
    pub(super) more: bool,
    /// Size with the holes.
    pub(super) size: u64,
}

/// A header whose checksum was right.
pub(super) struct Fields {
    header: Header,
    pub(super) format: Format,
}

impl Fields {
    /// Checks the checksum (the sum of unsigned bytes, or of signed ones as some old writers had it) and tells the layout.
    pub(super) fn new(block: &[u8; BLOCK]) -> Result<Self, Refusal> {
        if !checksum_is_right(block) {
            return Err(Refusal::corrupt("the header's checksum is wrong: this is not a tar header"));
        }
        let format = match &block[257..265] {
            [b'u', b's', b't', b'a', b'r', 0, _, _] => Format::Ustar,
            b"ustar  \0" => Format::Gnu,
            _ => Format::V7,
        };
        Ok(Fields { header: *Header::from_bytes(block), format })
    }

    /// The type flag as it stands.
    pub(super) fn type_flag(&self) -> u8 {
        self.header.as_ustar().typeflag[0]
    }

    /// Name, with the prefix of ustar before it.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.header.path_bytes();
        match self.format {
            Format::Ustar => {
                let prefix = until_nul(&self.header.as_ustar().prefix);
                if prefix.is_empty() { name.to_vec() } else { [prefix, name].join(&b'/') }
            }
            Format::V7 | Format::Gnu => name.to_vec(),
        }
    }

    /// Where a link points.
    pub(super) fn link_name(&self) -> &[u8] {
        self.header.link_name_bytes()
    }

    /// Bytes of data after the header. A blank field is refused: GNU tar and Python's tarfile disagree about it.
    pub(super) fn size(&self) -> Result<u64, Refusal> {
        let number = number(&self.header.as_ustar().size).map_err(|text| Refusal::corrupt(format!("the size field {text}")))?;
        let number = number.ok_or_else(|| Refusal::corrupt("the size field is blank"))?;
        // Offsets are signed in every consumer, so more than 2^63 is damage; so is a negative size.
        i64::try_from(number)
            .ok()
            .and_then(|size| u64::try_from(size).ok())
            .ok_or_else(|| Refusal::corrupt(format!("the size field is {number}, which is no size")))
    }

    /// Permission bits; the file type that old writers put above them is dropped.
    pub(super) fn mode(&self) -> Result<u16, Refusal> {
        let mode = number(&self.header.as_ustar().mode).map_err(|text| Refusal::corrupt(format!("the mode field {text}")))?.unwrap_or(0);
        Ok((mode & 0o7777) as u16)
    }

    /// Owner and group.
    pub(super) fn owner(&self) -> Result<(u32, u32), Refusal> {
        let fields = self.header.as_ustar();
        let uid = number(&fields.uid).map_err(|text| Refusal::corrupt(format!("the uid field {text}")))?.unwrap_or(0);
        let gid = number(&fields.gid).map_err(|text| Refusal::corrupt(format!("the gid field {text}")))?.unwrap_or(0);
        Ok((owner_id("uid", uid)?, owner_id("gid", gid)?))
    }

    /// Modification time; before 1970 it is a negative base-256 number.
    pub(super) fn mtime(&self) -> Result<Timestamp, Refusal> {
        let secs = number(&self.header.as_ustar().mtime).map_err(|text| Refusal::corrupt(format!("the mtime field {text}")))?.unwrap_or(0);
        let secs = i64::try_from(secs).map_err(|_| Refusal::corrupt(format!("the mtime field is {secs}, beyond 2^63 seconds")))?;
        Ok(Timestamp { secs, nanos: 0 })
    }

    /// Major and minor number of a device node. v7 has none, so a device node there is refused.
    pub(super) fn device(&self) -> Result<(u64, u64), Refusal> {
        if self.format == Format::V7 {
            return Err(Refusal::corrupt("a device node in a v7 header has no device number"));
        }
        let fields = self.header.as_ustar();
        let read = |field: &[u8], name: &str| {
            let value = number(field).map_err(|text| Refusal::corrupt(format!("the {name} field {text}")))?.unwrap_or(0);
            u64::try_from(value).map_err(|_| Refusal::corrupt(format!("the {name} field is {value}")))
        };
        Ok((read(&fields.dev_major, "devmajor")?, read(&fields.dev_minor, "devminor")?))
    }

    /// The part of an old GNU sparse header that tells where data is: at most four pairs, whether more follow, and the real size.
    pub(super) fn gnu_sparse(&self) -> Result<GnuSparse, Refusal> {
        if self.format != Format::Gnu {
            return Err(Refusal::corrupt("a sparse member (type S) without a GNU header"));
        }
        // struct oldgnu_header in GNU tar's tar.h: sparse at 386, isextended at 482, realsize at 483.
        let bytes = self.header.as_bytes();
        let real = number(&bytes[483..495]).map_err(|text| Refusal::corrupt(format!("the realsize field {text}")))?;
        let real = real.and_then(|value| u64::try_from(value).ok()).ok_or_else(|| Refusal::corrupt("the realsize field is no size"))?;
        Ok(GnuSparse { pairs: sparse_pairs(&bytes[386..482])?, more: bytes[482] != 0, size: real })
    }
}

/// Pairs of offset and length, twelve bytes each number, up to the first empty one.
pub(super) fn sparse_pairs(bytes: &[u8]) -> Result<Vec<(u64, u64)>, Refusal> {
    let mut pairs = Vec::new();
    for pair in bytes.chunks_exact(24) {
        if pair[12] == 0 {
            break; // The same test as GNU tar's: an unused pair starts its length with a NUL.
        }
        let read = |field: &[u8]| {
            let value = number(field).map_err(|text| Refusal::corrupt(format!("a number of the sparse map {text}")))?.unwrap_or(0);
            u64::try_from(value).map_err(|_| Refusal::corrupt(format!("a number of the sparse map is {value}")))
        };
        pairs.push((read(&pair[..12])?, read(&pair[12..])?));
    }
    Ok(pairs)
}

/// Checks a user or group number. The highest one means "no owner" to the kernel (chown(2)), so nobody can have it.
pub(super) fn owner_id(name: &str, value: i128) -> Result<u32, Refusal> {
    u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or_else(|| Refusal::corrupt(format!("the {name} {value} is outside 0..=4294967294")))
}

/// Checks a device number against what Linux can express.
pub(super) fn device_numbers((major, minor): (u64, u64)) -> Result<(u32, u32), Refusal> {
    if major > MAJOR_MAX || minor > MINOR_MAX {
        return Err(Refusal::corrupt(format!("device number {major}:{minor} is beyond {MAJOR_MAX}:{MINOR_MAX}")));
    }
    Ok((major as u32, minor as u32))
}

/// Whether the checksum of `block` is right, which is also how a plain archive is told from a compressed one.
pub(in crate::tree) fn checksum_is_right(block: &[u8; BLOCK]) -> bool {
    let Ok(Some(want)) = number(&block[148..156]) else { return false };
    let unsigned = |bytes: &[u8]| bytes.iter().map(|byte| i128::from(*byte)).sum::<i128>();
    let signed = |bytes: &[u8]| bytes.iter().map(|byte| i128::from(*byte as i8)).sum::<i128>();
    let spaces = 8 * i128::from(b' ');
    want == unsigned(&block[..148]) + spaces + unsigned(&block[156..]) || want == signed(&block[..148]) + spaces + signed(&block[156..])
}

/// A numeric field: octal digits after spaces, ended by space or NUL; or base-256 as GNU writes it: first byte 0x80, or 0xff for a negative one
/// in two's complement. Nothing when blank. The text of the error starts with a verb.
fn number(field: &[u8]) -> Result<Option<i128>, String> {
    match field.first() {
        Some(0x80) => base256(&field[1..]).map(Some),
        // The 0xff stands for an endless row of ones before the rest.
        Some(0xff) => base256(&field[1..]).map(|value| Some(value - (1i128 << (8 * (field.len() - 1))))),
        _ => octal(field),
    }
}

fn base256(digits: &[u8]) -> Result<i128, String> {
    // At most eleven bytes in any field of the header: 88 bits.
    debug_assert!(digits.len() < 16);
    Ok(digits.iter().fold(0, |value, digit| value << 8 | i128::from(*digit)))
}

fn octal(field: &[u8]) -> Result<Option<i128>, String> {
    let digits = field.trim_ascii_start();
    let len = digits.iter().take_while(|byte| (b'0'..=b'7').contains(byte)).count();
    // What comes after the terminator is ignored by some readers and an error to others: only more of the same is allowed.
    if !digits[len..].iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Err(format!("holds {:?}, which is no octal number", String::from_utf8_lossy(field)));
    }
    Ok((len > 0).then(|| digits[..len].iter().fold(0, |value, digit| value << 3 | i128::from(digit - b'0'))))
}

pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.iter().position(|byte| *byte == 0).map_or(bytes, |end| &bytes[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_gnu_tar_reads_them() {
        let cases: &[(&[u8], Option<i128>)] = &[
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644     ", Some(0o644)),
            (b"77777777777\0", Some(0o77777777777)),
            (b"777777777777", Some(0o777777777777)),
            (b"        ", None),
            (b"\0\0\0\0\0\0\0\0", None),
            (&[0x80, 0, 0, 0, 0, 0, 1, 0], Some(256)),
            (&[0xff; 12], Some(-1)),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00], Some(-256)),
            (&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Some(i64::MAX as i128)),
        ];
        for (field, want) in cases {
            assert_eq!(number(field), Ok(*want), "{field:?}");
        }
        for bad in [b"0000648\0".as_slice(), b"64 4   \0", b"644\0x   ", b"+644   \0", b"-1     \0", &[0x81, 0, 0, 0, 0, 0, 0, 0], b"\0 644   "] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn owners_and_devices_beyond_the_kernels_range_are_refused() {
        assert_eq!(owner_id("uid", 4_294_967_294).ok(), Some(4_294_967_294));
        assert!(owner_id("uid", 4_294_967_295).is_err());
        assert!(owner_id("gid", -1).is_err());
        assert_eq!(device_numbers((0xfff, 0xf_ffff)).ok(), Some((0xfff, 0xf_ffff)));
        assert!(device_numbers((0x1000, 0)).is_err());
        assert!(device_numbers((0, 0x10_0000)).is_err());
    }
}

//! Inodes: 128 bytes, and in larger ones `i_extra_isize` more bytes of fields, then the xattrs of the inode's body.

use super::{corrupt, get_u16, get_u32, join, need, put_u16, put_u32};
use crate::{error::Result, units::Timestamp};

/// Bytes of the old part.
pub const OLD_SIZE: usize = 128;
/// `i_extra_isize` of inodes with all fields up to `i_projid`.
pub const EXTRA_ISIZE: u16 = 32;
/// Offset of the low half of the checksum.
pub const CHECKSUM_LO_AT: usize = 0x7C;
/// Offset of the high half of the checksum.
pub const CHECKSUM_HI_AT: usize = 0x82;
/// Offset of `i_generation`.
pub const GENERATION_AT: usize = 0x64;
/// Offset and length of `i_block`.
pub const BLOCK_AT: usize = 0x28;
/// Bytes of `i_block`.
pub const BLOCK_LEN: usize = 60;
/// The most links of a file, and of subdirectories before the count becomes 1 (EXT4_LINK_MAX).
pub const LINK_MAX: u32 = 65000;

/// Type bits of `i_mode`.
pub mod mode {
    /// Mask of the type.
    pub const TYPE: u16 = 0xF000;
    /// FIFO.
    pub const FIFO: u16 = 0x1000;
    /// Character device.
    pub const CHAR: u16 = 0x2000;
    /// Directory.
    pub const DIR: u16 = 0x4000;
    /// Block device.
    pub const BLOCK: u16 = 0x6000;
    /// Regular file.
    pub const FILE: u16 = 0x8000;
    /// Symbolic link.
    pub const SYMLINK: u16 = 0xA000;
    /// Socket.
    pub const SOCKET: u16 = 0xC000;
}

/// Bits of `i_flags`.
pub mod flags {
    /// Immutable.
    pub const IMMUTABLE: u32 = 0x10;
    /// Append only.
    pub const APPEND: u32 = 0x20;
    /// Encrypted.
    pub const ENCRYPT: u32 = 0x800;
    /// Directory is a hashed tree.
    pub const INDEX: u32 = 0x1000;
    /// `i_blocks` counts filesystem blocks.
    pub const HUGE_FILE: u32 = 0x40000;
    /// `i_block` is the root of an extent tree.
    pub const EXTENTS: u32 = 0x80000;
    /// Verity.
    pub const VERITY: u32 = 0x100000;
    /// The inode holds an xattr value.
    pub const EA_INODE: u32 = 0x200000;
    /// Data is inside the inode.
    pub const INLINE_DATA: u32 = 0x10000000;
    /// Case-insensitive directory.
    pub const CASEFOLD: u32 = 0x40000000;
}

/// An inode with joined halves and decoded times. The checksum is not a field: `csum` computes it over the finished bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Type and permissions.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Creation; absent (zero) in 128-byte inodes.
    pub crtime: Timestamp,
    /// Deletion, or the next orphan.
    pub dtime: u32,
    /// Links.
    pub links: u16,
    /// Blocks used, metadata included: of 512 bytes, or of the filesystem with [`flags::HUGE_FILE`].
    pub blocks: u64,
    /// See [`flags`].
    pub flags: u32,
    /// NFS change counter, both halves.
    pub version: u64,
    /// Block map, extent root, fast symlink or device number.
    pub block: [u8; BLOCK_LEN],
    /// NFS generation; part of the checksum.
    pub generation: u32,
    /// Block of the shared xattrs, 0 for none.
    pub file_acl: u64,
    /// Bytes of fields after the first 128; 0 in 128-byte inodes.
    pub extra_isize: u16,
    /// Project.
    pub projid: u32,
}

impl Inode {
    /// All zero, with room for all extra fields.
    pub fn zeroed() -> Self {
        let zero = Timestamp::default();
        Inode {
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            atime: zero,
            ctime: zero,
            mtime: zero,
            crtime: zero,
            dtime: 0,
            links: 0,
            blocks: 0,
            flags: 0,
            version: 0,
            block: [0; BLOCK_LEN],
            generation: 0,
            file_acl: 0,
            extra_isize: EXTRA_ISIZE,
            projid: 0,
        }
    }

    /// Reads an inode of `bytes.len()` bytes (the filesystem's inode size). `Kind::Corrupt` when `i_extra_isize` does not fit.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        need(bytes, OLD_SIZE, "ext4 inode")?;
        let extra_isize = if bytes.len() >= OLD_SIZE + 4 { get_u16(bytes, 0x80) } else { 0 };
        if OLD_SIZE + usize::from(extra_isize) > bytes.len() || extra_isize % 4 != 0 {
            return Err(corrupt("ext4 inode", format!("has i_extra_isize {extra_isize} in an inode of {} bytes", bytes.len())));
        }
        // A field of the extra part exists when it ends inside i_extra_isize (EXT4_FITS_IN_INODE).
        let extra = |at: usize| if at + 4 <= OLD_SIZE + usize::from(extra_isize) { get_u32(bytes, at) } else { 0 };
        let mut block = [0; BLOCK_LEN];
        block.copy_from_slice(&bytes[BLOCK_AT..BLOCK_AT + BLOCK_LEN]);
        Ok(Inode {
            mode: get_u16(bytes, 0x0),
            uid: u32::from(get_u16(bytes, 0x2)) | u32::from(get_u16(bytes, 0x78)) << 16,
            gid: u32::from(get_u16(bytes, 0x18)) | u32::from(get_u16(bytes, 0x7A)) << 16,
            size: join(get_u32(bytes, 0x4), get_u32(bytes, 0x6C)),
            atime: decode_time(get_u32(bytes, 0x8), extra(0x8C)),
            ctime: decode_time(get_u32(bytes, 0xC), extra(0x84)),
            mtime: decode_time(get_u32(bytes, 0x10), extra(0x88)),
            crtime: decode_time(extra(0x90), extra(0x94)),
            dtime: get_u32(bytes, 0x14),
            links: get_u16(bytes, 0x1A),
            blocks: u64::from(get_u32(bytes, 0x1C)) | u64::from(get_u16(bytes, 0x74)) << 32,
            flags: get_u32(bytes, 0x20),
            version: join(get_u32(bytes, 0x24), extra(0x98)),
            block,
            generation: get_u32(bytes, GENERATION_AT),
            file_acl: u64::from(get_u32(bytes, 0x68)) | u64::from(get_u16(bytes, 0x76)) << 32,
            extra_isize,
            projid: extra(0x9C),
        })
    }

    /// Writes all fields except the checksum over an inode of `bytes.len()` bytes; what lies behind the extra fields (xattrs) stays.
    /// Panics when `bytes` is shorter than 128 bytes and `extra_isize` together.
    pub fn write(&self, bytes: &mut [u8]) {
        put_u16(bytes, 0x0, self.mode);
        put_u16(bytes, 0x2, self.uid as u16);
        put_u32(bytes, 0x4, self.size as u32);
        put_u32(bytes, 0x8, self.atime.secs as u32);
        put_u32(bytes, 0xC, self.ctime.secs as u32);
        put_u32(bytes, 0x10, self.mtime.secs as u32);
        put_u32(bytes, 0x14, self.dtime);
        put_u16(bytes, 0x18, self.gid as u16);
        put_u16(bytes, 0x1A, self.links);
        put_u32(bytes, 0x1C, self.blocks as u32);
        put_u32(bytes, 0x20, self.flags);
        put_u32(bytes, 0x24, self.version as u32);
        bytes[BLOCK_AT..BLOCK_AT + BLOCK_LEN].copy_from_slice(&self.block);
        put_u32(bytes, GENERATION_AT, self.generation);
        put_u32(bytes, 0x68, self.file_acl as u32);
        put_u32(bytes, 0x6C, (self.size >> 32) as u32);
        put_u16(bytes, 0x74, (self.blocks >> 32) as u16);
        put_u16(bytes, 0x76, (self.file_acl >> 32) as u16);
        put_u16(bytes, 0x78, (self.uid >> 16) as u16);
        put_u16(bytes, 0x7A, (self.gid >> 16) as u16);
        if bytes.len() < OLD_SIZE + 4 {
            return;
        }
        put_u16(bytes, 0x80, self.extra_isize);
        let end = OLD_SIZE + usize::from(self.extra_isize);
        let extras = [
            (0x84, encode_time_extra(self.ctime)),
            (0x88, encode_time_extra(self.mtime)),
            (0x8C, encode_time_extra(self.atime)),
            (0x90, self.crtime.secs as u32),
            (0x94, encode_time_extra(self.crtime)),
            (0x98, (self.version >> 32) as u32),
            (0x9C, self.projid),
        ];
        for (at, value) in extras {
            if at + 4 <= end {
                put_u32(bytes, at, value);
            }
        }
    }

    /// Whether the type is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & mode::TYPE == mode::DIR
    }
    /// Whether the type is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & mode::TYPE == mode::FILE
    }
    /// Whether the type is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & mode::TYPE == mode::SYMLINK
    }
}

/// The earliest second an inode can hold.
pub const TIME_MIN: i64 = i32::MIN as i64;
/// The latest second an inode can hold: two epoch bits extend the signed 32-bit count to the year 2446.
pub const TIME_MAX: i64 = i32::MAX as i64 + (3 << 32);

/// Brings a time into what an inode can hold.
pub fn clamp_time(time: Timestamp) -> Timestamp {
    if time.secs < TIME_MIN {
        Timestamp { secs: TIME_MIN, nanos: 0 }
    } else if time.secs > TIME_MAX {
        Timestamp { secs: TIME_MAX, nanos: 999_999_999 }
    } else {
        Timestamp { secs: time.secs, nanos: time.nanos.min(999_999_999) }
    }
}

/// Seconds are the signed low 32 bits plus the epoch bits times 2^32; nanoseconds are the upper 30 bits of the extra field.
fn decode_time(lo: u32, extra: u32) -> Timestamp {
    Timestamp { secs: i64::from(lo as i32) + (i64::from(extra & 3) << 32), nanos: (extra >> 2).min(999_999_999) }
}

/// The extra field of a time within [`TIME_MIN`]..=[`TIME_MAX`].
fn encode_time_extra(time: Timestamp) -> u32 {
    let epoch = ((time.secs - i64::from(time.secs as i32)) >> 32) as u32 & 3;
    time.nanos << 2 | epoch
}

/// Device numbers in `i_block`: the first word holds the old encoding when both numbers have 8 bits, else the second holds the new one.
pub fn encode_device(major: u32, minor: u32) -> [u8; BLOCK_LEN] {
    let mut block = [0; BLOCK_LEN];
    if major < 256 && minor < 256 {
        put_u32(&mut block, 0, major << 8 | minor);
    } else {
        put_u32(&mut block, 4, minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12);
    }
    block
}

/// Major and minor number from `i_block`.
pub fn decode_device(block: &[u8; BLOCK_LEN]) -> (u32, u32) {
    let old = get_u32(block, 0);
    if old != 0 {
        return (old >> 8 & 0xff, old & 0xff);
    }
    let new = get_u32(block, 4);
    (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xfff00)
}

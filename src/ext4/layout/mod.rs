//! The on-disk structures of ext4 and jbd2: field tables, constants, and the geometry derived from a superblock.
//!
//! Fields are read and written one by one at explicit offsets; nothing is cast. `parse` checks lengths and whatever must hold for the value to
//! be used safely; deeper consistency is the reader's business. Sources: the kernel's Documentation/filesystems/ext4 and fs/ext4/ext4.h,
//! include/linux/jbd2.h, e2fsprogs' lib/ext2fs/ext2_fs.h.

pub mod dir;
pub mod extent;
pub mod geometry;
pub mod group;
pub mod inode;
pub mod journal;
pub mod superblock;
pub mod xattr;

use crate::error::{Error, Kind, Stage};

/// Compatible features (`s_feature_compat`): an unknown one does not matter.
pub mod compat {
    /// Has a journal.
    pub const HAS_JOURNAL: u32 = 0x4;
    /// Has extended attributes.
    pub const EXT_ATTR: u32 = 0x8;
    /// Has reserved descriptor blocks for growth (inode 7).
    pub const RESIZE_INODE: u32 = 0x10;
    /// Directories may be hashed trees.
    pub const DIR_INDEX: u32 = 0x20;
    /// Backups in at most two groups, named in `s_backup_bgs`.
    pub const SPARSE_SUPER2: u32 = 0x200;
    /// The journal may hold fast commits.
    pub const FAST_COMMIT: u32 = 0x400;
    /// Inode numbers and UUID must not change (fscrypt).
    pub const STABLE_INODES: u32 = 0x800;
    /// Has an orphan file.
    pub const ORPHAN_FILE: u32 = 0x1000;
}

/// Incompatible features (`s_feature_incompat`): an unknown one forbids reading.
pub mod incompat {
    /// Directory entries hold the file type.
    pub const FILETYPE: u32 = 0x2;
    /// The journal must be replayed.
    pub const RECOVER: u32 = 0x4;
    /// This is an external journal device.
    pub const JOURNAL_DEV: u32 = 0x8;
    /// Descriptor blocks are spread over meta block groups.
    pub const META_BG: u32 = 0x10;
    /// Files may use extents.
    pub const EXTENTS: u32 = 0x40;
    /// Block numbers have 64 bits and descriptors 64 bytes.
    pub const BIT64: u32 = 0x80;
    /// Multiple mount protection.
    pub const MMP: u32 = 0x100;
    /// Bitmaps and inode tables may be outside their group.
    pub const FLEX_BG: u32 = 0x200;
    /// Large xattr values in inodes of their own.
    pub const EA_INODE: u32 = 0x400;
    /// Data in directory entries.
    pub const DIRDATA: u32 = 0x1000;
    /// The checksum seed is stored, not derived from the UUID.
    pub const CSUM_SEED: u32 = 0x2000;
    /// Directories above 2 GiB or three hash levels.
    pub const LARGEDIR: u32 = 0x4000;
    /// Small files inside their inode.
    pub const INLINE_DATA: u32 = 0x8000;
    /// fscrypt.
    pub const ENCRYPT: u32 = 0x10000;
    /// Case-insensitive directories.
    pub const CASEFOLD: u32 = 0x20000;
}

/// Read-only compatible features (`s_feature_ro_compat`): an unknown one forbids writing.
pub mod ro_compat {
    /// Superblock backups only in groups 0, 1 and powers of 3, 5 and 7.
    pub const SPARSE_SUPER: u32 = 0x1;
    /// Some file has been at least 2 GiB long.
    pub const LARGE_FILE: u32 = 0x2;
    /// `i_blocks` has 48 bits and may count filesystem blocks.
    pub const HUGE_FILE: u32 = 0x8;
    /// Descriptors have crc16 checksums and uninitialised flags.
    pub const GDT_CSUM: u32 = 0x10;
    /// A directory may have more than 65000 subdirectories (link count 1 then).
    pub const DIR_NLINK: u32 = 0x20;
    /// Inodes are larger than 128 bytes with extra fields.
    pub const EXTRA_ISIZE: u32 = 0x40;
    /// Quota in hidden inodes.
    pub const QUOTA: u32 = 0x100;
    /// Allocation in clusters of blocks.
    pub const BIGALLOC: u32 = 0x200;
    /// All metadata has crc32c checksums.
    pub const METADATA_CSUM: u32 = 0x400;
    /// Read-only image.
    pub const READONLY: u32 = 0x1000;
    /// Project quota.
    pub const PROJECT: u32 = 0x2000;
    /// fs-verity.
    pub const VERITY: u32 = 0x8000;
    /// The orphan file is not empty.
    pub const ORPHAN_PRESENT: u32 = 0x10000;
}

/// Inode numbers with a meaning (0 is none).
pub mod ino {
    /// List of bad blocks.
    pub const BAD_BLOCKS: u32 = 1;
    /// The root directory.
    pub const ROOT: u32 = 2;
    /// Holds the reserved descriptor blocks.
    pub const RESIZE: u32 = 7;
    /// The journal.
    pub const JOURNAL: u32 = 8;
    /// First inode that is not reserved in revision 1 filesystems made by mke2fs; `lost+found` there.
    pub const FIRST: u32 = 11;
}

/// The block size of filesystems this engine makes. (The reader takes what a superblock says.)
pub const BLOCK_SIZE: u32 = 4096;

/// Reads a `u16` at byte `at`; like the others panics outside the slice: callers check the length of the structure first.
#[inline]
pub fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::get(bytes, at)
}
/// Reads a `u32` at byte `at`.
#[inline]
pub fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::get(bytes, at)
}
/// Reads a `u64` at byte `at`.
#[inline]
pub fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::get(bytes, at)
}
/// Writes a `u16` at byte `at`.
#[inline]
pub fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    value.put(bytes, at);
}
/// Writes a `u32` at byte `at`.
#[inline]
pub fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    value.put(bytes, at);
}
/// Writes a `u64` at byte `at`.
#[inline]
pub fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    value.put(bytes, at);
}

/// Joins the halves of a 64-bit number.
#[inline]
pub fn join(lo: u32, hi: u32) -> u64 {
    u64::from(hi) << 32 | u64::from(lo)
}

/// A field of a little-endian structure.
pub(crate) trait Field: Sized {
    /// Reads it at byte `at`.
    fn get(bytes: &[u8], at: usize) -> Self;
    /// Writes it at byte `at`.
    fn put(&self, bytes: &mut [u8], at: usize);
}

macro_rules! integer_fields {
    ($($ty:ty),*) => {$(
        impl Field for $ty {
            #[inline]
            fn get(bytes: &[u8], at: usize) -> Self {
                let mut raw = [0; size_of::<$ty>()];
                raw.copy_from_slice(&bytes[at..at + size_of::<$ty>()]);
                <$ty>::from_le_bytes(raw)
            }
            #[inline]
            fn put(&self, bytes: &mut [u8], at: usize) {
                bytes[at..at + size_of::<$ty>()].copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
integer_fields!(u8, u16, u32, u64);

impl<T: Field, const N: usize> Field for [T; N] {
    fn get(bytes: &[u8], at: usize) -> Self {
        std::array::from_fn(|i| T::get(bytes, at + i * size_of::<T>()))
    }
    fn put(&self, bytes: &mut [u8], at: usize) {
        for (i, item) in self.iter().enumerate() {
            item.put(bytes, at + i * size_of::<T>());
        }
    }
}

/// Defines a little-endian structure by a table of `field: type = offset`.
macro_rules! le_struct {
    ($(#[$doc:meta])* $name:ident, $size:expr, { $( $(#[$fdoc:meta])* $field:ident : $ty:ty = $at:expr ),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $( $(#[$fdoc])* pub $field: $ty, )* }

        impl $name {
            /// Bytes on disk.
            pub const SIZE: usize = $size;

            /// All fields zero.
            pub fn zeroed() -> Self {
                Self::get(&[0; $size])
            }

            /// Reads the fields of at least [`Self::SIZE`] bytes without judging them.
            fn get(bytes: &[u8]) -> Self {
                Self { $( $field: crate::ext4::layout::Field::get(bytes, $at), )* }
            }

            /// Writes the fields over the first [`Self::SIZE`] bytes of `bytes`; bytes that belong to no field are left alone.
            /// Panics when `bytes` is shorter.
            pub fn write(&self, bytes: &mut [u8]) {
                $( crate::ext4::layout::Field::put(&self.$field, bytes, $at); )*
            }
        }
    };
}
pub(crate) use le_struct;

/// What is wrong with an image, as an error. (Reading happens in the edit stage; the formatter only writes.)
pub(crate) fn corrupt(object: impl Into<String>, message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, Stage::Edit, object, message)
}

/// Fails unless `bytes` has at least `len` bytes.
pub(crate) fn need(bytes: &[u8], len: usize, what: &str) -> crate::error::Result<()> {
    if bytes.len() < len { Err(corrupt(what, format!("has {} bytes, needs {len}", bytes.len()))) } else { Ok(()) }
}

#[cfg(test)]
mod tests;

//! Damage to a golden: an input is a list of small changes of its metadata, most of them with the checksums made right again, because what a
//! checksum stops never reaches the code behind it.

use std::{collections::BTreeSet, os::unix::fs::FileExt};

use arbitrary::{Arbitrary, Result, Unstructured};
use cloudletd::ext4::{
    csum,
    layout::{get_u16, get_u32, put_u16, put_u32},
};

use crate::goldens::{self, Golden, Sum};

/// Changes in one input.
const CHANGES_MAX: usize = 12;

/// One change.
#[derive(Debug, Clone, Copy, Arbitrary)]
struct Change {
    piece: u16,
    at: u16,
    what: What,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum What {
    Byte(u8),
    Half(u16),
    Word(u32),
    Long(u64),
    /// Numbers at the edges of types and of the golden.
    Edge(u8),
    /// Adds to a 16-bit or 32-bit number.
    Add16(i8),
    Add32(i8),
    /// Bytes of another piece.
    Copy {
        from: u16,
        len: u8,
    },
    /// A run of one byte.
    Fill {
        len: u16,
        byte: u8,
    },
}

/// A damaged golden. Repaired when dropped.
pub struct Damaged {
    pub golden: &'static Golden,
    dirty: BTreeSet<usize>,
}

impl Damaged {
    /// Takes the choice of a golden and the changes from an input.
    pub fn from_input(input: &mut Unstructured<'_>) -> Result<Damaged> {
        let goldens = goldens::all();
        let golden = &goldens[usize::from(u8::arbitrary(input)?) % goldens.len()];
        let count = usize::from(u8::arbitrary(input)?) % (CHANGES_MAX + 1);
        let sums_are_right = u8::arbitrary(input)? % 8 != 7;
        let mut damaged = Damaged { golden, dirty: BTreeSet::new() };
        let mut bytes = Bytes { golden, changed: Vec::new() };
        for _ in 0..count {
            let change = Change::arbitrary(input)?;
            damaged.dirty.insert(bytes.apply(&change));
        }
        if sums_are_right {
            damaged.resum(&mut bytes);
        }
        for (piece, content) in &bytes.changed {
            golden.file.write_all_at(content, golden.pieces[*piece].at as u64).expect("damage");
        }
        Ok(damaged)
    }

    /// Whether there is no damage at all.
    pub fn is_whole(&self) -> bool {
        self.dirty.is_empty()
    }

    /// Makes checksums right: of what was changed, of what belongs to a changed inode (their seed has its generation), of the descriptors of
    /// changed bitmaps.
    fn resum(&mut self, bytes: &mut Bytes) {
        let golden = self.golden;
        let touched: Vec<Sum> = self.dirty.iter().map(|piece| golden.pieces[*piece].sum).collect();
        for (number, piece) in golden.pieces.iter().enumerate() {
            let follows = match piece.sum {
                Sum::Extents { ino } | Sum::Leaf { ino } | Sum::Index { ino, .. } => touched.contains(&Sum::Inode { ino }),
                Sum::Desc { group } => touched.contains(&Sum::BlockBitmap { group }) || touched.contains(&Sum::InodeBitmap { group }),
                _ => false,
            };
            if follows {
                self.dirty.insert(number);
            }
        }
        // Bitmaps come behind their descriptors in the list, and their sums stand in those.
        for piece in self.dirty.clone().into_iter().rev() {
            bytes.resum(piece);
        }
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        for piece in &self.dirty {
            let (at, len) = (self.golden.pieces[*piece].at, sector_len(self.golden, *piece));
            self.golden.file.write_all_at(&self.golden.bytes[at..at + len], at as u64).expect("repair");
        }
    }
}

/// Bytes that are held of a piece: the superblock's is checksummed as a whole.
fn sector_len(golden: &Golden, piece: usize) -> usize {
    let piece = &golden.pieces[piece];
    if piece.sum == Sum::Super { 1024 } else { piece.len }
}

/// The changed pieces of a golden.
struct Bytes {
    golden: &'static Golden,
    changed: Vec<(usize, Vec<u8>)>,
}

impl Bytes {
    fn piece(&mut self, number: usize) -> &mut Vec<u8> {
        let at = match self.changed.iter().position(|(other, _)| *other == number) {
            Some(at) => at,
            None => {
                let start = self.golden.pieces[number].at;
                self.changed.push((number, self.golden.bytes[start..start + sector_len(self.golden, number)].to_vec()));
                self.changed.len() - 1
            }
        };
        &mut self.changed[at].1
    }

    fn number_of(&self, sum: Sum) -> Option<usize> {
        self.golden.pieces.iter().position(|piece| piece.sum == sum)
    }

    /// Gives the number of the piece that it changed.
    fn apply(&mut self, change: &Change) -> usize {
        let golden = self.golden;
        let number = usize::from(change.piece) % golden.pieces.len();
        let len = golden.pieces[number].len;
        let at = usize::from(change.at) % len;
        let source = if let What::Copy { from, .. } = change.what { self.piece(usize::from(from) % golden.pieces.len()).clone() } else { Vec::new() };
        let blocks = golden.bytes.len() / 1024;
        let piece = self.piece(number);
        let old = |width: usize| {
            let mut raw = [0; 4];
            let width = width.min(len - at);
            raw[..width].copy_from_slice(&piece[at..at + width]);
            u32::from_le_bytes(raw)
        };
        let new = match change.what {
            What::Byte(byte) => vec![byte],
            What::Half(half) => half.to_le_bytes().to_vec(),
            What::Word(word) => word.to_le_bytes().to_vec(),
            What::Long(long) => long.to_le_bytes().to_vec(),
            What::Edge(which) => {
                let edges = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, blocks as u32, blocks as u32 / 4];
                let width = [1, 2, 4, 4][usize::from(which >> 6)];
                edges[usize::from(which & 0x3f) % edges.len()].to_le_bytes()[..width].to_vec()
            }
            What::Add16(by) => (old(2) as u16).wrapping_add_signed(by.into()).to_le_bytes().to_vec(),
            What::Add32(by) => old(4).wrapping_add_signed(by.into()).to_le_bytes().to_vec(),
            What::Copy { len, .. } => source[at % source.len()..].iter().copied().take(usize::from(len)).collect(),
            What::Fill { len, byte } => vec![byte; usize::from(len)],
        };
        let width = new.len().min(len - at);
        piece[at..at + width].copy_from_slice(&new[..width]);
        number
    }

    fn resum(&mut self, number: usize) {
        let (seed, sum) = (self.golden.seed, self.golden.pieces[number].sum);
        if !self.golden.has_sums {
            // With uninit_bg descriptors have a CRC-16.
            if let Sum::Desc { group } = sum {
                let uuid = self.golden.bytes[1024 + 0x68..][..16].try_into().expect("16 bytes");
                let piece = self.piece(number);
                let sum = csum::group_desc_crc16(&uuid, group, piece);
                put_u16(piece, 0x1e, sum);
            }
            return;
        }
        let inode_seed = |bytes: &mut Bytes, ino: u32| {
            let inode = bytes.number_of(Sum::Inode { ino }).expect("every inode is listed");
            csum::inode_seed(seed, ino, get_u32(bytes.piece(inode), 0x64))
        };
        match sum {
            Sum::None => {}
            Sum::Super => {
                let piece = self.piece(number);
                let sum = csum::superblock(piece);
                put_u32(piece, csum::SUPER_CSUM_AT, sum);
            }
            Sum::Desc { group } => {
                let piece = self.piece(number);
                let sum = csum::group_desc(seed, group, piece);
                put_u16(piece, 0x1e, sum);
            }
            Sum::BlockBitmap { group } | Sum::InodeBitmap { group } => {
                let bits = csum::bitmap(seed, self.piece(number));
                let (low, high) = if matches!(sum, Sum::BlockBitmap { .. }) { (0x18, 0x38) } else { (0x1a, 0x3a) };
                let desc = self.number_of(Sum::Desc { group }).expect("every group is listed");
                let desc = self.piece(desc);
                put_u16(desc, low, bits as u16);
                if desc.len() >= 64 {
                    put_u16(desc, high, (bits >> 16) as u16);
                }
            }
            Sum::Inode { ino } => csum::set_inode(seed, ino, self.piece(number)),
            Sum::Extents { ino } => {
                let seed = inode_seed(self, ino);
                csum::set_extent_block(seed, self.piece(number));
            }
            Sum::Leaf { ino } => {
                let seed = inode_seed(self, ino);
                let piece = self.piece(number);
                // A damaged tail stays damaged.
                if get_u16(piece, piece.len() - 8) == 12 {
                    csum::set_dir_leaf(seed, piece);
                }
            }
            Sum::Index { ino, count_at } => {
                let seed = inode_seed(self, ino);
                csum::set_dx_block(seed, self.piece(number), count_at);
            }
            Sum::Xattrs { block } => csum::set_xattr_block(seed, block, self.piece(number)),
        }
    }
}

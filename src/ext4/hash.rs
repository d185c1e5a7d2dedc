//! Hashes of names in indexed directories (htree), as Linux `fs/ext4/hash.c` computes them.
//!
//! The filesystem chooses the algorithm (`s_def_hash_version`, copied to the root of each directory), a 128-bit seed (`s_hash_seed`) and,
//! by `s_flags`, whether `char` was signed on the machine that made it: names with bytes ≥ 0x80 hash differently. The lowest bit is not part
//! of the hash (in an index it marks a collision that goes on in the next leaf), and the largest value is reserved for the end of a directory.

/// Which algorithm, in the numbering of `s_def_hash_version` and `dx_root_info.hash_version` (0..=2; the unsigned ones are 3..=5 in memory).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashVersion {
    /// The hash of the first implementation.
    Legacy,
    /// MD4 cut to three rounds of eight steps; the default.
    HalfMd4,
    /// The Tiny Encryption Algorithm.
    Tea,
}

/// Whether bytes of a name count as `signed char` (`EXT2_FLAGS_SIGNED_HASH`) or `unsigned char` (`EXT2_FLAGS_UNSIGNED_HASH`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signedness {
    /// −128..=127.
    Signed,
    /// 0..=255.
    Unsigned,
}

/// How one filesystem hashes the names of one directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirHasher {
    /// The algorithm.
    pub version: HashVersion,
    /// How bytes are widened.
    pub signedness: Signedness,
    /// The four little-endian words of `s_hash_seed`; all zero means the default start values.
    pub seed: [u32; 4],
}

/// The hash of the directory's end in a 32-bit htree, before the shift; no name has it.
const EOF_32BIT: u32 = 0x7fff_ffff;
const START: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];

impl HashVersion {
    /// From the number on disk. The numbers 3, 4 and 5 (the unsigned variants, only ever used in memory) are accepted for their algorithm.
    pub fn from_disk(number: u8) -> Option<HashVersion> {
        match number {
            0 | 3 => Some(HashVersion::Legacy),
            1 | 4 => Some(HashVersion::HalfMd4),
            2 | 5 => Some(HashVersion::Tea),
            _ => None,
        }
    }

    /// The number on disk.
    pub fn to_disk(self) -> u8 {
        match self {
            HashVersion::Legacy => 0,
            HashVersion::HalfMd4 => 1,
            HashVersion::Tea => 2,
        }
    }
}

impl DirHasher {
    /// The seed's 16 bytes as words.
    pub fn seed_words(seed: &[u8; 16]) -> [u32; 4] {
        std::array::from_fn(|i| u32::from_le_bytes([seed[4 * i], seed[4 * i + 1], seed[4 * i + 2], seed[4 * i + 3]]))
    }

    /// The major hash of a name: even, below `0xffff_fffe`. `.` and `..` are hashed like any other name; callers treat them apart.
    pub fn hash(&self, name: &[u8]) -> u32 {
        self.hash_both(name).0
    }

    /// The major and the minor hash. The minor one orders readdir(3) within one major hash and is never stored.
    pub fn hash_both(&self, name: &[u8]) -> (u32, u32) {
        let mut state = if self.seed == [0; 4] { START } else { self.seed };
        let (major, minor) = match self.version {
            HashVersion::Legacy => (legacy(name, self.signedness), 0),
            HashVersion::HalfMd4 => {
                for start in (0..name.len()).step_by(32) {
                    half_md4(&mut state, &words::<8>(&name[start..], self.signedness));
                }
                (state[1], state[2])
            }
            HashVersion::Tea => {
                for start in (0..name.len()).step_by(16) {
                    tea(&mut state, &words::<4>(&name[start..], self.signedness));
                }
                (state[0], state[1])
            }
        };
        let major = major & !1;
        (if major == EOF_32BIT << 1 { (EOF_32BIT - 1) << 1 } else { major }, minor)
    }
}

fn widen(byte: u8, signedness: Signedness) -> u32 {
    match signedness {
        Signedness::Signed => i32::from(byte as i8) as u32,
        Signedness::Unsigned => u32::from(byte),
    }
}

fn legacy(name: &[u8], signedness: Signedness) -> u32 {
    let (mut hash0, mut hash1) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
    for byte in name {
        let mut hash = hash1.wrapping_add(hash0 ^ widen(*byte, signedness).wrapping_mul(7_152_373));
        if hash & 0x8000_0000 != 0 {
            hash = hash.wrapping_sub(0x7fff_ffff);
        }
        hash1 = hash0;
        hash0 = hash;
    }
    hash0 << 1
}

/// `str2hashbuf`: up to 4·N bytes as big-endian words, padded with the length of all that is left of the name.
fn words<const N: usize>(rest: &[u8], signedness: Signedness) -> [u32; N] {
    let len = rest.len() as u32;
    let mut pad = len | (len << 8);
    pad |= pad << 16;
    let mut out = [pad; N];
    for (word, chunk) in out.iter_mut().zip(rest.chunks(4)) {
        *word = chunk.iter().fold(pad, |value, byte| widen(*byte, signedness).wrapping_add(value << 8));
    }
    out
}

fn half_md4(state: &mut [u32; 4], input: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    let f: Mix = |x, y, z| z ^ (x & (y ^ z));
    let g: Mix = |x, y, z| (x & y).wrapping_add((x ^ y) & z);
    let h: Mix = |x, y, z| x ^ y ^ z;
    const K2: u32 = 0x5a82_7999;
    const K3: u32 = 0x6ed9_eba1;
    let rounds: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (f, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (g, K2, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (h, K3, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, key, order, shifts) in rounds {
        for (step, index) in order.into_iter().enumerate() {
            let next = a.wrapping_add(mix(b, c, d)).wrapping_add(input[index]).wrapping_add(key).rotate_left(shifts[step % 4]);
            (a, b, c, d) = (d, next, b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

fn tea(state: &mut [u32; 4], input: &[u32; 4]) {
    let [a, b, c, d] = *input;
    let (mut b0, mut b1, mut sum) = (state[0], state[1], 0_u32);
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        b0 = b0.wrapping_add((b1 << 4).wrapping_add(a) ^ b1.wrapping_add(sum) ^ (b1 >> 5).wrapping_add(b));
        b1 = b1.wrapping_add((b0 << 4).wrapping_add(c) ^ b0.wrapping_add(sum) ^ (b0 >> 5).wrapping_add(d));
    }
    state[0] = state[0].wrapping_add(b0);
    state[1] = state[1].wrapping_add(b1);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `debugfs -R "dx_hash -h <algorithm> [-s 01234567-89ab-cdef-0123-456789abcdef] <name>"` of e2fsprogs 1.47.0 prints.
    const KNOWN: [(HashVersion, bool, &str, u32, u32); 15] = [
        (HashVersion::Legacy, true, "a", 0xe74b_53e2, 0),
        (HashVersion::Legacy, true, "lost+found", 0x5e2a_ba24, 0),
        (HashVersion::Legacy, true, "a_name_of_more_than_thirty-two_bytes_in_all", 0xbf43_0924, 0),
        (HashVersion::Legacy, true, "grün", 0xc202_f150, 0),
        (HashVersion::Legacy, false, "hello", 0x3225_2546, 0),
        (HashVersion::HalfMd4, true, "a", 0x35dc_0cc4, 0x3f1d_acef),
        (HashVersion::HalfMd4, true, "lost+found", 0x663b_dc72, 0x562e_f5d8),
        (HashVersion::HalfMd4, true, "a_name_of_more_than_thirty-two_bytes_in_all", 0x3bb1_0fa8, 0x703c_f07a),
        (HashVersion::HalfMd4, true, "grün", 0x31cb_1010, 0x236c_ad79),
        (HashVersion::HalfMd4, false, "hello", 0x1746_da32, 0x4200_13b5),
        (HashVersion::Tea, true, "a", 0x6d0e_a4c0, 0xc189_22df),
        (HashVersion::Tea, true, "lost+found", 0x2dbf_9e80, 0xbfeb_ee4f),
        (HashVersion::Tea, true, "a_name_of_more_than_thirty-two_bytes_in_all", 0x81c1_b31e, 0x556d_38f6),
        (HashVersion::Tea, true, "grün", 0xa7ae_33b6, 0x3c9e_4704),
        (HashVersion::Tea, false, "hello", 0x6f5b_b1a8, 0x2319_17c2),
    ];
    const SEED: [u8; 16] = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef];

    #[test]
    fn hashes_are_those_of_e2fsprogs() {
        for (version, seeded, name, major, minor) in KNOWN {
            let seed = if seeded { DirHasher::seed_words(&SEED) } else { [0; 4] };
            let hasher = DirHasher { version, signedness: Signedness::Signed, seed };
            assert_eq!(hasher.hash_both(name.as_bytes()), (major, minor), "{version:?} {name}");
        }
    }

    #[test]
    fn signedness_matters_for_bytes_above_127_only() {
        for version in [HashVersion::Legacy, HashVersion::HalfMd4, HashVersion::Tea] {
            let signed = DirHasher { version, signedness: Signedness::Signed, seed: [1, 2, 3, 4] };
            let unsigned = DirHasher { signedness: Signedness::Unsigned, ..signed };
            assert_eq!(signed.hash(b"plain"), unsigned.hash(b"plain"));
            assert_ne!(signed.hash("grün".as_bytes()), unsigned.hash("grün".as_bytes()));
        }
    }

    #[test]
    fn the_lowest_bit_is_never_set() {
        for n in 0..10_000_u32 {
            let hasher = DirHasher { version: HashVersion::HalfMd4, signedness: Signedness::Signed, seed: [9, 9, 9, n] };
            assert_eq!(hasher.hash(&n.to_le_bytes()) & 1, 0);
        }
    }
}

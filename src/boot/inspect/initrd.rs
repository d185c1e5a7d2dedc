//! What an initrd holds: cpio archives of the newc format, one after another, plain or packed, as the kernel unpacks them
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Microcode comes first in an archive of its own, the root that matters behind it, packed.
//!
//! Names only: nothing is written anywhere, and contents are skipped. Padding between archives is of zeros.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};

use super::unpack::Packing;
use crate::{
    error::{Error, Kind, Result, Stage},
    units::{GIB, MIB},
};

/// Bytes that come out of all archives. A generic dracut initrd with firmware has 300 MB.
pub const UNPACKED_LEN_MAX: u64 = GIB;
/// Entries of all archives.
const ENTRIES_MAX: u32 = 200_000;
/// PATH_MAX, as the kernel has it.
const NAME_LEN_MAX: u32 = 4096;
/// Archives in one file.
const ARCHIVES_MAX: usize = 16;
/// Kernel modules that are kept by name; distributions have five thousand in all.
const MODULES_MAX: usize = 16_384;
const MODULE_NAME_LEN_MAX: usize = 64;
/// modules.builtin of a kernel: 30 KB.
const BUILTIN_LEN_MAX: u64 = MIB;

/// What an initrd holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InitrdFacts {
    /// How each archive in it is packed, in order; none for a plain one.
    pub archives: Vec<Option<Packing>>,
    /// Kernel modules by name as the kernel has it (underscores), sorted.
    pub modules: Vec<String>,
    /// Modules that its own `modules.builtin` says are part of the kernel.
    pub builtin: Vec<String>,
    /// Entries of all archives.
    pub entries: u32,
    /// Whether there is an `init` to run.
    pub has_init: bool,
}

/// Reads an initrd. `Kind::Corrupt`, reason `INITRD_UNREADABLE`, for what is none, or is damaged or beyond the limits above.
pub fn read(bytes: &[u8]) -> Result<InitrdFacts> {
    let mut facts = InitrdFacts::default();
    let mut reader = Reader { facts: &mut facts, left: UNPACKED_LEN_MAX };
    reader.all(bytes).map_err(|error| {
        Error::new(Kind::Corrupt, Stage::Golden, "initrd", "it can't be read as cpio archives").with_reason("INITRD_UNREADABLE").with_source(error)
    })?;
    for names in [&mut facts.modules, &mut facts.builtin] {
        names.sort_unstable();
        names.dedup();
    }
    Ok(facts)
}

fn corrupt(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

struct Reader<'a> {
    facts: &'a mut InitrdFacts,
    left: u64,
}

impl Reader<'_> {
    fn all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some(start) = bytes.iter().position(|byte| *byte != 0) {
            bytes = &bytes[start..];
            if self.facts.archives.len() == ARCHIVES_MAX {
                return Err(corrupt("there are more archives in it than are read"));
            }
            if bytes.starts_with(b"07070") {
                self.facts.archives.push(None);
                self.archive(&mut bytes)?;
                continue;
            }
            match Packing::detect(bytes) {
                Some(packing) => {
                    self.facts.archives.push(Some(packing));
                    let before = bytes.len();
                    self.packed(packing, &mut bytes)?;
                    if bytes.len() == before {
                        return Err(corrupt("an archive in it is empty"));
                    }
                }
                // What signs or pads a file behind its archives; the kernel says "junk" and goes on.
                None if !self.facts.archives.is_empty() => return Ok(()),
                None => return Err(corrupt("neither an archive nor a known compression")),
            }
        }
        if self.facts.archives.is_empty() { Err(corrupt("it is empty")) } else { Ok(()) }
    }

    /// A stream of archives; read to its end, so that what follows it is found.
    fn packed(&mut self, packing: Packing, bytes: &mut &[u8]) -> io::Result<()> {
        let mut plain = io::BufReader::with_capacity(64 << 10, packing.decoder(bytes)?);
        loop {
            let buffer = plain.fill_buf()?;
            if buffer.is_empty() {
                return Ok(());
            }
            let zeros = buffer.iter().take_while(|byte| **byte == 0).count();
            if zeros == 0 {
                self.archive(&mut plain)?;
            } else {
                self.spend(zeros as u64)?;
                plain.consume(zeros);
            }
        }
    }

    fn spend(&mut self, bytes: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| corrupt("it is too large unpacked"))?;
        Ok(())
    }

    /// One archive, up to and with its trailer.
    fn archive(&mut self, input: &mut impl Read) -> io::Result<()> {
        loop {
            let mut header = [0; 110];
            input.read_exact(&mut header)?;
            if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
                return Err(corrupt("an entry of an archive begins with something else"));
            }
            // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
            let (mode, len, name_len) = (field(&header, 1)?, field(&header, 6)?, field(&header, 11)?);
            if name_len == 0 || name_len > NAME_LEN_MAX {
                return Err(corrupt("an entry's name is too long, or there is none"));
            }
            let padded = (u64::from(name_len) + 110).next_multiple_of(4) - 110;
            self.spend(110 + padded + u64::from(len).next_multiple_of(4))?;
            let mut name = Vec::new();
            exactly(input, padded, &mut name)?;
            name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name_len as usize));
            if name == b"TRAILER!!!" {
                return skip(input, u64::from(len).next_multiple_of(4));
            }
            self.facts.entries += 1;
            if self.facts.entries > ENTRIES_MAX {
                return Err(corrupt("it has too many entries"));
            }
            self.entry(&name, mode, u64::from(len), input)?;
        }
    }

    fn entry(&mut self, name: &[u8], mode: u32, len: u64, input: &mut impl Read) -> io::Result<()> {
        const REGULAR: u32 = 0o100_000;
        let name = std::str::from_utf8(name).unwrap_or_default().trim_start_matches("./").trim_start_matches('/');
        let is_file = mode & 0o170_000 == REGULAR;
        self.facts.has_init |= name == "init" && mode & 0o170_000 != 0o040_000;
        if is_file && let Some(module) = module_name(name) {
            keep(&mut self.facts.modules, module);
        }
        let padding = len.next_multiple_of(4) - len;
        if is_file && name.ends_with("/modules.builtin") && len <= BUILTIN_LEN_MAX {
            let mut text = Vec::new();
            exactly(input, len, &mut text)?;
            for module in String::from_utf8_lossy(&text).lines().filter_map(module_name) {
                keep(&mut self.facts.builtin, module);
            }
            return skip(input, padding);
        }
        skip(input, len + padding)
    }
}

fn keep(modules: &mut Vec<String>, module: String) {
    if modules.len() < MODULES_MAX {
        modules.push(module);
    }
}

/// The module that a path is of: `…/virtio-blk.ko.xz` is `virtio_blk`.
pub fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz", ".ko.lz4", ".ko.bz2"].iter().find_map(|suffix| file.strip_suffix(suffix))?;
    let fits = (1..=MODULE_NAME_LEN_MAX).contains(&stem.len()) && stem.bytes().all(|byte| byte.is_ascii_graphic());
    fits.then(|| stem.replace('-', "_"))
}

/// One of the thirteen numbers, eight hexadecimal digits each.
fn field(header: &[u8; 110], index: usize) -> io::Result<u32> {
    let digits = header.get(6 + index * 8..14 + index * 8).unwrap_or_default();
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()));
    text.and_then(|text| u32::from_str_radix(text, 16).ok()).ok_or_else(|| corrupt("a number of an entry is none"))
}

fn exactly(input: &mut impl Read, len: u64, out: &mut Vec<u8>) -> io::Result<()> {
    if (input.take(len).read_to_end(out)? as u64) < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

fn skip(input: &mut impl Read, len: u64) -> io::Result<()> {
    if io::copy(&mut input.take(len), &mut io::sink())? < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::inspect::unpack::tests::{READ, pack};

    /// An archive of these files.
    pub(crate) fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, content) in files.iter().chain(&[("TRAILER!!!", &b""[..])]) {
            let fields = [1, 0o100_644, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
            out.extend_from_slice(b"070701");
            fields.iter().for_each(|field| out.extend(format!("{field:08x}").bytes()));
            out.extend_from_slice(name.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend_from_slice(content);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    fn main_archive() -> Vec<u8> {
        cpio(&[
            ("init", b"#!/bin/sh"),
            ("usr/lib/modules/6.1/kernel/drivers/block/virtio_blk.ko", b"x"),
            ("usr/lib/modules/6.1/kernel/drivers/block/xen-blkfront.ko.xz", b"xyz"),
            ("usr/lib/modules/6.1/kernel/fs/ext4/ext4.ko.zst", b""),
            ("usr/lib/modules/6.1/modules.builtin", b"kernel/drivers/nvme/host/nvme.ko\nkernel/fs/btrfs/btrfs.ko\n"),
            ("etc/notes.ko.txt", b""),
        ])
    }

    #[test]
    fn archives_behind_microcode_are_read_in_every_packing() {
        for packing in READ {
            let mut bytes = cpio(&[("kernel/x86/microcode/GenuineIntel.bin", &[7; 1000])]);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            bytes.extend(pack(packing, &main_archive()));
            let facts = read(&bytes).expect("an initrd");
            assert_eq!(facts.archives, [None, Some(packing)]);
            assert_eq!(facts.modules, ["ext4", "virtio_blk", "xen_blkfront"]);
            assert_eq!(facts.builtin, ["btrfs", "nvme"]);
            assert!(facts.has_init && facts.entries == 7, "{facts:?}");
        }
        // Two packed ones, padded: what credentials and overlays of systemd look like.
        let mut bytes = pack(Packing::Gzip, &main_archive());
        bytes.extend([0; 7]);
        bytes.extend(pack(Packing::Zstd, &cpio(&[("more.ko", b"")])));
        assert!(read(&bytes).expect("an initrd").modules.contains(&"more".to_owned()));
    }

    #[test]
    fn what_is_no_initrd_is_refused() {
        let whole = main_archive();
        for bytes in [&b""[..], &[0; 512], b"text", &whole[..whole.len() - 200], &pack(Packing::Zstd, b"no archive"), &pack(Packing::Lzo, b"")] {
            assert_eq!(read(bytes).expect_err("none").reason(), "INITRD_UNREADABLE");
        }
        let mut huge = cpio(&[("a", b"")]);
        huge[54..62].copy_from_slice(b"ffffffff");
        let chain = read(&huge).expect_err("too large").chain();
        assert!(chain.contains("too large"), "{chain}");
    }

    proptest! {
        #[test]
        fn hostile_initrds_give_answers(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12), len in any::<prop::sample::Index>()) {
            let mut bytes = main_archive();
            bytes.extend(pack(Packing::Zstd, &main_archive()));
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(len.index(bytes.len() * 2).min(bytes.len()));
            if let Ok(facts) = read(&bytes) {
                prop_assert!(facts.modules.is_sorted() && !facts.archives.is_empty());
            }
        }
    }
}

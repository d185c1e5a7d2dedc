//! What a kernel's file can do, from its bytes.
//!
//! | format | how it is known | source |
//! |---|---|---|
//! | bzImage | `HdrS` at 0x202; from protocol 2.08 the payload is an ELF file, packed | Documentation/arch/x86/boot.rst |
//! | EFI zboot | `MZ`, `zimg` at 4; the payload is another kernel, packed | drivers/firmware/efi/libstub/zboot-header.S |
//! | Image of arm64 and riscv | `ARM\x64`, `RSC\x05` at 56 | Documentation/arch/arm64/booting.rst, riscv/boot-image-header.rst |
//! | ELF | magic | elf(5) |
//! | one of these packed as a whole | magic of the compression | |
//!
//! A header is believed only as far as the bytes go. A PVH entry is a note inside the packed payload, so the payload is unpacked up to the note.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};

use super::{
    elf::{self, Elf},
    unpack::Packing,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    units::MIB,
};

/// Bytes of a kernel unpacked. Debian's has 60 MB, one with everything built in 120.
pub const UNPACKED_LEN_MAX: u64 = 256 * MIB;
/// As much of a packed kernel as is looked at to know its format.
const HEAD_LEN: u64 = 4096;

/// What a kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// x86's, with a setup header.
    BzImage,
    /// A UEFI program with a packed kernel in it.
    EfiZboot,
    /// The plain image of arm64 and riscv.
    Image,
    /// An ELF file (vmlinux).
    Elf,
}

/// What a kernel can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelFacts {
    /// Format of the file, or of what is packed in it.
    pub format: Format,
    /// Architecture in the kernel's words (`uname -m`), if it is known.
    pub machine: Option<String>,
    /// x86's boot protocol, e.g. 0x020f for 2.15.
    pub boot_protocol: Option<u16>,
    /// The kernel's own version text, e.g. `6.1.0-40-amd64 (debian-kernel@…) #1 SMP …`; printable ASCII, at most 256 bytes.
    pub release: Option<String>,
    /// How its payload is compressed; none for one that is not, or in a way that is not known (then a note says so).
    pub packing: Option<Packing>,
    /// Physical address at which Xen's PVH mode starts it.
    pub pvh_entry: Option<u64>,
    /// Whether Xen's paravirtual mode can start it; unknown when its ELF file was not seen.
    pub xen_pv: Option<bool>,
    /// Whether UEFI firmware can start it by itself.
    pub efi_stub: bool,
    /// Whether it carries a signature for Secure Boot; whose is not looked at.
    pub signed: bool,
    /// What could not be found out.
    pub notes: Vec<String>,
}

impl KernelFacts {
    fn new(format: Format) -> Self {
        KernelFacts {
            format,
            machine: None,
            boot_protocol: None,
            release: None,
            packing: None,
            pvh_entry: None,
            xen_pv: None,
            efi_stub: false,
            signed: false,
            notes: Vec::new(),
        }
    }

    fn of_elf(&mut self, elf: Elf) {
        self.pvh_entry = elf.pvh_entry;
        self.xen_pv = Some(elf.xen_pv);
        if let Some(machine) = elf.machine {
            self.machine = Some(machine.to_owned());
        }
    }
}

/// Reads a kernel. `Kind::Corrupt`, reason `KERNEL_FORMAT_UNKNOWN`, for what is none of the formats above. A payload that can't be read is no error: the facts
/// have a note then.
pub fn read(bytes: &[u8]) -> Result<KernelFacts> {
    let mut facts = match Packing::detect(bytes) {
        Some(packing) => packed_whole(packing, bytes)?,
        None => plain(bytes)?,
    };
    if let Some(pe) = pe_of(bytes) {
        facts.efi_stub = true;
        facts.signed = pe.signed;
        if facts.machine.is_none() {
            facts.machine = pe.machine.map(str::to_owned);
        }
    }
    Ok(facts)
}

fn unknown(why: &str) -> Error {
    Error::new(Kind::Corrupt, Stage::Golden, "kernel", format!("it is no kernel in a known format: {why}")).with_reason("KERNEL_FORMAT_UNKNOWN")
}

/// A kernel's image with nothing around it.
fn plain(bytes: &[u8]) -> Result<KernelFacts> {
    if bytes.get(0x202..0x206) == Some(b"HdrS") && bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) {
        return Ok(bz_image(bytes));
    }
    if bytes.starts_with(b"MZ") && bytes.get(4..8) == Some(b"zimg") {
        return Ok(zboot(bytes));
    }
    if let Some(machine) = image_magic(bytes) {
        let mut facts = KernelFacts::new(Format::Image);
        facts.machine = Some(machine.to_owned());
        return Ok(facts);
    }
    if bytes.starts_with(b"\x7fELF") {
        let mut facts = KernelFacts::new(Format::Elf);
        note_elf(&mut facts, elf::read(bytes, UNPACKED_LEN_MAX));
        return Ok(facts);
    }
    Err(unknown("neither setup header, zboot, Image nor ELF"))
}

fn image_magic(bytes: &[u8]) -> Option<&'static str> {
    match bytes.get(56..60)? {
        b"ARM\x64" => Some("aarch64"),
        b"RSC\x05" => Some("riscv64"),
        _ => None,
    }
}

fn note_elf(facts: &mut KernelFacts, elf: io::Result<Elf>) {
    match elf {
        Ok(elf) => facts.of_elf(elf),
        Err(error) => facts.notes.push(format!("its ELF file can't be read: {error}")),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// The setup header of x86.
fn bz_image(bytes: &[u8]) -> KernelFacts {
    let mut facts = KernelFacts::new(Format::BzImage);
    let protocol = u16_at(bytes, 0x206).unwrap_or(0);
    facts.boot_protocol = Some(protocol);
    facts.release = u16_at(bytes, 0x20e).filter(|at| *at != 0).and_then(|at| text_at(bytes, usize::from(at) + 0x200));
    // XLF_KERNEL_64; before protocol 2.12 only the payload tells.
    let wide = protocol >= 0x020c && u16_at(bytes, 0x236).is_some_and(|flags| flags & 1 != 0);
    facts.machine = match (wide, protocol >= 0x020c) {
        (true, _) => Some("x86_64".into()),
        (false, true) => Some("i686".into()),
        (false, false) => None,
    };
    if protocol < 0x0208 {
        facts.notes.push("its boot protocol is older than 2.08: where its payload is is not known".into());
        return facts;
    }
    let sectors = bytes.get(0x1f1).copied().filter(|count| *count != 0).unwrap_or(4);
    let start = (usize::from(sectors) + 1) * 512;
    let range = |offset: u32, len: u32| {
        let from = start.checked_add(usize::try_from(offset).ok()?)?;
        bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)
    };
    match u32_at(bytes, 0x248).zip(u32_at(bytes, 0x24c)).and_then(|(offset, len)| range(offset, len)) {
        Some(payload) => of_payload(&mut facts, payload),
        None => facts.notes.push("its payload lies outside of the file".into()),
    }
    facts
}

/// The packed vmlinux.
fn of_payload(facts: &mut KernelFacts, payload: &[u8]) {
    facts.packing = Packing::detect(payload);
    match facts.packing {
        Some(packing) => note_elf(facts, packing.decoder(payload).and_then(|decoder| elf::read(decoder, UNPACKED_LEN_MAX))),
        None if payload.starts_with(b"\x7fELF") => note_elf(facts, elf::read(payload, UNPACKED_LEN_MAX)),
        None => facts.notes.push("its payload is compressed in an unknown way".into()),
    }
}

fn zboot(bytes: &[u8]) -> KernelFacts {
    let mut facts = KernelFacts::new(Format::EfiZboot);
    let range = |offset: u32, len: u32| {
        let from = usize::try_from(offset).ok()?;
        bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)
    };
    let Some(payload) = u32_at(bytes, 8).zip(u32_at(bytes, 12)).and_then(|(offset, len)| range(offset, len)) else {
        facts.notes.push("its payload lies outside of the file".into());
        return facts;
    };
    facts.packing = Packing::detect(payload);
    match facts.packing.map(|packing| head(packing, payload)) {
        Some(Ok(head)) => facts.machine = image_magic(&head).map(str::to_owned),
        Some(Err(error)) => facts.notes.push(format!("its payload can't be read: {error}")),
        None => facts.notes.push("its payload is compressed in an unknown way".into()),
    }
    facts
}

fn head(packing: Packing, bytes: impl BufRead) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    packing.decoder(bytes)?.take(HEAD_LEN).read_to_end(&mut head)?;
    Ok(head)
}

/// A kernel that is packed as a file: `Image.gz`, `vmlinux.xz`.
fn packed_whole(packing: Packing, bytes: &[u8]) -> Result<KernelFacts> {
    let head = head(packing, bytes).map_err(|error| unknown(&format!("{} that can't be read: {error}", packing.name())))?;
    let mut facts = if head.starts_with(b"\x7fELF") {
        let mut facts = KernelFacts::new(Format::Elf);
        note_elf(&mut facts, packing.decoder(bytes).and_then(|decoder| elf::read(decoder, UNPACKED_LEN_MAX)));
        facts
    } else {
        // No bzImage: its payload would be packed twice, and nobody starts that.
        let machine = image_magic(&head).ok_or_else(|| unknown(&format!("{} of something else", packing.name())))?;
        let mut facts = KernelFacts::new(Format::Image);
        facts.machine = Some(machine.to_owned());
        facts
    };
    facts.packing = Some(packing);
    Ok(facts)
}

/// A NUL-terminated text of the header.
fn text_at(bytes: &[u8], at: usize) -> Option<String> {
    let text: Vec<u8> = bytes.get(at..)?.iter().copied().take_while(|byte| *byte != 0).take(256).collect();
    (!text.is_empty() && text.iter().all(|byte| (0x20..0x7f).contains(byte))).then(|| String::from_utf8_lossy(&text).into_owned())
}

/// Whether a UEFI program carries a signature, by whoever; nothing for what is no such program.
pub fn is_signed(bytes: &[u8]) -> Option<bool> {
    pe_of(bytes).map(|pe| pe.signed)
}

struct Pe {
    machine: Option<&'static str>,
    signed: bool,
}

/// The headers of a UEFI program (PE/COFF): machine, and whether the table of certificates (data directory 4) has something.
fn pe_of(bytes: &[u8]) -> Option<Pe> {
    if !bytes.starts_with(b"MZ") {
        return None;
    }
    let at = usize::try_from(u32_at(bytes, 0x3c)?).ok()?;
    let header = bytes.get(at..)?;
    if !header.starts_with(b"PE\0\0") {
        return None;
    }
    let machine = match u16_at(header, 4)? {
        0x014c => Some("i686"),
        0x8664 => Some("x86_64"),
        0xaa64 => Some("aarch64"),
        0x5064 => Some("riscv64"),
        _ => None,
    };
    let optional = header.get(24..)?;
    // Directories begin after 96 bytes of a PE32 optional header, 112 of a PE32+ one; their number is in the word before.
    let directories = match u16_at(optional, 0)? {
        0x010b => 96,
        0x020b => 112,
        _ => return Some(Pe { machine, signed: false }),
    };
    let has_table = u32_at(optional, directories - 4)? > 4;
    let signed = has_table && u32_at(optional, directories + 4 * 8 + 4)? != 0;
    Some(Pe { machine, signed })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::boot::inspect::{
        elf::tests::elf64,
        unpack::tests::{READ, pack},
    };

    pub(crate) fn pvh_elf() -> Vec<u8> {
        elf64(62, 70_000, &[(b"Xen\0", 1, &[0; 8]), (b"Xen\0", 18, &0x100_0000_u64.to_le_bytes())])
    }

    /// A bzImage of protocol 2.15 with this payload, as the kernel's build makes it.
    pub(crate) fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 0x1000];
        bytes[0x1f1] = 7;
        bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bytes[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        bytes[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
        bytes[0x236] = 1;
        bytes[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        bytes[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes[0x500..0x506].copy_from_slice(b"6.1.0\0");
        bytes.resize(0x1010, 0xcc);
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn the_pvh_entry_is_found_in_every_packing() {
        let elf = pvh_elf();
        for packing in READ {
            let mut payload = pack(packing, &elf);
            payload.extend((elf.len() as u32).to_le_bytes());
            let facts = read(&bz_image(&payload)).expect("a kernel");
            let wanted = KernelFacts {
                machine: Some("x86_64".into()),
                boot_protocol: Some(0x020f),
                release: Some("6.1.0".into()),
                packing: Some(packing),
                pvh_entry: Some(0x100_0000),
                xen_pv: Some(true),
                ..KernelFacts::new(Format::BzImage)
            };
            assert_eq!(facts, wanted);
            let whole = read(&pack(packing, &elf)).expect("a kernel");
            assert_eq!((whole.format, whole.pvh_entry, whole.packing), (Format::Elf, Some(0x100_0000), Some(packing)));
        }
        assert_eq!(read(&elf).expect("a kernel").pvh_entry, Some(0x100_0000));
    }

    #[test]
    fn what_can_not_be_read_is_noted_and_what_is_no_kernel_refused() {
        let damaged = |payload: &[u8]| read(&bz_image(payload)).expect("a header").notes.join(" ");
        let packed = pack(Packing::Gzip, &pvh_elf());
        assert!(damaged(&packed[..packed.len() / 2]).contains("can't be read"));
        assert!(damaged(&pack(Packing::Lzo, b"")).contains("lzo"));
        assert!(damaged(b"what is this").contains("unknown way"));
        let mut outside = bz_image(&packed);
        outside.truncate(0x1100);
        assert!(read(&outside).expect("a header").notes.join(" ").contains("outside"));
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096], &pack(Packing::Xz, b"text")] {
            assert_eq!(read(bytes).expect_err("no kernel").reason(), "KERNEL_FORMAT_UNKNOWN");
        }
    }

    #[test]
    fn kernels_of_arm_are_known_plain_packed_and_as_efi_programs() {
        let mut image = vec![0; 64];
        image[..2].copy_from_slice(b"MZ");
        image[56..60].copy_from_slice(b"ARM\x64");
        image[0x3c..0x40].copy_from_slice(&[0; 4]);
        let facts = read(&image).expect("a kernel");
        assert_eq!((facts.format, facts.machine.as_deref()), (Format::Image, Some("aarch64")));
        let packed = pack(Packing::Gzip, &image);
        assert_eq!(read(&packed).expect("a kernel").machine.as_deref(), Some("aarch64"));
        // zboot, with PE headers that say that it is signed.
        let mut zboot = b"MZ\0\0zimg".to_vec();
        zboot.extend(512_u32.to_le_bytes());
        zboot.extend((packed.len() as u32).to_le_bytes());
        zboot.resize(512, 0);
        zboot[0x3c] = 0x40;
        zboot[0x40..0x46].copy_from_slice(b"PE\0\0\x64\xaa");
        zboot[0x58..0x5a].copy_from_slice(&[0x0b, 0x02]);
        zboot[0x58 + 108] = 16;
        zboot[0x58 + 112 + 36] = 8;
        zboot.extend(packed);
        let facts = read(&zboot).expect("a kernel");
        assert_eq!((facts.format, facts.machine.as_deref(), facts.packing), (Format::EfiZboot, Some("aarch64"), Some(Packing::Gzip)));
        assert!(facts.efi_stub && facts.signed);
    }

    proptest! {
        #[test]
        fn hostile_kernels_give_answers(mut changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40), len in any::<prop::sample::Index>()) {
            let mut bytes = bz_image(&pack(Packing::Gzip, &elf64(62, 10, &[(b"Xen\0", 18, &[1; 4])])));
            let whole = bytes.len();
            // Most damage where numbers are.
            for (number, (at, value)) in changes.drain(..).enumerate() {
                let at = if number % 2 == 0 { at.index(whole) } else { 0x1f0 + at.index(0x80) };
                bytes[at] = value;
            }
            bytes.truncate(1 + len.index(whole * 2).min(whole - 1));
            let _ = read(&bytes);
        }
    }
}

//! As much of ELF (elf(5)) as tells what starts a kernel: machine and notes. Read from a stream, so that a packed kernel needs no memory for its code.

use std::io::{self, Read};

/// Entry of the kernel for Xen's paravirtual mode (xen/include/public/elfnote.h).
const XEN_ENTRY: u32 = 1;
/// Entry for PVH, a physical address at which 32-bit code starts.
const XEN_PHYS32_ENTRY: u32 = 18;
const NOTES_MAX: usize = 64;
const NOTE_SEGMENTS_MAX: usize = 8;
const NOTES_LEN_MAX: u64 = 64 << 10;
const HEADERS_MAX: u16 = 256;
const PT_NOTE: u32 = 4;

/// What an ELF file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Elf {
    /// Architecture in the kernel's words; nothing for one that is not known here.
    pub machine: Option<&'static str>,
    /// The PVH entry.
    pub pvh_entry: Option<u64>,
    /// Whether there is an entry for Xen's paravirtual mode.
    pub xen_pv: bool,
}

struct Layout {
    wide: bool,
    little: bool,
}

impl Layout {
    fn u16(&self, bytes: &[u8], at: usize) -> Option<u16> {
        let bytes = *bytes.get(at..)?.first_chunk()?;
        Some(if self.little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    }

    fn u32(&self, bytes: &[u8], at: usize) -> Option<u32> {
        let bytes = *bytes.get(at..)?.first_chunk()?;
        Some(if self.little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    }

    /// An address or offset.
    fn word(&self, bytes: &[u8], at: usize) -> Option<u64> {
        if !self.wide {
            return self.u32(bytes, at).map(u64::from);
        }
        let bytes = *bytes.get(at..)?.first_chunk()?;
        Some(if self.little { u64::from_le_bytes(bytes) } else { u64::from_be_bytes(bytes) })
    }
}

/// Reads until the last note, at most `len_max` bytes. `InvalidData` for what is no ELF file or breaks its own limits, `UnexpectedEof` for half of one.
pub(super) fn read(input: impl Read, len_max: u64) -> io::Result<Elf> {
    let corrupt = |why: &'static str| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut input = Counted { input: input.take(len_max), at: 0 };
    let mut header = vec![0; 52];
    input.exact(&mut header)?;
    let layout = match header[..] {
        [0x7f, b'E', b'L', b'F', class @ (1 | 2), data @ (1 | 2), ..] => Layout { wide: class == 2, little: data == 1 },
        _ => return Err(corrupt("it is no ELF file")),
    };
    if layout.wide {
        header.resize(64, 0);
        input.exact(&mut header[52..])?;
    }
    let (table, size, count) = match layout.wide {
        true => (layout.word(&header, 32), layout.u16(&header, 54), layout.u16(&header, 56)),
        false => (layout.word(&header, 28), layout.u16(&header, 42), layout.u16(&header, 44)),
    };
    let (Some(table), Some(size), Some(count)) = (table, size, count) else { return Err(corrupt("its header is short")) };
    let machine = layout.u16(&header, 18).and_then(|machine| name_of_machine(machine, &layout));
    let mut elf = Elf { machine, ..Elf::default() };
    if count == 0 {
        return Ok(elf);
    }
    if count > HEADERS_MAX || size < if layout.wide { 56 } else { 32 } || size > 256 {
        return Err(corrupt("its program headers are not plausible"));
    }
    input.skip_to(table)?;
    let mut headers = vec![0; usize::from(size) * usize::from(count)];
    input.exact(&mut headers)?;
    let mut notes: Vec<(u64, u64)> = headers.chunks_exact(usize::from(size)).filter_map(|header| note_segment(&layout, header)).collect();
    notes.sort_unstable();
    for (offset, len) in notes.into_iter().take(NOTE_SEGMENTS_MAX) {
        if len > NOTES_LEN_MAX {
            return Err(corrupt("its notes are too long"));
        }
        // One that lies in another, or in the headers, was read with it.
        if offset < input.at {
            continue;
        }
        input.skip_to(offset)?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| corrupt("its notes are too long"))?];
        input.exact(&mut bytes)?;
        read_notes(&layout, &bytes, &mut elf);
    }
    Ok(elf)
}

/// Offset and length of a note segment.
fn note_segment(layout: &Layout, header: &[u8]) -> Option<(u64, u64)> {
    let (offset, len) = if layout.wide { (8, 32) } else { (4, 16) };
    (layout.u32(header, 0)? == PT_NOTE).then_some((layout.word(header, offset)?, layout.word(header, len)?))
}

/// Notes: lengths of name and descriptor, type, both padded to four bytes.
fn read_notes(layout: &Layout, mut bytes: &[u8], elf: &mut Elf) {
    for _ in 0..NOTES_MAX {
        let lengths = (layout.u32(bytes, 0), layout.u32(bytes, 4), layout.u32(bytes, 8));
        let (Some(name_len), Some(desc_len), Some(kind)) = lengths else { return };
        let padded = |len: u32| usize::try_from(len).ok()?.checked_next_multiple_of(4);
        let (Some(name_len), Some(desc_padded), Ok(desc_len)) = (padded(name_len), padded(desc_len), usize::try_from(desc_len)) else { return };
        let Some((name, rest)) = bytes.get(12..).and_then(|rest| rest.split_at_checked(name_len)) else { return };
        let Some(desc) = rest.get(..desc_len) else { return };
        if name.starts_with(b"Xen\0") {
            match kind {
                XEN_ENTRY => elf.xen_pv = true,
                XEN_PHYS32_ENTRY => {
                    elf.pvh_entry = match desc_len {
                        4 => layout.u32(desc, 0).map(u64::from),
                        8 => Layout { wide: true, little: layout.little }.word(desc, 0),
                        _ => None,
                    };
                }
                _ => {}
            }
        }
        bytes = rest.get(desc_padded..).unwrap_or_default();
    }
}

fn name_of_machine(machine: u16, layout: &Layout) -> Option<&'static str> {
    Some(match machine {
        3 => "i686",
        21 if layout.little => "ppc64le",
        21 => "ppc64",
        22 => "s390x",
        40 => "arm",
        62 => "x86_64",
        183 => "aarch64",
        243 if layout.wide => "riscv64",
        258 if layout.wide => "loongarch64",
        _ => return None,
    })
}

/// A stream whose position is known.
struct Counted<R> {
    input: R,
    at: u64,
}

impl<R: Read> Counted<R> {
    fn exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        self.input.read_exact(out)?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn skip_to(&mut self, offset: u64) -> io::Result<()> {
        let Some(len) = offset.checked_sub(self.at) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its program headers lie in its header"));
        };
        if io::copy(&mut (&mut self.input).take(len), &mut io::sink())? < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at = offset;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A 64-bit little-endian file with these notes (name with its NUL, type, descriptor) after `gap` bytes of something else.
    pub(crate) fn elf64(machine: u16, gap: usize, notes: &[(&[u8], u32, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, kind, desc) in notes {
            for number in [name.len() as u32, desc.len() as u32, *kind] {
                body.extend(number.to_le_bytes());
            }
            for part in [name, desc] {
                body.extend_from_slice(part);
                body.resize(body.len().next_multiple_of(4), 0);
            }
        }
        let mut file = vec![0; 64 + 56 + gap];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 4;
        file[72..80].copy_from_slice(&((120 + gap) as u64).to_le_bytes());
        file[96..104].copy_from_slice(&(body.len() as u64).to_le_bytes());
        file.extend(body);
        file
    }

    #[test]
    fn xens_notes_are_found_among_others() {
        let notes: [(&[u8], u32, &[u8]); 4] =
            [(b"GNU\0", 18, &[1; 20]), (b"Xen\0", 1, &[0; 8]), (b"Xen\0", 5, b"xen-3.0\0"), (b"Xen\0", 18, &0x100_0000_u64.to_le_bytes())];
        let file = elf64(62, 5000, &notes);
        let elf = read(&file[..], u64::MAX).expect("read");
        assert_eq!(elf, Elf { machine: Some("x86_64"), pvh_entry: Some(0x100_0000), xen_pv: true });
        let elf = read(&elf64(183, 0, &notes[..1])[..], u64::MAX).expect("read");
        assert_eq!(elf, Elf { machine: Some("aarch64"), pvh_entry: None, xen_pv: false });
        for len in 0..file.len() {
            assert_eq!(read(&file[..len], u64::MAX).expect_err("half a file").kind(), io::ErrorKind::UnexpectedEof, "{len}");
        }
        assert!(read(&file[..], 4000).is_err(), "notes beyond the limit");
    }
}

//! Makes a damaged tar archive hang together again: checksums of headers, lengths of the records of extended headers. Without this hardly any
//! mutation gets past the first header.

const BLOCK: usize = 512;

/// Repairs what is repaired in place; the length stays.
pub fn repair(archive: &mut [u8]) {
    let mut at = 0;
    while at + BLOCK <= archive.len() {
        let (header, rest) = archive[at..].split_at_mut(BLOCK);
        at += BLOCK;
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        let size = octal(&header[124..136]).filter(|size| *size <= rest.len());
        if let (b'x' | b'g', Some(size)) = (header[156], size) {
            let room = size.next_multiple_of(BLOCK).min(rest.len());
            let records = records(&rest[..size]);
            if records.len() <= room {
                rest[..records.len()].copy_from_slice(&records);
                rest[records.len()..room].fill(0);
                header[124..136].copy_from_slice(format!("{:011o}\0", records.len()).as_bytes());
            }
        }
        at += octal(&header[124..136]).filter(|size| *size <= rest.len()).unwrap_or(0).next_multiple_of(BLOCK);
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

fn octal(field: &[u8]) -> Option<usize> {
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if text.is_empty() { Some(0) } else { usize::from_str_radix(text, 8).ok() }
}

/// The same records with their lengths right. A value with a newline becomes two records, of which the second has no key.
fn records(damaged: &[u8]) -> Vec<u8> {
    let mut repaired = Vec::with_capacity(damaged.len() + 16);
    for line in damaged.split_inclusive(|byte| *byte == b'\n') {
        let digits = line.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let Some(record) = line[digits..].strip_prefix(b" ").filter(|record| record.contains(&b'=') && record.ends_with(b"\n")) else {
            repaired.extend_from_slice(line);
            continue;
        };
        // The length counts its own digits.
        let mut len = record.len() + 2;
        while len != record.len() + 1 + len.to_string().len() {
            len = record.len() + 1 + len.to_string().len();
        }
        repaired.extend_from_slice(len.to_string().as_bytes());
        repaired.push(b' ');
        repaired.extend_from_slice(record);
    }
    repaired
}

//! Which file an image says is behind it, without opening that file or believing anything else about the image.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// QEMU refuses longer names (docs/interop/qcow2.rst).
const NAME_BYTES_MAX: u32 = 1023;

/// The name of the backing file in the header of the image at `path`, as it stands there; none when it has none or is no qcow2 image.
pub fn backing_name(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    // Magic, version, offset of the name (u64), its length (u32): docs/interop/qcow2.rst.
    let mut head = [0; 20];
    match file.read_exact_at(&mut head, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (at, len) = (u64::from(word(8)) << 32 | u64::from(word(12)), word(16));
    if head[..4] != *b"QFI\xfb" || at == 0 || len == 0 || len > NAME_BYTES_MAX {
        return Ok(None);
    }
    let mut name = vec![0; len as usize];
    match file.read_exact_at(&mut name, at) {
        Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput) => Ok(None),
        Err(error) => Err(error),
        Ok(()) => Ok(Some(name)),
    }
}

/// Every run of exactly 64 lower-case hexadecimal digits in a name: the keys of goldens that it may lead to, however the path is written (absolute, relative,
/// `json:`).
pub fn keys_in(name: &[u8]) -> Vec<String> {
    let is_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let runs = name.split(|byte| !is_hex(byte)).filter(|run| run.len() == 64);
    runs.map(|run| String::from_utf8_lossy(run).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_read_from_the_header_and_nothing_else_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.qcow2");
        let key = "a1".repeat(32);
        let name = format!("../state/goldens/{key}/disk.raw");
        let mut image = vec![0u8; 200];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        image[8..16].copy_from_slice(&104u64.to_be_bytes());
        image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        image.truncate(104);
        image.extend_from_slice(name.as_bytes());
        std::fs::write(&path, &image).expect("written");
        let found = backing_name(&path).expect("read").expect("has one");
        assert_eq!((keys_in(&found), found), (vec![key], name.into_bytes()));
        for (at, byte) in [(0, 0u8), (8, 0xff), (16, 0xff)] {
            let mut wrong = image.clone();
            wrong[at] = byte;
            std::fs::write(&path, &wrong).expect("written");
            assert_eq!(backing_name(&path).expect("read"), None, "byte {at}");
        }
        std::fs::write(&path, b"QFI").expect("written");
        assert_eq!(backing_name(&path).expect("read"), None);
        assert!(keys_in("A1".repeat(32).as_bytes()).is_empty() && keys_in("a".repeat(65).as_bytes()).is_empty());
    }
}

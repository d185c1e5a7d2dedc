//! What is mounted and what is swapped on, as this process sees it: `/proc/self/mountinfo` (proc_pid_mountinfo(5)) and `/proc/swaps`.
//!
//! A mount in another namespace does not show here; an exclusive open of the device (see `block`) does see those.

use std::{
    ffi::OsString,
    fs::File,
    io::Read,
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use crate::error::{Error, Kind, Result, Stage};

/// More than this is refused: a host with 100,000 mounts has about 20 MiB.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of the mounted filesystem's device (`st_dev` of its files).
    pub device: (u32, u32),
    /// The directory of the filesystem that is mounted.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of this mount, e.g. `rw,relatime`.
    pub options: String,
    /// Filesystem type.
    pub fs_type: String,
    /// What was mounted, often a device path.
    pub source: PathBuf,
}

/// Everything mounted in this namespace.
pub fn mounts() -> Result<Vec<Mount>> {
    let path = "/proc/self/mountinfo";
    let text = read_table(path)?;
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            parse_mountinfo_line(line).ok_or_else(|| {
                Error::new(Kind::Internal, Stage::Host, path, format!("a line is not understood: {:?}", String::from_utf8_lossy(line)))
            })
        })
        .collect()
}

/// Where the block device with this number is mounted. Filesystems with anonymous device numbers (btrfs) are recognised by their source.
pub fn mount_points_of(device: (u32, u32)) -> Result<Vec<PathBuf>> {
    let is_source = |mount: &Mount| mount.device.0 == 0 && mount.source.starts_with("/dev") && block_number(&mount.source) == Some(device);
    Ok(mounts()?.into_iter().filter(|mount| mount.device == device || is_source(mount)).map(|mount| mount.mount_point).collect())
}

/// Whether the block device with this number is used as swap space.
pub fn is_swap(device: (u32, u32)) -> Result<bool> {
    let text = read_table("/proc/swaps")?;
    let mut paths = text.split(|byte| *byte == b'\n').skip(1).filter_map(|line| line.split(|byte| matches!(byte, b' ' | b'\t')).next());
    Ok(paths.any(|path| !path.is_empty() && block_number(&PathBuf::from(OsString::from_vec(unescape(path)))) == Some(device)))
}

/// Major and minor number of the block device at `path`, if it is one.
pub fn block_number(path: &Path) -> Option<(u32, u32)> {
    use std::os::unix::fs::FileTypeExt;
    let meta = std::fs::metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())))
}

fn read_table(path: &str) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = match File::open(path) {
        Ok(file) => file,
        // A kernel without swap support has no /proc/swaps.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path == "/proc/swaps" => return Ok(text),
        Err(error) => return Err(Error::io(Stage::Host, path, "open", error)),
    };
    file.take(TABLE_BYTES_MAX + 1).read_to_end(&mut text).map_err(|error| Error::io(Stage::Host, path, "read", error))?;
    if text.len() as u64 > TABLE_BYTES_MAX {
        return Err(Error::new(Kind::NoSpace, Stage::Host, path, format!("has more than the limit of {TABLE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// `ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAG…] - TYPE SOURCE SUPER`
fn parse_mountinfo_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut next_text = || fields.next();
    let (_id, _parent) = (next_text()?, next_text()?);
    let (major, minor) = std::str::from_utf8(next_text()?).ok()?.split_once(':')?;
    let root = unescape(next_text()?);
    let mount_point = unescape(next_text()?);
    let options = String::from_utf8_lossy(next_text()?).into_owned();
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next()?);
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: OsString::from_vec(root).into(),
        mount_point: OsString::from_vec(mount_point).into(),
        options,
        fs_type,
        source: OsString::from_vec(source).into(),
    })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits (seq_path).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut clean = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')),
            _ => None,
        };
        clean.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_with_tags_and_escapes_are_understood() {
        let line = br"36 35 98:0 /mnt1 /mnt/a\040b\134c rw,noatime master:1 shared:7 - ext3 /dev/root\011x rw,errors=continue";
        let mount = parse_mountinfo_line(line).expect("valid");
        assert_eq!(mount.device, (98, 0));
        assert_eq!(mount.mount_point, Path::new(r"/mnt/a b\c"));
        assert_eq!(mount.source, Path::new("/dev/root\tx"));
        assert_eq!((mount.fs_type.as_str(), mount.options.as_str()), ("ext3", "rw,noatime"));
        let bare = parse_mountinfo_line(b"1 1 0:5 / /dev rw - devtmpfs devtmpfs rw").expect("no optional fields");
        assert_eq!(bare.device, (0, 5));
    }

    #[test]
    fn broken_lines_are_refused_without_panic() {
        for line in
            [&b""[..], b"1 2", b"1 2 x:y / / rw - a b c", b"1 2 3:4 / / rw shared:1", b"1 2 3:4 / / rw -", b"1 2 99999999999:4 / / rw - a b c"]
        {
            assert_eq!(parse_mountinfo_line(line), None, "{}", String::from_utf8_lossy(line));
        }
        assert_eq!(unescape(br"\04"), br"\04");
        assert_eq!(unescape(br"\777\"), br"\777\");
    }

    #[test]
    fn this_process_has_a_root_mount() {
        assert!(mounts().expect("mountinfo is readable").iter().any(|mount| mount.mount_point == Path::new("/")));
    }
}

//! What a device is called: in the guest, on its label, and on the host when it has to be written into somebody's configuration.

use std::path::Path;

use super::{Bus, Device};
use crate::error::{Error, Kind, Result, Stage};

/// The kernel's name of the device at `index` on `bus`, without `/dev/`: `vda` … `vdz`, `vdaa` …, as `disk_name_append` of the SCSI disk driver,
/// virtio-blk and xen-blkfront count.
pub fn guest_name(bus: Bus, index: usize) -> String {
    let prefix = match bus {
        Bus::Xen => "xvd",
        Bus::Virtio => "vd",
        Bus::Scsi => "sd",
        // Controllers count; each has one namespace here.
        Bus::Nvme => return format!("nvme{index}n1"),
    };
    let mut letters = Vec::new();
    let mut rest = index;
    loop {
        letters.push(b"abcdefghijklmnopqrstuvwxyz"[rest % 26] as char);
        rest /= 26;
        if rest == 0 {
            break;
        }
        rest -= 1;
    }
    prefix.chars().chain(letters.into_iter().rev()).collect()
}

/// The serial number of the device at `index` of an instance: `root`, `data-1`. The guest finds it as `/dev/disk/by-id/virtio-SERIAL` whatever
/// order the devices appear in. At most 20 bytes, which is what virtio-blk transports (VIRTIO_BLK_ID_BYTES).
pub fn serial(device: &Device, index: usize) -> String {
    if index == 0 { device.role.name().to_owned() } else { format!("{}-{index}", device.role.name()) }
}

/// The error for a bus that a form has no words for.
pub(super) fn no_bus(device: &Device, why: &str) -> Error {
    Error::new(Kind::Unsupported, Stage::Report, device.volume.name.as_str(), why).with_reason("BUS_NOT_EXPRESSIBLE")
}

/// The path as text that can be quoted in every dialect. Refuses what is not absolute, not UTF-8, or holds a control character or one of the
/// non-characters that XML 1.0 excludes.
pub fn expressible(path: &Path) -> Result<&str> {
    let refuse = |why: &str| Err(Error::new(Kind::Unsupported, Stage::Report, path.to_string_lossy(), why).with_reason("PATH_NOT_EXPRESSIBLE"));
    let Some(text) = path.to_str() else {
        return refuse("the path is not UTF-8, so a mapping can't name it");
    };
    if !text.starts_with('/') {
        return refuse("the path is not absolute, so it means something else to every reader of the mapping");
    }
    if text.chars().any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}')) {
        return refuse("the path holds control characters, which configuration files can't carry");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_on_after_z() {
        let table = [(0, "a"), (1, "b"), (25, "z"), (26, "aa"), (27, "ab"), (51, "az"), (52, "ba"), (701, "zz"), (702, "aaa")];
        for (index, letters) in table {
            assert_eq!(guest_name(Bus::Virtio, index), format!("vd{letters}"));
        }
        assert_eq!((guest_name(Bus::Xen, 0), guest_name(Bus::Scsi, 28)), ("xvda".into(), "sdac".into()));
    }

    #[test]
    fn names_are_unique() {
        let names: std::collections::BTreeSet<_> = (0..20_000).map(|index| guest_name(Bus::Scsi, index)).collect();
        assert_eq!(names.len(), 20_000);
    }

    #[test]
    fn paths_that_no_file_can_carry_are_refused() {
        use std::os::unix::ffi::OsStrExt;
        for bad in [&b"relative"[..], b"", b"/a\nb", b"/a\0b", b"/a\x7f", b"/\xff", "/\u{85}".as_bytes(), "/\u{ffff}".as_bytes()] {
            let error = expressible(Path::new(std::ffi::OsStr::from_bytes(bad))).expect_err("refused");
            assert_eq!(error.reason(), "PATH_NOT_EXPRESSIBLE", "{bad:?}");
        }
        assert_eq!(expressible(Path::new("/a, b/'\"<é>&")).ok(), Some("/a, b/'\"<é>&"));
    }
}

//! What a kernel and its initrd can do, from their bytes: computed once per golden, so that a platform can be answered without reading anything.
//!
//! ```text
//! kernel   setup header, PE, ELF notes    → KernelFacts     format, architecture, packing, PVH and PV entry, signature
//! initrd   cpio archives, packed or not   → InitrdFacts     modules by name
//! drivers  /boot/config-VERSION, modules.builtin, initrd → Availability of what a root disk needs
//! ```
//!
//! All of it is foreign: every read has a limit, and what can't be read becomes a note, never a failed build.

mod elf;
pub mod initrd;
pub mod kernel;
pub mod unpack;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{boot::kernels::Kernel, fs::TreeReader, units::MIB};
use initrd::InitrdFacts;
use kernel::KernelFacts;

/// Bytes of a kernel's file: Debian's has 8 MB, one with an initrd inside 100.
pub const KERNEL_LEN_MAX: u64 = 256 * MIB;
/// Bytes of an initrd's file.
pub const INITRD_LEN_MAX: u64 = 512 * MIB;
/// Bytes of a kernel's configuration (260 KB), and of `modules.builtin`.
const TEXT_LEN_MAX: u64 = 2 * MIB;

/// Drivers that decide whether a root disk is found and read: the module's name, and its option in the kernel's configuration.
pub const DRIVERS: [(&str, &str); 12] = [
    ("virtio_pci", "CONFIG_VIRTIO_PCI"),
    ("virtio_blk", "CONFIG_VIRTIO_BLK"),
    ("virtio_scsi", "CONFIG_SCSI_VIRTIO"),
    ("sd_mod", "CONFIG_BLK_DEV_SD"),
    ("ata_piix", "CONFIG_ATA_PIIX"),
    ("ahci", "CONFIG_SATA_AHCI"),
    ("xen_blkfront", "CONFIG_XEN_BLKDEV_FRONTEND"),
    ("nvme", "CONFIG_BLK_DEV_NVME"),
    ("ext4", "CONFIG_EXT4_FS"),
    ("xfs", "CONFIG_XFS_FS"),
    ("btrfs", "CONFIG_BTRFS_FS"),
    ("hvc_xen", "CONFIG_HVC_XEN"),
];

/// Where a driver is when the root is to be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Availability {
    /// Part of the kernel.
    Builtin,
    /// A module in the initrd.
    Initrd,
    /// A module that is only on the root itself: too late.
    RootOnly,
    /// Not part of this kernel at all.
    Absent,
}

/// What is known about a kernel and its initrd.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Inspection {
    /// The kernel; nothing when it could not be read.
    pub kernel: Option<KernelFacts>,
    /// The initrd; nothing when there is none or it could not be read.
    pub initrd: Option<InitrdSummary>,
    /// Where the drivers of [`DRIVERS`] are; one that is not listed is unknown.
    pub drivers: BTreeMap<String, Availability>,
    /// What could not be found out, and why.
    pub notes: Vec<String>,
}

/// What is kept of an initrd: not its list of modules, which has hundreds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InitrdSummary {
    /// How each archive in it is packed, in order; none for a plain one.
    pub archives: Vec<Option<unpack::Packing>>,
    /// Entries of all archives.
    pub entries: u32,
    /// Kernel modules in it.
    pub modules: u32,
    /// Whether there is an `init` to run.
    pub has_init: bool,
}

/// The files of a kernel: `kernel` and `initrd` as they are, `config` the text of `/boot/config-VERSION`, `builtin` that of `modules.builtin`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files<'a> {
    /// The kernel.
    pub kernel: &'a [u8],
    /// Its initrd.
    pub initrd: Option<&'a [u8]>,
    /// Its configuration.
    pub config: Option<&'a str>,
    /// Modules that are part of it.
    pub builtin: Option<&'a str>,
}

/// Finds out what `files` can do. Takes what unpacking takes: about a second for 60 MB of xz.
pub fn inspect(files: &Files<'_>) -> Inspection {
    let mut inspection = Inspection::default();
    match kernel::read(files.kernel) {
        Ok(facts) => inspection.kernel = Some(facts),
        Err(error) => inspection.notes.push(error.chain()),
    }
    let initrd = files.initrd.and_then(|bytes| initrd::read(bytes).map_err(|error| inspection.notes.push(error.chain())).ok());
    // An initrd that is there and was not understood may have any driver.
    let initrd_known = files.initrd.is_none() || initrd.is_some();
    for (module, option) in DRIVERS {
        if let Some(availability) = availability(module, option, files, initrd.as_ref(), initrd_known) {
            inspection.drivers.insert(module.to_owned(), availability);
        }
    }
    if files.config.is_none() && files.builtin.is_none() && initrd.as_ref().is_none_or(|initrd| initrd.builtin.is_empty()) {
        inspection.notes.push("which drivers are part of the kernel is not known: neither its configuration nor modules.builtin is there".into());
    }
    inspection.initrd = initrd.map(|facts| InitrdSummary {
        entries: facts.entries,
        modules: u32::try_from(facts.modules.len()).unwrap_or(u32::MAX),
        has_init: facts.has_init,
        archives: facts.archives,
    });
    inspection
}

fn availability(module: &str, option: &str, files: &Files<'_>, initrd: Option<&InitrdFacts>, initrd_known: bool) -> Option<Availability> {
    let has = |names: &[String]| names.binary_search_by(|name| name.as_str().cmp(module)).is_ok();
    let listed = |text: &str| text.lines().filter_map(initrd::module_name).any(|name| name == module);
    let configured = files.config.map(|text| option_of(text, option));
    if configured == Some(Setting::Yes) || files.builtin.is_some_and(listed) || initrd.is_some_and(|initrd| has(&initrd.builtin)) {
        return Some(Availability::Builtin);
    }
    if initrd.is_some_and(|initrd| has(&initrd.modules)) {
        return Some(Availability::Initrd);
    }
    if !initrd_known {
        return None;
    }
    match configured {
        Some(Setting::Module) => Some(Availability::RootOnly),
        Some(_) => Some(Availability::Absent),
        // A list of what is built in that lacks it, and an initrd that lacks it too.
        None => (files.builtin.is_some() || initrd.is_some_and(|initrd| !initrd.builtin.is_empty())).then_some(Availability::RootOnly),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    Yes,
    Module,
    No,
}

/// A setting of a kernel's configuration: `CONFIG_X=y`, `=m`, or `# CONFIG_X is not set`.
fn option_of(config: &str, option: &str) -> Setting {
    let value = config.lines().find_map(|line| line.strip_prefix(option)?.strip_prefix('='));
    match value.map(str::trim) {
        Some("y") => Setting::Yes,
        Some("m") => Setting::Module,
        _ => Setting::No,
    }
}

/// The same for a kernel of an image's tree, and the bytes of kernel and initrd for whoever keeps them; nothing when the kernel can't be read.
pub fn of_tree(tree: &dyn TreeReader, kernel: &Kernel) -> (Inspection, Option<KernelFiles>) {
    let mut notes = Vec::new();
    let mut read = |path: &str, len_max: u64| match tree.read(path, len_max) {
        Ok(bytes) => bytes,
        Err(error) => {
            notes.push(format!("{}: {}", path.escape_default(), error.chain()));
            None
        }
    };
    let bytes = read(&kernel.kernel, KERNEL_LEN_MAX);
    let initrd = kernel.initrd.as_deref().map(|path| read(path, INITRD_LEN_MAX));
    let mut text = |path: String| read(&path, TEXT_LEN_MAX).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    // A version comes from a file's name and may be anything but a path.
    let version = Some(kernel.version.as_str()).filter(|version| !version.is_empty() && !version.contains('/'));
    let config = version.and_then(|version| text(format!("/boot/config-{version}")).or_else(|| text(format!("/usr/lib/modules/{version}/config"))));
    let builtin = version.and_then(|version| {
        text(format!("/usr/lib/modules/{version}/modules.builtin")).or_else(|| text(format!("/lib/modules/{version}/modules.builtin")))
    });
    let Some(bytes) = bytes else {
        notes.push(format!("{} is not a file of at most {} MiB", kernel.kernel.escape_default(), KERNEL_LEN_MAX / MIB));
        return (Inspection { notes, ..Inspection::default() }, None);
    };
    if matches!(initrd, Some(None)) {
        notes.push("the initrd is not inspected: it is not a file that can be read".into());
    }
    // One that is named and can't be read is not the same as none: its drivers are unknown.
    let seen = initrd.as_ref().map(|initrd| initrd.as_deref().unwrap_or_default());
    let mut inspection = inspect(&Files { kernel: &bytes, initrd: seen, config: config.as_deref(), builtin: builtin.as_deref() });
    notes.append(&mut inspection.notes);
    inspection.notes = notes;
    let complete = !matches!(initrd, Some(None));
    (inspection, complete.then_some(KernelFiles { kernel: bytes, initrd: initrd.flatten() }))
}

/// The bytes of a kernel and its initrd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// The kernel.
    pub kernel: Vec<u8>,
    /// Its initrd.
    pub initrd: Option<Vec<u8>>,
}

#[cfg(test)]
mod tests {
    use super::{unpack::Packing, *};
    use crate::{
        boot::inspect::{
            initrd::tests::cpio,
            kernel::tests::{bz_image, pvh_elf},
            unpack::tests::pack,
        },
        error::Result,
    };

    struct Tree(BTreeMap<&'static str, Vec<u8>>);

    impl TreeReader for Tree {
        fn read(&self, path: &str, _len_max: u64) -> Result<Option<Vec<u8>>> {
            Ok(self.0.get(path).cloned())
        }
        fn list(&self, _path: &str) -> Result<Vec<String>> {
            Ok(Vec::new())
        }
    }

    fn kernel(initrd: bool) -> Kernel {
        Kernel { version: "6.1".into(), kernel: "/boot/vmlinuz-6.1".into(), initrd: initrd.then(|| "/boot/initrd.img-6.1".into()), kernel_len: 1 }
    }

    fn tree() -> Tree {
        Tree(BTreeMap::from([
            ("/boot/vmlinuz-6.1", bz_image(&pack(Packing::Zstd, &pvh_elf()))),
            ("/boot/initrd.img-6.1", pack(Packing::Gzip, &cpio(&[("init", b""), ("lib/modules/6.1/virtio_blk.ko", b"")]))),
            (
                "/boot/config-6.1",
                b"CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=m\nCONFIG_BLK_DEV_NVME=m\n# CONFIG_XFS_FS is not set\nCONFIG_EXT4_FS_SECURITY=y\n".to_vec(),
            ),
            ("/lib/modules/6.1/modules.builtin", b"kernel/fs/ext4/ext4.ko\n".to_vec()),
        ]))
    }

    #[test]
    fn drivers_are_where_configuration_initrd_and_modules_builtin_say() {
        let (inspection, files) = of_tree(&tree(), &kernel(true));
        let at = |driver: &str| inspection.drivers.get(driver).copied();
        assert_eq!(at("virtio_pci"), Some(Availability::Builtin));
        assert_eq!(at("virtio_blk"), Some(Availability::Initrd));
        assert_eq!(at("ext4"), Some(Availability::Builtin), "from modules.builtin");
        assert_eq!(at("nvme"), Some(Availability::RootOnly));
        assert_eq!(at("xfs"), Some(Availability::Absent));
        assert_eq!(inspection.kernel.as_ref().and_then(|kernel| kernel.pvh_entry), Some(0x100_0000));
        assert_eq!(inspection.notes, Vec::<String>::new());
        assert_eq!(files.map(|files| files.initrd.is_some()), Some(true));
        let text = serde_json::to_string(&inspection).expect("JSON");
        assert_eq!(serde_json::from_str::<Inspection>(&text).expect("read back"), inspection);
    }

    #[test]
    fn what_is_unknown_is_not_called_absent() {
        let mut damaged = tree();
        damaged.0.insert("/boot/initrd.img-6.1", b"no archive".to_vec());
        let (inspection, _) = of_tree(&damaged, &kernel(true));
        assert_eq!(inspection.drivers.get("nvme"), None);
        assert_eq!(inspection.drivers.get("virtio_pci"), Some(&Availability::Builtin));
        assert_eq!(inspection.notes.len(), 1, "{:?}", inspection.notes);
        let mut bare = tree();
        bare.0.retain(|path, _| *path == "/boot/vmlinuz-6.1");
        let (inspection, files) = of_tree(&bare, &kernel(false));
        assert!(inspection.drivers.is_empty() && inspection.notes[0].contains("not known"), "{inspection:?}");
        assert_eq!(files.map(|files| files.initrd), Some(None));
        // The initrd that is named and gone.
        let (inspection, files) = of_tree(&bare, &kernel(true));
        assert!(files.is_none() && !inspection.notes.is_empty());
        bare.0.clear();
        let (inspection, files) = of_tree(&bare, &kernel(false));
        assert!(files.is_none() && inspection.kernel.is_none() && !inspection.notes.is_empty());
    }
}

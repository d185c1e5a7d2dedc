//! Boot loaders of this host: GRUB's core images, made by its own `grub-mkimage`.
//!
//! Nothing of the guest is run or read for them. A core image finds its root by position, not by name: the prefix `(,gpt1)/boot/grub` means partition 1
//! of whatever disk the image was started from. So one image serves every disk with our layout, whatever UUIDs it has, however many of its clones are
//! attached, and a `grub.cfg` that the guest's own `update-grub` writes later is found where it writes it.
//!
//! | target | host packages (Debian) | what is made |
//! |---|---|---|
//! | BIOS | grub-common, grub-pc-bin | `core.img` for the BIOS boot partition; `boot.img` comes as it is |
//! | UEFI x86-64 | grub-common, grub-efi-amd64-bin | `BOOTX64.EFI`, not signed |
//!
//! The same version of GRUB gives the same bytes. They are made once per process, and again when the host's GRUB was replaced.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::FsKind,
    host::command,
    names::Digest,
    units::MIB,
};

/// Where GRUB's images find their configuration and modules: partition 1 of the disk they were started from.
const PREFIX: &str = "(,gpt1)/boot/grub";
/// grub-mkimage needs about 0.1 s; this is for a host that is very busy.
const MKIMAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// No core image is larger: the BIOS boot partition has 1 MiB, and an EFI image with every module 4 MiB.
const IMAGE_LEN_MAX: u64 = 16 * MIB;

/// Modules of both images: what a `grub.cfg` of ours or of `grub-mkconfig` uses, so that nothing is missed in a root that has no `/boot/grub/i386-pc`.
const MODULES: &[&str] = &[
    // The root, as Debian, Ubuntu, SUSE, Alpine and Red Hat make it.
    "part_gpt",
    "part_msdos",
    "ext2",
    "xfs",
    "btrfs",
    "fat",
    // The shell and its menu.
    "normal",
    "configfile",
    "loadenv",
    "test",
    "true",
    "echo",
    "eval",
    "regexp",
    "read",
    "sleep",
    "help",
    "ls",
    "cat",
    "probe",
    "search",
    "search_fs_uuid",
    "search_fs_file",
    "search_label",
    "halt",
    "reboot",
    "minicmd",
    "keystatus",
    // Starting a kernel, compressed in any way.
    "linux",
    "boot",
    "chain",
    "gzio",
    "xzio",
    "lzopio",
    // Screen and serial line.
    "serial",
    "terminal",
    "gettext",
    "font",
    "gfxterm",
    "gfxterm_background",
    "gfxmenu",
    "png",
    "all_video",
];
const MODULES_BIOS: &[&str] = &["biosdisk", "vga", "vbe", "linux16"];
const MODULES_EFI: &[&str] = &["efi_gop", "efi_uga", "efifwsetup", "video_bochs", "video_cirrus"];

/// GRUB for BIOS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BiosLoader {
    /// The boot sector as GRUB ships it, 512 bytes.
    pub boot_image: Vec<u8>,
    /// The core image.
    pub core_image: Vec<u8>,
}

/// A program for UEFI firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EfiLoader {
    /// The architecture as the removable path has it: `X64`, `AA64`.
    pub machine: &'static str,
    /// The program.
    pub image: Vec<u8>,
}

/// The boot loaders that this host can put on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostLoaders {
    /// GRUB for BIOS, if the host has the package.
    pub bios: Option<BiosLoader>,
    /// GRUB for UEFI, if the host has the package.
    pub efi: Option<EfiLoader>,
    /// Whether this GRUB reads ext4 with `metadata_csum_seed`, so that every instance can have a filesystem UUID of its own at no cost.
    pub reads_checksum_seed: bool,
    /// What this GRUB says about the filesystem of the disk at hand, where that is one that the host's tools make: see [`HostLoaders::reading`].
    pub reads: Reads,
}

/// Whether GRUB reads a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Reads {
    /// It does, as far as is known.
    #[default]
    Yes,
    /// It does not: why.
    No(String),
    /// It could not be asked: why.
    Unknown(String),
}

/// What of a [`HostLoaders`] decides the bytes of a golden disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct LoaderDigests {
    /// Over boot sector and core image for BIOS.
    pub bios: Option<Digest>,
    /// Of the UEFI program.
    pub efi: Option<Digest>,
}

impl HostLoaders {
    /// The loaders of this host for guests of `arch` (`uname -m` or Debian's spelling). `scratch` is a directory for short-lived files. A host
    /// without the packages has none: that is not an error. Blocking, 0.3 s the first time.
    pub fn of_host(arch: &str, scratch: &Path) -> Result<Arc<HostLoaders>> {
        // Others have no BIOS, and the host's packages for their UEFI are not looked for yet.
        if !matches!(arch, "x86_64" | "amd64") {
            return Ok(Arc::default());
        }
        static MADE: Mutex<Option<(Vec<Stamp>, Arc<HostLoaders>)>> = Mutex::new(None);
        let stamps = [BIOS, EFI].iter().map(Stamp::of).collect::<Vec<_>>();
        let mut made = MADE.lock().map_err(|_| Error::internal(Stage::Host, "grub", "making boot loaders panicked"))?;
        if let Some((since, loaders)) = &*made
            && *since == stamps
        {
            return Ok(Arc::clone(loaders));
        }
        let loaders = Arc::new(make(scratch)?);
        *made = Some((stamps, Arc::clone(&loaders)));
        Ok(loaders)
    }

    /// The same loaders with what they say about `filesystem` as this host's tools make it now; `scratch` as above. Of ext4 that is known already. Which
    /// features mkfs turns on changes with its version and with its configuration, so it is asked for every golden that is built; 0.1 s.
    pub fn reading(self: &Arc<Self>, filesystem: FsKind, scratch: &Path) -> Result<Arc<HostLoaders>> {
        if filesystem == FsKind::Ext4 || (self.bios.is_none() && self.efi.is_none()) {
            return Ok(Arc::clone(self));
        }
        Ok(Arc::new(HostLoaders { reads: probe::reads(filesystem, scratch)?, ..(**self).clone() }))
    }

    /// Digests for the golden key.
    pub fn digests(&self) -> LoaderDigests {
        LoaderDigests {
            bios: self.bios.as_ref().map(|bios| Digest::of(&[&bios.boot_image[..], &bios.core_image[..]].concat())),
            efi: self.efi.as_ref().map(|efi| Digest::of(&efi.image)),
        }
    }
}

/// One of GRUB's targets.
struct GrubTarget {
    name: &'static str,
    /// A file that only the package of this target has.
    sign: &'static str,
    modules: &'static [&'static str],
}

const BIOS: GrubTarget = GrubTarget { name: "i386-pc", sign: "boot.img", modules: MODULES_BIOS };
const EFI: GrubTarget = GrubTarget { name: "x86_64-efi", sign: "moddep.lst", modules: MODULES_EFI };

impl GrubTarget {
    fn directory(&self) -> PathBuf {
        Path::new("/usr/lib/grub").join(self.name)
    }
}

/// What changes when the host's GRUB does: inode, size and change time of its parts.
#[derive(Debug, PartialEq, Eq)]
struct Stamp(Vec<Option<(u64, u64, i64, i64)>>);

impl Stamp {
    fn of(target: &GrubTarget) -> Stamp {
        let files = [Some(target.directory().join(target.sign)), Some(target.directory().join("kernel.img")), command::find("grub-mkimage")];
        let stamp = |path: PathBuf| fs::metadata(path).ok().map(|meta| (meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec()));
        Stamp(files.into_iter().map(|path| path.and_then(stamp)).collect())
    }
}

fn make(scratch: &Path) -> Result<HostLoaders> {
    if command::find("grub-mkimage").is_none() {
        return Ok(HostLoaders::default());
    }
    let has = |target: &GrubTarget| target.directory().join(target.sign).exists();
    let bios = match has(&BIOS) {
        true => Some(BiosLoader { boot_image: read(&BIOS.directory().join(BIOS.sign))?, core_image: mkimage(&BIOS, scratch)? }),
        false => None,
    };
    let efi = match has(&EFI) {
        true => Some(EfiLoader { machine: "X64", image: mkimage(&EFI, scratch)? }),
        false => None,
    };
    let some = bios.is_some() || efi.is_some();
    Ok(HostLoaders { bios, efi, reads_checksum_seed: some && probe::reads_checksum_seed(scratch)?, reads: Reads::Yes })
}

fn mkimage(target: &GrubTarget, scratch: &Path) -> Result<Vec<u8>> {
    let output = Scratch::new(scratch, "core");
    let path = output.0.as_os_str();
    let arguments: Vec<&std::ffi::OsStr> =
        ["--format", target.name, "--prefix", PREFIX, "--output"].into_iter().map(AsRef::as_ref).chain([path]).collect();
    let modules = MODULES.iter().chain(target.modules).map(AsRef::as_ref);
    command::run("grub-mkimage", arguments.into_iter().chain(modules), MKIMAGE_TIMEOUT)?;
    read(&output.0)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |error| Error::io(Stage::Host, path.display().to_string(), "read", error);
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > IMAGE_LEN_MAX {
        return Err(Error::new(Kind::NoSpace, Stage::Host, path.display().to_string(), format!("has {len} bytes, the limit is {IMAGE_LEN_MAX}")));
    }
    fs::read(path).map_err(failed)
}

/// A file that is gone when this is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(directory: &Path, what: &str) -> Scratch {
        Scratch(directory.join(format!("grub-{what}-{}", uuid::Uuid::new_v4().simple())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "a scratch file could not be removed");
        }
    }
}

/// Asks the host's GRUB what it can read. Versions say little: distributions patch it (Debian's 2.06 reads what upstream's 2.06 refuses).
mod probe {
    use std::{fs::File, path::Path, sync::Arc};

    use std::os::unix::fs::FileExt;

    use super::{Reads, Scratch};
    use crate::{
        error::{Error, Result, Stage},
        ext4::Ext4,
        fs::{BuildParams, Filesystem, FsKind, Profile, Region, mounted::Mounted},
        host::command,
        progress::Progress,
        units::MIB,
    };

    /// Whether `grub-fstest`, which is built from the same sources as the modules, lists an empty filesystem with the feature.
    pub(super) fn reads_checksum_seed(scratch: &Path) -> Result<bool> {
        if command::find("grub-fstest").is_none() {
            return Ok(false);
        }
        let image = Scratch::new(scratch, "probe");
        let failed = |error| Error::io(Stage::Host, image.0.display().to_string(), "make a filesystem to ask GRUB about", error);
        let file = File::options().read(true).write(true).create_new(true).open(&image.0).map_err(failed)?;
        let len = Ext4.size_min().max(8 * MIB);
        file.set_len(len).map_err(failed)?;
        let params =
            BuildParams { uuid: [1; 16], hash_seed: [2; 16], label: String::new(), profile: Profile::Modern, epoch_secs: 1, bytes_per_inode: 16384 };
        let progress = Progress::default();
        Ext4.builder(&params, Region { file: Arc::new(file), offset: 0, len }, &progress)?.finish()?;
        let arguments = [image.0.as_os_str(), "ls".as_ref(), "(loop0)/".as_ref()];
        let (status, output) = command::run_any_status("grub-fstest", arguments, super::MKIMAGE_TIMEOUT)?;
        Ok(status.success() && output.stdout.starts_with(b"lost+found/"))
    }

    /// Whether `grub-fstest` recognises an empty filesystem as this host's mkfs makes it.
    pub(super) fn reads(kind: FsKind, scratch: &Path) -> Result<Reads> {
        if command::find("grub-fstest").is_none() {
            return Ok(Reads::Unknown(format!("whether this host's GRUB reads {} is not known: grub-fstest is not there", kind.name())));
        }
        let image = Scratch::new(scratch, "probe");
        let failed = |error| Error::io(Stage::Host, image.0.display().to_string(), "make a filesystem to ask GRUB about", error);
        let file = File::options().read(true).write(true).create_new(true).open(&image.0).map_err(failed)?;
        let engine = Mounted::new(kind);
        file.set_len(engine.size_min()).map_err(failed)?;
        engine.sample(&image.0)?;
        if recognises(kind, &image.0)? {
            return Ok(Reads::Yes);
        }
        let features = if kind == FsKind::Xfs { format!(" ({})", xfs_features(&file).map_err(failed)?.join(", ")) } else { String::new() };
        Ok(Reads::No(format!("this host's GRUB does not read {} as this host's mkfs makes it{features}", kind.name())))
    }

    /// Whether GRUB sees the filesystem in the file `image` and can look something up in it.
    pub(super) fn recognises(kind: FsKind, image: &Path) -> Result<bool> {
        let arguments = [image.as_os_str(), "ls".as_ref(), "--".as_ref(), "-l".as_ref(), "(loop0)".as_ref()];
        // It exits with 0 whatever it finds.
        let (_, output) = command::run_any_status("grub-fstest", arguments, super::MKIMAGE_TIMEOUT)?;
        Ok(String::from_utf8_lossy(&output.stdout).contains(&format!("Filesystem type {},", kind.name())))
    }

    /// Incompatible features of an XFS by their bits (fs/xfs/libxfs/xfs_format.h, XFS_SB_FEAT_INCOMPAT_*), in mkfs.xfs's words where it has some.
    const XFS_FEATURES: [&str; 11] =
        ["ftype", "sparse", "meta_uuid", "bigtime", "needsrepair", "nrext64", "exchange", "parent", "metadir", "zoned", "zone-gaps"];
    /// sb_features_incompat, 32 bits, big endian.
    pub(super) const XFS_FEATURES_AT: u64 = 216;

    fn xfs_features(file: &File) -> std::io::Result<Vec<String>> {
        let mut bits = [0; 4];
        file.read_exact_at(&mut bits, XFS_FEATURES_AT)?;
        let bits = u32::from_be_bytes(bits);
        let name = |bit: u32| XFS_FEATURES.get(bit as usize).map_or_else(|| format!("feature {bit}"), |name| (*name).to_owned());
        Ok((0..u32::BITS).filter(|bit| bits & (1 << bit) != 0).map(name).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_architecture_has_no_loaders_here() {
        let scratch = tempfile::tempdir().expect("directory");
        assert_eq!(*HostLoaders::of_host("riscv64", scratch.path()).expect("none"), HostLoaders::default());
    }

    /// Needs grub-fstest, xfsprogs and btrfs-progs, as the whole crate's tests do.
    #[test]
    fn grub_reads_what_this_hosts_tools_make_and_not_what_it_has_no_word_for() {
        use std::os::unix::fs::FileExt;
        let scratch = tempfile::tempdir().expect("directory");
        for kind in [FsKind::Xfs, FsKind::Btrfs] {
            assert_eq!(probe::reads(kind, scratch.path()).expect("asked"), Reads::Yes, "{}", kind.name());
        }
        assert_eq!(fs::read_dir(scratch.path()).expect("listed").count(), 0, "nothing is left behind");
        let path = scratch.path().join("future");
        let file = fs::File::options().read(true).write(true).create_new(true).open(&path).expect("file");
        file.set_len(300 * MIB).expect("sparse");
        crate::fs::mounted::Mounted::new(FsKind::Xfs).sample(&path).expect("made");
        assert!(probe::recognises(FsKind::Xfs, &path).expect("asked"));
        file.write_all_at(&[0x80], probe::XFS_FEATURES_AT).expect("a feature that nobody has");
        assert!(!probe::recognises(FsKind::Xfs, &path).expect("asked"));
    }

    #[test]
    fn digests_tell_loaders_apart() {
        let with =
            |core: &[u8]| HostLoaders { bios: Some(BiosLoader { boot_image: vec![1; 512], core_image: core.to_vec() }), ..HostLoaders::default() };
        assert_eq!(with(b"a").digests(), with(b"a").digests());
        assert_ne!(with(b"a").digests(), with(b"b").digests());
        assert_eq!(HostLoaders::default().digests(), LoaderDigests::default());
    }
}

//! What the EFI system partition of a golden disk holds.
//!
//! | image brings | `EFI/BOOT/BOOTX64.EFI` | besides |
//! |---|---|---|
//! | signed shim and GRUB (Debian, Ubuntu: `shim-signed`, `grub-efi-amd64-signed`; Red Hat: below `/boot/efi/EFI`) | the shim | `grubx64.efi`, MokManager, `EFI/VENDOR/grub.cfg` that leads to the root |
//! | a unified kernel image and no kernel that GRUB could start | the image's systemd-boot, else the UKI itself | `EFI/Linux/NAME.efi` |
//! | systemd-boot, and no GRUB | systemd-boot | its entries and their kernels: [`crate::boot::bls`] |
//! | none of these | this host's GRUB, not signed | |
//!
//! Signed programs are copied byte for byte: with Secure Boot the firmware trusts Microsoft's key, which signed the shim, which trusts the distribution's
//! key, which signed GRUB, which verifies the kernel. A GRUB of this host can't be part of that chain.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    boot::{bls, grub, inspect::kernel, kernels::Kernel, loaders::HostLoaders},
    disk::fat::FatVolumeSpec,
    error::{Error, Kind, Result, Stage},
    fs::TreeReader,
    guest::facts::GuestFacts,
    units::MIB,
};

/// No EFI program of a boot loader is larger; a UKI is a kernel with its initrd.
const PROGRAM_LEN_MAX: u64 = 8 * MIB;
/// What fits on the partition, tables and directories left out.
const UKI_LEN_MAX: u64 = 60 * MIB;
/// Label of the partition's volume.
const LABEL: &str = "ESP";

/// Who provides the program that UEFI firmware starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum EfiProgram {
    /// This host's GRUB; not signed.
    HostGrub,
    /// The image's signed shim and GRUB.
    ImageShim {
        /// The directory below `EFI` that this GRUB reads: `debian`, `ubuntu`, `fedora`.
        vendor: String,
    },
    /// The image's systemd-boot with entries for its kernels.
    ImageBootEntries {
        /// What its entries and their directory begin with.
        token: String,
    },
    /// The image's systemd-boot with its unified kernel image.
    ImageSystemdBoot {
        /// Name of the UKI below `EFI/Linux`.
        uki: String,
    },
    /// The image's unified kernel image by itself.
    ImageUki {
        /// Its name below `EFI/Linux`.
        uki: String,
    },
}

impl EfiProgram {
    /// In words.
    pub fn describe(&self) -> &'static str {
        match self {
            EfiProgram::HostGrub => "this host's GRUB",
            EfiProgram::ImageShim { .. } => "the image's shim and GRUB",
            EfiProgram::ImageBootEntries { .. } | EfiProgram::ImageSystemdBoot { .. } => "the image's systemd-boot",
            EfiProgram::ImageUki { .. } => "the image's unified kernel image",
        }
    }
}

/// The files of the partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Esp {
    /// Who starts.
    pub program: EfiProgram,
    /// Files by path.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Esp {
    /// Whether the program that the firmware starts carries a signature, and the one that a shim starts; nothing when it is no program.
    pub fn is_signed(&self) -> Option<bool> {
        let of = |(path, bytes): (&String, &Vec<u8>)| {
            let is_loader = path.starts_with("EFI/BOOT/BOOT") || path == "EFI/BOOT/grubx64.efi";
            is_loader.then(|| kernel::is_signed(bytes))
        };
        let signed: Option<Vec<bool>> = self.files.iter().filter_map(of).collect();
        signed.filter(|signed| !signed.is_empty()).map(|signed| signed.into_iter().all(|signed| signed))
    }

    /// The volume to build; `id` becomes its UUID.
    pub fn volume(self, id: u32) -> FatVolumeSpec {
        FatVolumeSpec { label: LABEL.into(), id, files: self.files }
    }
}

/// What of an image decides.
pub struct Image<'a> {
    /// Its files.
    pub tree: &'a dyn TreeReader,
    /// What is known of them.
    pub facts: &'a GuestFacts,
    /// Kernels that GRUB can start.
    pub kernels: &'a [Kernel],
}

/// Chooses what goes onto a partition of `esp_bytes`; nothing when neither image nor host has anything. `notes` says what was passed over.
pub fn choose(image: &Image<'_>, loaders: &HostLoaders, esp_bytes: u64, notes: &mut Vec<String>) -> Result<Option<Esp>> {
    let Image { tree, facts, kernels } = *image;
    if kernels.is_empty() {
        return unified(tree);
    }
    if let Some(esp) = signed(tree)? {
        return Ok(Some(esp));
    }
    if let Some(esp) = bls::choose(tree, facts, kernels, esp_bytes, notes)? {
        return Ok(Some(esp));
    }
    let host = loaders.efi.as_ref();
    Ok(host.map(|host| Esp {
        program: EfiProgram::HostGrub,
        files: BTreeMap::from([(format!("EFI/BOOT/BOOT{}.EFI", host.machine), host.image.clone())]),
    }))
}

/// Where packages of Debian and Ubuntu have the signed shim, first found first.
const SHIMS: [&str; 3] = ["/usr/lib/shim/shimx64.efi.signed", "/usr/lib/shim/shimx64.efi.dualsigned", "/usr/lib/shim/shimx64.efi.signed.latest"];
/// The signed GRUB.
const GRUBS: [&str; 1] = ["/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"];
/// The manager of the machine owner's keys, which shim starts when asked to.
const MANAGERS: [&str; 2] = ["/usr/lib/shim/mmx64.efi.signed", "/usr/lib/shim/mmx64.efi"];

fn signed(tree: &dyn TreeReader) -> Result<Option<Esp>> {
    if let (Some(shim), Some(grub)) = (first(tree, &SHIMS)?, first(tree, &GRUBS)?) {
        return shim_esp(shim, grub, first(tree, &MANAGERS)?, "/boot/grub").map(Some);
    }
    // Red Hat's packages put theirs where the partition is mounted.
    for vendor in tree.list("/boot/efi/EFI")?.into_iter().filter(|vendor| !vendor.eq_ignore_ascii_case("BOOT")) {
        let at = |name: &str| format!("/boot/efi/EFI/{vendor}/{name}");
        if let (Some(shim), Some(grub)) = (program(tree, &at("shimx64.efi"))?, program(tree, &at("grubx64.efi"))?) {
            return shim_esp(shim, grub, program(tree, &at("mmx64.efi"))?, "/boot/grub2").map(Some);
        }
    }
    Ok(None)
}

fn shim_esp(shim: Vec<u8>, grub: Vec<u8>, manager: Option<Vec<u8>>, below: &str) -> Result<Esp> {
    let vendor = vendor_of(&grub).ok_or_else(|| {
        Error::new(Kind::Unsupported, Stage::Golden, "grubx64.efi", "the image's signed GRUB does not say which directory of the ESP it reads")
            .with_reason("SIGNED_GRUB_UNKNOWN")
    })?;
    let mut files = BTreeMap::from([
        ("EFI/BOOT/BOOTX64.EFI".to_owned(), shim),
        ("EFI/BOOT/grubx64.efi".to_owned(), grub),
        (format!("EFI/{vendor}/grub.cfg"), grub::esp_stub(below).into_bytes()),
    ]);
    if let Some(manager) = manager {
        files.insert("EFI/BOOT/mmx64.efi".into(), manager);
    }
    Ok(Esp { program: EfiProgram::ImageShim { vendor }, files })
}

/// The directory below `EFI` in the prefix that was built into a GRUB: `/EFI/debian`.
fn vendor_of(grub: &[u8]) -> Option<String> {
    let start = b"/EFI/";
    let mut candidates = grub.windows(start.len()).enumerate().filter(|(_, window)| *window == start).map(|(at, _)| &grub[at + start.len()..]);
    candidates.find_map(|rest| {
        let len = rest.iter().take(32).position(|byte| *byte == 0)?;
        let name = std::str::from_utf8(&rest[..len]).ok()?;
        let fits = !name.is_empty()
            && !name.eq_ignore_ascii_case("boot")
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        fits.then(|| name.to_owned())
    })
}

/// A unified kernel image has its command line in it; it finds its root by the partition's type (systemd-gpt-auto-generator) or by what was built in.
fn unified(tree: &dyn TreeReader) -> Result<Option<Esp>> {
    for directory in ["/efi/EFI/Linux", "/boot/efi/EFI/Linux", "/boot/EFI/Linux"] {
        let mut names = tree.list(directory)?;
        names.retain(|name| {
            name.to_ascii_lowercase().ends_with(".efi") && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"*/:<>?\\|".contains(&byte))
        });
        names.sort_by(|a, b| crate::boot::kernels::compare(b, a));
        for name in names {
            let Some(uki) = tree.read(&format!("{directory}/{name}"), UKI_LEN_MAX)? else { continue };
            let systemd = first(tree, &bls::PROGRAMS)?;
            let at = format!("EFI/Linux/{name}");
            let (program, files) = match systemd {
                Some(systemd) => {
                    (EfiProgram::ImageSystemdBoot { uki: name }, BTreeMap::from([(at, uki), ("EFI/BOOT/BOOTX64.EFI".to_owned(), systemd)]))
                }
                None => (EfiProgram::ImageUki { uki: name }, BTreeMap::from([("EFI/BOOT/BOOTX64.EFI".to_owned(), uki)])),
            };
            return Ok(Some(Esp { program, files }));
        }
    }
    Ok(None)
}

/// The first of `paths` that is a program.
pub(super) fn first(tree: &dyn TreeReader, paths: &[&str]) -> Result<Option<Vec<u8>>> {
    for path in paths {
        if let Some(bytes) = program(tree, path)? {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// A PE program; what is something else is not taken.
fn program(tree: &dyn TreeReader, path: &str) -> Result<Option<Vec<u8>>> {
    match tree.read(path, PROGRAM_LEN_MAX) {
        Ok(bytes) => Ok(bytes.filter(|bytes| bytes.starts_with(b"MZ"))),
        Err(error) if error.kind() == Kind::NoSpace => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::loaders::EfiLoader;

    struct Tree(BTreeMap<&'static str, Vec<u8>>);

    impl TreeReader for Tree {
        fn read(&self, path: &str, len_max: u64) -> Result<Option<Vec<u8>>> {
            Ok(self.0.get(path).filter(|bytes| bytes.len() as u64 <= len_max).cloned())
        }
        fn list(&self, path: &str) -> Result<Vec<String>> {
            let prefix = format!("{path}/");
            let mut names: Vec<String> = self.0.keys().filter_map(|name| name.strip_prefix(&prefix)?.split('/').next().map(str::to_owned)).collect();
            names.dedup();
            Ok(names)
        }
    }

    fn tree(files: &[(&'static str, &[u8])]) -> Tree {
        Tree(files.iter().map(|(path, bytes)| (*path, bytes.to_vec())).collect())
    }

    fn host() -> HostLoaders {
        HostLoaders { efi: Some(EfiLoader { machine: "X64", image: b"MZhost".to_vec() }), ..HostLoaders::default() }
    }

    fn choose_from(tree: &Tree, loaders: &HostLoaders, has_kernel: bool) -> Result<Option<Esp>> {
        let kernel = Kernel { version: "1".into(), kernel: "/boot/vmlinuz-1".into(), initrd: None, kernel_len: 1 };
        let kernels = if has_kernel { vec![kernel] } else { Vec::new() };
        choose(&Image { tree, facts: &GuestFacts::default(), kernels: &kernels }, loaders, 64 << 20, &mut Vec::new())
    }

    #[track_caller]
    fn chosen(files: &[(&'static str, &[u8])], has_kernel: bool) -> Option<(EfiProgram, Vec<String>)> {
        let esp = choose_from(&tree(files), &host(), has_kernel).expect("chosen")?;
        Some((esp.program, esp.files.into_keys().collect()))
    }

    const GRUB: &[u8] = b"MZ....(memdisk)/EFI/BOOT\0..\0/EFI/debian\0";

    #[test]
    fn an_image_that_brings_signed_programs_boots_by_them() {
        let files: &[(&str, &[u8])] = &[
            ("/usr/lib/shim/shimx64.efi.signed", b"MZshim"),
            ("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", GRUB),
            ("/usr/lib/shim/mmx64.efi.signed", b"MZmok"),
        ];
        let (program, paths) = chosen(files, true).expect("an ESP");
        assert_eq!(program, EfiProgram::ImageShim { vendor: "debian".into() });
        assert_eq!(paths, ["EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/grubx64.efi", "EFI/BOOT/mmx64.efi", "EFI/debian/grub.cfg"]);
        let red_hat: &[(&str, &[u8])] = &[("/boot/efi/EFI/fedora/shimx64.efi", b"MZ"), ("/boot/efi/EFI/fedora/grubx64.efi", b"MZ/EFI/fedora\0")];
        let esp = choose_from(&tree(red_hat), &host(), true).expect("chosen").expect("an ESP");
        assert!(String::from_utf8_lossy(&esp.files["EFI/fedora/grub.cfg"]).contains("/boot/grub2"));
    }

    #[test]
    fn half_a_chain_or_what_is_no_program_is_not_used() {
        for files in [
            &[("/usr/lib/shim/shimx64.efi.signed", &b"MZ"[..])][..],
            &[("/usr/lib/shim/shimx64.efi.signed", b"#!/bin/sh"), ("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", GRUB)],
        ] {
            assert_eq!(chosen(files, true).expect("an ESP").0, EfiProgram::HostGrub);
        }
        let nameless: &[(&str, &[u8])] =
            &[("/usr/lib/shim/shimx64.efi.signed", b"MZ"), ("/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed", b"MZ/EFI/BOOT\0")];
        let error = choose_from(&tree(nameless), &host(), true).expect_err("unknown");
        assert_eq!(error.reason(), "SIGNED_GRUB_UNKNOWN");
    }

    #[test]
    fn a_unified_kernel_is_started_when_there_is_no_other() {
        let uki: &[(&str, &[u8])] = &[("/boot/efi/EFI/Linux/a-6.9.efi", b"MZold"), ("/boot/efi/EFI/Linux/a-6.10.efi", b"MZnew")];
        assert_eq!(chosen(uki, false).expect("an ESP").0, EfiProgram::ImageUki { uki: "a-6.10.efi".into() });
        let with: Vec<_> = uki.iter().copied().chain([("/usr/lib/systemd/boot/efi/systemd-bootx64.efi", &b"MZsd"[..])]).collect();
        let (program, paths) = chosen(&with, false).expect("an ESP");
        assert_eq!(program, EfiProgram::ImageSystemdBoot { uki: "a-6.10.efi".into() });
        assert_eq!(paths, ["EFI/BOOT/BOOTX64.EFI", "EFI/Linux/a-6.10.efi"]);
        assert_eq!(chosen(uki, true).expect("an ESP").0, EfiProgram::HostGrub);
    }

    #[test]
    fn without_kernel_or_loader_there_is_nothing() {
        assert_eq!(chosen(&[], false), None);
        assert_eq!(choose_from(&tree(&[]), &HostLoaders::default(), true).expect("chosen"), None);
    }
}

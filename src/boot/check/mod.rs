//! Whether a disk starts on a platform, and how: pure, from what was found out when the golden was built and when its kernel was inspected.
//!
//! | reason | refused because |
//! |---|---|
//! | `PLATFORM_CONTRADICTION` | the parts of the platform do not go together |
//! | `ARCH_DIFFERS` | the image or its kernel is for another architecture |
//! | `NO_BOOT_ENTRY_POINT` | the manifest says that the image is entered by changing root only |
//! | `LAYOUT_FIRMWARE` | BIOS and UEFI start from a partition table, the disk has none |
//! | `KERNEL_NEEDED` | the image has no kernel that this platform could start, and none is supplied |
//! | `KERNEL_UNSUITABLE` | no supplied kernel is the one that `entry_points.init` asks for |
//! | `KERNEL_UNUSABLE` | the supplied kernel's files are not there, or not what is configured |
//! | `KERNEL_MODULES` | the supplied kernel needs modules that the image does not have |
//! | `NO_BOOT_LOADER` | the disk has nothing that this firmware starts |
//! | `SECURE_BOOT` | what the firmware would start, or the kernel, is not signed |
//! | `FS_PROFILE` | the loader can't read this filesystem |
//! | `KERNEL_COMPRESSION` | Xen's domain builder can't unpack the kernel |
//! | `PVH_ENTRY_MISSING`, `PV_ENTRY_MISSING` | the kernel has no entry for this mode of Xen |
//! | `DRIVER_MISSING` | neither kernel nor initrd has the driver of the root disk or of its filesystem |
//!
//! What is known to fail is refused, and every reason is given; what is not known is planned, with a note. The same question may be asked before the golden
//! is built: then it is answered as far as manifest and platform decide it.

use serde::Serialize;

use crate::{
    boot::{
        esp::EfiProgram,
        inspect::{Availability, Inspection, unpack::Packing},
        platform::{Firmware, Mode, Platform, machine, runs_on},
        prepare::DiskBoot,
        supplied::{Modules, SuppliedFiles, SuppliedKernel},
    },
    disk::Layout,
    error::{Error, Kind, Stage},
    fs::{FsKind, Profile},
    guest::facts::GuestFacts,
    manifest::{EntryPoints, KernelSpec},
    mapping::Bus,
};

/// A golden as far as the answer depends on it.
#[derive(Debug, Clone, Copy)]
pub struct Built<'a> {
    /// How the disk can be started.
    pub boot: &'a DiskBoot,
    /// What its tree contains.
    pub facts: &'a GuestFacts,
    /// What its first kernel can do; nothing when that was not looked at.
    pub inspection: Option<&'a Inspection>,
}

/// Everything the answer depends on.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The golden; nothing before it is built.
    pub built: Option<Built<'a>>,
    /// `entry_points` of the manifest.
    pub entry_points: &'a EntryPoints,
    /// Whether the manifest names a kernel of the image (`boot.kernel`).
    pub names_kernel: bool,
    /// Architecture of the image.
    pub arch: &'a str,
    /// How the disk is laid out.
    pub layout: Layout,
    /// Filesystem of the root.
    pub filesystem: FsKind,
    /// Features of an ext4 root; does not matter for others.
    pub profile: Profile,
    /// Where it is to run.
    pub platform: &'a Platform,
    /// Major and minor version of the host's Xen, if it is known.
    pub xen_version: Option<(u16, u16)>,
    /// Kernels that come from elsewhere, in order of preference.
    pub supplied: &'a [SuppliedKernel],
}

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum KernelSource {
    /// The image.
    Image {
        /// Path in the image.
        kernel: String,
        /// Path in the image.
        initrd: Option<String>,
    },
    /// The image's unified kernel image on the EFI system partition.
    Unified,
    /// A supplied kernel; the image has none.
    Supplied {
        /// What it is called.
        name: String,
    },
    /// The golden is not built: whether the image has a kernel is not known.
    Unknown,
}

/// How a disk starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootPlan {
    /// What starts first.
    pub firmware: Firmware,
    /// The program that UEFI starts.
    pub efi: Option<EfiProgram>,
    /// The kernel.
    pub kernel: KernelSource,
    /// What was not known.
    pub notes: Vec<String>,
}

/// Why a disk does not start on a platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// A stable name, see the table above.
    pub reason: &'static str,
    /// What does not fit.
    pub message: String,
    /// What helps.
    pub hint: String,
}

/// All reasons why a disk does not start on a platform; at least one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusals(pub Vec<Refusal>);

impl Refusals {
    /// As the daemon's calls answer it: `Kind::Unsupported` with the first reason, and every reason as a violation. `platform` is the platform's name, `field`
    /// where it stands in the request.
    pub fn into_error(self, platform: &str, field: &str) -> Error {
        let first = self.0.first().map_or("PLATFORM", |refusal| refusal.reason);
        let all: Vec<String> = self.0.iter().map(|refusal| format!("{}: {}", refusal.reason, refusal.message)).collect();
        let hints: Vec<&str> = self.0.iter().map(|refusal| refusal.hint.as_str()).filter(|hint| !hint.is_empty()).collect();
        let text = format!("the image does not start on platform {platform}: {}", all.join("; "));
        let error = Error::new(Kind::Unsupported, Stage::Resolve, platform, text).with_reason(first).with_hint(hints.join("; "));
        all.into_iter().fold(error, |error, why| error.with_violation(field, why))
    }
}

/// What is collected on the way.
#[derive(Default)]
struct Findings {
    refusals: Vec<Refusal>,
    notes: Vec<String>,
}

impl Findings {
    fn refuse(&mut self, reason: &'static str, message: impl Into<String>, hint: impl Into<String>) {
        self.refusals.push(Refusal { reason, message: message.into(), hint: hint.into() });
    }
}

/// The kernel that was chosen, and what it can do.
struct Chosen<'a> {
    source: KernelSource,
    inspection: Option<&'a Inspection>,
}

/// Answers; the refusals are in order from what can't be helped to what a kernel's update changes.
pub fn check(question: &Question<'_>) -> Result<BootPlan, Refusals> {
    let platform = question.platform;
    let mut found = Findings::default();
    if let Some(why) = platform.contradiction() {
        found.refuse("PLATFORM_CONTRADICTION", why, "correct the platform in the configuration");
        return Err(Refusals(found.refusals));
    }
    check_arch(question, &mut found);
    let points = question.entry_points;
    if points.chroot.is_some() && points.kernel.is_none() && points.init.is_none() && !question.names_kernel {
        let text = "the image can only be entered by changing root: its manifest names neither kernel nor init";
        found.refuse("NO_BOOT_ENTRY_POINT", text, "use an image with an entry point kernel or init");
        return Err(Refusals(found.refusals));
    }
    if matches!(platform.firmware, Firmware::Bios | Firmware::Uefi) && !question.layout.is_partitioned() {
        let text = format!("{} starts from a disk with a partition table, this is a bare filesystem", platform.firmware.name());
        found.refuse("LAYOUT_FIRMWARE", text, "render with the layout gpt, or on a platform that starts kernels directly");
    }
    let chosen = choose_kernel(question, &mut found);
    check_firmware(question, &mut found);
    check_filesystem(question, &mut found);
    let kernel = chosen.map(|chosen| {
        match chosen.inspection {
            Some(inspection) => check_kernel(question, &chosen.source, inspection, &mut found),
            None if matches!(chosen.source, KernelSource::Unified | KernelSource::Unknown) => {}
            None => found.notes.push("the kernel was not looked at: whether it has the drivers of this platform is not known".into()),
        }
        chosen.source
    });
    match kernel {
        Some(kernel) if found.refusals.is_empty() => {
            let efi = question.built.and_then(|built| built.boot.efi.clone()).filter(|_| platform.firmware == Firmware::Uefi);
            Ok(BootPlan { firmware: platform.firmware, efi, kernel, notes: found.notes })
        }
        _ => Err(Refusals(found.refusals)),
    }
}

fn runs(guest: &str, platform: &Platform) -> bool {
    runs_on(guest, platform.machine(), platform.firmware)
}

fn check_arch(question: &Question<'_>, found: &mut Findings) {
    let guest = machine(question.arch);
    if !runs(guest, question.platform) {
        let text = format!("the image is for {guest}, the platform is {}", question.platform.machine());
        found.refuse("ARCH_DIFFERS", text, "choose a platform of the image's architecture");
    }
}

/// The image's kernel if it has one, else a supplied one where the host loads kernels.
fn choose_kernel<'a>(question: &Question<'a>, found: &mut Findings) -> Option<Chosen<'a>> {
    let platform = question.platform;
    match question.built {
        Some(built) => {
            if let Some(first) = built.boot.kernels.first() {
                let source = KernelSource::Image { kernel: first.kernel.clone(), initrd: first.initrd.clone() };
                return Some(Chosen { source, inspection: built.inspection });
            }
            let unified = matches!(built.boot.efi, Some(EfiProgram::ImageUki { .. } | EfiProgram::ImageSystemdBoot { .. }));
            if platform.firmware == Firmware::Uefi && unified {
                return Some(Chosen { source: KernelSource::Unified, inspection: None });
            }
        }
        // A manifest that says how the image starts, and not by a kernel of its own, is believed.
        None => {
            let init_only = question.entry_points.init.is_some() && question.entry_points.kernel.is_none();
            if !init_only || question.names_kernel {
                return Some(Chosen { source: KernelSource::Unknown, inspection: None });
            }
        }
    }
    choose_supplied(question, found)
}

fn choose_supplied<'a>(question: &Question<'a>, found: &mut Findings) -> Option<Chosen<'a>> {
    let wanted = question.entry_points.init.as_ref();
    let described = wanted.map(|spec| format!(" ({})", describe(spec))).unwrap_or_default();
    if question.platform.firmware != Firmware::Direct {
        let text = format!("the image has no kernel{described}, and {} starts none but the image's", question.platform.firmware.name());
        found.refuse("KERNEL_NEEDED", text, "use an image that has a kernel in /boot, or a platform whose firmware is direct");
        return None;
    }
    if question.supplied.is_empty() {
        let text = format!("the image has no kernel and needs one{described}");
        found.refuse("KERNEL_NEEDED", text, "configure a [[kernel]], or use an image that has one in /boot");
        return None;
    }
    let Some(kernel) = question.supplied.iter().find(|kernel| wanted.is_none_or(|wanted| meets(&kernel.offers, wanted))) else {
        let offered: Vec<String> = question.supplied.iter().map(|kernel| format!("{} ({})", kernel.name, describe(&kernel.offers))).collect();
        let text = format!("the image needs a kernel{described}, supplied are {}", offered.join(", "));
        found.refuse("KERNEL_UNSUITABLE", text, "configure a [[kernel]] of that system, version and flavor");
        return None;
    };
    match &kernel.files {
        Ok(files) => {
            check_modules(question, kernel, files, found);
            Some(Chosen { source: KernelSource::Supplied { name: kernel.name.clone() }, inspection: Some(&files.inspection) })
        }
        Err(why) => {
            found.refuse(
                "KERNEL_UNUSABLE",
                format!("the kernel {} can't be used: {why}", kernel.name),
                "correct the [[kernel]] in the configuration",
            );
            None
        }
    }
}

fn check_modules(question: &Question<'_>, kernel: &SuppliedKernel, files: &SuppliedFiles, found: &mut Findings) {
    let (Modules::Image, Some(built)) = (kernel.modules, question.built) else { return };
    let Some(release) = files.release().filter(|release| !release.contains('/')) else {
        found.notes.push(format!("the kernel {} does not say its release: whether the image has its modules is not known", kernel.name));
        return;
    };
    if !["/usr/lib/modules", "/lib/modules"].iter().any(|directory| built.facts.exists(&format!("{directory}/{release}"))) {
        let text = format!("the kernel {} has its modules from the image, which has no /lib/modules/{release}", kernel.name);
        found.refuse("KERNEL_MODULES", text, "put the modules into the image, or supply a kernel with modules = \"none\"");
    }
}

fn describe(spec: &KernelSpec) -> String {
    let parts: Vec<&str> = [&spec.os, &spec.version, &spec.flavor].into_iter().filter_map(Option::as_deref).collect();
    if parts.is_empty() { "of any kind".into() } else { parts.join(" ") }
}

/// What a manifest leaves out may be anything; a version is met by itself and by what goes on from it: 2.6.32 by 2.6.32.1 and 2.6.32-5, not by 2.6.321.
fn meets(offered: &KernelSpec, wanted: &KernelSpec) -> bool {
    let same = |offered: &Option<String>, wanted: &Option<String>| match (offered, wanted) {
        (_, None) => true,
        (Some(offered), Some(wanted)) => offered.eq_ignore_ascii_case(wanted),
        (None, Some(_)) => false,
    };
    let version = match (&offered.version, &wanted.version) {
        (_, None) => true,
        (Some(offered), Some(wanted)) => {
            offered.strip_prefix(wanted.as_str()).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        }
        (None, Some(_)) => false,
    };
    version && same(&offered.os, &wanted.os) && same(&offered.flavor, &wanted.flavor)
}

fn check_firmware(question: &Question<'_>, found: &mut Findings) {
    let (Some(Built { boot, .. }), platform) = (question.built, question.platform) else { return };
    // That a bare filesystem has no boot loader has been said.
    if !question.layout.is_partitioned() {
        return;
    }
    let why = || boot.notes.join("; ");
    match platform.firmware {
        Firmware::Bios if !boot.bios => found.refuse("NO_BOOT_LOADER", "the disk has no boot loader for BIOS", why()),
        Firmware::Uefi if boot.efi.is_none() => found.refuse("NO_BOOT_LOADER", "the disk has no program for UEFI firmware", why()),
        Firmware::Uefi if platform.secure_boot && boot.efi == Some(EfiProgram::HostGrub) => found.refuse(
            "SECURE_BOOT",
            "the disk is started by this host's GRUB, which is not signed",
            "use an image with shim-signed and grub-efi-amd64-signed, or a platform without Secure Boot",
        ),
        Firmware::Uefi if platform.secure_boot && boot.efi_signed == Some(false) => {
            let program = boot.efi.as_ref().map_or("program", EfiProgram::describe);
            let hint = "use an image whose boot programs are signed, or a platform without Secure Boot";
            found.refuse("SECURE_BOOT", format!("the disk is started by {program}, which carries no signature"), hint);
        }
        _ => {}
    }
}

/// Which loader reads which filesystem; the features are those of `ext4::profile`.
fn check_filesystem(question: &Question<'_>, found: &mut Findings) {
    let Question { platform, filesystem, profile, .. } = question;
    let ext4 = *filesystem == FsKind::Ext4;
    match platform.firmware {
        // pygrub's libfsimage: ext2 to ext4 with 32-byte descriptors; its XFS is that of 2005, without checksums.
        Firmware::Loader if !ext4 || *profile != Profile::Compat => {
            let text = if ext4 { format!("ext4 with the profile {}", profile_name(*profile)) } else { filesystem.name().to_owned() };
            found.refuse(
                "FS_PROFILE",
                format!("pygrub can't read {text}"),
                "render with ext4 and the profile compat, or on a platform that starts kernels directly",
            );
        }
        // An image's own GRUB is believed: distributions patch theirs.
        Firmware::Bios | Firmware::Uefi => {
            let Some(Built { boot, .. }) = question.built else { return };
            if let Some(why) = boot.unreadable.as_ref().filter(|_| host_grub_starts(boot, platform)) {
                found.refuse("FS_PROFILE", why, "render with ext4, or on a host whose GRUB is newer");
            }
            if ext4 && *profile == Profile::Modern && boot.reads_checksum_seed == Some(false) && host_grub_starts(boot, platform) {
                found.refuse(
                    "FS_PROFILE",
                    "the GRUB on the disk can't read ext4 with the profile modern (metadata_csum_seed)",
                    "render with the profile grub206, or on a host with GRUB 2.12",
                );
            }
        }
        Firmware::Direct | Firmware::Loader => {}
    }
}

fn host_grub_starts(boot: &DiskBoot, platform: &Platform) -> bool {
    platform.firmware == Firmware::Bios || boot.efi == Some(EfiProgram::HostGrub)
}

fn profile_name(profile: Profile) -> &'static str {
    match profile {
        Profile::Modern => "modern",
        Profile::Grub206 => "grub206",
        Profile::Compat => "compat",
    }
}

fn check_kernel(question: &Question<'_>, source: &KernelSource, inspection: &Inspection, found: &mut Findings) {
    let platform = question.platform;
    let Some(kernel) = &inspection.kernel else {
        found.notes.push("the kernel could not be read: what it can do is not known".into());
        return check_drivers(question, inspection, found);
    };
    if let Some(of_kernel) = kernel.machine.as_deref()
        && !runs(of_kernel, platform)
    {
        let text = format!("the kernel is for {of_kernel}, the platform is {}", platform.machine());
        found.refuse("ARCH_DIFFERS", text, "choose a platform of the kernel's architecture");
    }
    if platform.secure_boot && !kernel.signed && *source != KernelSource::Unified {
        found.refuse("SECURE_BOOT", "the kernel is not signed", "use the distribution's signed kernel");
    }
    check_packing(question, kernel.packing, found);
    match (platform.mode, kernel.xen_pv) {
        (Mode::Pvh, None) => found.notes.push("whether the kernel has a PVH entry is not known".into()),
        (Mode::Pvh, Some(_)) if kernel.pvh_entry.is_none() => {
            found.refuse("PVH_ENTRY_MISSING", "the kernel has no PVH entry", "use a kernel with CONFIG_PVH, or the modes pv or hvm");
        }
        (Mode::Pv, None) => found.notes.push("whether the kernel knows Xen's paravirtual mode is not known".into()),
        (Mode::Pv, Some(false)) => {
            let text = "the kernel has no entry for Xen's paravirtual mode";
            found.refuse("PV_ENTRY_MISSING", text, "use a kernel with CONFIG_XEN_PV, or the mode pvh");
        }
        _ => {}
    }
    check_drivers(question, inspection, found);
}

/// Xen's domain builder unpacks the kernel on the host (libxenguest, xg_dom_bzimageloader.c). Everybody else has the kernel unpack itself.
fn check_packing(question: &Question<'_>, packing: Option<Packing>, found: &mut Findings) {
    if !matches!(question.platform.mode, Mode::Pv | Mode::Pvh) || packing != Some(Packing::Zstd) {
        return;
    }
    match question.xen_version {
        Some((major, minor)) if (major, minor) < (4, 15) => {
            let text = format!("the kernel is compressed with zstd, which Xen {major}.{minor} can't unpack");
            let hint = "Xen 4.15 and later can; or use the mode hvm, or a kernel that is compressed in another way";
            found.refuse("KERNEL_COMPRESSION", text, hint);
        }
        Some(_) => {}
        None => found.notes.push("the kernel is compressed with zstd: Xen 4.15 or later is needed".into()),
    }
}

/// The modules without which the root is not found.
fn drivers_of(platform: &Platform) -> &'static [&'static str] {
    match (platform.bus, platform.mode) {
        (Bus::Virtio, _) => &["virtio_pci", "virtio_blk"],
        (Bus::Nvme, _) => &["nvme"],
        (Bus::Xen, _) => &["xen_blkfront"],
        (Bus::Scsi, Mode::Kvm) => &["virtio_pci", "virtio_scsi", "sd_mod"],
        // Which controller a machine has is not said.
        (Bus::Scsi, _) => &["sd_mod"],
    }
}

fn check_drivers(question: &Question<'_>, inspection: &Inspection, found: &mut Findings) {
    for driver in drivers_of(question.platform).iter().copied().chain([question.filesystem.name()]) {
        match inspection.drivers.get(driver) {
            Some(Availability::Builtin | Availability::Initrd) => {}
            Some(Availability::RootOnly) => found.refuse(
                "DRIVER_MISSING",
                format!("the root needs the driver {driver}, which is a module outside of the initrd"),
                "put it into the image's initrd (initramfs-tools: MODULES=most), or attach the disk in another way",
            ),
            Some(Availability::Absent) => found.refuse(
                "DRIVER_MISSING",
                format!("the root needs the driver {driver}, which the kernel does not have"),
                "use another kernel, or attach the disk in another way",
            ),
            None => found.notes.push(format!("whether kernel or initrd have the driver {driver} is not known")),
        }
    }
}

#[cfg(test)]
mod tests;

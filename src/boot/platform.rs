//! What a disk is to be booted on, in a provider's words. Input of [`crate::boot::check`] and of the boot configuration; given, never detected.

use serde::{Deserialize, Serialize};

pub use crate::mapping::Bus;
use crate::{
    disk::Layout,
    fs::{FsKind, Profile},
};

/// The hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hypervisor {
    /// Xen.
    Xen,
    /// KVM (or another that shows the guest a PC: QEMU's emulation, bhyve, Hyper-V generation 2 with virtio).
    Kvm,
    /// None: the disk is written to a machine's own drive.
    None,
}

impl Hypervisor {
    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Hypervisor::Xen => "xen",
            Hypervisor::Kvm => "kvm",
            Hypervisor::None => "none",
        }
    }
}

/// How the machine is virtualised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Xen paravirtual: the kernel knows Xen, no firmware.
    Pv,
    /// Xen PVH: hardware virtualisation, entry by an ELF note, no firmware.
    Pvh,
    /// Xen HVM: a whole PC.
    Hvm,
    /// KVM.
    Kvm,
    /// A machine of its own.
    Metal,
}

impl Mode {
    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Pv => "pv",
            Mode::Pvh => "pvh",
            Mode::Hvm => "hvm",
            Mode::Kvm => "kvm",
            Mode::Metal => "metal",
        }
    }
}

/// What starts first in the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// BIOS (SeaBIOS): the boot sector of the disk.
    Bios,
    /// UEFI (OVMF, AAVMF): the removable path of the disk's EFI system partition.
    Uefi,
    /// None: the host's tools load kernel and initrd, given as files.
    Direct,
    /// None: a loader of the host (pygrub, or pvgrub in the guest's place) reads the boot configuration from the disk.
    Loader,
}

impl Firmware {
    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Firmware::Bios => "bios",
            Firmware::Uefi => "uefi",
            Firmware::Direct => "direct",
            Firmware::Loader => "loader",
        }
    }
}

/// Where the guest's kernel and boot loader talk to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// The screen.
    Vga,
    /// The first serial port: `ttyS0`, on ARM `ttyAMA0`.
    Serial,
    /// The hypervisor's own: `hvc0` (Xen's, virtio's).
    Hypervisor,
}

impl Console {
    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Console::Vga => "vga",
            Console::Serial => "serial",
            Console::Hypervisor => "hypervisor",
        }
    }

    /// The kernel's argument for it.
    pub fn argument(self, arch: &str) -> &'static str {
        match self {
            Console::Vga => "console=tty0",
            Console::Serial if matches!(arch, "aarch64" | "arm64" | "arm" | "armv7l" | "armhf") => "console=ttyAMA0",
            Console::Serial => "console=ttyS0,115200",
            Console::Hypervisor => "console=hvc0",
        }
    }
}

/// A platform that a provider has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platform {
    /// The hypervisor.
    pub hypervisor: Hypervisor,
    /// How the machine is virtualised; `pv`, `pvh` and `hvm` are Xen's, `kvm` is KVM's, `metal` goes with no hypervisor.
    pub mode: Mode,
    /// What starts first.
    pub firmware: Firmware,
    /// Architecture as `uname -m` or Debian says it.
    #[serde(default = "host_arch")]
    pub arch: String,
    /// How the root disk is attached.
    pub bus: Bus,
    /// Consoles; the last one is where the guest's login prompt and kernel messages go first. Empty for what suits the mode.
    #[serde(default)]
    pub consoles: Vec<Console>,
    /// Whether the firmware starts signed programs only (UEFI Secure Boot).
    #[serde(default)]
    pub secure_boot: bool,
    /// Whether what starts there reads `/boot/extlinux/extlinux.conf` (U-Boot, extlinux): it is written then.
    #[serde(default)]
    pub extlinux: bool,
}

fn host_arch() -> String {
    std::env::consts::ARCH.to_owned()
}

impl Platform {
    /// The consoles given, or what suits: both screen and serial line where there is a PC, the hypervisor's where there is none.
    pub fn consoles(&self) -> Vec<Console> {
        match (&self.consoles[..], self.mode) {
            ([], Mode::Pv | Mode::Pvh) => vec![Console::Hypervisor],
            ([], Mode::Hvm | Mode::Kvm | Mode::Metal) => DEFAULT_CONSOLES.to_vec(),
            (given, _) => given.to_vec(),
        }
    }

    /// The architecture in the kernel's words.
    pub fn machine(&self) -> &str {
        machine(&self.arch)
    }

    /// Whether the parts go together: the mode belongs to the hypervisor, the firmware to the mode, the bus to the hypervisor.
    pub fn contradiction(&self) -> Option<String> {
        let Platform { hypervisor, mode, firmware, bus, secure_boot, .. } = self;
        let mode_fits = match hypervisor {
            Hypervisor::Xen => matches!(mode, Mode::Pv | Mode::Pvh | Mode::Hvm),
            Hypervisor::Kvm => *mode == Mode::Kvm,
            Hypervisor::None => *mode == Mode::Metal,
        };
        let firmware_fits = match mode {
            Mode::Pv | Mode::Pvh => matches!(firmware, Firmware::Direct | Firmware::Loader),
            Mode::Hvm | Mode::Kvm => *firmware != Firmware::Loader,
            Mode::Metal => matches!(firmware, Firmware::Bios | Firmware::Uefi),
        };
        let bus_fits = match mode {
            Mode::Pv | Mode::Pvh => *bus == Bus::Xen,
            Mode::Hvm => *bus != Bus::Virtio,
            Mode::Kvm | Mode::Metal => *bus != Bus::Xen,
        };
        if !mode_fits {
            Some(format!("hypervisor {hypervisor:?} has no mode {mode:?}").to_lowercase())
        } else if !firmware_fits {
            Some(format!("a machine of mode {mode:?} does not start by {firmware:?}").to_lowercase())
        } else if !bus_fits {
            Some(format!("a machine of mode {mode:?} has no {bus:?} disks").to_lowercase())
        } else if *secure_boot && *firmware != Firmware::Uefi {
            Some("secure boot is a matter of uefi".to_owned())
        } else {
            None
        }
    }
}

/// Consoles of a disk that may be started anywhere: the screen, and the serial line that clouds and `virsh console` show.
pub const DEFAULT_CONSOLES: [Console; 2] = [Console::Vga, Console::Serial];

/// What platforms want of a disk that has to start on all of them, where nobody else decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Preferences {
    /// A partition table when a firmware needs one, else none.
    pub layout: Option<Layout>,
    /// ext4 where the host's loader reads the filesystem.
    pub filesystem: Option<FsKind>,
    /// The features that the host's loader reads.
    pub profile: Option<Profile>,
}

/// What `platforms` want together; nothing when there are none.
pub fn preferences(platforms: &[Platform]) -> Preferences {
    let any = |firmwares: &[Firmware]| platforms.iter().any(|platform| firmwares.contains(&platform.firmware));
    Preferences {
        layout: match platforms {
            [] => None,
            _ if any(&[Firmware::Bios, Firmware::Uefi]) => Some(Layout::Gpt),
            _ => Some(Layout::Bare),
        },
        filesystem: any(&[Firmware::Loader]).then_some(FsKind::Ext4),
        profile: any(&[Firmware::Loader]).then_some(Profile::Compat),
    }
}

/// Consoles of a disk that has to talk on all of `platforms`. A kernel leaves out those that a machine lacks; the last one there is is its main one: the serial
/// line where there is a PC, the hypervisor's where there is none.
pub fn consoles(platforms: &[Platform]) -> Vec<Console> {
    match platforms {
        [] => DEFAULT_CONSOLES.to_vec(),
        [only] => only.consoles(),
        several => {
            let wanted: Vec<Console> = several.iter().flat_map(Platform::consoles).collect();
            [Console::Vga, Console::Hypervisor, Console::Serial].into_iter().filter(|console| wanted.contains(console)).collect()
        }
    }
}

/// Whether a machine of the architecture `offered` with this firmware runs what is for `guest` (both in the kernel's words). An x86-64 machine runs what is for
/// i686 too; its UEFI firmware is of 64 bits, and so is the GRUB that we put there.
pub fn runs_on(guest: &str, offered: &str, firmware: Firmware) -> bool {
    guest == offered || (guest == "i686" && offered == "x86_64" && firmware != Firmware::Uefi)
}

/// An architecture in the kernel's words (`uname -m`) for those known by several.
pub fn machine(arch: &str) -> &str {
    match arch {
        "i386" | "i486" | "i586" | "i686" | "x86" => "i686",
        "amd64" | "x86_64" | "x86-64" => "x86_64",
        "arm64" | "aarch64" => "aarch64",
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn platform(hypervisor: Hypervisor, mode: Mode, firmware: Firmware, bus: Bus) -> Platform {
        Platform { hypervisor, mode, firmware, bus, arch: "x86_64".into(), consoles: Vec::new(), secure_boot: false, extlinux: false }
    }

    #[test]
    fn a_platform_reads_as_documents_write_it() {
        let text = r#"{"hypervisor": "xen", "mode": "pvh", "firmware": "direct", "bus": "xen", "arch": "amd64"}"#;
        let read: Platform = serde_json::from_str(text).expect("a platform");
        assert_eq!((read.machine(), read.consoles()), ("x86_64", vec![Console::Hypervisor]));
        assert!(serde_json::from_str::<Platform>(&text.replace("\"bus\"", "\"buss\"")).is_err());
    }

    #[test]
    fn parts_that_do_not_go_together_are_named() {
        let says = |hypervisor, mode, firmware, bus| platform(hypervisor, mode, firmware, bus).contradiction();
        assert_eq!(says(Hypervisor::Kvm, Mode::Kvm, Firmware::Bios, Bus::Virtio), None);
        assert_eq!(says(Hypervisor::Xen, Mode::Pv, Firmware::Loader, Bus::Xen), None);
        assert_eq!(says(Hypervisor::None, Mode::Metal, Firmware::Uefi, Bus::Nvme), None);
        assert_eq!(says(Hypervisor::Kvm, Mode::Pv, Firmware::Direct, Bus::Xen).as_deref(), Some("hypervisor kvm has no mode pv"));
        assert_eq!(says(Hypervisor::Xen, Mode::Pvh, Firmware::Bios, Bus::Xen).as_deref(), Some("a machine of mode pvh does not start by bios"));
        assert_eq!(says(Hypervisor::Xen, Mode::Hvm, Firmware::Bios, Bus::Virtio).as_deref(), Some("a machine of mode hvm has no virtio disks"));
        let mut direct = platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Direct, Bus::Virtio);
        direct.secure_boot = true;
        assert_eq!(direct.contradiction().as_deref(), Some("secure boot is a matter of uefi"));
    }

    #[test]
    fn platforms_decide_together_what_nobody_else_does() {
        let bios = platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Bios, Bus::Virtio);
        let pv = platform(Hypervisor::Xen, Mode::Pv, Firmware::Loader, Bus::Xen);
        let pvh = platform(Hypervisor::Xen, Mode::Pvh, Firmware::Direct, Bus::Xen);
        assert_eq!((preferences(&[]), consoles(&[])), (Preferences::default(), DEFAULT_CONSOLES.to_vec()));
        assert_eq!(preferences(std::slice::from_ref(&bios)), Preferences { layout: Some(Layout::Gpt), filesystem: None, profile: None });
        let direct = Preferences { layout: Some(Layout::Bare), filesystem: None, profile: None };
        assert_eq!((preferences(std::slice::from_ref(&pvh)), consoles(std::slice::from_ref(&pvh))), (direct, vec![Console::Hypervisor]));
        let all = [bios, pvh, pv];
        let everything = Preferences { layout: Some(Layout::Gpt), filesystem: Some(FsKind::Ext4), profile: Some(Profile::Compat) };
        assert_eq!(preferences(&all), everything);
        assert_eq!(consoles(&all), [Console::Vga, Console::Hypervisor, Console::Serial]);
    }
}

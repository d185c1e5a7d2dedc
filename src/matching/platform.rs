//! An instance type, as far as it decides what runs on it.

use std::collections::BTreeSet;

use super::Reason;
use crate::{
    boot::platform::{self as boot, Bus, Firmware, machine},
    config::PlatformConfig,
};

pub use crate::boot::platform::Hypervisor;

impl Hypervisor {
    /// The hypervisor with a name of documents.
    pub fn parse(text: &str) -> Option<Hypervisor> {
        [Hypervisor::Xen, Hypervisor::Kvm, Hypervisor::None].into_iter().find(|hypervisor| hypervisor.name() == text)
    }
}

/// How the machine is virtualised. Those of [`crate::boot::platform::Mode`], and Xen's first domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Xen paravirtual.
    Pv,
    /// Xen PVH.
    Pvh,
    /// Xen HVM.
    Hvm,
    /// Xen's first domain, on hardware: the image runs beside its guests.
    Dom0,
    /// KVM.
    Kvm,
    /// A machine of its own.
    Metal,
}

impl Mode {
    const ALL: [Mode; 6] = [Mode::Pv, Mode::Pvh, Mode::Hvm, Mode::Dom0, Mode::Kvm, Mode::Metal];

    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Pv => "pv",
            Mode::Pvh => "pvh",
            Mode::Hvm => "hvm",
            Mode::Dom0 => "dom0",
            Mode::Kvm => "kvm",
            Mode::Metal => "metal",
        }
    }

    /// The mode with a name.
    pub fn parse(text: &str) -> Option<Mode> {
        Mode::ALL.into_iter().find(|mode| mode.name() == text)
    }

    /// The usual mode of a hypervisor.
    pub fn of(hypervisor: Hypervisor) -> Mode {
        match hypervisor {
            Hypervisor::Xen => Mode::Hvm,
            Hypervisor::Kvm => Mode::Kvm,
            Hypervisor::None => Mode::Metal,
        }
    }

    /// The hypervisor that it belongs to.
    pub fn hypervisor(self) -> Hypervisor {
        match self {
            Mode::Pv | Mode::Pvh | Mode::Hvm | Mode::Dom0 => Hypervisor::Xen,
            Mode::Kvm => Hypervisor::Kvm,
            Mode::Metal => Hypervisor::None,
        }
    }
}

/// A kind of guest that may be created inside a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Container {
    /// Linux containers.
    Lxc,
    /// Virtual machines of KVM.
    Kvm,
    /// Guests of Xen.
    Xen,
}

impl Container {
    /// All kinds.
    pub const ALL: [Container; 3] = [Container::Lxc, Container::Kvm, Container::Xen];

    /// The name used in documents.
    pub fn name(self) -> &'static str {
        match self {
            Container::Lxc => "lxc",
            Container::Kvm => "kvm",
            Container::Xen => "xen",
        }
    }

    /// The kind with a name.
    pub fn parse(text: &str) -> Option<Container> {
        Container::ALL.into_iter().find(|kind| kind.name() == text)
    }
}

/// A cloud that has an instance type.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cloud {
    /// Region, for those who have several.
    pub region: String,
    /// URL of the endpoint.
    pub endpoint: String,
}

/// An instance type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// Its name, e.g. `m1.small`.
    pub name: String,
    /// Who has it.
    pub clouds: Vec<Cloud>,
    /// The hypervisor.
    pub hypervisor: Hypervisor,
    /// How the machine is virtualised.
    pub mode: Mode,
    /// What starts first; see [`Platform::firmware`].
    pub firmware: Option<Firmware>,
    /// How the root disk is attached; see [`Platform::bus`].
    pub bus: Option<Bus>,
    /// Architectures that it offers, as their publisher says them. Not empty.
    pub archs: Vec<String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, MiB; 0 when not known.
    pub memory_mib: u64,
    /// Whether the guest sees hardware virtualisation.
    pub nested_virtualization: bool,
    /// Whether only signed programs are started.
    pub secure_boot: bool,
    /// Whether it is one of this host's, which renders for it.
    pub configured: bool,
    /// Whether images without a kernel are started with one of the provider's.
    pub supplies_kernel: bool,
    /// Kinds of guests that the provider says can be created inside; nothing when that follows from the rest.
    pub containers: Option<BTreeSet<Container>>,
}

impl Platform {
    /// A platform of the configuration.
    pub fn of_config(config: &PlatformConfig) -> Platform {
        let platform = config.platform();
        Platform {
            name: config.name.to_string(),
            clouds: vec![Cloud { region: config.region.clone(), endpoint: config.endpoint.clone() }],
            hypervisor: platform.hypervisor,
            mode: Mode::parse(platform.mode.name()).unwrap_or(Mode::of(platform.hypervisor)),
            firmware: Some(platform.firmware),
            bus: Some(platform.bus),
            archs: vec![platform.arch],
            cpus: config.cpus,
            memory_mib: config.memory.0 >> 20,
            nested_virtualization: config.nested_virtualization,
            secure_boot: config.secure_boot,
            configured: true,
            supplies_kernel: false,
            containers: None,
        }
    }

    /// What starts first: as given, or what suits the mode.
    pub fn firmware(&self) -> Firmware {
        self.firmware.unwrap_or(match self.mode {
            Mode::Pv => Firmware::Loader,
            Mode::Pvh => Firmware::Direct,
            Mode::Hvm | Mode::Dom0 | Mode::Kvm | Mode::Metal => Firmware::Bios,
        })
    }

    /// How the root disk is attached: as given, or what suits the mode.
    pub fn bus(&self) -> Bus {
        self.bus.unwrap_or(match self.mode {
            Mode::Pv | Mode::Pvh | Mode::Hvm => Bus::Xen,
            Mode::Kvm => Bus::Virtio,
            Mode::Dom0 | Mode::Metal => Bus::Scsi,
        })
    }

    /// The platform as booting sees it: of the architectures that it offers the first that runs one of `archs`. A first domain is a machine of its own
    /// there: Xen is started like any other program, and its domain by it.
    pub fn machine_for(&self, archs: &[String]) -> boot::Platform {
        let runs = |offered: &&String| archs.iter().any(|arch| boot::runs_on(machine(arch), machine(offered), self.firmware()));
        let arch = self.archs.iter().find(runs).or(self.archs.first()).cloned().unwrap_or_default();
        let (hypervisor, mode) = match self.mode {
            Mode::Pv => (self.hypervisor, boot::Mode::Pv),
            Mode::Pvh => (self.hypervisor, boot::Mode::Pvh),
            Mode::Hvm => (self.hypervisor, boot::Mode::Hvm),
            Mode::Kvm => (self.hypervisor, boot::Mode::Kvm),
            Mode::Metal => (self.hypervisor, boot::Mode::Metal),
            Mode::Dom0 => (Hypervisor::None, boot::Mode::Metal),
        };
        let (firmware, bus, secure_boot) = (self.firmware(), self.bus(), self.secure_boot);
        boot::Platform { hypervisor, mode, firmware, arch, bus, consoles: Vec::new(), secure_boot, extlinux: false }
    }

    /// Why guests of a kind can't be created on this platform, whatever runs on it.
    pub fn why_not(&self, kind: Container) -> Option<Reason> {
        if let Some(kinds) = &self.containers {
            let listed: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
            let why = || format!("the provider lists only {} for {}", listed.join(", "), self.name);
            return (!kinds.contains(&kind)).then(|| Reason::new("NOT_OFFERED", why()));
        }
        match kind {
            Container::Lxc => None,
            Container::Kvm => self.why_not_kvm(),
            Container::Xen => self.why_not_xen(),
        }
    }

    fn why_not_kvm(&self) -> Option<Reason> {
        match self.mode {
            Mode::Metal => {
                let known = ["x86_64", "i686", "aarch64", "ppc64le", "ppc64el", "s390x", "riscv64"];
                let has = self.archs.iter().any(|arch| known.contains(&machine(arch)));
                (!has).then(|| Reason::new("NO_HARDWARE_VIRTUALIZATION", format!("KVM does not run on {}", self.archs.join(", "))))
            }
            Mode::Kvm | Mode::Hvm if self.nested_virtualization => None,
            Mode::Kvm | Mode::Hvm => {
                Some(Reason::new("NO_NESTED_VIRTUALIZATION", "the machine does not show its guest hardware virtualisation (VMX, SVM)"))
            }
            Mode::Pv | Mode::Pvh => {
                let why = format!("a Xen {} guest has no hardware virtualisation to give on", self.mode.name());
                Some(Reason::new("NO_HARDWARE_VIRTUALIZATION", why))
            }
            Mode::Dom0 => Some(Reason::new("HYPERVISOR_IS_XEN", "the hardware's virtualisation belongs to Xen; its guests are Xen's")),
        }
    }

    fn why_not_xen(&self) -> Option<Reason> {
        match self.mode {
            Mode::Dom0 => None,
            Mode::Metal | Mode::Kvm => {
                Some(Reason::new("XEN_NOT_RUNNING", "the image runs without Xen beneath it; Xen's guests need its first domain"))
            }
            Mode::Pv | Mode::Pvh | Mode::Hvm => {
                Some(Reason::new("NOT_FIRST_DOMAIN", "the machine is itself a guest of Xen; only Xen's first domain creates guests"))
            }
        }
    }
}

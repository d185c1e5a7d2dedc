//! What runs where: images on platforms, and guests inside them.
//!
//! ```text
//! image     entry points, architectures, filesystem, drivers   ─┬─ boots(image, platform)       every reason why not
//! platform  hypervisor, mode, firmware, bus, nested, kernels    ─┤
//! container lxc, kvm, xen                                       ─┴─ hosts(image, platform, kind) every reason why not
//! ```
//!
//! Pure. Whether a machine can host Xen, KVM or LXC guests follows from the platform rather than from the image: LXC needs a Linux kernel of the image's own
//! or the provider's, and that is nearly anywhere; KVM needs hardware virtualisation that the machine shows its guest; Xen needs to be there first. What is
//! not known about an image is no reason against it.

mod image;
mod platform;
#[cfg(test)]
mod tests;

pub use image::{EntryPoint, Image};
pub use platform::{Cloud, Container, Hypervisor, Mode, Platform};

use crate::{
    boot::{
        inspect::Availability,
        platform::{Bus, Firmware, machine},
    },
    disk::Layout,
    error::{Error, Result, Stage},
    fs::FsKind,
    render::Engine,
};

/// Why something does not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Stable, UPPER_SNAKE; programs may branch on it.
    pub code: &'static str,
    /// For people.
    pub message: String,
}

impl Reason {
    fn new(code: &'static str, message: impl Into<String>) -> Reason {
        Reason { code, message: message.into() }
    }
}

/// Why the image does not boot on the platform; empty when it does, as far as is known.
pub fn boots(image: &Image, platform: &Platform) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let fits = |arch: &str| platform.archs.iter().any(|offered| runs(machine(offered), machine(arch)));
    if !image.archs.is_empty() && !image.archs.iter().any(|arch| fits(arch)) {
        let why = format!("the image is for {}, the platform has {}", image.archs.join(", "), platform.archs.join(", "));
        reasons.push(Reason::new("ARCH_MISMATCH", why));
    }
    let has = |entry: EntryPoint| image.entry_points.contains(&entry);
    if !has(EntryPoint::Kernel) && !image.entry_points.is_empty() {
        if has(EntryPoint::Init) && !platform.supplies_kernel {
            reasons.push(Reason::new("KERNEL_NEEDED", "the image brings an init but no kernel, and the platform supplies none"));
        } else if !has(EntryPoint::Init) {
            reasons.push(Reason::new("NO_BOOT_ENTRY_POINT", "the image can only be entered by chroot; it has neither kernel nor init"));
        }
    }
    if !image.virt.is_empty() && !image.virt.contains(&platform.mode) && platform.mode != Mode::Dom0 {
        let made_for: Vec<&str> = image.virt.iter().map(|mode| mode.name()).collect();
        let why = format!("its publisher made it for {}, the platform is {}", made_for.join(", "), platform.mode.name());
        reasons.push(Reason::new("VIRTUALIZATION_MISMATCH", why));
    }
    reasons.extend(boot_path(image, platform));
    reasons.extend(drivers(image, platform));
    reasons
}

/// Whether a machine of architecture `offered` runs programs and kernels of `arch`.
fn runs(offered: &str, arch: &str) -> bool {
    offered == arch || matches!((offered, arch), ("x86_64", "i686"))
}

fn boot_path(image: &Image, platform: &Platform) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let firmware = platform.firmware();
    let from_disk = matches!(firmware, Firmware::Bios | Firmware::Uefi);
    if from_disk && image.layout == Some(Layout::Bare) {
        let why = format!("{} starts what is in a partition table, and the image wants a disk without one", firmware.name());
        reasons.push(Reason::new("LAYOUT_BARE", why));
    }
    if firmware == Firmware::Loader
        && let Some(filesystem) = image.filesystem.filter(|filesystem| *filesystem != FsKind::Ext4)
    {
        let why = format!("the host's loader (pygrub) reads ext4, not {}", filesystem.name());
        reasons.push(Reason::new("FILESYSTEM_UNREADABLE", why));
    }
    reasons
}

/// Modules that a root disk on a bus needs, any one of each group.
fn needed(bus: Bus) -> &'static [&'static [&'static str]] {
    match bus {
        Bus::Virtio => &[&["virtio_pci"], &["virtio_blk", "virtio_scsi"]],
        Bus::Xen => &[&["xen_blkfront"]],
        // Which controller it is depends on the machine.
        Bus::Scsi => &[&["sd_mod"]],
        Bus::Nvme => &[&["nvme"]],
    }
}

fn drivers(image: &Image, platform: &Platform) -> Vec<Reason> {
    if image.drivers.is_empty() || !image.entry_points.contains(&EntryPoint::Kernel) {
        return Vec::new();
    }
    let usable = |module: &&str| image.drivers.get(*module).is_none_or(|at| matches!(at, Availability::Builtin | Availability::Initrd));
    let missing = |group: &&&[&str]| !group.iter().any(&usable);
    let bus = platform.bus();
    let of_bus = needed(bus).iter().filter(missing).map(|group| {
        let why = format!("the kernel can't reach a root disk on {}: {} is neither part of it nor in its initrd", bus_name(bus), group.join(" or "));
        Reason::new("DRIVER_MISSING", why)
    });
    let filesystem = image.filesystem.unwrap_or(FsKind::Ext4).name();
    let of_filesystem = (!usable(&filesystem)).then(|| Reason::new("DRIVER_MISSING", format!("the kernel can't mount a root of {filesystem}")));
    of_bus.chain(of_filesystem).collect()
}

fn bus_name(bus: Bus) -> String {
    serde_json::to_value(bus).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Why guests of a kind can't be created inside the image on the platform; empty when they can. Reasons of [`boots`] come first.
pub fn hosts(image: &Image, platform: &Platform, kind: Container) -> Vec<Reason> {
    let mut reasons = boots(image, platform);
    if kind == Container::Lxc && image.os.as_deref().is_some_and(|os| !os.eq_ignore_ascii_case("linux")) {
        reasons.push(Reason::new("NOT_LINUX", "Linux containers need a Linux kernel"));
    }
    reasons.extend(platform.why_not(kind));
    reasons
}

/// An answer for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The platform.
    pub platform: Platform,
    /// Why the image does not boot there; empty when it does.
    pub boot: Vec<Reason>,
    /// For each kind that was asked for: why it can't be created inside.
    pub containers: Vec<(Container, Vec<Reason>)>,
}

impl Answer {
    /// Whether the image boots, and every kind that was asked for can be created.
    pub fn is_match(&self) -> bool {
        self.boot.is_empty() && self.containers.iter().all(|(_, reasons)| reasons.is_empty())
    }
}

/// The answers for an image on each platform, in the platforms' order.
pub fn answers(image: &Image, platforms: &[Platform], kinds: &[Container]) -> Vec<Answer> {
    let answer = |platform: &Platform| Answer {
        platform: platform.clone(),
        boot: boots(image, platform),
        containers: kinds.iter().map(|kind| (*kind, hosts(image, platform, *kind))).collect(),
    };
    platforms.iter().map(answer).collect()
}

impl Engine {
    /// The host's own platforms, and those of `publish.platforms`. Blocking.
    pub fn instance_types(&self) -> Result<Vec<Platform>> {
        let mut platforms: Vec<Platform> = self.config.platforms.iter().map(Platform::of_config).collect();
        if let Some(path) = &self.config.publish.platforms {
            let object = path.display().to_string();
            let bytes = std::fs::read(path).map_err(|error| Error::io(Stage::Config, object.clone(), "read the platforms", error))?;
            let read = crate::streams::platforms::parse(&bytes)
                .map_err(|error| Error::new(error.kind(), Stage::Config, object, error.message().to_owned()).with_reason("BAD_PLATFORMS"))?;
            platforms.extend(read.into_iter().filter(|platform| !self.config.platforms.iter().any(|own| own.name.as_str() == platform.name)));
        }
        Ok(platforms)
    }
}

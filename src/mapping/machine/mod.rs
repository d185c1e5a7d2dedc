//! Whole machines: an instance's devices on a platform, as what a hypervisor's tools take to start it.
//!
//! ```text
//! mapping + platform + kernel ─ Machine ─┬─ libvirt   <domain>                       virsh define, virsh create
//!                                        ├─ xl        domain configuration           xl create
//!                                        └─ qemu      arguments of qemu-system-ARCH  execve(2)
//! ```
//!
//! Views of data, as the dialects of the disks are: nothing here reads the host, and what a form can't say is refused by name. What a provider decides beside
//! (bridges, graphics) has a plain default that can be edited.

pub mod libvirt;
pub mod qemu;
#[cfg(test)]
mod tests;
pub mod xl;

use std::path::PathBuf;

use crate::{
    boot::platform::{Firmware, Hypervisor, Mode, Platform},
    error::{Error, Kind, Result, Stage},
    mapping::{Bus, Mapping, names::expressible},
    names::MacAddr,
    units::MIB,
};

/// One machine.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    /// Its disks, name and identity.
    pub mapping: &'a Mapping,
    /// Where it runs.
    pub platform: &'a Platform,
    /// Virtual CPUs, at least 1.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Whether it may run virtual machines of its own.
    pub nested: bool,
    /// Bridge of the host that its NICs are attached to.
    pub bridge: &'a str,
    /// The kernel, where the host's tools load it.
    pub kernel: Option<DirectKernel>,
    /// UEFI firmware on the host, for QEMU's command line; libvirt and xl find their own.
    pub uefi: Option<UefiFiles>,
}

/// A kernel that the host's tools load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectKernel {
    /// Absolute path on the host.
    pub kernel: PathBuf,
    /// Absolute path on the host.
    pub initrd: Option<PathBuf>,
    /// Command line.
    pub cmdline: String,
}

/// Files of OVMF or AAVMF on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UefiFiles {
    /// The program, e.g. `/usr/share/OVMF/OVMF_CODE_4M.fd`.
    pub code: PathBuf,
    /// Empty variables, e.g. `/usr/share/OVMF/OVMF_VARS_4M.fd`.
    pub variables: PathBuf,
}

impl Machine<'_> {
    /// Its name: the instance's.
    pub fn name(&self) -> &str {
        self.mapping.instance.as_str()
    }

    /// Memory in whole MiB, which is what xl and QEMU count in.
    fn memory_mib(&self) -> u64 {
        self.memory_bytes / MIB
    }

    /// What `platform.firmware` needs and is not there, and disks that a form can't attach.
    fn check(&self) -> Result<()> {
        let platform = self.platform;
        if let Some(why) = platform.contradiction() {
            return Err(self.refuse("PLATFORM_CONTRADICTION", why));
        }
        if platform.firmware == Firmware::Direct && self.kernel.is_none() {
            return Err(self.refuse("KERNEL_MISSING", "the platform starts a kernel that the host loads, and none is extracted or supplied"));
        }
        // pygrub reads the disk as it is; libxl attaches a qcow2 image to dom0 first only with a block backend there.
        if platform.firmware == Firmware::Loader
            && let Some(root) = self.mapping.devices.first()
            && root.image_format() != "raw"
        {
            return Err(self.refuse(
                "LOADER_READS_RAW_ONLY",
                format!("a loader of the host can't look into a {} volume; use raw or block", root.image_format()),
            ));
        }
        if let Some(kernel) = &self.kernel {
            expressible(&kernel.kernel)?;
            kernel.initrd.as_deref().map(expressible).transpose()?;
            if kernel.cmdline.chars().any(char::is_control) {
                return Err(self.refuse("CMDLINE_NOT_EXPRESSIBLE", "the kernel's command line has a control character"));
            }
        }
        Ok(())
    }

    fn refuse(&self, reason: &'static str, why: impl Into<String>) -> Error {
        Error::new(Kind::Unsupported, Stage::Report, self.name(), why.into()).with_reason(reason)
    }

    /// The NICs with the addresses that the guest knows them by.
    fn macs(&self) -> impl Iterator<Item = MacAddr> {
        self.mapping.nics.iter().map(|nic| nic.mac)
    }

    /// Whether the machine is a PC with a screen, serial line and ACPI.
    fn is_pc(&self) -> bool {
        matches!(self.platform.mode, Mode::Hvm | Mode::Kvm | Mode::Metal)
    }

    fn bus(&self) -> Bus {
        self.platform.bus
    }

    /// A machine without hypervisor is somebody's own: there is nothing to start.
    fn virtual_only(&self) -> Result<()> {
        if self.platform.hypervisor == Hypervisor::None {
            return Err(self.refuse("NO_HYPERVISOR", "the platform has no hypervisor: the disk is written to the machine's own drive"));
        }
        Ok(())
    }
}

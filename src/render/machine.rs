//! An instance as a whole machine of a configured platform.

use crate::{
    boot::platform::{Firmware, Hypervisor},
    config::PlatformConfig,
    error::{Error, Kind, Result, Stage},
    mapping::{
        Bus, Mapping,
        machine::{
            Machine, UefiFiles, libvirt,
            qemu::{self, Accelerator},
            xl,
        },
    },
    proto,
    render::Engine,
};

impl Engine {
    /// The platform of this name. `NotFound` naming the ones there are.
    pub fn platform(&self, name: &str) -> Result<&PlatformConfig> {
        let platforms = &self.config.platforms;
        platforms.iter().find(|platform| platform.name.as_str() == name).ok_or_else(|| {
            let known: Vec<&str> = platforms.iter().map(|platform| platform.name.as_str()).collect();
            Error::new(Kind::NotFound, Stage::Resolve, name, "there is no such platform")
                .with_reason("PLATFORM_NOT_FOUND")
                .with_violation("platform", format!("{name:?} is not configured"))
                .with_hint(format!("configured platforms: {}", known.join(", ")))
        })
    }

    /// The forms that tools of the platform take. What its hypervisor does not have is empty.
    pub fn machine_forms(&self, mapping: &Mapping, config: &PlatformConfig) -> Result<proto::MachineForms> {
        let platform = config.platform();
        let files = &self.config.uefi;
        let uefi = (platform.firmware == Firmware::Uefi).then(|| match platform.secure_boot {
            true => UefiFiles { code: files.secure_code.clone(), variables: files.secure_variables.clone() },
            false => UefiFiles { code: files.code.clone(), variables: files.variables.clone() },
        });
        let machine = Machine {
            mapping,
            platform: &platform,
            cpus: config.cpus,
            memory_bytes: config.memory.0,
            nested: config.nested_virtualization,
            bridge: &config.bridge,
            kernel: None,
            uefi,
        };
        let mut forms = proto::MachineForms::default();
        match platform.hypervisor {
            Hypervisor::Xen => {
                forms.xl_config = xl::domain(&machine)?;
                forms.libvirt_domain = libvirt::domain(&machine)?;
            }
            Hypervisor::Kvm => {
                forms.qemu_command = qemu::command(&machine, Accelerator::Kvm)?;
                if platform.bus != Bus::Nvme {
                    forms.libvirt_domain = libvirt::domain(&machine)?;
                }
            }
            Hypervisor::None => {}
        }
        Ok(forms)
    }
}

//! QEMU: all arguments of `qemu-system-ARCH`, the program's name first, as a list for execve(2).
//!
//! Nothing comes from a configuration file or a default device: every device is written here. UEFI variables start empty each time; the disk is started from
//! its removable path, which needs none.

use std::path::Path;

use super::Machine;
use crate::{
    boot::platform::{Console, Firmware, Hypervisor},
    error::Result,
    mapping::{Bus, names::expressible, qemu},
};

/// Which accelerator runs the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The kernel's.
    Kvm,
    /// Emulation, for hosts without.
    Tcg,
}

/// Program and arguments. KVM platforms only: Xen's own tools start QEMU themselves.
pub fn command(machine: &Machine<'_>, accelerator: Accelerator) -> Result<Vec<String>> {
    machine.check()?;
    machine.virtual_only()?;
    if machine.platform.hypervisor == Hypervisor::Xen {
        return Err(machine.refuse("NOT_A_KVM_PLATFORM", "on Xen the toolstack starts QEMU: use the xl configuration"));
    }
    let arm = machine.platform.machine() == "aarch64";
    let mut command = vec![format!("qemu-system-{}", machine.platform.machine())];
    let mut add = |arguments: &[&str]| command.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        Accelerator::Tcg => ("tcg", "max"),
    };
    add(&["-name", &doubled(machine.name()), "-uuid", &machine.mapping.identity.instance_uuid]);
    let board = if arm { "virt" } else { "q35" };
    let smm = if machine.platform.secure_boot && !arm { ",smm=on" } else { "" };
    add(&["-machine", &format!("{board},accel={accel}{smm}"), "-cpu", cpu, "-smp", &machine.cpus.to_string()]);
    add(&["-m", &format!("{}M", machine.memory_mib()), "-no-user-config", "-nodefaults"]);
    firmware(machine, &mut add)?;
    for console in machine.platform.consoles() {
        match console {
            Console::Serial => add(&["-chardev", "stdio,id=serial0,signal=off", "-serial", "chardev:serial0"]),
            Console::Hypervisor => {
                add(&["-chardev", "stdio,id=hvc0,signal=off", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=hvc0"]);
            }
            Console::Vga => add(&["-device", if arm { "virtio-gpu-pci" } else { "VGA" }]),
        }
    }
    add(&["-display", "none"]);
    for (index, mac) in machine.macs().enumerate() {
        add(&["-netdev", &format!("bridge,id=net{index},br={}", doubled(machine.bridge))]);
        add(&["-device", &format!("virtio-net-pci,netdev=net{index},mac={mac}")]);
    }
    add(&["-device", "virtio-rng-pci"]);
    command.extend(qemu::arguments(machine.mapping, machine.bus())?);
    Ok(command)
}

fn firmware(machine: &Machine<'_>, add: &mut impl FnMut(&[&str])) -> Result<()> {
    match machine.platform.firmware {
        // SeaBIOS is QEMU's own.
        Firmware::Bios | Firmware::Loader => {}
        Firmware::Uefi => {
            let Some(files) = &machine.uefi else {
                return Err(
                    machine.refuse("UEFI_FIRMWARE_MISSING", "the platform needs UEFI firmware and the host has none that is known (Debian: ovmf)")
                );
            };
            let flash =
                |unit: u8, path: &Path, mode: &str| Ok(format!("if=pflash,unit={unit},format=raw,{mode},file={}", doubled(expressible(path)?)));
            add(&["-drive", &flash(0, &files.code, "readonly=on")?, "-drive", &flash(1, &files.variables, "snapshot=on")?]);
            if machine.platform.secure_boot && machine.bus() != Bus::Xen {
                add(&["-global", "driver=cfi.pflash01,property=secure,value=on"]);
            }
        }
        Firmware::Direct => {
            if let Some(kernel) = &machine.kernel {
                add(&["-kernel", expressible(&kernel.kernel)?, "-append", &kernel.cmdline]);
                if let Some(initrd) = &kernel.initrd {
                    add(&["-initrd", expressible(initrd)?]);
                }
            }
        }
    }
    Ok(())
}

/// QEMU's option lists end a value at a comma; a comma of the value itself is doubled.
fn doubled(text: &str) -> String {
    text.replace(',', ",,")
}

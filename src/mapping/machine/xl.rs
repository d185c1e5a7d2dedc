//! xl: a whole domain configuration (xl.cfg(5)).

use std::fmt::Write;

use super::{DirectKernel, Machine};
use crate::{
    boot::platform::{Console, Firmware, Hypervisor, Mode},
    error::Result,
    mapping::{
        names::expressible,
        xl::{disk_setting, quote},
    },
};

/// The configuration. Xen only.
pub fn domain(machine: &Machine<'_>) -> Result<String> {
    machine.check()?;
    let platform = machine.platform;
    if platform.hypervisor != Hypervisor::Xen {
        return Err(machine.refuse("NOT_A_XEN_PLATFORM", "an xl configuration is for a Xen platform"));
    }
    let mut text = String::new();
    let mut set = |name: &str, value: String| writeln!(text, "{name} = {value}").expect("writing to a string");
    set("name", quote(machine.name()));
    set("uuid", quote(&machine.mapping.identity.instance_uuid));
    let kind = match platform.mode {
        Mode::Pv => "pv",
        Mode::Pvh => "pvh",
        Mode::Hvm | Mode::Kvm | Mode::Metal => "hvm",
    };
    set("type", quote(kind));
    set("memory", machine.memory_mib().to_string());
    set("vcpus", machine.cpus.to_string());
    match platform.firmware {
        Firmware::Loader => set("bootloader", quote("pygrub")),
        Firmware::Uefi => set("firmware", quote("ovmf")),
        Firmware::Bios => set("firmware", quote("seabios")),
        Firmware::Direct => {
            if let Some(DirectKernel { kernel, initrd, cmdline }) = &machine.kernel {
                set("kernel", quote(expressible(kernel)?));
                if let Some(initrd) = initrd {
                    set("ramdisk", quote(expressible(initrd)?));
                }
                set("cmdline", quote(cmdline));
            }
        }
    }
    if machine.nested && platform.mode == Mode::Hvm {
        set("nestedhvm", "1".into());
    }
    if platform.mode == Mode::Hvm {
        for console in platform.consoles() {
            match console {
                Console::Serial => set("serial", quote("pty")),
                Console::Vga => set("vnc", "1".into()),
                Console::Hypervisor => {}
            }
        }
    }
    let vifs: Vec<String> = machine.macs().map(|mac| quote(&format!("mac={mac},bridge={}", machine.bridge))).collect();
    set("vif", format!("[ {} ]", vifs.join(", ")));
    set("on_poweroff", quote("destroy"));
    set("on_reboot", quote("restart"));
    set("on_crash", quote("restart"));
    text.push_str(&disk_setting(machine.mapping, machine.bus())?);
    Ok(text)
}

//! libvirt: a whole `<domain>` (<https://libvirt.org/formatdomain.html>).
//!
//! UEFI is asked for by feature (`firmware='efi'`, libvirt 5.2), so the host's own firmware and its variables file are libvirt's to find. Boot order is
//! per disk.

use std::fmt::Write;

use super::{DirectKernel, Machine};
use crate::{
    boot::platform::{Console, Firmware, Hypervisor, Mode},
    error::Result,
    mapping::{
        Bus,
        libvirt::{disks, escape},
        names::expressible,
    },
};

/// The domain.
pub fn domain(machine: &Machine<'_>) -> Result<String> {
    machine.check()?;
    machine.virtual_only()?;
    let disks = disks(machine.mapping, machine.bus())?;
    let mut xml = String::new();
    let mut line = |depth: usize, text: &str| writeln!(xml, "{:width$}{text}", "", width = depth * 2).expect("writing to a string");
    let kind = if machine.platform.hypervisor == Hypervisor::Xen { "xen" } else { "kvm" };
    line(0, &format!("<domain type='{kind}'>"));
    line(1, &format!("<name>{}</name>", escape(machine.name())));
    line(1, &format!("<uuid>{}</uuid>", escape(&machine.mapping.identity.instance_uuid)));
    line(1, &format!("<memory unit='MiB'>{}</memory>", machine.memory_mib()));
    line(1, &format!("<vcpu>{}</vcpu>", machine.cpus));
    for text in boot_elements(machine)? {
        line(1, &text);
    }
    if machine.is_pc() {
        line(1, "<features>");
        line(2, "<acpi/>");
        if machine.platform.machine() != "aarch64" {
            line(2, "<apic/>");
        }
        if machine.platform.secure_boot && machine.platform.machine() != "aarch64" {
            line(2, "<smm state='on'/>");
        }
        line(1, "</features>");
    }
    if machine.platform.mode == Mode::Kvm {
        // The whole host CPU carries the virtualisation extensions; the model that libvirt knows can be migrated.
        line(1, if machine.nested { "<cpu mode='host-passthrough'/>" } else { "<cpu mode='host-model'/>" });
    }
    line(1, "<clock offset='utc'/>");
    line(1, "<on_poweroff>destroy</on_poweroff>");
    line(1, "<on_reboot>restart</on_reboot>");
    line(1, "<on_crash>restart</on_crash>");
    line(1, "<devices>");
    for text in disks.lines() {
        line(2, text);
    }
    for text in device_elements(machine) {
        line(2, &text);
    }
    line(1, "</devices>");
    line(0, "</domain>");
    Ok(xml)
}

/// `<bootloader>` and `<os>`.
fn boot_elements(machine: &Machine<'_>) -> Result<Vec<String>> {
    let platform = machine.platform;
    let mut lines = Vec::new();
    if platform.firmware == Firmware::Loader {
        lines.push("<bootloader>pygrub</bootloader>".to_owned());
    }
    let arch = platform.machine();
    let (board, kind) = match platform.mode {
        Mode::Pv => ("xenpv", "linux"),
        Mode::Pvh => ("xenpvh", "xenpvh"),
        Mode::Hvm => ("xenfv", "hvm"),
        Mode::Kvm | Mode::Metal if arch == "aarch64" => ("virt", "hvm"),
        Mode::Kvm | Mode::Metal => ("q35", "hvm"),
    };
    lines.push(if platform.firmware == Firmware::Uefi { "<os firmware='efi'>".into() } else { "<os>".into() });
    lines.push(format!("  <type arch='{}' machine='{board}'>{kind}</type>", escape(arch)));
    if platform.firmware == Firmware::Uefi {
        let state = if platform.secure_boot { "yes" } else { "no" };
        lines.push("  <firmware>".into());
        lines.push(format!("    <feature enabled='{state}' name='secure-boot'/>"));
        lines.push("  </firmware>".into());
    }
    if let Some(DirectKernel { kernel, initrd, cmdline }) = machine.kernel.as_ref().filter(|_| platform.firmware == Firmware::Direct) {
        lines.push(format!("  <kernel>{}</kernel>", escape(expressible(kernel)?)));
        if let Some(initrd) = initrd {
            lines.push(format!("  <initrd>{}</initrd>", escape(expressible(initrd)?)));
        }
        lines.push(format!("  <cmdline>{}</cmdline>", escape(cmdline)));
    }
    lines.push("</os>".into());
    Ok(lines)
}

fn device_elements(machine: &Machine<'_>) -> Vec<String> {
    let xen = machine.platform.hypervisor == Hypervisor::Xen;
    let mut lines = Vec::new();
    if machine.bus() == Bus::Scsi && !xen {
        lines.push("<controller type='scsi' index='0' model='virtio-scsi'/>".to_owned());
    }
    for mac in machine.macs() {
        lines.push("<interface type='bridge'>".into());
        lines.push(format!("  <mac address='{mac}'/>"));
        lines.push(format!("  <source bridge='{}'/>", escape(machine.bridge)));
        if !xen {
            lines.push("  <model type='virtio'/>".into());
        }
        lines.push("</interface>".into());
    }
    for console in machine.platform.consoles() {
        match console {
            Console::Serial => {
                lines.push("<serial type='pty'><target port='0'/></serial>".into());
                lines.push("<console type='pty'><target type='serial' port='0'/></console>".into());
            }
            Console::Hypervisor => {
                let target = if xen { "xen" } else { "virtio" };
                lines.push(format!("<console type='pty'><target type='{target}' port='0'/></console>"));
            }
            Console::Vga => {
                lines.push("<graphics type='vnc' autoport='yes' listen='127.0.0.1'/>".into());
                lines.push("<video><model type='vga'/></video>".into());
            }
        }
    }
    if !xen {
        lines.push("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>".into());
    }
    lines
}

use super::{libvirt, qemu, qemu::Accelerator, xl, *};
use crate::{
    boot::platform::{Console, tests::platform},
    mapping::tests::mapping,
};

fn machine<'a>(mapping: &'a Mapping, platform: &'a Platform) -> Machine<'a> {
    Machine { mapping, platform, cpus: 2, memory_bytes: 1536 * MIB, nested: false, bridge: "br,0", kernel: None, uefi: None }
}

fn raw(mut mapping: Mapping) -> Mapping {
    mapping.devices.retain(|device| device.image_format() == "raw");
    mapping
}

fn kernel() -> DirectKernel {
    DirectKernel { kernel: "/srv/k & r/vmlinuz".into(), initrd: Some("/srv/initrd".into()), cmdline: "root=UUID=1 'quoted'".into() }
}

#[test]
fn a_domain_names_everything_that_starts_it() {
    let (mapping, platform) = (mapping(), platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Uefi, Bus::Virtio));
    let xml = libvirt::domain(&machine(&mapping, &platform)).expect("a domain");
    for part in ["<domain type='kvm'>", "<memory unit='MiB'>1536</memory>", "<os firmware='efi'>", "<source bridge='br,0'/>", "52:54:00:01:02:03"] {
        assert!(xml.contains(part), "{part} is not in {xml}");
    }
    let direct = Platform { firmware: Firmware::Direct, consoles: vec![Console::Hypervisor], ..platform };
    let mut machine = machine(&mapping, &direct);
    assert_eq!(libvirt::domain(&machine).expect_err("no kernel").reason(), "KERNEL_MISSING");
    machine.kernel = Some(kernel());
    let xml = libvirt::domain(&machine).expect("a domain");
    assert!(xml.contains("<kernel>/srv/k &amp; r/vmlinuz</kernel>") && xml.contains("&apos;quoted&apos;"), "{xml}");
}

#[test]
fn xen_modes_differ_in_how_they_start() {
    let mapping = mapping();
    let case = |mode, firmware, bus, kernel: Option<DirectKernel>, mapping: &Mapping| {
        let platform = platform(Hypervisor::Xen, mode, firmware, bus);
        xl::domain(&Machine { kernel, ..machine(mapping, &platform) }).map_err(|error| error.reason().to_owned())
    };
    let pvh = case(Mode::Pvh, Firmware::Direct, Bus::Xen, Some(kernel()), &mapping).expect("a configuration");
    for part in ["type = 'pvh'", "kernel = '/srv/k & r/vmlinuz'", "ramdisk = '/srv/initrd'", "cmdline = 'root=UUID=1 \\'quoted\\''", "memory = 1536"]
    {
        assert!(pvh.contains(part), "{part} is not in {pvh}");
    }
    assert_eq!(case(Mode::Pv, Firmware::Loader, Bus::Xen, None, &mapping), Err("LOADER_READS_RAW_ONLY".into()));
    let pv = case(Mode::Pv, Firmware::Loader, Bus::Xen, None, &raw(mapping.clone())).expect("a configuration");
    assert!(pv.contains("bootloader = 'pygrub'") && !pv.contains("kernel ="), "{pv}");
    let hvm = case(Mode::Hvm, Firmware::Uefi, Bus::Scsi, None, &mapping).expect("a configuration");
    assert!(hvm.contains("firmware = 'ovmf'") && hvm.contains("serial = 'pty'"), "{hvm}");
    let contradiction = case(Mode::Pvh, Firmware::Bios, Bus::Xen, None, &mapping);
    assert_eq!(contradiction, Err("PLATFORM_CONTRADICTION".into()));
    let kvm = platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Bios, Bus::Virtio);
    assert_eq!(xl::domain(&machine(&mapping, &kvm)).expect_err("not Xen").reason(), "NOT_A_XEN_PLATFORM");
}

#[test]
fn qemu_gets_a_list_of_words_and_doubled_commas() {
    let (mapping, platform) = (mapping(), platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Uefi, Bus::Virtio));
    let mut machine = machine(&mapping, &platform);
    assert_eq!(qemu::command(&machine, Accelerator::Kvm).expect_err("no firmware").reason(), "UEFI_FIRMWARE_MISSING");
    machine.uefi = Some(UefiFiles { code: "/fw/a,b.fd".into(), variables: "/fw/vars.fd".into() });
    let command = qemu::command(&machine, Accelerator::Kvm).expect("arguments");
    assert_eq!(command[0], "qemu-system-x86_64");
    for word in
        ["if=pflash,unit=0,format=raw,readonly=on,file=/fw/a,,b.fd", "bridge,id=net0,br=br,,0", "virtio-net-pci,netdev=net0,mac=52:54:00:01:02:03"]
    {
        assert!(command.iter().any(|given| given == word), "{word} is not in {command:?}");
    }
    let metal = crate::boot::platform::tests::platform(Hypervisor::None, Mode::Metal, Firmware::Uefi, Bus::Nvme);
    let metal = Machine { platform: &metal, ..machine };
    assert_eq!(qemu::command(&metal, Accelerator::Kvm).expect_err("nothing to start").reason(), "NO_HYPERVISOR");
}

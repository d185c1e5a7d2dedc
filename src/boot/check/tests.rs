use super::*;
use crate::boot::{
    inspect::kernel,
    kernels::{Kernel, tests::facts},
    platform::{Hypervisor, tests::platform},
};

/// A disk of a current distribution, built where GRUB is.
fn disk() -> (DiskBoot, Inspection) {
    let drivers = ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "xen_blkfront", "nvme"].map(|name| (name.to_owned(), Availability::Initrd));
    let mut inspection = Inspection { drivers: drivers.into(), ..Inspection::default() };
    inspection.drivers.insert("ext4".into(), Availability::Builtin);
    let mut facts = kernel::read(&kernel::tests::bz_image(&kernel::tests::pvh_elf())).expect("a kernel");
    facts.packing = Some(Packing::Zstd);
    facts.signed = true;
    inspection.kernel = Some(facts);
    (boot(), inspection)
}

fn boot() -> DiskBoot {
    DiskBoot {
        kernels: vec![Kernel {
            version: "6.1".into(),
            kernel: "/boot/vmlinuz-6.1".into(),
            initrd: Some("/boot/initrd.img-6.1".into()),
            kernel_len: 1,
        }],
        bios: true,
        efi: Some(EfiProgram::HostGrub),
        reads_checksum_seed: Some(true),
        ..DiskBoot::default()
    }
}

/// A question that tests change; what is borrowed lives in it.
struct Case {
    built: bool,
    boot: DiskBoot,
    inspection: Option<Inspection>,
    facts: GuestFacts,
    entry_points: EntryPoints,
    arch: &'static str,
    layout: Layout,
    filesystem: FsKind,
    profile: Profile,
    platform: Platform,
    xen_version: Option<(u16, u16)>,
    supplied: Vec<SuppliedKernel>,
}

fn case(hypervisor: Hypervisor, mode: Mode, firmware: Firmware, bus: Bus) -> Case {
    let layout = if matches!(firmware, Firmware::Bios | Firmware::Uefi) { Layout::Gpt } else { Layout::Bare };
    let profile = if firmware == Firmware::Loader { Profile::Compat } else { Profile::Modern };
    let (boot, inspection) = disk();
    Case {
        built: true,
        boot,
        inspection: Some(inspection),
        facts: facts(&[("/lib/modules/6.1.0/modules.dep", "")], &[]),
        entry_points: EntryPoints::default(),
        arch: "amd64",
        layout,
        filesystem: FsKind::Ext4,
        profile,
        platform: platform(hypervisor, mode, firmware, bus),
        xen_version: Some((4, 17)),
        supplied: Vec::new(),
    }
}

fn kvm(firmware: Firmware) -> Case {
    case(Hypervisor::Kvm, Mode::Kvm, firmware, Bus::Virtio)
}

fn xen(mode: Mode, firmware: Firmware) -> Case {
    case(Hypervisor::Xen, mode, firmware, Bus::Xen)
}

impl Case {
    fn answer(&self) -> Result<BootPlan, Refusals> {
        let built = Built { boot: &self.boot, facts: &self.facts, inspection: self.inspection.as_ref() };
        check(&Question {
            built: self.built.then_some(built),
            entry_points: &self.entry_points,
            names_kernel: false,
            arch: self.arch,
            layout: self.layout,
            filesystem: self.filesystem,
            profile: self.profile,
            platform: &self.platform,
            xen_version: self.xen_version,
            supplied: &self.supplied,
        })
    }

    #[track_caller]
    fn starts(&self) -> BootPlan {
        self.answer().unwrap_or_else(|refusal| panic!("{refusal:?}"))
    }

    #[track_caller]
    fn refused(&self, reason: &str) {
        self.refused_for(&[reason]);
    }

    #[track_caller]
    fn refused_for(&self, reasons: &[&str]) {
        let refusals = self.answer().expect_err("a refusal");
        let given: Vec<&str> = refusals.0.iter().map(|refusal| refusal.reason).collect();
        assert_eq!(given, reasons, "{refusals:?}");
        let error = refusals.into_error("small", "platform");
        assert_eq!((error.kind(), error.reason(), error.violations().len()), (Kind::Unsupported, reasons[0], reasons.len()));
        assert!(reasons.iter().all(|reason| error.message().contains(reason)), "{}", error.message());
    }

    fn kernel(&mut self) -> &mut kernel::KernelFacts {
        self.inspection.as_mut().and_then(|inspection| inspection.kernel.as_mut()).expect("a kernel")
    }

    fn drivers(&mut self) -> &mut std::collections::BTreeMap<String, Availability> {
        &mut self.inspection.as_mut().expect("an inspection").drivers
    }
}

#[test]
fn one_disk_starts_on_every_platform_without_doubts() {
    for case in [
        kvm(Firmware::Bios),
        kvm(Firmware::Uefi),
        kvm(Firmware::Direct),
        xen(Mode::Pv, Firmware::Loader),
        xen(Mode::Pv, Firmware::Direct),
        xen(Mode::Pvh, Firmware::Direct),
        xen(Mode::Hvm, Firmware::Bios),
        xen(Mode::Hvm, Firmware::Uefi),
        case(Hypervisor::None, Mode::Metal, Firmware::Uefi, Bus::Nvme),
        case(Hypervisor::None, Mode::Metal, Firmware::Bios, Bus::Scsi),
    ] {
        let plan = case.starts();
        assert_eq!(plan.notes, Vec::<String>::new(), "{:?}", case.platform);
        assert_eq!(plan.efi.is_some(), case.platform.firmware == Firmware::Uefi);
        assert!(matches!(plan.kernel, KernelSource::Image { .. }));
    }
}

#[test]
fn what_is_not_known_is_planned_with_a_note() {
    let mut case = xen(Mode::Pvh, Firmware::Direct);
    case.xen_version = None;
    case.kernel().xen_pv = None;
    case.kernel().pvh_entry = None;
    case.drivers().clear();
    assert_eq!(case.starts().notes.len(), 4);
    case.inspection = None;
    assert_eq!(case.starts().notes.len(), 1);
}

#[test]
fn parts_that_do_not_go_together_are_refused_first() {
    let mut case = kvm(Firmware::Bios);
    case.platform.bus = Bus::Xen;
    case.refused("PLATFORM_CONTRADICTION");
}

#[test]
fn another_architecture_is_refused_and_i686_runs_on_x86_64() {
    let mut case = kvm(Firmware::Bios);
    case.arch = "arm64";
    case.refused("ARCH_DIFFERS");
    case.arch = "i386";
    case.starts();
    case.arch = "amd64";
    case.kernel().machine = Some("aarch64".into());
    case.refused("ARCH_DIFFERS");
    let mut case = kvm(Firmware::Uefi);
    case.arch = "i386";
    case.refused("ARCH_DIFFERS");
}

#[test]
fn firmware_needs_a_partition_table() {
    for firmware in [Firmware::Bios, Firmware::Uefi] {
        let mut case = kvm(firmware);
        case.layout = Layout::Bare;
        case.refused("LAYOUT_FIRMWARE");
    }
    let mut case = kvm(Firmware::Direct);
    case.layout = Layout::Gpt;
    case.starts();
}

fn needs(version: &str) -> KernelSpec {
    KernelSpec { os: Some("linux".into()), version: Some(version.into()), flavor: None }
}

fn supplied(offers: KernelSpec) -> SuppliedKernel {
    let (_, inspection) = disk();
    let files = SuppliedFiles { kernel: "/srv/vmlinuz".into(), kernel_digest: crate::names::Digest::of(b"k"), initrd: None, inspection };
    SuppliedKernel { name: "provider".into(), offers, modules: Modules::None, cmdline: String::new(), files: Ok(files) }
}

fn init_only(firmware: Firmware) -> Case {
    let mut case = kvm(firmware);
    case.inspection = None;
    case.boot.kernels.clear();
    case.entry_points.init = Some(needs("2.6.32"));
    case
}

#[test]
fn an_image_with_an_init_only_needs_a_kernel_that_fits() {
    for built in [true, false] {
        let mut case = init_only(Firmware::Direct);
        case.built = built;
        case.refused("KERNEL_NEEDED");
        for (version, fits) in [("2.6.32", true), ("2.6.32-5", true), ("2.6.32.9", true), ("2.6.321", false), ("2.6.3", false)] {
            case.supplied = vec![supplied(needs(version))];
            match fits {
                true => assert_eq!(case.starts().kernel, KernelSource::Supplied { name: "provider".into() }),
                false => case.refused("KERNEL_UNSUITABLE"),
            }
        }
        case.entry_points.init = Some(KernelSpec { flavor: Some("xen-686".into()), ..needs("2.6.3") });
        case.refused("KERNEL_UNSUITABLE");
        // The first one that fits is taken.
        case.supplied.push(SuppliedKernel { name: "second".into(), ..supplied(case.entry_points.init.clone().expect("a requirement")) });
        assert_eq!(case.starts().kernel, KernelSource::Supplied { name: "second".into() });
        // Firmware reads the disk: a supplied kernel is of no use.
        case.platform = kvm(Firmware::Bios).platform;
        case.layout = Layout::Gpt;
        case.refused("KERNEL_NEEDED");
    }
}

#[test]
fn a_supplied_kernel_has_to_be_readable_and_to_find_its_modules() {
    let mut case = init_only(Firmware::Direct);
    case.supplied = vec![SuppliedKernel { modules: Modules::Image, ..supplied(needs("2.6.32")) }];
    case.starts();
    case.facts = facts(&[("/lib/modules/6.1.1/modules.dep", "")], &[]);
    case.refused("KERNEL_MODULES");
    case.supplied[0].files = Err("has the digest x, configured is y".into());
    case.refused("KERNEL_UNUSABLE");
    // It is judged as the image's own would be.
    let mut case = xen(Mode::Pvh, Firmware::Direct);
    case.boot.kernels.clear();
    case.supplied = vec![supplied(KernelSpec::default())];
    case.starts();
    let files = case.supplied[0].files.as_mut().expect("files");
    files.inspection.kernel.as_mut().expect("a kernel").pvh_entry = None;
    case.refused("PVH_ENTRY_MISSING");
}

#[test]
fn before_the_golden_is_built_what_is_known_is_refused_and_the_rest_left_open() {
    let mut case = kvm(Firmware::Uefi);
    case.built = false;
    case.boot = DiskBoot::default();
    case.platform.secure_boot = true;
    assert_eq!(case.starts().kernel, KernelSource::Unknown);
    case.layout = Layout::Bare;
    case.arch = "riscv64";
    case.refused_for(&["ARCH_DIFFERS", "LAYOUT_FIRMWARE"]);
    let mut loader = xen(Mode::Pv, Firmware::Loader);
    loader.built = false;
    loader.profile = Profile::Modern;
    loader.refused("FS_PROFILE");
}

#[test]
fn every_reason_is_given_at_once() {
    let mut case = kvm(Firmware::Uefi);
    case.platform.secure_boot = true;
    case.boot.reads_checksum_seed = Some(false);
    case.kernel().signed = false;
    case.drivers().insert("virtio_pci".into(), Availability::Absent);
    case.drivers().insert("ext4".into(), Availability::RootOnly);
    case.refused_for(&["SECURE_BOOT", "FS_PROFILE", "SECURE_BOOT", "DRIVER_MISSING", "DRIVER_MISSING"]);
}

#[test]
fn a_kernel_is_taken_out_of_every_filesystem_and_grub_has_to_read_its_root() {
    let mut case = kvm(Firmware::Direct);
    case.filesystem = FsKind::Xfs;
    case.drivers().insert("xfs".into(), Availability::RootOnly);
    case.refused("DRIVER_MISSING");
    case.drivers().insert("xfs".into(), Availability::Builtin);
    case.starts();
    case.boot.unreadable = Some("this host's GRUB does not read xfs".into());
    case.starts();
    case.layout = Layout::Gpt;
    for firmware in [Firmware::Bios, Firmware::Uefi] {
        case.platform.firmware = firmware;
        case.refused("FS_PROFILE");
    }
    // The image's own is believed.
    case.boot.efi = Some(EfiProgram::ImageShim { vendor: "debian".into() });
    case.starts();
}

#[test]
fn a_unified_kernel_starts_by_uefi_only() {
    let mut case = kvm(Firmware::Uefi);
    case.boot.kernels.clear();
    case.inspection = None;
    case.boot.efi = Some(EfiProgram::ImageUki { uki: "a.efi".into() });
    let plan = case.starts();
    assert_eq!((plan.kernel, plan.notes.len()), (KernelSource::Unified, 0));
    case.platform.firmware = Firmware::Bios;
    case.refused("KERNEL_NEEDED");
}

#[test]
fn a_disk_without_a_loader_for_the_firmware_is_refused() {
    let mut case = kvm(Firmware::Bios);
    case.boot.bios = false;
    case.refused("NO_BOOT_LOADER");
    case.platform.firmware = Firmware::Uefi;
    case.starts();
    case.boot.efi = None;
    case.refused("NO_BOOT_LOADER");
}

#[test]
fn secure_boot_needs_signed_programs_and_a_signed_kernel() {
    let mut case = kvm(Firmware::Uefi);
    case.platform.secure_boot = true;
    case.refused("SECURE_BOOT");
    case.boot.efi = Some(EfiProgram::ImageShim { vendor: "debian".into() });
    case.starts();
    case.kernel().signed = false;
    case.refused("SECURE_BOOT");
    case.kernel().signed = true;
    for efi in [EfiProgram::ImageBootEntries { token: "debian".into() }, EfiProgram::ImageShim { vendor: "x".into() }] {
        case.boot.efi = Some(efi);
        case.boot.efi_signed = Some(true);
        case.starts();
        case.boot.efi_signed = Some(false);
        case.refused("SECURE_BOOT");
    }
}

#[test]
fn a_loader_has_to_read_the_filesystem() {
    let mut case = xen(Mode::Pv, Firmware::Loader);
    for profile in [Profile::Modern, Profile::Grub206] {
        case.profile = profile;
        case.refused("FS_PROFILE");
    }
    case.profile = Profile::Compat;
    case.filesystem = FsKind::Btrfs;
    case.drivers().insert("btrfs".into(), Availability::Builtin);
    case.refused("FS_PROFILE");
    let mut case = kvm(Firmware::Bios);
    case.boot.reads_checksum_seed = Some(false);
    case.refused("FS_PROFILE");
    case.profile = Profile::Grub206;
    case.starts();
}

#[test]
fn zstd_needs_a_xen_that_knows_it() {
    for mode in [Mode::Pv, Mode::Pvh] {
        let mut case = xen(mode, Firmware::Direct);
        case.xen_version = Some((4, 14));
        case.refused("KERNEL_COMPRESSION");
        case.kernel().packing = Some(Packing::Xz);
        case.starts();
    }
    let mut case = xen(Mode::Hvm, Firmware::Bios);
    case.xen_version = Some((4, 11));
    case.starts();
}

#[test]
fn xens_modes_need_their_entries() {
    let mut case = xen(Mode::Pvh, Firmware::Direct);
    case.kernel().pvh_entry = None;
    case.refused("PVH_ENTRY_MISSING");
    let mut case = xen(Mode::Pv, Firmware::Direct);
    case.kernel().xen_pv = Some(false);
    case.refused("PV_ENTRY_MISSING");
}

#[test]
fn the_roots_drivers_have_to_be_in_kernel_or_initrd() {
    for (mut case, driver) in [
        (kvm(Firmware::Bios), "virtio_blk"),
        (xen(Mode::Pv, Firmware::Direct), "xen_blkfront"),
        (case(Hypervisor::Kvm, Mode::Kvm, Firmware::Bios, Bus::Scsi), "virtio_scsi"),
        (case(Hypervisor::None, Mode::Metal, Firmware::Bios, Bus::Nvme), "nvme"),
        (kvm(Firmware::Direct), "ext4"),
    ] {
        case.drivers().insert("ext4".into(), Availability::Builtin);
        for missing in [Availability::RootOnly, Availability::Absent] {
            case.drivers().insert(driver.into(), missing);
            case.refused("DRIVER_MISSING");
        }
    }
}

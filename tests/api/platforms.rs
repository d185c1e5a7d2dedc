//! Platforms: what they decide about a render, what is refused and with which reasons, and the kernels that the host loads.

use std::{os::unix::fs::MetadataExt, path::Path};

use cloudletd::{
    config::Config,
    names::Digest,
    proto::{self, VolumeFormat},
    units::{Bytes, MIB},
};
use tonic_types::StatusExt;

use crate::common::server::{Daemon, spec, tarball, volume};

const PLATFORMS: &str = r#"
    [[platform]]
    name = "m1.small"
    hypervisor = "kvm"
    memory = "2 GiB"
    cpus = 2
    bridge = "lan0"
    [[platform]]
    name = "x1.pv"
    hypervisor = "xen"
    mode = "pv"
    memory = "512 MiB"
    region = "eu-1"
    [[platform]]
    name = "x1.pvh"
    hypervisor = "xen"
    mode = "pvh"
    memory = "512 MiB"
    [[platform]]
    name = "micro"
    hypervisor = "kvm"
    firmware = "direct"
    consoles = ["serial"]
    memory = "256 MiB"
    [[platform]]
    name = "arm"
    hypervisor = "kvm"
    firmware = "uefi"
    arch = "aarch64"
    memory = "1 GiB"
"#;

/// A kernel as an ELF file with the notes that Xen's PVH (18) and PV (1) modes look for.
fn vmlinux() -> Vec<u8> {
    let note = |kind: u32, value: u64| {
        let mut note = [4_u32, 8, kind].map(u32::to_le_bytes).concat();
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&value.to_le_bytes());
        note
    };
    let notes = [note(18, 0x100_0000), note(1, 0xffff_ffff_8100_0000)].concat();
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend_from_slice(&[2_u16, 62].map(u16::to_le_bytes).concat());
    elf.extend_from_slice(&1_u32.to_le_bytes());
    elf.extend_from_slice(&[0_u64, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend_from_slice(&0_u32.to_le_bytes());
    elf.extend_from_slice(&[64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend_from_slice(&[4_u32, 4].map(u32::to_le_bytes).concat());
    let len = notes.len() as u64;
    elf.extend_from_slice(&[120_u64, 0, 0, len, len, 4].map(u64::to_le_bytes).concat());
    elf.extend_from_slice(&notes);
    elf
}

/// The small tree with a kernel and an empty initrd in `/boot`.
fn bootable() -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for entry in tar::Archive::new(&tarball()[..]).entries().expect("entries") {
        let entry = entry.expect("an entry");
        let header = entry.header().clone();
        archive.append(&header, entry).expect("appended");
    }
    let kernel = vmlinux();
    for (path, content) in [("boot/vmlinuz-6.1.0-test", &kernel[..]), ("boot/initrd.img-6.1.0-test", b"")] {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, path, content).expect("appended");
    }
    archive.into_inner().expect("a tarball")
}

async fn daemon(kernels: &str) -> Daemon {
    let config = Config::parse(&format!("{PLATFORMS}\n{kernels}")).expect("a configuration");
    Daemon::start_with(|own| {
        (own.platforms, own.kernels) = (config.platforms, config.kernels);
        // Room for what a partition table needs besides.
        own.golden.size = Bytes(128 * MIB);
    })
    .await
}

/// An image that says it brings a kernel, of this tarball.
async fn image_with_kernel(daemon: &mut Daemon, tarball: &[u8]) -> String {
    let digest = daemon.upload(tarball).await;
    let manifest = r#"{"name": "small", "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}}}"#;
    let request = proto::CreateImageRequest { manifest_json: manifest.into(), rootfs_digest: digest, ..Default::default() };
    daemon.images.create_image(request).await.expect("created").into_inner().image.expect("an image").id
}

fn on(image: &str, name: &str, platforms: &[&str]) -> proto::RenderSpec {
    proto::RenderSpec { platforms: platforms.iter().map(ToString::to_string).collect(), ..spec(image, name, VolumeFormat::Raw) }
}

fn mapping_on(name: &str, platform: &str) -> proto::GetMappingRequest {
    proto::GetMappingRequest { volume: Some(volume(name)), platform: platform.into(), ..Default::default() }
}

/// The reasons that a refusal gives.
#[track_caller]
fn reasons(status: &tonic::Status) -> Vec<String> {
    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status:?}");
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    violations.iter().map(|violation| violation.description.split(':').next().unwrap_or_default().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_on_a_platform_has_whole_machines_or_every_reason_why_not() {
    let mut daemon = daemon("").await;
    let listed = daemon.hosts.list_platforms(proto::ListPlatformsRequest {}).await.expect("a list").into_inner().platforms;
    let shown: Vec<(&str, &str, &str, &str)> =
        listed.iter().map(|one| (one.name.as_str(), one.mode.as_str(), one.firmware.as_str(), one.bus.as_str())).collect();
    let expected = [
        ("arm", "kvm", "uefi", "virtio"),
        ("m1.small", "kvm", "bios", "virtio"),
        ("micro", "kvm", "direct", "virtio"),
        ("x1.pv", "pv", "loader", "xen"),
        ("x1.pvh", "pvh", "direct", "xen"),
    ];
    assert_eq!(shown, expected);
    let image = image_with_kernel(&mut daemon, &bootable()).await;
    daemon.render("key", spec(&image, "web1", VolumeFormat::Raw)).await;
    let micro = daemon.volumes.get_mapping(mapping_on("web1", "micro")).await.expect("a mapping").into_inner();
    let machine = micro.machine.expect("a machine");
    assert!(machine.libvirt_domain.contains("<memory unit='MiB'>256</memory>") && machine.libvirt_domain.contains("52:54:00:00:00:01"));
    assert!(machine.qemu_command.iter().any(|word| word == "-kernel") && machine.xl_config.is_empty(), "{machine:?}");
    let bios = daemon.volumes.get_mapping(mapping_on("web1", "m1.small")).await.expect_err("a bare disk");
    assert_eq!(reasons(&bios), ["LAYOUT_FIRMWARE"]);
    let arm = daemon.volumes.get_mapping(mapping_on("web1", "arm")).await.expect_err("another architecture");
    assert_eq!(reasons(&arm), ["ARCH_DIFFERS", "LAYOUT_FIRMWARE", "ARCH_DIFFERS"], "{arm:?}");
    let pv = daemon.volumes.get_mapping(mapping_on("web1", "x1.pv")).await.expect_err("pygrub can't read it");
    assert_eq!(reasons(&pv), ["FS_PROFILE"]);
    let unknown = daemon.volumes.get_mapping(mapping_on("web1", "m2.huge")).await.expect_err("not configured");
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_is_taken_out_once_and_stays_as_long_as_an_instance_needs_it() {
    let mut daemon = daemon("").await;
    let image = image_with_kernel(&mut daemon, &bootable()).await;
    daemon.render("key", on(&image, "web1", &["x1.pvh", "micro"])).await;
    let asked = futures_util::future::join_all((0..16).map(|index| {
        let mut volumes = daemon.volumes.clone();
        async move { volumes.get_mapping(mapping_on("web1", ["x1.pvh", "micro"][index % 2])).await.expect("a mapping").into_inner() }
    }));
    let answers = asked.await;
    let kernels: Vec<proto::LoadedKernel> =
        answers.iter().map(|answer| answer.machine.clone().expect("a machine").kernel.expect("a kernel")).collect();
    let first = &kernels[0];
    assert_eq!(std::fs::read(&first.kernel).expect("readable"), vmlinux());
    assert_eq!(first.kernel_digest, Digest::of(&vmlinux()).to_string());
    assert_eq!(first.initrd_digest, Digest::of(b"").to_string());
    let uuid = &answers[0].mapping.as_ref().expect("a mapping").devices[0].filesystem.as_ref().expect("a filesystem").uuid;
    assert_eq!(first.cmdline, format!("root=UUID={uuid} ro console=hvc0"));
    assert_eq!(kernels[1].cmdline, format!("root=UUID={uuid} ro console=ttyS0,115200"));
    assert!(kernels.iter().all(|kernel| kernel.kernel == first.kernel && kernel.supplied_name.is_empty()));
    let xl = &answers[0].machine.as_ref().expect("a machine").xl_config;
    assert!(xl.contains(&format!("kernel = '{}'", first.kernel)) && xl.contains("type = 'pvh'") && xl.contains(&first.cmdline), "{xl}");
    // Asked for again by a daemon that knows nothing: not made again.
    let inode = |path: &str| std::fs::metadata(path).expect("there").ino();
    let made = (inode(&first.kernel), inode(&first.initrd));
    let again = daemon.volumes.get_mapping(mapping_on("web1", "micro")).await.expect("a mapping").into_inner();
    let again = again.machine.expect("a machine").kernel.expect("a kernel");
    assert_eq!((inode(&again.kernel), inode(&again.initrd)), made);
    // The raw volume needs no golden, its kernel does.
    let golden = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens.remove(0);
    let delete = proto::DeleteGoldenRequest { golden_key: golden.key };
    let refused = daemon.renders.delete_golden(delete.clone()).await.expect_err("needed");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    daemon.volumes.delete_volume(proto::DeleteVolumeRequest { volume: Some(volume("web1")), ..Default::default() }).await.expect("deleted");
    daemon.renders.delete_golden(delete).await.expect("nobody needs it");
    assert!(!Path::new(&first.kernel).exists());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_golden_that_is_gone_has_no_kernel_and_says_so() {
    let mut daemon = daemon("").await;
    let image = image_with_kernel(&mut daemon, &bootable()).await;
    // Not rendered for the platform: nothing keeps the golden.
    daemon.render("key", spec(&image, "web1", VolumeFormat::Raw)).await;
    let machine = daemon.volumes.get_mapping(mapping_on("web1", "micro")).await.expect("a mapping").into_inner().machine.expect("a machine");
    assert!(machine.notes.iter().any(|note| note.contains("name the platform in the render")), "{:?}", machine.notes);
    let golden = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens.remove(0);
    daemon.renders.delete_golden(proto::DeleteGoldenRequest { golden_key: golden.key }).await.expect("deleted");
    let gone = daemon.volumes.get_mapping(mapping_on("web1", "micro")).await.expect_err("no kernel");
    assert_eq!(gone.get_error_details().error_info().map(|info| info.reason.clone()).as_deref(), Some("GOLDEN_NOT_FOUND"), "{gone:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_to_fail_is_refused_before_anything_is_built() {
    let mut daemon = daemon("").await;
    let image = daemon.image().await;
    let needs = daemon.start_render("a", on(&image, "web1", &["x1.pvh"])).await.expect_err("no kernel");
    assert_eq!(reasons(&needs), ["KERNEL_NEEDED"]);
    let firmware = daemon.start_render("b", on(&image, "web1", &["m1.small"])).await.expect_err("no kernel");
    assert_eq!(reasons(&firmware), ["KERNEL_NEEDED"]);
    let mut bare = on(&image, "web1", &["m1.small"]);
    bare.golden = Some(proto::GoldenOptions { layout: proto::DiskLayout::Bare as i32, ..Default::default() });
    let bare = daemon.start_render("c", bare).await.expect_err("a bare disk");
    assert_eq!(reasons(&bare), ["LAYOUT_FIRMWARE", "KERNEL_NEEDED"]);
    let unknown = daemon.start_render("d", on(&image, "web1", &["m2.huge"])).await.expect_err("not configured");
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
    assert!(goldens.is_empty(), "{goldens:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_the_golden_shows_is_refused_before_a_volume_is_made() {
    let mut daemon = daemon("").await;
    // The manifest promises a kernel that is not there.
    let image = image_with_kernel(&mut daemon, &tarball()).await;
    let id = daemon.start_render("key", on(&image, "web1", &["micro"])).await.expect("accepted").render.expect("a render").id;
    let render = daemon.wait(&id).await;
    assert_eq!(render.error.map(|error| error.reason).as_deref(), Some("KERNEL_NEEDED"));
    assert!(!daemon.dir.join("pool/web1.raw").exists());
    let listed = daemon.volumes.list_volumes(proto::ListVolumesRequest::default()).await.expect("a list").into_inner().volumes;
    assert!(listed.is_empty());
    // Planning says the same now that the golden is there.
    let plan = proto::PlanRenderRequest { spec: Some(on(&image, "web1", &["micro"])) };
    assert_eq!(reasons(&daemon.renders.plan_render(plan).await.expect_err("refused")), ["KERNEL_NEEDED"]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_an_init_only_starts_with_the_providers_kernel() {
    let files = tempfile::tempdir().expect("a directory");
    let path = files.path().join("vmlinux");
    std::fs::write(&path, vmlinux()).expect("written");
    let digest = Digest::of(&vmlinux());
    let kernels = format!(
        "[[kernel]]\nname = 'old'\nkernel = '/nowhere'\nversion = '2.4'\nos = 'bsd'\n\
         [[kernel]]\nname = 'provider'\nkernel = {path:?}\ndigest = '{digest}'\nversion = '6.1'\ncmdline = 'quiet'\n"
    );
    let mut daemon = daemon(&kernels).await;
    let digest_of = daemon.upload(&tarball()).await;
    let image = |init: &str| proto::CreateImageRequest {
        manifest_json: format!(
            r#"{{"name": "small", "arch": "x86_64", "entry_points": {{"init": {{"kernel": {init}}}}}, "boot": {{"cmdline": "init=/sbin/init"}}}}"#
        ),
        rootfs_digest: digest_of.clone(),
        ..Default::default()
    };
    let fits =
        daemon.images.create_image(image(r#"{"os": "linux", "version": "6"}"#)).await.expect("created").into_inner().image.expect("an image").id;
    let other =
        daemon.images.create_image(image(r#"{"os": "linux", "version": "5.10"}"#)).await.expect("created").into_inner().image.expect("an image").id;
    let unsuitable = daemon.start_render("a", on(&other, "web2", &["x1.pvh"])).await.expect_err("another version");
    assert_eq!(reasons(&unsuitable), ["KERNEL_UNSUITABLE"]);
    daemon.render("b", on(&fits, "web1", &["x1.pvh"])).await;
    let answer = daemon.volumes.get_mapping(mapping_on("web1", "x1.pvh")).await.expect("a mapping").into_inner();
    assert_eq!(answer.mapping.expect("a mapping").platforms, ["x1.pvh"]);
    let kernel = answer.machine.expect("a machine").kernel.expect("a kernel");
    assert_eq!((kernel.supplied_name.as_str(), kernel.kernel.as_str()), ("provider", path.to_str().expect("text")));
    assert_eq!(kernel.kernel_digest, digest.to_string());
    // No initrd: the kernel finds its root by name.
    assert_eq!(kernel.cmdline, "root=/dev/xvda ro console=hvc0 quiet init=/sbin/init");
    // The file is not what was configured any more.
    std::fs::write(&path, b"something else").expect("written");
    let changed = daemon.volumes.get_mapping(mapping_on("web1", "x1.pvh")).await.expect_err("another file");
    assert_eq!(reasons(&changed), ["KERNEL_UNUSABLE"]);
    daemon.stop().await;
}

/// Further platforms, so that every firmware, mode and reason that small images can have is among them.
const MORE_PLATFORMS: &str = r#"
    [[platform]]
    name = "uefi"
    hypervisor = "kvm"
    firmware = "uefi"
    memory = "1 GiB"
    [[platform]]
    name = "secure"
    hypervisor = "kvm"
    firmware = "uefi"
    secure_boot = true
    memory = "1 GiB"
    [[platform]]
    name = "x1.hvm"
    hypervisor = "xen"
    memory = "1 GiB"
    [[platform]]
    name = "metal"
    hypervisor = "none"
    bus = "scsi"
    memory = "4 GiB"
"#;

/// Manifests that differ in what decides where an image starts.
fn manifests() -> Vec<serde_json::Value> {
    use serde_json::json;
    let kernel = json!({"kernel": {"os": "linux"}});
    vec![
        json!({"name": "kernel", "arch": "x86_64", "entry_points": kernel}),
        json!({"name": "nothing-said", "arch": "amd64"}),
        json!({"name": "arm", "arch": "arm64", "entry_points": kernel}),
        json!({"name": "old", "arch": "i386", "entry_points": kernel}),
        json!({"name": "init", "arch": "x86_64", "entry_points": {"init": {"kernel": {"os": "linux"}}}}),
        json!({"name": "init-other", "arch": "x86_64", "entry_points": {"init": {"kernel": {"os": "linux", "version": "2.6.18"}}}}),
        json!({"name": "chroot", "arch": "x86_64", "entry_points": {"chroot": {"command": "/bin/sh"}}}),
        json!({"name": "bare", "arch": "x86_64", "entry_points": kernel, "disk": {"layout": "bare"}}),
        json!({"name": "modern", "arch": "x86_64", "entry_points": kernel, "filesystem": {"type": "ext4", "profile": "modern"}}),
        json!({"name": "named", "arch": "x86_64", "entry_points": {"init": {}}, "boot": {"kernel": "/boot/vmlinuz-6.1.0-test"}}),
        json!({"name": "tiny", "arch": "x86_64", "entry_points": kernel, "disk": {"size": "32 MiB", "layout": "gpt"}}),
    ]
}

async fn matched(daemon: &mut Daemon, image: &str, platform: &str) -> Result<(), Vec<String>> {
    let request = proto::MatchRequest { image: image.into(), platforms: vec![platform.into()], ..Default::default() };
    let found = daemon.catalogue.r#match(request).await.expect("an answer").into_inner().matches.remove(0);
    if found.boots { Ok(()) } else { Err(found.boot_reasons.into_iter().map(|reason| reason.code).collect()) }
}

/// What a render for the platform is told: refused at once, refused when the golden is there, or done.
async fn rendered(daemon: &mut Daemon, image: &str, name: &str, platform: &str) -> Result<(), Vec<String>> {
    let request = proto::StartRenderRequest { idempotency_key: name.into(), spec: Some(on(image, name, &[platform])) };
    let id = match daemon.renders.start_render(request).await {
        Ok(started) => started.into_inner().render.expect("a render").id,
        Err(status) if status.code() == tonic::Code::FailedPrecondition => return Err(reasons(&status)),
        Err(status) => return Err(vec![status.get_error_details().error_info().expect("a reason").reason.clone()]),
    };
    let ended = daemon.wait(&id).await;
    let Some(error) = ended.error else { return Ok(()) };
    assert_eq!(error.code, tonic::Code::FailedPrecondition as i32, "{error:?}");
    let is_reason = |word: &&str| word.len() > 5 && word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    Err(error.message.split(": ").flat_map(|part| part.split("; ")).filter(is_reason).map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn match_says_what_a_render_is_told_for_every_image_on_every_platform() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("vmlinuz"), vmlinux()).expect("written");
    let kernel = format!("{MORE_PLATFORMS}\n[[kernel]]\nname = \"ours\"\nkernel = {:?}\nos = \"linux\"\n", directory.path().join("vmlinuz"));
    let mut daemon = daemon(&kernel).await;
    let platforms = daemon.hosts.list_platforms(proto::ListPlatformsRequest {}).await.expect("a list").into_inner().platforms;
    let trees = [("with", daemon.upload(&bootable()).await), ("without", daemon.upload(&tarball()).await)];
    let (mut compared, mut seen) = (0, std::collections::BTreeSet::new());
    for (what, digest) in &trees {
        for manifest in manifests() {
            let request = proto::CreateImageRequest { manifest_json: manifest.to_string(), rootfs_digest: digest.clone(), ..Default::default() };
            let image = daemon.images.create_image(request).await.expect("created").into_inner().image.expect("an image").id;
            for platform in &platforms {
                let case = format!("{} {what} kernel on {}", manifest["name"], platform.name);
                let before = matched(&mut daemon, &image, &platform.name).await;
                let name = format!("m-{compared}");
                let told = rendered(&mut daemon, &image, &name, &platform.name).await;
                // Before there is a golden only what manifest and platform decide is known; that is never taken back.
                if let Err(before) = &before {
                    assert_eq!(told.as_ref().expect_err(&case), before, "{case}");
                }
                let after = matched(&mut daemon, &image, &platform.name).await;
                assert_eq!(after, told, "{case}: a golden is there, or none was made");
                seen.extend(told.err().unwrap_or_default());
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 2 * manifests().len() * 9);
    for reason in
        ["ARCH_DIFFERS", "LAYOUT_FIRMWARE", "KERNEL_NEEDED", "KERNEL_UNSUITABLE", "NO_BOOT_ENTRY_POINT", "SECURE_BOOT", "FS_PROFILE", "BAD_SIZE"]
    {
        assert!(seen.contains(reason), "{reason} is not among {seen:?}");
    }
    daemon.stop().await;
}

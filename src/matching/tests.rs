use std::collections::BTreeSet;

use serde_json::json;

use super::*;
use crate::{
    manifest::Manifest,
    streams::{Limits, Products, platforms},
};

const PLATFORMS: &str = include_str!("../../tests/data/streams/platforms.json");

/// The product of the worked example, as its publisher describes it: images of a cloud, root tarball, disk.
fn precise() -> Image {
    let file = |ftype: &str| json!({"ftype": ftype, "path": format!("server/releases/precise/{ftype}"), "sha256": "0", "size": 1});
    let document = json!({
        "format": "products:1.0", "content_id": "com.ubuntu.cloud:released:download",
        "products": {"com.ubuntu.cloud:server:12.04:amd64": {
            "arch": "amd64", "os": "ubuntu", "release": "precise", "version": "12.04",
            "versions": {"20130502": {"items": {"disk1.img": file("disk1.img"), "root.tar.gz": file("root.tar.gz")}}}
        }}
    });
    let tree = Products::parse(document.to_string().as_bytes(), &Limits::default()).expect("a document");
    Image::of_product(&tree, "com.ubuntu.cloud:server:12.04:amd64").expect("the product")
}

fn codes(reasons: &[Reason]) -> Vec<&'static str> {
    reasons.iter().map(|reason| reason.code).collect()
}

fn platform(name: &str) -> Platform {
    platforms::parse(PLATFORMS.as_bytes()).expect("platforms").into_iter().find(|platform| platform.name == name).expect(name)
}

#[test]
fn the_worked_example_of_2013_gives_the_expected_answers() {
    let image = precise();
    // Which guests can be created on each platform with the product; why not otherwise.
    for (name, can, can_not) in [
        ("m1.small", &["lxc"][..], &[("kvm", "NO_HARDWARE_VIRTUALIZATION"), ("xen", "NOT_FIRST_DOMAIN")][..]),
        ("m1.large", &["lxc"], &[("kvm", "NO_HARDWARE_VIRTUALIZATION"), ("xen", "NOT_FIRST_DOMAIN")]),
        ("cc4.8xlarge", &["lxc"], &[("kvm", "NO_NESTED_VIRTUALIZATION"), ("xen", "NOT_FIRST_DOMAIN")]),
        ("k1.large", &["lxc", "kvm"], &[("xen", "XEN_NOT_RUNNING")]),
        ("h1.large", &["lxc", "kvm"], &[("xen", "XEN_NOT_RUNNING")]),
        ("xx2.large", &["lxc", "xen"], &[("kvm", "HYPERVISOR_IS_XEN")]),
    ] {
        let answer = answers(&image, &[platform(name)], &Container::ALL).remove(0);
        assert_eq!(answer.boot, [], "{name}: the image boots everywhere");
        let found: Vec<&str> = answer.containers.iter().filter(|(_, reasons)| reasons.is_empty()).map(|(kind, _)| kind.name()).collect();
        assert_eq!(found, can, "{name}");
        let refused: Vec<(&str, &str)> =
            answer.containers.iter().filter(|(_, reasons)| !reasons.is_empty()).map(|(kind, reasons)| (kind.name(), reasons[0].code)).collect();
        assert_eq!(refused, can_not, "{name}");
    }
    let all = platforms::parse(PLATFORMS.as_bytes()).expect("platforms");
    let mut both: Vec<String> =
        answers(&image, &all, &[Container::Lxc, Container::Kvm]).into_iter().filter(Answer::is_match).map(|answer| answer.platform.name).collect();
    both.sort();
    assert_eq!(both, ["h1.large", "k1.large"], "where LXC and KVM guests can both be created");
}

#[test]
fn each_reason_against_booting_has_a_case() {
    let manifest = |value: serde_json::Value| {
        let manifest = Manifest::parse(value.to_string().as_bytes()).expect("a manifest");
        Image::of_manifest("x", &manifest)
    };
    let kernel = json!({"kernel": {"os": "linux"}});
    for (image, on, want) in [
        (manifest(json!({"arch": "arm64", "entry_points": kernel})), "k1.large", &["ARCH_DIFFERS"][..]),
        (manifest(json!({"arch": "i386", "entry_points": kernel})), "k1.large", &[]),
        (manifest(json!({"arch": "amd64", "entry_points": {"init": {}}})), "k1.large", &["KERNEL_NEEDED"]),
        (manifest(json!({"arch": "amd64", "entry_points": {"chroot": {"command": "/bin/sh"}}})), "k1.large", &["NO_BOOT_ENTRY_POINT"]),
        (manifest(json!({"entry_points": kernel, "disk": {"layout": "bare"}})), "k1.large", &["LAYOUT_FIRMWARE"]),
        (manifest(json!({"entry_points": kernel, "disk": {"layout": "bare"}})), "m1.small", &[]),
        (manifest(json!({"entry_points": kernel, "filesystem": {"type": "xfs"}})), "m1.small", &["FS_PROFILE"]),
        (manifest(json!({})), "m1.small", &[]),
    ] {
        assert_eq!(codes(&boots(&image, &platform(on))), want, "{image:?} on {on}");
    }
    let mut supplied = platform("m1.small");
    supplied.supplies_kernel = true;
    assert_eq!(boots(&manifest(json!({"arch": "amd64", "entry_points": {"init": {}}})), &supplied), []);
    let mut hvm_only = precise();
    hvm_only.virt = BTreeSet::from([Mode::Hvm]);
    assert_eq!(codes(&boots(&hvm_only, &platform("m1.small"))), ["VIRTUALIZATION_MISMATCH"]);
    assert_eq!(boots(&hvm_only, &platform("cc4.8xlarge")), []);
}

#[test]
fn what_a_provider_says_about_guests_counts() {
    let mut said = platform("h1.large");
    said.containers = Some(BTreeSet::from([Container::Lxc, Container::Xen]));
    let image = precise();
    assert_eq!(hosts(&image, &said, Container::Xen, &[]), []);
    assert_eq!(codes(&hosts(&image, &said, Container::Kvm, &[])), ["NOT_OFFERED"]);
    let other = Image { os: Some("freebsd".into()), ..image };
    assert_eq!(codes(&hosts(&other, &said, Container::Lxc, &[])), ["NOT_LINUX"]);
}

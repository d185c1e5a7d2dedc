//! A golden image that another host built, pulled from a registry by a host that has never seen its tarball, and a root filesystem that is a squashfs image: both start in QEMU and
//! are configured as asked.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh`, grpcurl, docker-registry and squashfs-tools; without them the tests fail.

use std::{fs, process::Command};

use crate::common::{
    daemon::Daemon,
    fixture,
    rig::{call_ok, check, guest, image, render},
    sites::registry,
};
use cloudletd::names::Digest;
use serde_json::json;

const FIXTURE: &str = "bookworm-ifupdown";

#[test]
fn an_instance_of_a_golden_that_came_from_a_registry_boots_as_configured() {
    let server = registry();
    let password = server.secret("password", "right\n");
    let registry = format!(
        "[[share.registry]]\nname = \"provider\"\nurl = \"http://{}\"\nrepository = \"cloudlets/images\"\nusername = \"user\"\npassword_file = {password:?}\n",
        server.address
    );
    let builder = Daemon::start(&registry);
    let id = image(&builder, FIXTURE, &json!({}));
    render(&builder, &id, "built-1", "QCOW2_OVERLAY", &json!({}));
    let goldens = call_ok(&builder, "RenderService/ListGoldens", &json!({}));
    let golden = &goldens["goldens"][0];
    let pushed = call_ok(&builder, "ShareService/PushGolden", &json!({"remote": "provider", "goldenKey": golden["key"]}));
    assert_eq!(pushed["chunks"], pushed["sentChunks"], "{pushed:#}");

    let taker = Daemon::start(&format!("[golden]\nprefer = \"pull\"\n{registry}"));
    let tarball = fs::read(fixture::get(FIXTURE).tarball).expect("the fixture");
    let rootfs = json!({"url": "https://nowhere.invalid/root.tar", "digest": Digest::of(&tarball).to_string(), "size": tarball.len()});
    let id = image(&taker, FIXTURE, &json!({"rootfs": rootfs}));
    let rendered = render(&taker, &id, "pulled-1", "QCOW2_OVERLAY", &json!({}));
    assert_eq!(call_ok(&taker, "RenderService/ListGoldens", &json!({}))["goldens"][0]["digest"], golden["digest"]);
    assert_eq!(fs::read_dir(taker.directory().join("state/blobs")).expect("a store").count(), 0, "the tarball never came here");
    check(&guest(FIXTURE, rendered.disk()).boot(), &rendered, "pulled-1");
}

#[test]
fn an_instance_of_a_squashfs_image_boots_as_configured() {
    let dir = tempfile::tempdir().expect("a directory");
    let squashfs = dir.path().join("root.squashfs");
    let tarball = fixture::get(FIXTURE).tarball;
    let script = "set -o pipefail; zstd -dcq \"$1\" | sqfstar -comp zstd -quiet \"$2\"";
    let made =
        Command::new("bash").args(["-c", script, "bash"]).args([&tarball, &squashfs]).status().expect("bash, zstd and squashfs-tools are needed");
    assert!(made.success());
    let daemon = Daemon::start_in(dir.path(), "");
    let rootfs = json!({"url": format!("file://{}", squashfs.canonicalize().expect("made").display()), "media_type": "application/vnd.squashfs"});
    let id = image(&daemon, FIXTURE, &json!({"rootfs": rootfs}));
    let rendered = render(&daemon, &id, "squashed-1", "QCOW2_OVERLAY", &json!({}));
    check(&guest(FIXTURE, rendered.disk()).boot(), &rendered, "squashed-1");
    drop(daemon);
}

//! Every operator script, run as an operator would: the real script, the real grpcurl, a real daemon.
//!
//! Needs root, the fixtures of `scripts/fixtures.sh`, jq, and grpcurl (`scripts/tools.sh`); without them the tests fail.

mod common;

use std::{fs, process::Command};

use common::{
    daemon::{Daemon, script_path},
    fixture,
    rig::config,
};
use serde_json::{Value, json};

const SCRIPTS: [&str; 14] = [
    "gc.sh",
    "reap.sh",
    "backup.sh",
    "create-image.sh",
    "list-images.sh",
    "prerender.sh",
    "render.sh",
    "watch.sh",
    "mapping.sh",
    "list-volumes.sh",
    "delete-volume.sh",
    "reconfigure.sh",
    "host-info.sh",
    "match.sh",
];

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A daemon, and a manifest file beside it.
fn daemon_and_manifest() -> (Daemon, String) {
    let daemon = Daemon::start("");
    let tarball = fixture::get("bookworm-ifupdown").tarball;
    let manifest = json!({
        "name": "debian-12", "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}}, "rootfs": {"url": format!("file://{}", tarball.display())},
    });
    let path = daemon.directory().join("manifest.json");
    fs::write(&path, manifest.to_string()).expect("write the manifest");
    (daemon, path.to_str().expect("test paths are UTF-8").to_owned())
}

#[test]
fn every_script_explains_itself_and_refuses_what_it_does_not_know() {
    for script in SCRIPTS {
        let output = Command::new(script_path(script)).arg("--help").output().expect("run the script");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.starts_with(&format!("usage: {script}")) && text.contains("CLOUDLETD_ADDR"), "{script}: {text}");
        assert!(!Command::new(script_path(script)).arg("--no-such-flag").output().expect("run the script").status.success(), "{script}");
        let length = fs::read_to_string(script_path(script)).expect("read the script").lines().count();
        assert!(length <= 60, "{script} has {length} lines");
    }
}

#[test]
fn an_image_is_matched_with_instance_types() {
    let (daemon, manifest) = daemon_and_manifest();
    let created = json_of(&daemon.script_ok("create-image.sh", &[&manifest, "--json"]));
    let image = created["image"]["id"].as_str().expect("an image id");
    let platforms = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/streams/platforms.json");
    let table = daemon.script_ok("match.sh", &["--image", image, "--platforms", platforms, "--containers", "lxc,kvm"]);
    let line =
        |platform: &str| table.lines().find(|line| line.contains(platform)).unwrap_or_else(|| panic!("{platform} is not in {table}")).to_owned();
    assert!(line("k1.large").contains("lxc,kvm"), "{table}");
    assert!(line("m1.small").contains("kvm: NO_HARDWARE_VIRTUALIZATION"), "{table}");
    let found = daemon.script_ok("match.sh", &["--image", image, "--platforms", platforms, "--platform", "xx2.large", "--json"]);
    assert_eq!(json_of(&found)["containers"].as_array().map(Vec::len), Some(3), "{found}");
    let none = daemon.script("match.sh", &["--image", image, "--platforms", platforms, "--platform", "m1.small", "--containers", "kvm"]);
    assert_eq!(none.status.code(), Some(3), "nothing fits");
}

#[test]
fn an_image_becomes_a_volume_and_goes_away_again() {
    let (daemon, manifest) = daemon_and_manifest();
    let created = json_of(&daemon.script_ok("create-image.sh", &[&manifest, "--json"]));
    let image = created["image"]["id"].as_str().expect("an image id");
    assert!(daemon.script_ok("create-image.sh", &[&manifest]).contains("was there already"));
    let listed = daemon.script_ok("list-images.sh", &[]);
    assert!(listed.contains(image) && listed.contains("debian-12"), "{listed}");

    let built = daemon.script_ok("prerender.sh", &[image]);
    assert!(built.contains("succeeded"), "{built}");
    let again = daemon.script_ok("prerender.sh", &[image]);
    assert!(again.contains("was there already"), "{again}");

    let config_file = daemon.directory().join("web-1.json");
    fs::write(&config_file, config("web-1").to_string()).expect("write the configuration");
    let arguments =
        ["--image", image, "--instance", "web-1", "--format", "qcow2-overlay", "--config", config_file.to_str().expect("UTF-8"), "--key", "first"];
    let rendered = daemon.script_ok("render.sh", &arguments);
    assert!(rendered.contains("succeeded") && rendered.contains("host name web-1") && rendered.contains("golden"), "{rendered}");
    // The same key with the same request is the same render.
    let id = daemon.script_ok("render.sh", &[&arguments[..], &["--no-wait"]].concat());
    assert!(rendered.contains(id.trim()), "{rendered} lacks {id}");
    assert!(daemon.script_ok("watch.sh", &[id.trim()]).contains("succeeded"));

    let moved = daemon.directory().join("moved.json");
    fs::write(&moved, json!({"hostname": "web-2.example.com"}).to_string()).expect("write the configuration");
    let arguments = ["default/web-1", "--config", moved.to_str().expect("UTF-8")];
    let planned = daemon.script_ok("reconfigure.sh", &[&arguments[..], &["--dry-run"]].concat());
    assert!(planned.contains("would change") && planned.contains("/etc/hostname"), "{planned}");
    assert!(daemon.script_ok("mapping.sh", &["default/web-1"]).contains("host name web-1.example.com"));
    let changed = daemon.script_ok("reconfigure.sh", &arguments);
    assert!(changed.contains("reconfigured") && changed.contains("host name web-2.example.com"), "{changed}");
    assert!(daemon.script_ok("mapping.sh", &["default/web-1"]).contains("host name web-2.example.com"));

    let volumes = daemon.script_ok("list-volumes.sh", &["--pool", "default"]);
    assert!(volumes.contains("default/web-1") && volumes.contains("qcow2_overlay"), "{volumes}");
    let again = ["--image", image, "--instance", "web-1", "--format", "qcow2-overlay", "--size", "6GiB", "--replace"];
    let further = ["--device", "data:64M:/srv/data", "--device", "swap:64M"];
    let replaced = daemon.script_ok("render.sh", &[&again[..], &further[..]].concat());
    assert!(replaced.contains("succeeded"), "{replaced}");
    let volumes = daemon.script_ok("list-volumes.sh", &[]);
    assert!(volumes.contains("6 GiB") && volumes.contains("default/web-1-data") && volumes.contains("default/web-1-swap"), "{volumes}");
    let deleted = daemon.script_ok("delete-volume.sh", &["default/web-1"]);
    assert!(deleted.contains("deleted"), "{deleted}");
    let left = daemon.script_ok("list-volumes.sh", &[]);
    assert!(left.contains("web-1-data") && !left.contains("web-1-swap"), "{left}");
    assert!(daemon.script_ok("delete-volume.sh", &["--data", "default/web-1-data"]).contains("deleted"));
    assert!(daemon.script_ok("delete-volume.sh", &["default/web-1"]).contains("was gone already"));
    assert!(!daemon.script_ok("list-volumes.sh", &[]).contains("web-1"));
}

#[test]
fn a_mapping_comes_in_every_dialect() {
    let (daemon, manifest) = daemon_and_manifest();
    let created = json_of(&daemon.script_ok("create-image.sh", &[&manifest, "--json"]));
    let image = created["image"]["id"].as_str().expect("an image id");
    // A request file is a StartRenderRequest as the API takes it.
    let request = json!({"idempotencyKey": "k", "spec": {
        "imageId": image, "volume": {"pool": "default", "name": "db-1"}, "format": "VOLUME_FORMAT_RAW",
        "instance": {"name": "db-1", "hostname": "db-1.example.com"},
    }});
    let file = daemon.directory().join("request.json");
    fs::write(&file, request.to_string()).expect("write the request");
    daemon.script_ok("render.sh", &[file.to_str().expect("UTF-8")]);

    let dialect = |name: &str| daemon.script_ok("mapping.sh", &["default/db-1", "--dialect", name]);
    let path = daemon.default_pool().to_str().expect("UTF-8").to_owned();
    assert!(dialect("summary").contains(&path));
    assert!(dialect("libvirt").contains("<disk") && dialect("libvirt").contains(&path));
    assert!(dialect("xl").contains(&path));
    assert!(dialect("qemu").contains("-blockdev") && dialect("qemu").contains(&path));
    assert!(json_of(&dialect("ec2")).is_array() || json_of(&dialect("ec2")).is_object());
    assert!(json_of(&dialect("json")).to_string().contains(&path));
    assert!(!daemon.script("mapping.sh", &["default/db-1", "--dialect", "latin"]).status.success());
}

#[test]
fn errors_reach_the_operator() {
    let daemon = Daemon::start("");
    for (script, arguments, words) in [
        ("prerender.sh", &["img-00000000000000000000"][..], "img-00000000000000000000"),
        ("watch.sh", &["rnd-00000000000000000000"], "rnd-00000000000000000000"),
        ("mapping.sh", &["default/nothing"], "nothing"),
        ("mapping.sh", &["no-slash"], "POOL/VOLUME"),
        ("reconfigure.sh", &["default/nothing"], "--config"),
        ("reconfigure.sh", &["default/nothing", "--config", "/dev/null"], "nothing"),
        ("create-image.sh", &["/nonexistent/manifest.json"], "manifest.json"),
        ("render.sh", &["--image", "img-00000000000000000000", "--instance", "x"], "img-00000000000000000000"),
    ] {
        let output = daemon.script(script, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(words), "{script} {arguments:?}: {}\n{errors}", output.status);
    }
    let info = daemon.script_ok("host-info.sh", &[]);
    assert!(info.contains("cloudletd") && info.contains("default") && info.contains("ext4"), "{info}");
    // A daemon that is not there is an error too.
    let nobody = Command::new(script_path("host-info.sh")).env("CLOUDLETD_ADDR", "unix:///nonexistent/sock").output().expect("run the script");
    assert!(!nobody.status.success());
}

#[test]
fn an_upload_through_the_script_is_an_image() {
    let daemon = Daemon::start("");
    let directory = daemon.directory();
    let tree = directory.join("tree/etc");
    fs::create_dir_all(&tree).expect("make a tree");
    // More than one chunk of the script's two MiB.
    fs::write(tree.join("noise"), (0..5_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>()).expect("write a file");
    let tarball = directory.join("small.tar");
    let status = Command::new("tar").arg("-C").arg(directory.join("tree")).arg("-cf").arg(&tarball).arg(".").status().expect("run tar");
    assert!(status.success());
    let manifest = directory.join("small.json");
    fs::write(&manifest, json!({"name": "small", "entry_points": {"init": {}}}).to_string()).expect("write the manifest");
    let arguments = [manifest.to_str().expect("UTF-8"), "--upload", tarball.to_str().expect("UTF-8"), "--json"];
    let created = json_of(&daemon.script_ok("create-image.sh", &arguments));
    assert_eq!(created["image"]["rootfs"]["sizeBytes"], fs::metadata(&tarball).expect("the tarball").len().to_string(), "{created:#}");
    assert!(daemon.script_ok("list-images.sh", &[]).contains("small"));
}

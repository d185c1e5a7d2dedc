//! A real daemon with images made of the Debian fixtures, driven over gRPC by grpcurl as an operator would, and guests booted from what it rendered.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use super::{
    boot::{Disk, Guest, GuestFile, Report},
    daemon::Daemon,
    fixture,
};

/// Hardware addresses of the NICs that [`network`] configures, in order.
pub const MACS: [&str; 2] = ["52:54:00:aa:00:01", "52:54:00:aa:00:02"];
/// A key that may log in as root.
pub const LOGIN_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEkgVGhpbmsgVGhlcmVmb3JlIEFtIE5vdCBBIEtleSEh operator@example.com";

/// Runs one call of `cloudlet.v1.METHOD` with grpcurl; the error is what grpcurl printed.
pub fn call(daemon: &Daemon, method: &str, request: &Value) -> Result<Value, String> {
    let mut child = Command::new(grpcurl())
        .args(["--plaintext", "--unix", "--emit-defaults", "-d", "@"])
        .arg(daemon.socket())
        .arg(format!("cloudlet.v1.{method}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("run grpcurl: {error} (scripts/tools.sh builds one)"));
    child.stdin.take().expect("stdin is a pipe").write_all(request.to_string().as_bytes()).expect("write the request");
    let output = child.wait_with_output().expect("wait for grpcurl");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    // A stream of answers is a stream of JSON values; the last one counts.
    let answers = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    answers.last().unwrap_or(Ok(Value::Null)).map_err(|error| error.to_string())
}

/// The same, and it has to succeed.
#[track_caller]
pub fn call_ok(daemon: &Daemon, method: &str, request: &Value) -> Value {
    call(daemon, method, request).unwrap_or_else(|error| panic!("{method} {request}: {error}\n--- daemon ---\n{}", daemon.log()))
}

/// The program.
pub fn grpcurl() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/grpcurl");
    std::env::var_os("GRPCURL").map_or_else(|| if built.exists() { built } else { "grpcurl".into() }, PathBuf::from)
}

/// Catalogues a fixture as an image and returns the image id. `more` is added to the manifest.
#[track_caller]
pub fn image(daemon: &Daemon, fixture: &str, more: &Value) -> String {
    let tarball = daemon.readable(&fixture::get(fixture).tarball);
    let mut manifest = json!({
        "name": fixture, "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}},
        "rootfs": {"url": format!("file://{}", tarball.display())},
    });
    for (key, value) in more.as_object().expect("an object") {
        manifest[key] = value.clone();
    }
    call_ok(daemon, "ImageService/CreateImage", &json!({"manifestJson": manifest.to_string()}))["image"]["id"]
        .as_str()
        .expect("an image id")
        .to_owned()
}

/// A rendered volume.
pub struct Rendered {
    /// GetMapping's answer.
    pub answer: Value,
}

/// Renders `instance` in the pool `default` with [`config`] and waits for it. `format` as in the protocol, without its prefix. Fields of `more` are
/// added to the spec.
#[track_caller]
pub fn render(daemon: &Daemon, image: &str, instance: &str, format: &str, more: &Value) -> Rendered {
    let mut spec = json!({
        "imageId": image, "volume": {"pool": "default", "name": instance}, "format": format!("VOLUME_FORMAT_{format}"),
        "instance": {"name": instance, "configJson": config(instance).to_string()},
    });
    for (key, value) in more.as_object().expect("an object") {
        spec[key] = value.clone();
    }
    let started = call_ok(daemon, "RenderService/StartRender", &json!({"idempotencyKey": format!("test-{instance}"), "spec": spec}));
    let id = started["render"]["id"].as_str().expect("a render id");
    let ended = call_ok(daemon, "RenderService/WatchRender", &json!({"renderId": id}));
    assert_eq!(ended["render"]["state"], "RENDER_STATE_SUCCEEDED", "{ended:#}\n--- daemon ---\n{}", daemon.log());
    Rendered { answer: call_ok(daemon, "VolumeService/GetMapping", &json!({"renderId": id})) }
}

/// The configuration that [`check`] expects to see in the guest: two NICs, both families, a route, resolvers, a login key.
pub fn config(instance: &str) -> Value {
    json!({"hostname": format!("{instance}.example.com"), "authorized_keys": {"root": [LOGIN_KEY]}, "network": network()})
}

fn network() -> Value {
    json!({
        "interfaces": [
            {"name": "eth0", "mac": MACS[0], "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1", "gateway6": "2001:db8::1", "accept_ra": false},
            {"name": "lan1", "mac": MACS[1], "addresses": ["10.20.0.5/16"], "mtu": 1400, "routes": [{"to": "10.99.0.0/16", "via": "10.20.0.1"}]},
        ],
        "nameservers": ["192.0.2.53", "2001:db8::53"], "search": ["example.com"],
    })
}

impl Rendered {
    /// The root device of the mapping.
    pub fn root(&self) -> &Value {
        &self.answer["mapping"]["devices"][0]
    }

    /// What QEMU is given: the device in its declared format.
    #[track_caller]
    pub fn disk(&self) -> Disk {
        let path = self.root()["volume"]["device"].as_str().expect("the mapping names a device");
        match self.root()["format"].as_str().expect("the mapping says the format") {
            "raw" => Disk::raw(path),
            "qcow2" => Disk::qcow2(path),
            other => panic!("unknown format {other}"),
        }
    }

    /// The mapping's own QEMU arguments.
    pub fn qemu_args(&self) -> Disk {
        Disk::QemuArgs(
            self.answer["qemuArgs"].as_array().expect("a list").iter().map(|argument| argument.as_str().expect("text").to_owned()).collect(),
        )
    }

    /// Lines of the mapping's identity: `knownHosts`, `sshfp`, …
    #[track_caller]
    pub fn identity_lines(&self, key: &str) -> Vec<&str> {
        let lines = self.answer["mapping"]["identity"][key].as_array().unwrap_or_else(|| panic!("the identity has no {key}"));
        lines.iter().map(|line| line.as_str().expect("text")).collect()
    }

    fn identity(&self, key: &str) -> &str {
        self.answer["mapping"]["identity"][key].as_str().expect("the mapping has the guest's identity")
    }
}

/// A guest of `fixture` with the NICs that [`config`] is about, and the files that [`check`] reads.
pub fn guest(fixture: &str, disk: Disk) -> Guest<'_> {
    with_files(Guest::new(fixture, disk).nic(MACS[0]).nic(MACS[1]))
}

/// The same, and its SSH server can be reached.
pub fn visited_guest(fixture: &str, disk: Disk) -> Guest<'_> {
    with_files(Guest::new(fixture, disk).visited_nic(MACS[0]).nic(MACS[1]))
}

fn with_files(guest: Guest<'_>) -> Guest<'_> {
    guest.file("/etc/hosts").file("/root/.ssh/authorized_keys").file("/etc/ssh/ssh_host_ed25519_key").file("/etc/ssh/ssh_host_ed25519_key.pub")
}

/// The guest is what [`config`] asked for, and what the mapping says.
#[track_caller]
pub fn check(report: &Report, rendered: &Rendered, instance: &str) {
    let context = format!("{report:#?}");
    let first = report.link_by_mac(MACS[0]);
    let second = report.link_by_mac(MACS[1]);
    assert_eq!((first.name.as_str(), second.name.as_str()), ("eth0", "lan1"), "{context}");
    assert!(first.up && second.up, "{context}");
    let mut addresses = first.global_addresses();
    addresses.sort_unstable();
    assert_eq!(addresses, ["192.0.2.10/24", "2001:db8::10/64"], "{context}");
    assert_eq!(second.global_addresses(), ["10.20.0.5/16"], "{context}");
    assert_eq!(second.mtu, 1400, "{context}");

    let route = report.default_route4().unwrap_or_else(|| panic!("no IPv4 default route: {context}"));
    assert_eq!((route.gateway.as_str(), route.device.as_str()), ("192.0.2.1", "eth0"), "{context}");
    let route = report.default_route6().unwrap_or_else(|| panic!("no IPv6 default route: {context}"));
    assert_eq!((route.gateway.as_str(), route.device.as_str()), ("2001:db8::1", "eth0"), "{context}");
    let route = report.routes4.iter().find(|route| route.to == "10.99.0.0/16").unwrap_or_else(|| panic!("no static route: {context}"));
    assert_eq!((route.gateway.as_str(), route.device.as_str()), ("10.20.0.1", "lan1"), "{context}");

    assert_eq!(report.nameservers(), ["192.0.2.53", "2001:db8::53"], "{context}");
    assert_eq!(report.search(), ["example.com"], "{context}");

    let fqdn = format!("{instance}.example.com");
    // Debian keeps the short name in /etc/hostname; either way the full name has to resolve.
    assert!(report.hostname == instance || report.hostname == fqdn, "{context}");
    assert!(report.guest_text("/etc/hosts").split_whitespace().any(|word| word == fqdn), "{context}");
    assert_eq!(report.machine_id, rendered.identity("machineId"), "{context}");

    let GuestFile::File { mode, uid, gid, content } = report.guest_file("/root/.ssh/authorized_keys") else {
        panic!("no authorized_keys: {context}")
    };
    assert_eq!((*mode, *uid, *gid), (0o600, 0, 0));
    assert!(String::from_utf8_lossy(content).contains(LOGIN_KEY));
    let GuestFile::File { mode, .. } = report.guest_file("/etc/ssh/ssh_host_ed25519_key") else { panic!("no host key: {context}") };
    assert_eq!(*mode, 0o600);
    // The mapping's known_hosts lines are this guest's key.
    let public = report.guest_text("/etc/ssh/ssh_host_ed25519_key.pub");
    let key = public.split_whitespace().nth(1).expect("a public key");
    let known = rendered.answer["mapping"]["identity"]["knownHosts"].to_string();
    assert!(known.contains(key), "{known} lacks {key}");
}

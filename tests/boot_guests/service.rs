//! The units on a host of their own: a Debian with systemd that boots in QEMU, starts the daemon and its keeper by them, and renders to every target.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh`, grpcurl, binutils, and mkfs.xfs and e2fsck, which go into the guest.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::common::{
    boot::{Guest, Start},
    daemon::Daemon,
    fixture,
    rig::{MACS, call_ok, grpcurl, render},
    server::tarball_with,
};

/// Its C library is not older than that of any host that builds the daemon.
const FIXTURE: &str = "trixie-ifupdown";
const RESULT: &str = "/srv/result";
/// What the guest does, as a unit before multi-user.target.
const PROBE: &str = r#"#!/bin/sh
exec >/srv/result 2>&1
call() { grpcurl -plaintext -unix -max-time 120 -emit-defaults -d "$2" /run/cloudletd/cloudletd.sock "cloudlet.v1.$1"; }
field() { sed -n "s/^ *\"$1\": \"\(.*\)\",\{0,1\}$/\1/p" | head -n 1; }
truncate -s 64M /srv/device.img
losetup /dev/loop7 /srv/device.img
mkdir -p /srv/by-id
ln -s /dev/loop7 /srv/by-id/vm-1
echo "missing layers: $(call HostService/GetHostInfo '{}' | sed -n '/"missing"/,/]/p' | tr -d ' \n')"
image=$(call ImageService/CreateImage '{"manifest_json": "{\"name\": \"small\", \"entry_points\": {\"init\": {}}, \"rootfs\": {\"url\": \"file:///srv/images/rootfs.tar\"}}"}' | field id)
one() { # NAME FORMAT POOL GOLDEN
    volume="{\"pool\": \"$3\", \"name\": \"$1\"}"
    spec="{\"imageId\": \"$image\", \"volume\": $volume, \"format\": \"VOLUME_FORMAT_$2\", \"golden\": $4, \"instance\": {\"name\": \"$1\"}}"
    render=$(call RenderService/StartRender "{\"idempotencyKey\": \"$1\", \"spec\": $spec}" | field id)
    ended=$(call RenderService/WatchRender "{\"renderId\": \"$render\"}")
    echo "$1: $(echo "$ended" | grep '"state"' | tail -n 1 | tr -d ' ",') $(echo "$ended" | field message)"
    device=$(call VolumeService/GetMapping "{\"volume\": $volume}" | field device)
    [ $2 = QCOW2 ] || [ $2 = QCOW2_OVERLAY ] || [ $1 = xfs-1 ] || { e2fsck -fn "$device" >/dev/null 2>&1; echo "$1: e2fsck $?"; }
    [ $1 != xfs-1 ] || echo "$1: $(blkid -p -o value -s TYPE "$device")"
    echo "$1: $(call VolumeService/DeleteVolume "{\"volume\": $volume}" | tr -d ' \n')"
}
one raw-1 RAW default '{}'
one overlay-1 QCOW2_OVERLAY default '{}'
one qcow2-1 QCOW2 default '{}'
one loop-1 LOOP default '{}'
one vm-1 BLOCK devices '{}'
one xfs-1 RAW default '{"filesystem": "xfs", "sizeBytes": "335544320"}'
for unit in cloudletd cloudletd-keeper; do
    pid=$(systemctl show --property MainPID --value $unit)
    echo "$unit: $(grep -E '^(Uid|Groups|CapEff|NoNewPrivs|Seccomp):' /proc/$pid/status | tr '\t\n' ' ;')"
done
echo "user: $(id -u cloudletd)"
echo "network of the keeper: $(nsenter --target $(systemctl show --property MainPID --value cloudletd-keeper) --net ip -brief link | cut -d ' ' -f 1)"
systemctl reload cloudletd
before=$(systemctl show --property MainPID --value cloudletd)
systemctl restart cloudletd
[ $before != $(systemctl show --property MainPID --value cloudletd) ] && echo "restarted: $(call ImageService/ListImages '{}' | field name)"
echo "failed: $(systemctl --failed --no-legend | tr '\n' ' ')"
journalctl --no-pager --output=cat --unit=cloudletd --unit=cloudletd-keeper | grep -v '"level":"INFO"' | tail -n 100
exit 0
"#;
const PROBE_UNIT: &str = "[Unit]\nAfter=cloudletd.service\nWants=cloudletd.service\nBefore=multi-user.target\n\
    [Service]\nType=oneshot\nExecStart=/usr/local/sbin/probe\n";
const CONFIG: &str = "[fetch]\nfile_roots = [\"/srv/images\"]\n[golden]\nsize = \"24 MiB\"\n[limits]\nmemory_reserve = 0\n\
    [[pool]]\nname = \"default\"\nkind = \"directory\"\npath = \"/var/lib/cloudletd/volumes\"\n\
    [[pool]]\nname = \"devices\"\nkind = \"devices\"\npath = \"/srv/by-id\"\nallow = [\"vm-*\"]\n";

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
}

/// A tree of files to come.
struct Tree(PathBuf);

impl Tree {
    fn file(&self, path: &str, mode: u32, content: impl AsRef<[u8]>) -> PathBuf {
        let to = self.0.join(path);
        fs::create_dir_all(to.parent().expect("a directory")).expect("directories");
        fs::write(&to, content).expect("write");
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).expect("chmod");
        to
    }

    fn link(&self, path: &str, target: &str) {
        fs::create_dir_all(self.0.join(path).parent().expect("a directory")).expect("directories");
        symlink(target, self.0.join(path)).expect("a link");
    }

    /// A program of this host, with the libraries that it needs, beside those of the guest.
    fn program(&self, path: &str, program: &Path) {
        let output = Command::new("ldd").arg(program).output().expect("run ldd");
        let text = String::from_utf8(output.stdout).expect("text");
        let directory = "opt/programs";
        let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
        for library in libraries.chain([program.to_str().expect("text")]) {
            let name = library.rsplit('/').next().expect("a name");
            self.file(&format!("{directory}/{name}"), 0o755, fs::read(library).expect("read a library"));
        }
        let name = program.file_name().and_then(|name| name.to_str()).expect("a name");
        let start = format!("#!/bin/sh\nexec /{directory}/ld-linux-x86-64.so.2 --library-path /{directory} /{directory}/{name} \"$@\"\n");
        self.file(path, 0o755, start);
    }
}

/// What is added to the Debian: the daemon as its package would have it, and the probe.
fn host_tree(directory: &Path) -> PathBuf {
    let tree = Tree(directory.join("tree"));
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let daemon = tree.file("usr/bin/cloudletd", 0o755, "");
    run(Command::new("strip").arg("-o").arg(&daemon).arg(env!("CARGO_BIN_EXE_cloudletd")));
    for unit in ["cloudletd.service", "cloudletd.socket", "cloudletd-keeper.service", "cloudletd-keeper.socket"] {
        tree.file(&format!("usr/lib/systemd/system/{unit}"), 0o644, fs::read(checkout.join("systemd").join(unit)).expect("a unit"));
        let target = if unit.ends_with("socket") { "sockets" } else { "multi-user" };
        if unit != "cloudletd-keeper.service" {
            tree.link(&format!("etc/systemd/system/{target}.target.wants/{unit}"), &format!("/usr/lib/systemd/system/{unit}"));
        }
    }
    for (from, to) in [("sysusers", "sysusers.d"), ("tmpfiles", "tmpfiles.d")] {
        tree.file(&format!("usr/lib/{to}/cloudletd.conf"), 0o644, fs::read(checkout.join(format!("systemd/cloudletd.{from}"))).expect("a file"));
    }
    tree.file("etc/cloudletd/cloudletd.toml", 0o644, CONFIG);
    tree.file("srv/images/rootfs.tar", 0o644, tarball_with(&[], 1));
    tree.file("usr/local/bin/grpcurl", 0o755, fs::read(grpcurl()).expect("grpcurl"));
    for program in ["mkfs.xfs", "e2fsck"] {
        tree.program(&format!("usr/local/sbin/{program}"), &Path::new("/usr/sbin").join(program));
    }
    tree.file("usr/local/sbin/probe", 0o755, PROBE);
    tree.file("etc/systemd/system/probe.service", 0o644, PROBE_UNIT);
    tree.link("etc/systemd/system/multi-user.target.wants/probe.service", "/etc/systemd/system/probe.service");
    // One archive of both: GNU tar joins them.
    let (tarball, more) = (directory.join("host.tar"), directory.join("more.tar"));
    run(Command::new("zstd").args(["-q", "-d", "-o"]).arg(&tarball).arg(fixture::get(FIXTURE).tarball));
    run(Command::new("tar")
        .args(["--create", "--owner=0", "--group=0", "--file"])
        .arg(&more)
        .arg("-C")
        .arg(&tree.0)
        .args(["usr", "etc", "srv", "opt"]));
    run(Command::new("tar").arg("--concatenate").arg("--file").arg(&tarball).arg(&more));
    tarball
}

#[test]
fn the_units_run_a_daemon_without_privileges_that_renders_to_every_target() {
    let daemon = Daemon::start("");
    let tarball = host_tree(daemon.directory());
    let manifest = json!({"name": "host", "entry_points": {"kernel": {"os": "linux"}}, "rootfs": {"url": format!("file://{}", tarball.display())}});
    let created = call_ok(&daemon, "ImageService/CreateImage", &json!({"manifestJson": manifest.to_string()}));
    let image = created["image"]["id"].as_str().expect("an image id");
    let rendered = render(&daemon, image, "host-1", "RAW", &json!({"golden": {"sizeBytes": (3u64 << 30).to_string()}}));
    let report = Guest::new(FIXTURE, rendered.disk()).nic(MACS[0]).nic(MACS[1]).start(Start::Full).file(RESULT).boot();
    let result = report.guest_text(RESULT);
    let line = |start: &str| {
        result.lines().find_map(|line| line.strip_prefix(start)).unwrap_or_else(|| panic!("no line {start:?}:\n{result}")).trim().to_owned()
    };
    for name in ["raw-1", "overlay-1", "qcow2-1", "loop-1", "vm-1", "xfs-1"] {
        assert!(result.contains(&format!("{name}: state:RENDER_STATE_SUCCEEDED")), "{name}\n{result}");
        assert!(result.contains(&format!("{name}: {{\"deleted\":true")), "{name}\n{result}");
    }
    for name in ["raw-1", "loop-1", "vm-1"] {
        assert!(result.contains(&format!("{name}: e2fsck 0")), "{name}\n{result}");
    }
    assert!(result.contains("xfs-1: xfs\n"), "{result}");
    let user = line("user:");
    assert!(user != "0", "{result}");
    let daemons = line("cloudletd:");
    assert!(daemons.contains(&format!("Uid: {}", [user.as_str(); 4].join(" "))) && daemons.contains("CapEff: 0000000000000000"), "{result}");
    for unit in [daemons, line("cloudletd-keeper:")] {
        assert!(unit.contains("NoNewPrivs: 1") && unit.contains("Seccomp: 2"), "{result}");
    }
    assert_eq!(line("network of the keeper:"), "lo", "{result}");
    assert_eq!(line("restarted:"), "small", "{result}");
    assert_eq!(line("failed:"), "", "{result}");
    assert!(!result.contains("\"level\":\"ERROR\""), "{result}");
}

//! The same request for guests with different network tools: each guest's own tool brings up exactly what was asked for.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. About 10 s per guest.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::common::{
    boot::{Guest, Start},
    daemon::Daemon,
    rig::{LOGIN_KEY, MACS, call_ok, check, config, guest, image, render, visited_guest},
};
use serde_json::json;

/// Renders an overlay of `fixture`, boots it and checks the guest.
#[track_caller]
fn guest_comes_up(fixture: &str) {
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &json!({}));
    let rendered = render(&daemon, &image, "web-1", "QCOW2_OVERLAY", &json!({}));
    check(&guest(fixture, rendered.disk()).boot(), &rendered, "web-1");
}

#[test]
fn networkd_of_bookworm_brings_up_what_was_asked_for() {
    guest_comes_up("bookworm-networkd");
}

#[test]
fn netplan_of_bookworm_brings_up_what_was_asked_for() {
    guest_comes_up("bookworm-netplan");
}

#[test]
fn networkmanager_of_bookworm_brings_up_what_was_asked_for() {
    guest_comes_up("bookworm-networkmanager");
}

#[test]
fn ifupdown_of_trixie_brings_up_what_was_asked_for() {
    guest_comes_up("trixie-ifupdown");
}

#[test]
fn networkd_of_trixie_brings_up_what_was_asked_for() {
    guest_comes_up("trixie-networkd");
}

#[test]
fn netplan_of_trixie_brings_up_what_was_asked_for() {
    guest_comes_up("trixie-netplan");
}

#[test]
fn networkmanager_of_trixie_brings_up_what_was_asked_for() {
    guest_comes_up("trixie-networkmanager");
}

/// A bond of both NICs, a VLAN on it and a bridge, as a version 2 document.
fn stacked_guest_comes_up(fixture: &str) {
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &json!({}));
    let document = json!({"network": {
        "version": 2,
        "ethernets": {
            "eth0": {"match": {"macaddress": MACS[0]}, "set-name": "eth0"},
            "eth1": {"match": {"macaddress": MACS[1]}, "set-name": "eth1"},
        },
        "bonds": {"bond0": {
            "interfaces": ["eth0", "eth1"], "addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1", "accept-ra": false,
            "parameters": {"mode": "active-backup", "primary": "eth1", "mii-monitor-interval": 100},
        }},
        "vlans": {"bond0.5": {"id": 5, "link": "bond0", "addresses": ["10.5.0.2/24"], "accept-ra": false, "routes": [{"to": "10.6.0.0/16", "via": "10.5.0.1"}]}},
        "bridges": {"br0": {"interfaces": [], "addresses": ["10.7.0.1/24"], "accept-ra": false, "parameters": {"stp": false}}},
    }});
    let config = json!({"hostname": "bond-1", "network": {"document": document.to_string()}}).to_string();
    let rendered = render(&daemon, &image, "bond-1", "QCOW2_OVERLAY", &json!({"instance": {"name": "bond-1", "configJson": config}}));
    let report = Guest::new(fixture, rendered.disk()).nic(MACS[0]).nic(MACS[1]).boot();
    let context = format!("{report:#?}");
    for mac in MACS {
        let nic = report.links.iter().find(|link| link.raw["permaddr"].as_str().unwrap_or(&link.mac) == mac && link.name.starts_with("eth"));
        assert_eq!(nic.map(|nic| nic.raw["master"].as_str()), Some(Some("bond0")), "{context}");
    }
    for (name, address) in [("bond0", "192.0.2.10/24"), ("bond0.5", "10.5.0.2/24"), ("br0", "10.7.0.1/24")] {
        assert_eq!(report.link(name).global_addresses(), [address], "{context}");
        assert!(report.link(name).up, "{context}");
    }
    assert_eq!(report.link("bond0.5").raw["link"], "bond0", "{context}");
    let route = report.default_route4().unwrap_or_else(|| panic!("no default route: {context}"));
    assert_eq!((route.gateway.as_str(), route.device.as_str()), ("192.0.2.1", "bond0"), "{context}");
    let route = report.routes4.iter().find(|route| route.to == "10.6.0.0/16").unwrap_or_else(|| panic!("no route: {context}"));
    assert_eq!((route.gateway.as_str(), route.device.as_str()), ("10.5.0.1", "bond0.5"), "{context}");
}

#[test]
fn ifupdown_of_bookworm_brings_up_a_bond_with_a_vlan_and_a_bridge() {
    stacked_guest_comes_up("bookworm-ifupdown");
}

#[test]
fn networkd_of_bookworm_brings_up_a_bond_with_a_vlan_and_a_bridge() {
    stacked_guest_comes_up("bookworm-networkd");
}

#[test]
fn dhcp_gets_the_lease_and_nothing_else() {
    let fixture = "bookworm-networkd";
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &json!({}));
    let network = json!({"interfaces": [{"name": "eth0", "mac": MACS[0], "dhcp4": true, "accept_ra": false}]});
    let config = json!({"hostname": "dhcp-1", "network": network}).to_string();
    let rendered = render(&daemon, &image, "dhcp-1", "RAW", &json!({"instance": {"name": "dhcp-1", "configJson": config}}));
    let report = Guest::new(fixture, rendered.disk()).dhcp_nic(MACS[0]).boot();
    assert!(report.link("eth0").has_address("10.0.2.15/24"), "{report:#?}");
    // QEMU's isolated network offers neither router nor resolver: what the guest has is the lease and nothing made up.
    assert!(report.default_route4().is_none(), "{report:#?}");
}

#[test]
fn two_instances_of_one_image_are_two_machines() {
    let fixture = "bookworm-ifupdown";
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &json!({}));
    let reports = ["web-1", "web-2"].map(|instance| {
        let rendered = render(&daemon, &image, instance, "QCOW2_OVERLAY", &json!({}));
        let report = guest(fixture, rendered.disk()).boot();
        check(&report, &rendered, instance);
        report
    });
    assert_ne!(reports[0].machine_id, reports[1].machine_id);
    assert_ne!(reports[0].guest_text("/etc/ssh/ssh_host_ed25519_key.pub"), reports[1].guest_text("/etc/ssh/ssh_host_ed25519_key.pub"));
    let goldens = call_ok(&daemon, "RenderService/ListGoldens", &json!({}));
    assert_eq!(goldens["goldens"].as_array().map(Vec::len), Some(1), "{goldens:#}");
}

/// Runs a command in the guest whose SSH server is behind `port` as an operator would on first contact: only the lines of `known_hosts` are trusted. The
/// proxy stands for the network: ssh itself is told the guest's own name or address.
fn first_contact(port: u16, host: &str, known_hosts: &str, options: &[&str], key: &Path, command: &str) -> Output {
    let known = key.with_file_name("known_hosts");
    std::fs::write(&known, known_hosts).expect("write known_hosts");
    let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let proxy = format!("ProxyCommand=/bin/busybox nc 127.0.0.1 {port}");
    let known = format!("UserKnownHostsFile={}", path(&known));
    let mut ssh = Command::new("/usr/bin/ssh");
    ssh.args(["-F", "/dev/null", "-i", &path(key), "-o", &proxy, "-o", &known, "-o", "GlobalKnownHostsFile=/dev/null"]);
    ssh.args(["-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=120"]);
    ssh.args(options.iter().flat_map(|option| ["-o", option])).args([&format!("root@{host}"), command]);
    ssh.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("run ssh: {error} (install openssh-client)"))
}

/// Also the first contact: who was given the mapping's known_hosts lines gets in without being asked, and nobody else's host key is taken.
#[test]
fn a_whole_boot_with_systemd_ends_configured_without_failed_units_and_known_to_ssh() {
    let fixture = "bookworm-networkd";
    let scratch = tempfile::tempdir().expect("a directory");
    let key = scratch.path().join("login");
    let made = Command::new("/usr/bin/ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "operator", "-f"]).arg(&key).status();
    assert!(made.expect("run ssh-keygen").success());
    let public = std::fs::read_to_string(key.with_extension("pub")).expect("a public key");
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &json!({}));
    let mut config = config("full-1");
    config["authorized_keys"]["root"] = json!([LOGIN_KEY, public.trim()]);
    let rendered = render(&daemon, &image, "full-1", "QCOW2_OVERLAY", &json!({"instance": {"name": "full-1", "configJson": config.to_string()}}));
    // The filesystem is found by the UUID of the mapping: it is this instance's own.
    let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("the mapping has the filesystem's UUID");
    let cmdline = format!("root=UUID={uuid} rw");
    let known_hosts = rendered.identity_lines("knownHosts").join("\n") + "\n";
    assert_eq!(rendered.identity_lines("sshfp").len(), rendered.identity_lines("knownHosts").len());
    let visit = |port: u16| {
        // The guest's names with the login key where the host key should be: somebody else's machine.
        let (names, _) = known_hosts.split_once(' ').expect("names and a key");
        let other = format!("{names} {}\n", public.trim());
        let refused = first_contact(port, "full-1.example.com", &other, &[], &key, "true");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains("Host key verification failed"), "{said}");
        for (host, options, command) in [
            ("full-1.example.com", ["HostKeyAlgorithms=ecdsa-sha2-nistp256"], "cat /etc/machine-id"),
            ("192.0.2.10", ["HostKeyAlgorithms=ssh-ed25519"], "cat /etc/machine-id; touch /run/boot/visited"),
        ] {
            let output = first_contact(port, host, &known_hosts, &options, &key, command);
            assert!(output.status.success(), "{host}: {output:?}");
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), rendered.answer["mapping"]["identity"]["machineId"], "{output:?}");
        }
    };
    let report = visited_guest(fixture, rendered.disk()).start(Start::Full).cmdline(&cmdline).boot_visited(&visit);
    check(&report, &rendered, "full-1");
    assert_eq!(report.failed_units.as_deref(), Some(""), "{report:#?}");
}

//! The same request for guests with different network tools: each guest's own tool brings up exactly what was asked for.
//!
//! Needs root, QEMU, the fixtures of `scripts/fixtures.sh` and grpcurl; without them the tests fail. About 10 s per guest.

mod common;

use common::{
    boot::Start,
    daemon::Daemon,
    rig::{MACS, call_ok, check, guest, image, render},
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
    let report = common::boot::Guest::new(fixture, rendered.disk()).nic(MACS[0]).nic(MACS[1]).boot();
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
    let report = common::boot::Guest::new(fixture, rendered.disk()).dhcp_nic(MACS[0]).boot();
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

#[test]
fn a_whole_boot_with_systemd_ends_configured_and_without_failed_units() {
    let fixture = "bookworm-networkd";
    let daemon = Daemon::start("");
    let image = image(&daemon, fixture, &json!({}));
    let rendered = render(&daemon, &image, "full-1", "QCOW2_OVERLAY", &json!({}));
    // The filesystem is found by the UUID of the mapping: it is this instance's own.
    let uuid = rendered.root()["filesystem"]["uuid"].as_str().expect("the mapping has the filesystem's UUID");
    let cmdline = format!("root=UUID={uuid} rw");
    let report = guest(fixture, rendered.disk()).start(Start::Full).cmdline(&cmdline).boot();
    check(&report, &rendered, "full-1");
    assert_eq!(report.failed_units.as_deref(), Some(""), "{report:#?}");
}

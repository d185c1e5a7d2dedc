//! Injection as a whole on hand-made trees: what is written with which mode, what is removed, what is left to others, what is never told.

use std::collections::BTreeSet;

use crate::common::guest_trees::{
    self, Is,
    injection::{Given, HASH, KEY, injected, name, root_mount},
    own, put,
};
use cloudletd::{
    error::{Error, Kind},
    fs::edit::{Edit, EditOp},
    guest::{Injection, config::InstanceConfig, decode, facts::GuestFacts},
    units::Timestamp,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn config(document: Value) -> InstanceConfig {
    decode::from_value(&document, Some(&name())).expect("a valid document").config
}

fn try_with(facts: &GuestFacts, config: &InstanceConfig, claimed: &[&str]) -> Result<Injection, Error> {
    let claimed = claimed.iter().map(|path| (*path).to_owned()).collect();
    let secret_args = BTreeSet::from(["pin".to_owned()]);
    let now = Timestamp { secs: 5, nanos: 0 };
    injected(facts, config, &Given { claimed, secret_args, fstab_root: Some(root_mount()), now })
}

#[track_caller]
fn with(facts: &GuestFacts, document: Value, claimed: &[&str]) -> Injection {
    try_with(facts, &config(document), claimed).expect("injects")
}

fn edit<'a>(injection: &'a Injection, path: &str) -> Option<&'a Edit> {
    injection.edits.iter().find(|edit| edit.path.to_string() == path)
}

#[track_caller]
fn text<'a>(injection: &'a Injection, path: &str) -> &'a str {
    match edit(injection, path).map(|edit| &edit.op) {
        Some(EditOp::WriteFile { content, .. }) => std::str::from_utf8(content).expect("text"),
        _ => panic!("{path} is not written: {:?}", injection.edits),
    }
}

fn removed(injection: &Injection, path: &str) -> bool {
    edit(injection, path).is_some_and(|edit| edit.op == EditOp::Remove)
}

fn one_nic(extra: Value) -> Value {
    let mut document = json!({"network": {"interfaces": [{"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1"}],
        "nameservers": ["192.0.2.53"]}});
    for (key, value) in extra.as_object().expect("object") {
        document[key] = value.clone();
    }
    document
}

fn everything() -> Value {
    one_nic(json!({
        "hostname": "web1.example.com", "args": {"title": "t", "pin": 4711, "db_password": "dbsecret"},
        "authorized_keys": {"root": [KEY], "ada": [KEY]}, "root_password_hash": HASH,
        "files": [{"path": "/etc/app.key", "content": "filesecret", "mode": "0400"}]
    }))
}

#[test]
fn every_path_has_the_mode_and_owner_that_the_table_says() {
    let injection = with(&guest_trees::debian_ifupdown(), everything(), &[]);
    let table = [
        ("/etc/hostname", 0o644, 0, 0),
        ("/etc/hosts", 0o644, 0, 0),
        ("/etc/machine-id", 0o444, 0, 0),
        ("/etc/shadow", 0o640, 0, 42),
        ("/etc/ssh/ssh_host_ed25519_key", 0o600, 0, 0),
        ("/etc/ssh/ssh_host_ed25519_key.pub", 0o644, 0, 0),
        ("/etc/ssh/ssh_host_ecdsa_key", 0o600, 0, 0),
        ("/root/.ssh", 0o700, 0, 0),
        ("/root/.ssh/authorized_keys", 0o600, 0, 0),
        ("/home/ada/.ssh", 0o700, 1000, 1000),
        ("/home/ada/.ssh/authorized_keys", 0o600, 1000, 1000),
        ("/etc/network/interfaces", 0o644, 0, 0),
        ("/etc/resolv.conf", 0o644, 0, 0),
        ("/etc/fstab", 0o644, 0, 0),
        ("/etc/app.key", 0o400, 0, 0),
        ("/.cloudlet/applied_config", 0o644, 0, 0),
    ];
    for (path, mode, uid, gid) in table {
        let edit = edit(&injection, path).unwrap_or_else(|| panic!("{path} is not written"));
        let (EditOp::WriteFile { attrs, .. } | EditOp::MakeDir { attrs }) = &edit.op else { panic!("{path}: {edit:?}") };
        assert_eq!((attrs.mode, attrs.uid, attrs.gid), (mode, uid, gid), "{path}");
    }
    let netplan = with(&guest_trees::ubuntu_netplan(), everything(), &[]);
    let profile = with(&guest_trees::fedora_network_manager(), everything(), &[]);
    for (injection, path) in
        [(netplan, "/etc/netplan/50-cloudlet.yaml"), (profile, "/etc/NetworkManager/system-connections/cloudlet-eth0.nmconnection")]
    {
        assert!(matches!(&edit(&injection, path).expect("written").op, EditOp::WriteFile { attrs, .. } if attrs.mode == 0o600), "{path}");
    }
}

#[test]
fn secrets_are_in_the_guest_only_and_never_in_report_debug_or_record() {
    let injection = with(&guest_trees::debian_ifupdown(), everything(), &[]);
    assert!(text(&injection, "/etc/shadow").starts_with(&format!("root:{HASH}:19000:0:99999:7:::\nnobody:*:")));
    let told = [
        serde_json::to_string(&injection.report).expect("report"),
        format!("{injection:?}"),
        text(&injection, "/.cloudlet/applied_config").to_owned(),
        format!("{:?}", config(everything()).root_password_hash),
    ];
    for told in told {
        for secret in ["qFmFH.bQmm", "PRIVATE KEY", "filesecret", "4711", "dbsecret"] {
            assert!(!told.contains(secret), "{secret} in {told}");
        }
    }
    for path in ["/etc/shadow", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ecdsa_key", "/etc/app.key"] {
        let change = injection.report.changes.iter().find(|change| change.path == path).expect("reported");
        assert_eq!(change.content.as_deref(), Some("redacted"), "{path}");
    }
    let record: Value = serde_json::from_str(text(&injection, "/.cloudlet/applied_config")).expect("JSON");
    assert_eq!((&record["args"]["title"], &record["args"]["pin"]), (&json!("t"), &json!("[redacted]")));
    assert_eq!(record["network"]["interfaces"][0]["addresses"][0], "192.0.2.10/24");
}

#[test]
fn the_same_inputs_give_the_same_edits() {
    for (tree, facts) in guest_trees::all() {
        assert_eq!(with(&facts, everything(), &[]).edits, with(&facts, everything(), &[]).edits, "{tree}");
    }
}

#[test]
fn leftovers_of_the_build_machine_are_removed_with_a_reason() {
    let injection = with(&guest_trees::debian_ifupdown(), everything(), &[]);
    for path in [
        "/etc/ssh/ssh_host_rsa_key",
        "/etc/ssh/ssh_host_rsa_key.pub",
        "/var/lib/dhcp/dhclient.ens3.leases",
        "/etc/udev/rules.d/70-persistent-net.rules",
    ] {
        assert!(removed(&injection, path), "{path}");
        assert!(!edit(&injection, path).expect("edit").why.is_empty());
    }
    let seed = edit(&injection, "/var/lib/systemd/random-seed").expect("an edit");
    assert!(seed.secret && matches!(&seed.op, EditOp::WriteFile { content, attrs } if content.len() == 512 && attrs.mode == 0o600), "an own seed");
    let of_key = injection.edits.iter().filter(|edit| edit.path.to_string() == "/etc/ssh/ssh_host_ed25519_key").count();
    assert_eq!(of_key, 1, "a key that is written anew is not removed first");
    let kept = with(&guest_trees::debian_ifupdown(), json!({"ssh_host_keys": "keep"}), &[]);
    assert!(edit(&kept, "/etc/ssh/ssh_host_rsa_key").is_none() && kept.report.ssh_host_keys.is_empty());
    let gone = with(&guest_trees::debian_ifupdown(), json!({"ssh_host_keys": "remove"}), &[]);
    assert!(removed(&gone, "/etc/ssh/ssh_host_ed25519_key") && gone.report.warnings.iter().any(|warning| warning.contains("host keys")));
    assert!(removed(&with(&guest_trees::ubuntu_netplan(), json!({}), &[]), "/var/lib/cloud/instance"));
}

#[test]
fn host_names_follow_the_habit_of_the_distribution() {
    let short = with(&guest_trees::debian_ifupdown(), everything(), &[]);
    assert_eq!(text(&short, "/etc/hostname"), "web1\n");
    assert!(text(&short, "/etc/hosts").contains("127.0.1.1\tweb1.example.com web1\n"));
    assert!(!text(&short, "/etc/hosts").contains("builder"));
    assert_eq!(text(&with(&guest_trees::fedora_network_manager(), everything(), &[]), "/etc/hostname"), "web1.example.com\n");
    assert_eq!(text(&with(&guest_trees::debian_ifupdown(), json!({}), &[]), "/etc/hostname"), "web1\n", "the instance's name where none is given");
}

#[test]
fn host_keys_are_reported_with_fingerprint_and_known_hosts_line() {
    let injection = with(&guest_trees::debian_ifupdown(), everything(), &[]);
    let keys = &injection.report.ssh_host_keys;
    assert_eq!(keys.iter().map(|key| key.algorithm.as_str()).collect::<Vec<_>>(), ["ssh-ed25519", "ecdsa-sha2-nistp256"]);
    for key in keys {
        assert!(key.fingerprint.starts_with("SHA256:"));
        assert!(key.known_hosts.starts_with(&format!("web1.example.com,web1,192.0.2.10 {} AAAA", key.algorithm)), "{}", key.known_hosts);
    }
}

#[test]
fn users_must_exist_in_the_image_and_have_a_home() {
    let facts = guest_trees::debian_ifupdown();
    for (user, reason) in [("bob", "NO_SUCH_USER"), ("nobody", "USER_WITHOUT_HOME")] {
        let error = try_with(&facts, &config(json!({"authorized_keys": {user: [KEY]}})), &[]).expect_err("refused");
        assert_eq!((error.kind(), error.reason()), (Kind::InvalidRequest, reason));
        assert_eq!(error.violations()[0].field, format!("authorized_keys.{user}"));
    }
    let mut climbing = facts.clone();
    put(&mut climbing, "/etc/passwd", &Is::Text("root:x:0:0::/root/../etc:/bin/sh\n"));
    assert!(try_with(&climbing, &config(json!({"authorized_keys": {"root": [KEY]}})), &[]).is_err());
    let mut linked = facts;
    put(&mut linked, "/root/.ssh", &Is::To("/etc/ssh"));
    let injection = with(&linked, json!({"authorized_keys": {"root": [KEY]}}), &[]);
    let order: Vec<&str> = injection.edits.iter().filter(|edit| edit.path.to_string() == "/root/.ssh").map(|edit| edit.op.verb()).collect();
    assert_eq!(order, ["remove", "mkdir"], "a link does not lead the keys elsewhere");
}

#[test]
fn a_world_readable_shadow_is_narrowed_and_an_inline_password_moves() {
    let mut facts = guest_trees::debian_ifupdown();
    own(&mut facts, "/etc/shadow", 0o644, 0, 42);
    put(&mut facts, "/etc/passwd", &Is::Text("root::0:0:root:/root:/bin/bash\nx:y:1:1::/:/x\n"));
    let injection = with(&facts, json!({"root_password_hash": HASH}), &[]);
    assert!(matches!(&edit(&injection, "/etc/shadow").expect("written").op, EditOp::WriteFile { attrs, .. } if attrs.mode == 0o640));
    assert_eq!(text(&injection, "/etc/passwd"), "root:x:0:0:root:/root:/bin/bash\nx:y:1:1::/:/x\n");
    let untouched = with(&facts, json!({}), &[]);
    assert!(edit(&untouched, "/etc/shadow").is_none() && untouched.report.warnings.iter().any(|warning| warning.contains("empty password")));
}

#[test]
fn a_claimed_back_end_file_leaves_the_whole_network_to_the_template() {
    let injection = with(&guest_trees::debian_ifupdown(), one_nic(json!({})), &["/etc/network/interfaces", "/etc/hosts", "/etc/hostname"]);
    for path in ["/etc/network/interfaces", "/etc/hosts", "/etc/hostname"] {
        assert!(edit(&injection, path).is_none(), "{path} belongs to a template");
    }
    let network = injection.report.network.as_ref().expect("network");
    assert_eq!(network.backend, "template");
    assert!(injection.report.notes.iter().any(|note| note.contains("/etc/hosts is left to a template")), "{:?}", injection.report.notes);
    let mine = with(&guest_trees::debian_ifupdown(), one_nic(json!({"files": [{"path": "/etc/resolv.conf", "content": "mine\n"}]})), &[]);
    assert_eq!(text(&mine, "/etc/resolv.conf"), "mine\n", "a file of the request wins");
    let other = with(&guest_trees::fedora_network_manager(), one_nic(json!({})), &["/etc/network/interfaces"]);
    assert_eq!(other.report.network.expect("network").backend, "network-manager", "another back-end's file decides nothing");
}

#[test]
fn an_image_without_network_tooling_is_refused_unless_a_template_or_nobody_needs_it() {
    let mut facts = guest_trees::alpine_ifupdown_ng();
    facts.nodes.remove("/sbin/ifup");
    let two = json!({"network": {"interfaces": [{"name": "eth0", "addresses": ["192.0.2.10/24", "192.0.2.11/24"]}]}});
    let error = try_with(&facts, &config(two), &[]).expect_err("refused");
    assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "NO_NETWORK_BACKEND"));
    assert_eq!(with(&facts, one_nic(json!({})), &["/etc/network/interfaces"]).report.network.expect("network").backend, "template");
    assert!(with(&facts, json!({}), &[]).report.network.is_none());
    assert_eq!(with(&facts, json!({"network": {}}), &[]).report.network.expect("network").backend, "none");
    let forced = try_with(&guest_trees::debian_ifupdown(), &config(json!({"network": {"backend": "netplan"}})), &[]).expect_err("refused");
    assert_eq!(forced.reason(), "BACKEND_NOT_IN_IMAGE");
}

#[test]
fn dhcp_profiles_of_the_image_for_the_same_device_go_and_others_stay() {
    let mut facts = guest_trees::arch_networkd();
    put(&mut facts, "/etc/systemd/network/05-wlan.network", &Is::Text("[Match]\nType=wlan\n[Network]\nDHCP=yes\n"));
    put(&mut facts, "/etc/systemd/network/30-eth7.network", &Is::Text("[Match]\nName=eth7\n[Network]\nDHCP=yes\n"));
    put(&mut facts, "/etc/systemd/network/40-x.link", &Is::Text("[Match]\nMACAddress=52:54:00:00:00:01\n[Link]\nName=lan7\n"));
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert!(removed(&injection, "/etc/systemd/network/20-ethernet.network") && removed(&injection, "/etc/systemd/network/40-x.link"));
    assert!(edit(&injection, "/etc/systemd/network/05-wlan.network").is_none() && edit(&injection, "/etc/systemd/network/30-eth7.network").is_none());
    let mut facts = guest_trees::debian_ifupdown();
    put(&mut facts, "/etc/network/interfaces.d/50-cloud-init", &Is::Text("auto eth0\niface eth0 inet dhcp\n"));
    put(&mut facts, "/etc/network/interfaces.d/vpn", &Is::Text("iface tap0 inet manual\n"));
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert!(removed(&injection, "/etc/network/interfaces.d/50-cloud-init") && edit(&injection, "/etc/network/interfaces.d/vpn").is_none());
    assert!(text(&injection, "/etc/network/interfaces").contains("source /etc/network/interfaces.d/*\n"));
}

#[test]
fn managers_that_are_not_chosen_are_kept_off_the_interfaces() {
    let mut facts = guest_trees::fedora_network_manager();
    let forced = |document: Value| {
        let mut document = one_nic(document);
        document["network"]["backend"] = json!("networkd");
        document
    };
    let injection = with(&facts, forced(json!({})), &[]);
    assert!(text(&injection, "/etc/NetworkManager/conf.d/90-cloudlet-unmanaged.conf").contains("unmanaged-devices=mac:52:54:00:00:00:01\n"));
    assert!(edit(&injection, "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service").is_some(), "networkd is enabled");
    put(&mut facts, "/usr/sbin/ifup", &Is::Present);
    put(&mut facts, "/etc/network/interfaces", &Is::Text("auto eth0\niface eth0 inet dhcp\n"));
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert!(!text(&injection, "/etc/network/interfaces").contains("eth0"));
    put(&mut facts, "/usr/sbin/dhcpcd", &Is::Present);
    put(&mut facts, "/usr/lib/systemd/system/dhcpcd.service", &Is::Present);
    put(&mut facts, "/etc/systemd/system/multi-user.target.wants/dhcpcd.service", &Is::To("/usr/lib/systemd/system/dhcpcd.service"));
    assert!(removed(&with(&facts, one_nic(json!({})), &[]), "/etc/systemd/system/multi-user.target.wants/dhcpcd.service"));
}

#[test]
fn resolv_conf_follows_its_policy() {
    let resolved = |facts: &mut GuestFacts| {
        put(facts, "/usr/lib/systemd/systemd-resolved", &Is::Present);
        put(facts, "/usr/lib/systemd/system/systemd-resolved.service", &Is::Present);
        put(facts, "/etc/systemd/system/sysinit.target.wants/systemd-resolved.service", &Is::To("/usr/lib/systemd/system/systemd-resolved.service"));
    };
    let stub = Is::To("../run/systemd/resolve/stub-resolv.conf");
    let path = "/etc/resolv.conf";
    let is_file = |facts: &GuestFacts| edit(&with(facts, one_nic(json!({})), &[]), path).is_some_and(|edit| edit.op.verb() == "write");
    let debian = guest_trees::debian_ifupdown();
    assert!(is_file(&debian), "a plain file is written");
    let mut facts = debian.clone();
    put(&mut facts, path, &stub);
    assert!(is_file(&facts), "a stub that nobody maintains is replaced");
    resolved(&mut facts);
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert!(edit(&injection, path).is_none(), "resolved's stub stays");
    assert!(text(&injection, "/etc/systemd/resolved.conf.d/90-cloudlet.conf").contains("DNS=192.0.2.53\n"), "ifupdown can't tell resolved");
    put(&mut facts, "/etc/network/if-up.d/resolved", &Is::Present);
    assert!(
        text(&with(&facts, one_nic(json!({})), &[]), "/etc/network/interfaces").contains("dns-nameservers 192.0.2.53\n"),
        "unless there is a hook"
    );
    let mut facts = debian.clone();
    put(&mut facts, path, &Is::To("/run/resolvconf/resolv.conf"));
    assert!(is_file(&facts), "a link of a resolvconf that is not there is replaced");
    put(&mut facts, "/usr/sbin/resolvconf", &Is::Present);
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert!(edit(&injection, path).is_none() && text(&injection, "/etc/network/interfaces").contains("dns-nameservers 192.0.2.53"));
    let mut facts = guest_trees::arch_networkd();
    facts.nodes.remove(path);
    assert!(
        edit(&with(&facts, one_nic(json!({})), &[]), path).is_some_and(|edit| edit.op.verb() == "symlink"),
        "resolved without a file gets its link"
    );
    let fedora = guest_trees::fedora_network_manager();
    assert!(!is_file(&fedora), "NetworkManager writes it");
    let mut facts = fedora;
    put(&mut facts, "/etc/NetworkManager/conf.d/dns.conf", &Is::Text("[main]\ndns=none\n"));
    assert!(is_file(&facts), "unless told not to");
    let many = json!({"network": {"interfaces": [{"name": "eth0", "addresses": ["192.0.2.10/24"]}], "nameservers": ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"]}});
    let injection = with(&debian, many, &[]);
    assert_eq!(text(&injection, path).matches("nameserver").count(), 3);
    assert!(injection.report.warnings.iter().any(|warning| warning.contains("192.0.2.4 left out")), "{:?}", injection.report.warnings);
}

#[test]
fn presets_are_made_into_links_because_a_machine_id_ends_the_first_boot() {
    let mut facts = guest_trees::invented_future();
    put(&mut facts, "/usr/sbin/NetworkManager", &Is::Present);
    put(&mut facts, "/usr/lib/systemd/system/NetworkManager.service", &Is::Present);
    put(&mut facts, "/usr/lib/systemd/system-preset/90-default.preset", &Is::Text("enable NetworkManager.service\ndisable *\n"));
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert_eq!(injection.report.network.as_ref().expect("network").backend, "network-manager");
    assert!(edit(&injection, "/etc/systemd/system/multi-user.target.wants/NetworkManager.service").is_some());
}

#[test]
fn a_preset_never_beats_a_link_that_starts_another_tool() {
    let mut facts = guest_trees::debian_ifupdown();
    put(&mut facts, "/etc/machine-id", &Is::Text(""));
    put(&mut facts, "/usr/lib/systemd/systemd-networkd", &Is::Present);
    put(&mut facts, "/usr/lib/systemd/system/systemd-networkd.service", &Is::Present);
    put(&mut facts, "/usr/lib/systemd/system-preset/90-systemd.preset", &Is::Text("enable systemd-networkd.service\n"));
    let injection = with(&facts, one_nic(json!({})), &[]);
    assert_eq!(injection.report.network.as_ref().expect("network").backend, "ifupdown");
}

#[test]
fn fstab_names_the_root_and_reports_devices_of_the_build_machine() {
    let mut facts = guest_trees::debian_ifupdown();
    put(&mut facts, "/etc/fstab", &Is::Text("UUID=old / ext4 noatime 0 1\nUUID=esp /boot/efi vfat umask=0077 0 1\n/dev/sdb /data ext4 nofail 0 2\n"));
    let injection = with(&facts, json!({}), &[]);
    assert!(text(&injection, "/etc/fstab").starts_with(&format!("{} / ext4 noatime 0 1\nUUID=esp /boot/efi", root_mount().source)));
    let warned: Vec<&String> = injection.report.warnings.iter().filter(|warning| warning.contains("/etc/fstab")).collect();
    assert!(warned.len() == 1 && warned[0].contains("/boot/efi"), "{warned:?}");
}

/// Files of the image that injection reads.
const READ: [&str; 22] = [
    "/etc/passwd",
    "/etc/shadow",
    "/etc/hosts",
    "/etc/fstab",
    "/etc/resolv.conf",
    "/etc/network/interfaces",
    "/etc/network/interfaces.d/x",
    "/etc/NetworkManager/system-connections/x",
    "/etc/NetworkManager/NetworkManager.conf",
    "/etc/systemd/network/x.network",
    "/etc/systemd/network/x.link",
    "/etc/ssh/sshd_config",
    "/usr/lib/os-release",
    "/usr/lib/systemd/system-preset/x.preset",
    "/etc/systemd/network/x.netdev",
    "/etc/sysconfig/network",
    "/etc/sysconfig/network/config",
    "/etc/sysconfig/network/ifcfg-eth0",
    "/etc/sysconfig/network-scripts/ifcfg-eth0",
    "/etc/sysconfig/network-scripts/ifcfg-\u{1b}:x",
    "/etc/conf.d/net",
    "/etc/cloud/cloud.cfg.d/x.cfg",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_content_or_link_in_an_image_makes_injection_panic_or_write_control_characters(
        which in 0..READ.len(), tree in 0..22usize, link in any::<bool>(),
        content in "(root|eth0|\\[Match\\]|Name=|DEVICE=|NETCONFIG_DNS_STATIC_SERVERS=|iface |auto |:|=|/|\\.\\./|\\*|\\[|\n|\\PC|\u{1b}|\u{0}|UUID=x / |0|\t| ){0,40}",
    ) {
        let (_, mut facts) = guest_trees::all().swap_remove(tree);
        let is = if link { Is::To(&content) } else { Is::Text(&content) };
        put(&mut facts, READ[which], &is);
        let document = one_nic(json!({"hostname": "web1.example.com", "root_password_hash": HASH}));
        if let Ok(injection) = try_with(&facts, &config(document), &[]) {
            let report = serde_json::to_string(&injection.report).expect("report");
            prop_assert!(!report.contains("\\u00") && !report.contains("\\n"), "{}", report);
            for edit in &injection.edits {
                prop_assert!(!edit.path.display().contains("/../"));
            }
        }
    }

    #[test]
    fn no_document_makes_decoding_panic(text in "[\\[\\]{}\":,a-z0-9./\\\\ ]{0,80}") {
        let _ = decode::from_json(text.as_bytes(), Some(&name()));
    }
}

#[test]
fn a_seed_for_cloud_init_is_written_only_when_asked_for_and_cloud_init_is_let_run() {
    let mut facts = guest_trees::ubuntu_netplan();
    guest_trees::put(&mut facts, "/etc/cloud/cloud-init.disabled", &guest_trees::Is::Present);
    guest_trees::put(&mut facts, "/etc/cloud/cloud.cfg.d/99-off.cfg", &guest_trees::Is::Text("network: {config: disabled}\n"));
    let network = json!({"interfaces": [{"name": "eth0", "dhcp4": true}], "backend": "cloud-init"});
    let injection = with(&facts, json!({"network": network}), &[]);
    assert_eq!(injection.report.network.as_ref().expect("network").backend, "cloud-init");
    assert!(text(&injection, "/var/lib/cloud/seed/nocloud/network-config").contains("version: 2\nethernets:\n  \"eth0\":\n"));
    assert!(text(&injection, "/var/lib/cloud/seed/nocloud/user-data").starts_with("#cloud-config\n"));
    assert!(text(&injection, "/etc/cloud/cloud.cfg.d/99_zz_cloudlet_datasource.cfg").contains("datasource_list: [ NoCloud, None ]"));
    for removed in ["/etc/cloud/cloud-init.disabled", "/etc/cloud/cloud.cfg.d/99-off.cfg"] {
        assert!(matches!(edit(&injection, removed).expect(removed).op, EditOp::Remove), "{removed}");
    }
    assert!(edit(&injection, "/etc/cloud/cloud.cfg.d/99-cloudlet-network.cfg").is_none(), "it must not be kept off");
    assert!(edit(&injection, "/etc/netplan/50-cloudlet.yaml").is_none());
    let native = with(&facts, json!({"network": {"interfaces": [{"name": "eth0", "dhcp4": true}]}}), &[]);
    assert!(!native.edits.iter().any(|edit| edit.path.to_string().starts_with("/var/lib/cloud/seed")), "not unless asked for");
}

#[test]
fn what_a_back_end_can_not_express_is_refused_and_not_left_out() {
    let tree = |name: &str| guest_trees::all().into_iter().find(|(known, _)| *known == name).expect(name).1;
    let vlan = |name: &str| json!({"name": name, "vlan": {"id": 5, "link": "eth0"}});
    for (name, interfaces, what) in [
        ("gentoo-netifrc", json!([{"name": "eth0"}, vlan("eth0.5"), {"name": "eth0_5"}]), "eth0_5"),
        ("centos-7-ifcfg", json!([{"name": "eth0"}, vlan("uplink")]), "eth0.5 or vlan5"),
        ("centos-7-ifcfg", json!([{"name": "eth0", "addresses": ["192.0.2.1/24"], "link_local": false}]), "link-local"),
        ("rocky-9-network-manager", json!([{"name": "eth0", "addresses": ["2001:db8::1/64"], "link_local": false}]), "link-local"),
    ] {
        let error = try_with(&tree(name), &config(json!({"network": {"interfaces": interfaces}})), &[]).expect_err(what);
        assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "NETWORK_NOT_EXPRESSIBLE"), "{name}");
        assert!(error.message().contains(what), "{}", error.message());
    }
}

#[test]
fn the_kernels_argument_is_in_the_report_of_an_image_without_tooling() {
    let facts = guest_trees::all().into_iter().find(|(name, _)| *name == "appliance-kernel-ip").expect("a tree").1;
    let report = with(&facts, one_nic(json!({})), &[]).report;
    let network = report.network.expect("network");
    assert_eq!(
        (network.backend.as_str(), &network.kernel_arguments[..]),
        ("kernel-ip", &["ip=192.0.2.10::192.0.2.1:255.255.255.0:::off".to_owned()][..])
    );
    assert!(report.warnings.iter().any(|warning| warning.contains("must be booted with ip=")), "{:?}", report.warnings);
}

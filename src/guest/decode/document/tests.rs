use serde_json::{Value, json};

use super::*;
use crate::guest::{applied::network_value, config::InstanceConfig, decode};

/// The model in the form of our own documents, without what has its default.
fn model(text: &str) -> Value {
    let network = from_text(text).unwrap_or_else(|error| panic!("{}: {:?}", error.chain(), error.violations()));
    let document = json!({"instance": "web1", "network": {"document": text}});
    let decoded: InstanceConfig = decode::from_value(&document, None).unwrap_or_else(|error| panic!("{:?}", error.violations())).config;
    assert_eq!(decoded.network, Some(network.clone()));
    bare(network_value(&network))
}

fn bare(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let nothing = |value: &Value| matches!(value, Value::Null | Value::Bool(false)) || value == &json!([]) || value == &json!("unicast");
            members.into_iter().map(|(name, value)| (name, bare(value))).filter(|(_, value)| !nothing(value)).collect()
        }
        Value::Array(items) => items.into_iter().map(bare).collect(),
        other => other,
    }
}

fn refused_at(text: &str) -> (String, String) {
    let error = from_text(text).expect_err(text);
    let violation = &error.violations()[0];
    assert!(!violation.description.chars().any(char::is_control), "{violation:?}");
    (violation.field.clone(), violation.description.clone())
}

const NETPLAN: &str = r#"
# As an installer writes it.
network:
  version: 2
  renderer: networkd
  ethernets:
    a-nic:
      match: {macaddress: "52:54:00:AA:00:01"}
      set-name: wan0
      dhcp4: no
      addresses: [192.0.2.10/24, "2001:db8::10/64"]
      gateway6: fe80::1
      routes:
        - to: default
          via: 192.0.2.1
          metric: 50
        - {to: 10.0.0.0/8, via: 203.0.113.9, on-link: true, table: 100}
        - {to: 198.51.100.0/24, type: blackhole}
      nameservers: &dns
        addresses: [192.0.2.53]
        search: [example.com]
      mtu: 9000
      accept-ra: false
      optional: true
    eth1: {link-local: []}
    eth2: {}
  bonds:
    bond0:
      interfaces: [eth1, eth2]
      macaddress: 02:00:00:00:00:01
      parameters: {mode: 802.3ad, lacp-rate: fast, mii-monitor-interval: 1s, transmit-hash-policy: layer3+4}
      nameservers: *dns
  bridges:
    br0: {interfaces: [], dhcp4: true, dhcp4-overrides: {route-metric: 700, use-dns: true}, parameters: {forward-delay: 4}}
  vlans:
    v5: {id: 5, link: a-nic, dhcp6: true, ipv6-privacy: true}
"#;

#[test]
fn netplans_document_becomes_the_model() {
    let dns = json!(["192.0.2.53"]);
    let want = json!({"interfaces": [
        {
            "name": "wan0", "mac": "52:54:00:aa:00:01", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1",
            "gateway6": "fe80::1", "metric": 50, "optional": true, "mtu": 9000, "nameservers": dns, "search": ["example.com"],
            "routes": [
                {"to": "10.0.0.0/8", "via": "203.0.113.9", "on_link": true, "table": 100},
                {"to": "198.51.100.0/24", "type": "blackhole"},
            ],
        },
        {"name": "eth1"},
        {"name": "eth2"},
        {
            "name": "bond0", "mac": "02:00:00:00:00:01", "nameservers": dns, "search": ["example.com"],
            "bond": {"members": ["eth1", "eth2"], "mode": "802.3ad", "miimon_ms": 1000, "lacp_rate": "fast", "xmit_hash_policy": "layer3+4"},
        },
        {"name": "br0", "dhcp4": true, "metric": 700, "bridge": {"stp": true, "forward_delay": 4}},
        {"name": "v5", "dhcp6": true, "ipv6_privacy": true, "vlan": {"id": 5, "link": "wan0"}},
    ]});
    assert_eq!(model(NETPLAN), want);
    assert_eq!(from_text(NETPLAN).expect("decodes").interfaces[1].link_local, Some(false));
}

#[test]
fn the_document_may_be_bare_or_json_or_an_object() {
    let object = json!({"version": 2, "ethernets": {"eth0": {"dhcp4": true}}});
    let want = json!({"interfaces": [{"name": "eth0", "dhcp4": true}]});
    assert_eq!(model(&object.to_string()), want);
    assert_eq!(model("version: 2\nethernets:\n  eth0:\n    dhcp4: true\n"), want);
    let document = json!({"instance": "a", "network": {"document": {"network": object}, "backend": "networkd"}});
    let network = decode::from_value(&document, None).expect("valid").config.network.expect("a network");
    assert_eq!(bare(network_value(&network)), json!({"interfaces": [{"name": "eth0", "dhcp4": true}], "backend": "networkd"}));
}

#[test]
fn version_1_becomes_the_model() {
    let text = r#"
version: 1
config:
  - {type: nameserver, address: [192.0.2.53, '2001:db8::53'], search: [example.com]}
  - type: physical
    name: eth0
    mac_address: '52:54:00:12:34:00'
    mtu: 1400
    subnets:
      - {type: static, address: 192.0.2.10, netmask: 255.255.255.0, gateway: 192.0.2.1, dns_nameservers: [192.0.2.54]}
      - {type: static6, address: '2001:db8::10/64', gateway: 'fe80::1'}
  - {type: physical, name: eth1}
  - {type: physical, name: eth2}
  - type: bond
    name: bond0
    bond_interfaces: [eth1, eth2]
    params: {bond-mode: 1, bond-miimon: 50, bond_primary: eth2}
    subnets: [{type: dhcp4}, {type: ipv6_slaac}]
  - {type: vlan, name: eth0.101, vlan_link: eth0, vlan_id: 101, subnets: [{type: static, address: 10.1.0.2/24}]}
  - {type: bridge, name: br0, bridge_interfaces: [eth0.101], params: {bridge_stp: 'off', bridge_fd: 0}}
  - {type: route, destination: 10.9.0.0, netmask: 255.255.0.0, gateway: 192.0.2.9, metric: 3}
"#;
    // The VLAN has an address and is a member of the bridge: that is refused later, the decoding is what counts here.
    let network = from_text(text).expect("decodes");
    let want = json!({
        "nameservers": ["192.0.2.53", "2001:db8::53"], "search": ["example.com"],
        "interfaces": [
            {
                "name": "eth0", "mac": "52:54:00:12:34:00", "mtu": 1400, "addresses": ["192.0.2.10/24", "2001:db8::10/64"],
                "gateway4": "192.0.2.1", "gateway6": "fe80::1", "nameservers": ["192.0.2.54"],
                "routes": [{"to": "10.9.0.0/16", "via": "192.0.2.9", "metric": 3}],
            },
            {"name": "eth1"},
            {"name": "eth2"},
            {"name": "bond0", "dhcp4": true, "accept_ra": true,
                "bond": {"members": ["eth1", "eth2"], "mode": "active-backup", "miimon_ms": 50, "primary": "eth2"}},
            {"name": "eth0.101", "addresses": ["10.1.0.2/24"], "vlan": {"id": 101, "link": "eth0"}},
            {"name": "br0", "bridge": {"members": ["eth0.101"], "forward_delay": 0}},
        ],
    });
    assert_eq!(bare(network_value(&network)), want);
}

#[test]
fn what_is_unknown_or_can_not_be_expressed_is_refused_with_its_path() {
    let eth0 = |rest: &str| format!("network: {{version: 2, ethernets: {{eth0: {{{rest}}}}}}}");
    for (text, field) in [
        ("network: {version: 3}".to_owned(), "network"),
        ("network: {version: 2, wifis: {wlan0: {}}}".into(), "network.wifis"),
        ("network: {version: 2}\nother: 1".into(), "other"),
        (eth0("dhcp: true"), "network.ethernets.eth0.dhcp"),
        (eth0("macaddress: '52:54:00:00:00:01'"), "network.ethernets.eth0.macaddress"),
        (eth0("match: {driver: virtio}"), "network.ethernets.eth0.match.driver"),
        (eth0("match: {name: 'en*'}"), "network.ethernets.eth0.match.name"),
        (eth0("match: {name: ens3}, set-name: eth9"), "network.ethernets.eth0.match"),
        (eth0("wakeonlan: true"), "network.ethernets.eth0.wakeonlan"),
        (eth0("addresses: [{192.0.2.1/24: {label: x}}]"), "network.ethernets.eth0.addresses[0]"),
        (eth0("addresses: ['192.0.2.1']"), "network.ethernets.eth0.addresses[0]"),
        (eth0("addresses: [\"192.0.2.1/24\\n\"]"), "network.ethernets.eth0.addresses[0]"),
        (eth0("routes: [{to: default, via: 192.0.2.1, from: 192.0.2.2}]"), "network.ethernets.eth0.routes[0].from"),
        (eth0("routes: [{to: default}]"), "network.ethernets.eth0.routes[0].to"),
        (eth0("dhcp4-overrides: {use-dns: false}"), "network.ethernets.eth0.dhcp4-overrides.use-dns"),
        (eth0("link-local: [ipv4]"), "network.ethernets.eth0.link-local"),
        (eth0("nameservers: {addresses: ['$(reboot)']}"), "network.ethernets.eth0.nameservers.addresses[0]"),
        (eth0("nameservers: {search: ['a b']}"), "network.ethernets.eth0.nameservers.search[0]"),
        ("network: {version: 2, bonds: {b: {interfaces: [nobody]}}}".into(), "network.bonds.b.interfaces[0]"),
        ("network: {version: 2, bonds: {b: {interfaces: [], parameters: {arp-interval: 5}}}}".into(), "network.bonds.b.parameters.arp-interval"),
        ("network: {version: 2, ethernets: {\"e\\nth0\": {}}}".into(), "network.ethernets.e\\nth0"),
        ("{version: 1, config: [{type: infiniband, name: ib0}]}".into(), "config[0].type"),
        (
            "{version: 1, config: [{type: physical, name: eth0, subnets: [{type: static, address: 192.0.2.1}]}]}".into(),
            "config[0].subnets[0].address",
        ),
        ("{version: 1, config: [{type: route, destination: 10.0.0.0/8, gateway: 192.0.2.1}]}".into(), "config[0]"),
        ("{version: 1, config: [{type: physical, name: eth0, wifi: 1}]}".into(), "config[0].wifi"),
        ("- a".into(), ""),
        ("version: 2\nversion: 2".into(), ""),
        (format!("version: 2\n#{}", "x".repeat(DOCUMENT_LEN_MAX)), ""),
    ] {
        let (found, why) = refused_at(&text);
        assert_eq!(found, field, "{}: {why}", text.chars().take(100).collect::<String>());
    }
}

#[test]
fn errors_inside_of_a_configuration_have_the_whole_path() {
    let document = json!({"instance": "a", "network": {"document": "network: {version: 2, ethernets: {eth0: {mtu: x}}}"}});
    let error = decode::from_value(&document, None).expect_err("refused");
    assert_eq!(error.violations()[0].field, "network.document.network.ethernets.eth0.mtu");
    let both = json!({"instance": "a", "network": {"document": "{version: 2}", "interfaces": []}});
    assert_eq!(decode::from_value(&both, None).expect_err("refused").violations()[0].field, "network.interfaces");
}

use serde_json::json;

use super::*;
use crate::guest::config::BackendKind;

fn name() -> InstanceName {
    "web1".parse().expect("name")
}

#[track_caller]
fn fails_at(value: Value, field: &str) -> String {
    let error = from_value(&value, Some(&name())).expect_err("must be refused");
    assert_eq!(error.kind(), Kind::InvalidRequest);
    let fields: Vec<&str> = error.violations().iter().map(|violation| violation.field.as_str()).collect();
    assert!(fields.contains(&field), "{fields:?} has no {field}");
    let chain = error.chain();
    assert!(!chain.chars().any(char::is_control), "{chain:?}");
    chain
}

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me@example";

fn full() -> Value {
    json!({
        "instance": "web1", "hostname": "web1.example.com", "args": {"title": "x"},
        "network": {
            "interfaces": [{
                "name": "eth0", "mac": "52:54:00:12:34:56", "addresses": ["192.0.2.10/24", "2001:db8::10/64"], "gateway4": "192.0.2.1",
                "gateway6": "fe80::1", "metric": 100, "mtu": 1500, "accept_ra": false, "dhcp4": false, "dhcp6": false,
                "routes": [{"to": "10.0.0.0/8", "via": "192.0.2.254", "metric": 5, "on_link": false}], "nameservers": ["fe80::53"], "search": ["lan"]
            }],
            "nameservers": ["192.0.2.53"], "search": ["example.com"], "backend": "netplan"
        },
        "authorized_keys": {"root": [KEY]}, "machine_id": "0123456789abcdef0123456789abcdef", "ssh_host_keys": "remove",
        "files": [{"path": "/etc/motd", "content": "hi\n", "mode": "0600", "uid": 3, "gid": 4}, {"path": "/x", "content_base64": "AAE="}]
    })
}

#[test]
fn the_whole_document_is_understood_and_its_network_goes_round() {
    let config = from_value(&full(), None).expect("valid").config;
    assert_eq!(config.instance.as_str(), "web1");
    let network = config.network.expect("network");
    assert_eq!(network.backend, Some(BackendKind::Netplan));
    assert_eq!(network.interfaces[0].addresses.len(), 2);
    assert_eq!((config.files[0].mode, config.files[0].uid, config.files[1].content.expose()), (0o600, 3, &[0u8, 1][..]));
    let again = from_value(&json!({"network": crate::guest::applied::network_value(&network)}), Some(&name())).expect("decodes what it encoded");
    assert_eq!(again.config.network, Some(network));
}

#[test]
fn errors_name_the_field_by_its_path() {
    fails_at(json!({"hostname": "a b"}), "hostname");
    fails_at(json!({"hostnam": "a"}), "hostnam");
    fails_at(json!({"network": {"interfaces": [{"name": "eth0"}, {"name": "eth1", "adresses": []}]}}), "network.interfaces[1].adresses");
    fails_at(
        json!({"network": {"interfaces": [{"name": "eth0", "addresses": ["192.0.2.1/24", "192.0.2.300/24"]}]}}),
        "network.interfaces[0].addresses[1]",
    );
    fails_at(json!({"network": {"interfaces": [{"addresses": []}]}}), "network.interfaces[0].name");
    fails_at(json!({"network": {"interfaces": [{"name": "eth0", "mtu": 70000}]}}), "network.interfaces[0].mtu");
    fails_at(json!({"network": {"interfaces": [{"name": "eth0", "routes": [{"to": "default"}]}]}}), "network.interfaces[0].routes[0].to");
    fails_at(json!({"authorized_keys": {"root": "x"}}), "authorized_keys.root");
    fails_at(json!({"authorized_keys": {"root": [KEY, "nonsense"]}}), "authorized_keys.root[1]");
    fails_at(json!({"files": [{"path": "/x", "content": "", "mode": 644}]}), "files[0].mode");
    fails_at(json!({"files": [{"path": "/../x", "content": ""}]}), "files[0].path");
    fails_at(json!({"instance": "other"}), "instance");
    fails_at(json!({"machine_id": "0".repeat(32)}), "machine_id");
    assert!(from_value(&json!({}), None).is_err(), "no name at all");
    assert!(from_json(b"{\"root_password_hash\": \"hunter2", Some(&name())).is_err_and(|error| !error.chain().contains("hunter2")));
}

#[test]
fn cleartext_passwords_are_refused_without_repeating_them() {
    let told = fails_at(json!({"root_password_hash": "hunter2hunter2"}), "root_password_hash");
    assert!(!told.contains("hunter2"), "{told}");
}

#[test]
fn no_field_lets_a_control_character_through() {
    for evil in ["\n", "\r\n", "\0", "\u{1b}", "\u{85}", "\u{2028}\n"] {
        let mut hits = 0;
        let mut document = full();
        attack(&mut document.clone(), &mut document, &mut Vec::new(), evil, &mut hits);
        assert!(hits > 15, "only {hits} strings attacked");
    }
}

/// Appends `evil` to every string of the document, one at a time, and expects that either it is refused or it is content.
fn attack(whole: &mut Value, here: &mut Value, path: &mut Vec<String>, evil: &str, hits: &mut usize) {
    match here {
        Value::String(text) => {
            let place = format!("/{}", path.join("/"));
            // Arguments and contents are data, never lines of configuration.
            if place.starts_with("/args") || place.ends_with("/content") {
                return;
            }
            let attacked = format!("{text}{evil}x");
            let slot = whole.pointer_mut(&place).expect("path of the same document");
            let old = std::mem::replace(slot, Value::String(attacked));
            *hits += 1;
            assert!(from_value(whole, Some(&name())).is_err(), "{place} takes {evil:?}");
            *whole.pointer_mut(&place).expect("still there") = old;
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                path.push(index.to_string());
                attack(whole, item, path, evil, hits);
                path.pop();
            }
        }
        Value::Object(fields) => {
            for (name, item) in fields.iter_mut() {
                path.push(name.clone());
                attack(whole, item, path, evil, hits);
                path.pop();
            }
        }
        _ => {}
    }
}

#[test]
fn the_form_of_2010_is_understood_with_its_synonyms() {
    let document = json!({
        "args": {"hostname": "db1.example.com", "size": 3},
        "dns": {"nameservers": ["192.0.2.53"], "domain": "example.com"},
        "ip": {"interfaces": [
            {"name": "eth0", "address": "192.0.2.10", "netmask": "255.255.255.0", "gateway": "192.0.2.1"},
            {"device": "eth1", "addr": "10.0.0.2", "prefix": 8, "colour": "blue"},
            {"name": "eth2", "address": "2001:db8::2/64", "gw": "fe80::1"}
        ]}
    });
    let decoded = from_value(&document, Some(&name())).expect("valid");
    let network = decoded.config.network.expect("network");
    let addresses: Vec<String> = network.interfaces.iter().flat_map(|interface| &interface.addresses).map(ToString::to_string).collect();
    assert_eq!(addresses, ["192.0.2.10/24", "10.0.0.2/8", "2001:db8::2/64"]);
    assert_eq!(network.interfaces[0].gateway4, Some([192, 0, 2, 1].into()));
    assert_eq!(decoded.config.hostname.map(|name| name.to_string()), Some("db1.example.com".into()));
    assert!(decoded.notes.len() == 1 && decoded.notes[0].contains("ip.interfaces[1].colour"), "{:?}", decoded.notes);
    let odd = from_value(&json!({"args": {"hostname": "not a name"}, "dns": {}}), Some(&name())).expect("valid");
    assert!(odd.config.hostname.is_none() && odd.notes.iter().any(|note| note.contains("args.hostname")), "{:?}", odd.notes);
    fails_at(json!({"ip": {"interfaces": [{"name": "eth0", "address": "192.0.2.10", "netmask": "255.0.255.0"}]}}), "ip.interfaces[0]");
    fails_at(json!({"ip": {"interfaces": [{"name": "eth0", "address": "192.0.2.10"}]}}), "ip.interfaces[0]");
}

#[test]
fn cross_field_rules_are_checked() {
    let network = |interfaces: Value| json!({"network": {"interfaces": interfaces}});
    let one = |extra: Value| {
        let mut interface = json!({"name": "eth0", "addresses": ["192.0.2.10/24", "2001:db8::10/64"]});
        for (name, value) in extra.as_object().expect("object") {
            interface[name] = value.clone();
        }
        network(json!([interface]))
    };
    let i0 = |field: &str| format!("network.interfaces[0].{field}");
    fails_at(network(json!([{"name": "eth0"}, {"name": "eth0"}])), "network.interfaces[1].name");
    fails_at(network(json!([{"name": "a", "mac": "52:54:00:aa:bb:cc"}, {"name": "b", "mac": "52-54-00-AA-BB-CC"}])), "network.interfaces[1].mac");
    fails_at(
        network(json!([{"name": "a", "addresses": ["192.0.2.1/24"]}, {"name": "b", "addresses": ["192.0.2.1/32"]}])),
        "network.interfaces[1].addresses[0]",
    );
    fails_at(one(json!({"mtu": 1279})), &i0("mtu"));
    fails_at(network(json!([{"name": "a", "mtu": 67}])), &i0("mtu"));
    for gateway in ["192.0.2.10", "192.0.2.0", "192.0.2.255", "0.0.0.0", "224.0.0.1", "127.0.0.1", "255.255.255.255"] {
        fails_at(one(json!({"gateway4": gateway})), &i0("gateway4"));
    }
    fails_at(one(json!({"gateway6": "ff02::1"})), &i0("gateway6"));
    fails_at(network(json!([{"name": "a", "gateway4": "192.0.2.1"}])), &i0("gateway4"));
    fails_at(one(json!({"routes": [{"to": "10.0.0.1/8", "via": "192.0.2.1"}]})), &i0("routes[0].to"));
    fails_at(one(json!({"routes": [{"to": "10.0.0.0/8", "via": "2001:db8::1"}]})), &i0("routes[0].via"));
    fails_at(one(json!({"routes": [{"to": "10.0.0.0/8", "via": "198.51.100.1"}]})), &i0("routes[0].via"));
    fails_at(one(json!({"nameservers": ["0.0.0.0"]})), &i0("nameservers[0]"));
    fails_at(json!({"network": {"nameservers": ["fe80::1"]}}), "network.nameservers[0]");
    let two = |metric: Value| {
        network(json!([
            {"name": "a", "addresses": ["192.0.2.10/24"], "gateway4": "192.0.2.1"},
            {"name": "b", "addresses": ["198.51.100.10/24"], "gateway4": "198.51.100.1", "metric": metric}
        ]))
    };
    fails_at(two(Value::Null), "network.interfaces[1].gateway4");
    assert!(from_value(&two(json!(200)), Some(&name())).is_ok());
    for name in ["lo", "all", "123", "eth0.5"] {
        fails_at(network(json!([{"name": name}])), &i0("name"));
    }
    for address in ["192.0.2.0/24", "192.0.2.255/24", "192.0.2.1/0", "0.1.2.3/8", "240.0.0.1/8", "::1/128", "ff02::1/64", "::ffff:1.2.3.4/96"] {
        fails_at(network(json!([{"name": "a", "addresses": [address]}])), &i0("addresses[0]"));
    }
    let many: Vec<Value> = (0..65).map(|index| json!({"name": format!("e{index}")})).collect();
    fails_at(network(many.into()), "network.interfaces");
    for good in ["192.0.2.0/31", "192.0.2.255/32", "169.254.1.1/16", "fe80::1/64", "2001:db8::1/128"] {
        assert!(from_value(&network(json!([{"name": "a", "addresses": [good]}])), Some(&name())).is_ok(), "{good}");
    }
    fails_at(json!({"files": [{"path": "/run/x", "content": ""}]}), "files[0].path");
    fails_at(json!({"files": [{"path": "/x", "content": ""}, {"path": "//x", "content": ""}]}), "files[1].path");
    fails_at(json!({"authorized_keys": [{"user": "root", "keys": []}, {"user": "root", "keys": []}]}), "authorized_keys.root");
}

#[test]
fn a_key_with_control_characters_inside_its_base64_is_refused_in_printable_words() {
    // An ed25519 key whose algorithm, in the base64, ends in U+0004.
    let key = "from6\"10.0.0.0/8\" ssh-ed25519 AAAAC3NzaC1lZDI1NTAEA5AAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me@example";
    let why = crate::guest::validate::check_authorized_key(key).expect_err("refused");
    assert!(!why.chars().any(char::is_control), "{why:?}");
}

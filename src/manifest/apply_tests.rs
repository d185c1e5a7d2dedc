use super::*;

fn edits_of(manifest: &Manifest, facts: &GuestFacts, context: &Value) -> Result<Vec<Edit>> {
    template_edits(manifest, facts, context.clone(), |sources, context, secret_args| expand(&sources, &context, secret_args))
}

use crate::guest::{config::HostKeys, facts::Node};

fn config(network: Option<Network>) -> InstanceConfig {
    InstanceConfig {
        instance: "web-1".parse().expect("a name"),
        hostname: Some("web1.example.com".parse().expect("a name")),
        args: Map::new(),
        network,
        authorized_keys: Vec::new(),
        root_password_hash: None,
        machine_id: None,
        ssh_host_keys: HostKeys::Fresh,
        files: Vec::new(),
        setup: Default::default(),
    }
}

fn network() -> Network {
    let cidr = |text: &str, prefix| Cidr { address: text.parse().expect("an address"), prefix };
    let mut eth0 = Interface::named("eth0".parse().expect("a name"));
    eth0.mac = Some("52:54:00:ab:cd:0f".parse().expect("a MAC"));
    eth0.addresses = vec![cidr("2001:db8::10", 64), cidr("192.0.2.10", 26)];
    eth0.gateway4 = Some(Ipv4Addr::new(192, 0, 2, 1));
    eth0.nameservers = vec!["192.0.2.54".parse().expect("an address")];
    let mut eth1 = Interface::named("eth1".parse().expect("a name"));
    eth1.addresses = vec![cidr("2001:db8:1::1", 64)];
    eth1.gateway6 = Some("fe80::1".parse().expect("an address"));
    let eth2 = Interface { dhcp4: true, ..Interface::named("eth2".parse().expect("a name")) };
    Network {
        interfaces: vec![eth0, eth1, eth2],
        nameservers: vec!["192.0.2.53".parse().expect("an address"), "192.0.2.54".parse().expect("an address")],
        search: vec!["example.com".parse().expect("a name")],
        backend: None,
    }
}

fn image() -> ImageInfo {
    ImageInfo { id: "img-00000000000000000000".into(), name: "debian".into() }
}

fn node(kind: NodeKind) -> Node {
    Node { kind, mode: 0o640, uid: 7, gid: 8 }
}

fn file(content: &[u8]) -> Node {
    node(NodeKind::File { size: content.len() as u64, content: Some(content.to_vec()) })
}

fn facts(nodes: &[(&str, Node)]) -> GuestFacts {
    let mut facts = GuestFacts::default();
    for (path, node) in nodes {
        for (slash, _) in path.match_indices('/').skip(1) {
            facts.nodes.entry(path[..slash].to_owned()).or_insert_with(|| self::node(NodeKind::Directory));
        }
        facts.nodes.insert((*path).to_owned(), node.clone());
    }
    facts
}

fn manifest(document: Value) -> Manifest {
    Manifest::parse(document.to_string().as_bytes()).expect("a manifest")
}

fn content(edit: &Edit) -> (&str, &Attrs) {
    match &edit.op {
        EditOp::WriteFile { content, attrs } => (std::str::from_utf8(content).expect("text"), attrs),
        _ => panic!("{edit:?} is not a write"),
    }
}

#[test]
fn the_context_has_the_shape_of_2010_and_more() {
    let context = context(&config(Some(network())), &Map::new(), &image());
    let eth0 = &context["ip"]["interfaces"][0];
    for (key, want) in [
        ("name", json!("eth0")),
        ("mac", json!("52:54:00:ab:cd:0f")),
        ("address", json!("192.0.2.10")),
        ("netmask", json!("255.255.255.192")),
        ("prefix", json!(26)),
        ("broadcast", json!("192.0.2.63")),
        ("network", json!("192.0.2.0")),
        ("gateway", json!("192.0.2.1")),
        ("address6", json!("2001:db8::10")),
    ] {
        assert_eq!(eth0[key], want, "{key}");
    }
    let eth1 = &context["ip"]["interfaces"][1];
    assert_eq!((&eth1["address"], &eth1["gateway"], &eth1["netmask"]), (&json!("2001:db8:1::1"), &json!("fe80::1"), &Value::Null));
    let eth2 = context["ip"]["interfaces"][2].as_object().expect("an object");
    assert!(eth2["address"].is_null() && eth2["dhcp"] == json!(true) && eth2.contains_key("netmask"));
    assert_eq!(context["dns"], json!({"nameservers": ["192.0.2.53", "192.0.2.54"], "search": ["example.com"]}));
    assert_eq!(context["instance"], json!({"name": "web-1", "hostname": "web1", "fqdn": "web1.example.com", "domain": "example.com"}));
    assert_eq!(context["image"]["name"], "debian");
}

#[test]
fn without_network_the_lists_are_empty() {
    let context = context(&config(None), &Map::new(), &image());
    assert_eq!(
        (&context["ip"]["interfaces"], &context["dns"]["nameservers"], &context["network"]["configured"]),
        (&json!([]), &json!([]), &json!(false))
    );
}

#[test]
fn netmasks_at_the_ends() {
    let shown = |prefix| address(&Cidr { address: "192.0.2.10".parse().expect("an address"), prefix });
    assert_eq!(shown(0)["netmask"], "0.0.0.0");
    assert_eq!((&shown(32)["netmask"], &shown(32)["broadcast"]), (&json!("255.255.255.255"), &Value::Null));
    assert_eq!(address(&Cidr { address: "2001:db8::1".parse().expect("an address"), prefix: 0 })["network"], "::");
}

#[test]
fn templates_become_edits_with_their_mode_and_owner() {
    let manifest = manifest(
        json!({"args": {"hostname": {"type": "string", "default": "debian-host"}}, "templates": ["/etc/hostname", "/etc/plain", "/etc/link", "/etc/resolv.conf"]}),
    );
    let facts = facts(&[
        ("/etc/hostname", file(b"<%= args.hostname %>\n")),
        ("/etc/plain", file(b"nothing to do\n")),
        ("/etc/link", node(NodeKind::Symlink { target: "hostname".into() })),
        ("/etc/resolv.conf", node(NodeKind::Symlink { target: "../run/resolv.conf".into() })),
        ("/run/resolv.conf", file(b"<% for n in dns.nameservers %>nameserver <%= n %>\n<% endfor %>")),
    ]);
    let args = manifest.resolve_args(&Map::new()).expect("defaults");
    let edits = edits_of(&manifest, &facts, &context(&config(Some(network())), &args, &image())).expect("edits");
    assert_eq!(edits.iter().map(|edit| edit.path.to_string()).collect::<Vec<_>>(), ["/etc/hostname", "/run/resolv.conf"]);
    let (text, attrs) = content(&edits[0]);
    assert_eq!((text, attrs.mode, attrs.uid, attrs.gid, edits[0].secret), ("debian-host\n", 0o640, 7, 8, false));
    assert_eq!(content(&edits[1]).0, "nameserver 192.0.2.53\nnameserver 192.0.2.54\n");
}

#[test]
fn what_is_wrong_with_a_template_is_said_with_field_and_path() {
    let large = node(NodeKind::File { size: 1 << 30, content: None });
    let cases = [
        ("/etc/missing", file(b""), "/etc/x", "TEMPLATE_NOT_IN_IMAGE", "not in the image"),
        ("/etc/x", node(NodeKind::Directory), "/etc/x", "TEMPLATE_NOT_A_FILE", "regular file"),
        ("/etc/x", node(NodeKind::Symlink { target: "/nowhere".into() }), "/etc/x", "TEMPLATE_NOT_IN_IMAGE", "leads nowhere"),
        ("/etc/x", node(NodeKind::Other), "/etc/x", "TEMPLATE_NOT_A_FILE", "regular file"),
        ("/etc/x", large, "/etc/x", "TEMPLATE_TOO_LARGE", "1073741824"),
        ("/etc/x", file(b"a\n\xff<%= 1 %>"), "/etc/x", "TEMPLATE_NOT_UTF8", "line 2"),
        ("/etc/x", file(b"a\n<%= args.y %>"), "/etc/x", "TEMPLATE_UNDEFINED", "line 2, column 5: `args.y` is undefined"),
        ("/etc/x", file(b"<% var y %>"), "/etc/x", "TEMPLATE_JAVASCRIPT", "JavaScript"),
    ];
    for (template, node, at, reason, part) in cases {
        let manifest = manifest(json!({"templates": ["/etc/ok", template]}));
        let facts = facts(&[("/etc/ok", file(b"ok")), (at, node)]);
        let error = edits_of(&manifest, &facts, &context(&config(None), &Map::new(), &image())).expect_err("wrong");
        assert_eq!((error.reason(), error.object(), error.violations()[0].field.as_str()), (reason, template, "templates[1]"), "{error:?}");
        assert!(error.message().contains(part), "{error:?}");
    }
}

#[test]
fn secrets_mark_the_edit_and_stay_out_of_errors() {
    let manifest = manifest(json!({
        "args": {"pw": {"type": "string", "format": "password"}, "pin": {"type": "integer", "writeOnly": true}},
        "templates": ["/a", "/b", "/c", "/d"]
    }));
    let args = manifest.resolve_args(json!({"pw": "hunter2", "pin": 123456}).as_object().expect("an object")).expect("right");
    let context = context(&config(None), &args, &image());
    let good = facts(&[
        ("/a", file(b"<%= args['pw'] %>")),
        ("/b", file(b"<%= args|json|upper %>")),
        ("/c", file(b"<%= 1 %>")),
        ("/d", file(b"<% set a = args %><%= a.pin %>")),
    ]);
    let edits = edits_of(&manifest, &good, &context).expect("edits");
    assert_eq!(edits.iter().map(|edit| edit.secret).collect::<Vec<_>>(), [true, true, false, true]);
    let bad = facts(&[("/a", file(b"<%= args.pin // 0 %>")), ("/b", file(b"")), ("/c", file(b"")), ("/d", file(b""))]);
    let error = edits_of(&manifest, &bad, &context).expect_err("division");
    assert!(!format!("{error:?} {:?}", error.violations()).contains("123456"), "{error:?}");
}

use serde_json::json;

use super::*;
use crate::{guest::decode, manifest::Manifest, progress::Progress};

/// A unified tarball in the shape of a published image.
fn tarball(metadata: &str, templates: &[(&str, &str)], rootfs: bool) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, content: &str| {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, content.as_bytes()).expect("append");
    };
    add("metadata.yaml", metadata);
    for (name, source) in templates {
        add(&format!("templates/{name}"), source);
    }
    if rootfs {
        add("rootfs/etc/os-release", "ID=alpine\n");
    }
    tar.into_inner().expect("a tarball")
}

const METADATA: &str = "architecture: x86_64
creation_date: 1700000000
properties:
  description: Alpine 3.20 (20261120)
  name: alpine-3.20-x86_64-default
  os: alpine
templates:
  /etc/hostname:
    when:
    - create
    - copy
    template: hostname.tpl
  /var/lib/cloud/seed/nocloud-net/user-data:
    when: [create, copy]
    template: user.tpl
    properties:
      default: |
        #cloud-config
        {}
  /etc/motd:
    when: [start]
    create_only: true
    template: motd.tpl
  /etc/issue:
    when: [create, start]
    template: issue.tpl
    mode: \"0600\"
  /etc/copied:
    when: [copy]
    template: hostname.tpl
";
const TEMPLATES: [(&str, &str); 5] = [
    ("hostname.tpl", "{{ container.name }}\n"),
    ("user.tpl", "{{ config_get(\"user.user-data\", properties.default) }}\n"),
    ("motd.tpl", "welcome\n"),
    ("issue.tpl", "{{ trigger }} {{ instance.architecture }} {{ config_get(\"user.port\", \"none\") }}\n"),
    ("unused.tpl", "{% for x in y %}{% endfor %}"),
];

fn imported(metadata: &str) -> Result<Value> {
    import::read(&mut &tarball(metadata, &TEMPLATES, true)[..], "image.tar", &Progress::default())
}

fn facts() -> GuestFacts {
    let node = |kind| crate::guest::facts::Node { kind, mode: 0o640, uid: 3, gid: 4 };
    let file = || NodeKind::File { size: 1, content: None };
    let nodes = [
        ("/", NodeKind::Directory),
        ("/etc", NodeKind::Directory),
        ("/etc/motd", file()),
        ("/etc/issue", NodeKind::Symlink { target: "issue.real".into() }),
        ("/etc/issue.real", file()),
    ];
    GuestFacts { nodes: nodes.into_iter().map(|(path, kind)| (path.to_owned(), node(kind))).collect(), ..GuestFacts::default() }
}

fn applied(templates: &[LxdTemplate], config: &str, facts: &GuestFacts, others: &[Edit]) -> Result<Applied> {
    let config = decode::from_json(config.as_bytes(), Some(&"web1".parse().expect("name"))).expect("valid").config;
    apply(templates, facts, &Instance { config: &config, arch: "x86_64", has_secrets: false }, others, pongo::render_all)
}

fn written(applied: &Applied) -> Vec<(String, String, u16)> {
    let one = |edit: &Edit| match &edit.op {
        EditOp::WriteFile { content, attrs } => (edit.path.to_string(), String::from_utf8_lossy(content).into_owned(), attrs.mode),
        other => panic!("{}", other.verb()),
    };
    applied.edits.iter().map(one).collect()
}

#[test]
fn a_tarball_of_lxd_becomes_a_manifest() {
    let manifest = imported(METADATA).expect("a manifest");
    assert_eq!(manifest["name"], "alpine-3.20-x86_64-default");
    assert_eq!((&manifest["arch"], &manifest["rootfs"]), (&json!("x86_64"), &json!({"prefix": "/rootfs"})));
    assert_eq!(manifest["lxd"]["files"].as_object().map(Map::len), Some(4), "what nothing refers to is left out");
    let parsed = Manifest::parse(manifest.to_string().as_bytes()).expect("a manifest");
    assert_eq!(parsed.lxd_templates().len(), 5);
    let split = import::read(&mut &tarball(METADATA, &TEMPLATES, false)[..], "lxd.tar", &Progress::default()).expect("a manifest");
    assert_eq!(split.get("rootfs"), None);
    for (metadata, what) in [("a: [", "is not YAML"), ("templates: 7", "must be an object")] {
        let error = imported(metadata).expect_err(what);
        assert!(error.message().contains(what), "{}", error.message());
    }
    let none = import::read(&mut &tar::Builder::new(Vec::new()).into_inner().expect("empty")[..], "x.tar", &Progress::default());
    assert!(none.expect_err("empty").message().contains("no metadata.yaml"));
}

#[test]
fn templates_are_applied_as_at_creation_and_first_start() {
    let manifest = Manifest::parse(imported(METADATA).expect("a manifest").to_string().as_bytes()).expect("valid");
    let result = applied(manifest.lxd_templates(), r#"{"args": {"port": 80}}"#, &facts(), &[]).expect("applied");
    assert_eq!(
        written(&result),
        [
            ("/etc/hostname".to_owned(), "web1\n".to_owned(), 0o644),
            // Through the link, and with the mode that the file has.
            ("/etc/issue.real".to_owned(), "start x86_64 80\n".to_owned(), 0o640),
            ("/var/lib/cloud/seed/nocloud-net/user-data".to_owned(), "#cloud-config\n{}\n\n".to_owned(), 0o644),
        ]
    );
    let notes = result.notes.join("\n");
    assert!(notes.contains("/etc/copied is not written") && notes.contains("/etc/motd is"), "{notes}");
    let fresh = applied(manifest.lxd_templates(), "{}", &GuestFacts::default(), &[]).expect("applied");
    assert!(written(&fresh).contains(&("/etc/motd".to_owned(), "welcome\n".to_owned(), 0o644)));
    assert!(written(&fresh).contains(&("/etc/issue".to_owned(), "start x86_64 none\n".to_owned(), 0o600)));
}

#[test]
fn templates_give_way_to_what_the_request_says() {
    let manifest = Manifest::parse(imported(METADATA).expect("a manifest").to_string().as_bytes()).expect("valid");
    let hostname = Edit {
        path: GuestPath::new("/etc/hostname").expect("a path"),
        op: EditOp::WriteFile { content: b"other\n".to_vec(), attrs: Attrs::root(0o644) },
        why: String::new(),
        secret: false,
    };
    let seeded = r#"{"cloud_init": {"user_data": "x"}}"#;
    let result = applied(manifest.lxd_templates(), seeded, &facts(), &[hostname]).expect("applied");
    assert_eq!(written(&result).into_iter().map(|(path, ..)| path).collect::<Vec<_>>(), ["/etc/issue.real"]);
    assert_eq!(result.notes.iter().filter(|note| note.contains("gives way")).count(), 2, "{:?}", result.notes);
    let mut directory = facts();
    directory.nodes.insert("/etc/hostname".into(), crate::guest::facts::Node { kind: NodeKind::Directory, mode: 0, uid: 0, gid: 0 });
    assert_eq!(applied(manifest.lxd_templates(), "{}", &directory, &[]).expect_err("a directory").reason(), "TEMPLATE_NOT_A_FILE");
}

#[test]
fn what_is_wrong_with_templates_is_named_by_field() {
    let check = |template: Value, files: Value| {
        let manifest = json!({"lxd": {"templates": {"/etc/x": template}, "files": files}});
        Manifest::parse(manifest.to_string().as_bytes()).map(drop)
    };
    let files = || json!({"a.tpl": "{{ container.name }}"});
    assert!(check(json!({"when": ["create"], "template": "a.tpl", "uid": 7, "mode": "4755"}), files()).is_ok());
    for (template, files, field) in [
        (json!({"when": ["create"], "template": "b.tpl"}), files(), "template"),
        (json!({"when": ["boot"], "template": "a.tpl"}), files(), "when"),
        (json!({"template": "a.tpl"}), files(), "when"),
        (json!({"when": [], "template": "a.tpl", "mode": "999"}), files(), "mode"),
        (json!({"when": [], "template": "a.tpl", "uid": -1}), files(), "uid"),
        (json!({"when": [], "template": "a.tpl", "mood": 1}), files(), "mood"),
        (json!({"when": [], "template": "a.tpl", "properties": {"a": []}}), files(), "properties.a"),
        (json!({"when": [], "template": "a.tpl"}), json!({"a.tpl": "{% for %}"}), "template"),
        (json!([]), files(), ""),
    ] {
        let error = check(template.clone(), files).expect_err(field);
        let expected = if field.is_empty() { "lxd.templates[\"/etc/x\"]".to_owned() } else { format!("lxd.templates[\"/etc/x\"].{field}") };
        assert_eq!(error.violations()[0].field, expected, "{template}: {error}");
    }
    let relative = json!({"lxd": {"templates": {"../etc/x": {"when": [], "template": "a"}}, "files": {"a": ""}}});
    assert!(Manifest::parse(relative.to_string().as_bytes()).is_err());
}

//! Accounts, identity and first boot on hand-made trees: what is written for whom, what is refused, what stays byte for byte.

use crate::common::guest_trees::{
    self, Is,
    injection::{Given, HASH, KEY, injected, name},
    put,
};
use cloudletd::{
    error::Error,
    fs::edit::{Edit, EditOp},
    guest::{Injection, decode, facts::GuestFacts},
    units::Timestamp,
};
use serde_json::{Value, json};

fn try_with(facts: &GuestFacts, document: &Value) -> Result<Injection, Error> {
    let config = decode::from_value(document, Some(&name()))?.config;
    injected(facts, &config, &Given { now: Timestamp { secs: 20_000 * 86_400, nanos: 0 }, ..Given::default() })
}

#[track_caller]
fn with(facts: &GuestFacts, document: Value) -> Injection {
    try_with(facts, &document).expect("injects")
}

fn edit<'a>(injection: &'a Injection, path: &str) -> Option<&'a Edit> {
    injection.edits.iter().rfind(|edit| edit.path.to_string() == path)
}

#[track_caller]
fn file<'a>(injection: &'a Injection, path: &str) -> (&'a str, u16, u32, u32) {
    match edit(injection, path).map(|edit| &edit.op) {
        Some(EditOp::WriteFile { content, attrs }) => (std::str::from_utf8(content).expect("text"), attrs.mode, attrs.uid, attrs.gid),
        _ => panic!("{path} is not written: {:?}", injection.edits),
    }
}

#[track_caller]
fn text<'a>(injection: &'a Injection, path: &str) -> &'a str {
    file(injection, path).0
}

fn removed(injection: &Injection, path: &str) -> bool {
    edit(injection, path).is_some_and(|edit| edit.op == EditOp::Remove)
}

fn bob() -> Value {
    json!({"name": "bob", "full_name": "Bob B", "groups": ["adm", "sudo"], "sudo": "nopasswd", "password_hash": HASH})
}

#[test]
fn a_user_is_made_in_all_account_files_with_home_skeleton_keys_and_sudo() {
    let injection = with(&guest_trees::debian_with_accounts(), json!({"users": [bob()], "authorized_keys": {"bob": [KEY]}}));
    assert!(text(&injection, "/etc/passwd").ends_with("\nbob:x:1001:1001:Bob B:/home/bob:/bin/bash\n"));
    assert!(text(&injection, "/etc/shadow").ends_with(&format!("\nbob:{HASH}:20000:0:99999:7:::\n")));
    assert_eq!(
        text(&injection, "/etc/group"),
        "root:x:0:\nadm:x:4:bob\nsudo:x:27:bob\nshadow:x:42:\nusers:x:100:\nnogroup:x:65534:\nada:x:1000:\nbob:x:1001:\n"
    );
    assert!(text(&injection, "/etc/gshadow").contains("adm:*::bob\nsudo:*::bob\n") && text(&injection, "/etc/gshadow").ends_with("bob:!::\n"));
    assert_eq!(text(&injection, "/etc/subuid"), "ada:100000:65536\nbob:165536:65536\n");
    assert_eq!(file(&injection, "/etc/gshadow").1, 0o640);
    assert_eq!(file(&injection, "/etc/sudoers.d/90-cloudlet"), ("# Written by cloudletd.\nbob ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440, 0, 0));
    for (path, mode) in [("/home/bob", 0o700), ("/home/bob/.config", 0o755), ("/home/bob/.ssh", 0o700)] {
        assert!(
            matches!(&edit(&injection, path).expect("made").op, EditOp::MakeDir { attrs } if (attrs.mode, attrs.uid, attrs.gid) == (mode, 1001, 1001)),
            "{path}"
        );
    }
    assert_eq!(file(&injection, "/home/bob/.profile"), ("# ~/.profile\n", 0o644, 1001, 1001));
    assert_eq!(file(&injection, "/home/bob/.config/app.conf"), ("a=1\n", 0o644, 1001, 1001));
    assert_eq!(file(&injection, "/home/bob/.ssh/authorized_keys").1, 0o600);
    let user = &injection.report.users[0];
    assert_eq!((user.uid, user.gid, user.created, user.password, user.sudo), (1001, 1001, true, "hash", "nopasswd"));
    let told = format!("{injection:?}{}", serde_json::to_string(&injection.report).expect("report"));
    assert!(!told.contains("qFmFH.bQmm"), "the hash is told");
}

#[test]
fn a_user_of_the_image_is_changed_and_keeps_what_is_not_named() {
    let facts = guest_trees::debian_with_accounts();
    let injection = with(&facts, json!({"users": [{"name": "ada", "uid": 1000, "groups": ["adm"], "lock_password": true, "shell": "/bin/bash"}]}));
    assert!(text(&injection, "/etc/passwd").ends_with("ada:x:1000:1000:Ada:/home/ada:/bin/bash\n"));
    assert!(text(&injection, "/etc/shadow").ends_with("ada:*:19000:0:99999:7:::\n"), "locked so that keys still work without PAM");
    assert!(edit(&injection, "/etc/subuid").is_none() && edit(&injection, "/home/ada").is_none());
    let cases = [
        (json!({"name": "ada", "uid": 7}), "users[0].uid", "USER_EXISTS"),
        (json!({"name": "ada", "home": "/srv/ada"}), "users[0].home", "USER_EXISTS"),
        (json!({"name": "bob", "uid": 1000}), "users[0].uid", "UID_TAKEN"),
        (json!({"name": "bob", "groups": ["adm", "wheel"]}), "users[0].groups[1]", "NO_SUCH_GROUP"),
        (json!({"name": "bob", "home": "/etc"}), "users[0].home", "USER_WITHOUT_HOME"),
    ];
    for (user, field, reason) in cases {
        let error = try_with(&facts, &json!({"users": [user]})).expect_err("refused");
        assert_eq!((error.violations()[0].field.as_str(), error.reason()), (field, reason));
    }
    let error = try_with(&guest_trees::debian_ifupdown(), &json!({"users": [{"name": "bob", "sudo": "nopasswd"}]})).expect_err("refused");
    assert_eq!(error.reason(), "NO_SUDO");
}

#[test]
fn values_that_would_break_an_account_file_are_refused_in_every_field() {
    let facts = guest_trees::debian_with_accounts();
    let hostile = ["a\nroot::0:0:::", "a:b", "a\u{1b}[2J", "a\u{85}", "a\0"];
    for value in hostile {
        for field in ["name", "full_name", "home", "shell", "password_hash", "sudo"] {
            let mut user = bob();
            let value = if matches!(field, "home" | "shell") { format!("/{value}") } else { value.to_owned() };
            user[field] = json!(value);
            assert!(try_with(&facts, &json!({"users": [user]})).is_err(), "{field} {value:?}");
        }
        let mut user = bob();
        user["groups"] = json!([value]);
        assert!(try_with(&facts, &json!({"users": [user]})).is_err(), "group {value:?}");
    }
    for name in ["", "-x", "1000", "%wheel", "ALL", "a b", "a,b", "#0", "é", "bob$", "+", &"x".repeat(33)] {
        let mut user = bob();
        user["name"] = json!(name);
        assert!(try_with(&facts, &json!({"users": [user]})).is_err(), "{name:?}");
    }
    assert!(try_with(&facts, &json!({"users": [bob(), bob()]})).is_err(), "twice");
    assert!(try_with(&facts, &json!({"users": [{"name": "bob", "uid": 0}]})).is_err(), "a second root");
}

#[test]
fn images_without_shadow_suite_files_and_with_doas_are_served() {
    let mut facts = guest_trees::alpine_ifupdown_ng();
    put(&mut facts, "/etc/group", &Is::Text("root:x:0:root\nwheel:x:10:root\n"));
    put(&mut facts, "/usr/bin/doas", &Is::Present);
    let injection = with(&facts, json!({"users": [{"name": "bob", "sudo": "password", "groups": ["wheel"]}]}));
    assert!(text(&injection, "/etc/passwd").ends_with("bob:x:1001:1001::/home/bob:/bin/sh\n"));
    assert!(text(&injection, "/etc/shadow").ends_with("bob:*:20000:0:99999:7:::\n"));
    assert_eq!(text(&injection, "/etc/group"), "root:x:0:root\nwheel:x:10:root,bob\nbob:x:1001:\n");
    assert!(edit(&injection, "/etc/gshadow").is_none() && edit(&injection, "/etc/subuid").is_none());
    assert_eq!(text(&injection, "/etc/doas.d/90-cloudlet.conf"), "# Written by cloudletd.\npermit persist bob\n");
    assert!(injection.report.warnings.iter().any(|warning| warning.contains("has none")), "{:?}", injection.report.warnings);
}

#[test]
fn roots_login_policy_comes_before_what_the_image_says() {
    let drop_in = "/etc/ssh/sshd_config.d/00-cloudlet.conf";
    let debian = guest_trees::debian_with_accounts();
    let injection = with(&debian, json!({"root_login": "keys-only"}));
    assert_eq!(text(&injection, drop_in), "# Written by cloudletd.\nPermitRootLogin prohibit-password\n");
    assert!(edit(&injection, "/etc/shadow").is_none());
    let mut facts = debian.clone();
    put(&mut facts, "/root/.ssh/authorized_keys", &Is::Present);
    put(&mut facts, "/etc/shadow", &Is::Text("root:$6$x$y:19000:0:99999:7:::\n"));
    put(
        &mut facts,
        "/etc/ssh/sshd_config",
        &Is::Text("PermitRootLogin yes\nInclude /etc/ssh/sshd_config.d/*.conf\nMatch User x\nPermitRootLogin yes\n"),
    );
    let injection = with(&facts, json!({"root_login": "no"}));
    assert!(text(&injection, "/etc/ssh/sshd_config").starts_with("# Written by cloudletd.\nPermitRootLogin no\nPermitRootLogin yes\n"));
    assert_eq!(text(&injection, "/etc/shadow"), "root:*:19000:0:99999:7:::\n");
    assert!(removed(&injection, "/root/.ssh/authorized_keys") && injection.report.warnings.iter().any(|warning| warning.contains("Match")));
    for document in [json!({"root_login": "no", "root_password_hash": HASH}), json!({"root_login": "no", "authorized_keys": {"root": [KEY]}})] {
        assert!(try_with(&facts, &document).is_err());
    }
    assert!(edit(&with(&debian, json!({})), drop_in).is_none(), "nothing is asked, nothing is written");
}

#[test]
fn regional_settings_go_where_the_distribution_keeps_them() {
    let wish = json!({"timezone": "Europe/Berlin", "locale": "de_DE.UTF-8", "keymap": "de", "hardware_clock": "local"});
    let mut debian = guest_trees::debian_with_accounts();
    put(&mut debian, "/usr/share/zoneinfo/Europe", &Is::Dir);
    put(&mut debian, "/etc/default/keyboard", &Is::Text("XKBMODEL=\"pc105\"\nXKBLAYOUT=\"us\"\n"));
    put(&mut debian, "/etc/adjtime", &Is::Text("0.5 17 0\n17\nUTC\n"));
    let injection = with(&debian, wish.clone());
    assert!(
        matches!(&edit(&injection, "/etc/localtime").expect("link").op, EditOp::Symlink { target, .. } if target == b"../usr/share/zoneinfo/Europe/Berlin")
    );
    assert_eq!(text(&injection, "/etc/timezone"), "Europe/Berlin\n");
    assert_eq!(text(&injection, "/etc/default/locale"), "LANG=\"de_DE.UTF-8\"\n");
    assert_eq!(text(&injection, "/etc/default/keyboard"), "XKBMODEL=\"pc105\"\nXKBLAYOUT=\"de\"\n");
    assert_eq!(text(&injection, "/etc/adjtime"), "0.5 17 0\n17\nLOCAL\n");
    assert!(injection.report.warnings.iter().any(|warning| warning.contains("de_DE.UTF-8")), "no data for it");
    let mut fedora = guest_trees::fedora_network_manager();
    put(&mut fedora, "/usr/share/zoneinfo/Europe", &Is::Dir);
    let injection = with(&fedora, wish.clone());
    assert_eq!((text(&injection, "/etc/locale.conf"), text(&injection, "/etc/vconsole.conf")), ("LANG=\"de_DE.UTF-8\"\n", "KEYMAP=\"de\"\n"));
    assert!(edit(&injection, "/etc/timezone").is_none());
    assert_eq!(try_with(&guest_trees::debian_ifupdown(), &wish).expect_err("no tzdata").reason(), "NO_TIMEZONE");
    for field in ["timezone", "locale", "keymap", "hardware_clock"] {
        for hostile in ["", "../../etc/passwd", "/etc/x", "a b", "a\nb", "$(id)", "a\"b", "\u{1b}[2J", "Europe/../../x", &"a".repeat(65)] {
            assert!(try_with(&debian, &json!({field: hostile})).is_err(), "{field} {hostile:?}");
        }
    }
}

#[test]
fn the_scrub_list_can_be_chosen() {
    let mut facts = guest_trees::debian_ifupdown();
    for path in ["/var/log/syslog.1", "/var/log/nginx/access.log", "/root/.bash_history", "/home/ada/.zsh_history", "/etc/passwd-", "/tmp/x"] {
        put(&mut facts, path, &Is::Present);
    }
    let injection = with(&facts, json!({"scrub_skip": ["dhcp", "random-seed"], "scrub_also": ["logs", "shell-history", "backup-files"]}));
    for path in ["/var/log/syslog.1", "/root/.bash_history", "/home/ada/.zsh_history", "/etc/passwd-", "/etc/udev/rules.d/70-persistent-net.rules"] {
        assert!(removed(&injection, path), "{path}");
    }
    for path in ["/var/log/nginx", "/var/lib/dhcp/dhclient.ens3.leases", "/var/lib/systemd/random-seed", "/tmp/x"] {
        assert!(edit(&injection, path).is_none(), "{path}");
    }
    for wrong in [json!({"scrub_skip": ["logs"]}), json!({"scrub_also": ["dhcp"]}), json!({"scrub_also": ["everything"]})] {
        assert!(try_with(&facts, &wrong).is_err(), "{wrong}");
    }
}

#[test]
fn host_keys_are_of_the_kinds_asked_for_or_of_the_kind_that_sshd_reads() {
    let algorithms = |injection: &Injection| injection.report.ssh_host_keys.iter().map(|key| key.algorithm.clone()).collect::<Vec<_>>();
    let mut facts = guest_trees::debian_ifupdown();
    let injection = with(&facts, json!({"ssh_host_key_types": ["ecdsa"], "hostname": "web1.example.com"}));
    assert_eq!(algorithms(&injection), ["ecdsa-sha2-nistp256"]);
    assert!(injection.report.ssh_host_keys[0].sshfp.as_ref().is_some_and(|record| record.starts_with("web1.example.com. IN SSHFP 3 2 ")));
    put(&mut facts, "/etc/ssh/sshd_config", &Is::Text("HostKey /etc/ssh/ssh_host_rsa_key\n"));
    let injection = with(&facts, json!({}));
    assert_eq!(algorithms(&injection), ["ssh-rsa"]);
    assert!(injection.report.warnings.is_empty(), "{:?}", injection.report.warnings);
    let mut dropbear = guest_trees::alpine_busybox();
    for path in ["/usr/sbin/sshd", "/etc/ssh/sshd_config"] {
        dropbear.nodes.remove(path);
    }
    put(&mut dropbear, "/usr/sbin/dropbear", &Is::Present);
    let injection = with(&dropbear, json!({}));
    assert_eq!(algorithms(&injection), ["ssh-ed25519"]);
    assert!(
        matches!(&edit(&injection, "/etc/dropbear/dropbear_ed25519_host_key").expect("key").op, EditOp::WriteFile { content, .. } if content.len() == 83)
    );
}

#[test]
fn cloud_init_is_kept_from_undoing_what_is_configured() {
    let injection = with(&guest_trees::ubuntu_netplan(), json!({}));
    assert_eq!(
        text(&injection, "/etc/cloud/cloud.cfg.d/99-cloudlet-identity.cfg"),
        "# Written by cloudletd.\npreserve_hostname: true\nssh_deletekeys: false\n"
    );
    let left = with(&guest_trees::ubuntu_netplan(), json!({"ssh_host_keys": "remove"}));
    assert!(!text(&left, "/etc/cloud/cloud.cfg.d/99-cloudlet-identity.cfg").contains("ssh_deletekeys"), "then cloud-init makes them");
    assert!(edit(&with(&guest_trees::debian_ifupdown(), json!({})), "/etc/cloud/cloud.cfg.d/99-cloudlet-identity.cfg").is_none());
}

const NGINX: &str =
    "[Unit]\nDescription=x\n[Service]\nExecStart=/usr/sbin/nginx\n[Install]\nWantedBy=multi-user.target\nAlias=web.service\nAlso=nginx.socket\n";

fn with_units() -> GuestFacts {
    let mut facts = guest_trees::debian_with_accounts();
    for (path, text) in [
        ("/usr/lib/systemd/system/nginx.service", NGINX),
        ("/usr/lib/systemd/system/nginx.socket", "[Socket]\nListenStream=80\n[Install]\nWantedBy=sockets.target\n"),
        ("/usr/lib/systemd/system/getty@.service", "[Service]\nExecStart=/sbin/agetty %I\n[Install]\nWantedBy=getty.target\nDefaultInstance=tty1\n"),
        ("/usr/lib/systemd/system/static.service", "[Service]\nExecStart=/bin/true\n"),
        ("/usr/lib/systemd/system/cron.service", "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"),
        ("/usr/lib/systemd/system/strange.service", "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=../../x %H.target\n"),
    ] {
        put(&mut facts, path, &Is::Text(text));
    }
    put(&mut facts, "/etc/systemd/system/multi-user.target.wants/cron.service", &Is::To("/lib/systemd/system/cron.service"));
    put(&mut facts, "/etc/systemd/system/crond.service", &Is::To("/lib/systemd/system/cron.service"));
    facts
}

fn link(injection: &Injection, path: &str) -> Option<String> {
    match &edit(injection, path)?.op {
        EditOp::Symlink { target, .. } => Some(String::from_utf8_lossy(target).into_owned()),
        _ => None,
    }
}

#[test]
fn units_are_enabled_disabled_and_masked_as_systemctl_does() {
    let facts = with_units();
    let unit = |name: &str, state: &str| json!({"name": name, "state": state});
    let injection = with(
        &facts,
        json!({"units": [unit("nginx.service", "enabled"), unit("getty@ttyS1.service", "enabled"), unit("cron.service", "disabled"), unit("apt.timer", "masked"),
               unit("own.service", "enabled")],
               "files": [{"path": "/etc/systemd/system/own.service", "content": "[Service]\nExecStart=/bin/true\n[Install]\nRequiredBy=multi-user.target\n"}]}),
    );
    let etc = "/etc/systemd/system";
    for (path, target) in [
        ("multi-user.target.wants/nginx.service", "/usr/lib/systemd/system/nginx.service"),
        ("web.service", "/usr/lib/systemd/system/nginx.service"),
        ("sockets.target.wants/nginx.socket", "/usr/lib/systemd/system/nginx.socket"),
        ("getty.target.wants/getty@ttyS1.service", "/usr/lib/systemd/system/getty@.service"),
        ("apt.timer", "/dev/null"),
        ("multi-user.target.requires/own.service", "/etc/systemd/system/own.service"),
    ] {
        assert_eq!(link(&injection, &format!("{etc}/{path}")).as_deref(), Some(target), "{path}");
    }
    assert!(removed(&injection, &format!("{etc}/multi-user.target.wants/cron.service")) && removed(&injection, &format!("{etc}/crond.service")));
    assert!(text(&injection, "/etc/systemd/system-preset/00-cloudlet.preset").contains("disable cron.service\n"));
    for (name, reason) in [("none.service", "NO_SUCH_UNIT"), ("static.service", "UNIT_STATIC"), ("strange.service", "UNIT_NOT_LINKABLE")] {
        assert_eq!(try_with(&facts, &json!({"units": [unit(name, "enabled")]})).expect_err("refused").reason(), reason, "{name}");
    }
    for name in ["nginx", "../x.service", "a/b.service", "x\n.service", ".service", "$(id).service", "@.service"] {
        assert!(try_with(&facts, &json!({"units": [unit(name, "enabled")]})).is_err(), "{name:?}");
    }
}

#[test]
fn openrc_services_and_first_boot_scripts_are_linked_into_the_default_runlevel() {
    let mut facts = guest_trees::alpine_ifupdown_ng();
    put(&mut facts, "/etc/init.d/nginx", &Is::Text("#!/sbin/openrc-run\n"));
    let injection = with(&facts, json!({"units": [{"name": "nginx.service", "state": "enabled"}], "first_boot_script": "#!/bin/sh\necho secret\n"}));
    assert_eq!(link(&injection, "/etc/runlevels/default/nginx").as_deref(), Some("/etc/init.d/nginx"));
    assert_eq!(link(&injection, "/etc/runlevels/default/cloudlet-first-boot").as_deref(), Some("/etc/init.d/cloudlet-first-boot"));
    assert_eq!(file(&injection, "/etc/init.d/cloudlet-first-boot").1, 0o755);
    assert_eq!(file(&injection, "/usr/local/sbin/cloudlet-first-boot").1, 0o700);
    assert!(!serde_json::to_string(&injection.report).expect("report").contains("echo secret"));
    let systemd = with(&guest_trees::debian_ifupdown(), json!({"first_boot_script": "#!/bin/sh\n"}));
    assert!(link(&systemd, "/etc/systemd/system/multi-user.target.wants/cloudlet-first-boot.service").is_some());
    for hostile in ["echo no interpreter", "", "#!/bin/sh\0"] {
        assert!(try_with(&facts, &json!({"first_boot_script": hostile})).is_err(), "{hostile:?}");
    }
}

#[test]
fn a_cloud_init_seed_is_written_for_one_instance_and_only_where_it_is_read() {
    let injection = with(
        &guest_trees::ubuntu_netplan(),
        json!({"hostname": "a.example.com", "cloud_init": {"user_data": "#cloud-config\n", "meta_data": {"x": "y: \n- z"}}}),
    );
    let (meta, mode, ..) = file(&injection, "/var/lib/cloud/seed/nocloud/meta-data");
    let meta: Value = serde_json::from_str(meta).expect("JSON");
    assert_eq!((&meta["local-hostname"], &meta["x"], mode), (&json!("a.example.com"), &json!("y: \n- z"), 0o600));
    assert!(meta["instance-id"].as_str().is_some_and(|id| id.len() == 34));
    assert_eq!(text(&injection, "/var/lib/cloud/seed/nocloud/user-data"), "#cloud-config\n");
    assert!(removed(&injection, "/var/lib/cloud/instance"), "the state of the builder goes");
    assert_eq!(try_with(&guest_trees::debian_ifupdown(), &json!({"cloud_init": {"user_data": ""}})).expect_err("refused").reason(), "NO_CLOUD_INIT");
}

#[test]
fn the_request_and_the_network_back_end_share_one_seed() {
    let network = json!({"backend": "cloud-init", "interfaces": [{"name": "eth0", "addresses": ["192.0.2.10/24"]}]});
    let seed = json!({"user_data": "#cloud-config\npackages: []\n", "meta_data": {"x": 1}});
    let injection = with(&guest_trees::ubuntu_netplan(), json!({"hostname": "a.example.com", "network": network, "cloud_init": seed}));
    let mut paths: Vec<String> = injection.edits.iter().map(|edit| edit.path.to_string()).collect();
    let all = paths.len();
    paths.sort_unstable();
    paths.dedup();
    assert_eq!(paths.len(), all, "nothing is written twice: {paths:#?}");
    let meta: Value = serde_json::from_str(text(&injection, "/var/lib/cloud/seed/nocloud/meta-data")).expect("JSON");
    assert_eq!((&meta["local-hostname"], &meta["x"]), (&json!("a.example.com"), &json!(1)));
    assert!(meta["instance-id"].is_string());
    assert!(text(&injection, "/var/lib/cloud/seed/nocloud/user-data").contains("packages"));
    assert!(text(&injection, "/var/lib/cloud/seed/nocloud/network-config").contains("192.0.2.10/24"));
    // What the back-end's own user-data would have said.
    let settings = text(&injection, "/etc/cloud/cloud.cfg.d/99-cloudlet-identity.cfg");
    assert!(settings.contains("preserve_hostname: true") && settings.contains("ssh_deletekeys: false"), "{settings}");
}

#[test]
fn files_have_owners_by_name_and_extended_attributes() {
    let facts = guest_trees::debian_with_accounts();
    let injection = with(
        &facts,
        json!({"users": [{"name": "bob"}], "files": [{"path": "/srv/x", "content": "x", "user": "bob", "group": "adm", "xattrs": {"user.b": "AAE=", "user.a": ""}}]}),
    );
    let EditOp::WriteFile { attrs, .. } = &edit(&injection, "/srv/x").expect("written").op else { panic!("a file") };
    assert_eq!((attrs.uid, attrs.gid), (1001, 4));
    assert_eq!(
        attrs.xattrs.iter().map(|xattr| (&xattr.name[..], &xattr.value[..])).collect::<Vec<_>>(),
        [(&b"user.a"[..], &b""[..]), (b"user.b", &[0, 1])]
    );
    for (extra, value) in [
        ("user", json!("nobody-here")),
        ("group", json!("a:b")),
        ("xattrs", json!({"system.posix_acl_access": ""})),
        ("xattrs", json!({"user.": ""})),
    ] {
        let mut document = json!({"files": [{"path": "/srv/x", "content": "x"}]});
        document["files"][0][extra] = value;
        assert!(try_with(&facts, &document).is_err(), "{document}");
    }
}

#[test]
fn files_are_labelled_by_the_images_policy_where_its_tree_has_labels() {
    let mut facts = guest_trees::fedora_network_manager();
    put(&mut facts, "/.autorelabel", &Is::Dir);
    facts.nodes.remove("/.autorelabel");
    let policy = "/etc/selinux/targeted/contexts/files/file_contexts";
    put(
        &mut facts,
        policy,
        &Is::Text("/etc(/.*)?\tsystem_u:object_r:etc_t:s0\n/etc/ssh/.*key\t--\tsystem_u:object_r:sshd_key_t:s0\n/srv/.* <<none>>\n"),
    );
    put(&mut facts, &format!("{policy}.homedirs"), &Is::Text("/home/[^/]+/\\.ssh(/.*)?\tunconfined_u:object_r:ssh_home_t:s0\n"));
    let document = json!({"authorized_keys": {"ada": [KEY]}, "files": [{"path": "/opt/new/deep/x", "content": ""}, {"path": "/srv/x", "content": ""},
        {"path": "/etc/mine", "content": "", "xattrs": {"security.selinux": "bWluZQ=="}}]});
    let relabelled = with(&facts, document.clone());
    assert!(edit(&relabelled, "/.autorelabel").is_some(), "a tree without labels needs them everywhere");
    facts.labels.insert("/".into(), "system_u:object_r:root_t:s0".into());
    let injection = with(&facts, document.clone());
    assert!(edit(&injection, "/.autorelabel").is_none());
    let label = |path: &str| injection.report.changes.iter().rfind(|change| change.path == path).expect("a change").label.clone();
    for (path, wanted) in [
        ("/etc/hostname", Some("system_u:object_r:etc_t:s0")),
        ("/etc/ssh/ssh_host_ed25519_key", Some("system_u:object_r:sshd_key_t:s0")),
        ("/home/ada/.ssh", Some("unconfined_u:object_r:ssh_home_t:s0")),
        ("/home/ada/.ssh/authorized_keys", Some("unconfined_u:object_r:ssh_home_t:s0")),
        ("/opt/new/deep/x", Some("system_u:object_r:root_t:s0")),
        ("/opt/new", Some("system_u:object_r:root_t:s0")),
        ("/etc/mine", Some("mine")),
        ("/srv/x", None),
    ] {
        assert_eq!(label(path).as_deref(), wanted, "{path}");
    }
    let EditOp::WriteFile { attrs, .. } = &edit(&injection, "/etc/hostname").expect("written").op else { panic!("a file") };
    assert_eq!(attrs.xattrs[0].value.last(), Some(&0), "as setfilecon(3) writes it");
    for (wish, relabels) in [("relabel", true), ("leave", false)] {
        let mut document = document.clone();
        document["selinux"] = json!(wish);
        let injection = with(&facts, document);
        assert_eq!(edit(&injection, "/.autorelabel").is_some(), relabels, "{wish}");
        assert!(injection.report.changes.iter().all(|change| change.label.as_deref().is_none_or(|label| label == "mine")));
    }
}

//! Renders that work.

use cloudletd::proto::{self, VolumeFormat};

use crate::common::server::{Daemon, cat, judge, member, spec, tarball};

#[tokio::test(flavor = "multi_thread")]
async fn every_file_format_gives_the_same_disk_with_the_configuration_inside() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let cases = [("raw", VolumeFormat::Raw), ("overlay", VolumeFormat::Qcow2Overlay), ("alone", VolumeFormat::Qcow2)];
    for (name, format) in cases {
        daemon.render(&format!("key-{name}"), spec(&image, name, format)).await;
        let mapping = daemon.mapping(name).await;
        let device = &mapping.mapping.as_ref().expect("a mapping").devices[0];
        let volume = device.volume.as_ref().expect("a volume");
        let raw = daemon.dir.join(format!("{name}.judged")).to_string_lossy().into_owned();
        let (kind, path) = (device.format.as_str(), volume.path.as_str());
        assert_eq!(kind, if name == "raw" { "raw" } else { "qcow2" });
        if kind == "qcow2" {
            judge("qemu-img", &["check", "-f", "qcow2", path]);
        }
        judge("qemu-img", &["convert", "-f", kind, "-O", "raw", path, &raw]);
        judge("e2fsck", &["-fn", &raw]);
        assert_eq!(cat(&raw, "/etc/hostname").trim(), name);
        let interfaces = cat(&raw, "/etc/network/interfaces");
        for wanted in ["192.0.2.10/24", "192.0.2.1", "2001:db8::10/64"] {
            assert!(interfaces.contains(wanted), "{wanted} is not in {interfaces}");
        }
        assert!(cat(&raw, "/etc/fstab").contains(&device.filesystem.as_ref().expect("a filesystem").uuid));
        let identity = mapping.mapping.as_ref().expect("a mapping").identity.as_ref().expect("an identity");
        assert_eq!(cat(&raw, "/etc/machine-id").trim(), identity.machine_id);
        assert_eq!(identity.known_hosts.len(), identity.ssh_fingerprints.len());
        assert!(!identity.known_hosts.is_empty(), "the image has an SSH server");
        assert_eq!(identity.sshfp.len(), identity.known_hosts.len(), "{:?}", identity.sshfp);
        assert!(cat(&raw, "/etc/shadow").starts_with("root:*:"));
        if format == VolumeFormat::Qcow2Overlay {
            let info = judge("qemu-img", &["info", "--output=json", path]);
            let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
            assert_eq!(info["backing-filename-format"], "raw");
            assert_eq!(device.backing_chain.len(), 1);
        }
    }
    let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
    assert_eq!(goldens.len(), 1, "one golden serves all three");
    assert_eq!(goldens[0].backed_volumes, 1);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_twice_is_one_volume_and_the_same_answer() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let wanted = spec(&image, "web1", VolumeFormat::Raw);
    let first = daemon.start_render("key", wanted.clone()).await.expect("accepted");
    assert!(first.created);
    let again = daemon.start_render("key", wanted.clone()).await.expect("the same render");
    assert!(!again.created);
    let (first, again) = (first.render.expect("a render"), again.render.expect("a render"));
    assert_eq!(first.id, again.id);
    let done = daemon.wait(&first.id).await;
    assert_eq!(done.state(), proto::RenderState::Succeeded, "{:?}", done.error);
    let later = daemon.start_render("key", wanted.clone()).await.expect("the same render").render.expect("a render");
    assert_eq!(later, done);
    let mut other = wanted;
    other.instance.as_mut().expect("set").hostname = "other.example.com".into();
    let status = daemon.start_render("key", other).await.expect_err("another spec");
    assert_eq!(status.code(), tonic::Code::AlreadyExists);
    assert!(status.message().contains("spec.instance.hostname"), "{}", status.message());
    let volumes = daemon.volumes.list_volumes(proto::ListVolumesRequest::default()).await.expect("a list").into_inner().volumes;
    assert_eq!(volumes.len(), 1);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_renders_at_once_all_finish_and_nothing_is_left() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let formats = [VolumeFormat::Qcow2Overlay, VolumeFormat::Raw, VolumeFormat::Qcow2];
    let starts = (0..200).map(|index| {
        let request = proto::StartRenderRequest {
            idempotency_key: format!("key-{index}"),
            spec: Some(spec(&image, &format!("vm{index}"), formats[index % formats.len()])),
        };
        let mut renders = daemon.renders.clone();
        tokio::spawn(async move { renders.start_render(request).await.expect("accepted").into_inner().render.expect("a render").id })
    });
    let starts: Vec<_> = starts.collect();
    let mut ids = Vec::new();
    for start in starts {
        ids.push(start.await.expect("no panic"));
    }
    for id in &ids {
        let render = daemon.wait(id).await;
        assert_eq!(render.state(), proto::RenderState::Succeeded, "{:?}", render.error);
    }
    let listed = daemon.volumes.list_volumes(proto::ListVolumesRequest { page_size: 1000, ..Default::default() }).await.expect("a list").into_inner();
    assert_eq!(listed.volumes.len(), 200);
    let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
    assert_eq!(goldens.len(), 1, "two hundred asked, one was built");
    for index in 0..200 {
        let request = proto::DeleteVolumeRequest { volume: Some(crate::common::server::volume(&format!("vm{index}"))), ..Default::default() };
        assert!(daemon.volumes.delete_volume(request).await.expect("deleted").into_inner().deleted);
    }
    let left: Vec<_> = std::fs::read_dir(daemon.dir.join("pool")).expect("the pool").map(|entry| entry.expect("an entry").file_name()).collect();
    assert!(left.is_empty(), "left in the pool: {left:?}");
    let left: Vec<_> = std::fs::read_dir(daemon.dir.join("state/tmp")).expect("tmp").map(|entry| entry.expect("an entry").file_name()).collect();
    assert!(left.is_empty(), "left in tmp: {left:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_may_be_larger_than_its_golden_and_have_a_partition_table() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let mut wanted = spec(&image, "large", VolumeFormat::Raw);
    wanted.size_bytes = 1 << 30;
    wanted.golden = Some(proto::GoldenOptions { layout: proto::DiskLayout::Gpt as i32, size_bytes: 256 << 20, ..Default::default() });
    daemon.render("key", wanted).await;
    let mapping = daemon.mapping("large").await.mapping.expect("a mapping");
    let device = &mapping.devices[0];
    let path = &device.volume.as_ref().expect("a volume").path;
    assert_eq!(std::fs::metadata(path).expect("the volume").len(), 1 << 30);
    let verdict = judge("sgdisk", &["-v", path]);
    assert!(verdict.contains("No problems found"), "{verdict}");
    let root = device.filesystem.as_ref().expect("a filesystem");
    let judged = daemon.dir.join("root").to_string_lossy().into_owned();
    let (skip, count) = (format!("skip={}", root.offset_bytes), format!("count={}", root.size_bytes));
    judge("dd", &[&format!("if={path}"), &format!("of={judged}"), "bs=1M", "conv=sparse", "iflag=skip_bytes,count_bytes", &skip, &count]);
    judge("e2fsck", &["-fn", &judged]);
    assert_eq!(cat(&judged, "/etc/hostname").trim(), "large");
    let blocks = judge("dumpe2fs", &["-h", &judged]);
    let blocks = blocks.lines().find_map(|line| line.strip_prefix("Block count:")).expect("a block count").trim().parse::<u64>().expect("a number");
    assert_eq!(blocks * 4096, root.size_bytes, "the filesystem has grown to its partition");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_shows_what_a_render_then_does_and_writes_nothing() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let mut wanted = spec(&image, "web1", VolumeFormat::Raw);
    wanted.instance.as_mut().expect("set").files =
        vec![proto::InjectedFile { path: "/etc/app/secret".into(), content: b"hunter2".to_vec(), mode: 0o600, ..Default::default() }];
    let request = proto::PlanRenderRequest { spec: Some(wanted.clone()) };
    let cold = daemon.renders.plan_render(request.clone()).await.expect("a plan").into_inner();
    assert!(!cold.golden_ready && cold.edits.is_empty());
    let job = daemon.renders.prerender(proto::PrerenderRequest { image_id: image, ..Default::default() }).await.expect("accepted").into_inner();
    assert!(!job.already_built);
    let job = daemon.wait(&job.render.expect("a job").id).await;
    assert_eq!((job.state(), job.golden_key.clone()), (proto::RenderState::Succeeded, cold.golden_key.clone()));
    let warm = daemon.renders.plan_render(request).await.expect("a plan").into_inner();
    assert!(warm.golden_ready && warm.patch_blocks > 0);
    assert!(warm.edits.iter().any(|edit| edit.path == "/etc/network/interfaces"), "{:?}", warm.edits);
    assert_eq!(std::fs::read_dir(daemon.dir.join("pool")).expect("the pool").count(), 0);
    daemon.render("key", wanted.clone()).await;
    let report = injected(&mut daemon, "web1").await;
    let planned: serde_json::Value = serde_json::from_str(&warm.injected_json).expect("JSON");
    assert_eq!(as_planned(&planned, &report, true), planned, "the whole report, but for host keys and the time");
    assert!(report["ssh_host_keys"][0]["fingerprint"].as_str().is_some_and(|print| print.starts_with("SHA256:")), "{report:#}");
    // Rendered again the instance keeps its keys: there is nothing left to be decided but the time.
    wanted.replace = true;
    wanted.instance.as_mut().expect("set").hostname = "other.example.com".into();
    let again = daemon.renders.plan_render(proto::PlanRenderRequest { spec: Some(wanted.clone()) }).await.expect("a plan").into_inner();
    let planned: serde_json::Value = serde_json::from_str(&again.injected_json).expect("JSON");
    daemon.render("again", wanted).await;
    let second = injected(&mut daemon, "web1").await;
    assert_eq!(as_planned(&planned, &second, false), planned);
    assert_eq!(second["ssh_host_keys"][0]["fingerprint"], report["ssh_host_keys"][0]["fingerprint"]);
    daemon.stop().await;
}

async fn injected(daemon: &mut Daemon, name: &str) -> serde_json::Value {
    serde_json::from_str(&daemon.mapping(name).await.mapping.expect("a mapping").injected_json).expect("JSON")
}

/// `report` with the plan's mark wherever the plan has it, which may be nowhere but at host keys that are drawn and at the record with the time.
fn as_planned(planned: &serde_json::Value, report: &serde_json::Value, keys_are_drawn: bool) -> serde_json::Value {
    const LATER: &str = "decided when rendered";
    let mut report = report.clone();
    let mut marked = 0;
    for (index, change) in planned["changes"].as_array().expect("changes").iter().enumerate().filter(|(_, change)| change["content"] == LATER) {
        let path = change["path"].as_str().expect("a path");
        assert!(path == "/.cloudlet/applied_config" || (keys_are_drawn && path.ends_with("_key.pub")), "{change:#}");
        assert!(report["changes"][index]["content"].as_str().is_some_and(|digest| digest.starts_with("sha256:")));
        report["changes"][index]["content"] = LATER.into();
        marked += 1;
    }
    let keys = report["ssh_host_keys"].as_array_mut().expect("keys");
    assert_eq!(marked, if keys_are_drawn { 1 + keys.len() } else { 1 });
    for key in keys.iter_mut().filter(|_| keys_are_drawn) {
        for field in ["fingerprint", "known_hosts", "sshfp"] {
            key[field] = LATER.into();
        }
    }
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_args_and_files_are_rendered_and_secrets_stay_out_of_every_report() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&tarball()).await;
    let image =
        daemon.image_of(&digest, r#"{"args": {"greeting": {"type": "string"}}, "templates": ["/etc/motd"], "volatile": ["/usr/bin/.*"]}"#).await;
    let mut wanted = spec(&image, "web1", VolumeFormat::Raw);
    let hash = format!("$6$saltsalt${}", "a".repeat(86));
    {
        let instance = wanted.instance.as_mut().expect("set");
        let greeting = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("cloudlets".into())) };
        instance.args = Some(prost_types::Struct { fields: [("greeting".to_owned(), greeting)].into() });
        instance.root_password_hash = hash.clone();
        instance.files = vec![proto::InjectedFile {
            path: "/etc/app/secret".into(),
            content: b"hunter2-hunter2".to_vec(),
            mode: 0o600,
            uid: 5,
            gid: 6,
            ..Default::default()
        }];
        instance.authorized_keys = vec![proto::AuthorizedKeys {
            user: String::new(),
            keys: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGFrZXlmb3J0ZXN0c29ubHlub3RyZWFsbHlhbnlib2R5 me@example".into()],
        }];
    }
    daemon.render("key", wanted).await;
    let mapping = daemon.mapping("web1").await;
    let path = mapping.mapping.as_ref().expect("a mapping").devices[0].volume.as_ref().expect("a volume").path.clone();
    judge("e2fsck", &["-fn", &path]);
    assert_eq!(cat(&path, "/etc/motd"), "Welcome to cloudlets on web1.example.com\n");
    assert_eq!(cat(&path, "/etc/app/secret"), "hunter2-hunter2");
    assert!(cat(&path, "/etc/shadow").contains(&hash));
    assert!(cat(&path, "/root/.ssh/authorized_keys").contains("me@example"));
    assert_eq!(cat(&path, "/usr/bin/program"), "", "volatile paths are left out");
    let applied = cat(&path, "/.cloudlet/applied_config");
    assert!(applied.contains("cloudlets"), "{applied}");
    let catalogue = std::fs::read(daemon.dir.join("state/catalog.sqlite")).expect("the catalogue");
    let log = std::fs::read(daemon.dir.join("state/catalog.sqlite-wal")).unwrap_or_default();
    for (what, text) in
        [("applied_config", applied.as_bytes()), ("mapping", mapping.mapping_json.as_bytes()), ("catalogue", &catalogue), ("write-ahead log", &log)]
    {
        for secret in [hash.as_bytes(), b"hunter2"] {
            assert!(!text.windows(secret.len()).any(|window| window == secret), "{what} holds a secret");
        }
    }
    daemon.stop().await;
}

/// A unified tarball of LXD: the same tree below `rootfs/`, and templates of the image.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_lxd_is_rendered_with_its_templates() {
    let mut unified = tar::Builder::new(Vec::new());
    let metadata = b"architecture: x86_64\ntemplates:\n  /etc/hostname: {when: [create], template: name.tpl}\n  \
        /etc/issue: {when: [create, start], template: issue.tpl}\n  /opt/made: {when: [create], template: name.tpl}\n";
    member(&mut unified, "metadata.yaml", tar::EntryType::Regular, 0o644, metadata);
    member(&mut unified, "templates/name.tpl", tar::EntryType::Regular, 0o644, b"{{ container.name }}\n");
    let issue = b"{% if config_get(\"user.greeting\", \"\") == \"\" %}none{% else %}{{ config_get(\"user.greeting\", \"\") }}{% endif %} on {{ instance.type }}\n";
    member(&mut unified, "templates/issue.tpl", tar::EntryType::Regular, 0o644, issue);
    member(&mut unified, "rootfs", tar::EntryType::Directory, 0o755, b"");
    let tree = tarball();
    for entry in tar::Archive::new(&tree[..]).entries().expect("a tarball") {
        let mut entry = entry.expect("an entry");
        let path = format!("rootfs/{}", entry.path().expect("a path").display());
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).expect("read");
        let header = entry.header();
        member(&mut unified, &path, header.entry_type(), header.mode().expect("a mode"), &content);
    }
    let unified = unified.into_inner().expect("a tarball");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), &unified).expect("write");
    let mut manifest = cloudletd::manifest::lxd::import::file(file.path()).expect("a manifest");
    assert_eq!(manifest["rootfs"]["prefix"], "/rootfs");
    manifest["args"] = serde_json::json!({"greeting": {"type": "string"}});

    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&unified).await;
    let image = daemon.image_of(&digest, &manifest.to_string()).await;
    let mut wanted = spec(&image, "web1", VolumeFormat::Raw);
    let greeting = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("hello {{ x }}".into())) };
    wanted.instance.as_mut().expect("set").args = Some(prost_types::Struct { fields: [("greeting".to_owned(), greeting)].into() });
    daemon.render("key", wanted).await;
    let mapping = daemon.mapping("web1").await.mapping.expect("a mapping");
    let path = mapping.devices[0].volume.as_ref().expect("a volume").path.clone();
    judge("e2fsck", &["-fn", &path]);
    assert_eq!(cat(&path, "/etc/issue"), "hello {{ x }} on virtual-machine\n");
    assert_eq!(cat(&path, "/opt/made"), "web1\n");
    assert!(judge("debugfs", &["-R", "stat /usr/bin/program", &path]).contains("Size: 3145728"));
    assert!(cat(&path, "/etc/network/interfaces").contains("192.0.2.10"));
    assert_eq!(cat(&path, "/metadata.yaml"), "");
    assert_eq!(cat(&path, "/etc/hostname"), "web1\n", "Debian's habit");
    let report = injected(&mut daemon, "web1").await;
    assert!(report["notes"].to_string().contains("gives way to what is configured here: /etc/hostname"), "{report:#}");
    assert_eq!(report["templates"].as_array().map(Vec::len), Some(2), "{report:#}");
    daemon.stop().await;
}

//! The audit log: who did what, without secrets; rotated; and refusing when it is required and can't be written.

use std::path::Path;

use cloudletd::{
    config::{Access, Role},
    proto::{self, VolumeFormat},
    server,
};
use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt;

use crate::common::{
    pki::Authority,
    server::{Daemon, spec, volume},
};

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// The line of a method, which is written a moment after the answer.
async fn line_of(path: &Path, event: &str, method: &str) -> Value {
    let begun = std::time::Instant::now();
    loop {
        let found =
            lines(path).into_iter().rev().find(|line| line["event"] == event && line["method"].as_str().is_some_and(|name| name.ends_with(method)));
        match found {
            Some(line) => return line,
            None => assert!(begun.elapsed() < std::time::Duration::from_secs(20), "no {event} of {method}: {:?}", lines(path)),
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_and_what_is_denied_has_one_line_and_no_secret() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let log = dir.path().join("audit.jsonl");
    let mut address = None;
    let mut daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        config.access = vec![Access { common_names: vec!["web1".into()], ..Access::new(Role::Read) }];
        config.audit.file = Some(log.clone());
    })
    .await;
    let image = daemon.image().await;
    let mut wanted = spec(&image, "web1", VolumeFormat::Raw);
    let instance = wanted.instance.as_mut().expect("set");
    instance.root_password_hash = format!("$6$salt${}ab", "secret".repeat(14));
    instance.files = vec![proto::InjectedFile { path: "/etc/token".into(), content: b"topsecret".to_vec(), ..Default::default() }];
    let render = daemon.render("the-key", wanted.clone()).await;
    wanted.instance.as_mut().expect("set").root_password_hash = "plaintopsecret".into();
    daemon.start_render("other-key", wanted).await.expect_err("a password is no hash");
    daemon.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered");
    daemon.volumes.delete_volume(proto::DeleteVolumeRequest { volume: Some(volume("web1")), delete_data: false }).await.expect("deleted");
    let uid = nix::unistd::geteuid().as_raw();

    let created = line_of(&log, "call", "/CreateImage").await;
    assert_eq!((&created["outcome"], &created["object"]["image"]), (&"OK".into(), &image.as_str().into()));
    assert_eq!((&created["caller"]["kind"], &created["caller"]["uid"]), (&"unix".into(), &uid.into()));
    assert_eq!(created["caller"]["pid"], std::process::id());
    assert!(created["ms"].is_u64() && created["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{created}");
    let deleted = line_of(&log, "call", "/DeleteVolume").await;
    assert_eq!((&deleted["outcome"], &deleted["object"]["volume"]), (&"OK".into(), &"default/web1".into()));
    let starts: Vec<Value> = lines(&log).into_iter().filter(|line| line["method"] == "cloudlet.v1.RenderService/StartRender").collect();
    assert_eq!(starts.len(), 2, "{starts:?}");
    assert_eq!(starts[0]["object"], serde_json::json!({"key": "the-key", "volume": "default/web1", "image": image, "render": render.id}));
    assert_eq!((&starts[1]["outcome"], &starts[1]["object"]["key"]), (&"INVALID_ARGUMENT".into(), &"other-key".into()));
    assert!(starts[1]["reason"].is_string(), "{}", starts[1]);

    let reader = authority.endpoint(address.expect("set"), Some(authority.issue("web1"))).connect().await.expect("a client of ours");
    let request = proto::DeleteImageRequest { image_id: image };
    proto::image_service_client::ImageServiceClient::new(reader.clone()).delete_image(request).await.expect_err("may only look");
    let denied = line_of(&log, "denied", "/DeleteImage").await;
    assert_eq!((&denied["outcome"], &denied["reason"]), (&"PERMISSION_DENIED".into(), &"ROLE_TOO_LOW".into()));
    assert_eq!((&denied["caller"]["kind"], &denied["caller"]["subject"]), (&"certificate".into(), &"CN=web1".into()));
    assert_eq!(denied["caller"]["sha256"].as_str().map(str::len), Some(64));
    let nowhere = proto::ListVolumesRequest { pool: "default".into(), ..Default::default() };
    proto::volume_service_client::VolumeServiceClient::new(reader).list_volumes(nowhere).await.expect("may look");
    daemon.stop().await;

    let text = std::fs::read_to_string(&log).expect("the log");
    assert!(!text.contains("secret") && !text.contains("/etc/token"), "{text}");
    assert!(!text.contains("GetHostInfo") && !text.contains("ListVolumes"), "{text}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&log).expect("the log").permissions());
    assert_eq!(mode & 0o027, 0, "others can't read it: {mode:o}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_about_the_catalogue_and_the_store_name_what_they_are_about() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let log = dir.path().join("audit.jsonl");
    let mut daemon = Daemon::start_in(dir.path(), |config| config.audit.file = Some(log.clone())).await;
    let image = daemon.image().await;
    let name = proto::SetImageNameRequest { image: image.clone(), name: "small/1".into(), version: "1".into(), channels: vec!["stable".into()] };
    daemon.catalogue.set_image_name(name).await.expect("named");
    daemon.catalogue.set_image_alias(proto::SetImageAliasRequest { alias: "tiny".into(), name: "small/1".into() }).await.expect("an alias");
    let labels = [("tier".to_owned(), "web".to_owned())].into();
    daemon.catalogue.label_image(proto::LabelImageRequest { image: "tiny".into(), labels }).await.expect("labelled");
    let deprecate = proto::DeprecateImageRequest { image: image.clone(), reason: "old".into(), ..Default::default() };
    daemon.catalogue.deprecate_image(deprecate).await.expect("deprecated");
    daemon
        .catalogue
        .remove_image_name(proto::RemoveImageNameRequest { name: "small/1".into(), version: "1".into() })
        .await
        .expect_err("in a channel");
    daemon.catalogue.sync_stream(proto::SyncStreamRequest { stream: "nowhere".into() }).await.expect_err("not configured");
    let object = Some(proto::create_lease_request::Object::ImageId(image.clone()));
    let lease = proto::CreateLeaseRequest { object, owner: "ci".into(), ..Default::default() };
    let lease = daemon.stores.create_lease(lease).await.expect("a lease").into_inner().lease.expect("a lease").id;
    daemon.stores.release_lease(proto::ReleaseLeaseRequest { lease_id: lease.clone() }).await.expect("released");
    daemon.stores.collect_garbage(proto::CollectGarbageRequest { dry_run: true, ..Default::default() }).await.expect("looked");
    let backup = daemon.stores.backup_catalog(proto::BackupCatalogRequest { keep: 1 }).await.expect("backed up").into_inner().path;
    let golden_key = "0".repeat(64);
    let push = proto::PushGoldenRequest { remote: "nowhere".into(), golden_key: golden_key.clone() };
    daemon.shares.push_golden(push).await.expect_err("not configured");
    let blob = format!("sha256:{golden_key}");
    let pull = proto::PullBlobRequest { remote: "nowhere".into(), blob_digest: blob.clone() };
    daemon.shares.pull_blob(pull).await.expect_err("not configured");

    for (method, outcome, object) in [
        ("/SetImageName", "OK", json!({"image": image, "version": "small/1@1"})),
        ("/SetImageAlias", "OK", json!({"alias": "tiny", "name": "small/1"})),
        ("/LabelImage", "OK", json!({"image": "tiny"})),
        ("/DeprecateImage", "OK", json!({"image": image})),
        ("/RemoveImageName", "FAILED_PRECONDITION", json!({"version": "small/1@1"})),
        ("/SyncStream", "NOT_FOUND", json!({"stream": "nowhere"})),
        ("/CreateLease", "OK", json!({"holder": "ci", "lease": lease, "image": image})),
        ("/ReleaseLease", "OK", json!({"lease": lease})),
        ("/CollectGarbage", "OK", json!({"dry_run": "true"})),
        ("/BackupCatalog", "OK", json!({"backup": backup})),
        ("/PushGolden", "NOT_FOUND", json!({"remote": "nowhere", "golden": golden_key})),
        ("/PullBlob", "NOT_FOUND", json!({"remote": "nowhere", "blob": blob})),
    ] {
        let line = line_of(&log, "call", method).await;
        assert_eq!((&line["outcome"], &line["object"]), (&outcome.into(), &object), "{line}");
    }
    for alias in ["", "?"] {
        let request = proto::SetImageAliasRequest { alias: alias.into(), name: String::new() };
        assert_eq!(daemon.catalogue.set_image_alias(request).await.expect_err("no alias").code(), Code::InvalidArgument, "{alias:?}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_moved_away_is_made_anew_and_nothing_is_lost() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let log = dir.path().join("audit.jsonl");
    let mut daemon = Daemon::start_in(dir.path(), |config| config.audit.file = Some(log.clone())).await;
    let delete = |name: &str| proto::DeleteVolumeRequest { volume: Some(volume(name)), delete_data: false };
    daemon.volumes.delete_volume(delete("one")).await.expect("gone already");
    line_of(&log, "call", "/DeleteVolume").await;
    let moved = dir.path().join("audit.jsonl.1");
    std::fs::rename(&log, &moved).expect("moved");
    daemon.volumes.delete_volume(delete("two")).await.expect("gone already");
    assert_eq!(line_of(&log, "call", "/DeleteVolume").await["object"]["volume"], "default/two");
    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGHUP).expect("sent");
    daemon.volumes.delete_volume(delete("three")).await.expect("gone already");
    daemon.stop().await;
    assert_eq!((lines(&moved).len(), lines(&log).len()), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_is_refused_when_it_has_to_be_logged_and_can_not() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let log = dir.path().join("audit.jsonl");
    // A device that is always full, behind a name that another file can have later.
    std::os::unix::fs::symlink("/dev/full", &log).expect("a link");
    let mut daemon = Daemon::start_in(dir.path(), |config| (config.audit.file, config.audit.required) = (Some(log.clone()), true)).await;
    let delete = proto::DeleteVolumeRequest { volume: Some(volume("web1")), delete_data: false };
    let status = daemon.volumes.delete_volume(delete.clone()).await.expect_err("the log is full");
    assert_eq!(status.code(), Code::Unavailable, "{}", status.message());
    assert_eq!(status.get_error_details().error_info().expect("always there").reason, "AUDIT_UNWRITABLE");
    assert!(status.get_error_details().retry_info().is_some());
    daemon.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("looking is not logged");
    std::fs::remove_file(&log).expect("removed");
    daemon.volumes.delete_volume(delete).await.expect("there is room again");
    line_of(&log, "call", "/DeleteVolume").await;
    daemon.stop().await;
    let events: Vec<String> = lines(&log).iter().map(|line| line["event"].as_str().expect("text").to_owned()).collect();
    assert_eq!(events, ["begin", "call"]);

    let mut config = cloudletd::config::Config { state_dir: dir.path().join("other"), ..Default::default() };
    config.listen.unix = dir.path().join("other-sock");
    (config.audit.file, config.audit.required) = (Some(dir.path().join("missing/audit.jsonl")), true);
    let error = server::serve_until(config.checked().expect("valid"), std::future::pending()).await.expect_err("nothing to write to");
    assert!(error.chain().contains("missing/audit.jsonl"), "{}", error.chain());
}

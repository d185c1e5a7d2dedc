//! Images and uploads.

use cloudletd::{names::Digest, proto};

use crate::common::server::{Daemon, messages, spec, tarball};

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_2010_works_unchanged_and_the_same_one_is_the_same_image() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&tarball()).await;
    let manifest = r#"{
        "name": "small", "description": "An image of 2010", "author": "Solomon <s@example.com>", "arch": "x86_64",
        "args": {"hostname": {"type": "string", "default": "noname"}},
        "templates": ["/etc/motd"], "persistent": ["/var/lib/data"], "volatile": ["/tmp/(?!keep).*", "/var/run/.*"],
        "entry_points": {"kernel": {"os": "linux", "version": "2.6.32", "flavor": "generic"}, "chroot": {"command": "/bin/bash"}}
    }"#;
    let request = proto::CreateImageRequest { manifest_json: manifest.into(), rootfs_digest: digest.clone(), ..Default::default() };
    let first = daemon.images.create_image(request.clone()).await.expect("created").into_inner();
    assert!(first.created);
    let image = first.image.expect("an image");
    assert_eq!((image.name.as_str(), image.arch.as_str(), image.entry_points.len()), ("small", "x86_64", 2));
    assert!(image.rootfs.as_ref().expect("a rootfs").cached);
    let again = daemon.images.create_image(request).await.expect("the same").into_inner();
    assert!(!again.created);
    assert_eq!(again.image.expect("an image").id, image.id);
    let listed = daemon.images.list_images(proto::ListImagesRequest::default()).await.expect("a list").into_inner().images;
    assert_eq!(listed, std::slice::from_ref(&image));
    daemon.images.delete_image(proto::DeleteImageRequest { image_id: image.id.clone() }).await.expect("deleted");
    let status = daemon.images.get_image(proto::GetImageRequest { image_id: image.id }).await.expect_err("gone");
    assert_eq!(status.code(), tonic::Code::NotFound);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_volumes_is_not_deleted() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    daemon.render("key", spec(&image, "web1", proto::VolumeFormat::Qcow2Overlay)).await;
    let status = daemon.images.delete_image(proto::DeleteImageRequest { image_id: image.clone() }).await.expect_err("in use");
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    let golden = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens.remove(0);
    let status = daemon.renders.delete_golden(proto::DeleteGoldenRequest { golden_key: golden.key.clone() }).await.expect_err("backs a volume");
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    daemon
        .volumes
        .delete_volume(proto::DeleteVolumeRequest { volume: Some(crate::common::server::volume("web1")), ..Default::default() })
        .await
        .expect("deleted");
    daemon.images.delete_image(proto::DeleteImageRequest { image_id: image }).await.expect("deleted");
    assert!(!std::path::Path::new(&golden.path).exists(), "the golden goes with its image");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_with_other_bytes_than_announced_are_refused_and_leave_nothing() {
    let mut daemon = Daemon::start().await;
    let bytes = tarball();
    let right = Digest::of(&bytes).to_string();
    let wrong = Digest::of(b"something else").to_string();
    let header = |digest: &str, size| Some(proto::UploadHeader { digest: digest.into(), size_bytes: size, ..Default::default() });
    let cases = [
        (messages(header(&wrong, 0), &bytes), tonic::Code::DataLoss),
        (messages(header(&right, 5), &bytes), tonic::Code::DataLoss),
        (messages(header("sha256:zz", 0), &bytes), tonic::Code::InvalidArgument),
        (messages(header("", 1 << 50), &bytes), tonic::Code::ResourceExhausted),
        (messages(None, &bytes), tonic::Code::InvalidArgument),
    ];
    for (messages, code) in cases {
        let status = daemon.images.upload_rootfs(tokio_stream::iter(messages)).await.expect_err("refused");
        assert_eq!(status.code(), code, "{}", status.message());
    }
    for sub in ["blobs", "tmp"] {
        assert_eq!(std::fs::read_dir(daemon.dir.join("state").join(sub)).expect("a directory").count(), 0, "left in {sub}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn file_urls_work_below_configured_roots_only() {
    let mut daemon = Daemon::start().await;
    let path = daemon.dir.join("small.tar");
    std::fs::write(&path, tarball()).expect("write");
    let create = |url: String| proto::CreateImageRequest { manifest_json: r#"{"name": "small"}"#.into(), rootfs_url: url, ..Default::default() };
    let image =
        daemon.images.create_image(create(format!("file://{}", path.display()))).await.expect("created").into_inner().image.expect("an image");
    daemon.render("key", spec(&image.id, "web1", proto::VolumeFormat::Raw)).await;
    let image = daemon.images.get_image(proto::GetImageRequest { image_id: image.id }).await.expect("there").into_inner().image.expect("an image");
    assert_eq!(image.rootfs.expect("a rootfs").digest, Digest::of(&tarball()).to_string(), "the first fetch notes the digest");
    for url in ["file:///etc/passwd", "ftp://example.com/x.tar", "gopher://x", "not a url"] {
        let status = daemon.images.create_image(create(url.to_owned())).await.expect_err(url);
        assert!(matches!(status.code(), tonic::Code::InvalidArgument | tonic::Code::PermissionDenied), "{url}: {status:?}");
    }
    daemon.stop().await;
}

/// What a daemon finds in the catalogue: of an image that an older one catalogued nothing; of one whose manifest was read wrongly something else.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_reader_of_a_manifest_found_is_kept_made_anew_when_it_is_missing_and_believed_of_its_own_image_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut daemon = Daemon::start_in(dir.path(), |_| {}).await;
    let digest = daemon.upload(&tarball()).await;
    let ids = [daemon.image_of(&digest, r#"{"description": "a"}"#).await, daemon.image_of(&digest, r#"{"description": "b"}"#).await];
    daemon.stop().await;
    let open = || rusqlite::Connection::open(dir.path().join("state/catalog.sqlite")).expect("opens");
    let reading = |id: &str| open().query_row("SELECT judged FROM readings WHERE image_id=?1", [id], |row| row.get::<_, String>(0)).ok();
    let before = ids.clone().map(|id| reading(&id).expect("noted with the image"));
    open().execute("DELETE FROM readings WHERE image_id=?1", [&ids[0]]).expect("deleted");
    // The other's says of itself that it is somebody else's.
    open().execute("UPDATE readings SET judged=?2 WHERE image_id=?1", [&ids[1], &before[0]]).expect("changed");

    let mut daemon = Daemon::start_in(dir.path(), |_| {}).await;
    let get = |id: &str| proto::GetImageRequest { image_id: id.to_owned() };
    let image = daemon.images.get_image(get(&ids[0])).await.expect("read again").into_inner().image.expect("described");
    assert_eq!(image.description, "a");
    assert_eq!(reading(&ids[0]), Some(before[0].clone()));
    let error = daemon.images.get_image(get(&ids[1])).await.expect_err("not its manifest");
    assert_eq!(
        (error.code(), tonic_types::StatusExt::get_error_details(&error).error_info().map(|info| info.reason.clone())),
        (tonic::Code::DataLoss, Some("IMAGE_CHANGED".into()))
    );
    daemon.images.delete_image(proto::DeleteImageRequest { image_id: ids[0].clone() }).await.expect("deleted");
    assert_eq!(reading(&ids[0]), None);
    daemon.stop().await;
}

//! Wrong input: the right code, a text that names what and where, and nothing left behind.

use cloudletd::proto::{self, VolumeFormat};
use tonic::Code;
use tonic_types::StatusExt;

use crate::common::server::{Daemon, member, spec, tarball};

/// Fails when the pool or the store's tmp has anything in it.
#[track_caller]
fn assert_nothing_left(daemon: &Daemon) {
    for sub in ["pool", "state/tmp"] {
        let left: Vec<_> = std::fs::read_dir(daemon.dir.join(sub)).expect("a directory").map(|entry| entry.expect("an entry").file_name()).collect();
        assert!(left.is_empty(), "left in {sub}: {left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_can_never_work_are_refused_at_once() {
    type Break = fn(&mut proto::RenderSpec);
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&tarball()).await;
    let image = daemon.image_of(&digest, r#"{"args": {"port": {"type": "integer", "default": 80}}}"#).await;
    let cases: [(&str, Code, &str, Break); 10] = [
        ("unknown image", Code::NotFound, "spec.image_id", |spec| spec.image_id = "img-00000000000000000000".into()),
        ("unknown pool", Code::NotFound, "volume.pool", |spec| spec.volume.as_mut().expect("set").pool = "nowhere".into()),
        ("path as a name", Code::InvalidArgument, "spec.volume.name", |spec| spec.volume.as_mut().expect("set").name = "../../etc/passwd".into()),
        ("format of another pool", Code::InvalidArgument, "spec.format", |spec| spec.format = VolumeFormat::Block as i32),
        ("smaller than the golden", Code::InvalidArgument, "spec.size_bytes", |spec| spec.size_bytes = 4096),
        ("unknown arg", Code::InvalidArgument, "spec.instance.args.colour", |spec| set_arg(spec, "colour", "red")),
        ("arg of another type", Code::InvalidArgument, "spec.instance.args.port", |spec| set_arg(spec, "port", "eighty")),
        ("clear-text password", Code::InvalidArgument, "spec.instance.root_password_hash", |spec| {
            spec.instance.as_mut().expect("set").root_password_hash = "secret".into();
        }),
        ("gateway elsewhere twice", Code::InvalidArgument, "spec.instance.network.interfaces[0].gateway4", |spec| {
            spec.instance.as_mut().expect("set").network.as_mut().expect("set").interfaces[0].gateway4 = "nonsense".into();
        }),
        ("host path in the guest", Code::InvalidArgument, "spec.instance.files[0].path", |spec| {
            let file = proto::InjectedFile { path: "/etc/../../x".into(), ..Default::default() };
            spec.instance.as_mut().expect("set").files = vec![file];
        }),
    ];
    for (what, code, field, break_it) in cases {
        let mut wrong = spec(&image, "web1", VolumeFormat::Raw);
        break_it(&mut wrong);
        let status = daemon.start_render("key", wrong).await.expect_err(what);
        assert_eq!(status.code(), code, "{what}: {}", status.message());
        let details = status.get_error_details();
        let fields: Vec<&str> =
            details.bad_request().iter().flat_map(|bad| &bad.field_violations).map(|violation| violation.field.as_str()).collect();
        assert!(fields.contains(&field), "{what}: {fields:?}, {}", status.message());
        assert!(!details.error_info().expect("always there").reason.is_empty());
    }
    assert_nothing_left(&daemon);
    let renders = daemon.renders.list_renders(proto::ListRendersRequest::default()).await.expect("a list").into_inner().renders;
    assert!(renders.is_empty(), "a refused request is not a render: {renders:?}");
    daemon.stop().await;
}

fn set_arg(spec: &mut proto::RenderSpec, name: &str, value: &str) {
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(value.into())) };
    spec.instance.as_mut().expect("set").args = Some(prost_types::Struct { fields: [(name.to_owned(), value)].into() });
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_manifests_name_the_field() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&tarball()).await;
    for (manifest, want) in [
        ("{", "line"),
        (r#"{"nmae": "x"}"#, "nmae"),
        (r#"{"name": "x", "volatile": ["("]}"#, "volatile[0]"),
        (r#"{"name": "x", "templates": ["etc/motd"]}"#, "templates[0]"),
        (r#"{"name": "x", "entry_points": {"kernel": 5}}"#, "entry_points.kernel"),
        (r#"{"name": "x", "rootfs": {"digest": "sha256:../../etc"}}"#, "rootfs.digest"),
    ] {
        let request = proto::CreateImageRequest { manifest_json: manifest.into(), rootfs_digest: digest.clone(), ..Default::default() };
        let status = daemon.images.create_image(request).await.expect_err(manifest);
        assert_eq!(status.code(), Code::InvalidArgument, "{manifest}: {}", status.message());
        assert!(status.message().contains(want), "{manifest}: {}", status.message());
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_tarballs_fail_the_render_with_the_reason_and_leave_nothing() {
    let mut daemon = Daemon::start().await;
    let whole = tarball();
    let mut climbing = tar::Builder::new(Vec::new());
    member(&mut climbing, "../../etc/cron.d/evil", tar::EntryType::Regular, 0o644, b"x");
    let mut large = tar::Builder::new(Vec::new());
    for index in 0..80 {
        let noise: Vec<u8> = (0..1u32 << 20).map(|byte| (byte.wrapping_mul(2_654_435_761) >> (index % 20)) as u8 | 1).collect();
        member(&mut large, &format!("file{index}"), tar::EntryType::Regular, 0o644, &noise);
    }
    let cases = [
        ("truncated", whole[..whole.len() / 2].to_vec(), Code::DataLoss),
        ("climbing", climbing.into_inner().expect("a tarball"), Code::DataLoss),
        ("not a tarball", vec![b'x'; 100_000], Code::InvalidArgument),
        ("too large for its disk", large.into_inner().expect("a tarball"), Code::ResourceExhausted),
    ];
    for (what, bytes, code) in cases {
        let digest = daemon.upload(&bytes).await;
        let image = daemon.image_of(&digest, "{}").await;
        let id = daemon.start_render(&format!("key-{}", what.replace(' ', "-")), spec(&image, "web1", VolumeFormat::Raw)).await.expect("accepted");
        let render = daemon.wait(&id.render.expect("a render").id).await;
        assert_eq!(render.state(), proto::RenderState::Failed, "{what}");
        let error = render.error.expect("why it failed");
        assert_eq!(Code::from_i32(error.code), code, "{what}: {}", error.message);
        assert_eq!(error.stage, "golden", "{what}: {}", error.message);
        assert_nothing_left(&daemon);
    }
    let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("a list").into_inner().goldens;
    assert!(goldens.is_empty(), "{goldens:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_is_refused_by_catalogue_and_by_file() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    daemon.render("first", spec(&image, "web1", VolumeFormat::Raw)).await;
    let status = daemon.start_render("second", spec(&image, "web1", VolumeFormat::Raw)).await.expect_err("taken");
    assert_eq!(status.code(), Code::AlreadyExists, "{}", status.message());
    std::fs::write(daemon.dir.join("pool/stranger.raw"), "not ours").expect("write");
    let started = daemon.start_render("third", spec(&image, "stranger", VolumeFormat::Raw)).await.expect("accepted");
    let render = daemon.wait(&started.render.expect("a render").id).await;
    assert_eq!(render.state(), proto::RenderState::Failed);
    assert_eq!(Code::from_i32(render.error.expect("why").code), Code::AlreadyExists);
    assert_eq!(std::fs::read(daemon.dir.join("pool/stranger.raw")).expect("still there"), b"not ours");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_render_may_be_tried_again_with_its_key() {
    let mut daemon = Daemon::start().await;
    let image = daemon.image().await;
    let stranger = daemon.dir.join("pool/web1.raw");
    std::fs::write(&stranger, "in the way").expect("write");
    let wanted = spec(&image, "web1", VolumeFormat::Raw);
    let first = daemon.start_render("key", wanted.clone()).await.expect("accepted").render.expect("a render");
    assert_eq!(daemon.wait(&first.id).await.state(), proto::RenderState::Failed);
    std::fs::remove_file(&stranger).expect("remove");
    let again = daemon.start_render("key", wanted).await.expect("accepted");
    assert!(again.created);
    let again = again.render.expect("a render");
    assert_eq!(again.id, first.id);
    assert_eq!(daemon.wait(&again.id).await.state(), proto::RenderState::Succeeded);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_retry_info() {
    let mut daemon = Daemon::start_with(|config| {
        config.limits.queued_renders = 1;
    })
    .await;
    let image = daemon.image().await;
    let mut refused = None;
    for index in 0..50 {
        if let Err(status) = daemon.start_render(&format!("key-{index}"), spec(&image, &format!("vm{index}"), VolumeFormat::Qcow2)).await {
            refused = Some(status);
            break;
        }
    }
    let status = refused.expect("the queue of one was full at some time");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.get_error_details().error_info().expect("always there").reason, "QUEUE_FULL");
    assert!(status.get_error_details().retry_info().is_some());
    daemon.stop().await;
}

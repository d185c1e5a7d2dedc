//! Who may call what: every method of every service, by every kind of caller, over real connections.

use std::collections::BTreeSet;

use cloudletd::{
    config::{Access, Config, PoolConfig, Role},
    proto::{self, VolumeFormat},
};
use prost::Message;
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use tonic_types::StatusExt;

use crate::common::{
    pki::Authority,
    server::{Daemon, spec, volume},
};

/// Messages as bytes, so that one client calls every method.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; bytes::Buf::remaining(buffer)];
        bytes::Buf::copy_to_slice(buffer, &mut bytes);
        Ok(Some(bytes))
    }
}

/// Calls a method with one message; what it answers first.
pub async fn call(channel: Channel, path: &str, message: Vec<u8>) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::unavailable(format!("{error:?}")))?;
    let path: PathAndQuery = path.parse().expect("a path");
    let response = grpc.streaming(Request::new(tokio_stream::iter([message])), path, Raw).await?;
    response.into_inner().message().await.map(drop)
}

/// One method: what is asked, the least role, and what a caller hears who may call it in the pool `default`, and one who may do everything but elsewhere.
struct Case {
    path: &'static str,
    message: Vec<u8>,
    role: Role,
    allowed: Code,
    elsewhere: Code,
}

fn case(path: &'static str, message: impl Message, role: Role, allowed: Code, elsewhere: Code) -> Case {
    Case { path, message: message.encode_to_vec(), role, allowed, elsewhere }
}

/// Every method. `render` made the volume `default/web1`; whatever else is asked for is not there, so that no call changes what the next one finds.
fn cases(render: &str) -> Vec<Case> {
    use Code::{FailedPrecondition, InvalidArgument, NotFound, Ok, PermissionDenied};
    use proto::*;
    let nothing = "img-00000000000000000000".to_owned();
    let render_id = || render.to_owned();
    let spec = || Some(spec(&nothing, "web2", VolumeFormat::Raw));
    let instance = spec().and_then(|spec| spec.instance);
    let chunk = UploadRootfsRequest { part: Some(upload_rootfs_request::Part::Chunk(vec![1])) };
    let list_services = || tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mapping = GetMappingRequest { volume: Some(volume("web1")), ..Default::default() };
    let delete = DeleteVolumeRequest { volume: Some(volume("web2")), delete_data: false };
    let reconfigure = ReconfigureVolumeRequest { volume: Some(volume("web2")), instance, ..Default::default() };
    let start = StartRenderRequest { idempotency_key: "matrix".into(), spec: spec() };
    vec![
        case("/cloudlet.v1.CatalogueService/ListStreams", ListStreamsRequest {}, Role::Read, Ok, Ok),
        case("/cloudlet.v1.CatalogueService/SyncStream", SyncStreamRequest { stream: "none".into() }, Role::Admin, NotFound, PermissionDenied),
        case(
            "/cloudlet.v1.CatalogueService/ListStreamImages",
            ListStreamImagesRequest { stream: "none".into(), ..Default::default() },
            Role::Read,
            NotFound,
            NotFound,
        ),
        case(
            "/cloudlet.v1.CatalogueService/ImportStreamImage",
            ImportStreamImageRequest { stream: "none".into(), ..Default::default() },
            Role::Render,
            NotFound,
            NotFound,
        ),
        case("/cloudlet.v1.CatalogueService/PublishImages", PublishImagesRequest {}, Role::Admin, FailedPrecondition, PermissionDenied),
        case("/cloudlet.v1.CatalogueService/Match", MatchRequest { image: nothing.clone(), ..Default::default() }, Role::Read, NotFound, NotFound),
        case(
            "/cloudlet.v1.CatalogueService/SetImageName",
            SetImageNameRequest { name: "debian/12".into(), version: "1".into(), image: nothing.clone(), ..Default::default() },
            Role::Admin,
            NotFound,
            PermissionDenied,
        ),
        case(
            "/cloudlet.v1.CatalogueService/RemoveImageName",
            RemoveImageNameRequest { name: "debian/12".into(), version: "1".into() },
            Role::Admin,
            NotFound,
            PermissionDenied,
        ),
        case(
            "/cloudlet.v1.CatalogueService/SetImageAlias",
            SetImageAliasRequest { alias: "?".into(), name: "debian/12".into() },
            Role::Admin,
            InvalidArgument,
            PermissionDenied,
        ),
        case("/cloudlet.v1.CatalogueService/ResolveImage", ResolveImageRequest { reference: nothing.clone() }, Role::Read, NotFound, NotFound),
        case("/cloudlet.v1.CatalogueService/SearchImages", SearchImagesRequest::default(), Role::Read, Ok, Ok),
        case(
            "/cloudlet.v1.CatalogueService/LabelImage",
            LabelImageRequest { image: nothing.clone(), ..Default::default() },
            Role::Admin,
            NotFound,
            PermissionDenied,
        ),
        case(
            "/cloudlet.v1.CatalogueService/DeprecateImage",
            DeprecateImageRequest { image: nothing.clone(), ..Default::default() },
            Role::Admin,
            NotFound,
            PermissionDenied,
        ),
        case("/cloudlet.v1.CatalogueService/CheckDeleteImage", CheckDeleteImageRequest { image: nothing.clone() }, Role::Read, NotFound, NotFound),
        case("/cloudlet.v1.HostService/GetHostInfo", GetHostInfoRequest {}, Role::Read, Ok, Ok),
        case("/cloudlet.v1.HostService/ListPlatforms", ListPlatformsRequest {}, Role::Read, Ok, Ok),
        case("/cloudlet.v1.HostService/GetCaller", GetCallerRequest {}, Role::Read, Ok, Ok),
        case("/cloudlet.v1.ImageService/CreateImage", CreateImageRequest::default(), Role::Render, InvalidArgument, InvalidArgument),
        case("/cloudlet.v1.ImageService/UploadRootfs", chunk, Role::Render, InvalidArgument, InvalidArgument),
        case("/cloudlet.v1.ImageService/GetImage", GetImageRequest { image_id: nothing.clone() }, Role::Read, NotFound, NotFound),
        case("/cloudlet.v1.ImageService/ListImages", ListImagesRequest::default(), Role::Read, Ok, Ok),
        case("/cloudlet.v1.ImageService/DeleteImage", DeleteImageRequest { image_id: nothing.clone() }, Role::Admin, NotFound, PermissionDenied),
        case("/cloudlet.v1.RenderService/PlanRender", PlanRenderRequest { spec: spec() }, Role::Render, NotFound, PermissionDenied),
        case("/cloudlet.v1.RenderService/StartRender", start, Role::Render, NotFound, PermissionDenied),
        case("/cloudlet.v1.RenderService/WatchRender", WatchRenderRequest { render_id: render_id() }, Role::Read, Ok, NotFound),
        case("/cloudlet.v1.RenderService/GetRender", GetRenderRequest { render_id: render_id() }, Role::Read, Ok, NotFound),
        case("/cloudlet.v1.RenderService/ListRenders", ListRendersRequest::default(), Role::Read, Ok, Ok),
        case("/cloudlet.v1.RenderService/CancelRender", CancelRenderRequest { render_id: render_id() }, Role::Render, Ok, NotFound),
        case(
            "/cloudlet.v1.RenderService/Prerender",
            PrerenderRequest { image_id: nothing, golden: None, platforms: Vec::new() },
            Role::Render,
            NotFound,
            NotFound,
        ),
        case("/cloudlet.v1.RenderService/ListGoldens", ListGoldensRequest::default(), Role::Read, Ok, Ok),
        case("/cloudlet.v1.RenderService/DeleteGolden", DeleteGoldenRequest { golden_key: "0".repeat(64) }, Role::Admin, NotFound, PermissionDenied),
        case("/cloudlet.v1.ShareService/ListRemotes", ListRemotesRequest {}, Role::Read, Ok, Ok),
        case("/cloudlet.v1.ShareService/PushGolden", PushGoldenRequest::default(), Role::Admin, InvalidArgument, PermissionDenied),
        case("/cloudlet.v1.ShareService/PullGolden", PullGoldenRequest::default(), Role::Admin, InvalidArgument, PermissionDenied),
        case("/cloudlet.v1.ShareService/PushBlob", PushBlobRequest::default(), Role::Admin, InvalidArgument, PermissionDenied),
        case("/cloudlet.v1.ShareService/PullBlob", PullBlobRequest::default(), Role::Admin, InvalidArgument, PermissionDenied),
        case("/cloudlet.v1.StoreService/CreateLease", CreateLeaseRequest::default(), Role::Render, InvalidArgument, PermissionDenied),
        case("/cloudlet.v1.StoreService/ReleaseLease", ReleaseLeaseRequest { lease_id: "lse-0".into() }, Role::Render, Ok, PermissionDenied),
        case("/cloudlet.v1.StoreService/ListLeases", ListLeasesRequest {}, Role::Read, Ok, Ok),
        case(
            "/cloudlet.v1.StoreService/CollectGarbage",
            CollectGarbageRequest { dry_run: true, ..Default::default() },
            Role::Admin,
            Ok,
            PermissionDenied,
        ),
        case("/cloudlet.v1.StoreService/ReapLeftovers", ReapLeftoversRequest::default(), Role::Admin, Ok, PermissionDenied),
        case("/cloudlet.v1.StoreService/ScrubStore", ScrubStoreRequest::default(), Role::Admin, Ok, PermissionDenied),
        case("/cloudlet.v1.StoreService/BackupCatalog", BackupCatalogRequest::default(), Role::Admin, Ok, PermissionDenied),
        case(
            "/cloudlet.v1.VolumeService/ListVolumes",
            ListVolumesRequest { pool: "default".into(), ..Default::default() },
            Role::Read,
            Ok,
            PermissionDenied,
        ),
        case("/cloudlet.v1.VolumeService/GetMapping", mapping, Role::Read, Ok, PermissionDenied),
        case("/cloudlet.v1.VolumeService/DeleteVolume", delete, Role::Render, Ok, PermissionDenied),
        case("/cloudlet.v1.VolumeService/ReconfigureVolume", reconfigure, Role::Render, NotFound, PermissionDenied),
        case("/grpc.health.v1.Health/Check", tonic_health::pb::HealthCheckRequest::default(), Role::Read, Ok, Ok),
        case("/grpc.health.v1.Health/Watch", tonic_health::pb::HealthCheckRequest::default(), Role::Read, Ok, Ok),
        case("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", list_services(), Role::Read, Ok, Ok),
        case("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", list_services(), Role::Read, Ok, Ok),
    ]
}

/// Callers by the common name of their certificates; `stranger` is verified and named by nothing.
fn entries(config: &mut Config) {
    let other = "other".parse().expect("valid");
    config.pools.push(PoolConfig::Directory { name: other, path: config.state_dir.with_file_name("other") });
    let entry = |name: &str, role| Access { common_names: vec![name.to_owned()], ..Access::new(role) };
    config.access = vec![
        entry("reader", Role::Read),
        entry("renderer", Role::Render),
        entry("admin", Role::Admin),
        Access { pools: Some(BTreeSet::from(["other".parse().expect("valid")])), ..entry("elsewhere", Role::Admin) },
    ];
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_answers_every_kind_of_caller_as_the_table_says() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut address = None;
    let mut daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        entries(config);
    })
    .await;
    let address = address.expect("set");
    let image = daemon.image().await;
    let render = daemon.render("first", spec(&image, "web1", VolumeFormat::Raw)).await;
    let cases = cases(&render.id);

    let set = prost_types::FileDescriptorSet::decode(proto::DESCRIPTOR_SET).expect("descriptors");
    for file in &set.file {
        for (service, method) in file.service.iter().flat_map(|service| service.method.iter().map(move |method| (service, method))) {
            let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
            assert!(cases.iter().any(|case| case.path == path), "{path} is in no case");
        }
    }

    let nobody = authority.endpoint(address, None).connect_lazy();
    for case in &cases {
        let status = call(nobody.clone(), case.path, case.message.clone()).await.expect_err("no certificate, no answer");
        // The client's own words for a connection that never was; the daemon's would have a reason.
        let own_words = matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown);
        assert!(own_words && status.get_error_details().error_info().is_none(), "{}: {status:?}", case.path);
    }
    let callers =
        [("stranger", None), ("reader", Some(Role::Read)), ("renderer", Some(Role::Render)), ("elsewhere", None), ("admin", Some(Role::Admin))];
    for (name, role) in callers {
        let channel = authority.endpoint(address, Some(authority.issue(name))).connect().await.expect("a client of ours");
        for case in &cases {
            let answer = call(channel.clone(), case.path, case.message.clone()).await;
            let code = answer.as_ref().map_or_else(Status::code, |()| Code::Ok);
            let want = match name {
                "stranger" => Code::PermissionDenied,
                "elsewhere" => case.elsewhere,
                _ if role < Some(case.role) => Code::PermissionDenied,
                _ => case.allowed,
            };
            assert_eq!(code, want, "{name} calls {}: {answer:?}", case.path);
            if let Err(status) = answer
                && code == Code::PermissionDenied
            {
                let reason = status.get_error_details().error_info().expect("always there").reason.clone();
                let known = ["CALLER_NOT_ALLOWED", "ROLE_TOO_LOW", "POOL_NOT_ALLOWED"];
                assert!(known.contains(&reason.as_str()), "{name} calls {}: {reason}", case.path);
            }
        }
        let status = call(channel, "/cloudlet.v1.HostService/Shutdown", Vec::new()).await.expect_err("there is no such method");
        assert_eq!(status.code(), if name == "stranger" { Code::PermissionDenied } else { Code::Unimplemented }, "{name}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_one_pool_sees_and_touches_nothing_of_the_others() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut address = None;
    let mut daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        entries(config);
    })
    .await;
    let image = daemon.image().await;
    let ours = daemon.render("ours", spec(&image, "web1", VolumeFormat::Raw)).await;
    let channel = authority.endpoint(address.expect("set"), Some(authority.issue("elsewhere"))).connect().await.expect("a client of ours");
    let mut renders = proto::render_service_client::RenderServiceClient::new(channel.clone());
    let mut volumes = proto::volume_service_client::VolumeServiceClient::new(channel.clone());
    let mut hosts = proto::host_service_client::HostServiceClient::new(channel);

    let pools = hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered").into_inner().pools;
    assert_eq!(pools.iter().map(|pool| pool.name.as_str()).collect::<Vec<_>>(), ["other"]);
    assert!(volumes.list_volumes(proto::ListVolumesRequest::default()).await.expect("a list").into_inner().volumes.is_empty());
    assert!(renders.list_renders(proto::ListRendersRequest::default()).await.expect("a list").into_inner().renders.is_empty());
    let by_render = proto::GetMappingRequest { render_id: ours.id.clone(), ..Default::default() };
    assert_eq!(volumes.get_mapping(by_render).await.expect_err("not theirs").code(), Code::NotFound);

    // The root may go where the caller may write, a device of it may not go elsewhere.
    let in_other = |name: &str| {
        let mut spec = spec(&image, name, VolumeFormat::Raw);
        spec.volume.as_mut().expect("set").pool = "other".into();
        spec
    };
    let mut with_device = in_other("web2");
    with_device.devices = vec![proto::DeviceSpec {
        role: proto::DeviceRole::Data as i32,
        volume: Some(volume("web2-data")),
        size_bytes: 64 << 20,
        ..Default::default()
    }];
    let request = proto::StartRenderRequest { idempotency_key: "theirs".into(), spec: Some(with_device.clone()) };
    let status = renders.start_render(request).await.expect_err("a device in a pool of others");
    assert_eq!(status.code(), Code::PermissionDenied);
    let details = status.get_error_details();
    assert_eq!(details.bad_request().expect("a field").field_violations[0].field, "spec.devices[0].volume.pool");
    // A pool that is not there is refused in the same words as one that is not theirs.
    let mut nowhere = in_other("web2");
    nowhere.volume.as_mut().expect("set").pool = "nowhere".into();
    let request = proto::StartRenderRequest { idempotency_key: "theirs".into(), spec: Some(nowhere) };
    assert_eq!(renders.start_render(request).await.expect_err("no such pool").code(), Code::PermissionDenied);

    // An administrator makes it; then the owner of one pool may not remove what takes a volume of the other with it.
    let theirs = daemon.render("theirs", with_device).await;
    assert_eq!(renders.list_renders(proto::ListRendersRequest::default()).await.expect("a list").into_inner().renders[0].id, theirs.id);
    let root = proto::VolumeRef { pool: "other".into(), name: "web2".into() };
    let delete = |delete_data| proto::DeleteVolumeRequest { volume: Some(root.clone()), delete_data };
    assert_eq!(volumes.delete_volume(delete(true)).await.expect_err("data of another pool").code(), Code::PermissionDenied);
    assert!(volumes.delete_volume(delete(false)).await.expect("their own root").into_inner().deleted);
    assert!(dir.path().join("pool/web2-data.raw").exists() && dir.path().join("pool/web1.raw").exists());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn platforms_and_hosts_of_images_are_bounded_by_patterns() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut address = None;
    let daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        let platforms =
            "[[platform]]\nname='m1.small'\nhypervisor='kvm'\nmemory='1 GiB'\n[[platform]]\nname='m2.small'\nhypervisor='kvm'\nmemory='1 GiB'";
        config.platforms = Config::parse(platforms).expect("platforms").platforms;
        config.access = vec![Access {
            common_names: vec!["web*".into()],
            platforms: Some(vec!["m1.*".into()]),
            image_hosts: Some(vec!["images.example.com".into()]),
            ..Access::new(Role::Render)
        }];
    })
    .await;
    let channel = authority.endpoint(address.expect("set"), Some(authority.issue("web1"))).connect().await.expect("a client of ours");
    let mut hosts = proto::host_service_client::HostServiceClient::new(channel.clone());
    let platforms = hosts.list_platforms(proto::ListPlatformsRequest {}).await.expect("a list").into_inner().platforms;
    assert_eq!(platforms.iter().map(|platform| platform.name.as_str()).collect::<Vec<_>>(), ["m1.small"]);
    let mut volumes = proto::volume_service_client::VolumeServiceClient::new(channel.clone());
    for (platform, code) in [("m1.small", Code::NotFound), ("m2.small", Code::PermissionDenied), ("m3.small", Code::PermissionDenied)] {
        let request = proto::GetMappingRequest { volume: Some(volume("web1")), platform: platform.into(), ..Default::default() };
        assert_eq!(volumes.get_mapping(request).await.expect_err("no such volume").code(), code, "{platform}");
    }
    let mut images = proto::image_service_client::ImageServiceClient::new(channel);
    for (manifest, url, allowed) in [
        (r#"{"name": "x"}"#, "https://images.example.com/x.tar", true),
        (r#"{"name": "x"}"#, "https://example.org/x.tar", false),
        (r#"{"name": "x", "rootfs": {"url": "https://example.org/x.tar"}}"#, "", false),
    ] {
        let request = proto::CreateImageRequest { manifest_json: manifest.into(), rootfs_url: url.into(), ..Default::default() };
        let answer = images.create_image(request).await;
        assert_eq!(answer.is_ok(), allowed, "{manifest} {url}: {answer:?}");
        if let Err(status) = answer {
            assert_eq!(status.get_error_details().error_info().expect("always there").reason, "IMAGE_HOST_NOT_ALLOWED");
        }
    }
    daemon.stop().await;
}

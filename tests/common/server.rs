//! A daemon in this process, and a small Debian-shaped tarball.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cloudletd::{
    config::{Config, PoolConfig},
    names::Digest,
    proto::{
        self, catalogue_service_client::CatalogueServiceClient, host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
        render_service_client::RenderServiceClient, share_service_client::ShareServiceClient, store_service_client::StoreServiceClient,
        volume_service_client::VolumeServiceClient,
    },
    server,
    units::{Bytes, MIB},
};
use tempfile::TempDir;
use tokio::{net::UnixStream, sync::oneshot, task::JoinHandle};
use tonic::transport::{Channel, Endpoint, Uri};

/// How long a test waits for a render before it calls it lost.
const RENDER_TIMEOUT: Duration = Duration::from_secs(120);

/// A running daemon with its clients.
pub struct Daemon {
    pub dir: PathBuf,
    pub images: ImageServiceClient<Channel>,
    pub renders: RenderServiceClient<Channel>,
    pub volumes: VolumeServiceClient<Channel>,
    pub hosts: HostServiceClient<Channel>,
    pub stores: StoreServiceClient<Channel>,
    pub catalogue: CatalogueServiceClient<Channel>,
    pub shares: ShareServiceClient<Channel>,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<cloudletd::error::Result<()>>>,
    _owned: Option<TempDir>,
}

impl Daemon {
    /// One in a temporary directory.
    pub async fn start() -> Daemon {
        Self::start_with(|_| ()).await
    }

    /// The same after changing its configuration.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Daemon {
        let owned = tempfile::tempdir().expect("temporary directory");
        let mut daemon = Self::start_in(owned.path(), change).await;
        daemon._owned = Some(owned);
        daemon
    }

    /// One in a directory that stays.
    pub async fn start_in(dir: &Path, change: impl FnOnce(&mut Config)) -> Daemon {
        let mut config = Config { state_dir: dir.join("state"), ..Config::default() };
        config.listen.unix = dir.join("sock");
        // This process is no cloudletd.
        config.worker.program = Some(env!("CARGO_BIN_EXE_cloudletd").into());
        config.golden.size = Bytes(64 * MIB);
        config.fetch.file_roots = vec![dir.to_path_buf()];
        config.pools = vec![PoolConfig::Directory { name: "default".parse().expect("valid"), path: dir.join("pool") }];
        change(&mut config);
        let config = config.checked().expect("valid configuration");
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(server::serve_until(config, async {
            let _ = stopped.await;
        }));
        let channel = connect(&dir.join("sock"), &task).await;
        Daemon {
            dir: dir.to_path_buf(),
            images: ImageServiceClient::new(channel.clone()),
            renders: RenderServiceClient::new(channel.clone()),
            volumes: VolumeServiceClient::new(channel.clone()),
            hosts: HostServiceClient::new(channel.clone()),
            stores: StoreServiceClient::new(channel.clone()),
            catalogue: CatalogueServiceClient::new(channel.clone()),
            shares: ShareServiceClient::new(channel),
            stop: Some(stop),
            task: Some(task),
            _owned: None,
        }
    }

    /// Drains the daemon and checks how it ended.
    pub async fn stop(mut self) {
        self.stop.take().expect("running").send(()).expect("the daemon waits for this");
        let Daemon { images, renders, volumes, hosts, .. } = &self;
        drop((images.clone(), renders.clone(), volumes.clone(), hosts.clone()));
        self.task.take().expect("running").await.expect("no panic").expect("a clean end");
    }

    /// Catalogues the small image and returns its id.
    pub async fn image(&mut self) -> String {
        let digest = self.upload(&tarball()).await;
        self.image_of(&digest, "{}").await
    }

    /// Catalogues an image of an uploaded tarball, with more keys in its manifest.
    pub async fn image_of(&mut self, digest: &str, more: &str) -> String {
        let mut manifest: serde_json::Value = serde_json::from_str(more).expect("JSON");
        manifest["name"] = "small".into();
        manifest["entry_points"] = serde_json::json!({"init": {}});
        let request = proto::CreateImageRequest { manifest_json: manifest.to_string(), rootfs_digest: digest.into(), ..Default::default() };
        self.images.create_image(request).await.expect("created").into_inner().image.expect("an image").id
    }

    /// Uploads bytes and returns their digest.
    pub async fn upload(&mut self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes).to_string();
        let header = proto::UploadHeader { digest: digest.clone(), size_bytes: bytes.len() as u64, ..Default::default() };
        let response = self.images.upload_rootfs(tokio_stream::iter(messages(Some(header), bytes))).await.expect("uploaded").into_inner();
        assert_eq!(response.rootfs.expect("described").digest, digest);
        digest
    }

    /// Starts a render.
    pub async fn start_render(&mut self, key: &str, spec: proto::RenderSpec) -> Result<proto::StartRenderResponse, tonic::Status> {
        let request = proto::StartRenderRequest { idempotency_key: key.into(), spec: Some(spec) };
        self.renders.start_render(request).await.map(tonic::Response::into_inner)
    }

    /// Waits for a render's end.
    pub async fn wait(&mut self, id: &str) -> proto::Render {
        let begun = Instant::now();
        let mut stream = self.renders.watch_render(proto::WatchRenderRequest { render_id: id.into() }).await.expect("watched").into_inner();
        let mut last = None;
        while let Some(message) = stream.message().await.expect("no error in the stream") {
            last = message.render;
            assert!(begun.elapsed() < RENDER_TIMEOUT, "render {id} does not end: {last:?}");
        }
        last.expect("at least one message")
    }

    /// Renders and expects success.
    pub async fn render(&mut self, key: &str, spec: proto::RenderSpec) -> proto::Render {
        let id = self.start_render(key, spec).await.expect("accepted").render.expect("a render").id;
        let render = self.wait(&id).await;
        assert_eq!(render.state(), proto::RenderState::Succeeded, "{:?}", render.error);
        render
    }

    /// The mapping of a volume.
    pub async fn mapping(&mut self, name: &str) -> proto::GetMappingResponse {
        let request = proto::GetMappingRequest { volume: Some(volume(name)), ..Default::default() };
        self.volumes.get_mapping(request).await.expect("a mapping").into_inner()
    }
}

/// Upload messages: a header, then the bytes in chunks.
pub fn messages(header: Option<proto::UploadHeader>, bytes: &[u8]) -> Vec<proto::UploadRootfsRequest> {
    use proto::upload_rootfs_request::Part;
    let header = header.map(|header| proto::UploadRootfsRequest { part: Some(Part::Header(header)) });
    header.into_iter().chain(bytes.chunks(64 * 1024).map(|chunk| proto::UploadRootfsRequest { part: Some(Part::Chunk(chunk.to_vec())) })).collect()
}

async fn connect(socket: &Path, task: &JoinHandle<cloudletd::error::Result<()>>) -> Channel {
    let begun = Instant::now();
    loop {
        let path = socket.to_path_buf();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        });
        match Endpoint::from_static("http://localhost").connect_with_connector(connector).await {
            Ok(channel) => return channel,
            Err(_) if begun.elapsed() < Duration::from_secs(20) && !task.is_finished() => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(error) => panic!("the daemon does not listen: {error} (ended: {})", task.is_finished()),
        }
    }
}

/// The gRPC code that an error of the daemon becomes.
pub fn code_of(error: &cloudletd::error::Error) -> tonic::Code {
    cloudletd::api::status::code_of(error.kind())
}

/// A volume in the pool `default`.
pub fn volume(name: &str) -> proto::VolumeRef {
    proto::VolumeRef { pool: "default".into(), name: name.into() }
}

/// A render of an image for an instance, with one static address.
pub fn spec(image_id: &str, name: &str, format: proto::VolumeFormat) -> proto::RenderSpec {
    proto::RenderSpec {
        image_id: image_id.into(),
        instance: Some(proto::InstanceConfig {
            name: name.into(),
            hostname: format!("{name}.example.com"),
            network: Some(proto::Network {
                interfaces: vec![proto::Interface {
                    name: "eth0".into(),
                    mac: "52:54:00:00:00:01".into(),
                    addresses: vec!["192.0.2.10/24".into(), "2001:db8::10/64".into()],
                    gateway4: "192.0.2.1".into(),
                    ..Default::default()
                }],
                nameservers: vec!["192.0.2.53".into()],
                ..Default::default()
            }),
            ..Default::default()
        }),
        volume: Some(volume(name)),
        format: format as i32,
        ..Default::default()
    }
}

/// A tarball with what injection looks at in a Debian tree with ifupdown and SSH, a template, and a few megabytes besides.
pub fn tarball() -> Vec<u8> {
    let more = [
        ("etc/fstab", 0o644, &b"# nothing yet\n"[..]),
        ("usr/sbin/sshd", 0o755, b"\x7fELF"),
        ("etc/motd", 0o644, b"Welcome to <%= args.greeting %> on <%= instance.fqdn %>\n"),
    ];
    tarball_with(&more, 3)
}

/// A tarball with what injection looks at in a Debian tree with ifupdown, with more files (path, mode, content) and a program of so many MiB.
pub fn tarball_with(more: &[(&str, u32, &[u8])], mib: u32) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for dir in ["etc", "etc/network", "etc/init.d", "etc/ssh", "root", "usr", "usr/sbin", "usr/bin", "var", "var/lib", "sbin", "tmp"] {
        member(&mut tar, dir, tar::EntryType::Directory, 0o755, b"");
    }
    let debian = [
        ("etc/hostname", 0o644, &b"image\n"[..]),
        ("etc/hosts", 0o644, b"127.0.0.1\tlocalhost\n127.0.1.1\timage\n"),
        ("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/bash\n"),
        ("etc/shadow", 0o640, b"root:*:19000:0:99999:7:::\n"),
        ("etc/group", 0o644, b"root:x:0:\n"),
        ("etc/os-release", 0o644, b"ID=debian\nVERSION_ID=\"12\"\n"),
        ("etc/network/interfaces", 0o644, b"auto lo\niface lo inet loopback\n"),
        ("etc/init.d/networking", 0o755, b"#!/bin/sh\n"),
        ("etc/machine-id", 0o444, b""),
        ("usr/sbin/ifup", 0o755, b"\x7fELF"),
    ];
    for &(path, mode, content) in debian.iter().chain(more) {
        member(&mut tar, path, tar::EntryType::Regular, mode, content);
    }
    // No two chunks of it are the same.
    let noise: Vec<u8> = (0..mib << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8 ^ (index >> 20) as u8).collect();
    member(&mut tar, "usr/bin/program", tar::EntryType::Regular, 0o755, &noise);
    tar.into_inner().expect("a tarball")
}

/// A port that was free a moment ago.
pub fn free_port() -> std::net::SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("an address")
}

/// Appends one member, its name taken as it is.
pub fn member(tar: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, mode: u32, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(content.len() as u64);
    header.set_cksum();
    tar.append(&header, content).expect("append");
}

/// Runs a judge and returns what it printed; fails when the tool is missing or unhappy.
#[track_caller]
pub fn judge(program: &str, args: &[&str]) -> String {
    let output =
        std::process::Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program} is needed and can't be run: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}", output.status);
    text
}

/// The content of a file in a raw, bare ext4 image, read by debugfs.
#[track_caller]
pub fn cat(image: &str, path: &str) -> String {
    let output = std::process::Command::new("debugfs").args(["-R", &format!("cat {path}"), image]).output().expect("debugfs is needed");
    String::from_utf8(output.stdout).expect("text")
}

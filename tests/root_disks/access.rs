//! Who may call on the unix socket, by the user and groups that the kernel saw when the caller connected. Needs root, to be somebody else for a moment.

use std::{
    os::unix::net::UnixStream as StdUnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cloudletd::{
    config::{Access, Config, PoolConfig, Role},
    proto::{self, host_service_client::HostServiceClient, image_service_client::ImageServiceClient, volume_service_client::VolumeServiceClient},
    server,
};
use rustix::{
    process::{Gid, Uid},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use tokio::{net::UnixStream, sync::oneshot};
use tonic::{
    Code,
    transport::{Channel, Endpoint, Uri},
};

/// Connects as another user: credentials are of the thread that connects (unix(7), SO_PEERCRED), and this thread ends with them.
fn connect_as(socket: &Path, uid: u32, gid: u32) -> StdUnixStream {
    let socket = socket.to_path_buf();
    let thread = std::thread::spawn(move || {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        set_thread_groups(&[]).expect("this test needs root");
        set_thread_res_gid(gid, gid, gid).expect("this test needs root");
        set_thread_res_uid(uid, uid, uid).expect("this test needs root");
        let begun = Instant::now();
        loop {
            match StdUnixStream::connect(&socket) {
                Ok(stream) => return stream,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(20), "{}: {error}", socket.display()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    thread.join().expect("connected")
}

async fn channel_as(socket: &Path, uid: u32, gid: u32) -> Channel {
    let socket: PathBuf = socket.to_path_buf();
    let stream = tokio::task::spawn_blocking(move || connect_as(&socket, uid, gid)).await.expect("connected");
    stream.set_nonblocking(true).expect("non-blocking");
    let mut stream = Some(UnixStream::from_std(stream).expect("registered"));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = stream.take().map(hyper_util::rt::TokioIo::new).ok_or(std::io::ErrorKind::NotConnected);
        async move { stream.map_err(std::io::Error::from) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.expect("a connection")
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_on_the_unix_socket_have_the_role_of_their_user_or_group() {
    let dir = tempfile::tempdir().expect("temporary directory");
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("others may look in");
    let mut config = Config { state_dir: dir.path().join("state"), ..Config::default() };
    let socket = dir.path().join("sock");
    config.listen.unix = socket.clone();
    config.worker.program = Some(env!("CARGO_BIN_EXE_cloudletd").into());
    config.listen.allow_uids = [61001].into();
    config.listen.allow_gids = [61100].into();
    let pool = |name: &str| PoolConfig::Directory { name: name.parse().expect("valid"), path: dir.path().join(name) };
    config.pools = vec![pool("a"), pool("b")];
    let only_a = Some(["a".parse().expect("valid")].into());
    config.access =
        vec![Access { uids: [61002].into(), ..Access::new(Role::Read) }, Access { gids: [61200].into(), pools: only_a, ..Access::new(Role::Render) }];
    let config = config.checked().expect("valid configuration");
    let (stop, stopped) = oneshot::channel::<()>();
    let daemon = tokio::spawn(server::serve_until(config, async {
        let _ = stopped.await;
    }));

    use Code::{InvalidArgument, NotFound, Ok as Fine, PermissionDenied};
    // What GetHostInfo (read), CreateImage (render), DeleteImage (admin everywhere), DeleteVolume in a and in b (render) say.
    let cases = [
        ("root", 0, 0, [Fine, InvalidArgument, NotFound, Fine, Fine]),
        ("listen.allow_uids", 61001, 7, [Fine, InvalidArgument, NotFound, Fine, Fine]),
        ("listen.allow_gids", 61009, 61100, [Fine, InvalidArgument, NotFound, Fine, Fine]),
        ("reader", 61002, 7, [Fine, PermissionDenied, PermissionDenied, PermissionDenied, PermissionDenied]),
        ("group of one pool", 61009, 61200, [Fine, InvalidArgument, PermissionDenied, Fine, PermissionDenied]),
        ("reader in that group", 61002, 61200, [Fine, InvalidArgument, PermissionDenied, Fine, PermissionDenied]),
        ("nobody", 61009, 61009, [PermissionDenied; 5]),
    ];
    for (who, uid, gid, want) in cases {
        let channel = channel_as(&socket, uid, gid).await;
        let mut images = ImageServiceClient::new(channel.clone());
        let mut volumes = VolumeServiceClient::new(channel.clone());
        let code = |error: tonic::Status| error.code();
        let delete = |pool: &str| proto::DeleteVolumeRequest {
            volume: Some(proto::VolumeRef { pool: pool.into(), name: "none".into() }),
            ..Default::default()
        };
        let image_id = "img-00000000000000000000".to_owned();
        let answers = [
            HostServiceClient::new(channel).get_host_info(proto::GetHostInfoRequest {}).await.map_or_else(code, |_| Fine),
            images.create_image(proto::CreateImageRequest::default()).await.map_or_else(code, |_| Fine),
            images.delete_image(proto::DeleteImageRequest { image_id }).await.map_or_else(code, |_| Fine),
            volumes.delete_volume(delete("a")).await.map_or_else(code, |_| Fine),
            volumes.delete_volume(delete("b")).await.map_or_else(code, |_| Fine),
        ];
        assert_eq!(answers, want, "{who}");
    }
    stop.send(()).expect("the daemon waits for this");
    daemon.await.expect("no panic").expect("a clean end");
}

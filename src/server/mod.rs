//! Listeners: a unix socket with peer credentials (its own, or one passed by systemd), TCP with mutual TLS; health, reflection, and drain on SIGTERM.

pub mod accept;
pub mod http;
mod reload;
pub mod tls;

use std::{
    fs,
    os::unix::{fs::FileTypeExt, fs::PermissionsExt, net::UnixListener as StdUnixListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tonic::transport::{Server, server::Router};
use tonic_health::pb::health_server::{Health, HealthServer};
use tower::layer::util::{Identity, Stack};

use crate::{
    api::{
        audit::Audit,
        authorise::{AccessLayer, Rates, Rules},
        catalogue::Catalogue,
        hosts::Hosts,
        images::Images,
        renders::Renders,
        sharing::Sharing,
        stores::Stores,
        volumes::Volumes,
    },
    config::Config,
    error::{Error, Kind, Result, Stage},
    host::keeper::use_keeper,
    proto::{
        DESCRIPTOR_SET, catalogue_service_server::CatalogueServiceServer, host_service_server::HostServiceServer,
        image_service_server::ImageServiceServer, render_service_server::RenderServiceServer, share_service_server::ShareServiceServer,
        store_service_server::StoreServiceServer, volume_service_server::VolumeServiceServer,
    },
    render::Engine,
    server::{accept::Door, tls::Certificates},
    store::Store,
};

/// Largest message a client may send: the file and manifest limits of the protocol fit in it.
const MESSAGE_LEN_MAX: usize = 32 << 20;
/// Idle connections are probed this often, so that clients that vanished do not hold resources.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Streams that one connection may have open at a time.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;

/// Runs the daemon until SIGTERM or SIGINT; see [`serve_until`].
pub async fn serve(config: Config) -> Result<()> {
    let stop = stop_signals()?;
    serve_until(config, stop).await
}

/// Runs the daemon until `stop` is ready, with the keeper of the configuration for the whole process, then drains: no new calls, running renders get `limits.drain_timeout_secs`, the rest is cancelled.
pub async fn serve_until(config: Config, stopped: impl Future<Output = ()>) -> Result<()> {
    let begun = std::time::Instant::now();
    if let Some(socket) = &config.keeper.socket {
        use_keeper(socket)?;
    }
    let store = Store::open(&config.state_dir)?;
    let engine = Engine::new(store, config.clone())?;
    let starting = Arc::clone(&engine);
    crate::render::blocking(Stage::Host, move || starting.recover()).await?;

    let (stop, stopping) = watch::channel(false);
    let mut tasks = tokio::task::JoinSet::new();
    let rules = Arc::new(Rules::new(&config));
    let certificates = config.listen.tls.as_ref().map(Certificates::load).transpose()?;
    let interval = config.listen.tls.as_ref().map_or(0, |tls| tls.reload_interval_secs);
    let audit = Audit::open(&config.audit)?;
    let reloading = reload::watch(Arc::clone(&engine), certificates.clone(), audit.clone(), interval)?;
    raise_file_limit();
    let door = Door::new(Arc::clone(&rules), config.listen.max_connections);
    let (unix, bound) = unix_listener(&config.listen.unix, rules.let_others_in())?;
    let tcp = match config.listen.tcp {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            Some(listener.map_err(|error| Error::io(Stage::Config, address.to_string(), "listen on TCP", error))?)
        }
        None => None,
    };
    let health = health_service().await;
    let layer = AccessLayer::new(Rates::new(&config.access), audit);
    if let Some(tcp) = tcp {
        let router = router(&engine, &certificates, layer.clone(), health.clone())?;
        let acceptors = certificates.clone();
        let (wait, incoming) = (until(stopping.clone()), accept::tcp(tcp, door.clone(), acceptors));
        tasks.spawn(async move { router.serve_with_incoming_shutdown(incoming, wait).await });
    }
    if let (Some(address), Some(directory)) = (config.publish.listen, config.publish.directory.clone()) {
        let listener = crate::streams::serve::bind(address).await?;
        let blobs = config.publish.blobs.then(|| Arc::clone(&engine));
        let wait = until(stopping.clone());
        tasks.spawn(async move {
            crate::streams::serve::serve(listener, directory, blobs, wait).await;
            Ok(())
        });
    }
    if let Some(address) = config.share.listen {
        let listener = crate::share::serve::bind(address).await?;
        let sharing = crate::share::serve::server(listener, &engine, &config, certificates.as_ref(), until(stopping.clone()))?;
        tasks.spawn(async move {
            sharing.await;
            Ok(())
        });
    }
    let router = router(&engine, &certificates, layer, health)?;
    tasks.spawn(async move { router.serve_with_incoming_shutdown(accept::unix(unix, door), until(stopping)).await });
    tracing::info!(
        socket = %config.listen.unix.display(),
        tcp = config.listen.tcp.map(tracing::field::display),
        state_dir = %config.state_dir.display(),
        ms = begun.elapsed().as_millis() as u64,
        "serving"
    );
    // Fails when there is no service manager to tell, which is fine.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let preparing = tokio::spawn(crate::render::prerender::prepare_all(Arc::clone(&engine)));
    let collecting = tokio::spawn(crate::render::collect::collect_regularly(Arc::clone(&engine)));
    let syncing = tokio::spawn(crate::streams::sync::run(Arc::clone(&engine)));
    let publishing = tokio::spawn(crate::streams::publish::publish_regularly(Arc::clone(&engine)));
    let scrubbing = tokio::spawn(crate::render::verify::scrub_regularly(Arc::clone(&engine)));

    stopped.await;
    preparing.abort();
    collecting.abort();
    syncing.abort();
    publishing.abort();
    reloading.abort();
    scrubbing.abort();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("draining");
    stop.send_replace(true);
    let patience = Duration::from_secs(config.limits.drain_timeout_secs);
    if tokio::time::timeout(patience, engine.idle()).await.is_err() {
        tracing::warn!("renders still run after {} s; they are cancelled", patience.as_secs());
        engine.cancel_all();
        engine.idle().await;
    }
    // Watches end with their renders; connections that stay open for nothing are dropped.
    let _ = tokio::time::timeout(Duration::from_secs(5), async { while tasks.join_next().await.is_some() {} }).await;
    // Connections that ended this moment and work that was aborted in the middle of a blocking step have the store for a little longer.
    let closed = engine.store.closed();
    drop(engine);
    if tokio::time::timeout(Duration::from_secs(5), closed).await.is_err() {
        tracing::warn!("the store is still in use; its lock goes with the process");
    }
    if let Some(path) = bound {
        let _ = fs::remove_file(path);
    }
    tracing::info!("stopped");
    Ok(())
}

async fn until(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Ready at the first SIGTERM or SIGINT; the handlers are there when this returns.
fn stop_signals() -> Result<impl Future<Output = ()>> {
    let failed = |error| Error::io(Stage::Host, "signals", "listen for signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// The socket passed by systemd (sd_listen_fds(3)), or one of our own; and the path to remove at the end.
fn unix_listener(path: &Path, others_may_call: bool) -> Result<(UnixListener, Option<std::path::PathBuf>)> {
    let failed = |doing: &'static str| move |error| Error::io(Stage::Config, path.display().to_string(), doing, error);
    let mut passed = listenfd::ListenFd::from_env();
    let (listener, bound) = match passed.take_unix_listener(0).map_err(failed("take the socket passed by the service manager"))? {
        Some(listener) => (listener, None),
        None => {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).map_err(failed("make the socket's directory"))?;
            }
            remove_stale_socket(path)?;
            let listener = StdUnixListener::bind(path).map_err(failed("listen on the unix socket"))?;
            // Connecting needs write permission (unix(7)); who may call is decided by peer credentials.
            let mode = if others_may_call { 0o666 } else { 0o600 };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the socket's mode"))?;
            (listener, Some(path.to_path_buf()))
        }
    };
    listener.set_nonblocking(true).map_err(failed("make the socket non-blocking"))?;
    Ok((UnixListener::from_std(listener).map_err(failed("register the socket"))?, bound))
}

/// Removes a socket that nobody listens on. Anything else at that path is left alone and refused.
fn remove_stale_socket(path: &Path) -> Result<()> {
    let object = path.display().to_string();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(Stage::Config, object, "look at the socket's path", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => Err(Error::new(Kind::Conflict, Stage::Config, object, "is there and is not a socket")),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            Err(Error::new(Kind::Busy, Stage::Config, object, "another process listens on this socket"))
        }
        Ok(_) => fs::remove_file(path).map_err(|error| Error::io(Stage::Config, object, "remove the stale socket", error)),
    }
}

async fn health_service() -> HealthServer<impl Health> {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_serving::<ImageServiceServer<Images>>().await;
    reporter.set_serving::<RenderServiceServer<Renders>>().await;
    reporter.set_serving::<VolumeServiceServer<Volumes>>().await;
    reporter.set_serving::<HostServiceServer<Hosts>>().await;
    reporter.set_serving::<StoreServiceServer<Stores>>().await;
    reporter.set_serving::<CatalogueServiceServer<Catalogue>>().await;
    reporter.set_serving::<ShareServiceServer<Sharing>>().await;
    service
}

fn router(
    engine: &Arc<Engine>,
    certificates: &Option<Arc<Certificates>>,
    layer: AccessLayer,
    health: HealthServer<impl Health>,
) -> Result<Router<Stack<AccessLayer, Identity>>> {
    let reflection = |error: tonic_reflection::server::Error| Error::internal(Stage::Config, "reflection", "set up reflection").with_source(error);
    let builder = || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(DESCRIPTOR_SET);
    let mut server =
        Server::builder().http2_keepalive_interval(Some(KEEPALIVE_INTERVAL)).max_concurrent_streams(Some(STREAMS_PER_CONNECTION_MAX)).layer(layer);
    let images = ImageServiceServer::new(Images(Arc::clone(engine))).max_decoding_message_size(MESSAGE_LEN_MAX);
    let renders = RenderServiceServer::new(Renders(Arc::clone(engine))).max_decoding_message_size(MESSAGE_LEN_MAX);
    Ok(server
        .add_service(health)
        .add_service(builder().build_v1().map_err(reflection)?)
        .add_service(builder().build_v1alpha().map_err(reflection)?)
        .add_service(images)
        .add_service(renders)
        .add_service(VolumeServiceServer::new(Volumes(Arc::clone(engine))))
        .add_service(CatalogueServiceServer::new(Catalogue(Arc::clone(engine))))
        .add_service(ShareServiceServer::new(Sharing(Arc::clone(engine))))
        .add_service(StoreServiceServer::new(Stores(Arc::clone(engine))))
        .add_service(HostServiceServer::new(Hosts { engine: Arc::clone(engine), certificates: certificates.clone() })))
}

/// Raises the number of files that may be open to what the service manager allows at most: each connection is one. The soft limit is low for the sake of
/// programs that use select(2); this is none.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "raise the limit of open files");
    }
}

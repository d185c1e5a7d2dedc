//! A client of a running daemon: cold builds and warm renders through gRPC on its unix socket, with a clock around them. `scripts/bench.sh` runs it; by
//! hand: `cargo bench --bench render_load -- --socket SOCKET render IMAGE`.
//!
//! A render takes from the call of StartRender to the end of WatchRender's stream: then the volume is durable and has its row. Every command prints
//! one JSON object; times are milliseconds.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::{CommandFactory, Parser, Subcommand};
use cloudletd::proto::{
    self, image_service_client::ImageServiceClient, render_service_client::RenderServiceClient, volume_service_client::VolumeServiceClient,
};
use serde_json::{Value, json};
use tokio::{net::UnixStream, task::JoinSet};
use tonic::transport::{Channel, Endpoint, Uri};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Connections that the requests in flight share at most.
const CONNECTIONS_MAX: usize = 8;
/// How often a daemon that starts is asked, about once a millisecond.
const ANSWER_TRIES_MAX: u32 = 20_000;

#[derive(Parser)]
struct Arguments {
    /// The daemon's unix socket.
    #[arg(long, default_value = cloudletd::config::SOCKET_DEFAULT)]
    socket: PathBuf,
    /// Nothing: print the help, which is what a plain `cargo bench` gets.
    #[command(subcommand)]
    command: Option<Command>,
    /// Cargo gives it to every benchmark.
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Catalogues a tarball (below one of the daemon's file_roots) and prefetches it by building its golden once.
    Image { tarball: PathBuf },
    /// Deletes the golden and builds it again.
    Cold { image: String },
    /// Renders and deletes volumes.
    Render {
        image: String,
        #[arg(long, default_value = "qcow2-overlay")]
        format: String,
        #[arg(long, default_value = "default")]
        pool: String,
        #[arg(long, default_value_t = 100)]
        count: usize,
        #[arg(long, default_value_t = 1)]
        in_flight: usize,
        /// What all volumes are called, for a device; else names are made.
        #[arg(long)]
        volume: Option<String>,
        /// Write over what the device holds.
        #[arg(long)]
        overwrite: bool,
        /// Zero policy of a device.
        #[arg(long)]
        zero: Option<String>,
        /// Do not delete the volumes.
        #[arg(long)]
        keep: bool,
    },
    /// Waits for the daemon to answer a call.
    Answer {
        /// When the waiting began, microseconds since 1970.
        #[arg(long)]
        since: u64,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let Some(command) = arguments.command else { return Ok(Arguments::command().print_help()?) };
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
        let result = match command {
            Command::Image { tarball } => image(&arguments.socket, &tarball).await?,
            Command::Cold { image } => cold(&arguments.socket, &image).await?,
            Command::Render { image, format, pool, count, in_flight, volume, overwrite, zero, keep } => {
                let options = zero.map(|policy| zero_policy(&policy)).transpose()?;
                let job = Job {
                    image,
                    format: format_of(&format)?,
                    pool,
                    volume,
                    overwrite,
                    options,
                    keep,
                    run: std::process::id(),
                    next: AtomicUsize::new(0),
                    count,
                };
                render(&arguments.socket, Arc::new(job), in_flight).await?
            }
            Command::Answer { since } => answer(&arguments.socket, UNIX_EPOCH + Duration::from_micros(since)).await?,
        };
        println!("{result}");
        Ok(())
    })
}

fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

fn format_of(name: &str) -> Result<proto::VolumeFormat> {
    let name = format!("VOLUME_FORMAT_{}", name.to_uppercase().replace('-', "_"));
    Ok(proto::VolumeFormat::from_str_name(&name).ok_or("formats: raw, qcow2-overlay, qcow2, block, loop")?)
}

fn zero_policy(name: &str) -> Result<proto::VolumeOptions> {
    let name = format!("ZERO_POLICY_{}", name.to_uppercase().replace('-', "_"));
    let policy = proto::ZeroPolicy::from_str_name(&name).ok_or("zero policies: auto, zero-out, discard, write, keep")?;
    Ok(proto::VolumeOptions { zero_policy: policy as i32, ..Default::default() })
}

/// Tries every millisecond.
async fn answer(socket: &Path, since: SystemTime) -> Result<Value> {
    for _ in 0..ANSWER_TRIES_MAX {
        if let Ok(channel) = connect(socket).await {
            let request = proto::ListVolumesRequest { page_size: 1, ..Default::default() };
            if VolumeServiceClient::new(channel).list_volumes(request).await.is_ok() {
                return Ok(json!({"ms": (since.elapsed()?.as_secs_f64() * 1e6).round() / 1e3}));
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Err("the daemon does not answer".into())
}

async fn connect(socket: &Path) -> Result<Channel> {
    let socket = socket.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://localhost").connect_with_connector(connector).await?)
}

async fn finish(renders: &mut RenderServiceClient<Channel>, id: &str) -> Result<proto::Render> {
    let mut stream = renders.watch_render(proto::WatchRenderRequest { render_id: id.into() }).await?.into_inner();
    let mut last = None;
    while let Some(message) = stream.message().await? {
        last = message.render;
    }
    let render = last.ok_or("the watch ended without a word")?;
    match render.state() {
        proto::RenderState::Succeeded => Ok(render),
        state => Err(format!("render {id} ended as {}: {:?}", state.as_str_name(), render.error).into()),
    }
}

async fn prerender(renders: &mut RenderServiceClient<Channel>, image: &str) -> Result<proto::Render> {
    let started = renders.prerender(proto::PrerenderRequest { image_id: image.into(), golden: None, ..Default::default() }).await?.into_inner();
    finish(renders, &started.render.ok_or("no render")?.id).await
}

async fn image(socket: &Path, tarball: &Path) -> Result<Value> {
    let channel = connect(socket).await?;
    let name = tarball.file_name().unwrap_or_default().to_string_lossy().replace('.', "-");
    let manifest = json!({"name": name, "arch": "x86_64", "entry_points": {"kernel": {"os": "linux"}},
        "rootfs": {"url": format!("file://{}", std::path::absolute(tarball)?.display())}});
    let request = proto::CreateImageRequest { manifest_json: manifest.to_string(), ..Default::default() };
    let image = ImageServiceClient::new(channel.clone()).create_image(request).await?.into_inner().image.ok_or("no image")?.id;
    let mut renders = RenderServiceClient::new(channel);
    prerender(&mut renders, &image).await?;
    Ok(json!({"image": image, "golden": golden(&mut renders, &image).await?.path}))
}

async fn golden(renders: &mut RenderServiceClient<Channel>, image: &str) -> Result<proto::Golden> {
    let request = proto::ListGoldensRequest { image_id: image.into() };
    Ok(renders.list_goldens(request).await?.into_inner().goldens.pop().ok_or("no golden")?)
}

async fn cold(socket: &Path, image: &str) -> Result<Value> {
    let mut renders = RenderServiceClient::new(connect(socket).await?);
    let key = golden(&mut renders, image).await?.key;
    renders.delete_golden(proto::DeleteGoldenRequest { golden_key: key }).await?;
    let begun = Instant::now();
    prerender(&mut renders, image).await?;
    Ok(json!({"ms": ms(begun)}))
}

/// What the tasks share.
struct Job {
    image: String,
    format: proto::VolumeFormat,
    pool: String,
    volume: Option<String>,
    overwrite: bool,
    options: Option<proto::VolumeOptions>,
    keep: bool,
    /// Makes names unique.
    run: u32,
    next: AtomicUsize,
    count: usize,
}

async fn render(socket: &Path, job: Arc<Job>, in_flight: usize) -> Result<Value> {
    let mut channels = Vec::new();
    for _ in 0..in_flight.clamp(1, CONNECTIONS_MAX) {
        channels.push(connect(socket).await?);
    }
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for index in 0..in_flight {
        tasks.spawn(one_after_another(channels[index % channels.len()].clone(), Arc::clone(&job)));
    }
    let (mut times, mut failures) = (Vec::new(), Vec::new());
    while let Some(task) = tasks.join_next().await {
        let (done, failed) = task?;
        times.extend(done);
        failures.extend(failed);
    }
    let total = ms(begun);
    let mut volumes = VolumeServiceClient::new(channels[0].clone());
    let mapping = volumes.get_mapping(proto::GetMappingRequest { volume: Some(reference(&job, 0)), ..Default::default() }).await;
    let volume = mapping.ok().and_then(|answer| answer.into_inner().mapping?.devices.into_iter().next()?.volume);
    if !job.keep {
        delete(volumes, &job).await?;
    }
    if let Some(first) = failures.first() {
        return Err(format!("{} of {} renders failed, the first: {first}", failures.len(), job.count).into());
    }
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    Ok(json!({"renders": times.len(), "in_flight": in_flight, "total_ms": total, "per_second": (times.len() as f64 / total * 1e4).round() / 10.0,
        "min_ms": at(0.0), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0), "times_ms": times, "allocated_bytes": volume.map(|volume| volume.allocated_size_bytes)}))
}

/// Takes the next name until none is left. Gives the times of what succeeded, and why others failed.
async fn one_after_another(channel: Channel, job: Arc<Job>) -> (Vec<f64>, Vec<String>) {
    let mut renders = RenderServiceClient::new(channel);
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    loop {
        let number = job.next.fetch_add(1, Ordering::Relaxed);
        if number >= job.count {
            return (done, failed);
        }
        let begun = Instant::now();
        match one(&mut renders, &job, number).await {
            Ok(()) => done.push(ms(begun)),
            Err(error) => failed.push(error.to_string()),
        }
    }
}

fn reference(job: &Job, number: usize) -> proto::VolumeRef {
    let name = job.volume.clone().unwrap_or_else(|| format!("bench-{}-{number}", job.run));
    proto::VolumeRef { pool: job.pool.clone(), name }
}

async fn one(renders: &mut RenderServiceClient<Channel>, job: &Job, number: usize) -> Result<()> {
    let volume = reference(job, number);
    let spec = proto::RenderSpec {
        image_id: job.image.clone(),
        instance: Some(instance(&volume.name, number)),
        volume: Some(volume.clone()),
        format: job.format as i32,
        overwrite: job.overwrite,
        options: job.options,
        ..Default::default()
    };
    let request = proto::StartRenderRequest { idempotency_key: format!("bench-{}-{number}", job.run), spec: Some(spec) };
    let started = renders.start_render(request).await?.into_inner();
    finish(renders, &started.render.ok_or("no render")?.id).await?;
    Ok(())
}

/// Everything that is injected into a usual server: names, network for both families, login key, fresh host keys, machine-id, fstab.
fn instance(name: &str, number: usize) -> proto::InstanceConfig {
    let interface = proto::Interface {
        name: "eth0".into(),
        mac: format!("52:54:00:00:{:02x}:{:02x}", number >> 8 & 0xff, number & 0xff),
        addresses: vec![format!("10.0.{}.{}/16", number >> 8 & 0xff, number & 0xff | 1), format!("2001:db8::{:x}/64", number + 1)],
        gateway4: "10.0.255.254".into(),
        gateway6: "2001:db8::ffff".into(),
        ..Default::default()
    };
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti operator@example.com";
    proto::InstanceConfig {
        name: name.into(),
        hostname: format!("{name}.example.com"),
        network: Some(proto::Network {
            interfaces: vec![interface],
            nameservers: vec!["192.0.2.53".into(), "2001:db8::53".into()],
            search: vec!["example.com".into()],
            ..Default::default()
        }),
        authorized_keys: vec![proto::AuthorizedKeys { user: "root".into(), keys: vec![key.into()] }],
        ..Default::default()
    }
}

async fn delete(volumes: VolumeServiceClient<Channel>, job: &Arc<Job>) -> Result<()> {
    let mut tasks = JoinSet::new();
    let next = Arc::new(AtomicUsize::new(0));
    for _ in 0..CONNECTIONS_MAX {
        let (mut volumes, job, next) = (volumes.clone(), Arc::clone(job), Arc::clone(&next));
        tasks.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= job.count {
                    return;
                }
                // Of a render that failed there is nothing to delete; what is left over shows in the pool.
                let _ = volumes.delete_volume(proto::DeleteVolumeRequest { volume: Some(reference(&job, number)), delete_data: false }).await;
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task?;
    }
    Ok(())
}

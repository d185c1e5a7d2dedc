//! A thousand calls at once, among clients that are slow, silent or gone: memory stays bounded, health stays green, and what was opened is closed again.
//!
//! `scripts/load.sh` runs this and prints the times; the test checks everything but them.

mod common;

use std::{
    io::Write as _,
    os::unix::net::UnixStream as StdUnixStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cloudletd::proto::{self, host_service_client::HostServiceClient, image_service_client::ImageServiceClient};
use common::daemon::Daemon;
use tokio::net::UnixStream;
use tonic::{
    Code,
    transport::{Channel, Endpoint, Uri},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// Calls at one time, over so many connections.
const CALLS: usize = 1000;
const CONNECTIONS: usize = 50;
/// How often each of them calls.
const ROUNDS: usize = 10;
/// Clients of each bad kind.
const BAD: usize = 200;
/// What the daemon may hold more than before, while all of this goes on. A connection costs some tens of kilobytes, a call less.
const GROWTH_KIB_MAX: u64 = 128 * 1024;

async fn connect(socket: &Path) -> Channel {
    let socket = socket.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.expect("a connection")
}

/// Connections that say nothing, or half a greeting, and stay.
fn silent(socket: &Path) -> Vec<StdUnixStream> {
    let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let open = |index: usize| {
        let mut stream = StdUnixStream::connect(socket).expect("a connection");
        stream.write_all(&greeting[..index % greeting.len()]).expect("sent");
        stream
    };
    (0..BAD).map(open).collect()
}

/// Uploads that begin and then stall. Those beyond the daemon's limit are refused at once.
async fn stalled_uploads(channel: &Channel) -> Vec<tokio::task::JoinHandle<Code>> {
    let upload = |_| {
        let mut client = ImageServiceClient::new(channel.clone());
        tokio::spawn(async move {
            let (sender, receiver) = tokio::sync::mpsc::channel(2);
            let header = proto::UploadHeader::default();
            let part = Some(proto::upload_rootfs_request::Part::Header(header));
            sender.send(proto::UploadRootfsRequest { part }).await.expect("there is room");
            let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
            let code = client.upload_rootfs(stream).await.map_or_else(|status| status.code(), |_| Code::Ok);
            drop(sender);
            code
        })
    };
    (0..BAD).map(upload).collect()
}

/// Clients that call and go away before the answer, again and again.
fn leaving(socket: &Path, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<usize> {
    let (socket, stop) = (socket.to_path_buf(), Arc::clone(stop));
    tokio::spawn(async move {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            let mut client = HostServiceClient::new(connect(&socket).await);
            let call = tokio::spawn(async move { client.get_host_info(proto::GetHostInfoRequest {}).await });
            tokio::time::sleep(Duration::from_micros(300 * (count as u64 % 5))).await;
            call.abort();
            count += 1;
        }
        count
    })
}

/// Asks for the daemon's health until told to stop; how often it was asked, and the longest answer in microseconds.
fn health(channel: Channel, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<(usize, u64)> {
    let stop = Arc::clone(stop);
    tokio::spawn(async move {
        let (mut count, worst) = (0, AtomicU64::new(0));
        let mut client = HealthClient::new(channel);
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let request = HealthCheckRequest { service: "cloudlet.v1.HostService".into() };
            let answer = tokio::time::timeout(Duration::from_secs(30), client.check(request)).await.expect("in time").expect("answered");
            assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
            worst.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
            count += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (count, worst.into_inner())
    })
}

/// All calls of all rounds; how long each took, in microseconds, sorted.
async fn calls(channels: &[Channel]) -> Vec<u64> {
    let caller = |index: usize| {
        let mut client = HostServiceClient::new(channels[index % CONNECTIONS].clone());
        tokio::spawn(async move {
            let mut times = Vec::with_capacity(ROUNDS);
            for _ in 0..ROUNDS {
                let begun = Instant::now();
                client.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered under load");
                times.push(begun.elapsed().as_micros() as u64);
            }
            times
        })
    };
    let mut times = Vec::with_capacity(CALLS * ROUNDS);
    for task in (0..CALLS).map(caller).collect::<Vec<_>>() {
        times.extend(task.await.expect("no panic"));
    }
    times.sort_unstable();
    times
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_among_slow_and_leaving_clients_are_answered_in_bounded_memory() {
    raise_file_limit();
    let mut daemon = Daemon::start("[fetch]\nidle_timeout_secs = 5\n");
    let socket = daemon.socket();
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        channels.push(connect(&socket).await);
    }
    // The first answer starts every tool of the host; that is not what is looked at here.
    HostServiceClient::new(channels[0].clone()).get_host_info(proto::GetHostInfoRequest {}).await.expect("answered");
    let (resident, descriptors) = (daemon.resident_kib(), daemon.open_descriptors());

    let stop = Arc::new(AtomicBool::new(false));
    let silent = silent(&socket);
    let uploads = stalled_uploads(&connect(&socket).await).await;
    let leaving: Vec<_> = (0..4).map(|_| leaving(&socket, &stop)).collect();
    let healthy = health(connect(&socket).await, &stop);
    let begun = Instant::now();
    let times = calls(&channels).await;
    let seconds = begun.elapsed().as_secs_f64();
    let grown = daemon.peak_resident_kib().saturating_sub(resident);
    stop.store(true, Ordering::Relaxed);
    let (checks, worst) = healthy.await.expect("healthy all the time");
    let mut left = 0;
    for task in leaving {
        left += task.await.expect("no panic");
    }
    let mut codes = Vec::new();
    for upload in uploads {
        codes.push(upload.await.expect("no panic"));
    }
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
    println!(
        "load: {} calls of GetHostInfo, {CALLS} at a time, {:.0} a second: p50 {:.1} ms, p99 {:.1} ms, worst {:.1} ms; health {checks} times, worst {:.1} ms; \
         {left} clients left early; memory grew by {} MiB",
        times.len(),
        times.len() as f64 / seconds,
        at(0.5),
        at(0.99),
        at(1.0),
        worst as f64 / 1000.0,
        grown / 1024
    );

    assert!(grown < GROWTH_KIB_MAX, "the daemon grew by {grown} KiB");
    assert!(checks > 0 && left > 0, "{checks} {left}");
    let refused = codes.iter().filter(|code| **code == Code::ResourceExhausted).count();
    let stalled = codes.iter().filter(|code| **code == Code::DeadlineExceeded).count();
    assert_eq!((refused + stalled, stalled > 0, refused > 0), (BAD, true, true), "{codes:?}");
    drop(silent);
    let begun = Instant::now();
    while daemon.open_descriptors() > descriptors + 8 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} descriptors are open, before there were {descriptors}", daemon.open_descriptors());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(channels);
    assert!(daemon.stop().success(), "{}", daemon.log());
}

/// The clients of this test are in one process.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("up to the hard limit");
}

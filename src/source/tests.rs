//! The server here speaks HTTP/1.1 by hand, so that it can lie.

use std::{
    collections::HashMap,
    os::unix::fs::symlink,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use super::*;

mod https;
#[path = "mirror_tests.rs"]
mod mirrors;

#[derive(Debug, Clone)]
struct Request {
    /// Counted from 1.
    number: usize,
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn range_start(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

enum Step {
    Send(Vec<u8>),
    Wait(Duration),
}

/// Answers every request on a connection of its own, and remembers what was asked.
struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start(handler: impl Fn(&Request) -> Vec<Step> + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let (log, count) = (Arc::clone(&requests), Arc::clone(&connections));
        let handler = Arc::new(handler);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream, Arc::clone(&log), Arc::clone(&handler)));
            }
        });
        Server { port, requests, connections }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("not poisoned").clone()
    }
}

async fn serve<H: Fn(&Request) -> Vec<Step>>(stream: TcpStream, log: Arc<Mutex<Vec<Request>>>, handler: Arc<H>) {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
            return;
        }
        if line.trim_end().is_empty() {
            break;
        }
        lines.push(line.trim_end().to_owned());
    }
    let path = lines[0].split(' ').nth(1).expect("a request line").to_owned();
    let headers = lines[1..].iter().filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())).collect();
    let request = {
        let mut log = log.lock().expect("not poisoned");
        let request = Request { number: log.len() + 1, path, headers };
        log.push(request.clone());
        request
    };
    for step in handler(&request) {
        match step {
            Step::Send(bytes) => {
                if stream.get_mut().write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Step::Wait(pause) => tokio::time::sleep(pause).await,
        }
    }
    let _ = stream.get_mut().shutdown().await;
}

fn send(head: &str, body: &[u8]) -> Step {
    Step::Send([format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes(), body].concat())
}

/// What a good server says to a request for `content`.
fn good(request: &Request, content: &[u8], etag: &str) -> Vec<Step> {
    let current = request.headers.get("if-range").is_none_or(|tag| tag == etag);
    let len = content.len();
    match request.range_start() {
        Some(start) if current && start >= len => {
            vec![send(&format!("416 Range Not Satisfiable\r\nContent-Length: 0\r\nContent-Range: bytes */{len}"), b"")]
        }
        Some(start) if current => {
            let head =
                format!("206 Partial Content\r\nETag: {etag}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{len}", len - start, len - 1);
            vec![send(&head, &content[start..])]
        }
        _ => vec![send(&format!("200 OK\r\nETag: {etag}\r\nContent-Type: application/zstd\r\nContent-Length: {len}"), content)],
    }
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn with_policy(policy: UrlPolicy) -> Config {
    Config { rules: Rules { policy, ..config().rules }, ..config() }
}

fn config() -> Config {
    Config {
        rules: Rules {
            connect_timeout: Duration::from_secs(2),
            idle_timeout: Duration::from_millis(300),
            policy: UrlPolicy { allow_addresses: vec!["127.0.0.1".parse().expect("an address")], ..UrlPolicy::default() },
            ..Config::default().rules
        },
        total_timeout: Duration::from_secs(20),
        attempts: 3,
        pause: Duration::from_millis(10),
        ..Config::default()
    }
}

struct Run {
    result: Result<Fetched>,
    bytes: Vec<u8>,
    progress: Progress,
}

impl Run {
    #[track_caller]
    fn fetched(&self, want: &[u8]) -> &Fetched {
        let fetched = self.result.as_ref().unwrap_or_else(|error| panic!("{error:?}"));
        assert_eq!((fetched.digest, fetched.size), (Digest::of(want), want.len() as u64));
        assert!(self.bytes == want, "the file differs");
        fetched
    }

    #[track_caller]
    fn failed(&self, kind: Kind, reason: &str) -> &Error {
        let error = self.result.as_ref().expect_err("must fail");
        assert_eq!((error.kind(), error.reason()), (kind, reason), "{error:?}");
        error
    }
}

async fn run_over(config: Config, descriptor: Descriptor, before: &[u8]) -> Run {
    let dir = tempfile::tempdir().expect("a directory");
    let partial = dir.path().join("partial");
    if !before.is_empty() {
        std::fs::write(&partial, before).expect("written");
    }
    let progress = Progress::default();
    let fetcher = Fetcher::new(config).expect("a good configuration");
    let result = fetcher.fetch(&descriptor, &partial, &progress).await;
    Run { result, bytes: std::fs::read(&partial).unwrap_or_default(), progress }
}

async fn run(config: Config, url: &str, digest: Option<Digest>) -> Run {
    run_over(config, Descriptor { url: url.to_owned(), digest, size: None }, b"").await
}

#[tokio::test]
async fn a_good_server_is_fetched_from_with_and_without_digest() {
    let bytes = content(3_000_000);
    let server = Server::start({
        let bytes = bytes.clone();
        move |request| good(request, &bytes, "\"a\"")
    })
    .await;
    for digest in [None, Some(Digest::of(&bytes))] {
        let run = run(config(), &server.url("/x.tar.zst?token=secret"), digest).await;
        let fetched = run.fetched(&bytes);
        assert_eq!(fetched.media_type_hint.as_deref(), Some("application/zstd"));
        assert_eq!(fetched.url_used, server.url("/x.tar.zst?…"));
        let reading = run.progress.reading();
        assert_eq!((reading.bytes_done, reading.bytes_total), (bytes.len() as u64, bytes.len() as u64));
    }
    assert_eq!(server.requests()[0].headers.get("accept-encoding").map(String::as_str), Some("identity"));
}

#[tokio::test]
async fn a_broken_transfer_is_resumed_with_the_validator() {
    let bytes = content(100_000);
    let server = Server::start({
        let bytes = bytes.clone();
        move |request| match request.number {
            1 => vec![send(&format!("200 OK\r\nETag: \"a\"\r\nContent-Length: {}", bytes.len()), &bytes[..40_000])],
            _ => good(request, &bytes, "\"a\""),
        }
    })
    .await;
    run(config(), &server.url("/x"), None).await.fetched(&bytes);
    let second = &server.requests()[1];
    assert_eq!((second.range_start(), second.headers.get("if-range").map(String::as_str)), (Some(40_000), Some("\"a\"")));
}

#[tokio::test]
async fn a_file_that_changed_in_between_or_has_no_validator_is_fetched_from_the_start() {
    let bytes = content(100_000);
    for (first_tag, expected_range) in [("ETag: \"old\"\r\n", Some(40_000)), ("", None), ("ETag: W/\"a\"\r\n", None)] {
        let server = Server::start({
            let bytes = bytes.clone();
            move |request| match request.number {
                1 => vec![send(&format!("200 OK\r\n{first_tag}Content-Length: {}", bytes.len()), &vec![9; 40_000])],
                _ => good(request, &bytes, "\"a\""),
            }
        })
        .await;
        run(config(), &server.url("/x"), None).await.fetched(&bytes);
        assert_eq!(server.requests()[1].range_start(), expected_range, "{first_tag:?}");
    }
}

#[tokio::test]
async fn what_an_earlier_run_left_is_used_when_the_digest_can_judge_it() {
    let bytes = content(100_000);
    let digest = Some(Digest::of(&bytes));
    let serve = |bytes: Vec<u8>| move |request: &Request| good(request, &bytes, "\"a\"");
    let server = Server::start(serve(bytes.clone())).await;
    let descriptor = Descriptor { url: server.url("/x"), digest, size: Some(bytes.len() as u64) };
    run_over(config(), descriptor.clone(), &bytes[..70_000]).await.fetched(&bytes);
    assert_eq!(server.requests().iter().map(Request::range_start).collect::<Vec<_>>(), [Some(70_000)]);
    // All of it is there already.
    run_over(config(), descriptor.clone(), &bytes).await.fetched(&bytes);
    // It was something else: one more transfer, from the start.
    run_over(config(), descriptor.clone(), &[1; 70_000]).await.fetched(&bytes);
    // It is longer than the file.
    run_over(config(), descriptor.clone(), &[1; 170_000]).await.fetched(&bytes);
    // Nothing could judge it.
    let before = server.requests().len();
    run_over(config(), Descriptor { digest: None, ..descriptor }, &bytes[..70_000]).await.fetched(&bytes);
    assert_eq!(server.requests()[before].range_start(), None);
}

#[tokio::test]
async fn a_server_that_ignores_or_garbles_ranges_is_asked_for_everything() {
    let bytes = content(100_000);
    for garbled in ["bytes 0-99999/100000", "bytes 70001-99999/100000", "garbage"] {
        let server = Server::start({
            let bytes = bytes.clone();
            move |request| match request.range_start() {
                Some(_) => vec![send(&format!("206 Partial Content\r\nContent-Range: {garbled}\r\nContent-Length: 30000"), &[0; 30_000])],
                None => good(request, &bytes, "\"a\""),
            }
        })
        .await;
        let descriptor = Descriptor { url: server.url("/x"), digest: Some(Digest::of(&bytes)), size: None };
        run_over(config(), descriptor, &bytes[..70_000]).await.fetched(&bytes);
        assert_eq!(server.requests().len(), 2, "{garbled}");
    }
    let server = Server::start({
        let bytes = bytes.clone();
        move |_| vec![send(&format!("200 OK\r\nContent-Length: {}", bytes.len()), &bytes)]
    })
    .await;
    let descriptor = Descriptor { url: server.url("/x"), digest: Some(Digest::of(&bytes)), size: None };
    run_over(config(), descriptor, &bytes[..70_000]).await.fetched(&bytes);
    assert_eq!(server.requests().len(), 1);
    // A part that nobody asked for is not a file.
    let server = Server::start(|_| vec![send("206 Partial Content\r\nContent-Range: bytes 0-4/9\r\nContent-Length: 5", b"hello")]).await;
    run(config(), &server.url("/x"), None).await.failed(Kind::Corrupt, "HTTP_ANSWER");
}

#[tokio::test]
async fn success_with_the_wrong_body_is_a_mismatch_that_is_not_kept_or_retried() {
    let server = Server::start(|_| vec![send("200 OK\r\nContent-Length: 9\r\nContent-Type: text/html", b"<html>no!")]).await;
    let want = content(10);
    let run = run(config(), &server.url("/x"), Some(Digest::of(&want))).await;
    let error = run.failed(Kind::Corrupt, "DIGEST_MISMATCH");
    assert!(error.message().contains(&Digest::of(&want).to_string()) && error.message().contains(&Digest::of(b"<html>no!").to_string()));
    assert!(run.bytes.is_empty());
    assert_eq!(server.requests().len(), 1);

    for length in ["Content-Length: 9\r\n", ""] {
        let server = Server::start(move |_| vec![send(&format!("200 OK\r\n{length}X: y"), b"<html>no!")]).await;
        for size in [8, 10] {
            let run = run_over(config(), Descriptor { url: server.url("/x"), digest: None, size: Some(size) }, b"").await;
            run.failed(Kind::Corrupt, "SIZE_MISMATCH");
            assert!(run.bytes.is_empty() || run.bytes.len() < 10);
        }
    }
}

#[tokio::test]
async fn sizes_are_limited_before_and_during_the_transfer() {
    let announced = Server::start(|_| vec![send("200 OK\r\nContent-Length: 1000001", b"x")]).await;
    let endless = Server::start(|_| {
        let chunk = [b"10000\r\n".as_slice(), &vec![7; 0x10000], b"\r\n"].concat();
        let mut steps = vec![send("200 OK\r\nTransfer-Encoding: chunked", b"")];
        steps.extend((0..200).map(|_| Step::Send(chunk.clone())));
        steps
    })
    .await;
    let config = Config { size_max: 1_000_000, ..config() };
    for server in [&announced, &endless] {
        let run = run(config.clone(), &server.url("/x"), None).await;
        run.failed(Kind::NoSpace, "ROOTFS_TOO_LARGE");
        assert!(run.bytes.len() <= 1_000_000);
        assert_eq!(server.requests().len(), 1);
    }
    let descriptor = Descriptor { url: announced.url("/x"), digest: None, size: Some(1_000_001) };
    run_over(config, descriptor, b"").await.failed(Kind::NoSpace, "ROOTFS_TOO_LARGE");
    assert_eq!(announced.requests().len(), 1, "what is announced to be too large is not asked for");
}

#[tokio::test]
async fn a_lying_content_length_never_passes() {
    // Too short a body breaks the transfer, however often; the surplus of too long a body is never read.
    let short = Server::start(|_| vec![send("200 OK\r\nContent-Length: 100", b"hello")]).await;
    assert!(run(config(), &short.url("/x"), None).await.failed(Kind::Unavailable, "UNAVAILABLE").is_retryable());
    assert_eq!(short.requests().len(), 3);
    let chunked = Server::start(|_| vec![send("200 OK\r\nTransfer-Encoding: chunked", b"5\r\nhello\r\n")]).await;
    run(config(), &chunked.url("/x"), None).await.failed(Kind::Unavailable, "UNAVAILABLE");
    let long = Server::start(|_| vec![send("200 OK\r\nContent-Length: 5", b"hello and more")]).await;
    run(config(), &long.url("/x"), None).await.fetched(b"hello");
    run(config(), &long.url("/x"), Some(Digest::of(b"hello and more"))).await.failed(Kind::Corrupt, "DIGEST_MISMATCH");
}

#[tokio::test]
async fn stalls_are_cut_and_resumed() {
    let bytes = content(100_000);
    let server = Server::start({
        let bytes = bytes.clone();
        move |request| match request.number {
            1 => vec![Step::Wait(Duration::from_secs(30))],
            2 => vec![
                send(&format!("200 OK\r\nETag: \"a\"\r\nContent-Length: {}", bytes.len()), &bytes[..50_000]),
                Step::Wait(Duration::from_secs(30)),
            ],
            _ => good(request, &bytes, "\"a\""),
        }
    })
    .await;
    let config = Config { rules: Rules { connect_timeout: Duration::from_millis(200), ..config().rules }, ..config() };
    run(config, &server.url("/x"), None).await.fetched(&bytes);
    assert_eq!(server.requests()[2].range_start(), Some(50_000));
}

#[tokio::test]
async fn one_budget_of_time_covers_everything() {
    // A byte now and then is no stall.
    let drip = Server::start(|_| {
        let mut steps = vec![send("200 OK\r\nContent-Length: 1000", b"")];
        steps.extend((0..1000).flat_map(|_| [Step::Wait(Duration::from_millis(50)), Step::Send(vec![1])]));
        steps
    })
    .await;
    let config = Config { total_timeout: Duration::from_millis(700), attempts: 1000, ..config() };
    let started = Instant::now();
    run(config.clone(), &drip.url("/x"), None).await.failed(Kind::Timeout, "TIMEOUT");
    let down = Server::start(|_| vec![send("503 Service Unavailable\r\nContent-Length: 0", b"")]).await;
    let run = run(config, &down.url("/x"), None).await;
    let error = run.failed(Kind::Timeout, "TIMEOUT");
    assert!(error.chain().contains("503"), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn what_may_pass_is_retried_and_what_stays_is_not() {
    for (status, kind, reason, requests) in [
        ("404 Not Found", Kind::NotFound, "ROOTFS_NOT_FOUND", 1),
        ("410 Gone", Kind::NotFound, "ROOTFS_NOT_FOUND", 1),
        ("403 Forbidden", Kind::PermissionDenied, "HTTP_STATUS", 1),
        ("400 Bad Request", Kind::InvalidRequest, "HTTP_STATUS", 1),
        ("204 No Content", Kind::InvalidRequest, "HTTP_STATUS", 1),
        ("500 Internal Server Error", Kind::Unavailable, "HTTP_STATUS", 3),
        ("503 Service Unavailable\r\nRetry-After: 0", Kind::Unavailable, "HTTP_STATUS", 3),
        ("503 Service Unavailable\r\nRetry-After: 86400", Kind::Unavailable, "HTTP_STATUS", 1),
        ("429 Too Many Requests", Kind::Unavailable, "HTTP_STATUS", 3),
    ] {
        let server = Server::start(move |_| vec![send(&format!("{status}\r\nContent-Length: 0"), b"")]).await;
        run(config(), &server.url("/x"), None).await.failed(kind, reason);
        assert_eq!(server.requests().len(), requests, "{status}");
    }
    let closed = Server::start(|_| vec![]).await;
    run(config(), &closed.url("/x"), None).await.failed(Kind::Unavailable, "UNAVAILABLE");
    assert_eq!(closed.requests().len(), 3);
    // Nobody listens there any more.
    let port = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("bound").port();
    run(config(), &format!("http://127.0.0.1:{port}/x"), None).await.failed(Kind::Unavailable, "UNAVAILABLE");
}

#[tokio::test]
async fn redirects_are_followed_checked_and_counted() {
    let bytes = content(1000);
    let server = Server::start({
        let bytes = bytes.clone();
        move |request| match request.path.as_str() {
            "/relative" => vec![send("302 Found\r\nLocation: ./x\r\nContent-Length: 0", b"")],
            "/private" => vec![send("302 Found\r\nLocation: http://127.0.0.2:1/x\r\nContent-Length: 0", b"")],
            "/metadata" => vec![send("307 Temporary Redirect\r\nLocation: http://169.254.169.254/latest\r\nContent-Length: 0", b"")],
            "/file" => vec![send("302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0", b"")],
            "/nowhere" => vec![send("302 Found\r\nContent-Length: 0", b"")],
            "/loop" => vec![send("302 Found\r\nLocation: /loop\r\nContent-Length: 0", b"")],
            "/name" => vec![send("302 Found\r\nLocation: http://localhost:1/x\r\nContent-Length: 0", b"")],
            _ => good(request, &bytes, "\"a\""),
        }
    })
    .await;
    let followed = run(config(), &server.url("/relative"), None).await;
    assert_eq!(followed.fetched(&bytes).url_used, server.url("/x"));
    for path in ["/private", "/metadata", "/file"] {
        run(config(), &server.url(path), None).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
    }
    run(config(), &server.url("/nowhere"), None).await.failed(Kind::Corrupt, "HTTP_ANSWER");
    let before = server.requests().len();
    run(config(), &server.url("/loop"), None).await.failed(Kind::Corrupt, "TOO_MANY_REDIRECTS");
    assert_eq!(server.requests().len() - before, 6);
    let denying = with_policy(UrlPolicy { deny_hosts: vec!["localhost".into()], ..config().rules.policy });
    run(denying, &server.url("/name"), None).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
}

#[tokio::test]
async fn a_name_that_leads_to_a_denied_address_gets_no_packet() {
    let server = Server::start(|_| vec![send("200 OK\r\nContent-Length: 5", b"hello")]).await;
    let url = format!("http://localhost:{}/x", server.port);
    let closed = with_policy(UrlPolicy::default());
    let run = run(closed.clone(), &url, None).await;
    let error = run.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
    assert!(error.message().contains("127.0.0.1") || error.message().contains("::1"), "{error:?}");
    assert_eq!(server.connections.load(Ordering::SeqCst), 0);
    super::tests::run(config(), &url, None).await.fetched(b"hello");
    super::tests::run(closed, &server.url("/x"), None).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
}

#[tokio::test]
async fn mirrors_are_asked_in_order_instead_of_the_origin() {
    let bytes = content(1000);
    let good_bytes = bytes.clone();
    let missing = Server::start(|_| vec![send("404 Not Found\r\nContent-Length: 0", b"")]).await;
    let wrong = Server::start(|_| vec![send("200 OK\r\nContent-Length: 5", b"hello")]).await;
    let right = Server::start(move |request| good(request, &good_bytes, "\"a\"")).await;
    let away = Server::start(|_| vec![send("302 Found\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0", b"")]).await;
    let mirror = |servers: &[&Server]| Config {
        // Mirrors may be at private addresses, what strangers name may not.
        rules: Rules { policy: UrlPolicy::default(), ..config().rules },
        mirrors: vec![Mirror {
            prefix: "https://deb.example/cloud/".into(),
            replace: servers.iter().map(|server| server.url("/m/")).collect(),
            trusted: false,
        }],
        ..config()
    };
    let digest = Some(Digest::of(&bytes));
    let found = run(mirror(&[&missing, &wrong, &right]), "https://deb.example/cloud/a/b.tar?v=1", digest).await;
    assert_eq!(found.fetched(&bytes).url_used, right.url("/m/a/b.tar?…"));
    assert_eq!([&missing, &wrong, &right].map(|server| server.requests()[0].path.clone()), ["/m/a/b.tar?v=1", "/m/a/b.tar?v=1", "/m/a/b.tar?v=1"]);
    run(mirror(&[&missing]), "https://deb.example/cloud/x", digest).await.failed(Kind::NotFound, "ROOTFS_NOT_FOUND");
    run(mirror(&[&away]), "https://deb.example/cloud/x", digest).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
    // Dots can't climb out of the mirror's directory: the parser takes them out before the prefix is compared.
    let fetcher = Fetcher::new(mirror(&[&right])).expect("good");
    for climbing in ["https://deb.example/cloud/../secret", "https://deb.example/cloud/%2e%2e/secret"] {
        let descriptor = Descriptor { url: climbing.into(), digest, size: None };
        let candidates = fetcher.candidates(&policy::parse(climbing).expect("a URL"), &descriptor).expect("allowed");
        assert_eq!(candidates, [Candidate::Http { url: policy::parse("https://deb.example/secret").expect("a URL"), mirror: None }]);
    }
}

#[tokio::test]
async fn mirrors_that_lie_stall_truncate_or_answer_with_a_page_are_passed_over_and_asked_last_for_a_while() {
    let bytes = content(50_000);
    let (lie, half, whole) = (content(50_001)[1..].to_vec(), bytes[..20_000].to_vec(), bytes.clone());
    let lying = Server::start(move |request| good(request, &lie, "\"a\"")).await;
    let stalling = Server::start(|_| vec![Step::Wait(Duration::from_secs(30))]).await;
    let truncating = Server::start(move |_| vec![send("200 OK\r\nContent-Length: 50000", &half)]).await;
    let page = Server::start(|_| vec![send("200 OK\r\nContent-Type: text/html\r\nContent-Length: 21", b"<html>sorry</html>...")]).await;
    let right = Server::start(move |request| good(request, &whole, "\"a\"")).await;
    let servers = [&lying, &stalling, &truncating, &page, &right];
    let mirrors =
        vec![Mirror { prefix: "https://deb.example/cloud/".into(), replace: servers.map(|server| server.url("/")).to_vec(), trusted: false }];
    let fetcher =
        Fetcher::new(Config { rules: Rules { connect_timeout: Duration::from_millis(200), ..config().rules }, mirrors, ..config() }).expect("good");
    let descriptor = Descriptor { url: "https://deb.example/cloud/x".into(), digest: Some(Digest::of(&bytes)), size: Some(50_000) };
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["first", "second"] {
        let path = dir.path().join(name);
        let fetched = fetcher.fetch(&descriptor, &path, &Progress::default()).await.expect("the last one is good");
        assert_eq!(fetched.url_used, right.url("/x"), "{name}");
        assert_eq!(std::fs::read(&path).expect("there"), bytes);
    }
    assert_eq!([&lying, &stalling, &truncating, &page].map(|server| server.requests().len()), [1, 1, 1, 1], "the second time they were not asked");
}

#[tokio::test]
async fn a_store_of_blobs_is_asked_by_digest_when_that_is_known() {
    let bytes = content(1000);
    let whole = bytes.clone();
    let blobs = Server::start(move |request| good(request, &whole, "\"a\"")).await;
    let mirrors = vec![Mirror { prefix: "https://deb.example/".into(), replace: vec![blobs.url("/blobs/sha256/{sha256}")], trusted: false }];
    let config = Config { mirrors, ..config() };
    let digest = Digest::of(&bytes);
    run(config.clone(), "https://deb.example/any/path?x", Some(digest)).await.fetched(&bytes);
    assert_eq!(blobs.requests()[0].path, format!("/blobs/sha256/{}", digest.hex()));
    // Without a digest there is only the origin.
    let url = policy::parse("https://deb.example/any/path").expect("a URL");
    let descriptor = Descriptor { url: url.to_string(), digest: None, size: None };
    let candidates = Fetcher::new(config).expect("good").candidates(&url, &descriptor).expect("allowed");
    assert_eq!(candidates, [Candidate::Http { url, mirror: None }]);
}

#[tokio::test]
async fn a_transfer_goes_on_at_another_mirror_where_the_first_one_broke() {
    let bytes = content(100_000);
    let (half, whole) = (bytes.clone(), bytes.clone());
    let broken = Server::start(move |_| vec![send(&format!("200 OK\r\nContent-Length: {}", half.len()), &half[..60_000])]).await;
    let right = Server::start(move |request| good(request, &whole, "\"a\"")).await;
    let config = Config {
        mirrors: vec![Mirror { prefix: "http://deb.example".into(), replace: vec![broken.url(""), right.url("")], trusted: false }],
        ..config()
    };
    run(config, "http://deb.example/x", Some(Digest::of(&bytes))).await.fetched(&bytes);
    let request = &right.requests()[0];
    assert_eq!((request.range_start(), request.headers.get("if-range")), (Some(60_000), None));
}

#[tokio::test]
async fn cancelling_ends_a_stalled_transfer_soon() {
    let server = Server::start(|_| vec![send("200 OK\r\nContent-Length: 100", b"hello"), Step::Wait(Duration::from_secs(60))]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let progress = Progress::default();
    let fetcher = Fetcher::new(Config { rules: Rules { idle_timeout: Duration::from_secs(60), ..config().rules }, ..config() }).expect("good");
    let descriptor = Descriptor { url: server.url("/x"), digest: None, size: None };
    let canceller = progress.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        canceller.cancel();
    });
    let started = Instant::now();
    let error = fetcher.fetch(&descriptor, &dir.path().join("partial"), &progress).await.expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(std::fs::read(dir.path().join("partial")).expect("kept"), b"hello");
}

#[tokio::test]
async fn files_are_fetched_from_below_the_roots_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("root/sub")).expect("made");
    std::fs::write(at("root/sub/a b.tar"), b"content").expect("written");
    std::fs::write(at("secret"), b"secret").expect("written");
    symlink("sub/a b.tar", at("root/inside")).expect("made");
    symlink("../secret", at("root/outside")).expect("made");
    symlink(at("secret"), at("root/absolute")).expect("made");
    symlink("..", at("root/up")).expect("made");
    symlink("/proc/self/root", at("root/magic")).expect("made");
    nix::unistd::mkfifo(&at("root/fifo"), nix::sys::stat::Mode::S_IRWXU).expect("made");
    let config = Config { file_roots: vec![at("root")], ..config() };
    let url = |name: &str| format!("file://{}", at(name).display());
    for name in ["root/sub/a%20b.tar", "root/inside", "root/./sub//a%20b.tar", "root/sub/../inside"] {
        let run = run(config.clone(), &url(name), Some(Digest::of(b"content"))).await;
        assert_eq!(run.fetched(b"content").media_type_hint, None, "{name}");
    }
    let refused = [
        "secret",
        "root/outside",
        "root/absolute",
        "root/up/secret",
        "root/magic/etc/passwd",
        "root/fifo",
        "root/sub",
        "root",
        "root/../secret",
        "root/%2e%2e/secret",
    ];
    for name in refused {
        run(config.clone(), &url(name), None).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
    }
    run(config.clone(), &format!("file://host{}", at("root/inside").display()), None).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
    run(config.clone(), &url("root/none"), None).await.failed(Kind::NotFound, "ROOTFS_NOT_FOUND");
    run(config.clone(), &url("root/inside"), Some(Digest::of(b"other"))).await.failed(Kind::Corrupt, "DIGEST_MISMATCH");
    run(Config { size_max: 6, ..config.clone() }, &url("root/inside"), None).await.failed(Kind::NoSpace, "ROOTFS_TOO_LARGE");
    run(super::tests::config(), &url("root/inside"), None).await.failed(Kind::PermissionDenied, "URL_NOT_ALLOWED");
    let mirrored = Config { mirrors: vec![Mirror { prefix: "https://deb.example/".into(), replace: vec![url("root/")], trusted: true }], ..config };
    run(mirrored, "https://deb.example/sub/a%20b.tar", None).await.fetched(b"content");
}

#[test]
fn wrong_configurations_and_urls_are_refused_before_anything_is_asked() {
    let wrong = |config: Config| Fetcher::new(config).expect_err("wrong").violations()[0].field.clone();
    assert_eq!(wrong(Config { attempts: 0, ..config() }), "fetch.attempts");
    assert_eq!(wrong(Config { file_roots: vec!["relative".into()], ..config() }), "fetch.file_roots");
    assert_eq!(wrong(Config { file_roots: vec!["/srv/../etc".into()], ..config() }), "fetch.file_roots");
    for url in ["ftp://x/", "no url", "https://x/?query"] {
        let mirror = Mirror { prefix: "https://a/".into(), replace: vec![url.into()], trusted: false };
        assert_eq!(wrong(Config { mirrors: vec![mirror], ..config() }), "fetch.mirror", "{url}");
    }
    let fetcher = Fetcher::new(config()).expect("good");
    assert!(fetcher.check_url("https://deb.example/x.tar.zst").is_ok());
    assert_eq!(fetcher.check_url("x").expect_err("no URL").kind(), Kind::InvalidRequest);
    for url in ["ftp://a/x", "file:///etc/passwd", "http://10.0.0.1/", "http://user:pw@deb.example/"] {
        let error = fetcher.check_url(url).expect_err("not allowed");
        assert_eq!((error.kind(), error.reason()), (Kind::PermissionDenied, "URL_NOT_ALLOWED"), "{url}");
        assert!(!format!("{error:?}").contains("pw"), "{error:?}");
    }
}

#[test]
fn the_pause_is_cut_randomly_by_at_most_a_half() {
    for _ in 0..100 {
        let pause = jittered(Duration::from_secs(10));
        assert!(pause >= Duration::from_secs(5) && pause <= Duration::from_secs(10), "{pause:?}");
    }
}

//! Daemons that share, and what stands between them.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use cloudletd::{
    config::{Config, Mirror, share},
    names::Digest,
    proto,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use crate::common::server::{self, Daemon, free_port};

/// Where the tarball is said to be; nobody is there.
const URL: &str = "https://deb.example/small.tar";

/// A tarball without SSH, whose host keys would differ, and large enough for a dozen chunks.
pub fn tarball() -> Vec<u8> {
    server::tarball_with(&[], 36)
}

/// A daemon that has the tarball as a file behind a mirror rule, and shares.
pub async fn serving(tar: &[u8], change: impl FnOnce(&mut Config)) -> (Daemon, SocketAddr) {
    let address = free_port();
    let daemon = Daemon::start_with(|config| {
        let dir = config.state_dir.parent().expect("a parent").to_path_buf();
        std::fs::write(dir.join("small.tar"), tar).expect("written");
        let replace = vec![format!("file://{}/", dir.display())];
        change(config);
        config.fetch.mirrors = vec![Mirror { prefix: "https://deb.example/".into(), replace, mirrors_json: None, trusted: false }];
        config.share.listen = Some(address);
        if config.share.allow.is_empty() && !config.share.tls {
            config.share.allow = vec!["127.0.0.0/8".into(), "::1".into()];
        }
    })
    .await;
    (daemon, address)
}

/// A peer at a URL.
pub fn peer(url: &str) -> share::Peer {
    share::Peer { url: url.into(), ca: None, identity: None }
}

/// Makes a daemon take goldens from peers rather than build them.
pub fn pulling(urls: &[&str]) -> impl FnOnce(&mut Config) + use<> {
    let peers = urls.iter().map(|url| peer(url)).collect();
    move |config: &mut Config| {
        config.golden.prefer = share::Prefer::Pull;
        config.share.peers = peers;
        config.fetch.attempts = 1;
    }
}

/// Catalogues the image of the tarball.
pub async fn image_named(daemon: &mut Daemon, tar: &[u8]) -> String {
    let manifest = serde_json::json!({
        "name": "small",
        "entry_points": {"init": {}},
        "rootfs": {"url": URL, "digest": Digest::of(tar).to_string(), "size": tar.len()},
    });
    let request = proto::CreateImageRequest { manifest_json: manifest.to_string(), ..Default::default() };
    daemon.images.create_image(request).await.expect("created").into_inner().image.expect("an image").id
}

/// A render of it.
pub fn spec(image: &str, name: &str) -> proto::RenderSpec {
    server::spec(image, name, proto::VolumeFormat::Raw)
}

/// The one golden of a daemon.
pub async fn golden_of(daemon: &mut Daemon) -> proto::Golden {
    let mut goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("listed").into_inner().goldens;
    assert_eq!(goldens.len(), 1);
    goldens.remove(0)
}

/// How many blobs a daemon has.
pub fn blobs_of(daemon: &Daemon) -> usize {
    std::fs::read_dir(daemon.dir.join("state/blobs")).expect("there").count()
}

/// A client of HTTP.
pub fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().tls_certs_only([]).build().expect("a client")
}

/// Changes an answer: path, number of the request of its kind, body. `None` breaks the connection.
type Change = dyn Fn(&str, usize, Option<Vec<u8>>) -> Option<Vec<u8>> + Send + Sync;

/// Stands between a peer and those who ask it.
pub struct Between {
    port: u16,
    /// Passes everything on from now on.
    pub is_open: Arc<AtomicBool>,
    given: Arc<Mutex<Vec<String>>>,
    asked: Arc<AtomicUsize>,
}

impl Between {
    pub async fn start(peer: SocketAddr, change: impl Fn(&str, usize, Option<Vec<u8>>) -> Option<Vec<u8>> + Send + Sync + 'static) -> Between {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let (is_open, given, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let between = Between { port, is_open: Arc::clone(&is_open), given: Arc::clone(&given), asked: Arc::clone(&asked) };
        let (change, chunks): (Arc<Change>, _) = (Arc::new(change), Arc::new(AtomicUsize::new(0)));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                asked.fetch_add(1, Ordering::SeqCst);
                let (change, chunks, is_open, given) = (Arc::clone(&change), Arc::clone(&chunks), Arc::clone(&is_open), Arc::clone(&given));
                tokio::spawn(async move { pass(stream, peer, &*change, &chunks, &is_open, &given).await });
            }
        });
        between
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Paths of the chunks that were given.
    pub fn given(&self) -> Vec<String> {
        self.given.lock().expect("no panic").clone()
    }

    /// Connections so far.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

async fn pass(mut stream: TcpStream, peer: SocketAddr, change: &Change, chunks: &AtomicUsize, is_open: &AtomicBool, given: &Mutex<Vec<String>>) {
    let (read, mut write) = stream.split();
    let mut lines = BufReader::new(read).lines();
    let Ok(Some(first)) = lines.next_line().await else { return };
    while lines.next_line().await.expect("a header").is_some_and(|line| !line.is_empty()) {}
    let path = first.split(' ').nth(1).expect("a path").to_owned();
    let response = client().get(format!("http://{peer}{path}")).send().await.expect("an answer");
    let status = response.status();
    let mut answer = Some(response.bytes().await.expect("a body").to_vec());
    let is_chunk = path.contains("/chunks/");
    let number = if is_chunk { chunks.fetch_add(1, Ordering::SeqCst) + 1 } else { 1 };
    if !is_open.load(Ordering::SeqCst) && status.is_success() {
        answer = change(&path, number, answer);
    }
    let Some(body) = answer else { return };
    if is_chunk {
        given.lock().expect("no panic").push(path);
    }
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let _ = write.write_all(&[head.as_bytes(), &body].concat()).await;
}

//! Servers of other people that run for a test: Debian's docker-registry, and moto's S3.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cloudletd::config::remote;
use tempfile::TempDir;

use super::server::free_port;

/// User of the registry; the password is `right`.
const HTPASSWD: &str = "user:$2b$04$mJ6QO6vyCbGcrbRXhrHNKe9ET3z7AqCyAagl6ubSiIFhb5VJImt6.\n";
/// Who a test says it is where nobody checks.
pub const CLAIM: &str = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
/// How long a server may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A server, its files and what it logs. Ends with the test.
pub struct Server {
    pub address: SocketAddr,
    pub dir: TempDir,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Runs a program that listens at `address`, and waits until it does.
    #[track_caller]
    fn start(dir: TempDir, address: SocketAddr, program: &Path, args: &[&str]) -> Server {
        let log = fs::File::create(dir.path().join("log")).expect("made");
        let other = log.try_clone().expect("cloned");
        let child = Command::new(program).args(args).current_dir(dir.path()).stdin(Stdio::null()).stdout(log).stderr(other).spawn();
        let child = child.unwrap_or_else(|error| panic!("{} is needed and can't be run: {error}", program.display()));
        let server = Server { address, dir, child };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(begun.elapsed() < START_TIMEOUT, "{} does not listen: {}", program.display(), server.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).expect("a log")
    }

    /// Writes a secret and gives its path.
    pub fn secret(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path).expect("made");
        std::io::Write::write_all(&mut file, text.as_bytes()).expect("written");
        path
    }
}

/// Debian's docker-registry.
pub fn registry() -> Server {
    let dir = tempfile::tempdir().expect("a directory");
    let address = free_port();
    fs::write(dir.path().join("htpasswd"), HTPASSWD).expect("written");
    let at = dir.path().display();
    let config = format!(
        "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {at}/storage}}\nhttp: {{addr: '{address}', secret: s}}\n\
         auth:\n  htpasswd: {{realm: test, path: {at}/htpasswd}}\n"
    );
    fs::write(dir.path().join("config.yml"), config).expect("written");
    let file = dir.path().join("config.yml").display().to_string();
    Server::start(dir, address, Path::new("docker-registry"), &["serve", &file])
}

/// How a daemon is to use it.
pub fn registry_config(server: &Server, password: &str) -> remote::Registry {
    remote::Registry {
        name: "registry".into(),
        url: format!("http://{}", server.address),
        repository: "cloudlets/images".into(),
        username: Some("user".into()),
        password_file: Some(server.secret("password", &format!("{password}\n"))),
        token_file: None,
        token_server: None,
        ca: None,
        goldens: true,
    }
}

/// Where docker-registry keeps a blob.
pub fn registry_blob(server: &Server, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").expect("a digest");
    server.dir.path().join("storage/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
}

/// moto's S3 with the bucket `images`, and what a daemon is to use it with. With `checked` it wants requests signed by its user's key and checks the signatures; otherwise it
/// takes everything.
pub async fn s3(checked: bool) -> (Server, remote::Bucket) {
    let dir = tempfile::tempdir().expect("a directory");
    let address = free_port();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/moto/bin/moto_server");
    assert!(program.exists(), "moto is needed: scripts/tools.sh moto");
    let (port, without) = (address.port().to_string(), if checked { "4" } else { "inf" });
    let setting = format!("INITIAL_NO_AUTH_ACTION_COUNT={without}");
    let server = Server::start(dir, address, Path::new("env"), &[&setting, program.to_str().expect("text"), "-H", "127.0.0.1", "-p", &port]);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().expect("a client");
    let iam = |body: &'static str| {
        let request = client.post(format!("http://{address}/")).header("host", "iam.amazonaws.com").body(body);
        let request = request.header("authorization", CLAIM.replace("/s3/", "/iam/")).header("content-type", "application/x-www-form-urlencoded");
        async move { request.send().await.expect("an answer").error_for_status().expect("done").text().await.expect("text") }
    };
    iam("Action=CreateUser&UserName=u&Version=2010-05-08").await;
    let key = iam("Action=CreateAccessKey&UserName=u&Version=2010-05-08").await;
    iam("Action=PutUserPolicy&UserName=u&PolicyName=p&Version=2010-05-08&PolicyDocument=%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C%22Action%22%3A%22s3%3A%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D").await;
    client.put(format!("http://{address}/images")).send().await.expect("an answer").error_for_status().expect("made");
    let tag = |name: &str| key.split(&format!("<{name}>")).nth(1).expect(name).split('<').next().expect(name).to_owned();
    let text = format!("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n", tag("AccessKeyId"), tag("SecretAccessKey"));
    let credentials = server.secret("credentials", &text);
    let config = remote::Bucket {
        name: "bucket".into(),
        endpoint: Some(format!("http://{address}")),
        bucket: "images".into(),
        prefix: "cloud/lets".into(),
        region: "us-east-1".into(),
        credentials_file: Some(credentials),
        virtual_hosted: false,
        ca: None,
        goldens: true,
    };
    (server, config)
}

/// What a stub answers: status line, more headers, body.
pub struct Reply(pub &'static str, pub Vec<(&'static str, String)>, pub Vec<u8>);

/// A server of HTTP that answers a path (and `Authorization`) as the test says.
pub async fn stub<F>(answer: impl Fn(String, Option<String>) -> F + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = Reply> + Send + 'static,
{
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let answer = std::sync::Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = std::sync::Arc::clone(&answer);
            tokio::spawn(async move {
                let (read, mut write) = stream.split();
                let mut lines = BufReader::new(read).lines();
                let Ok(Some(first)) = lines.next_line().await else { return };
                let mut who = None;
                while let Some(line) = lines.next_line().await.expect("a header").filter(|line| !line.is_empty()) {
                    let (name, value) = line.split_once(':').expect("a header");
                    if name.eq_ignore_ascii_case("authorization") {
                        who = Some(value.trim().to_owned());
                    }
                }
                let Reply(status, headers, body) = answer(first.split(' ').nth(1).expect("a path").to_owned(), who).await;
                let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
                let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = write.write_all(&[head.as_bytes(), &body].concat()).await;
            });
        }
    });
    address
}

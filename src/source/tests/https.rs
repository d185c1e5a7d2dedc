//! TLS to servers: whose certificates are accepted, and what a redirect may take away.

use std::io::Write as _;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsAcceptor;

use super::*;

/// An authority, its certificate in a file.
struct Authority {
    file: tempfile::NamedTempFile,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(pem.as_bytes()).expect("written");
        Authority { file, issuer: Issuer::new(params, key) }
    }

    /// A server that has a certificate for `name` and gives everybody `answer`; its port.
    async fn serve(&self, name: &str, change: impl FnOnce(&mut CertificateParams), answer: Vec<u8>) -> u16 {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        change(&mut params);
        let certificate: CertificateDer<'static> = params.signed_by(&key, &self.issuer).expect("a certificate").into();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("a key that fits");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
            }
        });
        port
    }

    fn config(&self) -> Config {
        Config { rules: Rules { authorities: Authorities::Only(self.file.path().to_owned()), ..config().rules }, attempts: 1, ..config() }
    }
}

fn answer(body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

fn to(location: &str) -> Vec<u8> {
    format!("HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n").into_bytes()
}

async fn fetch(config: Config, url: String) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let partial = dir.path().join("partial");
    let descriptor = Descriptor { url, digest: None, size: None };
    Fetcher::new(config).expect("good").fetch(&descriptor, &partial, &Progress::default()).await?;
    Ok(std::fs::read(partial).expect("fetched"))
}

#[tokio::test]
async fn a_servers_certificate_has_to_be_of_the_authority_for_the_host_and_in_time() {
    let (ours, other) = (Authority::new(), Authority::new());
    let body = content(100_000);
    let port = ours.serve("localhost", |_| (), answer(&body)).await;
    let url = format!("https://localhost:{port}/x");
    assert_eq!(fetch(ours.config(), url.clone()).await.expect("all is well"), body);

    let wrong_host = ours.serve("mirror.example", |_| (), answer(&body)).await;
    let ended = ours.serve("localhost", |params| params.not_after = rcgen::date_time_ymd(2021, 1, 1), answer(&body)).await;
    let early = ours.serve("localhost", |params| params.not_before = rcgen::date_time_ymd(2100, 1, 1), answer(&body)).await;
    for (what, config, url) in [
        ("another authority", other.config(), url.clone()),
        ("the host's authorities", Config { attempts: 1, ..super::config() }, url),
        ("another host's certificate", ours.config(), format!("https://localhost:{wrong_host}/x")),
        ("an ended certificate", ours.config(), format!("https://localhost:{ended}/x")),
        ("an early certificate", ours.config(), format!("https://localhost:{early}/x")),
    ] {
        let error = fetch(config, url).await.expect_err(what);
        assert_eq!((error.kind(), error.reason()), (Kind::PermissionDenied, "TLS_CERTIFICATE"), "{what}: {}", error.chain());
    }
}

#[tokio::test]
async fn a_redirect_from_https_to_http_is_refused_and_one_to_https_is_followed() {
    let authority = Authority::new();
    let plain = Server::start(|request| good(request, b"swapped", "\"a\"")).await;
    let port = authority.serve("localhost", |_| (), to(&plain.url("/x"))).await;
    let error = fetch(authority.config(), format!("https://localhost:{port}/x")).await.expect_err("http takes away what https promised");
    assert_eq!((error.kind(), error.reason()), (Kind::PermissionDenied, "URL_NOT_ALLOWED"), "{}", error.chain());
    assert!(plain.requests().is_empty(), "it was not even asked");

    let end = authority.serve("localhost", |_| (), answer(b"whole")).await;
    let begin = authority.serve("localhost", |_| (), to(&format!("https://localhost:{end}/y"))).await;
    assert_eq!(fetch(authority.config(), format!("https://localhost:{begin}/x")).await.expect("followed"), b"whole");
    let limited = Config { rules: Rules { redirects_max: 0, ..authority.config().rules }, ..authority.config() };
    let error = fetch(limited, format!("https://localhost:{begin}/x")).await.expect_err("one too many");
    assert_eq!(error.reason(), "TOO_MANY_REDIRECTS");
}

#[tokio::test]
async fn a_source_has_rules_of_its_own_and_the_others_keep_the_general_ones() {
    let authority = Authority::new();
    let port = authority.serve("localhost", |_| (), answer(b"inside")).await;
    let closed = Rules { policy: UrlPolicy::default(), ..config().rules };
    let open = Rules {
        policy: UrlPolicy { ports: [port].into(), schemes: ["https".to_owned()].into(), allow_private_addresses: true, ..UrlPolicy::default() },
        ..authority.config().rules
    };
    let sources = vec![SourceRules { hosts: vec!["LOCALHOST".into()], rules: open }];
    let config = || Config { rules: closed.clone(), sources: sources.clone(), attempts: 1, ..super::config() };
    assert_eq!(fetch(config(), format!("https://localhost:{port}/x")).await.expect("the source is open"), b"inside");
    for (what, url) in [
        ("another port", format!("https://localhost:{}/x", port ^ 1)),
        ("another scheme", format!("http://localhost:{port}/x")),
        ("another host at the same address", format!("https://127.0.0.1:{port}/x")),
    ] {
        let error = fetch(config(), url).await.expect_err(what);
        assert_eq!(error.reason(), "URL_NOT_ALLOWED", "{what}: {}", error.chain());
    }
    // What the source redirects to is held to the rules of where it leads.
    let away = authority.serve("localhost", |_| (), to(&format!("https://127.0.0.1:{port}/x"))).await;
    let mut both = config();
    both.sources[0].rules.policy.ports.insert(away);
    let error = fetch(both, format!("https://localhost:{away}/x")).await.expect_err("out of the source");
    assert_eq!(error.reason(), "URL_NOT_ALLOWED", "{}", error.chain());
}

#[tokio::test]
async fn a_file_of_authorities_that_is_none_is_named() {
    let mut config = Authority::new().config();
    let error = fetch(config.clone(), "https://localhost:1/x".into()).await.expect_err("the file is gone");
    assert_eq!(error.kind(), Kind::NotFound, "{}", error.chain());
    let empty = tempfile::NamedTempFile::new().expect("a file");
    config.rules.authorities = Authorities::HostAnd(empty.path().to_owned());
    let error = fetch(config, "https://localhost:1/x".into()).await.expect_err("no certificate in it");
    assert!(error.chain().contains("no certificate"), "{}", error.chain());
}

//! Fail-over under mirrors that lie.

use super::*;

const URL: &str = "https://deb.example/cloud/a.tar";

fn through(servers: &[&Server], trusted: bool) -> Config {
    Config {
        rules: Rules { policy: UrlPolicy::default(), connect_timeout: Duration::from_millis(300), ..config().rules },
        mirrors: vec![Mirror {
            prefix: "https://deb.example/cloud/".into(),
            replace: servers.iter().map(|server| server.url("/m/")).collect(),
            trusted,
        }],
        ..config()
    }
}

async fn with(fetcher: &Fetcher, url: &str, digest: Option<Digest>) -> (Result<Fetched>, Vec<u8>) {
    let dir = tempfile::tempdir().expect("a directory");
    let partial = dir.path().join("partial");
    let result = fetcher.fetch(&Descriptor { url: url.into(), digest, size: None }, &partial, &Progress::default()).await;
    (result, std::fs::read(&partial).unwrap_or_default())
}

async fn honest(bytes: &[u8]) -> Server {
    let bytes = bytes.to_vec();
    Server::start(move |request| good(request, &bytes, "\"a\"")).await
}

type Answer = fn(&[u8]) -> Vec<Step>;

/// Ways to fail by one's own fault.
const FAULTS: [(&str, Answer); 7] = [
    ("wrong bytes", |bytes| vec![send(&format!("200 OK\r\nContent-Length: {}", bytes.len()), &vec![7; bytes.len()])]),
    ("an error page", |_| vec![send("200 OK\r\nContent-Type: text/html\r\nContent-Length: 22", b"<html>try later</html>")]),
    ("stalls before", |_| vec![Step::Wait(Duration::from_secs(30))]),
    ("stalls within", |bytes| vec![send(&format!("200 OK\r\nContent-Length: {}", bytes.len()), &bytes[..1000]), Step::Wait(Duration::from_secs(30))]),
    ("truncates", |bytes| vec![send(&format!("200 OK\r\nContent-Length: {}", bytes.len()), &bytes[..60_000])]),
    ("fails", |_| vec![send("502 Bad Gateway\r\nContent-Length: 0", b"")]),
    ("redirects elsewhere", |_| vec![send("302 Found\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0", b"")]),
];

#[tokio::test]
async fn after_a_mirror_that_lies_the_next_is_asked_and_the_liar_comes_last_from_then_on() {
    let bytes = content(100_000);
    for (what, fault) in FAULTS {
        let liar = Server::start({
            let bytes = bytes.clone();
            move |_| fault(&bytes)
        })
        .await;
        let right = honest(&bytes).await;
        let fetcher = Fetcher::new(through(&[&liar, &right], false)).expect("good");
        for round in 1..=2 {
            let (result, file) = with(&fetcher, URL, Some(Digest::of(&bytes))).await;
            assert_eq!(result.unwrap_or_else(|error| panic!("{what}: {error:?}")).url_used, right.url("/m/a.tar"));
            assert!(file == bytes, "{what}");
            assert_eq!((liar.requests().len(), right.requests().len()), (1, round), "{what}");
        }
    }
}

#[tokio::test]
async fn a_mirror_is_asked_again_when_its_back_off_is_over_or_nobody_else_has_the_file() {
    let bytes = content(1000);
    let digest = Some(Digest::of(&bytes));
    let recovering = Server::start({
        let bytes = bytes.clone();
        move |request| if request.number == 1 { vec![send("500 No\r\nContent-Length: 0", b"")] } else { good(request, &bytes, "\"a\"") }
    })
    .await;
    let other = honest(&bytes).await;
    let fetcher = Fetcher::new(Config { mirror_back_off: Duration::from_millis(200), ..through(&[&recovering, &other], false) }).expect("good");
    assert_eq!(with(&fetcher, URL, digest).await.0.expect("fetched").url_used, other.url("/m/a.tar"));
    assert_eq!(with(&fetcher, URL, digest).await.0.expect("fetched").url_used, other.url("/m/a.tar"));
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(with(&fetcher, URL, digest).await.0.expect("fetched").url_used, recovering.url("/m/a.tar"));

    let missing = Server::start(|_| vec![send("404 Not Found\r\nContent-Length: 0", b"")]).await;
    let failing = Server::start({
        let bytes = bytes.clone();
        move |request| if request.number == 1 { vec![] } else { good(request, &bytes, "\"a\"") }
    })
    .await;
    let fetcher = Fetcher::new(through(&[&failing, &missing], false)).expect("good");
    assert_eq!(with(&fetcher, URL, digest).await.0.expect("fetched").url_used, failing.url("/m/a.tar"));
    assert!(fetcher.health.aside(&missing.url("/m/")).is_none(), "not to have a file is no fault");
}

#[tokio::test]
async fn without_a_digest_only_the_origin_and_trusted_mirrors_are_asked() {
    let bytes = content(1000);
    let (origin, other) = (honest(&bytes).await, honest(&content(999)).await);
    let rule = |replace: Vec<String>, trusted| Mirror { prefix: origin.url("/o/"), replace, trusted };
    let url = origin.url("/o/a.tar");
    let cases = [
        (vec![rule(vec![other.url("/m/")], false)], origin.url("/o/a.tar")),
        (vec![rule(vec![other.url("/m/"), origin.url("/o/")], false)], origin.url("/o/a.tar")),
        (vec![rule(vec![format!("{}{{digest}}", other.url("/v1/blobs/"))], true)], origin.url("/o/a.tar")),
        (vec![rule(vec![other.url("/m/")], true)], other.url("/m/a.tar")),
        (vec![rule(vec![other.url("/m/")], false), rule(vec![other.url("/t/")], true)], other.url("/t/a.tar")),
    ];
    for (mirrors, expected) in cases {
        let fetcher = Fetcher::new(Config { mirrors: mirrors.clone(), ..config() }).expect("good");
        assert_eq!(with(&fetcher, &url, None).await.0.expect("fetched").url_used, expected, "{mirrors:?}");
    }
}

#[tokio::test]
async fn bytes_of_two_mirrors_are_put_together_only_when_the_digest_can_judge_them() {
    let bytes = content(100_000);
    let cut = |bytes: Vec<u8>| move |_: &Request| vec![send(&format!("200 OK\r\nETag: \"a\"\r\nContent-Length: {}", bytes.len()), &bytes[..60_000])];
    let (broken, right) = (Server::start(cut(bytes.clone())).await, honest(&bytes).await);
    let fetcher = Fetcher::new(through(&[&broken, &right], true)).expect("good");
    assert!(with(&fetcher, URL, None).await.1 == bytes);
    assert_eq!(right.requests()[0].range_start(), None, "from the start without a digest");
    // The first half is a lie: the second place is asked for all of it at once, not after another half of the liar's.
    let (liar, right) = (Server::start(cut(vec![9; 100_000])).await, honest(&bytes).await);
    let fetcher = Fetcher::new(through(&[&liar, &right], true)).expect("good");
    assert!(with(&fetcher, URL, Some(Digest::of(&bytes))).await.1 == bytes);
    assert_eq!(right.requests().iter().map(Request::range_start).collect::<Vec<_>>(), [Some(60_000), None]);
    assert_eq!(liar.requests().len(), 1);
    assert!(fetcher.health.aside(&right.url("/m/")).is_none(), "the mixture was not its fault");
}

#[tokio::test]
async fn the_error_names_every_mirror_and_why_it_did_not_help() {
    let missing = Server::start(|_| vec![send("404 Not Found\r\nContent-Length: 0", b"")]).await;
    let down = Server::start(|_| vec![send("503 Service Unavailable\r\nContent-Length: 0", b"")]).await;
    let liar = Server::start(|_| vec![send("200 OK\r\nContent-Length: 5", b"hello")]).await;
    let away = Server::start(|_| vec![send("302 Found\r\nLocation: http://10.0.0.1/x\r\nContent-Length: 0", b"")]).await;
    let fetcher = Fetcher::new(through(&[&missing, &down, &liar, &away], false)).expect("good");
    let error = with(&fetcher, URL, Some(Digest::of(b"other"))).await.0.expect_err("nobody has it");
    assert_eq!((error.kind(), error.reason(), error.object()), (Kind::Unavailable, "HTTP_STATUS", URL));
    for (server, why) in [(&missing, "404"), (&down, "503"), (&liar, "has digest"), (&away, "10.0.0.1")] {
        assert!(error.message().contains(&server.url("/m/a.tar")) && error.message().contains(why), "{error:?}");
    }
}

#[tokio::test]
async fn a_rule_may_go_by_host_and_a_mirror_by_digest() {
    let bytes = content(1000);
    let right = honest(&bytes).await;
    let blobs = format!("{}{{digest}}", right.url("/v1/blobs/"));
    let by_host = |replace: String| {
        let mirrors = vec![Mirror { prefix: "deb.example".into(), replace: vec![replace], trusted: false }];
        Fetcher::new(Config { mirrors, ..config() }).expect("good")
    };
    let digest = Digest::of(&bytes);
    for scheme in ["http", "https"] {
        let url = format!("{scheme}://deb.example/x/a.tar");
        assert_eq!(with(&by_host(right.url("/m")), &url, Some(digest)).await.0.expect("fetched").url_used, right.url("/m/x/a.tar"));
        assert_eq!(with(&by_host(blobs.clone()), &url, Some(digest)).await.0.expect("fetched").url_used, right.url(&format!("/v1/blobs/{digest}")));
    }
    for other in ["https://deb.example.org/a", "https://deb.example:444/a", "https://x/deb.example/a"] {
        let descriptor = Descriptor { url: other.into(), digest: Some(digest), size: None };
        let candidates = by_host(right.url("/m")).candidates(&policy::parse(other).expect("a URL"), &descriptor).expect("allowed");
        assert_eq!(candidates.iter().map(Candidate::mirror).collect::<Vec<_>>(), [None], "{other}");
    }
    for wrong in ["http://{digest}/", "ftp://a/{digest}"] {
        let mirrors = vec![Mirror { prefix: "deb.example".into(), replace: vec![wrong.into()], trusted: false }];
        assert!(Fetcher::new(Config { mirrors, ..config() }).is_err(), "{wrong}");
    }
}

//! Blobs and golden images between daemons: real ones with stores of their own in this process, and peers between them that fail and lie.

use std::sync::atomic::Ordering;

use crate::common::pki::Authority;
use crate::common::server::{self, Daemon, free_port};
use crate::kit::{Between, blobs_of, client, golden_of, image_named, pulling, serving, spec, tarball};
use cloudletd::{
    config::{Mirror, Tls, share},
    names::Digest,
    proto::RenderState,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_golden_built_on_one_host_is_pulled_by_another_that_has_no_tarball() {
    let tar = tarball();
    let (mut builder, address) = serving(&tar, |_| ()).await;
    let image = image_named(&mut builder, &tar).await;
    builder.render("a", spec(&image, "web1")).await;
    let mut taker = Daemon::start_with(pulling(&[&format!("http://{address}")])).await;
    let same = image_named(&mut taker, &tar).await;
    taker.render("a", spec(&same, "web1")).await;
    let (built, pulled) = (golden_of(&mut builder).await, golden_of(&mut taker).await);
    assert_eq!((&built.key, &built.digest), (&pulled.key, &pulled.digest));
    assert_eq!(blobs_of(&taker), 0, "the tarball never came here");
    let file = |daemon: &Daemon, name: &str| daemon.dir.join("state/goldens").join(&built.key).join(name);
    for name in ["disk.raw", "facts.json", "boot.json"] {
        assert!(std::fs::read(file(&builder, name)).expect("there") == std::fs::read(file(&taker, name)).expect("there"), "{name} differs");
        let mode = |daemon: &Daemon| std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(file(daemon, name)).expect("there").permissions());
        assert_eq!(mode(&builder), mode(&taker), "{name}");
    }
    // Inode times and the record of what was applied have the time of the render; everything else of the two volumes is the same, as e2fsprogs and diff see it.
    let trees = [&builder, &taker].map(|daemon| {
        let volume = daemon.dir.join("pool/web1.raw").display().to_string();
        server::judge("e2fsck", &["-fn", &volume]);
        let tree = daemon.dir.join("tree");
        std::fs::create_dir(&tree).expect("made");
        server::judge("debugfs", &["-R", &format!("rdump / {}", tree.display()), &volume]);
        tree.display().to_string()
    });
    server::judge("diff", &["-r", "--no-dereference", "--exclude=applied_config", &trees[0], &trees[1]]);
    assert!(pulled.allocated_size_bytes <= built.allocated_size_bytes * 2, "{pulled:?} has lost the holes of {built:?}");
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_pull_goes_on_where_it_was_even_after_a_restart() {
    let tar = tarball();
    let (mut builder, address) = serving(&tar, |_| ()).await;
    let image = image_named(&mut builder, &tar).await;
    builder.render("a", spec(&image, "web1")).await;
    let between = Between::start(address, |path, number, answer| if path.contains("/chunks/") && number > 4 { None } else { answer }).await;
    let dir = tempfile::tempdir().expect("a directory");
    let mut taker = Daemon::start_in(dir.path(), pulling(&[&between.url()])).await;
    let same = image_named(&mut taker, &tar).await;
    let failed = taker.start_render("a", spec(&same, "web1")).await.expect("accepted").render.expect("a render").id;
    assert_eq!(taker.wait(&failed).await.state(), RenderState::Failed, "neither peer nor tarball");
    taker.stop().await;
    let first = between.given();
    assert_eq!(first.len(), 4, "{first:?}");
    between.is_open.store(true, Ordering::SeqCst);
    let mut taker = Daemon::start_in(dir.path(), pulling(&[&between.url()])).await;
    taker.render("b", spec(&same, "web1")).await;
    assert_eq!(golden_of(&mut taker).await.digest, golden_of(&mut builder).await.digest);
    let all = between.given();
    let different: std::collections::BTreeSet<&String> = all.iter().collect();
    assert!(all.len() > 4 && all.len() == different.len(), "no chunk is given twice: {all:?}");
    let left = std::fs::read_dir(dir.path().join("state/tmp")).expect("there").flatten().map(|entry| entry.file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains("golden")), "nothing unfinished is left");
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lies_about_a_chunk_is_put_aside_and_the_next_is_asked() {
    let tar = tarball();
    let (mut builder, address) = serving(&tar, |_| ()).await;
    let image = image_named(&mut builder, &tar).await;
    builder.render("a", spec(&image, "web1")).await;
    let liars: [fn(Vec<u8>) -> Vec<u8>; 4] = [
        |answer| zstd::bulk::compress(&vec![7; zstd::bulk::decompress(&answer, 8 << 20).expect("zstd").len()], 1).expect("compressed"),
        |mut answer| answer.split_off(answer.len() / 2),
        |_| b"<html>please log in</html>".to_vec(),
        |_| zstd::bulk::compress(&vec![0; 64 << 20], 1).expect("a bomb"),
    ];
    for lie in liars {
        let liar = Between::start(address, move |path, _, answer| if path.contains("/chunks/") { answer.map(lie) } else { answer }).await;
        let mut taker = Daemon::start_with(pulling(&[&liar.url(), &format!("http://{address}")])).await;
        let same = image_named(&mut taker, &tar).await;
        taker.render("a", spec(&same, "web1")).await;
        assert_eq!(golden_of(&mut taker).await.digest, golden_of(&mut builder).await.digest);
        assert!(liar.given().len() <= 4, "only what was under way when it was caught: {:?}", liar.given());
        taker.stop().await;
    }
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_as_a_whole_is_refused_and_the_golden_is_built() {
    let tar = tarball();
    let (mut builder, address) = serving(&tar, |_| ()).await;
    let image = image_named(&mut builder, &tar).await;
    builder.render("a", spec(&image, "web1")).await;
    let right = golden_of(&mut builder).await.digest;
    let lies: [fn(&mut serde_json::Value); 6] = [
        |manifest| manifest["digest"] = Digest::of(b"other").to_string().into(),
        |manifest| drop(manifest["chunks"].as_array_mut().expect("chunks").pop()),
        |manifest| manifest["key"] = Digest::of(b"other").to_string().into(),
        |manifest| manifest["spec"]["label"] = "other".into(),
        |manifest| manifest["chunks"][0]["index"] = u64::MAX.into(),
        |manifest| manifest["facts"] = "{".into(),
    ];
    for lie in lies {
        let liar = Between::start(address, move |path, _, answer| {
            let answer = answer?;
            if !path.ends_with("/manifest") {
                return Some(answer);
            }
            let mut manifest = serde_json::from_slice(&answer).expect("JSON");
            lie(&mut manifest);
            Some(manifest.to_string().into_bytes())
        })
        .await;
        let (mut taker, _) = serving(&tar, pulling(&[&liar.url()])).await;
        let same = image_named(&mut taker, &tar).await;
        taker.render("a", spec(&same, "web1")).await;
        assert_eq!(golden_of(&mut taker).await.digest, right);
        assert_eq!(blobs_of(&taker), 1, "it was built from the tarball");
        let asked = liar.asked();
        taker.start_render("b", spec(&same, "web2")).await.expect("accepted");
        assert_eq!(liar.asked(), asked);
        taker.stop().await;
    }
    // Two have to agree, and don't.
    let liar = Between::start(address, |path, _, answer| {
        let answer = answer?;
        Some(if path.ends_with("/manifest") {
            String::from_utf8(answer).expect("text").replace(r#"{\"nodes\""#, r#"{ \"nodes\""#).into_bytes()
        } else {
            answer
        })
    })
    .await;
    let agreeing = pulling(&[&liar.url(), &format!("http://{address}")]);
    let (mut taker, _) = serving(&tar, |config| {
        agreeing(config);
        config.share.agree = 2;
    })
    .await;
    let same = image_named(&mut taker, &tar).await;
    taker.render("a", spec(&same, "web1")).await;
    assert_eq!(blobs_of(&taker), 1, "it was built from the tarball");
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_are_served_with_ranges_and_tags_and_nothing_else_is() {
    let tar = tarball();
    let (mut daemon, address) = serving(&tar, |_| ()).await;
    let digest = daemon.upload(&tar).await;
    let client = client();
    let url = format!("http://{address}/v1/blobs/{digest}");
    let get = |headers: &[(&str, &str)]| {
        let request = headers.iter().fold(client.get(&url), |request, (name, value)| request.header(*name, *value));
        async move {
            let response = request.send().await.expect("an answer");
            let header = |name: &str| response.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
            let (status, range, tag) = (response.status().as_u16(), header("content-range"), header("etag"));
            (status, range, tag, response.bytes().await.expect("a body"))
        }
    };
    let tag = format!("\"{digest}\"");
    let (status, _, etag, body) = get(&[]).await;
    assert_eq!((status, etag.as_deref(), body[..] == tar[..]), (200, Some(tag.as_str()), true));
    let (status, range, _, body) = get(&[("range", "bytes=100-199"), ("if-range", &tag)]).await;
    assert_eq!((status, range, &body[..]), (206, Some(format!("bytes 100-199/{}", tar.len())), &tar[100..200]));
    assert_eq!(get(&[("range", "bytes=100-199"), ("if-range", "\"other\"")]).await.3.len(), tar.len());
    let (status, range, _, _) = get(&[("range", &format!("bytes={}-", tar.len()))]).await;
    assert_eq!((status, range), (416, Some(format!("bytes */{}", tar.len()))));
    assert_eq!(get(&[("if-none-match", &format!("\"x\", {tag}"))]).await.0, 304);
    let head = client.head(&url).send().await.expect("an answer");
    assert_eq!(head.headers()["content-length"].to_str().expect("text"), tar.len().to_string());
    assert!(head.bytes().await.expect("nothing").is_empty());
    assert_eq!(client.post(&url).body("x").send().await.expect("an answer").status(), 405);
    let other = Digest::of(b"other");
    for path in [
        "/".into(),
        "/v1/blobs/".into(),
        "/v1/blobs/../catalog.sqlite".into(),
        "/v1/blobs/sha256:..%2f..%2fcatalog.sqlite".into(),
        format!("/v1/blobs/{other}"),
        format!("/v1/goldens/{}/manifest", other.hex()),
        format!("/v1/goldens/{}/chunks/0", other.hex()),
        "/v1/goldens/..%2f../manifest".into(),
    ] {
        assert_eq!(client.get(format!("http://{address}{path}")).send().await.expect("an answer").status(), 404, "{path}");
    }
    daemon.stop().await;
    // curl, as another reader of the protocol, resumes a download.
    let (mut daemon, address) = serving(&tar, |_| ()).await;
    daemon.upload(&tar).await;
    let file = daemon.dir.join("download");
    std::fs::write(&file, &tar[..1_000_000]).expect("written");
    server::judge("curl", &["-sS", "--fail", "-C", "-", "-o", file.to_str().expect("text"), &format!("http://{address}/v1/blobs/{digest}")]);
    assert!(std::fs::read(&file).expect("there") == tar);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_allowed_addresses_and_certificates_are_answered() {
    let tar = tarball();
    let (mut daemon, address) = serving(&tar, |config| config.share.allow = vec!["192.0.2.0/24".into()]).await;
    let digest = daemon.upload(&tar).await;
    client().get(format!("http://{address}/v1/blobs/{digest}")).send().await.expect_err("another address");
    daemon.stop().await;

    let dir = tempfile::tempdir().expect("a directory");
    let (ours, other) = (Authority::new(), Authority::new());
    ours.write(dir.path());
    std::fs::write(dir.path().join("crl.pem"), ours.revoking(&[2], 2100)).expect("written");
    let files = dir.path().to_path_buf();
    let (mut builder, address) = serving(&tar, |config| {
        config.share.allow.clear();
        config.share.tls = true;
        let tls = Tls::new(files.join("server.pem"), files.join("server.key"), files.join("ca.pem"));
        config.listen.tls = Some(Tls { client_crl: Some(files.join("crl.pem")), reload_interval_secs: 1, ..tls });
    })
    .await;
    let image = image_named(&mut builder, &tar).await;
    builder.render("a", spec(&image, "web1")).await;
    let url = format!("https://localhost:{}", address.port());
    for (name, authority, serial, expected) in [
        ("ours", Some(&ours), 1u64, RenderState::Succeeded),
        ("revoked", Some(&ours), 2, RenderState::Failed),
        ("other", Some(&other), 1, RenderState::Failed),
        ("none", None, 0, RenderState::Failed),
    ] {
        let identity = authority.map(|authority| {
            let (certificate, key) = authority.issue_with("host", |params| params.serial_number = Some(serial.into()));
            let path = dir.path().join(format!("{name}.pem"));
            std::fs::write(&path, format!("{certificate}{key}")).expect("written");
            path
        });
        let mut taker = Daemon::start_with(|config| {
            pulling(&[])(config);
            config.share.peers = vec![share::Peer { url: url.clone(), ca: Some(dir.path().join("ca.pem")), identity }];
        })
        .await;
        let same = image_named(&mut taker, &tar).await;
        let id = taker.start_render("a", spec(&same, "web1")).await.expect("accepted").render.expect("a render").id;
        assert_eq!(taker.wait(&id).await.state(), expected, "{name}");
        taker.stop().await;
    }
    // Over a connection that is open when the list changes.
    let (certificate, key) = ours.issue_with("host", |params| params.serial_number = Some(3u64.into()));
    let identity = reqwest::Identity::from_pem(format!("{certificate}{key}").as_bytes()).expect("an identity");
    let ca = reqwest::Certificate::from_pem(&std::fs::read(dir.path().join("ca.pem")).expect("read")).expect("a certificate");
    let host = reqwest::Client::builder().no_proxy().tls_certs_only([ca]).identity(identity).build().expect("a client");
    let status = async || host.head(format!("{url}/v1/blobs/{digest}")).send().await.expect("an answer").status().as_u16();
    assert_eq!(status().await, 200, "it may ask");
    std::fs::write(dir.path().join("crl.pem"), ours.revoking(&[2, 3], 2100)).expect("written");
    let begun = std::time::Instant::now();
    while status().await != 403 {
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "a revoked host still reads");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_fetched_for_another_host_when_the_catalogue_knows_it() {
    let tar = tarball();
    for (pull_through, expected) in [(true, RenderState::Succeeded), (false, RenderState::Failed)] {
        let (mut through, address) = serving(&tar, |config| config.share.pull_through = pull_through).await;
        image_named(&mut through, &tar).await;
        // It takes blobs, and builds by itself.
        let mut taker = Daemon::start_with(|config| {
            config.fetch.attempts = 1;
            let replace = vec![format!("http://{address}/v1/blobs/{{digest}}")];
            config.fetch.mirrors = vec![Mirror { prefix: "deb.example".into(), replace, mirrors_json: None, trusted: false }];
        })
        .await;
        let same = image_named(&mut taker, &tar).await;
        let id = taker.start_render("a", spec(&same, "web1")).await.expect("accepted").render.expect("a render").id;
        assert_eq!(taker.wait(&id).await.state(), expected, "{pull_through}");
        assert_eq!((blobs_of(&through), blobs_of(&taker)), (usize::from(pull_through), usize::from(pull_through)));
        taker.stop().await;
        through.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_that_are_each_others_mirrors_do_not_wait_for_each_other() {
    let tar = tarball();
    let (one, two) = (free_port(), free_port());
    let ring = |own, other| {
        move |config: &mut cloudletd::config::Config| {
            config.share.listen = Some(own);
            config.share.allow = vec!["127.0.0.1".into()];
            config.share.pull_through = true;
            config.fetch.attempts = 1;
            let replace = vec![format!("http://{other}/v1/blobs/{{digest}}")];
            config.fetch.mirrors = vec![Mirror { prefix: "deb.example".into(), replace, mirrors_json: None, trusted: false }];
        }
    };
    let (mut first, mut second) = (Daemon::start_with(ring(one, two)).await, Daemon::start_with(ring(two, one)).await);
    let image = image_named(&mut first, &tar).await;
    image_named(&mut second, &tar).await;
    let begun = std::time::Instant::now();
    let id = first.start_render("a", spec(&image, "web1")).await.expect("accepted").render.expect("a render").id;
    assert_eq!(first.wait(&id).await.state(), RenderState::Failed);
    assert!(begun.elapsed() < std::time::Duration::from_secs(15), "{:?}", begun.elapsed());
    first.stop().await;
    second.stop().await;
}

//! What we publish, judged by simplestreams' own tools and by GnuPG: `sstream-query` and `sstream-mirror` read and mirror the tree, signed with a key that
//! gpg made, from files and over the daemon's own HTTP endpoint.
//!
//! Needs gpg, and simplestreams (`scripts/tools.sh simplestreams`, or a distribution's package); without them the tests fail.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::server::{self, Daemon, free_port, judge, tarball};
use cloudletd::{config::streams::Publish, proto};
use serde_json::Value;

const CONTENT: &str = "cloudlets:released:download";

/// A key of GnuPG's, and the files that it is exported to.
struct Key {
    home: tempfile::TempDir,
}

impl Key {
    fn new(algorithm: &str) -> Key {
        let key = Key { home: tempfile::tempdir().expect("a directory") };
        key.gpg(&["--quick-generate-key", "Publisher <publisher@example.com>", algorithm, "sign", "never"]);
        key.gpg(&["--output", key.path("public.gpg").to_str().expect("UTF-8"), "--export"]);
        key.gpg(&["--output", key.path("secret.gpg").to_str().expect("UTF-8"), "--export-secret-keys"]);
        fs::set_permissions(key.path("secret.gpg"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("changed");
        key
    }

    fn gpg(&self, args: &[&str]) -> String {
        let home = self.home.path().to_str().expect("UTF-8");
        judge("gpg", &[&["--homedir", home, "--batch", "--yes", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"], args].concat())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }
}

/// simplestreams' tool, from PATH or where scripts/tools.sh puts it; what it prints on standard output.
#[track_caller]
fn sstream(tool: &str, args: &[&str]) -> String {
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/simplestreams/bin").join(tool);
    let program = if local.exists() { local } else { tool.into() };
    let output =
        Command::new(&program).args(args).output().unwrap_or_else(|error| panic!("{tool} is needed (scripts/tools.sh simplestreams): {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

async fn publishing(key: &Key, port: u16) -> (Daemon, tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let tree = dir.path().join("published");
    let publish = Publish {
        directory: Some(tree.clone()),
        secret_key: Some(key.path("secret.gpg")),
        platforms: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/streams/platforms.json")),
        listen: Some(([127, 0, 0, 1], port).into()),
        ..Publish::default()
    };
    let daemon = Daemon::start_in(dir.path(), |config| config.publish = publish).await;
    (daemon, dir, tree)
}

async fn named_image(daemon: &mut Daemon, name: &str, version: &str, description: &str) -> String {
    let digest = daemon.upload(&tarball()).await;
    let more = format!(r#"{{"arch": "x86_64", "description": {description:?}}}"#);
    let image = daemon.image_of(&digest, &more).await;
    let request = proto::SetImageNameRequest { name: name.into(), version: version.into(), image: image.clone(), channels: vec!["stable".into()] };
    daemon.catalogue.set_image_name(request).await.expect("named");
    image
}

async fn publish(daemon: &mut Daemon) -> proto::PublishImagesResponse {
    daemon.catalogue.publish_images(proto::PublishImagesRequest {}).await.expect("published").into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn simplestreams_own_tools_read_and_mirror_what_is_published() {
    for algorithm in ["ed25519", "rsa3072"] {
        let key = Key::new(algorithm);
        let port = free_port().port();
        let (mut daemon, dir, tree) = publishing(&key, port).await;
        named_image(&mut daemon, "debian/12", "20261101", "one").await;
        named_image(&mut daemon, "debian/12", "20261102", "two").await;
        daemon
            .catalogue
            .set_image_alias(proto::SetImageAliasRequest { alias: "debian/bookworm".into(), name: "debian/12".into() })
            .await
            .expect("alias");
        let published = publish(&mut daemon).await;
        assert_eq!((published.products, published.versions, published.platforms), (1, 2, 6), "{published:?}");
        assert_eq!(published.signer.len(), 40, "a fingerprint");

        key.gpg(&["--verify", tree.join("streams/v1/index.sjson").to_str().expect("UTF-8")]);
        key.gpg(&["--verify", tree.join(format!("streams/v1/{CONTENT}.sjson")).to_str().expect("UTF-8")]);
        let keyring = format!("--keyring={}", key.path("public.gpg").display());
        for root in [format!("file://{}", tree.display()), format!("http://127.0.0.1:{port}")] {
            let url = format!("{root}/streams/v1/index.sjson");
            let query = [&keyring, "--json", &url, "datatype=image-downloads", "ftype~^root", "virt~(^|,)kvm(,|$)", "release=12"];
            let items: Value = serde_json::from_str(&sstream("sstream-query", &query)).expect("JSON");
            let items = items.as_array().expect("a list");
            assert_eq!(items.len(), 0, "an image without a kernel boots nowhere: {items:?}");
            let items: Value = serde_json::from_str(&sstream("sstream-query", &[&keyring, "--json", &url, "ftype~^root"])).expect("JSON");
            let items = items.as_array().expect("a list");
            assert_eq!(items.len(), 2, "{root}");
            assert_eq!(items[0]["aliases"], "debian/bookworm");
            assert_eq!(items[0]["entry_points"], "init");
            let platforms: Value = serde_json::from_str(&sstream("sstream-query", &[&keyring, "--json", &url, "datatype=platforms"])).expect("JSON");
            assert_eq!(platforms.as_array().map(Vec::len), Some(7), "an item per cloud");
            let containers = |name: &str| {
                let of_name = platforms.as_array().and_then(|items| items.iter().find(|item| item["product_name"] == name));
                of_name.map(|item| item["containers"].clone())
            };
            assert_eq!(containers("k1.large"), Some("lxc,kvm".into()));
            assert_eq!(containers("xx2.large"), Some("lxc,xen".into()));

            let mirror = dir.path().join(format!("mirror-{}", root.len()));
            sstream("sstream-mirror", &[&keyring, "--max=1", &url, mirror.to_str().expect("UTF-8"), "ftype~^root"]);
            let mirrored: Vec<_> = fs::read_dir(mirror.join("images")).expect("mirrored").map(|entry| entry.expect("read").path()).collect();
            assert_eq!(mirrored.len(), 1, "the newest");
            assert_eq!(fs::read(&mirrored[0]).expect("read"), tarball());
        }
        // With somebody else's key they refuse it.
        let stranger = Key::new("ed25519");
        let wrong = format!("--keyring={}", stranger.path("public.gpg").display());
        let url = format!("file://{}/streams/v1/index.sjson", tree.display());
        let local = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/simplestreams/bin/sstream-query");
        let program = if local.exists() { local } else { "sstream-query".into() };
        let refused = Command::new(program).args([&wrong, &url]).output().expect("sstream-query is needed");
        assert!(!refused.status.success());
        daemon.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_see_one_generation_and_files_outlive_it_by_one() {
    let key = Key::new("ed25519");
    let port = free_port().port();
    let (mut daemon, _dir, tree) = publishing(&key, port).await;
    let first = named_image(&mut daemon, "web", "1", "one").await;
    publish(&mut daemon).await;
    let generation = fs::read_link(tree.join("streams/v1")).expect("a link");
    let count = || fs::read_dir(tree.join("images")).expect("a directory").count();
    assert_eq!(count(), 2, "tarball and manifest");

    // Ranges, and what is not served.
    let image = fs::read_dir(tree.join("images"))
        .expect("a directory")
        .map(|entry| entry.expect("read").path())
        .find(|path| path.extension().is_some_and(|e| e == "tar"));
    let image = image.expect("the tarball");
    let name = format!("/images/{}", image.file_name().and_then(|name| name.to_str()).expect("UTF-8"));
    let (status, body) = get(port, &name, "Range: bytes=257-261\r\n");
    assert_eq!((status, body.as_slice()), (206, &b"ustar"[..]));
    assert_eq!(get(port, &name, "").1, tarball());
    assert_eq!(get(port, &name, "Range: bytes=999999999-\r\n").0, 416);
    for bad in [
        "/",
        "/images",
        "/streams/v1",
        "/../state/catalog.sqlite",
        "/%2e%2e/state/catalog.sqlite",
        &format!("/streams/{}/index.json", generation.display()),
        "/nothing",
    ] {
        assert_eq!(get(port, bad, "").0, 404, "{bad}");
    }
    assert_eq!(request(port, "DELETE /images HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").0, 405);

    // The image goes; its files stay for those who read the index a moment ago.
    daemon
        .catalogue
        .deprecate_image(proto::DeprecateImageRequest { image: first, reason: "old".into(), ..Default::default() })
        .await
        .expect("deprecated");
    let published = publish(&mut daemon).await;
    assert_eq!((published.products, published.skipped.len()), (0, 1), "{published:?}");
    assert_ne!(fs::read_link(tree.join("streams/v1")).expect("a link"), generation);
    assert_eq!(count(), 2);
    publish(&mut daemon).await;
    assert_eq!(count(), 0);
    assert!(!tree.join("streams").join(generation).exists());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_is_published_by_itself_and_what_does_not_is_left_alone() {
    let (key, dir) = (Key::new("ed25519"), tempfile::tempdir().expect("a directory"));
    let tree = dir.path().join("published");
    let publish = Publish { directory: Some(tree.clone()), secret_key: Some(key.path("secret.gpg")), interval_secs: 1, ..Publish::default() };
    let mut daemon = Daemon::start_in(dir.path(), |config| config.publish = publish.clone()).await;
    let generation = || fs::read_link(tree.join("streams/v1")).ok();
    let pause = || tokio::time::sleep(std::time::Duration::from_millis(100));
    // The generation after `before`, which the document says something in.
    let next = |before: Option<PathBuf>, says: &'static str| {
        let tree = tree.clone();
        async move {
            for _ in 0..200 {
                let document = fs::read_to_string(tree.join(format!("streams/v1/{CONTENT}.json"))).unwrap_or_default();
                let now = fs::read_link(tree.join("streams/v1")).ok();
                if now.is_some() && now != before && document.contains(says) {
                    return now;
                }
                pause().await;
            }
            panic!("{says} was not published");
        }
    };
    let empty = next(None, "products").await;
    let image = named_image(&mut daemon, "debian/12", "20261101", "one").await;
    let first = next(empty, "20261101").await;
    key.gpg(&["--verify", tree.join(format!("streams/v1/{CONTENT}.sjson")).to_str().expect("UTF-8")]);
    // Several looks later, and after a restart, readers still see the same.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(generation(), first);
    daemon.stop().await;
    let mut daemon = Daemon::start_in(dir.path(), |config| config.publish = publish.clone()).await;
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(generation(), first);
    // A file that somebody removed is put back; a version that is deprecated goes; another key signs anew.
    let files = || fs::read_dir(tree.join("images")).expect("a directory").map(|entry| entry.expect("read").path()).collect::<Vec<_>>();
    let removed = files().remove(0);
    fs::remove_file(&removed).expect("removed");
    let second = next(first, "20261101").await;
    assert!(removed.exists());
    daemon.catalogue.deprecate_image(proto::DeprecateImageRequest { image, reason: "old".into(), ..Default::default() }).await.expect("deprecated");
    for _ in 0..200 {
        if !fs::read_to_string(tree.join(format!("streams/v1/{CONTENT}.json"))).unwrap_or_default().contains("20261101") {
            break;
        }
        pause().await;
    }
    let third = generation();
    assert_ne!(third, second);
    daemon.stop().await;
    let other = Key::new("ed25519");
    let resigned = Publish { secret_key: Some(other.path("secret.gpg")), ..publish };
    let daemon = Daemon::start_in(dir.path(), |config| config.publish = resigned).await;
    next(third, "products").await;
    other.gpg(&["--verify", tree.join("streams/v1/index.sjson").to_str().expect("UTF-8")]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_host_takes_from_the_other_what_it_published() {
    use cloudletd::{
        config::streams::{SignaturePolicy, StreamConfig, SyncMode},
        units::{Bytes, MIB},
    };
    let key = Key::new("ed25519");
    let port = free_port().port();
    let (mut publisher, _dir, _tree) = publishing(&key, port).await;
    named_image(&mut publisher, "debian/12", "20261101", "one").await;
    publish(&mut publisher).await;
    let stream = StreamConfig {
        name: "provider".parse().expect("valid"),
        url: format!("http://127.0.0.1:{port}/"),
        policy: SignaturePolicy::Signed,
        keyring: Some(key.path("public.gpg")),
        content: vec![CONTENT.into()],
        filters: Vec::new(),
        sync: SyncMode::Fetch,
        keep: 1,
        channel: "stable".into(),
        interval_secs: 3600,
        max_age_secs: Some(3600),
        max_document_size: Bytes(MIB),
        max_image_size: None,
    };
    let mut reader = Daemon::start_with(|config| config.streams = vec![stream]).await;
    let report = reader.catalogue.sync_stream(proto::SyncStreamRequest { stream: "provider".into() }).await.expect("synchronised").into_inner();
    assert!(report.skipped.is_empty(), "{report:?}");
    let found = reader.catalogue.resolve_image(proto::ResolveImageRequest { reference: "debian/12".into() }).await.expect("named").into_inner();
    assert_eq!(found.pinned, "debian/12@20261101");
    let id = found.image.and_then(|image| image.image).expect("an image").id;
    reader.render("key", server::spec(&id, "web1", proto::VolumeFormat::Raw)).await;
    reader.stop().await;
    publisher.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_fetches_a_blob_once_for_all_others() {
    use cloudletd::{config::Mirror, names::Digest};
    let (dir, port) = (tempfile::tempdir().expect("a directory"), free_port().port());
    let origin = dir.path().join("origin.tar");
    fs::write(&origin, tarball()).expect("written");
    let digest = Digest::of(&tarball());
    let publish =
        Publish { directory: Some(dir.path().join("published")), listen: Some(([127, 0, 0, 1], port).into()), blobs: true, ..Publish::default() };
    let mut first = Daemon::start_in(dir.path(), |config| config.publish = publish).await;
    let blob = format!("/blobs/sha256/{}", digest.hex());
    assert_eq!(get(port, &blob, "").0, 404, "nobody has catalogued it");
    let manifest = |url: &str| {
        serde_json::json!({"name": "x", "entry_points": {"init": {}}, "rootfs": {"url": url, "digest": digest.to_string(), "size": tarball().len()}})
            .to_string()
    };
    let request = proto::CreateImageRequest { manifest_json: manifest(&format!("file://{}", origin.display())), ..Default::default() };
    first.images.create_image(request).await.expect("catalogued");

    let rule = Mirror {
        prefix: "https://cloudlets.example/".into(),
        replace: vec![format!("http://127.0.0.1:{port}/blobs/sha256/{{sha256}}")],
        mirrors_json: None,
        trusted: false,
    };
    let mut second = Daemon::start_with(|config| config.fetch.mirrors = vec![rule]).await;
    let request = proto::CreateImageRequest { manifest_json: manifest("https://cloudlets.example/debian/root.tar"), ..Default::default() };
    let image = second.images.create_image(request).await.expect("catalogued").into_inner().image.expect("an image").id;
    second.render("key", server::spec(&image, "web1", proto::VolumeFormat::Raw)).await;
    // The origin is no longer needed, and parts can be had.
    fs::remove_file(&origin).expect("removed");
    assert_eq!(get(port, &blob, "Range: bytes=257-261\r\n"), (206, b"ustar".to_vec()));
    for bad in ["/blobs/sha256/", "/blobs/sha256/../x", &blob.to_uppercase()] {
        assert_eq!(get(port, bad, "").0, 404, "{bad}");
    }
    second.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_key_that_others_may_read_signs_nothing() {
    use std::os::unix::fs::PermissionsExt as _;
    let key = Key::new("ed25519");
    fs::set_permissions(key.path("secret.gpg"), fs::Permissions::from_mode(0o644)).expect("changed");
    let (mut daemon, _dir, tree) = publishing(&key, free_port().port()).await;
    let status = daemon.catalogue.publish_images(proto::PublishImagesRequest {}).await.expect_err("refused");
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    assert!(!tree.join("streams/v1").exists(), "nothing was published unsigned in its place");
    daemon.stop().await;
}

fn get(port: u16, path: &str, headers: &str) -> (u16, Vec<u8>) {
    request(port, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"))
}

fn request(port: u16, text: &str) -> (u16, Vec<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.write_all(text.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answered");
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
    let status = String::from_utf8_lossy(&answer[9..12]).parse().expect("a status");
    (status, answer.split_off(head + 4))
}

//! simplestreams sources: trees shaped as Ubuntu's and linuxcontainers.org's, signed by a real GnuPG key.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cloudletd::{
    config::{
        Config,
        streams::{SignaturePolicy, StreamConfig, SyncMode},
    },
    names::Digest,
    proto,
    units::{Bytes, MIB},
};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::server::{Daemon, judge, member, spec, tarball};

const CONTENT: &str = "com.example.cloud:released:download";
const PRODUCT: &str = "com.example.cloud:server:12:amd64";

/// A tree on disk, and the key that signs it.
pub struct Tree {
    pub root: PathBuf,
    home: tempfile::TempDir,
}

impl Tree {
    /// An empty one below a daemon's directory.
    pub fn new(dir: &Path) -> Tree {
        let home = tempfile::tempdir().expect("a directory");
        let root = dir.join("tree");
        fs::create_dir_all(root.join("streams/v1")).expect("directories");
        let tree = Tree { root, home };
        tree.gpg(&["--quick-generate-key", "Publisher <publisher@example.com>", "ed25519", "sign", "never"]);
        tree.gpg(&["--output", tree.keyring().to_str().expect("UTF-8"), "--export"]);
        tree
    }

    pub fn gpg(&self, args: &[&str]) -> String {
        let home = self.home.path().to_str().expect("UTF-8");
        judge("gpg", &[&["--homedir", home, "--batch", "--yes", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"], args].concat())
    }

    pub fn keyring(&self) -> PathBuf {
        self.home.path().join("public.gpg")
    }

    /// Writes a document, unsigned and signed.
    fn document(&self, path: &str, value: &Value) {
        let json = self.root.join(path);
        fs::write(&json, format!("{value:#}\n")).expect("written");
        let signed = json.with_extension("sjson");
        self.gpg(&["--output", signed.to_str().expect("UTF-8"), "--clearsign", json.to_str().expect("UTF-8")]);
    }

    /// Writes index and products.
    fn publish(&self, updated: &str, products: Value) {
        let path = format!("streams/v1/{CONTENT}.json");
        let index = json!({
            "format": "index:1.0", "updated": updated,
            "index": {CONTENT: {"datatype": "image-downloads", "format": "products:1.0", "path": path, "updated": updated, "products": [PRODUCT]}}
        });
        let document =
            json!({"format": "products:1.0", "content_id": CONTENT, "datatype": "image-downloads", "updated": updated, "products": products});
        self.document(&path, &document);
        self.document("streams/v1/index.json", &index);
    }

    /// A product with these versions; each is the small tarball with a few bytes more, so that each has a digest of its own.
    fn product(&self, versions: &[&str]) -> Value {
        let mut product = json!({"aliases": "12,bookworm", "arch": "amd64", "os": "Debian", "release": "bookworm", "version": "12", "versions": {}});
        for version in versions {
            let mut bytes = tarball();
            bytes.extend(std::iter::repeat_n(0, 512 * version.len()));
            bytes.extend(std::iter::repeat_n(0, 512 * usize::from(version.as_bytes()[version.len() - 1])));
            let path = format!("server/{version}/root.tar");
            fs::create_dir_all(self.root.join("server").join(version)).expect("a directory");
            fs::write(self.root.join(&path), &bytes).expect("written");
            product["versions"][version] = json!({"label": "release", "items": {
                "root.tar": {"ftype": "root.tar", "path": path, "sha256": Digest::of(&bytes).hex(), "size": bytes.len()},
                "disk1.img": {"ftype": "disk1.img", "path": "x", "sha256": Digest::of(b"").hex(), "size": 0}
            }});
        }
        json!({PRODUCT: product})
    }

    fn source(&self, policy: SignaturePolicy, sync: SyncMode) -> StreamConfig {
        StreamConfig {
            name: "example".parse().expect("valid"),
            url: format!("file://{}", self.root.display()),
            policy,
            keyring: (policy == SignaturePolicy::Signed).then(|| self.keyring()),
            content: Vec::new(),
            filters: vec!["arch=amd64".into(), "ftype~^root".into()],
            sync,
            keep: 1,
            channel: "stable".into(),
            interval_secs: 3600,
            max_age_secs: None,
            max_document_size: Bytes(MIB),
            max_image_size: None,
        }
    }
}

const MONDAY: &str = "Mon, 02 Nov 2026 10:00:00 +0000";
const TUESDAY: &str = "Tue, 03 Nov 2026 10:00:00 +0000";

/// A daemon with a tree below its directory; synchronised by calls only, unless the mode says otherwise.
async fn daemon(policy: SignaturePolicy, sync: SyncMode, change: impl FnOnce(&mut Config, &Tree)) -> (Daemon, Tree, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let tree = Tree::new(dir.path());
    tree.publish(MONDAY, tree.product(&["20261101", "20261102"]));
    let source = tree.source(policy, sync);
    let daemon = Daemon::start_in(dir.path(), |config| {
        config.streams = vec![source];
        change(config, &tree);
    })
    .await;
    (daemon, tree, dir)
}

async fn sync(daemon: &mut Daemon) -> Result<proto::SyncStreamResponse, tonic::Status> {
    daemon.catalogue.sync_stream(proto::SyncStreamRequest { stream: "example".into() }).await.map(tonic::Response::into_inner)
}

async fn resolve(daemon: &mut Daemon, reference: &str) -> Result<proto::ResolveImageResponse, tonic::Status> {
    daemon.catalogue.resolve_image(proto::ResolveImageRequest { reference: reference.into() }).await.map(tonic::Response::into_inner)
}

fn id_of(response: proto::ResolveImageResponse) -> String {
    response.image.and_then(|image| image.image).expect("an image").id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_tree_becomes_images_that_render_and_follow_their_channel() {
    let (mut daemon, tree, _dir) = daemon(SignaturePolicy::Signed, SyncMode::Catalogue, |_, _| ()).await;
    // The first synchronisation began with the daemon; this one comes after it.
    sync(&mut daemon).await.expect("synchronised");
    let streams = daemon.catalogue.list_streams(proto::ListStreamsRequest {}).await.expect("a list").into_inner().streams;
    assert_eq!((streams[0].error.as_str(), streams[0].documents.len()), ("", 2));
    assert!(streams[0].documents.iter().all(|document| document.signer.len() >= 40), "{:?}", streams[0].documents);

    let first = resolve(&mut daemon, "debian/12").await.expect("named");
    assert_eq!(first.pinned, "debian/12@20261102");
    let first = id_of(first);
    for reference in ["debian/bookworm", "debian/12:stable", "debian/bookworm@20261102", &first] {
        assert_eq!(id_of(resolve(&mut daemon, reference).await.expect(reference)), first, "{reference}");
    }
    let status = resolve(&mut daemon, "debian/12@20261101").await.expect_err("one version is kept");
    assert_eq!(status.code(), Code::NotFound);
    let render = daemon.render("key", spec("debian/12", "web1", proto::VolumeFormat::Qcow2Overlay)).await;
    assert_eq!(render.image_id, first, "rendered by name");

    tree.publish(TUESDAY, tree.product(&["20261101", "20261102", "20261103"]));
    let report = sync(&mut daemon).await.expect("synchronised");
    assert_eq!((report.imported.len(), report.removed.len()), (1, 0), "{report:?}");
    assert!(report.skipped.iter().any(|skipped| skipped.what.contains("20261102") && skipped.why.contains("volume")), "{:?}", report.skipped);
    assert_eq!(resolve(&mut daemon, "debian/12").await.expect("moved").pinned, "debian/12@20261103");
    assert_eq!(id_of(resolve(&mut daemon, "debian/12@20261102").await.expect("still there")), first);
    // The same request again is the same render, although its name means another image now.
    let again = daemon.start_render("key", spec("debian/12", "web1", proto::VolumeFormat::Qcow2Overlay)).await.expect("the same");
    assert!(!again.created);

    daemon
        .volumes
        .delete_volume(proto::DeleteVolumeRequest { volume: Some(crate::common::server::volume("web1")), ..Default::default() })
        .await
        .expect("deleted");
    let report = sync(&mut daemon).await.expect("synchronised");
    assert_eq!(report.removed, [first], "nothing needs it any more");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_come_one_by_one_when_nobody_keeps_them_in_step() {
    let (mut daemon, _tree, _dir) = daemon(SignaturePolicy::Signed, SyncMode::OnDemand, |_, _| ()).await;
    let report = sync(&mut daemon).await.expect("read");
    assert_eq!((report.documents, report.imported.len()), (1, 0));
    let request = proto::ListStreamImagesRequest { stream: "example".into(), filters: vec!["version_name~1101$".into()], ..Default::default() };
    let images = daemon.catalogue.list_stream_images(request).await.expect("a list").into_inner().images;
    assert_eq!(images.len(), 1);
    assert_eq!((images[0].version.as_str(), images[0].name.as_str(), images[0].image_id.as_str()), ("20261101", "debian/12", ""));
    let request = proto::ImportStreamImageRequest { stream: "example".into(), product: PRODUCT.into(), version: "20261101".into() };
    let image = daemon.catalogue.import_stream_image(request.clone()).await.expect("imported").into_inner().image.expect("an image");
    assert_eq!(image.versions, ["debian/12@20261101"]);
    let again = daemon.catalogue.import_stream_image(request).await.expect("the same").into_inner().image.expect("an image");
    assert_eq!(again, image);
    let wrong = proto::ImportStreamImageRequest { stream: "example".into(), product: PRODUCT.into(), version: "20200101".into() };
    assert_eq!(daemon.catalogue.import_stream_image(wrong).await.expect_err("no such version").code(), Code::NotFound);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_that_are_tampered_with_stale_unsigned_oversized_or_escaping_are_refused() {
    let (mut daemon, tree, _dir) = daemon(SignaturePolicy::Signed, SyncMode::Catalogue, |_, _| ()).await;
    tree.publish(TUESDAY, tree.product(&["20261103"]));
    sync(&mut daemon).await.expect("synchronised");
    let before = resolve(&mut daemon, "debian/12").await.expect("named").pinned;
    let index = tree.root.join("streams/v1/index.sjson");
    let products = tree.root.join(format!("streams/v1/{CONTENT}.sjson"));
    let good = [&index, &products].map(|path| fs::read(path).expect("read"));
    let restore = || [&index, &products].into_iter().zip(&good).for_each(|(path, bytes)| fs::write(path, bytes).expect("written"));

    // Tampered: one digit of a size.
    let text = String::from_utf8(good[1].clone()).expect("UTF-8").replacen("\"size\": ", "\"size\": 1", 1);
    fs::write(&products, text).expect("written");
    assert_eq!(sync(&mut daemon).await.expect_err("tampered").code(), Code::DataLoss);
    restore();
    // Unsigned in the signed one's place; and gone.
    fs::copy(index.with_extension("json"), &index).expect("copied");
    assert_ne!(sync(&mut daemon).await.expect_err("unsigned").code(), Code::Ok);
    fs::remove_file(&index).expect("removed");
    assert_eq!(sync(&mut daemon).await.expect_err("gone, and the unsigned one is not read").code(), Code::NotFound);
    restore();
    // One signed document in another's place.
    fs::copy(&index, &products).expect("copied");
    assert_eq!(sync(&mut daemon).await.expect_err("another document").code(), Code::DataLoss);
    restore();
    // Signed by somebody else.
    let other = tempfile::tempdir().expect("a directory");
    let stranger = Tree::new(other.path());
    stranger.publish(TUESDAY, stranger.product(&["20261104"]));
    fs::copy(stranger.root.join("streams/v1/index.sjson"), &index).expect("copied");
    assert_eq!(sync(&mut daemon).await.expect_err("a stranger's key").code(), Code::PermissionDenied);
    restore();
    // Yesterday's, with a good signature.
    tree.publish(MONDAY, tree.product(&["20261101"]));
    let status = sync(&mut daemon).await.expect_err("stale");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("older"), "{}", status.message());
    // A path out of the tree: that version is left out, and says why.
    let mut product = tree.product(&["20261105"]);
    product[PRODUCT]["versions"]["20261105"]["items"]["root.tar"]["path"] = "../../etc/passwd".into();
    tree.publish("Wed, 04 Nov 2026 10:00:00 +0000", product);
    let report = sync(&mut daemon).await.expect("the tree is fine, its item is not");
    assert!(report.skipped.iter().any(|skipped| skipped.why.contains("..")), "{:?}", report.skipped);
    // Oversized.
    let mut product = tree.product(&["20261106"]);
    // In short lines: gpg cuts long ones.
    product[PRODUCT]["padding"] = vec!["x".repeat(1 << 10); 2 << 10].into();
    tree.publish("Thu, 05 Nov 2026 10:00:00 +0000", product);
    let status = sync(&mut daemon).await.expect_err("too large");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");

    assert_eq!(resolve(&mut daemon, "debian/12").await.expect("still there").pinned, before, "nothing of it changed the catalogue");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsigned_tree_is_read_where_the_policy_says_so() {
    let (mut daemon, tree, _dir) = daemon(SignaturePolicy::Unsigned, SyncMode::Fetch, |_, _| ()).await;
    for name in ["index", CONTENT] {
        fs::remove_file(tree.root.join(format!("streams/v1/{name}.sjson"))).expect("removed");
    }
    sync(&mut daemon).await.expect("synchronised");
    let image = resolve(&mut daemon, "debian/12").await.expect("named").image.and_then(|image| image.image).expect("an image");
    assert!(image.rootfs.expect("a root filesystem").cached, "its bytes are here");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_pinned_or_follow_and_say_why_an_image_stays() {
    let mut daemon = Daemon::start().await;
    let digest = daemon.upload(&tarball()).await;
    let mut ids = Vec::new();
    for version in ["1", "2"] {
        let id = daemon.image_of(&digest, &format!(r#"{{"description": "version {version}"}}"#)).await;
        let request = proto::SetImageNameRequest { name: "app/web".into(), version: version.into(), image: id.clone(), channels: Vec::new() };
        assert!(daemon.catalogue.set_image_name(request.clone()).await.expect("named").into_inner().created);
        assert!(!daemon.catalogue.set_image_name(request).await.expect("again").into_inner().created);
        ids.push(id);
    }
    let taken = proto::SetImageNameRequest { name: "app/web".into(), version: "1".into(), image: ids[1].clone(), channels: Vec::new() };
    assert_eq!(daemon.catalogue.set_image_name(taken).await.expect_err("pinned").code(), Code::AlreadyExists);
    assert_eq!(id_of(resolve(&mut daemon, "app/web").await.expect("newest")), ids[1]);
    let request = proto::SetImageNameRequest { name: "app/web".into(), version: "1".into(), image: ids[0].clone(), channels: vec!["stable".into()] };
    daemon.catalogue.set_image_name(request).await.expect("a channel");
    assert_eq!(resolve(&mut daemon, "app/web").await.expect("the channel").pinned, "app/web@1");
    let status = resolve(&mut daemon, "app/web:edge").await.expect_err("no such channel");
    assert!(status.message().contains("stable"), "says what there is: {}", status.message());

    daemon.catalogue.set_image_alias(proto::SetImageAliasRequest { alias: "web".into(), name: "app/web".into() }).await.expect("an alias");
    assert_eq!(id_of(resolve(&mut daemon, "web@2").await.expect("through the alias")), ids[1]);
    let labels = [("team".to_owned(), "blue".to_owned())].into();
    daemon.catalogue.label_image(proto::LabelImageRequest { image: "web@2".into(), labels }).await.expect("labelled");
    let request = proto::DeprecateImageRequest { image: "web@1".into(), reason: "old".into(), replacement: "app/web@2".into(), undo: false };
    daemon.catalogue.deprecate_image(request).await.expect("deprecated");
    for (filters, want) in [
        (vec!["team=blue"], 1),
        (vec!["deprecated=True"], 1),
        (vec!["name~web"], 2),
        (vec!["team!=blue", "name~web"], 1),
        (vec!["channel=stable"], 1),
    ] {
        let request = proto::SearchImagesRequest { filters: filters.iter().map(|text| (*text).to_owned()).collect(), ..Default::default() };
        assert_eq!(daemon.catalogue.search_images(request).await.expect("a search").into_inner().images.len(), want, "{filters:?}");
    }

    let reasons =
        daemon.catalogue.check_delete_image(proto::CheckDeleteImageRequest { image: "web@1".into() }).await.expect("an answer").into_inner().reasons;
    assert_eq!(reasons, ["channel app/web:stable points at it"]);
    let status = daemon.images.delete_image(proto::DeleteImageRequest { image_id: ids[0].clone() }).await.expect_err("a channel");
    assert_eq!(status.code(), Code::FailedPrecondition);
    let request = proto::SetImageNameRequest { name: "app/web".into(), version: "2".into(), image: ids[1].clone(), channels: vec!["stable".into()] };
    daemon.catalogue.set_image_name(request).await.expect("moved");
    let object = Some(proto::create_lease_request::Object::ImageId(ids[0].clone()));
    let lease = proto::CreateLeaseRequest { object, owner: "audit".into(), ..Default::default() };
    let lease = daemon.stores.create_lease(lease).await.expect("a lease").into_inner().lease.expect("a lease").id;
    let check = proto::CheckDeleteImageRequest { image: "web@1".into() };
    let reasons = daemon.catalogue.check_delete_image(check).await.expect("an answer").into_inner().reasons;
    assert_eq!(reasons, [format!("lease {lease} of audit holds it")]);
    daemon.images.delete_image(proto::DeleteImageRequest { image_id: ids[0].clone() }).await.expect_err("a lease");
    daemon.stores.release_lease(proto::ReleaseLeaseRequest { lease_id: lease }).await.expect("released");
    daemon.images.delete_image(proto::DeleteImageRequest { image_id: ids[0].clone() }).await.expect("deleted");
    assert_eq!(resolve(&mut daemon, "app/web@1").await.expect_err("gone").code(), Code::NotFound);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_product_is_matched_with_platforms_before_it_is_an_image() {
    const PLATFORMS: &str = include_str!("../data/streams/platforms.json");
    // Room for what a partition table needs besides.
    let roomy = |config: &mut Config, _: &Tree| config.golden.size = Bytes(128 * MIB);
    let (mut daemon, _tree, _dir) = daemon(SignaturePolicy::Signed, SyncMode::OnDemand, roomy).await;
    sync(&mut daemon).await.expect("read");
    let request = proto::MatchRequest {
        image: PRODUCT.into(),
        platforms_json: PLATFORMS.into(),
        containers: vec![proto::ContainerKind::Lxc as i32, proto::ContainerKind::Kvm as i32],
        ..Default::default()
    };
    let matches = daemon.catalogue.r#match(request.clone()).await.expect("an answer").into_inner().matches;
    assert!(matches.len() == 6 && matches.iter().all(|found| found.boots), "{matches:?}");
    let fitting: Vec<&str> = matches.iter().filter(|found| found.matches).map(|found| found.platform.as_str()).collect();
    assert_eq!(fitting, ["h1.large", "k1.large"]);
    let small = matches.iter().find(|found| found.platform == "m1.small").expect("there");
    assert_eq!(small.regions, ["us-east-1", "us-west-2"]);
    assert_eq!(small.containers[1].reasons[0].code, "NO_HARDWARE_VIRTUALIZATION");
    let one = proto::MatchRequest { platforms: vec!["xx2.large".into()], ..request.clone() };
    assert_eq!(daemon.catalogue.r#match(one).await.expect("an answer").into_inner().matches.len(), 1);
    let none = proto::MatchRequest { platforms: vec!["t2.nano".into()], ..request.clone() };
    assert_eq!(daemon.catalogue.r#match(none).await.expect_err("unknown").code(), Code::NotFound);
    let wrong = proto::MatchRequest { platforms_json: "{}".into(), ..request.clone() };
    assert_eq!(daemon.catalogue.r#match(wrong).await.expect_err("no document").code(), Code::InvalidArgument);
    let items: serde_json::Map<String, serde_json::Value> =
        (0..5001).map(|memory| (format!("i{memory}"), serde_json::json!({"memory_mib": memory}))).collect();
    let fields = serde_json::json!({"hypervisor": "kvm", "arch": "amd64", "versions": {"1": {"items": items}}});
    let platforms_json = serde_json::json!({"format": "products:1.0", "products": {"m1": fields}}).to_string();
    let many = daemon.catalogue.r#match(proto::MatchRequest { platforms_json, ..request }).await.expect_err("more than a message holds");
    assert!(many.code() == Code::InvalidArgument && many.message().contains("1 images on 5001 platforms"), "{many:?}");
    // The image that the product becomes: a root filesystem whose kernel somebody else has to bring.
    let request = proto::ImportStreamImageRequest { stream: "example".into(), product: PRODUCT.into(), version: String::new() };
    daemon.catalogue.import_stream_image(request).await.expect("imported");
    let request = proto::MatchRequest { image: "debian/12".into(), platforms_json: PLATFORMS.into(), ..Default::default() };
    let matches = daemon.catalogue.r#match(request).await.expect("an answer").into_inner().matches;
    assert!(matches.iter().all(|found| !found.matches && found.boot_reasons[0].code == "KERNEL_NEEDED"), "{matches:?}");
    daemon.stop().await;
}

/// A split image of Incus: metadata with one template, and the root filesystem beside it. `bytes`: what the tree says that the metadata is.
fn split_product(tree: &Tree, template: &str, bytes: Option<&[u8]>) -> Value {
    const METADATA: &str = "architecture: x86_64\ncreation_date: 1760000000\ntemplates:\n  /etc/motd:\n    when: [create]\n    template: motd.tpl\n";
    let mut tar = tar::Builder::new(Vec::new());
    member(&mut tar, "metadata.yaml", tar::EntryType::Regular, 0o644, METADATA.as_bytes());
    member(&mut tar, "templates", tar::EntryType::Directory, 0o755, b"");
    member(&mut tar, "templates/motd.tpl", tar::EntryType::Regular, 0o644, template.as_bytes());
    let directory = tree.root.join("images");
    fs::create_dir_all(&directory).expect("a directory");
    let (plain, packed) = (directory.join("incus.tar"), directory.join("incus.tar.xz"));
    fs::write(&plain, tar.into_inner().expect("a tarball")).expect("written");
    judge("xz", &["--force", plain.to_str().expect("UTF-8")]);
    fs::write(directory.join("rootfs.tar"), tarball()).expect("written");
    let item = |ftype: &str, path: &str, bytes: &[u8]| json!({"ftype": ftype, "path": format!("images/{path}"), "sha256": Digest::of(bytes).hex(), "size": bytes.len()});
    let real = fs::read(&packed).expect("xz made it");
    let items =
        json!({"incus.tar.xz": item("incus.tar.xz", "incus.tar.xz", bytes.unwrap_or(&real)), "root.tar": item("root.tar", "rootfs.tar", &tarball())});
    json!({"debian:bookworm:amd64:default": {
        "arch": "amd64", "os": "Debian", "release": "bookworm", "variant": "default", "aliases": "debian/12", "versions": {"20261104_05:24": {"items": items}}
    }})
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_of_a_split_image_are_rendered_and_its_metadata_is_fetched_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let tree = Tree::new(dir.path());
    tree.publish(MONDAY, split_product(&tree, "Welcome to {{ container.name }}\n", None));
    let source = StreamConfig {
        filters: vec!["arch=amd64".into(), "ftype~(root.tar|incus.tar.xz)".into()],
        ..tree.source(SignaturePolicy::Signed, SyncMode::Catalogue)
    };
    let mut daemon = Daemon::start_in(dir.path(), |config| config.streams = vec![source]).await;
    let report = sync(&mut daemon).await.expect("synchronised");
    assert!(report.skipped.is_empty(), "{report:?}");
    let image = resolve(&mut daemon, "debian/bookworm").await.expect("named").image.and_then(|image| image.image).expect("an image");
    let manifest: Value = serde_json::from_str(&image.manifest_json).expect("JSON");
    assert_eq!(manifest["lxd"]["files"]["motd.tpl"], "Welcome to {{ container.name }}\n");
    daemon.render("key", spec(&image.id, "web1", proto::VolumeFormat::Raw)).await;
    let disk = daemon.dir.join("pool/web1.raw");
    assert_eq!(crate::common::server::cat(disk.to_str().expect("UTF-8"), "/etc/motd"), "Welcome to web1\n");

    // The image remembers; nobody asks for the bytes again.
    fs::remove_file(tree.root.join("images/incus.tar.xz")).expect("removed");
    let report = sync(&mut daemon).await.expect("synchronised");
    assert_eq!((report.unchanged, report.imported.len(), report.skipped.len()), (1, 0, 0), "{report:?}");

    // Templates that are not understood are left out, and the image says so.
    tree.publish(TUESDAY, split_product(&tree, "{% for key in config %}{{ key }}{% endfor %}\n", None));
    let report = sync(&mut daemon).await.expect("synchronised");
    assert_eq!(report.imported.len(), 1, "{report:?}");
    let known = daemon.images.list_images(proto::ListImagesRequest::default()).await.expect("a list").into_inner().images;
    let other = known.iter().find(|image| image.id == report.imported[0]).expect("catalogued");
    let manifest: Value = serde_json::from_str(&other.manifest_json).expect("JSON");
    let why = manifest["x-simplestreams"]["templates_left_out"].as_str().expect("a reason");
    assert!(manifest.get("lxd").is_none() && why.contains("motd.tpl") && why.contains("line 1"), "{manifest:#}");

    // Bytes that are not those which the tree names are not read at all.
    tree.publish("Wed, 04 Nov 2026 10:00:00 +0000", split_product(&tree, "x\n", Some(b"others")));
    let report = sync(&mut daemon).await.expect("synchronised");
    assert!(report.imported.is_empty() && report.skipped.iter().any(|skipped| skipped.why.contains("incus.tar.xz")), "{report:?}");
    daemon.stop().await;
}

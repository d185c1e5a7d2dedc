//! `[[trust]]` holds by every way that bytes and manifests come in: calls, uploads, mirrors, peers, streams, and a store from before there was a rule.
//!
//! Daemons in this process with stores of their own; signatures by minisign and GnuPG.

use std::{fs, path::Path};

use crate::common::server::{self, Daemon, free_port, messages, tarball};
use crate::kit::{Gpg, Minisign};
use cloudletd::{
    config::{
        Config, Mirror, share,
        streams::{SignaturePolicy, StreamConfig, SyncMode},
        trust::{Require, Trust},
    },
    names::Digest,
    proto,
    units::{Bytes, MIB},
};

/// Where tarballs are said to be; a mirror rule leads to a directory.
const ORIGIN: &str = "https://origin.example/";

fn rule(prefix: &str, minisign: &[&Path], openpgp: &[&Path]) -> Trust {
    let owned = |paths: &[&Path]| paths.iter().map(|path| path.to_path_buf()).collect::<Vec<_>>();
    let require = if minisign.is_empty() && openpgp.is_empty() { Require::Nothing } else { Require::Signature };
    Trust { prefix: prefix.into(), require, openpgp: owned(openpgp), minisign: owned(minisign), suffix: None }
}

/// Leads [`ORIGIN`] to `dir`, which is not asked for what nobody knows the digest of.
fn mirrored(config: &mut Config, dir: &Path) {
    config.fetch.file_roots.push(dir.to_path_buf());
    config.fetch.attempts = 1;
    config.fetch.mirrors =
        vec![Mirror { prefix: ORIGIN.into(), replace: vec![format!("file://{}/", dir.display())], mirrors_json: None, trusted: false }];
}

fn manifest(name: &str, tar: &[u8]) -> String {
    serde_json::json!({
        "name": name, "entry_points": {"init": {}},
        "rootfs": {"url": format!("{ORIGIN}{name}.tar"), "digest": Digest::of(tar).to_string(), "size": tar.len()},
    })
    .to_string()
}

async fn create(daemon: &mut Daemon, manifest: &str, signature: &[u8]) -> Result<proto::Image, tonic::Status> {
    let request = proto::CreateImageRequest { manifest_json: manifest.into(), manifest_signature: signature.to_vec(), ..Default::default() };
    Ok(daemon.images.create_image(request).await?.into_inner().image.expect("an image"))
}

/// How a render of the image ended: its reason, empty when it succeeded.
async fn outcome(daemon: &mut Daemon, image: &str, name: &str) -> String {
    let id = match daemon.start_render(name, server::spec(image, name, proto::VolumeFormat::Raw)).await {
        Ok(started) => started.render.expect("a render").id,
        Err(status) => return reason(&status),
    };
    let render = daemon.wait(&id).await;
    match render.error {
        None => String::new(),
        Some(error) => error.reason,
    }
}

fn reason(status: &tonic::Status) -> String {
    use tonic_types::StatusExt as _;
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

fn minisigned(minisign: &Minisign, dir: &Path, name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = dir.join(name);
    fs::write(&path, bytes).expect("write");
    minisign.sign(&path, &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_store_from_before_the_rule_is_not_exempt() {
    let (tar, minisign) = (tarball(), Minisign::new());
    let (origin, home) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let origin_dir = fs::canonicalize(origin.path()).expect("there");
    let signature = minisigned(&minisign, &origin_dir, "small.tar", &tar);
    fs::remove_file(origin_dir.join("small.tar.minisig")).expect("stripped");
    let mut before = Daemon::start_in(home.path(), |config| mirrored(config, &origin_dir)).await;
    let image = create(&mut before, &manifest("small", &tar), b"").await.expect("nothing is owed").id;
    assert_eq!(outcome(&mut before, &image, "web1").await, "");
    before.stop().await;

    let key = minisign.public_key();
    let with_rule = |config: &mut Config| {
        mirrored(config, &origin_dir);
        config.trust = vec![rule(ORIGIN, &[&key], &[])];
    };
    let mut after = Daemon::start_in(home.path(), with_rule).await;
    assert_eq!(outcome(&mut after, &image, "web2").await, "SIGNATURE_MISSING", "the golden image is here, and means nothing");
    fs::write(origin_dir.join("small.tar.minisig"), &signature).expect("signed");
    assert_eq!(outcome(&mut after, &image, "web3").await, "", "the untrusted mirror may give the signature: it vouches for itself");
    fs::remove_file(origin_dir.join("small.tar.minisig")).expect("stripped");
    assert_eq!(outcome(&mut after, &image, "web4").await, "", "it is noted who signed");
    let shown = after.images.get_image(proto::GetImageRequest { image_id: image.clone() }).await.expect("there").into_inner().image.expect("there");
    let signer = shown.rootfs.expect("described").signed_by.expect("noted");
    assert_eq!((signer.method.as_str(), signer.key), ("minisign", minisign.key_id()));
    after.stop().await;

    // A key that is taken out of the configuration vouches for nothing any more.
    let other = Minisign::new();
    let other_key = other.public_key();
    let mut rotated = Daemon::start_in(home.path(), |config| {
        mirrored(config, &origin_dir);
        config.trust = vec![rule(ORIGIN, &[&other_key], &[])];
    })
    .await;
    fs::write(origin_dir.join("small.tar.minisig"), &signature).expect("signed");
    assert_eq!(outcome(&mut rotated, &image, "web5").await, "SIGNATURE_KEY_UNKNOWN");
    minisigned(&other, &origin_dir, "small.tar", &tar);
    assert_eq!(outcome(&mut rotated, &image, "web6").await, "");
    rotated.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_was_revoked_since_vouches_for_nothing() {
    let (tar, gpg) = (tarball(), Gpg::new());
    gpg.make_key("builder", "ed25519", "sign", "0");
    let (origin, home) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let origin_dir = fs::canonicalize(origin.path()).expect("there");
    let ring = origin_dir.join("ring.gpg");
    fs::write(&ring, gpg.export(&["builder"])).expect("written");
    fs::write(origin_dir.join("small.tar"), &tar).expect("written");
    // As `gpg --detach-sign` calls it.
    fs::write(origin_dir.join("small.tar.sig"), gpg.sign("builder", &tar, &[])).expect("written");
    let with_rule = |config: &mut Config| {
        mirrored(config, &origin_dir);
        config.trust = vec![rule("*", &[], &[&ring])];
    };
    let mut daemon = Daemon::start_in(home.path(), with_rule).await;
    let image = create(&mut daemon, &manifest("small", &tar), b"").await.expect("catalogued").id;
    assert_eq!(outcome(&mut daemon, &image, "web1").await, "");
    daemon.stop().await;
    gpg.revoke("builder");
    fs::write(&ring, gpg.export(&["builder"])).expect("written");
    let mut daemon = Daemon::start_in(home.path(), with_rule).await;
    assert_eq!(outcome(&mut daemon, &image, "web2").await, "SIGNATURE_KEY_REVOKED");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_has_the_golden_image_does_not_vouch_for_it() {
    let (tar, minisign) = (tarball(), Minisign::new());
    let origin = tempfile::tempdir().expect("a directory");
    let origin_dir = fs::canonicalize(origin.path()).expect("there");
    fs::write(origin_dir.join("small.tar"), &tar).expect("written");
    let address = free_port();
    let mut builder = Daemon::start_with(|config| {
        mirrored(config, &origin_dir);
        config.share.listen = Some(address);
        config.share.allow = vec!["127.0.0.0/8".into()];
    })
    .await;
    let image = create(&mut builder, &manifest("small", &tar), b"").await.expect("catalogued").id;
    assert_eq!(outcome(&mut builder, &image, "web1").await, "");
    let key = minisign.public_key();
    let mut taker = Daemon::start_with(|config| {
        mirrored(config, &origin_dir);
        config.golden.prefer = share::Prefer::Pull;
        config.share.peers = vec![share::Peer { url: format!("http://{address}"), ca: None, identity: None }];
        config.trust = vec![rule(ORIGIN, &[&key], &[])];
    })
    .await;
    assert_eq!(create(&mut taker, &manifest("small", &tar), b"").await.expect("catalogued").id, image);
    assert_eq!(outcome(&mut taker, &image, "web1").await, "SIGNATURE_MISSING");
    let goldens = taker.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("listed").into_inner().goldens;
    assert!(goldens.is_empty(), "nothing was pulled");
    minisigned(&minisign, &origin_dir, "small.tar", &tar);
    assert_eq!(outcome(&mut taker, &image, "web2").await, "");
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uploaded_tarball_brings_its_signature_or_is_refused() {
    let (tar, minisign, dir) = (tarball(), Minisign::new(), tempfile::tempdir().expect("a directory"));
    let signature = minisigned(&minisign, dir.path(), "small.tar", &tar);
    let key = minisign.public_key();
    let mut daemon = Daemon::start_with(|config| config.trust = vec![rule("*", &[&key], &[])]).await;
    let digest = Digest::of(&tar).to_string();
    let header = |signature: &[u8]| proto::UploadHeader { digest: digest.clone(), size_bytes: tar.len() as u64, signature: signature.to_vec() };
    let other = minisigned(&minisign, dir.path(), "other.tar", b"other");
    for (signature, expected) in [(&b""[..], "SIGNATURE_MISSING"), (b"nonsense", "SIGNATURE_MALFORMED"), (&other, "SIGNATURE_INVALID")] {
        let status = daemon.images.upload_rootfs(tokio_stream::iter(messages(Some(header(signature)), &tar))).await.expect_err(expected);
        assert_eq!(reason(&status), expected);
        assert_eq!(fs::read_dir(daemon.dir.join("state/blobs")).expect("there").count(), 0);
        assert_eq!(fs::read_dir(daemon.dir.join("state/tmp")).expect("there").count(), 0);
    }
    daemon.images.upload_rootfs(tokio_stream::iter(messages(Some(header(&signature)), &tar))).await.expect("signed");
    let image = daemon.image_of(&digest, "{}").await;
    assert_eq!(outcome(&mut daemon, &image, "web1").await, "");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tarball_that_was_uploaded_before_the_rule_is_refused() {
    let (minisign, home) = (Minisign::new(), tempfile::tempdir().expect("a directory"));
    let mut before = Daemon::start_in(home.path(), |_| ()).await;
    let image = before.image().await;
    before.stop().await;
    let key = minisign.public_key();
    let mut after = Daemon::start_in(home.path(), |config| config.trust = vec![rule("upload:", &[&key], &[])]).await;
    assert_eq!(outcome(&mut after, &image, "web1").await, "SIGNATURE_MISSING");
    after.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_owes_its_signature_before_it_is_parsed() {
    let (tar, gpg, minisign) = (tarball(), Gpg::new(), Minisign::new());
    gpg.make_key("author", "ed25519", "sign", "0");
    let (dir, home) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let dir = fs::canonicalize(dir.path()).expect("there");
    let (ring, key) = (dir.join("ring.gpg"), minisign.public_key());
    fs::write(&ring, gpg.export(&["author"])).expect("written");
    fs::write(dir.join("small.tar"), &tar).expect("written");
    let text = manifest("small", &tar);
    let mut before = Daemon::start_in(home.path(), |config| mirrored(config, &dir)).await;
    let old = create(&mut before, &manifest("old", &tar), b"").await.expect("nothing is owed").id;
    before.stop().await;

    let mut daemon = Daemon::start_in(home.path(), |config| {
        mirrored(config, &dir);
        // Either kind will do.
        config.trust = vec![rule("manifest:", &[&key], &[&ring])];
    })
    .await;
    // Not even whether it is a manifest is found out.
    for document in [text.as_str(), "{"] {
        assert_eq!(reason(&create(&mut daemon, document, b"").await.expect_err("unsigned")), "SIGNATURE_MISSING");
    }
    let signature = gpg.sign("author", text.as_bytes(), &["--armor"]);
    let changed = text.replace("small", "smell");
    assert_eq!(reason(&create(&mut daemon, &changed, &signature).await.expect_err("changed")), "SIGNATURE_INVALID");
    let image = create(&mut daemon, &text, &signature).await.expect("signed");
    let signer = image.manifest_signed_by.expect("shown");
    assert_eq!((signer.method.as_str(), signer.key), ("openpgp", gpg.fingerprint("author")));
    assert!(image.rootfs.expect("described").signed_by.is_none(), "the tarball owes nothing");
    assert_eq!(outcome(&mut daemon, &image.id, "web1").await, "");
    let other = manifest("small", &tar).replace("\"init\"", "\"chroot\"");
    create(&mut daemon, &other, &minisigned(&minisign, &dir, "other.json", other.as_bytes())).await.expect("signed by the other kind");
    assert_eq!(outcome(&mut daemon, &old, "web2").await, "SIGNATURE_MISSING", "what was catalogued before the rule is not exempt");
    daemon.stop().await;
}

/// A stream below `dir` with one image, `small.tar`, signed by `author` in the clear.
fn write_stream(dir: &Path, gpg: &Gpg, tar: &[u8]) {
    let streams = dir.join("streams/v1");
    fs::create_dir_all(&streams).expect("made");
    let digest = Digest::of(tar).hex();
    let products = serde_json::json!({
        "format": "products:1.0", "content_id": "images", "datatype": "image-downloads", "updated": "Sun, 22 Nov 2026 00:00:00 +0000",
        "products": {"x:small": {"os": "x", "release": "1", "arch": "amd64", "versions": {"20261122": {"items": {
            "root.tar.xz": {"ftype": "root.tar.xz", "path": "small.tar", "sha256": digest, "size": tar.len()}}}}}},
    });
    let index = serde_json::json!({
        "format": "index:1.0", "updated": "Sun, 22 Nov 2026 00:00:00 +0000",
        "index": {"images": {"datatype": "image-downloads", "path": "streams/v1/images.json", "format": "products:1.0"}},
    });
    for (name, document) in [("index", index), ("images", products)] {
        let text = document.to_string();
        fs::write(streams.join(format!("{name}.json")), &text).expect("written");
        let signed = gpg.clearsign("author", text.as_bytes(), &[]);
        fs::write(streams.join(format!("{name}.sjson")), signed).expect("written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_stream_owes_what_its_url_owes_and_its_manifest_is_the_streams() {
    let (gpg, minisign) = (Gpg::new(), Minisign::new());
    gpg.make_key("author", "ed25519", "sign", "0");
    let dir = tempfile::tempdir().expect("a directory");
    let dir = fs::canonicalize(dir.path()).expect("there");
    let tar = tarball();
    let xz = support_xz(&tar);
    fs::write(dir.join("small.tar"), &xz).expect("written");
    write_stream(&dir, &gpg, &xz);
    let (ring, key) = (dir.join("ring.gpg"), minisign.public_key());
    fs::write(&ring, gpg.export(&["author"])).expect("written");
    let stream = |policy: SignaturePolicy| StreamConfig {
        name: "provider".parse().expect("valid"),
        url: "https://origin.example/".into(),
        policy,
        keyring: (policy == SignaturePolicy::Signed).then(|| ring.clone()),
        content: Vec::new(),
        filters: Vec::new(),
        sync: SyncMode::OnDemand,
        keep: 1,
        channel: "stable".into(),
        interval_secs: 3600,
        max_age_secs: None,
        max_document_size: Bytes(MIB),
        max_image_size: None,
    };
    let rules = || vec![rule(ORIGIN, &[&key], &[]), rule("manifest:", &[], &[&ring])];
    let configured = |config: &mut Config, policy| {
        mirrored(config, &dir);
        config.fetch.mirrors[0].trusted = true;
        config.streams = vec![stream(policy)];
        config.trust = rules();
    };
    let import = || proto::ImportStreamImageRequest { stream: "provider".into(), product: "x:small".into(), ..Default::default() };
    let mut unsigned = Daemon::start_with(|config| configured(config, SignaturePolicy::Unsigned)).await;
    unsigned.catalogue.sync_stream(proto::SyncStreamRequest { stream: "provider".into() }).await.expect("read");
    let status = unsigned.catalogue.import_stream_image(import()).await.expect_err("its documents are signed by nobody");
    assert_eq!(reason(&status), "SIGNATURE_MISSING");
    unsigned.stop().await;

    let mut daemon = Daemon::start_with(|config| configured(config, SignaturePolicy::Signed)).await;
    daemon.catalogue.sync_stream(proto::SyncStreamRequest { stream: "provider".into() }).await.expect("read");
    let image = daemon.catalogue.import_stream_image(import()).await.expect("imported").into_inner().image.expect("named").image.expect("an image");
    assert_eq!(image.manifest_signed_by.expect("the stream's").key, gpg.fingerprint("author"));
    assert_eq!(outcome(&mut daemon, &image.id, "web1").await, "SIGNATURE_MISSING", "the stream vouches for the digest, the rule wants a signature");
    minisigned(&minisign, &dir, "small.tar", &xz);
    assert_eq!(outcome(&mut daemon, &image.id, "web2").await, "");
    daemon.stop().await;
}

/// The bytes compressed by xz.
fn support_xz(bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x");
    fs::write(&path, bytes).expect("written");
    server::judge("xz", &["-0", path.to_str().expect("text")]);
    fs::read(dir.path().join("x.xz")).expect("compressed")
}

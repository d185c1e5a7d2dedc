//! Golden images and tarballs through registries and buckets: real servers of other people, and daemons with stores of their own that have nothing else in common.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use crate::common::server::{Daemon, free_port, judge};
use crate::common::sites::{CLAIM, Reply, Server, registry, registry_blob, registry_config, s3, stub};
use crate::kit::{self, blobs_of, golden_of, image_named, serving, spec, tarball};
use cloudletd::{
    config::{Config, remote, share::Prefer},
    names::Digest,
    proto,
};
use tonic::Code;
use tonic_types::StatusExt;

/// A daemon with these remotes and no tarball.
async fn taker(registries: Vec<remote::Registry>, buckets: Vec<remote::Bucket>, prefer: Prefer) -> Daemon {
    Daemon::start_with(taking(registries, buckets, prefer)).await
}

fn taking(registries: Vec<remote::Registry>, buckets: Vec<remote::Bucket>, prefer: Prefer) -> impl FnOnce(&mut Config) {
    move |config| {
        config.golden.prefer = prefer;
        config.share.registries = registries;
        config.share.buckets = buckets;
        config.fetch.attempts = 1;
    }
}

/// One that has built the golden, and the image's id there.
async fn builder(tar: &[u8], registries: Vec<remote::Registry>, buckets: Vec<remote::Bucket>) -> Daemon {
    let (mut daemon, _) = serving(tar, taking(registries, buckets, Prefer::Build)).await;
    let image = image_named(&mut daemon, tar).await;
    daemon.render("a", spec(&image, "web1")).await;
    daemon
}

async fn push(daemon: &mut Daemon, remote: &str) -> proto::PushGoldenResponse {
    let golden_key = golden_of(daemon).await.key;
    let request = proto::PushGoldenRequest { remote: remote.into(), golden_key };
    daemon.shares.push_golden(request).await.expect("pushed").into_inner()
}

async fn pull(daemon: &mut Daemon, remote: &str, key: &str) -> Result<proto::PullGoldenResponse, tonic::Status> {
    let request = proto::PullGoldenRequest { remote: remote.into(), golden_key: key.into(), ..Default::default() };
    daemon.shares.pull_golden(request).await.map(tonic::Response::into_inner)
}

fn reason(status: &tonic::Status) -> String {
    status.get_error_details().error_info().expect("an ErrorInfo").reason.clone()
}

/// Two volumes of the same name are the same tree, as e2fsprogs and diff see it; inode times and the record of what was applied have the time of the render.
fn same_volumes(daemons: [&Daemon; 2]) {
    let trees = daemons.map(|daemon| {
        let volume = daemon.dir.join("pool/web1.raw").display().to_string();
        judge("e2fsck", &["-fn", &volume]);
        let tree = daemon.dir.join("tree");
        fs::create_dir(&tree).expect("made");
        judge("debugfs", &["-R", &format!("rdump / {}", tree.display()), &volume]);
        tree.display().to_string()
    });
    judge("diff", &["-r", "--no-dereference", "--exclude=applied_config", &trees[0], &trees[1]]);
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).expect("written");
}

/// The layers of a golden's artifact, as skopeo shows it.
fn layers(server: &Server, key: &str) -> Vec<String> {
    let reference = format!("docker://{}/cloudlets/images:golden-{key}", server.address);
    let raw = judge("skopeo", &["inspect", "--raw", "--tls-verify=false", "--creds", "user:right", &reference]);
    let manifest: serde_json::Value = serde_json::from_str(&raw).expect("JSON");
    assert_eq!(manifest["artifactType"], "application/vnd.cloudlet.golden.v1");
    assert_eq!(manifest["annotations"]["cloudlet.golden.key"], key);
    assert_eq!(manifest["config"]["mediaType"], "application/vnd.cloudlet.golden.v1+json");
    let layers = manifest["layers"].as_array().expect("layers");
    assert!(layers.iter().all(|layer| layer["mediaType"] == "application/vnd.cloudlet.golden.chunk.v1+zstd"));
    layers.iter().map(|layer| layer["digest"].as_str().expect("text").to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_golden_goes_through_a_registry_to_a_host_that_has_no_tarball() {
    let (tar, server) = (tarball(), registry());
    let config = || vec![registry_config(&server, "right")];
    let mut builder = builder(&tar, config(), Vec::new()).await;
    let built = golden_of(&mut builder).await;
    let pushed = push(&mut builder, "registry").await;
    assert_eq!(pushed.reference, format!("{}/cloudlets/images:golden-{}", server.address, built.key));
    assert!(pushed.sent_chunks > 8 && pushed.sent_chunks <= pushed.chunks, "{pushed:?}");
    let again = push(&mut builder, "registry").await;
    assert_eq!((again.sent_chunks, again.artifact_digest), (0, pushed.artifact_digest.clone()));
    // Another implementation of the protocol holds every blob against its digest as it copies them.
    assert_eq!(layers(&server, &built.key).len() as u64, pushed.chunks);
    let copy = server.dir.path().join("copy");
    let reference = format!("docker://{}", pushed.reference);
    judge("skopeo", &["copy", "--src-tls-verify=false", "--src-creds", "user:right", &reference, &format!("dir:{}", copy.display())]);
    let manifest = fs::read(copy.join("manifest.json")).expect("copied");
    assert_eq!(Digest::of(&manifest).to_string(), pushed.artifact_digest);

    // By call.
    let mut called = taker(config(), Vec::new(), Prefer::Build).await;
    let image = image_named(&mut called, &tar).await;
    let pulled = pull(&mut called, "registry", &built.key).await.expect("pulled");
    assert_eq!((pulled.pulled, pulled.digest.as_str()), (true, built.digest.as_str()));
    assert!(!pull(&mut called, "registry", &built.key).await.expect("here").pulled);
    called.render("a", spec(&image, "web1")).await;
    assert_eq!((golden_of(&mut called).await.digest, blobs_of(&called)), (built.digest.clone(), 0));
    same_volumes([&builder, &called]);
    called.stop().await;
    // By itself, before a build.
    let mut own = taker(config(), Vec::new(), Prefer::Pull).await;
    let image = image_named(&mut own, &tar).await;
    own.render("a", spec(&image, "web1")).await;
    assert_eq!((golden_of(&mut own).await.digest, blobs_of(&own)), (built.digest, 0));
    let remotes = own.shares.list_remotes(proto::ListRemotesRequest {}).await.expect("listed").into_inner().remotes;
    assert_eq!(
        (remotes[0].kind.as_str(), remotes[0].location.as_str()),
        ("registry", &pushed.reference[..pushed.reference.rfind(":golden").expect("a tag")])
    );
    own.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_pull_from_a_registry_goes_on_where_it_was() {
    let (tar, server) = (tarball(), registry());
    let config = || vec![registry_config(&server, "right")];
    let mut builder = builder(&tar, config(), Vec::new()).await;
    let built = golden_of(&mut builder).await;
    push(&mut builder, "registry").await;
    let layers = layers(&server, &built.key);
    let missing = registry_blob(&server, &layers[layers.len() / 2]);
    let aside = server.dir.path().join("aside");
    fs::rename(&missing, &aside).expect("moved");
    let dir = tempfile::tempdir().expect("a directory");
    let mut first = Daemon::start_in(dir.path(), taking(config(), Vec::new(), Prefer::Build)).await;
    image_named(&mut first, &tar).await;
    let failed = pull(&mut first, "registry", &built.key).await.expect_err("a chunk is missing");
    assert_eq!((failed.code(), reason(&failed).as_str()), (Code::Unavailable, "GOLDEN_PEERS"), "{failed:?}");
    first.stop().await;
    let given = || {
        let log = server.log();
        let blobs = log.lines().filter(|line| line.contains("\"GET /v2/") && line.contains("/blobs/") && line.contains("\" 200 "));
        blobs.map(|line| line.split("/blobs/").nth(1).expect("a digest").split(' ').next().expect("a digest").to_owned()).collect::<Vec<_>>()
    };
    let before: Vec<String> = given().into_iter().filter(|digest| layers.contains(digest)).collect();
    assert!(before.len() > 1 && before.len() < layers.len(), "{before:?}");
    fs::rename(&aside, &missing).expect("moved back");
    let mut second = Daemon::start_in(dir.path(), taking(config(), Vec::new(), Prefer::Build)).await;
    assert!(pull(&mut second, "registry", &built.key).await.expect("pulled").pulled);
    assert_eq!(golden_of(&mut second).await.digest, built.digest);
    let all: Vec<String> = given().into_iter().filter(|digest| layers.contains(digest)).collect();
    let different: std::collections::BTreeSet<&String> = all.iter().collect();
    assert_eq!(all.len(), different.len(), "no chunk comes twice");
    second.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_should_not_have_is_refused_and_says_why() {
    let (tar, server) = (tarball(), registry());
    let config = || vec![registry_config(&server, "right")];
    let mut builder = builder(&tar, config(), Vec::new()).await;
    let built = golden_of(&mut builder).await;
    let mut taker = taker(config(), Vec::new(), Prefer::Build).await;
    // Nothing there yet, no such remote, no such golden.
    let missing = pull(&mut taker, "registry", &built.key).await.expect_err("not there");
    assert_eq!((missing.code(), reason(&missing).as_str()), (Code::NotFound, "REMOTE_NOT_FOUND"), "{missing:?}");
    let unknown = pull(&mut taker, "other", &built.key).await.expect_err("no remote");
    assert_eq!((unknown.code(), reason(&unknown).as_str()), (Code::NotFound, "REMOTE_UNKNOWN"));
    let request = proto::PushGoldenRequest { remote: "registry".into(), golden_key: built.key.clone() };
    let nothing = taker.shares.push_golden(request).await.expect_err("not in this store");
    assert_eq!((nothing.code(), reason(&nothing).as_str()), (Code::NotFound, "GOLDEN_NOT_FOUND"));
    push(&mut builder, "registry").await;
    // Nobody knows what it is for.
    let nameless = pull(&mut taker, "registry", &built.key).await.expect_err("no image");
    assert_eq!((nameless.code(), reason(&nameless).as_str()), (Code::NotFound, "IMAGE_NOT_FOUND"));
    let image = image_named(&mut taker, &tar).await;
    // Another golden than the caller means.
    let digest = Digest::of(b"other").to_string();
    let request = proto::PullGoldenRequest { remote: "registry".into(), golden_key: built.key.clone(), digest, ..Default::default() };
    let other = taker.shares.pull_golden(request).await.expect_err("another");
    assert_eq!((other.code(), reason(&other).as_str()), (Code::DataLoss, "DIGEST_MISMATCH"));
    // Another password: it is not told, neither to the caller nor in what is kept of the call.
    fs::write(server.dir.path().join("password"), "wrong-secret\n").expect("written");
    let mut denied = self::taker(
        vec![remote::Registry { password_file: Some(server.dir.path().join("password")), ..config().remove(0) }],
        Vec::new(),
        Prefer::Build,
    )
    .await;
    fs::write(server.dir.path().join("password"), "wrong-secret\n").expect("written");
    image_named(&mut denied, &tar).await;
    let refused = pull(&mut denied, "registry", &built.key).await.expect_err("a wrong password");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "REMOTE_AUTH"), "{refused:?}");
    assert!(!format!("{refused:?}").contains("wrong-secret"));
    // It is read when it is needed: no restart.
    fs::write(server.dir.path().join("password"), "right\n").expect("written");
    assert!(pull(&mut denied, "registry", &built.key).await.expect("pulled").pulled);
    denied.stop().await;
    // Bytes that changed on the registry's disk: a chunk, then the manifest.
    let layers = layers(&server, &built.key);
    flip(&registry_blob(&server, &layers[1]));
    let changed = pull(&mut taker, "registry", &built.key).await.expect_err("a chunk is another");
    assert_eq!((changed.code(), reason(&changed).as_str()), (Code::DataLoss, "GOLDEN_PEERS"), "{changed:?}");
    assert!(changed.message().contains(&layers[1]), "{}", changed.message());
    flip(&registry_blob(&server, &layers[1]));
    let artifact = fs::read(
        server.dir.path().join(format!("storage/docker/registry/v2/repositories/cloudlets/images/_manifests/tags/golden-{}/current/link", built.key)),
    );
    let manifest = registry_blob(&server, &String::from_utf8(artifact.expect("a tag")).expect("text"));
    let text = fs::read_to_string(&manifest).expect("there");
    fs::write(&manifest, text.replace("golden.v1\"", "golden.v9\"").replace("golden.v1+json", "golden.v9+json")).expect("written");
    let changed = pull(&mut taker, "registry", &built.key).await.expect_err("another artifact");
    assert_eq!(changed.code(), Code::DataLoss, "{changed:?}");
    fs::write(&manifest, text).expect("written");
    assert!(pull(&mut taker, "registry", &built.key).await.expect("all is well again").pulled);
    taker.render("a", spec(&image, "web1")).await;
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_takes_the_place_of_a_pull_that_a_registry_spoils() {
    let (tar, server) = (tarball(), registry());
    let config = || vec![registry_config(&server, "right")];
    let mut builder = builder(&tar, config(), Vec::new()).await;
    let built = golden_of(&mut builder).await;
    push(&mut builder, "registry").await;
    flip(&registry_blob(&server, &layers(&server, &built.key)[0]));
    let (mut taker, _) = serving(&tar, taking(config(), Vec::new(), Prefer::Pull)).await;
    let image = image_named(&mut taker, &tar).await;
    taker.render("a", spec(&image, "web1")).await;
    assert_eq!((golden_of(&mut taker).await.digest, blobs_of(&taker)), (built.digest, 1), "it was built from the tarball");
    taker.stop().await;
    // A registry that is not there delays nothing for long.
    let mut gone = config();
    gone[0].url = format!("http://{}", free_port());
    let (mut taker, _) = serving(&tar, taking(gone, Vec::new(), Prefer::Pull)).await;
    let image = image_named(&mut taker, &tar).await;
    let begun = std::time::Instant::now();
    taker.render("a", spec(&image, "web1")).await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tarball_goes_through_a_registry_and_an_interrupted_one_is_continued() {
    let (tar, server) = (tarball(), registry());
    let config = || vec![registry_config(&server, "right")];
    let mut giver = taker(config(), Vec::new(), Prefer::Build).await;
    let blob_digest = giver.upload(&tar).await;
    let push = proto::PushBlobRequest { remote: "registry".into(), blob_digest: blob_digest.clone() };
    let pushed = giver.shares.push_blob(push.clone()).await.expect("pushed").into_inner();
    assert_eq!(pushed.sent_bytes, tar.len() as u64);
    assert_eq!(giver.shares.push_blob(push).await.expect("there").into_inner().sent_bytes, 0);
    giver.stop().await;
    // What arrived of it before.
    let dir = tempfile::tempdir().expect("a directory");
    let partial = dir.path().join("state/tmp").join(format!("partial-blob-{}", &blob_digest[7..]));
    fs::create_dir_all(partial.parent().expect("a parent")).expect("made");
    fs::write(&partial, &tar[..1_000_000]).expect("written");
    let mut taker = Daemon::start_in(dir.path(), taking(config(), Vec::new(), Prefer::Build)).await;
    let pull = proto::PullBlobRequest { remote: "registry".into(), blob_digest: blob_digest.clone() };
    let pulled = taker.shares.pull_blob(pull.clone()).await.expect("pulled").into_inner();
    assert_eq!((pulled.pulled, pulled.size_bytes), (true, tar.len() as u64));
    assert!(!taker.shares.pull_blob(pull.clone()).await.expect("here").into_inner().pulled);
    assert!(server.log().lines().any(|line| line.contains("\"GET /v2/") && line.contains("\" 206 ")), "the rest alone was asked for");
    let image = taker.image_of(&blob_digest, "{}").await;
    taker.render("a", spec(&image, "web1")).await;
    taker.stop().await;
    // What arrived before is something else: it is begun anew. What is there is something else: it is refused.
    let dir = tempfile::tempdir().expect("a directory");
    let partial = dir.path().join("state/tmp").join(format!("partial-blob-{}", &blob_digest[7..]));
    fs::create_dir_all(partial.parent().expect("a parent")).expect("made");
    fs::write(&partial, vec![7; 1_000_000]).expect("written");
    let mut taker = Daemon::start_in(dir.path(), taking(config(), Vec::new(), Prefer::Build)).await;
    flip(&registry_blob(&server, &blob_digest));
    let wrong = taker.shares.pull_blob(pull.clone()).await.expect_err("another");
    assert_eq!((wrong.code(), reason(&wrong).as_str()), (Code::DataLoss, "DIGEST_MISMATCH"), "{wrong:?}");
    flip(&registry_blob(&server, &blob_digest));
    fs::write(&partial, vec![7; 1_000_000]).expect("written");
    assert!(taker.shares.pull_blob(pull).await.expect("pulled").into_inner().pulled);
    let none = proto::PullBlobRequest { remote: "registry".into(), blob_digest: Digest::of(b"none").to_string() };
    assert_eq!(taker.shares.pull_blob(none).await.expect_err("not there").code(), Code::NotFound);
    taker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_sends_nobody_where_the_policy_does_not_and_no_secret_anywhere_else() {
    let (tar, server) = (tarball(), registry());
    let mut builder = builder(&tar, vec![registry_config(&server, "right")], Vec::new()).await;
    let built = golden_of(&mut builder).await;
    push(&mut builder, "registry").await;
    // What stands behind: it wants to know nobody, and remembers who told it anyway.
    let told = Arc::new(Mutex::new(Vec::new()));
    let (noted, real) = (Arc::clone(&told), server.address);
    let behind = stub(move |path, who| {
        noted.lock().expect("no panic").push(who);
        async move {
            let request = kit::client().get(format!("http://{real}{path}")).basic_auth("user", Some("right"));
            Reply("200 OK", Vec::new(), request.send().await.expect("an answer").bytes().await.expect("a body").to_vec())
        }
    })
    .await;
    // A token server that takes the right password.
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&asked);
    let tokens = stub(move |path, who| {
        let is_right = who.as_deref() == Some("Basic dXNlcjpyaWdodA==");
        noted.lock().expect("no panic").push((path, who));
        async move {
            if is_right { Reply("200 OK", Vec::new(), b"{\"token\":\"sesame\"}".to_vec()) } else { Reply("401 Unauthorized", Vec::new(), Vec::new()) }
        }
    })
    .await;
    // In front: a registry that wants tokens of the token server, and has its blobs elsewhere.
    let front = stub(move |path, who| async move {
        if who.as_deref() != Some("Bearer sesame") {
            let challenge = format!("Bearer realm=\"http://{tokens}/token\",service=\"front\"");
            return Reply("401 Unauthorized", vec![("WWW-Authenticate", challenge)], Vec::new());
        }
        if path.contains("/blobs/") {
            return Reply("307 Temporary Redirect", vec![("Location", format!("http://{behind}{path}"))], Vec::new());
        }
        let request = kit::client().get(format!("http://{real}{path}")).basic_auth("user", Some("right"));
        let request = request.header("accept", "application/vnd.oci.image.manifest.v1+json");
        Reply("200 OK", Vec::new(), request.send().await.expect("an answer").bytes().await.expect("a body").to_vec())
    })
    .await;
    let config =
        |token_server: Option<String>| vec![remote::Registry { url: format!("http://{front}"), token_server, ..registry_config(&server, "right") }];
    // Nobody said that the password may go to the token server.
    let mut taker = self::taker(config(None), Vec::new(), Prefer::Build).await;
    image_named(&mut taker, &tar).await;
    let refused = pull(&mut taker, "registry", &built.key).await.expect_err("another host");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "REMOTE_AUTH"), "{refused:?}");
    assert!(refused.message().contains("token_server") && asked.lock().expect("no panic").is_empty(), "{refused:?}");
    taker.stop().await;
    // The redirect leads to a private address.
    let token_server = Some(format!("http://{tokens}"));
    let mut taker = self::taker(config(token_server.clone()), Vec::new(), Prefer::Build).await;
    image_named(&mut taker, &tar).await;
    let refused = pull(&mut taker, "registry", &built.key).await.expect_err("a private address");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "URL_NOT_ALLOWED"), "{refused:?}");
    assert!(told.lock().expect("no panic").is_empty());
    taker.stop().await;
    // The policy allows it: the bytes come, and the storage is not told who asks.
    let mut taker = Daemon::start_with(|config_of| {
        taking(config(token_server), Vec::new(), Prefer::Build)(config_of);
        config_of.fetch.allow_private_addresses = true;
    })
    .await;
    image_named(&mut taker, &tar).await;
    assert!(pull(&mut taker, "registry", &built.key).await.expect("pulled").pulled);
    assert!(told.lock().expect("no panic").len() > 8 && told.lock().expect("no panic").iter().all(Option::is_none));
    let asked = asked.lock().expect("no panic").clone();
    assert!(asked.iter().all(|(path, _)| path == "/token?scope=repository%3Acloudlets%2Fimages%3Apull&service=front"), "{asked:?}");
    taker.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn goldens_and_tarballs_go_through_a_bucket_with_signed_requests() {
    let tar = tarball();
    let (server, bucket) = s3(true).await;
    let config = || vec![bucket.clone()];
    let mut builder = builder(&tar, Vec::new(), config()).await;
    let built = golden_of(&mut builder).await;
    let pushed = push(&mut builder, "bucket").await;
    assert_eq!(pushed.reference, format!("s3://images/cloud/lets/goldens/{}.json", built.key));
    assert!(pushed.sent_chunks > 8, "{pushed:?}");
    assert_eq!(push(&mut builder, "bucket").await.sent_chunks, 0);
    // A tarball of several parts.
    let blob_digest = Digest::of(&tar).to_string();
    let push_blob = proto::PushBlobRequest { remote: "bucket".into(), blob_digest: blob_digest.clone() };
    assert_eq!(builder.shares.push_blob(push_blob.clone()).await.expect("pushed").into_inner().sent_bytes, tar.len() as u64);
    assert_eq!(builder.shares.push_blob(push_blob).await.expect("there").into_inner().sent_bytes, 0);
    // Amazon's own client sees what it should.
    let script = "import boto3,configparser,hashlib,sys\nc=configparser.ConfigParser();c.read(sys.argv[2]);d=c['default']\n\
        s=boto3.client('s3',endpoint_url=sys.argv[1],region_name='us-east-1',aws_access_key_id=d['aws_access_key_id'],aws_secret_access_key=d['aws_secret_access_key'])\n\
        keys=[o['Key'] for p in s.get_paginator('list_objects_v2').paginate(Bucket='images') for o in p['Contents']]\n\
        for k in keys:\n  n=k.split('/')[-1]\n  if '/rootfs/' in k: assert hashlib.sha256(s.get_object(Bucket='images',Key=k)['Body'].read()).hexdigest()==n\n\
        print(sum('/chunks/' in k for k in keys),sum('/rootfs/' in k for k in keys),sum('/goldens/' in k for k in keys),len(keys))";
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/moto/bin/python");
    let credentials = server.dir.path().join("credentials").display().to_string();
    let seen = judge(python.to_str().expect("text"), &["-c", script, &format!("http://{}", server.address), &credentials]);
    let chunks = pushed.sent_chunks;
    assert_eq!(seen.trim(), format!("{chunks} 1 1 {}", chunks + 2));

    let mut called = taker(Vec::new(), config(), Prefer::Build).await;
    let image = image_named(&mut called, &tar).await;
    assert!(pull(&mut called, "bucket", &built.key).await.expect("pulled").pulled);
    called.render("a", spec(&image, "web1")).await;
    assert_eq!((golden_of(&mut called).await.digest, blobs_of(&called)), (built.digest.clone(), 0));
    same_volumes([&builder, &called]);
    called.stop().await;
    let mut own = taker(Vec::new(), config(), Prefer::Pull).await;
    let image = image_named(&mut own, &tar).await;
    own.render("a", spec(&image, "web1")).await;
    assert_eq!((golden_of(&mut own).await.digest, blobs_of(&own)), (built.digest.clone(), 0));
    own.stop().await;

    // The rest of a tarball of which a part has arrived.
    let dir = tempfile::tempdir().expect("a directory");
    let partial = dir.path().join("state/tmp").join(format!("partial-blob-{}", &blob_digest[7..]));
    fs::create_dir_all(partial.parent().expect("a parent")).expect("made");
    fs::write(&partial, &tar[..20_000_000]).expect("written");
    let mut rest = Daemon::start_in(dir.path(), taking(Vec::new(), config(), Prefer::Build)).await;
    let pull_blob = proto::PullBlobRequest { remote: "bucket".into(), blob_digest };
    assert_eq!(rest.shares.pull_blob(pull_blob).await.expect("pulled").into_inner().size_bytes, tar.len() as u64);
    assert!(
        server.log().lines().any(|line| line.contains("GET /images/cloud/lets/rootfs/") && line.contains(" 206 ")),
        "the rest alone was asked for"
    );
    // Another secret: refused, not told, and read again for the next call.
    let right = fs::read_to_string(&credentials).expect("there");
    let wrong =
        right.lines().map(|line| if line.contains("secret") { "aws_secret_access_key = wrong-secret" } else { line }).collect::<Vec<_>>().join("\n");
    fs::write(&credentials, wrong).expect("written");
    image_named(&mut rest, &tar).await;
    let refused = pull(&mut rest, "bucket", &built.key).await.expect_err("a wrong secret");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "REMOTE_AUTH"), "{refused:?}");
    assert!(!format!("{refused:?}").contains("wrong-secret"));
    fs::write(&credentials, right).expect("written");
    assert!(pull(&mut rest, "bucket", &built.key).await.expect("pulled").pulled);
    rest.stop().await;
    builder.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_lacks_or_spoils_a_chunk_gives_nothing_wrong_and_is_gone_on_with() {
    let tar = tarball();
    let (server, bucket) = s3(false).await;
    let config = || vec![bucket.clone()];
    let mut builder = builder(&tar, Vec::new(), config()).await;
    let built = golden_of(&mut builder).await;
    let mut taker = taker(Vec::new(), config(), Prefer::Build).await;
    image_named(&mut taker, &tar).await;
    let missing = pull(&mut taker, "bucket", &built.key).await.expect_err("not there");
    assert_eq!((missing.code(), reason(&missing).as_str()), (Code::NotFound, "REMOTE_NOT_FOUND"), "{missing:?}");
    push(&mut builder, "bucket").await;
    let (client, root) = (kit::client(), format!("http://{}/images/cloud/lets", server.address));
    let get = |path: String| {
        let request = client.get(format!("{root}/{path}")).header("authorization", CLAIM);
        async move { request.send().await.expect("an answer").error_for_status().expect("there").bytes().await.expect("a body").to_vec() }
    };
    let put = |path: String, bytes: Vec<u8>| {
        let request = client.put(format!("{root}/{path}")).header("authorization", CLAIM).body(bytes);
        async move { request.send().await.expect("an answer").error_for_status().expect("put") }
    };
    let manifest: serde_json::Value = serde_json::from_slice(&get(format!("goldens/{}.json", built.key)).await).expect("JSON");
    let chunks = manifest["chunks"].as_array().expect("chunks").clone();
    let name = |index: usize| format!("chunks/{}.zst", chunks[index]["blake3"].as_str().expect("text"));
    let (middle, other) = (name(chunks.len() / 2), name(0));
    let right = get(middle.clone()).await;
    client.delete(format!("{root}/{middle}")).header("authorization", CLAIM).send().await.expect("an answer").error_for_status().expect("gone");
    let gone = pull(&mut taker, "bucket", &built.key).await.expect_err("a chunk is missing");
    assert_eq!((gone.code(), reason(&gone).as_str()), (Code::Unavailable, "GOLDEN_PEERS"), "{gone:?}");
    // Another chunk in its place: whole, and not the one.
    put(middle.clone(), get(other).await).await;
    let wrong = pull(&mut taker, "bucket", &built.key).await.expect_err("another chunk");
    assert_eq!((wrong.code(), reason(&wrong).as_str()), (Code::DataLoss, "GOLDEN_PEERS"), "{wrong:?}");
    put(middle, right).await;
    assert!(pull(&mut taker, "bucket", &built.key).await.expect("pulled").pulled);
    assert_eq!(golden_of(&mut taker).await.digest, built.digest);
    let log = server.log();
    let given: Vec<&str> = log.lines().filter(|line| line.contains("GET ") && line.contains("/chunks/") && line.contains(" 200 ")).collect();
    // Each once, but for what this test got and put, and the one that was wrong.
    assert!(given.len() <= chunks.len() + 4, "{} for {} chunks", given.len(), chunks.len());
    taker.stop().await;
    builder.stop().await;
}

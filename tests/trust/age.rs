//! Encrypted tarballs, made by Debian's age: opened for the build and by nothing else, refused by name when they can't be.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use crate::common::server::{self, Daemon, judge, tarball};
use cloudletd::{
    config::worker::{Confine, Worker},
    config::{
        Config,
        trust::{Require, Trust},
    },
    names::Digest,
    proto,
    trust::{minisign::Keys, openpgp::Keyring},
    worker::{Launcher, Signed, Vouching},
};

use crate::kit::{Gpg, Minisign, encrypt, identity};

async fn outcome(daemon: &mut Daemon, path: &Path, name: &str, media_type: Option<&str>) -> Result<(), (String, String)> {
    let bytes = fs::read(path).expect("there");
    // The digest is that of the file as it is fetched: encrypted.
    let mut rootfs = serde_json::json!({"url": format!("file://{}", path.display()), "digest": Digest::of(&bytes).to_string(), "size": bytes.len()});
    if let Some(media_type) = media_type {
        rootfs["media_type"] = media_type.into();
    }
    let manifest = serde_json::json!({"name": name, "entry_points": {"init": {}}, "rootfs": rootfs}).to_string();
    let request = proto::CreateImageRequest { manifest_json: manifest, ..Default::default() };
    let image = daemon.images.create_image(request).await.expect("catalogued").into_inner().image.expect("an image").id;
    let started = daemon.start_render(name, server::spec(&image, name, proto::VolumeFormat::Raw)).await.expect("accepted");
    let render = daemon.wait(&started.render.expect("a render").id).await;
    match render.error {
        None => Ok(()),
        Some(error) => Err((error.reason, error.message)),
    }
}

fn with_age(config: &mut Config, dir: &Path, identities: &[&Path], confine: Confine) {
    config.fetch.file_roots.push(dir.to_path_buf());
    config.age.identities = identities.iter().map(|path| path.to_path_buf()).collect();
    config.worker.confine = confine;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_age_encrypts_becomes_the_same_tree() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = fs::canonicalize(dir.path()).expect("there");
    let (key, recipient) = identity(&dir, "key");
    let (other, other_recipient) = identity(&dir, "other");
    let plain = dir.join("small.tar");
    fs::write(&plain, tarball()).expect("written");
    for (confine, keys) in [(Confine::Required, [key.as_path(), other.as_path()]), (Confine::Off, [other.as_path(), key.as_path()])] {
        let mut daemon = Daemon::start_with(|config| with_age(config, &dir, &keys, confine)).await;
        outcome(&mut daemon, &plain, "plain", None).await.expect("plain tarballs as ever");
        for (compressor, end, media_type) in [("", "tar", None), ("gzip", "gz", Some("application/gzip")), ("xz", "xz", None), ("zstd", "zst", None)]
        {
            let path = match compressor {
                "" => dir.join("copy.tar"),
                _ => dir.join(format!("copy.tar.{end}")),
            };
            fs::copy(&plain, dir.join("copy.tar")).expect("copied");
            if !compressor.is_empty() {
                judge(compressor, &["-k", "-f", dir.join("copy.tar").to_str().expect("text")]);
            }
            let both = ["-r", &recipient, "-r", &other_recipient];
            let encrypted = encrypt(&path, if end == "xz" { &both } else { &both[..2] });
            outcome(&mut daemon, &encrypted, &format!("of-{end}"), media_type).await.unwrap_or_else(|(reason, why)| panic!("{end}: {reason}: {why}"));
            let volume = |name: &str| daemon.dir.join(format!("pool/{name}.raw")).display().to_string();
            server::judge("e2fsck", &["-fn", &volume(&format!("of-{end}"))]);
            for name in ["/etc/passwd", "/etc/os-release", "/etc/init.d/networking"] {
                let content = server::cat(&volume(&format!("of-{end}")), name);
                assert!(!content.is_empty() && content == server::cat(&volume("plain"), name), "{name}");
            }
        }
        daemon.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_opened_is_refused_by_name_and_leaves_no_golden_image() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = fs::canonicalize(dir.path()).expect("there");
    let (key, recipient) = identity(&dir, "key");
    let (other, _) = identity(&dir, "other");
    let plain = dir.join("small.tar");
    fs::write(&plain, tarball()).expect("written");
    let good = encrypt(&plain, &["-r", &recipient]);
    let bytes = fs::read(&good).expect("there");
    let written = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, bytes).expect("written");
        path
    };
    let mut flipped = bytes.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let squashed = dir.join("squashed.tar");
    judge("mksquashfs", &[dir.join("small.tar").to_str().expect("text"), squashed.to_str().expect("text"), "-quiet", "-no-progress"]);
    let cases = [
        ("squashfs", encrypt(&squashed, &["-r", &recipient]), "ENCRYPTED_SQUASHFS"),
        ("cut-in-a-chunk", written("a.age", &bytes[..bytes.len() - 100_000]), "AGE_CORRUPT"),
        // The header is of one recipient: as long as the file is more than its chunks.
        ("cut-between-chunks", written("b.age", &bytes[..bytes.len() - (bytes.len() - header_len(&bytes)) % 65552]), "AGE_CORRUPT"),
        ("changed", written("c.age", &flipped), "AGE_CORRUPT"),
        ("longer", written("d.age", &[&bytes[..], &bytes[..]].concat()), "AGE_CORRUPT"),
        ("header-only", written("e.age", &bytes[..header_len(&bytes)]), "AGE_CORRUPT"),
        ("half-a-header", written("f.age", &bytes[..60]), "AGE_CORRUPT"),
        ("armored", encrypt(&written("armored.tar", &tarball()), &["-a", "-r", &recipient]), "AGE_UNSUPPORTED"),
        ("no-tar", encrypt(&written("notes.tar", b"no tarball at all"), &["-r", &recipient]), "ROOTFS_FORMAT_UNKNOWN"),
        ("twice", encrypt(&written("twice.tar", &bytes), &["-r", &recipient]), "ROOTFS_FORMAT_UNKNOWN"),
    ];
    let mut daemon = Daemon::start_with(|config| with_age(config, &dir, &[&key], Confine::Required)).await;
    for (name, path, expected) in &cases {
        let (reason, why) = outcome(&mut daemon, path, name, None).await.expect_err(name);
        assert_eq!(&reason, expected, "{name}: {why}");
        assert!(!why.contains("AGE-SECRET"), "{why}");
    }
    let goldens = daemon.renders.list_goldens(proto::ListGoldensRequest::default()).await.expect("listed").into_inner().goldens;
    assert!(goldens.is_empty(), "{goldens:?}");
    outcome(&mut daemon, &good, "good", None).await.expect("the one they were made of");
    daemon.stop().await;
    for (keys, expected) in [(&[other.as_path()][..], "AGE_KEY_UNKNOWN"), (&[], "AGE_NO_IDENTITY")] {
        let mut daemon = Daemon::start_with(|config| with_age(config, &dir, keys, Confine::Required)).await;
        let (reason, why) = outcome(&mut daemon, &good, "good", None).await.expect_err(expected);
        assert_eq!(reason, expected, "{why}");
        daemon.stop().await;
    }
}

/// Length of the header and nonce of an age file.
fn header_len(bytes: &[u8]) -> usize {
    let mac = bytes.windows(5).position(|window| window == b"\n--- ").expect("a header ends in its MAC");
    mac + 1 + bytes[mac + 1..].iter().position(|byte| *byte == b'\n').expect("a line") + 1 + 16
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_tarball_is_signed_as_it_is_fetched() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = fs::canonicalize(dir.path()).expect("there");
    let minisign = Minisign::new();
    let (key, recipient) = identity(&dir, "key");
    let plain = dir.join("small.tar");
    fs::write(&plain, tarball()).expect("written");
    let good = encrypt(&plain, &["-r", &recipient]);
    let rule = Trust { prefix: "*".into(), require: Require::Signature, openpgp: Vec::new(), minisign: vec![minisign.public_key()], suffix: None };
    let mut daemon = Daemon::start_with(|config| {
        with_age(config, &dir, &[&key], Confine::Required);
        config.trust = vec![rule];
    })
    .await;
    minisign.sign(&plain, &[]);
    fs::rename(dir.join("small.tar.minisig"), dir.join("small.age.minisig")).expect("renamed");
    let (reason, _) = outcome(&mut daemon, &good, "inner", None).await.expect_err("signed is what is inside");
    assert_eq!(reason, "SIGNATURE_INVALID");
    minisign.sign(&good, &[]);
    outcome(&mut daemon, &good, "outer", None).await.expect("signed is what is fetched");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_does_not_start_with_identities_that_others_can_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let (key, _) = identity(dir.path(), "key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("chmod");
    let config = dir.path().join("cloudletd.toml");
    let text = format!("state_dir = {:?}\n[listen]\nunix = {:?}\n[age]\nidentities = [{key:?}]\n", dir.path().join("state"), dir.path().join("sock"));
    fs::write(&config, text).expect("written");
    let output = Command::new(env!("CARGO_BIN_EXE_cloudletd")).args(["serve", "--config"]).arg(&config).output().expect("run cloudletd");
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && said.contains("0644"), "{said}");
    assert!(!said.contains("AGE-SECRET"), "{said}");
}

#[test]
fn a_process_that_reads_a_signature_and_misbehaves_is_killed_and_nothing_is_believed() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let (gpg, minisign, dir) = (Gpg::new(), Minisign::new(), tempfile::tempdir().expect("a directory"));
    gpg.make_key("key", "ed25519", "sign", "0");
    let ring = Keyring::parse(&gpg.export(&["key"]), "ring").expect("a keyring");
    let keys = Keys::parse(&fs::read_to_string(minisign.public_key()).expect("there"), "keys").expect("a key");
    let path = dir.path().join("file");
    fs::write(&path, vec![7; 3_000_000]).expect("written");
    let file = fs::File::open(&path).expect("there");
    let openpgp = gpg.sign("key", &fs::read(&path).expect("there"), &["--armor"]);
    let mini = minisign.sign(&path, &[]);
    let launcher = || Launcher::new(&Worker::default()).with_program(env!("CARGO_BIN_EXE_cloudletd"));
    let inside = Launcher::new(&Worker { confine: Confine::Off, ..Worker::default() });
    for (keys, signature) in [(Vouching::Openpgp(&ring), &openpgp), (Vouching::Minisign(&keys), &mini)] {
        let confined = launcher().verify(keys, signature, Signed::File(&file), "file").unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(confined, inside.verify(keys, signature, Signed::File(&file), "file").expect("good"));
        let error = launcher().verify(keys, signature, Signed::Bytes(b"other"), "file").expect_err("of other bytes");
        assert_eq!(error.reason(), "SIGNATURE_INVALID");
        for call in ["open", "socket", "execve", "fork"] {
            let error = launcher().with_misdeed(call).verify(keys, signature, Signed::File(&file), "file").expect_err(call);
            assert_eq!(error.reason(), "WORKER_DIED", "{call}");
            assert!(error.message().contains("SIGSYS"), "{call}: {}", error.chain());
        }
    }
}

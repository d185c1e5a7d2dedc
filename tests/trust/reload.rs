//! Key files are read again on SIGHUP, all or none.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use cloudletd::{
    config::trust::{Require, Trust},
    names::Digest,
    proto,
};
use nix::sys::signal::{Signal, kill};
use tonic_types::StatusExt as _;

use crate::{
    common::server::{self, Daemon, messages, tarball},
    kit::{Minisign, encrypt, identity},
};

/// Uploads the file with the signature; the reason where it is refused.
async fn upload(daemon: &mut Daemon, path: &Path, signature: &[u8]) -> Result<String, String> {
    let bytes = fs::read(path).expect("there");
    let digest = Digest::of(&bytes).to_string();
    let header = proto::UploadHeader { digest: digest.clone(), size_bytes: bytes.len() as u64, signature: signature.to_vec() };
    let answer = daemon.images.upload_rootfs(tokio_stream::iter(messages(Some(header), &bytes))).await;
    answer.map(|_| digest).map_err(|status| status.get_details_error_info().expect("always there").reason)
}

async fn render(daemon: &mut Daemon, image: &str, name: &str) -> Result<(), String> {
    let started = daemon.start_render(name, server::spec(image, name, proto::VolumeFormat::Raw)).await;
    let id = started.map_err(|status| status.get_details_error_info().expect("always there").reason)?.render.expect("a render").id;
    daemon.wait(&id).await.error.map_or(Ok(()), |error| Err(error.reason))
}

/// Asks for the files to be read again, and waits until what was read is told to be as `is_done` says.
async fn reload(daemon: &mut Daemon, is_done: impl Fn(&proto::KeyStatus) -> bool) -> proto::KeyStatus {
    // Times are told in seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    kill(nix::unistd::getpid(), Signal::SIGHUP).expect("sent");
    let begun = Instant::now();
    loop {
        let keys = daemon.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered").into_inner().keys.expect("keys are configured");
        if is_done(&keys) {
            return keys;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "not loaded again: {keys:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trusted_keys_and_identities_are_read_again_on_a_hangup_signal_and_stay_where_a_file_is_wrong() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = fs::canonicalize(dir.path()).expect("there");
    let (former, new) = (Minisign::new(), Minisign::new());
    let (trusted, host) = (dir.join("trusted.pub"), dir.join("host.age"));
    fs::copy(former.public_key(), &trusted).expect("copied");
    let ((first, _), (second, recipient)) = (identity(&dir, "first"), identity(&dir, "second"));
    fs::copy(&first, &host).expect("copied");
    let tar = dir.join("small.tar");
    fs::write(&tar, tarball()).expect("written");
    let encrypted = encrypt(&tar, &["-r", &recipient]);
    let mut daemon = Daemon::start_with(|config| {
        let rule =
            Trust { prefix: "upload:".into(), require: Require::Signature, openpgp: Vec::new(), minisign: vec![trusted.clone()], suffix: None };
        config.trust = vec![rule];
        config.age.identities = vec![host.clone()];
    })
    .await;
    let started = daemon.hosts.get_host_info(proto::GetHostInfoRequest {}).await.expect("answered").into_inner().keys.expect("there");
    assert!(started.reload_error.is_empty() && started.loaded_at.is_some(), "{started:?}");

    let (by_former, by_new) = (former.sign(&tar, &[]), new.sign(&tar, &[]));
    assert_eq!(upload(&mut daemon, &tar, &by_new).await, Err("SIGNATURE_KEY_UNKNOWN".to_owned()));
    let plain = upload(&mut daemon, &tar, &by_former).await.expect("signed by the key that is trusted");
    let sealed = upload(&mut daemon, &encrypted, &former.sign(&encrypted, &[])).await.expect("signed");
    let (plain, sealed) = (daemon.image_of(&plain, "{}").await, daemon.image_of(&sealed, "{}").await);
    assert_eq!(render(&mut daemon, &plain, "web1").await, Ok(()));
    assert_eq!(render(&mut daemon, &sealed, "web2").await, Err("AGE_KEY_UNKNOWN".to_owned()));

    // One file is right and one is wrong: neither is taken.
    fs::copy(&second, &host).expect("replaced");
    fs::write(&trusted, "no key\n").expect("damaged");
    let keys = reload(&mut daemon, |keys| !keys.reload_error.is_empty()).await;
    assert!(keys.reload_error.contains(trusted.to_str().expect("text")) && keys.loaded_at == started.loaded_at, "{keys:?}");
    assert_eq!(render(&mut daemon, &plain, "web3").await, Ok(()));
    assert_eq!(render(&mut daemon, &sealed, "web4").await, Err("AGE_KEY_UNKNOWN".to_owned()));

    fs::copy(new.public_key(), &trusted).expect("replaced");
    let keys = reload(&mut daemon, |keys| keys.loaded_at != started.loaded_at).await;
    assert_eq!(keys.reload_error, "");
    assert_eq!(render(&mut daemon, &plain, "web5").await, Err("SIGNATURE_MISSING".to_owned()), "the former key's word is gone with it");
    assert_eq!(upload(&mut daemon, &tar, &by_former).await, Err("SIGNATURE_KEY_UNKNOWN".to_owned()));
    for path in [&tar, &encrypted] {
        upload(&mut daemon, path, &new.sign(path, &[])).await.expect("signed by the key that is trusted now");
    }
    assert_eq!(render(&mut daemon, &plain, "web6").await, Ok(()));
    assert_eq!(render(&mut daemon, &sealed, "web7").await, Ok(()));
    daemon.stop().await;
}

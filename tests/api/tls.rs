//! TCP: only clients with a certificate of the configured authority get an answer.

use cloudletd::{
    config::{TCP_WITHOUT_TLS_CONSENT, TlsVersion},
    proto::{GetHostInfoRequest, TlsStatus, host_service_client::HostServiceClient},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use tonic_types::StatusExt;

use crate::common::{
    pki::Authority,
    server::{Daemon, free_port},
};

async fn ask(endpoint: Endpoint) -> Result<(), String> {
    let channel: Channel = endpoint.connect().await.map_err(|error| format!("connect: {error:?}"))?;
    HostServiceClient::new(channel).get_host_info(GetHostInfoRequest {}).await.map(|_| ()).map_err(|status| format!("{:?}: {status}", status.code()))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_clients_of_the_configured_authority_are_answered() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (ours, other) = (Authority::new(), Authority::new());
    let mut address = None;
    let daemon = Daemon::start_in(dir.path(), |config| address = Some(ours.serve(config, dir.path()))).await;
    let address = address.expect("set");
    let endpoint = |identity| ours.endpoint(address, identity);
    ask(endpoint(Some(ours.issue("client")))).await.expect("a client of ours");
    ask(endpoint(Some(other.issue("client")))).await.expect_err("a client of another authority");
    ask(endpoint(None)).await.expect_err("a client without a certificate");
    let plain = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    ask(plain).await.expect_err("a client without TLS");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_without_tls_needs_the_sentence() {
    let address = free_port();
    let daemon = Daemon::start_with(|config| {
        config.listen.tcp = Some(address);
        config.listen.tcp_without_tls = Some(TCP_WITHOUT_TLS_CONSENT.to_owned());
    })
    .await;
    ask(Endpoint::from_shared(format!("http://{address}")).expect("an address")).await.expect("answered, as the configuration says");
    daemon.stop().await;
    let mut config = cloudletd::config::Config::default();
    config.listen.tcp = Some(address);
    config.listen.tcp_without_tls = Some("yes".to_owned());
    let error = config.checked().expect_err("yes is not the sentence");
    assert_eq!(error.violations()[0].field, "listen.tcp");
    assert_eq!(crate::common::server::code_of(&error), Code::InvalidArgument);
}

/// Calls until the answer is as wanted; a reload takes a second or two.
async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < std::time::Duration::from_secs(30), "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

async fn status(channel: &Channel) -> TlsStatus {
    let info = HostServiceClient::new(channel.clone()).get_host_info(GetHostInfoRequest {}).await.expect("answered");
    info.into_inner().tls.expect("the listener speaks TLS")
}

#[tokio::test(flavor = "multi_thread")]
async fn new_certificates_are_taken_without_a_restart_and_connections_go_on_as_long_as_their_authority_is_one() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (first, second) = (Authority::new(), Authority::new());
    let mut address = None;
    let daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(first.serve(config, dir.path()));
        config.listen.tls.as_mut().expect("set").reload_interval_secs = 1;
    })
    .await;
    let address = address.expect("set");
    let client_of_first = first.issue("client");
    let old = first.endpoint(address, Some(client_of_first.clone())).connect().await.expect("a client of the first authority");
    let before = status(&old).await;
    ask(second.endpoint(address, Some(second.issue("client")))).await.expect_err("the second authority is not known yet");

    // A new server certificate, and both authorities for a while.
    second.write(dir.path());
    std::fs::write(dir.path().join("ca.pem"), format!("{}{}", first.pem, second.pem)).expect("write");
    let client_of_second = second.issue("client");
    soon("the new certificates are in force", async || ask(second.endpoint(address, Some(client_of_second.clone()))).await.is_ok()).await;
    let after = status(&old).await;
    assert_ne!(before.certificate_sha256, after.certificate_sha256, "the old connection is answered, and says what is new");
    assert_eq!(after.reload_error, "");
    let new = second.endpoint(address, Some(client_of_second.clone())).connect().await.expect("a client of the second authority");
    std::fs::write(dir.path().join("ca.pem"), &second.pem).expect("write");
    soon("the first authority is known no longer", async || {
        HostServiceClient::new(old.clone()).get_host_info(GetHostInfoRequest {}).await.is_err_and(|status| status.code() == Code::Unauthenticated)
    })
    .await;
    ask(first.endpoint(address, Some(client_of_first))).await.expect_err("the first authority is known no longer");

    // What can't be used leaves what is there, and says so.
    for (file, text) in [("server.key", first.issue("localhost").1), ("server.pem", "nothing".to_owned()), ("ca.pem", String::new())] {
        let whole = std::fs::read(dir.path().join(file)).expect("read");
        std::fs::write(dir.path().join(file), text).expect("write");
        soon("the error is told", async || !status(&new).await.reload_error.is_empty()).await;
        assert!(status(&new).await.reload_error.contains(&*dir.path().to_string_lossy()), "{}", status(&new).await.reload_error);
        ask(second.endpoint(address, Some(client_of_second.clone()))).await.expect("the certificates before are in force");
        std::fs::write(dir.path().join(file), whole).expect("write");
        soon("the error is gone", async || status(&new).await.reload_error.is_empty()).await;
    }
    let (ended, key) = second.issue_with("localhost", |params| params.not_after = rcgen::date_time_ymd(2021, 1, 1));
    std::fs::write(dir.path().join("server.pem"), ended).expect("write");
    std::fs::write(dir.path().join("server.key"), key).expect("write");
    soon("a certificate that has ended is not taken", async || status(&new).await.reload_error.contains("is valid from")).await;
    ask(second.endpoint(address, Some(client_of_second))).await.expect("the certificates before are in force");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_read_again_on_a_hangup_signal() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let authority = Authority::new();
    let mut address = None;
    let daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        config.listen.tls.as_mut().expect("set").reload_interval_secs = 0;
    })
    .await;
    let channel = authority.endpoint(address.expect("set"), Some(authority.issue("client"))).connect().await.expect("a client of ours");
    let before = status(&channel).await;
    authority.write(dir.path());
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(status(&channel).await, before, "nobody looks at the files");
    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGHUP).expect("sent");
    soon("the signal is heeded", async || status(&channel).await.certificate_sha256 != before.certificate_sha256).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_early_and_revoked_client_certificates_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let authority = Authority::new();
    let path = dir.path().join("crl.pem");
    std::fs::write(&path, authority.revoking(&[], 2100)).expect("write");
    let mut address = None;
    let daemon = Daemon::start_in(dir.path(), |config| {
        address = Some(authority.serve(config, dir.path()));
        let tls = config.listen.tls.as_mut().expect("set");
        (tls.client_crl, tls.reload_interval_secs) = (Some(path.clone()), 1);
    })
    .await;
    let address = address.expect("set");
    let client = |serial: u64| authority.issue_with("client", |params| params.serial_number = Some(serial.into()));
    let (good, bad) = (client(1), client(2));
    let of = |identity: &(String, String)| ask(authority.endpoint(address, Some(identity.clone())));
    of(&good).await.expect("nobody is revoked");
    of(&bad).await.expect("nobody is revoked");
    let ended = authority.issue_with("client", |params| params.not_after = rcgen::date_time_ymd(2021, 1, 1));
    of(&ended).await.expect_err("a certificate that has ended");
    let early = authority.issue_with("client", |params| params.not_before = rcgen::date_time_ymd(2100, 1, 1));
    of(&early).await.expect_err("a certificate whose time has not come");
    let for_servers = authority.issue_with("client", |params| params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth]);
    of(&for_servers).await.expect_err("a certificate for servers only");

    // Connections that are open when the list changes.
    let open = async |identity: &(String, String)| {
        let channel = authority.endpoint(address, Some(identity.clone())).connect().await.expect("nobody is revoked");
        HostServiceClient::new(channel)
    };
    let (mut open_good, mut open_bad) = (open(&good).await, open(&bad).await);
    for client in [&mut open_good, &mut open_bad] {
        client.get_host_info(GetHostInfoRequest {}).await.expect("nobody is revoked");
    }
    std::fs::write(&path, authority.revoking(&[2], 2100)).expect("write");
    soon("the revoked client is refused", async || of(&bad).await.is_err()).await;
    let refused = open_bad.get_host_info(GetHostInfoRequest {}).await.expect_err("revoked while connected");
    assert_eq!(
        (refused.code(), refused.get_error_details().error_info().expect("why").reason.as_str()),
        (Code::Unauthenticated, "CERTIFICATE_REVOKED")
    );
    open_good.get_host_info(GetHostInfoRequest {}).await.expect("the other is not");
    of(&good).await.expect("the other is not");
    std::fs::write(&path, authority.revoking(&[], 2025)).expect("write");
    soon("a list whose time is over vouches for nobody", async || of(&good).await.is_err()).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_below_the_least_are_not_spoken() {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
    let authority = Authority::new();
    let shake_hands = async |address, version: &'static rustls::SupportedProtocolVersion| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).expect("PEM")).expect("an authority");
        let (certificate, key) = authority.issue("client");
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM"))
            .expect("a key that fits");
        let stream = tokio::net::TcpStream::connect(address).await.expect("connected");
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        connector.connect(ServerName::try_from("localhost").expect("a name"), stream).await.map(drop)
    };
    for (least, with_1_2) in [(TlsVersion::V1_2, true), (TlsVersion::V1_3, false)] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut address = None;
        let daemon = Daemon::start_in(dir.path(), |config| {
            address = Some(authority.serve(config, dir.path()));
            config.listen.tls.as_mut().expect("set").min_version = least;
        })
        .await;
        let address = address.expect("set");
        assert_eq!(shake_hands(address, &rustls::version::TLS12).await.is_ok(), with_1_2, "{least:?}");
        shake_hands(address, &rustls::version::TLS13).await.expect("1.3 is always spoken");
        daemon.stop().await;
    }
}

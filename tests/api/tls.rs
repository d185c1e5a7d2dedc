//! TCP: only clients with a certificate of the configured authority get an answer.

use cloudletd::{
    config::TCP_WITHOUT_TLS_CONSENT,
    proto::{GetHostInfoRequest, host_service_client::HostServiceClient},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::{
    pki::{Authority, free_port},
    support::Daemon,
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
    assert_eq!(crate::support::code_of(&error), Code::InvalidArgument);
}

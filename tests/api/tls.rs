//! TCP: only clients with a certificate of the configured authority get an answer.

use cloudletd::{
    config::{TCP_WITHOUT_TLS_CONSENT, Tls},
    proto::{GetHostInfoRequest, host_service_client::HostServiceClient},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tonic::{
    Code,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::support::Daemon;

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key, PEM.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        (params.signed_by(&key, &self.issuer).expect("a certificate").pem(), key.serialize_pem())
    }
}

/// A port that was free a moment ago.
fn free_port() -> std::net::SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("an address")
}

async fn ask(endpoint: Endpoint) -> Result<(), String> {
    let channel: Channel = endpoint.connect().await.map_err(|error| format!("connect: {error:?}"))?;
    HostServiceClient::new(channel).get_host_info(GetHostInfoRequest {}).await.map(|_| ()).map_err(|status| format!("{:?}: {status}", status.code()))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_clients_of_the_configured_authority_are_answered() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (ours, other) = (Authority::new(), Authority::new());
    let (certificate, key) = ours.issue("localhost");
    for (name, text) in [("server.pem", &certificate), ("server.key", &key), ("ca.pem", &ours.pem)] {
        std::fs::write(dir.path().join(name), text).expect("write");
    }
    let address = free_port();
    let daemon = Daemon::start_in(dir.path(), |config| {
        config.listen.tcp = Some(address);
        config.listen.tls =
            Some(Tls { certificate: dir.path().join("server.pem"), key: dir.path().join("server.key"), client_ca: dir.path().join("ca.pem") });
    })
    .await;
    let endpoint = |identity: Option<(String, String)>| {
        let mut tls = ClientTlsConfig::new().domain_name("localhost").ca_certificate(Certificate::from_pem(&ours.pem));
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        Endpoint::from_shared(format!("https://{address}")).expect("an address").tls_config(tls).expect("valid")
    };
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

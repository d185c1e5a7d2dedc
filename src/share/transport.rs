//! Connections of other hosts: bounded in number, by address or certificate, and in how long they may do nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use crate::{
    config::Tls,
    error::{Error, Kind, Result, Stage},
    source::Network,
};

/// For a handshake, and for the head of a request; a connection that asks for nothing is closed after it too.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long bytes may wait for a client to take them (tcp(7), TCP_USER_TIMEOUT).
const UNSENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an answer that is being sent may take once the daemon stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after the system refused a connection (too many files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Who may connect, and how.
pub(super) struct Door {
    /// Empty: every address.
    pub allow: Vec<Network>,
    /// None: plain HTTP.
    pub tls: Option<TlsAcceptor>,
    /// Connections at the same time.
    pub connections_max: usize,
}

impl Door {
    fn admits(&self, from: &SocketAddr) -> bool {
        let address = from.ip().to_canonical();
        self.allow.is_empty() || self.allow.iter().any(|network| network.contains(address))
    }
}

/// Serves `router` until `stop` is ready.
pub(super) async fn serve(listener: TcpListener, door: Door, router: Router, stop: impl Future<Output = ()> + Send) {
    let connections = Arc::new(Semaphore::new(door.connections_max));
    let (stopping, _) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tokio::pin!(stop);
    loop {
        // The permit comes first: those for whom there is none wait in the backlog of the socket.
        let next = async {
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = &mut stop => break,
            next = next => next,
        };
        while tasks.try_join_next().is_some() {}
        let Ok(permit) = permit else { break };
        match accepted {
            Ok((stream, from)) if door.admits(&from) => {
                tasks.spawn(connection(stream, door.tls.clone(), router.clone(), permit, stopping.subscribe()));
            }
            Ok((_, from)) => tracing::debug!(%from, "an address that may not read from this host"),
            Err(error) => {
                tracing::warn!(%error, "accept a connection of another host");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    stopping.send_replace(true);
    while tasks.join_next().await.is_some() {}
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router, permit: OwnedSemaphorePermit, stopping: watch::Receiver<bool>) {
    let _permit = permit;
    // Without it such a client only lasts longer.
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(UNSENT_TIMEOUT));
    let Some(tls) = tls else { return converse(stream, router, stopping).await };
    match tokio::time::timeout(REQUEST_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => converse(stream, router, stopping).await,
        Ok(Err(error)) => tracing::debug!(%error, "a host without a certificate of ours"),
        Err(_) => tracing::debug!("a TLS handshake that does not end"),
    }
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, mut stopping: watch::Receiver<bool>) {
    let service =
        hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| router.clone().oneshot(request.map(axum::body::Body::new)));
    let conversation = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(conversation);
    let ended = tokio::select! {
        ended = conversation.as_mut() => ended,
        () = stopped(&mut stopping) => {
            conversation.as_mut().graceful_shutdown();
            tokio::time::timeout(DRAIN_TIMEOUT, conversation).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection of another host broke");
    }
}

/// Keeps nothing of the watch: what it lends may not stay with a task.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Mutual TLS with the certificates of `listen.tls`. Blocking. `Kind::InvalidRequest` when they do not fit.
pub(super) fn acceptor(tls: &Tls) -> Result<TlsAcceptor> {
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(Kind::InvalidRequest, Stage::Config, "listen.tls", "the certificates do not fit").with_source(error)
    };
    let chain = |path| -> Result<Vec<CertificateDer<'static>>> {
        let certificates = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.into()))?;
        certificates.collect::<Result<_, _>>().map_err(|error| wrong(error.into()))
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut authorities = RootCertStore::empty();
    for authority in chain(&tls.client_ca)? {
        authorities.add(authority).map_err(|error| wrong(error.into()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), Arc::clone(&provider));
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| wrong(error.into()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.into()))?
        .with_client_cert_verifier(verifier.build().map_err(|error| wrong(error.into()))?)
        .with_single_cert(chain(&tls.certificate)?, key)
        .map_err(|error| wrong(error.into()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

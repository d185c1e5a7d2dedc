//! Read-only HTTP for other hosts (`crate::share`, `crate::streams`): connections bounded in number, by address or certificate, and in how long they may do
//! nothing; and ranges of bytes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};
use tower::ServiceExt;

use super::tls::{Certificates, Vouched};
use crate::source::Network;

/// For a handshake, and for the head of a request; a connection that asks for nothing is closed after it too.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long bytes may wait for a client to take them (tcp(7), TCP_USER_TIMEOUT).
const UNSENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an answer that is being sent may take once the daemon stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after the system refused a connection (too many files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Who may connect, and how.
pub struct Door {
    /// Empty: every address.
    pub allow: Vec<Network>,
    /// Whose clients are let in. None: plain HTTP.
    pub certificates: Option<Arc<Certificates>>,
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
pub async fn serve(listener: TcpListener, door: Door, router: Router, stop: impl Future<Output = ()> + Send) {
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
                tasks.spawn(connection(stream, door.certificates.clone(), router.clone(), permit, stopping.subscribe()));
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

async fn connection(
    stream: TcpStream,
    tls: Option<Arc<Certificates>>,
    router: Router,
    permit: OwnedSemaphorePermit,
    stopping: watch::Receiver<bool>,
) {
    let _permit = permit;
    // Without it such a client only lasts longer.
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(UNSENT_TIMEOUT));
    let Some(certificates) = tls else { return converse(stream, router, stopping).await };
    let generation = certificates.generation();
    match tokio::time::timeout(REQUEST_TIMEOUT, certificates.http1_acceptor().accept(stream)).await {
        Ok(Ok(stream)) => {
            let vouched = Arc::new(Vouched::new(&certificates, stream.get_ref().1.peer_certificates().unwrap_or_default(), generation));
            converse(stream, router.layer(from_fn_with_state(vouched, while_good)), stopping).await
        }
        Ok(Err(error)) => tracing::debug!(%error, "a host without a certificate of ours"),
        Err(_) => tracing::debug!("a TLS handshake that does not end"),
    }
}

/// Refuses a client that was let in and would not be now.
async fn while_good(State(vouched): State<Arc<Vouched>>, request: Request, next: Next) -> Response {
    if vouched.is_good() { next.run(request).await } else { StatusCode::FORBIDDEN.into_response() }
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

/// What of a file is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// From the first to the last byte, both included.
    Bytes {
        /// The first.
        first: u64,
        /// The last.
        last: u64,
    },
    /// Nothing that is there.
    None,
}

/// The part of a file of `len` bytes that the header `Range` means (RFC 9110, 14.1.2). What is not understood, several ranges among it, is as if it were not there: all of it is a right answer.
pub fn parse_range(text: &str, len: u64) -> Part {
    let Some((first, last)) = text.trim().strip_prefix("bytes=").and_then(|range| range.split_once('-')) else { return Part::Whole };
    let number = |text: &str| if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse::<u64>().ok() } else { None };
    match (first.trim(), last.trim()) {
        ("", suffix) => match number(suffix) {
            Some(0) => Part::None,
            Some(_) if len == 0 => Part::None,
            Some(count) => Part::Bytes { first: len.saturating_sub(count), last: len - 1 },
            None => Part::Whole,
        },
        (first, last) => match (number(first), if last.is_empty() { Some(u64::MAX) } else { number(last) }) {
            (Some(first), Some(last)) if first > last => Part::Whole,
            (Some(first), Some(_)) if first >= len => Part::None,
            (Some(first), Some(last)) => Part::Bytes { first, last: last.min(len - 1) },
            _ => Part::Whole,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_rfc() {
        let bytes = |first, last| Part::Bytes { first, last };
        for (text, want) in [
            ("bytes=0-", bytes(0, 99)),
            ("bytes=10-19", bytes(10, 19)),
            ("bytes=90-1000", bytes(90, 99)),
            ("bytes=-10", bytes(90, 99)),
            ("bytes=-1000", bytes(0, 99)),
            ("bytes=100-", Part::None),
            ("bytes=-0", Part::None),
            ("bytes=5-4", Part::Whole),
            ("bytes=0-1,3-4", Part::Whole),
            ("bytes=+1-4", Part::Whole),
            ("lines=0-1", Part::Whole),
            ("bytes=x-", Part::Whole),
            ("", Part::Whole),
        ] {
            assert_eq!(parse_range(text, 100), want, "{text}");
        }
        assert_eq!((parse_range("bytes=0-", 0), parse_range("bytes=-5", 0)), (Part::None, Part::None));
    }

    proptest::proptest! {
        #[test]
        fn a_part_is_always_within_the_file(text in "bytes=[0-9]{0,22}-[0-9]{0,22}", len in 0u64..1000) {
            if let Part::Bytes { first, last } = parse_range(&text, len) {
                proptest::prop_assert!(first <= last && last < len);
            }
        }
    }
}

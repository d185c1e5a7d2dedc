//! Connections: accepted, bounded in number, and each with its [`Peer`], found out once.
//!
//! A connection costs a task and some tens of kilobytes, so their number is bounded: of callers that a rule names by `listen.max_connections`, of strangers,
//! who only ever hear that they may not call, by [`STRANGERS_MAX`]. What is over is closed at once. A TLS handshake has [`HANDSHAKE_TIMEOUT`], and runs beside
//! the others, so that one that sends nothing holds up nobody.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::tls::{Certificates, Vouched};
use crate::api::authorise::{Certificate, Identity, Peer, Rules, StillGood};

/// Connections of callers that no rule names, at one time.
pub const STRANGERS_MAX: usize = 64;
/// Handshakes that go on at one time.
const HANDSHAKES_MAX: usize = 256;
/// How long a client may take to shake hands.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an error of accept(2) that is about this process, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections between the acceptor and the server.
const AHEAD: usize = 64;

/// A connection and who is at its other end.
pub struct Connection {
    io: Io,
    peer: Peer,
    _permit: OwnedSemaphorePermit,
}

enum Io {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(io) => Pin::new(io).poll_read(context, buffer),
            Io::Tcp(io) => Pin::new(io).poll_read(context, buffer),
            Io::Tls(io) => Pin::new(io).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Unix(io) => Pin::new(io).poll_write(context, bytes),
            Io::Tcp(io) => Pin::new(io).poll_write(context, bytes),
            Io::Tls(io) => Pin::new(io).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(io) => Pin::new(io).poll_flush(context),
            Io::Tcp(io) => Pin::new(io).poll_flush(context),
            Io::Tls(io) => Pin::new(io).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Unix(io) => Pin::new(io).poll_shutdown(context),
            Io::Tcp(io) => Pin::new(io).poll_shutdown(context),
            Io::Tls(io) => Pin::new(io).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Unix(io) => Pin::new(io).poll_write_vectored(context, bytes),
            Io::Tcp(io) => Pin::new(io).poll_write_vectored(context, bytes),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Unix(io) => io.is_write_vectored(),
            Io::Tcp(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }
}

/// What decides who gets a connection.
#[derive(Clone)]
pub struct Door {
    rules: Arc<Rules>,
    callers: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Door {
    /// For at most `connections_max` connections of callers that a rule names.
    pub fn new(rules: Arc<Rules>, connections_max: usize) -> Door {
        Door { rules, callers: Arc::new(Semaphore::new(connections_max)), strangers: Arc::new(Semaphore::new(STRANGERS_MAX)) }
    }

    /// The connection with its peer, unless there are too many.
    fn enter(&self, io: Io, identity: Identity, still_good: Option<StillGood>) -> Option<Connection> {
        let grants = self.rules.grants(&identity);
        let (semaphore, limit) = if grants.is_some() { (&self.callers, "listen.max_connections") } else { (&self.strangers, "strangers") };
        match Arc::clone(semaphore).try_acquire_owned() {
            Ok(permit) => Some(Connection { io, peer: Peer { identity: Arc::new(identity), grants, still_good }, _permit: permit }),
            Err(_) => {
                tracing::warn!(caller = %identity, limit, "connection closed: there are too many");
                None
            }
        }
    }
}

/// Connections in the order in which they are ready.
pub type Incoming = ReceiverStream<io::Result<Connection>>;

/// Connections of a unix socket. Ends when the receiver is dropped.
pub fn unix(listener: UnixListener, door: Door) -> Incoming {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        while !sender.is_closed() {
            let stream = tokio::select! {
                () = sender.closed() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        pause(&error).await;
                        continue;
                    }
                },
            };
            let (door, sender) = (door.clone(), sender.clone());
            if door.rules.need_groups() {
                // The user database may be slow, and those behind this caller need not wait for it.
                tokio::spawn(async move { deliver(&sender, of_process(&door, stream).await).await });
            } else {
                deliver(&sender, of_process(&door, stream).await).await;
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn of_process(door: &Door, stream: UnixStream) -> Option<Connection> {
    let peer = match stream.peer_cred() {
        Ok(peer) => peer,
        Err(error) => {
            tracing::warn!(%error, "connection closed: the kernel does not say who it is");
            return None;
        }
    };
    let (uid, gid, pid) = (peer.uid(), peer.gid(), peer.pid());
    let identity = if door.rules.need_groups() {
        tokio::task::spawn_blocking(move || Identity::of_process(uid, gid, pid, true)).await.ok()?
    } else {
        Identity::of_process(uid, gid, pid, false)
    };
    door.enter(Io::Unix(stream), identity, None)
}

/// Connections of a TCP socket, in the clear without `tls`. Ends when the receiver is dropped.
pub fn tcp(listener: TcpListener, door: Door, tls: Option<Arc<Certificates>>) -> Incoming {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    tokio::spawn(async move {
        while !sender.is_closed() {
            let (stream, address) = tokio::select! {
                () = sender.closed() => return,
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        pause(&error).await;
                        continue;
                    }
                },
            };
            // Answers are small and there is no reason to wait for more of them.
            let _ = stream.set_nodelay(true);
            let Some(certificates) = tls.clone() else {
                deliver(&sender, door.enter(Io::Tcp(stream), Identity::Tcp { address: Some(address) }, None)).await;
                continue;
            };
            let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
                tracing::warn!(%address, "connection closed: too many TLS handshakes");
                continue;
            };
            let (door, sender) = (door.clone(), sender.clone());
            tokio::spawn(async move {
                let connection = shake_hands(&door, &certificates, stream, address).await;
                drop(permit);
                deliver(&sender, connection).await;
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn shake_hands(door: &Door, certificates: &Arc<Certificates>, stream: TcpStream, address: std::net::SocketAddr) -> Option<Connection> {
    let generation = certificates.generation();
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, certificates.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::info!(%address, %error, "TLS handshake failed");
            return None;
        }
        Err(_) => {
            tracing::info!(%address, "TLS handshake took more than {} s", HANDSHAKE_TIMEOUT.as_secs());
            return None;
        }
    };
    // The verifier demands a certificate; that there is one is checked again, because everything depends on it.
    let chain = stream.get_ref().1.peer_certificates()?;
    let vouched = Vouched::new(certificates, chain, generation);
    match Certificate::of(chain.first()?, Some(address)) {
        Ok(certificate) => {
            let is_good: StillGood = Arc::new(move || vouched.is_good());
            door.enter(Io::Tls(Box::new(stream)), Identity::Certificate(Box::new(certificate)), Some(is_good))
        }
        Err(error) => {
            tracing::warn!(%address, error = %error.chain(), "connection closed: the client certificate can't be read");
            None
        }
    }
}

async fn deliver(sender: &mpsc::Sender<io::Result<Connection>>, connection: Option<Connection>) {
    if let Some(connection) = connection {
        // Nobody takes it while the daemon stops.
        let _ = sender.send(Ok(connection)).await;
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "accept a connection");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

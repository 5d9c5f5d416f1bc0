//! The clients' edge: accept, bound, TLS, serve, drain.
//!
//! HTTP/1.1 and 1.0; HTTP/2 is off. A stop goes in steps: every answer carries `Connection: close`; the listener stays open
//! for [`GRACE`], as long as load balancers may still send somebody; idle connections get as long for a last request, then
//! a FIN; what is in flight or queued finishes. hyper's `graceful_shutdown` closes idle connections at once, so it is
//! called only when their grace is over. What a request means is `gateway`'s business.

mod chunks;
mod closing;
mod connection;
pub mod descriptors;
mod framing;
mod guard;
mod head;
mod phases;
mod plain;
mod tls;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::gateway::{Gateway, refusal};
use crate::listen::{Failing, is_of_one_connection};
use crate::outcome::EdgeRefusal;
use crate::panics;
pub use connection::serve_connection;
pub use tls::{Tls, serve_tls_connection};

/// How long a client may take to close, after our FIN, or to go on with what it is sending: a lost packet is sent again by
/// then (RFC 6298, section 2: after 1 s). Chosen, not measured.
const LINGER: Duration = Duration::from_secs(2);

/// How long, at a stop, the listener stays open and an idle connection may still ask. Chosen, not measured: Kubernetes takes
/// longer to send nobody any more, and is waited for before the stop begins (`preStop` in `deploy/base`).
pub const GRACE: Duration = Duration::from_secs(2);

/// Accepts and serves clients until `draining` is cancelled, then drains: returns when the last connection has closed, or
/// `drain` has passed, or `now` is cancelled. As many as `most_turned_away` are told at once why they are not let in; beyond,
/// they are closed without a word.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    gateway: Arc<Gateway>,
    most_turned_away: usize,
    draining: CancellationToken,
    now: CancellationToken,
) {
    let server = Server {
        tls,
        gateway: Arc::clone(&gateway),
        admitted: Arc::default(),
        turning_away: Arc::new(Semaphore::new(most_turned_away)),
        draining: draining.clone(),
        tracker: TaskTracker::new(),
    };
    let until_closed = async {
        draining.cancelled().await;
        sleep(GRACE.min(gateway.config().drain)).await;
    };
    tokio::select! {
        () = server.accept_all(&listener) => {}
        () = until_closed => {}
        () = now.cancelled() => return,
    }
    server.admit_backlog(listener);
    server.tracker.close();
    tokio::select! {
        () = server.tracker.wait() => {}
        () = sleep(gateway.config().drain.saturating_sub(GRACE)) => {
            tracing::warn!(connections = server.tracker.len(), "drain time is over: closing what is left");
        }
        () = now.cancelled() => {}
    }
}

struct Server {
    tls: Option<Arc<Tls>>,
    gateway: Arc<Gateway>,
    admitted: Arc<Mutex<HashMap<IpAddr, usize>>>,
    turning_away: Arc<Semaphore>,
    draining: CancellationToken,
    tracker: TaskTracker,
}

impl Server {
    async fn accept_all(&self, listener: &TcpListener) {
        let mut failing = Failing::default();
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => self.admit(stream, peer.ip()),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    self.gateway.metrics().refused(EdgeRefusal::Accept);
                    let say = || {
                        tracing::warn!(%error, "cannot accept: raise the limit of open files, or lower limits.connections");
                    };
                    failing.rest(say).await;
                }
            }
        }
    }

    /// Closes the listener. Whoever is in its backlog has been let in: closing over them would reset them. The kernel is
    /// asked directly, since tokio may not have heard yet that somebody is there.
    fn admit_backlog(&self, listener: TcpListener) {
        let Ok(listener) = listener.into_std() else {
            return;
        };
        while let Ok((stream, peer)) = listener.accept() {
            let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
            if let Ok(stream) = stream {
                self.admit(stream, peer.ip());
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: IpAddr) {
        // A socket that is gone already fails later, too.
        let _ = stream.set_nodelay(true);
        let place = match self.place(peer) {
            Ok(place) => place,
            Err(limit) => {
                self.gateway.metrics().refused(EdgeRefusal::Connections);
                if let Ok(turning_away) = Arc::clone(&self.turning_away).try_acquire_owned() {
                    let (tls, draining, places) =
                        (self.tls.clone(), self.draining.clone(), Arc::clone(&self.turning_away));
                    self.tracker.spawn(async move {
                        let _turning_away = turning_away;
                        // To tell the next one why is worth more than to hear this one out.
                        let may_go_on = || !draining.is_cancelled() && places.available_permits() > 0;
                        // Whether it listens is its own business.
                        let _ = turn_away(stream, tls, limit, may_go_on).await;
                    });
                }
                return;
            }
        };
        let (gateway, limits) = (Arc::clone(&self.gateway), self.gateway.config().limits.clone());
        let (tls, draining) = (self.tls.clone(), self.draining.clone());
        self.tracker.spawn(async move {
            let _place = place;
            let serving = async {
                match tls {
                    None => serve_connection(stream, peer, gateway, &limits, draining).await,
                    Some(tls) => Box::pin(serve_tls_connection(stream, peer, tls, gateway, &limits, draining)).await,
                }
            };
            // A request's own panics are its answer; what panics here is the connection's.
            panics::contain(serving).await
        });
    }

    /// A place, or the limit that is reached.
    fn place(&self, peer: IpAddr) -> Result<Place, &'static str> {
        let mut admitted = self.admitted.lock();
        let of_peer = admitted.get(&peer).copied().unwrap_or(0);
        let in_all = usize::try_from(self.gateway.metrics().connections.get()).unwrap_or(0);
        let limits = &self.gateway.config().limits;
        if in_all >= limits.connections {
            return Err("limits.connections");
        }
        if limits.connections_per_address.is_some_and(|most| of_peer >= most) {
            return Err("limits.connections_per_address");
        }
        admitted.insert(peer, of_peer + 1);
        self.gateway.metrics().connections.inc();
        Ok(Place {
            admitted: Arc::clone(&self.admitted),
            gateway: Arc::clone(&self.gateway),
            peer,
        })
    }
}

/// A connection's place among `limits.connections` and those of its address.
struct Place {
    admitted: Arc<Mutex<HashMap<IpAddr, usize>>>,
    gateway: Arc<Gateway>,
    peer: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut admitted = self.admitted.lock();
        if let Some(of_peer) = admitted.get_mut(&self.peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                admitted.remove(&self.peer);
            }
        }
        self.gateway.metrics().connections.dec();
    }
}

/// Tells a client why it gets no connection, without reading what it asks; an upload may go on as long as `may_go_on` says.
async fn turn_away(
    stream: TcpStream,
    tls: Option<Arc<Tls>>,
    limit: &'static str,
    may_go_on: impl Fn() -> bool,
) -> io::Result<()> {
    match tls {
        None => tell(stream, limit, may_go_on).await,
        Some(tls) => match tls.handshake(stream, GRACE).await {
            Some((stream, _)) => tell(stream, limit, may_go_on).await,
            None => Ok(()),
        },
    }
}

async fn tell<S>(mut stream: S, limit: &'static str, may_go_on: impl Fn() -> bool) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let answer = refusal(&Error::TooManyConnections(limit));
    timeout(GRACE, stream.write_all(&answer)).await??;
    closing::close(&mut stream, may_go_on).await
}

/// Sleeps until `deadline`, for ever without one.
async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

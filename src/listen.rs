//! How others are let in: an address is bound, and an accept that fails is borne.
//!
//! Who is accepted, and what is said of an accept that fails, is the business of whoever listens.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::time::{Instant, sleep};

/// After an accept that failed for want of descriptors or memory: spinning would make both worse.
const BACKOFF: Duration = Duration::from_millis(100);

/// So long without one, the next is news.
const MENDED: Duration = Duration::from_mins(1);

/// Connections that the kernel holds until they are accepted.
const BACKLOG: u32 = 4096;

/// Binds an address; a restart need not wait until the last connections of the one before are forgotten.
///
/// # Errors
/// When the address is taken, not this host's, or not allowed.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Whether an accept failed because of the one connection, which is gone, and not of us.
pub fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// Accepts that fail because of us.
#[derive(Debug, Default)]
pub struct Failing {
    last: Option<Instant>,
}

impl Failing {
    /// Another one has failed: rests before the next, and `say`s so once for as long as it lasts; in between some may be
    /// let in.
    pub async fn rest(&mut self, say: impl FnOnce()) {
        if self.last.is_none_or(|last| last.elapsed() > MENDED) {
            say();
        }
        self.last = Some(Instant::now());
        sleep(BACKOFF).await;
    }
}

//! One HTTP/1.1 connection that whoever uses it drives: what it brings wakes nobody but the one who waits for it.
//!
//! A task of its own for each connection, as hyper has it usually, would be woken for every request to write it, for every
//! answer to read it, and once more for its body; each time somebody else would have to be woken in turn. So nobody looks at
//! a connection that is idle: that it has closed is noted, and seen when it is taken or swept.

use std::error::Error as _;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http_body_util::Empty;
use hyper::client::conn::http1::{Connection, SendRequest};
use hyper_util::rt::TokioIo;

use super::pool::Slot;
use super::wire::{Heard, Wire};

/// How often, at once, connection and exchange may go on because the other did: a head, the wish for its body, and the body.
/// Beyond, others have their turn first.
const MOST_TURNS: u32 = 32;

/// What goes over a connection of ours.
type Http = Connection<TokioIo<Heard>, Empty<Bytes>>;

pub(super) struct Line {
    pub(super) sender: SendRequest<Empty<Bytes>>,
    pub(super) driver: Driver,
    pub(super) wire: Wire,
    /// How long the next query has waited for it to open while others could have had its place.
    pub(super) opening: Duration,
    /// Given back when all else is closed.
    slot: Slot,
}

impl Line {
    pub(super) fn new(sender: SendRequest<Empty<Bytes>>, http: Http, wire: Wire, slot: Slot) -> Self {
        Self {
            sender,
            driver: Driver::new(http),
            wire,
            opening: Duration::ZERO,
            slot,
        }
    }

    /// Closes it and keeps its place.
    pub(super) fn into_slot(self: Box<Self>) -> Slot {
        let Self { slot, .. } = *self;
        slot
    }

    /// Whether it has been closed, by either side.
    pub(super) fn is_closed(&mut self) -> bool {
        self.driver.look();
        self.driver.http.is_none() || self.sender.is_closed()
    }

    /// Whether more has come than what was asked for.
    pub(super) fn has_surplus(&mut self) -> bool {
        self.driver.look();
        self.driver.has_surplus
    }

    /// Whether the next request may go.
    pub(super) fn is_ready(&mut self) -> bool {
        !self.is_closed() && self.sender.is_ready()
    }

    /// Waits until the next request may go. `false`: none may any more.
    ///
    /// Cancel safe.
    pub(super) async fn ready(&mut self) -> bool {
        let Self { sender, driver, .. } = self;
        driver.run(pin!(sender.ready())).await.is_ok()
    }
}

/// A connection's part in what goes over it.
pub(super) struct Driver {
    /// Until it is over. Then it is dropped, or whoever waits for the next request to go would never be told.
    http: Option<Http>,
    has_surplus: bool,
    nudge: Arc<Nudge>,
    /// That nudge, as the driver is polled with it.
    waker: Waker,
}

impl Driver {
    fn new(http: Http) -> Self {
        let nudge = Arc::new(Nudge::new());
        Self {
            http: Some(http),
            has_surplus: false,
            waker: Waker::from(Arc::clone(&nudge)),
            nudge,
        }
    }

    /// Goes on for as long as `exchange` takes.
    ///
    /// Cancel safe, as far as `exchange` is.
    pub(super) async fn run<T>(&mut self, mut exchange: Pin<&mut impl Future<Output = T>>) -> T {
        let done = poll_fn(|cx| self.poll_both(exchange.as_mut(), cx)).await;
        // Idle, it wakes nobody.
        self.nudge.owner.take();
        done
    }

    /// Does what the connection has to do by now: nothing, unless it was nudged since it was last polled.
    fn look(&mut self) {
        if self.nudge.begin() {
            self.poll();
        }
        self.nudge.end();
    }

    fn poll(&mut self) {
        let mut cx = Context::from_waker(&self.waker);
        if let Some(http) = &mut self.http
            && let Poll::Ready(ended) = Pin::new(http).poll(&mut cx)
        {
            // How it ends, whoever uses it learns from the exchange; but not of what came behind an answer. hyper calls that
            // unexpected and has no name for it: whatever else ends a connection on which all was answered has a cause.
            self.has_surplus = ended.is_err_and(|error| error.source().is_none());
            self.http = None;
        }
    }

    /// Lets both go on for as long as one can because the other did.
    fn poll_both<T>(&mut self, mut exchange: Pin<&mut impl Future<Output = T>>, cx: &mut Context<'_>) -> Poll<T> {
        self.nudge.owner.register(cx.waker());
        for _ in 0..MOST_TURNS {
            let was_nudged = self.nudge.begin();
            if let Poll::Ready(done) = exchange.as_mut().poll(&mut Context::from_waker(&self.waker)) {
                if was_nudged {
                    // Perhaps by the connection, which was not polled for it.
                    self.nudge.is_nudged.store(true, Ordering::SeqCst);
                }
                self.nudge.end();
                return Poll::Ready(done);
            }
            self.poll();
            if !self.nudge.end() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Tells a driver at work from one that has to be woken.
struct Nudge {
    is_at_work: AtomicBool,
    is_nudged: AtomicBool,
    owner: AtomicWaker,
}

impl Nudge {
    /// Of a connection that has yet to be polled.
    fn new() -> Self {
        Self {
            is_at_work: AtomicBool::new(false),
            is_nudged: AtomicBool::new(true),
            owner: AtomicWaker::new(),
        }
    }

    /// Whether somebody nudged it since it began last.
    fn begin(&self) -> bool {
        self.is_at_work.store(true, Ordering::SeqCst);
        self.is_nudged.swap(false, Ordering::SeqCst)
    }

    /// Whether there is more to do. 1. the driver is at work; 2. somebody nudges it, and so wakes nobody; 3. it ends: whatever
    /// nudged it before is seen here, and whatever comes later wakes its owner.
    fn end(&self) -> bool {
        self.is_at_work.store(false, Ordering::SeqCst);
        self.is_nudged.load(Ordering::SeqCst)
    }
}

impl Wake for Nudge {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_nudged.store(true, Ordering::SeqCst);
        if !self.is_at_work.load(Ordering::SeqCst) {
            self.owner.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use hyper::client::conn::http1::handshake;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// A connection that nobody has looked at yet, and upstream's end of it.
    async fn open() -> (SendRequest<Empty<Bytes>>, Driver, tokio::io::DuplexStream) {
        let (near, far) = duplex(1024);
        let (stream, _) = Wire::attach(Box::new(near), None).await.unwrap();
        let (sender, http) = handshake(TokioIo::new(stream)).await.unwrap();
        (sender, Driver::new(http), far)
    }

    #[tokio::test]
    async fn that_upstream_closes_is_seen_whenever_it_does() {
        let (_sender, mut driver, far) = open().await;
        drop(far);
        driver.look();
        assert!(driver.http.is_none(), "before anybody has looked");

        let (_sender, mut driver, far) = open().await;
        for _ in 0..2 {
            driver.look();
            assert!(driver.http.is_some());
        }
        drop(far);
        driver.look();
        assert!(driver.http.is_none(), "while it was idle");

        let (mut sender, mut driver, mut far) = open().await;
        let mut request = http::Request::new(Empty::new());
        request
            .headers_mut()
            .insert("host", http::HeaderValue::from_static("a"));
        let answers = tokio::spawn(async move {
            far.read_u8().await.unwrap();
            far.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            far
        });
        let response = driver.run(pin!(sender.send_request(request))).await.unwrap();
        assert_eq!(response.status(), 204);
        driver.look();
        assert!(sender.is_ready() && driver.http.is_some());
        drop(answers.await.unwrap());
        driver.look();
        assert!(driver.http.is_none(), "after it was used");

        let (_sender, mut driver, far) = open().await;
        driver.look();
        drop(far);
        // Done before the connection had to be polled for it.
        driver.run(pin!(std::future::ready(()))).await;
        driver.look();
        assert!(driver.http.is_none(), "just before it was used");
    }

    #[tokio::test]
    async fn what_is_idle_is_not_polled_and_wakes_nobody() {
        let (_sender, mut driver, mut far) = open().await;
        driver.look();
        assert!(!driver.nudge.is_nudged.load(Ordering::SeqCst));
        driver.run(pin!(std::future::ready(()))).await;
        assert!(driver.nudge.owner.take().is_none());
        // What nobody has asked for.
        far.write_all(b"HTTP/1.1 200 OK\r\n").await.unwrap();
        assert!(driver.nudge.is_nudged.load(Ordering::SeqCst));
    }
}

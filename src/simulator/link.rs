//! What the layers of one connection tell each other: the stamps of what came in, and how an answer is to be maimed.
//!
//! ```text
//! hyper ─ CutStream ─ (TLS) ─ StampedStream ─ kernel
//!             └────────── Link ─────┘
//! ```

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::arrival::unix_ns;
use super::unwritable;

/// One connection, as its layers and its requests see it.
pub(super) struct Link {
    /// The stamp of the first bytes since the last write: a request's arrival. Zero when nothing has come since.
    first: AtomicU64,
    /// The stamp of the last bytes: the arrival of a request that came together with the one before it.
    last: AtomicU64,
    /// How many more bytes may be written before the connection is closed.
    left: AtomicUsize,
    reset: AtomicBool,
    /// What goes out in place of the answer.
    instead: Mutex<Option<Instead>>,
    /// Since when no request is being answered. `None` while one is.
    idle_since: Mutex<Option<Instant>>,
    served: AtomicBool,
    answered: Notify,
}

impl Link {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
            left: AtomicUsize::new(usize::MAX),
            reset: AtomicBool::new(false),
            instead: Mutex::new(None),
            idle_since: Mutex::new(Some(Instant::now())),
            served: AtomicBool::new(false),
            answered: Notify::new(),
        })
    }

    /// Bytes came in at `stamp`.
    pub(super) fn received(&self, stamp: u64) {
        let _ = self
            .first
            .compare_exchange(0, stamp, Ordering::Relaxed, Ordering::Relaxed);
        self.last.store(stamp, Ordering::Relaxed);
    }

    /// Bytes go out: what comes in from here on belongs to the next request.
    pub(super) fn wrote(&self) {
        self.first.store(0, Ordering::Relaxed);
    }

    /// When the request that is now being answered arrived, in nanoseconds of the wall clock.
    pub(super) fn arrival(&self) -> u64 {
        [&self.first, &self.last]
            .map(|stamp| stamp.load(Ordering::Relaxed))
            .into_iter()
            .find(|&stamp| stamp != 0)
            .unwrap_or_else(|| unix_ns(SystemTime::now()))
    }

    /// Lets `bytes` more out, then closes the connection.
    pub(super) fn close_after(&self, bytes: usize) {
        self.left.store(bytes, Ordering::Relaxed);
    }

    /// Resets the connection in place of writing.
    pub(super) fn reset(&self) {
        self.reset.store(true, Ordering::Relaxed);
        self.close_after(0);
    }

    /// Sends `script` in place of the answer to the request that is here.
    pub(super) fn instead(&self, script: unwritable::Script) {
        *self.instead.lock() = Some(Instead { script, sent: 0 });
    }

    pub(super) fn is_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// A request is here.
    pub(super) fn begin(&self) {
        self.served.store(true, Ordering::Relaxed);
        *self.instead.lock() = None;
        *self.idle_since.lock() = None;
    }

    /// The answer's last byte has been handed over to be written.
    pub(super) fn end(&self) {
        *self.idle_since.lock() = Some(Instant::now());
        self.answered.notify_one();
    }

    pub(super) fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }

    /// Completes when an answer has been handed over.
    pub(super) async fn answered(&self) {
        self.answered.notified().await;
    }

    /// Completes when no request has been there for `limit`.
    pub(super) async fn idle_for(&self, limit: Duration) {
        loop {
            let idle_since = *self.idle_since.lock();
            let now = Instant::now();
            // Looking again after `limit` misses nothing: whatever became idle since then is due later still.
            let due = idle_since.unwrap_or(now) + limit;
            if due <= now {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// Bytes that replace an answer, and how many of the part at hand are sent.
struct Instead {
    script: unwritable::Script,
    sent: usize,
}

impl Instead {
    /// Completes when all is sent that is not sent for ever.
    fn poll_send(&mut self, mut stream: Pin<&mut impl AsyncWrite>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let unsent = &self.script.first[self.sent..];
            if !unsent.is_empty() {
                self.sent += ready!(stream.as_mut().poll_write(cx, unsent))?;
            } else if self.script.repeated.is_empty() {
                return Poll::Ready(Ok(()));
            } else {
                self.script.first.clone_from(&self.script.repeated);
                self.sent = 0;
            }
        }
    }
}

/// A stream that sends other bytes where its [`Link`] says so, or closes after the bytes that its [`Link`] lets out.
pub(super) struct CutStream<S> {
    stream: S,
    link: Arc<Link>,
}

impl<S> CutStream<S> {
    pub(super) fn new(stream: S, link: Arc<Link>) -> Self {
        Self { stream, link }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for CutStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for CutStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Some(instead) = &mut *this.link.instead.lock() {
            ready!(instead.poll_send(Pin::new(&mut this.stream), cx))?;
            return Poll::Ready(Ok(buf.len()));
        }
        let left = this.link.left.load(Ordering::Relaxed);
        if left == usize::MAX {
            return Pin::new(&mut this.stream).poll_write(cx, buf);
        }
        if left == 0 {
            ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &buf[..buf.len().min(left)]))?;
        this.link.left.store(left - written, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

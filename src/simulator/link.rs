//! What the layers of one connection tell each other: the stamps of what came in, and how an answer is to be maimed.
//!
//! ```text
//! hyper ─ CutStream ─ (TLS) ─ StampedStream ─ kernel
//!             └────────── Link ─────┘
//! ```

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::arrival::unix_ns;

/// One connection, as its layers and its requests see it.
pub(super) struct Link {
    /// The stamp of the first bytes since the last write: a request's arrival. Zero when nothing has come since.
    first: AtomicU64,
    /// The stamp of the last bytes: the arrival of a request that came together with the one before it.
    last: AtomicU64,
    /// How many more bytes may be written before the connection is closed.
    left: AtomicUsize,
    reset: AtomicBool,
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

    pub(super) fn is_reset(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// A request is here.
    pub(super) fn begin(&self) {
        self.served.store(true, Ordering::Relaxed);
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The answer's last byte has been handed over to be written.
    pub(super) fn end(&self) {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
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
            let idle_since = *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner);
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

/// A stream that closes after the bytes that its [`Link`] lets out.
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

//! A request's body: whoever answers without it leaves it to the connection, which has to come to the next request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use parking_lot::Mutex;

/// A request's body, as hyper reads it. Whoever has a clone can read on where the others have left it; hyper gives it up with
/// the last one.
#[derive(Clone, Debug)]
pub struct RequestBody(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    incoming: Mutex<Incoming>,
    /// Whoever reads would have more, and there is none.
    is_awaited: AtomicBool,
    /// Its end was read: of one in chunks hyper does not tell.
    has_ended: AtomicBool,
}

impl RequestBody {
    /// A body of which nothing is read.
    pub fn new(body: Incoming) -> Self {
        Self(Arc::new(Inner {
            incoming: Mutex::new(body),
            is_awaited: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
        }))
    }

    /// Whether it is the client that is waited for.
    pub(super) fn is_awaited(&self) -> bool {
        self.0.is_awaited.load(Ordering::Relaxed)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut *self.0.incoming.lock()).poll_frame(cx);
        self.0.is_awaited.store(frame.is_pending(), Ordering::Relaxed);
        if matches!(frame, Poll::Ready(None)) {
            self.0.has_ended.store(true, Ordering::Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.0.has_ended.load(Ordering::Relaxed) || self.0.incoming.lock().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.incoming.lock().size_hint()
    }
}

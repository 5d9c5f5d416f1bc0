//! The bytes below hyper: where the instant of a write is taken.
//!
//! Writes are stamped on the raw stream, under TLS, since that is where bytes leave; what was heard is noted above TLS,
//! since a session ticket is no answer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_util::io::InspectWriter;

use crate::budget::Permit;
use crate::dial::{Handshake, Stream};

/// The most bytes before an answer's body, interim answers included. hyper skips those without end, thousands at a time,
/// and holds up whatever else its thread does. The usual limit of servers for a request's head, several times over.
const MOST_BEFORE_BODY: usize = 64 << 10;

/// What is known of a connection's bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Wire(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Paid for the request that is about to be written.
    permit: Option<Permit>,
    heard: bool,
    /// Bytes heard since the last request was armed; of no interest once its answer's head is there.
    before_body: usize,
    is_answered: bool,
    /// The permit was too late, and nothing was written.
    was_late: bool,
}

impl Wire {
    /// Puts the stamp under the bytes and, where it is spoken, TLS between.
    pub(super) async fn attach(raw: Box<dyn Stream>, tls: Option<&Handshake>) -> io::Result<(Heard, Self)> {
        let wire = Self::default();
        let below = wire.clone();
        let stamped = InspectWriter::new(raw, move |_: &[u8]| below.wrote());
        let stream: Box<dyn Stream> = match tls {
            Some((connector, name)) => Box::new(connector.connect(name.clone(), stamped).await?),
            None => Box::new(stamped),
        };
        let heard = Heard {
            stream,
            wire: wire.clone(),
        };
        Ok((heard, wire))
    }

    /// The next bytes written are the request that `permit` has paid for.
    pub(super) fn arm(&self, permit: Permit) {
        *self.0.lock() = State {
            permit: Some(permit),
            ..State::default()
        };
    }

    /// The head of the answer is there: what follows is its body.
    pub(super) fn answered(&self) {
        self.0.lock().is_answered = true;
    }

    /// Whether any byte came since the last request was written.
    pub(super) fn heard(&self) -> bool {
        self.0.lock().heard
    }

    /// Whether the last request was not written, since its permit was late.
    pub(super) fn was_late(&self) -> bool {
        self.0.lock().was_late
    }

    /// The last look before the bytes go: whatever held them up since the permit was granted has happened by now.
    fn may_write(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        if state.permit.take_if(|permit| permit.is_late(Instant::now())).is_some() {
            state.was_late = true;
        }
        if state.was_late {
            return Err(io::Error::other("the permit is too late"));
        }
        Ok(())
    }

    fn wrote(&self) {
        if let Some(permit) = self.0.lock().permit.take() {
            permit.written(Instant::now());
        }
    }

    fn hear(&self, bytes: usize) {
        let mut state = self.0.lock();
        // Nothing at all is the end of the stream.
        state.heard |= bytes > 0;
        state.before_body = state.before_body.saturating_add(bytes);
    }

    /// How many bytes may come yet: one read may bring a body with its head.
    fn room(&self) -> usize {
        let state = self.0.lock();
        if state.is_answered {
            usize::MAX
        } else {
            MOST_BEFORE_BODY.saturating_sub(state.before_body)
        }
    }

    /// Whether what has come before the body is not too much.
    pub(super) fn may_go_on(&self) -> bool {
        self.room() > 0
    }
}

/// A stream whose [`Wire`] notes what is read.
pub(super) struct Heard {
    stream: Box<dyn Stream>,
    wire: Wire,
}

impl AsyncRead for Heard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let room = this.wire.room();
        if room == 0 {
            return Poll::Ready(Err(io::Error::other("too much before the body")));
        }
        let before = buf.filled().len();
        let mut read = (&mut this.stream).take(room as u64);
        ready!(Pin::new(&mut read).poll_read(cx, buf))?;
        this.wire.hear(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Heard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.wire.may_write()?;
        Pin::new(&mut this.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.wire.may_write()?;
        Pin::new(&mut this.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncWriteExt as _, duplex};
    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_a_late_permit_has_paid_for_is_not_written() {
        let third = Duration::from_millis(10);
        for (waits, is_written) in [(third, true), (third + Duration::from_millis(1), false)] {
            let (near, mut far) = duplex(64);
            let (mut stream, wire) = Wire::attach(Box::new(near), None).await.unwrap();
            wire.arm(Permit::until(Instant::now() + third));
            advance(waits).await;
            assert_eq!(stream.write_all(b"GET").await.is_ok(), is_written, "after {waits:?}");
            assert_eq!(wire.was_late(), !is_written);
            let mut arrived = [0; 3];
            let reads = timeout(third, far.read_exact(&mut arrived)).await;
            assert_eq!(reads.is_ok(), is_written);
            // Later bytes are nobody's either.
            assert_eq!(stream.write_all(b"GET").await.is_ok(), is_written);
        }
    }
}

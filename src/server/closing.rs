//! How a client's connection ends: with a FIN, and its reads drained, since bytes that lie unread when a socket closes reset
//! it, and the client loses the answer.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::LINGER;
use super::phases::{Phase, Phases};

/// How long a client may go on sending after our FIN: many look for an answer only when they have sent all, and a reset would
/// take it away.
const MOST_LINGER: Duration = Duration::from_secs(30);

/// How much of it is read at once.
const DISCARDED: usize = 16 << 10;

/// Sends a FIN and reads until the client's, for as long as [`LINGER`]; from one that goes on sending, for as long as
/// `may_go_on` says so, and [`MOST_LINGER`].
///
/// Not cancel safe: a client that is still sending gets a reset, which may take its answer away.
pub(super) async fn close<S>(stream: &mut S, may_go_on: impl Fn() -> bool) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    timeout(LINGER, stream.shutdown()).await??;
    let most = Instant::now() + MOST_LINGER;
    let mut until = Instant::now() + LINGER;
    let mut discarded = [0; 1024];
    while timeout_at(until, stream.read(&mut discarded)).await?? > 0 {
        if may_go_on() {
            until = (Instant::now() + LINGER).min(most);
        }
    }
    Ok(())
}

/// The client's stream as hyper has it: it ends like one closed by [`close`], and its end is not the answer's.
pub(super) struct Watched<S> {
    stream: S,
    phase: Phases,
    draining: CancellationToken,
    has_held_back_end: bool,
    ending: Ending,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, phase: Phases, draining: CancellationToken) -> Self {
        Self {
            stream,
            phase,
            draining,
            has_held_back_end: false,
            ending: Ending::Open,
        }
    }
}

enum Ending {
    Open,
    /// Our FIN is sent; the client's is awaited, for so long, and in the end until then.
    Lingering(Pin<Box<Sleep>>, Instant),
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let is_end = buffer.filled().len() == before;
        if is_end && self.phase.is_busy() && !self.has_held_back_end {
            // To hyper a client whose end has come has left, and gets no answer; yet it may only have said all it has to say.
            // So the end is held back for one turn, in which an answer that is there is sent; without one, it has left.
            self.has_held_back_end = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.phase.settled(false);
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.phase.settled(false);
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        // hyper flushes only what it has written whole.
        self.phase.settled(matches!(self.ending, Ending::Open));
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.phase.settled(false);
        loop {
            match &mut this.ending {
                Ending::Open => {
                    ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
                    this.phase.set(Phase::Closing);
                    let until = Instant::now() + MOST_LINGER;
                    this.ending = Ending::Lingering(Box::pin(sleep(LINGER)), until);
                }
                Ending::Lingering(over, until) => {
                    if over.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(Ok(()));
                    }
                    let mut discarded = [MaybeUninit::uninit(); DISCARDED];
                    let mut buffer = ReadBuf::uninit(&mut discarded);
                    ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer))?;
                    if buffer.filled().is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                    // A stop waits for nobody's upload, and a head that does not end is none.
                    if !this.draining.is_cancelled() && !this.phase.is_out_of_time() {
                        over.as_mut().reset((Instant::now() + LINGER).min(*until));
                    }
                }
            }
        }
    }
}

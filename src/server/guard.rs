//! Lets a client's bytes go on to hyper when they are checked, unchanged and in order; a head only when it is whole.
//!
//! Mostly a read brings whole requests: they are checked where hyper has them read to, and nothing is copied. Only what
//! is the beginning of a head is held here until its end has come.
//!
//! A poll that is as plain as can be, and a hit, is answered from here while hyper has no part in the connection: most of
//! what a hit took was hyper's parsing, header map and encoding (`benches/README.md`).
//!
//! What is refused goes no further, and nothing after it does. In its place hyper gets a request of our own, [`REFUSED`]:
//! so the refusal is answered after the answers that are still due, and the connection closed as after any other.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::mem::{self, MaybeUninit};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::framing::{Framing, Refused};
use super::head::Most;
use super::phases::{Busy, Phases};
use crate::gateway::{Hit, PlainPoll};

/// Stands in for what was refused. No client can send it: TRACE is refused.
pub(super) const REFUSED: &[u8] = b"TRACE / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// How much is read at once behind the beginning of a head.
const READ: usize = 4096;

/// A body of up to so many bytes is sent in one piece with its head: to copy it costs less than to send two.
const JOINED: usize = 16 << 10;

thread_local! {
    /// Where hits are written on their way out, mostly for no longer than it takes to send them.
    static OUT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Why a connection's bytes go no further; shared with whoever answers, and with whoever sees to it that a head ends in time.
pub(super) type Refusal = Arc<OnceLock<Refused>>;

/// A client's stream whose bytes are checked.
pub(super) struct Guard<S> {
    stream: S,
    phases: Phases,
    framing: Framing,
    /// What was read and has not gone on.
    held: BytesMut,
    /// So many bytes of it may.
    checked: usize,
    refusal: Refusal,
    /// What the client has not taken yet of the last hit.
    sending: Option<Box<(Sending, Busy)>>,
}

impl<S> Guard<S> {
    pub(super) fn new(stream: S, phases: Phases, most: Most, refusal: Refusal) -> Self {
        Self {
            stream,
            phases,
            framing: Framing::new(most),
            held: BytesMut::new(),
            checked: 0,
            refusal,
            sending: None,
        }
    }

    /// Whether a hit is on its way to the client.
    pub(super) fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// How many of `bytes` may go on.
    fn check(&mut self, bytes: &[u8]) -> usize {
        // hyper reads on only when it has begun to answer all that it has.
        if !self.phases.is_busy() {
            self.framing.answered();
        }
        let followed = self.framing.follow(bytes);
        if let Some(refused) = followed.refused {
            // Set once: nothing is checked after a refusal.
            let _ = self.refusal.set(refused);
        }
        followed.through
    }

    /// The same for what is held, to which something was added.
    fn check_held(&mut self) {
        let held = mem::take(&mut self.held);
        let through = self.check(&held);
        self.held = held;
        if self.refusal.get().is_some() {
            self.held.truncate(through);
            self.hold(&[]);
        }
        self.phases
            .next_begun(self.refusal.get().is_none() && self.held.len() > through);
        self.checked = self.checked.max(through);
    }

    /// Takes back what went on and was not looked at: it goes on again, before all else.
    pub(super) fn take_back(&mut self, unread: &[u8]) {
        if !unread.is_empty() {
            self.held = [unread, &self.held].concat().as_slice().into();
            self.checked += unread.len();
        }
    }

    /// Keeps what may not go on yet; what may never is replaced.
    fn hold(&mut self, rest: &[u8]) {
        match self.refusal.get() {
            None => {
                self.held.extend_from_slice(rest);
                if !rest.is_empty() {
                    self.phases.next_begun(true);
                }
            }
            Some(refused) if refused.in_body => {}
            Some(_) => {
                self.held.extend_from_slice(REFUSED);
                self.checked = self.held.len();
            }
        }
    }
}

impl<S: AsyncRead + Unpin> Guard<S> {
    /// Reads straight to where hyper wants it.
    fn poll_read_through(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Read>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let came = &buffer.filled()[before..];
        if came.is_empty() {
            return Poll::Ready(Ok(Read::End));
        }
        self.phases.heard();
        let through = self.check(came);
        self.hold(&came[through..]);
        buffer.set_filled(before + through);
        Poll::Ready(Ok(if through > 0 { Read::Checked } else { Read::Held }))
    }

    /// Reads behind the beginning of a head.
    fn poll_read_behind(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Read>> {
        self.held.reserve(READ);
        if ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.held))? == 0 {
            return Poll::Ready(Ok(Read::End));
        }
        self.check_held();
        Poll::Ready(Ok(Read::Held))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Guard<S> {
    /// Reads until there is something for hyper to do: a head is whole, or what came is refused. `false`: the client has
    /// ended its side, and nothing of it may go on.
    ///
    /// What `hit` has an answer to is not: it is answered here, and hyper never sees it.
    pub(super) fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        hit: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Hit>,
    ) -> Poll<io::Result<bool>> {
        loop {
            if let Some(sending) = &mut self.sending {
                ready!(sending.0.poll(&mut self.stream, cx))?;
                self.sending = None;
                self.answer_held(cx, hit)?;
                continue;
            }
            if self.checked > 0 || self.refusal.get().is_some() {
                return Poll::Ready(Ok(true));
            }
            // No room is kept for whoever sends nothing.
            let mut room = [MaybeUninit::uninit(); READ];
            let mut buffer = ReadBuf::uninit(&mut room);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
            let came = buffer.filled();
            if came.is_empty() {
                return Poll::Ready(Ok(false));
            }
            if self.held.is_empty() {
                let answered = self.answer(came, cx, hit)?;
                self.held.extend_from_slice(&came[answered..]);
                self.check_rest();
            } else {
                self.held.extend_from_slice(came);
                self.answer_held(cx, hit)?;
            }
        }
    }

    /// Answers the hits that what is held begins with, and checks the rest.
    fn answer_held(
        &mut self,
        cx: &mut Context<'_>,
        hit: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Hit>,
    ) -> io::Result<()> {
        let held = mem::take(&mut self.held);
        let answered = self.answer(&held, cx, hit);
        self.held = held;
        self.held.advance(answered?);
        self.check_rest();
        Ok(())
    }

    /// Checks what is held, once no hit before it is on its way any more.
    fn check_rest(&mut self) {
        if !self.held.is_empty() && self.sending.is_none() {
            self.phases.heard();
            self.check_held();
        }
    }

    /// Answers the hits that `bytes` begin with, as far as the client takes the answers. Gives how many bytes those were.
    fn answer(
        &mut self,
        bytes: &[u8],
        cx: &mut Context<'_>,
        hit: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Hit>,
    ) -> io::Result<usize> {
        let mut answered = 0;
        while self.sending.is_none()
            && let Some((length, poll)) = self.framing.plain(&bytes[answered..])
        {
            let mut out = OUT.take();
            out.clear();
            let Some(hit) = hit(poll, &mut out) else {
                OUT.set(out);
                break;
            };
            answered += length;
            self.framing.passed();
            let arrived = hit.arrived;
            let mut sending = Sending::new(out, hit);
            match sending.poll(&mut self.stream, cx) {
                Poll::Ready(sent) => {
                    OUT.set(sending.bytes);
                    sent?;
                    self.phases.answered(arrived);
                }
                Poll::Pending => self.sending = Some(Box::new((sending.slow(), self.phases.busy()))),
            }
        }
        Ok(answered)
    }
}

/// A hit on its way to the client.
struct Sending {
    /// Its head and, while they are to be sent in one piece, its body.
    bytes: Vec<u8>,
    head: usize,
    hit: Hit,
    /// So many bytes of head and body have gone.
    sent: usize,
}

impl Sending {
    fn new(mut bytes: Vec<u8>, hit: Hit) -> Self {
        let (head, body) = (bytes.len(), hit.answer.body());
        if body.len() <= JOINED {
            bytes.extend_from_slice(body);
        }
        Self {
            bytes,
            head,
            hit,
            sent: 0,
        }
    }

    fn poll<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (bytes, body) = (&self.bytes, self.hit.answer.body());
        let behind = if bytes.len() > self.head { &[] } else { body };
        while self.sent < self.head + body.len() {
            let stream = Pin::new(&mut *stream);
            let sent = if behind.is_empty() {
                stream.poll_write(cx, &bytes[self.sent..])
            } else {
                let (here, there) = (self.sent.min(self.head), self.sent.saturating_sub(self.head));
                stream.poll_write_vectored(cx, &[IoSlice::new(&bytes[here..]), IoSlice::new(&behind[there..])])
            };
            match ready!(sent)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        Pin::new(stream).poll_flush(cx)
    }

    /// Lets go of the copy of the body: the client takes its time, and the cache has it anyway.
    fn slow(mut self) -> Self {
        self.bytes.truncate(self.head);
        self.bytes.shrink_to_fit();
        self
    }
}

/// What came of a read.
enum Read {
    /// hyper has it.
    Checked,
    /// It is held, and may or may not go on.
    Held,
    /// Nothing more will come.
    End,
}

impl<S: AsyncRead + Unpin> AsyncRead for Guard<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.checked > 0 {
                let here = this.checked.min(buffer.remaining());
                buffer.put_slice(&this.held[..here]);
                this.held.advance(here);
                this.checked -= here;
                if this.held.is_empty() {
                    // Its room is not kept: mostly it is not needed again.
                    this.held = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            match this.refusal.get() {
                None => {}
                // The body breaks off.
                Some(refused) if refused.in_body => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                // The head that is held here has taken too long.
                Some(_) if !this.held.is_empty() => {
                    this.held.clear();
                    this.hold(&[]);
                    this.phases.next_begun(false);
                    continue;
                }
                // hyper closes when it has answered.
                Some(_) => return Poll::Pending,
            }
            let read = if this.held.is_empty() {
                match this.poll_read_through(cx, buffer) {
                    Poll::Ready(read) => read?,
                    Poll::Pending => {
                        if this.framing.is_between_requests() {
                            this.phases.starved();
                        }
                        return Poll::Pending;
                    }
                }
            } else {
                ready!(this.poll_read_behind(cx))?
            };
            if matches!(read, Read::Checked | Read::End) {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guard<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

//! Lets a client's bytes go on to hyper when they are checked, unchanged and in order; a head only when it is whole.
//!
//! Mostly a read brings whole requests: they are checked where hyper has them read to, and nothing is copied. Only what
//! is the beginning of a head is held here until its end has come.
//!
//! A poll that is as plain as can be never comes to hyper, while that has no part in the connection. If it is a hit, it is
//! answered from here: most of what a hit took was hyper's parsing, header map and encoding (`benches/README.md`). Else it
//! is handed out, and its answer comes back: who waits for a turn waits without hyper's 18 KiB.
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
use http::HeaderValue;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::framing::{Framing, Refused};
use super::head::Most;
use super::phases::{Busy, Phases};
use crate::error::Error;
use crate::gateway::{Data, Hit, Looked, Miss, PlainPoll, REQUEST_ID, Reply};
use crate::metrics::InFlight;

/// Stands in for what was refused. No client can send it: TRACE is refused.
pub(super) const REFUSED: &[u8] = b"TRACE / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// How much is read at once while hyper has no buffer for it: a poll is some hundred bytes, so several of them. It stands on
/// the stack mostly, and no connection keeps it. Chosen, not measured.
const READ: usize = 4096;

/// A body of up to so many bytes is sent in one piece with its head: to copy it costs less than to send two.
const JOINED: usize = 16 << 10;

/// More than a hit's head has.
const MOST_FIELDS: usize = 16;

thread_local! {
    /// Where answers are written on their way out, mostly for no longer than it takes to send them.
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
    /// What is behind them was not looked at yet.
    is_unchecked: bool,
    /// How much may come behind a request that is being answered before no more is read.
    most_ahead: usize,
    /// hyper waits for more, and sees for itself when there is none.
    is_awaited: bool,
    refusal: Refusal,
    /// A plain poll that is no hit.
    asked: Option<Box<Miss>>,
    /// What the client has not taken yet of the last answer.
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
            is_unchecked: false,
            most_ahead: most.bytes,
            is_awaited: false,
            refusal,
            asked: None,
            sending: None,
        }
    }

    /// Whether an answer is on its way to the client.
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
        if followed.heads > 0 || asks(&bytes[followed.through..]) {
            self.phases.heard();
        }
        if let Some(refused) = followed.refused {
            // Set once: nothing is checked after a refusal.
            let _ = self.refusal.set(refused);
        }
        followed.through
    }

    /// Checks what is held, to which something was added.
    fn check_held(&mut self) {
        self.is_unchecked = false;
        let held = mem::take(&mut self.held);
        let through = self.check(&held);
        self.held = held;
        if self.refusal.get().is_some() {
            self.held.truncate(through);
            self.hold(&[]);
        }
        self.phases
            .next_begun(self.refusal.get().is_none() && asks(&self.held[through..]));
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
                if asks(rest) {
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

    /// Waits, while a request is answered, until the client has left, which an error means, too. What it asks meanwhile is
    /// held, and looked at later. Behind more than a head's worth of that it is not seen to leave.
    pub(super) fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.held.len() < self.most_ahead {
            let mut room = [MaybeUninit::uninit(); READ];
            let mut buffer = ReadBuf::uninit(&mut room);
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return Poll::Ready(());
            }
            self.held.extend_from_slice(buffer.filled());
            self.is_unchecked = true;
            self.phases.next_begun(asks(&self.held));
        }
        Poll::Pending
    }

    /// What goes on, read if there is none yet.
    fn poll_checked(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.checked > 0 {
                let here = self.checked.min(buffer.remaining());
                buffer.put_slice(&self.held[..here]);
                self.held.advance(here);
                self.checked -= here;
                if self.held.is_empty() {
                    // Its room is not kept: mostly it is not needed again.
                    self.held = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            match self.refusal.get() {
                None => {}
                // The body breaks off.
                Some(refused) if refused.in_body => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                // The head that is held here has taken too long.
                Some(_) if !self.held.is_empty() => {
                    self.held.clear();
                    self.hold(&[]);
                    self.phases.next_begun(false);
                    continue;
                }
                // hyper closes when it has answered.
                Some(_) => return Poll::Pending,
            }
            if self.is_unchecked {
                self.check_held();
                continue;
            }
            let read = if self.held.is_empty() {
                self.poll_read_through(cx, buffer)
            } else {
                self.poll_read_behind(cx)
            };
            let Poll::Ready(read) = read else {
                if self.framing.is_between_requests() && !asks(&self.held) {
                    self.phases.starved();
                }
                return Poll::Pending;
            };
            match read {
                Ok(Read::Checked) => return Poll::Ready(Ok(())),
                Ok(Read::Held) => {}
                // Whichever way the client has gone.
                Ok(Read::End) | Err(_) => {
                    if !self.framing.is_between_requests() {
                        let error = Error::Malformed("the connection ends within the request's body");
                        // Nothing was refused, or nothing would be read.
                        let _ = self.refusal.set(Refused { error, in_body: true });
                    }
                    return Poll::Ready(read.map(drop));
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Guard<S> {
    /// Reads until there is something to do that is not done here. What is a hit when one may `look` is answered at once.
    pub(super) fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        look: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Looked>,
    ) -> Poll<io::Result<Came>> {
        loop {
            if let Some(sending) = &mut self.sending {
                ready!(sending.0.poll(&mut self.stream, cx))?;
                let is_last = sending.0.is_last;
                self.sending = None;
                if is_last {
                    return Poll::Ready(Ok(Came::End));
                }
                self.answer_held(cx, look)?;
                continue;
            }
            if let Some(miss) = self.asked.take() {
                return Poll::Ready(Ok(Came::Poll(miss)));
            }
            if self.checked > 0 || self.refusal.get().is_some() {
                return Poll::Ready(Ok(Came::Other));
            }
            // No room is kept for whoever sends nothing.
            let mut room = [MaybeUninit::uninit(); READ];
            let mut buffer = ReadBuf::uninit(&mut room);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
            let came = buffer.filled();
            if came.is_empty() {
                return Poll::Ready(Ok(Came::End));
            }
            if self.held.is_empty() {
                let taken = self.answer(came, cx, look)?;
                self.held.extend_from_slice(&came[taken..]);
                self.check_rest();
            } else {
                self.held.extend_from_slice(came);
                self.answer_held(cx, look)?;
            }
        }
    }

    /// Sends the answer to the poll that was handed out, as far as the client takes it at once; `busy` lasts until it has
    /// all. Gives whether it has, and nothing more may be asked.
    pub(super) fn send(
        &mut self,
        cx: &mut Context<'_>,
        reply: Reply,
        in_flight: InFlight,
        busy: Option<Busy>,
        is_last: bool,
    ) -> io::Result<bool> {
        let mut out = OUT.take();
        out.clear();
        let body = reply.write(&mut out, is_last);
        let sending = Sending::new(out, body, in_flight, is_last);
        Ok(self.begin(cx, sending, busy)? && is_last)
    }

    /// Sends as much as the client takes at once. Gives whether that is all.
    fn begin(&mut self, cx: &mut Context<'_>, mut sending: Sending, busy: Option<Busy>) -> io::Result<bool> {
        match sending.poll(&mut self.stream, cx) {
            Poll::Ready(sent) => {
                OUT.set(sending.bytes);
                sent.map(|()| true)
            }
            Poll::Pending => {
                let busy = busy.unwrap_or_else(|| {
                    let busy = self.phases.busy();
                    // A hit's: in case it is cut.
                    self.phases.answers(sending.request_id().as_ref());
                    busy
                });
                busy.answered();
                self.sending = Some(Box::new((sending.slow(), busy)));
                Ok(false)
            }
        }
    }

    /// Takes the plain polls that what is held begins with, and checks the rest.
    pub(super) fn answer_held(
        &mut self,
        cx: &mut Context<'_>,
        look: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Looked>,
    ) -> io::Result<()> {
        let held = mem::take(&mut self.held);
        let taken = self.answer(&held, cx, look);
        self.held = held;
        self.held.advance(taken?);
        self.check_rest();
        Ok(())
    }

    /// Checks what is held, once nothing before it waits for an answer or is on its way any more.
    fn check_rest(&mut self) {
        self.phases.next_begun(asks(&self.held));
        if self.held.is_empty() {
            // Nor is the room of a long head kept.
            self.held = BytesMut::new();
        } else if self.sending.is_none() && self.asked.is_none() {
            self.check_held();
        }
    }

    /// Takes the plain polls that `bytes` begin with: answers the hits, as far as the client takes the answers, up to one
    /// that is none. Gives how many bytes those were.
    fn answer(
        &mut self,
        bytes: &[u8],
        cx: &mut Context<'_>,
        look: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Looked>,
    ) -> io::Result<usize> {
        let mut taken = 0;
        while self.sending.is_none()
            && self.asked.is_none()
            && let Some((length, poll)) = self.framing.plain(&bytes[taken..])
        {
            let mut out = OUT.take();
            out.clear();
            match look(poll, &mut out) {
                Some(Looked::Hit(Hit {
                    body,
                    arrived,
                    in_flight,
                })) => {
                    if self.begin(cx, Sending::new(out, body, in_flight, false), None)? {
                        self.phases.answered(arrived);
                    }
                }
                missed => {
                    OUT.set(out);
                    let Some(Looked::Miss(miss)) = missed else { break };
                    self.asked = Some(miss);
                }
            }
            taken += length;
            self.framing.passed();
        }
        Ok(taken)
    }
}

/// Whether a request begins with `bytes`: the empty lines that may stand before one are none (RFC 9112 §2.2).
fn asks(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| !matches!(byte, b'\r' | b'\n'))
}

/// What a client wants.
pub(super) enum Came {
    /// To know of a task: a plain poll that is no hit.
    Poll(Box<Miss>),
    /// What hyper is there for: a head is whole, or what came is refused.
    Other,
    /// Nothing more: it has ended its side, or its last answer is sent.
    End,
}

/// An answer on its way to the client.
struct Sending {
    /// Its head and, while they are to be sent in one piece, its body.
    bytes: Vec<u8>,
    head: usize,
    body: Data,
    _in_flight: InFlight,
    is_last: bool,
    /// So many bytes of head and body have gone.
    sent: usize,
}

impl Sending {
    fn new(mut bytes: Vec<u8>, body: Data, in_flight: InFlight, is_last: bool) -> Self {
        let (head, behind) = (bytes.len(), body.chunk());
        if behind.len() <= JOINED {
            bytes.extend_from_slice(behind);
        }
        Self {
            bytes,
            head,
            body,
            _in_flight: in_flight,
            is_last,
            sent: 0,
        }
    }

    fn poll<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (bytes, body) = (&self.bytes, self.body.chunk());
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

    /// What its head calls the request.
    fn request_id(&self) -> Option<HeaderValue> {
        let mut headers = [httparse::EMPTY_HEADER; MOST_FIELDS];
        let mut response = httparse::Response::new(&mut headers);
        response.parse(&self.bytes[..self.head]).ok()?;
        let named = response.headers.iter().find(|header| REQUEST_ID == header.name)?;
        HeaderValue::from_bytes(named.value).ok()
    }

    /// Lets go of a copy of the body that is kept as it is: the client takes its time.
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
        let read = this.poll_checked(cx, buffer);
        this.is_awaited = read.is_pending();
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guard<S> {
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

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // hyper comes by here whenever it goes to wait. While it holds the next request it does not read.
        let may_leave_unseen = !this.is_awaited
            && this.phases.is_answering()
            && this.framing.is_between_requests()
            && this.refusal.get().is_none();
        if may_leave_unseen && this.poll_left(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

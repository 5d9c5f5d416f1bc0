//! One client connection: its time-outs, its last request, its end. What it may ask is `guard`'s business.
//!
//! hyper's own header time-out also counts idle time, so the two are told apart here: an I/O wrapper sees a request's first
//! byte, the service its head's end, the response body's drop its end. And a connection ends with a FIN and its reads
//! drained, since bytes that lie unread when a socket closes reset it, and the client loses the answer.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, Response};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::framing::Refused;
use super::guard::{Guard, Refusal};
use super::head::{Most, USUAL_HEADERS};
use super::{GRACE, sleep_until_some};
use crate::account::Caller;
use crate::config::Limits;
use crate::error::Error;
use crate::gateway::{Body, Gateway, InFlight};

/// How long a client may take to close, after our FIN.
const LINGER: Duration = Duration::from_secs(2);

/// Serves one connection until the client closes it, a time-out does, or, once `draining` is cancelled, its grace is over
/// and its last answer is given.
pub async fn serve_connection<S>(
    stream: S,
    caller: impl Into<Caller>,
    gateway: Arc<Gateway>,
    limits: &Limits,
    draining: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let phase = Phases::new(limits);
    let refusal = Refusal::default();
    let caller = caller.into();
    let service = service_fn({
        let (phase, gateway, draining) = (phase.clone(), Arc::clone(&gateway), draining.clone());
        let refusal = Arc::clone(&refusal);
        move |request: Request<Incoming>| {
            let (busy, gateway, draining) = (phase.busy(), Arc::clone(&gateway), draining.clone());
            let (refusal, caller) = (Arc::clone(&refusal), caller.clone());
            async move {
                let (mut response, in_flight) = answer(&gateway, request, caller, &refusal).await;
                if draining.is_cancelled() || refusal.get().is_some_and(|refused| refused.in_body) {
                    response
                        .headers_mut()
                        .insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response.map(|body| Tracked {
                    body,
                    _in_flight: in_flight,
                    _busy: busy,
                }))
            }
        }
    });
    let watched = Watched {
        stream,
        phase: phase.clone(),
        has_held_back_end: false,
        ending: Ending::Open,
    };
    let guard = Guard::new(watched, phase.clone(), Most::new(limits), Arc::clone(&refusal));
    let mut builder = http1::Builder::new();
    if limits.headers > USUAL_HEADERS {
        builder.max_headers(limits.headers);
    }
    let mut connection = pin!(builder.serve_connection(TokioIo::new(guard), service));
    let mut alarm = pin!(sleep_until(phase.until().unwrap_or_else(Instant::now)));
    let mut drained = pin!(async {
        draining.cancelled().await;
        sleep(GRACE).await;
    });
    let mut is_closing = false;
    let mut give_up = None;
    loop {
        let event = {
            let mut patience_ends = pin!(sleep_until_some(give_up));
            poll_fn(|cx| {
                // However it ends, there is nobody left to tell.
                if connection.as_mut().poll(cx).is_ready() || patience_ends.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Ended);
                }
                if !is_closing && drained.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Drained);
                }
                poll_alarm(alarm.as_mut(), &phase, cx).map(Event::TimedOut)
            })
            .await
        };
        match event {
            Event::Ended | Event::TimedOut(Phase::Closing) => return,
            Event::TimedOut(Phase::Head { .. }) => {
                // Where that is said already, or something else, whoever it is said to does not read.
                if refusal
                    .set(Refused {
                        error: Error::HeaderTimeout,
                        in_body: false,
                    })
                    .is_err()
                {
                    return;
                }
                phase.set(Phase::Head {
                    until: Instant::now() + LINGER,
                });
            }
            // What was to be answered in words has been: this answer has begun, and there is but one way to end it.
            Event::TimedOut(Phase::Busy { .. }) => return gateway.metrics().refused(Error::RequestTimeout.detail()),
            Event::Drained => {
                is_closing = true;
                connection.as_mut().graceful_shutdown();
            }
            Event::TimedOut(Phase::Idle { .. }) => {
                // One more time to close in peace, then it is dropped.
                phase.set(Phase::Closing);
                give_up = Some(Instant::now() + LINGER + LINGER);
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// The answer to one request, or to what came in place of one.
async fn answer(
    gateway: &Arc<Gateway>,
    request: Request<Incoming>,
    caller: Caller,
    refusal: &Refusal,
) -> (Response<Body>, Option<InFlight>) {
    if request.method() == Method::TRACE {
        // Ours: `guard` lets no client's through.
        let error = refusal.get().map_or(Error::Internal, |refused| refused.error.clone());
        return (gateway.refuse(&error, request.headers()), None);
    }
    let in_flight = match gateway.place() {
        Ok(in_flight) => in_flight,
        Err(error) => return (gateway.refuse(&error, request.headers()), None),
    };
    let response = Arc::clone(gateway).handle(request, caller).await;
    let response = match refusal.get() {
        // Whatever came of a body that broke off, this is why.
        Some(refused) if refused.in_body => gateway.refuse(&refused.error, response.headers()),
        Some(_) | None => response,
    };
    (response, Some(in_flight))
}

/// Sends a FIN and reads until the client's, for as long as [`LINGER`].
pub(super) async fn close<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    stream.shutdown().await?;
    let drain = async {
        let mut discarded = [0; 1024];
        while stream.read(&mut discarded).await? > 0 {}
        Ok(())
    };
    tokio::time::timeout(LINGER, drain).await.unwrap_or(Ok(()))
}

enum Event {
    Ended,
    Drained,
    TimedOut(Phase),
}

/// What a connection is doing, and until when it may.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Nothing is asked.
    Idle { until: Instant },
    /// A request's head has begun.
    Head { until: Instant },
    /// A request is being answered.
    Busy { until: Instant },
    /// Nothing more is answered.
    Closing,
}

/// A connection's phase, as all who change it share it.
#[derive(Clone, Debug)]
pub(super) struct Phases {
    phase: Arc<Mutex<Phase>>,
    /// A head has begun behind the request that is being answered.
    is_next_begun: Arc<AtomicBool>,
    idle_timeout: Duration,
    header_timeout: Duration,
    request_timeout: Duration,
}

impl Phases {
    pub(super) fn new(limits: &Limits) -> Self {
        let until = Instant::now() + limits.idle_timeout;
        Self {
            phase: Arc::new(Mutex::new(Phase::Idle { until })),
            is_next_begun: Arc::default(),
            idle_timeout: limits.idle_timeout,
            header_timeout: limits.header_timeout,
            request_timeout: limits.request_timeout,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        *self.lock() = phase;
    }

    fn until(&self) -> Option<Instant> {
        match *self.lock() {
            Phase::Idle { until } | Phase::Head { until } | Phase::Busy { until } => Some(until),
            Phase::Closing => None,
        }
    }

    /// Bytes came: where nothing was asked, a request has begun.
    pub(super) fn heard(&self) {
        let mut phase = self.lock();
        if matches!(*phase, Phase::Idle { .. }) {
            *phase = Phase::Head {
                until: Instant::now() + self.header_timeout,
            };
        }
    }

    /// The beginning of a head is there, or it is whole now.
    pub(super) fn next_begun(&self, is_begun: bool) {
        self.is_next_begun.store(is_begun, Ordering::Relaxed);
    }

    /// Whether a request is being answered, or nothing more is.
    pub(super) fn is_busy(&self) -> bool {
        matches!(*self.lock(), Phase::Busy { .. } | Phase::Closing)
    }

    /// A request is being answered, until this is dropped.
    pub(super) fn busy(&self) -> Busy {
        // An answer in words is given when `request_timeout` is over, and has a while to go out.
        let until = Instant::now() + self.request_timeout + LINGER;
        self.set(Phase::Busy { until });
        Busy(self.clone())
    }
}

/// A request that is being answered; when dropped, the connection is idle again, or the next one's head has begun.
pub(super) struct Busy(Phases);

impl Drop for Busy {
    fn drop(&mut self) {
        let now = Instant::now();
        self.0.set(if self.0.is_next_begun.load(Ordering::Relaxed) {
            let until = now + self.0.header_timeout;
            Phase::Head { until }
        } else {
            let until = now + self.0.idle_timeout;
            Phase::Idle { until }
        });
    }
}

/// Ready with the phase that has lasted too long. The alarm is set anew only where it would ring too late: phases change
/// with every request, and most end long before it rings.
fn poll_alarm(mut alarm: Pin<&mut Sleep>, phases: &Phases, cx: &mut Context<'_>) -> Poll<Phase> {
    loop {
        let Some(until) = phases.until() else {
            return Poll::Pending;
        };
        if until < alarm.deadline() {
            alarm.as_mut().reset(until);
        }
        ready!(alarm.as_mut().poll(cx));
        let phase = *phases.lock();
        match phase {
            Phase::Idle { until } | Phase::Head { until } | Phase::Busy { until } if until > Instant::now() => {
                alarm.as_mut().reset(until);
            }
            Phase::Idle { .. } | Phase::Head { .. } | Phase::Busy { .. } => return Poll::Ready(phase),
            Phase::Closing => return Poll::Pending,
        }
    }
}

/// A response's body; with it goes the request's time.
struct Tracked {
    body: Body,
    _in_flight: Option<InFlight>,
    _busy: Busy,
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The client's stream: it sees a request's first byte, and ends in peace.
struct Watched<S> {
    stream: S,
    phase: Phases,
    has_held_back_end: bool,
    ending: Ending,
}

enum Ending {
    Open,
    /// Our FIN is sent; the client's is awaited, for so long.
    Lingering(Pin<Box<Sleep>>),
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.phase.heard();
        } else if self.phase.is_busy() && !self.has_held_back_end {
            // To hyper the client's end is the end of its request, too. One that has but said all it has to say gets the
            // answer that is there at once; for any other answer it looks like one that has left.
            self.has_held_back_end = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.ending {
                Ending::Open => {
                    ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
                    this.ending = Ending::Lingering(Box::pin(sleep(LINGER)));
                }
                Ending::Lingering(over) => {
                    if over.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(Ok(()));
                    }
                    let mut discarded = [0; 1024];
                    let mut buffer = ReadBuf::new(&mut discarded);
                    ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer))?;
                    if buffer.filled().is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }
}

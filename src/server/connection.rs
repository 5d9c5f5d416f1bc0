//! One client connection: its time-outs, its last request, its end. What it may ask is `guard`'s business.
//!
//! It rests until something is asked. A plain hit is answered as it rests, and another plain poll waits for its answer
//! without hyper, too; for anything else that is called in, and given up when all is answered: nothing of it is kept for
//! connections that ask nothing or wait, and every poll may be a hit again.
//!
//! hyper's own header time-out also counts idle time, so the two are told apart here: an I/O wrapper sees a request's first
//! byte, the service its head's end, the response body's drop its end. How it ends is `closing`'s
//! business.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{CONNECTION, EXPECT};
use http::{HeaderValue, Method, Request, Response, Version};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::closing::Watched;
use super::framing::Refused;
use super::guard::{Came, Guard, Refusal};
use super::head::{Most, USUAL_HEADERS};
use super::phases::{Busy, Phase, Phases, poll_alarm};
use super::{GRACE, LINGER, sleep_until_some};
use crate::account::Caller;
use crate::config::Limits;
use crate::error::Error;
use crate::gateway::{Body, Data, Gateway, Looked, Miss, PlainPoll, REQUEST_ID, Reply, RequestBody};
use crate::metrics::InFlight;
use crate::outcome::EdgeRefusal;

/// How long the body of a request that is answered without it may take to come: mostly it is on its way.
const UNREAD_WAIT: Duration = Duration::from_millis(200);

/// How much of it is read: for more, a connection of its own costs the next request less.
const MOST_UNREAD: usize = 64 << 10;

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
    // Its own: every request asks it, and all connections would meet in the lock of one.
    let draining = draining.child_token();
    let served = Arc::new(ConnectionContext {
        phase: phase.clone(),
        refusal: Arc::clone(&refusal),
        gateway,
        draining: draining.clone(),
        caller: caller.into(),
    });
    let ConnectionContext { gateway, caller, .. } = &*served;
    let service = service(Arc::clone(&served));
    let look = |poll: PlainPoll<'_>, head: &mut Vec<u8>| {
        // The last answer says that it is: a hit's does not.
        let may_hit = !draining.is_cancelled();
        gateway.look(poll, may_hit, caller, head)
    };
    let watched = Watched::new(stream, phase.clone(), draining.clone());
    let guard = Guard::new(watched, phase.clone(), Most::new(limits), Arc::clone(&refusal));
    let mut builder = http1::Builder::new();
    if limits.headers > USUAL_HEADERS {
        builder.max_headers(limits.headers);
    }
    let serve = |guard| Box::new(builder.serve_connection(TokioIo::new(guard), &service));
    let mut mode = Mode::Resting(guard);
    let mut alarm = pin!(phase.alarm());
    let mut drained = pin!(grace_is_over(&draining));
    let mut is_closing = false;
    let mut give_up = None;
    let mut time_ended = None;
    loop {
        let event = {
            let mut patience_ends = pin!(sleep_until_some(give_up));
            poll_fn(|cx| {
                if let Poll::Ready(event) = mode.poll(cx, &phase, &look, || draining.is_cancelled()) {
                    return Poll::Ready(event);
                }
                if matches!(mode, Mode::Serving(_)) && !is_closing && phase.may_rest() {
                    return Poll::Ready(Event::Rested);
                }
                if patience_ends.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Ended);
                }
                if !is_closing && !mode.is_answering(&phase) && drained.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::Drained);
                }
                poll_alarm(alarm.as_mut(), &phase, cx).map(Event::Over)
            })
            .await
        };
        // Before `mode` is taken out: the future would keep a second place for it meanwhile.
        if let Event::Over(Phase::Idle { until } | Phase::Head { until }) = event
            && time_ended.replace(until) != Some(until)
        {
            look_once_more().await;
            continue;
        }
        mode = match (event, mode) {
            (Event::Asked(None), Mode::Resting(guard)) => Mode::Serving(serve(guard)),
            (Event::Asked(Some(miss)), Mode::Resting(guard)) => {
                let answer = Box::pin(answer_plain(Arc::clone(&served), miss));
                let busy = Some(phase.busy());
                Mode::Polling { guard, answer, busy }
            }
            (Event::Rested, Mode::Polling { guard, .. }) => Mode::Resting(guard),
            (Event::Rested, Mode::Serving(connection)) => {
                let parts = connection.into_parts();
                let mut guard = parts.io.into_inner();
                guard.take_back(&parts.read_buf);
                Mode::Resting(guard)
            }
            (Event::Over(Phase::Head { .. }), mode) => {
                if !served.refuses_slow_head() {
                    return;
                }
                mode
            }
            // What was to be answered in words has been: this answer has begun, and there is but one way to end it.
            (Event::Over(Phase::Busy { .. }), _) => return served.cut(),
            (event @ (Event::Drained | Event::Over(Phase::Idle { .. })), Mode::Serving(mut connection)) => {
                is_closing = true;
                if matches!(event, Event::Over(_)) {
                    // One more time to close in peace, then it is dropped.
                    phase.set(Phase::Closing);
                    give_up = Some(Instant::now() + LINGER + LINGER);
                }
                Pin::new(&mut *connection).graceful_shutdown();
                Mode::Serving(connection)
            }
            (Event::Left | Event::Drained | Event::Over(Phase::Idle { .. }), Mode::Resting(guard))
            | (Event::Left, Mode::Polling { guard, .. }) => {
                is_closing = true;
                phase.set(Phase::Closing);
                give_up = Some(Instant::now() + LINGER + LINGER);
                Mode::Closing(guard)
            }
            (Event::Ended | Event::Over(_), _) => return,
            (_, mode) => mode,
        };
    }
}

/// Waits until a stop's grace for connections on which nothing is asked is over.
async fn grace_is_over(draining: &CancellationToken) {
    draining.cancelled().await;
    sleep(GRACE).await;
    look_once_more().await;
}

/// Waits until the thread has been told of all that has come on its sockets. It is told between two turns of its tasks: in a
/// long one a connection's time may run out over a request that lies there.
async fn look_once_more() {
    yield_now().await;
}

/// A connection between its requests and in them. hyper's side of one weighs 18 KiB, and most connections ask nothing most
/// of the time, or nothing but plain polls.
enum Mode<G, A, C> {
    /// Nothing is asked, or the beginning of a head is there, or an answer is being sent.
    Resting(G),
    /// A plain poll is being answered.
    Polling {
        guard: G,
        answer: A,
        /// Until the answer is there.
        busy: Option<Busy>,
    },
    /// hyper has it, until that is answered.
    Serving(Box<C>),
    /// It ends without hyper.
    Closing(G),
}

impl<S, A, C> Mode<Guard<Watched<S>>, A, C>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Future<Output = (Reply, InFlight)> + Unpin,
    C: Future<Output = hyper::Result<()>> + Unpin,
{
    /// Whether a request is being answered, or an answer is on its way. One that has begun may not have said that it is the
    /// last: what is asked behind it gets one that does.
    fn is_answering(&self, phase: &Phases) -> bool {
        match self {
            Self::Resting(guard) => guard.is_sending(),
            Self::Polling { .. } => true,
            Self::Serving(_) => phase.is_answering() || phase.is_sending(),
            Self::Closing(_) => false,
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        phase: &Phases,
        look: &impl Fn(PlainPoll<'_>, &mut Vec<u8>) -> Option<Looked>,
        is_draining: impl Fn() -> bool,
    ) -> Poll<Event> {
        // However it ends, there is nobody left to tell.
        match self {
            Self::Resting(guard) => guard.poll_request(cx, look).map(|came| match came {
                Ok(Came::Poll(miss)) => Event::Asked(Some(miss)),
                Ok(Came::Other) => Event::Asked(None),
                Ok(Came::End) => Event::Left,
                Err(_) => Event::Ended,
            }),
            Self::Polling { guard, answer, busy } => {
                let Poll::Ready((reply, in_flight)) = Pin::new(answer).poll(cx) else {
                    return guard.poll_left(cx).map(|()| Event::Ended);
                };
                let sent = guard.send(cx, reply, in_flight, busy.take(), is_draining());
                Poll::Ready(match sent {
                    Ok(true) => Event::Left,
                    Ok(false) => guard.answer_held(cx, look).map_or(Event::Ended, |()| Event::Rested),
                    Err(_) => Event::Ended,
                })
            }
            Self::Serving(connection) => {
                let was_busy = phase.is_busy();
                let mut ended = Pin::new(&mut **connection).poll(cx);
                // hyper 1.12 goes to wait where an answer's end is the last thing it comes upon and takes no byte to write:
                // that it is to close now it sees only when polled again, and nobody would wake it for that (what is left of
                // hyperium/hyper#4143).
                if ended.is_pending() && was_busy && !phase.is_busy() {
                    ended = Pin::new(&mut **connection).poll(cx);
                }
                // Where its last request offered another protocol, hyper leaves off as if that were spoken now: polled again, it
                // sends what is left of the answer, and ends the connection like any other.
                if matches!(ended, Poll::Ready(Ok(()))) {
                    ended = Pin::new(&mut **connection).poll(cx);
                }
                ended.map(|_| Event::Ended)
            }
            Self::Closing(guard) => Pin::new(guard).poll_shutdown(cx).map(|_| Event::Ended),
        }
    }
}

/// What happens to a connection.
enum Event {
    /// A plain poll came or, without one, something for hyper to do.
    Asked(Option<Box<Miss>>),
    /// The client has ended it with nothing asked, or has its last answer.
    Left,
    Ended,
    /// Everything is answered, and nothing is asked.
    Rested,
    Drained,
    /// This phase has lasted too long.
    Over(Phase),
}

/// What all requests of a connection have in common.
struct ConnectionContext {
    phase: Phases,
    refusal: Refusal,
    gateway: Arc<Gateway>,
    draining: CancellationToken,
    caller: Caller,
}

impl ConnectionContext {
    /// Refuses a head that takes too long; not where that is said already, or something else, and whoever it is said to does
    /// not read.
    fn refuses_slow_head(&self) -> bool {
        self.phase.ran_out_of_time();
        let (error, in_body) = (Error::HeaderTimeout, false);
        let is_said = self.refusal.set(Refused { error, in_body }).is_ok();
        if is_said {
            let until = Instant::now() + LINGER;
            self.phase.set(Phase::Head { until });
        }
        is_said
    }

    /// Tells of an answer that is cut.
    fn cut(&self) {
        self.phase.set(Phase::Closing);
        let request_id = self.phase.request_id();
        let request_id = request_id.as_ref().and_then(|id| id.to_str().ok());
        tracing::info!(request_id, "answer cut: not at its end within limits.request_timeout");
        self.gateway.metrics().refused(EdgeRefusal::AnswerCut);
    }
}

/// Answers a connection's requests.
fn service(
    served: Arc<ConnectionContext>,
) -> impl Service<Request<Incoming>, Response = Response<Tracked>, Error = Infallible, Future: Send> + Send {
    service_fn(move |request: Request<Incoming>| {
        let (busy, served) = (served.phase.busy(), Arc::clone(&served));
        let version = request.version();
        async move {
            // On the heap, so that hyper's side of a connection keeps no room for it.
            let answering = Box::pin(answer(&served, Box::new(request.map(RequestBody::new))));
            let (mut response, in_flight, may_ask_on) = answering.await;
            busy.answered();
            // To HTTP/1.0 only the connection's end says where a body of unknown length ends.
            let ends_body = version == Version::HTTP_10 && response.body().size_hint().exact().is_none();
            if ends_body || !may_ask_on {
                close_after(&mut response);
                // Or else hyper adds `keep-alive` for a client of HTTP/1.0 that has asked for it.
                *response.version_mut() = version;
            }
            Ok(response.map(|body| Tracked {
                body,
                sending: Some((busy, in_flight)),
            }))
        }
    })
}

/// Says that it is the connection's last answer.
fn close_after(response: &mut Response<Body>) {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
}

/// The answer to a plain poll.
async fn answer_plain(served: Arc<ConnectionContext>, miss: Box<Miss>) -> (Reply, InFlight) {
    let ConnectionContext { gateway, caller, .. } = &*served;
    let (reply, in_flight) = gateway.answer_plain(miss, caller, served.phase.request_timeout()).await;
    served.phase.answers(reply.request_id());
    (reply, in_flight)
}

/// The answer to one request, and whether another may follow it on this connection.
async fn answer(
    served: &ConnectionContext,
    request: Box<Request<RequestBody>>,
) -> (Response<Body>, Option<InFlight>, bool) {
    // Whoever waits for `100 Continue` has sent nothing yet, and is not asked to.
    let (body, holds_back) = (request.body().clone(), request.headers().contains_key(EXPECT));
    let (response, in_flight) = answer_to(served, request).await;
    let is_last = || {
        let refused = served.refusal.get();
        served.draining.is_cancelled() || refused.is_some_and(|refused| refused.in_body)
    };
    let may_ask_on = !is_last()
        && match response.body() {
            // Upstream goes on to read it, or who sent it is told that nobody does.
            Body::Streamed(streamed, _) => body.is_end_stream() || !streamed.ends_request(),
            Body::Whole(_) => body.is_end_stream() || !holds_back && comes_to_its_end(body).await && !is_last(),
        };
    (response, in_flight, may_ask_on)
}

/// Reads what is left of a body that nobody wants: without its end nobody can say where the next request begins.
async fn comes_to_its_end(body: RequestBody) -> bool {
    let is_short = body.size_hint().lower() <= MOST_UNREAD as u64;
    let all = Limited::new(body, MOST_UNREAD).collect();
    is_short && timeout(UNREAD_WAIT, all).await.is_ok_and(|all| all.is_ok())
}

/// The answer to one request, or to what came in place of one.
async fn answer_to(
    served: &ConnectionContext,
    request: Box<Request<RequestBody>>,
) -> (Response<Body>, Option<InFlight>) {
    let ConnectionContext { gateway, refusal, .. } = served;
    if request.method() == Method::TRACE {
        // Ours: `guard` lets no client's through.
        let error = refusal.get().map_or(Error::Internal, |refused| refused.error.clone());
        return (gateway.refuse(&error, request.headers()), None);
    }
    let in_flight = match gateway.place() {
        Ok(in_flight) => in_flight,
        Err(error) => return (gateway.refuse(&error, request.headers()), None),
    };
    // Whatever comes of a body that breaks off, this is why.
    let in_body = || refusal.get().filter(|refused| refused.in_body);
    let broken = || in_body().map(|refused| refused.error.clone());
    let request_timeout = served.phase.request_timeout();
    let response = gateway.handle(request, &served.caller, request_timeout, broken).await;
    served.phase.answers(response.headers().get(REQUEST_ID));
    (response, Some(in_flight))
}

/// A response's body; with what hyper has taken of it goes the request's time.
struct Tracked {
    body: Body,
    sending: Option<(Busy, Option<InFlight>)>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let Some((busy, in_flight)) = self.sending.take() else {
            return;
        };
        // One that is cut is told of.
        if !busy.is_cut() {
            self.body.let_go();
        }
        busy.taken(in_flight);
    }
}

impl HttpBody for Tracked {
    type Data = Data;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

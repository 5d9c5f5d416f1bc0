//! Which trace a request and a flight belong to, what their spans say, and what of that upstream sees: nothing, unless
//! configured.
//!
//! ```text
//! GET …/TaskInfo        a poll
//! ├ cache               what was kept
//! ├ disk                the same, where the cache has nothing and the disk may
//! ├ shared store        the same, while nobody may ask upstream
//! └ flight              of the poll that opened it; who joined is linked to it
//!   ├ shared store      what other replicas have
//!   ├ wait for turn     in the account's queue
//!   ├ connect
//!   ├ wait for permit   paced
//!   └ query             upstream's answer; once more after a 429 or a broken connection
//! POST /api/v1/         what is streamed through, to its last byte
//! └ POST                upstream
//! probe                 on nobody's behalf, a trace of its own
//! └ query
//! ```
//! A request that names no trace begins one, but only once somebody wants to know: a hit that nobody logs or exports costs
//! nothing. No span says anything that a client sent, but for what has been checked: its method, task and request id.

use std::sync::OnceLock;

use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::{Gateway, Progress};
use crate::error::Error;
use crate::otlp::{Exporter, Kind, Span};
use crate::outcome::Served;
use crate::stored::Answer;
use crate::task::{Class, TaskId};
use crate::trace::{BAGGAGE, TRACEPARENT, TRACESTATE, TraceContext, TraceId};
use crate::upstream::TASK_INFO_PATH;

const ACCOUNT: &str = "crun_gateway.account";
const ATTEMPT: &str = "crun_gateway.attempt";
const CACHE: &str = "crun_gateway.cache";
const CODE: &str = "crun_gateway.code";
const DETAIL: &str = "crun_gateway.detail";
const OUTCOME: &str = "crun_gateway.outcome";
const REQUEST_ID: &str = "crun_gateway.request_id";
const TASK: &str = "crun_gateway.task";
/// OpenTelemetry's names (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>).
const METHOD: &str = "http.request.method";
const ROUTE: &str = "http.route";
const STATUS: &str = "http.response.status_code";

impl Gateway {
    /// The trace of a request, and where it is kept its span from here on.
    /// `told` is what the request says of it.
    pub(super) fn trace(
        &self,
        told: Option<TraceContext>,
        method: &Method,
        path: &str,
        request_id: &HeaderValue,
    ) -> Trace {
        let Some(exporter) = &self.exporter else {
            return Trace::without_span(told);
        };
        let config = self.config.load();
        let mut prefixes = config.passthrough.iter();
        let route = if path == TASK_INFO_PATH {
            Some(TASK_INFO_PATH)
        } else {
            prefixes.find(|prefix| path.starts_with(*prefix)).map(String::as_str)
        };
        let MethodName { in_span, attribute } = method_name(method);
        let name = route.map_or(in_span.to_owned(), |route| format!("{in_span} {route}"));
        let (context, span) = exporter.begin(told, &name, Kind::Server);
        if span.is_kept() {
            span.say(METHOD, attribute);
            if let Some(route) = route {
                span.say(ROUTE, route);
            }
            if !self.accounts.is_secret(request_id) {
                span.say(REQUEST_ID, request_id.to_str().unwrap_or_default());
            }
        }
        Trace {
            context: OnceLock::from(context),
            call: OnceLock::new(),
            span,
        }
    }

    /// What a poll asks for.
    pub(super) fn trace_task(&self, trace: &Trace, task: &TaskId) {
        let is_secret = || HeaderValue::from_str(task.as_str()).is_ok_and(|task| self.accounts.is_secret(&task));
        if trace.span.is_kept() && !is_secret() {
            trace.span.say(TASK, task.as_str());
        }
    }
}

/// A request's.
#[derive(Debug, Default)]
pub(super) struct Trace {
    context: OnceLock<TraceContext>,
    /// Upstream's part in a request that is streamed through; it ends first.
    call: OnceLock<Span>,
    span: Span,
}

impl Trace {
    /// What a request with these `headers` says, without a span.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        Self::without_span(TraceContext::of(headers))
    }

    fn without_span(told: Option<TraceContext>) -> Self {
        Self {
            context: told.map(OnceLock::from).unwrap_or_default(),
            ..Self::default()
        }
    }

    fn context(&self) -> TraceContext {
        *self.context.get_or_init(|| TraceContext::random(false))
    }

    /// What log lines show.
    pub(super) fn id(&self) -> TraceId {
        self.context().trace
    }

    /// Something that a poll waits for.
    pub(super) fn part(&self, name: &str) -> Span {
        self.span.child(name, Kind::Internal)
    }

    /// How a poll was answered.
    pub(super) fn answered(&self, account: &str, served: Served, code: u16) {
        self.span.say(ACCOUNT, account);
        self.span.say(CACHE, <&str>::from(served));
        self.span.say(CODE, code);
    }

    /// Why there was no answer of upstream's.
    pub(super) fn refused(&self, error: &Error) {
        self.span.say(DETAIL, error.detail());
        if let Some(call) = self.call.get() {
            failed(call, error);
        }
    }

    /// The HTTP status that the client gets.
    pub(super) fn ended(&self, status: StatusCode) {
        self.span.say(STATUS, status.as_u16());
        if status.is_server_error() {
            self.span.fail();
        }
    }

    /// Its answer has begun, and is not to be had.
    pub(super) fn broken(&self) {
        self.refused(&Error::UpstreamBroken);
        self.span.fail();
    }

    /// The trace of a flight that this request opens: the same.
    pub(super) fn flight(&self) -> FlightTrace {
        let span = self.span.child("flight", Kind::Internal);
        FlightTrace {
            context: span.context().unwrap_or_else(|| self.context()),
            span,
            step: Span::none(),
        }
    }

    /// It waits for a flight that somebody else opened.
    pub(super) fn joined(&self, progress: &Progress) {
        if let Some(flight) = progress.trace {
            self.span.link(flight);
        }
    }

    /// Upstream's part in a request that is streamed through, from here on.
    pub(super) fn call(&self, method: &Method) -> &Span {
        self.call.get_or_init(|| {
            let MethodName { in_span, attribute } = method_name(method);
            let call = self.span.child(in_span, Kind::Client);
            call.say(METHOD, attribute);
            call
        })
    }

    /// The status of upstream's answer to that.
    pub(super) fn passed(&self, status: StatusCode) {
        if let Some(call) = self.call.get() {
            said(call, status);
        }
    }
}

/// Settles what a request that is streamed through says of its trace: nothing, or, where `upstream.traceparent` allows it,
/// what the client said, as far as it is well-formed. Where that goes on with `call`, so does upstream.
pub(super) fn settle(headers: &mut HeaderMap, is_told: bool, call: &Span) {
    if !is_told {
        headers.remove(BAGGAGE);
    }
    if !is_told || TraceContext::of(headers).is_none() {
        headers.remove(TRACEPARENT);
        // Without the one the other means nothing (W3C Trace Context §3.3).
        headers.remove(TRACESTATE);
    }
    if let Some(call) = call.context().filter(|_| is_told).and_then(|call| call.header()) {
        headers.insert(TRACEPARENT, call);
    }
}

/// Why there was no whole answer of upstream's.
fn failed(call: &Span, error: &Error) {
    call.say(DETAIL, error.detail());
    call.fail();
}

/// The status of upstream's answer.
fn said(call: &Span, status: StatusCode) {
    call.say(STATUS, status.as_u16());
    if status.is_client_error() || status.is_server_error() {
        call.fail();
    }
}

/// A flight's: that of the request which opened it, or, for one on nobody's behalf, a new one.
#[derive(Debug)]
pub(super) struct FlightTrace {
    context: TraceContext,
    span: Span,
    /// What it does now.
    step: Span,
}

impl FlightTrace {
    /// A probe's, on nobody's behalf.
    pub(super) fn probe(exporter: Option<&Exporter>) -> Self {
        let none = || (TraceContext::random(false), Span::none());
        let (context, span) = exporter.map_or_else(none, |exporter| exporter.begin(None, "probe", Kind::Internal));
        Self {
            context,
            span,
            step: Span::none(),
        }
    }

    /// What log lines show.
    pub(super) fn id(&self) -> TraceId {
        self.context.trace
    }

    /// What the spans of those who join are linked to.
    pub(super) fn link(&self) -> Option<TraceContext> {
        self.span.context()
    }

    /// It goes on to `step`.
    pub(super) fn step(&mut self, step: &str) {
        // The one before ends first.
        self.step = Span::none();
        self.step = self.span.child(step, Kind::Internal);
    }

    /// It asks upstream.
    pub(super) fn query(&self, attempt: u32) -> Query {
        let span = self.span.child("query", Kind::Client);
        span.say(METHOD, "GET");
        span.say(ROUTE, TASK_INFO_PATH);
        span.say(ATTEMPT, attempt);
        let context = span.context().unwrap_or(self.context);
        Query { context, span }
    }

    /// It does nothing any more but to ask.
    pub(super) fn approached(&mut self) {
        self.step = Span::none();
    }
}

/// A query to upstream, until it is dropped.
pub(super) struct Query {
    /// What upstream is told, where `upstream.traceparent` allows it.
    pub(super) context: TraceContext,
    span: Span,
}

impl Query {
    pub(super) fn answered(&self, answer: &Answer, outcome: Class) {
        said(&self.span, answer.status());
        self.span.say(CODE, answer.code());
        self.span.say(OUTCOME, <&str>::from(outcome));
    }

    pub(super) fn failed(&self, error: &Error, outcome: Class) {
        failed(&self.span, error);
        self.span.say(OUTCOME, <&str>::from(outcome));
    }

    /// It was not sent: there was none.
    pub(super) fn unsent(mut self) {
        self.span.discard();
    }
}

/// What a method is called: a client may make up any.
pub(super) struct MethodName {
    /// In a span's name.
    in_span: &'static str,
    /// As a span's attribute, and in the log.
    pub(super) attribute: &'static str,
}

pub(super) fn method_name(method: &Method) -> MethodName {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
    let known = KNOWN.into_iter().find(|known| *known == method.as_str());
    MethodName {
        in_span: known.unwrap_or("HTTP"),
        attribute: known.unwrap_or("_OTHER"),
    }
}

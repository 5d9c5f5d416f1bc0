//! Which trace a request and a flight belong to, and what of that upstream sees: nothing, unless configured.
//!
//! A request that names no trace begins one, but only once somebody wants to know: a hit that nobody logs costs nothing.

use std::sync::OnceLock;

use http::{HeaderMap, HeaderValue};

use crate::trace::{BAGGAGE, TRACEPARENT, TRACESTATE, TraceContext, TraceId};

/// A request's.
#[derive(Debug, Default)]
pub(super) struct Trace(OnceLock<TraceContext>);

impl Trace {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        Self(TraceContext::of(headers).map(OnceLock::from).unwrap_or_default())
    }

    fn context(&self) -> TraceContext {
        *self.0.get_or_init(|| TraceContext::random(false))
    }

    /// What log lines show.
    pub(super) fn id(&self) -> TraceId {
        self.context().trace
    }

    /// The trace of a flight that this request opens: the same.
    pub(super) fn flight(&self) -> FlightTrace {
        FlightTrace {
            context: self.context(),
        }
    }
}

/// Settles what a request that is streamed through says of its trace: nothing, or, where `upstream.traceparent` allows it,
/// what the client said, as far as it is well-formed.
pub(super) fn settle(headers: &mut HeaderMap, is_told: bool) {
    if !is_told {
        headers.remove(BAGGAGE);
    }
    if !is_told || TraceContext::of(headers).is_none() {
        headers.remove(TRACEPARENT);
        // Without the one the other means nothing (§3.3).
        headers.remove(TRACESTATE);
    }
}

/// A flight's: that of the request which opened it, or, for one on nobody's behalf, a new one.
#[derive(Debug)]
pub(super) struct FlightTrace {
    context: TraceContext,
}

impl FlightTrace {
    pub(super) fn new() -> Self {
        Self {
            context: TraceContext::random(false),
        }
    }

    /// What log lines show.
    pub(super) fn id(&self) -> TraceId {
        self.context.trace
    }

    /// What upstream is told, where `upstream.traceparent` allows it.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        self.context.header()
    }
}

//! Requests whose clients have left before their answer was there: nobody gets one, but what was asked for upstream may have
//! been done, so that something has to tell of them.

use http::HeaderValue;

use super::Gateway;
use super::traced::Trace;

/// A request, for as long as it has no answer. Dropped then, it is counted and logged as one that was abandoned.
pub(super) struct Unanswered<'r> {
    gateway: &'r Gateway,
    request_id: &'r HeaderValue,
    trace: &'r Trace,
    is_poll: bool,
    has_answer: bool,
}

impl<'r> Unanswered<'r> {
    pub(super) fn new(gateway: &'r Gateway, request_id: &'r HeaderValue, trace: &'r Trace, is_poll: bool) -> Self {
        Self {
            gateway,
            request_id,
            trace,
            is_poll,
            has_answer: false,
        }
    }

    /// There is an answer, of whatever kind.
    pub(super) fn answered(mut self) {
        self.has_answer = true;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if self.has_answer {
            return;
        }
        // A poll costs upstream nothing that its flight does not tell of.
        if !self.is_poll {
            self.gateway.metrics.abandoned();
        }
        tracing::debug!(
            request_id = self.request_id.to_str().unwrap_or_default(),
            trace_id = %self.trace.id(),
            "{} abandoned: its client left before the answer",
            if self.is_poll { "poll" } else { "request" }
        );
    }
}

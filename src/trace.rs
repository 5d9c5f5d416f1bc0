//! Which trace a request belongs to: `traceparent`, as W3C Trace Context says (Level 1, <https://www.w3.org/TR/trace-context-1/>).
//!
//! What is not well-formed to the letter does not count, and a new trace begins: no id that a client made up reaches a log
//! or a collector in another form than this. What is done with a trace is `otlp`'s and the gateway's business.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

/// Which trace, and which span of it is the parent.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What tracing systems add to it.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// What an application adds to it (W3C Baggage).
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// `00-<trace>-<span>-<flags>`.
const LENGTH: usize = 55;
const SAMPLED: u8 = 1;

/// A trace: 16 bytes, not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

/// A span: 8 bytes, not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanId([u8; 8]);

/// A span, and the trace that it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace: TraceId,
    /// The span of it that is the parent of what follows.
    pub span: SpanId,
    /// Whether its spans are to be kept.
    pub is_sampled: bool,
}

impl TraceId {
    /// A new one. All of it but six bits is random, the last seven bytes entirely.
    pub fn random() -> Self {
        Self(Uuid::new_v4().into_bytes())
    }

    /// Where it stands among all traces, from 0 up to 1: the same for everybody who has to decide whether to keep it.
    pub fn position(&self) -> f64 {
        let low = self.0[9..].iter().fold(0, |low: u64, byte| low << 8 | u64::from(*byte));
        #[allow(clippy::cast_precision_loss, reason = "a ratio of traces needs no 56 bits")]
        let position = low as f64 / (1_u64 << 56) as f64;
        position
    }
}

impl SpanId {
    /// A new one.
    pub fn random() -> Self {
        let [bytes @ .., _, _, _, _, _, _, _, _] = Uuid::new_v4().into_bytes();
        Self(bytes)
    }
}

impl TraceContext {
    /// A new trace, of which nobody else knows.
    pub fn random(is_sampled: bool) -> Self {
        Self {
            trace: TraceId::random(),
            span: SpanId::random(),
            is_sampled,
        }
    }

    /// The one that a request names, if it does, once, and well-formed.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        Self::among(headers.get_all(TRACEPARENT).iter().map(HeaderValue::as_bytes))
    }

    /// The one that a request names, of what stands in each of its `traceparent`s.
    pub fn among<'v>(mut named: impl Iterator<Item = &'v [u8]>) -> Option<Self> {
        let (Some(first), None) = (named.next(), named.next()) else {
            return None;
        };
        Self::parse(first)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        // What a later version adds comes behind, and after another dash.
        let (known, added) = text.split_at_checked(LENGTH)?;
        let [version] = hex(&known[..2])?;
        let is_well_formed = match version {
            0 => added.is_empty(),
            0xff => false,
            _ => added.first().is_none_or(|byte| *byte == b'-'),
        };
        if !is_well_formed || [known[2], known[35], known[52]] != *b"---" {
            return None;
        }
        let (trace, span, [flags]) = (hex(&known[3..35])?, hex(&known[36..52])?, hex(&known[53..])?);
        (trace != [0; 16] && span != [0; 8]).then_some(Self {
            trace: TraceId(trace),
            span: SpanId(span),
            is_sampled: flags & SAMPLED != 0,
        })
    }

    /// As it is sent on.
    pub fn header(&self) -> Option<HeaderValue> {
        let Self {
            trace,
            span,
            is_sampled,
        } = self;
        HeaderValue::try_from(format!("00-{trace}-{span}-{:02x}", u8::from(*is_sampled))).ok()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

/// Bytes in lower-case hexadecimal, twice as many digits.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn parse(text: &str) -> Option<TraceContext> {
        TraceContext::parse(text.as_bytes())
    }

    #[test]
    fn the_recommendations_example_is_read() {
        let context = parse(EXAMPLE).unwrap();
        assert_eq!(context.trace.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span.to_string(), "00f067aa0ba902b7");
        assert!(context.is_sampled);
        assert_eq!(context.header().unwrap(), EXAMPLE);
    }

    #[test]
    fn of_the_flags_only_sampled_counts() {
        for (flags, is_sampled) in [("00", false), ("01", true), ("02", false), ("03", true), ("ff", true)] {
            let context = parse(&format!("{}{flags}", &EXAMPLE[..53])).unwrap();
            assert_eq!(context.is_sampled, is_sampled, "{flags}");
        }
    }

    #[test]
    fn what_is_not_well_formed_does_not_count() {
        for text in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-001",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00F067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0A",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7_01",
            "0g-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            " 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.more",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        for text in [
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-will-be-like",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
        ] {
            assert_eq!(parse(text), parse(EXAMPLE), "{text}");
        }
    }

    #[test]
    fn a_request_that_names_two_names_none() {
        let mut headers = HeaderMap::new();
        assert_eq!(TraceContext::of(&headers), None);
        headers.append(TRACEPARENT, HeaderValue::from_static(EXAMPLE));
        assert_eq!(TraceContext::of(&headers), parse(EXAMPLE));
        headers.append(TRACEPARENT, HeaderValue::from_static(EXAMPLE));
        assert_eq!(TraceContext::of(&headers), None);
    }

    #[test]
    fn a_new_one_is_well_formed_and_new() {
        for is_sampled in [false, true] {
            let context = TraceContext::random(is_sampled);
            assert_eq!(TraceContext::parse(context.header().unwrap().as_bytes()), Some(context));
            assert_ne!(TraceContext::random(is_sampled), context);
        }
    }

    #[test]
    fn positions_are_spread_evenly() {
        let below = (0..10_000).filter(|_| TraceId::random().position() < 0.25).count();
        assert!((2000..3000).contains(&below), "{below}");
        assert!(TraceId([0xff; 16]).position() <= 1.0 && TraceId([0; 16]).position().abs() < f64::EPSILON);
    }

    proptest! {
        #[test]
        fn nothing_is_read_that_is_not_written_so(text in "\\PC{0,80}|[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}") {
            if let Some(context) = parse(&text) {
                let written = context.header().unwrap();
                prop_assert_eq!(&written.as_bytes()[3..53], &text.as_bytes()[3..53]);
            }
        }
    }
}

//! One span: begun, told of, and ended when it is dropped. Where nobody exports it, it is nothing, and costs nothing.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Exporter;
use crate::moment::unix_now;
use crate::trace::{SpanId, TraceContext};

/// A part of a request's life, that goes on until this is dropped.
#[derive(Debug, Default)]
pub struct Span(Option<Box<Open>>);

#[derive(Debug)]
struct Open {
    exporter: Exporter,
    began: Instant,
    /// When it began, by the wall clock.
    began_unix: Duration,
    context: TraceContext,
    parent: Option<SpanId>,
    name: String,
    kind: Kind,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    attributes: Vec<(&'static str, Value)>,
    links: Vec<TraceContext>,
    has_failed: bool,
}

/// What a span stands for: its number in OTLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Something within.
    Internal = 1,
    /// A request that was answered.
    Server = 2,
    /// A request that was made.
    Client = 3,
}

/// What is said of a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// In words.
    Text(String),
    /// In a number.
    Number(u64),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u16> for Value {
    fn from(number: u16) -> Self {
        Self::Number(number.into())
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

/// A span that has ended, as it is exported.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) context: TraceContext,
    pub(super) parent: Option<SpanId>,
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Since 1970.
    pub(super) began: Duration,
    pub(super) took: Duration,
    pub(super) attributes: Vec<(&'static str, Value)>,
    pub(super) links: Vec<TraceContext>,
    pub(super) has_failed: bool,
}

impl Span {
    /// One that nobody exports.
    pub fn none() -> Self {
        Self(None)
    }

    pub(super) fn begin(
        exporter: &Exporter,
        context: TraceContext,
        parent: Option<SpanId>,
        name: String,
        kind: Kind,
    ) -> Self {
        Self(Some(Box::new(Open {
            exporter: exporter.clone(),
            began: Instant::now(),
            began_unix: unix_now(),
            context,
            parent,
            name,
            kind,
            said: Mutex::default(),
        })))
    }

    /// A part of this one.
    #[must_use]
    pub fn child(&self, name: &str, kind: Kind) -> Self {
        let Some(open) = &self.0 else { return Self(None) };
        let context = TraceContext {
            span: SpanId::random(),
            ..open.context
        };
        Self::begin(&open.exporter, context, Some(open.context.span), name.to_owned(), kind)
    }

    /// Whether anybody will hear of it.
    pub fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// What others may name it by.
    pub fn context(&self) -> Option<TraceContext> {
        self.0.as_ref().map(|open| open.context)
    }

    /// Says something of it, in place of what was said by that name. Never a key, and of what a client sent only what has
    /// been checked.
    pub fn say<V: Into<Value>>(&self, name: &'static str, value: V) {
        self.with(|said| {
            said.attributes.retain(|(known, _)| *known != name);
            said.attributes.push((name, value.into()));
        });
    }

    /// It had to do with another one, of this trace or not.
    pub fn link(&self, other: TraceContext) {
        self.with(|said| said.links.push(other));
    }

    /// It failed.
    pub fn fail(&self) {
        self.with(|said| said.has_failed = true);
    }

    /// Nothing of it is told.
    pub fn discard(&mut self) {
        self.0 = None;
    }

    fn with(&self, tell: impl FnOnce(&mut Said)) {
        if let Some(open) = &self.0 {
            tell(&mut open.said.lock());
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(open) = self.0.take() else { return };
        let Said {
            attributes,
            links,
            has_failed,
        } = open.said.into_inner();
        open.exporter.export(Ended {
            context: open.context,
            parent: open.parent,
            name: open.name,
            kind: open.kind,
            began: open.began_unix,
            took: open.began.elapsed(),
            attributes,
            links,
            has_failed,
        });
    }
}

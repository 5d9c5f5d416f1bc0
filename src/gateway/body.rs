//! What a response's body is made of: bytes that are there, or upstream's as they come, of which something is told when they
//! end too early.

use std::borrow::Cow;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderValue;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::traced::Trace;
use crate::stored::Answer;
use crate::upstream::Streamed;

/// A response's body: bytes that are there, or upstream's as they come.
#[derive(Debug)]
pub enum Body {
    /// Bytes that are there, until they are taken.
    Whole(Option<Data>),
    /// Upstream's, as they come.
    Streamed(Streamed, Box<StreamLog>),
}

/// What is told of an answer that is streamed through, to its last byte.
#[derive(Debug)]
pub struct StreamLog {
    request_id: HeaderValue,
    has_broken_off: bool,
    trace: Trace,
}

impl StreamLog {
    /// Upstream has broken off, and its status is with the client already.
    fn breaks_off(&mut self, error: &hyper::Error) {
        self.has_broken_off = true;
        tracing::info!(
            request_id = self.request_id.to_str().unwrap_or_default(),
            trace_id = %self.trace.id(),
            %error,
            "answer broken off"
        );
        self.trace.broken();
    }
}

impl Body {
    /// Upstream's, in answer to the request that is called `request_id`.
    pub(super) fn streamed(body: Streamed, request_id: HeaderValue) -> Self {
        let told = StreamLog {
            request_id,
            has_broken_off: false,
            trace: Trace::default(),
        };
        Self::Streamed(body, Box::new(told))
    }

    /// The request's trace goes on with the answer, where that is streamed through.
    pub(super) fn carry(&mut self, trace: Trace) {
        if let Self::Streamed(_, told) = self {
            told.trace = trace;
        }
    }

    /// Tells of an answer that is streamed through, where whoever was to have it takes no more of it.
    pub fn let_go(&self) {
        if let Self::Streamed(body, told) = self
            && !body.is_whole()
            && !told.has_broken_off
        {
            tracing::info!(
                request_id = told.request_id.to_str().unwrap_or_default(),
                trace_id = %told.trace.id(),
                "answer abandoned: its connection ended before it did"
            );
        }
    }

    /// The bytes that are there.
    pub fn take(&mut self) -> Option<Data> {
        match self {
            Self::Whole(data) => data.take(),
            Self::Streamed(..) => None,
        }
    }
}

impl HttpBody for Body {
    type Data = Data;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, hyper::Error>>> {
        match self.get_mut() {
            Self::Whole(data) => Poll::Ready(data.take().map(|data| Ok(Frame::data(data)))),
            Self::Streamed(body, told) => {
                let bytes = ready!(Pin::new(body).poll_frame(cx));
                if let Some(Err(error)) = &bytes {
                    told.breaks_off(error);
                }
                Poll::Ready(bytes.map(|bytes| bytes.map(|frame| frame.map_data(Data::Bytes))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(data) => data.as_ref().is_none_or(|data| !data.has_remaining()),
            Self::Streamed(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(data) => SizeHint::with_exact(data.as_ref().map_or(0, Data::remaining) as u64),
            Self::Streamed(body, _) => body.size_hint(),
        }
    }
}

/// Bytes on their way out.
#[derive(Debug)]
pub enum Data {
    /// Bytes of their own.
    Bytes(Bytes),
    /// What is left of an answer's that is not packed: the cache keeps no counter of its own beside each body for those who
    /// send it.
    Of {
        /// Whose bytes.
        answer: Answer,
        /// So many are sent.
        at: usize,
    },
}

impl From<Answer> for Data {
    fn from(answer: Answer) -> Self {
        if let Cow::Owned(body) = answer.body() {
            return Self::Bytes(body.into());
        }
        Self::Of { answer, at: 0 }
    }
}

impl Buf for Data {
    fn remaining(&self) -> usize {
        self.chunk().len()
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Of { answer, at } => match answer.body() {
                Cow::Borrowed(body) => body.get(*at..).unwrap_or_default(),
                // None such: `from` has unpacked it.
                Cow::Owned(_) => &[],
            },
        }
    }

    fn advance(&mut self, sent: usize) {
        match self {
            Self::Bytes(bytes) => bytes.advance(sent),
            Self::Of { at, .. } => *at += sent,
        }
    }
}

//! Spans to an OpenTelemetry collector: OTLP over HTTP, in JSON (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).
//!
//! Nothing here holds up a request: an ended span goes into a bounded queue, or is dropped and counted. One task sends
//! batches; while the collector cannot be reached it keeps the one that it has, tries again, and the queue fills. Without
//! `otlp.endpoint` there is no exporter, and no span is ever made. What spans say is `gateway`'s business.

mod collector;
mod payload;
mod span;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use prometheus::IntCounter;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config;
use crate::metrics::{Metrics, SpanDrop};
use crate::panics::supervise;
use crate::trace::{TraceContext, TraceId};
use collector::{Collector, Said};
use span::Ended;
pub use span::{Kind, Span, Value};

/// Ended spans that wait to be sent: some 3 MB.
const MOST_WAITING: usize = 4096;

/// Spans of one request, and how long the first of them waits for the others. OpenTelemetry's batch span processor has
/// the same, but for 5 s: whoever looks for a trace has just made it.
const MOST_IN_BATCH: usize = 512;
const BATCH_DELAY: Duration = Duration::from_secs(1);

/// Between two tries, twice as long each time. OpenTelemetry's Collector waits as long at most, and 5 s at first: here the
/// queue fills meanwhile.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

/// The way to the collector. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Exporter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    queue: mpsc::Sender<Ended>,
    queue_full: IntCounter,
    sample_ratio: f64,
    closing: CancellationToken,
    closed: CancellationToken,
}

impl Exporter {
    /// The exporter that `settings` name, if they do.
    ///
    /// # Errors
    /// When `otlp.endpoint` cannot be used.
    ///
    /// # Panics
    /// Outside a tokio runtime: what sends is spawned here.
    pub fn start(settings: &config::Otlp, metrics: &Metrics) -> anyhow::Result<Option<Self>> {
        let Some(endpoint) = &settings.endpoint else {
            return Ok(None);
        };
        let (queue, ended) = mpsc::channel(MOST_WAITING);
        let (closing, closed) = (CancellationToken::new(), CancellationToken::new());
        let mut sender = Sender {
            queue: ended,
            batch: Vec::new(),
            collector: Collector::new(endpoint, settings)?,
            instance: Uuid::new_v4().to_string(),
            timeout: settings.timeout,
            closing: closing.clone(),
            exported: metrics.spans_exported.clone(),
            refused: metrics.spans_dropped(SpanDrop::Refused),
            unsent: metrics.spans_dropped(SpanDrop::Unsent),
            is_failing: false,
        };
        let done = closed.clone().drop_guard();
        let sending = supervise("spans", async move || sender.run().await);
        tokio::spawn(sending.map(|()| drop(done)));
        Ok(Some(Self(Arc::new(Inner {
            queue,
            queue_full: metrics.spans_dropped(SpanDrop::QueueFull),
            sample_ratio: settings.sample_ratio,
            closing,
            closed,
        }))))
    }

    /// A span of what `came` names, or of a new trace; and what others are to name. Whether the trace is kept was decided
    /// where it began; where that is here, by `otlp.sample_ratio`.
    pub fn begin(&self, came: Option<TraceContext>, name: &str, kind: Kind) -> (TraceContext, Span) {
        let mut context = TraceContext::random(false);
        if let Some(came) = came {
            (context.trace, context.is_sampled) = (came.trace, came.is_sampled);
        } else {
            context.is_sampled = self.samples(context.trace);
        }
        if !context.is_sampled {
            return (came.unwrap_or(context), Span::none());
        }
        let parent = came.map(|came| came.span);
        (context, Span::begin(self, context, parent, name.to_owned(), kind))
    }

    fn samples(&self, trace: TraceId) -> bool {
        self.0.sample_ratio >= 1.0 || trace.position() < self.0.sample_ratio
    }

    fn export(&self, ended: Ended) {
        if self.0.queue.try_send(ended).is_err() {
            self.0.queue_full.inc();
        }
    }

    /// Sends what has ended so far, each span once; after that nothing more is.
    ///
    /// Cancel safe.
    pub async fn close(&self) {
        self.0.closing.cancel();
        self.0.closed.cancelled().await;
    }
}

/// The one that sends.
struct Sender {
    queue: mpsc::Receiver<Ended>,
    batch: Vec<Ended>,
    collector: Collector,
    instance: String,
    timeout: Duration,
    closing: CancellationToken,
    exported: IntCounter,
    refused: IntCounter,
    unsent: IntCounter,
    /// It was said that the collector cannot be reached.
    is_failing: bool,
}

impl Sender {
    async fn run(&mut self) {
        // What it panicked over is not tried again.
        self.unsent.inc_by(self.batch.len() as u64);
        self.batch.clear();
        while !self.closing.is_cancelled() {
            tokio::select! {
                () = self.closing.cancelled() => break,
                came = self.queue.recv_many(&mut self.batch, MOST_IN_BATCH) => if came == 0 { break },
            }
            let until = Instant::now() + BATCH_DELAY;
            while self.batch.len() < MOST_IN_BATCH {
                let room = MOST_IN_BATCH - self.batch.len();
                tokio::select! {
                    () = self.closing.cancelled() => break,
                    came = timeout_at(until, self.queue.recv_many(&mut self.batch, room)) => {
                        if matches!(came, Ok(0) | Err(_)) { break }
                    }
                }
            }
            self.send().await;
            self.batch.clear();
        }
        self.queue.close();
        while self.queue.recv_many(&mut self.batch, MOST_IN_BATCH).await > 0 {
            self.send().await;
            self.batch.clear();
        }
    }

    /// Sends the batch, again and again until the collector has an answer to it, or it is time to end.
    async fn send(&mut self) {
        let (spans, body) = (
            self.batch.len() as u64,
            Bytes::from(payload::request(&self.batch, &self.instance)),
        );
        let mut backoff = FIRST_BACKOFF;
        loop {
            let failure = match timeout(self.timeout, self.collector.post(body.clone())).await {
                Ok(Ok(Said::Accepted { rejected })) => {
                    let rejected = rejected.min(spans);
                    self.exported.inc_by(spans - rejected);
                    self.refused.inc_by(rejected);
                    if self.is_failing {
                        tracing::info!("the collector takes spans again");
                        self.is_failing = false;
                    }
                    return;
                }
                Ok(Ok(Said::Refused(status))) => {
                    self.refused.inc_by(spans);
                    self.fails(&format!("it refuses them: {status}"));
                    return;
                }
                Ok(Ok(Said::Later(status, wait))) => {
                    if let Some(wait) = wait {
                        backoff = wait.clamp(FIRST_BACKOFF, LONGEST_BACKOFF);
                    }
                    status.to_string()
                }
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => "no answer within otlp.timeout".to_owned(),
            };
            self.fails(&failure);
            if self.closing.is_cancelled() {
                return self.unsent.inc_by(spans);
            }
            tokio::select! {
                () = sleep(backoff) => backoff = (backoff * 2).min(LONGEST_BACKOFF),
                () = self.closing.cancelled() => {}
            }
        }
    }

    fn fails(&mut self, error: &str) {
        // Once for as long as it lasts.
        if !self.is_failing {
            tracing::warn!(error, "the collector (otlp.endpoint) does not take spans");
        }
        self.is_failing = true;
    }
}

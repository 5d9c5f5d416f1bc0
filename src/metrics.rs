//! What Prometheus sees: one struct with every family, no globals, handles resolved once per account.
//!
//! Names follow prometheus.io/docs/practices/naming. Labels come from closed sets only: configured account names and
//! `other`, and enums, whose variants' names they are: to rename one renames a series. Every series exists at 0 from the
//! start, so that a first error is an increase.

mod disk;
mod families;
mod pulled;
mod shared;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    Encoder, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder,
};
use strum::{AsRefStr, VariantArray};

use crate::outcome::{EdgeRefusal, Lane, Served, Shed};
use crate::task::Class;
pub use disk::{DiskMetrics, DiskRead, DiskStep};
use families::{Families, opts};
use pulled::Pulled;
pub use shared::{SharedCacheMetrics, SharedCall, SharedFlight, SharedMetrics, SharedRead, SharedWrite};

/// The label of every account, and every client, that configuration does not name.
pub const OTHER: &str = "other";

/// From a hit's tens of microseconds to the longest that a poll may wait.
const REQUEST_BUCKETS: &[f64] = &[
    0.0001, 0.0005, 0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0,
];

/// An attempt is bounded by `upstream.timeout`, 8 s unless configured.
const UPSTREAM_BUCKETS: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0];

/// One emission interval is 0.07 s; 2 s is where the saturation alert looks.
const WAIT_BUCKETS: &[f64] = &[0.005, 0.035, 0.07, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 7.0, 10.0, 30.0];

/// Why an answer left the cache before its time, or at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Eviction {
    /// The cache was full.
    Size,
    /// It was kept as long as it may be.
    Expired,
    /// Its account held more than half of a cache that others needed.
    AccountShare,
}

/// Why a client's TLS handshake came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum HandshakeFailure {
    /// `limits.header_timeout` passed first.
    Timeout,
    /// The client spoke HTTP without TLS.
    PlainHttp,
    /// The client's certificate was missing, or nobody vouches for it.
    ClientCertificate,
    /// The client refused, mostly the gateway's certificate.
    RefusedByClient,
    /// What came is not TLS, or none that is spoken here.
    Protocol,
    /// The client left.
    Closed,
}

/// Why an ended span did not reach the collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SpanDrop {
    /// Too many were waiting: the collector is slow, or away.
    QueueFull,
    /// The collector will not take it.
    Refused,
    /// The process ended first, or a panic lost them.
    Unsent,
}

/// The place of an HTTP-like code's class among [`CODE_CLASSES`].
fn code_class(code: u16) -> usize {
    match code {
        200..300 => 0,
        300..400 => 1,
        400..500 => 2,
        500..600 => 3,
        _ => 4,
    }
}

const CODE_CLASSES: [&str; 5] = ["2xx", "3xx", "4xx", "5xx", "other"];

/// The code of those who left before the answer, a class of its own: no client was told it, and no other 4xx may have been
/// carried out. nginx's word.
const ABANDONED: &str = "499";

/// Every family.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    request_duration: Vec<Histogram>,
    upstream_requests: IntCounterVec,
    /// One attempt, from permit to the last byte.
    pub upstream_request_duration: Histogram,
    /// Connections to upstream that could not be opened: attempts that were never made, and cost nothing.
    pub upstream_connect_failures: IntCounter,
    upstream_calls_saved: IntCounterVec,
    budget_wait: HistogramVec,
    budget_queue_length: IntGaugeVec,
    budget_rate: prometheus::GaugeVec,
    budget_shed: IntCounterVec,
    upstream_paused: IntGaugeVec,
    upstream_keys_refused: IntGaugeVec,
    upstream_credits_missing: IntGaugeVec,
    /// 1 while the breaker is open or half-open.
    pub upstream_breaker_open: IntGauge,
    live_tasks: IntGaugeVec,
    freshness: prometheus::GaugeVec,
    /// Answers kept.
    pub cache_entries: IntGauge,
    /// What they weigh.
    pub cache_bytes: IntGauge,
    cache_evictions: IntCounterVec,
    /// Of answers kept on disk.
    pub disk: DiskMetrics,
    passthrough_requests: Vec<IntCounter>,
    passthrough_abandoned: IntCounter,
    /// 0 while the configuration last read is wrong; else 1, also while fields of it wait for a restart.
    pub config_reload_success: IntGauge,
    /// When one was last taken over, in seconds since 1970.
    pub config_reload_timestamp: prometheus::Gauge,
    refused: IntCounterVec,
    /// Requests that are being answered.
    pub requests_in_flight: IntGauge,
    /// Panics, wherever they were.
    pub panics: IntCounter,
    /// Client connections open now.
    pub connections: IntGauge,
    /// As many are let in.
    connections_limit: IntGauge,
    /// Upstream connections open now.
    pub upstream_connections: IntGauge,
    tls_handshake_failures: IntCounterVec,
    /// 0 while what the files of `tls` hold was refused, and what was served before still is.
    pub tls_reload_success: IntGauge,
    /// Spans that the collector took.
    pub spans_exported: IntCounter,
    spans_dropped: IntCounterVec,
    /// Without labels, and without a value while there is no certificate: 0 would have expired in 1970.
    tls_certificate_expiry: IntGaugeVec,
}

impl Metrics {
    /// Every family, registered and at 0.
    ///
    /// # Errors
    /// Only for a bug: a name that Prometheus refuses or that is registered twice.
    #[allow(clippy::too_many_lines, reason = "one entry a family, and nothing else")]
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let make = Families(&registry);
        let build_info: IntGaugeVec = make.gauges("build_info", "The version that runs; always 1.", &["version"])?;
        build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let request_duration = make.histograms(
            "request_duration_seconds",
            "From a poll's arrival to its answer.",
            REQUEST_BUCKETS,
            &["cache"],
        )?;
        let passthrough = make.counters(
            "passthrough_requests_total",
            "Requests for other paths than TaskInfo, streamed through or refused, by the answer's class; 499: left before it.",
            &["code"],
        )?;
        let metrics = Self {
            requests: make.counters(
                "requests_total",
                "Polls answered, by how and with what.",
                &["account", "client", "cache", "code"],
            )?,
            request_duration: Served::VARIANTS
                .iter()
                .map(|served| request_duration.with_label_values(&[served]))
                .collect(),
            upstream_requests: make.counters(
                "upstream_requests_total",
                "Attempts made upstream, each paid from the budget, by what came of them.",
                &["account", "outcome"],
            )?,
            upstream_request_duration: make.histogram(
                "upstream_request_duration_seconds",
                "One attempt, from its permit to the last byte.",
                UPSTREAM_BUCKETS,
            )?,
            upstream_connect_failures: make.counter(
                "upstream_connect_failures_total",
                "Connections to upstream that could not be opened: name, TCP, TLS, or too slow.",
            )?,
            upstream_calls_saved: make.counters(
                "upstream_calls_saved_total",
                "Polls that opened no flight of their own, by why.",
                &["account", "how"],
            )?,
            budget_wait: make.histograms(
                "budget_wait_seconds",
                "How long flights waited for a permit.",
                WAIT_BUCKETS,
                &["account", "lane"],
            )?,
            budget_queue_length: make.gauges(
                "budget_queue_length",
                "Flights that wait for a permit.",
                &["account", "lane"],
            )?,
            budget_rate: make.gauges(
                "budget_rate",
                "Permits a second that the account's pace allows; the lowest where accounts share a label.",
                &["account"],
            )?,
            budget_shed: make.counters(
                "budget_shed_total",
                "Polls turned away by the budget, by why.",
                &["account", "reason"],
            )?,
            upstream_paused: make.gauges(
                "upstream_paused",
                "Accounts paused by an upstream 429.",
                &["account"],
            )?,
            upstream_keys_refused: make.gauges(
                "upstream_keys_refused",
                "Keys that upstream refused when it was last asked.",
                &["account"],
            )?,
            upstream_credits_missing: make.gauges(
                "upstream_credits_missing",
                "Accounts for which upstream's last word was missing credits (402).",
                &["account"],
            )?,
            upstream_breaker_open: make.gauge(
                "upstream_breaker_open",
                "1 while upstream is taken to be unavailable and only probed, else 0.",
            )?,
            live_tasks: make.gauges(
                "live_tasks",
                "Tasks that go on and that somebody has lately asked for.",
                &["account"],
            )?,
            freshness: make.gauges(
                "freshness_seconds",
                "How long a live task's answer is fresh; the longest where accounts share a label.",
                &["account"],
            )?,
            cache_entries: make.gauge("cache_entries", "Answers kept.")?,
            cache_bytes: make.gauge("cache_bytes", "What the kept answers weigh.")?,
            cache_evictions: make.counters_by::<Eviction>(
                "cache_evictions_total",
                "Answers that left the cache, by why.",
                "cause",
            )?,
            disk: DiskMetrics::new(&make)?,
            passthrough_requests: CODE_CLASSES
                .iter()
                .map(|class| passthrough.with_label_values(&[class]))
                .collect(),
            passthrough_abandoned: passthrough.with_label_values(&[ABANDONED]),
            config_reload_success: make.gauge(
                "config_reload_success",
                "0 while the configuration last read is wrong, and the one before is in force; else 1, also while fields of it wait \
                 for a restart.",
            )?,
            config_reload_timestamp: make.gauge(
                "config_reload_timestamp_seconds",
                "When a configuration was last taken over, in seconds since 1970.",
            )?,
            refused: make.counters_by::<EdgeRefusal>(
                "refused_total",
                "Requests and connections that went no further, by why.",
                "reason",
            )?,
            requests_in_flight: make.gauge("requests_in_flight", "Requests that are being answered.")?,
            panics: make.counter("panics_total", "Panics, by a bug or for want of a thread.")?,
            connections: make.gauge("connections", "Client connections open.")?,
            connections_limit: make.gauge(
                "connections_limit",
                "Client connections that are let in: limits.connections, or fewer for want of file descriptors.",
            )?,
            upstream_connections: make.gauge("upstream_connections", "Upstream connections open.")?,
            tls_handshake_failures: make.counters_by::<HandshakeFailure>(
                "tls_handshake_failures_total",
                "Clients' TLS handshakes that came to nothing, by why.",
                "reason",
            )?,
            tls_reload_success: make.gauge(
                "tls_reload_success",
                "0 while what the files of tls hold was refused and the certificate before is served, else 1.",
            )?,
            spans_exported: make.counter("spans_exported_total", "Spans that the collector took.")?,
            spans_dropped: make.counters_by::<SpanDrop>(
                "spans_dropped_total",
                "Spans that did not reach the collector, by why.",
                "reason",
            )?,
            tls_certificate_expiry: make.gauges(
                "tls_certificate_expiry_timestamp_seconds",
                "When the certificate that clients are shown, or one of its intermediates, expires.",
                &[],
            )?,
            registry,
        };
        metrics.tls_reload_success.set(1);
        Ok(metrics)
    }

    /// So many client connections are let in from now on.
    pub fn lets_in(&self, connections: usize) {
        self.connections_limit
            .set(i64::try_from(connections).unwrap_or(i64::MAX));
    }

    /// The counter of spans that did not reach the collector.
    pub fn spans_dropped(&self, why: SpanDrop) -> IntCounter {
        self.spans_dropped.with_label_values(&[why])
    }

    /// Counts a client's handshake that came to nothing.
    pub fn handshake_failed(&self, why: HandshakeFailure) {
        self.tls_handshake_failures.with_label_values(&[why]).inc();
    }

    /// A certificate that expires then is served from now on.
    pub fn tls_serves(&self, expires: SystemTime) {
        let seconds = expires.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let expiry = self.tls_certificate_expiry.with_label_values::<&str>(&[]);
        expiry.set(i64::try_from(seconds).unwrap_or(i64::MAX));
        self.tls_reload_success.set(1);
    }

    /// The handles of a process that shares its budgets with up to `max_replicas`, and stands in one of `standings`:
    /// families that others do not have.
    ///
    /// # Errors
    /// When it was asked for before.
    pub fn shared(
        &self,
        max_replicas: u32,
        standings: impl IntoIterator<Item = &'static str>,
    ) -> prometheus::Result<SharedMetrics> {
        SharedMetrics::new(&Families(&self.registry), max_replicas, standings)
    }

    /// The handles of a process that shares answers and flights: families that others do not have.
    ///
    /// # Errors
    /// When it was asked for before.
    pub fn shared_cache(&self) -> prometheus::Result<SharedCacheMetrics> {
        SharedCacheMetrics::new(&Families(&self.registry))
    }

    /// The handles of one account; those of every unlisted account are the same ones, under `other`.
    pub fn account(&self, account: &str) -> AccountMetrics {
        let lanes = || Lane::VARIANTS.iter().map(|lane| [account, lane.as_ref()]);
        AccountMetrics {
            request_duration: self.request_duration.clone(),
            // Classes with one word share a series.
            upstream_requests: Class::VARIANTS
                .iter()
                .map(|outcome| self.upstream_requests.with_label_values(&[account, outcome.as_ref()]))
                .collect(),
            upstream_request_duration: self.upstream_request_duration.clone(),
            saved: Served::SAVING
                .map(|served| self.upstream_calls_saved.with_label_values(&[account, served.as_ref()])),
            budget_wait: lanes().map(|lane| self.budget_wait.with_label_values(&lane)).collect(),
            queue_length: lanes()
                .map(|lane| self.budget_queue_length.with_label_values(&lane))
                .collect(),
            rate: self.budget_rate.with_label_values(&[account]),
            shed: Shed::VARIANTS
                .iter()
                .map(|reason| self.budget_shed.with_label_values(&[account, reason.as_ref()]))
                .collect(),
            paused: self.upstream_paused.with_label_values(&[account]),
            keys_refused: self.upstream_keys_refused.with_label_values(&[account]),
            credits_missing: self.upstream_credits_missing.with_label_values(&[account]),
            live_tasks: self.live_tasks.with_label_values(&[account]),
            freshness: self.freshness.with_label_values(&[account]),
        }
    }

    /// Shows no longer what only a listed account has: its rate, live tasks and freshness lifetime. Handles that are still
    /// about set nothing that is shown.
    pub fn forget(&self, account: &str) {
        // One that is not there is forgotten already.
        let _ = self.budget_rate.remove_label_values(&[account]);
        let _ = self.live_tasks.remove_label_values(&[account]);
        let _ = self.freshness.remove_label_values(&[account]);
    }

    /// The handles of one client of an account, those that configuration does not name under `other`.
    pub fn client(&self, account: &str, client: &str) -> ClientRequests {
        let of = |served: &Served| {
            CODE_CLASSES.map(|class| {
                let labels = [account, client, served.as_ref(), class];
                self.requests.with_label_values(&labels)
            })
        };
        ClientRequests(Served::VARIANTS.iter().map(of).collect())
    }

    /// Counts an answer that left the cache.
    pub fn evicted(&self, cause: Eviction) {
        self.cache_evictions.with_label_values(&[cause]).inc();
    }

    /// Counts a request or a connection that went no further.
    pub fn refused(&self, reason: EdgeRefusal) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// Counts a request for another path than TaskInfo: streamed through, or refused.
    pub fn passed_through(&self, code: u16) {
        self.passthrough_requests[code_class(code)].inc();
    }

    /// Counts a request for another path than `TaskInfo` whose client has left before the answer.
    pub fn abandoned(&self) {
        self.passthrough_abandoned.inc();
    }

    /// Shows how many lines the log has dropped: `count` is read whenever Prometheus asks.
    ///
    /// # Errors
    /// Only for a bug: it is shown already.
    pub fn log_lines_dropped(&self, count: impl Fn() -> u64 + Send + Sync + 'static) -> prometheus::Result<()> {
        let help = "Lines that the log dropped: nobody read the ones before, or could.";
        let dropped = Pulled::new(opts("log_lines_dropped_total", help), count)?;
        self.registry.register(Box::new(dropped))
    }

    /// The text that Prometheus scrapes.
    ///
    /// # Errors
    /// Only for a bug: a family that cannot be encoded.
    pub fn render(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    /// The media type of [`Self::render`].
    pub const CONTENT_TYPE: &'static str = prometheus::TEXT_FORMAT;
}

/// A request's place among those that are being answered.
#[derive(Debug)]
pub struct InFlight(IntGauge);

impl InFlight {
    /// One more.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// One client's polls: by how they were served, then by class of the code.
#[derive(Clone, Debug)]
pub struct ClientRequests(Vec<[IntCounter; CODE_CLASSES.len()]>);

/// One account's handles.
#[derive(Clone, Debug)]
pub struct AccountMetrics {
    request_duration: Vec<Histogram>,
    upstream_requests: Vec<IntCounter>,
    upstream_request_duration: Histogram,
    saved: [IntCounter; Served::SAVING.len()],
    /// How long flights waited for a permit, by [`Lane`].
    pub budget_wait: Vec<Histogram>,
    /// Flights that wait for a permit, by [`Lane`].
    pub queue_length: Vec<IntGauge>,
    rate: prometheus::Gauge,
    shed: Vec<IntCounter>,
    /// Accounts under this label that an upstream 429 has paused.
    pub paused: IntGauge,
    /// Keys under this label that upstream refuses.
    pub keys_refused: IntGauge,
    /// Accounts under this label that have no credits.
    pub credits_missing: IntGauge,
    live_tasks: IntGauge,
    freshness: prometheus::Gauge,
}

impl AccountMetrics {
    /// Counts a poll of `client` that was answered `served` with `code`, `after` its arrival.
    pub fn answered(&self, client: &ClientRequests, served: Served, code: u16, after: Duration) {
        client.0[served as usize][code_class(code)].inc();
        self.request_duration[served as usize].observe(after.as_secs_f64());
    }

    /// Counts a poll that was answered `served` and has opened no flight.
    pub fn saved(&self, served: Served) {
        if let Some(place) = Served::SAVING.iter().position(|saving| *saving == served) {
            self.saved[place].inc();
        }
    }

    /// Counts an attempt made upstream.
    pub fn attempted(&self, outcome: Class, took: Duration) {
        self.upstream_requests[outcome as usize].inc();
        self.upstream_request_duration.observe(took.as_secs_f64());
    }

    /// Shows how many permits a second the pace allows.
    pub fn rate(&self, rate: f64) {
        self.rate.set(rate);
    }

    /// Shows how many tasks are live, and how long their answers are fresh.
    pub fn live(&self, tasks: usize, freshness: Duration) {
        self.live_tasks.set(i64::try_from(tasks).unwrap_or(i64::MAX));
        self.freshness.set(freshness.as_secs_f64());
    }

    /// Counts a poll that the budget turned away.
    pub fn shed(&self, reason: Shed) {
        self.shed[reason as usize].inc();
    }
}

//! What is counted of what replicas share. Of the budget: how the store answers, who lends, and where this process stands;
//! of answers and flights: what is read and written, and who asks for all.

use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use strum::{AsRefStr, VariantArray};

use super::families::Families;

/// A reply within a third of `budget.margin`, 10 ms unless configured, is one in time.
const REPLY_BUCKETS: &[f64] = &[0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.2];

/// What came of a call to the shared store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SharedCall {
    /// A reply in time.
    InTime,
    /// A reply that took too long to be one.
    Late,
    /// None, or an error.
    NoReply,
}

/// The handles of a process that shares its budgets.
#[derive(Clone, Debug)]
pub struct SharedMetrics {
    leases: IntGauge,
    /// By label.
    standings: Vec<(&'static str, IntGauge)>,
    calls: IntCounterVec,
    call_duration: Histogram,
}

impl SharedMetrics {
    pub(super) fn new(
        make: &Families<'_>,
        max_replicas: u32,
        standings: impl IntoIterator<Item = &'static str>,
    ) -> prometheus::Result<Self> {
        let most: IntGauge = make.gauge(
            "shared_max_replicas",
            "The most replicas that may run at once, as configured.",
        )?;
        most.set(max_replicas.into());
        let standing: IntGaugeVec = make.gauges(
            "shared_standing",
            "1 for how this replica takes part in the shared budget, 0 for the others.",
            &["standing"],
        )?;
        Ok(Self {
            leases: make.gauge(
                "shared_leases",
                "Replicas that lend their part of the budget to the shared store, as it said last; 0 without its word.",
            )?,
            standings: standings
                .into_iter()
                .map(|label| (label, standing.with_label_values(&[label])))
                .collect(),
            calls: make.counters_by::<SharedCall>(
                "shared_calls_total",
                "Calls to the shared store, by what came of them.",
                "result",
            )?,
            call_duration: make.histogram(
                "shared_call_duration_seconds",
                "How long replies of the shared store took.",
                REPLY_BUCKETS,
            )?,
        })
    }

    /// Where the process stands, by its label, and how many lend.
    pub fn show(&self, standing: &str, leases: u32) {
        for (label, gauge) in &self.standings {
            gauge.set((*label == standing).into());
        }
        self.leases.set(leases.into());
    }

    /// Counts a call.
    pub fn called(&self, result: SharedCall, took: Option<Duration>) {
        self.calls.with_label_values(&[result]).inc();
        if let Some(took) = took {
            self.call_duration.observe(took.as_secs_f64());
        }
    }
}

/// A poll waits up to 40 ms for a reply, and a call up to 200 ms unless configured.
const READ_BUCKETS: &[f64] = &[0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.1, 0.2];

/// What became of an answer that the shared store was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SharedRead {
    /// It can be served.
    Hit,
    /// It is older than it may be.
    Stale,
    /// There is none.
    Miss,
    /// Something that does not open: changed, cut short, another task's, or sealed with a key that the account has not.
    Doubtful,
    /// No reply in time, or the store was known to give none.
    Away,
}

/// What became of an answer for the shared store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SharedWrite {
    /// It is there.
    Stored,
    /// Something newer was there.
    Older,
    /// The store uses as much memory as it may.
    Full,
    /// It is larger than what is shared.
    TooLarge,
    /// The store was away, or too slow for all that was to be written.
    Dropped,
}

/// Who asks upstream for what the store has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SharedFlight {
    /// This replica, for all.
    Ours,
    /// Another, and this one waits.
    Theirs,
    /// This replica, for itself: the store was away, or what one had fetched for all could not be shared.
    Alone,
}

/// The handles of a process that shares answers and flights.
#[derive(Clone, Debug)]
pub struct SharedCacheMetrics {
    up: IntGauge,
    reads: IntCounterVec,
    read_duration: Histogram,
    writes: IntCounterVec,
    evictions: IntCounter,
    flights: IntCounterVec,
}

impl SharedCacheMetrics {
    pub(super) fn new(make: &Families<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            up: make.gauge(
                "shared_cache_up",
                "1 while answers and flights are shared with other replicas, else 0.",
            )?,
            reads: make.counters_by::<SharedRead>(
                "shared_cache_reads_total",
                "Answers that the shared store was asked for, by what came.",
                "result",
            )?,
            read_duration: make.histogram(
                "shared_cache_read_duration_seconds",
                "How long replies of the shared store to such questions took.",
                READ_BUCKETS,
            )?,
            writes: make.counters_by::<SharedWrite>(
                "shared_cache_writes_total",
                "Answers for the shared store, by what became of them.",
                "result",
            )?,
            evictions: make.counter(
                "shared_cache_evictions_total",
                "Answers that left the shared store to make room for this replica's.",
            )?,
            flights: make.counters_by::<SharedFlight>(
                "shared_flights_total",
                "Answers that the shared store had not, by who asked upstream for them.",
                "whose",
            )?,
        })
    }

    /// Whether answers and flights are shared.
    pub fn up(&self, is_up: bool) {
        self.up.set(is_up.into());
    }

    /// Counts an answer that was asked for.
    pub fn read(&self, result: SharedRead) {
        self.reads.with_label_values(&[result]).inc();
    }

    /// How long a reply took.
    pub fn read_took(&self, took: Duration) {
        self.read_duration.observe(took.as_secs_f64());
    }

    /// Counts an answer that was to be kept.
    pub fn wrote(&self, result: SharedWrite) {
        self.writes.with_label_values(&[result]).inc();
    }

    /// Counts answers that made room.
    pub fn evicted(&self, answers: u64) {
        self.evictions.inc_by(answers);
    }

    /// Counts a flight.
    pub fn flies(&self, whose: SharedFlight) {
        self.flights.with_label_values(&[whose]).inc();
    }
}

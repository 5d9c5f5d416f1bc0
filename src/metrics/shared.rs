//! What is counted of a budget that replicas share: how the store answers, who lends, and where this process stands.

use std::time::Duration;

use prometheus::{Histogram, IntCounterVec, IntGauge, IntGaugeVec, Registry};

use super::{histogram, opts, register};

/// A reply within a third of `budget.margin`, 10 ms unless configured, is one in time.
const REPLY_BUCKETS: &[f64] = &[0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.2];

/// What came of a call to the shared store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedCall {
    /// A reply in time.
    InTime,
    /// A reply that took too long to be one.
    Late,
    /// None, or an error.
    NoReply,
}

impl SharedCall {
    const ALL: [Self; 3] = [Self::InTime, Self::Late, Self::NoReply];

    fn label(self) -> &'static str {
        match self {
            Self::InTime => "in_time",
            Self::Late => "late",
            Self::NoReply => "no_reply",
        }
    }
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
        registry: &Registry,
        max_replicas: u32,
        standings: impl IntoIterator<Item = &'static str>,
    ) -> prometheus::Result<Self> {
        let most = register(
            registry,
            IntGauge::with_opts(opts(
                "shared_max_replicas",
                "The most replicas that may run at once, as configured.",
            ))?,
        )?;
        most.set(max_replicas.into());
        let standing = register(
            registry,
            IntGaugeVec::new(
                opts(
                    "shared_standing",
                    "1 for how this replica takes part in the shared budget, 0 for the others.",
                ),
                &["standing"],
            )?,
        )?;
        let metrics = Self {
            leases: register(
                registry,
                IntGauge::with_opts(opts(
                    "shared_leases",
                    "Replicas that lend their part of the budget to the shared store, as it said last; 0 without its word.",
                ))?,
            )?,
            standings: standings
                .into_iter()
                .map(|label| (label, standing.with_label_values(&[label])))
                .collect(),
            calls: register(
                registry,
                IntCounterVec::new(
                    opts("shared_calls_total", "Calls to the shared store, by what came of them."),
                    &["result"],
                )?,
            )?,
            call_duration: register(
                registry,
                Histogram::with_opts(histogram(
                    "shared_call_duration_seconds",
                    "How long replies of the shared store took.",
                    REPLY_BUCKETS,
                ))?,
            )?,
        };
        for call in SharedCall::ALL {
            metrics.calls.with_label_values(&[call.label()]);
        }
        Ok(metrics)
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
        self.calls.with_label_values(&[result.label()]).inc();
        if let Some(took) = took {
            self.call_duration.observe(took.as_secs_f64());
        }
    }
}

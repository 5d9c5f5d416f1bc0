//! A counter whose count is kept elsewhere, and read when Prometheus asks.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, Opts};

pub(super) struct Pulled<F> {
    opts: Opts,
    /// Describes it.
    empty: IntCounter,
    count: F,
}

impl<F: Fn() -> u64 + Send + Sync> Pulled<F> {
    pub(super) fn new(opts: Opts, count: F) -> prometheus::Result<Self> {
        let empty = IntCounter::with_opts(opts.clone())?;
        Ok(Self { opts, empty, count })
    }
}

impl<F: Fn() -> u64 + Send + Sync> Collector for Pulled<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.empty.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // A new one each time: two who ask at once cannot count anything twice.
        let Ok(counter) = IntCounter::with_opts(self.opts.clone()) else {
            return Vec::new();
        };
        counter.inc_by((self.count)());
        counter.collect()
    }
}

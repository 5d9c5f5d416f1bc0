//! How a family is made: with the prefix that all names have, and registered.

use prometheus::core::{Atomic, Collector, GenericGauge, GenericGaugeVec};
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, Result};
use strum::VariantArray;

/// Makes families, and registers them.
pub(super) struct Families<'r>(pub(super) &'r Registry);

impl Families<'_> {
    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.register(IntCounter::with_opts(opts(name, help))?)
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.register(IntCounterVec::new(opts(name, help), labels)?)
    }

    /// One for each variant of `L`, all at 0 from the start.
    pub(super) fn counters_by<L>(&self, name: &str, help: &str, label: &str) -> Result<IntCounterVec>
    where
        L: VariantArray + AsRef<str>,
    {
        let counters = self.counters(name, help, &[label])?;
        for variant in L::VARIANTS {
            counters.with_label_values(&[variant.as_ref()]);
        }
        Ok(counters)
    }

    pub(super) fn gauge<P: Atomic + 'static>(&self, name: &str, help: &str) -> Result<GenericGauge<P>> {
        self.register(GenericGauge::with_opts(opts(name, help))?)
    }

    pub(super) fn gauges<P: Atomic + 'static>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GenericGaugeVec<P>> {
        self.register(GenericGaugeVec::new(opts(name, help), labels)?)
    }

    pub(super) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram> {
        self.register(Histogram::with_opts(histogram(name, help, buckets))?)
    }

    pub(super) fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> Result<HistogramVec> {
        self.register(HistogramVec::new(histogram(name, help, buckets), labels)?)
    }

    fn register<F: Collector + Clone + 'static>(&self, family: F) -> Result<F> {
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }
}

/// What every family has: its name and help text.
pub(super) fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("crun_gateway_{name}"), help)
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec())
}

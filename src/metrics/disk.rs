//! What Prometheus sees of the answers kept on disk. Every series is there at 0 where none are.

use prometheus::{IntCounter, IntCounterVec, IntGauge};
use strum::{AsRefStr, VariantArray};

use super::families::Families;

/// What became of an answer that the disk was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DiskRead {
    /// It can be served.
    Hit,
    /// It was not there after all, or cannot be served: too old, or sealed with a key that its account has no longer.
    Miss,
    /// It did not come in time, and nobody waits for it.
    Slow,
}

/// What was being done when the disk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum DiskStep {
    /// The file was being opened, or set aside.
    Open,
    /// An answer was being read.
    Read,
    /// Answers were being written.
    Write,
}

/// The families.
#[derive(Clone, Debug)]
pub struct DiskMetrics {
    /// 1 while answers are kept on disk.
    pub up: IntGauge,
    /// How many.
    pub entries: IntGauge,
    /// What they take.
    pub bytes: IntGauge,
    reads: IntCounterVec,
    /// Answers written.
    pub writes: IntCounter,
    /// Answers not written: the disk was too slow for them, or away.
    pub dropped: IntCounter,
    /// Answers that made room for others.
    pub evicted: IntCounter,
    /// Answers that were kept as long as they may be.
    pub expired: IntCounter,
    errors: IntCounterVec,
}

impl DiskMetrics {
    pub(super) fn new(make: &Families<'_>) -> prometheus::Result<Self> {
        let evictions = make.counters(
            "disk_evictions_total",
            "Answers that left the disk, by why.",
            &["cause"],
        )?;
        Ok(Self {
            up: make.gauge("disk_up", "1 while answers are kept on disk, else 0.")?,
            entries: make.gauge("disk_entries", "Answers kept on disk.")?,
            bytes: make.gauge("disk_bytes", "What the answers on disk take there.")?,
            reads: make.counters_by::<DiskRead>(
                "disk_reads_total",
                "Answers that the disk was asked for, by what came.",
                "result",
            )?,
            writes: make.counter("disk_writes_total", "Answers written to disk.")?,
            dropped: make.counter(
                "disk_dropped_total",
                "Answers not written to disk: it was too slow, or away, or they were too large.",
            )?,
            evicted: evictions.with_label_values(&["size"]),
            expired: evictions.with_label_values(&["age"]),
            errors: make.counters_by::<DiskStep>(
                "disk_errors_total",
                "Failures of the disk, by what was being done.",
                "operation",
            )?,
        })
    }

    /// Counts an answer that was asked for.
    pub fn read(&self, result: DiskRead) {
        self.reads.with_label_values(&[result]).inc();
    }

    /// Counts a failure.
    pub fn failed(&self, step: DiskStep) {
        self.errors.with_label_values(&[step]).inc();
    }

    /// Shows what is kept.
    pub fn holds(&self, entries: usize, bytes: u64) {
        self.entries.set(i64::try_from(entries).unwrap_or(i64::MAX));
        self.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

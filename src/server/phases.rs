//! What a connection is doing, and until when it may.
//!
//! The phase is set by whoever sees it change: a request's first byte, its head's end, its answer's end. One alarm per
//! connection serves all phases.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

use super::LINGER;
use crate::config::Limits;
use crate::metrics::InFlight;

/// What a connection is doing, and until when it may.
#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    /// Nothing is asked.
    Idle { until: Instant },
    /// A request's head has begun.
    Head { until: Instant },
    /// A request is being answered.
    Busy { until: Instant },
    /// Nothing more is answered.
    Closing,
}

const IDLE: u64 = 0;
const HEAD: u64 = 1;
const BUSY: u64 = 2;
const CLOSING: u64 = 3;

impl Phase {
    fn until(self) -> Option<Instant> {
        match self {
            Self::Idle { until } | Self::Head { until } | Self::Busy { until } => Some(until),
            Self::Closing => None,
        }
    }
}

/// An answer that hyper has taken whole, until it is sent.
#[derive(Debug)]
struct Last {
    until: Instant,
    /// Its request's place among all.
    _in_flight: Option<InFlight>,
}

/// A connection's phase, as all who change it share it.
#[derive(Clone, Debug)]
pub(super) struct Phases(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The phases' instants count from here.
    begun: Instant,
    /// The phase in the lowest two bits; above, until when it may last, in nanoseconds since `begun`. All who change it are
    /// one task, so it needs no lock.
    phase: AtomicU64,
    /// A head has begun behind the request that is being answered.
    is_next_begun: AtomicBool,
    /// All that was written has gone to the client's stream, and its end is not begun.
    is_settled: AtomicBool,
    /// Since the last request was taken up, hyper has wanted more than there was of it: it has no byte left.
    is_starved: AtomicBool,
    /// hyper has taken all of an answer, and has yet to send it.
    is_sending: AtomicBool,
    last: Mutex<Option<Last>>,
    /// A head took too long: whoever sent it so slowly has no more time.
    is_out_of_time: AtomicBool,
    /// What the answer that was begun last calls its request; hits do not say, unless they are taken slowly.
    request_id: Mutex<Option<HeaderValue>>,
    idle_timeout: Duration,
    header_timeout: Duration,
    request_timeout: Duration,
}

impl Phases {
    pub(super) fn new(limits: &Limits) -> Self {
        let begun = Instant::now();
        let phases = Self(Arc::new(Inner {
            begun,
            phase: AtomicU64::new(CLOSING),
            is_next_begun: AtomicBool::new(false),
            is_settled: AtomicBool::new(true),
            is_starved: AtomicBool::new(false),
            is_sending: AtomicBool::new(false),
            last: Mutex::default(),
            is_out_of_time: AtomicBool::new(false),
            request_id: Mutex::default(),
            idle_timeout: limits.idle_timeout,
            header_timeout: limits.header_timeout,
            request_timeout: limits.request_timeout,
        }));
        let until = begun + limits.idle_timeout;
        phases.set(Phase::Idle { until });
        phases
    }

    fn now(&self) -> Phase {
        let phase = self.0.phase.load(Ordering::Relaxed);
        let until = self.0.begun + Duration::from_nanos(phase >> 2);
        match phase & 3 {
            IDLE => Phase::Idle { until },
            HEAD => Phase::Head { until },
            BUSY => Phase::Busy { until },
            _ => Phase::Closing,
        }
    }

    pub(super) fn set(&self, phase: Phase) {
        let bits = match phase {
            Phase::Idle { .. } => IDLE,
            Phase::Head { .. } => HEAD,
            Phase::Busy { .. } => BUSY,
            Phase::Closing => CLOSING,
        };
        let until = phase.until().unwrap_or(self.0.begun) - self.0.begun;
        let until = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX >> 2);
        self.0.phase.store(until << 2 | bits, Ordering::Relaxed);
    }

    /// Whether nothing is asked, nothing is on its way, and hyper holds nothing: bytes of a body that nobody wanted would
    /// be taken for the next request.
    pub(super) fn may_rest(&self) -> bool {
        let is_idle = self.0.phase.load(Ordering::Relaxed) & 3 == IDLE;
        is_idle
            && [&self.0.is_settled, &self.0.is_starved]
                .iter()
                .all(|flag| flag.load(Ordering::Relaxed))
    }

    /// An alarm for [`poll_alarm`].
    pub(super) fn alarm(&self) -> Sleep {
        sleep_until(self.now().until().unwrap_or_else(Instant::now))
    }

    /// A head has begun, or is whole: where nothing was asked, something is.
    pub(super) fn heard(&self) {
        if self.0.phase.load(Ordering::Relaxed) & 3 == IDLE {
            let until = Instant::now() + self.0.header_timeout;
            self.set(Phase::Head { until });
        }
    }

    /// A request that came at `arrived` was answered as it came, and nothing is asked any more.
    pub(super) fn answered(&self, arrived: Instant) {
        let until = arrived + self.0.idle_timeout;
        self.set(Phase::Idle { until });
    }

    /// Whether the next request's head has begun.
    pub(super) fn next_begun(&self, is_begun: bool) {
        self.0.is_next_begun.store(is_begun, Ordering::Relaxed);
    }

    /// Whether nothing is on its way to the client, an end included.
    pub(super) fn settled(&self, is_settled: bool) {
        self.0.is_settled.store(is_settled, Ordering::Relaxed);
        if is_settled && self.is_sending() {
            self.send(None);
            if !self.is_busy() {
                self.ended();
            }
        }
    }

    /// Whether hyper has taken all of an answer, and has yet to send it.
    pub(super) fn is_sending(&self) -> bool {
        self.0.is_sending.load(Ordering::Relaxed)
    }

    fn send(&self, last: Option<Last>) {
        self.0.is_sending.store(last.is_some(), Ordering::Relaxed);
        *self.0.last.lock() = last;
    }

    /// The phase that time is kept of: who takes an answer is not idle, nor late with the next head.
    fn timed(&self) -> Phase {
        match self.now() {
            Phase::Idle { .. } | Phase::Head { .. } if self.is_sending() => {
                let until = self.0.last.lock().as_ref().map(|last| last.until);
                until.map_or(Phase::Closing, |until| Phase::Busy { until })
            }
            phase @ (Phase::Idle { .. } | Phase::Head { .. } | Phase::Busy { .. } | Phase::Closing) => phase,
        }
    }

    /// A request is answered: the connection is idle again, or the next one's head has begun.
    fn ended(&self) {
        let (now, shared) = (Instant::now(), &self.0);
        self.set(if shared.is_next_begun.load(Ordering::Relaxed) {
            let until = now + shared.header_timeout;
            Phase::Head { until }
        } else {
            let until = now + shared.idle_timeout;
            Phase::Idle { until }
        });
    }

    /// hyper wanted more, and all of every request was there.
    pub(super) fn starved(&self) {
        self.0.is_starved.store(true, Ordering::Relaxed);
    }

    /// A head has taken too long.
    pub(super) fn ran_out_of_time(&self) {
        self.0.is_out_of_time.store(true, Ordering::Relaxed);
    }

    /// Whether one has.
    pub(super) fn is_out_of_time(&self) -> bool {
        self.0.is_out_of_time.load(Ordering::Relaxed)
    }

    /// The answer to the request that is being answered calls it so.
    pub(super) fn answers(&self, request_id: Option<&HeaderValue>) {
        *self.0.request_id.lock() = request_id.cloned();
    }

    /// How long an answer may take on this connection, to its last byte.
    pub(super) fn request_timeout(&self) -> Duration {
        self.0.request_timeout
    }

    /// What the answer that has begun calls its request, if it is known.
    pub(super) fn request_id(&self) -> Option<HeaderValue> {
        self.0.request_id.lock().clone()
    }

    /// Whether a request is being answered.
    pub(super) fn is_answering(&self) -> bool {
        self.0.phase.load(Ordering::Relaxed) & 3 == BUSY
    }

    /// Whether a request is being answered, or nothing more is.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self.0.phase.load(Ordering::Relaxed) & 3, BUSY | CLOSING)
    }

    /// A request is being answered, until this is dropped.
    pub(super) fn busy(&self) -> Busy {
        let time_is_over = Instant::now() + self.0.request_timeout;
        // An answer in words is given then, and has a while to go out.
        let until = time_is_over + LINGER;
        self.0.is_starved.store(false, Ordering::Relaxed);
        // hyper may have yet to send the answer before: that has as long as this one now.
        if self.is_sending() {
            self.send(None);
        }
        self.answers(None);
        self.set(Phase::Busy { until });
        Busy {
            phases: self.clone(),
            time_is_over,
        }
    }
}

/// A request that is being answered; when dropped, the connection is idle again, or the next one's head has begun.
pub(super) struct Busy {
    phases: Phases,
    time_is_over: Instant,
}

impl Busy {
    /// Its answer is there: one that is in time has to be at its end in time, too.
    pub(super) fn answered(&self) {
        let until = self.time_is_over;
        if Instant::now() < until {
            self.phases.set(Phase::Busy { until });
        }
    }

    /// hyper has all of its answer: until that is sent its time goes on, and it keeps its place among all requests.
    pub(super) fn taken(self, in_flight: Option<InFlight>) {
        let (phases, until) = (self.phases.clone(), self.time_is_over);
        drop(self);
        phases.send(Some(Last {
            until,
            _in_flight: in_flight,
        }));
    }

    /// Whether its connection has ended it.
    pub(super) fn is_cut(&self) -> bool {
        self.phases.0.phase.load(Ordering::Relaxed) & 3 == CLOSING
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.phases.ended();
    }
}

/// The phase that has lasted too long, once one has. The alarm is set anew only where it would ring too late: phases change
/// with every request, and most end long before it rings.
pub(super) fn poll_alarm(mut alarm: Pin<&mut Sleep>, phases: &Phases, cx: &mut Context<'_>) -> Poll<Phase> {
    loop {
        let phase = phases.timed();
        let Some(until) = phase.until() else {
            return Poll::Pending;
        };
        if until < alarm.deadline() {
            alarm.as_mut().reset(until);
        }
        ready!(alarm.as_mut().poll(cx));
        if until <= Instant::now() {
            return Poll::Ready(phase);
        }
        alarm.as_mut().reset(until);
    }
}

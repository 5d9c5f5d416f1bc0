//! One budget, many replicas: each process lends its slice of the limit to a shared store, one second at a time, and
//! the store pays out no more than it holds on loan. So the store may forget everything at any moment.
//!
//! W is 1 s + margin; the slice is limit ÷ `max_replicas`, rounded down. Waiting is on the process's own monotonic
//! clock. The script (`shared/lend.lua`; one hash, one call):
//! 1. No hash, one of another run of the server, or one stored more than 5 ms ahead of its time: an empty one, under a
//!    new generation.
//! 2. A hello, or another generation: only generation and time are told.
//! 3. The lease runs to **the time that the call names** + 1 s. Already over: as 2. So a late call renews nothing.
//! 4. The slot is the account's next. More than 100 ms ahead, or another process's turn by the weight of who waits: ask
//!    again. Else it is paid from what is on loan at the slot: limit − slice × (`max_replicas` − leases alive then).
//!
//! The process (`shared/lease.rs`, `shared/process.rs`):
//! 5. A reply that took longer than a third of the margin is no reply. A call at least every 250 ms, one at a time, on
//!    one connection; a new one after a time-out.
//! 6. At start nothing is spent or lent for 1 s + W: the predecessor may have.
//! 7. Lending, only permits are spent, at their slot and at most a third of the margin late, counted from when the call
//!    was sent. A lent slice is home 1 s + W after the reply whose time a call named last.
//! 8. Two calls running without a reply: cut off. Then it only says hello and, once the slice is home, spends it. After
//!    1 s of replies without a miss it stops, waits W, and lends.
//! 9. Something odd (a new generation, the first too; a time that moved more or less than our own clock allows,
//!    ± 5 ms): its permits are dropped, and nothing is spent or lent for W, nor before the slice is home.
//! 10. Told to stop, a process owns and lends nothing; it still asks for permits until it has drained.
//!
//! They were found by simulation, which is ported to `shared/tests`. Who gets an account's permits within the process
//! is `budget`'s business. Answers and flights are shared on the way of `shared/cache.rs`, by calls and a connection of
//! their own.

mod cache;
mod connect;
mod lease;
mod link;
mod process;
mod script;
mod share;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use strum::VariantArray as _;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::config::Config;
use crate::metrics::{Metrics, SharedCall, SharedMetrics};
use crate::panics::supervise;
pub use cache::{Away, Claim, Found, Label, SharedCache, Wanted, Whose};
pub use lease::Standing;
use link::{Exchanged, Link};
pub use process::{Backed, Demand, Slot};
use process::{BorrowerId, Process, Told};
use script::Constants;

/// This process's part in the shared budget, for as long as its runtime lasts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Replica(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    process: Mutex<Process>,
    /// There is a call to be made at once.
    wake: Notify,
    /// Whether the process may spend.
    spends: watch::Sender<bool>,
    max_replicas: NonZeroU32,
    slice: u32,
    third: Duration,
    metrics: SharedMetrics,
}

impl Replica {
    /// Starts to take part, as `config` says; `None` where it names no store. A store that is away is no error: then
    /// the slice is spent, from 2 s + margin on.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    ///
    /// # Panics
    /// Outside a tokio runtime: the calls are made by a task of their own.
    pub fn start(config: &Config, metrics: &Arc<Metrics>) -> anyhow::Result<Option<Self>> {
        let Some((shared, store)) = config
            .shared
            .as_ref()
            .and_then(|shared| Some((shared, shared.store.as_ref()?)))
        else {
            return Ok(None);
        };
        let (limit, margin) = (config.budget.limit.get(), config.budget.margin);
        let constants = Constants {
            who: random_name(),
            limit,
            replicas: shared.max_replicas.get(),
            window: Duration::from_secs(1) + margin,
        };
        let slice = limit / shared.max_replicas;
        let third = margin / 3;
        let share = f64::from(slice) / f64::from(limit);
        let process = Process::new(constants.window, third, share, constants.replicas, Instant::now());
        let inner = Arc::new(Inner {
            process: Mutex::new(process),
            wake: Notify::new(),
            spends: watch::Sender::default(),
            max_replicas: shared.max_replicas,
            slice,
            third,
            metrics: metrics.shared(shared.max_replicas.get(), Standing::VARIANTS.iter().map(Into::into))?,
        });
        inner.metrics.show(Standing::Waiting.as_ref(), 0);
        let mut link = Link::new(store, constants)?;
        let taking_part = Arc::clone(&inner);
        let drive = async move || drive(&taking_part, &mut link).await;
        tokio::spawn(supervise("shared budget", drive));
        Ok(Some(Self(inner)))
    }

    /// One more account, by a name that every replica gives it and that tells nothing of its keys.
    pub fn budget(&self, account: &str) -> SharedBudget {
        let now = Instant::now();
        let told = Arc::new(Told::new(now));
        let id = self.0.process.lock().open(account.into(), Arc::clone(&told), now);
        SharedBudget {
            replica: self.clone(),
            id,
            told,
        }
    }

    /// The process is told to stop: what it owns is its successor's from now on.
    pub fn leave(&self) {
        self.0.process.lock().leave(Instant::now());
        self.0.wake.notify_one();
    }

    /// Waits until the process may spend, or until it may not.
    ///
    /// Cancel safe.
    pub async fn until(&self, spends: bool) {
        // The sender is ours.
        let _ = self.0.spends.subscribe().wait_for(|now| *now == spends).await;
    }

    /// Where the process stands with its slice.
    pub fn standing(&self, now: Instant) -> Standing {
        self.0.process.lock().standing(now)
    }

    /// Processes that lend, as the store said last.
    pub fn alive(&self) -> u32 {
        self.0.process.lock().alive()
    }

    /// The most processes that run at once.
    pub fn max_replicas(&self) -> u32 {
        self.0.max_replicas.get()
    }

    /// How long nothing is spent after a start: 1 s + W.
    pub fn hold(config: &Config) -> Duration {
        lease::LENT + Duration::from_secs(1) + config.budget.margin
    }
}

/// One account's way to shared permits; dropping it takes the account out.
#[derive(Debug)]
pub struct SharedBudget {
    replica: Replica,
    id: BorrowerId,
    told: Arc<Told>,
}

/// What an account may spend now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Cut off: the process's slice of the limit, queries a second, at its own pace.
    Alone(u32),
    /// This permit.
    Slot(Slot),
    /// Nothing, until it is told.
    Nothing,
}

impl SharedBudget {
    /// Says who waits for permits from `now` on; with no flights, that none is wanted.
    pub fn want(&self, demand: Demand, now: Instant) {
        if self.replica.0.process.lock().want(self.id, demand, now) {
            self.replica.0.wake.notify_one();
        }
    }

    /// What may be spent now.
    pub fn right(&self) -> Right {
        let process = self.replica.0.process.lock();
        if process.is_alone() {
            Right::Alone(self.replica.0.slice)
        } else {
            process.slot(self.id).map_or(Right::Nothing, Right::Slot)
        }
    }

    /// The permit is spent, or too late to be.
    pub fn spent(&self) {
        self.replica.0.process.lock().spent(self.id, Instant::now());
        self.replica.0.wake.notify_one();
    }

    /// Waits until [`Self::right`], [`Self::share`] or [`Self::backed`] may have changed.
    ///
    /// Cancel safe.
    pub async fn told(&self) {
        self.told.news.notified().await;
    }

    /// What part of the limit the account can count on here, from 0 to 1: in the mean of the last two seconds.
    pub fn share(&self, now: Instant) -> f64 {
        self.told.share().of_limit(now)
    }

    /// Whether others wanted permits, too, when the store was asked last, a moment ago.
    pub fn is_contended(&self, now: Instant) -> bool {
        self.told.share().is_contended(now)
    }

    /// What upstream's last 429 did to the account, wherever it was heard.
    pub fn backed(&self) -> Option<Backed> {
        self.replica.0.process.lock().backed(self.id)
    }

    /// Upstream said 429 here: every replica hears of it.
    pub fn back_off(&self, backed: Backed) {
        self.replica.0.process.lock().back_off(self.id, backed, Instant::now());
        self.replica.0.wake.notify_one();
    }

    /// The longest that a granted query may be on its way to the wire: later, it could fall into another second.
    pub fn patience(&self) -> Duration {
        self.replica.0.third
    }
}

impl Drop for SharedBudget {
    fn drop(&mut self) {
        self.replica.0.process.lock().close(self.id);
    }
}

/// A name that no other start of a process has.
fn random_name() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Makes the calls, for ever.
async fn drive(inner: &Inner, link: &mut Link) {
    let mut said = Said::default();
    inner.process.lock().resume(Instant::now());
    loop {
        let now = Instant::now();
        let (at, call) = {
            let mut process = inner.process.lock();
            (process.look(now), process.call(now))
        };
        said.show(inner, now);
        let Some(call) = call else {
            tokio::select! {
                () = inner.wake.notified() => {}
                () = sleep_until(at.unwrap_or(now)), if at.is_some() => {}
            }
            continue;
        };
        let mut exchange = std::pin::pin!(link.exchange(&call));
        let exchanged = loop {
            // The slice may come home while a call is under way.
            let now = Instant::now();
            let at = inner.process.lock().look(now);
            said.show(inner, now);
            tokio::select! {
                exchanged = &mut exchange => break exchanged,
                () = sleep_until(at.unwrap_or(now)), if at.is_some() => {}
            }
        };
        match exchanged {
            Ok(Exchanged { sent, received, reply }) => {
                let is_in_time = inner.process.lock().heard(sent, received, &reply);
                let result = if is_in_time {
                    SharedCall::InTime
                } else {
                    SharedCall::Late
                };
                inner.metrics.called(result, Some(received - sent));
                said.failure = (!is_in_time).then(|| "the reply took too long".to_owned());
            }
            Err(error) => {
                inner.process.lock().missed(Instant::now());
                inner.metrics.called(SharedCall::NoReply, None);
                said.failure = Some(format!("{error:#}"));
            }
        }
    }
}

/// What was logged and shown last.
#[derive(Debug, Default)]
struct Said {
    standing: Option<Standing>,
    /// Why the last call had no reply.
    failure: Option<String>,
}

impl Said {
    fn show(&mut self, inner: &Inner, now: Instant) {
        let (standing, alive) = {
            let process = inner.process.lock();
            (process.standing(now), process.alive())
        };
        inner.metrics.show(standing.as_ref(), alive);
        inner.spends.send_if_modified(|spends| {
            let before = std::mem::replace(spends, standing.spends());
            before != *spends
        });
        let before = self.standing.replace(standing);
        if before == Some(standing) {
            return;
        }
        let (replicas, slice) = (inner.max_replicas, inner.slice);
        match standing {
            Standing::Lending => tracing::info!(max_replicas = replicas, "the budget is shared"),
            Standing::Waiting => {
                tracing::info!("nothing is spent for a moment: what others may have spent has to pass");
            }
            Standing::CutOff => {
                let error = self.failure.as_deref().unwrap_or_default();
                tracing::warn!(
                    error,
                    "cut off from the shared store: nothing is spent until the slice is home"
                );
            }
            Standing::Alone => tracing::warn!(slice, "cut off from the shared store: the slice is spent, and no more"),
        }
    }
}

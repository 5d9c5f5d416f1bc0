//! Who has which connection: each account's own, so that an answer out of step could never reach another account, and how
//! many there may be of them and in all.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Inner;
use super::line::Line;
use super::recent::{Outlook, Recent};
use crate::budget::Connected;
use crate::error::Error;
use crate::task::TaskId;

/// Connections idle for longer are closed by us: most servers close theirs after 60 s or more, and one that closes just as
/// a request is written costs a second permit.
const IDLE_LIFETIME: Duration = Duration::from_secs(30);

/// Every connection there is.
#[derive(Default)]
pub(super) struct Connections {
    open: usize,
    next_pool: u64,
    pools: BTreeMap<u64, PoolState>,
}

#[derive(Default)]
struct PoolState {
    open: usize,
    /// The one used last is at the back and is used next, so that the others grow old and go.
    idle: VecDeque<Idle>,
}

struct Idle {
    line: Box<Line>,
    since: Instant,
}

impl Idle {
    fn is_old(&self, now: Instant) -> bool {
        self.since + IDLE_LIFETIME <= now
    }
}

/// What came of asking for a connection.
enum Offer {
    Idle(Idle),
    /// A place to open one in, and whether it was the last.
    Open(Slot, bool),
    /// There is no place; this one has to be closed to make room.
    Full(Option<Idle>),
}

/// The connections of one account. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pool(Arc<PoolHandle>);

#[derive(Debug)]
struct PoolHandle {
    upstream: Arc<Inner>,
    id: u64,
    /// Held by whoever is the next to have a place: the others wait for it in the order in which they came.
    next: tokio::sync::Mutex<()>,
    /// What its queries took.
    recent: Recent,
}

impl Drop for PoolHandle {
    fn drop(&mut self) {
        let closed = self.upstream.connections.lock().pools.remove(&self.id);
        drop(closed);
    }
}

impl Pool {
    /// A new account's, empty. Dropping it closes its idle connections.
    pub(super) fn new(upstream: Arc<Inner>) -> Self {
        let id = upstream.connections.lock().add_pool();
        Self(Arc::new(PoolHandle {
            upstream,
            id,
            next: tokio::sync::Mutex::default(),
            recent: Recent::default(),
        }))
    }

    /// How long the account's next answer is thought to take, for whoever waits `within` so long at most.
    pub fn outlook(&self, within: Duration, now: Instant) -> Outlook {
        let outlook = self.0.recent.outlook(within, now);
        let mean = outlook.mean.min(self.0.upstream.settings.timeout);
        Outlook { mean, ..outlook }
    }

    /// How many connections the account may have, if no other has any.
    pub fn connections(&self) -> usize {
        self.0.upstream.most_of_one()
    }

    /// A connection of one's own, to ask for `task`: an idle one, else a new one; with `fresh`, always a new one. Waits
    /// while the account or the process has as many as it may.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// As [`Place::connect`].
    pub async fn connect(&self, task: &TaskId, fresh: bool) -> Result<Ready, Error> {
        self.place(fresh).await.connect(task).await
    }

    /// What [`Pool::connect`] waits for before it opens anything: whoever came first has the first place that is free.
    ///
    /// Cancel safe.
    pub async fn place(&self, fresh: bool) -> Place {
        let upstream = &self.0.upstream;
        let _next = self.0.next.lock().await;
        loop {
            // From here on, so that no news of a free place is missed.
            let freed = upstream.freed.notified();
            let offer = upstream.connections.lock().offer(upstream, self.0.id, fresh);
            match offer {
                Offer::Idle(mut idle) => {
                    let is_trusted = !idle.is_old(Instant::now()) && upstream.breaker.trusts(idle.since);
                    if is_trusted && idle.line.is_ready() {
                        return Place(Taken::Idle(self.ready(idle.line)));
                    }
                }
                Offer::Open(slot, is_last) => return Place(Taken::New(self.clone(), slot, is_last)),
                Offer::Full(closed) => {
                    drop(closed);
                    freed.await;
                }
            }
        }
    }

    async fn open(&self, task: &TaskId, slot: Slot, is_last: bool) -> Result<Ready, Error> {
        let upstream = &self.0.upstream;
        let began = Instant::now();
        // On the heap: it is large, and mostly there is one that is idle.
        let opening = Box::pin(upstream.breaker.watch(task, upstream.open_line(slot)));
        let mut line = opening.await?;
        // Where there are more places, it keeps nobody waiting.
        if is_last {
            line.opening = began.elapsed();
        }
        Ok(self.ready(line))
    }

    pub(super) fn upstream(&self) -> &Arc<Inner> {
        &self.0.upstream
    }

    pub(super) fn recent(&self) -> &Recent {
        &self.0.recent
    }

    fn ready(&self, line: Box<Line>) -> Ready {
        Ready(Some(Held {
            pool: self.clone(),
            line,
        }))
    }
}

/// A place among the connections of one account. Dropped, it is free again.
pub struct Place(Taken);

enum Taken {
    Idle(Ready),
    New(Pool, Slot, bool),
}

impl Place {
    /// The connection in it, opened unless it was idle.
    ///
    /// Cancel safe: the place is free again.
    ///
    /// # Errors
    /// [`Error::NoConnection`] when DNS, TCP or TLS fail or take longer than `upstream.connect_timeout` together.
    pub async fn connect(self, task: &TaskId) -> Result<Ready, Error> {
        match self.0 {
            Taken::Idle(ready) => Ok(ready),
            Taken::New(pool, slot, is_last) => pool.open(task, slot, is_last).await,
        }
    }
}

/// A connection and whose it is.
pub(super) struct Held {
    pub(super) pool: Pool,
    pub(super) line: Box<Line>,
}

impl Held {
    /// Makes it idle, if it can be used again.
    pub(super) fn hand_back(self) {
        let Self { pool, mut line } = self;
        if line.is_closed() {
            return;
        }
        let since = Instant::now();
        let upstream = &pool.0.upstream;
        let mut idle = Some(Idle { line, since });
        if let Some(pool) = upstream.connections.lock().pools.get_mut(&pool.0.id) {
            pool.idle.extend(idle.take());
        }
        // A pool that is gone has no use for it: then it closes here.
        drop(idle);
        upstream.freed.notify_waiters();
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("pool", &self.pool).finish_non_exhaustive()
    }
}

/// A connection that is open and belongs to one flight. Dropped unused, it is idle again.
#[derive(Debug)]
pub struct Ready(Option<Held>);

impl Connected for Ready {}

impl Ready {
    /// Whether upstream has closed it since.
    pub fn is_closed(&mut self) -> bool {
        self.0.as_mut().is_none_or(|held| held.line.is_closed())
    }

    /// Another in its place. It waits for no other place, so that whoever holds the permit that others wait for waits for
    /// none of them.
    ///
    /// Cancel safe: the place is free again.
    ///
    /// # Errors
    /// [`Error::NoConnection`], as [`Place::connect`].
    pub async fn reopen(self, task: &TaskId) -> Result<Self, Error> {
        let Held { pool, line } = self.take().ok_or(Error::NoConnection)?;
        pool.open(task, line.into_slot(), true).await
    }

    /// For the query.
    pub(super) fn take(mut self) -> Option<Held> {
        self.0.take()
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Some(held) = self.0.take() {
            held.hand_back();
        }
    }
}

/// A connection that has brought an answer; `None` if not all of it. Dropped, it is closed: what came may not have been an
/// answer to what was asked.
#[derive(Debug)]
pub struct Answered(pub(super) Option<Held>);

impl Answered {
    /// Keeps it for the next query, if the answer was whole.
    pub fn reuse(self) {
        let Some(mut held) = self.0 else { return };
        if held.line.is_ready() {
            return held.hand_back();
        }
        // Idle once nothing of the answer is left over; mostly nothing is.
        tokio::spawn(async move {
            if held.line.ready().await {
                held.hand_back();
            }
        });
    }
}

impl Inner {
    /// How many connections one account may have.
    fn most_of_one(&self) -> usize {
        self.settings.connections.min(self.most_connections)
    }

    /// A place for a connection that is no account's, as soon as one is free.
    pub(super) async fn slot_of_nobody(self: &Arc<Self>) -> Slot {
        loop {
            let freed = self.freed.notified();
            let slot = self.connections.lock().slot_of_nobody(self);
            match slot {
                Ok(slot) => return slot,
                Err(closed) => {
                    drop(closed);
                    freed.await;
                }
            }
        }
    }

    /// Closes connections that have been idle for long, and those that upstream has closed.
    pub(super) fn sweep(&self, now: Instant) {
        // Closed when the lock is released.
        let mut closed = VecDeque::new();
        for pool in self.connections.lock().pools.values_mut() {
            let idle = std::mem::take(&mut pool.idle);
            for mut idle in idle {
                let goes = idle.is_old(now) || idle.line.is_closed();
                let to = if goes { &mut closed } else { &mut pool.idle };
                to.push_back(idle);
            }
        }
    }
}

impl Connections {
    fn add_pool(&mut self) -> u64 {
        self.next_pool += 1;
        self.pools.insert(self.next_pool, PoolState::default());
        self.next_pool
    }

    fn offer(&mut self, upstream: &Arc<Inner>, pool_id: u64, fresh: bool) -> Offer {
        let full = self.open >= upstream.most_connections;
        let Some(pool) = self.pools.get_mut(&pool_id) else {
            return Offer::Full(None);
        };
        if !fresh && let Some(idle) = pool.idle.pop_back() {
            return Offer::Idle(idle);
        }
        if pool.open >= upstream.settings.connections {
            return Offer::Full(pool.idle.pop_front());
        }
        // An account may always open one, or a full process would shut it out.
        if full && pool.open > 0 {
            return Offer::Full(self.longest_idle());
        }
        pool.open += 1;
        let is_last = pool.open >= upstream.most_of_one();
        Offer::Open(self.slot(upstream, Some(pool_id)), is_last)
    }

    /// A place, or what has to be closed to make room.
    fn slot_of_nobody(&mut self, upstream: &Arc<Inner>) -> Result<Slot, Option<Idle>> {
        if self.open >= upstream.most_connections {
            return Err(self.longest_idle());
        }
        Ok(self.slot(upstream, None))
    }

    fn slot(&mut self, upstream: &Arc<Inner>, pool: Option<u64>) -> Slot {
        self.open += 1;
        upstream.metrics.upstream_connections.inc();
        Slot {
            upstream: Arc::clone(upstream),
            pool,
        }
    }

    fn longest_idle(&mut self) -> Option<Idle> {
        let pools = self.pools.values_mut().filter(|pool| !pool.idle.is_empty());
        let pool = pools.min_by_key(|pool| pool.idle.front().map(|idle| idle.since))?;
        pool.idle.pop_front()
    }
}

/// A connection's place among `upstream.connections` and `limits.upstream_connections`, from before it is opened until it
/// has closed. Whoever drops it must not hold the lock of all connections.
pub(super) struct Slot {
    upstream: Arc<Inner>,
    pool: Option<u64>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut connections = self.upstream.connections.lock();
        connections.open -= 1;
        if let Some(pool) = self.pool.and_then(|pool| connections.pools.get_mut(&pool)) {
            pool.open -= 1;
        }
        drop(connections);
        self.upstream.metrics.upstream_connections.dec();
        self.upstream.freed.notify_waiters();
    }
}

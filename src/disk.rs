//! Sealed answers on disk, so that a restart does not cost the budget a second time for what had ended.
//!
//! Written behind: an answer goes into a bounded queue, and a task of its own writes what has gathered there in one
//! commit; what finds no room is counted and not written. Read on demand, on threads where reading may block, and only
//! what is there; whoever waits does so for a moment, and while the disk stands still nobody does. No request ever waits
//! for a write. Without a file that can be used the gateway runs as if there were none, says why and what to do, and tries
//! again from time to time. What is in the file is `disk/file.rs`'s business, what an answer means nobody's here.
//!
//! redb, and not fjall (redb 4.6, fjall 3.1; 200,000 answers of 1.2 to 3.2 KB in commits of 256, each waited for): 1 new
//! dependency against 16, 6 MB of memory against 145, opened in 4 ms against 190, and the file is bounded by what it holds;
//! that fjall writes an answer in 18 us and redb in 66, reads one in 22 and redb in 11, is nothing at 15 a second.

mod file;

use std::fmt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::metrics::{DiskMetrics, DiskRead, DiskStep};
use crate::moment::{millis, unix_now};
use crate::panics::{blocking, supervise};
use crate::stored::MOST_AHEAD;
use file::{Book, Bounds, File, Gone, Sealed, Trouble};

/// Answers that wait to be written, and their bytes: over a minute of one account's, and no more than a few of the largest
/// or an eighth of what may be kept. In memory they stand twice, once sealed.
const QUEUE: usize = 1024;
const QUEUE_BYTES: usize = 16 << 20;

/// How long an answer waits for others that go into the same commit: a commit is some writes and a wait for the disk.
const LINGER: Duration = Duration::from_millis(200);

/// Answers that are read and opened at once. Each stands in memory up to three times: as a page of redb's, which may be twice
/// its size, and as a copy.
const READERS: usize = 4;

/// How often it is looked for answers that are too old.
const SWEEP: Duration = Duration::from_mins(1);

/// How long a file that cannot be used is left alone: as long as another process may take to end, longer each time, and
/// no longer than it takes to hear of it that space is free again.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_mins(5);

/// How long the disk may take to do one thing before that is said to fail: longer than any that is well, be it ever so busy.
const STALL: Duration = Duration::from_mins(1);

/// Where answers are kept, and how many.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The file.
    pub path: PathBuf,
    /// What the answers take there, in bytes.
    pub max_bytes: u64,
    /// The oldest.
    pub max_age: Duration,
}

impl Settings {
    /// What configuration says; `None` when nothing is kept on disk.
    pub fn of(cache: &config::Cache) -> Option<Self> {
        cache.disk.clone().map(|path| Self {
            path,
            max_bytes: cache.disk_max_bytes,
            max_age: cache.disk_max_age,
        })
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            bytes: self.max_bytes,
            oldest_ms: self.oldest_ms(),
            newest_ms: millis(unix_now() + MOST_AHEAD),
        }
    }

    /// What was said before (milliseconds since 1970) is too old.
    fn oldest_ms(&self) -> u64 {
        millis(unix_now().saturating_sub(self.max_age))
    }
}

/// The answers on disk.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Inner>,
    queue: mpsc::Sender<Record>,
    room: Arc<Semaphore>,
    stop: CancellationToken,
    stopped: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    settings: Settings,
    state: watch::Sender<State>,
    readers: Arc<Semaphore>,
    /// A read did not come in time, and none has ended since. Whoever sets it has one under way, which clears it.
    stands_still: AtomicBool,
    /// What reads ran into.
    trouble: mpsc::Sender<Trouble>,
    metrics: DiskMetrics,
}

#[derive(Clone, Debug)]
enum State {
    /// And what is there, as soon as that is known.
    Opening(Option<Book>),
    Open(Arc<File>),
    Away,
}

/// An answer on its way to the disk.
struct Record {
    place: u128,
    said_ms: u64,
    seal: Box<dyn FnOnce() -> Option<Vec<u8>> + Send>,
    /// Held until it is written.
    _room: OwnedSemaphorePermit,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens the file in the background.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(settings: Settings, metrics: DiskMetrics) -> Self {
        let (queue, records) = mpsc::channel(QUEUE);
        let (trouble, troubles) = mpsc::channel(1);
        let shared = Arc::new(Inner {
            settings,
            state: watch::Sender::new(State::Opening(None)),
            readers: Arc::new(Semaphore::new(READERS)),
            stands_still: AtomicBool::new(false),
            trouble,
            metrics,
        });
        let room = QUEUE_BYTES.min(usize::try_from(shared.settings.max_bytes / 8).unwrap_or(QUEUE_BYTES));
        let (stop, stopped) = (CancellationToken::new(), CancellationToken::new());
        let mut keeper = Keeper {
            shared: Arc::clone(&shared),
            records,
            troubles,
            stop: stop.clone(),
            said: None,
            retry: FIRST_RETRY,
        };
        let is_over = stopped.clone().drop_guard();
        let keeping = supervise("disk", async move || keeper.run().await);
        tokio::spawn(keeping.map(|()| drop(is_over)));
        Self {
            shared,
            queue,
            room: Arc::new(Semaphore::new(room)),
            stop,
            stopped,
        }
    }

    /// Has an answer of about `size` bytes kept at `place`, which upstream said at `said_ms` (milliseconds since 1970).
    /// `seal` gives its bytes, if it can be kept, and runs where it may take its time.
    pub fn put(&self, place: u128, said_ms: u64, size: usize, seal: impl FnOnce() -> Option<Vec<u8>> + Send + 'static) {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).try_acquire_many_owned(size);
        let is_queued = room.is_ok_and(|room| {
            let seal = Box::new(seal);
            let record = Record {
                place,
                said_ms,
                seal,
                _room: room,
            };
            self.queue.try_send(record).is_ok()
        });
        if !is_queued {
            self.shared.metrics.dropped.inc();
        }
    }

    /// Whether an answer may be kept at `place`; if not, there is nothing to wait for.
    pub fn may_hold(&self, place: u128) -> bool {
        let may = match &*self.shared.state.borrow() {
            State::Opening(book) => book.as_ref().is_none_or(|book| book.may_hold(place)),
            State::Open(file) => file.may_hold(place),
            State::Away => false,
        };
        may && !self.shared.stands_still.load(Ordering::Relaxed)
    }

    /// What `open` makes of the answer at `place`, on a thread where it may take its time; `None` when there is none, or
    /// it does not come within `patience`.
    ///
    /// Cancel safe.
    pub async fn get<T: Send + 'static>(
        &self,
        place: u128,
        patience: Duration,
        open: impl FnOnce(Vec<u8>) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let shared = &self.shared;
        let given_up = Instant::now() + patience;
        let mut reading = Box::pin(Arc::clone(shared).read(place, given_up, open));
        let Ok(read) = timeout_at(given_up, &mut reading).await else {
            // From now on nobody asks, and only what was asked before can tell that the disk goes on: so this is not
            // dropped, be it not even begun.
            shared.stands_still.store(true, Ordering::Relaxed);
            tokio::spawn(reading);
            shared.metrics.read(DiskRead::Slow);
            return None;
        };
        let read = read?;
        shared
            .metrics
            .read(if read.is_some() { DiskRead::Hit } else { DiskRead::Miss });
        read
    }

    /// Writes what waits to be written, and closes the file.
    ///
    /// Cancel safe: dropped, it goes on.
    pub async fn close(&self) {
        self.stop.cancel();
        self.stopped.cancelled().await;
    }
}

impl Inner {
    /// `None` when nothing was read. However it ends, the disk does not stand still.
    async fn read<T: Send + 'static>(
        self: Arc<Self>,
        place: u128,
        given_up: Instant,
        open: impl FnOnce(Vec<u8>) -> Option<T> + Send + 'static,
    ) -> Option<Option<T>> {
        let read = Arc::clone(&self).read_in_turn(place, given_up, open).await;
        self.stands_still.store(false, Ordering::Relaxed);
        read
    }

    async fn read_in_turn<T: Send + 'static>(
        self: Arc<Self>,
        place: u128,
        given_up: Instant,
        open: impl FnOnce(Vec<u8>) -> Option<T> + Send + 'static,
    ) -> Option<Option<T>> {
        // Before the file: whoever waits for a turn does not keep one open that is to be closed.
        let turn = Arc::clone(&self.readers).acquire_owned().await.ok()?;
        let mut state = self.state.subscribe();
        let state = state.wait_for(|state| !matches!(state, State::Opening(_))).await;
        let State::Open(file) = state.ok()?.clone() else {
            return None;
        };
        // What nobody waits for any more holds up nobody who does.
        if !file.may_hold(place) || Instant::now() >= given_up {
            return None;
        }
        let read = blocking(move || {
            // Until it is opened: an answer stands in memory several times till then.
            let _turn = turn;
            match file.read(place, self.settings.oldest_ms()) {
                Ok(sealed) => Some(sealed.and_then(open)),
                Err(trouble) => {
                    self.metrics.failed(DiskStep::Read);
                    // One is enough to have the file opened anew.
                    let _ = self.trouble.try_send(trouble);
                    None
                }
            }
        });
        read.await.ok().flatten()
    }

    fn set(&self, state: State) {
        self.metrics.up.set(i64::from(matches!(state, State::Open(_))));
        if let State::Open(file) = &state {
            self.show(file);
        } else {
            self.metrics.holds(0, 0);
        }
        self.state.send_replace(state);
    }

    /// It is opened for this. Not if nobody waits for that any more: work that found no thread may be done later.
    fn will_hold(&self, book: Book) {
        self.state.send_if_modified(|state| {
            let is_opening = matches!(state, State::Opening(_));
            if is_opening {
                *state = State::Opening(Some(book));
            }
            is_opening
        });
    }

    fn count(&self, gone: Gone) {
        self.metrics.evicted.inc_by(gone.evicted);
        self.metrics.expired.inc_by(gone.expired);
    }

    fn say_kept(&self, file: &File) {
        let (entries, bytes) = file.holds();
        tracing::info!(path = %self.settings.path.display(), entries, bytes, "ended tasks are kept on disk");
    }

    fn show(&self, file: &File) {
        let (entries, bytes) = file.holds();
        self.metrics.holds(entries, bytes);
    }
}

/// Who opens the file and writes to it.
struct Keeper {
    shared: Arc<Inner>,
    records: mpsc::Receiver<Record>,
    troubles: mpsc::Receiver<Trouble>,
    stop: CancellationToken,
    /// Of what was wrong with the file last, so that it is not said every few seconds.
    said: Option<String>,
    retry: Duration,
}

impl Keeper {
    /// Until it is stopped, and what was queued is written.
    async fn run(&mut self) {
        // After a panic the file may be open here still.
        self.shared.set(State::Opening(None));
        loop {
            let (path, bounds) = (self.shared.settings.path.clone(), self.shared.settings.bounds());
            let shared = Arc::clone(&self.shared);
            let opening = blocking(move || File::open(&path, bounds, |book| shared.will_hold(book)));
            let opened = self.watched(DiskStep::Open, opening).await;
            let trouble = match opened.unwrap_or_else(|error| Err(Trouble::Io(error))) {
                Ok((file, gone)) => {
                    self.shared.count(gone);
                    self.keep(Arc::new(file)).await
                }
                Err(trouble) => Some((DiskStep::Open, trouble)),
            };
            let Some((step, trouble)) = trouble else {
                return self.shared.set(State::Away);
            };
            let may_go_on = self.complain(step, trouble).await;
            self.shared
                .set(if may_go_on { State::Opening(None) } else { State::Away });
            if !may_go_on && self.pass_time().await {
                return;
            }
        }
    }

    /// Writes what comes, until it is stopped or something goes wrong.
    async fn keep(&mut self, file: Arc<File>) -> Option<(DiskStep, Trouble)> {
        if self.said.is_none() {
            self.shared.say_kept(&file);
        }
        while self.troubles.try_recv().is_ok() {}
        self.shared.set(State::Open(Arc::clone(&file)));
        // What became too old while nobody ran.
        let mut trouble = self.write(&file, Vec::new()).await;
        while trouble.is_none() {
            let mut batch = Vec::new();
            tokio::select! {
                biased;
                read = self.troubles.recv() => {
                    trouble = read.map(|read| (DiskStep::Read, read));
                    continue;
                }
                () = self.stop.cancelled(), if !self.records.is_closed() => {
                    self.records.close();
                    continue;
                }
                received = self.records.recv_many(&mut batch, QUEUE) => if received == 0 {
                    break;
                },
                () = sleep(SWEEP) => {}
            }
            if !batch.is_empty() {
                let gather =
                    async { while batch.len() < QUEUE && self.records.recv_many(&mut batch, QUEUE).await > 0 {} };
                tokio::select! {
                    biased;
                    () = self.stop.cancelled() => {}
                    _ = timeout(LINGER, gather) => {}
                }
            }
            trouble = self.write(&file, batch).await;
        }
        self.shared.set(State::Away);
        // Closing it may wait for the disk.
        let _ = blocking(move || drop(file)).await;
        trouble
    }

    async fn write(&mut self, file: &Arc<File>, batch: Vec<Record>) -> Option<(DiskStep, Trouble)> {
        let (metrics, queued) = (&self.shared.metrics, batch.len() as u64);
        let bounds = self.shared.settings.bounds();
        let file = Arc::clone(file);
        let writing = blocking(move || {
            let sealed = batch.into_iter().filter_map(|record| {
                let bytes = (record.seal)()?;
                Some(Sealed {
                    place: record.place,
                    said_ms: record.said_ms,
                    bytes,
                })
            });
            let sealed: Vec<_> = sealed.collect();
            let gone = file.write(&sealed, bounds)?;
            Ok((sealed.len() as u64, gone, file))
        });
        let written = self.watched(DiskStep::Write, writing).await;
        match written.unwrap_or_else(|error| Err(Trouble::Io(error))) {
            Ok((written, gone, file)) => {
                if written > 0 {
                    if self.said.take().is_some() {
                        // Not before: that it opens says nothing of room for an answer.
                        self.shared.say_kept(&file);
                    }
                    self.retry = FIRST_RETRY;
                }
                metrics.writes.inc_by(written);
                metrics.dropped.inc_by(queued - written);
                self.shared.count(gone);
                self.shared.show(&file);
                None
            }
            Err(trouble) => {
                metrics.dropped.inc_by(queued);
                Some((DiskStep::Write, trouble))
            }
        }
    }

    /// Waits for the disk however long it takes, and counts each `STALL` as a failure: else nobody would hear of a disk that
    /// stands still.
    async fn watched<T>(&self, step: DiskStep, work: impl Future<Output = T>) -> T {
        let (mut work, mut stands_still) = (pin!(work), false);
        let path = self.shared.settings.path.display();
        loop {
            if let Ok(done) = timeout(STALL, &mut work).await {
                if stands_still {
                    tracing::info!(%path, "cache.disk: the disk goes on");
                }
                return done;
            }
            self.shared.metrics.failed(step);
            if !stands_still {
                tracing::error!(
                    %path, operation = step.as_ref(),
                    what = "the disk has stood still for a minute: what is to be written waits",
                    fix = "see what the file is on; on Kubernetes its volume may be detached, and the pod has to move to where it is",
                    "cache.disk: nothing more is kept on disk until it goes on"
                );
            }
            stands_still = true;
        }
    }

    /// Says what is wrong and what to do; true when it is mended already.
    async fn complain(&mut self, step: DiskStep, trouble: Trouble) -> bool {
        self.shared.metrics.failed(step);
        let path = self.shared.settings.path.clone();
        let (what, fix) = match trouble {
            Trouble::Corrupt(what) => {
                let damaged = path.clone();
                match blocking(move || file::set_aside(&damaged)).await.flatten() {
                    Ok(aside) => {
                        tracing::error!(
                            path = %path.display(), operation = step.as_ref(), what, moved_to = %aside.display(),
                            "cache.disk: the file is corrupt; it is moved aside, and an empty one begun"
                        );
                        return true;
                    }
                    Err(error) => (
                        format!("it is corrupt ({what}), and cannot be moved aside: {error}"),
                        "delete it",
                    ),
                }
            }
            Trouble::InUse => (
                "another process has it open".to_owned(),
                "give each process a file of its own, or end the other",
            ),
            Trouble::Io(error) => (error.to_string(), fix(error.kind())),
        };
        if self.said.as_deref() != Some(&what) {
            tracing::error!(
                path = %path.display(), operation = step.as_ref(), what, fix,
                "cache.disk: the file cannot be used; nothing is kept on disk until it can"
            );
            self.said = Some(what);
        }
        false
    }

    /// Lets a while pass, in which nothing is written. True when it is to stop.
    async fn pass_time(&mut self) -> bool {
        let (stop, retry) = (self.stop.clone(), self.retry);
        self.retry = (retry * 2).min(LAST_RETRY);
        let drop_what_comes = async {
            while self.records.recv().await.is_some() {
                self.shared.metrics.dropped.inc();
            }
        };
        tokio::select! {
            () = stop.cancelled() => true,
            () = drop_what_comes => true,
            () = sleep(retry) => false,
        }
    }
}

/// What to do about it.
fn fix(kind: std::io::ErrorKind) -> &'static str {
    use std::io::ErrorKind;
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "there are many, and few that say what to do"
    )]
    match kind {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "let the gateway's user write the file and its folder (on Kubernetes: fsGroup, and a volume that is not read-only)"
        }
        full if file::is_full(full) => {
            "free space there, or lower cache.disk_max_bytes and restart; without the gateway running the file may be deleted"
        }
        ErrorKind::WouldBlock => "allow the process more threads (pids)",
        ErrorKind::IsADirectory => "name a file in that folder",
        _ => "name a file in a folder that exists and can be written",
    }
}

#[cfg(test)]
mod tests;

//! The file: sealed answers by place, and the order in which they go. Every call blocks.
//!
//! redb commits in two phases, so that what a kill, a torn write or a power cut leaves behind is the last commit, whole, and
//! opens at once. What is inside a page is not checked when it is read: a bad structure is an error or a panic, both of
//! which are taken for a corrupt file, and a bad answer does not open its seal. In memory are 64 bits of each place, so that
//! a task which is not there costs no read.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use redb::{AccessGuard, Builder, Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

/// By place: when upstream said it, in milliseconds since 1970, and the sealed answer.
const ANSWERS: TableDefinition<'_, u128, (u64, &[u8])> = TableDefinition::new("answers 1");

/// The oldest first: what each takes, in bytes.
const ORDER: TableDefinition<'_, (u64, u128), u64> = TableDefinition::new("order 1");

/// Pages that redb keeps in memory, in bytes; the system keeps the file's besides.
const PAGES: usize = 4 << 20;

/// What an answer takes beside its bytes, at most, and at least with them.
const ROW: u64 = 256;
const SMALLEST: u64 = 1024;

/// One part in so many is left for redb's own.
const SPARE: u64 = 8;

/// Why the file cannot be used.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Another process has it open.
    InUse,
    /// It is not as it was written.
    Corrupt(String),
    /// The system says so.
    Io(io::Error),
}

/// An answer to be written.
pub(super) struct Sealed {
    pub(super) place: u128,
    /// When upstream said it, in milliseconds since 1970.
    pub(super) said_ms: u64,
    pub(super) bytes: Vec<u8>,
}

/// How much may be kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) bytes: u64,
    /// Milliseconds since 1970: what was said before goes.
    pub(super) oldest_ms: u64,
    /// What was said after is of a clock that has been set back since, and opens for nobody: of what has to make room, it is
    /// the first.
    pub(super) newest_ms: u64,
}

/// What went, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) evicted: u64,
    pub(super) expired: u64,
}

/// The open file.
#[derive(Debug)]
pub(super) struct File {
    database: Database,
    book: Book,
}

/// What is there. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Book(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    places: HashSet<u64>,
    bytes: u64,
}

impl Book {
    /// Whether an answer may be kept there; if not, none is.
    pub(super) fn may_hold(&self, place: u128) -> bool {
        self.0.lock().places.contains(&mark(place))
    }
}

impl File {
    /// Opens the file, or makes one. One that takes more than `bounds` by now (they were lowered, or the sizes of answers left
    /// gaps) is made smaller; where not even that finds room, an empty one is begun: all in it can be asked for again. As making
    /// it smaller may take a while, `tell` is told before what is there.
    pub(super) fn open(path: &Path, bounds: Bounds, tell: impl FnOnce(Book)) -> Result<(Self, Gone), Trouble> {
        let is_too_large = taken(path) > bounds.bytes;
        let opened = Self::open_as_it_is(path);
        let opened = opened.and_then(|file| {
            if is_too_large {
                tell(file.book.clone());
                file.made_smaller(bounds)
            } else {
                Ok((file, Gone::default()))
            }
        });
        match opened {
            Err(Trouble::Io(error)) if is_too_large && is_full(error.kind()) => {
                tracing::warn!(
                    path = %path.display(), %error,
                    "cache.disk: the file is too large, and there is no room to make it smaller; an empty one is begun"
                );
                std::fs::remove_file(path).map_err(Trouble::Io)?;
                Ok((Self::open_as_it_is(path)?, Gone::default()))
            }
            opened => opened,
        }
    }

    fn made_smaller(mut self, bounds: Bounds) -> Result<(Self, Gone), Trouble> {
        let gone = self.write(&[], bounds)?;
        contained(|| Ok(self.database.compact()?))?;
        Ok((self, gone))
    }

    fn open_as_it_is(path: &Path) -> Result<Self, Trouble> {
        contained(|| {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(Trouble::Io)?;
            }
            let database = Builder::new().set_cache_size(PAGES).create(path)?;
            // A write that nothing follows: whoever may not write shall hear it now.
            let start = begin(&database)?;
            start.open_table(ANSWERS)?;
            start.open_table(ORDER)?;
            start.commit()?;
            let book = Book::default();
            for entry in database.begin_read()?.open_table(ORDER)?.iter()? {
                let (key, weight) = entry?;
                let (_, place) = key.value();
                let mut entries = book.0.lock();
                entries.places.insert(mark(place));
                entries.bytes += weight.value();
            }
            Ok(Self { database, book })
        })
    }

    /// Whether an answer may be kept there; if not, none is.
    pub(super) fn may_hold(&self, place: u128) -> bool {
        self.book.may_hold(place)
    }

    /// The sealed answer that is kept there, unless it is older than `oldest_ms`.
    pub(super) fn read(&self, place: u128, oldest_ms: u64) -> Result<Option<Vec<u8>>, Trouble> {
        contained(|| {
            let answers = self.database.begin_read()?.open_table(ANSWERS)?;
            let kept = answers.get(place)?;
            Ok(kept.and_then(|kept| {
                let (said_ms, sealed) = kept.value();
                (said_ms >= oldest_ms).then(|| sealed.to_vec())
            }))
        })
    }

    /// Writes `answers`, and lets go what is beyond `bounds`; durable, or not done at all.
    pub(super) fn write(&self, answers: &[Sealed], bounds: Bounds) -> Result<Gone, Trouble> {
        contained(|| {
            let (mut added, mut removed, mut gone) = (Vec::new(), Vec::new(), Gone::default());
            let mut bytes = self.book.0.lock().bytes;
            // What a commit writes and what it frees stand side by side until the next one.
            let passing: u64 = answers.iter().map(|answer| weight(answer.bytes.len())).sum();
            let most = (bounds.bytes - bounds.bytes / SPARE).saturating_sub(passing);
            let commit = begin(&self.database)?;
            {
                let (mut kept, mut order) = (commit.open_table(ANSWERS)?, commit.open_table(ORDER)?);
                for answer in answers {
                    let weight = weight(answer.bytes.len());
                    let before = kept.insert(answer.place, (answer.said_ms, answer.bytes.as_slice()))?;
                    if let Some(said_ms) = before.map(|before| before.value().0) {
                        let freed = order.remove((said_ms, answer.place))?;
                        bytes = bytes.saturating_sub(freed.map_or(0, |freed| freed.value()));
                    }
                    order.insert((answer.said_ms, answer.place), weight)?;
                    bytes += weight;
                    added.push(mark(answer.place));
                }
                loop {
                    let said = |(key, _): (AccessGuard<'_, (u64, u128)>, AccessGuard<'_, u64>)| key.value();
                    let (first, last) = (order.first()?.map(said), order.last()?.map(said));
                    let next = if let Some(old) = first.filter(|(said_ms, _)| *said_ms < bounds.oldest_ms) {
                        gone.expired += 1;
                        old
                    } else if let Some(oldest) = first.filter(|_| bytes > most) {
                        gone.evicted += 1;
                        last.filter(|(said_ms, _)| *said_ms > bounds.newest_ms)
                            .unwrap_or(oldest)
                    } else {
                        break;
                    };
                    let freed = order.remove(next)?.map_or(0, |freed| freed.value());
                    kept.remove(next.1)?;
                    bytes = bytes.saturating_sub(freed);
                    removed.push(mark(next.1));
                }
            }
            if answers.is_empty() && removed.is_empty() {
                commit.abort()?;
                return Ok(gone);
            }
            commit.commit()?;
            let mut entries = self.book.0.lock();
            entries.bytes = bytes;
            entries.places.extend(added);
            for place in removed {
                entries.places.remove(&place);
            }
            Ok(gone)
        })
    }

    /// How many answers are there, and what they take in bytes.
    pub(super) fn holds(&self) -> (usize, u64) {
        let entries = self.book.0.lock();
        (entries.places.len(), entries.bytes)
    }
}

/// What the file takes of its volume, in bytes: redb makes it longer than it writes.
fn taken(path: &Path) -> u64 {
    path.metadata().map_or(0, |is| is.blocks() * 512)
}

/// Whether that says that there is no room.
pub(super) fn is_full(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(kind, StorageFull | QuotaExceeded | FileTooLarge)
}

/// Moves a corrupt file out of the way, over one that was there before; says where it is.
pub(super) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".corrupt");
    std::fs::rename(path, &aside)?;
    Ok(aside.into())
}

fn begin(database: &Database) -> Result<redb::WriteTransaction, Trouble> {
    let mut commit = database.begin_write()?;
    // Without it the next process, after a kill, would read the whole file before it opens.
    commit.set_quick_repair(true);
    Ok(commit)
}

/// redb panics where a page is not what another one says.
fn contained<T>(work: impl FnOnce() -> Result<T, Trouble>) -> Result<T, Trouble> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Trouble::Corrupt("a page is not what it should be".to_owned())))
}

/// What is remembered of a place.
fn mark(place: u128) -> u64 {
    u64::try_from(place >> 64).unwrap_or_default()
}

/// What an answer takes in the file, in bytes: redb gives room by powers of two, one page at least, in which several small
/// ones stand; and both tables, and what a commit leaves free for the next.
fn weight(sealed: usize) -> u64 {
    (sealed as u64 + ROW).next_power_of_two().max(SMALLEST) + ROW
}

impl Trouble {
    #[allow(clippy::wildcard_enum_match_arm, reason = "redb may come to know more errors")]
    fn of(error: redb::Error) -> Self {
        match error {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => Self::InUse,
            redb::Error::Io(error) => match error.kind() {
                // What is no database at all, and one that is shorter than it says: no retry mends it.
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Self::Corrupt(error.to_string()),
                _ => Self::Io(error),
            },
            // After a failed write nothing more is done with the file until it is opened anew.
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => Self::Io(io::Error::other(error.to_string())),
            other => Self::Corrupt(other.to_string()),
        }
    }
}

macro_rules! from_redb {
    ($($error:ident),*) => {
        $(impl From<redb::$error> for Trouble {
            fn from(error: redb::$error) -> Self {
                Self::of(error.into())
            }
        })*
    };
}

from_redb!(
    DatabaseError,
    StorageError,
    TransactionError,
    TableError,
    CommitError,
    CompactionError
);

#[cfg(test)]
mod tests;

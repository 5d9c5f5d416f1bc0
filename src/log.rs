//! The log: lines to stderr, for which nobody waits.
//!
//! A container's stderr is a pipe, and whoever reads it may stop: a full one would hold up every thread that has something
//! to say. So lines go to a thread that alone writes them. Where it falls behind, the newest are dropped and counted, and
//! what is left is written before the process ends, as far as somebody reads it. A panic is a line like any other.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::Level;
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Registry, reload};

use crate::config;
use crate::config::LogFormat;
use crate::metrics::Metrics;

/// Lines that wait to be written: some 2 MB, and at `log.level: info`, where a line is an attempt, half a minute of twenty
/// accounts.
const MOST_LINES: usize = 8192;

/// How long the guard of the thread that writes waits for it at most (a second and a tenth), and a little.
const LONGEST_FLUSH: Duration = Duration::from_millis(1500);

/// So many bytes are written at once: as many as a pipe holds.
const MOST_AT_ONCE: usize = 64 << 10;

/// For how long the thread rests when it has written all there was: a line that comes meanwhile waits for it, so that a
/// thousand lines a second are two hundred writes, and as many changes of threads.
const REST: Duration = Duration::from_millis(5);

/// The way to stderr. Dropped, it writes what is left, for at most `LONGEST_FLUSH`.
pub struct Log {
    lines: NonBlocking,
    unwritten: Arc<AtomicU64>,
    /// Once it is started, whoever reads it may understand nothing else.
    is_json: AtomicBool,
    flush: Option<WorkerGuard>,
}

impl Log {
    /// Opens it. Nothing is logged before [`Self::start`].
    pub fn to_stderr() -> Self {
        let unwritten = Arc::new(AtomicU64::new(0));
        let stderr = Piled {
            to: Patient(io::stderr()),
            rest: REST,
            lines: Vec::new(),
            is_begun: false,
            unwritten: Arc::clone(&unwritten),
        };
        let (lines, flush) = NonBlockingBuilder::default()
            .buffered_lines_limit(MOST_LINES)
            .lossy(true)
            .thread_name("log")
            .finish(stderr);
        Self {
            lines,
            unwritten,
            is_json: AtomicBool::new(false),
            flush: Some(flush),
        }
    }

    /// Says something to whoever started the process, in the order of the log; once that is started as JSON, as a line of it.
    pub fn say(&self, text: &str) {
        if self.is_json.load(Ordering::Relaxed) {
            tracing::error!("{text}");
            return;
        }
        // Where stderr is closed there is nobody to tell.
        let _ = self.lines.clone().write_all(format!("{text}\n").as_bytes());
    }

    /// Has `metrics` count the lines that were dropped, since nobody read the ones before or could.
    ///
    /// # Errors
    /// Only for a bug: they are counted already.
    pub fn count_in(&self, metrics: &Metrics) -> anyhow::Result<()> {
        let (dropped, unwritten) = (self.lines.error_counter(), Arc::clone(&self.unwritten));
        let lost = move || dropped.dropped_lines() as u64 + unwritten.load(Ordering::Relaxed);
        Ok(metrics.log_lines_dropped(lost)?)
    }

    /// From now on what happens is logged, as `log` says, panics too, which `metrics` count. Gives what changes the level.
    pub fn start(&self, log: &config::Log, metrics: &Metrics) -> impl Fn(Level) + Send + 'static {
        let (filter, level) = reload::Layer::<_, Registry>::new(targets(log.level));
        let registry = tracing_subscriber::registry().with(filter);
        let lines = tracing_subscriber::fmt::layer()
            .with_timer(Clock)
            .with_writer(self.lines.clone());
        match log.format {
            LogFormat::Text => registry.with(lines.with_ansi(false)).init(),
            LogFormat::Json => registry.with(lines.json().flatten_event(true)).init(),
        }
        self.is_json.store(log.format == LogFormat::Json, Ordering::Relaxed);
        let panics = metrics.panics.clone();
        // All come by here, and once, whoever contains them.
        std::panic::set_hook(Box::new(move |info| {
            panics.inc();
            log_panic(info);
        }));
        // The log outlives everything that could have a level to set.
        move |to| drop(level.modify(|filter| *filter = targets(to)))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let flush = self.flush.take();
        let (done, flushed) = mpsc::channel();
        // The guard says on stdout where nobody reads the log, and waits for whoever reads that: maybe the same nobody.
        let flushing = thread::Builder::new().name("log end".to_owned()).spawn(move || {
            drop(flush);
            // Nobody waits any more, where it took too long.
            let _ = done.send(());
        });
        if flushing.is_ok() {
            // As soon as it is done, or cannot be.
            let _ = flushed.recv_timeout(LONGEST_FLUSH);
        }
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

/// Our own words at the configured level; other crates' only as warnings, since what they print about a request is not
/// under our control.
fn targets(level: Level) -> Targets {
    Targets::new()
        .with_default(Level::WARN)
        .with_target("crun_gateway", level)
}

/// The time of day as tracing's own clock writes it, for a fifth of what that takes.
struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, to: &mut Writer<'_>) -> fmt::Result {
        write!(to, "{}", humantime::format_rfc3339_micros(SystemTime::now()))
    }
}

/// std's own hook writes to stderr itself, and waits.
fn log_panic(info: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
    tracing::error!(
        thread = thread::current().name(),
        location = info.location().map(tracing::field::display),
        // `message` is what the line has already.
        error = info.payload_as_str(),
        backtrace = backtrace.as_ref().map(tracing::field::display),
        "panicked"
    );
}

/// What the thread writes to: lines that come while it writes or rests go out together.
struct Piled<W> {
    to: W,
    /// For how long nothing more is written.
    rest: Duration,
    lines: Vec<u8>,
    /// Whether they begin within a line, of which the beginning is written.
    is_begun: bool,
    unwritten: Arc<AtomicU64>,
}

impl<W: Write> Write for Piled<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.len() + line.len() > MOST_AT_ONCE {
            self.write_out();
        }
        self.lines.extend_from_slice(line);
        Ok(line.len())
    }

    /// The thread does it as soon as no further line waits.
    #[expect(clippy::disallowed_methods, reason = "the thread has nothing else to do")]
    fn flush(&mut self) -> io::Result<()> {
        if !self.lines.is_empty() {
            self.write_out();
            thread::sleep(self.rest);
        }
        Ok(())
    }
}

impl<W: Write> Piled<W> {
    fn write_out(&mut self) {
        let written = written(&mut self.to, &self.lines);
        if let Some(last) = written.checked_sub(1) {
            self.is_begun = self.lines[last] != b'\n';
        }
        self.lines.drain(..written);
        // What follows would else be glued to it, and lost, too.
        let rest_of_line = memchr::memchr(b'\n', &self.lines).filter(|_| self.is_begun);
        let kept = rest_of_line.map_or(0, |end| end + 1);
        let lost = memchr::memchr_iter(b'\n', &self.lines[kept..]).count();
        self.lines.truncate(kept);
        self.unwritten.fetch_add(lost as u64, Ordering::Relaxed);
    }
}

/// Writes as many of `lines` as `to` takes; says how many bytes that is.
fn written(to: &mut impl Write, lines: &[u8]) -> usize {
    let mut left = lines;
    while !left.is_empty() {
        match to.write(left) {
            Ok(0) => break,
            Ok(written) => left = &left[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    lines.len() - left.len()
}

/// Waits for whoever reads, where that is no pipe that does so itself: others may share it, and one of them may have it so.
struct Patient<W>(W);

impl<W: Write + AsFd> Write for Patient<W> {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(lines) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let room = PollFd::new(self.0.as_fd(), PollFlags::POLLOUT);
                    poll(&mut [room], PollTimeout::NONE)?;
                }
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// What was written, write by write, as far as there is room.
    struct Reader {
        read: Vec<String>,
        room: usize,
    }

    impl Default for Reader {
        fn default() -> Self {
            Self {
                read: Vec::new(),
                room: usize::MAX,
            }
        }
    }

    impl Write for &mut Reader {
        fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
            let taken = lines.len().min(self.room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= taken;
            self.read.push(String::from_utf8_lossy(&lines[..taken]).into_owned());
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn piled(to: &mut Reader) -> Piled<&mut Reader> {
        Piled {
            to,
            rest: Duration::ZERO,
            lines: Vec::new(),
            is_begun: false,
            unwritten: Arc::default(),
        }
    }

    #[test]
    fn lines_that_pile_up_are_written_together_and_no_more_of_them_than_a_pipe_holds() {
        let mut reader = Reader::default();
        let mut log = piled(&mut reader);
        log.write_all(b"a\n").unwrap();
        log.write_all(b"b\n").unwrap();
        log.flush().unwrap();
        log.write_all(b"c\n").unwrap();
        log.flush().unwrap();
        let half = format!("{}\n", "d".repeat(MOST_AT_ONCE / 2));
        for _ in 0..2 {
            log.write_all(half.as_bytes()).unwrap();
        }
        log.flush().unwrap();
        assert_eq!(reader.read, ["a\nb\n", "c\n", &half, &half]);
    }

    #[test]
    fn a_full_stream_that_does_not_wait_itself_is_waited_for() {
        let (stderr, mut reader) = UnixStream::pair().unwrap();
        stderr.set_nonblocking(true).unwrap();
        let mut log = Piled {
            to: Patient(stderr),
            rest: Duration::ZERO,
            lines: Vec::new(),
            is_begun: false,
            unwritten: Arc::default(),
        };
        let mut full = 0;
        while let Ok(written) = log.to.0.write(&vec![b' '; MOST_AT_ONCE]) {
            full += written;
        }
        // Many times what it holds: it is full again and again.
        let lines: Vec<_> = (0..20_000).map(|number| format!("{number:1000}\n")).collect();
        let read = thread::spawn(move || {
            let mut read = Vec::new();
            reader.read_to_end(&mut read).map(|_| read.split_off(full))
        });
        for line in &lines {
            log.write_all(line.as_bytes()).unwrap();
        }
        log.flush().unwrap();
        assert_eq!(log.unwritten.load(Ordering::Relaxed), 0);
        drop(log);
        assert!(read.join().unwrap().unwrap() == lines.concat().as_bytes());
    }

    #[test]
    fn each_line_that_nobody_reads_is_counted() {
        let mut reader = Reader::default();
        let mut log = piled(&mut reader);
        log.write_all(b"a\n").unwrap();
        log.flush().unwrap();
        log.to.room = 0;
        log.write_all(b"b\n").unwrap();
        log.write_all(b"c\n").unwrap();
        log.flush().unwrap();
        log.flush().unwrap();
        assert_eq!(log.unwritten.load(Ordering::Relaxed), 2);
        log.to.room = usize::MAX;
        log.write_all(b"d\n").unwrap();
        log.flush().unwrap();
        assert_eq!(reader.read, ["a\n", "d\n"]);
    }

    #[test]
    fn a_line_is_written_whole_or_not_at_all_however_full_the_disk_was() {
        for room in 0..=9 {
            let mut reader = Reader {
                room,
                ..Reader::default()
            };
            let mut log = piled(&mut reader);
            log.write_all(b"a1\nb2\nc3\n").unwrap();
            log.flush().unwrap();
            // Still full.
            log.write_all(b"d4\n").unwrap();
            log.flush().unwrap();
            log.to.room = usize::MAX;
            log.write_all(b"e5\n").unwrap();
            log.flush().unwrap();
            let begun = room.div_ceil(3);
            let lost = log.unwritten.load(Ordering::Relaxed);
            assert_eq!(lost, 4 - begun as u64, "{room}");
            let written = [&["a1\n", "b2\n", "c3\n"][..begun], &["e5\n"]].concat();
            assert_eq!(reader.read.concat(), written.concat(), "{room}");
        }
    }
}

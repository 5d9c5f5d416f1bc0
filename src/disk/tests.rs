use std::path::Path;
use std::sync::LazyLock;

use tracing::Dispatch;
use tracing::subscriber::NoSubscriber;

use super::*;
use crate::metrics::Metrics;

const PATIENCE: Duration = Duration::from_mins(1);

/// Two places, as far apart as digests are.
const A: u128 = 7 << 100;
const B: u128 = 8 << 100;

fn settings(folder: &Path) -> Settings {
    Settings {
        path: folder.join("answers"),
        max_bytes: 16 << 20,
        max_age: Duration::from_hours(1),
    }
}

fn metrics() -> (Arc<Metrics>, DiskMetrics) {
    let metrics = Arc::new(Metrics::new().unwrap());
    let disk = metrics.disk.clone();
    (metrics, disk)
}

fn now_ms() -> u64 {
    millis(unix_now())
}

fn text(sealed: Vec<u8>) -> Option<String> {
    String::from_utf8(sealed).ok()
}

/// Whether a line of what Prometheus sees is `line`.
fn shows(metrics: &Metrics, line: &str) -> bool {
    let text = String::from_utf8(metrics.render().unwrap()).unwrap();
    text.lines().any(|shown| shown == line)
}

#[tokio::test]
async fn what_is_put_can_be_got_by_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::open(settings(folder.path()), metrics().1);
    disk.put(A, now_ms(), 3, || Some(b"abc".to_vec()));
    disk.put(B, now_ms(), 3, || None);
    disk.close().await;
    assert!(!disk.may_hold(A), "closed");

    let (metrics, disk_metrics) = metrics();
    let disk = Disk::open(settings(folder.path()), disk_metrics);
    assert_eq!(disk.get(A, PATIENCE, text).await.as_deref(), Some("abc"));
    assert_eq!(disk.get(B, PATIENCE, text).await, None);
    assert!(disk.may_hold(A) && !disk.may_hold(B));
    assert_eq!(disk.get(A, PATIENCE, |_| None::<()>).await, None, "it does not open");
    for (result, times) in [("hit", 1), ("miss", 1), ("slow", 0)] {
        let line = format!(r#"crun_gateway_disk_reads_total{{result="{result}"}} {times}"#);
        assert!(shows(&metrics, &line), "{line}");
    }
}

/// A disk that has written one answer, at `A`.
async fn with_one(folder: &Path) -> (Arc<Metrics>, Disk) {
    let (metrics, disk_metrics) = metrics();
    let disk = Disk::open(settings(folder), disk_metrics);
    disk.put(A, now_ms(), 3, || Some(b"abc".to_vec()));
    while metrics.disk.writes.get() < 1 {
        tokio::task::yield_now().await;
    }
    (metrics, disk)
}

/// As many reads as there may be, none of which ends before this is dropped.
async fn all_readers(disk: &Disk) -> OwnedSemaphorePermit {
    let readers = u32::try_from(READERS).unwrap();
    let readers = Arc::clone(&disk.shared.readers).acquire_many_owned(readers);
    readers.await.unwrap()
}

#[tokio::test]
async fn while_the_disk_stands_still_nobody_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (metrics, disk) = with_one(folder.path()).await;
    let stuck = all_readers(&disk).await;
    assert!(disk.may_hold(A));
    assert_eq!(disk.get(A, Duration::from_millis(1), text).await, None);
    assert!(shows(&metrics, r#"crun_gateway_disk_reads_total{result="slow"} 1"#));
    assert!(!disk.may_hold(A), "the next one does not even ask");
    drop(stuck);
    assert_goes_on(&disk).await;
    assert!(
        shows(&metrics, r#"crun_gateway_disk_reads_total{result="hit"} 1"#),
        "what was given up is not counted again"
    );
}

#[tokio::test]
async fn a_file_that_opens_slowly_is_read_once_it_is_open() {
    let folder = tempfile::tempdir().unwrap();
    let (_, disk) = with_one(folder.path()).await;
    let open = disk.shared.state.send_replace(State::Opening(None));
    // B is not in the file, which nobody knows yet.
    for place in [A, B] {
        assert_eq!(disk.get(place, Duration::from_millis(1), text).await, None);
    }
    assert!(!disk.may_hold(A), "the next one does not wait for it");
    disk.shared.set(open);
    assert_goes_on(&disk).await;
    assert!(!disk.may_hold(B));
}

#[tokio::test]
async fn while_a_file_is_made_smaller_nobody_waits_for_what_is_not_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_, disk) = with_one(folder.path()).await;
    disk.close().await;
    disk.shared.set(State::Opening(None));
    // Less than an empty file takes, and room for one answer.
    let bounds = Bounds {
        bytes: 8 << 10,
        ..disk.shared.settings.bounds()
    };
    let (file, _) = File::open(&disk.shared.settings.path, bounds, |book| disk.shared.will_hold(book)).unwrap();
    assert!(disk.may_hold(A) && !disk.may_hold(B));
    disk.shared.set(State::Open(Arc::new(file)));
    assert_eq!(disk.get(A, PATIENCE, text).await.as_deref(), Some("abc"));
}

#[tokio::test]
async fn a_read_given_up_keeps_nobody_from_a_file_that_was_closed_and_opened_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (_, disk) = with_one(folder.path()).await;
    let stuck = all_readers(&disk).await;
    assert_eq!(disk.get(A, Duration::from_millis(1), text).await, None);
    // As after any trouble.
    let State::Open(file) = disk.shared.state.send_replace(State::Away) else {
        panic!("it was open");
    };
    // The keeper's and this one.
    assert_eq!(Arc::strong_count(&file), 2, "nobody who waits holds it");
    drop(stuck);
    disk.shared.set(State::Open(file));
    assert_goes_on(&disk).await;
}

#[tokio::test]
async fn no_more_answers_are_opened_at_once_than_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let (_, disk) = with_one(folder.path()).await;
    let disk = Arc::new(disk);
    let (are_opening, mut opening) = mpsc::channel(READERS);
    let (go_on, stuck) = std::sync::mpsc::channel::<()>();
    let stuck = Arc::new(parking_lot::Mutex::new(stuck));
    let opens: Vec<_> = (0..READERS)
        .map(|_| {
            let (disk, is_opening, stuck) = (Arc::clone(&disk), are_opening.clone(), Arc::clone(&stuck));
            tokio::spawn(async move {
                let open = move |_| {
                    is_opening.blocking_send(()).unwrap();
                    // Until nobody can tell it to go on any more.
                    stuck.lock().recv().ok()
                };
                disk.get(A, PATIENCE, open).await
            })
        })
        .collect();
    for _ in 0..READERS {
        opening.recv().await.unwrap();
    }
    assert_eq!(disk.get(A, Duration::from_millis(1), text).await, None);
    drop(go_on);
    for open in opens {
        assert_eq!(open.await.unwrap(), None);
    }
    assert_goes_on(&disk).await;
}

/// That what is on disk is read again, without anybody's asking in spite of what `may_hold` says.
async fn assert_goes_on(disk: &Disk) {
    let may = async {
        while !disk.may_hold(A) {
            sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(timeout(PATIENCE, may).await.is_ok(), "nobody may ask any more");
    assert_eq!(disk.get(A, PATIENCE, text).await.as_deref(), Some("abc"));
    assert!(disk.may_hold(A));
}

#[tokio::test]
async fn a_put_never_waits_and_what_finds_no_room_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (_, metrics) = metrics();
    // Nothing is awaited here, so nothing is written meanwhile.
    let disk = Disk::open(settings(folder.path()), metrics.clone());
    for place in 0..QUEUE + 5 {
        disk.put(A + place as u128, now_ms(), 10, || Some(vec![0; 10]));
    }
    assert_eq!(metrics.dropped.get(), 5, "more than may wait");
    disk.close().await;
    assert_eq!(metrics.writes.get(), QUEUE as u64);

    let disk = Disk::open(settings(folder.path()), metrics.clone());
    let eighth = 2 << 20;
    disk.put(A, now_ms(), eighth - 10, || None);
    disk.put(B, now_ms(), 11, || None);
    assert_eq!(metrics.dropped.get(), 6, "larger than may wait");
    disk.close().await;
    assert_eq!(metrics.dropped.get(), 7, "what comes to nothing is not written, either");
}

#[tokio::test(start_paused = true)]
async fn what_comes_within_a_moment_is_written_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (_, metrics) = metrics();
    let disk = Disk::open(settings(folder.path()), metrics.clone());
    let start = Instant::now();
    disk.put(A, now_ms(), 1, || Some(vec![1]));
    while metrics.writes.get() < 1 {
        sleep(Duration::from_millis(1)).await;
    }
    assert!(start.elapsed() >= LINGER, "it waited for others: {:?}", start.elapsed());
    drop(disk);
}

/// Keeps the process from having a single listener: tracing would ask the thread that comes upon a line first whether anybody
/// listens, for all threads and for good, and another test's says no.
static OTHER_LISTENERS: LazyLock<[Dispatch; 2]> =
    LazyLock::new(|| [(); 2].map(|()| Dispatch::new(NoSubscriber::new())));

#[tokio::test(start_paused = true)]
async fn that_answers_are_kept_again_is_said_when_one_is() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let lines = tracing_subscriber::fmt().with_writer(Arc::new(std::fs::File::create(&log).unwrap()));
    LazyLock::force(&OTHER_LISTENERS);
    let _logging = tracing::subscriber::set_default(lines.finish());
    let said = |text| std::fs::read_to_string(&log).unwrap().matches(text).count();
    let (_, metrics) = metrics();
    let disk = Disk::open(settings(folder.path()), metrics.clone());
    let comes = async |up| {
        while metrics.up.get() != up {
            sleep(Duration::from_millis(1)).await;
        }
    };
    comes(1).await;
    for retries in 1..4 {
        let full = Trouble::Io(std::io::ErrorKind::StorageFull.into());
        disk.shared.trouble.send(full).await.unwrap();
        comes(0).await;
        comes(1).await;
        assert_eq!((said("cannot be used"), said("are kept on disk")), (1, 1), "{retries}");
    }
    disk.put(B, now_ms(), 3, || Some(b"abc".to_vec()));
    disk.close().await;
    assert_eq!((said("cannot be used"), said("are kept on disk")), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_file_that_cannot_be_used_is_tried_again_after_five_seconds_and_then_less_often() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path());
    let in_the_way = settings.path.clone();
    std::fs::create_dir(&in_the_way).unwrap();
    let (all, metrics) = metrics();
    let failed = async |times| {
        let line = format!(r#"crun_gateway_disk_errors_total{{operation="open"}} {times}"#);
        while !shows(&all, &line) {
            sleep(Duration::from_millis(1)).await;
        }
        Instant::now()
    };
    let comes = async |up| {
        while metrics.up.get() != up {
            sleep(Duration::from_millis(1)).await;
        }
        Instant::now()
    };
    let about = |waited: Duration, wait| (wait..wait + 2).contains(&waited.as_secs());
    let disk = Disk::open(settings, metrics.clone());
    let mut tried = failed(1).await;
    for (times, wait) in [(2, 5), (3, 10), (4, 20)] {
        let again = failed(times).await;
        assert!(about(again - tried, wait), "{:?}, not {wait} s", again - tried);
        tried = again;
    }
    std::fs::remove_dir(&in_the_way).unwrap();
    comes(1).await;
    disk.put(A, now_ms(), 3, || Some(b"abc".to_vec()));
    while metrics.writes.get() < 1 {
        sleep(Duration::from_millis(1)).await;
    }
    // An answer is written: what comes next is another trouble.
    let full = Trouble::Io(std::io::ErrorKind::StorageFull.into());
    disk.shared.trouble.send(full).await.unwrap();
    let (away, back) = (comes(0).await, comes(1).await);
    assert!(about(back - away, 5), "{:?}", back - away);
}

#[tokio::test]
async fn what_becomes_too_old_goes_though_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (_, metrics) = metrics();
    let max_age = Duration::from_millis(700);
    let settings = Settings {
        max_age,
        ..settings(folder.path())
    };
    let disk = Disk::open(settings, metrics.clone());
    let said = now_ms();
    disk.put(A, said, 3, || Some(b"abc".to_vec()));
    while metrics.writes.get() < 1 || now_ms() <= said + millis(max_age) {
        sleep(Duration::from_millis(1)).await;
    }
    tokio::time::pause();
    tokio::time::advance(SWEEP + Duration::from_millis(2)).await;
    tokio::time::resume();
    let goes = async {
        while metrics.expired.get() < 1 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(SWEEP / 6, goes).await.unwrap();
    assert_eq!(metrics.entries.get(), 0);
}

#[tokio::test]
async fn a_disk_that_stands_still_fails_once_a_minute() {
    let folder = tempfile::tempdir().unwrap();
    let (metrics, disk) = with_one(folder.path()).await;
    let failed = |times| {
        shows(
            &metrics,
            &format!(r#"crun_gateway_disk_errors_total{{operation="write"}} {times}"#),
        )
    };
    let (go_on, stuck) = std::sync::mpsc::channel();
    let (is_stuck, written) = tokio::sync::oneshot::channel();
    disk.put(B, now_ms(), 3, move || {
        is_stuck.send(()).unwrap();
        stuck.recv().unwrap();
        Some(b"def".to_vec())
    });
    written.await.unwrap();
    tokio::time::pause();
    for times in 1..=4 {
        assert!(failed(times - 1));
        // Timers go by whole milliseconds.
        tokio::time::advance(STALL + Duration::from_millis(2)).await;
        tokio::task::yield_now().await;
        assert!(failed(times), "{times}");
    }
    tokio::time::resume();
    go_on.send(()).unwrap();
    while metrics.disk.writes.get() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(disk.get(B, PATIENCE, text).await.as_deref(), Some("def"));
    assert!(failed(4));
}

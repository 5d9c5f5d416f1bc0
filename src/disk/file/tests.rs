use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const MIB: u64 = 1 << 20;
const ANY: Bounds = Bounds {
    bytes: u64::MAX,
    oldest_ms: 0,
    newest_ms: u64::MAX,
};

/// As a digest would be.
fn place(number: u64) -> u128 {
    u128::from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) << 64 | u128::from(number)
}

fn sealed(number: u64, length: usize) -> Sealed {
    Sealed {
        place: place(number),
        said_ms: 1_000_000 + number,
        bytes: vec![u8::try_from(number % 251).unwrap(); length],
    }
}

fn at(folder: &TempDir) -> PathBuf {
    folder.path().join("answers")
}

fn open(folder: &TempDir) -> File {
    File::open(&at(folder), ANY, |_| {}).unwrap().0
}

/// What the file takes of its volume. Not its length: redb makes it longer than it writes.
fn taken(folder: &TempDir) -> u64 {
    at(folder).metadata().unwrap().blocks() * 512
}

#[test]
fn what_was_written_is_there_when_it_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    assert!(!file.may_hold(place(1)));
    file.write(&[sealed(1, 10), sealed(2, 100_000)], ANY).unwrap();
    let held = file.holds();
    drop(file);
    let file = open(&folder);
    assert_eq!((file.holds(), held.0), (held, 2));
    for (number, length) in [(1, 10), (2, 100_000)] {
        assert!(file.may_hold(place(number)));
        assert_eq!(file.read(place(number), 0).unwrap(), Some(sealed(number, length).bytes));
    }
    assert!(!file.may_hold(place(3)));
    assert_eq!(file.read(place(3), 0).unwrap(), None);
}

#[test]
fn an_answer_takes_the_place_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    file.write(&[sealed(1, 5000), sealed(2, 10)], ANY).unwrap();
    let later = Sealed {
        said_ms: 2_000_000,
        ..sealed(1, 10)
    };
    file.write(&[later], ANY).unwrap();
    assert_eq!(file.holds(), (2, 2 * weight(10)));
    assert_eq!(file.read(place(1), 0).unwrap(), Some(sealed(1, 10).bytes));
    let only_later = Bounds {
        oldest_ms: 2_000_000,
        ..ANY
    };
    assert_eq!(file.write(&[], only_later).unwrap(), Gone { evicted: 0, expired: 1 });
    assert!(file.may_hold(place(1)) && !file.may_hold(place(2)), "it counts as new");
}

#[test]
fn what_upstream_said_too_long_ago_goes() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    let answers: Vec<_> = (0..10).map(|number| sealed(number, 10)).collect();
    file.write(&answers, ANY).unwrap();
    let bounds = Bounds {
        oldest_ms: 1_000_004,
        ..ANY
    };
    assert_eq!(file.write(&[], bounds).unwrap(), Gone { evicted: 0, expired: 4 });
    assert_eq!(file.write(&[], bounds).unwrap(), Gone::default());
    assert_eq!(file.read(place(3), 0).unwrap(), None);
    assert!(file.read(place(4), 1_000_004).unwrap().is_some());
    assert!(
        file.read(place(4), 1_000_005).unwrap().is_none(),
        "whatever is there yet"
    );
    assert_eq!(open_after(file, &folder).holds().0, 6);
}

fn open_after(file: File, folder: &TempDir) -> File {
    drop(file);
    open(folder)
}

#[test]
fn the_oldest_make_room_and_the_file_stays_within_its_bound() {
    // The sizes of answers that there are: small failures, songs, and bodies that echo what was sent.
    for lengths in [
        &[500][..],
        &[2200],
        &[1500, 3000, 900],
        &[4200],
        &[600, 70_000, 2200, 9000],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = open(&folder);
        let bounds = Bounds { bytes: 4 * MIB, ..ANY };
        let (mut number, mut written, mut gone) = (0, 0, 0);
        while written < 9 * MIB {
            let batch: Vec<_> = (0..20)
                .map(|_| {
                    number += 1;
                    sealed(number, lengths[usize::try_from(number).unwrap() % lengths.len()])
                })
                .collect();
            written += batch.iter().map(|answer| weight(answer.bytes.len())).sum::<u64>();
            gone += file.write(&batch, bounds).unwrap().evicted;
            let (_, bytes) = file.holds();
            assert!(bytes <= bounds.bytes);
            let taken = taken(&folder);
            assert!(taken <= bounds.bytes, "{lengths:?}: {taken} after {number}");
        }
        let (entries, bytes) = file.holds();
        assert_eq!(number, gone + entries as u64);
        assert!(bytes > bounds.bytes / 2, "no more than has to");
        assert!(file.read(place(gone), 0).unwrap().is_none() && file.read(place(gone + 1), 0).unwrap().is_some());
    }
}

#[test]
fn what_is_of_a_time_to_come_makes_room_before_the_oldest() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    let answers: Vec<_> = (0..10).map(|number| sealed(number, 1000)).collect();
    file.write(&answers, ANY).unwrap();
    let has = |number| file.may_hold(place(number));
    // Room for six.
    let bounds = Bounds {
        bytes: 8 * weight(1000),
        newest_ms: 1_000_007,
        ..ANY
    };
    assert_eq!(
        file.write(
            &[],
            Bounds {
                bytes: u64::MAX,
                ..bounds
            }
        )
        .unwrap(),
        Gone::default()
    );
    let now = Sealed {
        said_ms: 1_000_007,
        ..sealed(10, 1000)
    };
    assert_eq!(file.write(&[now], bounds).unwrap(), Gone { evicted: 5, expired: 0 });
    assert!((0..3).chain([8, 9]).all(|number| !has(number)));
    assert!((3..8).chain([10]).all(has));
}

#[test]
fn a_file_that_takes_more_than_it_may_by_now_is_smaller_once_it_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    for batch in 0..20 {
        let answers: Vec<_> = (0..100).map(|number| sealed(100 * batch + number, 9000)).collect();
        file.write(&answers, ANY).unwrap();
    }
    drop(file);
    let lowered = Bounds { bytes: 4 * MIB, ..ANY };
    assert!(taken(&folder) > 4 * lowered.bytes);
    let mut is_told = false;
    let tell = |book: Book| {
        is_told = book.may_hold(place(1999)) && !book.may_hold(place(2000));
        assert!(taken(&folder) > 4 * lowered.bytes, "before it is made smaller");
    };
    let (file, gone) = File::open(&at(&folder), lowered, tell).unwrap();
    assert!(is_told);
    assert!(taken(&folder) <= lowered.bytes, "{}", taken(&folder));
    let (entries, bytes) = file.holds();
    assert_eq!(gone.evicted + entries as u64, 2000);
    assert!(bytes > lowered.bytes / 2, "no more than has to");
    assert_eq!(file.read(place(1999), 0).unwrap(), Some(sealed(1999, 9000).bytes));
    // And stays usable.
    file.write(&[sealed(2000, 9000)], lowered).unwrap();
    drop(file);
    let (file, gone) = File::open(&at(&folder), lowered, |_| {}).unwrap();
    assert_eq!((gone, file.may_hold(place(2000))), (Gone::default(), true));
}

#[test]
fn one_process_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    assert!(matches!(File::open(&at(&folder), ANY, |_| {}), Err(Trouble::InUse)));
    drop(file);
    open(&folder);
}

#[test]
fn what_is_no_such_file_is_corrupt_and_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, _) = content();
    // Cut by a disk that was full, or by a copy that did not end: at a page's end, within a page, within the first.
    let cut = [
        &ours[..4096],
        &ours[..8192],
        &ours[..ours.len() / 2],
        &ours[..ours.len() - 4096],
    ];
    for content in [&b"not ours"[..], &vec![0; 100_000]].into_iter().chain(cut) {
        std::fs::write(at(&folder), content).unwrap();
        assert!(
            matches!(File::open(&at(&folder), ANY, |_| {}), Err(Trouble::Corrupt(_))),
            "{}",
            content.len()
        );
        let aside = set_aside(&at(&folder)).unwrap();
        // All of it is there, though one of ours has been marked as open.
        assert_eq!(std::fs::read(aside).unwrap().len(), content.len());
        assert_eq!(open(&folder).holds().0, 0);
    }
}

#[test]
fn a_folder_that_is_missing_is_made_and_one_that_cannot_be_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::open(&folder.path().join("a/b/answers"), ANY, |_| {}).unwrap();
    drop(file);
    std::fs::write(folder.path().join("file"), "").unwrap();
    let below_a_file = File::open(&folder.path().join("file/answers"), ANY, |_| {});
    assert!(matches!(below_a_file, Err(Trouble::Io(_))), "{below_a_file:?}");
}

/// A file as a process left it that had 200 answers written.
fn content() -> (Vec<u8>, HashMap<u128, Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder);
    let answers: Vec<_> = (0..200).map(|number| sealed(number, 700)).collect();
    for batch in answers.chunks(20) {
        file.write(batch, ANY).unwrap();
    }
    let answers = answers.into_iter().map(|answer| (answer.place, answer.bytes));
    // While it is open: what a kill leaves.
    (std::fs::read(at(&folder)).unwrap(), answers.collect())
}

/// What comes of it, unless the file is corrupt. Any other trouble would be met again and again, and never be over.
fn unless_corrupt<T>(tried: Result<T, Trouble>) -> Option<T> {
    match tried {
        Ok(done) => Some(done),
        Err(Trouble::Corrupt(_)) => None,
        Err(trouble) => panic!("{trouble:?}"),
    }
}

/// Opens what `content` has become, and uses it; gives how many answers can be read.
fn readable(content: &[u8], answers: &HashMap<u128, Vec<u8>>) -> Option<usize> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(at(&folder), content).unwrap();
    let (file, _) = unless_corrupt(File::open(&at(&folder), ANY, |_| {}))?;
    let as_written =
        |(place, bytes): &(&u128, &Vec<u8>)| unless_corrupt(file.read(**place, 0)).flatten().as_ref() == Some(bytes);
    let found = answers.iter().filter(as_written).count();
    unless_corrupt(file.write(&[sealed(1000, 10)], ANY));
    Some(found)
}

#[test]
fn a_file_that_a_kill_left_open_has_all_that_was_written() {
    let (content, answers) = content();
    assert_eq!(readable(&content, &answers), Some(200));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_damaged_file_is_an_error_at_worst(
        at: prop::sample::Index, length in 1..3000_usize, byte: u8, cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (mut content, answers) = content();
        let start = at.index(content.len());
        let end = (start + length).min(content.len());
        content[start..end].fill(byte);
        if let Some(cut) = cut {
            content.truncate(cut.index(content.len()));
        }
        readable(&content, &answers);
    }
}

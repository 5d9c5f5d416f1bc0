use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;

const UNIX: Duration = Duration::from_millis(1_800_000_000_123);
const DAY: Duration = Duration::from_hours(24);

static SETTINGS: LazyLock<config::Cache> = LazyLock::new(|| config::Config::default().cache);

fn key(key: &str) -> ApiKey {
    ApiKey::new(key).unwrap()
}

fn task(id: &str) -> TaskId {
    TaskId::from_query(Some(&format!("task_id={id}"))).unwrap()
}

fn now() -> Moment {
    Moment {
        at: Instant::now(),
        unix: UNIX,
    }
}

/// The same process, or its successor, after `duration`.
fn later(now: Moment, duration: Duration) -> Moment {
    Moment {
        at: now.at + duration,
        unix: now.unix + duration,
    }
}

fn body(task: &str, status: &str, media: &str, more: &str) -> String {
    format!(
        r#"{{"code":200,"message":"ok","data":{{"task_id":"{task}","status":"{status}","result":{{"media_urls":[{media}]}},"param":{}}}}}"#,
        serde_json::to_string(more).unwrap()
    )
}

/// What is kept of an answer that took a second and was received `age` ago.
fn draft(id: &str, body: &str, now: Moment, age: Duration) -> Draft {
    let reading = task::read(200, body.as_bytes(), &task(id));
    let received = now.at.checked_sub(age).unwrap();
    let asked = received.checked_sub(Duration::from_secs(1)).unwrap();
    let unix_received = now.unix.saturating_sub(age).as_secs();
    let draft = Draft {
        content_type: Some(HeaderValue::from_static("application/json")),
        keeping: Keeping::of(&reading, None, received, unix_received, &SETTINGS),
        ..Draft::new(StatusCode::OK, Bytes::from(body.to_owned()), reading, asked, received)
    };
    assert!(draft.keeping.is_some(), "{body}");
    draft
}

fn answer(id: &str, body: &str, now: Moment, age: Duration) -> Answer {
    draft(id, body, now, age).of_nobody()
}

fn ended(id: &str, now: Moment, age: Duration) -> Answer {
    answer(id, &body(id, "success", r#""https://m""#, ""), now, age)
}

/// Seals `answer` about task `a` of the account `music`, and opens it `after` that.
fn reopened(answer: &Answer, now: Moment, after: Duration, cache: &config::Cache) -> Option<Draft> {
    let (seal, owner) = (Seal::of(&key("k")), Owner::listed("music"));
    let sealed = seal.close(owner, &task("a"), answer, now)?;
    seal.open(owner, &task("a"), sealed, later(now, after), cache)
}

#[test]
fn a_live_answer_brings_no_lifetime_and_a_settling_one_its_first_sight() {
    let now = now();
    let running = answer("a", &body("a", "running", "", ""), now, Duration::from_secs(3));
    let opened = reopened(&running, now, Duration::ZERO, &SETTINGS).unwrap().of_nobody();
    assert!(opened.is_live() && !opened.has_ended());
    assert_eq!(opened.keeping().unwrap().keep, SETTINGS.max_stale);

    let settling = answer("a", &body("a", "success", "", ""), now, Duration::from_mins(9));
    let opened = reopened(&settling, now, Duration::ZERO, &SETTINGS).unwrap().of_nobody();
    assert!(opened.is_live());
    let next = later(now, Duration::from_mins(1));
    let reading = task::read(200, &opened.body(), &task("a"));
    let again = Keeping::of(&reading, Some(&opened), next.at, next.unix.as_secs(), &SETTINGS);
    assert!(again.unwrap().ended, "ten minutes from first sight, whoever saw it");
}

#[test]
fn a_content_type_is_kept_byte_for_byte() {
    let now = now();
    for bytes in [&b"application/json"[..], b"text/x; a=\xc3\xa4\xff\x80", b"a\tb", b""] {
        let kept = Draft {
            content_type: Some(HeaderValue::from_bytes(bytes).unwrap()),
            ..draft("a", &body("a", "success", r#""https://m""#, ""), now, Duration::ZERO)
        };
        let opened = reopened(&kept.of_nobody(), now, Duration::ZERO, &SETTINGS).expect("kept");
        assert_eq!(opened.content_type.unwrap(), bytes);
    }
}

#[test]
fn it_is_kept_no_longer_than_both_then_and_now_say() {
    let now = now();
    let kept = |answer: &Answer, after, cache: &config::Cache| reopened(answer, now, after, cache).is_some();
    let tick = Duration::from_millis(1);
    let fresh = ended("a", now, Duration::ZERO);
    assert!(kept(&fresh, SETTINGS.terminal.saturating_sub(tick), &SETTINGS));
    assert!(!kept(&fresh, SETTINGS.terminal, &SETTINGS));
    let lowered = config::Cache {
        terminal: DAY,
        ..SETTINGS.clone()
    };
    assert!(
        kept(&fresh, DAY.saturating_sub(tick), &lowered) && !kept(&fresh, DAY, &lowered),
        "lowered since"
    );
    let raised = config::Cache {
        terminal: DAY * 10,
        ..SETTINGS.clone()
    };
    assert!(!kept(&fresh, SETTINGS.terminal, &raised), "raised since");
}

#[test]
fn a_clock_that_is_a_little_behind_the_writers_makes_an_answer_new_and_far_behind_a_miss() {
    let (now, seal, owner) = (now(), Seal::of(&key("k")), Owner::listed("music"));
    let sealed = seal
        .close(owner, &task("a"), &ended("a", now, Duration::ZERO), now)
        .unwrap();
    let behind = |by: Duration| {
        let now = Moment {
            unix: now.unix.saturating_sub(by),
            ..now
        };
        seal.open(owner, &task("a"), sealed.clone(), now, &SETTINGS)
    };
    assert_eq!(behind(MOST_AHEAD).unwrap().of_nobody().age(now.at), Duration::ZERO);
    assert!(behind(MOST_AHEAD + Duration::from_millis(1)).is_none());
}

#[test]
fn each_key_of_an_account_opens_what_it_sealed_and_nothing_else() {
    let (now, owner) = (now(), Owner::listed("music"));
    let (old, new) = (Seal::of(&key("old")), Seal::of(&key("new")));
    let sealed = old
        .close(owner, &task("a"), &ended("a", now, Duration::ZERO), now)
        .unwrap();
    assert!(old.open(owner, &task("a"), sealed.clone(), now, &SETTINGS).is_some());
    assert!(new.open(owner, &task("a"), sealed.clone(), now, &SETTINGS).is_none());
}

#[test]
fn what_is_not_kept_is_not_sealed() {
    let now = now();
    let mut draft = ended("a", now, Duration::ZERO).draft();
    draft.keeping = None;
    assert!(
        Seal::of(&key("k"))
            .close(Owner::listed("music"), &task("a"), &draft.of_nobody(), now)
            .is_none()
    );
}

#[test]
fn neither_key_nor_task_nor_body_can_be_read_from_it() {
    let now = now();
    let (secret, owner) = (key("ak_secret_0123"), Owner::unlisted(&key("ak_secret_0123")));
    let text = body("task-4711", "success", r#""https://media""#, "a song of mine");
    let sealed = Seal::of(&secret).close(owner, &task("task-4711"), &answer("task-4711", &text, now, DAY), now);
    let seen = String::from_utf8_lossy(&sealed.unwrap()).into_owned();
    for hidden in ["ak_secret_0123", "task-4711", "media", "song", "application/json"] {
        assert!(!seen.contains(hidden), "{hidden}");
    }
    let printed = format!("{owner:?} {:?}", Seal::of(&secret));
    assert_eq!(printed, "Owner(…) Seal(***)");
}

#[test]
fn places_are_stable_and_tell_accounts_and_tasks_apart() {
    let (music, video) = (Owner::listed("music"), Owner::listed("video"));
    // Files outlive releases.
    assert_eq!(
        format!("{:032x}", music.place(&task("a"))),
        "9fa779bfe94fdcae633092bee0adb009"
    );
    assert_ne!(music.place(&task("a")), music.place(&task("b")));
    assert_ne!(music.place(&task("a")), video.place(&task("a")));
    assert_ne!(Owner::unlisted(&key("music")), music);
    assert_ne!(Owner::unlisted(&key("one")), Owner::unlisted(&key("other")));
}

proptest! {
    #[test]
    fn what_is_sealed_opens_as_it_was(more in ".{0,300}", age_ms in 0..500_000_000_u64, after_ms in 0..50_000_000_u64) {
        let (now, age, after) = (now(), Duration::from_millis(age_ms), Duration::from_millis(after_ms));
        let before = draft("a", &body("a", "failed", "", &more), now, age);
        let sealed = answer("a", &body("a", "failed", "", &more), now, age);
        let opened = reopened(&sealed, now, after, &SETTINGS).unwrap();
        prop_assert_eq!(&opened.body, &before.body);
        prop_assert_eq!(opened.status, before.status);
        prop_assert_eq!(&opened.content_type, &before.content_type);
        prop_assert_eq!(opened.reading, before.reading);
        prop_assert_eq!(now.at + after - opened.received, age + after);
        prop_assert_eq!(opened.received - opened.asked, before.received - before.asked);
        prop_assert_eq!(opened.keeping, before.keeping);
    }

    #[test]
    fn a_changed_byte_or_length_is_a_miss(at: prop::sample::Index, flip in 1..=255_u8, cut: prop::sample::Index, added: u8) {
        let (now, seal, owner) = (now(), Seal::of(&key("k")), Owner::listed("music"));
        let sealed = seal.close(owner, &task("a"), &ended("a", now, DAY), now).unwrap();
        let opens = |bytes: &[u8]| seal.open(owner, &task("a"), bytes.to_vec(), now, &SETTINGS).is_some();
        prop_assert!(opens(&sealed));
        let mut flipped = sealed.clone();
        flipped[at.index(sealed.len())] ^= flip;
        prop_assert!(!opens(&flipped));
        prop_assert!(!opens(&sealed[..cut.index(sealed.len())]));
        let mut longer = sealed.clone();
        longer.push(added);
        prop_assert!(!opens(&longer));
    }

    #[test]
    fn another_account_or_task_is_a_miss(name in "[a-z]{1,8}", id in "[a-z]{1,8}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let (now, seal, owner) = (now(), Seal::of(&key("k")), Owner::listed("music"));
        // A body that would be read for either task: only what it is bound to tells them apart.
        let not_found = r#"{"code":404,"message":"no","data":null}"#;
        let sealed = seal.close(owner, &task("a"), &answer("a", not_found, now, Duration::ZERO), now).unwrap();
        let opens = |owner, id: &str| seal.open(owner, &task(id), sealed.clone(), now, &SETTINGS).is_some();
        prop_assert_eq!(opens(Owner::listed(&name), "a"), name == "music");
        prop_assert_eq!(opens(owner, &id), id == "a");
        prop_assert!(!opens(Owner::unlisted(&key("music")), "a"));
        prop_assert!(seal.open(owner, &task("a"), bytes, now, &SETTINGS).is_none());
    }
}

//! What is kept, what replaces what, and what goes first.

use http::StatusCode;

use super::*;
use crate::account::AccountIds;
use crate::config;
use crate::stored::Keeping;
use crate::task::{Reading, Stage, Timestamp};

const LIVE: Duration = Duration::from_secs(2);

fn task(id: &str) -> TaskId {
    TaskId::new(id).unwrap()
}

/// An answer that tells of `stage`, asked for and received at `now`.
fn answer(stage: Stage, body: usize, now: Instant) -> Arc<Answer> {
    let reading = Reading {
        class: stage.class(),
        stage: Some(stage),
        effective_code: Some(if stage == Stage::NotFound { 404 } else { 200 }),
        complete_at: Timestamp::Absent,
        create_at: Timestamp::Absent,
    };
    let mut answer = Answer::new(StatusCode::OK, vec![b'x'; body].into(), reading, now, now);
    answer.keeping = Keeping::of(&reading, None, now, 1_800_000_000, &config::Config::default().cache);
    Arc::new(answer)
}

fn cache(max_bytes: u64) -> (Cache, AccountId, AccountId) {
    let ids = AccountIds::default();
    let cache = Cache::new(max_bytes, Arc::new(Metrics::new().unwrap()));
    (cache, ids.listed("a"), ids.listed("b"))
}

#[tokio::test(start_paused = true)]
async fn a_state_only_moves_forward() {
    let (cache, account, _) = cache(1 << 20);
    let (id, now) = (task("x"), Instant::now());
    let stage = |now| cache.get(account, &id, now, LIVE).and_then(|kept| kept.reading.stage);
    cache.put(account, &id, &answer(Stage::Running, 10, now), now);
    assert_eq!(stage(now), Some(Stage::Running));
    cache.put(account, &id, &answer(Stage::Ended, 10, now), now);
    cache.put(account, &id, &answer(Stage::Running, 10, now + LIVE), now + LIVE);
    assert_eq!(stage(now + LIVE), Some(Stage::Ended), "a late `running` is late");
}

#[tokio::test(start_paused = true)]
async fn not_found_lives_apart_and_hides_no_fresh_state() {
    let (cache, account, other) = cache(1 << 20);
    let (id, now) = (task("x"), Instant::now());
    let stage = |now| cache.get(account, &id, now, LIVE).and_then(|kept| kept.reading.stage);
    cache.put(account, &id, &answer(Stage::NotFound, 10, now), now);
    assert_eq!(stage(now), Some(Stage::NotFound));
    assert!(
        cache.get(other, &id, now, LIVE).is_none(),
        "another account's is another's"
    );
    assert!(cache.snapshot(account, &id, now).is_none(), "and stands in for nothing");
    cache.put(account, &id, &answer(Stage::Running, 10, now), now);
    assert_eq!(stage(now), Some(Stage::Running));
    for n in 0..20_000 {
        cache.put(account, &task(&n.to_string()), &answer(Stage::NotFound, 500, now), now);
    }
    cache.maintain();
    assert_eq!(stage(now), Some(Stage::Running), "random ids push nothing out");
}

#[tokio::test(start_paused = true)]
async fn an_account_gives_up_what_it_holds_beyond_half_when_another_needs_room() {
    const MAX: u64 = 1 << 20;
    let (cache, greedy, modest) = cache(MAX);
    let now = Instant::now();
    let held = |account, ids: std::ops::Range<u32>| {
        ids.filter(|n| cache.get(account, &task(&n.to_string()), now, LIVE).is_some())
            .count()
    };
    for n in 0..1000 {
        cache.put(greedy, &task(&n.to_string()), &answer(Stage::Ended, 1000, now), now);
    }
    cache.maintain();
    assert!(cache.tasks.weighted_size() <= MAX);
    assert!(
        held(greedy, 0..1000) > 300,
        "alone it may fill all but its own excess: {}",
        held(greedy, 0..1000)
    );
    for n in 0..300 {
        cache.put(modest, &task(&n.to_string()), &answer(Stage::Ended, 1000, now), now);
    }
    cache.maintain();
    assert!(cache.tasks.weighted_size() <= MAX);
    assert_eq!(held(modest, 0..300), 300, "what fits its half stays");
}

#[tokio::test(start_paused = true)]
async fn what_is_larger_than_half_is_not_kept_and_what_is_kept_is_forgotten_in_time() {
    let (cache, account, _) = cache(1 << 20);
    let (id, now) = (task("x"), Instant::now());
    cache.put(account, &id, &answer(Stage::Ended, 600_000, now), now);
    assert!(cache.get(account, &id, now, LIVE).is_none());
    cache.put(account, &id, &answer(Stage::Running, 10, now), now);
    let last = now + Duration::from_secs(599);
    assert!(cache.snapshot(account, &id, last).is_some());
    assert!(cache.snapshot(account, &id, last + Duration::from_secs(2)).is_none());
}

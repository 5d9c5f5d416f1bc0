//! What is kept, what replaces what, and what goes first.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::LazyLock;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use proptest::prelude::*;
use tokio::time::advance;

use super::*;
use crate::account::AccountIds;
use crate::config;
use crate::stored::{Draft, Keeping};
use crate::task::{Reading, Stage, Timestamp};

static SETTINGS: LazyLock<config::Cache> = LazyLock::new(|| config::Config::default().cache);

/// The freshness lifetime of live answers.
const LIVE: Duration = Duration::from_secs(2);

const MIB: u64 = 1 << 20;

fn cache(max_bytes: u64) -> Cache {
    Cache::new(max_bytes, Arc::new(Metrics::new().unwrap()))
}

fn accounts<const N: usize>() -> [AccountId; N] {
    let ids = AccountIds::default();
    std::array::from_fn(|n| ids.listed(&n.to_string()))
}

fn task(id: impl Display) -> TaskId {
    TaskId::new(&id.to_string()).unwrap()
}

/// An answer that tells of `stage`, asked for and received at `now`.
fn draft(stage: Stage, body: impl Into<Bytes>, now: Instant) -> Draft {
    let reading = Reading {
        class: stage.class(),
        stage: Some(stage),
        effective_code: Some(if stage == Stage::NotFound { 404 } else { 200 }),
        complete_at: Timestamp::Absent,
        create_at: Timestamp::Absent,
    };
    Draft {
        content_type: Some(HeaderValue::from_static("application/json")),
        keeping: Keeping::of(&reading, None, now, 1_800_000_000, &SETTINGS),
        ..Draft::new(StatusCode::OK, body.into(), reading, now, now)
    }
}

/// Bytes that repeat nothing, so that none are saved.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::fill(&mut bytes[..]);
    bytes
}

fn ended(kib: usize) -> Draft {
    draft(Stage::Ended, noise(kib << 10), Instant::now())
}

impl Cache {
    /// Gives whether the answer says that it is kept.
    fn put_now(&self, account: AccountId, id: impl Display, draft: Draft) -> bool {
        let task = task(id);
        self.put(account, &task, &draft.of(account, &task), Instant::now())
            .is_stored()
    }

    fn holds(&self, account: AccountId, id: impl Display) -> bool {
        self.tasks.contains_key(&self.key(account, task(id).as_str()))
    }

    /// Which of an account's tasks 0 to `most` are kept.
    fn held_by(&self, account: AccountId, most: usize) -> Vec<usize> {
        (0..most).filter(|id| self.holds(account, id)).collect()
    }

    fn body(&self, account: AccountId, id: &str) -> Option<String> {
        let answer = self.get(account, &task(id), Instant::now(), LIVE)?;
        Some(String::from_utf8(answer.body().to_vec()).unwrap())
    }

    fn evictions(&self, cause: &str) -> usize {
        let text = String::from_utf8(self.metrics.render().unwrap()).unwrap();
        let name = format!("crun_gateway_cache_evictions_total{{cause=\"{cause}\"}} ");
        let count = text.lines().find_map(|line| line.strip_prefix(&name)).unwrap();
        count.parse().unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_takes_nothing_back() {
    let (cache, [account]) = (cache(MIB), accounts());
    let path = [Stage::Pending, Stage::Running, Stage::Settling, Stage::Ended];
    for (before, after) in path.iter().zip(&path[1..]) {
        let asked = Instant::now();
        advance(Duration::from_secs(1)).await;
        assert!(cache.put_now(account, "task", draft(*after, "after", Instant::now())));
        assert!(!cache.put_now(account, "task", draft(*before, "before", asked)));
        assert_eq!(cache.body(account, "task").unwrap(), "after", "{after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_too_large_to_be_kept_leaves_no_older_state_behind() {
    let (cache, [account]) = (cache(MIB), accounts());
    let asked = Instant::now();
    advance(Duration::from_secs(1)).await;
    assert!(cache.put_now(account, "task", draft(Stage::Running, "goes on", Instant::now())));
    assert!(!cache.put_now(account, "task", draft(Stage::Pending, noise(800 << 10), asked)));
    assert_eq!(cache.body(account, "task").unwrap(), "goes on", "that was late");
    advance(Duration::from_secs(1)).await;
    assert!(!cache.put_now(account, "task", ended(800)));
    assert_eq!(cache.body(account, "task"), None);
}

#[tokio::test(start_paused = true)]
async fn a_task_may_step_back_until_it_has_ended() {
    let (cache, [account]) = (cache(MIB), accounts());
    for (stage, body) in [
        (Stage::Settling, "without media"),
        (Stage::Running, "goes on"),
        (Stage::Pending, "waits again"),
        (Stage::Ended, "ended"),
    ] {
        advance(Duration::from_secs(1)).await;
        cache.put_now(account, "task", draft(stage, body, Instant::now()));
        assert_eq!(cache.body(account, "task").unwrap(), body);
    }
    for stage in [Stage::Settling, Stage::Running, Stage::Pending] {
        advance(Duration::from_secs(1)).await;
        cache.put_now(account, "task", draft(stage, "after all", Instant::now()));
        assert_eq!(cache.body(account, "task").unwrap(), "ended", "{stage:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn of_one_stage_the_answer_asked_for_later_is_newer() {
    let (cache, [account]) = (cache(MIB), accounts());
    for stage in [Stage::Running, Stage::Ended] {
        let early = Instant::now();
        advance(Duration::from_secs(1)).await;
        cache.put_now(account, "task", draft(stage, "second", Instant::now()));
        cache.put_now(account, "task", draft(stage, "first", early));
        assert_eq!(cache.body(account, "task").unwrap(), "second", "{stage:?}");
        advance(Duration::from_secs(1)).await;
        cache.put_now(account, "task", draft(stage, "third", Instant::now()));
        assert_eq!(cache.body(account, "task").unwrap(), "third", "{stage:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_no_longer_gives_way_to_anything() {
    let (cache, [account]) = (cache(MIB), accounts());
    cache.put_now(account, "task", draft(Stage::Ended, "ended", Instant::now()));
    advance(SETTINGS.terminal).await;
    assert_eq!(
        cache.body(account, "task"),
        None,
        "moka's clock has not moved, ours has"
    );
    assert!(cache.snapshot(account, &task("task"), Instant::now()).is_none());
    cache.put_now(account, "task", draft(Stage::Pending, "again", Instant::now()));
    assert_eq!(cache.body(account, "task").unwrap(), "again");
}

/// What repeats itself takes less memory, but only once there is little left.
#[tokio::test(start_paused = true)]
async fn answers_are_packed_once_an_eighth_is_taken() {
    let (cache, [account]) = (cache(MIB), accounts());
    let body = String::from_utf8(noise(2_000).iter().map(|byte| byte & 0x7f).collect()).unwrap();
    let body = body.repeat(10);
    let held = || {
        cache.maintain();
        cache.tasks.weighted_size()
    };
    let mut before = held();
    for n in 0..100 {
        cache.put_now(account, n, draft(Stage::Ended, body.clone(), Instant::now()));
        let taken = held() - before;
        let is_packed = taken < 3_000;
        assert_eq!(is_packed, before >= MIB / 8, "{taken} at {before}");
        before += taken;
        assert_eq!(cache.body(account, &n.to_string()).unwrap(), body);
    }
    assert!(before > MIB / 8);
    for n in 0..100 {
        assert_eq!(cache.body(account, &n.to_string()).unwrap(), body);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_no_longer_gives_its_memory_back() {
    let (cache, [account]) = (cache(16 * MIB), accounts());
    for id in 0..1000 {
        cache.put_now(account, id, draft(Stage::Running, "running", Instant::now()));
    }
    advance(SETTINGS.max_stale / 2).await;
    for id in 0..10 {
        cache.put_now(account, id, draft(Stage::Running, "running", Instant::now()));
    }
    advance(SETTINGS.max_stale / 2 + Duration::from_secs(1)).await;
    cache.maintain();
    assert_eq!(
        cache.held_by(account, 1000),
        (0..10).collect::<Vec<_>>(),
        "the newer ones are kept yet"
    );
    assert_eq!(cache.evictions("expired"), 990);
    assert_eq!(cache.shares.held(), cache.tasks.weighted_size());
    advance(SETTINGS.max_stale).await;
    cache.maintain();
    assert!(cache.tasks.entry_count() == 0 && !cache.holds_any(account));
}

#[tokio::test(start_paused = true)]
async fn all_are_looked_through_by_turns() {
    let (cache, [account]) = (cache(16 * MIB), accounts());
    let all = 2 * MOST_SEARCHED + 1;
    for id in 0..all {
        cache.put_now(account, id, draft(Stage::Running, "", Instant::now()));
    }
    advance(SETTINGS.max_stale + Duration::from_secs(1)).await;
    for left in [MOST_SEARCHED + 1, 1, 0] {
        cache.maintain();
        assert_eq!(cache.tasks.entry_count(), left as u64);
    }
}

/// As unlikely as it is that two have the same key.
#[tokio::test(start_paused = true)]
async fn an_answer_under_anothers_key_is_served_to_nobody() {
    let (cache, [account, other]) = (cache(MIB), accounts());
    cache.put_now(other, "theirs", draft(Stage::Ended, "secret", Instant::now()));
    let theirs = cache.snapshot(other, &task("theirs"), Instant::now()).unwrap();
    for (account, id) in [(account, "mine"), (account, "theirs"), (other, "mine")] {
        cache.tasks.insert(cache.key(account, id), theirs.block().clone());
        assert_eq!(cache.body(account, id), None);
        cache.put_now(account, id, draft(Stage::Pending, "own", Instant::now()));
        assert_eq!(cache.body(account, id).unwrap(), "own");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stale_state_is_kept_for_a_while() {
    let (cache, [account]) = (cache(MIB), accounts());
    cache.put_now(account, "task", draft(Stage::Running, "running", Instant::now()));
    advance(SETTINGS.max_stale.saturating_sub(Duration::from_millis(1))).await;
    let stale = cache.get(account, &task("task"), Instant::now(), LIVE).unwrap();
    assert!(!stale.is_fresh(Instant::now(), LIVE));
    advance(Duration::from_millis(1)).await;
    assert_eq!(cache.body(account, "task"), None);
}

#[tokio::test(start_paused = true)]
async fn accounts_never_see_each_others_answers() {
    let (cache, [one, other]) = (cache(MIB), accounts());
    for stage in [Stage::Ended, Stage::NotFound] {
        cache.put_now(one, "task", draft(stage, "mine", Instant::now()));
        assert_eq!(cache.body(other, "task"), None);
        assert!(cache.snapshot(other, &task("task"), Instant::now()).is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_not_found_does_not_hide_a_fresh_state() {
    let (cache, [account]) = (cache(MIB), accounts());
    cache.put_now(account, "task", draft(Stage::Ended, "ended", Instant::now()));
    advance(Duration::from_secs(1)).await;
    cache.put_now(account, "task", draft(Stage::NotFound, "nowhere", Instant::now()));
    assert_eq!(cache.body(account, "task").unwrap(), "ended");
}

#[tokio::test(start_paused = true)]
async fn a_newer_not_found_counts_though_a_live_state_would_be_fresh_yet() {
    let (cache, [account]) = (cache(MIB), accounts());
    let early = Instant::now();
    advance(Duration::from_millis(1)).await;
    cache.put_now(account, "task", draft(Stage::Running, "running", Instant::now()));
    cache.put_now(account, "task", draft(Stage::NotFound, "nowhere", early));
    let state = || cache.state(account, "task", Instant::now()).unwrap();
    assert!(state().is_fresh(Instant::now(), LIVE), "it was asked for later");
    cache.put_now(account, "task", draft(Stage::NotFound, "nowhere", Instant::now()));
    assert!(!state().is_fresh(Instant::now(), LIVE));
    assert_eq!(cache.body(account, "task").unwrap(), "nowhere");
    cache.put_now(account, "task", draft(Stage::Running, "again", Instant::now()));
    assert!(state().is_fresh(Instant::now(), LIVE));
    assert_eq!(cache.body(account, "task").unwrap(), "again");
}

#[tokio::test(start_paused = true)]
async fn a_newer_not_found_counts_once_the_state_is_stale() {
    let (cache, [account]) = (cache(MIB), accounts());
    cache.put_now(account, "task", draft(Stage::Running, "running", Instant::now()));
    advance(LIVE).await;
    cache.put_now(account, "task", draft(Stage::NotFound, "nowhere", Instant::now()));
    assert_eq!(cache.body(account, "task").unwrap(), "nowhere");
    let snapshot = cache.snapshot(account, &task("task"), Instant::now()).unwrap();
    assert_eq!(&*snapshot.body(), b"running", "it may still stand in");
    advance(SETTINGS.not_found).await;
    assert_eq!(cache.body(account, "task").unwrap(), "running");
}

#[tokio::test(start_paused = true)]
async fn a_not_found_older_than_the_state_never_counts() {
    let (cache, [account]) = (cache(MIB), accounts());
    let early = Instant::now();
    advance(Duration::from_secs(1)).await;
    cache.put_now(account, "task", draft(Stage::Running, "running", Instant::now()));
    cache.put_now(account, "task", draft(Stage::NotFound, "nowhere", early));
    advance(LIVE).await;
    assert_eq!(cache.body(account, "task").unwrap(), "running");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_appears_is_not_hidden_by_the_not_found_before_it() {
    let (cache, [account]) = (cache(MIB), accounts());
    cache.put_now(account, "task", draft(Stage::NotFound, "nowhere", Instant::now()));
    cache.put_now(account, "task", draft(Stage::Pending, "pending", Instant::now()));
    assert_eq!(cache.body(account, "task").unwrap(), "pending");
}

#[tokio::test(start_paused = true)]
async fn random_ids_push_nothing_out() {
    let (cache, [account, stranger]) = (cache(16 * MIB), accounts());
    for id in 0..100 {
        cache.put_now(account, id, ended(1));
    }
    for id in 0..30_000 {
        cache.put_now(stranger, id, draft(Stage::NotFound, noise(1000), Instant::now()));
    }
    cache.maintain();
    assert_eq!(cache.held_by(account, 100).len(), 100);
    assert!(cache.not_found.weighted_size() <= NOT_FOUND_BYTES);
    assert!(cache.not_found.entry_count() > 0);
}

#[tokio::test(start_paused = true)]
async fn what_says_no_time_is_not_kept() {
    let (cache, [account]) = (cache(MIB), accounts());
    let mut unkept = ended(1);
    unkept.keeping = None;
    cache.put_now(account, "task", unkept);
    assert!(!cache.holds(account, "task"));
}

#[tokio::test(start_paused = true)]
async fn an_answer_larger_than_half_is_not_kept() {
    let (cache, [account]) = (cache(MIB), accounts());
    assert!(!cache.put_now(account, "large", ended(512)));
    assert!(cache.put_now(account, "small", ended(510)));
    assert!(!cache.holds(account, "large"));
    assert!(cache.holds(account, "small"));
    let not_found = |kib: usize| draft(Stage::NotFound, noise(kib << 10), Instant::now());
    assert!(
        !cache.put_now(account, "nowhere", not_found(1024)),
        "nor is one larger than all such may be"
    );
    assert!(cache.put_now(account, "nowhere", not_found(1022)));
}

#[tokio::test(start_paused = true)]
async fn the_bound_in_bytes_holds() {
    let (cache, accounts) = (cache(MIB), accounts::<5>());
    for id in 0..3000 {
        cache.put_now(accounts[id % 5], id, ended(id % 7));
        if id % 500 == 499 {
            cache.maintain();
            assert!(cache.tasks.weighted_size() <= MIB, "{}", cache.tasks.weighted_size());
            assert!(cache.tasks.weighted_size() > MIB / 10 * 9);
        }
    }
    assert!(cache.evictions("size") > 0);
    assert_eq!(
        cache.metrics.cache_bytes.get(),
        i64::try_from(cache.tasks.weighted_size()).unwrap()
    );
    assert_eq!(
        cache.metrics.cache_entries.get(),
        i64::try_from(cache.tasks.entry_count()).unwrap()
    );
}

/// How many answers of 8 KiB fill a MiB.
const FULL: usize = 110;

#[tokio::test(start_paused = true)]
async fn an_account_alone_may_fill_it_all() {
    let (cache, [a]) = (cache(MIB), accounts());
    for id in 0..1000 {
        cache.put_now(a, id, ended(8));
    }
    cache.maintain();
    assert!(cache.tasks.weighted_size() > MIB / 10 * 9);
    assert_eq!(
        cache.held_by(a, 1000).first(),
        Some(&(1000 - cache.held_by(a, 1000).len())),
        "the oldest went"
    );
    assert_eq!(cache.evictions("account_share"), 0, "nobody else needed room");
    assert_eq!(cache.evictions("size"), 1000 - cache.held_by(a, 1000).len());
}

#[tokio::test(start_paused = true)]
async fn one_that_holds_more_than_half_gives_way_to_others() {
    let (cache, [a, b, c]) = (cache(MIB), accounts());
    for id in 0..200 {
        cache.put_now(a, id, ended(8));
    }
    cache.maintain();
    for id in 0..FULL / 4 {
        cache.put_now(b, id, ended(8));
        cache.put_now(c, id, ended(8));
    }
    cache.maintain();
    assert_eq!(cache.held_by(b, FULL / 4).len(), FULL / 4);
    assert_eq!(cache.held_by(c, FULL / 4).len(), FULL / 4);
    assert!(cache.evictions("account_share") >= FULL / 4);
    // However much it asks for, what others hold is theirs.
    for id in 200..400 {
        cache.put_now(a, id, ended(8));
    }
    cache.maintain();
    assert_eq!(cache.held_by(b, FULL / 4).len(), FULL / 4);
    assert_eq!(cache.held_by(c, FULL / 4).len(), FULL / 4);
}

#[tokio::test(start_paused = true)]
async fn what_was_read_is_spared() {
    let (cache, [a]) = (cache(MIB), accounts());
    for id in 0..FULL {
        cache.put_now(a, id, ended(8));
    }
    for id in FULL..2 * FULL {
        for id in 0..10 {
            assert!(cache.get(a, &task(id), Instant::now(), LIVE).is_some(), "{id}");
        }
        cache.put_now(a, id, ended(8));
    }
    cache.maintain();
    assert_eq!(cache.held_by(a, 10).len(), 10);
    assert_eq!(cache.held_by(a, 60).len(), 10, "what nobody read went before");
}

#[tokio::test(start_paused = true)]
async fn one_put_looks_at_few_answers_however_many_were_read() {
    let (cache, [a]) = (cache(MIB), accounts());
    for id in 0..2000 {
        cache.put_now(a, id, draft(Stage::Ended, "", Instant::now()));
    }
    cache.maintain();
    let held = cache.held_by(a, 2000);
    for id in &held {
        let _ = cache.get(a, &task(id), Instant::now(), LIVE);
    }
    cache.put_now(a, "one more", draft(Stage::Ended, "", Instant::now()));
    let still_read = held
        .iter()
        .filter_map(|id| cache.tasks.get(&cache.key(a, task(id).as_str())))
        .filter(Block::take_read);
    assert!(still_read.count() + 2 * MOST_SPARED >= held.len());
}

#[derive(Clone, Debug)]
enum Step {
    Put(usize, usize, Stage, usize),
    Get(usize, usize),
    Forget(usize, usize),
    Wait(u64),
    Maintain,
}

fn step() -> impl Strategy<Value = Step> {
    let stage = prop::sample::select(
        &[
            Stage::NotFound,
            Stage::Pending,
            Stage::Running,
            Stage::Settling,
            Stage::Ended,
        ][..],
    );
    let which = (0..3_usize, 0..40_usize);
    prop_oneof![
        8 => (which.clone(), stage, 0..4000_usize).prop_map(|((a, id), stage, size)| Step::Put(a, id, stage, size)),
        4 => which.clone().prop_map(|(a, id)| Step::Get(a, id)),
        1 => which.prop_map(|(a, id)| Step::Forget(a, id)),
        1 => (0..400_u64).prop_map(Step::Wait),
        1 => Just(Step::Maintain),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_shares_are_what_is_really_kept(steps in prop::collection::vec(step(), 1..300)) {
        let (cache, accounts) = (cache(64 << 10), accounts::<3>());
        let mut now = Instant::now();
        for step in steps {
            match step {
                Step::Put(a, id, stage, size) => {
                    let (account, task) = (accounts[a], task(id));
                    let answer = draft(stage, noise(size), now).of(account, &task);
                    cache.put(account, &task, &answer, now);
                }
                Step::Get(a, id) => drop(cache.get(accounts[a], &task(id), now, LIVE)),
                Step::Forget(a, id) => {
                    cache.tasks.invalidate(&cache.key(accounts[a], task(id).as_str()));
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
                Step::Maintain => cache.maintain(),
            }
        }
        cache.maintain();
        prop_assert!(cache.tasks.weighted_size() <= 64 << 10);
        let mut kept: HashMap<u64, (u64, Vec<u64>)> = HashMap::new();
        for (key, answer) in &cache.tasks {
            let (bytes, keys) = kept.entry(answer.account()).or_default();
            *bytes += u64::from(weight(&answer));
            keys.push(key.0);
        }
        prop_assert_eq!(cache.shares.held(), kept.values().map(|(bytes, _)| bytes).sum::<u64>());
        for account in accounts {
            let (bytes, mut keys) = kept.remove(&account.half()).unwrap_or_default();
            keys.sort_unstable();
            let (held, mut in_order) = cache.shares.held_by(account);
            in_order.sort_unstable_by_key(|key| key.0);
            prop_assert_eq!((held, in_order), (bytes, keys.into_iter().map(Key).collect()));
        }
    }
}

/// Where `OVERHEAD` comes from. Alone in its process, since it reads the memory of all of it:
/// `cargo test --lib -- --ignored --exact cache::tests::an_entry_weighs_what_it_takes`.
#[tokio::test]
#[ignore = "takes a minute and six gigabytes"]
async fn an_entry_weighs_what_it_takes() {
    const ENTRIES: usize = 1_000_000;
    let memory = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    let (cache, [account]) = (cache(16 << 30), accounts());
    let (before, now) = (memory(), Instant::now());
    let mut taken = 0;
    // What is said twice is packed: more than an eighth is taken by then.
    for (length, times) in [(2050, 1), (36, 1), (64, 1), (1025, 2)] {
        for n in 0..ENTRIES {
            let task = task(format!("{length:08x}-89ab-4def-8123-{n:012x}"));
            let mut body = task.to_string().into_bytes();
            body.extend(noise(length - body.len()));
            let answer = draft(Stage::Ended, body.repeat(times), now).of(account, &task);
            cache.put(account, &task, &answer, now);
        }
        cache.maintain();
        let last = std::mem::replace(&mut taken, memory() - before);
        let counted = cache.tasks.weighted_size();
        eprintln!(
            "with {times} times {length}: {} an entry",
            (taken - last) / ENTRIES as u64
        );
        assert!(
            taken <= counted,
            "{} an entry are missing",
            (taken - counted) / ENTRIES as u64
        );
        assert!(
            counted - taken <= taken / 4,
            "{} an entry too many",
            (counted - taken) / ENTRIES as u64
        );
    }
}

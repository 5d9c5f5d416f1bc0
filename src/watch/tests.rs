use proptest::prelude::*;

use super::*;

const FRESH: Fresh = Fresh {
    floor: Duration::from_secs(2),
    ceiling: Duration::from_secs(30),
};

/// What the default pace allows.
const RATE: f64 = 15.0 / 1.03;

fn task(number: usize) -> TaskId {
    TaskId::new(&format!("task-{number}")).unwrap()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_task_is_live_from_its_first_live_answer_on() {
    let (watch, now) = (Watch::new(FRESH), Instant::now());
    watch.asked(task(0).as_str(), now);
    assert_eq!(watch.live(now), 0, "it may be any id");
    watch.goes_on(&task(0), now);
    watch.goes_on(&task(0), now);
    assert_eq!(watch.live(now), 1);
}

#[test]
fn a_task_is_live_for_twice_the_ceiling_after_somebody_asked() {
    let (watch, start) = (Watch::new(FRESH), Instant::now());
    watch.goes_on(&task(0), start);
    watch.asked(task(0).as_str(), start + seconds(50));
    watch.goes_on(&task(0), start + seconds(100));
    assert_eq!(watch.live(start + seconds(110)), 1);
    assert_eq!(watch.live(start + seconds(111)), 0, "an answer is no asking");
    watch.asked(task(0).as_str(), start + seconds(112));
    assert_eq!(watch.live(start + seconds(112)), 0, "by now it may have ended");
}

#[test]
fn an_ended_task_is_not_live() {
    let (watch, now) = (Watch::new(FRESH), Instant::now());
    watch.goes_on(&task(0), now);
    watch.goes_on(&task(1), now);
    watch.ended(&task(0));
    watch.ended(&task(0));
    assert_eq!(watch.live(now), 1);
}

#[test]
fn no_more_than_so_many_tasks_are_remembered() {
    let (watch, now) = (Watch::new(FRESH), Instant::now());
    for number in 0..MOST_TASKS + 10 {
        watch.goes_on(&task(number), now);
    }
    assert_eq!(watch.live(now), MOST_TASKS);
    assert_eq!(watch.live(now + seconds(61)), 0);
    assert!(watch.tasks.lock().filed.is_empty());
}

#[test]
fn few_tasks_are_fresh_for_the_floor_and_many_for_the_ceiling() {
    for live in [0, 1, 23] {
        assert_eq!(freshness(live, RATE, FRESH), FRESH.floor);
    }
    let lifetime = freshness(200, RATE, FRESH).as_secs_f64();
    assert!((lifetime - 200.0 / (0.8 * RATE)).abs() < 1e-6, "{lifetime}");
    for live in [350, 100_000, usize::MAX] {
        assert_eq!(freshness(live, RATE, FRESH), FRESH.ceiling);
    }
    assert_eq!(freshness(1, 0.0, FRESH), FRESH.ceiling, "nothing can be refreshed");
}

/// What may happen to a watch.
#[derive(Clone, Copy, Debug)]
enum Event {
    Asked(usize),
    GoesOn(usize),
    Ended(usize),
    Seconds(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..12_usize).prop_map(Event::Asked),
        3 => (0..12_usize).prop_map(Event::GoesOn),
        1 => (0..12_usize).prop_map(Event::Ended),
        3 => (0..40_u64).prop_map(Event::Seconds),
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_a_scan_of_everything(events in prop::collection::vec(event(), 0..300)) {
        let watch = Watch::new(FRESH);
        let mut model: HashMap<usize, Instant> = HashMap::new();
        let mut now = Instant::now();
        for event in events {
            match event {
                Event::Asked(number) => {
                    watch.asked(task(number).as_str(), now);
                    model.entry(number).and_modify(|last| *last = now);
                }
                Event::GoesOn(number) => {
                    watch.goes_on(&task(number), now);
                    model.entry(number).or_insert(now);
                }
                Event::Ended(number) => {
                    watch.ended(&task(number));
                    model.remove(&number);
                }
                Event::Seconds(passed) => {
                    now += seconds(passed);
                    model.retain(|_, last| now - *last <= FRESH.ceiling * 2);
                }
            }
            prop_assert_eq!(watch.live(now), model.len());
            let tasks = watch.tasks.lock();
            prop_assert_eq!(tasks.filed.len(), tasks.by_id.len());
            prop_assert!(tasks.by_id.values().all(|asked| asked.filed <= asked.last));
        }
    }

    #[test]
    fn all_live_tasks_fit_in_four_fifths_of_the_rate(live in 0..1_000_000_usize, rate in 0.01..1000.0_f64) {
        let lifetime = freshness(live, rate, FRESH);
        prop_assert!(FRESH.floor <= lifetime && lifetime <= FRESH.ceiling);
        #[expect(clippy::cast_precision_loss, reason = "below a million")]
        let spent = live as f64 / lifetime.as_secs_f64();
        // No more than needed, and no less, save where a bound forbids it.
        prop_assert!(spent <= 0.8 * rate * 1.000_001 || lifetime == FRESH.ceiling);
        prop_assert!(spent >= 0.8 * rate * 0.999_999 || lifetime == FRESH.floor);
    }
}

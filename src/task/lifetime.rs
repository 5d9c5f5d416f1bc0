//! How long an ended task's answer may be kept: until the media that it links to die, and never up to that day.
//!
//! Source of the 14 days: the vendor's page on `TaskInfo`, which says that generated media are "typically" deleted for
//! good after 14 days. The day taken off is ours: "typically" is not a promise, and clocks and time zones differ.

use std::time::Duration;

const DAY: u64 = 24 * 60 * 60;

/// From the end of a task to the death of its media, by the vendor's word.
const MEDIA: u64 = 14 * DAY;

/// Taken off for safety.
const SAFETY: u64 = DAY;

/// 2001-09-09: an earlier instant is not one of upstream's, which is younger, but a small number that means otherwise.
const EARLIEST: u64 = 1_000_000_000;

/// An instant as upstream gave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Timestamp {
    /// Not there, or null: the next best field counts.
    #[default]
    Absent,
    /// Unix seconds, 1 000 000 000 or later; may lie in the future.
    At(u64),
    /// Something that is no such instant: the task counts as first seen now.
    Nonsense,
}

impl Timestamp {
    /// Reads a member's JSON text. Only a JSON integer is an instant; `1768900482.0` and `"1768900482"` are not.
    pub(super) fn read(json: Option<&str>) -> Self {
        match json {
            None | Some("null") => Self::Absent,
            Some(json) => json
                .parse()
                .ok()
                .filter(|&seconds| seconds >= EARLIEST)
                .map_or(Self::Nonsense, Self::At),
        }
    }
}

/// How long an ended task's answer may be kept from `now` (Unix seconds) on, first seen now.
///
/// 13 days from `complete_at`, else (absent or null) from `create_at`, else from `now`; nonsense and the future count
/// as `now`. At most `cap` (`cache.terminal`). When that time is over already, `already_dead` (`fresh.ceiling`, also
/// capped): the links are dead, but the answer does not change any more.
pub fn media_lifetime(
    complete_at: Timestamp,
    create_at: Timestamp,
    now: u64,
    cap: Duration,
    already_dead: Duration,
) -> Duration {
    let ended = match (complete_at, create_at) {
        (Timestamp::At(at), _) | (Timestamp::Absent, Timestamp::At(at)) if at <= now => at,
        _ => now,
    };
    let left = (MEDIA - SAFETY).saturating_sub(now - ended);
    let lifetime = if left == 0 {
        already_dead
    } else {
        Duration::from_secs(left)
    };
    lifetime.min(cap)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Timestamp::{Absent, At, Nonsense};
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const FOREVER: Duration = Duration::MAX;
    const DEAD: Duration = Duration::from_secs(30);
    const FULL: u64 = 13 * DAY;

    fn seconds(complete_at: Timestamp, create_at: Timestamp) -> u64 {
        media_lifetime(complete_at, create_at, NOW, FOREVER, DEAD).as_secs()
    }

    #[test]
    fn media_live_thirteen_days_from_the_end_of_their_task() {
        assert_eq!(seconds(At(NOW), At(NOW - 500)), FULL);
        assert_eq!(seconds(At(NOW - 100), At(NOW - 500)), FULL - 100);
        assert_eq!(seconds(At(NOW - FULL + 1), Absent), 1);
    }

    #[test]
    fn without_an_end_the_beginning_counts() {
        assert_eq!(seconds(Absent, At(NOW - 500)), FULL - 500);
        assert_eq!(seconds(Absent, Absent), FULL);
    }

    #[test]
    fn nonsense_and_the_future_count_as_first_seen() {
        for complete_at in [Nonsense, At(NOW + 1), At(NOW * 1000), At(u64::MAX)] {
            assert_eq!(seconds(complete_at, At(NOW - 500)), FULL, "{complete_at:?}");
            assert_eq!(seconds(Absent, complete_at), FULL, "{complete_at:?}");
        }
        assert_eq!(seconds(At(NOW - 100), Nonsense), FULL - 100);
        assert_eq!(seconds(At(NOW - 100), At(NOW + 1)), FULL - 100);
    }

    #[test]
    fn what_is_dead_already_is_kept_briefly() {
        for ended in [NOW - FULL, NOW - MEDIA, EARLIEST] {
            assert_eq!(media_lifetime(At(ended), Absent, NOW, FOREVER, DEAD), DEAD);
            assert_eq!(media_lifetime(Absent, At(ended), NOW, FOREVER, DEAD), DEAD);
        }
    }

    #[test]
    fn the_cap_is_over_everything() {
        let cap = Duration::from_secs(7 * DAY);
        assert_eq!(media_lifetime(At(NOW), Absent, NOW, cap, DEAD), cap);
        assert_eq!(
            media_lifetime(At(NOW - FULL + 5), Absent, NOW, cap, DEAD),
            Duration::from_secs(5)
        );
        let brief = Duration::from_secs(1);
        assert_eq!(media_lifetime(At(EARLIEST), Absent, NOW, brief, DEAD), brief);
    }

    #[test]
    fn only_an_integer_of_our_age_is_an_instant() {
        assert_eq!(Timestamp::read(None), Absent);
        assert_eq!(Timestamp::read(Some("null")), Absent);
        assert_eq!(Timestamp::read(Some("1768900482")), At(1_768_900_482));
        assert_eq!(Timestamp::read(Some("1768900482000")), At(1_768_900_482_000));
        assert_eq!(Timestamp::read(Some("1000000000")), At(EARLIEST));
        for json in [
            "999999999",
            "0",
            "-0",
            "-1768900482",
            "1768900482.0",
            "1.7e9",
            "17E8",
            "\"1768900482\"",
            "\"\"",
            "true",
            "[]",
            "{}",
            "[1768900482]",
            "99999999999999999999999",
        ] {
            assert_eq!(Timestamp::read(Some(json)), Nonsense, "{json}");
        }
    }

    fn timestamp() -> impl Strategy<Value = Timestamp> {
        prop_oneof![
            Just(Absent),
            Just(Nonsense),
            any::<u64>().prop_map(At),
            (NOW - MEDIA..=NOW).prop_map(At)
        ]
    }

    proptest! {
        #[test]
        fn nothing_outlives_its_media(
            complete_at in timestamp(), create_at in timestamp(), now in prop_oneof![0..1_u64 << 40, Just(NOW)],
            cap in 1u64..=20 * DAY, dead in 1u64..=3600,
        ) {
            let (longest, briefest) = (Duration::from_secs(cap), Duration::from_secs(dead));
            let kept = media_lifetime(complete_at, create_at, now, longest, briefest).as_secs();
            prop_assert!(kept <= cap && kept <= FULL && kept > 0);
            if let At(ended) = complete_at && ended <= now {
                prop_assert!(kept <= dead || now + kept <= ended + FULL);
            }
        }
    }
}

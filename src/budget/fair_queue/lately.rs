//! Who was served lately, also of those who stand in the queue no more: of equals, the one served last gives way.

use std::collections::HashMap;
use std::hash::Hash;

/// So many are remembered, and fewer than twice as many: names are free text. Where more contend than these and those that
/// stand in the queue, it is also a matter of the moment at which somebody comes.
const MOST: u64 = 256;

/// The number of the turn that somebody had last: the greater, the later.
pub(super) type ServedAt = u64;

/// When each of them was served last.
#[derive(Debug)]
pub(super) struct Lately<K> {
    served: HashMap<K, ServedAt>,
    turns: ServedAt,
}

impl<K> Default for Lately<K> {
    fn default() -> Self {
        Self {
            served: HashMap::new(),
            turns: 0,
        }
    }
}

impl<K: Clone + Eq + Hash> Lately<K> {
    /// `who` is served now.
    pub(super) fn serve(&mut self, who: &K) -> ServedAt {
        self.turns += 1;
        let turns = self.turns;
        if let Some(served) = self.served.get_mut(who) {
            *served = turns;
            return turns;
        }
        self.served.insert(who.clone(), turns);
        if self.served.len() as u64 >= 2 * MOST {
            self.served.retain(|_, served| *served + MOST > turns);
        }
        turns
    }

    /// When `who` was served last, if that is remembered.
    pub(super) fn last(&self, who: &K) -> Option<ServedAt> {
        self.served.get(who).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered_however_many_are_served() {
        let mut lately = Lately::default();
        for who in 0..10_000_u64 {
            assert_eq!(lately.serve(&who), who + 1);
            assert!((lately.served.len() as u64) < 2 * MOST);
            assert_eq!(
                lately.last(&who.saturating_sub(MOST - 1)),
                Some(who.saturating_sub(MOST - 1) + 1)
            );
        }
        assert_eq!(lately.last(&0), None);
        assert_eq!(lately.serve(&9_999), 10_001);
    }
}

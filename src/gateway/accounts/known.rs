//! Every key that an account has, or that upstream said something of lately: each of them once. So what upstream says of it
//! holds wherever it stands, and wherever it stood when upstream was asked.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::time::Instant;

use super::super::keys::Key;
use crate::account::ApiKey;

/// The keys that are known.
#[derive(Debug)]
pub(super) struct Known {
    /// Before all that upstream ever says.
    epoch: Instant,
    next: AtomicU64,
    keys: Mutex<HashMap<ApiKey, Arc<Key>>>,
}

impl Known {
    pub(super) fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            next: AtomicU64::new(0),
            keys: Mutex::default(),
        }
    }

    /// The key with this secret; one that was not known counts in the gauge `refused` when it is.
    pub(super) fn key(&self, secret: &ApiKey, refused: &IntGauge) -> Arc<Key> {
        let mut keys = self.keys.lock();
        let key = keys.entry(secret.clone()).or_insert_with(|| {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            Arc::new(Key::new(secret.clone(), number, self.epoch, refused.clone()))
        });
        Arc::clone(key)
    }

    pub(super) fn has(&self, secret: &ApiKey) -> bool {
        self.keys.lock().contains_key(secret)
    }

    /// Forgets what nobody uses, unless it `counts` yet; of that, all but the `most` that came last.
    pub(super) fn sweep(&self, most: usize, counts: impl Fn(&Key) -> bool) {
        let mut keys = self.keys.lock();
        // Whoever comes to use one asks here, so a count of 1 stays that.
        let is_unused = |key: &Arc<Key>| Arc::strong_count(key) == 1;
        keys.retain(|_, key| !is_unused(key) || counts(key));
        let mut unused: Vec<_> = keys
            .values()
            .filter(|key| is_unused(key))
            .map(|key| key.number)
            .collect();
        if unused.len() > most {
            let (_, last_to_go, _) = unused.select_nth_unstable_by_key(most, |number| Reverse(*number));
            let last_to_go = *last_to_go;
            keys.retain(|_, key| !is_unused(key) || key.number > last_to_go);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_those_that_nobody_uses_the_latest_stay_known() {
        let known = Known::new(Instant::now());
        let gauge = IntGauge::new("refused", "refused").unwrap();
        let secret = |number| ApiKey::new(&format!("ak_{number}")).unwrap();
        let used = known.key(&secret(0), &gauge);
        for number in 1..10 {
            known.key(&secret(number), &gauge);
        }
        let left = || (0..10).filter(|number| known.has(&secret(*number))).collect::<Vec<_>>();
        known.sweep(9, |_| true);
        assert_eq!(left().len(), 10);
        known.sweep(3, |_| true);
        assert_eq!(left(), [0, 7, 8, 9]);
        known.sweep(3, |key| key.number > 7);
        assert_eq!(left(), [0, 8, 9]);
        drop(used);
        known.sweep(0, |_| true);
        assert!(left().is_empty());
    }
}

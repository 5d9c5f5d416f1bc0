//! Every key that an account has, or that upstream said something of lately: each of them once. So what upstream says of it
//! holds wherever it stands, and wherever it stood when upstream was asked.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
        let mut keys = self.keys();
        let key = keys.entry(secret.clone()).or_insert_with(|| {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            Arc::new(Key::new(secret.clone(), number, self.epoch, refused.clone()))
        });
        Arc::clone(key)
    }

    pub(super) fn has(&self, secret: &ApiKey) -> bool {
        self.keys().contains_key(secret)
    }

    /// Forgets what nobody uses, unless it `counts` yet.
    pub(super) fn sweep(&self, counts: impl Fn(&Key) -> bool) {
        // Whoever comes to use one asks here, so a count of 1 stays that.
        self.keys().retain(|_, key| Arc::strong_count(key) > 1 || counts(key));
    }

    /// A poisoned lock means a panic in a few lines that cannot leave half a change behind.
    fn keys(&self) -> MutexGuard<'_, HashMap<ApiKey, Arc<Key>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

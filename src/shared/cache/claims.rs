//! Which flights this process has claimed, and for which of others' it waits: two lists, no I/O.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

#[derive(Debug, Default)]
pub(super) struct Claims {
    lists: Mutex<Lists>,
    /// A list that was empty is so no longer.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Lists {
    held: HashMap<u128, Arc<str>>,
    waiting: Vec<(u128, oneshot::Sender<()>)>,
}

impl Claims {
    /// Waits until there is something to renew, or somebody to tell.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn hold(&self, place: u128, name: &Arc<str>) {
        let mut lists = self.lists.lock();
        lists.held.insert(place, Arc::clone(name));
        if lists.held.len() == 1 {
            self.changed.notify_one();
        }
    }

    /// Takes whatever claim there is at `place`.
    pub(super) fn take(&self, place: u128) -> Option<Arc<str>> {
        self.lists.lock().held.remove(&place)
    }

    /// Ends a claim; false where it has ended already.
    pub(super) fn end(&self, place: u128, name: &Arc<str>) -> bool {
        let mut lists = self.lists.lock();
        let holds = lists.held.get(&place).is_some_and(|held| Arc::ptr_eq(held, name));
        if holds {
            lists.held.remove(&place);
        }
        holds
    }

    pub(super) fn held(&self) -> Vec<(u128, Arc<str>)> {
        let lists = self.lists.lock();
        lists
            .held
            .iter()
            .map(|(place, name)| (*place, Arc::clone(name)))
            .collect()
    }

    pub(super) fn holds_any(&self) -> bool {
        !self.lists.lock().held.is_empty()
    }

    /// Resolves once somebody says that nobody claims the flight any more.
    pub(super) fn wait(&self, place: u128) -> oneshot::Receiver<()> {
        let (over, told) = oneshot::channel();
        let mut lists = self.lists.lock();
        lists.waiting.push((place, over));
        if lists.waiting.len() == 1 {
            self.changed.notify_one();
        }
        told
    }

    /// The places that somebody waits for.
    pub(super) fn waited_for(&self) -> Vec<u128> {
        let mut lists = self.lists.lock();
        lists.waiting.retain(|(_, over)| !over.is_closed());
        lists.waiting.iter().map(|(place, _)| *place).collect()
    }

    pub(super) fn waits_any(&self) -> bool {
        !self.lists.lock().waiting.is_empty()
    }

    /// Tells those who wait for `place`.
    pub(super) fn tell(&self, place: u128) {
        self.lists.lock().waiting.retain(|(waited_for, _)| *waited_for != place);
    }

    /// Tells everybody.
    pub(super) fn tell_all(&self) {
        self.lists.lock().waiting.clear();
    }
}

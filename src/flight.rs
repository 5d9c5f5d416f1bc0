//! One fetch for everybody who asks the same at the same time.
//!
//! A flight belongs to no client. Whoever opened it carries its leader on while it waits, and when it leaves, for whatever
//! reason, the leader goes on as a task of its own ([`Carried`]); so a client that leaves hurts nobody, and each follower has
//! its own deadline. Caches that fetch, like moka's `try_get_with`, will not do: their init future belongs to the first caller
//! (moka-rs/moka#240). It works for answers that may not be stored just as for those that may. What is fetched, and what
//! the stages of it are, is the caller's business.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::hash::Hash;
use std::sync::Arc;
use std::task::Poll;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// The flights under way, by key. Cheap to clone.
#[derive(Debug)]
pub struct Flights<K, S>(Arc<Mutex<HashMap<K, watch::Sender<S>>>>);

impl<K, S> Clone for Flights<K, S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K, S> Default for Flights<K, S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash + Clone, S> Flights<K, S> {
    /// Joins the flight for `key`, or opens one at the stage `first` gives: then the caller also gets its [`Leader`], and has to
    /// see to it that it lands.
    ///
    /// The receiver shows the flight's stage, now and whenever it changes; it closes when the leader was dropped without
    /// landing. Dropping it leaves the flight.
    pub fn join(&self, key: K, first: impl FnOnce() -> S) -> (watch::Receiver<S>, Option<Leader<K, S>>) {
        match self.0.lock().entry(key) {
            Entry::Occupied(flight) => (flight.get().subscribe(), None),
            Entry::Vacant(place) => {
                let (stage, follower) = watch::channel(first());
                let leader = Leader {
                    flights: self.clone(),
                    key: place.key().clone(),
                    stage: stage.clone(),
                    has_landed: false,
                };
                place.insert(stage);
                (follower, Some(leader))
            }
        }
    }
}

/// The one who fetches. Dropped without [`Leader::land`], by a panic for instance, the flight ends and every follower is
/// told so.
#[derive(Debug)]
pub struct Leader<K: Eq + Hash + Clone, S> {
    flights: Flights<K, S>,
    key: K,
    stage: watch::Sender<S>,
    has_landed: bool,
}

impl<K: Eq + Hash + Clone, S> Leader<K, S> {
    /// The stage that the followers see.
    pub fn stage(&self) -> watch::Ref<'_, S> {
        self.stage.borrow()
    }

    /// Shows the followers how far the flight is.
    pub fn update(&self, change: impl FnOnce(&mut S)) {
        self.stage.send_modify(change);
    }

    /// Resolves once nobody waits; from then on the flight can be joined no more, and the next to ask opens a new one.
    ///
    /// Cancel safe.
    pub async fn deserted(&self) {
        loop {
            self.stage.closed().await;
            let mut flights = self.flights.0.lock();
            // 1. the last follower leaves; 2. somebody joins; 3. we are woken: there is somebody after all. Joining
            // subscribes under this same lock.
            if self.stage.receiver_count() == 0 {
                self.remove_from(&mut flights);
                return;
            }
        }
    }

    /// Ends the flight with a last change of its stage. Whoever asks from now on opens a new one, so what may be shared later must be
    /// in the cache before.
    pub fn land(mut self, last: impl FnOnce(&mut S)) {
        self.remove_from(&mut self.flights.0.lock());
        self.has_landed = true;
        self.stage.send_modify(last);
    }

    fn remove_from(&self, flights: &mut HashMap<K, watch::Sender<S>>) {
        // After `deserted` another flight may go under the same key.
        if flights
            .get(&self.key)
            .is_some_and(|flight| flight.same_channel(&self.stage))
        {
            flights.remove(&self.key);
        }
    }
}

impl<K: Eq + Hash + Clone, S> Drop for Leader<K, S> {
    fn drop(&mut self) {
        if !self.has_landed {
            self.remove_from(&mut self.flights.0.lock());
        }
    }
}

/// What a leader does, in the hands of whoever opened the flight: most wait until it lands, and then no task is made for it
/// and nobody is woken by another. Dropped before it has landed, it goes on as a task of its own.
pub struct Carried(Option<BoxFuture<'static, ()>>);

impl Carried {
    /// Nothing is done before it is carried on, or dropped.
    pub fn new(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(Box::pin(work)))
    }

    /// Carries it on for as long as this is polled.
    ///
    /// Cancel safe.
    pub async fn on(&mut self) -> Infallible {
        poll_fn(|cx| {
            if self.0.as_mut().is_some_and(|work| work.as_mut().poll(cx).is_ready()) {
                self.0 = None;
            }
            Poll::Pending
        })
        .await
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        // Without a runtime the process is ending.
        if let (Some(work), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(work);
        }
    }
}

impl fmt::Debug for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Carried").field(&self.0.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, oneshot};

    use super::*;

    #[tokio::test]
    async fn followers_share_the_leaders_landing() {
        let flights = Flights::<_, u32>::default();
        let (mut first, leader) = flights.join("key", || 0);
        let (mut second, nobody) = flights.join("key", || 0);
        assert!(nobody.is_none());
        leader.unwrap().land(|stage| *stage = 7);
        assert_eq!(*first.wait_for(|stage| *stage == 7).await.unwrap(), 7);
        assert_eq!(*second.wait_for(|stage| *stage == 7).await.unwrap(), 7);
        assert_eq!(flights.0.lock().len(), 0);
    }

    #[tokio::test]
    async fn a_leader_that_dies_is_an_error_for_all_and_not_a_hang() {
        let flights = Flights::<_, u32>::default();
        let (mut follower, leader) = flights.join("key", || 0);
        drop(leader);
        assert!(follower.wait_for(|stage| *stage == 7).await.is_err());
        assert!(flights.join("key", || 0).1.is_some());
    }

    #[tokio::test]
    async fn a_flight_is_deserted_when_the_last_follower_leaves() {
        let flights = Flights::<_, u32>::default();
        let (first, leader) = flights.join("key", || 0);
        let (second, _) = flights.join("key", || 0);
        let leader = leader.unwrap();
        drop(first);
        let waiting = tokio::time::timeout(std::time::Duration::ZERO, leader.deserted());
        assert!(waiting.await.is_err(), "one still waits");
        drop(second);
        leader.deserted().await;
        let (_third, successor) = flights.join("key", || 0);
        assert!(successor.is_some(), "a deserted flight cannot be joined");
        drop(leader);
        assert!(
            flights.join("key", || 0).1.is_none(),
            "its end leaves the successor alone"
        );
    }

    #[tokio::test]
    async fn what_a_leader_does_goes_on_when_whoever_carries_it_has_left() {
        for is_begun in [false, true] {
            let (go, gone) = oneshot::channel();
            let (landed, lands) = oneshot::channel();
            let mut carried = Carried::new(async move {
                gone.await.unwrap();
                landed.send(()).unwrap();
            });
            if is_begun {
                let waits = tokio::time::timeout(std::time::Duration::ZERO, carried.on());
                assert!(waits.await.is_err());
            }
            drop(carried);
            go.send(()).unwrap();
            lands.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_has_landed_is_done_once() {
        let (landed, mut lands) = mpsc::unbounded_channel();
        let mut carried = Carried::new(async move { landed.send(()).unwrap() });
        let waits = tokio::time::timeout(std::time::Duration::ZERO, carried.on());
        assert!(waits.await.is_err());
        drop(carried);
        assert_eq!(lands.recv().await, Some(()));
        assert_eq!(lands.recv().await, None);
    }
}

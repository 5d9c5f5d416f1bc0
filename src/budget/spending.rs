//! Who was charged for an account's permits, lately: what the status page shows. Pure: `now` is passed in.
//!
//! It covers the last three to six minutes, exactly: two spans, of which the older is dropped when the newer has lasted
//! three. Addresses and names are anybody's to invent, so each span names a bounded number; a newcomer takes the place of
//! whoever was charged least, the longest ago where several were, and what those had been charged is told as a sum. So no
//! client is ever shown with more than it spent, and whoever spends much is never displaced.

use std::time::Duration;

use tokio::time::Instant;

use super::MOST_SHOWN;
use crate::account::Client;

/// How long a span lasts.
const SPAN: Duration = Duration::from_mins(3);

/// Clients named in each span, in some 80 bytes each.
const MOST_NAMED: usize = 32;

/// Permits by who was charged for them.
#[derive(Clone, Debug)]
pub struct Spent {
    /// The time that they cover.
    pub span: Duration,
    /// Clients that were charged most, and how many permits.
    pub by_client: Vec<(Client, u64)>,
    /// Permits of flights that nobody waited for.
    pub background: u64,
    /// Permits of all other clients.
    pub rest: u64,
}

#[derive(Debug)]
pub(super) struct Spending {
    now: Span,
    before: Option<Span>,
}

#[derive(Debug)]
struct Span {
    start: Instant,
    /// In the order in which they came.
    named: Vec<(Client, u64)>,
    background: u64,
    rest: u64,
}

impl Spending {
    /// Nothing is spent before `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            now: Span::new(now),
            before: None,
        }
    }

    /// One permit was granted in the turn of `client`, or in the background's.
    pub(super) fn charge(&mut self, client: Option<&Client>, now: Instant) {
        self.forget_old(now);
        match client {
            Some(client) => self.now.charge(client, 1),
            None => self.now.background += 1,
        }
    }

    /// What was spent in the time that ends at `now`.
    pub(super) fn spent(&mut self, now: Instant) -> Spent {
        self.forget_old(now);
        let spans = || self.before.iter().chain([&self.now]);
        let mut by_client: Vec<(Client, u64)> = Vec::new();
        for (client, permits) in spans().flat_map(|span| &span.named) {
            match by_client.iter_mut().find(|(known, _)| known == client) {
                Some((_, sum)) => *sum += permits,
                None => by_client.push((client.clone(), *permits)),
            }
        }
        by_client.sort_by(|(client, permits), (other, others)| others.cmp(permits).then(client.cmp(other)));
        let unnamed: u64 = spans().map(|span| span.rest).sum();
        let not_shown = by_client.split_off(by_client.len().min(MOST_SHOWN));
        Spent {
            span: now.saturating_duration_since(self.before.as_ref().unwrap_or(&self.now).start),
            by_client,
            background: spans().map(|span| span.background).sum(),
            rest: unnamed + not_shown.iter().map(|(_, permits)| permits).sum::<u64>(),
        }
    }

    fn forget_old(&mut self, now: Instant) {
        let lasted = now.saturating_duration_since(self.now.start);
        if lasted < SPAN {
            return;
        }
        let over = std::mem::replace(&mut self.now, Span::new(now));
        // In an account that was idle for long, both are over.
        self.before = (lasted < SPAN * 2).then_some(over);
    }
}

impl Span {
    fn new(start: Instant) -> Self {
        Self {
            start,
            named: Vec::new(),
            background: 0,
            rest: 0,
        }
    }

    fn charge(&mut self, client: &Client, permits: u64) {
        if let Some((_, sum)) = self.named.iter_mut().find(|(known, _)| known == client) {
            *sum += permits;
            return;
        }
        if self.named.len() >= MOST_NAMED
            && let Some((place, _)) = self.named.iter().enumerate().min_by_key(|(_, (_, permits))| *permits)
        {
            self.rest += self.named.remove(place).1;
        }
        self.named.push((client.clone(), permits));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::Caller;

    fn client(name: &str) -> Client {
        Client {
            caller: Caller::Token(name.into()),
            name: None,
        }
    }

    fn after(seconds: u64) -> (Instant, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        (start + Duration::from_secs(seconds), move |seconds| {
            start + Duration::from_secs(seconds)
        })
    }

    #[test]
    fn permits_are_told_by_client_for_three_to_six_minutes() {
        let (start, at) = after(0);
        let mut spending = Spending::new(start);
        let (music, shop) = (client("music"), client("shop"));
        spending.charge(Some(&music), at(1));
        spending.charge(Some(&shop), at(2));
        spending.charge(None, at(3));
        spending.charge(Some(&shop), at(200));
        let spent = spending.spent(at(300));
        assert_eq!(spent.by_client, [(shop.clone(), 2), (music, 1)]);
        assert_eq!((spent.background, spent.rest), (1, 0));
        assert_eq!(spent.span, Duration::from_mins(5));
        // The first span is over at 200 s, the second at 380 s.
        let spent = spending.spent(at(380));
        assert_eq!((spent.by_client, spent.background), (vec![(shop, 1)], 0));
        assert_eq!(spent.span, Duration::from_mins(3));
        let spent = spending.spent(at(10_000));
        assert_eq!((spent.by_client.len(), spent.span), (0, Duration::ZERO));
    }

    #[test]
    fn names_without_end_displace_no_spender_and_no_permit_is_lost() {
        let (start, at) = after(0);
        let mut spending = Spending::new(start);
        for number in 0..10_000 {
            spending.charge(Some(&client(&format!("passer-by {number}"))), at(1));
            if number % 10 == 0 {
                spending.charge(Some(&client("spender")), at(1));
            }
        }
        let spent = spending.spent(at(1));
        assert_eq!(spent.by_client[0], (client("spender"), 1000));
        assert_eq!(spent.by_client.len(), MOST_SHOWN);
        let named: u64 = spent.by_client.iter().map(|(_, permits)| permits).sum();
        assert_eq!(named + spent.rest, 11_000);
        assert!(spending.now.named.len() <= MOST_NAMED);
    }
}

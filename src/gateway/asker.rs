//! Who asks: on which account, as which client, and with which of the keys that it may use.
//!
//! Whoever presents a key uses that one. A client token stands for its account's keys: the first that upstream accepts.
//! What upstream said of each is `gateway::keys`' business.

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderValue;
use tokio::time::Instant;

use super::account::Account;
use super::keys::Key;
use crate::account::{Caller, Client};
use crate::metrics::ClientRequests;
use crate::stored::Answer;

/// Of a client's own name for itself, so many characters count: strangers choose it, and the queue keeps it. Chosen, not
/// measured.
const LONGEST_NAME: usize = 64;

/// A configured client: its token stands for its account's keys.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) name: Arc<str>,
    pub(super) weight: u32,
    pub(super) passthrough: bool,
    pub(super) requests: Arc<ClientRequests>,
}

/// Who asks: on which account, with which key, and as which client.
#[derive(Clone, Debug)]
pub(super) struct Asker {
    pub(super) account: Arc<Account>,
    /// The key that goes upstream.
    pub(super) key: Arc<Key>,
    pub(super) token: Option<Arc<Token>>,
}

impl Asker {
    /// The client, for fairness: its token or, without one, whose connection it is; within that the name that it gave
    /// itself.
    pub(super) fn client(&self, caller: &Caller, name: Option<&HeaderValue>) -> Client {
        let caller = match &self.token {
            Some(token) => Caller::Token(Arc::clone(&token.name)),
            None => caller.clone(),
        };
        let name = name.and_then(|name| name.to_str().ok()).map(|name| {
            let end = name.char_indices().nth(LONGEST_NAME).map_or(name.len(), |(end, _)| end);
            Arc::from(&name[..end])
        });
        Client { caller, name }
    }

    /// How many turns the client gets for one that has no token.
    pub(super) fn weight(&self) -> u32 {
        self.token.as_ref().map_or(1, |token| token.weight)
    }

    /// The client's counters: its token's or, without one, those of whose connection it is.
    pub(super) fn requests(&self, caller: &Caller) -> Cow<'_, Arc<ClientRequests>> {
        match &self.token {
            Some(token) => Cow::Borrowed(&token.requests),
            None => self.account.others.requests(caller),
        }
    }

    /// Whether it may use the paths that are streamed through: a token only where configuration says so, since that
    /// spends money.
    pub(super) fn may_pass_through(&self) -> bool {
        self.token.as_ref().is_none_or(|token| token.passthrough)
    }

    /// Whether it presented a token, and the key is one that it stands for.
    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// This asker with another of its keys.
    pub(super) fn with(&self, key: &Arc<Key>) -> Self {
        Self {
            key: Arc::clone(key),
            ..self.clone()
        }
    }

    /// The keys that it may use: a token stands for all of its account's, and whoever presents a key has no other.
    fn keys(&self) -> &[Arc<Key>] {
        match &self.token {
            Some(_) => &self.account.keys,
            None => std::slice::from_ref(&self.key),
        }
    }

    /// Whether upstream refuses every key that it may use.
    pub(super) fn is_refused(&self) -> bool {
        self.keys().iter().all(|key| key.is_refused())
    }

    /// Upstream's refusal, if it refuses every key that the asker may use and said so at `start` or later.
    pub(super) fn refused_since(&self, start: Instant) -> Option<Answer> {
        let mut refusals = self.keys().iter().filter_map(|key| key.refusal.since(start));
        self.is_refused().then(|| refusals.next())?
    }

    /// The first of its keys that upstream does not refuse, else the first.
    pub(super) fn fit_key(&self) -> &Arc<Key> {
        let mut keys = self.keys().iter();
        keys.find(|key| !key.is_refused()).unwrap_or(&self.key)
    }

    /// Takes the first key that upstream does not refuse, else one that may be tried again.
    ///
    /// # Errors
    /// Upstream's refusal, while it is remembered of all of them.
    pub(super) fn admit(&mut self, now: Instant) -> Result<(), Answer> {
        let key = self.fit_key();
        if !key.is_refused() {
            if !Arc::ptr_eq(key, &self.key) {
                self.key = Arc::clone(key);
            }
            return Ok(());
        }
        let mut refusal = None;
        for key in self.keys() {
            let Some(answer) = key.refusal.recall(now) else {
                self.key = Arc::clone(key);
                return Ok(());
            };
            refusal = refusal.or(Some(answer));
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Takes another of its keys, one that upstream has not refused since `arrived`; false when there is none.
    pub(super) fn take_next_key(&mut self, arrived: Instant) -> bool {
        let keys = self.keys();
        let fit = keys.iter().find(|key| !key.is_refused());
        let now = Instant::now();
        let may_be_fit = || {
            keys.iter()
                .find(|key| key.refusal.since(arrived).is_none() && key.refusal.recall(now).is_none())
        };
        let next = fit.or_else(may_be_fit).cloned();
        let is_there = next.is_some();
        self.key = next.unwrap_or_else(|| Arc::clone(&self.key));
        is_there
    }

    /// Whether upstream refuses none of its keys, and none is to be asked about.
    pub(super) fn is_settled(&self, now: Instant) -> bool {
        !self.keys().iter().any(|key| key.is_refused()) && self.due(now).is_none()
    }

    /// Its key if upstream has not said anything of it lately, or one before it that it would rather use.
    pub(super) fn due(&self, now: Instant) -> Option<&Arc<Key>> {
        let keys = self.keys();
        let own = keys.iter().position(|key| Arc::ptr_eq(key, &self.key))?;
        keys[..=own].iter().find(|key| key.is_due(now))
    }
}

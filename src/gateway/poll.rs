//! One poll: what its request says, who asks, and what is known of it so far.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, Uri};
use tokio::time::Instant;

use super::answered::Answered;
use super::asker::Asker;
use super::clearance::is_refused_key;
use super::hit::Lookup;
use super::traced::Trace;
use super::{Gateway, max_age};
use crate::account::{ApiKey, Caller};
use crate::error::Error;
use crate::stored::Answer;
use crate::task::TaskId;

/// What a poll's request says that has a say in its answer.
#[derive(Debug)]
pub(super) struct Terms {
    /// An account's, or a client token.
    pub(super) key: ApiKey,
    pub(super) task: TaskId,
    /// What the client calls itself.
    pub(super) name: Option<HeaderValue>,
    /// How old a live answer may be, if the client says so.
    pub(super) max_age: Option<Duration>,
}

/// Who asks, for which task, and since when.
#[derive(Debug)]
pub(super) struct Poll<'t> {
    pub(super) arrived: Instant,
    pub(super) asker: Asker,
    /// Whose connection it came on.
    pub(super) caller: &'t Caller,
    pub(super) terms: Terms,
    /// What the cache has, if that is known already.
    pub(super) seen: Seen,
    /// [`Cache::puts`](crate::cache::Cache::puts) before the cache was looked at.
    pub(super) puts: u64,
    /// Whether it has opened a flight that was to ask, and may go on without it: then it saved no call.
    pub(super) has_flown: bool,
    pub(super) trace: &'t Trace,
}

/// What a look at the cache has shown.
#[derive(Debug, Default)]
pub(super) enum Seen {
    /// It was not looked at.
    #[default]
    Nothing,
    Kept(Option<Answer>),
}

impl Gateway {
    /// What a poll's request says.
    pub(super) fn terms(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Terms, Error> {
        if method != Method::GET && method != Method::HEAD {
            return Err(Error::MethodNotAllowed);
        }
        Ok(Terms {
            key: self.credential(headers)?.ok_or(Error::MissingKey)?,
            task: TaskId::from_query(uri.query())?,
            name: headers.get(&self.config.load().client_header).cloned(),
            max_age: max_age::wanted(headers),
        })
    }

    /// The poll, with what was `seen` of it when it came.
    pub(super) fn take_up<'t>(
        &self,
        terms: Terms,
        seen: Option<Lookup>,
        caller: &'t Caller,
        arrived: Instant,
        trace: &'t Trace,
    ) -> Result<Poll<'t>, Error> {
        self.trace_task(trace, &terms.task);
        let (asker, puts, seen) = if let Some(Lookup { asker, puts, kept, .. }) = seen {
            (asker, puts, Seen::Kept(kept))
        } else {
            let asker = self.accounts.of(&terms.key, arrived)?;
            (asker, self.cache.puts(), Seen::Nothing)
        };
        Ok(Poll {
            arrived,
            asker,
            caller,
            terms,
            seen,
            puts,
            has_flown: false,
            trace,
        })
    }

    /// Who asks since a changed configuration, where what has come of the poll is the business of what was before.
    pub(super) fn asker_since(
        &self,
        poll: &Poll<'_>,
        answered: &Result<Answered, Error>,
    ) -> Option<Result<Asker, Error>> {
        let before = &poll.asker;
        let may_be_over = match answered {
            // Its key has come under another account: whatever went wrong was the old one's.
            Err(_) => before.account.superseded.is_cancelled(),
            // The keys that a token stands for may be others.
            Ok(answered) => before.has_token() && is_refused_key(&answered.answer),
        };
        let since = may_be_over.then(|| self.accounts.of(&poll.terms.key, poll.arrived));
        let is_the_same = |asker: &Asker| Arc::ptr_eq(&asker.account, &before.account);
        since.filter(|since| !since.as_ref().is_ok_and(is_the_same))
    }
}

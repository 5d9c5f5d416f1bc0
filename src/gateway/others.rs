//! The counters of an account's clients that configuration does not name.
//!
//! A client with a verified certificate has a label of its own, the certificate's name. The operator's root vouches for
//! these names, yet a label must stay one of few: beyond [`MOST_LABELS`] they count as `other`, like everybody else.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::account::Caller;
use crate::metrics::{ClientRequests, Metrics, OTHER};

/// Names of certificates that label series, per account. Each is 25 series.
const MOST_LABELS: usize = 64;

#[derive(Debug)]
pub(super) struct Others {
    /// The account's label.
    account: Arc<str>,
    metrics: Arc<Metrics>,
    rest: Arc<ClientRequests>,
    named: RwLock<HashMap<Arc<str>, Arc<ClientRequests>>>,
}

impl Others {
    pub(super) fn new(account: &str, metrics: Arc<Metrics>) -> Self {
        Self {
            account: account.into(),
            rest: Arc::new(metrics.client(account, OTHER)),
            metrics,
            named: RwLock::default(),
        }
    }

    /// The counters of a client on `caller`'s connection.
    pub(super) fn requests(&self, caller: &Caller) -> Cow<'_, Arc<ClientRequests>> {
        match caller {
            Caller::Certificate(name) => Cow::Owned(self.of_certificate(name)),
            Caller::Token(_) | Caller::Address(_) => Cow::Borrowed(&self.rest),
        }
    }

    fn of_certificate(&self, name: &Arc<str>) -> Arc<ClientRequests> {
        let known = self.named.read().get(name).cloned();
        known.unwrap_or_else(|| {
            let mut named = self.named.write();
            if named.len() >= MOST_LABELS && !named.contains_key(name) {
                return Arc::clone(&self.rest);
            }
            let requests = named
                .entry(Arc::clone(name))
                .or_insert_with(|| Arc::new(self.metrics.client(&self.account, name)));
            Arc::clone(requests)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::outcome::Served;

    #[test]
    fn a_certificate_has_a_label_of_its_own_until_there_are_too_many() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let (others, account) = (Others::new("music", Arc::clone(&metrics)), metrics.account("music"));
        for _ in 0..2 {
            for number in 0..=MOST_LABELS {
                let caller = Caller::Certificate(format!("client-{number}").into());
                account.answered(&others.requests(&caller), Served::Hit, 200, Duration::ZERO);
            }
        }
        let text = String::from_utf8(metrics.render().unwrap()).unwrap();
        let counted = |client: &str| {
            let series = format!(
                "crun_gateway_requests_total{{account=\"music\",cache=\"hit\",client=\"{client}\",code=\"2xx\"}} "
            );
            text.lines()
                .find_map(|line| line.strip_prefix(&series))
                .map(str::to_owned)
        };
        assert_eq!(counted("client-0").as_deref(), Some("2"));
        assert_eq!(counted(&format!("client-{}", MOST_LABELS - 1)).as_deref(), Some("2"));
        assert_eq!(counted(&format!("client-{MOST_LABELS}")), None);
        assert_eq!(counted(OTHER).as_deref(), Some("2"));
    }
}

//! The connection by which the budget is shared, and one call on it.
//!
//! What a lost connection or a late reply means is `shared::process`'s business; nothing is tried again here.

use std::fmt;

use anyhow::Context as _;
use redis::{Script, Value};
use tokio::time::{Instant, timeout};

use super::connect::{Connection, Dialer};
use super::script::{self, Call, Constants, Reply};
use crate::config::Store;

/// The way to the one hash.
pub(super) struct Link {
    dialer: Dialer,
    script: Script,
    /// The one hash.
    key: String,
    constants: Constants,
    connection: Option<Connection>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("dialer", &self.dialer)
            .finish_non_exhaustive()
    }
}

/// What came back, and between which instants.
#[derive(Debug)]
pub(super) struct Exchanged {
    pub(super) sent: Instant,
    pub(super) received: Instant,
    pub(super) reply: Reply,
}

impl Link {
    /// # Errors
    /// When TLS cannot be set up.
    pub(super) fn new(store: &Store, constants: Constants) -> anyhow::Result<Self> {
        Ok(Self {
            dialer: Dialer::new(store)?,
            script: Script::new(script::LEND),
            key: format!("{}budget", store.prefix),
            constants,
            connection: None,
        })
    }

    /// One call and its reply. After an error the next call is made on a new connection (rule 5).
    ///
    /// Cancel safe: then, too, the next call is made on a new connection.
    ///
    /// # Errors
    /// When there is no connection in time, no reply in time, or one that says something else.
    pub(super) async fn exchange(&mut self, call: &Call) -> anyhow::Result<Exchanged> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.dialer.connect().await?,
        };
        let invocation = call.invoke(&self.script, &self.key, &self.constants);
        let sent = Instant::now();
        let calling = invocation.invoke_async::<Value>(&mut connection.calls);
        let value = timeout(self.dialer.timeout(), calling)
            .await
            .context("no reply within shared.timeout")??;
        let received = Instant::now();
        let reply = Reply::read(value).context("a reply that the script does not give")?;
        self.connection = Some(connection);
        Ok(Exchanged { sent, received, reply })
    }
}

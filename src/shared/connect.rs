//! How a connection to the shared store is opened: over TCP or TLS, straight or by asking sentinels.
//!
//! redis-rs speaks the protocol, on a stream that is opened here: so the roots are the gateway's own, and TLS has one
//! provider. What goes over a connection, and what a lost one means, is its owner's business: nothing is tried again
//! here.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, bail};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, RedisConnectionInfo, Value};
use rustls_pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::{Key, Store};
use crate::dial;

/// The store, and how it is reached.
pub(super) struct Dialer {
    store: Store,
    tls: Option<TlsConnector>,
}

/// Dropped, it is closed.
pub(super) struct Connection {
    pub(super) calls: MultiplexedConnection,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    /// Waits until the other end has closed it.
    ///
    /// Cancel safe.
    pub(super) async fn closed(&mut self) {
        // How it ends, the calls learn.
        let _ = (&mut self.driver).await;
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer")
            .field("url", &self.store.url)
            .finish_non_exhaustive()
    }
}

impl Dialer {
    /// # Errors
    /// When TLS cannot be set up.
    pub(super) fn new(store: &Store) -> anyhow::Result<Self> {
        let tls = || dial::connector(store.ca_file.as_deref(), &[]);
        let tls = store.url.is_tls.then(tls).transpose()?;
        Ok(Self {
            store: store.clone(),
            tls,
        })
    }

    /// What names of keys begin with.
    pub(super) fn prefix(&self) -> &str {
        &self.store.prefix
    }

    /// After how long without a reply a call is given up.
    pub(super) fn timeout(&self) -> Duration {
        self.store.timeout
    }

    /// A new connection, within `shared.connect_timeout`.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When there is none in time, or the store does not let us in.
    pub(super) async fn connect(&self) -> anyhow::Result<Connection> {
        timeout(self.store.connect_timeout, self.dial())
            .await
            .context("not connected within shared.connect_timeout")?
    }

    async fn dial(&self) -> anyhow::Result<Connection> {
        let url = &self.store.url;
        let Some(service) = &url.service else {
            let address = url.addresses.first().context("shared.url names no host")?;
            return self.log_in(address).await;
        };
        let ask = async |sentinel: &(String, u16)| {
            let primary = self.primary(sentinel, service).await;
            primary.with_context(|| format!("sentinel {}:{}", sentinel.0, sentinel.1))
        };
        let primary = dial::first(&url.addresses, ask).await;
        primary.context("shared.url names no sentinel")?
    }

    /// The primary of `service`, as this sentinel knows it and as it knows itself.
    async fn primary(&self, sentinel: &(String, u16), service: &str) -> anyhow::Result<Connection> {
        let login = login(None, self.store.sentinel_password.as_ref());
        let mut asked = self.open(sentinel, login).await?;
        let mut query = redis::cmd("SENTINEL");
        query.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
        let address: Option<(String, u16)> = query.query_async(&mut asked.calls).await?;
        let address = address.context("knows no such service")?;
        let mut primary = self.log_in(&address).await?;
        let role: Vec<Value> = redis::cmd("ROLE").query_async(&mut primary.calls).await?;
        match role.into_iter().next().map(redis::from_redis_value::<String>) {
            Some(Ok(role)) if role == "master" => Ok(primary),
            _ => bail!("{}:{} is no primary", address.0, address.1),
        }
    }

    async fn log_in(&self, address: &(String, u16)) -> anyhow::Result<Connection> {
        let login = login(self.store.username.as_deref(), self.store.password.as_ref());
        self.open(address, login.set_db(self.store.url.db)).await
    }

    async fn open(&self, (host, port): &(String, u16), login: RedisConnectionInfo) -> anyhow::Result<Connection> {
        let raw = dial::connect(host, *port).await?;
        // Both time-outs are ours.
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None);
        let (calls, driver) = match &self.tls {
            None => {
                let (calls, driver) = MultiplexedConnection::new_with_config(&login, raw, settings).await?;
                (calls, tokio::spawn(driver))
            }
            Some(tls) => {
                let name = ServerName::try_from(host.clone()).context("shared.url: host")?;
                let stream = tls.connect(name, raw).await?;
                let (calls, driver) = MultiplexedConnection::new_with_config(&login, stream, settings).await?;
                (calls, tokio::spawn(driver))
            }
        };
        Ok(Connection { calls, driver })
    }
}

fn login(username: Option<&str>, password: Option<&Key>) -> RedisConnectionInfo {
    let mut login = RedisConnectionInfo::default().set_skip_set_lib_name();
    if let Some(username) = username {
        login = login.set_username(username);
    }
    if let Some(password) = password {
        login = login.set_password(password.key.expose());
    }
    login
}

//! crun-gateway: one account's 15 `TaskInfo` queries a second serve a whole company.
//!
//! The map, from the edge inwards; a module names only modules of a lower row (`tests/architecture.rs` reads it here):
//!
//! ```text
//! simulator                                    the simulated upstream and the demo fleet
//! server  admin  reload  log                   edges: accept, TLS, drain · metrics, health, status page · a changed configuration · the log
//! gateway                                      the life of a request: knows all the parts
//! cache  disk  flight  upstream  watch  otlp   the parts: know nothing of each other
//! budget                                       who may ask upstream, and when
//! stored  shared                               what is kept of an answer · what replicas share: a budget and answers, in a store
//! config  error  metrics  dial  listen         checked config · one enum · one struct · how we connect · how others are let in
//! task  account  outcome  trace                words: pure, no I/O
//! panics  moment                               what a panic ends, and what goes on · an instant on both clocks
//! ```

pub mod account;
pub mod admin;
pub mod budget;
pub mod cache;
pub mod config;
pub mod dial;
pub mod disk;
pub mod error;
pub mod flight;
pub mod gateway;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod moment;
pub mod otlp;
pub mod outcome;
pub mod panics;
pub mod reload;
pub mod server;
pub mod shared;
pub mod simulator;
pub mod stored;
pub mod task;
pub mod trace;
pub mod upstream;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use admin::Health;
use config::Config;
use gateway::Gateway;
use metrics::Metrics;
use panics::supervise;
use server::descriptors;

/// How long a stop that has used up `drain` still waits for the disk: by `disk`'s figures a full queue is written in less than
/// a tenth of it, unless the disk stands still.
const LAST_WRITES: Duration = Duration::from_secs(1);

/// How long, at a stop, a collector may take for the last spans, within `drain`: one that is away shall hardly make a stop
/// longer. Chosen, not measured.
const LONGEST_FLUSH: Duration = Duration::from_secs(2);

/// The two edges, bound: tests bind port 0.
#[derive(Debug)]
pub struct Listeners {
    /// For clients.
    pub clients: TcpListener,
    /// For the platform.
    pub admin: std::net::TcpListener,
}

impl Listeners {
    /// Binds what `config` names.
    ///
    /// # Errors
    /// When an address is taken, not this host's, or not allowed.
    pub fn bind(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            clients: listen::bind(config.listen).with_context(|| format!("listen: {}", config.listen))?,
            // A probe that finds the queue for being accepted full waits a second before it tries again.
            admin: listen::bind(config.admin)
                .and_then(TcpListener::into_std)
                .with_context(|| format!("admin: {}", config.admin))?,
        })
    }
}

/// How a run ends.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled: accept no more, finish what is under way.
    pub drain: CancellationToken,
    /// Cancelled: end at once.
    pub now: CancellationToken,
}

/// Serves `config`, and what becomes of it at its `source`, until `shutdown` says otherwise; returns when everything is drained, or `config.drain` is over.
///
/// Not cancel safe: not all that it has started is stopped then. `shutdown` ends it.
///
/// # Errors
/// When the files of `tls` cannot be served, when upstream, the collector or the replicas' store cannot be set up, when the
/// admin port cannot be served, or when the system does not tell how many file descriptors there are.
pub async fn run(
    config: Config,
    source: Option<reload::Source>,
    listeners: Listeners,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let tls = config
        .tls
        .clone()
        .map(|files| server::Tls::load(files, Arc::clone(&metrics)));
    let tls = tls.transpose()?;
    let most_turned_away = descriptors::most_turned_away(descriptors::hard_limit().context("file descriptors")?);
    let dial = dial::tcp(config.upstream.url.clone());
    metrics.config_reload_success.set(1);
    metrics.config_reload_timestamp.set(moment::unix_now().as_secs_f64());
    let gateway = Gateway::new(config.clone(), dial, metrics)?;
    let health = Health::new(shutdown.drain.clone());
    let stop_admin = CancellationToken::new();
    let (listen_address, admin_address) = (listeners.clients.local_addr()?, listeners.admin.local_addr()?);
    let admin = admin::spawn(
        listeners.admin,
        Arc::clone(&health),
        Arc::clone(&gateway),
        stop_admin.clone(),
    )?;
    // Before it is said: whoever waits for the line may ask `/readyz` at once.
    health.serving();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %listen_address,
        admin = %admin_address,
        upstream = %config.upstream.url,
        limit = config.budget.limit,
        accounts = config.accounts.len(),
        "serving"
    );
    // On the workers: where this function itself runs is its caller's choice, and says nothing of them.
    let mut stopping = tokio::spawn({
        let (gateway, drain) = (Arc::clone(&gateway), shutdown.drain.clone());
        async move {
            drain.cancelled().await;
            gateway.leave();
            Instant::now()
        }
    });
    let mut lasting = JoinSet::new();
    lasting.spawn(supervise("beat", async move || health.beat().await));
    lasting.spawn({
        let gateway = Arc::clone(&gateway);
        supervise("sweep", async move || gateway.sweep().await)
    });
    if let Some(mut source) = source {
        let gateway = Arc::clone(&gateway);
        let watch = async move || reload::watch(&mut source, &gateway).await;
        lasting.spawn(supervise("reload", watch));
    }
    if let Some(tls) = tls.clone() {
        lasting.spawn(supervise("certificates", async move || tls.watch().await));
    }
    let now = shutdown.now.clone();
    server::serve(
        listeners.clients,
        tls,
        Arc::clone(&gateway),
        most_turned_away,
        shutdown.drain,
        shutdown.now,
    )
    .await;
    let closing = async {
        let (since, served) = ((&mut stopping).await.unwrap_or_else(|_| Instant::now()), Instant::now());
        let drained = since + gateway.config().drain;
        // What ended in the last moments goes to disk, too: within what is left of `drain`, or the little that it takes.
        let last_writes = timeout_at(drained.max(served + LAST_WRITES), gateway.close_disk());
        // What a collector has not taken by then is lost.
        let last_spans = timeout_at(drained.min(served + LONGEST_FLUSH), gateway.close_spans());
        if tokio::join!(last_writes, last_spans).0.is_err() {
            tracing::warn!("not all ended tasks were written to disk in time");
        }
    };
    tokio::select! {
        biased;
        () = now.cancelled() => {}
        () = closing => {}
    }
    stopping.abort();
    drop(lasting);
    stop_admin.cancel();
    // It ends within a turn of its runtime; a panic there was reported by the hook.
    let _ = panics::blocking(|| admin.join()).await;
    tracing::info!("stopped");
    Ok(())
}

//! The command `demo`: a fleet of clients polls through the gateway, and anyone can watch that the limit holds.
//!
//! The simulated upstream runs as a child process, so that it counts on a clock of its own; the gateway is served by
//! whoever calls, so that this module needs to know nothing of it. Ends by itself within a minute, whatever happens.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use http::Uri;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::board::{Board, Counted, Figures, LIMIT};
use super::client::Client;
use super::fleet::{Fleet, Size};

/// After so long the demo is over, even where something hangs.
const LONGEST: Duration = Duration::from_secs(58);
/// After so long the clients have stopped.
const CLIENTS_UNTIL: Duration = Duration::from_secs(51);
const START_PATIENCE: Duration = Duration::from_secs(10);
const STOP_PATIENCE: Duration = Duration::from_secs(4);
const STATS_PATIENCE: Duration = Duration::from_secs(1);

/// Watch a fleet of clients poll through the gateway, against a simulated upstream.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Clients.
    #[arg(long, value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u16).range(1..=500))]
    pub clients: u16,
    /// Tasks at once.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub tasks: u16,
    /// Clients that poll each task.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=20))]
    pub watchers: u16,
    /// How long the clients poll, in seconds.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=50))]
    pub seconds: u64,
}

impl DemoArgs {
    fn size(&self) -> Size {
        Size {
            clients: self.clients.into(),
            tasks: self.tasks.into(),
            watchers: self.watchers.min(self.clients).into(),
        }
    }
}

/// Runs the demo: `serve` serves the gateway for the given upstream on the given listener until the token is cancelled.
/// An early `shutdown` ends it with the figures so far. False when a client got an error, upstream saw a violation, or
/// nothing was served.
///
/// # Errors
/// When something cannot be started, the gateway ends by itself, or the demo is not over in time.
pub async fn demo<F, Fut>(args: DemoArgs, shutdown: impl Future<Output = ()>, serve: F) -> anyhow::Result<bool>
where
    F: FnOnce(Uri, TcpListener, CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let started = Instant::now();
    let mut upstream = Upstream::start().context("cannot start the simulated upstream")?;
    let run = run(&args, started, &mut upstream, shutdown, serve);
    let ended = timeout_at(started + LONGEST, Box::pin(run)).await;
    upstream.stop().await;
    ended.context("the demo was not over in time")?
}

async fn run<F, Fut>(
    args: &DemoArgs,
    started: Instant,
    upstream: &mut Upstream,
    shutdown: impl Future<Output = ()>,
    serve: F,
) -> anyhow::Result<bool>
where
    F: FnOnce(Uri, TcpListener, CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let mut shutdown = pin!(shutdown);
    let upstream_address = tokio::select! {
        address = upstream.address() => address?,
        () = &mut shutdown => return Ok(false),
    };
    let mut stats = Client::new(upstream_address, Vec::new());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let gateway_address = listener.local_addr()?;
    let stop = CancellationToken::new();
    let uri = Uri::builder()
        .scheme("http")
        .authority(upstream_address.to_string())
        .path_and_query("/")
        .build()?;
    // A set, so that the gateway ends with this function however that ends.
    let mut gateway = JoinSet::new();
    gateway.spawn(serve(uri, listener, stop.clone()));

    let mut board = Board::new();
    board.introduce(args.size())?;
    let begun = Instant::now();
    let fleet = Fleet::start(gateway_address, args.size());
    let end = (begun + Duration::from_secs(args.seconds)).min(started + CLIENTS_UNTIL);
    let mut counted = Counted::default();
    let mut ticks = interval(board.period());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            () = sleep_until(end) => break,
            Some(ended) = gateway.join_next() => {
                ended.context("the gateway panicked")??;
                bail!("the gateway ended by itself");
            }
            _ = ticks.tick() => {
                // A reading that fails now is made up for by the next; the last one must not fail.
                counted = read_stats(&mut stats).await.unwrap_or(counted);
                board.draw(&Figures {
                    elapsed: begun.elapsed(),
                    clients: fleet.tallied(),
                    upstream: counted.clone(),
                })?;
            }
        }
    }
    let elapsed = begun.elapsed();
    let clients = fleet.tallied();
    drop(fleet);
    stop.cancel();
    // What is in flight comes to its end, so that the last reading holds it.
    if let Ok(Some(ended)) = timeout(STOP_PATIENCE, gateway.join_next()).await {
        ended.context("the gateway panicked")??;
    }
    let figures = Figures {
        elapsed,
        clients,
        upstream: read_stats(&mut stats)
            .await
            .context("the simulated upstream does not tell its figures")?,
    };
    board.summarise(&figures)?;
    Ok(figures.are_good())
}

async fn read_stats(client: &mut Client) -> anyhow::Result<Counted> {
    let (_, body) = timeout(STATS_PATIENCE, client.get("/__stats")).await??;
    Ok(serde_json::from_slice(&body)?)
}

/// The simulated upstream, as a child process; killed when dropped.
struct Upstream(Child);

impl Upstream {
    fn start() -> anyhow::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .args(["upstream", "--listen", "127.0.0.1:0", "--latency", "200ms"])
            .args(["--run-time", "10s", "--run-time-spread", "10s"])
            .args(["--limit", &LIMIT.to_string()])
            .arg("--end-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A ctrl-c is for the demo, which ends its child itself.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self(child))
    }

    /// Where it listens, as it tells on its first line.
    async fn address(&mut self) -> anyhow::Result<SocketAddr> {
        let stdout = self.0.stdout.take().context("no output")?;
        let mut line = String::new();
        timeout(START_PATIENCE, BufReader::new(stdout).read_line(&mut line))
            .await
            .context("the simulated upstream did not start in time")??;
        let address = line.trim_end().strip_prefix("listening on http://");
        ensure!(address.is_some(), "the simulated upstream did not start");
        address
            .unwrap_or_default()
            .parse()
            .context("the simulated upstream does not tell where it listens")
    }

    async fn stop(&mut self) {
        match timeout(STATS_PATIENCE, self.0.kill()).await {
            Ok(Err(error)) if error.kind() != ErrorKind::InvalidInput => {
                tracing::warn!(%error, "cannot end the simulated upstream");
            }
            _ => {}
        }
    }
}

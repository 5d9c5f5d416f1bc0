//! The commands: serve (the default), `check`, `upstream`, `demo`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crun_gateway::config::Config;
use crun_gateway::log::Log;
use crun_gateway::metrics::Metrics;
use crun_gateway::reload::Source;
use crun_gateway::server::descriptors::{self, Shortfall};
use crun_gateway::simulator::{self, DemoArgs, UpstreamArgs};
use crun_gateway::{Listeners, Shutdown};

/// One account's 15 TaskInfo queries a second, serving a whole company.
///
/// Without a command: serves, as the configuration says.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    file: ConfigFile,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Args)]
struct ConfigFile {
    /// The configuration; an empty file is a valid one.
    #[arg(long, value_name = "FILE", default_value = "config.yaml")]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Validate a configuration and print what it means, secrets masked; exit 2 when something is wrong with it.
    Check(ConfigFile),
    /// Serve a simulated upstream: strict, with every answer that the real one can give.
    Upstream(UpstreamArgs),
    /// Show the main job: a simulated upstream, the gateway, and a fleet of clients that polls through it.
    Demo(DemoArgs),
}

/// The exit code when the configuration is wrong.
const BAD_CONFIG: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.command.is_none()
        && let Err(error) = of_hangup().thread_block()
    {
        eprintln!("crun-gateway: SIGHUP: {error}");
        return ExitCode::FAILURE;
    }
    // Dropped last, on every way out: what was said is written then.
    let log = Log::to_stderr();
    let done = match cli.command {
        None => {
            load(&cli.file, &log).map_or_else(Ok, |config| serve(config, cli.file, &log).map(|()| ExitCode::SUCCESS))
        }
        Some(Command::Check(file)) => load(&file, &log).map_or_else(Ok, |config| {
            let mut printed = config.render();
            let available = descriptors::hard_limit().context("file descriptors")?;
            if let Some(shortfall) = Shortfall::of(&config.limits, available) {
                // What is printed stays a configuration.
                printed.insert_str(0, &format!("# {shortfall}\n"));
            }
            std::io::stdout().write_all(printed.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }),
        Some(Command::Upstream(args)) => simulate(args).map(|()| ExitCode::SUCCESS),
        Some(Command::Demo(args)) => demo(args),
    };
    done.unwrap_or_else(|error| {
        log.say(&format!("crun-gateway: {error:#}"));
        ExitCode::FAILURE
    })
}

/// The configuration, or the exit code after every problem was printed.
fn load(file: &ConfigFile, log: &Log) -> Result<Config, ExitCode> {
    Config::load(&file.config, &|name| std::env::var(name).ok()).map_err(|problems| {
        log.say(&problems.to_string());
        ExitCode::from(BAD_CONFIG)
    })
}

fn serve(mut config: Config, file: ConfigFile, log: &Log) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new().context("metrics")?);
    let set_level = Box::new(log.start(&config.log, &metrics));
    log.count_in(&metrics)?;
    let available = descriptors::raise().context("file descriptors")?;
    let written = config.clone();
    let mut said = Shortfall::of(&config.limits, available);
    if let Some(shortfall) = &said {
        tracing::warn!("{shortfall}");
        shortfall.fit(&mut config.limits);
    }
    let upstream_connections = config.limits.upstream_connections;
    let runtime = runtime(config.worker_threads)?;
    let done = runtime.block_on(async {
        // Told of by the error of the write that is too large; else this signal would end the process.
        let _file_too_large = signal(SignalKind::from_raw(Signal::SIGXFSZ as i32)).context("SIGXFSZ")?;
        let shutdown = Shutdown::default();
        tokio::spawn(cancel_on_signals(shutdown.drain.clone(), shutdown.now.clone())?);
        let now = Arc::new(Notify::new());
        tokio::spawn(notify_on_hangup(Arc::clone(&now))?);
        of_hangup().thread_unblock().context("SIGHUP")?;
        let source = Source {
            path: file.config,
            written,
            now,
            fit: Box::new(move |limits| {
                let shortfall = Shortfall::of_clients(limits, upstream_connections, available);
                if let Some(shortfall) = &shortfall {
                    if said.as_ref() != Some(shortfall) {
                        tracing::warn!("{shortfall}");
                    }
                    shortfall.fit(limits);
                }
                said = shortfall;
            }),
            set_level,
        };
        let listeners = Listeners::bind(&config)?;
        crun_gateway::run(config, Some(source), listeners, metrics, shutdown).await
    });
    // Dropped, it would wait for look-ups of names that are under way, and those know no deadline.
    runtime.shutdown_background();
    done
}

fn simulate(args: UpstreamArgs) -> anyhow::Result<()> {
    runtime(2)?.block_on(async {
        let stop = CancellationToken::new();
        tokio::spawn(cancel_on_signals(stop.clone(), stop.clone())?);
        simulator::upstream(args, stop.cancelled_owned()).await
    })
}

fn demo(args: DemoArgs) -> anyhow::Result<ExitCode> {
    // Its display is the log.
    let kept = runtime(2)?.block_on(async {
        let stop = CancellationToken::new();
        tokio::spawn(cancel_on_signals(stop.clone(), stop.clone())?);
        let gateway = |upstream: http::Uri, clients, drain| async move {
            let mut config = Config::default();
            config.upstream.url = upstream;
            config.admin = ([127, 0, 0, 1], 0).into();
            let admin = std::net::TcpListener::bind(config.admin)?;
            let shutdown = Shutdown {
                drain,
                ..Shutdown::default()
            };
            let metrics = Arc::new(Metrics::new().context("metrics")?);
            crun_gateway::run(config, None, Listeners { clients, admin }, metrics, shutdown).await
        };
        simulator::demo(args, stop.cancelled_owned(), gateway).await
    })?;
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One multi-thread runtime, whatever the number of workers. One current-thread runtime per core, each with a listener of its
/// own (`SO_REUSEPORT`), would gain nothing measurable: with one worker the two differ by half a percent of a request's
/// instructions (`benches/README.md`); and what all cores share, the cache, flights and budgets, they would share all the
/// same, while the kernel's choice of a listener leaves some cores idle and others with too many connections.
fn runtime(worker_threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    // Where tokio cannot have all its workers it panics, and waits, unwinding, for those that it has: nobody tells them to
    // end. So the process ends before.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let why = panic.payload_as_str().unwrap_or_default();
        eprintln!("crun-gateway: {worker_threads} worker threads: {why}");
        std::process::exit(1)
    }));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(worker_threads)
        .enable_all()
        .build();
    std::panic::set_hook(hook);
    runtime.context("runtime")
}

/// The first SIGTERM or SIGINT cancels `first`, the next one `second`.
fn cancel_on_signals(
    first: CancellationToken,
    second: CancellationToken,
) -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    Ok(async move {
        for token in [first, second] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
    })
}

/// Who serves has it wait from the first moment until somebody listens, else an early one would end the process. Threads
/// that begin meanwhile never take it: the first one does.
fn of_hangup() -> SigSet {
    SigSet::from(Signal::SIGHUP)
}

/// SIGHUP asks for the configuration to be read anew.
fn notify_on_hangup(asked: Arc<Notify>) -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    Ok(async move {
        while hangup.recv().await.is_some() {
            asked.notify_one();
        }
    })
}

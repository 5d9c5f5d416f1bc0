//! A changed configuration, taken over while the gateway runs.
//!
//! Kubernetes changes a mounted `ConfigMap` or Secret by swapping a symlink in the folder above, which a watch on the file
//! misses; so what the configuration says is read anew every few seconds, with all the files that it names, and compared.
//! SIGHUP does it at once. Who writes a file in place may be in the middle of it, and half a configuration is often a valid
//! one that lets more people in: so a change counts once it has read the same twice in a row. It is checked first and taken
//! over whole, or not at all: then everything stays as it was, and the log says what is wrong and what to do.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::config::{Config, Limits, Problems, may_be_read_anew};
use crate::gateway::Gateway;
use crate::moment::unix_now;
use crate::panics;

/// How often the configuration is read anew. The kubelet takes up to a minute to bring a change into a pod.
const INTERVAL: Duration = Duration::from_secs(5);

/// Where the configuration comes from, and what a change of it concerns outside the gateway.
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// What it said when it was last taken over, before anything was lowered: what is read anew is compared with that.
    pub written: Config,
    /// Notified: read it now.
    pub now: Arc<Notify>,
    /// Lowers what does not fit this host, as at start, and says so.
    pub fit: Box<dyn FnMut(&mut Limits) + Send>,
    /// Sets the log's level.
    pub set_level: Box<dyn Fn(tracing::Level) + Send>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// What was said last, so that it is not said every few seconds.
#[derive(Default)]
struct Said {
    problems: Option<Problems>,
    needs_restart: Vec<&'static str>,
    is_no_file: bool,
}

/// Takes over what changes in `source`, for as long as it is polled.
pub async fn watch(source: &mut Source, gateway: &Gateway) {
    let (metrics, mut said) = (gateway.metrics(), Said::default());
    let mut last = Ok(source.written.clone());
    loop {
        let is_asked = timeout(INTERVAL, source.now.notified()).await.is_ok();
        if is_asked {
            said = Said::default();
        }
        let (path, running) = (source.path.clone(), source.written.clone());
        // Files may lie on a network's disk.
        let load = panics::blocking(move || {
            may_be_read_anew(&path).then(|| Config::load_anew(&path, &|name| std::env::var(name).ok(), &running))
        });
        let Ok(loaded) = load.await else { continue };
        let Some(loaded) = loaded else {
            if !said.is_no_file {
                tracing::warn!(
                    path = %source.path.display(),
                    "the configuration is in no regular file: what was read at the start stays, and the keys that it names"
                );
                said.is_no_file = true;
            }
            continue;
        };
        let is_settled = is_asked || loaded == last;
        last.clone_from(&loaded);
        if !is_settled {
            continue;
        }
        match loaded {
            Ok(config) => {
                take_over(config, source, gateway, &mut said, is_asked);
                metrics.config_reload_success.set(1);
            }
            Err(problems) if said.problems.as_ref() == Some(&problems) => {}
            Err(problems) => {
                metrics.config_reload_success.set(0);
                for problem in &problems {
                    tracing::error!(%problem, "the changed configuration is not taken over: everything stays as it was");
                }
                said.problems = Some(problems);
            }
        }
    }
}

fn take_over(config: Config, source: &mut Source, gateway: &Gateway, said: &mut Said, is_asked: bool) {
    let (mut config, needs_restart) = config.taken_over(&source.written);
    let is_changed = config != source.written;
    if is_changed {
        let written = config.clone();
        (source.fit)(&mut config.limits);
        (source.set_level)(config.log.level);
        let (limit, accounts) = (config.budget.limit, config.accounts.len());
        gateway.configure(config);
        // Not before: what a panic has kept from being taken over is taken over the next time.
        source.written = written;
        gateway.metrics().config_reload_timestamp.set(unix_now().as_secs_f64());
        tracing::info!(limit, accounts, "the changed configuration is taken over");
    } else if said.problems.is_some() {
        tracing::info!("the configuration says again what is in force");
    } else if is_asked && needs_restart.is_empty() {
        tracing::info!("the configuration has not changed");
    }
    said.problems = None;
    if needs_restart != said.needs_restart {
        if !needs_restart.is_empty() {
            tracing::warn!(
                fields = needs_restart.join(", "),
                "these fields of the changed configuration need a restart: they stay as they were"
            );
        }
        said.needs_restart = needs_restart;
    }
}

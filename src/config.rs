//! The checked configuration: real types, every value in range, every secret read.
//!
//! A YAML file goes in, a [`Config`] or all its [`Problems`] come out. The one list of fields, defaults and checks is
//! `config/fields.rs`; the shape is that of the shipped `config.yaml`. Nothing here reads the process's environment, which
//! is an argument, or the clock, but to see whether a certificate is valid. Relative paths are relative to the working
//! directory.

mod fields;
mod problem;
mod reader;
mod render;
mod restart;
mod secret;
mod shared;
mod tls;
mod values;
mod watched;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderName, Uri};
use serde_json::Value;

use self::problem::Wrong;
pub use self::problem::{Problem, Problems};
use self::reader::Reader;
pub use self::secret::{Key, KeySource, may_be_read_anew};
pub use self::shared::{Shared, Store, StoreUrl};
pub use self::tls::{CaFile, ClientCertificates, Demand, Identity, Tls};
pub use self::watched::{Content, Watched};

/// Everything that the gateway may be told.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Metrics and health; never exposed outside.
    pub admin: SocketAddr,
    /// TLS for clients; `None` is plain HTTP.
    pub tls: Option<Tls>,
    /// The API that is polled.
    pub upstream: Upstream,
    /// The accounts that are known by name.
    pub accounts: Vec<Account>,
    /// What becomes of a key that is listed nowhere.
    pub unknown_keys: UnknownKeys,
    /// How many unlisted keys are remembered at once.
    pub max_accounts: usize,
    /// The header that names the client within its token, its certificate or its address.
    pub client_header: HeaderName,
    /// How each account's queries are spent.
    pub budget: Budget,
    /// What is kept of answers, and for how long.
    pub cache: Cache,
    /// Path prefixes that are streamed through; each begins and ends with `/`.
    pub passthrough: Vec<String>,
    /// How replicas share budgets, answers and flights; `None` is one process.
    pub shared: Option<Shared>,
    /// What bounds the process.
    pub limits: Limits,
    /// How long a stop waits for what is in flight or queued.
    pub drain: Duration,
    /// Threads of the main runtime.
    pub worker_threads: usize,
    /// What is logged, and how.
    pub log: Log,
    /// Where spans go.
    pub otlp: Otlp,
}

impl Config {
    /// Reads the file at `path` and everything that it names. `env` looks up an environment variable.
    ///
    /// # Errors
    /// Every problem of the file at once; or the one that keeps it from being read.
    pub fn load(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Problems> {
        Self::parse(&read(path)?, env)
    }

    /// Reads the file for a process that runs with `running`, to which a file that says nothing is no configuration, if that
    /// would change anything, now or at a restart: it was lost, or has yet to be written, and the defaults let everybody in.
    ///
    /// # Errors
    /// As for [`load`](Self::load), and when it says nothing.
    pub fn load_anew(path: &Path, env: &dyn Fn(&str) -> Option<String>, running: &Self) -> Result<Self, Problems> {
        let text = read(path)?;
        let config = Self::parse_anew(&text, env, Some(running))?;
        let says_nothing = reader::tree(&text, &fields::is_one)?.is_null();
        if says_nothing && config != *running {
            let wrong = Wrong {
                what: "says nothing any more".into(),
                fix: "put back what was in it, or write {} for all defaults".into(),
            };
            return Err(Problem::new(path.display().to_string(), wrong).into());
        }
        Ok(config)
    }

    /// Reads the text of a configuration and the files and environment variables that it names.
    ///
    /// # Errors
    /// Every problem of the text at once. When it is not YAML, that is the one problem.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Problems> {
        Self::parse_anew(text, env, None)
    }

    fn parse_anew(text: &str, env: &dyn Fn(&str) -> Option<String>, running: Option<&Self>) -> Result<Self, Problems> {
        let tree = reader::tree(text, &fields::is_one)?;
        let mut reader = Reader::new(env, running);
        let config = reader.root(&tree, fields::config);
        reader.finish(text).map(|()| config)
    }

    /// Every key, token and password.
    fn keys(&self) -> impl Iterator<Item = &Key> {
        let keys = self.accounts.iter().flat_map(|account| &account.keys);
        let clients = self.accounts.iter().flat_map(|account| &account.clients);
        let store = self.shared.iter().filter_map(|shared| shared.store.as_ref());
        let passwords = store.flat_map(|store| [&store.password, &store.sentinel_password]);
        keys.chain(clients.map(|client| &client.token))
            .chain(passwords.flatten())
    }

    /// Every file of extra roots.
    fn ca_files(&self) -> impl Iterator<Item = &CaFile> {
        let store = self.shared.iter().filter_map(|shared| shared.store.as_ref());
        let store = store.map(|store| &store.ca_file);
        [&self.upstream.ca_file, &self.otlp.ca_file]
            .into_iter()
            .chain(store)
            .flatten()
    }

    /// The whole configuration as YAML in the shape of the file, every field, keys masked: what `check` prints.
    ///
    /// It parses to the same configuration again as long as the keys are where they were.
    pub fn render(&self) -> String {
        render::yaml(self)
    }
}

fn read(path: &Path) -> Result<String, Problem> {
    let text = secret::read_file(path).and_then(|bytes| {
        String::from_utf8(bytes).or_else(|_| problem::wrong("the file is not UTF-8", "save it as UTF-8"))
    });
    text.map_err(|wrong| Problem::new(path.display().to_string(), wrong))
}

impl Default for Config {
    /// What an empty file means.
    fn default() -> Self {
        Reader::new(&|_| None, None).root(&Value::Null, fields::config)
    }
}

/// The upstream and how it is reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    /// Scheme, host and port; no path.
    pub url: Uri,
    /// DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// One attempt, from its first byte written to the last byte read.
    pub timeout: Duration,
    /// Connections per account, at most.
    pub connections: usize,
    /// The largest body, decoded, in bytes.
    pub max_body: usize,
    /// Extra roots.
    pub ca_file: Option<CaFile>,
    /// Whether it is told which trace a request belongs to.
    pub traceparent: bool,
}

/// A configured account.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    /// Its metric label.
    pub name: String,
    /// Its keys, which share one budget; the first that upstream accepts is sent for client tokens.
    pub keys: Vec<Key>,
    /// Clients with a token of their own, which stands for the account's keys.
    pub clients: Vec<Client>,
}

/// A configured client.
#[derive(Clone, Debug, PartialEq)]
pub struct Client {
    /// Its metric label.
    pub name: String,
    /// What it presents in place of a key.
    pub token: Key,
    /// How many turns it gets for one of a client that has weight 1.
    pub weight: u32,
    /// Whether it may use the paths that are streamed through, which spends the account's money.
    pub passthrough: bool,
}

/// What becomes of a key that is listed nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownKeys {
    /// It is an account of its own.
    Forward,
    /// It is answered 401.
    Reject,
}

/// How each account's queries are spent.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// Queries a second that upstream allows an account.
    pub limit: NonZeroU32,
    /// `limit` emission intervals last 1 s plus this.
    pub margin: Duration,
    /// From a poll's arrival to its answer.
    pub max_wait: Duration,
    /// Flights that wait for a permit, per account, at most.
    pub max_queue: usize,
}

/// What is kept of answers, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Cache {
    /// Weight of all kept answers, in bytes.
    pub max_bytes: u64,
    /// How long an ended task is kept at most.
    pub terminal: Duration,
    /// How long a not-found answer is kept.
    pub not_found: Duration,
    /// The bounds of a live answer's freshness lifetime.
    pub fresh: Fresh,
    /// The oldest that a live snapshot may be when it is served.
    pub max_stale: Duration,
    /// The file in which ended tasks outlive the process; `None` is none.
    pub disk: Option<PathBuf>,
    /// What they may take there, in bytes.
    pub disk_max_bytes: u64,
    /// How long they are kept there, from when upstream said so.
    pub disk_max_age: Duration,
}

/// The bounds of a live answer's freshness lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// Never below.
    pub floor: Duration,
    /// Never above.
    pub ceiling: Duration,
}

/// What bounds the process.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// A request's head, in bytes.
    pub header_bytes: usize,
    /// A request's fields.
    pub headers: usize,
    /// A request's head, from its first byte.
    pub header_timeout: Duration,
    /// A request's body, in bytes.
    pub request_body: u64,
    /// A request and its answer, from the head's end to the answer's last byte.
    pub request_timeout: Duration,
    /// Requests being answered at once.
    pub requests: usize,
    /// A connection on which nothing is asked.
    pub idle_timeout: Duration,
    /// Client connections in all.
    pub connections: usize,
    /// Client connections per peer address; `None` is off.
    pub connections_per_address: Option<usize>,
    /// Upstream connections in all.
    pub upstream_connections: usize,
    /// Bytes of upstream bodies in flight: half to read with, half for what clients have yet to take.
    pub body_bytes: usize,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// The form of a line.
    pub format: LogFormat,
    /// The least severe level that is written.
    pub level: tracing::Level,
}

/// Where spans go: a collector that speaks OTLP/HTTP.
#[derive(Clone, Debug, PartialEq)]
pub struct Otlp {
    /// Scheme, host and port; `None` is no spans at all.
    pub endpoint: Option<Uri>,
    /// Extra roots.
    pub ca_file: Option<CaFile>,
    /// Of the traces that begin here, how many are kept, from 0 to 1.
    pub sample_ratio: f64,
    /// One request to the collector, connecting included.
    pub timeout: Duration,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

#[cfg(test)]
mod tests;

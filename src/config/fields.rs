//! Every field of the configuration: its name, its default, and what it must be.
//!
//! This is the one list. `Config::default()` is what it makes of an empty file; the shipped `config.yaml` and
//! [`Config::render`] have the same fields in the same order, which the tests hold them to.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use bytesize::{GIB, KIB, MIB, TIB};
use http::{HeaderName, Uri};
use serde_json::Value;
use tracing::Level;

use super::problem::{Wrong, wrong};
use super::reader::{self, Reader};
use super::secret;
use super::values::{self, written_duration, written_size};
use super::{
    Account, Budget, Cache, Client, Config, Fresh, Limits, Log, LogFormat, Otlp, UnknownKeys, Upstream, shared, tls,
};

const MS: Duration = Duration::from_millis(1);
const DAY: Duration = secs(86_400);
/// No duration is longer, so that sums of them never overflow.
const YEAR: Duration = secs(365 * 86_400);
/// No count is larger: beyond, memory or file descriptors would end first.
const MANY: u64 = 1_000_000;

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub(super) const UNKNOWN_KEYS: [(&str, UnknownKeys); 2] =
    [("forward", UnknownKeys::Forward), ("reject", UnknownKeys::Reject)];
pub(super) const LOG_FORMATS: [(&str, LogFormat); 2] = [("text", LogFormat::Text), ("json", LogFormat::Json)];
pub(super) const LOG_LEVELS: [(&str, Level); 5] = [
    ("trace", Level::TRACE),
    ("debug", Level::DEBUG),
    ("info", Level::INFO),
    ("warn", Level::WARN),
    ("error", Level::ERROR),
];

/// One of each section that is not there by default.
const ONE_OF_EACH: &str = "{ accounts: [{ name: a, keys: [{ env: KEY }], clients: [{ name: c, token: { env: TOKEN } }] }], \
                           tls: {}, shared: {} }";

/// Every field that is asked for when there is an account, TLS and a store, as `accounts.keys.file`.
fn known() -> Vec<String> {
    let tree = reader::tree(ONE_OF_EACH, &|_| false).unwrap_or_default();
    let mut reader = Reader::new(&|_| Some("key".to_owned()), None);
    reader.root(&tree, config);
    reader.known().iter().cloned().collect()
}

/// Whether some field has this last name.
pub(super) fn is_one(name: &str) -> bool {
    known().iter().any(|field| field.rsplit('.').next() == Some(name))
}

/// Reads the whole configuration.
pub(super) fn config(r: &mut Reader<'_>) -> Config {
    let config = Config {
        listen: r.value("listen", SocketAddr::from(([0, 0, 0, 0], 8080)), values::address),
        admin: r.value("admin", SocketAddr::from(([0, 0, 0, 0], 9090)), values::address),
        tls: r.optional("tls", tls::section).flatten(),
        upstream: r.section("upstream", upstream),
        accounts: accounts(r),
        unknown_keys: r.choice("unknown_keys", UnknownKeys::Forward, &UNKNOWN_KEYS),
        max_accounts: r.count("max_accounts", 10_000, 1..=MANY),
        client_header: r.value("client_header", HeaderName::from_static("x-client-id"), values::header),
        budget: r.section("budget", budget),
        cache: r.section("cache", cache),
        passthrough: r.list("passthrough", vec!["/api/v1/".to_owned()], values::prefix),
        shared: r.optional("shared", shared::section).flatten(),
        limits: r.section("limits", limits),
        drain: r.duration("drain", secs(30), MS..=DAY),
        worker_threads: r
            .nullable("worker_threads", count(1..=1024))
            .unwrap_or_else(default_worker_threads),
        log: r.section("log", log),
        otlp: r.section("otlp", otlp),
    };
    together(r, &config);
    config
}

fn upstream(r: &mut Reader<'_>) -> Upstream {
    Upstream {
        url: r.value("url", Uri::from_static("https://api.crun.ai"), values::url),
        connect_timeout: r.duration("connect_timeout", secs(3), MS..=YEAR),
        timeout: r.duration("timeout", secs(8), MS..=YEAR),
        connections: r.count("connections", 120, 1..=MANY),
        max_body: r.bytes("max_body", 16 * MIB, KIB..=GIB),
        ca_file: tls::ca_file(r),
        traceparent: r.value("traceparent", false, values::boolean),
    }
}

fn account(r: &mut Reader<'_>) -> Account {
    let name = r.nullable("name", values::name);
    if name.is_none() && r.sound(&["", "name"]) {
        let fix = "give the account a name, which labels its metrics";
        r.problem("name", "is missing", fix);
    }
    let keys = secret::keys(r, "keys");
    let clients: Vec<_> = r.each("clients", client).into_iter().flatten().collect();
    for (index, Client { name, .. }) in clients.iter().enumerate() {
        if clients[..index].iter().any(|other| other.name == *name) {
            let what = "is also the name of another client of this account";
            r.problem(&format!("clients[{index}].name"), what, "choose another");
        }
    }
    let name = name.unwrap_or_default();
    Account { name, keys, clients }
}

fn client(r: &mut Reader<'_>) -> Option<Client> {
    let name = r.nullable("name", values::name);
    if name.is_none() && r.sound(&["", "name"]) {
        let fix = "give the client a name, which labels its metrics";
        r.problem("name", "is missing", fix);
    }
    let token = secret::one(r, "token");
    let weight = r.count("weight", 1, 1..=1000);
    let passthrough = r.value("passthrough", false, values::boolean);
    Some(Client {
        name: name?,
        token: token?,
        weight,
        passthrough,
    })
}

fn accounts(r: &mut Reader<'_>) -> Vec<Account> {
    let accounts = r.each("accounts", account);
    let named = accounts
        .iter()
        .enumerate()
        .filter(|(_, account)| !account.name.is_empty());
    for (index, Account { name, .. }) in named {
        if let Some(first) = accounts[..index].iter().position(|other| other.name == *name) {
            let what = format!("is also the name of accounts[{first}]");
            let fix = "choose another, or list the keys of both under one account";
            r.problem(&format!("accounts[{index}].name"), what, fix);
        }
    }
    accounts
}

fn budget(r: &mut Reader<'_>) -> Budget {
    Budget {
        limit: NonZeroU32::new(r.count("limit", 15, 1..=1_000_000)).unwrap_or(NonZeroU32::MIN),
        margin: r.duration("margin", 30 * MS, Duration::ZERO..=secs(10)),
        max_wait: r.duration("max_wait", secs(10), MS..=secs(3600)),
        max_queue: r.count("max_queue", 1000, 1..=MANY),
    }
}

fn cache(r: &mut Reader<'_>) -> Cache {
    Cache {
        max_bytes: r.bytes("max_bytes", 256 * MIB, MIB..=16 * TIB),
        terminal: r.duration("terminal", 7 * DAY, MS..=YEAR),
        not_found: r.duration("not_found", secs(5), Duration::ZERO..=YEAR),
        fresh: r.section("fresh", |r| Fresh {
            floor: r.duration("floor", secs(2), Duration::ZERO..=YEAR),
            ceiling: r.duration("ceiling", secs(30), MS..=YEAR),
        }),
        max_stale: r.duration("max_stale", secs(600), Duration::ZERO..=YEAR),
        disk: r.nullable("disk", values::file),
        disk_max_bytes: r.bytes("disk_max_bytes", GIB, 16 * MIB..=16 * TIB),
        disk_max_age: r.duration("disk_max_age", 7 * DAY, secs(1)..=YEAR),
    }
}

fn limits(r: &mut Reader<'_>) -> Limits {
    Limits {
        // hyper takes no longer target than 64 KiB.
        header_bytes: r.bytes("header_bytes", 32 * KIB, KIB..=64 * KIB),
        headers: r.count("headers", 100, 1..=1000),
        header_timeout: r.duration("header_timeout", secs(10), MS..=YEAR),
        request_body: r.bytes("request_body", 256 * MIB, 0..=TIB),
        request_timeout: r.duration("request_timeout", secs(15 * 60), MS..=YEAR),
        requests: r.count("requests", 10_000, 1..=MANY),
        idle_timeout: r.duration("idle_timeout", secs(75), MS..=YEAR),
        connections: r.count("connections", 20_000, 1..=MANY),
        connections_per_address: r.nullable("connections_per_address", count(1..=MANY)),
        upstream_connections: r.count("upstream_connections", 2000, 1..=MANY),
        body_bytes: r.bytes("body_bytes", 256 * MIB, KIB..=64 * GIB),
    }
}

fn log(r: &mut Reader<'_>) -> Log {
    Log {
        format: r.choice("format", LogFormat::Text, &LOG_FORMATS),
        level: r.choice("level", Level::INFO, &LOG_LEVELS),
    }
}

fn otlp(r: &mut Reader<'_>) -> Otlp {
    Otlp {
        endpoint: r.nullable("endpoint", values::endpoint),
        ca_file: tls::ca_file(r),
        sample_ratio: r.value("sample_ratio", 0.01, values::ratio),
        timeout: r.duration("timeout", secs(10), MS..=secs(3600)),
    }
}

/// What no field can say alone.
fn together(r: &mut Reader<'_>, config: &Config) {
    let (listen, admin) = (config.listen, config.admin);
    let any = listen.ip().is_unspecified() || admin.ip().is_unspecified();
    let clash = listen.port() == admin.port() && listen.port() != 0 && (any || listen.ip() == admin.ip());
    let what = "is the address of `listen`";
    let fix = "choose another port: it must not be exposed where clients are";
    r.together(&["admin", "listen"], !clash, what, fix);

    let Fresh { floor, ceiling } = config.cache.fresh;
    let (low, high) = (written_duration(floor), written_duration(ceiling));
    let what = format!("is {low}, above cache.fresh.ceiling of {high}");
    let fix = "lower it, or raise cache.fresh.ceiling";
    r.together(
        &["cache.fresh.floor", "cache.fresh.ceiling"],
        floor <= ceiling,
        what,
        fix,
    );

    let (wait, request) = (config.budget.max_wait, config.limits.request_timeout);
    let what = format!(
        "is {}, below budget.max_wait of {}",
        written_duration(request),
        written_duration(wait)
    );
    let fix = "raise it, or lower budget.max_wait: a poll may wait that long";
    r.together(
        &["limits.request_timeout", "budget.max_wait"],
        wait <= request,
        what,
        fix,
    );

    if let Some(shared) = &config.shared {
        let (replicas, limit) = (shared.max_replicas, config.budget.limit);
        let what =
            format!("is {replicas}, above budget.limit of {limit}: a replica that is cut off could spend nothing");
        let fix = "lower it";
        r.together(&["shared.max_replicas", "budget.limit"], replicas <= limit, what, fix);
        let margin = config.budget.margin;
        let what = format!(
            "is {}: a third of it is all that a reply of the shared store may take",
            written_duration(margin)
        );
        let fix = "raise it to 15ms or more, or set shared.url to null";
        r.together(
            &["budget.margin", "shared.url"],
            shared.store.is_none() || margin >= 15 * MS,
            what,
            fix,
        );
    }

    let (one, all) = (config.upstream.max_body, config.limits.body_bytes);
    let room = written_size(all as u64);
    let what = format!(
        "is above half of limits.body_bytes of {room}: no room to read one such body while a client takes another"
    );
    let fix = "lower it, or raise limits.body_bytes";
    r.together(&["upstream.max_body", "limits.body_bytes"], one <= all / 2, what, fix);
}

fn default_worker_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4))
}

fn count<N: TryFrom<u64>>(range: RangeInclusive<u64>) -> impl Fn(&Value) -> Result<N, Wrong> {
    move |value| {
        let number = values::whole(value, &range)?;
        N::try_from(number).or_else(|_| wrong("is more than this machine can count", "lower it"))
    }
}

/// The getters that the table above is written in.
impl Reader<'_> {
    pub(super) fn duration(
        &mut self,
        name: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        self.value(name, default, |value| values::duration(value, &range))
    }

    fn count<N: TryFrom<u64>>(&mut self, name: &'static str, default: N, range: RangeInclusive<u64>) -> N {
        self.value(name, default, count(range))
    }

    /// A size with its default in bytes; at most what this machine can address.
    pub(super) fn bytes<N: TryFrom<u64> + Default>(
        &mut self,
        name: &'static str,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> N {
        let fits = |bytes| N::try_from(bytes).or_else(|_| wrong("is more than this machine can address", "lower it"));
        self.value(name, N::try_from(default).unwrap_or_default(), |value| {
            fits(values::size(value, &range)?)
        })
    }

    fn choice<T: Copy>(&mut self, name: &'static str, default: T, choices: &[(&str, T)]) -> T {
        self.value(name, default, |value| values::choice(value, choices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../config.yaml");

    /// Whether a line of `yaml` begins with `field`'s last name, as a field or within `{ … }`, perhaps commented out.
    fn shows(yaml: &str, field: &str) -> bool {
        let name = field.rsplit('.').next().unwrap_or(field);
        yaml.lines()
            .map(|line| line.trim_start_matches(['#', ' ', '-', '{']))
            .any(|line| line.starts_with(&format!("{name}:")))
    }

    #[test]
    fn the_shipped_file_shows_every_field() {
        for field in known() {
            assert!(shows(SHIPPED, &field), "config.yaml lacks {field}");
        }
    }

    #[test]
    fn what_is_rendered_shows_every_field() {
        let files = tempfile::tempdir().unwrap();
        let path = files.path().join("key");
        std::fs::write(&path, "other-key").unwrap();
        let text = format!(
            "accounts: [{{ name: a, keys: [{{ env: KEY }}, {{ file: {path:?} }}], clients: [{{ name: c, token: {{ env: \
             TOKEN }} }}] }}]"
        );
        let mut config = Config::parse(&text, &|name| Some(name.to_lowercase())).unwrap();
        config.tls = Some(tls::Tls {
            cert_file: "cert".into(),
            key_file: "key".into(),
            clients: None,
        });
        config.shared = Config::parse("shared: { max_replicas: 3, url: 'redis://a' }", &|_| None)
            .unwrap()
            .shared;
        for field in known() {
            assert!(shows(&config.render(), &field), "render lacks {field}");
        }
    }

    #[test]
    fn the_shipped_file_says_what_an_empty_one_means() {
        let shipped = Config::parse(SHIPPED, &|_| None).unwrap();
        assert_eq!(shipped, Config::default());
        assert_eq!(shipped, Config::parse("", &|_| None).unwrap());
    }

    /// What the shipped file shows of `section`, commented out.
    fn example(section: &str) -> String {
        let example: Vec<_> = SHIPPED
            .lines()
            .skip_while(|line| *line != format!("# {section}:"))
            .map_while(|line| line.strip_prefix("# "))
            .collect();
        example.join("\n")
    }

    #[test]
    fn the_commented_tls_in_the_shipped_file_is_right() {
        let problems = Config::parse(&example("tls"), &|_| None).unwrap_err();
        let fields: Vec<_> = problems.iter().map(|problem| problem.field.as_str()).collect();
        let files = ["tls.cert_file", "tls.key_file", "tls.client_ca_file"];
        assert_eq!(fields, files, "only the files are missing: {problems}");
    }

    #[test]
    fn the_commented_shared_in_the_shipped_file_is_right() {
        let example = example("shared");
        let shared = Config::parse(&example, &|name| Some(format!("value-of-{name}")))
            .unwrap()
            .shared
            .unwrap();
        assert!(shared.store.is_some_and(|store| store.password.is_some()), "{example}");
    }

    #[test]
    fn the_commented_account_in_the_shipped_file_is_right() {
        let example = example("accounts");
        let problems = Config::parse(&example, &|name| Some(format!("value-of-{name}"))).unwrap_err();
        let fields: Vec<_> = problems.iter().map(|problem| problem.field.as_str()).collect();
        assert_eq!(fields, ["accounts[0].keys[0].file"], "{problems}\n{example}");
    }
}

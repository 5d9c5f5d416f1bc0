//! Writes a configuration as the file that would say the same.

use std::path::Path;

use http::Uri;

use super::fields::{LOG_FORMATS, LOG_LEVELS, UNKNOWN_KEYS};
use super::tls::DEMANDS;
use super::values::{written_duration as time, written_size};
use super::{Account, CaFile, Client, Config, Key, KeySource, Shared, Tls};

/// Every field, in the order of the shipped `config.yaml`.
pub(super) fn yaml(config: &Config) -> String {
    let Config {
        listen,
        admin,
        tls,
        upstream,
        accounts,
        unknown_keys,
        max_accounts,
        client_header,
        budget,
        cache,
        passthrough,
        shared,
        limits,
        drain,
        worker_threads,
        log,
        otlp,
    } = config;
    let size = |bytes: usize| quoted(&written_size(bytes as u64));
    let time = |duration| quoted(&time(duration));
    let prefixes: Vec<_> = passthrough.iter().map(|prefix| quoted(prefix)).collect();

    let lines = [
        format!("listen: {}", quoted(&listen.to_string())),
        format!("admin: {}", quoted(&admin.to_string())),
        tls.as_ref().map_or_else(|| "tls: null".to_owned(), tls_yaml),
        "upstream:".to_owned(),
        format!("  url: {}", origin(&upstream.url)),
        format!("  connect_timeout: {}", time(upstream.connect_timeout)),
        format!("  timeout: {}", time(upstream.timeout)),
        format!("  connections: {}", upstream.connections),
        format!("  max_body: {}", size(upstream.max_body)),
        format!("  ca_file: {}", or_null(ca_file(upstream.ca_file.as_ref()))),
        format!("  traceparent: {}", upstream.traceparent),
        accounts_yaml(accounts),
        format!("unknown_keys: {}", word(unknown_keys, &UNKNOWN_KEYS)),
        format!("max_accounts: {max_accounts}"),
        format!("client_header: {client_header}"),
        "budget:".to_owned(),
        format!("  limit: {}", budget.limit),
        format!("  margin: {}", time(budget.margin)),
        format!("  max_wait: {}", time(budget.max_wait)),
        format!("  max_queue: {}", budget.max_queue),
        "cache:".to_owned(),
        format!("  max_bytes: {}", quoted(&written_size(cache.max_bytes))),
        format!("  terminal: {}", time(cache.terminal)),
        format!("  not_found: {}", time(cache.not_found)),
        "  fresh:".to_owned(),
        format!("    floor: {}", time(cache.fresh.floor)),
        format!("    ceiling: {}", time(cache.fresh.ceiling)),
        format!("  max_stale: {}", time(cache.max_stale)),
        format!("  disk: {}", or_null(cache.disk.as_deref().map(path))),
        format!("  disk_max_bytes: {}", quoted(&written_size(cache.disk_max_bytes))),
        format!("  disk_max_age: {}", time(cache.disk_max_age)),
        format!("passthrough: [{}]", prefixes.join(", ")),
        shared.as_ref().map_or_else(|| "shared: null".to_owned(), shared_yaml),
        "limits:".to_owned(),
        format!("  header_bytes: {}", size(limits.header_bytes)),
        format!("  headers: {}", limits.headers),
        format!("  header_timeout: {}", time(limits.header_timeout)),
        format!("  request_body: {}", quoted(&written_size(limits.request_body))),
        format!("  request_timeout: {}", time(limits.request_timeout)),
        format!("  requests: {}", limits.requests),
        format!("  idle_timeout: {}", time(limits.idle_timeout)),
        format!("  connections: {}", limits.connections),
        format!("  connections_per_address: {}", or_null(limits.connections_per_address)),
        format!("  upstream_connections: {}", limits.upstream_connections),
        format!("  body_bytes: {}", size(limits.body_bytes)),
        format!("drain: {}", time(*drain)),
        format!("worker_threads: {worker_threads}"),
        "log:".to_owned(),
        format!("  format: {}", word(&log.format, &LOG_FORMATS)),
        format!("  level: {}", word(&log.level, &LOG_LEVELS)),
        "otlp:".to_owned(),
        format!("  endpoint: {}", or_null(otlp.endpoint.as_ref().map(origin))),
        format!("  ca_file: {}", or_null(ca_file(otlp.ca_file.as_ref()))),
        format!("  sample_ratio: {}", otlp.sample_ratio),
        format!("  timeout: {}", time(otlp.timeout)),
    ];
    lines.map(|line| line + "\n").concat()
}

fn tls_yaml(tls: &Tls) -> String {
    let roots = tls.clients.as_ref().map(|clients| path(&clients.ca_file));
    let demand = tls.clients.as_ref().map(|clients| word(&clients.demand, &DEMANDS));
    format!(
        "tls:\n  cert_file: {}\n  key_file: {}\n  client_ca_file: {}\n  client_certificates: {}",
        path(&tls.cert_file),
        path(&tls.key_file),
        or_null(roots),
        or_null(demand)
    )
}

fn shared_yaml(Shared { max_replicas, store }: &Shared) -> String {
    let head = format!("shared:\n  max_replicas: {max_replicas}\n  url: ");
    let Some(store) = store else {
        return head + "null";
    };
    let secret = |key: &Option<Key>| or_null(key.as_ref().map(key_yaml));
    format!(
        "{head}{}\n  prefix: {}\n  max_bytes: {}\n  username: {}\n  password: {}\n  sentinel_password: {}\n  \
         ca_file: {}\n  \
         connect_timeout: {}\n  timeout: {}",
        quoted(&store.url.to_string()),
        quoted(&store.prefix),
        quoted(&written_size(store.max_bytes)),
        or_null(store.username.as_deref().map(quoted)),
        secret(&store.password),
        secret(&store.sentinel_password),
        or_null(ca_file(store.ca_file.as_ref())),
        quoted(&time(store.connect_timeout)),
        quoted(&time(store.timeout)),
    )
}

fn accounts_yaml(accounts: &[Account]) -> String {
    if accounts.is_empty() {
        return "accounts: []".to_owned();
    }
    let account = |Account { name, keys, clients }: &Account| {
        let keys: Vec<_> = keys.iter().map(|key| format!("      - {}", key_yaml(key))).collect();
        let name = quoted(name);
        let clients = if clients.is_empty() {
            " []".to_owned()
        } else {
            clients.iter().map(client_yaml).collect()
        };
        format!(
            "  - name: {name}\n    keys:\n{}\n    clients:{clients}",
            keys.join("\n")
        )
    };
    let accounts: Vec<_> = accounts.iter().map(account).collect();
    format!("accounts:\n{}", accounts.join("\n"))
}

fn client_yaml(client: &Client) -> String {
    format!(
        "\n      - name: {}\n        token: {}\n        weight: {}\n        passthrough: {}",
        quoted(&client.name),
        key_yaml(&client.token),
        client.weight,
        client.passthrough
    )
}

fn key_yaml(Key { key, source }: &Key) -> String {
    let source = match source {
        KeySource::File(file) => format!("file: {}", path(file)),
        KeySource::Env(name) => format!("env: {}", quoted(name)),
    };
    format!("{{ {source} }}  # read, {} characters", key.length())
}

/// A JSON string, which is a YAML string in double quotes.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Scheme, host and port.
fn origin(url: &Uri) -> String {
    quoted(url.to_string().trim_end_matches('/'))
}

fn path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn ca_file(roots: Option<&CaFile>) -> Option<String> {
    roots.map(|roots| path(&roots.path))
}

fn or_null(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "null".to_owned(), |value| value.to_string())
}

fn word<T: PartialEq>(value: &T, words: &[(&'static str, T)]) -> &'static str {
    words
        .iter()
        .find(|(_, other)| other == value)
        .map_or("", |(word, _)| word)
}

//! A configuration as an operator meets it: defaults, every kind of mistake, secrets, and what `check` prints.

use std::fs;
use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::*;
use crate::account::ApiKey;

const SECRET: &str = "ak_91f3secret7c";

fn no_env(_: &str) -> Option<String> {
    None
}

/// `MUSIC` and `MEDIA` are set, to two keys; `PADDED` is the first with white space around it.
fn env(name: &str) -> Option<String> {
    match name {
        "MUSIC" => Some(SECRET.to_owned()),
        "MEDIA" => Some("ak_2media".to_owned()),
        "PADDED" => Some(format!(" {SECRET}\n")),
        "EMPTY" => Some(" \n".to_owned()),
        "BROKEN" => Some(format!("{SECRET}\nX: y")),
        _ => None,
    }
}

fn refused(text: &str) -> Problems {
    match Config::parse(text, &env) {
        Ok(config) => panic!("accepted:\n{text}\n{}", config.render()),
        Err(problems) => problems,
    }
}

/// Says that `text` has one problem, which reads `expected`.
fn refuses(text: &str, expected: &str) {
    assert_eq!(refused(text).to_string(), expected, "{text}");
}

/// Says that `text` is refused for `fields`, in this order.
fn refuses_fields(text: &str, fields: &[&str]) {
    let problems = refused(text);
    let found: Vec<_> = problems.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(found, fields, "{text}\n{problems}");
}

fn accepts(text: &str) -> Config {
    Config::parse(text, &env).unwrap_or_else(|problems| panic!("{text}\n{problems}"))
}

fn file(directory: &tempfile::TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

fn certificate() -> String {
    rcgen::generate_simple_self_signed(["upstream".to_owned()])
        .unwrap()
        .cert
        .pem()
}

#[test]
fn an_empty_file_has_every_default() {
    let config = accepts("# nothing\n");
    let secs = Duration::from_secs;

    assert_eq!(config.listen.to_string(), "0.0.0.0:8080");
    assert_eq!(config.admin.to_string(), "0.0.0.0:9090");
    assert_eq!(config.upstream.url, "https://api.crun.ai");
    assert_eq!(config.upstream.connect_timeout, secs(3));
    assert_eq!(config.upstream.timeout, secs(8));
    assert_eq!(config.upstream.connections, 120);
    assert_eq!(config.upstream.max_body, 16 << 20);
    assert_eq!(config.upstream.ca_file, None);
    assert!(!config.upstream.traceparent);
    assert_eq!(config.accounts, []);
    assert_eq!(config.unknown_keys, UnknownKeys::Forward);
    assert_eq!(config.max_accounts, 10_000);
    assert_eq!(config.client_header, "x-client-id");
    assert_eq!(config.budget.limit.get(), 15);
    assert_eq!(config.budget.margin, Duration::from_millis(30));
    assert_eq!(config.budget.max_wait, secs(10));
    assert_eq!(config.budget.max_queue, 1000);
    assert_eq!(config.cache.max_bytes, 256 << 20);
    assert_eq!(config.cache.terminal, Duration::from_hours(7 * 24));
    assert_eq!(config.cache.not_found, secs(5));
    assert_eq!(config.cache.fresh.floor, secs(2));
    assert_eq!(config.cache.fresh.ceiling, secs(30));
    assert_eq!(config.cache.max_stale, Duration::from_mins(10));
    assert_eq!(config.cache.disk, None);
    assert_eq!(config.cache.disk_max_bytes, 1 << 30);
    assert_eq!(config.cache.disk_max_age, Duration::from_hours(7 * 24));
    assert_eq!(config.passthrough, ["/api/v1/"]);
    assert_eq!(config.limits.header_bytes, 32 << 10);
    assert_eq!(config.limits.headers, 100);
    assert_eq!(config.limits.header_timeout, secs(10));
    assert_eq!(config.limits.request_body, 256 << 20);
    assert_eq!(config.limits.request_timeout, Duration::from_mins(15));
    assert_eq!(config.limits.requests, 10_000);
    assert_eq!(config.limits.idle_timeout, secs(75));
    assert_eq!(config.limits.connections, 20_000);
    assert_eq!(config.limits.connections_per_address, None);
    assert_eq!(config.limits.upstream_connections, 2000);
    assert_eq!(config.limits.body_bytes, 256 << 20);
    assert_eq!(config.drain, secs(30));
    assert!((1..=4).contains(&config.worker_threads));
    assert_eq!(config.log.format, LogFormat::Text);
    assert_eq!(config.log.level, tracing::Level::INFO);
    assert_eq!(config.otlp.endpoint, None);
    assert_eq!(config.otlp.ca_file, None);
    assert!((config.otlp.sample_ratio - 0.01).abs() < f64::EPSILON);
    assert_eq!(config.otlp.timeout, secs(10));
    assert_eq!(config, Config::default());
}

#[test]
fn the_shipped_file_loads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.yaml");
    assert_eq!(Config::load(&path, &no_env).unwrap(), Config::default());
}

#[test]
fn all_problems_are_told_at_once() {
    let text = r#"
listen: "0.0.0.0:8080"
admin: localhost
upstream:
  url: https://api.crun.ai/api/v1
  timeout: 8
  conections: 5
accounts:
  - name: music
    keys: [{ env: MUSIC }]
  - name: music
    keys:
      - { file: /nowhere/key }
      - { env: MUSIC }
budget:
  limit: "15"
  margin: 11s
max_wait: 10s
passthrough: ["/api/v1/", "api"]
"#;
    let expected = [
        r#"admin: is not an IP address and a port: write both, e.g. "0.0.0.0:8080" or "[::]:8080""#,
        r#"upstream.url: has a path, a query or a fragment: write scheme and host only, e.g. "https://api.crun.ai""#,
        r#"upstream.timeout: has no unit: write it with a unit, e.g. "3s""#,
        "accounts[1].keys[0].file: there is no such file: create it, or correct the path",
        "accounts[1].keys[1]: is the same key as accounts[0].keys[0]: list each key once",
        "accounts[1].name: is also the name of accounts[0]: choose another, or list the keys of both under one account",
        "budget.limit: is text, not a number: write the number without quotes",
        "budget.margin: is out of range: choose a duration from 0s to 10s",
        r#"passthrough[1]: does not begin and end with `/`: write whole segments, e.g. "/api/v1/""#,
        "upstream.conections: no such field: did you mean `connections`?",
        "max_wait: no such field: did you mean `budget.max_wait`?",
    ];
    refuses(text, &expected.join("\n"));
}

#[test]
fn an_unknown_field_is_refused_at_every_level() {
    refuses("lisen: x", "lisen: no such field: did you mean `listen`?");
    refuses(
        "cache: { fresh: { celing: 3s } }",
        "cache.fresh.celing: no such field: did you mean `ceiling`?",
    );
    refuses(
        "log: { target: x }",
        "log.target: no such field: the fields here are format, level",
    );
    refuses_fields("limits: { x: 1 }", &["limits.x"]);
    refuses_fields("upstream: { x: 1 }", &["upstream.x"]);
    refuses_fields("budget: { x: 1 }", &["budget.x"]);
    refuses_fields(
        "accounts: [{ name: a, keys: [{ env: MUSIC }], x: 1 }]",
        &["accounts[0].x"],
    );
    refuses_fields(
        "accounts: [{ name: a, keys: [{ env: MUSIC, x: 1 }] }]",
        &["accounts[0].keys[0].<unknown>"],
    );
}

#[test]
fn wrong_shapes_are_refused() {
    refuses(
        "- a",
        "the file: is a list, not a mapping of fields: write a mapping of fields, e.g. {}",
    );
    refuses_fields("hello", &["the file"]);
    refuses_fields("budget: 15", &["budget"]);
    refuses_fields("accounts: music", &["accounts"]);
    refuses_fields("accounts: [music]", &["accounts[0]"]);
    refuses_fields("accounts: [{ name: a, keys: { env: MUSIC } }]", &["accounts[0].keys"]);
    refuses_fields("passthrough: /api/", &["passthrough"]);
    refuses_fields("passthrough: [1]", &["passthrough[0]"]);
    refuses(
        "drain:",
        "drain: is empty: give it a value, or remove it for the default",
    );
    refuses_fields("a: 1\nb: [", &["line 2, column 4"]);
}

#[test]
fn an_empty_section_has_its_defaults() {
    assert_eq!(accepts("budget:\naccounts:\ncache:\n  fresh:\n"), Config::default());
}

#[test]
fn every_field_has_a_range() {
    for (field, bad) in [
        (
            "listen",
            &["'8080'", "8080", "localhost:80", "''", "'0.0.0.0:70000'"][..],
        ),
        ("upstream.url", &["ftp://x", "x", "'http://u:p@x'", "http://x/y", "7"]),
        ("upstream.connect_timeout", &["0s", "3", "2y", "-1s", "null"]),
        ("upstream.timeout", &["0s", "'8'", "true", "[8s]"]),
        (
            "upstream.connections",
            &["0", "-1", "1.5", "'120'", "1000001", "99999999999999999999"],
        ),
        ("upstream.max_body", &["1023", "2GiB", "big", "-1", "1.5"]),
        ("upstream.ca_file", &["/nowhere/ca.pem", "''", "7"]),
        ("upstream.traceparent", &["yes please", "1"]),
        (
            "otlp.endpoint",
            &[
                "otel-collector:4318",
                "http://otel-collector:4318/v1/traces",
                "grpc://x",
                "7",
            ],
        ),
        ("otlp.ca_file", &["/nowhere/ca.pem", "7"]),
        ("otlp.sample_ratio", &["-0.1", "1.1", "'1'", "all"]),
        ("otlp.timeout", &["10", "0s"]),
        ("unknown_keys", &["maybe", "Forward", "true"]),
        ("max_accounts", &["0", "x"]),
        ("client_header", &["x-api-key", "Host", "'a b'", "''"]),
        ("budget.limit", &["0", "1000001", "15.0", "'15'", "-15"]),
        ("budget.margin", &["11s", "30"]),
        ("budget.max_wait", &["0s", "10", "61m"]),
        ("budget.max_queue", &["0"]),
        ("cache.max_bytes", &["0", "1KiB", "99EiB"]),
        ("cache.terminal", &["0s", "366d"]),
        ("cache.not_found", &["5", "366d"]),
        ("cache.fresh.floor", &["2", "31s"]),
        ("cache.fresh.ceiling", &["0s"]),
        ("cache.max_stale", &["10", "never", "10M", "1w"]),
        ("cache.disk", &["''", "7", "/var/lib/crun-gateway/"]),
        ("cache.disk_max_bytes", &["1MiB", "0"]),
        ("cache.disk_max_age", &["0s", "7"]),
        ("passthrough", &["null", "/api/"]),
        ("limits.header_bytes", &["0", "1000", "65KiB"]),
        ("limits.headers", &["0", "1001"]),
        ("limits.header_timeout", &["0s"]),
        ("limits.request_body", &["2TiB", "1s"]),
        ("limits.request_timeout", &["0s", "9s"]),
        ("limits.requests", &["0"]),
        ("limits.idle_timeout", &["0s"]),
        ("limits.connections", &["0", "null"]),
        ("limits.connections_per_address", &["0"]),
        ("limits.upstream_connections", &["0"]),
        ("limits.body_bytes", &["0", "1TiB"]),
        ("drain", &["0s", "2d"]),
        ("worker_threads", &["0", "1025", "two"]),
        ("log.format", &["xml"]),
        ("log.level", &["INFO", "off", "3"]),
        ("shared", &["true"]),
        ("shared.max_replicas", &["0", "1001", "three"]),
    ] {
        for bad in bad {
            let nested = |text: String, name: &str| format!("{{ {name}: {text} }}");
            let text = field.rsplit('.').fold((*bad).to_owned(), nested);
            refuses_fields(&text, &[field]);
        }
    }
}

#[test]
fn fields_that_contradict_each_other_are_refused() {
    refuses(
        r#"{ listen: "127.0.0.1:80", admin: "0.0.0.0:80" }"#,
        "admin: is the address of `listen`: choose another port: it must not be exposed where clients are",
    );
    accepts(r#"{ listen: "127.0.0.1:80", admin: "127.0.0.2:80" }"#);
    accepts(r#"{ listen: "127.0.0.1:0", admin: "127.0.0.1:0" }"#);
    refuses(
        "cache: { fresh: { ceiling: 1s } }",
        "cache.fresh.floor: is 2s, above cache.fresh.ceiling of 1s: lower it, or raise cache.fresh.ceiling",
    );
    refuses(
        "limits: { body_bytes: 8MiB }",
        "upstream.max_body: is above half of limits.body_bytes of 8MiB: no room to read one such body while a client takes \
         another: lower it, or raise limits.body_bytes",
    );
    refuses_fields("limits: { body_bytes: 31MiB }", &["upstream.max_body"]);
    accepts("limits: { body_bytes: 32MiB }");
    refuses(
        "limits: { request_timeout: 9s }",
        "limits.request_timeout: is 9s, below budget.max_wait of 10s: raise it, or lower budget.max_wait: a poll may wait \
         that long",
    );
    // A longer wait than drain is the operator's choice: what has not finished by then is cut.
    accepts("budget: { max_wait: 45s }");
    accepts("drain: 5s");
    // A field that is wrong by itself is not also held against the others' defaults.
    refuses_fields("cache: { fresh: { floor: x, ceiling: 1s } }", &["cache.fresh.floor"]);
}

#[test]
fn replicas_share_by_a_store_that_is_named_without_its_password() {
    accepts("shared: null");
    accepts("shared: { max_replicas: 3 }");
    accepts("shared: { max_replicas: 15, url: 'rediss://valkey', password: { env: MUSIC }, max_bytes: 0 }");
    refuses(
        "shared: { url: 'redis://valkey' }",
        "shared.max_replicas: is missing: write the highest number of processes that ever run at once",
    );
    refuses(
        "shared: { max_replicas: 3, url: 'redis://:pw@valkey' }",
        "shared.url: has a user name or a password: remove them, and name them in shared.username and shared.password",
    );
    refuses(
        "shared: { max_replicas: 16 }",
        "shared.max_replicas: is 16, above budget.limit of 15: a replica that is cut off could spend nothing: lower it",
    );
    refuses(
        "{ budget: { margin: 10ms }, shared: { max_replicas: 3, url: 'redis://valkey' } }",
        "budget.margin: is 10ms: a third of it is all that a reply of the shared store may take: \
         raise it to 15ms or more, or set shared.url to null",
    );
    accepts("{ budget: { margin: 10ms }, shared: { max_replicas: 3 } }");
    refuses_fields("shared: { max_replicas: 3, ulr: 'redis://valkey' }", &["shared.ulr"]);
    for (field, bad) in [
        ("prefix", "''"),
        ("prefix", "'{a}'"),
        ("max_bytes", "17TiB"),
        ("password", "plain"),
        ("connect_timeout", "0s"),
        ("timeout", "2s"),
        ("ca_file", "nowhere.pem"),
    ] {
        let text = format!("shared: {{ max_replicas: 3, url: 'redis://valkey', {field}: {bad} }}");
        refuses_fields(&text, &[&format!("shared.{field}")]);
    }
}

#[test]
fn keys_come_from_files_and_the_environment() {
    let files = tempfile::tempdir().unwrap();
    let path = file(&files, "music", "  ak_from_file\r\n");
    let config = accepts(&format!(
        "accounts: [{{ name: music, keys: [{{ file: {path:?} }}, {{ env: PADDED }}] }}, {{ name: media, keys: [{{ env: MEDIA }}] }}]"
    ));
    let [music, media] = &config.accounts[..] else {
        panic!("two accounts")
    };
    assert_eq!(music.name, "music");
    assert_eq!(music.keys[0].key, ApiKey::new("ak_from_file").unwrap());
    assert_eq!(music.keys[0].source, KeySource::File(path));
    assert_eq!(music.keys[1].key, ApiKey::new(SECRET).unwrap());
    assert_eq!(music.keys[1].source, KeySource::Env("PADDED".to_owned()));
    assert_eq!(media.keys[0].key, ApiKey::new("ak_2media").unwrap());
}

#[test]
fn a_key_that_cannot_be_had_is_refused() {
    let files = tempfile::tempdir().unwrap();
    let empty = file(&files, "empty", "\n");
    let binary = file(&files, "binary", b"ak_\xff\xfe");
    let long = file(&files, "long", "a".repeat(513));
    let directory = files.path();
    for (key, expected) in [
        (
            format!("{{ file: {empty:?} }}"),
            "keys[0].file: the key is empty: put the key in",
        ),
        (
            format!("{{ file: {binary:?} }}"),
            "keys[0].file: the key has a character that a header cannot carry: \
             keep the key alone, on one line, in visible ASCII",
        ),
        (
            format!("{{ file: {long:?} }}"),
            "keys[0].file: the key is longer than 512 characters: put the key alone in",
        ),
        (
            format!("{{ file: {directory:?} }}"),
            "keys[0].file: the file cannot be read (Is a directory (os error 21)): correct the path or the permissions",
        ),
        (
            "{ env: UNSET }".to_owned(),
            "keys[0].env: that environment variable is not set: set it, or correct the name",
        ),
        (
            "{ env: EMPTY }".to_owned(),
            "keys[0].env: the key is empty: put the key in",
        ),
        (
            "{ env: BROKEN }".to_owned(),
            "keys[0].env: the key has a character that a header cannot carry: \
             keep the key alone, on one line, in visible ASCII",
        ),
        (
            "{ env: MUSIC, file: /x }".to_owned(),
            "keys[0]: has both `file` and `env`: keep one of the two",
        ),
        (
            "{}".to_owned(),
            "keys[0]: has neither `file` nor `env`: write { file: PATH } or { env: NAME }",
        ),
        (
            SECRET.to_owned(),
            "keys[0]: a key as plain text: keys are never written into the config: \
             put it in a file or an environment variable and write { file: PATH } or { env: NAME }",
        ),
    ] {
        let text = format!("accounts: [{{ name: a, keys: [{key}] }}]");
        refuses(&text, &format!("accounts[0].{expected}"));
    }
    refuses(
        "accounts: [{ name: a, keys: [] }]",
        r#"accounts[0].keys: has no key: name at least one, e.g. [{ file: "/run/secrets/key" }]"#,
    );
    refuses_fields("accounts: [{}]", &["accounts[0].name", "accounts[0].keys"]);
    refuses_fields("accounts: [{ name: a }]", &["accounts[0].keys"]);
    refuses(
        "accounts: [{ keys: [{ env: MUSIC }] }]",
        "accounts[0].name: is missing: give the account a name, which labels its metrics",
    );
    refuses(
        "accounts: [{ name: a, keys: [{ env: MUSIC }, { env: PADDED }] }]",
        "accounts[0].keys[1]: is the same key as accounts[0].keys[0]: list each key once",
    );
}

#[test]
fn passwords_of_the_store_may_be_the_same_and_are_no_keys() {
    let config = accepts(
        "accounts: [{ name: a, keys: [{ env: MUSIC }] }]\n\
         shared: { max_replicas: 3, url: 'redis+sentinel://s/main', password: { env: MEDIA }, sentinel_password: { env: MEDIA } }",
    );
    let store = config.shared.unwrap().store.unwrap();
    assert_eq!(store.password, store.sentinel_password);
    accepts("accounts: [{ name: a, keys: [{ env: MUSIC }] }]\nshared: { max_replicas: 3, password: { env: MUSIC } }");
}

#[test]
fn an_unknown_field_that_is_not_quoted_has_its_line() {
    for name in ["http2", "a.b", "'a b'"] {
        let problems = refused(&format!("listen: '127.0.0.1:0'\n{name}: true\n")).to_string();
        assert!(
            problems.starts_with("<unknown>: no such field, on line 2: "),
            "{problems}"
        );
    }
    refuses(
        "drain: 3s\nbudget: { '': 1 }",
        "budget.<unknown>: no such field, on line 2: the fields here are limit, margin, max_wait, max_queue",
    );
    refuses_fields("'': 1", &["<unknown>"]);
    refuses(
        "accounts:\n  - name: a\n    keys:\n      - value: x",
        "accounts[0].keys[0]: has neither `file` nor `env`: write { file: PATH } or { env: NAME }\n\
         accounts[0].keys[0].<unknown>: no such field, on line 4: the fields here are file, env",
    );
}

#[test]
fn a_secret_is_never_told() {
    for text in [
        "accounts: [{ name: a, keys: [SECRET] }]",
        "accounts: [{ name: a, keys: SECRET }]",
        "accounts: [{ name: a, keys: [{ SECRET }] }]",
        "accounts: [{ name: a, keys: [{ abcsecret: 1 }] }]",
        "accounts: [{ name: a, keys: [{ file: SECRET }] }]",
        "accounts: [{ name: a, keys: [{ env: SECRET }] }]",
        "accounts: [{ name: a, keys: [{ env: [SECRET] }] }]",
        "accounts: [{ name: a, keys: [{ env: BROKEN }] }]",
        "accounts: [{ name: a, keys: [{ env: MUSIC }, { env: PADDED }] }]",
        "accounts: [{ name: a, keys: [{ env: MUSIC }], clients: [{ token: SECRET }] }]",
        "accounts: [{ name: 'SECRET!', keys: [{ env: MUSIC }] }]",
        "accounts: [{ SECRET: 1 }]",
        "accounts: SECRET",
        "SECRET",
        "SECRET: 1",
        "{ SECRET: 1, SECRET: 2 }",
        "{ abcsecret: 1, abcsecret: 2 }",
        "a: *SECRET",
        "a: !!int SECRET",
        "a: [SECRET",
        "a: 'SECRET",
        "%SECRET\na: 1",
        "a: 1\n  SECRET: 2",
        "upstream: { url: 'https://x:SECRET@api.crun.ai' }",
        "upstream: { ca_file: SECRET }",
        "shared: { url: 'redis://:SECRET@x' }",
        "drain: SECRET",
        "listen: SECRET",
        "budget: { limit: SECRET }",
        "cache: { max_bytes: SECRET }",
        "log: { level: SECRET }",
        "client_header: 'SECRET!?:'",
        "passthrough: [SECRET]",
    ] {
        let problems = refused(&text.replace("SECRET", SECRET));
        assert!(!problems.to_string().contains("secret7"), "{text}\n{problems}");
        assert!(!problems.to_string().contains("abcsecret"), "{text}\n{problems}");
        assert!(!format!("{problems:?}").contains("secret7"), "{text}\n{problems:?}");
    }
    let config = accepts("accounts: [{ name: a, keys: [{ env: MUSIC }] }]");
    assert!(!config.render().contains(SECRET));
    assert!(!format!("{config:?}").contains(SECRET));
}

#[test]
fn extra_roots_must_hold_a_certificate() {
    let files = tempfile::tempdir().unwrap();
    let good = file(&files, "good.pem", certificate() + &certificate());
    let config = accepts(&format!("upstream: {{ ca_file: {good:?} }}"));
    let roots = config.upstream.ca_file.unwrap();
    assert_eq!((&roots.path, roots.anchors.len()), (&good, 2));

    let none = file(&files, "none.pem", "# no certificate\n");
    let half = &certificate()[..200];
    let half = file(&files, "half.pem", half);
    refuses(
        &format!("upstream: {{ ca_file: {none:?} }}"),
        "upstream.ca_file: has no certificate in it: name a PEM file with BEGIN CERTIFICATE",
    );
    refuses(
        &format!("upstream: {{ ca_file: {half:?} }}"),
        "upstream.ca_file: is damaged: name a PEM file with whole certificates",
    );
    // What is PEM, and no certificate.
    let junk = file(
        &files,
        "junk.pem",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    for (section, rest) in [
        ("upstream", ""),
        ("otlp", ""),
        ("shared", "max_replicas: 3, url: 'rediss://x', "),
    ] {
        refuses(
            &format!("{section}: {{ {rest}ca_file: {junk:?} }}"),
            &format!(
                "{section}.ca_file: has a certificate that cannot vouch for others: name the roots' own certificates"
            ),
        );
    }
}

#[test]
fn other_roots_in_the_same_file_need_a_restart() {
    let files = tempfile::tempdir().unwrap();
    let roots = file(&files, "roots.pem", certificate());
    let text = format!(
        "upstream: {{ ca_file: {roots:?} }}\notlp: {{ ca_file: {roots:?} }}\n\
         shared: {{ max_replicas: 3, url: 'rediss://x', ca_file: {roots:?} }}"
    );
    let running = accepts(&text);
    assert!(accepts(&text).taken_over(&running).1.is_empty());
    file(&files, "roots.pem", certificate());
    let (taken, left) = accepts(&text).taken_over(&running);
    assert_eq!(left, ["upstream", "shared", "otlp"]);
    assert_eq!(taken, running);
}

/// A certificate and its key, in files.
fn identity(
    files: &tempfile::TempDir,
    name: &str,
    change: impl FnOnce(&mut rcgen::CertificateParams),
) -> (PathBuf, PathBuf) {
    let mut params = rcgen::CertificateParams::new(["gateway.test".to_owned()]).unwrap();
    change(&mut params);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    (
        file(files, &format!("{name}.crt"), certificate),
        file(files, &format!("{name}.key"), key.serialize_pem()),
    )
}

#[test]
fn tls_names_files_that_can_be_served() {
    let files = tempfile::tempdir().unwrap();
    let (cert, key) = identity(&files, "a", |_| {});
    let tls = |rest: &str| accepts(&format!("tls: {{ cert_file: {cert:?}, key_file: {key:?}{rest} }}")).tls;
    let plain = Tls {
        cert_file: cert.clone(),
        key_file: key.clone(),
        clients: None,
    };
    let asking = |demand| {
        let ca_file = cert.clone();
        let clients = Some(ClientCertificates { ca_file, demand });
        Some(Tls {
            clients,
            ..plain.clone()
        })
    };
    assert_eq!(tls("").as_ref(), Some(&plain));
    let roots = format!(", client_ca_file: {cert:?}");
    assert_eq!(tls(&roots), asking(Demand::Required), "who names roots means them");
    assert_eq!(
        tls(&format!("{roots}, client_certificates: optional")),
        asking(Demand::Optional)
    );
    assert_eq!(accepts("tls: null").tls, None);
}

#[test]
fn what_cannot_be_served_over_tls_is_refused_by_field_and_with_a_fix() {
    let files = tempfile::tempdir().unwrap();
    let (cert, key) = identity(&files, "a", |_| {});
    let (_, other) = identity(&files, "b", |_| {});
    let (expired, expired_key) = identity(&files, "c", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 2, 3);
    });
    let chain = fs::read(&cert)
        .unwrap()
        .into_iter()
        .chain(fs::read(&expired).unwrap())
        .collect::<Vec<_>>();
    let chain = file(&files, "chain.crt", chain);
    let nothing = file(&files, "nothing.pem", "nothing\n");
    let damaged = file(
        &files,
        "damaged.pem",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    let of = |cert: &Path, key: &Path, rest: &str| format!("tls: {{ cert_file: {cert:?}, key_file: {key:?}{rest} }}");
    refuses(
        &of(&cert, &other, ""),
        "tls.key_file: is not the key of the first certificate in tls.cert_file: name the two that belong together, \
         the server's own certificate before its intermediates",
    );
    for text in [of(&expired, &expired_key, ""), of(&chain, &key, "")] {
        refuses(
            &text,
            "tls.cert_file: expired on 2021-02-03T00:00:00Z: renew it, and put the new certificate and its key in place",
        );
    }
    let (early, its_key) = identity(&files, "d", |params| {
        params.not_before = rcgen::date_time_ymd(2999, 1, 2);
        params.not_after = rcgen::date_time_ymd(3000, 1, 1);
    });
    refuses(
        &of(&early, &its_key, ""),
        "tls.cert_file: is valid only from 2999-01-02T00:00:00Z on: put it in place then, or set this machine's clock right",
    );
    // Clocks of issuer and server may differ by a minute.
    let tls = Tls {
        cert_file: expired,
        key_file: expired_key,
        clients: None,
    };
    let begin = UNIX_EPOCH + Duration::from_hours((50 * 365 + 12) * 24);
    let before = |secs| tls.read(begin - Duration::from_secs(secs)).is_ok();
    assert_eq!((before(60), before(61)), (true, false));
    refuses(
        &of(&nothing, &cert, ""),
        "tls.cert_file: has no certificate in it: name a PEM file with BEGIN CERTIFICATE\n\
         tls.key_file: has no private key in it that can be read: name a PEM file with BEGIN PRIVATE KEY, not encrypted",
    );
    refuses_fields(&of(&damaged, &key, ""), &["tls.cert_file"]);
    refuses_fields(&of(Path::new("/nowhere"), &key, ""), &["tls.cert_file"]);
    // It would give what it holds to the check, and nothing to whoever serves it.
    refuses(
        &of(&cert, Path::new("/dev/null"), ""),
        "tls.key_file: is no regular file, and could not be read anew: name a regular file",
    );
    refuses_fields(&of(&cert, Path::new("/nowhere"), ""), &["tls.key_file"]);
    refuses_fields(&of(&cert, &key, ", client_ca_file: /nowhere"), &["tls.client_ca_file"]);
    refuses_fields(
        &of(&cert, &key, &format!(", client_ca_file: {damaged:?}")),
        &["tls.client_ca_file"],
    );
    refuses(
        &of(&cert, &key, ", client_certificates: required"),
        "tls.client_certificates: nobody vouches for clients: name the roots that vouch for clients in \
         tls.client_ca_file, or remove this",
    );
    refuses_fields(
        &of(&cert, &key, ", client_ca_file: null, client_certificates: sometimes"),
        &["tls.client_certificates"],
    );
    refuses_fields("tls: {}", &["tls.cert_file", "tls.key_file"]);
    refuses_fields("tls: true", &["tls"]);
    refuses_fields(
        "tls: { cert_file: /nope, client_ca_file: /nope }",
        &["tls.key_file", "tls.cert_file", "tls.client_ca_file"],
    );
    refuses_fields("tls: { key_file: /nope }", &["tls.cert_file", "tls.key_file"]);
    refuses_fields(&of(&cert, &key, ", certs: x"), &["tls.certs"]);
}

#[test]
fn what_check_prints_means_the_same() {
    let files = tempfile::tempdir().unwrap();
    let key = file(&files, "a \"quoted\" key", "ak_from_file");
    let roots = file(&files, "roots.pem", certificate());
    let (cert, private) = identity(&files, "own", |_| {});
    let text = format!(
        r#"
listen: "[::1]:0"
admin: "127.0.0.1:0"
tls: {{ cert_file: {cert:?}, key_file: {private:?}, client_ca_file: {roots:?}, client_certificates: optional }}
upstream: {{ url: "http://127.0.0.1:8099/", connect_timeout: 1500ms, timeout: 90s, connections: 7, max_body: 999999, ca_file: {roots:?} }}
accounts:
  - {{ name: "15", keys: [{{ file: {key:?} }}, {{ env: MUSIC }}] }}
  - {{ name: "null", keys: [{{ env: MEDIA }}] }}
unknown_keys: reject
max_accounts: 3
client_header: X-Team
budget: {{ limit: 1000000, margin: 0.000001ms, max_wait: 30m 1s, max_queue: 1 }}
cache: {{ max_bytes: 1TiB, terminal: 364d 1ms, not_found: 0s, fresh: {{ floor: 0s, ceiling: 1ms }}, max_stale: 0s, disk: /a/b, disk_max_bytes: 17MiB, disk_max_age: 2d }}
passthrough: []
limits: {{ header_bytes: 1KiB, headers: 1000, request_body: 0, request_timeout: 31m, requests: 1, header_timeout: 1m, idle_timeout: 1d, connections: 1, connections_per_address: 2, upstream_connections: 3, body_bytes: 2MB }}
drain: 24h
worker_threads: 1024
log: {{ format: json, level: trace }}
otlp: {{ endpoint: "https://collector:4318", ca_file: {roots:?}, sample_ratio: 1, timeout: 1ms }}
"#
    );
    let config = accepts(&text);
    let printed = config.render();
    assert_eq!(accepts(&printed), config, "{printed}");
    assert_eq!(accepts(&printed).render(), printed);
    assert!(
        printed.contains("      - { env: \"MUSIC\" }  # read, 15 characters\n"),
        "{printed}"
    );
    let default = Config::default();
    assert_eq!(accepts(&default.render()), default);
}

#[test]
fn a_file_that_cannot_be_read_is_told_by_its_path() {
    let problems = Config::load(Path::new("/nowhere/config.yaml"), &no_env).unwrap_err();
    assert_eq!(
        problems.to_string(),
        "/nowhere/config.yaml: there is no such file: create it, or correct the path"
    );
    let files = tempfile::tempdir().unwrap();
    let binary = file(&files, "binary.yaml", b"a: \xff");
    let problems = Config::load(&binary, &no_env).unwrap_err();
    assert!(
        problems
            .to_string()
            .ends_with(": the file is not UTF-8: save it as UTF-8"),
        "{problems}"
    );
}

/// Text made of the pieces that configurations are made of, so that it often is YAML.
fn almost_a_configuration() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("accounts"),
        Just("keys"),
        Just("file"),
        Just("env"),
        Just("budget"),
        Just("limit"),
        Just("fresh"),
        Just("cache"),
        Just("drain"),
        Just("upstream"),
        Just("url"),
        Just("passthrough"),
        Just("MUSIC"),
        Just(": "),
        Just(":\n  "),
        Just("\n"),
        Just("\n- "),
        Just("{ "),
        Just(" }"),
        Just("["),
        Just("]"),
        Just(", "),
        Just("3s"),
        Just("15"),
        Just("null"),
        Just("\""),
        Just("'"),
        Just("&a "),
        Just("*a"),
        Just("<<: "),
        Just("!!int "),
        Just("---\n"),
        Just("| \n "),
        Just("18446744073709551615s 1000ms"),
        Just("9e99"),
        Just("-1"),
        Just("\u{feff}"),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in prop_oneof![any::<String>(), "[ -~\n]{0,80}", almost_a_configuration()]) {
        match Config::parse(&text, &env) {
            Ok(config) => prop_assert_eq!(Config::parse(&config.render(), &env), Ok(config)),
            Err(problems) => prop_assert!(!problems.to_string().is_empty()),
        }
    }

    #[test]
    fn no_value_makes_a_field_panic(value in prop_oneof![any::<String>(), "[0-9a-zA-Z:/. -]{0,24}"]) {
        let value = Value::from(value);
        for field in ["listen", "drain", "client_header", "unknown_keys", "passthrough", "accounts", "max_accounts"] {
            let _ = Config::parse(&format!("{field}: {value}"), &env);
        }
        let text = format!(
            "{{ passthrough: [{value}], upstream: {{ url: {value}, max_body: {value}, timeout: {value} }}, \
             accounts: [{{ name: {value}, keys: [{{ env: {value} }}, {value}] }}] }}"
        );
        let _ = Config::parse(&text, &env);
    }
}

#[test]
fn replicas_that_share_take_no_other_limit_over_without_a_restart() {
    let parse = |text: &str| Config::parse(text, &|_| None).unwrap();
    let shared = "shared: { max_replicas: 3 }";
    let running = parse(&format!("{{ {shared}, budget: {{ limit: 15, max_queue: 10 }} }}"));
    let changed = parse(&format!(
        "{{ {shared}, budget: {{ limit: 12, margin: 40ms, max_queue: 20 }} }}"
    ));
    let (taken, left) = changed.taken_over(&running);
    assert_eq!(left, ["budget.limit", "budget.margin"]);
    assert_eq!((taken.budget.limit.get(), taken.budget.max_queue), (15, 20));
    let (taken, left) = parse("budget: { limit: 12 }").taken_over(&parse("{}"));
    assert_eq!((taken.budget.limit.get(), left.len()), (12, 0));
    let (taken, left) = parse("{}").taken_over(&running);
    assert!(taken.shared.is_some() && left.contains(&"shared"), "{left:?}");
}

//! A key, a token or a private key is in nothing that comes out, in no form: logs at their most talkative, metrics, every
//! header and body that is the gateway's own, spans, what `check` prints, and what is said of a configuration that is wrong.

use std::io::Write as _;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use parking_lot::Mutex;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::time::{Instant, sleep};

use crate::harness::client::{bare, poll_request, request};
use crate::harness::collector::{Collector, Takes};
use crate::harness::paused::{Behaviour, Paused};
use crate::harness::process::{config_file, run};
use crate::harness::raw::Raw;
use crate::harness::store::Store;
use crate::harness::{Gateway, PATIENCE, Reply, Simulator, TASK_INFO};

/// Of the first and the last so many characters nothing may be seen either.
const PREFIX: usize = 8;

const FILE_KEY: &str = "Zk3qW8vN2xT5rL9pH4mJ";
const ENV_KEY: &str = "bY7sD1gF6hK0wQ3eU8tA";
const REFUSED_KEY: &str = "mV4nB9cX-refused-jR2k";
const TOKEN: &str = "tP6oI5uY3zE8wQ1aS7dG";
const SPENDING_TOKEN: &str = "hL2jK9fD5sA8pO4iU6yT";
const UNLISTED_KEY: &str = "xC3vB7nM1qW9eR5tZ2uJ";
const UNLISTED_REFUSED: &str = "kJ8hG4fD-refused-sA6p";
const BEARER: &str = "gF5dS1aP9oI3uY7tR2eW";
const PASSWORD: &str = "wE9rT4zU7iO2pA6sD1fG";
const STORE_PASSWORD: &str = "qL6wX1cV8bN3mK7jH2gF";
const SENTINEL_PASSWORD: &str = "yU4iO9pZ5xS0dC6vB1nM";

const SECRETS: [&str; 11] = [
    FILE_KEY,
    ENV_KEY,
    REFUSED_KEY,
    TOKEN,
    SPENDING_TOKEN,
    UNLISTED_KEY,
    UNLISTED_REFUSED,
    BEARER,
    PASSWORD,
    STORE_PASSWORD,
    SENTINEL_PASSWORD,
];

/// Looks for secrets in whatever comes out.
#[derive(Default)]
struct Scan {
    /// What is looked for, in lower case where case does not matter, and what it would give away.
    forms: Vec<(Vec<u8>, String)>,
    found: Mutex<Vec<String>>,
    looked_at: Mutex<usize>,
}

impl Scan {
    fn new(secrets: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let mut scan = Self::default();
        for (number, secret) in secrets.into_iter().enumerate() {
            let ends = [&secret[..PREFIX], &secret[secret.len() - PREFIX..]];
            for part in ends {
                let name = |form: &str| format!("secret {number}, {form}");
                scan.forms.push((part.to_vec(), name("raw")));
                let hex = hex(part);
                scan.forms.push((hex.to_ascii_uppercase().into_bytes(), name("HEX")));
                scan.forms.push((hex.into_bytes(), name("hex")));
                scan.forms
                    .push((format!("{part:?}").into_bytes(), name("a list of bytes")));
                scan.forms
                    .extend(in_base64(part).map(|form| (form.into_bytes(), name("base64"))));
            }
        }
        scan
    }

    /// Looks at `bytes`, which came out at `place`.
    fn look(&self, place: &str, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        *self.looked_at.lock() += bytes.len();
        // A list of bytes goes on after the prefix.
        let holds = |form: &[u8]| {
            let form = form
                .strip_prefix(b"[")
                .and_then(|form| form.strip_suffix(b"]"))
                .unwrap_or(form);
            bytes.windows(form.len()).any(|window| window == form)
        };
        let found = self.forms.iter().filter(|(form, _)| holds(form));
        let text = String::from_utf8_lossy(bytes);
        self.found
            .lock()
            .extend(found.map(|(_, name)| format!("{place}: {name} in\n{text}")));
    }

    fn reply(&self, place: &str, reply: &Reply) {
        for (name, value) in &reply.headers {
            self.look(place, [name.as_str().as_bytes(), b": ", value.as_bytes()].concat());
        }
        self.look(place, &reply.body);
    }

    fn assert_clean(self) {
        let found = self.found.into_inner();
        assert!(found.is_empty(), "{}", found.join("\n"));
        assert!(self.looked_at.into_inner() > 1000, "something did come out");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

/// How `part` reads in base64, wherever in a longer text it stands: what does not depend on its neighbours.
fn in_base64(part: &[u8]) -> impl Iterator<Item = String> {
    (0..3).flat_map(|before| {
        let text = [&[0; 2][..before], part].concat();
        // The characters that hold bits of a neighbour.
        let (first, whole) = ([0, 2, 3][before], text.len() * 8 / 6);
        [STANDARD_NO_PAD, URL_SAFE_NO_PAD].map(|engine| engine.encode(&text)[first..whole].to_owned())
    })
}

#[test]
fn the_scan_finds_every_form() {
    let secret = FILE_KEY.as_bytes();
    let hex = hex(secret);
    let based = |before: &str, engine: base64::engine::GeneralPurpose| engine.encode(format!("{before}{FILE_KEY}:x"));
    for planted in [
        FILE_KEY.to_owned(),
        format!("key={}…", &FILE_KEY[..PREFIX]),
        format!("…{}", &FILE_KEY[FILE_KEY.len() - PREFIX..]),
        hex.clone(),
        hex.to_ascii_uppercase(),
        format!("{secret:?}"),
        based("", STANDARD_NO_PAD),
        based("u:", STANDARD_NO_PAD),
        based("a", URL_SAFE_NO_PAD),
    ] {
        let scan = Scan::new([secret.to_vec()]);
        scan.look("here", format!("before {planted} after"));
        assert!(!scan.found.into_inner().is_empty(), "{planted}");
    }
    let scan = Scan::new([secret.to_vec()]);
    scan.look("here", "ApiKey(***), 20 characters, Zk3qW8v");
    assert!(scan.found.into_inner().is_empty());
}

struct Files {
    folder: tempfile::TempDir,
    private_key: Vec<u8>,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own = rcgen::generate_simple_self_signed(["gateway.test".to_owned()]).unwrap();
        let pem = own.signing_key.serialize_pem();
        for (name, content) in [
            ("key", FILE_KEY),
            ("refused", REFUSED_KEY),
            ("tls.crt", &own.cert.pem()),
            ("tls.key", &pem),
        ] {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        // PKCS #8 of a P-256 key: its 32 bytes stand behind 36 that are the same for all.
        let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap();
        let private_key = der.secret_der()[36..68].to_vec();
        Self { folder, private_key }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn scan(&self) -> Scan {
        let secrets = SECRETS.iter().map(|secret| secret.as_bytes().to_vec());
        Scan::new(secrets.chain([self.private_key.clone()]))
    }

    fn accounts(&self) -> String {
        format!(
            "accounts:\n  - name: music\n    keys: [{{ file: \"{}\" }}, {{ file: \"{}\" }}, {{ env: ENV_KEY }}]\n    \
             clients:\n      - {{ name: studio, token: {{ env: TOKEN }} }}\n      - {{ name: shop, token: {{ env: \
             SPENDING_TOKEN }}, passthrough: true }}\n",
            self.path("refused"),
            self.path("key")
        )
    }

    fn tls(&self) -> String {
        let (cert, key) = (self.path("tls.crt"), self.path("tls.key"));
        format!("tls: {{ cert_file: \"{cert}\", key_file: \"{key}\" }}\n")
    }
}

const ENV: [(&str, &str); 7] = [
    ("ENV_KEY", ENV_KEY),
    ("TOKEN", TOKEN),
    ("SPENDING_TOKEN", SPENDING_TOKEN),
    ("STORE_PASSWORD", STORE_PASSWORD),
    ("SENTINEL_PASSWORD", SENTINEL_PASSWORD),
    ("RUST_LOG", "trace"),
    ("RUST_BACKTRACE", "full"),
];

/// Of the shared store.
const LOGIN: &str = "password: { env: STORE_PASSWORD }, sentinel_password: { env: SENTINEL_PASSWORD }";

/// A request with these headers, on this path.
fn with(method: Method, path: &str, headers: &[(&'static str, &str)]) -> Request<Full<Bytes>> {
    let mut request = bare(method, path);
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    request
}

/// Every kind of request that a key may be in, well formed or not.
fn requests() -> Vec<Request<Full<Bytes>>> {
    let mut all = Vec::new();
    for key in [FILE_KEY, ENV_KEY, TOKEN, REFUSED_KEY, UNLISTED_KEY, UNLISTED_REFUSED] {
        for task in [
            "ended.a",
            "ended.a",
            "running.a",
            "http-404.a",
            "http-500.a",
            "body-503.a",
            "html.a",
            "cut.a",
            "reset.a",
            "wrong-id.a",
        ] {
            all.push(poll_request(key, task));
        }
    }
    let poll = format!("{TASK_INFO}?task_id=ended.b");
    let two = [("x-api-key", FILE_KEY), ("x-api-key", UNLISTED_KEY)];
    all.push(with(Method::GET, &poll, &two));
    all.push(with(
        Method::GET,
        &poll,
        &[("x-api-key", &format!("{FILE_KEY} {ENV_KEY}"))],
    ));
    let bearer = |key: &str| format!("Bearer {key}");
    all.push(with(Method::GET, &poll, &[("authorization", &bearer(TOKEN))]));
    all.push(with(Method::GET, &poll, &[("authorization", &bearer(BEARER))]));
    let both = [("x-api-key", UNLISTED_KEY), ("authorization", &bearer(TOKEN))];
    all.push(with(Method::GET, &poll, &both));
    all.push(with(Method::DELETE, &poll, &[("x-api-key", FILE_KEY)]));
    for query in ["", "?", "?task_id=", "?task_id=a&task_id=b"] {
        let path = format!("{TASK_INFO}{query}");
        all.push(with(Method::GET, &path, &[("x-api-key", FILE_KEY)]));
    }
    let pasted = format!("{TASK_INFO}?api_key={UNLISTED_KEY}&x-api-key={FILE_KEY}");
    all.push(with(
        Method::GET,
        &pasted,
        &[("x-api-key", FILE_KEY), ("x-client-id", TOKEN)],
    ));
    all.push(with(
        Method::GET,
        &format!("/nowhere/{FILE_KEY}?{ENV_KEY}"),
        &[("cookie", PASSWORD)],
    ));
    for (name, value) in [
        ("x-api-key", FILE_KEY),
        ("x-api-key", TOKEN),
        ("x-api-key", SPENDING_TOKEN),
        ("x-api-key", UNLISTED_KEY),
        ("authorization", &bearer(SPENDING_TOKEN)),
        ("authorization", &bearer(BEARER)),
        ("proxy-authorization", &bearer(PASSWORD)),
    ] {
        all.push(with(Method::POST, "/api/v1/client/job/CreateTask", &[(name, value)]));
    }
    // Last: these are remembered of the account.
    for task in ["body-402.a", "http-429.a", "http-401.a"] {
        all.extend([FILE_KEY, TOKEN, UNLISTED_KEY].map(|key| poll_request(key, task)));
    }
    all
}

/// Asks everything, which brings these statuses, and looks at every answer, at the admin port and at the log.
async fn comes_out_clean(upstream: &str, format: &str, more: &str, brings: &[u16], logs: &str) {
    let files = Files::new();
    let scan = files.scan();
    let collector = Collector::start(Takes::Everything);
    let config = format!(
        "log: {{ level: trace, format: {format} }}\nbudget: {{ limit: 1000, max_wait: 2s }}\notlp: {{ endpoint: \
         \"http://{}\", sample_ratio: 1.0 }}\n{more}{}",
        collector.address,
        files.accounts()
    );
    let mut gateway = Gateway::start_with_env(upstream, &config, &ENV).await;
    let mut statuses = Vec::new();
    for asked in requests() {
        let place = format!("the answer to {} {}", asked.method(), asked.uri().path());
        let reply = request(gateway.address, asked).await;
        statuses.push(reply.status.as_u16());
        scan.reply(&place, &reply);
    }
    for status in brings {
        assert!(statuses.contains(status), "no {status} among {statuses:?}");
    }
    let mut malformed = Raw::connect(gateway.address).await;
    let head = format!("GET {TASK_INFO}?task_id=a HTTP/1.1\r\nx-api-key: {FILE_KEY}\r\nx api key: {ENV_KEY}\r\n\r\n");
    malformed.send(head).await.unwrap();
    while let Ok(some @ [_, ..]) = malformed.some().await.as_deref() {
        scan.look("the answer to a malformed request", some);
    }
    for path in [
        "/",
        "/metrics",
        "/status",
        "/status.json",
        "/livez",
        "/readyz",
        "/nowhere",
    ] {
        let reply = request(gateway.admin, with(Method::GET, path, &[("x-api-key", FILE_KEY)])).await;
        scan.reply(path, &reply);
    }
    gateway.logged(logs, 1).await;
    gateway.terminate();
    assert_eq!(gateway.exit().await.code(), Some(0));
    let patience = Instant::now() + PATIENCE;
    while !gateway.log().contains("stopped") {
        assert!(Instant::now() < patience, "{}", gateway.log());
        sleep(Duration::from_millis(5)).await;
    }
    let log = gateway.log();
    assert!(log.contains("poll refused"), "{log}");
    scan.look("the log", log);
    assert!(collector.spans().len() > 100, "spans came");
    for spans in collector.bodies() {
        scan.look("the spans", spans);
    }
    scan.assert_clean();
}

#[tokio::test]
async fn no_secret_is_in_anything_that_comes_out_of_a_gateway() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let brings = [200, 401, 403, 404, 405, 422, 429, 502];
    comes_out_clean(&upstream.url, "text", "", &brings, "poll answered").await;
}

#[tokio::test]
async fn nor_where_unlisted_keys_are_rejected_and_lines_are_json() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let reject = "unknown_keys: reject\n";
    let brings = [200, 401, 403, 404, 405, 422, 429, 502];
    comes_out_clean(&upstream.url, "json", reject, &brings, "\"poll answered\"").await;
}

#[tokio::test]
async fn nor_while_upstream_is_away() {
    // A port that nobody listens on.
    let nobody = "http://127.0.0.1:9";
    let brings = [401, 403, 404, 405, 422, 503];
    comes_out_clean(nobody, "text", "", &brings, "upstream connection failed").await;
}

/// A store behind a sentinel, which let in whoever has these passwords.
async fn guarded_store(store_password: &str, sentinel_password: &str) -> [Store; 2] {
    let store = Store::start().await;
    let sentinel = Store::sentinel(&store).await;
    store.must(&["CONFIG", "SET", "requirepass", store_password]);
    sentinel.must(&["SENTINEL", "SET", "main", "auth-pass", store_password]);
    sentinel.must(&["ACL", "SETUSER", "default", &format!(">{sentinel_password}")]);
    [store, sentinel]
}

#[tokio::test]
async fn nor_where_replicas_share_a_store_whether_it_lets_them_in_or_not() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let shared = "answers and flights are shared";
    let refused = "cut off from the shared store";
    for (store_password, sentinel_password, logs) in [
        (STORE_PASSWORD, SENTINEL_PASSWORD, shared),
        ("another", SENTINEL_PASSWORD, refused),
        (STORE_PASSWORD, "another", refused),
    ] {
        let [_store, sentinel] = guarded_store(store_password, sentinel_password).await;
        let more = format!(
            "shared: {{ max_replicas: 2, url: 'redis+sentinel://{}/main', {LOGIN} }}\n",
            sentinel.address
        );
        comes_out_clean(&upstream.url, "text", &more, &[401, 403, 404, 405, 422], logs).await;
    }
}

#[tokio::test]
async fn no_secret_is_in_what_is_said_of_a_configuration() {
    let files = Files::new();
    let scan = files.scan();
    let (right, tls) = (files.accounts(), files.tls());
    let pem = std::fs::read_to_string(files.path("tls.key")).unwrap();
    let inline = pem.replace('\n', "\\n");
    let mut wrong_key = tempfile::NamedTempFile::new().unwrap();
    writeln!(wrong_key, "{FILE_KEY}\n{ENV_KEY}").unwrap();
    for (text, code) in [
        (format!("{right}{tls}"), 0),
        (
            format!("{right}shared: {{ max_replicas: 3, url: 'redis+sentinel://store/main', {LOGIN} }}"),
            0,
        ),
        (
            format!("shared: {{ max_replicas: 3, url: 'redis://store', password: {STORE_PASSWORD} }}"),
            2,
        ),
        (
            format!("shared: {{ max_replicas: 3, url: 'redis://:{STORE_PASSWORD}@store' }}"),
            2,
        ),
        (format!("accounts: [{{ name: a, keys: [{FILE_KEY}] }}]"), 2),
        (format!("accounts: [{{ name: a, keys: [{{ file: {FILE_KEY} }}] }}]"), 2),
        (format!("accounts: [{{ name: a, keys: [{{ env: {ENV_KEY} }}] }}]"), 2),
        (
            format!(
                "accounts: [{{ name: a, keys: [{{ file: \"{}\" }}] }}]",
                wrong_key.path().display()
            ),
            2,
        ),
        (format!("{right}  - {{ name: again, keys: [{{ env: TOKEN }}] }}"), 2),
        (format!("{FILE_KEY}: 1\n{right}"), 2),
        (
            format!("{right}upstream: {{ url: \"https://x:{PASSWORD}@api.crun.ai\" }}"),
            2,
        ),
        // The private key where its certificate, or its path, should be.
        (tls.replace("tls.crt", "tls.key"), 2),
        (tls.replace("tls.key", "key"), 2),
        (
            format!(
                "tls: {{ cert_file: \"{}\", key_file: \"{inline}\" }}",
                files.path("tls.crt")
            ),
            2,
        ),
    ] {
        let file = config_file(&text);
        let path = file.path().to_str().unwrap();
        let checked = run(&["check", "--config", path], &ENV).await;
        assert_eq!(checked.code, code, "{text}\n{checked:?}");
        scan.look("check", checked.stdout + &checked.stderr);
        if code != 0 {
            let ended = run(&["--config", path], &ENV).await;
            assert_eq!(ended.code, code, "{text}\n{ended:?}");
            scan.look("the start", ended.stdout + &ended.stderr);
        }
    }
    let help = run(&["--help"], &ENV).await;
    scan.look("--help", help.stdout + &help.stderr);
    scan.assert_clean();
}

#[tokio::test(start_paused = true)]
async fn no_secret_is_in_a_gateways_debug_which_a_panic_may_print() {
    let scan = Scan::new([UNLISTED_KEY.as_bytes().to_vec()]);
    let gateway = Paused::start(Behaviour::default(), |_| {});
    assert_eq!(gateway.poll(UNLISTED_KEY, "a").await.status, 200);
    let debug = gateway.debug();
    assert!(debug.contains("ApiKey(***)"), "{debug}");
    scan.look("Debug", debug);
    scan.assert_clean();
}

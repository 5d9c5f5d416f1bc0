//! Clients over TLS: what is spoken, a certificate that changes while it is in use, clients with certificates of their
//! own, and handshakes that come to nothing.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crun_gateway::account::Caller;
use crun_gateway::config;
use crun_gateway::metrics::Metrics;
use crun_gateway::server::{GRACE, Tls};
use http_body_util::BodyExt as _;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::{ClientConfig, HandshakeKind, RootCertStore, crypto::ring};
use tokio_util::sync::CancellationToken;
use tracing::Level;

use crate::harness::client::{over, poll_request};
use crate::harness::listener::listen;
use crate::harness::paused::{Behaviour, Paused};
use crate::harness::process::{config_file, run};
use crate::harness::raw::{self, Raw};
use crate::harness::{Gateway, KEY, PATIENCE, Reply, Simulator, poll};

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Pair {
    cert: String,
    key: String,
}

impl Pair {
    fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.cert.as_bytes()).unwrap()
    }
}

/// A root that vouches for servers and clients, and a folder that is laid out as Kubernetes mounts a Secret.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: String,
    folder: tempfile::TempDir,
    versions: AtomicUsize,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().pem();
        let folder = tempfile::tempdir().unwrap();
        let authority = Self {
            issuer: Issuer::new(params, key),
            root,
            folder,
            versions: AtomicUsize::new(0),
        };
        for file in ["tls.crt", "tls.key", "ca.crt"] {
            symlink(format!("..data/{file}"), authority.file(file)).unwrap();
        }
        authority.mount(&authority.server());
        authority
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        Pair {
            cert: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    fn server(&self) -> Pair {
        self.issue(|params| params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())])
    }

    fn client(&self, name: &str) -> Pair {
        self.issue(|params| params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())])
    }

    /// Puts a certificate and its key in place, both at once, by swapping a symlink.
    fn mount(&self, pair: &Pair) {
        let version = format!("..{}", self.versions.fetch_add(1, Ordering::Relaxed));
        let folder = self.file(&version);
        fs::create_dir(&folder).unwrap();
        for (file, content) in [("tls.crt", &pair.cert), ("tls.key", &pair.key), ("ca.crt", &self.root)] {
            fs::write(folder.join(file), content).unwrap();
        }
        symlink(&version, self.file("..data_tmp")).unwrap();
        fs::rename(self.file("..data_tmp"), self.file("..data")).unwrap();
    }

    /// What the section of the configuration means.
    fn settings(&self) -> config::Tls {
        config::Tls {
            cert_file: self.file("tls.crt"),
            key_file: self.file("tls.key"),
            clients: None,
        }
    }

    /// The section of the configuration, with `rest` added.
    fn section(&self, rest: &str) -> String {
        let [cert, key] = ["tls.crt", "tls.key"].map(|name| self.file(name).display().to_string());
        format!("tls: {{ cert_file: \"{cert}\", key_file: \"{key}\"{rest} }}\n")
    }

    /// The same, where clients are asked for certificates.
    fn asking(&self, demand: &str) -> String {
        let roots = self.file("ca.crt").display().to_string();
        self.section(&format!(", client_ca_file: \"{roots}\", client_certificates: {demand}"))
    }

    /// A client that trusts the root, offers `alpn`, and has a certificate or not.
    pub fn client_with(&self, alpn: &[&str], own: Option<&Pair>) -> Client {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.root.as_bytes()).unwrap())
            .unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match own {
            None => builder.with_no_client_auth(),
            Some(pair) => {
                let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![pair.der()], key).unwrap()
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Client(TlsConnector::from(Arc::new(config)))
    }

    fn stranger(&self) -> Client {
        self.client_with(&[], None)
    }
}

#[derive(Clone)]
pub struct Client(TlsConnector);

impl Client {
    pub async fn connect(&self, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("127.0.0.1").unwrap();
        timeout(PATIENCE, self.0.connect(name, stream))
            .await
            .expect("a handshake or an end")
    }

    async fn poll(&self, address: SocketAddr, task: &str) -> anyhow::Result<Reply> {
        over(self.connect(address).await?, poll_request(KEY, task)).await
    }

    /// The certificate that the gateway shows.
    async fn sees(&self, address: SocketAddr) -> CertificateDer<'static> {
        let stream = self.connect(address).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    }
}

async fn quick() -> Simulator {
    Simulator::start(&["--latency", "0ms"]).await
}

fn failures(reason: &str) -> String {
    format!("crun_gateway_tls_handshake_failures_total{{reason=\"{reason}\"}}")
}

#[tokio::test]
async fn polls_are_answered_over_tls_and_http_1_is_all_that_is_spoken() {
    let authority = Authority::new();
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, &authority.section("")).await;
    let both = authority.client_with(&["h2", "http/1.1"], None);
    let stream = both.connect(gateway.address).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let older = authority.client_with(&["http/1.0"], None);
    assert_eq!(older.poll(gateway.address, "ended.a").await.unwrap().status, 200);
    let reply = over(stream, poll_request(KEY, "ended.a")).await.unwrap();
    assert_eq!(reply.status, 200);
    reply.assert_is_signed();
    let plain = authority.stranger().poll(gateway.address, "ended.a").await.unwrap();
    assert_eq!(
        plain.header("cache-status").map(|status| status.contains("hit")),
        Some(true)
    );
    let newer = authority.client_with(&["h2"], None);
    assert!(newer.connect(gateway.address).await.is_err(), "HTTP/2 is not spoken");
    gateway.shows(&failures("protocol"), 1.0).await;
}

#[tokio::test]
async fn plain_http_is_told_that_tls_is_spoken_here() {
    let authority = Authority::new();
    let config = authority.section("") + "log: { level: debug }";
    let gateway = Gateway::start("http://127.0.0.1:9", &config).await;
    let mut client = Raw::connect(gateway.address).await;
    let reply = client.poll("a").await;
    assert!(reply.is(400) && reply.says_close(), "{reply:?}");
    assert_eq!(reply.json()["code"], 400);
    assert!(
        reply.json()["message"]
            .as_str()
            .unwrap()
            .contains("crun-gateway: this port speaks TLS")
    );
    for name in ["x-request-id", "cache-status", "age", "date"] {
        assert!(reply.header(name).is_some(), "{name}: {reply:?}");
    }
    client.assert_ends().await;
    let log = gateway.logged(reply.header("x-request-id").unwrap(), 1).await;
    assert!(log.contains("request refused"), "{log}");
    gateway.shows(&failures("plain_http"), 1.0).await;
    let mut client = Raw::connect(gateway.address).await;
    client.send(b"\x16\x03\x01\x00\x05hello").await.unwrap();
    client.assert_ends().await;
    gateway.shows(&failures("protocol"), 1.0).await;
}

#[tokio::test]
async fn a_new_certificate_is_taken_after_a_moment_without_threads() {
    let authority = Authority::new();
    let gateway = Gateway::start_without_threads("http://127.0.0.1:9", &authority.section("")).await;
    gateway.logged("panicked", 2).await;
    let renewed = authority.server();
    authority.mount(&renewed);
    gateway.allow_threads().await;
    gateway.logged("new certificate", 1).await;
    assert_eq!(authority.stranger().sees(gateway.address).await, renewed.der());
}

#[tokio::test]
async fn a_client_that_does_not_trust_the_certificate_is_counted() {
    let (authority, other) = (Authority::new(), Authority::new());
    let gateway = Gateway::start("http://127.0.0.1:9", &authority.section("")).await;
    assert!(other.stranger().connect(gateway.address).await.is_err());
    gateway.shows(&failures("refused_by_client"), 1.0).await;
}

#[tokio::test]
async fn a_new_certificate_is_taken_under_load_and_costs_no_request() {
    let authority = Authority::new();
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, &authority.section("")).await;
    let (address, client) = (gateway.address, authority.stranger());
    assert_eq!(client.poll(address, "ended.a").await.unwrap().status, 200);
    let stream = client.connect(address).await.unwrap();
    let (mut kept, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let done = Arc::new(AtomicBool::new(false));
    let mut load = JoinSet::new();
    for _ in 0..4 {
        let (client, done) = (client.clone(), Arc::clone(&done));
        load.spawn(async move {
            let mut answered = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(client.poll(address, "ended.a").await.unwrap().status, 200);
                answered += 1;
            }
            answered
        });
    }
    let year = 2040;
    for later in 0..2 {
        let renewed = authority.issue(|params| {
            params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
            params.not_after = rcgen::date_time_ymd(year + later, 1, 1);
        });
        authority.mount(&renewed);
        let patience = Instant::now() + PATIENCE;
        while client.sees(address).await != renewed.der() {
            assert!(Instant::now() < patience, "still the certificate before");
            sleep(Duration::from_millis(10)).await;
        }
        let expires = rcgen::date_time_ymd(year + later, 1, 1).unix_timestamp();
        let shown = gateway
            .metric("crun_gateway_tls_certificate_expiry_timestamp_seconds")
            .await;
        assert!((shown - expires as f64).abs() < 0.5, "{shown}, not {expires}");
    }
    done.store(true, Ordering::Relaxed);
    let answered: usize = load.join_all().await.into_iter().sum();
    assert!(answered > 10, "there was load: {answered}");
    // A connection from before goes on.
    let reply = kept.send_request(poll_request(KEY, "ended.a")).await.unwrap();
    assert_eq!(reply.status(), 200);
    reply.into_body().collect().await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_cannot_be_served_changes_nothing() {
    let authority = Authority::new();
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, &authority.section("")).await;
    let (address, client) = (gateway.address, authority.stranger());
    let before = client.sees(address).await;
    let (renewed, other) = (authority.server(), authority.server());
    authority.mount(&Pair {
        key: other.key,
        ..renewed.clone()
    });
    gateway.shows("crun_gateway_tls_reload_success", 0.0).await;
    assert_eq!(client.sees(address).await, before);
    assert_eq!(client.poll(address, "ended.a").await.unwrap().status, 200);
    for (from, until, said) in [
        (2020, 2021, "expired on 2021-01-01"),
        (2999, 3000, "is valid only from 2999-01-01"),
    ] {
        authority.mount(&authority.issue(|params| {
            params.not_before = rcgen::date_time_ymd(from, 1, 1);
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
        }));
        gateway.logged(said, 1).await;
        assert_eq!(client.sees(address).await, before);
    }
    authority.mount(&renewed);
    gateway.shows("crun_gateway_tls_reload_success", 1.0).await;
    assert_eq!(client.sees(address).await, renewed.der());
}

#[test]
fn what_is_refused_is_said_once_with_field_and_fix_however_often_it_is_looked_at() {
    let authority = Authority::new();
    let tls = Tls::load(authority.settings(), Arc::new(Metrics::new().unwrap())).unwrap();
    let served = authority.server();
    let log = authority.file("log");
    let _listening = listen(fs::File::create(&log).unwrap(), Level::INFO);
    for round in 0..2 {
        authority.mount(&Pair {
            key: authority.server().key,
            ..served.clone()
        });
        for _ in 0..3 {
            tls.reload();
        }
        let log = fs::read_to_string(&log).unwrap();
        let refused: Vec<_> = log.lines().filter(|line| line.contains("WARN")).collect();
        assert_eq!(refused.len(), round + 1, "{log}");
        assert!(refused.iter().all(|line| {
            line.contains("field=\"tls.key_file\"") && line.contains("fix=\"name the two that belong together")
        }));
        // Good again: the next refusal is news.
        authority.mount(&served);
        for _ in 0..3 {
            tls.reload();
        }
    }
    let log = fs::read_to_string(&log).unwrap();
    let said = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(
        (said("new certificate"), said("hold again what is served")),
        (1, 1),
        "{log}"
    );
}

#[tokio::test]
async fn an_expired_certificate_is_named_by_check_and_nothing_starts_with_it() {
    let authority = Authority::new();
    authority.mount(&authority.issue(|params| params.not_after = rcgen::date_time_ymd(2021, 1, 1)));
    let file = config_file(&authority.section(""));
    let path = file.path().to_str().unwrap();
    for arguments in [&["check", "--config", path][..], &["--config", path]] {
        let ended = run(arguments, &[]).await;
        assert_eq!(ended.code, 2, "{ended:?}");
        assert!(
            ended
                .stderr
                .starts_with("tls.cert_file: expired on 2021-01-01T00:00:00Z: renew it")
        );
    }
}

/// How many polls of an account that is not listed a client had answered.
fn answered(client: &str) -> String {
    let labels = format!("account=\"other\",cache=\"hit\",client=\"{client}\",code=\"2xx\"");
    format!("crun_gateway_requests_total{{{labels}}}")
}

#[tokio::test]
async fn only_clients_that_the_root_vouches_for_are_let_in_and_their_name_is_in_the_metrics() {
    let (authority, other) = (Authority::new(), Authority::new());
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, &authority.asking("required")).await;
    let address = gateway.address;
    let known = |own: &Pair| authority.client_with(&[], Some(own));
    let first = known(&authority.client("warm-up"))
        .poll(address, "ended.a")
        .await
        .unwrap();
    assert_eq!(first.status, 200);
    assert!(
        authority.stranger().poll(address, "ended.a").await.is_err(),
        "no certificate"
    );
    gateway.shows(&failures("client_certificate"), 1.0).await;
    let forged = known(&other.client("studio.internal"));
    assert!(
        forged.poll(address, "ended.a").await.is_err(),
        "nobody here vouches for it"
    );
    gateway.shows(&failures("client_certificate"), 2.0).await;
    let uri = SanType::URI("spiffe://example/ns/music/sa/studio".try_into().unwrap());
    for (name, own) in [
        ("studio.internal", authority.client("studio.internal")),
        (
            "spiffe://example/ns/music/sa/studio",
            authority.issue(|params| params.subject_alt_names = vec![uri.clone()]),
        ),
        (
            "first.internal",
            authority.issue(|params| {
                let dns = ["first.internal", "second.internal"].map(|name| SanType::DnsName(name.try_into().unwrap()));
                params.subject_alt_names = [uri.clone()].into_iter().chain(dns).collect();
                params.distinguished_name.push(DnType::CommonName, "common");
            }),
        ),
        (
            "common",
            authority.issue(|params| params.distinguished_name.push(DnType::CommonName, "common")),
        ),
        // A name that is not fit for a label is none: such a client is known by its address.
        (
            "other",
            authority.issue(|params| params.distinguished_name.push(DnType::CommonName, "a\" b")),
        ),
    ] {
        let client = known(&own);
        assert_eq!(client.poll(address, "ended.a").await.unwrap().status, 200, "{name}");
        gateway.shows(&answered(name), 1.0).await;
        // Each time the certificate is verified anew.
        let stream = client.connect(address).await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[tokio::test]
async fn a_certificate_may_be_optional_and_a_wrong_one_is_still_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, &authority.asking("optional")).await;
    let address = gateway.address;
    assert_eq!(authority.stranger().poll(address, "ended.a").await.unwrap().status, 200);
    assert_eq!(authority.stranger().poll(address, "ended.a").await.unwrap().status, 200);
    gateway.shows(&answered("other"), 1.0).await;
    let known = authority.client_with(&[], Some(&authority.client("studio.internal")));
    assert_eq!(known.poll(address, "ended.a").await.unwrap().status, 200);
    gateway.shows(&answered("studio.internal"), 1.0).await;
    let forged = authority.client_with(&[], Some(&other.client("studio.internal")));
    assert!(forged.poll(address, "ended.a").await.is_err());
}

#[tokio::test(start_paused = true)]
async fn clients_with_certificates_share_the_budget_wherever_they_come_from() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_wait = Duration::from_secs(90);
    }));
    let caller = |name: &str| Caller::Certificate(name.into());
    let mut greedy = JoinSet::new();
    for task in 0..1000 {
        let (gateway, greed) = (Arc::clone(&gateway), caller("greedy.internal"));
        greedy.spawn(async move { gateway.poll_from(greed, KEY, &format!("greedy-{task}")).await });
    }
    sleep(Duration::from_secs(3)).await;
    let started = Instant::now();
    let mut modest = JoinSet::new();
    for task in 0..5 {
        let (gateway, modesty) = (Arc::clone(&gateway), caller("modest.internal"));
        modest.spawn(async move { gateway.poll_from(modesty, KEY, &format!("modest-{task}")).await });
    }
    for reply in modest.join_all().await {
        assert_eq!(reply.status, 200);
    }
    let took = started.elapsed();
    assert!(took <= Duration::from_millis(1500), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_ends_with_the_header_timeout_whatever_was_said_so_far() {
    let authority = Authority::new();
    let gateway = Paused::start(Behaviour::default(), |config| {
        config.limits.header_timeout = Duration::from_secs(7);
    });
    for said in [&b""[..], b"\x16", b"\x16\x03\x01\x02\x00\x01"] {
        let started = Instant::now();
        let mut client = gateway.connect_tls(authority.settings(), CancellationToken::new());
        for byte in said {
            client.write_all(&[*byte]).await.unwrap();
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(client.read(&mut [0; 64]).await.unwrap(), 0);
        assert_eq!(started.elapsed(), Duration::from_secs(7));
    }
    assert!((gateway.metric(&failures("timeout")) - 3.0).abs() < 0.1);
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_is_under_way_has_the_grace_of_an_idle_connection_at_a_stop() {
    let authority = Authority::new();
    let gateway = Paused::start(Behaviour::default(), |_| {});
    let draining = CancellationToken::new();
    let mut client = gateway.connect_tls(authority.settings(), draining.clone());
    client.write_all(b"\x16").await.unwrap();
    sleep(Duration::from_secs(1)).await;
    draining.cancel();
    let stopped = Instant::now();
    assert_eq!(client.read(&mut [0; 64]).await.unwrap(), 0);
    assert_eq!(stopped.elapsed(), GRACE);
}

#[tokio::test]
async fn handshakes_that_never_end_hold_nobody_up() {
    let authority = Authority::new();
    let upstream = quick().await;
    let config = authority.section("") + "limits: { header_timeout: \"2s\" }";
    let gateway = Gateway::start(&upstream.url, &config).await;
    let (address, client) = (gateway.address, authority.stranger());
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut connection = Raw::connect(address).await;
        connection.send(b"\x16\x03\x01").await.unwrap();
        slow.push(connection);
    }
    assert_eq!(client.poll(address, "ended.a").await.unwrap().status, 200);
    for mut connection in slow {
        connection.assert_ends().await;
    }
    gateway.shows(&failures("timeout"), 200.0).await;
    gateway.shows("crun_gateway_connections", 0.0).await;
}

#[tokio::test]
async fn whoever_finds_no_place_is_told_so_over_tls() {
    let authority = Authority::new();
    let upstream = quick().await;
    let config = authority.section("") + "limits: { connections: 1 }";
    let gateway = Gateway::start(&upstream.url, &config).await;
    let client = authority.stranger();
    let _holder = client.connect(gateway.address).await.unwrap();
    let mut second = client.connect(gateway.address).await.unwrap();
    let mut told = String::new();
    second.read_to_string(&mut told).await.unwrap();
    assert!(
        told.starts_with("HTTP/1.1 503 ") && told.contains("limits.connections"),
        "{told}"
    );
}

#[tokio::test]
async fn a_connections_end_is_said_over_tls_whatever_its_client_offers() {
    let authority = Authority::new();
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, &authority.section("")).await;
    for options in ["close", "close, upgrade\r\nupgrade: websocket"] {
        let mut client = authority.stranger().connect(gateway.address).await.unwrap();
        let asked = raw::poll("ended.a").replace("\r\n\r\n", &format!("\r\nconnection: {options}\r\n\r\n"));
        client.write_all(asked.as_bytes()).await.unwrap();
        let mut told = String::new();
        // To its end, which is a close_notify: rustls takes a bare FIN for an error.
        client.read_to_string(&mut told).await.unwrap();
        assert!(told.starts_with("HTTP/1.1 200 OK\r\n"), "{told}");
    }
}

#[tokio::test]
async fn a_stop_is_as_clean_over_tls() {
    let authority = Authority::new();
    let upstream = Simulator::start(&["--latency", "1s"]).await;
    let mut gateway = Gateway::start(&upstream.url, &authority.section("")).await;
    let (address, client) = (gateway.address, authority.stranger());
    // What is asked after the stop begins is kept: another task's turn may come later than the grace is over.
    assert_eq!(client.poll(address, "ended.kept").await.unwrap().status, 200);
    let mut idle = client.connect(address).await.unwrap();
    let mut busy = JoinSet::new();
    for task in 0..30 {
        let client = client.clone();
        busy.spawn(async move { client.poll(address, &format!("ended.{task}")).await });
    }
    let mut unfinished = Raw::connect(address).await;
    unfinished.send(b"\x16\x03\x01").await.unwrap();
    gateway.shows("crun_gateway_connections", 32.0).await;
    upstream.asked(6).await;
    gateway.terminate();
    gateway.drains().await;
    let newcomer = client.poll(address, "ended.kept").await.unwrap();
    assert_eq!(
        (newcomer.status.as_u16(), newcomer.header("connection")),
        (200, Some("close"))
    );
    idle.write_all(raw::poll("ended.kept").as_bytes()).await.unwrap();
    let mut last = String::new();
    // To its end, which is a close_notify: rustls takes a bare FIN for an error.
    idle.read_to_string(&mut last).await.unwrap();
    assert!(last.starts_with("HTTP/1.1 200 OK\r\n"), "{last}");
    assert!(last.to_lowercase().contains("connection: close\r\n"), "{last}");
    for reply in busy.join_all().await {
        assert_eq!(reply.unwrap().status, 200);
    }
    unfinished.assert_ends().await;
    assert_eq!(gateway.exit().await.code(), Some(0));
    assert_eq!(upstream.stats().await["violations"], 0);
}

#[tokio::test]
async fn without_tls_no_certificate_is_said_to_expire() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let (_, metrics) = gateway.admin("/metrics").await;
    assert!(
        !metrics.contains("certificate_expiry"),
        "an alert would take 0 for 1970"
    );
    assert!(metrics.contains(&(failures("timeout") + " 0\n")));
}

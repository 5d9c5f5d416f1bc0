//! Upstream over TLS: whom the gateway trusts, and that slow handshakes cost neither the pace nor anybody's answer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use rustls_pki_types::{PrivateKeyDer, pem::PemObject as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto::ring};

use crate::harness::client::bare;
use crate::harness::process::{config_file, run};
use crate::harness::scripted::response;
use crate::harness::{Gateway, Simulator, poll, request};

/// A root of our own, and the certificate of a server that it vouches for.
pub struct Identity {
    directory: tempfile::TempDir,
    certificate: rcgen::Certificate,
    key: rcgen::KeyPair,
}

impl Identity {
    pub fn of(name: &str) -> Self {
        Self::made(name, |_| {})
    }

    /// One whose certificate was valid in the year 2020.
    fn expired(name: &str) -> Self {
        Self::made(name, |certificate| {
            certificate.not_before = rcgen::date_time_ymd(2020, 1, 1);
            certificate.not_after = rcgen::date_time_ymd(2020, 12, 31);
        })
    }

    fn made(name: &str, change: impl FnOnce(&mut rcgen::CertificateParams)) -> Self {
        let root_key = rcgen::KeyPair::generate().unwrap();
        let mut root = rcgen::CertificateParams::new([]).unwrap();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root_certificate = root.self_signed(&root_key).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut certificate = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
        change(&mut certificate);
        let certificate = certificate
            .signed_by(&key, &rcgen::Issuer::new(root, root_key))
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        for (file, pem) in [
            ("root.pem", root_certificate.pem()),
            ("cert.pem", certificate.pem()),
            ("key.pem", key.serialize_pem()),
        ] {
            std::fs::write(directory.path().join(file), pem).unwrap();
        }
        Self {
            directory,
            certificate,
            key,
        }
    }

    pub fn file(&self, name: &str) -> String {
        let path: PathBuf = self.directory.path().join(name);
        path.to_str().unwrap().to_owned()
    }

    /// A simulated upstream with this certificate.
    async fn upstream(&self, options: &[&str]) -> Simulator {
        let (cert, key) = (self.file("cert.pem"), self.file("key.pem"));
        let tls = ["--tls-cert", &cert, "--tls-key", &key];
        Simulator::start(&[&tls, options].concat()).await
    }

    /// A gateway that trusts the root.
    async fn gateway(&self, url: &str, config: &str) -> Gateway {
        let root = self.file("root.pem");
        let config = format!("upstream: {{ url: \"{url}\", ca_file: \"{root}\" }}\n{config}");
        Gateway::start(url, &config).await
    }

    pub fn acceptor(&self, alpn: &[&str]) -> TlsAcceptor {
        let key = PrivateKeyDer::from_pem_slice(self.key.serialize_pem().as_bytes()).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        TlsAcceptor::from(Arc::new(config))
    }
}

#[tokio::test]
async fn bytes_are_those_of_upstream_and_http_1_1_is_spoken_even_where_upstream_prefers_http_2() {
    const BODY: &[u8] =
        b"{ \"data\":{\"status\":\"failed\", \"task_id\":\"a\",\"x\":\"\\u00e9 \xc3\xa9\"},\"code\":200}\n";
    let identity = Identity::of("127.0.0.1");
    let acceptor = identity.acceptor(&["h2", "http/1.1"]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let (spoken, mut protocols) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = acceptor.accept(stream).await.unwrap();
            spoken
                .send(stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec))
                .unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(&response("200 OK", "", BODY)).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    });
    let gateway = identity.gateway(&url, "").await;
    let reply = poll(gateway.address, "a").await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.body, BODY);
    assert_eq!(protocols.recv().await.unwrap().as_deref(), Some(&b"http/1.1"[..]));
    let passed = request(gateway.address, bare(Method::GET, "/api/v1/x")).await;
    assert_eq!(passed.body, BODY);
    assert_eq!(protocols.recv().await.unwrap().as_deref(), Some(&b"http/1.1"[..]));
}

/// Polls and posts, and is told both times that upstream cannot be reached, and soon.
async fn cannot_be_reached(gateway: &Gateway, upstream: &Simulator) {
    let started = Instant::now();
    poll(gateway.address, "ended.a").await.assert_is_our_error(503);
    let posted = request(gateway.address, bare(Method::POST, "/api/v1/echo")).await;
    posted.assert_is_our_error(503);
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    let log = gateway.logged("upstream connection failed", 1).await;
    assert!(log.contains("certificate"), "{log}");
    let spent = gateway
        .metric("crun_gateway_upstream_request_duration_seconds_count")
        .await;
    assert!(spent < 0.1, "a connection that fails costs no query: {spent}");
    assert!(upstream.url.starts_with("https://"));
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_not_trusted() {
    let identity = Identity::of("127.0.0.1");
    let upstream = identity.upstream(&[]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    cannot_be_reached(&gateway, &upstream).await;
    let stranger = Identity::of("127.0.0.1");
    let gateway = stranger.gateway(&upstream.url, "").await;
    cannot_be_reached(&gateway, &upstream).await;
}

#[tokio::test]
async fn a_certificate_of_another_name_is_not_trusted() {
    let identity = Identity::of("api.example");
    let upstream = identity.upstream(&[]).await;
    let gateway = identity.gateway(&upstream.url, "").await;
    cannot_be_reached(&gateway, &upstream).await;
}

#[tokio::test]
async fn an_expired_certificate_is_not_trusted() {
    let identity = Identity::expired("127.0.0.1");
    let upstream = identity.upstream(&[]).await;
    let gateway = identity.gateway(&upstream.url, "").await;
    cannot_be_reached(&gateway, &upstream).await;
    gateway.logged("expired", 1).await;
}

#[tokio::test]
async fn a_ca_file_that_cannot_be_read_is_said_at_the_start() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(
        &mut file,
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let config = config_file(&format!(
        "listen: \"127.0.0.1:0\"\nadmin: \"127.0.0.1:0\"\nupstream: {{ ca_file: \"{}\" }}",
        file.path().display()
    ));
    let ended = run(&["--config", config.path().to_str().unwrap()], &[]).await;
    assert_ne!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("upstream.ca_file"), "{ended:?}");
}

/// A hundred tasks at once over connections that upstream keeps closing and is slow to open.
async fn the_pace_holds(latency: &str, closing: &[&str]) {
    let identity = Identity::of("127.0.0.1");
    let options = ["--latency", latency, "--open-delay", "300ms", "--open-delay-every", "3"];
    let upstream = identity.upstream(&[&options[..], closing].concat()).await;
    let gateway = identity
        .gateway(&upstream.url, "budget: { max_wait: \"30s\" }\npassthrough: [\"/\"]")
        .await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..100 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    // All its paths are open here, so that the gateway itself is the way to what upstream counted.
    let stats = request(address, bare(Method::GET, "/__stats")).await.json();
    let number = |name: &str| stats[name].as_u64().unwrap();
    assert!(number("highest_in_any_second") <= 15, "{stats}");
    assert_eq!(number("violations"), 0, "{stats}");
    assert_eq!(number("rate_limited"), 0, "{stats}");
    let span = Duration::from_nanos(number("last_arrival_unix_ns") - number("first_arrival_unix_ns"));
    let goodput = f64::from(u32::try_from(number("requests") - 1).unwrap()) / span.as_secs_f64();
    assert!(goodput >= 14.0, "{goodput}/s: {stats}");
}

#[tokio::test]
async fn slow_handshakes_do_not_cost_the_pace() {
    the_pace_holds("200ms", &["--close-after-response"]).await;
}

#[tokio::test]
async fn slow_handshakes_and_slow_answers_do_not_cost_the_pace() {
    the_pace_holds("2s", &["--close-after-response"]).await;
}

//! Upstream over HTTPS: trusted by `upstream.ca_file`, and only then.

use std::io::Write as _;
use std::sync::Arc;

use http_body_util::BodyExt as _;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

use crate::harness::client::bare;
use crate::harness::{Gateway, Simulator, poll};

fn pem(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// A simulated upstream with a certificate for `name`, and the file of that certificate.
async fn secure(name: &str, options: &[&str]) -> (Simulator, tempfile::NamedTempFile, tempfile::NamedTempFile) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let (certificate, key) = (pem(&made.cert.pem()), pem(&made.signing_key.serialize_pem()));
    let files = [
        "--tls-cert",
        certificate.path().to_str().unwrap(),
        "--tls-key",
        key.path().to_str().unwrap(),
    ];
    let upstream = Simulator::start(&[&files[..], options].concat()).await;
    (upstream, certificate, key)
}

/// What upstream counted, asked over TLS as it wants to be.
async fn stats(upstream: &Simulator, name: &str, certificate: &tempfile::NamedTempFile) -> Value {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(certificate.path()).unwrap())
        .unwrap();
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let address = upstream.url.split_once("//").unwrap().1;
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(bare(http::Method::GET, "/__stats")).await.unwrap();
    serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

fn config(upstream: &Simulator, ca_file: Option<&tempfile::NamedTempFile>) -> String {
    let ca_file = ca_file.map_or(String::new(), |file| {
        format!(", ca_file: \"{}\"", file.path().display())
    });
    format!(
        "upstream: {{ url: \"{}\"{ca_file} }}\nbudget: {{ max_wait: \"45s\" }}",
        upstream.url
    )
}

#[tokio::test]
async fn a_certificate_that_ca_file_trusts_will_do_and_no_other() {
    let (upstream, certificate, _key) = secure("127.0.0.1", &["--latency", "0ms"]).await;
    let trusting = Gateway::start("", &config(&upstream, Some(&certificate))).await;
    assert_eq!(
        poll(trusting.address, "ended.a").await.json()["data"]["status"],
        "success"
    );
    let wary = Gateway::start("", &config(&upstream, None)).await;
    poll(wary.address, "ended.b").await.assert_is_our_error(503);

    assert_eq!(stats(&upstream, "127.0.0.1", &certificate).await["requests"], 1);

    let (misnamed, certificate, _key) = secure("elsewhere.example", &["--latency", "0ms"]).await;
    let gateway = Gateway::start("", &config(&misnamed, Some(&certificate))).await;
    poll(gateway.address, "ended.a").await.assert_is_our_error(503);
    assert_eq!(stats(&misnamed, "elsewhere.example", &certificate).await["requests"], 0);
}

/// A third of new connections take 300 ms to open, and each closes after its answer, without a word.
#[tokio::test]
async fn the_pace_holds_while_connections_open_slowly() {
    let options = [
        "--open-delay",
        "300ms",
        "--open-delay-every",
        "3",
        "--close-after-response",
        "--latency",
        "100ms",
    ];
    let (upstream, certificate, _key) = secure("127.0.0.1", &options).await;
    let gateway = Gateway::start("", &config(&upstream, Some(&certificate))).await;
    let address = gateway.address;
    let mut polls = JoinSet::new();
    for task in 0..150 {
        polls.spawn(async move { poll(address, &format!("ended.{task}")).await });
    }
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let stats = stats(&upstream, "127.0.0.1", &certificate).await;
    let number = |name: &str| stats[name].as_u64().unwrap();
    assert_eq!((number("violations"), number("rate_limited")), (0, 0), "{stats}");
    let span = (number("last_arrival_unix_ns") - number("first_arrival_unix_ns")) as f64 / 1e9;
    let goodput = (number("requests") - 1) as f64 / span;
    assert!(goodput >= 14.0, "{goodput}/s: {stats}");
}

//! How a connection of ours to somebody else is opened: by DNS and TCP, and TLS where the URL says so.
//!
//! TLS trusts the roots of the web and the operator's own, whatever is spoken over it. What goes over a connection, and for how
//! long one is waited for, is its owner's business.

use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use futures_util::TryFutureExt as _;
use futures_util::future::BoxFuture;
use http::Uri;
use http::uri::Scheme;
use hyper_util::client::legacy::connect::HttpConnector;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
use tower_service::Service as _;

use crate::panics::dialled;

/// A stream of bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A stream that is being opened.
pub type Dialing = BoxFuture<'static, io::Result<Box<dyn Stream>>>;

/// How a raw stream is opened: TCP, or a pipe in memory where time is paused.
pub type Dial = Arc<dyn Fn() -> Dialing + Send + Sync>;

/// What a handshake needs: the connector, and whose certificate it has to be.
pub type Handshake = (TlsConnector, ServerName<'static>);

/// Dials `url` by DNS and TCP, without Nagle's delay; every address is tried, IPv6 and IPv4 side by side.
pub fn tcp(url: Uri) -> Dial {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    Arc::new(move || {
        let connecting = connector.clone().call(url.clone());
        Box::pin(async move {
            let stream = dialled(connecting.map_err(io::Error::other)).await?;
            Ok(Box::new(stream.into_inner()) as Box<dyn Stream>)
        })
    })
}

/// The TLS that `url` asks for, if it does, to speak HTTP/1.1. `ca_file` holds extra roots, PEM; `section` is where both are configured.
///
/// # Errors
/// When the URL names no host, or the file cannot be read.
pub fn tls(url: &Uri, ca_file: Option<&Path>, section: &str) -> anyhow::Result<Option<Handshake>> {
    if url.scheme() != Some(&Scheme::HTTPS) {
        return Ok(None);
    }
    let host = url.host().with_context(|| format!("{section}: no host in {url}"))?;
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(name).with_context(|| format!("{section}: host in {url}"))?;
    Ok(Some((connector(ca_file, section, &["http/1.1"])?, name)))
}

/// TLS that trusts the roots of the web and those in `ca_file`, PEM, which `section` configures; ALPN offers `protocols`.
///
/// # Errors
/// When the file cannot be read.
pub fn connector(ca_file: Option<&Path>, section: &str, protocols: &[&str]) -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(file) = ca_file {
        let named = || format!("{section}.ca_file: {}", file.display());
        for certificate in CertificateDer::pem_file_iter(file).with_context(named)? {
            roots.add(certificate.with_context(named)?).with_context(named)?;
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}

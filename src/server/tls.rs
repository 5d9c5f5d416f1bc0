//! The clients' TLS: handshakes, who a verified certificate says is there, and a change of certificate.
//!
//! The content of the files that `config.tls` names is looked at every [`LOOK_INTERVAL`]. What can be served replaces
//! what was, whole, for handshakes from then on; what cannot changes nothing and is said once. Connections that are open
//! stay as they are. Of what ALPN knows, HTTP/1.1 is spoken, and HTTP/1.0 with who offers no other.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};
use tokio_rustls::StartHandshake;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::{Accepted, Acceptor, NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::SingleCertAndKey;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::GRACE;
use super::closing::close;
use super::connection::serve_connection;
use crate::account::Caller;
use crate::config::{self, Demand, Identity, Limits, Problem, Problems, Watched};
use crate::error::Error;
use crate::gateway::{Gateway, refusal};
use crate::metrics::{HandshakeFailure, Metrics};
use crate::panics;

/// How often the files are looked at: three small files, and a certificate in use soon after it was put in place.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A name in a certificate that is longer, or holds what a metric label had better not, is none.
const LONGEST_NAME: usize = 128;

/// What a handshake begins with, mostly in one piece. rustls reads as much at once where it reads for itself.
const HELLO: usize = 4096;

/// The certificate in use, and what may follow it.
#[derive(Debug)]
pub struct Tls {
    settings: config::Tls,
    current: ArcSwap<ServerConfig>,
    files: Mutex<Files>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Files {
    watched: Watched,
    /// Why what they hold is not served.
    refused: Option<Problems>,
}

/// A handshake that came to nothing.
struct Failed<S> {
    why: HandshakeFailure,
    error: io::Error,
    /// The connection, where it may still be closed in peace.
    stream: Option<S>,
}

impl Tls {
    /// What `settings` name, read.
    ///
    /// # Errors
    /// Everything that is wrong with the files.
    pub fn load(settings: config::Tls, metrics: Arc<Metrics>) -> Result<Arc<Self>, Problems> {
        let watched = Watched::new(settings.files());
        let (config, expires) = read(&settings)?;
        metrics.tls_serves(expires);
        Ok(Arc::new(Self {
            settings,
            current: ArcSwap::new(config),
            files: Mutex::new(Files { watched, refused: None }),
            metrics,
        }))
    }

    /// Takes what the files hold from time to time, for as long as it is polled.
    pub async fn watch(self: &Arc<Self>) {
        loop {
            sleep(LOOK_INTERVAL).await;
            let tls = Arc::clone(self);
            // A panic there was reported by the hook; the next look is another.
            let _ = panics::blocking(move || tls.reload()).await;
        }
    }

    /// Takes what the files hold now, if it is something new that can be served. Blocks on the file system.
    pub fn reload(&self) {
        let mut files = self.files.lock();
        let Some(content) = files.watched.changed() else {
            if files.refused.take().is_some() {
                self.metrics.tls_reload_success.set(1);
                tracing::info!("the files of tls hold again what is served");
            }
            return;
        };
        match read(&self.settings) {
            Ok((config, expires)) => {
                self.current.store(config);
                // Not before it is served: what is refused is looked at again.
                files.watched.take(content);
                files.refused = None;
                self.metrics.tls_serves(expires);
                let expires = humantime::format_rfc3339_seconds(expires);
                tracing::info!(%expires, "new certificate: new connections get it");
            }
            Err(problems) if files.refused.as_ref() == Some(&problems) => {}
            Err(problems) => {
                for Problem { field, what, fix } in &problems {
                    tracing::warn!(field, what, fix, "the certificate stays as it was");
                }
                self.metrics.tls_reload_success.set(0);
                files.refused = Some(problems);
            }
        }
    }

    /// The connection behind a handshake, and whose it is if a certificate says so; `None` when the handshake failed, or
    /// took longer than `patience`: then it is counted, and the connection closed.
    ///
    /// Cancelled, it closes the connection, too, and counts nothing.
    pub(super) async fn handshake<S>(&self, stream: S, patience: Duration) -> Option<(TlsStream<S>, Option<Caller>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let shaken = timeout(patience, self.shake(stream)).await.unwrap_or_else(|_| {
            Err(Failed {
                why: HandshakeFailure::Timeout,
                error: io::ErrorKind::TimedOut.into(),
                stream: None,
            })
        });
        let Failed { why, error, stream } = match shaken {
            Ok(stream) => {
                let certificates = stream.get_ref().1.peer_certificates();
                let name = certificates.and_then(<[_]>::first).and_then(name);
                return Some((stream, name.map(Caller::Certificate)));
            }
            Err(failed) => failed,
        };
        self.metrics.handshake_failed(why);
        tracing::debug!(why = why.as_ref(), %error, "TLS handshake failed");
        if let Some(mut stream) = stream {
            // Whether it listens is its own business.
            let _ = timeout(GRACE, async {
                if why == HandshakeFailure::PlainHttp {
                    stream.write_all(&refusal(&Error::PlainHttp)).await?;
                }
                close(&mut stream, || false).await
            })
            .await;
        }
        None
    }

    async fn shake<S>(&self, mut stream: S) -> Result<TlsStream<S>, Failed<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let accepted = match hello(&mut stream).await {
            Ok(accepted) => accepted,
            Err((why, error)) => {
                let stream = Some(stream);
                return Err(Failed { why, error, stream });
            }
        };
        let config = self.current.load_full();
        let rest = StartHandshake::from_parts(accepted, stream).into_stream(config);
        rest.into_fallible().await.map_err(|(error, stream)| Failed {
            why: why(&error),
            error,
            stream: Some(stream),
        })
    }
}

/// Serves one connection like [`serve_connection`], once its handshake is done: within `limits.header_timeout`, and, when
/// `draining` is cancelled meanwhile, as long as a connection on which nothing is asked.
pub async fn serve_tls_connection<S>(
    stream: S,
    peer: IpAddr,
    tls: Arc<Tls>,
    gateway: Arc<Gateway>,
    limits: &Limits,
    draining: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let drained = async {
        draining.cancelled().await;
        sleep(GRACE).await;
    };
    let shaken = tokio::select! {
        shaken = tls.handshake(stream, limits.header_timeout) => shaken,
        () = drained => return,
    };
    // Its certificates and sessions may go with the next change.
    drop(tls);
    if let Some((stream, caller)) = shaken {
        let caller = caller.unwrap_or_else(|| peer.into());
        serve_connection(stream, caller, gateway, limits, draining).await;
    }
}

/// Reads a client's first words. Those of plain HTTP are told apart here, since rustls would answer them with an alert, of
/// which such a client can make nothing.
async fn hello<S>(stream: &mut S) -> Result<Accepted, (HandshakeFailure, io::Error)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut acceptor = Acceptor::default();
    let mut bytes = vec![0; HELLO];
    let mut is_first = true;
    loop {
        let read = stream.read(&mut bytes).await.map_err(|error| (why(&error), error))?;
        if read == 0 {
            let error = io::ErrorKind::UnexpectedEof.into();
            return Err((HandshakeFailure::Closed, error));
        }
        // A method begins with a letter, a handshake with 0x16.
        if is_first && bytes[0].is_ascii_uppercase() {
            return Err((HandshakeFailure::PlainHttp, io::ErrorKind::InvalidData.into()));
        }
        is_first = false;
        let mut unread = &bytes[..read];
        while !unread.is_empty() {
            match acceptor.read_tls(&mut unread) {
                Ok(1..) => {}
                Ok(0) => return Err((HandshakeFailure::Protocol, io::ErrorKind::InvalidData.into())),
                Err(error) => return Err((HandshakeFailure::Protocol, error)),
            }
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok(accepted),
            Ok(None) => {}
            Err((error, mut alert)) => {
                let error = io::Error::new(io::ErrorKind::InvalidData, error);
                let mut answer = Vec::new();
                if alert.write_all(&mut answer).is_ok() {
                    // Whether it listens is its own business.
                    let _ = stream.write_all(&answer).await;
                }
                return Err((why(&error), error));
            }
        }
    }
}

fn why(error: &io::Error) -> HandshakeFailure {
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            HandshakeFailure::ClientCertificate
        }
        Some(rustls::Error::AlertReceived(_)) => HandshakeFailure::RefusedByClient,
        Some(_) => HandshakeFailure::Protocol,
        None => HandshakeFailure::Closed,
    }
}

/// What is to be served from now on, and when it expires.
fn read(settings: &config::Tls) -> Result<(Arc<ServerConfig>, SystemTime), Problems> {
    let Identity {
        certified,
        client_roots,
        expires,
    } = settings.read(SystemTime::now())?;
    let bug = |error: &dyn std::fmt::Display| Problem {
        field: "tls".into(),
        what: error.to_string(),
        fix: "name other files".into(),
    };
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| bug(&error))?;
    let asks_clients = client_roots.is_some();
    let builder = match client_roots {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let is_optional = settings.clients.as_ref().is_some_and(|c| c.demand == Demand::Optional);
            let verifier = if is_optional {
                verifier.allow_unauthenticated()
            } else {
                verifier
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| bug(&error))?)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = [&b"http/1.1"[..], b"http/1.0"].map(<[u8]>::to_vec).to_vec();
    if asks_clients {
        // A session that is resumed is not verified again, and would outlive the client's certificate.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok((Arc::new(config), expires))
}

/// Who a verified certificate says is there: its first DNS name, else its first URI, else its common name.
fn name(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let certificate = CertificateInner::<Raw>::from_der(certificate).ok()?;
    let subject = certificate.tbs_certificate();
    let names = subject.get_extension::<SubjectAltName>().ok().flatten();
    let names = names.map_or_else(Vec::new, |(_, SubjectAltName(names))| names);
    let (mut dns, mut uri) = (None, None);
    for name in names.iter().rev() {
        if let GeneralName::DnsName(name) = name {
            dns = Some(name);
        } else if let GeneralName::UniformResourceIdentifier(name) = name {
            uri = Some(name);
        }
    }
    let name: Arc<str> = match dns.or(uri) {
        Some(name) => name.as_str().into(),
        None => subject.subject().common_name().ok()??.value().into(),
    };
    let is_plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_.-:/@*".contains(&b));
    (is_plain && (1..=LONGEST_NAME).contains(&name.len())).then_some(name)
}

//! How a connection of ours to somebody else is opened: by DNS and TCP, and TLS where the URL says so.
//!
//! TLS trusts the roots of the web and the operator's own, whatever is spoken over it. What goes over a connection, and for how
//! long one is waited for, is its owner's business.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use http::Uri;
use http::uri::Scheme;
use rustls_pki_types::{ServerName, TrustAnchor};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

use crate::panics::blocking;

/// How long one of several is waited for before the next is tried beside it (RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// A stream of bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A stream that is being opened.
pub type Dialing = BoxFuture<'static, io::Result<Box<dyn Stream>>>;

/// How a raw stream is opened: TCP, or a pipe in memory where time is paused.
pub type Dial = Arc<dyn Fn() -> Dialing + Send + Sync>;

/// What a handshake needs: the connector, and whose certificate it has to be.
pub type Handshake = (TlsConnector, ServerName<'static>);

/// Dials `url` by DNS and TCP, as [`connect`] does.
pub fn tcp(url: Uri) -> Dial {
    Arc::new(move || {
        let url = url.clone();
        Box::pin(async move {
            let host = url.host().unwrap_or_default();
            let port = if url.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
            let stream = connect(bare(host), url.port_u16().unwrap_or(port)).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    })
}

/// Opens a connection to `host`, a name or an address, without Nagle's delay. Of several addresses none keeps the others
/// from being tried: see [`first`].
///
/// Cancel safe.
///
/// # Errors
/// When the name has no address, or none lets us in.
pub async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses = match host.parse() {
        Ok(address) => vec![SocketAddr::new(address, port)],
        Err(_) => look_up(host.to_owned(), port).await?,
    };
    let stream = first(in_turn(addresses), TcpStream::connect).await;
    let stream = stream.unwrap_or_else(|| Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn look_up(name: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(blocking(move || (name, port).to_socket_addrs()).await??.collect())
}

/// As the resolver prefers them, but IPv6 and IPv4 in turn: one of the two may be out of reach as a whole.
fn in_turn(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let mut of_family = [0, 0];
    let placed = addresses.into_iter().map(|address| {
        let place = &mut of_family[usize::from(address.is_ipv6())];
        *place += 1;
        (*place, address)
    });
    let mut placed: Vec<_> = placed.collect();
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, address)| address).collect()
}

/// What `attempt` gives for the first of `candidates` with which it succeeds. The next one is tried as soon as all before
/// it have failed, and beside those that take longer than `ATTEMPT_DELAY`: one that never answers costs no more than that.
/// When all fail, what the first one to do so said; `None` without candidates.
///
/// Cancel safe, as far as `attempt` is.
pub async fn first<C, A, T, E>(
    candidates: impl IntoIterator<Item = C>,
    mut attempt: impl FnMut(C) -> A,
) -> Option<Result<T, E>>
where
    A: Future<Output = Result<T, E>>,
{
    let mut candidates = candidates.into_iter().peekable();
    let (mut attempts, mut failed) = (FuturesUnordered::new(), None);
    loop {
        attempts.extend(candidates.next().map(&mut attempt));
        let next_in = candidates.peek().map_or(Duration::MAX, |_| ATTEMPT_DELAY);
        match timeout(next_in, attempts.next()).await {
            Ok(Some(Ok(done))) => return Some(Ok(done)),
            Ok(Some(Err(error))) => {
                failed.get_or_insert(error);
            }
            Ok(None) => return failed.map(Err),
            Err(_) => {}
        }
    }
}

fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// The TLS that `url` asks for, if it does, to speak HTTP/1.1, with these extra roots; `section` is where both are configured.
///
/// # Errors
/// When the URL names no host, or one that no certificate can name; else as [`connector`].
pub fn tls(url: &Uri, extra: Option<&[TrustAnchor<'static>]>, section: &str) -> anyhow::Result<Option<Handshake>> {
    if url.scheme() != Some(&Scheme::HTTPS) {
        return Ok(None);
    }
    let host = url.host().with_context(|| format!("{section}: no host in {url}"))?;
    let name = ServerName::try_from(bare(host).to_owned()).with_context(|| format!("{section}: host in {url}"))?;
    Ok(Some((connector(extra, &["http/1.1"])?, name)))
}

/// TLS that trusts the roots of the web and the `extra` ones; ALPN offers `protocols`.
///
/// # Errors
/// When the provider of its algorithms lacks one that TLS needs.
pub fn connector(extra: Option<&[TrustAnchor<'static>]>, protocols: &[&str]) -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    let of_the_web = webpki_roots::TLS_SERVER_ROOTS;
    roots.extend(of_the_web.iter().chain(extra.unwrap_or_default()).cloned());
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{Instant, sleep};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// How an attempt ends: it succeeds or fails after a while, or is never over.
    #[derive(Clone, Copy)]
    enum Ends {
        Well(Duration),
        Badly(Duration),
        Never,
    }

    /// Which candidate it is or what the error is, and after how long.
    async fn tried(candidates: &[Ends]) -> (Option<Result<usize, usize>>, Duration) {
        let start = Instant::now();
        let attempt = |(number, ends)| async move {
            match ends {
                Ends::Well(after) => sleep(after).await,
                Ends::Badly(after) => {
                    sleep(after).await;
                    return Err(number);
                }
                Ends::Never => pending().await,
            }
            Ok(number)
        };
        let first = first(candidates.iter().copied().enumerate(), attempt).await;
        (first, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_never_answers_keeps_nobody_from_the_others() {
        use Ends::{Badly, Never, Well};
        let second = 1000 * MS;
        for (candidates, first, after) in [
            (&[Never, Well(MS)][..], Some(Ok(1)), 251 * MS),
            (&[Never, Never, Never, Well(MS)], Some(Ok(3)), 751 * MS),
            // One that fails is not waited for.
            (&[Badly(MS), Well(MS)], Some(Ok(1)), 2 * MS),
            (&[Never, Badly(MS), Badly(MS), Well(MS)], Some(Ok(3)), 253 * MS),
            // A slow one goes on beside the others.
            (&[Well(3 * second)], Some(Ok(0)), 3 * second),
            (&[Well(second), Never], Some(Ok(0)), second),
            (&[Well(second), Badly(MS), Well(3 * second)], Some(Ok(0)), second),
            (&[Badly(second), Badly(MS)], Some(Err(1)), second),
            (&[], None, Duration::ZERO),
        ] {
            assert_eq!(tried(candidates).await, (first, after));
        }
    }

    #[test]
    fn families_are_tried_in_turn_the_preferred_one_first() {
        let addresses =
            |texts: &[&str]| -> Vec<SocketAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        for (resolved, tried) in [
            (
                &["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "1.1.1.2:1"][..],
                &["[::1]:1", "1.1.1.1:1", "[::2]:1", "1.1.1.2:1", "[::3]:1"][..],
            ),
            (
                &["1.1.1.2:1", "1.1.1.1:1", "[::1]:1"],
                &["1.1.1.2:1", "[::1]:1", "1.1.1.1:1"],
            ),
            (&[], &[]),
        ] {
            assert_eq!(in_turn(addresses(resolved)), addresses(tried));
        }
    }

    #[tokio::test]
    async fn a_host_is_a_name_or_an_address_of_either_family() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let url = format!("http://{host}:{port}").parse().unwrap();
            assert!(tcp(url)().await.is_ok(), "{host}");
        }
    }
}

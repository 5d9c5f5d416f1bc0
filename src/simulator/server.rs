//! Accepts connections to the simulated upstream and serves HTTP/1.1 on them, over TLS where asked.

use std::io::Write;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, unix::pipe};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto::ring};

use super::arrival::{StampedStream, stamp_arrivals};
use super::endpoint::Endpoints;
use super::link::{CutStream, Link};
use super::options::UpstreamArgs;

/// Runs the simulated upstream until `shutdown`: the command. The first line on the standard output tells where it
/// listens.
///
/// # Errors
/// When it cannot listen, or a certificate cannot be read.
pub async fn upstream(args: UpstreamArgs, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let scheme = if args.tls_files()?.is_some() { "https" } else { "http" };
    let address = listener.local_addr()?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening on {scheme}://{address}")?;
    stdout.flush()?;
    let stdin = args.end_with_stdin.then(stdin).transpose()?;
    let shutdown = async {
        tokio::select! {
            () = shutdown => {}
            () = closed(stdin) => {}
        }
    };
    serve(listener, args, shutdown).await
}

/// The standard input as a pipe that does not block.
fn stdin() -> anyhow::Result<pipe::Receiver> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    pipe::Receiver::from_owned_fd(stdin).context("the standard input is not a pipe")
}

/// Completes when `pipe` is closed; never, when there is none.
async fn closed(pipe: Option<pipe::Receiver>) {
    match pipe {
        Some(mut pipe) => while matches!(pipe.read(&mut [0; 64]).await, Ok(1..)) {},
        None => std::future::pending().await,
    }
}

/// Serves the simulated upstream on `listener` until `shutdown`, whatever `args.listen` says. Then all connections are
/// closed at once.
///
/// # Errors
/// When a certificate cannot be read.
pub(super) async fn serve(
    listener: TcpListener,
    args: UpstreamArgs,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    stamp_arrivals(&listener).context("the kernel does not stamp arrivals")?;
    let tls = acceptor(&args)?;
    let args = Arc::new(args);
    let endpoints = Arc::new(Endpoints::new(&args));
    let mut connections = JoinSet::new();
    let mut opened: u64 = 0;
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => return Ok(()),
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, most likely: the next try would fail as fast.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        opened += 1;
        endpoints.ledger().opened();
        let delay = args
            .open_delay
            .filter(|_| opened.is_multiple_of(args.open_delay_every.max(1)));
        connections.spawn(open(stream, tls.clone(), delay, args.clone(), endpoints.clone()));
    }
}

fn acceptor(args: &UpstreamArgs) -> anyhow::Result<Option<TlsAcceptor>> {
    let Some((cert, key)) = args.tls_files()? else {
        return Ok(None);
    };
    let read = |path| std::fs::read(path).with_context(|| format!("cannot read {}", std::path::Path::display(path)));
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(cert)?)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{} is not PEM", cert.display()))?;
    ensure!(!chain.is_empty(), "{} holds no certificate", cert.display());
    let key_der = PrivateKeyDer::from_pem_slice(&read(key)?)
        .with_context(|| format!("{} holds no private key in PEM", key.display()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// Opens one connection and serves it. Whatever ends it ends it quietly: the other side knows why.
async fn open(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    delay: Option<Duration>,
    args: Arc<UpstreamArgs>,
    endpoints: Arc<Endpoints>,
) {
    let link = Link::new();
    let Ok(stream) = StampedStream::new(stream, link.clone()) else {
        return;
    };
    if let Some(delay) = delay {
        tokio::time::sleep(delay).await;
    }
    match tls {
        None => connection(stream, link, &args, endpoints).await,
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                // What comes in from here on is the first request; if it came with the handshake, its stamp is the last.
                link.wrote();
                Box::pin(connection(stream, link, &args, endpoints)).await;
            }
        }
    }
}

async fn connection<S>(stream: S, link: Arc<Link>, args: &UpstreamArgs, endpoints: Arc<Endpoints>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let (endpoints, link) = (endpoints.clone(), link.clone());
        async move { endpoints.answer(link, request).await }
    });
    let stream = TokioIo::new(CutStream::new(stream, link.clone()));
    let mut connection = pin!(http1::Builder::new().serve_connection(stream, service));
    let mut closing = false;
    loop {
        let idle = async {
            match args.idle_close {
                Some(limit) if !closing => link.idle_for(limit).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = connection.as_mut() => return,
            // The head has been written by now, so nothing announces the end.
            () = link.answered(), if args.close_after_response => connection.as_mut().graceful_shutdown(),
            () = idle => {
                if !link.has_served() {
                    return;
                }
                closing = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

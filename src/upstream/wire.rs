//! The bytes below hyper: how a connection is dialled, and where the instant of a write is taken.
//!
//! Writes are stamped on the raw stream, under TLS, since that is where bytes leave; what was heard is noted above TLS,
//! since a session ticket is no answer.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_util::io::{InspectReader, InspectWriter};
use tower_service::Service as _;

use crate::budget::Permit;

/// A stream of bytes to upstream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A stream that is being opened.
pub type Dialing = BoxFuture<'static, io::Result<Box<dyn Stream>>>;

/// How a raw stream to upstream is opened: TCP, or a pipe in memory where time is paused.
pub type Dial = Arc<dyn Fn() -> Dialing + Send + Sync>;

/// Dials `url` by DNS and TCP, without Nagle's delay; every address is tried, IPv6 and IPv4 side by side.
pub fn tcp(url: Uri) -> Dial {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    Arc::new(move || {
        let connecting = connector.clone().call(url.clone());
        Box::pin(async move {
            let stream = connecting.await.map_err(io::Error::other)?;
            Ok(Box::new(stream.into_inner()) as Box<dyn Stream>)
        })
    })
}

/// What is known of a connection's bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Wire(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Paid for the request that is about to be written.
    permit: Option<Permit>,
    heard: bool,
}

impl Wire {
    /// Puts the stamp under the bytes and, where it is spoken, TLS between.
    pub(super) async fn attach(
        raw: Box<dyn Stream>,
        tls: Option<&(TlsConnector, ServerName<'static>)>,
    ) -> io::Result<(impl Stream, Self)> {
        let wire = Self::default();
        let (below, above) = (wire.clone(), wire.clone());
        let stamped = InspectWriter::new(raw, move |_: &[u8]| below.wrote());
        let stream: Box<dyn Stream> = match tls {
            Some((connector, name)) => Box::new(connector.connect(name.clone(), stamped).await?),
            None => Box::new(stamped),
        };
        Ok((InspectReader::new(stream, move |bytes: &[u8]| above.hear(bytes)), wire))
    }

    /// The next bytes written are the request that `permit` has paid for.
    pub(super) fn arm(&self, permit: Permit) {
        *self.state() = State {
            permit: Some(permit),
            heard: false,
        };
    }

    /// Whether any byte came since the last request was written.
    pub(super) fn heard(&self) -> bool {
        self.state().heard
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrote(&self) {
        if let Some(permit) = self.state().permit.take() {
            permit.written(Instant::now());
        }
    }

    fn hear(&self, bytes: &[u8]) {
        // Nothing at all is the end of the stream.
        if !bytes.is_empty() {
            self.state().heard = true;
        }
    }
}

//! A client's connection for the demo: kept alive, opened anew when the other side closed it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The shortest time-out of a real client.
const PATIENCE: Duration = Duration::from_secs(15);

/// See the module.
pub(super) struct Client {
    address: SocketAddr,
    headers: Vec<(&'static str, String)>,
    sender: Option<SendRequest<Empty<Bytes>>>,
}

impl Client {
    pub(super) fn new(address: SocketAddr, headers: Vec<(&'static str, String)>) -> Self {
        Self {
            address,
            headers,
            sender: None,
        }
    }

    /// The answer to a GET, whole. An error when none came: the connection is then given up.
    pub(super) async fn get(&mut self, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        let sender = self.sender.take();
        let (status, body, sender) = timeout(PATIENCE, self.exchange(sender, path))
            .await
            .context("no answer within 15 s")??;
        self.sender = Some(sender);
        Ok((status, body))
    }

    async fn exchange(
        &self,
        kept: Option<SendRequest<Empty<Bytes>>>,
        path: &str,
    ) -> anyhow::Result<(StatusCode, Bytes, SendRequest<Empty<Bytes>>)> {
        let mut request = Request::builder().uri(path).header("host", self.address.to_string());
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let request = request.body(Empty::new())?;
        let ready = match kept {
            Some(mut sender) => sender.ready().await.is_ok().then_some(sender),
            None => None,
        };
        let mut sender = match ready {
            Some(sender) => sender,
            None => self.open().await?,
        };
        let response = match sender.send_request(request.clone()).await {
            // Closed before anything was sent: any client library would try once more.
            Err(error) if error.is_canceled() => {
                sender = self.open().await?;
                sender.send_request(request).await?
            }
            sent => sent?,
        };
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, body, sender))
    }

    async fn open(&self) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
        let stream = TcpStream::connect(self.address).await.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

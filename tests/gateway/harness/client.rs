//! A client that sees what a service team's would: status, headers, bytes.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::{KEY, TASK_INFO};

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The answer is the gateway's own: upstream's envelope, its `code` the status, its message naming the gateway.
    #[track_caller]
    pub fn assert_is_our_error(&self, status: u16) {
        assert_eq!(self.status, status, "{self:?}");
        let envelope = self.json();
        assert_eq!(envelope["code"], status);
        assert!(
            envelope["data"].is_null() && envelope.as_object().unwrap().contains_key("data"),
            "{envelope}"
        );
        assert!(
            envelope["message"].as_str().unwrap().contains("crun-gateway"),
            "{envelope}"
        );
        assert_eq!(self.header("content-type"), Some("application/json"));
        self.assert_is_signed();
    }

    /// What every answer carries.
    #[track_caller]
    pub fn assert_is_signed(&self) {
        assert_eq!(self.header("cache-control"), Some("no-store"), "{self:?}");
        assert_eq!(self.header("via"), Some("1.1 crun-gateway"), "{self:?}");
        assert!(
            self.header("cache-status").unwrap().starts_with("crun-gateway"),
            "{self:?}"
        );
        assert!(self.header("age").unwrap().parse::<u64>().is_ok(), "{self:?}");
        assert!(self.header("x-request-id").is_some_and(|id| !id.is_empty()), "{self:?}");
    }
}

/// Sends one request on a connection of its own.
pub async fn request(address: SocketAddr, request: Request<Full<Bytes>>) -> Reply {
    try_request(address, request).await.unwrap()
}

/// The same, where the connection may fail.
pub async fn try_request(address: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Reply> {
    over(TcpStream::connect(address).await?, request).await
}

/// The same, over any stream.
pub async fn over<S>(stream: S, request: Request<Full<Bytes>>) -> anyhow::Result<Reply>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    Ok(Reply {
        status: head.status,
        headers: head.headers,
        body,
    })
}

/// A request without a key.
pub fn bare(method: Method, path_and_query: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(path_and_query)
        .header("host", "gateway")
        .body(Full::default())
        .unwrap()
}

/// A poll of `task`, which needs no escaping.
pub fn poll_request(key: &str, task: &str) -> Request<Full<Bytes>> {
    let mut request = bare(Method::GET, &format!("{TASK_INFO}?task_id={task}"));
    request.headers_mut().insert("x-api-key", key.parse().unwrap());
    request
}

/// Polls `task` with the usual key.
pub async fn poll(address: SocketAddr, task: &str) -> Reply {
    poll_as(address, KEY, task).await
}

/// Polls `task` with `key`.
pub async fn poll_as(address: SocketAddr, key: &str, task: &str) -> Reply {
    request(address, poll_request(key, task)).await
}

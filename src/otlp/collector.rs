//! The collector that spans are sent to: one connection, one request after another, over the hyper that is there.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio_util::task::AbortOnDropHandle;

use crate::config;
use crate::dial::{self, Dial, Handshake, Stream};
use crate::task;

/// Where OTLP/HTTP takes spans.
const PATH: &str = "/v1/traces";

/// Of an answer, more than that says nothing.
const MOST_ANSWER: usize = 64 << 10;

pub(super) struct Collector {
    dial: Dial,
    tls: Option<Handshake>,
    host: HeaderValue,
    connection: Option<Connection>,
}

/// With its I/O, which ends with it.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    _io: AbortOnDropHandle<()>,
}

/// What the collector said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// It took them, save so many that it will never take.
    Accepted { rejected: u64 },
    /// It cannot now, and may have said when it can.
    Later(StatusCode, Option<Duration>),
    /// It will never take them.
    Refused(StatusCode),
}

/// `ExportTraceServiceResponse`, as far as it is of interest.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Answer {
    partial_success: Partial,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Partial {
    rejected_spans: serde_json::Value,
}

impl Collector {
    pub(super) fn new(endpoint: &Uri, settings: &config::Otlp) -> anyhow::Result<Self> {
        let authority = endpoint.authority().context("otlp.endpoint: no host")?;
        Ok(Self {
            dial: dial::tcp(endpoint.clone()),
            tls: dial::tls(endpoint, settings.ca_file.as_deref(), "otlp")?,
            host: HeaderValue::from_str(authority.as_str()).context("otlp.endpoint: host")?,
            connection: None,
        })
    }

    /// Sends a request's body, and reads the answer.
    ///
    /// Cancel safe: what is under way is cut.
    pub(super) async fn post(&mut self, body: Bytes) -> anyhow::Result<Said> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static(PATH);
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("crun-gateway/", env!("CARGO_PKG_VERSION"))),
        );
        let mut connection = match self.connection.take() {
            Some(kept) if !kept.sender.is_closed() => kept,
            Some(_) | None => self.connect().await?,
        };
        connection.sender.ready().await?;
        let (head, body) = connection.sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MOST_ANSWER).collect().await;
        let body = body.map_err(anyhow::Error::from_boxed)?.to_bytes();
        self.connection = Some(connection);
        let wait = || task::retry_after(head.headers.get(RETRY_AFTER)?.to_str().ok()?, SystemTime::now());
        Ok(match head.status {
            status if status.is_success() => Said::Accepted {
                rejected: rejected(&body),
            },
            status @ (StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT) => Said::Later(status, wait()),
            status => Said::Refused(status),
        })
    }

    async fn connect(&self) -> anyhow::Result<Connection> {
        let raw = (self.dial)().await?;
        let stream: Box<dyn Stream> = match &self.tls {
            Some((connector, name)) => Box::new(connector.connect(name.clone(), raw).await?),
            None => raw,
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let io = tokio::spawn(async move {
            // How it ends, the request that is under way learns.
            let _ = connection.await;
        });
        Ok(Connection {
            sender,
            _io: AbortOnDropHandle::new(io),
        })
    }
}

/// A 64-bit integer, which is text in JSON, and a number with some.
fn rejected(answer: &[u8]) -> u64 {
    let answer: Answer = serde_json::from_slice(answer).unwrap_or_default();
    let spans = answer.partial_success.rejected_spans;
    spans
        .as_u64()
        .or_else(|| spans.as_str()?.parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejected_spans_are_a_number_or_text() {
        for (answer, count) in [
            ("", 0),
            ("{}", 0),
            ("<html>", 0),
            (r#"{"partialSuccess":{}}"#, 0),
            (r#"{"partialSuccess":{"rejectedSpans":"7","errorMessage":"x"}}"#, 7),
            (r#"{"partialSuccess":{"rejectedSpans":7}}"#, 7),
        ] {
            assert_eq!(rejected(answer.as_bytes()), count, "{answer}");
        }
    }
}

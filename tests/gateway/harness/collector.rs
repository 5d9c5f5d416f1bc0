//! An OpenTelemetry collector: takes spans by OTLP over HTTP, and reads them as the specification says, to the letter.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpSocket;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::PATIENCE;

/// What it does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    Everything,
    /// All but so many spans of each request.
    AllBut(u32),
    /// Nothing: answers with this status.
    Nothing(u16),
    /// Nothing: never answers.
    Hangs,
}

pub struct Collector {
    pub address: SocketAddr,
    takes: Arc<Mutex<Takes>>,
    bodies: Arc<Mutex<Vec<Bytes>>>,
    asked: Arc<Mutex<usize>>,
}

impl Collector {
    pub fn start(takes: Takes) -> Self {
        Self::start_at(socket(), takes, None)
    }

    pub fn start_at(socket: TcpSocket, takes: Takes, tls: Option<TlsAcceptor>) -> Self {
        let listener = socket.listen(64).unwrap();
        let collector = Self {
            address: listener.local_addr().unwrap(),
            takes: Arc::new(Mutex::new(takes)),
            bodies: Arc::default(),
            asked: Arc::default(),
        };
        let shared = [&collector.bodies].map(Arc::clone);
        let (takes, asked) = (Arc::clone(&collector.takes), Arc::clone(&collector.asked));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let ([bodies], takes, asked) = (shared.clone(), Arc::clone(&takes), Arc::clone(&asked));
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, bodies, takes, asked).await,
                        // One that does not trust us is no matter of ours.
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, bodies, takes, asked).await;
                            }
                        }
                    }
                });
            }
        });
        collector
    }

    pub fn takes(&self, takes: Takes) {
        *self.takes.lock() = takes;
    }

    /// How many requests came.
    pub fn asked(&self) -> usize {
        *self.asked.lock()
    }

    /// What it took, as it came.
    pub fn bodies(&self) -> Vec<Bytes> {
        self.bodies.lock().clone()
    }

    /// The spans that it took.
    pub fn spans(&self) -> Vec<Span> {
        self.bodies().iter().flat_map(|body| read(body)).collect()
    }

    /// Waits until the spans that it took are what `is_it` wants.
    pub async fn until(&self, what: &str, is_it: impl Fn(&[Span]) -> bool) -> Vec<Span> {
        let waiting = async {
            loop {
                let spans = self.spans();
                if is_it(&spans) {
                    return spans;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = timeout(PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("no {what} in {:#?}", self.spans()))
    }
}

/// A port that refuses connections until somebody listens.
pub fn socket() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    socket
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    bodies: Arc<Mutex<Vec<Bytes>>>,
    takes: Arc<Mutex<Takes>>,
    asked: Arc<Mutex<usize>>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (bodies, takes, asked) = (Arc::clone(&bodies), *takes.lock(), Arc::clone(&asked));
        async move {
            assert_eq!(request.method(), "POST");
            assert_eq!(request.uri(), "/v1/traces");
            assert_eq!(request.headers()["content-type"], "application/json");
            let body = request.into_body().collect().await.unwrap().to_bytes();
            *asked.lock() += 1;
            let answer = match takes {
                Takes::Everything => "{}".to_owned(),
                Takes::AllBut(count) => {
                    format!(r#"{{"partialSuccess":{{"rejectedSpans":"{count}","errorMessage":"so many"}}}}"#)
                }
                Takes::Nothing(_) => r#"{"code":3,"message":"no"}"#.to_owned(),
                Takes::Hangs => std::future::pending().await,
            };
            let mut response = Response::new(Full::new(Bytes::from(answer)));
            if let Takes::Nothing(status) = takes {
                *response.status_mut() = status.try_into().unwrap();
            } else {
                bodies.lock().push(body);
            }
            Ok::<_, Infallible>(response)
        }
    });
    // How a connection ends is the gateway's business.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ExportTraceServiceRequest {
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ResourceSpans {
    resource: Resource,
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resource {
    attributes: Vec<KeyValue>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScopeSpans {
    scope: Scope,
    spans: Vec<RawSpan>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Scope {
    name: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSpan {
    trace_id: String,
    span_id: String,
    parent_span_id: Option<String>,
    name: String,
    kind: u8,
    start_time_unix_nano: String,
    end_time_unix_nano: String,
    attributes: Vec<KeyValue>,
    links: Vec<Link>,
    status: Status,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyValue {
    key: String,
    value: AnyValue,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum AnyValue {
    StringValue(String),
    IntValue(String),
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Link {
    pub trace_id: String,
    pub span_id: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Status {
    code: Option<u8>,
}

/// One span, read.
#[derive(Clone, Debug)]
pub struct Span {
    pub trace: String,
    pub id: String,
    pub parent: Option<String>,
    pub name: String,
    pub kind: u8,
    pub began: u64,
    pub ended: u64,
    pub says: HashMap<String, String>,
    pub links: Vec<Link>,
    pub has_failed: bool,
}

impl Span {
    #[track_caller]
    pub fn says(&self, key: &str) -> &str {
        self.says.get(key).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }

    pub fn is_child_of(&self, parent: &Self) -> bool {
        self.trace == parent.trace && self.parent.as_ref() == Some(&parent.id)
    }
}

fn read(body: &[u8]) -> Vec<Span> {
    let request: ExportTraceServiceRequest = serde_json::from_slice(body).unwrap();
    let [resource] = request.resource_spans.try_into().unwrap();
    let ResourceSpans { resource, scope_spans } = resource;
    let of: HashMap<_, _> = resource.attributes.into_iter().map(pair).collect();
    assert_eq!(of["service.name"], "crun-gateway");
    assert!(of.contains_key("service.version") && of["service.instance.id"].len() == 36);
    let [ScopeSpans { scope, spans }] = scope_spans.try_into().unwrap();
    assert_eq!(scope.name, "crun_gateway");
    assert!((1..=512).contains(&spans.len()), "{}", spans.len());
    spans.into_iter().map(span).collect()
}

fn pair(KeyValue { key, value }: KeyValue) -> (String, String) {
    let value = match value {
        AnyValue::StringValue(text) => text,
        AnyValue::IntValue(digits) => digits.parse::<i64>().unwrap().to_string(),
    };
    (key, value)
}

fn span(raw: RawSpan) -> Span {
    let is_id = |id: &str, length| {
        id.len() == length
            && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            && id.bytes().any(|b| b != b'0')
    };
    assert!(is_id(&raw.trace_id, 32) && is_id(&raw.span_id, 16), "{raw:?}");
    assert!(raw.parent_span_id.as_ref().is_none_or(|id| is_id(id, 16)), "{raw:?}");
    let links = raw.links.iter();
    assert!(
        links
            .clone()
            .all(|link| is_id(&link.trace_id, 32) && is_id(&link.span_id, 16)),
        "{raw:?}"
    );
    let named = raw.attributes.len();
    let says: HashMap<_, _> = raw.attributes.into_iter().map(pair).collect();
    assert_eq!(says.len(), named, "an attribute twice: {says:?}");
    let (began, ended) = (
        raw.start_time_unix_nano.parse().unwrap(),
        raw.end_time_unix_nano.parse().unwrap(),
    );
    assert!(began <= ended);
    Span {
        trace: raw.trace_id,
        id: raw.span_id,
        parent: raw.parent_span_id,
        name: raw.name,
        kind: raw.kind,
        began,
        ended,
        says,
        links: raw.links,
        has_failed: raw.status.code == Some(2),
    }
}

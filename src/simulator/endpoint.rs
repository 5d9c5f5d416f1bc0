//! The endpoints of the simulated upstream: one request becomes one response.
//!
//! What counts is `TaskInfo`: every method on exactly that path. `/__stats` and `/__reset` never count.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use flate2::Crc;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use parking_lot::{Mutex, MutexGuard};
use serde_json::json;
use uuid::Uuid;

use super::answer::{self, Payload, json as json_response, of_type, payload, with_status};
use super::arrival::unix_ns;
use super::body::{envelope, message_envelope};
use super::ledger::{Ledger, Verdict};
use super::link::Link;
use super::options::UpstreamArgs;
use super::steer::{Case, KeyCase, case, key_case};

const TASK_INFO: &str = "/api/v1/client/job/TaskInfo";
const KEY: &str = "x-api-key";

/// What all connections share.
pub(super) struct Endpoints {
    args: UpstreamArgs,
    ledger: Mutex<Ledger>,
}

impl Endpoints {
    pub(super) fn new(args: &UpstreamArgs) -> Self {
        Self {
            ledger: Mutex::new(Ledger::new(args.limit, args.account_keys.clone())),
            args: args.clone(),
        }
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock()
    }

    /// Answers one request. Fails only where the request's own body does.
    pub(super) async fn answer(
        &self,
        link: Arc<Link>,
        request: Request<Incoming>,
    ) -> hyper::Result<Response<AnswerBody>> {
        link.begin();
        let response = self.respond(&link, request).await?;
        Ok(response.map(|body| AnswerBody { body, link }))
    }

    async fn respond(&self, link: &Link, request: Request<Incoming>) -> hyper::Result<Response<Payload>> {
        let arrival = link.arrival();
        let path = request.uri().path();
        if path == TASK_INFO {
            return Ok(self.task_info(link, arrival, &request).await);
        }
        if !path.starts_with("/__") {
            self.ledger().elsewhere(path);
        }
        let (method, path) = (request.method().clone(), path.to_owned());
        match (method, path.as_str()) {
            (Method::GET, "/__stats") => Ok(self.stats()),
            (Method::POST, "/__reset") => {
                self.ledger().reset();
                Ok(json_response("{}"))
            }
            (Method::POST, "/api/v1/client/job/CreateTask") => {
                request.into_body().collect().await?;
                self.latency_since(arrival, self.args.latency).await;
                Ok(json_response(
                    json!({"code": 200, "message": "success", "data": {"task_id": Uuid::now_v7().to_string()}})
                        .to_string(),
                ))
            }
            (Method::GET, "/api/v1/client/account/balance") => {
                self.latency_since(arrival, self.args.latency).await;
                Ok(json_response(
                    r#"{"code":200,"message":"success","data":{"balance":1000}}"#,
                ))
            }
            (Method::POST, "/api/v1/chat/completions") => {
                request.into_body().collect().await?;
                Ok(chat())
            }
            (Method::POST, "/api/v1/mirror") => Ok(mirror(request)),
            (_, path) if path == "/api/v1/echo" || path.starts_with("/api/v1/echo/") => echo(request).await,
            _ => Ok(with_status(404, json_response(message_envelope(404, "Not Found")))),
        }
    }

    async fn task_info(&self, link: &Link, arrival: u64, request: &Request<Incoming>) -> Response<Payload> {
        let key = request.headers().get(KEY).and_then(|key| key.to_str().ok());
        let id = task_id(request.uri().query().unwrap_or_default());
        let verdict = self.ledger().arrived(key, id.as_deref(), arrival);
        let case = id.as_deref().map_or(Case::Runs, case);
        let latency = case.latency().unwrap_or(self.args.latency);
        self.latency_since(arrival, latency).await;
        let key_case = key.map_or(KeyCase::Accepted, key_case);
        match (verdict, key_case) {
            (Verdict::NoKey, _) => with_status(401, json_response(message_envelope(401, "API key missing"))),
            (_, KeyCase::Refused) => with_status(401, json_response(envelope(401))),
            (_, KeyCase::RefusedInBody) => json_response(envelope(401)),
            (_, KeyCase::Disabled) => with_status(403, json_response(envelope(403))),
            (_, KeyCase::NoCredits) => with_status(402, json_response(envelope(402))),
            (Verdict::OverLimit, KeyCase::Accepted) => {
                answer::rate_limited(self.args.rate_limit_form, self.args.retry_after)
            }
            (_, KeyCase::Accepted) if !matches!(*request.method(), Method::GET | Method::HEAD) => {
                with_status(405, json_response(envelope(405)))
            }
            (Verdict::NoTask, KeyCase::Accepted) => with_status(422, json_response(envelope(422))),
            (Verdict::Seen(sight), KeyCase::Accepted) => {
                let id = id.as_deref().unwrap_or_default();
                answer::task(&self.args, link, id, &case, sight).await
            }
        }
    }

    fn stats(&self) -> Response<Payload> {
        let stats = self.ledger().stats();
        stats.map_or_else(|_| with_status(500, json_response(envelope(500))), json_response)
    }

    /// Waits until `latency` has passed since the arrival.
    async fn latency_since(&self, arrival: u64, latency: Duration) {
        let passed = Duration::from_nanos(unix_ns(SystemTime::now()).saturating_sub(arrival));
        let left = latency.saturating_sub(passed);
        if !left.is_zero() {
            tokio::time::sleep(left).await;
        }
    }
}

fn task_id(query: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes())
        .find(|(name, _)| name == "task_id")
        .map(|(_, id)| id.into_owned())
        .filter(|id| !id.is_empty())
}

/// Five events, 100 ms apart, and the end.
fn chat() -> Response<Payload> {
    let events = stream::unfold(1, |number| async move {
        let event = match number {
            1..=5 => format!(
                "data: {{\"id\":\"simulated\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\
                 \"delta\":{{\"content\":\"word{number} \"}}}}]}}\n\n"
            ),
            6 => "data: [DONE]\n\n".to_owned(),
            _ => return None,
        };
        if (2..=5).contains(&number) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Some((Ok(Frame::data(Bytes::from(event))), number + 1))
    });
    let mut response = of_type("text/event-stream", "");
    *response.body_mut() = payload(StreamBody::new(events));
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// The request's body, as it comes in.
fn mirror(request: Request<Incoming>) -> Response<Payload> {
    let mut response = of_type("application/octet-stream", "");
    *response.body_mut() = request.into_body().boxed_unsync();
    response
}

/// What came in, told as JSON.
async fn echo(request: Request<Incoming>) -> hyper::Result<Response<Payload>> {
    let (parts, mut body) = request.into_parts();
    let (mut length, mut checksum) = (0, Crc::new());
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            length += data.len();
            checksum.update(&data);
        }
    }
    let told = json!({
        "method": parts.method.as_str(),
        "path": parts.uri.path_and_query().map(http::uri::PathAndQuery::as_str),
        "headers": headers(&parts.headers),
        "body_length": length,
        "body_crc32": checksum.sum(),
    });
    Ok(json_response(told.to_string()))
}

fn headers(headers: &HeaderMap) -> serde_json::Map<String, serde_json::Value> {
    let values = |name| {
        let values = headers.get_all(name).iter();
        values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect()
    };
    headers.keys().map(|name| (name.to_string(), values(name))).collect()
}

/// A body that tells its connection when it has been handed over.
pub(super) struct AnswerBody {
    body: Payload,
    link: Arc<Link>,
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.link.end();
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

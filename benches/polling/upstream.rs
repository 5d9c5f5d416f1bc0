//! The model upstream: 15 queries a second, answers by the tasks' own clock, everything else is 429.
//!
//! How the vendor limits is not documented, so it is modelled in the way that is kindest to a fleet that polls without a
//! gateway: a query that was refused does not count against the next ones.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use crun_gateway::dial::{Dial, Stream};
use http::header::RETRY_AFTER;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{DuplexStream, duplex};
use tokio::time::{Instant, sleep};

use crate::tasks::{self, Task};

/// Arrivals that are answered in any sliding second.
pub const LIMIT: usize = 15;

const LATENCY: Duration = Duration::from_millis(100);

/// A buffer that holds any message here.
pub const PIPE: usize = 1 << 14;

/// One account's upstream.
pub struct Upstream {
    start: Instant,
    tasks: Arc<[Task]>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// When the last ones arrived that were answered.
    answered: VecDeque<Duration>,
    arrivals: Vec<Arrival>,
    refused: usize,
}

/// A query, since the start.
#[derive(Clone, Copy)]
pub struct Arrival {
    pub at: Duration,
    pub refused: bool,
}

impl Upstream {
    pub fn new(start: Instant, tasks: Arc<[Task]>) -> Arc<Self> {
        Arc::new(Self {
            start,
            tasks,
            seen: Mutex::default(),
        })
    }

    /// Every query so far, in order.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.seen.lock().arrivals.clone()
    }

    /// A connection in memory.
    pub fn connect(self: &Arc<Self>) -> DuplexStream {
        let (near, far) = duplex(PIPE);
        let upstream = Arc::clone(self);
        let service = service_fn(move |request: Request<Incoming>| {
            let response = upstream.answer(&request);
            async move {
                sleep(LATENCY).await;
                Ok::<_, Infallible>(response)
            }
        });
        // However it ends, there is nobody to tell.
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(far), service));
        near
    }

    /// The way here for a gateway.
    pub fn dial(self: &Arc<Self>) -> Dial {
        let upstream = Arc::clone(self);
        Arc::new(move || {
            let connection: Box<dyn Stream> = Box::new(upstream.connect());
            Box::pin(std::future::ready(Ok(connection)))
        })
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let now = self.start.elapsed();
        if let Some(refusal) = self.seen.lock().refuse(now) {
            return refusal;
        }
        let id = request.uri().query().unwrap().strip_prefix("task_id=").unwrap();
        let status = self.tasks[tasks::number(id)].status(now);
        let result = if status == "success" {
            r#"{"code":200,"message":"success","media_urls":["https://media.example/a.mp3"]}"#
        } else {
            "null"
        };
        let body = format!(
            r#"{{"code":200,"message":"success","data":{{"task_id":"{id}","status":"{status}","result":{result}}}}}"#
        );
        Response::new(Full::new(Bytes::from(body)))
    }
}

impl Seen {
    /// A 429, if too many were answered in the second before `now`. None is documented to say for how long, and others of
    /// the vendor's kind do: every other one here does.
    fn refuse(&mut self, now: Duration) -> Option<Response<Full<Bytes>>> {
        let is_over = |at: &Duration| *at + Duration::from_secs(1) <= now;
        while self.answered.front().is_some_and(is_over) {
            self.answered.pop_front();
        }
        let refused = self.answered.len() >= LIMIT;
        self.arrivals.push(Arrival { at: now, refused });
        if !refused {
            self.answered.push_back(now);
            return None;
        }
        self.refused += 1;
        let body = r#"{"code":429,"message":"Rate limit exceeded","data":null}"#;
        let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
        *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        if self.refused.is_multiple_of(2) {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        Some(response)
    }
}

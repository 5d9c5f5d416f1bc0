//! One service: it polls over connections that it keeps, as HTTP libraries do.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, RETRY_AFTER};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::DuplexStream;
use tokio::time::timeout;

/// The company's one key.
const KEY: &str = "ak_company";

/// The shortest that a real client waits for an answer.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Opens a connection to what is polled, on behalf of the client with this number.
pub type Connect = Arc<dyn Fn(usize) -> DuplexStream + Send + Sync>;

pub struct Client {
    number: usize,
    connect: Connect,
    idle: Mutex<Vec<SendRequest<Empty<Bytes>>>>,
}

/// What a poll says to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    GoesOn,
    Ended,
    /// Anything but the task's state; and how long the client shall wait, if it says so.
    Error(Option<Duration>),
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    data: Data<'a>,
}

#[derive(Deserialize)]
struct Data<'a> {
    status: &'a str,
}

impl Client {
    pub fn new(number: usize, connect: Connect) -> Self {
        Self {
            number,
            connect,
            idle: Mutex::default(),
        }
    }

    /// Every other one waits for as long as an error says; the others poll again when they always do.
    pub fn heeds_retry_after(&self) -> bool {
        self.number.is_multiple_of(2)
    }

    pub async fn poll(&self, id: &str) -> Said {
        let Ok((response, body)) = timeout(TIMEOUT, self.get(id)).await else {
            return Said::Error(None);
        };
        if response.status() != StatusCode::OK {
            let retry_after = response.headers().get(RETRY_AFTER);
            let seconds = retry_after.map(|value| value.to_str().unwrap().parse().unwrap());
            return Said::Error(seconds.map(Duration::from_secs));
        }
        let Envelope { data } = serde_json::from_slice(&body).unwrap();
        match data.status {
            "pending" | "running" => Said::GoesOn,
            "success" => Said::Ended,
            other => panic!("no such status: {other}"),
        }
    }

    async fn get(&self, id: &str) -> (Response<()>, Bytes) {
        loop {
            let (mut sender, is_new) = match self.kept() {
                Some(sender) => (sender, false),
                None => (self.open().await, true),
            };
            // One that was kept may have been closed meanwhile.
            let Ok(response) = sender.send_request(request(id)).await else {
                assert!(!is_new, "a connection was closed before it was used");
                continue;
            };
            let (head, body) = response.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            self.idle.lock().push(sender);
            return (Response::from_parts(head, ()), body);
        }
    }

    /// The connection used last, so that those that are not needed grow old.
    fn kept(&self) -> Option<SendRequest<Empty<Bytes>>> {
        let mut idle = self.idle.lock();
        idle.retain(|sender| !sender.is_closed());
        let last = idle.iter().rposition(SendRequest::is_ready)?;
        Some(idle.remove(last))
    }

    async fn open(&self) -> SendRequest<Empty<Bytes>> {
        let (sender, connection) = handshake(TokioIo::new((self.connect)(self.number))).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

fn request(id: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("/api/v1/client/job/TaskInfo?task_id={id}"))
        .header(HOST, "api.crun.ai")
        .header("x-api-key", KEY)
        .body(Empty::new())
        .unwrap()
}

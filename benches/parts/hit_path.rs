//! A hit and a miss, from a request's bytes to its answer's, over a connection in memory: all that the gateway itself does,
//! and nothing of the kernel's. A miss has the upstream's part in it, too: hyper's server in the same process.
//!
//! The client is a stream and no task: each read is one request, each write is checked against the bytes that the answer
//! must end with.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use crun_gateway::account::ApiKey;
use crun_gateway::config::{Account, Config, Key, KeySource};
use crun_gateway::dial::{Dial, Stream};
use crun_gateway::gateway::Gateway;
use crun_gateway::metrics::Metrics;
use crun_gateway::server::serve_connection;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, duplex};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::answer::body;
use crate::runtime;

const KEY: &str = "ak_0123456789abcdef0123456789abcdef";

/// A task's id, of the documented length.
fn id(number: usize) -> String {
    format!("{number:08x}-2f17-43d4-8514-000000000000")
}

/// Asks for each task in turn until `left` is 0.
struct Client {
    /// Each request, and the body that answers it.
    requests: Arc<[(Vec<u8>, Vec<u8>)]>,
    next: usize,
    left: usize,
    is_awaiting: bool,
    /// Of the answer that is awaited, as much as was written.
    written: Vec<u8>,
    reader: Option<Waker>,
    answered: Arc<AtomicUsize>,
}

impl Client {
    fn heard(&mut self) {
        let head = self.written.windows(4).position(|end| end == b"\r\n\r\n");
        let Some(head) = head else { return };
        let expected = &self.requests[self.next].1;
        let came = &self.written[head + 4..];
        if came.len() >= expected.len() {
            assert!(self.written.starts_with(b"HTTP/1.1 200 OK\r\n"), "an error");
            assert!(*came == **expected, "another body");
            self.answered.fetch_add(1, Ordering::Relaxed);
            self.written.clear();
            self.is_awaiting = false;
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
    }
}

/// The size of a body, in bytes.
const BODY: usize = 2048;

impl AsyncRead for Client {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_awaiting {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if self.left > 0 {
            self.left -= 1;
            self.next = (self.next + 1) % self.requests.len();
            self.is_awaiting = true;
            buffer.put_slice(&self.requests[self.next].0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.written.extend_from_slice(bytes);
        self.heard();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        for slice in slices {
            self.written.extend_from_slice(slice);
        }
        self.heard();
        Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        assert!(self.written.is_empty(), "{}", String::from_utf8_lossy(&self.written));
        Poll::Ready(Ok(()))
    }
}

/// An upstream in memory where every task has ended.
fn upstream() -> Dial {
    Arc::new(|| {
        let (near, far) = duplex(1 << 16);
        let service = service_fn(|request: Request<Incoming>| async move {
            let id = request.uri().query().unwrap().strip_prefix("task_id=").unwrap();
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(body(id, BODY)))))
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(far), service));
        let connection: Box<dyn Stream> = Box::new(near);
        Box::pin(std::future::ready(Ok(connection)))
    })
}

/// Polls `of` tasks that have ended by turns, `times` polls in all.
pub fn run(of: usize, times: usize) -> Duration {
    runtime().block_on(polls(of, of, times))
}

/// Polls `times` tasks, each for the first time.
pub fn misses(_: usize, times: usize) -> Duration {
    runtime().block_on(polls(times + 1, 1, times))
}

/// Polls `tasks` by turns, `before` polls that do not count and then `counted` that do.
async fn polls(tasks: usize, before: usize, counted: usize) -> Duration {
    let key = Key {
        key: ApiKey::new(KEY).unwrap(),
        source: KeySource::Env("KEY".to_owned()),
    };
    let mut config = Config {
        accounts: vec![Account {
            name: "music".to_owned(),
            keys: vec![key],
            clients: Vec::new(),
        }],
        ..Config::default()
    };
    config.upstream.url = "http://upstream.example".parse().unwrap();
    config.budget.limit = 1_000_000.try_into().unwrap();
    let limits = config.limits.clone();
    let gateway = Gateway::new(config, upstream(), Arc::new(Metrics::new().unwrap())).unwrap();
    let requests: Arc<[_]> = (0..tasks)
        .map(|task| {
            let request = format!(
                "GET /api/v1/client/job/TaskInfo?task_id={} HTTP/1.1\r\nhost: gateway:8080\r\nx-api-key: {KEY}\r\n\r\n",
                id(task)
            );
            (request.into_bytes(), body(&id(task), BODY))
        })
        .collect();
    let serve = async |next: usize, polls: usize| {
        let answered = Arc::new(AtomicUsize::new(0));
        let client = Client {
            requests: Arc::clone(&requests),
            next,
            left: polls,
            is_awaiting: false,
            written: Vec::with_capacity(1 << 14),
            reader: None,
            answered: Arc::clone(&answered),
        };
        let peer = IpAddr::from(Ipv4Addr::LOCALHOST);
        serve_connection(client, peer, Arc::clone(&gateway), &limits, CancellationToken::new()).await;
        assert_eq!(answered.load(Ordering::Relaxed), polls, "each is answered");
    };
    // For the first, the wait until permits are granted.
    serve(0, before).await;
    let start = Instant::now();
    serve(before, counted).await;
    start.elapsed()
}

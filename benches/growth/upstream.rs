//! An upstream where every task has ended, on a thread of its own.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

use crate::BODY;
use crate::answer::body;

/// How long the answer to a task of this kind takes: everybody is to have asked by then.
pub const SLOW: &str = "slow";
const SLOW_ANSWER: Duration = Duration::from_secs(5);

static CALLS: AtomicUsize = AtomicUsize::new(0);
static REPLIED: Mutex<Option<Instant>> = Mutex::new(None);

/// How often it was asked, and when it last replied.
pub fn seen() -> (usize, Instant) {
    (CALLS.load(Ordering::Relaxed), REPLIED.lock().unwrap())
}

/// Starts it; gives its address.
pub fn start() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
            }
        });
    });
    address
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let task = request.uri().query().unwrap().strip_prefix("task_id=").unwrap();
    CALLS.fetch_add(1, Ordering::Relaxed);
    if task.starts_with(SLOW) {
        sleep(SLOW_ANSWER).await;
    }
    let response = Response::builder().header("content-type", "application/json");
    *REPLIED.lock() = Some(Instant::now());
    Ok(response.body(Full::from(body(task, BODY))).unwrap())
}

//! An upstream of raw bytes: what it answers is what the test says, byte for byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Answers each request, on keep-alive connections, with the bytes that a function of its head gives.
pub struct Scripted {
    pub url: String,
    pub address: SocketAddr,
    queries: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    pub async fn start(delay: Duration, answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let queries = Arc::new(AtomicUsize::new(0));
        let heads = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(answer);
        let (counted, kept) = (Arc::clone(&queries), Arc::clone(&heads));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(
                    stream,
                    delay,
                    Arc::clone(&answer),
                    Arc::clone(&counted),
                    Arc::clone(&kept),
                ));
            }
        });
        Self {
            url: format!("http://{address}"),
            address,
            queries,
            heads,
        }
    }

    /// Answers every request with the same.
    pub async fn always(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(Duration::ZERO, move |_| answer.clone()).await
    }

    /// How many requests came.
    pub fn queries(&self) -> usize {
        self.queries.load(Ordering::SeqCst)
    }

    /// The heads of the requests so far.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().clone()
    }
}

/// A complete answer around `body`.
pub fn response(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

async fn serve<F: Fn(&str) -> Vec<u8>>(
    mut stream: TcpStream,
    delay: Duration,
    answer: Arc<F>,
    queries: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<String>>>,
) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk).await {
                Ok(read @ 1..) => buffer.extend_from_slice(&chunk[..read]),
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        queries.fetch_add(1, Ordering::SeqCst);
        heads.lock().push(head.clone());
        tokio::time::sleep(delay).await;
        if stream.write_all(&answer(&head)).await.is_err() {
            return;
        }
    }
}

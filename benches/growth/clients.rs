//! Clients that poll over connections that they keep.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::{BODY, Load};

/// How many polls were answered, and how long half and 99 of 100 of them took at most.
pub struct Polled {
    pub polls: usize,
    pub p50: Duration,
    pub p99: Duration,
    pub last: Instant,
}

impl Polled {
    fn new(mut took: Vec<Duration>) -> Self {
        took.sort_unstable();
        let polls = took.len();
        Self {
            polls,
            p50: took[polls / 2],
            p99: took[polls * 99 / 100],
            last: Instant::now(),
        }
    }
}

/// Polls everything once.
pub fn poll_each(address: SocketAddr, load: Load) -> Polled {
    each_connection(load, move |mut client, number| async move {
        let mut answer = number;
        while answer < load.answers() {
            client.poll(address, load, answer).await;
            answer += load.connections;
        }
        client.took
    })
}

/// Polls one task from every connection, all at once.
pub fn poll_at_once(address: SocketAddr, load: Load) -> Polled {
    let all = Arc::new(Barrier::new(load.connections));
    each_connection(load, move |mut client, _| {
        let all = Arc::clone(&all);
        async move {
            client.connect(address).await;
            all.wait().await;
            client.poll(address, load, 0).await;
            client.took
        }
    })
}

/// Polls anything, over and over, for so long.
pub fn poll_for(address: SocketAddr, load: Load, each: Duration) -> Polled {
    let is_over = Arc::new(AtomicBool::new(false));
    let all = Arc::new(Barrier::new(load.connections + 1));
    each_connection(load, {
        let (is_over, all) = (Arc::clone(&is_over), Arc::clone(&all));
        move |mut client, number| {
            let (is_over, all) = (Arc::clone(&is_over), Arc::clone(&all));
            async move {
                if number == 0 {
                    tokio::spawn({
                        let (is_over, all) = (Arc::clone(&is_over), Arc::clone(&all));
                        async move {
                            all.wait().await;
                            sleep(each).await;
                            is_over.store(true, Ordering::Relaxed);
                        }
                    });
                }
                client.connect(address).await;
                all.wait().await;
                // Some order that no connection shares with another.
                let mut next = number * 7919;
                while !is_over.load(Ordering::Relaxed) {
                    next = next
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    client.poll(address, load, (next >> 33) % load.answers()).await;
                }
                client.took
            }
        }
    })
}

fn each_connection<F>(load: Load, client: impl Fn(Client, usize) -> F) -> Polled
where
    F: Future<Output = Vec<Duration>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let took = runtime.block_on(async {
        let mut clients = JoinSet::new();
        for number in 0..load.connections {
            clients.spawn(client(Client::default(), number));
        }
        clients.join_all().await
    });
    Polled::new(took.into_iter().flatten().collect())
}

/// One connection, and how long its polls took.
#[derive(Default)]
struct Client {
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
    took: Vec<Duration>,
}

impl Client {
    async fn connect(&mut self, address: SocketAddr) {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        self.stream = Some(stream);
    }

    async fn poll(&mut self, address: SocketAddr, load: Load, answer: usize) {
        if self.stream.is_none() {
            self.connect(address).await;
        }
        let stream = self.stream.as_mut().unwrap();
        let (account, task) = (answer % load.accounts, answer / load.accounts);
        let (kind, task) = if load.kind.is_empty() {
            ("task", task)
        } else {
            (load.kind, 0)
        };
        let request = format!(
            "GET /api/v1/client/job/TaskInfo?task_id={kind}-{task:08x}-2f17-43d4-8514-0000000 HTTP/1.1\r\nhost: gateway\r\n\
             x-api-key: ak_{account:032x}\r\n\r\n"
        );
        let asked = Instant::now();
        stream.write_all(request.as_bytes()).await.unwrap();
        self.buffer.clear();
        let end = loop {
            assert_ne!(stream.read_buf(&mut self.buffer).await.unwrap(), 0, "closed");
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
        };
        assert!(
            self.buffer.starts_with(b"HTTP/1.1 200 "),
            "{}",
            String::from_utf8_lossy(&self.buffer)
        );
        while self.buffer.len() < end + BODY {
            assert_ne!(stream.read_buf(&mut self.buffer).await.unwrap(), 0, "closed");
        }
        self.took.push(asked.elapsed());
    }
}

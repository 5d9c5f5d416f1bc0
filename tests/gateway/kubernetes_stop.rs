//! A stop as Kubernetes does it, with the times of `deploy/base`: the pod leaves the Service's endpoints at 3 s, SIGTERM
//! comes at 5 s, when `preStop` has slept, and SIGKILL would come at 45 s.
//!
//! The Service is a proxy that chooses an endpoint for each connection and keeps to it, as kube-proxy's rules do; beside the
//! pod that stops it has another one, so that whoever connects anew finds somebody.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::harness::raw::{self, RawReply};
use crate::harness::{Gateway, KEY, Raw, Simulator};

const REMOVED: Duration = Duration::from_secs(3);
const SIGTERM: Duration = Duration::from_secs(5);
const SIGKILL: Duration = Duration::from_secs(45);

/// Until when clients ask: those of the stopping pod have all come back to the Service by then.
const END: Duration = Duration::from_secs(18);

const CREATE: &str = "/api/v1/client/job/CreateTask";

/// The Service.
struct Service {
    address: SocketAddr,
    endpoint: Arc<Mutex<SocketAddr>>,
    /// What a connection saw other than a clean end, on either side.
    faults: Arc<Mutex<Vec<String>>>,
}

impl Service {
    async fn before(endpoint: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let endpoint = Arc::new(Mutex::new(endpoint));
        let faults = Arc::new(Mutex::new(Vec::new()));
        let (chosen, seen) = (Arc::clone(&endpoint), Arc::clone(&faults));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (to, seen) = (*chosen.lock(), Arc::clone(&seen));
                tokio::spawn(async move {
                    if let Err(error) = relay(client, to).await {
                        seen.lock().push(format!("to {to}: {error}"));
                    }
                });
            }
        });
        Self {
            address,
            endpoint,
            faults,
        }
    }
}

async fn relay(mut client: TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut pod = TcpStream::connect(to).await?;
    tokio::io::copy_bidirectional(&mut client, &mut pod).await.map(drop)
}

/// A client with a pool of one connection: it does not use one that has ended, and asks again on a new one when the
/// connection ends, cleanly, before the first byte of an answer. Gives how many answers it got.
struct Client {
    number: u64,
    service: SocketAddr,
    pooled: Option<Raw>,
}

impl Client {
    /// Asks, is idle, asks again on the same connection, until `end`.
    async fn ask_until(mut self, end: Instant) -> io::Result<u64> {
        let idle = Duration::from_secs(1 + self.number % 10);
        sleep(Duration::from_millis(self.number * 37 % 1000)).await;
        let mut answers = 0;
        while Instant::now() < end {
            let request = if self.posts() {
                format!("POST {CREATE} HTTP/1.1\r\nhost: gateway\r\nx-api-key: {KEY}\r\ncontent-length: 2\r\n\r\n{{}}")
            } else {
                raw::poll(&format!("running.{}", self.number % 8))
            };
            let reply = self.ask(&request).await?;
            assert!(reply.is(200), "client {}: {reply:?}", self.number);
            answers += 1;
            sleep(idle).await;
        }
        Ok(answers)
    }

    fn posts(&self) -> bool {
        self.number.is_multiple_of(3)
    }

    async fn ask(&mut self, request: &str) -> io::Result<RawReply> {
        loop {
            let mut connection = match self.pooled.take() {
                Some(pooled) if !pooled.has_ended()? => pooled,
                _ => Raw::try_connect(self.service).await?,
            };
            connection.send(request).await?;
            if let Some(reply) = connection.try_reply().await? {
                self.pooled = (!reply.says_close()).then_some(connection);
                return Ok(reply);
            }
        }
    }
}

#[tokio::test]
async fn no_client_of_the_service_sees_a_reset_and_no_post_is_lost_or_doubled() {
    // Of another account than the other pod's, so that the two need not share a budget.
    let (upstream, others) = (Simulator::start(&[]).await, Simulator::start(&[]).await);
    let mut stopping = Gateway::start(&upstream.url, "").await;
    let other = Gateway::start(&others.url, "").await;
    let service = Service::before(stopping.address).await;
    let start = Instant::now();

    let mut clients = JoinSet::new();
    for number in 0..60 {
        let client = Client {
            number,
            service: service.address,
            pooled: None,
        };
        clients.spawn(async move { (client.posts(), client.ask_until(start + END).await) });
    }
    // Asked before SIGTERM, answered long after it.
    let address = service.address;
    let slow = tokio::spawn(async move {
        let mut connection = Raw::connect(address).await;
        sleep_until(start + SIGTERM - Duration::from_millis(500)).await;
        connection.poll("slow-7s.a").await
    });

    sleep_until(start + REMOVED).await;
    *service.endpoint.lock() = other.address;
    sleep_until(start + SIGTERM).await;
    let before = upstream.stats().await["paths"][CREATE].as_u64().unwrap();
    stopping.terminate();
    let exit = timeout_at(start + SIGKILL, stopping.exit()).await;
    assert_eq!(exit.expect("no SIGKILL").code(), Some(0));

    assert!(slow.await.unwrap().is(200));
    let mut posted = 0;
    for (posts, answers) in clients.join_all().await {
        let answers = answers.expect("neither a reset nor half an answer");
        assert!(answers >= 2, "each was served before and after");
        posted += if posts { answers } else { 0 };
    }
    assert!(service.faults.lock().is_empty(), "{:?}", service.faults.lock());
    let created = |stats: serde_json::Value| stats["paths"][CREATE].as_u64().unwrap();
    let by_stopping = created(upstream.stats().await);
    assert!(by_stopping > before, "the pod served on its connections after SIGTERM");
    assert_eq!(by_stopping + created(others.stats().await), posted);
}

//! A client of raw bytes: what it sends is what the test says, and it can tell an end from a reset.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::process::PATIENCE;
use super::{KEY, TASK_INFO};

/// One connection.
pub struct Raw<S = TcpStream> {
    pub stream: S,
    buffer: Vec<u8>,
}

/// One answer, framed by its Content-Length.
#[derive(Debug, PartialEq, Eq)]
pub struct RawReply {
    pub head: String,
    pub body: Vec<u8>,
}

impl RawReply {
    pub fn is(&self, status: u16) -> bool {
        self.head.starts_with(&format!("HTTP/1.1 {status} ")) || self.head.starts_with(&format!("HTTP/1.0 {status} "))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn says_close(&self) -> bool {
        self.header("connection")
            .is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

/// The value of a head's first line with this name.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (given, value) = line.split_once(':')?;
        given.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).await.unwrap()
    }

    pub async fn try_connect(address: SocketAddr) -> io::Result<Self> {
        TcpStream::connect(address).await.map(Self::over)
    }

    /// Whether the other side has ended the connection, cleanly, as far as is known now.
    pub fn has_ended(&self) -> io::Result<bool> {
        match self.stream.try_read(&mut [0]) {
            Ok(0) => Ok(true),
            Ok(_) => Err(io::Error::other("bytes that nobody asked for")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// The other side of a connection that was accepted, or one in memory.
    pub fn over(stream: S) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// The next request's head; `None` at the end, however it comes.
    pub async fn head(&mut self) -> Option<String> {
        loop {
            if let Some(head) = self.take_head() {
                return Some(head);
            }
            if self.fill().await.ok()? == 0 {
                return None;
            }
        }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref()).await
    }

    /// The next answer; `None` when the connection ends, without a reset, before its first byte.
    pub async fn try_reply(&mut self) -> io::Result<Option<RawReply>> {
        timeout(PATIENCE, self.next()).await.expect("an answer or an end")
    }

    pub async fn reply(&mut self) -> RawReply {
        self.try_reply().await.unwrap().expect("an answer")
    }

    /// Sends one poll and gives its answer.
    pub async fn poll(&mut self, task: &str) -> RawReply {
        self.send(poll(task)).await.unwrap();
        self.reply().await
    }

    /// Waits for the next bytes, as many as come at once; none is the end.
    pub async fn some(&mut self) -> io::Result<Vec<u8>> {
        if !self.buffer.is_empty() {
            return Ok(std::mem::take(&mut self.buffer));
        }
        let mut chunk = vec![0; 65536];
        let read = timeout(PATIENCE, self.stream.read(&mut chunk))
            .await
            .expect("bytes or an end")?;
        chunk.truncate(read);
        Ok(chunk)
    }

    /// Waits until what has come holds `text`, and gives it all.
    pub async fn until(&mut self, text: &str) -> String {
        let mut all = Vec::new();
        loop {
            let some = self.some().await.unwrap();
            assert!(
                !some.is_empty(),
                "ended without {text:?}: {}",
                String::from_utf8_lossy(&all)
            );
            all.extend(some);
            let seen = String::from_utf8_lossy(&all);
            if seen.contains(text) {
                return seen.into_owned();
            }
        }
    }

    /// The other side ends the connection, cleanly and without another byte.
    pub async fn assert_ends(&mut self) {
        let some = self.some().await.expect("a FIN, not a reset");
        assert_eq!(String::from_utf8_lossy(&some), "");
    }

    async fn next(&mut self) -> io::Result<Option<RawReply>> {
        let head = loop {
            if let Some(head) = self.take_head() {
                break head;
            }
            if self.fill().await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        };
        let length = header(&head, "content-length").map_or(0, |length| length.parse().unwrap());
        let body = self.body(length).await?;
        Ok(Some(RawReply { head, body }))
    }

    /// The body of so many bytes that follows a head.
    pub async fn body(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn take_head(&mut self) -> Option<String> {
        let end = self.buffer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
        Some(String::from_utf8(self.buffer.drain(..end).collect()).unwrap())
    }

    async fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = vec![0; 16384];
        let read = self.stream.read(&mut chunk).await?;
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(read)
    }
}

/// A poll of `task`, on a connection that stays open.
pub fn poll(task: &str) -> String {
    format!("GET {TASK_INFO}?task_id={task} HTTP/1.1\r\nhost: gateway\r\nx-api-key: {KEY}\r\n\r\n")
}

/// Polls an ended task over some connections, without a pause, until what this gives is dropped; each answer has to be a 200.
pub fn keep_hitting(address: SocketAddr) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        clients.spawn(async move {
            let mut client = Raw::connect(address).await;
            loop {
                let reply = client.poll("ended.a").await;
                assert!(reply.is(200), "{reply:?}");
            }
        });
    }
    clients
}

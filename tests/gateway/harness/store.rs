//! A real Redis server, and a link to it that a test can cut or slow down: one for each replica.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::PATIENCE;

/// A server in a process of its own; it is killed with the test.
pub struct Store {
    pub address: SocketAddr,
    child: Child,
    /// What it writes into: a copy does, and whoever starts there would begin with that.
    _directory: tempfile::TempDir,
}

/// A port of which no connection is given the number: where a store was, the next one shall find its place free.
fn free_address() -> SocketAddr {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let first: u16 = range.split_whitespace().next().unwrap().parse().unwrap();
    loop {
        let address = SocketAddr::from(([127, 0, 0, 1], rand::random_range(first / 2..first)));
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

impl Store {
    pub async fn start() -> Self {
        Self::start_at(free_address()).await
    }

    /// Starts it where another has been, with nothing in it.
    pub async fn start_at(address: SocketAddr) -> Self {
        Self::launch(address, &mut server(address.port())).answers().await
    }

    /// Starts it with these environment variables, too.
    pub async fn start_with_env(env: &[(&str, String)]) -> Self {
        let address = free_address();
        let mut command = server(address.port());
        command.envs(env.iter().map(|(name, value)| (name, value)));
        Self::launch(address, &mut command).answers().await
    }

    /// A copy of `primary`.
    pub async fn replica(primary: &Self) -> Self {
        let (address, port) = (free_address(), primary.address.port().to_string());
        let mut command = server(address.port());
        command.args(["--replicaof", "127.0.0.1", &port]);
        Self::launch(address, &mut command).answers().await
    }

    /// A sentinel that watches `primary` as the service `main`, and replaces it after half a second.
    pub async fn sentinel(primary: &Self) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("sentinel.conf");
        let (address, port) = (free_address(), primary.address.port());
        let text = format!(
            "bind 127.0.0.1\nport {}\nsentinel monitor main 127.0.0.1 {port} 1\n\
             sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n",
            address.port()
        );
        std::fs::write(&config, text).unwrap();
        let child = spawn(Command::new("redis-server").arg(&config).arg("--sentinel"));
        let sentinel = Self {
            address,
            child,
            _directory: directory,
        };
        sentinel.answers().await
    }

    /// One that speaks TLS with this certificate, and asks for this password.
    pub async fn guarded(cert: &str, key: &str, password: &str) -> Self {
        let address = free_address();
        let port = address.port().to_string();
        let tls = ["--tls-port", &port, "--tls-cert-file", cert, "--tls-key-file", key];
        let more = ["--tls-auth-clients", "no", "--requirepass", password];
        let store = Self::launch(address, server(0).args(tls).args(more));
        let patience = Instant::now() + PATIENCE;
        while TcpStream::connect(address).await.is_err() {
            assert!(Instant::now() < patience, "redis-server does not listen");
            sleep(Duration::from_millis(10)).await;
        }
        store
    }

    fn launch(address: SocketAddr, command: &mut Command) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            address,
            child: spawn(command.arg("--dir").arg(directory.path())),
            _directory: directory,
        }
    }

    async fn answers(self) -> Self {
        let patience = Instant::now() + PATIENCE;
        while self.command(&["PING"]).is_none_or(|reply| !reply.starts_with("+PONG")) {
            assert!(Instant::now() < patience, "redis-server does not answer");
            sleep(Duration::from_millis(10)).await;
        }
        self
    }

    /// Its reply to a command, up to the first 4 KiB; `None` when there is none within a second.
    pub fn command(&self, words: &[&str]) -> Option<String> {
        let second = Duration::from_secs(1);
        let mut stream = std::net::TcpStream::connect_timeout(&self.address, second).ok()?;
        stream.set_read_timeout(Some(second)).ok()?;
        write!(stream, "*{}\r\n", words.len()).ok()?;
        for word in words {
            write!(stream, "${}\r\n{word}\r\n", word.len()).ok()?;
        }
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..read]).into_owned())
    }

    /// The same, where it has to be taken.
    pub fn must(&self, words: &[&str]) {
        let reply = self.command(words);
        assert!(
            reply.as_deref().is_some_and(|reply| reply.starts_with('+')),
            "{words:?}: {reply:?}"
        );
    }

    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), signal).unwrap();
    }

    /// Ends it at once, with all that it holds.
    pub async fn kill(mut self) -> SocketAddr {
        self.child.kill().await.unwrap();
        self.address
    }
}

/// A server that keeps nothing.
fn server(port: u16) -> Command {
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
    command.args(["--save", "", "--appendonly", "no"]);
    command
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stdin(Stdio::null()).kill_on_drop(true);
    command.spawn().unwrap_or_else(|error| {
        panic!("redis-server cannot be started ({error}): install it, on Debian with `apt-get install redis-server`")
    })
}

/// How a link carries bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carries {
    /// Nothing passes, and nobody is told; what was open then is closed when it ends.
    pub is_cut: bool,
    /// How long requests are on their way.
    pub up: Duration,
    /// How long replies are.
    pub down: Duration,
}

/// The link of one replica. It has a thread of its own: what a test's clients do holds up no reply.
pub struct Link {
    pub address: SocketAddr,
    carries: watch::Sender<Carries>,
}

impl Link {
    pub fn to(store: SocketAddr) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (carries, looks) = watch::channel(Carries::default());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let mut ends = looks.clone();
                tokio::select! {
                    () = accept(TcpListener::from_std(listener).unwrap(), store, looks) => {}
                    _ = ends.wait_for(|_| false) => {}
                }
            });
        });
        Self { address, carries }
    }

    pub fn set(&self, carries: Carries) {
        self.carries.send_replace(carries);
    }
}

async fn accept(listener: TcpListener, store: SocketAddr, looks: watch::Receiver<Carries>) {
    while let Ok((near, _)) = listener.accept().await {
        let looks = looks.clone();
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(store).await else {
                return;
            };
            near.set_nodelay(true).unwrap();
            far.set_nodelay(true).unwrap();
            let (near_reads, near_writes) = near.into_split();
            let (far_reads, far_writes) = far.into_split();
            let up = carry(near_reads, far_writes, looks.clone(), |carries| carries.up);
            let down = carry(far_reads, near_writes, looks.clone(), |carries| carries.down);
            tokio::select! {
                () = up => {}
                () = down => {}
                () = healed(looks) => {}
            }
        });
    }
}

/// Waits until the link was cut, and is no more.
async fn healed(mut carries: watch::Receiver<Carries>) {
    let _ = carries.wait_for(|carries| carries.is_cut).await;
    let _ = carries.wait_for(|carries| !carries.is_cut).await;
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    carries: watch::Receiver<Carries>,
    takes: fn(&Carries) -> Duration,
) {
    let (enters, mut leaves) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let reads = async move {
        let mut buffer = vec![0; 1 << 14];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let now = *carries.borrow();
            if !now.is_cut {
                let _ = enters.send((Instant::now() + takes(&now), buffer[..read].to_vec()));
            }
        }
    };
    let writes = async move {
        while let Some((at, bytes)) = leaves.recv().await {
            // A timer would be up to a millisecond late.
            if at > Instant::now() {
                sleep_until(at).await;
            }
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(reads, writes);
}

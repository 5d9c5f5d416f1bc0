//! The binary under test, as its users start it.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::client::{bare, request};
use super::value_of;

/// Longer than anything here takes: a test that hangs shall say where.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `is_so`; `what` is what a test that waits in vain says.
pub async fn until(what: &str, is_so: impl AsyncFnMut() -> bool) {
    assert!(comes_true(is_so).await, "in vain: {what}");
}

/// Waits until `is_so`: whether it ever is.
async fn comes_true(mut is_so: impl AsyncFnMut() -> bool) -> bool {
    let waiting = async {
        while !is_so().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting).await.is_ok()
}

/// The path of the binary.
pub const BINARY: &str = env!("CARGO_BIN_EXE_crun-gateway");

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end, without a terminal.
pub async fn run(args: &[&str], env: &[(&str, &str)]) -> Ended {
    let mut command = Command::new(BINARY);
    command.args(args).envs(env.iter().copied());
    ended(command).await
}

/// Waits until `command` has ended.
pub async fn ended(mut command: Command) -> Ended {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(PATIENCE, command.output())
        .await
        .expect("the command ends in time")
        .unwrap();
    Ended {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The binary where it can have so many threads, its first one not counted: each takes a GiB of addresses, and there
/// are no more. A limit of threads binds a user, and no root.
pub fn with_threads(threads: u32) -> Command {
    let limited = format!("ulimit -S -v {} && exec \"$0\" \"$@\"", (threads << 20) + (1 << 19));
    let mut command = Command::new("sh");
    command.args(["-c", &limited, BINARY]);
    command.env("RUST_MIN_STACK", (1 << 30).to_string());
    // Else the memory of each thread would take addresses, too.
    command.env("MALLOC_ARENA_MAX", "1");
    command
}

/// A configuration in a file of its own.
pub fn config_file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// `config` (YAML) with what every test has, where it does not say otherwise.
fn complete(upstream: &str, config: &str) -> String {
    let has = |field: &str| config.lines().any(|line| line.starts_with(field));
    let unless_given = [
        ("listen:", "\"127.0.0.1:0\"".to_owned()),
        ("upstream:", format!("{{ url: \"{upstream}\" }}")),
    ];
    let given = unless_given.iter().filter(|(field, _)| !has(field));
    let given: Vec<_> = given.map(|(field, value)| format!("{field} {value}\n")).collect();
    let lines = given.concat();
    format!("{lines}admin: \"127.0.0.1:0\"\nworker_threads: 2\n{config}\n")
}

/// Whoever reads a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    Reads,
    Pauses,
    Leaves,
}

/// A running gateway; it is killed with the test.
pub struct Gateway {
    pub address: SocketAddr,
    pub admin: SocketAddr,
    child: Child,
    log: Arc<Mutex<String>>,
    reader: watch::Sender<Reader>,
    config: tempfile::NamedTempFile,
    upstream: String,
}

impl Gateway {
    /// Starts the gateway in front of `upstream`, with `config` (YAML) added to what every test has.
    pub async fn start(upstream: &str, config: &str) -> Self {
        Self::start_with_env(upstream, config, &[]).await
    }

    pub async fn start_with_env(upstream: &str, config: &str, env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(BINARY);
        command.envs(env.iter().copied());
        Self::start_by(command, upstream, config).await
    }

    /// The same, where so many file descriptors are allowed, softly and at all.
    pub async fn start_with_descriptors(upstream: &str, config: &str, soft: u32, hard: u32) -> Self {
        let limited = format!("ulimit -S -n {soft} && ulimit -H -n {hard} && exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &limited, BINARY]);
        Self::start_by(command, upstream, config).await
    }

    /// The same, where a file may hold so many kilobytes and no more.
    pub async fn start_with_file_size(upstream: &str, config: &str, kilobytes: u32) -> Self {
        // In blocks of 512 bytes.
        let limited = format!("ulimit -f {} && exec \"$0\" \"$@\"", kilobytes * 2);
        let mut command = Command::new("sh");
        command.args(["-c", &limited, BINARY]);
        Self::start_by(command, upstream, config).await
    }

    /// The same, where whatever it prints has to wait, for ever.
    pub async fn start_with_full_stdout(upstream: &str, config: &str) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut fills = writer.try_clone().unwrap();
        std::thread::spawn(move || {
            let _reader = reader;
            while fills.write_all(b"x").is_ok() {}
        });
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" \"$@\" 1>&0", BINARY]).stdin(writer);
        Self::start_by(command, upstream, config).await
    }

    /// The same, where it can have the log's thread, its two workers and the admin port's, and no more.
    pub async fn start_without_threads(upstream: &str, config: &str) -> Self {
        for _ in 0..100 {
            // Whoever looks up a name at once may have the last one before the admin port has.
            if let Ok(gateway) = Self::try_start_by(with_threads(4), upstream, config).await {
                return gateway;
            }
        }
        panic!("the gateway does not start");
    }

    /// From now on it can have as many as it likes.
    pub async fn allow_threads(&self) {
        let pid = self.child.id().unwrap().to_string();
        let allowed = Command::new("prlimit").args(["--pid", &pid, "--as=unlimited"]).status();
        assert!(allowed.await.unwrap().success());
    }

    async fn start_by(command: Command, upstream: &str, config: &str) -> Self {
        let started = Self::try_start_by(command, upstream, config).await;
        started.unwrap_or_else(|log| panic!("the gateway did not start: {log}"))
    }

    /// The gateway, or what it logged when it did not start.
    async fn try_start_by(mut command: Command, upstream: &str, config: &str) -> Result<Self, String> {
        let file = config_file(&complete(upstream, config));
        command.arg("--config").arg(file.path());
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let reader = watch::Sender::new(Reader::Reads);
        let lines = follow(child.stderr.take().unwrap(), Arc::clone(&log), reader.subscribe());
        // Nothing is written there, and if it were it would be seen.
        let stdout = child.stdout.take().unwrap();
        drop(follow(stdout, Arc::clone(&log), reader.subscribe()));
        let serving = timeout(PATIENCE, lines)
            .await
            .expect("the gateway starts in time")
            .unwrap();
        let Some(serving) = serving else {
            return Err(log.lock().clone());
        };
        let json: Option<Value> = serde_json::from_str(&serving).ok();
        let field = |name: &str| {
            let text = match &json {
                Some(line) => line[name].as_str().unwrap(),
                None => serving
                    .split_once(&format!(" {name}="))
                    .unwrap()
                    .1
                    .split_whitespace()
                    .next()
                    .unwrap(),
            };
            text.parse().unwrap()
        };
        Ok(Self {
            address: field("listen"),
            admin: field("admin"),
            child,
            log,
            reader,
            config: file,
            upstream: upstream.to_owned(),
        })
    }

    /// The time that its threads have run, in user and system mode.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id().unwrap())).unwrap();
        // The name may hold spaces; `utime` and `stime` are the 12th and 13th behind it, in hundredths of a second.
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        Duration::from_millis(fields.map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum())
    }

    /// Everything logged so far, and whatever else was printed.
    pub fn log(&self) -> String {
        self.log.lock().clone()
    }

    /// Waits until so many lines with `text` are logged, and gives everything logged by then.
    pub async fn logged(&self, text: &str, times: usize) -> String {
        let is_there = comes_true(async || self.log().matches(text).count() >= times).await;
        let log = self.log();
        assert!(is_there, "not {times} times {text:?} in\n{log}");
        log
    }

    /// What whoever reads what it logs and prints does from the next line on.
    pub fn reader(&self, reader: Reader) {
        self.reader.send_replace(reader);
    }

    /// Changes its configuration, as `start` made it, and sends SIGHUP.
    pub fn reconfigure(&self, config: &str) {
        let changed = config_file(&complete(&self.upstream, config));
        changed.persist(self.config.path()).unwrap();
        self.signal(nix::sys::signal::SIGHUP);
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal(nix::sys::signal::SIGTERM);
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        send(&self.child, signal);
    }

    /// Ends it at once, by SIGKILL.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    pub async fn exit(&mut self) -> ExitStatus {
        timeout(PATIENCE, self.child.wait())
            .await
            .expect("the gateway ends in time")
            .unwrap()
    }

    /// The admin port's answer: status and text.
    pub async fn admin(&self, path: &str) -> (u16, String) {
        let reply = request(self.admin, bare(http::Method::GET, path)).await;
        (reply.status.as_u16(), String::from_utf8(reply.body.to_vec()).unwrap())
    }

    /// The value of one series, named as in `/metrics`.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.admin("/metrics").await;
        value_of(series, &text)
    }

    /// Waits until `series` has reached `value`.
    pub async fn reaches(&self, series: &str, value: u32) {
        self.comes_to(series, |now| now >= f64::from(value)).await;
    }

    /// Waits until `series` is `value`.
    pub async fn shows(&self, series: &str, value: f64) {
        self.comes_to(series, |now| (now - value).abs() < 0.1).await;
    }

    async fn comes_to(&self, series: &str, is_there: impl Fn(f64) -> bool) {
        let mut now = f64::NAN;
        let comes = comes_true(async || {
            now = self.metric(series).await;
            is_there(now)
        });
        assert!(comes.await, "{series} stays {now}\n{}", self.log());
    }

    /// Waits until it says that it stops.
    pub async fn drains(&self) {
        let stops = comes_true(async || self.admin("/readyz").await.0 == 503).await;
        assert!(stops, "still ready\n{}", self.log());
    }
}

fn send(child: &Child, signal: nix::sys::signal::Signal) {
    let id = i32::try_from(child.id().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), signal).unwrap();
}

/// Collects lines while it is read; gives the one that says where the gateway serves.
fn follow<R: AsyncRead + Unpin + Send + 'static>(
    output: R,
    log: Arc<Mutex<String>>,
    mut reader: watch::Receiver<Reader>,
) -> tokio::sync::oneshot::Receiver<Option<String>> {
    let (found, serving) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut found = Some(found);
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            *log.lock() += &(line.clone() + "\n");
            if (line.contains(" serving ") || line.contains("\"serving\""))
                && let Some(found) = found.take()
            {
                let _ = found.send(Some(line));
            }
            // Where the gateway is gone, so is whoever could say so: what it left behind is read.
            let reader = reader.wait_for(|reader| *reader != Reader::Pauses).await;
            if reader.is_ok_and(|reader| *reader == Reader::Leaves) {
                break;
            }
        }
        found.map(|found| found.send(None))
    });
    serving
}

/// A simulated upstream: the binary's own command, in a process of its own.
pub struct Simulator {
    pub url: String,
    pub address: SocketAddr,
    child: Child,
}

impl Simulator {
    pub async fn start(options: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", options).await
    }

    /// Starts it where another has been.
    pub async fn start_at(listen: &str, options: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        command.args(["upstream", "--listen", listen]).args(options);
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = timeout(PATIENCE, lines.next_line())
            .await
            .expect("upstream starts in time")
            .unwrap()
            .unwrap();
        let url = first.strip_prefix("listening on ").unwrap().to_owned();
        let address = url.split_once("//").unwrap().1.parse().unwrap();
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { url, address, child }
    }

    /// Ends it at once; says where it was.
    pub async fn kill(mut self) -> String {
        self.child.kill().await.unwrap();
        self.address.to_string()
    }

    /// Ends it at once, for good: as long as what this gives is there, nobody listens where it was, nor is given its
    /// port.
    pub async fn gone(mut self) -> Socket {
        self.child.kill().await.unwrap();
        let port = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        port.set_reuse_address(true).unwrap();
        port.bind(&self.address.into()).unwrap();
        port
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        send(&self.child, signal);
    }

    /// What it counted.
    pub async fn stats(&self) -> Value {
        request(self.address, bare(http::Method::GET, "/__stats")).await.json()
    }

    /// How many TaskInfo queries arrived.
    pub async fn queries(&self) -> u64 {
        self.stats().await["requests"].as_u64().unwrap()
    }

    /// Waits until so many TaskInfo queries have arrived.
    pub async fn asked(&self, queries: u64) {
        let mut now = 0;
        let comes = comes_true(async || {
            now = self.queries().await;
            now >= queries
        });
        assert!(comes.await, "{now} queries, not {queries}");
    }
}

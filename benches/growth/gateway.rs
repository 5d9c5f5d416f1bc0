//! The binary, with a budget that is no limit.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::NamedTempFile;

pub struct Gateway {
    pub address: SocketAddr,
    child: Child,
    _config: NamedTempFile,
}

impl Gateway {
    /// Starts it before `upstream`.
    pub fn start(upstream: SocketAddr) -> Self {
        let mut config = NamedTempFile::new().unwrap();
        writeln!(
            config,
            "listen: \"127.0.0.1:0\"\nadmin: \"127.0.0.1:0\"\nworker_threads: 1\n\
             upstream: {{ url: \"http://{upstream}\", connections: 64 }}\n\
             budget: {{ limit: 1000000, max_queue: 100000 }}\ncache: {{ max_bytes: 6GiB }}\n\
             limits: {{ requests: 20000 }}"
        )
        .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_crun-gateway"));
        command.arg("--config").arg(config.path()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.find_map(|line| {
            let line = line.unwrap();
            let (_, rest) = line.split_once(" listen=")?;
            Some(rest.split_whitespace().next()?.parse().unwrap())
        });
        // What else it says nobody reads, but it must not be held up.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            address: address.unwrap(),
            child,
            _config: config,
        }
    }

    /// Its resident memory, in bytes.
    pub fn resident(&self) -> usize {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// The processor time that it has taken, the kernel's for it included.
    pub fn cpu(&self) -> Duration {
        // In hundredths of a second, as proc(5) has them on Linux: user and system, the twelfth and the thirteenth after
        // the name.
        let stat = self.proc("stat");
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let ticks = fields
            .split(' ')
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().unwrap());
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

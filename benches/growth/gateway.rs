//! The binary, with a budget that is no limit.

use std::net::SocketAddr;
use std::time::Duration;

use tempfile::NamedTempFile;

use crate::process::{self, Process};

pub struct Gateway {
    pub address: SocketAddr,
    process: Process,
    _config: NamedTempFile,
}

impl Gateway {
    /// Starts it before `upstream`.
    pub fn start(upstream: SocketAddr) -> Self {
        let ((process, config), address) = process::gateway(&format!(
            "worker_threads: 1\n\
             upstream: {{ url: \"http://{upstream}\", connections: 64 }}\n\
             budget: {{ limit: 1000000, max_queue: 100000 }}\ncache: {{ max_bytes: 6GiB }}\n\
             max_accounts: 20000\nlimits: {{ requests: 20000 }}"
        ));
        Self {
            address,
            process,
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
        std::fs::read_to_string(format!("/proc/{}/{file}", self.process.0.id())).unwrap()
    }
}

//! The binary in a process of its own.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::NamedTempFile;

/// A process that ends with the bench.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a gateway with this configuration (YAML); gives it with the file, which it goes on to watch, and its address.
pub fn gateway(config: &str) -> ((Process, NamedTempFile), SocketAddr) {
    let mut file = NamedTempFile::new().unwrap();
    writeln!(file, "listen: \"127.0.0.1:0\"\nadmin: \"127.0.0.1:0\"\n{config}").unwrap();
    let (process, address) = start(&["--config", file.path().to_str().unwrap()], " listen=");
    ((process, file), address)
}

/// Starts the binary; gives the address that its first line with `mark` names behind it.
pub fn start(args: &[&str], mark: &str) -> (Process, SocketAddr) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_crun-gateway"));
    // Where the gateway says that it serves, and where upstream says that it listens.
    let mut child = command
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (found, address) = std::sync::mpsc::channel();
    for output in [Box::new(stdout) as Box<dyn std::io::Read + Send>, Box::new(stderr)] {
        let (found, mark) = (found.clone(), mark.to_owned());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some((_, rest)) = line.split_once(&mark) {
                    let _ = found.send(rest.split_whitespace().next().unwrap().parse().unwrap());
                }
            }
        });
    }
    let address = address.recv_timeout(Duration::from_secs(20)).unwrap();
    (Process(child), address)
}

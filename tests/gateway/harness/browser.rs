//! A headless Chromium, driven through `chromedriver` (W3C, `WebDriver`).

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::client::{bare, request};
use super::process::PATIENCE;

/// A browser with one window; it ends with the test.
pub struct Browser {
    driver: SocketAddr,
    session: String,
    /// The browser's process, once it runs: the driver leaves it behind when it is ended itself.
    process: Option<Pid>,
    _driver: Child,
}

/// Starts a driver; gives its port. `None` of one that ended at once: it takes a port that is free on one of the two loopback
/// addresses, and it may be taken on the other.
async fn driver() -> Option<(Child, u16)> {
    let mut command = Command::new("chromedriver");
    command
        .arg("--port=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().expect("chromedriver: tests/browser/run installs it");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        if let Some((_, port)) = line.split_once("started successfully on port ") {
            let port = port.trim_end_matches('.').parse().unwrap();
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return Some((child, port));
        }
    }
    None
}

impl Browser {
    pub async fn start() -> Self {
        let started = timeout(PATIENCE, async {
            loop {
                if let Some(started) = driver().await {
                    return started;
                }
            }
        });
        let (child, port) = started.await.expect("chromedriver starts in time");
        let mut browser = Self {
            driver: SocketAddr::from(([127, 0, 0, 1], port)),
            session: String::new(),
            process: None,
            _driver: child,
        };
        let quiet = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": quiet },
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let session = browser.say(Method::POST, "", wanted).await;
        let process = session["capabilities"]["goog:processID"].as_i64().unwrap();
        browser.process = Some(Pid::from_raw(process.try_into().unwrap()));
        browser.session = format!("/{}", session["sessionId"].as_str().unwrap());
        browser
    }

    /// Opens an address.
    pub async fn open(&self, url: &str) {
        self.say(Method::POST, "/url", json!({ "url": url })).await;
    }

    /// The value of an expression on the page.
    pub async fn value(&self, expression: &str) -> Value {
        let script = json!({ "script": format!("return {expression};"), "args": [] });
        self.say(Method::POST, "/execute/sync", script).await
    }

    /// Waits until an expression on the page holds.
    pub async fn until(&self, expression: &str) {
        let since = Instant::now();
        while self.value(expression).await != json!(true) {
            let page = async { self.value("document.body.innerText").await };
            assert!(since.elapsed() < PATIENCE, "{expression} never holds:\n{}", page.await);
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the console has shown since it was last asked.
    pub async fn console(&self) -> Vec<String> {
        let entries = self.say(Method::POST, "/se/log", json!({ "type": "browser" })).await;
        entries.as_array().unwrap().iter().map(Value::to_string).collect()
    }

    /// How wide the screen is, in CSS pixels, and whether its user likes it dark.
    pub async fn look(&self, width: u32, is_dark: bool) {
        let scheme = if is_dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", media).await;
        let screen = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", screen).await;
    }

    /// A picture of the whole page, PNG.
    pub async fn picture(&self) -> Vec<u8> {
        let whole = json!({ "captureBeyondViewport": true });
        let picture = self.devtools("Page.captureScreenshot", whole).await;
        STANDARD.decode(picture["data"].as_str().unwrap()).unwrap()
    }

    /// Closes it.
    pub async fn close(mut self) {
        self.say(Method::DELETE, "", Value::Null).await;
        self.process = None;
    }

    async fn devtools(&self, command: &str, parameters: Value) -> Value {
        let command = json!({ "cmd": command, "params": parameters });
        self.say(Method::POST, "/goog/cdp/execute", command).await
    }

    async fn say(&self, method: Method, what: &str, body: Value) -> Value {
        let mut asked = bare(method, &format!("/session{}{what}", self.session));
        asked
            .headers_mut()
            .insert("host", self.driver.to_string().parse().unwrap());
        if !body.is_null() {
            *asked.body_mut() = Bytes::from(body.to_string()).into();
        }
        let reply = timeout(PATIENCE, request(self.driver, asked)).await;
        let reply = reply.expect("the browser answers in time");
        assert_eq!(reply.status, 200, "{what}: {}", String::from_utf8_lossy(&reply.body));
        reply.json()["value"].clone()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Some(process) = self.process {
            let _ = kill(process, Signal::SIGTERM);
        }
    }
}

//! The status page as a person sees it, in headless Chromium. `tests/browser/run` runs these: they need a browser.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::harness::browser::Browser;
use crate::harness::client::{poll_request, try_request};
use crate::harness::{Gateway, Simulator};

const SECRETS: [&str; 4] = [
    "ak_music_secret",
    "ak_video_secret",
    "token_studio_secret",
    "ak_stranger_secret",
];

/// What a client may call itself.
const MARKUP: &str = "<img src=x onerror=alert(1)>";

const WIDE: u32 = 1400;
const NARROW: u32 = 390;

/// A gateway with two accounts, of which one has clients with tokens, and clients that ask all the time.
struct Scene {
    gateway: Gateway,
    _upstream: Simulator,
    _secrets: Vec<tempfile::NamedTempFile>,
    _traffic: JoinSet<()>,
}

impl Scene {
    async fn start() -> Self {
        let upstream = Simulator::start(&["--latency", "150ms", "--run-time", "20s"]).await;
        let secrets: Vec<_> = SECRETS[..3]
            .iter()
            .map(|secret| {
                let mut file = tempfile::NamedTempFile::new().unwrap();
                writeln!(file, "{secret}").unwrap();
                file
            })
            .collect();
        let file = |index: usize| format!("{{ file: \"{}\" }}", secrets[index].path().display());
        let config = format!(
            "accounts:\n  - name: music\n    keys: [{}]\n    clients: [{{ name: studio, token: {} }}]\n  - name: video\n    keys: [{}]\n\
             budget: {{ max_wait: \"30s\" }}",
            file(0),
            file(2),
            file(1)
        );
        let gateway = Gateway::start(&upstream.url, &config).await;
        let mut traffic = JoinSet::new();
        let [music, video, studio, stranger] = SECRETS;
        let clients = [
            (studio, "mixer", 40, ""),
            (studio, MARKUP, 10, ""),
            (
                music,
                "a-batch-job-with-a-rather-long-name-that-somebody-chose-in-2019",
                90,
                "batch.",
            ),
            (music, "shop", 3, ""),
            (video, "shop", 5, ""),
            (video, "too-eager", 1, "body-429."),
            (stranger, "laptop", 2, "ended."),
        ];
        for (key, name, tasks, prefix) in clients {
            for task in 0..tasks {
                let (address, task) = (gateway.address, format!("{prefix}{task}"));
                traffic.spawn(async move {
                    loop {
                        let mut asked = poll_request(key, &task);
                        asked.headers_mut().insert("x-client-id", name.parse().unwrap());
                        // A gateway that is gone is what one test is about.
                        let _ = try_request(address, asked).await;
                        sleep(Duration::from_millis(500)).await;
                    }
                });
            }
        }
        Self {
            gateway,
            _upstream: upstream,
            _secrets: secrets,
            _traffic: traffic,
        }
    }

    fn url(&self) -> String {
        format!("http://{}/status", self.gateway.admin)
    }
}

const CURVE: &str = "document.querySelector('[aria-label=\"Account music\"] .curve').getAttribute('d')";

#[tokio::test]
#[ignore = "needs a browser: tests/browser/run"]
async fn the_status_page_loads_and_updates_by_itself_while_traffic_runs() {
    let scene = Scene::start().await;
    let browser = Browser::start().await;
    browser.open(&scene.url()).await;
    for account in ["music", "video", "other #1"] {
        browser
            .until(&format!(
                "!!document.querySelector('[aria-label=\"Account {account}\"] svg')"
            ))
            .await;
    }
    for update in 0..3 {
        let before = browser.value(CURVE).await;
        assert!(before.as_str().unwrap().len() > 180, "{update}: {before}");
        browser.until(&format!("{CURVE} !== {before}")).await;
    }
    browser.value("document.getElementById('hold').click()").await;
    browser
        .until("document.getElementById('link').textContent.startsWith('held')")
        .await;
    let held = browser.value(CURVE).await;
    browser.value("document.getElementById('hold').click()").await;
    browser.until(&format!("{CURVE} !== {held}")).await;
    let shows = |account: &str, text: &str| {
        format!("document.querySelector('[aria-label=\"Account {account}\"]').innerText.includes({text:?})")
    };
    browser.until(&shows("music", "studio · mixer")).await;
    browser.until(&shows("music", MARKUP)).await;
    browser.until(&shows("video", "paused by upstream")).await;
    assert_eq!(browser.value("document.images.length").await, 0, "a name is text");
    let page = browser.value("document.documentElement.outerHTML").await;
    for secret in SECRETS {
        assert!(!page.as_str().unwrap().contains(secret));
    }
    for (width, is_dark) in [(WIDE, false), (WIDE, true), (NARROW, false), (NARROW, true)] {
        browser.look(width, is_dark).await;
        let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
        assert_eq!(browser.value(overflow).await, 0, "nothing sticks out at {width}");
        let is_light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128";
        assert_eq!(browser.value(is_light).await, !is_dark);
        if let Some(folder) = std::env::var_os("SCREENSHOTS").map(PathBuf::from) {
            let scheme = if is_dark { "dark" } else { "light" };
            std::fs::write(folder.join(format!("{width}-{scheme}.png")), browser.picture().await).unwrap();
        }
    }
    assert_eq!(browser.console().await, Vec::<String>::new());
    browser.close().await;
}

#[tokio::test]
#[ignore = "needs a browser: tests/browser/run"]
async fn the_status_page_says_when_the_gateway_is_gone() {
    let mut scene = Scene::start().await;
    let browser = Browser::start().await;
    browser.open(&scene.url()).await;
    browser
        .until("document.getElementById('link').textContent.startsWith('live')")
        .await;
    assert_eq!(browser.value("document.getElementById('alarm').hidden").await, true);
    scene.gateway.terminate();
    scene.gateway.terminate();
    scene.gateway.exit().await;
    browser
        .until("document.getElementById('link').textContent.startsWith('no answer')")
        .await;
    assert_eq!(browser.value("document.getElementById('alarm').hidden").await, false);
    // What is shown stays, dimmed; it asks ever more seldom.
    assert_eq!(
        browser.value("!!document.querySelector('main.lost-data svg')").await,
        true
    );
    browser
        .until("document.getElementById('link').textContent.endsWith('next try in 8 s')")
        .await;
    browser.close().await;
}

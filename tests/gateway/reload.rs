//! A changed configuration is taken over while the gateway runs, whole or not at all, and loses nothing.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, timeout};
use tracing::Level;
use tracing::subscriber::DefaultGuard;

use crate::harness::listener::listen;
use crate::harness::paused::{Away, Behaviour, Paused, json, most_in_a_second, running, success};
use crate::harness::process::BINARY;
use crate::harness::raw::Raw;
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, PATIENCE, Scripted, Simulator, poll, poll_as};

const TAKEN_OVER: &str = "the changed configuration is taken over";

/// A folder as the kubelet mounts a Secret: the files are links into a folder behind a link, which alone is swapped.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(files: &[(&str, &str)]) -> Self {
        let mounted = Self(tempfile::tempdir().unwrap());
        mounted.swap(files);
        for (name, _) in files {
            symlink(Path::new("..data").join(name), mounted.path(name)).unwrap();
        }
        mounted
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn swap(&self, files: &[(&str, &str)]) {
        let content = tempfile::Builder::new()
            .prefix("..")
            .tempdir_in(self.0.path())
            .unwrap()
            .keep();
        for (name, text) in files {
            fs::write(content.join(name), text).unwrap();
        }
        let link = self.path("..new");
        symlink(&content, &link).unwrap();
        fs::rename(link, self.path("..data")).unwrap();
    }

    /// `{ file: … }`, for a configuration.
    fn file(&self, name: &str) -> String {
        format!("{{ file: \"{}\" }}", self.path(name).display())
    }
}

/// Polls as `token` without a break until told to stop; every answer has to be a 200. Gives how many there were.
fn keep_polling(address: SocketAddr, token: &'static str, stop: &Arc<AtomicBool>) -> JoinSet<usize> {
    let mut clients = JoinSet::new();
    for client in 0..10 {
        let stop = Arc::clone(stop);
        clients.spawn(async move {
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                let task = format!("ended.{client}-{}", answered / 20);
                let reply = poll_as(address, token, &task).await;
                assert_eq!(reply.status, 200, "{reply:?}");
                answered += 1;
            }
            answered
        });
    }
    clients
}

#[tokio::test]
async fn a_key_is_rotated_under_load_without_a_failed_request() {
    let upstream = Simulator::start(&["--latency", "20ms"]).await;
    let secrets = Mounted::new(&[("key", "ak_old"), ("token", "token-app")]);
    let config = format!(
        "accounts: [{{ name: music, keys: [{}], clients: [{{ name: app, token: {} }}] }}]\nbudget: {{ limit: 200 }}",
        secrets.file("key"),
        secrets.file("token")
    );
    let gateway = Gateway::start(&upstream.url, &config).await;
    let stop = Arc::new(AtomicBool::new(false));
    let clients = keep_polling(gateway.address, "token-app", &stop);
    upstream.asked(20).await;
    // Nobody tells the gateway: it finds out.
    secrets.swap(&[("key", "ak_new"), ("token", "token-app")]);
    gateway.logged(TAKEN_OVER, 1).await;
    let before = upstream.stats().await["accounts"].as_array().unwrap().len();
    assert!(before <= 2);
    let new_is_used = async {
        while upstream.stats().await["accounts"].as_array().unwrap().len() < 2 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, new_is_used).await.expect("the new key is sent");
    stop.store(true, Ordering::Relaxed);
    assert!(clients.join_all().await.iter().sum::<usize>() > 100);
    assert_eq!(
        gateway.metric("crun_gateway_config_reload_success").await.to_string(),
        "1"
    );
}

#[tokio::test]
async fn kept_answers_outlive_a_reload_and_a_removed_key_loses_them() {
    let upstream = Scripted::start(Duration::ZERO, |head| {
        let key = head.split_once("x-api-key: ").unwrap().1.split("\r\n").next().unwrap();
        let body = format!(
            r#"{{"code":200,"message":"success","data":{{"task_id":"same","status":"failed","result":{{"message":"for {key}"}}}}}}"#
        );
        response("200 OK", "Content-Type: application/json\r\n", body.as_bytes())
    })
    .await;
    let secrets = Mounted::new(&[("one", "ak_one"), ("two", "ak_two")]);
    let both = format!(
        "accounts: [{{ name: music, keys: [{}, {}] }}]",
        secrets.file("one"),
        secrets.file("two")
    );
    let gateway = Gateway::start(&upstream.url, &both).await;
    let message = async |key| poll_as(gateway.address, key, "same").await.json()["data"]["result"]["message"].clone();
    assert_eq!(message("ak_one").await, "for ak_one");
    gateway.reconfigure(&format!(
        "accounts: [{{ name: music, keys: [{}] }}]",
        secrets.file("one")
    ));
    gateway.logged(TAKEN_OVER, 1).await;
    assert_eq!(message("ak_one").await, "for ak_one");
    assert_eq!(upstream.queries(), 1, "it was kept");
    assert_eq!(message("ak_two").await, "for ak_two", "an account of its own");
    gateway.reconfigure(&format!(
        "unknown_keys: reject\naccounts: [{{ name: music, keys: [{}] }}]",
        secrets.file("one")
    ));
    gateway.logged(TAKEN_OVER, 2).await;
    assert_eq!(poll_as(gateway.address, "ak_two", "same").await.status, 401);
    assert_eq!(message("ak_one").await, "for ak_one");
    assert_eq!(upstream.queries(), 2);
}

#[tokio::test]
async fn a_wrong_configuration_changes_nothing_and_says_what_is_wrong() {
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(&upstream.url, "client_header: x-team").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway.reconfigure("budget: { limit: 0 }\nlog: { level: loud }");
    gateway.logged("is not taken over", 2).await;
    for field in ["budget.limit: ", "log.level: "] {
        assert!(gateway.log().contains(field), "{}", gateway.log());
    }
    assert_eq!(
        gateway.metric("crun_gateway_config_reload_success").await.to_string(),
        "0"
    );
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    // Whoever asks once more hears it once more.
    gateway.signal(nix::sys::signal::SIGHUP);
    gateway.logged("is not taken over", 4).await;
    gateway.reconfigure("budget: { limit: 12 }");
    gateway.logged(TAKEN_OVER, 1).await;
    assert_eq!(
        gateway.metric("crun_gateway_config_reload_success").await.to_string(),
        "1"
    );
    let rate = gateway.metric("crun_gateway_budget_rate{account=\"other\"}").await;
    assert!((rate - 12.0 / 1.03).abs() < 0.01, "{rate}");
}

/// Who is listed nowhere is rejected; what is written of it first says that all are let in.
const CLOSED: &str = "upstream: { url: 'http://upstream' }\nunknown_keys: reject\n";
const HALF: &str = "upstream: { url: 'http://upstream' }\n";

/// A gateway that runs with a configuration in a file that may change.
struct Watching {
    gateway: Paused,
    folder: tempfile::TempDir,
    /// While it is there, what is logged goes to a file.
    _listening: DefaultGuard,
}

impl Watching {
    fn start(configuration: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let watching = Self {
            gateway: Paused::start(Behaviour::default(), |_| {}),
            _listening: listen(log, Level::INFO),
            folder,
        };
        watching.write(configuration);
        watching.gateway.watch(&watching.path());
        watching
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("config.yaml")
    }

    fn write(&self, configuration: &str) {
        fs::write(self.path(), configuration).unwrap();
    }

    /// Whether a key that is listed nowhere is let in.
    async fn lets_in(&self) -> bool {
        self.gateway.poll(KEY, "task").await.status == 200
    }

    /// How many lines with `text` were logged.
    fn said(&self, text: &str) -> usize {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap();
        log.lines().filter(|line| line.contains(text)).count()
    }

    fn is_right(&self) -> bool {
        self.gateway.metric("crun_gateway_config_reload_success") > 0.5
    }
}

/// Until just before it is looked at the first time.
async fn until_the_first_look() {
    sleep(Duration::from_millis(4900)).await;
}

#[tokio::test(start_paused = true)]
async fn a_change_is_taken_over_when_it_reads_the_same_twice_in_a_row() {
    let watching = Watching::start(CLOSED);
    until_the_first_look().await;
    watching.write(HALF);
    sleep(Duration::from_secs(5)).await;
    assert!(!watching.lets_in().await);
    sleep(Duration::from_secs(1)).await;
    assert!(watching.lets_in().await);
    assert_eq!(watching.said(TAKEN_OVER), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_half_written_is_never_in_force() {
    let watching = Watching::start(CLOSED);
    until_the_first_look().await;
    for text in ["", HALF, "upstream: {", CLOSED] {
        watching.write(text);
        sleep(Duration::from_secs(5)).await;
        assert!(!watching.lets_in().await);
    }
    sleep(Duration::from_secs(20)).await;
    assert!(!watching.lets_in().await);
    assert_eq!((watching.said(TAKEN_OVER), watching.said("ERROR")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_file_that_says_nothing_any_more_changes_nothing() {
    let watching = Watching::start(CLOSED);
    for text in ["", "# all that is left\n"] {
        watching.write(text);
        sleep(Duration::from_secs(20)).await;
        assert!(!watching.lets_in().await && !watching.is_right());
    }
    assert_eq!(watching.said("config.yaml: says nothing"), 1);
    // Who means the defaults says so.
    watching.write("{}");
    sleep(Duration::from_secs(20)).await;
    assert!(watching.lets_in().await && watching.is_right());

    let nothing = Watching::start("");
    sleep(Duration::from_secs(20)).await;
    nothing.write("# nothing");
    sleep(Duration::from_secs(20)).await;
    assert_eq!((nothing.said("ERROR"), nothing.lets_in().await), (0, true));
}

#[tokio::test(start_paused = true)]
async fn a_file_that_says_nothing_any_more_is_told_of_though_only_a_restart_would_change_anything() {
    let watching = Watching::start("log: { format: json }");
    watching.write("");
    sleep(Duration::from_secs(20)).await;
    assert_eq!(watching.said("config.yaml: says nothing"), 1);
    assert!(!watching.is_right());
}

#[tokio::test(start_paused = true)]
async fn what_was_read_from_no_regular_file_stays_and_that_is_said_once() {
    let watching = Watching::start(CLOSED);
    fs::remove_file(watching.path()).unwrap();
    // Which gives nothing, like a pipe that has given all.
    symlink("/dev/null", watching.path()).unwrap();
    sleep(Duration::from_mins(1)).await;
    assert!(!watching.lets_in().await);
    assert_eq!((watching.said("no regular file"), watching.said("ERROR")), (1, 0));
}

fn make_pipe(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status();
    assert!(made.unwrap().success());
}

#[tokio::test]
async fn keys_and_roots_that_came_through_a_pipe_stay_and_the_rest_is_taken_over() {
    const REFUSED: &str = "is no regular file";
    let folder = tempfile::tempdir().unwrap();
    let root = rcgen::generate_simple_self_signed(["collector".to_owned()]).unwrap();
    let pipes = [("key", "ak_pipe"), ("token", "tk_pipe"), ("root", &root.cert.pem())].map(|(name, text)| {
        let (path, text) = (folder.path().join(name), text.to_owned());
        make_pipe(&path);
        let file = path.display().to_string();
        // It waits for whoever reads it.
        thread::spawn(move || fs::write(path, text));
        file
    });
    let [key, token, root] = &pipes;
    let config = |key, rest| {
        format!(
            "accounts: [{{ name: music, keys: [{{ file: {key:?} }}], clients: [{{ name: app, token: {{ file: {token:?} \
             }} }}] }}]\notlp: {{ ca_file: {root:?} }}\nunknown_keys: reject\n{rest}"
        )
    };
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(&upstream.url, &config(key, "")).await;
    gateway.reconfigure(&config(key, "log: { level: debug }"));
    gateway.logged(TAKEN_OVER, 1).await;
    for key in ["ak_pipe", "tk_pipe"] {
        assert_eq!(poll_as(gateway.address, key, "ended.a").await.status, 200);
    }
    // Nobody would ever write to another.
    let another = folder.path().join("another").display().to_string();
    make_pipe(Path::new(&another));
    gateway.reconfigure(&config(&another, ""));
    let log = gateway.logged(REFUSED, 1).await;
    assert!(log.contains(&format!("accounts[0].keys[0].file: {REFUSED}")), "{log}");
    gateway.reconfigure(&config(key, ""));
    gateway.logged(TAKEN_OVER, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_is_right_again_is_told_of() {
    const AGAIN: &str = "says again what is in force";
    let watching = Watching::start(CLOSED);
    watching.write("unknown_keys: perhaps");
    sleep(Duration::from_secs(20)).await;
    assert_eq!((watching.said("is not taken over"), watching.said(AGAIN)), (1, 0));
    watching.write(CLOSED);
    sleep(Duration::from_secs(20)).await;
    assert_eq!((watching.said("is not taken over"), watching.said(AGAIN)), (1, 1));
    assert!(watching.is_right());
}

#[tokio::test]
async fn a_hangup_while_the_configuration_is_first_read_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.yaml");
    make_pipe(&path);
    let mut gateway = Command::new(BINARY)
        .arg("--config")
        .arg(&path)
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    // There is somebody to write to once it is about to read.
    let opened = spawn_blocking(move || fs::OpenOptions::new().write(true).open(path));
    let mut config = timeout(PATIENCE, opened).await.unwrap().unwrap().unwrap();
    let id = i32::try_from(gateway.id().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::SIGHUP).unwrap();
    config
        .write_all(b"listen: \"127.0.0.1:0\"\nadmin: \"127.0.0.1:0\"\n")
        .unwrap();
    drop(config);
    let mut log = BufReader::new(gateway.stderr.take().unwrap()).lines();
    let serves = async {
        while !log
            .next_line()
            .await
            .unwrap()
            .expect("it goes on")
            .contains(" serving ")
        {}
    };
    timeout(PATIENCE, serves).await.unwrap();
}

#[tokio::test]
async fn a_request_on_a_connection_from_before_is_told_that_its_time_is_over() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("http://{}", silent.local_addr().unwrap());
    let config = |timeout: &str| {
        format!(
            "upstream: {{ url: \"{upstream}\" }}\nbudget: {{ max_wait: \"1s\" }}\nlimits: {{ request_timeout: \"{timeout}\" }}"
        )
    };
    let gateway = Gateway::start(&upstream, &config("1s")).await;
    let mut before = Raw::connect(gateway.address).await;
    before.send("GET /elsewhere HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(before.reply().await.is(404));
    gateway.reconfigure(&config("1h"));
    gateway.logged(TAKEN_OVER, 1).await;
    before.send("GET /api/v1/x HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let reply = before.reply().await;
    assert!(reply.is(504), "{reply:?}");
}

#[tokio::test]
async fn what_needs_a_restart_is_named_and_the_rest_is_taken_over() {
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    assert!(!gateway.log().contains("poll answered"));
    gateway.reconfigure(
        "cache: { max_bytes: \"64MiB\" }\nlog: { level: debug, format: json }\nlimits: { body_bytes: \"32MiB\" }\notlp: \
         { sample_ratio: 1.0 }",
    );
    gateway.logged(TAKEN_OVER, 1).await;
    gateway.logged("need a restart", 1).await;
    assert!(
        gateway
            .log()
            .contains("fields=\"cache.max_bytes, limits.body_bytes, log.format, otlp\""),
        "{}",
        gateway.log()
    );
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    gateway.logged("poll answered", 1).await;
}

#[tokio::test]
async fn changes_ten_times_a_second_never_bring_more_than_the_limit_upstream() {
    let upstream = Simulator::start(&["--latency", "50ms", "--account-keys", "ak_one,ak_two"]).await;
    let secrets = Mounted::new(&[("one", "ak_one"), ("two", "ak_two")]);
    let (one, two) = (secrets.file("one"), secrets.file("two"));
    // The same account all the time, and never more than 15 a second; who is listed where, and the limit, change.
    let configs = [
        format!("budget: {{ limit: 15, max_wait: \"60s\" }}\naccounts: [{{ name: music, keys: [{one}, {two}] }}]"),
        format!("budget: {{ limit: 14, max_wait: \"60s\" }}\naccounts: [{{ name: music, keys: [{one}, {two}] }}]"),
        format!("budget: {{ limit: 15, max_wait: \"60s\" }}\naccounts: [{{ name: songs, keys: [{two}, {one}] }}]"),
    ];
    let gateway = Gateway::start(&upstream.url, &configs[0]).await;
    let mut polls = JoinSet::new();
    for task in 0..150 {
        let address = gateway.address;
        let key = if task % 2 == 0 { "ak_one" } else { "ak_two" };
        polls.spawn(async move { poll_as(address, key, &format!("ended.{task}")).await });
    }
    // Two changes of the limit in three: an account formed anew grants nothing for a second.
    for change in 0..60 {
        gateway.reconfigure(&configs[change % 2]);
        sleep(Duration::from_millis(100)).await;
    }
    gateway.reconfigure(&configs[2]);
    gateway.logged(TAKEN_OVER, 45).await;
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let stats = upstream.stats().await;
    assert_eq!(stats["violations"], 0, "{stats}");
    assert_eq!(stats["requests"], 150, "nobody was asked about twice");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_comes_under_another_budget_brings_nothing_more_upstream() {
    let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
        config.budget.max_wait = Duration::from_mins(1);
    }));
    let mut polls = JoinSet::new();
    for task in 0..100 {
        let gateway = Arc::clone(&gateway);
        polls.spawn(async move { gateway.poll(KEY, &format!("task-{task}")).await });
    }
    sleep(Duration::from_secs(3)).await;
    let asked = gateway.arrivals().len();
    assert!((20..40).contains(&asked), "{asked}");
    gateway.list(&[("music", &[KEY])]);
    for reply in polls.join_all().await {
        assert_eq!(reply.status, 200, "moved to the new account's queue: {reply:?}");
    }
    let arrivals = gateway.arrivals();
    assert_eq!(arrivals.len(), 100, "nobody was asked about twice");
    assert!(most_in_a_second(&arrivals) <= 15);
    let pause = arrivals[asked] - arrivals[asked - 1];
    assert!(pause >= Duration::from_millis(1030), "{pause:?}");
    assert!(pause <= Duration::from_millis(1130), "{pause:?}");
}

#[tokio::test(start_paused = true)]
async fn nor_does_what_queued_before_the_change_before() {
    let (key, other) = ("ak_moves", "ak_stays");
    let (both, three) = ([other, key], [other, key, "ak_new"]);
    let (one, more) = ([("music", &both[..])], [("music", &three[..])]);
    let (without, two) = ([("music", &both[..1])], [("music", &both[..1]), ("film", &both[1..])]);
    // A key is added, the account goes, and it loses the key: always the same budget, until `film` has one of its own.
    for (before, between) in [(&one[..], &more[..]), (&one, &[]), (&one, &without)] {
        let gateway = Arc::new(Paused::start(Behaviour::default(), |config| {
            config.budget.max_wait = Duration::from_mins(1);
        }));
        gateway.list(before);
        let mut polls = JoinSet::new();
        let mut poll_all = |name: &str| {
            for task in 0..100 {
                let (gateway, task) = (Arc::clone(&gateway), format!("{name}-{task}"));
                polls.spawn(async move { gateway.poll(key, &task).await });
            }
        };
        poll_all("old");
        sleep(Duration::from_secs(3)).await;
        gateway.list(between);
        sleep(Duration::from_millis(500)).await;
        gateway.list(&two);
        poll_all("new");
        for reply in polls.join_all().await {
            assert_eq!(reply.status, 200, "{reply:?}");
        }
        let arrivals = gateway.arrivals_with(key);
        assert_eq!(arrivals.len(), 200, "nobody was asked about twice");
        assert!(most_in_a_second(&arrivals) <= 15, "{}", most_in_a_second(&arrivals));
    }
}

#[tokio::test(start_paused = true)]
async fn upstreams_pause_goes_with_a_key_whatever_budget_it_comes_under() {
    let second = Duration::from_secs(1);
    let (none, music, film): (&[_], _, _) = (&[], [("music", &[KEY][..])], [("film", &[KEY][..])]);
    for (before, after) in [(none, &music[..]), (&music, &film), (&music, none)] {
        let behaviour = Behaviour {
            answer: |count, task| match count {
                0 => {
                    let mut response = json(&serde_json::json!({ "code": 429, "message": "slow down", "data": null }));
                    response.headers_mut().insert("retry-after", 60.into());
                    response
                }
                _ => success(task),
            },
            ..Behaviour::default()
        };
        let gateway = Paused::start(behaviour, |_| {});
        gateway.list(before);
        sleep(2 * second).await;
        assert_eq!(gateway.poll(KEY, "task").await.json()["code"], 429);
        let paused = Instant::now();
        sleep(second).await;
        gateway.list(after);
        let mut polls = 0;
        while gateway.poll(KEY, "task").await.status == 429 {
            polls += 1;
            assert!(polls < 100, "it stays paused");
            sleep(second).await;
        }
        assert!(polls > 3, "each waits for 10 s, or is told at once");
        let next = gateway.arrivals()[1] - paused;
        assert!((59_999..70_000).contains(&next.as_millis()), "{next:?}");
        // And the rate is still cut.
        let rate = gateway.status()["accounts"][0]["rate"].as_f64().unwrap();
        assert!(rate < 14.0, "{rate}");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_polls_after_a_change_is_not_refused_with_a_flight_from_before() {
    let behaviour = Behaviour {
        latency: Duration::from_secs(3),
        answer: |count, task| match count {
            0 => json(&serde_json::json!({ "code": 429, "message": "slow down", "data": null })),
            _ => success(task),
        },
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |_| {}));
    gateway.list(&[("music", &["ak_stays", "ak_moves"])]);
    sleep(Duration::from_secs(2)).await;
    let poll = || {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { gateway.poll("ak_stays", "task").await })
    };
    let before = poll();
    sleep(Duration::from_secs(1)).await;
    gateway.list(&[("music", &["ak_stays"]), ("film", &["ak_moves"])]);
    let after = poll();
    // The first attempt is under way, and what would follow it is on the old account's behalf.
    for reply in [before.await.unwrap(), after.await.unwrap()] {
        assert_eq!(
            (reply.status.as_u16(), &reply.json()["code"]),
            (200, &200.into()),
            "{reply:?}"
        );
    }
    assert_eq!(gateway.arrivals().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_probe_is_not_sent_on_behalf_of_a_budget_that_its_key_has_left() {
    let second = Duration::from_secs(1);
    let behaviour = Behaviour {
        outage: Some((2 * second..10 * second, Away::Status(503))),
        // So that a probe takes a while before it is sent.
        idle: Some(second),
        opening: |_| Duration::from_millis(300),
        ..Behaviour::default()
    };
    let gateway = Arc::new(Paused::start(behaviour, |config| {
        config.budget.limit = NonZeroU32::MIN;
        config.budget.max_wait = 100 * second;
    }));
    gateway.list(&[("music", &["ak_stays", "ak_moves"])]);
    let start = Instant::now();
    sleep(2 * second).await;
    for task in ["a", "b", "a", "b", "a"] {
        assert_eq!(gateway.poll("ak_moves", task).await.status, 503, "upstream's own words");
    }
    sleep(start + 11 * second - Instant::now()).await;
    let (sent, dials) = (gateway.arrivals().len(), gateway.dials().len());
    while gateway.dials().len() == dials {
        assert!(start.elapsed() < 60 * second, "no probe comes");
        gateway.poll("ak_moves", "c").await.assert_is_our_error(503);
        sleep(second / 100).await;
    }
    assert_eq!(gateway.arrivals().len(), sent, "the probe has yet to be sent");
    gateway.list(&[("music", &["ak_stays"]), ("film", &["ak_moves"])]);
    let mut polls = 0;
    while gateway.poll("ak_moves", "d").await.status != 200 {
        polls += 1;
        assert!(polls < 1000);
        sleep(second / 100).await;
    }
    let arrivals = gateway.arrivals();
    assert!(arrivals.len() > sent);
    assert_eq!(most_in_a_second(&arrivals), 1, "{arrivals:?}");
}

#[tokio::test(start_paused = true)]
async fn a_change_holds_for_unlisted_accounts_that_are_known_already() {
    let behaviour = Behaviour {
        answer: |_, task| running(task),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    gateway.poll(KEY, "a").await;
    let told = || {
        let account = &gateway.status()["accounts"][0];
        let of = |field: &str| account[field].as_f64().unwrap().round();
        assert_eq!(account["name"], "other #1");
        (of("rate"), of("freshness_seconds"))
    };
    assert_eq!(told(), (15.0, 2.0));
    gateway.configure(|config| {
        config.budget.limit = NonZeroU32::new(5).unwrap();
        config.cache.fresh.floor = Duration::from_secs(7);
    });
    assert_eq!(told(), (5.0, 7.0));
}

#[tokio::test(start_paused = true)]
async fn an_account_that_is_removed_shows_neither_rate_nor_live_tasks_any_more() {
    let behaviour = Behaviour {
        answer: |_, task| running(task),
        ..Behaviour::default()
    };
    let gateway = Paused::start(behaviour, |_| {});
    let live = "crun_gateway_live_tasks{account=\"music\"}";
    gateway.list(&[("music", &[KEY]), ("film", &["ak_film"])]);
    gateway.poll(KEY, "a").await;
    assert!((gateway.metric(live) - 1.0).abs() < 0.1);
    gateway.list(&[("film", &["ak_film"])]);
    for family in ["budget_rate", "live_tasks", "freshness_seconds"] {
        let shown = gateway.series(&format!("crun_gateway_{family}"));
        assert!(!shown.contains("music") && shown.contains("film"), "{shown}");
    }
    gateway.list(&[("music", &[KEY]), ("film", &["ak_film"])]);
    assert!(gateway.metric(live).abs() < 0.1, "it is another one");
    gateway.poll(KEY, "b").await;
    assert!((gateway.metric(live) - 1.0).abs() < 0.1);
}

//! Many connections, few file descriptors: whoever is too many is told so, everybody else and the platform are served.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use crate::harness::process::{BINARY, config_file};
use crate::harness::raw::{self, Raw};
use crate::harness::{Gateway, KEY, PATIENCE, Simulator, TASK_INFO, poll, until, value_of};

async fn quick() -> Simulator {
    Simulator::start(&["--latency", "0ms"]).await
}

/// One series of the admin port, over a connection that is open already.
async fn metric(admin: &mut Raw, series: &str) -> f64 {
    admin.send("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let reply = admin.reply().await;
    value_of(series, str::from_utf8(&reply.body).unwrap())
}

#[tokio::test]
async fn the_soft_limit_of_descriptors_is_raised_to_the_hard_one() {
    let upstream = quick().await;
    let gateway = Gateway::start_with_descriptors(&upstream.url, "limits: { connections: 500 }", 64, 4096).await;
    let most = gateway.metric("process_max_fds").await;
    assert!((most - 4096.0).abs() < 0.1, "{most}");
    assert!(!gateway.log().contains("file descriptors"), "{}", gateway.log());
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(Raw::connect(gateway.address).await);
    }
    for client in &mut clients {
        assert!(client.poll("ended.a").await.is(200));
    }
}

#[tokio::test]
async fn a_shortfall_of_descriptors_is_named_at_start_and_by_check() {
    let upstream = quick().await;
    let config = "limits: { connections: 2000, upstream_connections: 200 }";
    let gateway = Gateway::start_with_descriptors(&upstream.url, config, 1024, 1024).await;
    let said = "limits.connections: 2000 and limits.upstream_connections of 200 take 2392 file descriptors, and a process \
                may have 1024 here, so that 757 and 75 are let in";
    assert!(gateway.log().contains(said), "{}", gateway.log());
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);

    let file = config_file(config);
    let limited = "ulimit -n 1024 && exec \"$0\" check --config \"$1\"";
    let mut check = tokio::process::Command::new("sh");
    let checked = check
        .args(["-c", limited, BINARY])
        .arg(file.path())
        .output()
        .await
        .unwrap();
    let printed = String::from_utf8(checked.stdout).unwrap();
    assert!(checked.status.success(), "{printed}");
    assert!(printed.starts_with(&format!("# {said}")), "{printed}");
    // What is printed is a configuration all the same.
    let again = config_file(&printed);
    let again = crate::harness::process::run(&["check", "--config", again.path().to_str().unwrap()], &[]).await;
    assert_eq!(again.code, 0, "{again:?}");
}

#[tokio::test]
async fn where_descriptors_are_few_a_change_names_what_was_changed_and_what_is_short() {
    let upstream = quick().await;
    let config = "limits: { connections: 1000, upstream_connections: 200 }";
    let gateway = Gateway::start_with_descriptors(&upstream.url, config, 1000, 1000).await;
    let taken_over = "the changed configuration is taken over";
    let limit = async || gateway.metric("crun_gateway_connections_limit").await.to_string();
    assert_eq!(limit().await, "674");
    gateway.reconfigure("limits: { connections: 600, upstream_connections: 200 }");
    gateway.logged(taken_over, 1).await;
    assert_eq!(limit().await, "600");
    gateway.reconfigure("limits: { connections: 5000, upstream_connections: 200 }");
    gateway.logged(taken_over, 2).await;
    let said = "limits.connections: 5000 and limits.upstream_connections of 200 take 5392 file descriptors, and a process \
                may have 1000 here, so that 674 and 134 are let in";
    gateway.logged(said, 1).await;
    assert_eq!(limit().await, "674");
    assert!(!gateway.log().contains("need a restart"), "{}", gateway.log());
    gateway.reconfigure("limits: { connections: 5000, upstream_connections: 300 }");
    gateway.logged("need a restart", 1).await;
    assert!(
        gateway.log().contains("fields=\"limits.upstream_connections\""),
        "{}",
        gateway.log()
    );
}

/// So many clients as are let in, each of which is served.
async fn as_many_as_fit(gateway: &Gateway, fitting: u32) -> Vec<Raw<TcpStream>> {
    let limit = gateway.metric("crun_gateway_connections_limit").await;
    assert!((limit - f64::from(fitting)).abs() < 0.5, "{limit}");
    let mut let_in = Vec::new();
    for _ in 0..fitting {
        let_in.push(Raw::connect(gateway.address).await);
    }
    for client in &mut let_in {
        assert!(client.poll("ended.a").await.is(200));
    }
    let_in
}

#[tokio::test]
async fn where_descriptors_are_few_the_admin_port_and_those_let_in_are_served() {
    let upstream = quick().await;
    let gateway = Gateway::start_with_descriptors(&upstream.url, "", 512, 512).await;
    // A change of the configuration changes nothing of that.
    gateway.reconfigure("max_accounts: 7");
    let log = gateway.logged("the changed configuration is taken over", 1).await;
    assert!(!log.contains("need a restart"), "{log}");
    // 512 less 192 for everything else, shared 10 to 1.
    let mut let_in = as_many_as_fit(&gateway, 291).await;
    let mut too_many = Vec::new();
    for _ in 0..300 {
        too_many.push(Raw::connect(gateway.address).await);
        if too_many.len() % 50 == 0 {
            assert_eq!(gateway.admin("/readyz").await.0, 200);
        }
    }
    let refusal = too_many[0].reply().await;
    assert!(refusal.is(503), "{refusal:?}");
    for client in let_in.iter_mut().step_by(10) {
        assert!(client.poll("ended.a").await.is(200));
    }
    gateway
        .reaches("crun_gateway_refused_total{reason=\"connections\"}", 300)
        .await;
    assert!(!gateway.log().contains("cannot accept"), "{}", gateway.log());
    drop((let_in, too_many));
    gateway.shows("crun_gateway_connections", 0.0).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
}

#[tokio::test]
async fn where_descriptors_are_few_those_turned_away_leave_some_for_upstream() {
    // Each query needs a connection of its own.
    let upstream = Simulator::start(&["--latency", "0ms", "--close-after-response"]).await;
    let gateway = Gateway::start_with_descriptors(&upstream.url, "", 128, 128).await;
    // Half of 128 for everything else, the rest shared 10 to 1.
    let mut let_in = as_many_as_fit(&gateway, 59).await;
    let mut too_many = Vec::new();
    for _ in 0..300 {
        too_many.push(Raw::connect(gateway.address).await);
    }
    let refusal = too_many[0].reply().await;
    assert!(refusal.is(503), "{refusal:?}");
    for (task, client) in let_in.iter_mut().take(15).enumerate() {
        let reply = client.poll(&format!("ended.{task}")).await;
        assert!(reply.is(200), "{task}: {reply:?}");
    }
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    assert!(!gateway.log().contains("cannot accept"), "{}", gateway.log());
}

#[tokio::test]
async fn an_accept_without_descriptors_waits_and_does_not_spin() {
    let upstream = quick().await;
    // Too few for the process's own.
    let gateway = Gateway::start_with_descriptors(&upstream.url, "", 40, 40).await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let mut admin = Raw::connect(gateway.admin).await;
    let mut kept = Raw::connect(gateway.address).await;
    assert!(kept.poll("ended.a").await.is(200));
    let mut clients = Vec::new();
    for _ in 0..60 {
        clients.push(Raw::connect(gateway.address).await);
        clients.push(Raw::connect(gateway.admin).await);
    }
    let failed = "crun_gateway_refused_total{reason=\"accept\"}";
    until("none is accepted", async || metric(&mut admin, failed).await >= 1.0).await;
    let (first, started) = (metric(&mut admin, failed).await, Instant::now());
    let cpu = gateway.cpu();
    // Who is connected is served meanwhile.
    assert!(kept.poll("ended.a").await.is(200));
    let ten_more = async {
        loop {
            let tries = metric(&mut admin, failed).await - first;
            if tries >= 10.0 {
                return tries;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let tries = timeout(PATIENCE, ten_more).await.expect("it goes on trying");
    let took = started.elapsed();
    // One every 100 ms; the one before the first that is seen here may just have begun.
    assert!(took.as_secs_f64() >= 0.1 * (tries - 1.0), "{tries} in {took:?}");
    let cpu = gateway.cpu().saturating_sub(cpu);
    assert!(cpu < took / 2, "{cpu:?} in {took:?}");
    let log = gateway.logged("cannot accept: raise the limit", 1).await;
    let said = log.matches("cannot accept: raise the limit").count();
    assert_eq!(said, 1, "{log}");
    drop(clients);
    // Once it has seen them go, there is room again.
    until("there is room", async || {
        poll(gateway.address, "ended.a").await.status == 200
    })
    .await;
    assert_eq!(gateway.admin("/readyz").await.0, 200);
}

#[tokio::test]
async fn that_the_admin_port_cannot_accept_is_said_once_though_some_are_let_in_between() {
    let upstream = quick().await;
    let gateway = Gateway::start_with_descriptors(&upstream.url, "", 40, 40).await;
    let mut kept = Raw::connect(gateway.admin).await;
    let held: usize = metric(&mut kept, "process_open_fds").await.to_string().parse().unwrap();
    let mut asking = Vec::new();
    for _ in 0..60 {
        let mut admin = Raw::connect(gateway.admin).await;
        admin.send("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        asking.push(admin);
    }
    let cannot = "the admin port cannot accept";
    gateway.logged(cannot, 1).await;
    let mut let_in = VecDeque::new();
    for mut admin in asking {
        assert!(admin.reply().await.is(200));
        let_in.push_back(admin);
        // One goes, the next is let in, and after that there is no room again.
        if let_in.len() + held > 40 - 3 {
            let_in.pop_front();
        }
    }
    drop(let_in);
    // Whatever was logged before is there when this is.
    gateway.reconfigure("max_accounts: 7");
    let log = gateway.logged("the changed configuration is taken over", 1).await;
    assert_eq!(log.matches(cannot).count(), 1, "{log}");
}

#[tokio::test]
async fn five_hundred_slow_heads_are_closed_in_time_and_hold_up_nobody() {
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "limits: { header_timeout: \"2s\" }").await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let mut slow = Vec::new();
    for _ in 0..500 {
        let mut client = Raw::connect(gateway.address).await;
        client
            .send(format!("GET {TASK_INFO}?task_id=a HTTP/1.1\r\nx-api-key: {KEY}\r\na: "))
            .await
            .unwrap();
        slow.push(client);
    }
    let mut quick = Raw::connect(gateway.address).await;
    assert!(quick.poll("ended.a").await.is(200));
    for client in &mut slow {
        assert!(client.reply().await.is(408));
        client.assert_ends().await;
    }
    let closed = gateway
        .metric("crun_gateway_refused_total{reason=\"header_timeout\"}")
        .await;
    assert!((closed - 500.0).abs() < 0.1, "{closed}");
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    assert!(quick.poll("ended.a").await.is(200));
}

#[tokio::test]
async fn the_beginning_of_a_head_behind_a_request_is_held_to_the_header_timeout_too() {
    let upstream = quick().await;
    let gateway = Gateway::start(
        &upstream.url,
        "limits: { header_timeout: \"1s\", idle_timeout: \"60s\" }",
    )
    .await;
    let mut client = Raw::connect(gateway.address).await;
    client.send(format!("{}GET /", raw::poll("ended.a"))).await.unwrap();
    assert!(client.reply().await.is(200));
    let answered = Instant::now();
    assert!(client.reply().await.is(408));
    client.assert_ends().await;
    assert!(answered.elapsed() < Duration::from_secs(10), "{:?}", answered.elapsed());
}

#[tokio::test]
async fn answers_that_fill_the_cache_push_out_others_and_are_all_served() {
    let upstream = quick().await;
    let most = 4 << 20;
    let gateway = Gateway::start(&upstream.url, "cache: { max_bytes: \"4MiB\" }\nbudget: { limit: 1000 }").await;
    for task in 0..60 {
        let reply = poll(gateway.address, &format!("big-256KiB.{task}")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(reply.body.len() >= 256 << 10);
        let held = gateway.metric("crun_gateway_cache_bytes").await;
        assert!(held <= f64::from(most), "{held}");
    }
    let evicted = gateway
        .metric("crun_gateway_cache_evictions_total{cause=\"size\"}")
        .await;
    assert!(evicted >= 40.0, "{evicted}");
}

/// A connection to the admin port that asks for more than it may be sent, and reads nothing.
async fn deaf(admin: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(admin).await.unwrap();
    let asked = "GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n".repeat(100);
    stream.writable().await.unwrap();
    stream.try_write(asked.as_bytes()).unwrap();
    stream
}

#[tokio::test]
async fn connections_that_fill_the_admin_port_keep_nobody_from_it() {
    // Longer than it takes on any machine, and shorter than silence is borne.
    const SOON: Duration = Duration::from_secs(15);
    let upstream = quick().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let asks = |path| {
        let answered = timeout(SOON, gateway.admin(path));
        async move { answered.await.is_ok_and(|(status, _)| status == 200) }
    };
    let (mut silent, mut not_reading) = (Vec::new(), Vec::new());
    for round in 0..4 {
        for _ in 0..40 {
            silent.push(Raw::connect(gateway.admin).await);
        }
        assert!(asks("/livez").await, "{round}: beside those that are silent");
    }
    for round in 0..4 {
        for _ in 0..40 {
            not_reading.push(deaf(gateway.admin).await);
        }
        for path in ["/livez", "/readyz", "/metrics", "/status.json"] {
            assert!(asks(path).await, "{round}: {path} beside those that do not read");
        }
    }
    // Who came first goes first.
    silent[0].assert_ends().await;
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
}

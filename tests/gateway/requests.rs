//! What a poll may look like; and nothing that upstream might count as a query passes unpaid.

use http::Method;

use crate::harness::client::bare;
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, Scripted, Simulator, TASK_INFO, poll, request};

/// Upstream says the same to everybody and keeps what it was asked.
async fn recording() -> Scripted {
    Scripted::always(response(
        "200 OK",
        "",
        br#"{"code":404,"message":"Task not found","data":null}"#,
    ))
    .await
}

async fn ask(gateway: &Gateway, method: Method, target: &str) -> crate::harness::Reply {
    let mut asked = bare(method, target);
    asked.headers_mut().insert("X-API-KEY", KEY.parse().unwrap());
    request(gateway.address, asked).await
}

#[tokio::test]
async fn a_task_id_that_names_no_task_is_422_and_costs_nothing() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let long = format!("?task_id={}", "x".repeat(257));
    for query in [
        "",
        "?",
        "?task_id",
        "?task_id=",
        "?task_id=a&task_id=b",
        "?task_id=a&task_id=a",
        "?task_id=a&task%5Fid=b",
        "?task_id=%4",
        "?task_id=%zz",
        "?task_id=%0a",
        "?task_id=%00",
        "?task_id=%D0%BD",
        "?task_id=%ff",
        "?Task_Id=a",
        "?id=a",
        &long,
    ] {
        let reply = ask(&gateway, Method::GET, &format!("{TASK_INFO}{query}")).await;
        reply.assert_is_our_error(422);
        assert!(
            reply.json()["message"].as_str().unwrap().contains("task_id"),
            "{query}: {reply:?}"
        );
    }
    assert_eq!(upstream.queries(), 0);
}

#[tokio::test]
async fn upstream_sees_the_task_and_the_key_and_nothing_else() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut asked = bare(Method::GET, &format!("{TASK_INFO}?_=17&task_id=a%2Fb+c%7e&x=%zz"));
    for (name, value) in [
        ("x-api-key", KEY),
        ("accept-encoding", "br"),
        ("authorization", "Bearer something"),
        ("cookie", "a=b"),
        ("if-none-match", "\"x\""),
        ("range", "bytes=0-1"),
        ("user-agent", "a client"),
        ("x-forwarded-for", "10.0.0.1"),
        ("content-type", "application/json"),
    ] {
        asked.headers_mut().insert(name, value.parse().unwrap());
    }
    assert_eq!(request(gateway.address, asked).await.json()["code"], 404);
    let head = upstream.heads().remove(0);
    let mut lines: Vec<_> = head.trim_end().split("\r\n").collect();
    assert_eq!(
        lines.remove(0),
        "GET /api/v1/client/job/TaskInfo?task_id=a%2Fb%20c~ HTTP/1.1"
    );
    lines.sort_unstable();
    let host = format!("host: {}", upstream.address);
    let key = format!("x-api-key: {KEY}");
    let agent = concat!("user-agent: crun-gateway/", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        lines,
        [
            "accept-encoding: identity",
            "accept: application/json",
            host.as_str(),
            agent,
            key.as_str()
        ]
    );
}

#[tokio::test]
async fn further_parameters_and_spellings_of_an_id_are_one_task() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for query in [
        "?task_id=a-b",
        "?task_id=a%2Db",
        "?_=1&task_id=a-b",
        "?task_id=%61-b&callback=x",
    ] {
        assert_eq!(
            ask(&gateway, Method::GET, &format!("{TASK_INFO}{query}")).await.json()["code"],
            404
        );
    }
    assert_eq!(upstream.queries(), 1, "not found is kept, too");
    ask(&gateway, Method::GET, &format!("{TASK_INFO}?task_id=A-b")).await;
    assert_eq!(upstream.queries(), 2, "an id is case-sensitive");
}

#[tokio::test]
async fn head_is_answered_as_get_without_a_body() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let get = poll(gateway.address, "ended.a").await;
    let head = ask(&gateway, Method::HEAD, &format!("{TASK_INFO}?task_id=ended.a")).await;
    assert_eq!(head.status, 200);
    assert!(head.body.is_empty());
    assert_eq!(head.header("content-length").unwrap(), get.body.len().to_string());
    assert_eq!(upstream.queries().await, 1);
}

#[tokio::test]
async fn keys_are_one_rule() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let target = format!("{TASK_INFO}?task_id=a");
    let (longest, longer) = ("a".repeat(512), "a".repeat(513));
    for (keys, status) in [
        (vec![], 401),
        (vec![""], 401),
        (vec![&*longer], 401),
        (vec!["ak_1", "ak_2"], 401),
        (vec!["ak 1"], 401),
        (vec!["ak_1", "ak_1"], 200),
        (vec!["ak_1"], 200),
        (vec![&*longest], 200),
    ] {
        let mut asked = bare(Method::GET, &target);
        for key in &keys {
            asked.headers_mut().append("x-api-key", key.parse().unwrap());
        }
        let reply = request(gateway.address, asked).await;
        if status == 401 {
            reply.assert_is_our_error(401);
        } else {
            assert_eq!(reply.status, status, "{keys:?}");
        }
    }
    let mut bearer = bare(Method::GET, &target);
    bearer
        .headers_mut()
        .insert("authorization", "Bearer ak_1".parse().unwrap());
    request(gateway.address, bearer).await.assert_is_our_error(401);
    assert_eq!(upstream.queries(), 2, "one for each account");
}

#[tokio::test]
async fn a_request_id_is_echoed_when_it_is_well_formed_and_made_when_not() {
    let upstream = recording().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let long = "x".repeat(129);
    for (sent, echoed) in [
        ("abc-1.2_Z", true),
        ("a b", false),
        ("a\"b", false),
        (long.as_str(), false),
    ] {
        let mut asked = bare(Method::GET, &format!("{TASK_INFO}?task_id=a"));
        asked.headers_mut().insert("x-request-id", sent.parse().unwrap());
        let reply = request(gateway.address, asked).await;
        assert_eq!(reply.header("x-request-id") == Some(sent), echoed, "{sent}");
        assert!(!reply.header("x-request-id").unwrap().is_empty());
    }
}

#[tokio::test]
async fn every_other_spelling_of_task_info_is_refused_and_upstream_sees_none() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    for path in [
        "/api/v1/client/job/taskinfo",
        "/API/v1/client/job/TaskInfo",
        "/api/v1/client/job/TaskInfo/",
        "/api/v1/client/job//TaskInfo",
        "//api/v1/client/job/TaskInfo",
        "/api/v1/client/job/./TaskInfo",
        "/api/v1/client/x/../job/TaskInfo",
        "/api/v1/client/x/..;/job/TaskInfo",
        "/api/v1/client/x/%2e%2e/job/TaskInfo",
        "/api/v1/client/job/TaskInfo;v=1",
        "/api/v1/client/job/%54askInfo",
        "/api/v1/client/job/%2554askInfo",
        "/api/v1/client/job%2FTaskInfo",
        "/api/v1/client/job%5CTaskInfo",
        "/api/v1/client/job/TaskInfo%3Ftask_id=a",
        "/api/v1/client/job/TaskInfo.json",
        "/api/v1/client/job/TaskInfo%00",
    ] {
        let reply = ask(&gateway, Method::GET, &format!("{path}?task_id=ended.a")).await;
        reply.assert_is_our_error(404);
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "QUERY"] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let reply = ask(&gateway, method, &format!("{TASK_INFO}?task_id=ended.a")).await;
        reply.assert_is_our_error(405);
        assert_eq!(reply.header("allow"), Some("GET, HEAD"));
    }
    let stats = upstream.stats().await;
    assert_eq!(stats["requests"], 0, "{stats}");
    assert_eq!(stats["paths"], serde_json::json!({}), "{stats}");
}

#[tokio::test]
async fn an_innocent_path_cannot_be_turned_into_a_query_by_a_header() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let mut asked = bare(Method::POST, "/api/v1/echo");
    for name in [
        "x-original-url",
        "x-rewrite-url",
        "x-http-method-override",
        "x_original_url",
        "x-original_url",
        "x.original.url",
        "x-original-path",
        "x-envoy-original-path",
        "x-forwarded-uri",
        "x-forwarded-path",
    ] {
        asked.headers_mut().insert(name, TASK_INFO.parse().unwrap());
    }
    let echoed = request(gateway.address, asked).await.json();
    assert!(!echoed["headers"].to_string().contains("TaskInfo"), "{echoed}");
}

#[tokio::test]
async fn a_full_queue_refuses_the_newcomer_and_says_when_to_come_back() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "budget: { limit: 1, max_queue: 2 }").await;
    let address = gateway.address;
    // In the first second nothing is granted, so all of these queue.
    let waiting: Vec<_> = ["ended.a", "ended.b"]
        .map(|task| tokio::spawn(async move { poll(address, task).await }))
        .into_iter()
        .collect();
    let length = "crun_gateway_budget_queue_length{account=\"other\",lane=\"foreground\"}";
    gateway.reaches(length, 2).await;
    let newcomer = poll(address, "ended.c").await;
    newcomer.assert_is_our_error(429);
    let wait: u64 = newcomer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=4).contains(&wait), "{wait}");
    for poll in waiting {
        assert_eq!(poll.await.unwrap().status, 200);
    }
}

//! Which trace and which request it was, for whoever reads the log; upstream is told only where that is configured.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;

use crate::harness::client::{bare, poll_request, request};
use crate::harness::scripted::response;
use crate::harness::{Gateway, KEY, Scripted, TASK_INFO};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Answers every query as an ended task.
async fn upstream() -> Scripted {
    Scripted::start(Duration::ZERO, |head| {
        let task = head
            .split_once("task_id=")
            .map_or("none", |(_, rest)| rest.split(' ').next().unwrap());
        let body = format!(r#"{{"code":200,"message":"success","data":{{"task_id":"{task}","status":"failed"}}}}"#);
        response("200 OK", "Content-Type: application/json\r\n", body.as_bytes())
    })
    .await
}

fn with(mut request: Request<Full<Bytes>>, headers: &[(&'static str, &str)]) -> Request<Full<Bytes>> {
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    request
}

/// What upstream was told in the last request, as `name: value`.
fn told(upstream: &Scripted) -> Vec<String> {
    let heads = upstream.heads();
    let lines = heads.last().unwrap().lines();
    let is_trace = |line: &&str| {
        ["traceparent:", "tracestate:", "baggage:"]
            .iter()
            .any(|name| line.starts_with(name))
    };
    lines.filter(is_trace).map(str::to_owned).collect()
}

const CLIENTS: [(&str, &str); 3] = [
    ("traceparent", TRACEPARENT),
    ("tracestate", "a=1"),
    ("baggage", "user=7"),
];

#[tokio::test]
async fn upstream_hears_of_no_trace() {
    let upstream = upstream().await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let asked = with(poll_request(KEY, "a"), &CLIENTS);
    assert_eq!(request(gateway.address, asked).await.status, 200);
    assert_eq!((upstream.queries(), told(&upstream)), (1, vec![]));
    let posted = with(bare(Method::POST, "/api/v1/echo"), &CLIENTS);
    assert_eq!(request(gateway.address, posted).await.status, 200);
    assert_eq!((upstream.queries(), told(&upstream)), (2, vec![]));
}

#[tokio::test]
async fn where_it_is_configured_upstream_is_told_the_clients_trace() {
    let upstream = upstream().await;
    let config = format!("upstream: {{ url: \"{}\", traceparent: true }}", upstream.url);
    let gateway = Gateway::start(&upstream.url, &config).await;
    let asked = with(poll_request(KEY, "a"), &CLIENTS);
    assert_eq!(request(gateway.address, asked).await.status, 200);
    assert_eq!(
        told(&upstream),
        [format!("traceparent: {TRACEPARENT}")],
        "a flight is everybody's"
    );
    let posted = with(bare(Method::POST, "/api/v1/echo"), &CLIENTS);
    request(gateway.address, posted).await;
    let all = [
        &format!("traceparent: {TRACEPARENT}"),
        "tracestate: a=1",
        "baggage: user=7",
    ];
    assert_eq!(told(&upstream), all);

    // Without a well-formed one: a query gets a new one, another request none, and its tracestate means nothing.
    for bad in [&TRACEPARENT.to_uppercase(), "00-1-2-3"] {
        let headers = [("traceparent", bad), ("tracestate", "a=1")];
        request(gateway.address, with(bare(Method::POST, "/api/v1/echo"), &headers)).await;
        assert_eq!(told(&upstream), [""; 0], "{bad}");
    }
    let twice = [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)];
    request(gateway.address, with(bare(Method::POST, "/api/v1/echo"), &twice)).await;
    assert_eq!(told(&upstream), [""; 0]);
    let asked = with(poll_request(KEY, "b"), &[("traceparent", "00-1-2-3")]);
    assert_eq!(request(gateway.address, asked).await.status, 200);
    let told = told(&upstream);
    assert!(
        told.len() == 1 && told[0].len() == 68 && !told[0].contains(TRACE),
        "{told:?}"
    );
}

/// The `trace_id` of each log line with `text`.
fn trace_ids(log: &str, text: &str) -> Vec<String> {
    let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
    let said = lines.filter(|line: &serde_json::Value| line["message"] == text);
    said.map(|line| line["trace_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn log_lines_say_which_trace_it_was() {
    let upstream = upstream().await;
    let gateway = Gateway::start(&upstream.url, "log: { level: debug, format: json }").await;
    for traced in [true, false] {
        let headers = if traced { &CLIENTS[..1] } else { &[] };
        for asked in [
            poll_request(KEY, if traced { "a" } else { "b" }),
            bare(Method::GET, &format!("{TASK_INFO}?task_id=c")),
            bare(Method::POST, "/api/v1/echo"),
            bare(Method::GET, "/nowhere"),
        ] {
            request(gateway.address, with(asked, headers)).await;
        }
    }
    let lines = [
        "poll answered",
        "upstream asked",
        "poll refused",
        "request passed through",
        "request refused",
    ];
    let log = gateway.logged("request refused", 2).await;
    let mut made = Vec::new();
    for text in lines {
        let [clients, own]: [String; 2] = trace_ids(&log, text)
            .try_into()
            .unwrap_or_else(|ids| panic!("{text}: {ids:?}"));
        assert_eq!(clients, TRACE, "{text}");
        assert!(
            own.len() == 32 && own.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
            "{own}"
        );
        made.push(own);
    }
    assert_eq!(made[0], made[1], "the poll's flight is of its trace");
    made.sort();
    made.dedup();
    assert_eq!(made.len(), 4, "and every other request of another");
}

#[tokio::test]
async fn every_answer_names_its_request() {
    let upstream = upstream().await;
    let config = "max_accounts: 1";
    let gateway = Gateway::start(&upstream.url, config).await;
    assert_eq!(request(gateway.address, poll_request(KEY, "a")).await.status, 200);
    let mut two_keys = poll_request(KEY, "a");
    two_keys.headers_mut().append("x-api-key", "ak_other".parse().unwrap());
    for (status, asked) in [
        (401, bare(Method::GET, &format!("{TASK_INFO}?task_id=a"))),
        (401, two_keys),
        (404, bare(Method::GET, "/nowhere")),
        (404, bare(Method::GET, "/api/v1/client/job/taskinfo")),
        (405, bare(Method::POST, TASK_INFO)),
        (422, poll_request(KEY, "")),
        (429, poll_request("ak_one_too_many", "a")),
    ] {
        for sent in [Some("the-one.I_sent"), None, Some("not well-formed")] {
            let mut asked = asked.clone();
            if let Some(sent) = sent {
                asked.headers_mut().insert("x-request-id", sent.parse().unwrap());
            }
            let reply = request(gateway.address, asked).await;
            reply.assert_is_our_error(status);
            let named = reply.header("x-request-id").unwrap();
            let is_echoed = sent == Some("the-one.I_sent");
            assert_eq!(named == "the-one.I_sent", is_echoed, "{status}: {named}");
            assert!(is_echoed || named.len() == 36, "{status}: {named}");
        }
    }
}

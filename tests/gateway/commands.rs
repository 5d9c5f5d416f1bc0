//! The commands as their users call them, and the admin port.

use std::collections::HashSet;

use crate::harness::process::{config_file, run};
use crate::harness::{Gateway, KEY, Simulator, poll};

const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config.yaml");

#[tokio::test]
async fn check_prints_what_the_shipped_configuration_means() {
    let checked = run(&["check", "--config", SHIPPED], &[]).await;
    assert_eq!((checked.code, checked.stderr.as_str()), (0, ""));
    let printed = checked.stdout;
    assert!(
        printed.contains("limit: 15") && printed.contains("api.crun.ai"),
        "{printed}"
    );
}

#[tokio::test]
async fn every_problem_is_named_at_once_with_field_and_fix() {
    let file = config_file(
        "limitt: 1\nbudget: { limit: 0, max_wait: 10 }\naccounts: [{ name: a, keys: [\"ak_s3cr3t\", { env: \"EMPTY\" }] }]\n",
    );
    let path = file.path().to_str().unwrap();
    for arguments in [&["check", "--config", path][..], &["--config", path][..]] {
        let ended = run(arguments, &[("EMPTY", "")]).await;
        assert_eq!((ended.code, ended.stdout.as_str()), (2, ""));
        for field in [
            "limitt",
            "budget.limit",
            "budget.max_wait",
            "accounts[0].keys[0]",
            "accounts[0].keys[1]",
        ] {
            // Field, what is wrong, what to do.
            let line = ended.stderr.lines().find(|line| line.starts_with(field));
            let parts = line.map(|line| line.split(": ").filter(|part| !part.is_empty()).count());
            assert!(parts.is_some_and(|parts| parts >= 3), "{field}: {ended:?}");
        }
        assert!(!ended.stderr.contains("s3cr3t"), "{ended:?}");
    }
}

#[tokio::test]
async fn a_file_that_is_not_there_is_named() {
    for arguments in [&["check"][..], &[]] {
        let arguments = [arguments, &["--config", "/nowhere/config.yaml"]].concat();
        let ended = run(&arguments, &[]).await;
        assert_eq!(ended.code, 2);
        assert!(ended.stderr.contains("/nowhere/config.yaml: "), "{ended:?}");
    }
}

#[tokio::test]
async fn a_port_in_use_is_said_with_its_field() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    for (field, listen, admin) in [
        ("listen", taken.as_str(), "127.0.0.1:0"),
        ("admin", "127.0.0.1:0", &taken),
    ] {
        let file = config_file(&format!("listen: \"{listen}\"\nadmin: \"{admin}\"\n"));
        let ended = run(&["--config", file.path().to_str().unwrap()], &[]).await;
        assert_eq!(ended.code, 1);
        assert!(
            ended.stderr.contains(&format!("crun-gateway: {field}: {taken}: ")),
            "{ended:?}"
        );
    }
    drop(holder);
}

#[tokio::test]
async fn what_ends_a_start_is_a_line_in_the_format_of_the_log() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let file = config_file(&format!(
        "listen: \"{taken}\"\nadmin: \"127.0.0.1:0\"\nlog: {{ format: json }}\n"
    ));
    let ended = run(&["--config", file.path().to_str().unwrap()], &[]).await;
    assert_eq!(ended.code, 1);
    let lines = ended.stderr.lines().map(serde_json::from_str);
    let lines: Vec<serde_json::Value> = lines.map(|line| line.expect(&ended.stderr)).collect();
    let last = lines.last().unwrap();
    let message = last["message"].as_str().unwrap();
    assert!(
        message.starts_with(&format!("crun-gateway: listen: {taken}: ")),
        "{last}"
    );
    assert_eq!(last["level"], "ERROR");
}

#[tokio::test]
async fn the_shipped_configuration_serves() {
    let shipped = std::fs::read_to_string(SHIPPED).unwrap();
    let own = ["listen:", "admin:", "worker_threads:"];
    let rest: Vec<_> = shipped
        .lines()
        .filter(|line| !own.iter().any(|field| line.starts_with(field)))
        .collect();
    let rest = rest.join("\n");
    assert!(rest.contains("\nupstream:\n"), "{rest}");
    let gateway = Gateway::start("", &rest).await;
    assert_eq!(gateway.admin("/readyz").await.0, 200);
}

/// `name{label="value",…} number`, or without labels.
fn is_sample(line: &str) -> bool {
    let Some((series, value)) = line.rsplit_once(' ') else {
        return false;
    };
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let is_label = |label: &str| {
        let quoted = label.split_once('=').map(|(name, value)| (is_name(name), value));
        quoted.is_some_and(|(named, value)| named && value.len() >= 2 && value.starts_with('"') && value.ends_with('"'))
    };
    let is_series = match series.split_once('{') {
        Some((name, labels)) => {
            is_name(name)
                && labels
                    .strip_suffix('}')
                    .is_some_and(|labels| labels.split(',').all(is_label))
        }
        None => is_name(series),
    };
    is_series && value.parse::<f64>().is_ok()
}

#[tokio::test]
async fn every_line_of_metrics_parses_and_nothing_has_been_counted_at_the_start() {
    let upstream = Simulator::start(&[]).await;
    let gateway = Gateway::start(&upstream.url, "").await;
    let (_, metrics) = gateway.admin("/metrics").await;
    let mut families = HashSet::new();
    for line in metrics.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            families.insert(family.split_once(' ').unwrap().0.to_owned());
        } else if !line.starts_with("# HELP ") {
            assert!(is_sample(line), "{line}");
            let (series, value) = line.rsplit_once(' ').unwrap();
            let counts = series.split('{').next().unwrap();
            if counts.starts_with("crun_gateway_") && (counts.ends_with("_total") || counts.ends_with("_count")) {
                assert_eq!(value, "0", "{line}");
            }
        }
    }
    for family in [
        "requests_total",
        "request_duration_seconds",
        "upstream_requests_total",
        "upstream_request_duration_seconds",
        "upstream_calls_saved_total",
        "budget_wait_seconds",
        "budget_queue_length",
        "budget_rate",
        "budget_shed_total",
        "cache_entries",
        "cache_bytes",
        "cache_evictions_total",
        "live_tasks",
        "freshness_seconds",
        "upstream_breaker_open",
        "upstream_paused",
        "passthrough_requests_total",
        "refused_total",
        "requests_in_flight",
        "panics_total",
        "log_lines_dropped_total",
        "spans_exported_total",
        "spans_dropped_total",
        "tls_handshake_failures_total",
        "tls_reload_success",
        "connections",
        "connections_limit",
        "upstream_connections",
        "upstream_connect_failures_total",
        "build_info",
    ] {
        assert!(
            families.contains(&format!("crun_gateway_{family}")),
            "{family}: {families:?}"
        );
    }
}

#[tokio::test]
async fn the_admin_port_lists_its_endpoints_and_counters_exist_from_the_start() {
    let upstream = Simulator::start(&["--latency", "0ms"]).await;
    let gateway = Gateway::start(&upstream.url, "log: { format: json, level: debug }").await;
    let (_, index) = gateway.admin("/").await;
    let (_, metrics) = gateway.admin("/metrics").await;
    assert!(
        ["/metrics", "/livez", "/readyz"]
            .iter()
            .all(|path| index.contains(path))
    );
    assert_eq!(
        (
            gateway.admin("/livez").await.0,
            gateway.admin("/readyz").await.0,
            gateway.admin("/x").await.0
        ),
        (200, 200, 404)
    );
    for series in [
        "crun_gateway_requests_total{account=\"other\",cache=\"none\",client=\"other\",code=\"5xx\"} 0",
        "crun_gateway_upstream_requests_total{account=\"other\",outcome=\"rate_limited\"} 0",
        "crun_gateway_budget_shed_total{account=\"other\",reason=\"queue_full\"} 0",
        "crun_gateway_cache_evictions_total{cause=\"size\"} 0",
        "crun_gateway_passthrough_requests_total{code=\"2xx\"} 0",
        "crun_gateway_refused_total{reason=\"internal\"} 0",
        "crun_gateway_panics_total 0",
        "crun_gateway_upstream_paused{account=\"other\"} 0",
    ] {
        assert!(
            metrics.lines().any(|line| line == series),
            "{series} is not in\n{metrics}"
        );
    }
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let log = gateway.logged("poll answered", 1).await;
    for line in log.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
    }
    assert!(!log.contains(KEY), "{log}");
}

#[tokio::test]
async fn the_demo_shows_the_main_job_without_a_terminal() {
    let demo = run(&["demo", "--seconds", "4", "--tasks", "8", "--clients", "8"], &[]).await;
    assert_eq!(demo.code, 0, "{demo:?}");
    let printed = demo.stdout;
    assert!(
        printed.contains("0 violations") && printed.contains("The limit held"),
        "{printed}"
    );
    assert!(
        !printed.contains('\u{1b}') && printed.lines().count() > 6,
        "plain lines: {printed}"
    );
}

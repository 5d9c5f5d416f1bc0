//! The commands as their users call them, and the admin port.

use std::process::Command;

use crate::harness::process::BINARY;
use crate::harness::{Gateway, KEY, Simulator, poll};

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(BINARY).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn check_prints_what_the_shipped_configuration_means() {
    let (code, printed, _) = run(&["check", "--config", concat!(env!("CARGO_MANIFEST_DIR"), "/config.yaml")]);
    assert_eq!(code, Some(0));
    assert!(
        printed.contains("limit: 15") && printed.contains("api.crun.ai"),
        "{printed}"
    );
}

#[test]
fn every_problem_is_named_at_once_with_field_and_fix() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "limitt: 1\nbudget: { limit: 0, max_wait: 10 }\naccounts: [{ name: a, keys: [\"ak_s3cr3t\"] }]\n";
    std::fs::write(file.path(), text).unwrap();
    let path = file.path().to_str().unwrap();
    for arguments in [&["check", "--config", path][..], &["--config", path][..]] {
        let (code, printed, complained) = run(arguments);
        assert_eq!(code, Some(2));
        assert_eq!(printed, "");
        for field in ["limitt", "budget.limit", "budget.max_wait", "accounts[0].keys[0]"] {
            assert!(
                complained.lines().any(|line| line.contains(field)),
                "{field}: {complained}"
            );
        }
        assert!(!complained.contains("s3cr3t"), "{complained}");
    }
    assert_eq!(run(&["--config", "/nowhere/config.yaml"]).0, Some(2));
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
        "crun_gateway_panics_total 0",
        "crun_gateway_upstream_paused{account=\"other\"} 0",
    ] {
        assert!(
            metrics.lines().any(|line| line == series),
            "{series} is not in\n{metrics}"
        );
    }
    assert_eq!(poll(gateway.address, "ended.a").await.status, 200);
    let log = gateway.log();
    for line in log.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
    }
    assert!(log.contains("poll answered") && !log.contains(KEY), "{log}");
}

#[test]
fn the_demo_shows_the_main_job_without_a_terminal() {
    let (code, printed, _) = run(&["demo", "--seconds", "4", "--tasks", "8", "--clients", "8"]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(
        printed.contains("0 violations") && printed.contains("The limit held"),
        "{printed}"
    );
    assert!(!printed.contains('\u{1b}'), "plain lines");
}

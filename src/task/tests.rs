//! What each answer of upstream's means: every recorded body in both forms of an error, and every trap we know of.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use Class::{Failed, Live, NotFound, RateLimited, Refused, Settling, Terminal, Unavailable, Unreadable, Unrecognised};

const SONG: &str = "d6956973-2f17-43d4-8514-af6cc3a2f55d";
const IMAGE: &str = "0b9f6c0a-5a35-4a55-8f5b-2f8c7f0f3a11";

/// Every fixture, the task asked for, and what it means with HTTP 200.
const FIXTURES: [(&str, &str, Class); 23] = [
    ("code_401.json", SONG, Refused),
    ("code_402.json", SONG, Refused),
    ("code_403.json", SONG, Refused),
    ("code_404.json", SONG, NotFound),
    ("code_422.json", SONG, Refused),
    ("code_429.json", SONG, RateLimited),
    ("code_455.json", SONG, Unavailable),
    ("code_500.json", SONG, Failed),
    ("code_501.json", SONG, Failed),
    ("code_505.json", SONG, Failed),
    ("data_null.json", SONG, Unrecognised),
    ("failed.json", SONG, Terminal),
    ("failed_result_code_200.json", IMAGE, Terminal),
    ("not_json.html", SONG, Unreadable),
    ("pending.json", SONG, Live),
    ("pending_result_code_501.json", IMAGE, Live),
    ("running.json", SONG, Live),
    ("success.json", SONG, Terminal),
    ("success_media_info.json", IMAGE, Terminal),
    ("success_media_urls.json", IMAGE, Terminal),
    ("success_null_result.json", IMAGE, Settling),
    ("unknown_fields.json", SONG, Terminal),
    ("unknown_status.json", SONG, Unrecognised),
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(name)).unwrap()
}

fn id(id: &str) -> TaskId {
    TaskId::new(id).unwrap()
}

/// Reads `body` as the answer to the question about `t`, as which [`task`] goes.
fn reading(http_status: u16, body: impl AsRef<[u8]>) -> Reading {
    read(http_status, body.as_ref(), &id("t"))
}

/// A found task: `rest` is what follows the id in `data`.
fn task(rest: &str) -> String {
    format!(r#"{{"code":200,"message":"success","data":{{"task_id":"t",{rest}}}}}"#)
}

#[track_caller]
fn means(class: Class, body: impl AsRef<[u8]>) {
    let body = body.as_ref();
    let start = String::from_utf8_lossy(&body[..body.len().min(300)]);
    assert_eq!(reading(200, body).class, class, "{start}");
}

#[track_caller]
fn found(class: Class, rest: &str) {
    means(class, task(rest));
}

#[test]
fn every_fixture_has_its_class() {
    for (name, asked, class) in FIXTURES {
        assert_eq!(read(200, &fixture(name), &id(asked)).class, class, "{name}");
    }
}

#[test]
fn no_fixture_is_left_out() {
    let on_disk: BTreeSet<_> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let in_table: BTreeSet<_> = FIXTURES.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(on_disk, in_table);
}

#[test]
fn both_forms_of_an_error_mean_the_same() {
    let mut codes = 0;
    for (name, asked, class) in FIXTURES {
        let Some(code) = name.strip_prefix("code_").and_then(|name| name.strip_suffix(".json")) else {
            continue;
        };
        let code: u16 = code.parse().unwrap();
        for http_status in [200, code] {
            let reading = read(http_status, &fixture(name), &id(asked));
            assert_eq!(reading.class, class, "{name} with HTTP {http_status}");
            assert_eq!(
                reading.effective_code,
                Some(i64::from(code)),
                "{name} with HTTP {http_status}"
            );
        }
        codes += 1;
    }
    assert_eq!(codes, 10);
}

#[test]
fn a_task_of_another_id_is_never_taken_for_the_one_asked_for() {
    for (name, _, class) in FIXTURES {
        let expected = match class {
            Live | Settling | Terminal => Unrecognised,
            NotFound | RateLimited | Refused | Unavailable | Failed | Unrecognised | Unreadable => class,
        };
        assert_eq!(read(200, &fixture(name), &id("another")).class, expected, "{name}");
    }
    assert_eq!(
        read(200, &fixture("running.json"), &id(&SONG.to_uppercase())).class,
        Unrecognised
    );
}

#[test]
fn the_http_status_decides_when_it_is_not_2xx() {
    for (http_status, class) in [
        (301, Unrecognised),
        (304, Unrecognised),
        (400, Unrecognised),
        (401, Refused),
        (402, Refused),
        (403, Refused),
        (404, NotFound),
        (405, Unrecognised),
        (408, Failed),
        (418, Unrecognised),
        (422, Refused),
        (429, RateLimited),
        (455, Unavailable),
        (499, Unrecognised),
        (500, Failed),
        (501, Failed),
        (502, Unavailable),
        (503, Unavailable),
        (504, Unavailable),
        (505, Failed),
        (507, Failed),
        (599, Failed),
        (999, Failed),
    ] {
        for body in [
            fixture("success.json"),
            fixture("code_429.json"),
            fixture("not_json.html"),
            Vec::new(),
        ] {
            let reading = read(http_status, &body, &id("t"));
            assert_eq!(reading.class, class, "HTTP {http_status}");
            assert_eq!(reading.effective_code, Some(i64::from(http_status)));
        }
    }
}

#[test]
fn a_part_of_an_answer_is_none() {
    for http_status in [204, 205, 206, 207, 226, 299] {
        for body in [fixture("success.json"), fixture("code_404.json"), Vec::new()] {
            let reading = read(http_status, &body, &id("t"));
            assert_eq!(reading.class, Unreadable, "HTTP {http_status}");
        }
    }
}

#[test]
fn the_code_decides_when_the_http_status_is_2xx() {
    for (code, class) in [
        ("201", Unrecognised),
        ("204", Unrecognised),
        ("0", Unrecognised),
        ("-0", Unrecognised),
        ("1", Unrecognised),
        ("-200", Unrecognised),
        ("-500", Unrecognised),
        ("301", Unrecognised),
        ("400", Unrecognised),
        ("404", NotFound),
        ("408", Failed),
        ("418", Unrecognised),
        ("429", RateLimited),
        ("499", Unrecognised),
        ("502", Unavailable),
        ("503", Unavailable),
        ("504", Unavailable),
        ("505", Failed),
        ("506", Failed),
        ("70000", Failed),
        ("65736", Failed),                // 200 when cut to 16 bits
        ("4294967496", Failed),           // 200 when cut to 32 bits
        ("18446744073709551816", Failed), // 200 when cut to 64 bits
        ("1000000000000000000000000000000", Failed),
        ("-1000000000000000000000000000000", Unrecognised),
    ] {
        for data in ["null", "[]", "{}", "\"\"", "0", r#"{"task_id":"t","status":"running"}"#] {
            let body = format!(r#"{{"message":"x","data":{data},"code":{code}}}"#);
            means(class, &body);
            assert_eq!(reading(202, &body).class, class, "{body}");
        }
        means(class, format!(r#"{{"code":{code}}}"#));
    }
    assert_eq!(reading(200, fixture("code_429.json")).effective_code, Some(429));
    assert_eq!(reading(200, r#"{"code":-7}"#).effective_code, Some(-7));
}

#[test]
fn a_code_that_is_no_integer_makes_the_body_unreadable() {
    for code in [
        "\"200\"",
        "200.0",
        "2e2",
        "true",
        "null",
        "[200]",
        "{}",
        "{\"code\":200}",
        "\"\"",
        "200.5",
        "1e400",
    ] {
        let body = format!(r#"{{"code":{code},"data":{{"task_id":"t","status":"running"}}}}"#);
        means(Unreadable, &body);
        assert_eq!(reading(200, &body).effective_code, None);
    }
    means(Unreadable, r#"{"data":{"task_id":"t","status":"running"}}"#);
    means(
        Unreadable,
        r#"{"Code":200,"CODE":200,"data":{"task_id":"t","status":"running"}}"#,
    );
    means(Unreadable, r#"{"data":{"code":200,"task_id":"t","status":"running"}}"#);
}

#[test]
fn what_is_not_one_json_object_is_unreadable() {
    let good = task(r#""status":"running""#);
    means(Live, &good);
    for body in [
        String::new(),
        " ".into(),
        "\u{feff}".into(),
        "null".into(),
        "200".into(),
        "\"success\"".into(),
        "[]".into(),
        format!("[{good}]"),
        format!(r#"[200,"success",{good}]"#),
        format!("{good}{good}"),
        format!("{good}\n{good}"),
        format!("{good}x"),
        format!("{good},"),
        format!("{good}\0"),
        format!("\0{good}"),
        format!("x{good}"),
        format!("{good}\u{feff}"),
        format!("{good}\u{a0}"),
        good[..good.len() - 1].to_owned(),
        good[..good.len() / 2].to_owned(),
        good.replace("success", "succ\0ess"),
        good.replace("success", "succ\ness"),
        good.replace("\"message\"", "\"mess\0age\""),
        good.replace("success", "\\x"),
        good.replace("\"message\"", "\"mess\\xage\""),
        good.replace(",\"data\"", ",,\"data\""),
        good.replace("\"message\"", "message"),
        good.replace("\"success\"", "NaN"),
        good.replace("\"success\"", "01"),
        good.replace('"', "'"),
        format!("/* found */{good}"),
    ] {
        means(Unreadable, body);
    }
}

#[test]
fn html_means_what_its_status_means() {
    let html = fixture("not_json.html");
    assert_eq!(reading(200, &html).class, Unreadable);
    assert_eq!(reading(404, &html).class, NotFound);
    assert_eq!(reading(501, &html).class, Failed);
    assert_eq!(reading(502, &html).class, Unavailable);
}

#[test]
fn white_space_and_one_byte_order_mark_are_skipped() {
    let good = task(r#" "status" : "running" "#);
    means(Live, format!(" \t\r\n{good} \t\r\n"));
    means(Live, format!("\u{feff}{good}\n"));
    means(Live, format!("\u{feff}\n{good}"));
    means(Unreadable, format!("\u{feff}\u{feff}{good}"));
    means(Unreadable, format!("\n\u{feff}{good}"));
}

#[test]
fn a_bad_byte_anywhere_makes_the_body_unreadable() {
    let good = task(r#""param":{"lyrics":"la@la"},"status":"running""#);
    means(Live, &good);
    for bad in [&b"\xff"[..], b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80"] {
        let at = good.find('@').unwrap();
        means(
            Unreadable,
            [&good.as_bytes()[..at], bad, &good.as_bytes()[at + 1..]].concat(),
        );
    }
    means(Unreadable, [b"\xff\xfe", good.as_bytes()].concat());
}

#[test]
fn a_repeated_code_or_data_makes_the_body_unreadable() {
    let running = r#"{"task_id":"t","status":"running"}"#;
    means(Live, format!(r#"{{"code":200,"data":{running}}}"#));
    means(Unreadable, format!(r#"{{"code":200,"data":{running},"code":200}}"#));
    means(
        Unreadable,
        format!(r#"{{"code":200,"data":{running},"\u0063ode":429}}"#),
    );
    means(Unreadable, format!(r#"{{"code":null,"code":200,"data":{running}}}"#));
    means(
        Unreadable,
        format!(r#"{{"code":200,"data":{running},"data":{running}}}"#),
    );
    means(Unreadable, format!(r#"{{"code":200,"data":null,"data":{running}}}"#));
    means(
        Unreadable,
        format!(r#"{{"code":200,"data":{running},"d\u0061ta":null}}"#),
    );
    means(Unreadable, r#"{"code":429,"data":null,"data":null}"#);
    means(
        Live,
        format!(r#"{{"code":200,"data":{running},"message":"a","message":"b"}}"#),
    );
}

#[test]
fn a_repeated_status_or_id_is_not_recognised() {
    found(Unrecognised, r#""status":"running","status":"success""#);
    found(Unrecognised, r#""status":"running","status":"running""#);
    found(Unrecognised, r#""status":"running","st\u0061tus":"running""#);
    found(Unrecognised, r#""status":null,"status":"running""#);
    found(Unrecognised, r#""status":"running","task_id":"t""#);
    found(Unrecognised, r#""status":"running","task_id":"other""#);
}

#[test]
fn of_other_repeated_fields_the_last_counts() {
    found(Live, r#""status":"running","param":{},"param":{}"#);
    found(
        Terminal,
        r#""status":"success","result":null,"result":{"media_urls":["u"]}"#,
    );
    found(
        Settling,
        r#""status":"success","result":{"media_urls":["u"]},"result":null"#,
    );
    found(
        Settling,
        r#""status":"success","result":{"media_urls":["u"],"media_urls":[]}"#,
    );
    let body = task(r#""status":"failed","complete_at":"x","complete_at":1768900482"#);
    assert_eq!(reading(200, body).complete_at, Timestamp::At(1_768_900_482));
}

#[test]
fn data_without_a_known_status_is_not_recognised() {
    for data in [
        "null",
        "[]",
        "{}",
        "\"running\"",
        "1",
        "true",
        r#"["t","running"]"#,
        r#"[{"task_id":"t","status":"running"}]"#,
        r#"{"task_id":"t"}"#,
    ] {
        means(Unrecognised, format!(r#"{{"code":200,"data":{data}}}"#));
    }
    means(Unrecognised, r#"{"code":200}"#);
    means(Unrecognised, r#"{"code":200,"task_id":"t","status":"running"}"#);
    for status in [
        "\"SUCCESS\"",
        "\"Success\"",
        "\" success\"",
        "\"success \"",
        "\"\"",
        "\"succeeded\"",
        "\"completed\"",
        "\"TEXT_SUCCESS\"",
        "\"fail\"",
        "\"error\"",
        "\"success\\u0000\"",
        "\"\\ud800\"",
        "null",
        "1",
        "true",
        "[\"success\"]",
        "{\"status\":\"success\"}",
    ] {
        found(
            Unrecognised,
            &format!(r#""status":{status},"result":{{"media_urls":["u"]}}"#),
        );
    }
    found(Unrecognised, r#""Status":"running","STATUS":"running""#);
}

#[test]
fn an_answer_about_another_task_is_not_recognised() {
    for task_id in [
        "\"T\"",
        "\"t \"",
        "\"\"",
        "\"tt\"",
        "null",
        "1",
        "[\"t\"]",
        "{}",
        "\"\\ud800\"",
    ] {
        for status in ["running", "success", "failed"] {
            means(
                Unrecognised,
                format!(r#"{{"code":200,"data":{{"task_id":{task_id},"status":"{status}"}}}}"#),
            );
        }
    }
    means(Unrecognised, r#"{"code":200,"data":{"status":"running"}}"#);
    means(
        Unrecognised,
        r#"{"code":200,"task_id":"t","data":{"status":"running"}}"#,
    );
    means(Live, r#"{"code":200,"data":{"status":"running","task_id":"\u0074"}}"#);
}

#[test]
fn escapes_do_not_change_what_is_said() {
    found(
        Terminal,
        r#""status":"\u0073\u0075ccess","result":{"media_urls":["u"]}"#,
    );
    found(Terminal, r#""st\u0061tus":"f\u0061iled""#);
    means(
        Live,
        r#"{"\u0063ode":200,"d\u0061ta":{"t\u0061sk_id":"t","\u0073tatus":"running"}}"#,
    );
    found(
        Terminal,
        r#""status":"success","\u0072esult":{"med\u0069a_info":{"a":1}}"#,
    );
}

#[test]
fn nothing_but_the_status_of_data_decides() {
    let lyrics = r#"\"status\":\"success\",\"task_id\":\"x\",\"code\":429}}"#;
    found(Live, &format!(r#""param":{{"lyrics":"{lyrics}"}},"status":"running""#));
    found(
        Live,
        r#""param":{"status":"success","code":500,"task_id":"x"},"status":"running""#,
    );
    found(
        Live,
        r#""status":"pending","result":{"code":501,"status":"failed","media_urls":["u"]}"#,
    );
    found(
        Live,
        r#""status":"running","param":[{"status":"success"},{"status":"failed"}],"code":404"#,
    );
    found(
        Live,
        r#""\"status\":\"success\"":"status","status\u0000":"success","status":"running""#,
    );
    found(Live, r#""status":"running","complete_at":1768900482,"error":"x""#);
    found(
        Terminal,
        r#""result":{"code":200,"status":"running"},"status":"failed","param":{"status":"pending"}"#,
    );
    found(
        Terminal,
        r#""status":"success","result":{"code":501,"media_urls":["u"]},"param":{"status":"failed"}"#,
    );
    means(
        Live,
        r#"{"code":200,"status":"failed","task_id":"x","data":{"task_id":"t","status":"running"},"errors":["x"]}"#,
    );
}

#[test]
fn a_success_without_media_is_settling() {
    for result in [
        "null",
        "{}",
        "[]",
        "\"\"",
        "\"u\"",
        "1",
        "true",
        r#"["u"]"#,
        r#"{"code":200,"message":"ok","usage":{"seconds":9}}"#,
        r#"{"suno_data":null,"media_urls":null,"media_info":null}"#,
        r#"{"suno_data":[],"media_urls":[ ],"media_info":{ }}"#,
        r#"{"media_urls":"","media_info":{}}"#,
        r#"{"Media_urls":["u"],"media_url":"u","nested":{"media_urls":["u"]}}"#,
    ] {
        found(Settling, &format!(r#""status":"success","result":{result}"#));
        found(Terminal, &format!(r#""status":"failed","result":{result}"#));
        found(Live, &format!(r#""status":"running","result":{result}"#));
    }
    found(Settling, r#""status":"success""#);
    found(Settling, r#""status":"success","media_urls":["u"],"suno_data":[1]"#);
}

#[test]
fn media_in_any_of_the_three_places_end_a_success() {
    for result in [
        r#"{"suno_data":[{"suno_id":"x"}]}"#,
        r#"{"media_urls":["u"]}"#,
        r#"{"media_urls":"u"}"#,
        r#"{"media_info":{"vocals":"u"}}"#,
        r#"{"suno_data":[],"media_urls":null,"media_info":{"vocals":"u"}}"#,
        r#"{"suno_data":[null]}"#,
    ] {
        found(Terminal, &format!(r#""status":"success","result":{result}"#));
    }
}

#[test]
fn code_501_has_ended_only_with_the_failed_task_that_was_asked_for() {
    let ended = r#"{"code":501,"message":"x","data":{"task_id":"t","status":"failed","complete_at":1768900482}}"#;
    for http_status in [200, 501] {
        let reading = reading(http_status, ended);
        assert_eq!((reading.class, reading.stage), (Terminal, Some(Stage::Ended)));
        assert_eq!(reading.effective_code, Some(501));
        assert_eq!(reading.complete_at, Timestamp::At(1_768_900_482));
    }
    for data in [
        "null",
        "[]",
        "{}",
        "\"failed\"",
        r#"{"task_id":"t","status":"pending"}"#,
        r#"{"task_id":"t","status":"running"}"#,
        r#"{"task_id":"t","status":"success"}"#,
        r#"{"task_id":"t","status":"success","result":{"media_urls":["u"]}}"#,
        r#"{"task_id":"t","status":"Failed"}"#,
        r#"{"task_id":"t","status":"failed","status":"failed"}"#,
        r#"{"task_id":"T","status":"failed"}"#,
        r#"{"status":"failed"}"#,
        r#"["t","failed"]"#,
    ] {
        let body = format!(r#"{{"code":501,"data":{data}}}"#);
        for http_status in [200, 501] {
            let reading = reading(http_status, &body);
            assert_eq!(
                (reading.class, reading.stage),
                (Failed, None),
                "HTTP {http_status} {body}"
            );
        }
    }
}

#[test]
fn http_501_trusts_only_a_body_that_is_understood() {
    let failed = r#"{"task_id":"t","status":"failed"}"#;
    assert_eq!(
        reading(501, format!(r#"{{"code":501,"data":{failed}}}"#)).class,
        Terminal
    );
    assert_eq!(
        reading(501, format!(r#"{{"code":200,"data":{failed}}}"#)).class,
        Terminal
    );
    for body in [
        format!(r#"{{"data":{failed}}}"#),
        format!(r#"{{"code":"501","data":{failed}}}"#),
        format!(r#"{{"code":501,"code":501,"data":{failed}}}"#),
        format!(r#"{{"code":501,"data":{failed},"data":{failed}}}"#),
        format!(r#"{{"code":501,"data":{failed}}}x"#),
        format!("[501,{failed}]"),
        String::new(),
    ] {
        assert_eq!(reading(501, &body).class, Failed, "{body}");
    }
    assert_eq!(reading(500, format!(r#"{{"code":501,"data":{failed}}}"#)).class, Failed);
}

#[test]
fn the_instants_are_read_as_they_are() {
    let read = |rest: &str| {
        let reading = reading(200, task(&format!(r#""status":"failed",{rest}"#)));
        (reading.complete_at, reading.create_at)
    };
    assert_eq!(
        read(r#""create_at":1768900001,"complete_at":1768900010"#),
        (Timestamp::At(1_768_900_010), Timestamp::At(1_768_900_001))
    );
    assert_eq!(read(r#""complete_at":null"#), (Timestamp::Absent, Timestamp::Absent));
    assert_eq!(
        read(r#""complete_at":"1768900010","create_at":0"#),
        (Timestamp::Nonsense, Timestamp::Nonsense)
    );
    assert_eq!(
        read(r#""param":{"complete_at":1768900010},"result":{"create_at":1768900010}"#),
        (Timestamp::Absent, Timestamp::Absent)
    );
    let running = super::read(200, &fixture("running.json"), &id(SONG));
    assert_eq!(
        (running.complete_at, running.create_at),
        (Timestamp::Absent, Timestamp::At(1_768_900_378))
    );
}

#[test]
fn each_answer_tells_how_far_the_task_is() {
    for (name, asked, stage) in [
        ("code_404.json", SONG, Stage::NotFound),
        ("pending.json", SONG, Stage::Pending),
        ("running.json", SONG, Stage::Running),
        ("success_null_result.json", IMAGE, Stage::Settling),
        ("success.json", SONG, Stage::Ended),
        ("failed.json", SONG, Stage::Ended),
    ] {
        assert_eq!(read(200, &fixture(name), &id(asked)).stage, Some(stage), "{name}");
    }
    for (name, asked, class) in FIXTURES {
        let stage = read(200, &fixture(name), &id(asked)).stage;
        assert_eq!(stage.is_some(), class.is_stored(), "{name}");
    }
}

#[test]
fn no_depth_is_too_deep() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let objects = format!(
        "{}1{}",
        r#"{"status":"failed","a":"#.repeat(100_000),
        "}".repeat(100_000)
    );
    for deep in [&deep, &objects] {
        found(Live, &format!(r#""param":{deep},"status":"running""#));
        found(Live, &format!(r#""status":"running","result":{deep}"#));
        found(
            Terminal,
            &format!(r#""status":"success","result":{{"media_urls":{deep},"x":{deep}}}"#),
        );
        found(Unrecognised, &format!(r#""status":{deep}"#));
        found(Unrecognised, &format!(r#""status":"running","task_id":{deep}"#));
        means(
            Live,
            format!(r#"{{"x":{deep},"code":200,"data":{{"task_id":"t","status":"running"}}}}"#),
        );
        means(RateLimited, format!(r#"{{"code":429,"data":{deep}}}"#));
        means(Unrecognised, format!(r#"{{"code":200,"data":{deep}}}"#));
        means(
            Unreadable,
            format!(r#"{{"code":{deep},"data":{{"task_id":"t","status":"running"}}}}"#),
        );
    }
    means(Unreadable, &deep);
    means(Unreadable, "[".repeat(1_000_000));
    means(Unreadable, r#"{"code":"#.repeat(1_000_000));
    found(
        Terminal,
        &format!(r#""status":"failed","create_at":{deep},"complete_at":{deep}"#),
    );
}

#[test]
fn a_param_of_ten_megabytes_hides_nothing() {
    let image = "A".repeat(10 << 20);
    found(
        Live,
        &format!(r#""param":{{"image":"data:image/png;base64,{image}"}},"status":"running""#),
    );
    let quoted = r#"\"status\":\"success\","#.repeat(500_000);
    found(Live, &format!(r#""param":"{quoted}","status":"running""#));
}

#[test]
fn numbers_that_no_type_holds_are_ignored() {
    let digits = "9".repeat(10_000);
    found(
        Live,
        &format!(r#""credits":{digits}.5e-99999,"x":1e999999,"y":-{digits},"status":"running""#),
    );
    found(
        Terminal,
        &format!(r#""status":"success","result":{{"media_urls":["u"],"n":{digits}}}"#),
    );
    let body = task(&format!(r#""status":"failed","complete_at":{digits}"#));
    assert_eq!(reading(200, body).complete_at, Timestamp::Nonsense);
}

#[test]
fn text_that_is_no_unicode_when_unescaped_is_ignored_where_nothing_is_asked_of_it() {
    found(Live, r#""param":"\ud800","\udfff":1,"status":"running""#);
    means(
        Live,
        r#"{"\ud800":1,"message":"\ud800","code":200,"data":{"task_id":"t","status":"running"}}"#,
    );
}

/// Any JSON value, with keys and texts that a search would fall for.
fn any_json() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        any::<String>(),
        Just("status".to_owned()),
        Just("task_id".to_owned()),
        Just(r#"","status":"success","x":""#.to_owned()),
        Just("success".to_owned()),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(text.clone(), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_param_changes_what_an_answer_means(param in any_json(), pretty in any::<bool>()) {
        let result = json!({ "media_urls": ["u"] });
        for (code, status, class) in [
            (200, json!("pending"), Live),
            (200, json!("success"), Terminal),
            (200, json!("archived"), Unrecognised),
            (501, json!("failed"), Terminal),
            (501, json!("running"), Failed),
            (404, Value::Null, NotFound),
            (429, Value::Null, RateLimited),
        ] {
            let body = json!({
                "code": code, "message": param,
                "data": { "param": param, "result": result, "source": param, "status": status, "task_id": "t" },
            });
            let body = if pretty { serde_json::to_vec_pretty(&body) } else { serde_json::to_vec(&body) };
            prop_assert_eq!(reading(200, body.unwrap()).class, class);
        }
    }

    #[test]
    fn no_result_contradicts_a_failure_or_a_live_status(result in any_json()) {
        for (status, class) in [("failed", Terminal), ("running", Live)] {
            let body = json!({ "code": 200, "data": { "result": result, "status": status, "task_id": "t" } });
            prop_assert_eq!(reading(200, body.to_string()).class, class);
        }
    }

    #[test]
    fn no_bytes_panic(http_status in any::<u16>(), body in prop::collection::vec(any::<u8>(), 0..200)) {
        let reading = reading(http_status, body);
        prop_assert_eq!(reading.stage.is_some(), reading.class.is_stored());
    }

    #[test]
    fn no_damage_to_an_answer_panics_or_ends_a_task(at in 0_usize..700, byte in any::<u8>(), cut in any::<bool>()) {
        let mut body = fixture("running.json");
        let at = at % body.len();
        if cut {
            body.truncate(at);
        } else if let Some(place) = body.get_mut(at) {
            *place = byte;
        }
        let class = read(200, &body, &id(SONG)).class;
        prop_assert!(!matches!(class, Terminal | Settling), "{class:?}");
    }
}

#[test]
fn only_an_integer_is_an_integer() {
    assert_eq!(integer("200"), Some(200));
    assert_eq!(integer("-1"), Some(-1));
    assert_eq!(integer("0"), Some(0));
    assert_eq!(integer("-0"), Some(0));
    assert_eq!(integer("99999999999999999999"), Some(i64::MAX));
    assert_eq!(integer("-99999999999999999999"), Some(i64::MIN));
    for json in ["200.0", "2e2", "2E2", "\"200\"", "true", "null", "[200]", "{}"] {
        assert_eq!(integer(json), None, "{json}");
    }
}

#[test]
fn only_nothing_is_empty() {
    for json in ["null", "\"\"", "[]", "{}", "[ ]", "{\r\n\t}"] {
        assert!(is_empty(json), "{json}");
    }
    for json in [
        "0",
        "false",
        "\" \"",
        "[null]",
        "[[]]",
        "{\"a\":null}",
        "\"[]\"",
        "\"null\"",
    ] {
        assert!(!is_empty(json), "{json}");
    }
}

#[test]
fn a_string_is_compared_by_what_it_means() {
    assert_eq!(string(r#""success""#).as_deref(), Some("success"));
    assert_eq!(string(r#""\u0073uccess""#).as_deref(), Some("success"));
    for json in ["success", "null", "1", "[\"success\"]", r#""\ud800""#] {
        assert_eq!(string(json), None, "{json}");
    }
}

#[test]
fn a_task_moves_forward_through_its_stages() {
    let path = [
        Stage::NotFound,
        Stage::Pending,
        Stage::Running,
        Stage::Settling,
        Stage::Ended,
    ];
    assert!(path.is_sorted_by(|earlier, later| earlier < later));
    assert!(path.iter().all(|stage| stage.class().is_stored()));
}

#[test]
fn only_what_a_snapshot_beats_yields_to_it() {
    for class in [RateLimited, Unavailable, Failed, Unreadable] {
        assert!(class.yields_to_snapshot() && !class.is_stored(), "{class:?}");
    }
    for class in [Live, Settling, Terminal, NotFound] {
        assert!(!class.yields_to_snapshot() && class.is_stored(), "{class:?}");
    }
    for class in [Refused, Unrecognised] {
        assert!(!class.yields_to_snapshot() && !class.is_stored(), "{class:?}");
    }
}

/// A body whose members are mostly what they should be.
fn body() -> impl Strategy<Value = String> {
    let any = |usual: &'static str| {
        prop_oneof![
            8 => usual.prop_map(|value| value),
            1 => r#"null|1|-1|1.5|"x"|""|\[\]|\[1\]|\{\}|\{"a":1\}|tru|"\\ud800""#.prop_map(|value| value),
        ]
    };
    let member = |name: &'static str, usual| {
        let name =
            prop_oneof![30 => Just(format!("\"{name}\"")), 1 => Just(format!("\"{}\"", name.replace('a', "\\u0061")))];
        let value = any(usual);
        let often = prop_oneof![1 => Just(0), 20 => Just(1), 1 => Just(2)];
        (name, prop::collection::vec(value, 2), often).prop_map(|(name, values, often)| {
            values
                .into_iter()
                .take(often)
                .map(|value| format!("{name}:{value}"))
                .collect::<Vec<_>>()
        })
    };
    let object = |members: Vec<Vec<String>>| format!("{{{}}}", members.concat().join(","));
    let media = r#"null|\[\]|\[ \]|\["u"\]|\{\}|\{"a":"u"\}|"""#;
    let result = vec![
        member("suno_data", media),
        member("media_urls", media),
        member("media_info", media),
        member("x", "1"),
    ];
    let result = prop_oneof![4 => result.prop_map(object), 1 => any("null")];
    let data = (
        member("task_id", "\"a\""),
        member("status", "\"(pending|running|success|success|failed|other)\""),
        result,
        member("complete_at", "1800000000|null|5"),
        member("create_at", "1700000000|null"),
    );
    let data = data.prop_map(move |(task_id, status, result, complete_at, create_at)| {
        object(vec![
            task_id,
            status,
            vec![format!("\"result\":{result}")],
            complete_at,
            create_at,
        ])
    });
    let data = prop_oneof![8 => data, 1 => any("null")];
    (member("code", "200|501|404|2e2"), data, member("message", "\"a\""))
        .prop_map(move |(code, data, message)| object(vec![code, vec![format!("\"data\":{data}")], message]))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_usual_is_read_as_anything_is(body in body()) {
        let asked = TaskId::new("a").unwrap();
        if let Some(usual) = Envelope::usual(&body) {
            let any = Envelope::any(&body).unwrap();
            prop_assert_eq!(usual.code, any.code);
            prop_assert_eq!(Task::of(&usual.data.unwrap(), &asked), Task::of(&any.data.unwrap(), &asked));
        }
    }
}

#[test]
fn what_upstream_says_is_usual() {
    for body in [
        r#"{"code":200,"message":"success","data":{"task_id":"a","status":"running"}}"#,
        r#"{"code":200,"data":{"task_id":"a","status":"pending","result":null,"complete_at":null,"create_at":1}}"#,
        r#"{"code":200,"data":{"task_id":"a","status":"success","result":{"code":200,"suno_data":[{"a":"\ud83d"}]}}}"#,
    ] {
        assert!(Envelope::usual(body).is_some(), "{body}");
    }
}

//! What a single value may look like, read and written: pure, one function per kind of value.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use http::uri::{Authority, Scheme};
use http::{HeaderName, Uri};
use rustls_pki_types::ServerName;
use serde_json::Value;

use super::problem::{Wrong, wrong};
use super::reader::is_not;

/// More digits than any sane duration has. humantime 2.4 panics where 20 digits of seconds meet a carry.
const MAX_DURATION_DIGITS: usize = 12;

/// The units of a duration. humantime knows many more, of which `M` is a month.
const DURATION_UNITS: [&str; 5] = ["ms", "s", "m", "h", "d"];

/// Headers that carry something else, so that they name no client.
const TAKEN: [&str; 14] = [
    "x-api-key",
    "authorization",
    "proxy-authorization",
    "cookie",
    "host",
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "content-length",
    "te",
    "trailer",
    "upgrade",
    "expect",
];

/// Text that is not empty.
pub(super) fn text<'a>(value: &'a Value, example: &str) -> Result<&'a str, Wrong> {
    match value.as_str() {
        Some(text) if !text.trim().is_empty() => Ok(text),
        Some(_) => wrong("is empty", format!("write text, e.g. {example:?}")),
        None => Err(is_not(value, "text in quotes", &format!("{example:?}"))),
    }
}

/// A path of a file, which need not be there.
pub(super) fn file(value: &Value) -> Result<PathBuf, Wrong> {
    let path = text(value, "/var/lib/crun-gateway/answers")?;
    if path.ends_with('/') || path.contains('\0') {
        return wrong(
            "is no file's path",
            r#"name a file, e.g. "/var/lib/crun-gateway/answers""#,
        );
    }
    Ok(path.into())
}

/// A whole number.
pub(super) fn whole(value: &Value, range: &RangeInclusive<u64>) -> Result<u64, Wrong> {
    let (least, most) = (range.start(), range.end());
    match value.as_u64() {
        Some(number) if range.contains(&number) => Ok(number),
        Some(_) => wrong(
            "is out of range",
            format!("choose a whole number from {least} to {most}"),
        ),
        None if value.is_number() => wrong(
            "is not a whole number in range",
            format!("choose one from {least} to {most}"),
        ),
        None if value.as_str().is_some_and(|text| text.parse::<f64>().is_ok()) => {
            wrong("is text, not a number", "write the number without quotes")
        }
        None => Err(is_not(value, "a whole number", &least.to_string())),
    }
}

/// A duration with its unit, or a sum of such.
pub(super) fn duration(value: &Value, range: &RangeInclusive<Duration>) -> Result<Duration, Wrong> {
    let bare = |text: &str| text.trim().parse::<f64>().is_ok();
    if value.is_number() || value.as_str().is_some_and(bare) {
        return wrong("has no unit", r#"write it with a unit, e.g. "3s""#);
    }
    let text = text(value, "3s")?;
    let mut words = text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty());
    let is_known = words.all(|word| DURATION_UNITS.contains(&word));
    let parsed = (is_known && text.chars().filter(char::is_ascii_digit).count() <= MAX_DURATION_DIGITS)
        .then(|| humantime::parse_duration(text).ok())
        .flatten();
    match parsed {
        Some(duration) if range.contains(&duration) => Ok(duration),
        Some(_) => {
            let (least, most) = (written_duration(*range.start()), written_duration(*range.end()));
            wrong("is out of range", format!("choose a duration from {least} to {most}"))
        }
        None => wrong(
            "is not a duration",
            r#"write a number and a unit (ms, s, m, h, d), e.g. "3s""#,
        ),
    }
}

/// A size in bytes, with a unit or without.
pub(super) fn size(value: &Value, range: &RangeInclusive<u64>) -> Result<u64, Wrong> {
    let parsed = match value {
        Value::Number(number) => number.as_u64(),
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) | Value::Object(_) => text(value, "16MiB")?
            .trim()
            .parse::<ByteSize>()
            .ok()
            .map(|size| size.as_u64()),
    };
    match parsed {
        Some(bytes) if range.contains(&bytes) => Ok(bytes),
        Some(_) => {
            let (least, most) = (written_size(*range.start()), written_size(*range.end()));
            wrong("is out of range", format!("choose a size from {least} to {most}"))
        }
        None => wrong(
            "is not a size",
            r#"write a number of bytes or a number and a unit, e.g. "16MiB""#,
        ),
    }
}

/// One of a few words.
pub(super) fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Result<T, Wrong> {
    let words = || choices.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
    let word = value
        .as_str()
        .and_then(|text| choices.iter().find(|(word, _)| *word == text));
    word.map_or_else(
        || wrong("is not one of the choices", format!("write one of {}", words())),
        |(_, choice)| Ok(*choice),
    )
}

/// An IP address and a port.
pub(super) fn address(value: &Value) -> Result<SocketAddr, Wrong> {
    let parsed = text(value, "0.0.0.0:8080")?.parse();
    parsed.or_else(|_| {
        let fix = r#"write both, e.g. "0.0.0.0:8080" or "[::]:8080""#;
        wrong("is not an IP address and a port", fix)
    })
}

/// `http://` or `https://`, a host and perhaps a port.
pub(super) fn url(value: &Value) -> Result<Uri, Wrong> {
    web_url(value, "https://api.crun.ai")
}

/// A collector's URL: `http://` or `https://`, a host and perhaps a port.
pub(super) fn endpoint(value: &Value) -> Result<Uri, Wrong> {
    web_url(value, "http://otel-collector:4318")
}

/// From 0 to 1.
pub(super) fn ratio(value: &Value) -> Result<f64, Wrong> {
    let ratio = value.as_f64().ok_or_else(|| is_not(value, "a number", "0.01"))?;
    if (0.0..=1.0).contains(&ratio) {
        Ok(ratio)
    } else {
        wrong("is out of range", "choose a number from 0 to 1")
    }
}

fn web_url(value: &Value, example: &str) -> Result<Uri, Wrong> {
    let fix = format!("write scheme and host only, e.g. {example:?}");
    let text = text(value, example)?;
    let Ok(uri) = text.parse::<Uri>() else {
        return wrong("is not a URL", fix);
    };
    let web = [&Scheme::HTTP, &Scheme::HTTPS];
    let Some(authority) = uri
        .authority()
        .filter(|_| uri.scheme().is_some_and(|scheme| web.contains(&scheme)))
    else {
        return wrong("is not an http or https URL", fix);
    };
    if authority.as_str().contains('@') {
        return wrong("has a user name or a password", fix);
    }
    if uri.path() != "/" || uri.query().is_some() || text.contains('#') {
        return wrong("has a path, a query or a fragment", fix);
    }
    if host_and_port(authority).is_none() {
        return wrong("has no valid host and port", fix);
    }
    Ok(uri)
}

/// The host that `authority` names, an IPv6 address without its brackets, and the port, if there is one; `None` unless both
/// are sound.
pub(super) fn host_and_port(authority: &Authority) -> Option<(&str, Option<u16>)> {
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let port = authority.port_u16().filter(|port| *port > 0);
    let has_port = authority.as_str() != authority.host();
    let is_sound = ServerName::try_from(host).is_ok() && port.is_some() == has_port;
    is_sound.then_some((host, port))
}

/// The name of a header that may name a client.
pub(super) fn header(value: &Value) -> Result<HeaderName, Wrong> {
    let Ok(name) = HeaderName::from_bytes(text(value, "x-client-id")?.as_bytes()) else {
        return wrong("is not a header name", r#"write one, e.g. "x-client-id""#);
    };
    if TAKEN.contains(&name.as_str()) {
        let what = "is a header that carries something else";
        return wrong(what, r#"choose one that names the client, e.g. "x-client-id""#);
    }
    Ok(name)
}

/// True or false; YAML 1.2 knows no other words for them.
pub(super) fn boolean(value: &Value) -> Result<bool, Wrong> {
    value.as_bool().ok_or_else(|| is_not(value, "true or false", "true"))
}

/// An account's or a client's name, fit for a metric label.
pub(super) fn name(value: &Value) -> Result<String, Wrong> {
    let name = text(value, "music")?;
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if !plain || name.len() > 64 {
        let fix = "use 1 to 64 letters, digits, `_`, `.` or `-`";
        return wrong("is not fit for a metric label", fix);
    }
    if name == "other" {
        return wrong(
            "`other` stands for every account that is not configured",
            "choose another name",
        );
    }
    Ok(name.to_owned())
}

/// A path prefix that means the same to us and to upstream.
pub(super) fn prefix(value: &Value) -> Result<String, Wrong> {
    let prefix = text(value, "/api/v1/")?;
    if !(prefix.starts_with('/') && prefix.ends_with('/')) {
        return wrong(
            "does not begin and end with `/`",
            r#"write whole segments, e.g. "/api/v1/""#,
        );
    }
    let plain = prefix
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"/_.~-".contains(&b));
    let dots = prefix
        .split('/')
        .any(|segment| segment == "." || segment.contains(".."));
    if !plain || dots || prefix.contains("//") {
        let what = "has `//`, dot segments, `%` or another character that paths may hide behind";
        return wrong(what, r#"write it plainly, e.g. "/api/v1/""#);
    }
    Ok(prefix.to_owned())
}

/// `10m`: the largest unit that leaves no remainder; a part of a millisecond is a fraction of it.
pub(super) fn written_duration(duration: Duration) -> String {
    const UNITS: [(u128, &str); 5] = [
        (86_400_000_000_000, "d"),
        (3_600_000_000_000, "h"),
        (60_000_000_000, "m"),
        (1_000_000_000, "s"),
        (NANOS_PER_MS, "ms"),
    ];
    const NANOS_PER_MS: u128 = 1_000_000;
    let nanos = duration.as_nanos();
    match UNITS.iter().find(|(unit, _)| nanos > 0 && nanos.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", nanos / unit),
        None if nanos == 0 => "0s".to_owned(),
        None => {
            let written = format!("{}.{:06}", nanos / NANOS_PER_MS, nanos % NANOS_PER_MS);
            written.trim_end_matches('0').to_owned() + "ms"
        }
    }
}

/// `256MiB`: the largest unit that leaves no remainder; plain bytes below.
pub(super) fn written_size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (bytesize::TIB, "TiB"),
        (bytesize::GIB, "GiB"),
        (bytesize::MIB, "MiB"),
        (bytesize::KIB, "KiB"),
    ];
    match UNITS.iter().find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const ANY_DURATION: RangeInclusive<Duration> = Duration::ZERO..=Duration::MAX;

    #[test]
    fn a_duration_has_a_unit() {
        let parse = |value: Value| duration(&value, &(Duration::from_secs(1)..=Duration::from_mins(1)));
        assert_eq!(parse(json!("3s")), Ok(Duration::from_secs(3)));
        assert_eq!(parse(json!("1500ms")), Ok(Duration::from_millis(1500)));
        assert_eq!(parse(json!("1m")), Ok(Duration::from_mins(1)));
        for bare in [json!(3), json!("3"), json!(1.5), json!("-3"), json!(0), json!("0")] {
            assert_eq!(parse(bare), wrong("has no unit", r#"write it with a unit, e.g. "3s""#));
        }
        assert_eq!(
            parse(json!("2m")),
            wrong("is out of range", "choose a duration from 1s to 1m")
        );
        for bad in ["three", "-3s", "3 parsecs", "3s!", "1.s"] {
            assert_eq!(parse(json!(bad)).unwrap_err().what, "is not a duration", "{bad}");
        }
    }

    #[test]
    fn a_duration_has_a_unit_that_its_error_names() {
        let parse = |text: &str| duration(&json!(text), &ANY_DURATION);
        let minutes = |minutes| Ok(Duration::from_mins(minutes));
        for sum in ["90m", "1h 30m", "1h30m", "1.5h", "60 m 30 m"] {
            assert_eq!(parse(sum), minutes(90), "{sum}");
        }
        assert_eq!(parse("2d"), minutes(2880));
        let fix = r#"write a number and a unit (ms, s, m, h, d), e.g. "3s""#;
        for other in [
            "10M",
            "1w",
            "1y",
            "10us",
            "10µs",
            "10ns",
            "3sec",
            "3 seconds",
            "10min",
            "2hours",
            "1day",
            "1h 10M",
            "3S",
        ] {
            assert_eq!(parse(other), wrong("is not a duration", fix), "{other}");
        }
    }

    #[test]
    fn a_duration_that_overflows_is_refused() {
        for huge in [
            "18446744073709551615s 1000ms",
            "99999999999999999999s",
            "584542046090y 26215615s 1000ms",
        ] {
            assert!(duration(&json!(huge), &ANY_DURATION).is_err(), "{huge}");
        }
    }

    #[test]
    fn a_size_may_do_without_a_unit() {
        let parse = |value: Value| size(&value, &(1024..=bytesize::GIB));
        assert_eq!(parse(json!("16MiB")), Ok(16 << 20));
        assert_eq!(parse(json!("16 MB")), Ok(16_000_000));
        assert_eq!(parse(json!(4096)), Ok(4096));
        assert_eq!(parse(json!("4096")), Ok(4096));
        assert_eq!(parse(json!("1.5KiB")), Ok(1536));
        for out in [json!(1), json!("2GiB"), json!("999999999999EiB")] {
            assert_eq!(parse(out), wrong("is out of range", "choose a size from 1KiB to 1GiB"));
        }
        for bad in [
            json!("lots"),
            json!("16 bananas"),
            json!(-5),
            json!(1.5),
            json!("-1KiB"),
        ] {
            assert_eq!(parse(bad.clone()).unwrap_err().what, "is not a size", "{bad}");
        }
    }

    #[test]
    fn numbers_are_whole_and_unquoted() {
        let parse = |value: Value| whole(&value, &(1..=100)).map_err(|wrong| wrong.what);
        assert_eq!(parse(json!(15)), Ok(15));
        assert_eq!(parse(json!(0)), Err("is out of range".into()));
        assert_eq!(parse(json!(-1)), Err("is not a whole number in range".into()));
        assert_eq!(parse(json!(1.5)), Err("is not a whole number in range".into()));
        assert_eq!(parse(json!("15")), Err("is text, not a number".into()));
    }

    #[test]
    fn the_url_is_scheme_and_host() {
        for good in [
            "https://api.crun.ai",
            "http://127.0.0.1:8099",
            "http://[::1]:8099",
            "https://api.crun.ai/",
            "http://upstream:80",
            "HTTPS://API.crun.ai",
        ] {
            assert!(url(&json!(good)).is_ok(), "{good}: {:?}", url(&json!(good)));
        }
        for bad in [
            "api.crun.ai",
            "ftp://api.crun.ai",
            "https://",
            "https:///x",
            "https://user:pw@api.crun.ai",
            "https://api.crun.ai/api",
            "https://api.crun.ai?x=1",
            "https://api.crun.ai/#x",
            "https://api.crun.ai:",
            "https://api.crun.ai:0",
            "https://api.crun.ai:99999",
            "https://:443",
            "https://a b",
            "/api",
            "*",
        ] {
            assert!(url(&json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_prefix_hides_nothing() {
        for good in ["/", "/api/v1/", "/v1.2/a-b_c~/"] {
            assert_eq!(prefix(&json!(good)), Ok(good.to_owned()));
        }
        for bad in [
            "", "api/", "/api", "/a%2f/", "/../", "/a/./", "/a..b/", "//", "/a//b/", "/a;b/", "/a b/", "/a?/", "/é/",
            "/a\\/",
        ] {
            assert!(prefix(&json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_client_header_names_clients() {
        assert_eq!(
            header(&json!("X-Client-Id")),
            Ok(HeaderName::from_static("x-client-id"))
        );
        for bad in ["x-api-key", "Host", "authorization", "a b", "", "x:y"] {
            assert!(header(&json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_account_name_is_a_metric_label() {
        assert_eq!(name(&json!("music-2.eu_a")), Ok("music-2.eu_a".to_owned()));
        for bad in [
            json!(""),
            json!("other"),
            json!("a b"),
            json!("ключ"),
            json!("x".repeat(65)),
            json!(7),
        ] {
            assert!(name(&bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(nanos in 0..31_536_000_000_000_000_u64, scale in 0..4_u32, bytes: u64) {
            let unit = [1, 1_000_000, 1_000_000_000, 60_000_000_000][scale as usize];
            let exact = Duration::from_nanos(nanos / unit * unit);
            prop_assert_eq!(humantime::parse_duration(&written_duration(exact)), Ok(exact));
            let exact = bytes >> (10 * scale) << (10 * scale);
            prop_assert_eq!(size(&json!(written_size(exact)), &(0..=u64::MAX)), Ok(exact));
        }
    }
}

//! What a request's Cache-Control (RFC 9111 §5.2.1) says about how old an answer may be.
//!
//! Only `max-age=N` and `no-cache`, which is `max-age=0` here; the smallest counts. Every other directive, and whatever
//! is not exactly one of these two, has no effect. What is made of the wish is not this file's business.

use std::time::Duration;

use http::HeaderMap;
use http::header::CACHE_CONTROL;

/// How old an answer may be, if the request says so.
pub(super) fn wanted(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(CACHE_CONTROL).iter();
    values.flat_map(|value| of_list(value.as_bytes())).min()
}

fn of_list(list: &[u8]) -> impl Iterator<Item = Duration> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let members = list.split(move |byte| {
        // A comma in a quoted string separates nothing, nor does `\"` end one (RFC 9110 §5.6.4).
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_quoted => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            b',' => return !is_quoted,
            _ => {}
        }
        false
    });
    members.filter_map(|member| of_directive(member.trim_ascii()))
}

fn of_directive(directive: &[u8]) -> Option<Duration> {
    if directive.eq_ignore_ascii_case(b"no-cache") {
        return Some(Duration::ZERO);
    }
    let (name, value) = directive.split_at_checked(b"max-age=".len())?;
    if !name.eq_ignore_ascii_case(b"max-age=") {
        return None;
    }
    let quoted = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
    let digits = quoted.unwrap_or(value);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // Only too many digits are left to fail.
    let seconds = str::from_utf8(digits).ok()?.parse().unwrap_or(u64::MAX);
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn of(lines: &[&str]) -> Option<u64> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(CACHE_CONTROL, line.parse().unwrap());
        }
        wanted(&headers).map(|age| age.as_secs())
    }

    #[test]
    fn max_age_and_no_cache_are_read() {
        for (line, seconds) in [
            ("max-age=0", 0),
            ("max-age=5", 5),
            ("Max-Age=007", 7),
            ("max-age=\"5\"", 5),
            ("no-cache", 0),
            ("NO-CACHE", 0),
            (" no-store ,\tmax-age=3", 3),
            (",,max-age=3,", 3),
            ("max-age=9, max-age=3, max-age=6", 3),
            ("max-age=9, no-cache", 0),
            ("ext=\"a, b\", max-age=3", 3),
            ("ext=\"a\\\", b\", max-age=3", 3),
            ("max-age=-1, max-age=8", 8),
            ("max-age=99999999999999999999999", u64::MAX),
        ] {
            assert_eq!(of(&[line]), Some(seconds), "{line}");
        }
        assert_eq!(of(&["no-store", "max-age=4", "max-age=2"]), Some(2));
    }

    #[test]
    fn everything_else_has_no_effect() {
        for line in [
            "",
            ",",
            "max-age",
            "max-age=",
            "max-age=-1",
            "max-age=+1",
            "max-age=1.5",
            "max-age=1s",
            "max-age=0x1",
            "max-age = 1",
            "max-age= 1",
            "max-age=\"",
            "max-age=\"\"",
            "max-age=\"1",
            "max-age=1\"",
            "max-age=\" 1\"",
            "max-age:1",
            "max-age=1;no-cache",
            "s-maxage=1",
            "x-max-age=1",
            "no-cache=1",
            "no-cache=\"x\"",
            "no-store",
            "max-stale=10, min-fresh=3, only-if-cached, no-transform",
            "ext=\"a, max-age=0, no-cache",
            "ext=\"a, max-age=0\"",
        ] {
            assert_eq!(of(&[line]), None, "{line}");
        }
        assert_eq!(of(&[]), None);
    }

    proptest! {
        #[test]
        fn no_bytes_upset_it(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                wanted(&HeaderMap::from_iter([(CACHE_CONTROL, value)]));
            }
        }

        #[test]
        fn any_list_of_ages_means_the_smallest(ages in prop::collection::vec(any::<u32>(), 1..10)) {
            let list: Vec<_> = ages.iter().map(|age| format!("max-age={age}")).collect();
            prop_assert_eq!(of(&[&list.join(", ")]), ages.iter().min().map(|age| u64::from(*age)));
        }
    }
}

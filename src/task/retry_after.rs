//! `Retry-After`, upstream's or a collector's, in both forms of RFC 9110 §10.2.3.
//!
//! Upstream documents no such header, but its kind sends one. It can only make a pause longer than ours would be, so
//! whatever asks for no pause at all counts as absent.

use std::time::{Duration, SystemTime};

/// The longest pause that the header can impose. A quota a second needs none longer; the bound keeps a wrong header, or
/// a wrong clock, from silencing an account.
const MAX: Duration = Duration::from_mins(5);

/// How long a `Retry-After` of `value` asks to wait from `now` on, at most 300 s.
///
/// `None` when it is neither whole seconds nor an HTTP date, or asks for no wait: 0 seconds, or a date not after `now`.
pub fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim_matches([' ', '\t']);
    let asked = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // Digits alone fail to parse only when there are too many of them.
        value.parse().map_or(MAX, Duration::from_secs)
    } else {
        httpdate::parse_http_date(value).ok()?.duration_since(now).ok()?
    };
    (!asked.is_zero()).then(|| asked.min(MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 1994-11-06 08:49:37 GMT, the example of RFC 9110.
    const THEN: u64 = 784_111_777;

    fn seconds(value: &str) -> Option<u64> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(THEN - 10);
        retry_after(value, now).map(|wait| wait.as_secs())
    }

    #[test]
    fn whole_seconds_are_read() {
        assert_eq!(seconds("1"), Some(1));
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds(" 007\t"), Some(7));
    }

    #[test]
    fn dates_are_read_in_every_form_that_http_knows() {
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(10));
        assert_eq!(seconds("Sunday, 06-Nov-94 08:49:37 GMT"), Some(10));
        assert_eq!(seconds("Sun Nov  6 08:49:37 1994"), Some(10));
    }

    #[test]
    fn no_wait_is_no_header() {
        assert_eq!(seconds("0"), None);
        assert_eq!(seconds("000"), None);
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:27 GMT"), None);
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:26 GMT"), None);
        assert_eq!(seconds("Thu, 01 Jan 1970 00:00:00 GMT"), None);
    }

    #[test]
    fn a_pause_is_bounded() {
        assert_eq!(seconds("300"), Some(300));
        assert_eq!(seconds("301"), Some(300));
        assert_eq!(seconds(&"9".repeat(100)), Some(300));
        assert_eq!(seconds("Fri, 31 Dec 9999 23:59:59 GMT"), Some(300));
    }

    #[test]
    fn garbage_is_no_header() {
        for value in [
            "",
            " ",
            "-1",
            "+5",
            "1.5",
            "1e2",
            "5s",
            "1 2",
            "0x10",
            "٣",
            "soon",
            "Sun, 06 Nov 1994",
            "\u{a0}5",
        ] {
            assert_eq!(seconds(value), None, "{value:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_or_exceeds_the_bound(
            value in any::<String>(),
            date in "(Sun|Mon), [0-9]{2} (Jan|Feb|Dec) [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT",
        ) {
            for value in [value, date] {
                let wait = retry_after(&value, SystemTime::UNIX_EPOCH + Duration::from_secs(THEN));
                prop_assert!(wait.is_none_or(|wait| !wait.is_zero() && wait <= MAX));
            }
        }
    }
}

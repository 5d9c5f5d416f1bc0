//! The id of a task: how a client's query string spells it, and how ours does.
//!
//! Upstream's ids are opaque. Its documents disagree on their length, and real clients accept 1 to 256 printable ASCII
//! characters, so that is what is taken here. One id has one spelling towards upstream, whatever the client's encoder.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// The parameter that carries a task id.
const PARAMETER: &str = "task_id";

/// The longest id, in characters: the most that a client in the wild accepts.
const MAX_LEN: usize = 256;

/// RFC 3986 §2.3: everything but the unreserved characters is escaped.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A task's id: 1 to 256 printable ASCII characters, case-sensitive, otherwise opaque. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(Arc<str>);

/// Why a query string names no task. No message repeats what the client sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum TaskIdError {
    /// The query string has no such parameter.
    #[error("task_id is missing: add ?task_id=<id> to the URL")]
    Missing,
    /// The parameter has no value.
    #[error("task_id is empty: give the id that CreateTask returned")]
    Empty,
    /// The parameter occurs more than once, be it with one value or several.
    #[error("task_id is given more than once: ask for one task per request")]
    Repeated,
    /// A `%` that two hexadecimal digits do not follow.
    #[error("task_id has a broken percent escape: send a literal % as %25")]
    BadEscape,
    /// A control character, or one outside of ASCII, after decoding.
    #[error("task_id has a character outside printable ASCII: send the id exactly as CreateTask returned it")]
    NotPrintable,
    /// More than 256 characters after decoding.
    #[error("task_id is longer than 256 characters: send the id exactly as CreateTask returned it")]
    TooLong,
}

impl TaskId {
    /// An id as it is, without any encoding.
    ///
    /// # Errors
    /// [`TaskIdError::Empty`], [`TaskIdError::NotPrintable`] or [`TaskIdError::TooLong`].
    pub fn new(id: &str) -> Result<Self, TaskIdError> {
        if id.is_empty() {
            return Err(TaskIdError::Empty);
        }
        if !id.bytes().all(|byte| matches!(byte, 0x20..=0x7e)) {
            return Err(TaskIdError::NotPrintable);
        }
        if id.len() > MAX_LEN {
            return Err(TaskIdError::TooLong);
        }
        Ok(Self(id.into()))
    }

    /// The task that a raw query string (what follows `?`) asks for.
    ///
    /// Read as a form: `+` is a space, names are decoded before they are compared (`task%5Fid` is `task_id`, `Task_Id`
    /// is not). Every other parameter is ignored, whatever it holds.
    ///
    /// # Errors
    /// Each way in which `task_id` can be unusable has a [`TaskIdError`] of its own; repetition is reported before
    /// anything that is wrong with a value.
    pub fn from_query(query: Option<&str>) -> Result<Self, TaskIdError> {
        // Most say nothing else, and say it as it is.
        if let Some(id) = query.and_then(Self::plain) {
            return Ok(Self(id.into()));
        }
        let mut values = query
            .unwrap_or_default()
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .filter(|(name, _)| percent_decode_str(name).eq(PARAMETER.bytes()))
            .map(|(_, value)| value);
        let value = values.next().ok_or(TaskIdError::Missing)?;
        if values.next().is_some() {
            return Err(TaskIdError::Repeated);
        }
        if value.contains(['%', '+']) {
            Self::new(&decoded(value)?)
        } else {
            Self::new(value)
        }
    }

    /// The id in a raw query string that says nothing else, if it has unreserved characters only: it stands there as it is,
    /// and nobody can read it otherwise.
    pub fn plain(query: &str) -> Option<&str> {
        let id = query.strip_prefix(PARAMETER)?.strip_prefix('=')?;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() | matches!(byte, b'-' | b'.' | b'_' | b'~');
        // To the end in any case: so it is done for many bytes at once.
        let all_plain = id.bytes().fold(true, |all, byte| all & is_plain(byte));
        ((1..=MAX_LEN).contains(&id.len()) && all_plain).then_some(id)
    }

    /// The request target for upstream, `<path>?task_id=…`: unreserved characters as they are, all others escaped (a space
    /// is `%20`, which both form and URI decoders read).
    pub fn to_target(&self, path: &str) -> String {
        let mut target = String::with_capacity(path.len() + PARAMETER.len() + 2 + self.0.len());
        target.extend([path, "?", PARAMETER, "="]);
        target.extend(utf8_percent_encode(&self.0, ESCAPED));
        target
    }

    /// The id, decoded.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Undoes the form encoding of one value. Stricter than `form_urlencoded`, which keeps a broken escape as it stands and
/// would so let two spellings mean one id.
fn decoded(value: &str) -> Result<String, TaskIdError> {
    let mut bytes = value.bytes();
    let mut id = String::new();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'+' => b' ',
            b'%' => {
                let high = bytes.next().and_then(hex_digit);
                let low = bytes.next().and_then(hex_digit);
                high.zip(low)
                    .map(|(high, low)| high << 4 | low)
                    .ok_or(TaskIdError::BadEscape)?
            }
            other => other,
        };
        // Beyond ASCII it is the wrong character, but no better one: `new` refuses either.
        id.push(char::from(byte));
    }
    Ok(id)
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| digit.try_into().ok())
}

impl Borrow<str> for TaskId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::TaskIdError::{BadEscape, Empty, Missing, NotPrintable, Repeated, TooLong};
    use super::*;

    fn parsed(query: &str) -> Result<String, TaskIdError> {
        TaskId::from_query(Some(query)).map(|id| id.as_str().to_owned())
    }

    #[track_caller]
    fn is(query: &str, id: &str) {
        assert_eq!(parsed(query).as_deref(), Ok(id), "{query:?}");
    }

    #[track_caller]
    fn fails(query: &str, error: TaskIdError) {
        assert_eq!(parsed(query), Err(error), "{query:?}");
    }

    #[test]
    fn an_id_is_read_from_the_query_string() {
        is(
            "task_id=d6956973-2f17-43d4-8514-af6cc3a2f55d",
            "d6956973-2f17-43d4-8514-af6cc3a2f55d",
        );
        is(
            "task_id=task_nano-banana-pro_1765166238716",
            "task_nano-banana-pro_1765166238716",
        );
        is("task_id=a", "a");
        is("task_id=AbC", "AbC");
    }

    #[test]
    fn values_are_form_decoded() {
        is("task_id=a%2Fb%2fc", "a/b/c");
        is("task_id=a+b%20c%2Bd", "a b c+d");
        is("task_id=%74ask", "task");
        is("task_id=a=b==", "a=b==");
        is("task_id=100%25", "100%");
        is("task_id=a%26task_id%3Db", "a&task_id=b");
        is("task_id=a;b", "a;b");
        is("task_id=%257A", "%7A");
    }

    #[test]
    fn names_are_decoded_and_case_sensitive() {
        is("task%5Fid=a", "a");
        is("%74%61%73%6b%5f%69%64=a", "a");
        fails("Task_id=a", Missing);
        fails("task%5FID=a", Missing);
        fails("task_id%20=a", Missing);
        fails("task_id+=a", Missing);
        fails("task_id[]=a", Missing);
        fails("task_id%zz=a", Missing);
    }

    #[test]
    fn other_parameters_are_ignored_whatever_they_hold() {
        is("&&_=%zz&task_id=a&x=%ff&=&é=%4&y", "a");
        is("_=1764&task_id=a", "a");
    }

    #[test]
    fn a_missing_id_is_told_from_an_empty_one() {
        assert_eq!(TaskId::from_query(None), Err(Missing));
        fails("", Missing);
        fails("&", Missing);
        fails("id=a", Missing);
        fails("xtask_id=a", Missing);
        fails("task_id", Empty);
        fails("task_id=", Empty);
        fails("task_id=&x=1", Empty);
    }

    #[test]
    fn a_repeated_id_is_refused_however_it_is_spelled() {
        fails("task_id=a&task_id=b", Repeated);
        fails("task_id=a&task_id=a", Repeated);
        fails("task_id=a&x=1&task%5Fid=a", Repeated);
        fails("task_id=a&task_id", Repeated);
        fails("task_id=&task_id=", Repeated);
        fails("task_id=%zz&task_id=a", Repeated);
    }

    #[test]
    fn broken_escapes_are_refused() {
        for value in ["%", "a%", "%4", "a%4", "%zz", "%4g", "%g4", "%%41", "%+1", "% 1", "%é"] {
            fails(&format!("task_id={value}"), BadEscape);
        }
    }

    #[test]
    fn only_printable_ascii_is_an_id() {
        for value in [
            "é",
            "%C3%A9",
            "%ff",
            "%00",
            "a%0A",
            "%0d%0a",
            "%7F",
            "%1f",
            "a\tb",
            "a%80",
            "\u{1f389}%20",
        ] {
            fails(&format!("task_id={value}"), NotPrintable);
        }
        is("task_id=+", " ");
        is("task_id=~", "~");
    }

    #[test]
    fn an_id_has_at_most_256_characters_after_decoding() {
        is(&format!("task_id={}", "a".repeat(256)), &"a".repeat(256));
        is(&format!("task_id={}", "%61".repeat(256)), &"a".repeat(256));
        fails(&format!("task_id={}", "a".repeat(257)), TooLong);
        fails(&format!("task_id={}", "%61".repeat(257)), TooLong);
    }

    #[test]
    fn upstream_gets_the_strict_encoding() {
        let id = TaskId::from_query(Some("_=1&task_id=aZ09-._~+%2B%2f%25%26%3d%23*'()!")).unwrap();
        assert_eq!(
            id.to_target("/a"),
            "/a?task_id=aZ09-._~%20%2B%2F%25%26%3D%23%2A%27%28%29%21"
        );
    }

    #[test]
    fn messages_name_the_field_and_never_the_value() {
        for (query, error) in [
            ("x=qqq", Missing),
            ("task_id=", Empty),
            ("task_id=qqq&task_id=qqq", Repeated),
            ("task_id=qqq%zz", BadEscape),
            ("task_id=qqq%00", NotPrintable),
            (&*format!("task_id={}", "qqq".repeat(100)), TooLong),
        ] {
            let found = TaskId::from_query(Some(query)).unwrap_err();
            assert_eq!(found, error);
            let message = found.to_string();
            assert!(message.starts_with("task_id ") && message.contains(": "), "{message}");
            assert!(!message.contains("qqq"), "{message}");
        }
    }

    #[test]
    fn a_map_keyed_by_ids_is_searched_by_text() {
        let map = HashMap::from([(TaskId::new("a").unwrap(), 1)]);
        assert_eq!(map.get("a"), Some(&1));
        assert_eq!(map.get("A"), None);
    }

    proptest! {
        #[test]
        fn every_id_survives_the_round_trip(id in "[ -~]{1,256}") {
            let id = TaskId::new(&id).unwrap();
            let target = id.to_target("");
            let query = &target[1..];
            prop_assert!(query.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%=".contains(&b)));
            prop_assert_eq!(TaskId::from_query(Some(query)), Ok(id));
        }

        #[test]
        fn any_form_encoder_is_understood(id in "[ -~]{1,256}") {
            let query = form_urlencoded::Serializer::new(String::new()).append_pair("task_id", &id).finish();
            prop_assert_eq!(parsed(&query), Ok(id));
        }

        #[test]
        fn no_query_string_panics(query in "(task_id=|[%&+=]|\\PC){0,40}", raw in any::<String>()) {
            for query in [query, raw] {
                if let Ok(id) = TaskId::from_query(Some(&query)) {
                    prop_assert!(TaskId::new(id.as_str()).is_ok());
                }
            }
        }
    }
}

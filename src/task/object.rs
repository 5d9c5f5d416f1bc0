//! Named members of one JSON object, as the bytes that they are, without building the rest.
//!
//! Values are skipped iteratively, so that nothing a task echoes back, however deep or long, can exhaust a stack or hit
//! a recursion limit. A derived struct would not do by itself: it also reads arrays ([`Object`] does not), and it fails on
//! any repeated member where here the reader decides.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// What an object holds under one name.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Member<'a> {
    last: Option<&'a str>,
    repeated: bool,
}

impl<'a> Member<'a> {
    /// The value's JSON text; of several, the last, as most parsers have it.
    pub(super) fn last(self) -> Option<&'a str> {
        self.last
    }

    /// The value's JSON text, unless the name occurs again.
    pub(super) fn only(self) -> Option<&'a str> {
        self.last.filter(|_| !self.repeated)
    }

    /// Whether the name occurs more than once.
    pub(super) fn is_repeated(self) -> bool {
        self.repeated
    }
}

/// The members called `names` of the one object that `json` consists of; white space may surround it, nothing else.
pub(super) fn members<'a, const N: usize>(json: &'a str, names: &[&str; N]) -> Option<[Member<'a>; N]> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let members = Members(names).deserialize(&mut deserializer).ok()?;
    deserializer.end().ok()?;
    Some(members)
}

/// A `T` that is spelt as an object, and not as the array of its fields that a derived struct would read, too.
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(AnObject(PhantomData)).map(Self)
    }
}

struct AnObject<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for AnObject<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

struct Members<'n, const N: usize>(&'n [&'n str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Members<'_, N> {
    type Value = [Member<'de>; N];

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Members<'_, N> {
    type Value = [Member<'de>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = [Member::default(); N];
        // Keys as raw text too: one that is no string in Rust (a lone surrogate) is no reason to refuse the object.
        while let Some(key) = map.next_key::<&'de RawValue>()? {
            note(&mut members, self.0, spelled(key.get()).as_deref(), &mut map)?;
        }
        Ok(members)
    }
}

/// Notes the value that comes next, if its key is one of `names`.
fn note<'de, A: MapAccess<'de>, const N: usize>(
    members: &mut [Member<'de>; N],
    names: &[&str; N],
    key: Option<&str>,
    map: &mut A,
) -> Result<(), A::Error> {
    let position = names.iter().position(|name| Some(*name) == key);
    if let Some(member) = position.and_then(|position| members.get_mut(position)) {
        member.repeated = member.last.is_some();
        member.last = Some(map.next_value::<&'de RawValue>()?.get());
    } else {
        map.next_value::<IgnoredAny>()?;
    }
    Ok(())
}

/// What a key, given as its JSON text, spells; `None` when that is no string in Rust.
fn spelled(key: &str) -> Option<Cow<'_, str>> {
    let inside = key.strip_prefix('"')?.strip_suffix('"')?;
    if inside.as_bytes().contains(&b'\\') {
        serde_json::from_str(key).map(Cow::Owned).ok()
    } else {
        Some(Cow::Borrowed(inside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a(json: &str) -> Option<Member<'_>> {
        members(json, &["a"]).map(|[a]| a)
    }

    #[test]
    fn a_member_is_its_own_text() {
        let [b, a] = members(
            " {\"x\": 1, \"a\" : [ 1, {\"b\":2} ] ,\"b\":\"\\u0061\"}\r\n",
            &["b", "a"],
        )
        .unwrap();
        assert_eq!(a.only(), Some("[ 1, {\"b\":2} ]"));
        assert_eq!(b.only(), Some("\"\\u0061\""));
    }

    #[test]
    fn an_object_is_no_array() {
        #[derive(Deserialize)]
        struct A {
            a: u8,
        }
        let read = |json| serde_json::from_str::<Object<A>>(json).map(|Object(A { a })| a).ok();
        assert_eq!(read(r#"{"b":[],"\u0061":1}"#), Some(1));
        for json in ["[1]", "{}", r#"{"a":1,"a":1}"#, r#"{"a":1}x"#, "null"] {
            assert_eq!(read(json), None, "{json}");
        }
    }

    #[test]
    fn an_absent_member_is_not_a_null_one() {
        assert_eq!(a("{}").unwrap().last(), None);
        assert_eq!(a(r#"{"A":1}"#).unwrap().last(), None);
        assert_eq!(a(r#"{"a":null}"#).unwrap().only(), Some("null"));
    }

    #[test]
    fn a_repeated_member_is_told() {
        for json in [r#"{"a":1,"a":2}"#, r#"{"a":3,"a":1,"\u0061":2}"#, r#"{"a":null,"a":2}"#] {
            let a = a(json).unwrap();
            assert!(a.is_repeated(), "{json}");
            assert_eq!((a.only(), a.last()), (None, Some("2")), "{json}");
        }
        assert!(!a(r#"{"a":1,"b":{"a":2}}"#).unwrap().is_repeated());
    }

    #[test]
    fn only_one_whole_object_is_read() {
        for json in [
            "",
            " ",
            "[1]",
            "null",
            "1",
            "\"a\"",
            "{",
            "{}x",
            "{}{}",
            "{} ,",
            "{\"a\":}",
            "{'a':1}",
            "{\"a\":1,}",
            "{\"a\u{0}\":1}",
            "{\"\\q\":1}",
            "{1:1}",
        ] {
            assert!(a(json).is_none(), "{json}");
        }
    }

    #[test]
    fn what_nobody_asks_for_is_skipped() {
        let json = format!(r#"{{"\ud800":"\udfff","n":1e999999,"i":{},"a":1}}"#, "9".repeat(5000));
        assert_eq!(a(&json).unwrap().only(), Some("1"));
    }
}

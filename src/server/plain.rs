//! Polls that are as plain as can be, where they stand in a connection's bytes: what `gateway::hit` may answer.
//!
//! A client asks on one connection for one task after the other, in heads that are otherwise the same. So the last one is
//! kept, and the next is compared with it before it is parsed.

use std::ops::Range;

use constant_time_eq::constant_time_eq;
use secrecy::{ExposeSecret as _, SecretSlice};

use super::head::{self, Most};
use crate::account::API_KEY_HEADER;
use crate::gateway::PlainPoll;
use crate::upstream::TASK_INFO_PATH;

/// Of a longer head none is kept: most have a few hundred bytes, and idle connections keep one, too.
const LONGEST_KEPT: usize = 1024;

/// Reads one connection's plain polls.
#[derive(Debug, Default)]
pub(super) struct Plain {
    last: Option<Last>,
}

/// The head of a plain poll without an `x-request-id`, which every poll has another of.
#[derive(Debug)]
struct Last {
    /// It has the key in it.
    head: SecretSlice<u8>,
    key: Range<usize>,
    query: Range<usize>,
}

impl Plain {
    /// The poll that `bytes` begin with, and the length of its head, if all of that is there and as plain as can be.
    pub(super) fn read<'b>(&mut self, bytes: &'b [u8], most: &Most) -> Option<(usize, PlainPoll<'b>)> {
        if let Some(again) = self.last.as_ref().and_then(|last| last.again(bytes)) {
            return Some(again);
        }
        let (length, poll) = parse(bytes, most)?;
        if poll.request_id.is_none() && length <= LONGEST_KEPT {
            self.last = Some(Last::new(&bytes[..length], &poll));
        }
        Some((length, poll))
    }
}

impl Last {
    fn new(head: &[u8], poll: &PlainPoll<'_>) -> Self {
        let range = |part: &str| {
            let start = part.as_ptr().addr() - head.as_ptr().addr();
            start..start + part.len()
        };
        Self {
            key: range(poll.key),
            query: range(poll.query),
            head: SecretSlice::from(head.to_vec()),
        }
    }

    /// The poll that `bytes` begin with, if its head differs in the query alone, and not in how long that is. Whether the
    /// query is one is not looked at: it may hold the end of a request line, fields, even another request. Whoever takes it
    /// up has read the query as a plain id ([`TaskId::plain`](crate::task::TaskId::plain)); else nothing of it counts.
    fn again<'b>(&self, bytes: &'b [u8]) -> Option<(usize, PlainPoll<'b>)> {
        let last = self.head.expose_secret();
        let head = bytes.get(..last.len())?;
        let (before, behind) = (..self.query.start, self.query.end..);
        // A proxy may bring several clients' polls on one connection: none shall learn of another's key.
        let is_alike =
            constant_time_eq(&head[before], &last[before]) & constant_time_eq(&head[behind.clone()], &last[behind]);
        let text = |range: &Range<usize>| str::from_utf8(&head[range.clone()]).ok();
        let (key, query) = is_alike.then(|| text(&self.key).zip(text(&self.query)))??;
        let request_id = None;
        let poll = PlainPoll {
            key,
            query,
            request_id,
            head,
        };
        Some((head.len(), poll))
    }
}

fn parse<'b>(bytes: &'b [u8], most: &Most) -> Option<(usize, PlainPoll<'b>)> {
    // Neither an empty line nor another method.
    if bytes.first() != Some(&b'G') {
        return None;
    }
    let within = &bytes[..bytes.len().min(most.bytes)];
    let read = |request: &httparse::Request<'_, 'b>, length| Ok(poll(request, &within[..length]));
    let poll = head::parsed(within, most, read).ok()???;
    head::has_clean_lines(poll.head).then_some((poll.head.len(), poll))
}

/// What a request asks for, if it could mean nothing else: what has a say in the answer stands in it at most once, and
/// nothing does that only the longer way understands.
fn poll<'b>(request: &httparse::Request<'_, 'b>, head: &'b [u8]) -> Option<PlainPoll<'b>> {
    let query = request.path?.strip_prefix(TASK_INFO_PATH)?.strip_prefix('?')?;
    if request.method != Some("GET") || request.version != Some(1) {
        return None;
    }
    let (mut host, mut key, mut request_id) = (None, None, None);
    for header in request.headers.iter() {
        let is = |name| header.name.eq_ignore_ascii_case(name);
        match header.name.len() {
            4 if is("host") && host.replace(header.value).is_some() => return None,
            6 if is("expect") => return None,
            7 if is("upgrade") => return None,
            9 if is(API_KEY_HEADER) && key.replace(header.value).is_some() => return None,
            10 if is("connection") && !header.value.eq_ignore_ascii_case(b"keep-alive") => return None,
            12 if is("x-request-id") && request_id.replace(header.value).is_some() => return None,
            13 if is("authorization") || is("cache-control") => return None,
            14 if is("content-length") => return None,
            17 if is("transfer-encoding") => return None,
            _ => {}
        }
    }
    if !head::is_host(host?) {
        return None;
    }
    let key = str::from_utf8(key?).ok()?;
    Some(PlainPoll {
        key,
        query,
        request_id,
        head,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::TaskId;

    const MOST: Most = Most {
        bytes: 1 << 15,
        headers: 100,
        body: 1 << 20,
    };

    fn head(query: &str, key: &str, more: &str) -> String {
        format!("GET {TASK_INFO_PATH}?{query} HTTP/1.1\r\nhost: gateway\r\nx-api-key: {key}\r\n{more}\r\n")
    }

    /// What is read after `before` on the same connection.
    fn read_after<'h>(before: &str, head: &'h str) -> Option<(usize, &'h str, &'h str)> {
        let mut plain = Plain::default();
        plain.read(before.as_bytes(), &MOST).unwrap();
        let (length, poll) = plain.read(head.as_bytes(), &MOST)?;
        Some((length, poll.key, poll.query))
    }

    #[test]
    fn a_poll_is_read_for_what_it_says_whatever_came_before() {
        let before = head("task_id=one", "ak_one", "accept: a\r\n");
        for (query, key, more) in [
            ("task_id=one", "ak_one", "accept: a\r\n"),
            ("task_id=two", "ak_one", "accept: a\r\n"),
            ("task_id=two", "ak_two", "accept: a\r\n"),
            ("task_id=one", "ak_one", "accept: b\r\n"),
            ("task_id=longer", "ak_one", "accept: a\r\n"),
            ("task_id=o", "ak_one", ""),
        ] {
            let head = head(query, key, more);
            assert_eq!(read_after(&before, &head), Some((head.len(), key, query)), "{head}");
            let with_more = format!("{head}GET / HTTP/1.1\r\n");
            assert_eq!(read_after(&before, &with_more), Some((head.len(), key, query)));
            assert_eq!(
                read_after(&before, &head[..head.len() - 1]),
                None,
                "it is not all there"
            );
        }
    }

    #[test]
    fn what_is_not_plain_is_not_read_whatever_came_before() {
        let before = head("task_id=one", "ak_one", "accept: a\r\n");
        for head in [
            before.replace("\r\naccept", "\naccept"),
            before.replace("GET", "PUT"),
            before.replace("1.1\r", "1.0\r"),
            before.replace("TaskInfo", "TaskInfa"),
            before.replace("accept", "Expect"),
            before.replace("accept: a", "upgrade: a"),
            before.replace("accept: a", "content-length: 0"),
            before.replace("accept: a", "transfer-encoding: chunked"),
            before.replace("accept: a", "authorization: a"),
            before.replace("accept: a", "cache-control: a"),
            before.replace("accept: a", "connection: close"),
            before.replace("accept: a", "host: a"),
            before.replace("accept: a", "x-api-key: a"),
            before.replace("host: gateway", "host: gate way"),
            before.replace("host: gateway", "hose: gateway"),
            before.replace("x-api-key", "x-api-kez"),
            format!("\r\n{before}"),
        ] {
            assert_ne!(head, before);
            assert_eq!(read_after(&before, &head), None, "{head}");
        }
    }

    /// An id of the same length that holds the end of a request line: whoever takes it for an id would answer another
    /// question than the one that is asked.
    #[test]
    fn a_query_that_is_none_is_no_task() {
        for hidden in [
            "a HTTP/1.1\r\nb:c",
            "a HTTP/1.1\r\ncontent-length: 1\r\nb:c",
            "a HTTP/1.1\nb:c",
            "a HTTP/1.1\r\n\r\nGET /?b",
            "a HTTP/1.1\r\nhost: b\r\nc:d",
            "a b",
        ] {
            let smuggled = head(&format!("task_id={hidden}"), "ak_one", "");
            let before = head(&format!("task_id={}", "0".repeat(hidden.len())), "ak_one", "");
            let (length, _, query) = read_after(&before, &smuggled).unwrap();
            assert_eq!(length, smuggled.len());
            assert_eq!(TaskId::plain(query), None, "{hidden}");
        }
    }

    #[test]
    fn a_request_id_is_read_and_the_next_poll_has_its_own() {
        let mut plain = Plain::default();
        for (id, more) in [
            (Some("a"), "x-request-id: a\r\n"),
            (Some("b"), "x-request-id: b\r\n"),
            (None, ""),
        ] {
            let head = head("task_id=one", "ak_one", more);
            let (_, poll) = plain.read(head.as_bytes(), &MOST).unwrap();
            assert_eq!(poll.request_id, id.map(str::as_bytes));
        }
    }

    #[test]
    fn no_key_is_printed() {
        let mut plain = Plain::default();
        plain.read(head("task_id=one", "ak_one", "").as_bytes(), &MOST).unwrap();
        assert!(plain.last.is_some());
        assert!(!format!("{plain:?}").contains("97, 107"), "{plain:?}");
    }
}

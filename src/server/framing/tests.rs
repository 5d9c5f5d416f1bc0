use std::cell::Cell;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _, ReadBuf};

use super::super::guard::{Came, Guard, REFUSED, Refusal};
use super::super::phases::Phases;
use super::*;
use crate::config::{Config, Limits};

static LIMITS: LazyLock<Limits> = LazyLock::new(|| Config::default().limits);

fn most() -> Most {
    Most {
        bytes: 256,
        headers: 4,
        body: 64,
    }
}

/// What comes of bytes that come whole.
fn follow(bytes: &[u8]) -> Followed {
    Framing::new(most()).follow(bytes)
}

/// The same when they come in pieces of these lengths, over and over; and what went on of them.
fn follow_pieces(bytes: &[u8], lengths: &[usize]) -> (Followed, bool) {
    let mut framing = Framing::new(most());
    let mut lengths = lengths.iter().cycle();
    let (mut came, mut through, mut heads) = (0, 0, 0);
    while came < bytes.len() {
        came = bytes.len().min(came + lengths.next().unwrap());
        let followed = framing.follow(&bytes[through..came]);
        through += followed.through;
        heads += followed.heads;
        if let Some(refused) = followed.refused {
            let in_body = refused.in_body;
            let refused = Some(refused);
            return (
                Followed {
                    through,
                    heads,
                    refused,
                },
                in_body,
            );
        }
    }
    let refused = None;
    (
        Followed {
            through,
            heads,
            refused,
        },
        false,
    )
}

#[track_caller]
fn refused(bytes: impl AsRef<[u8]>) -> Error {
    let bytes = bytes.as_ref();
    let followed = follow(bytes);
    let shown = String::from_utf8_lossy(bytes);
    let refused = followed.refused.unwrap_or_else(|| panic!("{shown:?} goes through"));
    assert!(!refused.in_body, "{shown:?}");
    refused.error
}

#[track_caller]
fn passes(bytes: impl AsRef<[u8]>, heads: usize) {
    let bytes = bytes.as_ref();
    let shown = String::from_utf8_lossy(bytes);
    let (through, refused) = (bytes.len(), None);
    assert_eq!(
        follow(bytes),
        Followed {
            through,
            heads,
            refused
        },
        "{shown:?}"
    );
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";

fn post(head: &str, body: &str) -> String {
    format!("POST /a HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{body}")
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked", body)
}

#[test]
fn requests_that_follow_each_other_are_told_apart() {
    let all = [
        GET.to_owned(),
        post("Content-Length: 5", "GET /"),
        chunked("3\r\nGET\r\n5;ext=\"x\"\r\n / HT\r\n00\r\nTrailer: x\r\nOther:\r\n\r\n"),
        "\r\n\r\nHEAD http://x/a HTTP/1.0\r\n\r\n".to_owned(),
        post("content-length: 0", ""),
        "OPTIONS * HTTP/1.1\r\nhost: [::1]:80\r\n\r\n".to_owned(),
    ];
    passes(all.concat(), all.len());
    let mut ends: Vec<_> = all.iter().map(String::len).collect();
    for index in 1..ends.len() {
        ends[index] += ends[index - 1];
    }
    // Where each begins: what lies before is whole, what follows is refused there.
    for end in ends {
        let mut broken = all.concat().into_bytes();
        broken.truncate(end);
        broken.extend(b"\0");
        assert_eq!(follow(&broken).through, end);
    }
}

#[test]
fn a_head_goes_on_only_whole() {
    for length in 0..GET.len() {
        let (through, heads, refused) = (0, 0, None);
        assert_eq!(
            follow(&GET.as_bytes()[..length]),
            Followed {
                through,
                heads,
                refused
            }
        );
    }
}

#[test]
fn a_request_whose_body_is_broken_goes_no_further_if_it_can_be_helped() {
    let broken = chunked("3\r\nabcd\r\n0\r\n\r\n");
    let all = format!("{GET}{broken}");
    let followed = follow(all.as_bytes());
    assert_eq!((followed.through, followed.heads), (GET.len(), 1));
    assert!(!followed.refused.unwrap().in_body);
    // But it can not when its head has gone.
    let head = broken.find("3\r\n").unwrap();
    let (followed, in_body) = follow_pieces(broken.as_bytes(), &[head, 100]);
    assert!(in_body);
    assert_eq!(followed.heads, 1);
}

#[test]
fn what_comes_behind_an_offer_of_another_protocol_is_nobodys() {
    let offer = "GET /a HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    passes(offer, 1);
    assert!(matches!(refused(format!("{offer}{GET}")), Error::Malformed(_)));
    assert!(matches!(refused(format!("{offer}\x01\x05hello")), Error::Malformed(_)));
    // Its answer came first: it was declined.
    let mut framing = Framing::new(most());
    framing.follow(offer.as_bytes());
    framing.answered();
    assert_eq!(framing.follow(GET.as_bytes()).heads, 1);
}

#[test]
fn limits_are_exact() {
    let head = |length: usize| {
        let without = "GET /a HTTP/1.1\r\nHost: x\r\na: \r\n\r\n".len();
        format!(
            "GET /a HTTP/1.1\r\nHost: x\r\na: {}\r\n\r\n",
            "x".repeat(length - without)
        )
    };
    passes(head(256), 1);
    assert_eq!(refused(head(257)), Error::HeadTooLarge);
    let fields = |count: usize| format!("GET /a HTTP/1.1\r\nHost: x\r\n{}\r\n", "a: b\r\n".repeat(count - 1));
    passes(fields(4), 1);
    assert_eq!(refused(fields(5)), Error::HeadTooLarge);
    passes(post("Content-Length: 64", &"x".repeat(64)), 1);
    assert_eq!(refused(post("Content-Length: 65", "")), Error::BodyTooLarge);
    let half = format!("20\r\n{}\r\n", "x".repeat(32));
    passes(chunked(&format!("{half}{half}0\r\n\r\n")), 1);
    assert_eq!(refused(chunked(&format!("{half}{half}1\r\n"))), Error::BodyTooLarge);
    let trailer = |fields: usize| format!("0\r\n{}\r\n", "a: b\r\n".repeat(fields));
    passes(chunked(&trailer(4)), 1);
    assert_eq!(refused(chunked(&trailer(5))), Error::HeadTooLarge);
    assert_eq!(
        refused(chunked(&format!("0\r\na: {}", "x".repeat(9000)))),
        Error::HeadTooLarge
    );
    passes(chunked(&format!("0;{}\r\n\r\n", "x".repeat(4096))), 1);
    assert!(matches!(
        refused(chunked(&format!("0;{}", "x".repeat(4097)))),
        Error::Malformed(_)
    ));
}

#[test]
fn as_many_fields_as_configured_fit() {
    let mut limits = LIMITS.clone();
    limits.headers = 300;
    let fields = |count: usize| format!("GET /a HTTP/1.1\r\nHost: x\r\n{}\r\n", "a: b\r\n".repeat(count - 1));
    let mut framing = Framing::new(Most::new(&limits));
    assert_eq!(framing.follow(fields(300).as_bytes()).heads, 1);
    let refused = framing.follow(fields(301).as_bytes()).refused.unwrap();
    assert_eq!(refused.error, Error::HeadTooLarge);
}

#[test]
fn fields_that_two_servers_could_read_differently_are_refused() {
    for head in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 3",
        "Content-Length: 3, 3",
        "Content-Length: +3",
        "Content-Length: -0",
        "Content-Length:",
        "Content-Length: 0x3",
        "Content-Length: 3 0",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding:",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        "X: a\r\n Transfer-Encoding: chunked",
        "X: a\r\n\tfolded",
        "X: a\rb: c",
        "X: a\nb: c",
        "X: a\r\r\nb: c",
        "X: a\0b",
        "X: a\x7fb",
        ": a",
        "X",
        "X y: a",
        "X\0: a",
        "X(: a",
        "\u{444}: a",
        "Host: y",
        "Host: x",
    ] {
        assert!(matches!(refused(post(head, "")), Error::Malformed(_)), "{head:?}");
    }
}

#[test]
fn request_lines_and_hosts_that_two_servers_could_read_differently_are_refused() {
    for start in [
        "GET /a HTTP/1.1\r\n",
        "GET /a HTTP/1.1\r\nHost: x y\r\n",
        "GET /a HTTP/1.1\r\nHost: x/y\r\n",
        "GET /a HTTP/1.1\r\nHost: u@x\r\n",
        "GET /a HTTP/1.1\r\nHost: x:y\r\n",
        "GET /a HTTP/1.1\r\nHost: [::1\r\n",
        "GET /a HTTP/1.1\r\nHost: [::1]x\r\n",
        "GET /a HTTP/1.1\nHost: x\r\n",
        "\nGET /a HTTP/1.1\r\nHost: x\r\n",
        "\r\n\r\n\r\nGET /a HTTP/1.1\r\nHost: x\r\n",
        " GET /a HTTP/1.1\r\nHost: x\r\n",
        "GET  /a HTTP/1.1\r\nHost: x\r\n",
        "GET /a  HTTP/1.1\r\nHost: x\r\n",
        "GET /a b HTTP/1.1\r\nHost: x\r\n",
        "GET /a\r\nHost: x\r\n",
        "GET /a#b HTTP/1.1\r\nHost: x\r\n",
        "GET a HTTP/1.1\r\nHost: x\r\n",
        "GET x:80 HTTP/1.1\r\nHost: x\r\n",
        "GET * HTTP/1.1\r\nHost: x\r\n",
        "GET ftp://x/ HTTP/1.1\r\nHost: x\r\n",
        "GET http://u@x/ HTTP/1.1\r\nHost: x\r\n",
        "GET http:///a HTTP/1.1\r\nHost: x\r\n",
        "G(T /a HTTP/1.1\r\nHost: x\r\n",
        "GET /a HTTP/1.2\r\nHost: x\r\n",
        "GET /a http/1.1\r\nHost: x\r\n",
        "PRI * HTTP/2.0\r\n",
        "CONNECT x:80 HTTP/1.1\r\nHost: x\r\n",
        "TRACE / HTTP/1.1\r\nHost: x\r\n",
        "trace / HTTP/1.1\r\nHost: x\r\n",
        "GET /a HTTP/1.0\r\nHost: x\r\nHost: x\r\n",
        "POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n",
        "POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        "\x16\x03\x01\x02",
    ] {
        assert!(
            matches!(refused(format!("{start}\r\n")), Error::Malformed(_)),
            "{start:?}"
        );
    }
}

#[test]
fn chunks_that_two_servers_could_read_differently_are_refused() {
    for body in [
        "3\r\nabcd\r\n",
        "3\nabc\r\n",
        "3\r\nabc\n",
        "3\r\nabc0\r\n\r\n",
        "\r\n",
        ";x\r\n",
        "+3\r\n",
        "-3\r\n",
        "0x3\r\n",
        "3 3\r\n",
        "3 \r\n",
        "g\r\n",
        "1000000000000000\r\n",
        "ffffffffffffffffffff\r\n",
        "3;a\nb\r\n",
        "3;a\rb\r\n",
        "3;\0\r\n",
        "3;\r\n",
        "3;=x\r\n",
        "3;;a\r\n",
        "3;a=\r\n",
        "3;a=;b\r\n",
        "3;a=b=c\r\n",
        "3;a b\r\n",
        "3;a \r\n",
        "3;a=b c\r\n",
        "3;a=\"b\r\n",
        "3;a=\"b\\\"\r\n",
        "3;a=\"b\"c\r\n",
        "3;\"a\"\r\n",
        "0\r\n\n",
        "0\r\n a: b\r\n",
        "0\r\na : b\r\n",
        "0\r\na\r\n",
        "0\r\na: b\n",
        "0\r\na: \0\r\n",
        "0\r\n: b\r\n",
    ] {
        assert!(matches!(refused(chunked(body)), Error::Malformed(_)), "{body:?}");
    }
}

#[test]
fn what_is_only_unusual_passes() {
    for head in [
        "Content-Length: 003\r\nx: \u{444}",
        "content-LENGTH:3",
        "Content-Length: \t3 \t",
    ] {
        passes(post(head, "abc"), 1);
    }
    for body in [
        "3\r\nabc\r\n0\r\n\r\n",
        "003;a\r\nabc\r\n0 ;b=\"c\"\r\n\r\n",
        "3;a=b;c=\"\\\"; \u{444}\";d\r\nabc\r\n0 ; b\t= c ; d\r\n\r\n",
        "0\r\n\r\n",
    ] {
        passes(post("tRANSFER-eNCODING:\tChunked ", body), 1);
    }
    for head in [
        "GET /a?x[]={y}|^`&%zz HTTP/1.1\r\nHost:\r\n\r\n",
        "GET //a/..;/%2f HTTP/1.1\r\nHost: x:\r\n\r\n",
        "X-METHOD! / HTTP/1.1\r\nHost: EXAMPLE.com:8080\r\n\r\n",
        "GET https://x:8/a?b HTTP/1.1\r\nHost: y\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
    ] {
        passes(head, 1);
    }
}

/// A request of parts that mostly go together.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let line = (
        prop::sample::select(&["GET", "POST", "OPTIONS", "M!", "TRACE", "G T"][..]),
        prop::sample::select(
            &[
                "/a",
                "/?a=%zz",
                "/\u{444}",
                "*",
                "http://x",
                "HTTPS://x:1/a?b",
                "x",
                "/a b",
                "/<",
            ][..],
        ),
        prop::sample::select(&["1.1", "1.1", "1.1", "1.0", "2.0"][..]),
    );
    let fields = prop::sample::select(
        &[
            "Host: x\r\n",
            "hOST:[::1]:8\r\n",
            "Content-Length: 5\r\n",
            "content-length:\t05 \r\n",
            "Content-Length: 5, 5\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: 0\r\n",
            "Content-Length: 18446744073709551615\r\n",
            "Transfer-Encoding: chunked\r\n",
            "tRANSFER-eNCODING: CHUNKED\t\r\n",
            "Transfer-Encoding: chunked, identity\r\n",
            "Transfer-Encoding : chunked\r\n",
            "Expect: 100-continue\r\n",
            "Connection: close\r\n",
            "a: b\r\n",
            "a:\r\n",
            "a: b\n",
            " a: b\r\n",
            "a: \u{444}\r\n",
        ][..],
    );
    let body = prop::sample::select(
        &[
            "",
            "",
            "hello",
            "5\r\nhello\r\n0\r\n\r\n",
            "005;a=\"b\" ;c\r\nhello\r\n0 ;d\r\na: b\r\nc:\r\n\r\n",
            "0\r\n\r\n",
            "0\r\na : b\r\n\r\n",
            "5\nhello\n0\n\n",
            "41\r\n",
            "ffffffffffffffff\r\n",
        ][..],
    );
    (
        line,
        prop::bool::weighted(0.9),
        prop::collection::vec(fields, 0..4),
        body,
    )
        .prop_map(|((method, target, version), has_host, fields, body)| {
            let host = if has_host { "Host: x\r\n" } else { "" };
            let fields = fields.concat();
            format!("{method} {target} HTTP/{version}\r\n{host}{fields}\r\n{body}").into_bytes()
        })
}

/// Requests, good and bad, and what they are made of.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let text = |texts: &'static [&'static str]| prop::sample::select(texts).prop_map(|text| text.as_bytes().to_vec());
    prop_oneof![
        6 => request(),
        6 => text(&[
            "GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
            "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\nt: u\r\n\r\n",
            "GET /a HTTP/1.1\r\nHost: x\r\nUpgrade: y\r\n\r\n",
        ]),
        5 => text(&[
            "GET ", "POST ", "TRACE ", "/", "/a?b", "*", "http://x/", " HTTP/1.1\r\n", " HTTP/1.0\r\n", "Host: x\r\n",
            "Content-Length: ", "Transfer-Encoding: ", "chunked", "identity", "Upgrade: y\r\n", "0\r\n", "3\r\nabc\r\n",
            "a: b\r\n", "ffffffffffffffff", "5", "65", ";x", "\r\n", "\r\n\r\n", "\r", "\n", " ", "\t", ":", ",", "#", "\0",
            "Expect: 100-continue\r\n", "Connection: close\r\n",
        ]),
        1 => prop::collection::vec(any::<u8>(), 1..8),
        1 => (1_usize..300).prop_map(|length| vec![b'x'; length]),
    ]
}

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let damage = prop::option::of((any::<prop::sample::Index>(), any::<u8>()));
    (prop::collection::vec(piece(), 1..8), damage).prop_map(|(pieces, damage)| {
        let mut bytes = pieces.concat();
        if let Some((at, byte)) = damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

/// How many requests hyper finds in bytes, and how many it answers with an error of its own.
async fn hyper_finds(bytes: &[u8]) -> (usize, bool) {
    let (mut near, far) = tokio::io::duplex(1 << 16);
    let found = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&found);
    let service = service_fn(move |request: Request<Incoming>| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            // A body that ends too soon is the client's end, and none of the framing's.
            let _ = request.into_body().collect().await;
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let serving = async {
        let _ = http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(far), service)
            .await;
    };
    let asking = async {
        near.write_all(bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let mut answers = Vec::new();
        let _ = near.read_to_end(&mut answers).await;
        let errors = [&b"HTTP/1.1 4"[..], b"HTTP/1.0 4"];
        answers.windows(10).any(|window| errors.contains(&window))
    };
    let ((), has_error) = tokio::join!(serving, asking);
    (found.load(Ordering::Relaxed), has_error)
}

/// Gives bytes in pieces of these lengths, over and over.
struct Pieces<'a> {
    bytes: &'a [u8],
    lengths: std::iter::Cycle<std::slice::Iter<'a, usize>>,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let length = *self.lengths.next().unwrap();
        let (piece, rest) = self
            .bytes
            .split_at(length.min(buffer.remaining()).min(self.bytes.len()));
        buffer.put_slice(piece);
        self.bytes = rest;
        Poll::Ready(Ok(()))
    }
}

/// What a guard lets through, and whether it then breaks off. Before each read it may rest; what hyper had not looked at then
/// it takes back. If it never does, it looks before each read whether the client leaves.
fn guarded(bytes: &[u8], lengths: &[usize], room: usize, rests: &[bool]) -> (Vec<u8>, bool) {
    let pieces = Pieces {
        bytes,
        lengths: lengths.iter().cycle(),
    };
    let phases = Phases::new(&LIMITS);
    let _busy = phases.busy();
    let stream = tokio::io::join(pieces, tokio::io::sink());
    let mut guard = Guard::new(stream, phases, most(), Refusal::default());
    let mut cx = Context::from_waker(Waker::noop());
    let (mut through, mut last) = (Vec::new(), 0);
    let rests_at_all = rests.contains(&true);
    for rests in rests.iter().cycle() {
        if *rests {
            let unread = through.split_off(through.len() - last / 2);
            guard.take_back(&unread);
            if let Poll::Ready(Ok(Came::End)) = guard.poll_request(&mut cx, &|_, _| None) {
                return (through, false);
            }
        }
        if !rests_at_all {
            // That the bytes are at their end is nothing new.
            let _ = Pin::new(&mut guard).poll_flush(&mut cx);
        }
        let mut buffer = vec![0; room];
        let mut buffer = ReadBuf::new(&mut buffer);
        match Pin::new(&mut guard).poll_read(&mut cx, &mut buffer) {
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                last = buffer.filled().len();
                through.extend_from_slice(buffer.filled());
            }
            Poll::Ready(Err(_)) => return (through, true),
            Poll::Ready(Ok(())) | Poll::Pending => return (through, false),
        }
    }
    (through, false)
}

#[test]
fn what_turns_out_not_to_be_plain_is_looked_up_once() {
    let poll = b"GET /api/v1/client/job/TaskInfo?task_id=a HTTP/1.1\r\nHost: x\r\nx-api-key: k\r\n\r\n";
    for behind in [&b""[..], poll, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let bytes = [poll, behind].concat();
        let lengths = [bytes.len()];
        let pieces = Pieces {
            bytes: &bytes,
            lengths: lengths.iter().cycle(),
        };
        let stream = tokio::io::join(pieces, tokio::io::sink());
        let mut guard = Guard::new(stream, Phases::new(&LIMITS), most(), Refusal::default());
        let looked_up = Cell::new(0);
        let look = |poll: PlainPoll<'_>, _: &mut Vec<u8>| {
            assert_eq!((poll.key, poll.query), ("k", "task_id=a"));
            looked_up.set(looked_up.get() + 1);
            None
        };
        let came = guard.poll_request(&mut Context::from_waker(Waker::noop()), &look);
        assert!(matches!(came, Poll::Ready(Ok(Came::Other))));
        assert_eq!(looked_up.get(), 1);
    }
}

#[test]
fn so_much_is_read_behind_a_request_that_is_being_answered_and_no_more() {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let most = most();
            let room = 1 << 16;
            let (mut near, far) = tokio::io::duplex(room);
            let phases = Phases::new(&LIMITS);
            let _busy = phases.busy();
            let mut guard = Guard::new(far, phases, most, Refusal::default());
            near.write_all(&vec![b'x'; room]).await.unwrap();
            let mut cx = Context::from_waker(Waker::noop());
            assert!(guard.poll_left(&mut cx).is_pending());
            let taken = near.write(&vec![b'x'; room]).await.unwrap();
            assert!((most.bytes..most.bytes + (8 << 10)).contains(&taken), "{taken}");
            drop(near);
            assert!(guard.poll_left(&mut cx).is_pending());
        });
    });
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
}

proptest! {
    #[test]
    fn a_verdict_depends_on_no_piece(bytes in stream(), lengths in prop::collection::vec(1_usize..40, 1..6)) {
        let whole = follow(&bytes);
        let (pieces, in_body) = follow_pieces(&bytes, &lengths);
        let error = |followed: &Followed| followed.refused.as_ref().map(|refused| refused.error.clone());
        prop_assert_eq!(error(&whole), error(&pieces));
        if in_body {
            // The head had gone, and what was clean of its body.
            prop_assert_eq!(whole.heads + 1, pieces.heads);
            prop_assert!(whole.through < pieces.through);
        } else {
            prop_assert_eq!((whole.heads, whole.through), (pieces.heads, pieces.through));
        }
    }

    #[test]
    fn what_goes_on_is_what_came(
        bytes in stream(),
        lengths in prop::collection::vec(1_usize..400, 1..6),
        room in 1_usize..300,
        rests in prop_oneof![Just(vec![false]), prop::collection::vec(any::<bool>(), 1..6)],
    ) {
        let whole = follow(&bytes);
        let (through, breaks_off) = guarded(&bytes, &lengths, room, &rests);
        if breaks_off {
            prop_assert!(bytes.starts_with(&through) && whole.through < through.len());
            prop_assert!(whole.refused.is_some());
        } else {
            let end = if whole.refused.is_some() { REFUSED } else { b"" };
            prop_assert_eq!(through, [&bytes[..whole.through], end].concat());
        }
    }

    #[test]
    fn hyper_finds_the_same_requests_in_what_goes_on(bytes in stream()) {
        let followed = follow(&bytes);
        let passed = &bytes[..followed.through];
        let (found, has_error) = RUNTIME.with(|runtime| runtime.block_on(hyper_finds(passed)));
        prop_assert!(!has_error);
        // After one that closes the connection hyper looks at nothing more.
        let closes = [&b"close"[..], b"HTTP/1.0"].iter().any(|word| passed.windows(word.len()).any(|window| window == *word));
        if closes {
            prop_assert!(found <= followed.heads);
        } else {
            prop_assert_eq!(found, followed.heads);
        }
    }
}

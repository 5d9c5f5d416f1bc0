//! The answers to `TaskInfo`: a task's case and age become a response, or a maimed one.

use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use flate2::{Compress, Compression, Crc, FlushCompress, write::GzEncoder};
use futures_util::stream;
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};

use super::body::{self, PAST_RUN, TaskBody};
use super::ledger::Sight;
use super::link::Link;
use super::options::{RateLimitForm, RetryAfter, UpstreamArgs};
use super::steer::{Case, Maiming};

/// The body of any answer.
pub(super) type Payload = UnsyncBoxBody<Bytes, hyper::Error>;

/// Bytes of padding that are sent at once.
const PIECE: usize = 64 * 1024;
/// A piece of padding: it repeats nothing, so that whoever keeps it has to find the room.
static LETTERS: LazyLock<Bytes> = LazyLock::new(|| {
    let letter = |at: usize| {
        let mut hasher = DefaultHasher::new();
        at.hash(&mut hasher);
        b'a' + u8::try_from(hasher.finish() % 26).unwrap_or(0)
    };
    (0..PIECE).map(letter).collect()
});
/// Arrays nested by `deep`.
const DEPTH: usize = 100_000;
/// What `bomb` expands to, in pieces of 1 MiB.
const BOMB_PIECES: u32 = 1024;
const BOMB_PIECE: u32 = 1 << 20;
/// What `cut` lets out: the head and some of the body.
const CUT: usize = 700;
/// What `cut-head` lets out.
const CUT_HEAD: usize = 30;

/// The answer to a query for the task `id`, that `sight` tells of.
pub(super) async fn task(args: &UpstreamArgs, link: &Link, id: &str, case: &Case, sight: Sight) -> Response<Payload> {
    let seen = sight.first_seen / 1_000_000_000;
    let ended = || TaskBody::success(id, seen.saturating_sub(PAST_RUN), seen);
    let failed = || TaskBody::failed(id, seen.saturating_sub(PAST_RUN), seen);
    let live = |status| TaskBody::live(id, status, seen);
    match case {
        Case::First429 if sight.times == 1 => rate_limited(args.rate_limit_form, args.retry_after),
        Case::Runs => json(running_task(args, id, seen, sight.age()).text()),
        Case::Failed => {
            let run_time = run_time(args, id);
            let body = if sight.age() < run_time {
                live(live_status(sight.age(), run_time))
            } else {
                TaskBody::failed(id, seen, seen + run_time.as_secs())
            };
            json(body.text())
        }
        Case::Ended | Case::Slow(_) | Case::First429 => json(ended().text()),
        Case::EndedFailed => json(failed().text()),
        Case::Failed501 => {
            let code = "501";
            json(TaskBody { code, ..failed() }.text())
        }
        Case::Pending => json(live("pending").text()),
        Case::Running => json(live("running").text()),
        Case::Http(429) => rate_limited(RateLimitForm::Http, args.retry_after),
        Case::Body(429) => rate_limited(RateLimitForm::Body, args.retry_after),
        Case::Http(status) => with_status(*status, json(body::envelope(*status))),
        Case::Body(code) => json(body::envelope(*code)),
        Case::CodeString => {
            let code = "\"200\"";
            json(TaskBody { code, ..ended() }.text())
        }
        Case::DataNull => json(body::envelope(200)),
        Case::NoMedia => {
            let result = None;
            json(TaskBody { result, ..ended() }.text())
        }
        Case::MediaUrls => {
            let result = Some(body::media_urls());
            json(TaskBody { result, ..ended() }.text())
        }
        Case::MediaInfo => {
            let result = Some(body::media_info());
            json(TaskBody { result, ..ended() }.text())
        }
        Case::Status(word) => {
            let status = word.into();
            json(
                TaskBody {
                    status,
                    ..live("running")
                }
                .text(),
            )
        }
        Case::WrongId => json(
            TaskBody {
                id: "another-task",
                ..ended()
            }
            .text(),
        ),
        Case::Html(status) => with_status(*status, html(*status)),
        Case::NoContentType => without_content_type(json(ended().text())),
        Case::Bom => json(format!("\u{feff}{}", ended().text())),
        Case::Trailing => json(ended().text() + "\n{\"trailing\":true}"),
        Case::InvalidUtf8 => json(invalid_utf8(&ended())),
        Case::Duplicate => json(live("running").text().replacen(
            r#""status":"running""#,
            r#""status":"running","status":"success""#,
            1,
        )),
        Case::Lyrics => json(live("running").with_misleading_param().text()),
        Case::Deep => padded(&ended(), [b"[", b"]"].map(|byte| (byte.repeat(DEPTH).into(), 1))),
        Case::Big(size) => {
            let quote = (Bytes::from_static(b"\""), 1);
            let rest = LETTERS.slice(..usize::try_from(size % PIECE as u64).unwrap_or(0));
            let letters = [(LETTERS.clone(), size / PIECE as u64), (rest, 1)];
            padded(&ended(), [quote.clone()].into_iter().chain(letters).chain([quote]))
        }
        Case::Gzip => encoded("gzip", gzipped(ended().text().as_bytes())),
        Case::Bomb => bomb(),
        Case::BrotliClaimed => encoded("br", &b"\xff\xfenot brotli at all\x00\x01"[..]),
        Case::Maimed(maiming) => {
            maim(link, *maiming, sight).await;
            json(ended().text())
        }
        Case::Unwritable(unwritable) => {
            let body = ended().text();
            link.instead(unwritable.script(&body));
            json(body)
        }
        Case::Drip => dripping(ended().text().into()),
        Case::NoStore => uncacheable(json(live("running").text())),
    }
}

async fn maim(link: &Link, maiming: Maiming, sight: Sight) {
    match maiming {
        Maiming::Cut => link.close_after(CUT),
        Maiming::CutHead => link.close_after(CUT_HEAD),
        Maiming::Close => link.close_after(0),
        Maiming::FlakyClose if sight.times == 1 => link.close_after(0),
        Maiming::FlakyClose => {}
        Maiming::Reset => link.reset(),
        Maiming::Hang => std::future::pending().await,
    }
}

fn running_task<'a>(args: &UpstreamArgs, id: &'a str, seen: u64, age: Duration) -> TaskBody<'a> {
    let run_time = run_time(args, id);
    if age < run_time {
        TaskBody::live(id, live_status(age, run_time), seen)
    } else {
        TaskBody::success(id, seen, seen + run_time.as_secs())
    }
}

fn live_status(age: Duration, run_time: Duration) -> &'static str {
    if age < run_time / 10 { "pending" } else { "running" }
}

/// How long the task runs: its share of the spread is a matter of its id alone.
fn run_time(args: &UpstreamArgs, id: &str) -> Duration {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    let thousandths = u32::try_from(hasher.finish() % 1000).unwrap_or(0);
    args.run_time + args.run_time_spread / 1000 * thousandths
}

/// An answer over the limit.
pub(super) fn rate_limited(form: RateLimitForm, retry_after: RetryAfter) -> Response<Payload> {
    let mut response = json(body::envelope(429));
    match form {
        RateLimitForm::Http => *response.status_mut() = StatusCode::TOO_MANY_REQUESTS,
        RateLimitForm::Body => {}
    }
    let value = match retry_after {
        RetryAfter::None => None,
        RetryAfter::Seconds(seconds) => Some(HeaderValue::from(seconds)),
        RetryAfter::Date => {
            let at = std::time::SystemTime::now() + Duration::from_secs(2);
            HeaderValue::try_from(httpdate::fmt_http_date(at)).ok()
        }
    };
    if let Some(value) = value {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    response
}

/// HTTP 200 with JSON.
pub(super) fn json(body: impl Into<Bytes>) -> Response<Payload> {
    of_type("application/json", body)
}

/// HTTP 200 with a body of `content_type`.
pub(super) fn of_type(content_type: &'static str, body: impl Into<Bytes>) -> Response<Payload> {
    let mut response = Response::new(payload(Full::new(body.into())));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Any body that cannot fail, as a [`Payload`].
pub(super) fn payload(body: impl http_body::Body<Data = Bytes, Error = Infallible> + Send + 'static) -> Payload {
    body.map_err(|never| match never {}).boxed_unsync()
}

/// The answer with another status. A redirect leads elsewhere, so that one who follows is found out.
pub(super) fn with_status(status: u16, mut response: Response<Payload>) -> Response<Payload> {
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if matches!(status, 301 | 302 | 303 | 307 | 308) {
        let elsewhere = HeaderValue::from_static("/redirected");
        response.headers_mut().insert(header::LOCATION, elsewhere);
    }
    response
}

fn html(status: u16) -> Response<Payload> {
    let page = format!("<html><body><h1>{status} from the edge</h1></body></html>\n");
    of_type("text/html", page)
}

fn without_content_type(mut response: Response<Payload>) -> Response<Payload> {
    response.headers_mut().remove(header::CONTENT_TYPE);
    response
}

fn invalid_utf8(body: &TaskBody<'_>) -> Vec<u8> {
    let (before, after) = body.around_param();
    [before.as_bytes(), b"{\"title\":\"\xff\xfe\xc3\"}", after.as_bytes()].concat()
}

fn uncacheable(mut response: Response<Payload>) -> Response<Payload> {
    let headers = [
        ("cache-control", "no-store, private, max-age=0"),
        ("set-cookie", "session=simulated; Path=/"),
        ("vary", "*"),
        ("keep-alive", "timeout=5"),
        ("proxy-authenticate", "Basic"),
        ("x-hop", "for one hop"),
        ("connection", "x-hop"),
        ("x-ratelimit-remaining", "3"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn encoded(encoding: &'static str, body: impl Into<Bytes>) -> Response<Payload> {
    let mut response = json(body);
    response
        .headers_mut()
        .insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
    response
}

fn gzipped(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    let written: io::Result<Vec<u8>> = encoder.write_all(plain).and_then(|()| encoder.finish());
    // A vector takes whatever is written to it.
    written.unwrap_or_default()
}

/// `body` with a `param` of parts, each so many times, sent piece by piece: no answer is held in memory.
fn padded(body: &TaskBody<'_>, param: impl IntoIterator<Item = (Bytes, u64)>) -> Response<Payload> {
    let (before, after) = body.around_param();
    let parts = [(before.into(), 1)].into_iter().chain(param).chain([(after.into(), 1)]);
    repeated(json(""), parts.collect())
}

/// A gzip stream of zeros, put together from one piece: a full flush makes a piece of a deflate stream repeatable.
fn bomb() -> Response<Payload> {
    let zeros = vec![0; BOMB_PIECE as usize];
    let mut piece = Vec::with_capacity(64 * 1024);
    let mut deflate = Compress::new(Compression::best(), false);
    // The capacity is far beyond what the piece takes, so one call takes it all.
    let _ = deflate.compress_vec(&zeros, &mut piece, FlushCompress::Full);
    let mut checksum = Crc::new();
    let mut of_piece = Crc::new();
    of_piece.update(&zeros);
    for _ in 0..BOMB_PIECES {
        checksum.combine(&of_piece);
    }
    // An empty last block; then checksum and length.
    let mut end = vec![0x03, 0x00];
    end.extend(checksum.sum().to_le_bytes());
    end.extend((BOMB_PIECE * BOMB_PIECES).to_le_bytes());
    let head = &b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"[..];
    let parts = vec![(head.into(), 1), (piece.into(), BOMB_PIECES.into()), (end.into(), 1)];
    repeated(encoded("gzip", ""), parts)
}

/// The response with a body of `parts`, each sent so many times.
fn repeated(mut response: Response<Payload>, parts: Vec<(Bytes, u64)>) -> Response<Payload> {
    let length: u64 = parts.iter().map(|(part, times)| part.len() as u64 * times).sum();
    let pieces = parts
        .into_iter()
        .flat_map(|(part, times)| (0..times).map(move |_| Ok(Frame::data(part.clone()))));
    *response.body_mut() = payload(StreamBody::new(stream::iter(pieces)));
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

fn dripping(body: Bytes) -> Response<Payload> {
    let length = body.len();
    let drops = stream::unfold(body, |mut rest| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        Some((Ok(Frame::data(rest.split_to(1))), rest))
    });
    let mut response = json("");
    *response.body_mut() = payload(StreamBody::new(drops));
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    response
}

//! What a request's head must look like before hyper sees it (RFC 9112).
//!
//! hyper repairs what the RFC calls an error (it takes bare LFs for line ends, merges repeated lengths, lets
//! `Transfer-Encoding` win over `Content-Length`, asks for no `Host`), and a service never learns of it. What two servers
//! could read differently is refused here instead. The parser is hyper's own, httparse, so that both see the same head.
//!
//! A verdict depends on the bytes alone, not on the pieces in which they come: the earliest fault decides.

use std::mem::MaybeUninit;

use http::Uri;
use httparse::{Request, Status};

use crate::config::Limits;
use crate::error::Error;

/// Fields that fit the stack; it is hyper's number, too.
pub(super) const USUAL_HEADERS: usize = 100;

/// Empty lines that may stand before a request: RFC 9112 §2.2 asks to ignore one at least.
const MOST_EMPTY_LINES: usize = 2;

const STRAY: Error = Error::Malformed("a control character, or a line end that is not CR LF");

/// The limits that a request's bytes are held to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    /// Bytes of a head, the empty lines before it included.
    pub(super) bytes: usize,
    /// Fields of a head.
    pub(super) headers: usize,
    /// Bytes of a body.
    pub(super) body: u64,
}

impl Most {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            bytes: limits.header_bytes,
            headers: limits.headers,
            body: limits.request_body,
        }
    }
}

/// A head that may go on to hyper.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) length: usize,
    pub(super) body: Body,
    /// Whether it offers another protocol.
    pub(super) upgrades: bool,
}

/// How a body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// So many bytes, perhaps none.
    Length(u64),
    Chunked,
}

/// How much of a head that is not yet whole has been looked at.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Bytes without a fault.
    clean: usize,
    /// Where the line begins that these end in.
    line: usize,
    /// Bytes of the empty lines before the head.
    leading: usize,
}

/// The head that `bytes` begin with, once it is whole. `scan` is a new one for each head, and the same one while it grows.
pub(super) fn check(bytes: &[u8], scan: &mut Scan, most: &Most) -> Result<Option<Head>, Error> {
    let within = &bytes[..bytes.len().min(most.bytes)];
    // Mostly a head comes whole, and there is nothing wrong with it.
    if scan.clean == 0
        && let Ok(Some(head)) = parse(within, most)
        && has_clean_lines(&within[..head.length])
    {
        return Ok(Some(head));
    }
    let lines = scan.line;
    while let Some(&byte) = within.get(scan.clean) {
        let at = scan.clean;
        let after_cr = at > scan.line && within[at - 1] == b'\r';
        let is_stray = match byte {
            b'\n' => !after_cr,
            b'\t' | b'\r' | b' '..=b'~' | 0x80.. => after_cr,
            _ => true,
        };
        if is_stray {
            return Err(parse(&within[..scan.line], most).err().unwrap_or(STRAY));
        }
        scan.clean += 1;
        if byte == b'\n' {
            let is_empty = at == scan.line + 1;
            if is_empty && scan.line > scan.leading {
                return parse(&within[..=at], most);
            }
            scan.line = scan.clean;
            if is_empty {
                scan.leading = scan.clean;
                if scan.leading > MOST_EMPTY_LINES * 2 {
                    return Err(Error::Malformed("empty lines in place of a request"));
                }
            }
        }
    }
    if scan.line > lines {
        parse(&within[..scan.line], most)?;
    }
    if within.len() == most.bytes {
        return Err(Error::HeadTooLarge);
    }
    Ok(None)
}

/// What the scan asks of a head that httparse has read to its end: control characters it has refused itself, but it takes
/// a bare LF for a line end.
pub(super) fn has_clean_lines(head: &[u8]) -> bool {
    let empty_lines = head.chunks(2).take_while(|pair| pair == b"\r\n").count();
    let behind = head.get(1..).unwrap_or_default();
    let is_bare = |(before, byte): (&u8, &u8)| *byte == b'\n' && *before != b'\r';
    // All are counted: so it is done for many bytes at once.
    let bare = head.iter().zip(behind).filter(|pair| is_bare(*pair)).count();
    empty_lines <= MOST_EMPTY_LINES && bare == 0 && head.first() != Some(&b'\n')
}

fn parse(bytes: &[u8], most: &Most) -> Result<Option<Head>, Error> {
    parsed(bytes, most, |request, length| examine(request, length, most))
}

/// What `read` makes of the head that `bytes` begin with, once it is whole.
pub(super) fn parsed<'b, T>(
    bytes: &'b [u8],
    most: &Most,
    read: impl FnOnce(&Request<'_, 'b>, usize) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let mut usual = [const { MaybeUninit::uninit() }; USUAL_HEADERS];
    let mut many;
    let headers = if let Some(usual) = usual.get_mut(..most.headers) {
        usual
    } else {
        many = vec![MaybeUninit::uninit(); most.headers];
        &mut many[..]
    };
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(bytes, headers) {
        Ok(Status::Complete(length)) => read(&request, length).map(Some),
        Ok(Status::Partial) => Ok(None),
        Err(error) => Err(match error {
            httparse::Error::TooManyHeaders => Error::HeadTooLarge,
            httparse::Error::HeaderName => Error::Malformed("a field name that is none, or white space around it"),
            httparse::Error::HeaderValue => Error::Malformed("a field value with control characters"),
            httparse::Error::NewLine | httparse::Error::Status => STRAY,
            httparse::Error::Token => Error::Malformed("the request line is none"),
            httparse::Error::Version => Error::Malformed("HTTP/1.1 and HTTP/1.0 are spoken here, and nothing else"),
        }),
    }
}

/// What a well-formed head must say, and what it must not.
fn examine(request: &Request<'_, '_>, length: usize, most: &Most) -> Result<Head, Error> {
    let method = request.method.unwrap_or_default();
    if ["CONNECT", "TRACE"]
        .iter()
        .any(|name| method.eq_ignore_ascii_case(name))
    {
        return Err(Error::Malformed("CONNECT and TRACE are not served"));
    }
    if !is_target(method, request.path.unwrap_or_default()) {
        return Err(Error::Malformed("the request target is none"));
    }
    let (mut host, mut content_length, mut transfer_encoding, mut upgrades) = (None, None, None, false);
    for header in request.headers.iter() {
        let (seen, repeated) = match header.name.len() {
            4 if header.name.eq_ignore_ascii_case("host") => (&mut host, "more than one Host"),
            14 if header.name.eq_ignore_ascii_case("content-length") => {
                (&mut content_length, "more than one Content-Length")
            }
            17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                (&mut transfer_encoding, "more than one Transfer-Encoding")
            }
            7 if header.name.eq_ignore_ascii_case("upgrade") => {
                upgrades = true;
                continue;
            }
            _ => continue,
        };
        if seen.replace(header.value).is_some() {
            return Err(Error::Malformed(repeated));
        }
    }
    let is_http_1_1 = request.version == Some(1);
    match host {
        None if is_http_1_1 => return Err(Error::Malformed("no Host")),
        Some(host) if !is_host(host) => return Err(Error::Malformed("a Host that is none")),
        None | Some(_) => {}
    }
    let body = match (transfer_encoding, content_length) {
        (None, None) => Body::Length(0),
        (Some(_), Some(_)) => return Err(Error::Malformed("both Transfer-Encoding and Content-Length")),
        (Some(_), None) if !is_http_1_1 => return Err(Error::Malformed("Transfer-Encoding in HTTP/1.0")),
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Body::Chunked,
        (Some(_), None) => return Err(Error::Malformed("a Transfer-Encoding other than chunked")),
        (None, Some(digits)) => {
            let length = decimal(digits).ok_or(Error::Malformed("a Content-Length that is no number"))?;
            if length > most.body {
                return Err(Error::BodyTooLarge);
            }
            Body::Length(length)
        }
    };
    Ok(Head { length, body, upgrades })
}

/// Bytes that a target may have anywhere.
const PLAIN: [bool; 256] = of_these(b"/?-._~%=&+,:@!$'()*");

/// Bytes that a host's name may have.
const NAME: [bool; 256] = of_these(b"-._~%!$&'()*+,;=");

/// ASCII letters and digits, and `others`: a table, since every byte of a head is looked up.
const fn of_these(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    let mut byte = 0;
    while byte < table.len() {
        #[allow(clippy::cast_possible_truncation, reason = "a byte's values are all that is counted")]
        let is_alphanumeric = (byte as u8).is_ascii_alphanumeric();
        table[byte] = table[byte] || is_alphanumeric;
        byte += 1;
    }
    table
}

/// Whether hyper will take it, and nobody drops part of it: a fragment has no place in a request.
fn is_target(method: &str, target: &str) -> bool {
    let is_plain = |byte: &u8| PLAIN[usize::from(*byte)];
    match target.as_bytes() {
        b"*" => method == "OPTIONS",
        [b'/', rest @ ..] if rest.iter().all(is_plain) => true,
        bytes if bytes.contains(&b'#') => false,
        [b'/', ..] => Uri::try_from(target).is_ok(),
        _ => Uri::try_from(target).is_ok_and(|uri| {
            let has_web_scheme = matches!(uri.scheme_str(), Some("http" | "https"));
            has_web_scheme && uri.authority().is_some_and(|name| !name.as_str().contains('@'))
        }),
    }
}

/// `uri-host [ ":" port ]` (RFC 3986 §3.2), or nothing.
pub(super) fn is_host(value: &[u8]) -> bool {
    let is_name = |byte: &u8| NAME[usize::from(*byte)];
    let (name, rest) = if let Some(literal) = value.strip_prefix(b"[") {
        let Some(end) = literal.iter().position(|byte| *byte == b']') else {
            return false;
        };
        if end == 0 || !literal[..end].iter().all(|byte| *byte == b':' || is_name(byte)) {
            return false;
        }
        (&[][..], &literal[end + 1..])
    } else {
        let end = value.iter().position(|byte| *byte == b':').unwrap_or(value.len());
        value.split_at(end)
    };
    let port = rest.strip_prefix(b":");
    name.iter().all(is_name)
        && port.unwrap_or(rest).iter().all(u8::is_ascii_digit)
        && (rest.is_empty() || port.is_some())
}

/// `1*DIGIT`, no sign, no list.
fn decimal(digits: &[u8]) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|_| is_number)
}

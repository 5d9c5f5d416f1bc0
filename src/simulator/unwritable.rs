//! Answers that no HTTP library would write, as bytes. Pure.

/// What is wrong with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unwritable {
    Garbage,
    Extra,
    ShortLength,
    LengthAndChunked,
    EndlessInterim,
    EndlessHeaders,
}

/// What is sent in place of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Script {
    /// Once.
    pub(super) first: Vec<u8>,
    /// For ever after; when empty, the connection stays open for the next query.
    pub(super) repeated: Vec<u8>,
}

impl Unwritable {
    /// The answer, where `body` is what should have been answered.
    pub(super) fn script(self, body: &str) -> Script {
        let length = body.len();
        let head = |headers: &str| format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{headers}");
        let whole = |length: usize| format!("{}Content-Length: {length}\r\n\r\n{body}", head(""));
        let (first, repeated) = match self {
            Self::Garbage => ("\u{1}\u{2} neither HTTP\r\nnor anything else\r\n\r\n".into(), ""),
            Self::Extra => (whole(length) + &whole(length).replace("\"success\"", "\"forged!\""), ""),
            Self::ShortLength => (whole(length / 2), ""),
            Self::LengthAndChunked => (
                format!(
                    "{}\r\n{length:x}\r\n{body}\r\n0\r\n\r\n",
                    head(&format!("Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"))
                ),
                "",
            ),
            Self::EndlessInterim => (String::new(), "HTTP/1.1 100 Continue\r\n\r\n"),
            Self::EndlessHeaders => (head(""), "X-Filler: for ever and ever\r\n"),
        };
        Script {
            first: first.into_bytes(),
            repeated: repeated.repeat(100).into_bytes(),
        }
    }
}

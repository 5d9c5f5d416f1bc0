//! Follows a chunked body (RFC 9112 §7.1) to its end, byte for byte, and refuses what is not exactly its grammar.
//!
//! Nothing is decoded: hyper does that, from the same bytes. It takes what this lets through, since this is stricter in
//! everything: sizes, extensions and trailers are bounded more tightly, and control characters stand nowhere.

use crate::error::Error;

/// Digits of a chunk's size, leading zeros included: no chunk of ours is larger than 2^60 bytes.
const MOST_DIGITS: u32 = 15;

/// Bytes of all extensions of a body. hyper has 16 KiB.
const MOST_EXTENSION_BYTES: u32 = 4096;

/// Bytes of all trailer fields. hyper has 16 KiB.
const MOST_TRAILER_BYTES: u32 = 8192;

const BAD_SIZE: Error = Error::Malformed("a chunk size that is none");
const BAD_FRAMING: Error = Error::Malformed("chunks that are not framed as they must be");
const BAD_TRAILER: Error = Error::Malformed("a trailer field that is none");

/// Where in a chunked body the next byte stands.
#[derive(Debug)]
pub(super) struct Chunks {
    state: State,
    /// Of the chunk that is read: its size, then what is left of it.
    size: u64,
    /// What the body may still bring.
    body_left: u64,
    extensions_left: u32,
    trailers_left: u32,
    fields_left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The size, of which so many digits were read.
    Size(u32),
    Extension(Extension),
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// A trailer field's name begins here, or the end's CR stands here.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    End,
}

/// Where in a chunk's extensions (RFC 9112 §7.1.1) the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extension {
    /// White space, behind which a semicolon must follow.
    Space,
    /// Behind the semicolon: a name must follow.
    Begun,
    Name,
    /// White space behind the name.
    Named,
    /// Behind the `=`: a value must follow.
    Equals,
    Value,
    Quoted,
    /// Behind a backslash in quotes.
    Escape,
    /// Behind the closing quote.
    Unquoted,
}

impl Extension {
    /// Whether the line may end here.
    fn may_end(self) -> bool {
        matches!(self, Self::Name | Self::Value | Self::Unquoted)
    }

    fn step(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Space | Self::Name | Self::Named | Self::Value | Self::Unquoted, b';') => Self::Begun,
            (Self::Space | Self::Value | Self::Unquoted, b' ' | b'\t') => Self::Space,
            (Self::Name | Self::Named, b' ' | b'\t') => Self::Named,
            (Self::Begun | Self::Equals, b' ' | b'\t') => self,
            (Self::Begun | Self::Name, _) if is_token(byte) => Self::Name,
            (Self::Name | Self::Named, b'=') => Self::Equals,
            (Self::Equals, b'"') => Self::Quoted,
            (Self::Equals | Self::Value, _) if is_token(byte) => Self::Value,
            (Self::Quoted, b'"') => Self::Unquoted,
            (Self::Quoted, b'\\') => Self::Escape,
            (Self::Quoted | Self::Escape, _) if is_text(byte) => Self::Quoted,
            _ => return None,
        })
    }
}

impl Chunks {
    /// A body of at most `most_bytes` with at most `most_fields` in its trailer.
    pub(super) fn new(most_bytes: u64, most_fields: usize) -> Self {
        Self {
            state: State::Size(0),
            size: 0,
            body_left: most_bytes,
            extensions_left: MOST_EXTENSION_BYTES,
            trailers_left: MOST_TRAILER_BYTES,
            fields_left: most_fields,
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state == State::End
    }

    /// Follows the body through `bytes`; says how many of them are its own: all, or those up to its end.
    pub(super) fn follow(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.state == State::End {
                break;
            }
            if self.state == State::Data {
                let rest = bytes.len() - at;
                let here = usize::try_from(self.size).map_or(rest, |size| size.min(rest));
                at += here;
                self.size -= here as u64;
                if self.size == 0 {
                    self.state = State::DataCr;
                }
            } else {
                self.state = self.step(byte)?;
                at += 1;
            }
        }
        Ok(at)
    }

    fn step(&mut self, byte: u8) -> Result<State, Error> {
        Ok(match (self.state, byte) {
            (State::Size(digits), _) if byte.is_ascii_hexdigit() => {
                if digits == MOST_DIGITS {
                    return Err(BAD_SIZE);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                self.size = self.size * 16 + u64::from(digit);
                State::Size(digits + 1)
            }
            (State::Size(1..), b'\r') => self.sized()?,
            (State::Extension(extension), b'\r') if extension.may_end() => self.sized()?,
            (State::Size(1..), b';') => State::Extension(Extension::Begun),
            (State::Size(1..), b' ' | b'\t') => {
                spend(&mut self.extensions_left, BAD_FRAMING)?;
                State::Extension(Extension::Space)
            }
            (State::Extension(extension), _) => {
                spend(&mut self.extensions_left, BAD_FRAMING)?;
                State::Extension(extension.step(byte).ok_or(BAD_FRAMING)?)
            }
            (State::SizeLf, b'\n') if self.size == 0 => State::Trailer,
            (State::SizeLf, b'\n') => State::Data,
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size(0),
            (State::Trailer, b'\r') => State::EndLf,
            (State::EndLf, b'\n') => State::End,
            (State::Trailer, _) if is_token(byte) => {
                self.fields_left = self.fields_left.checked_sub(1).ok_or(Error::HeadTooLarge)?;
                spend(&mut self.trailers_left, Error::HeadTooLarge)?;
                State::TrailerName
            }
            (State::TrailerName, b':') => State::TrailerValue,
            (State::TrailerName, _) if is_token(byte) => {
                spend(&mut self.trailers_left, Error::HeadTooLarge)?;
                State::TrailerName
            }
            (State::TrailerValue, b'\r') => State::TrailerLf,
            (State::TrailerValue, _) if is_text(byte) => {
                spend(&mut self.trailers_left, Error::HeadTooLarge)?;
                State::TrailerValue
            }
            (State::TrailerLf, b'\n') => State::Trailer,
            (State::Size(_), _) => return Err(BAD_SIZE),
            (State::Trailer | State::TrailerName | State::TrailerValue | State::TrailerLf | State::EndLf, _) => {
                return Err(BAD_TRAILER);
            }
            (State::SizeLf | State::Data | State::DataCr | State::DataLf | State::End, _) => return Err(BAD_FRAMING),
        })
    }

    /// A chunk's size is known.
    fn sized(&mut self) -> Result<State, Error> {
        self.body_left = self.body_left.checked_sub(self.size).ok_or(Error::BodyTooLarge)?;
        Ok(State::SizeLf)
    }
}

/// What a value may hold.
fn is_text(byte: u8) -> bool {
    matches!(byte, b'\t' | b' '..=b'~' | 0x80..)
}

fn spend(left: &mut u32, or: Error) -> Result<(), Error> {
    *left = left.checked_sub(1).ok_or(or)?;
    Ok(())
}

/// `tchar` of RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

//! Reading upstream's body: bounded, decoded, and with room for it reserved before it is kept.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;

/// `limits.body_bytes`, as permits. Bodies that do not say how long they are take room as they grow; so that they can never
/// all wait for each other, room for one largest body is set aside, and whoever has it needs no more.
pub(super) struct Room {
    shared: Arc<Semaphore>,
    set_aside: Arc<Semaphore>,
    /// `upstream.max_body`.
    most: usize,
    buffers: Arc<Buffers>,
}

impl Room {
    pub(super) fn new(body_bytes: usize, max_body: usize) -> Self {
        let shared = body_bytes.saturating_sub(max_body).min(Semaphore::MAX_PERMITS);
        Self {
            shared: Arc::new(Semaphore::new(shared)),
            set_aside: Arc::new(Semaphore::new(1)),
            most: max_body,
            buffers: Arc::default(),
        }
    }

    async fn share(&self, bytes: usize) -> Result<Share<'_>, Error> {
        let mut share = Share {
            room: self,
            bytes: 0,
            permit: None,
        };
        share.grow(bytes).await?;
        Ok(share)
    }
}

/// One body's part of the room.
struct Share<'a> {
    room: &'a Room,
    bytes: usize,
    permit: Option<OwnedSemaphorePermit>,
}

impl Share<'_> {
    async fn grow(&mut self, bytes: usize) -> Result<(), Error> {
        let Some(missing) = bytes.checked_sub(self.bytes).filter(|missing| *missing > 0) else {
            return Ok(());
        };
        let missing = u32::try_from(missing).map_err(|_| Error::UpstreamTooLarge)?;
        // Neither semaphore is ever closed.
        tokio::select! {
            biased;
            more = Arc::clone(&self.room.shared).acquire_many_owned(missing) => {
                let more = more.map_err(|_| Error::Internal)?;
                match &mut self.permit {
                    Some(permit) => permit.merge(more),
                    None => self.permit = Some(more),
                }
                self.bytes = bytes;
            }
            all = Arc::clone(&self.room.set_aside).acquire_owned() => {
                self.permit = Some(all.map_err(|_| Error::Internal)?);
                self.bytes = self.room.most;
            }
        }
        Ok(())
    }
}

/// Buffers that are used again: an answer is kept in a piece of memory of its own, and what lay beside it and was freed
/// would leave holes there that fit nothing. At a million answers that was a sixth of the memory.
#[derive(Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

/// Buffers that are kept for the next, of up to this many bytes each.
const MOST_BUFFERS: usize = 128;
const LARGEST_BUFFER: usize = 64 << 10;
/// What most bodies fit into.
const SMALLEST_BUFFER: usize = 4 << 10;

impl Buffers {
    fn lend(&self) -> Vec<u8> {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| Vec::with_capacity(SMALLEST_BUFFER))
    }
}

/// A body, in a buffer that is given back.
struct Lent {
    bytes: Vec<u8>,
    from: Arc<Buffers>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut spare = self.from.0.lock().unwrap_or_else(PoisonError::into_inner);
        if self.bytes.capacity() <= LARGEST_BUFFER && spare.len() < MOST_BUFFERS {
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.clear();
            spare.push(bytes);
        }
    }
}

/// Reads `body` to its end, undoing its Content-Encoding: at most `upstream.max_body` bytes, with room for each.
///
/// # Errors
/// When it breaks off, is too large, or is encoded in an unknown way.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Incoming,
    room: &Room,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Error> {
    let most = room.most;
    let announced = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > most) {
        return Err(Error::UpstreamTooLarge);
    }
    let mut decoding = Decoder::of(
        headers,
        Bounded {
            bytes: room.buffers.lend(),
            most,
        },
    )?;
    let mut share = room.share(announced.unwrap_or(0)).await?;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Error::UpstreamBroken)?.into_data() else {
            continue;
        };
        decoding.push(&data)?;
        share.grow(decoding.bounded().bytes.len()).await?;
        if body.is_end_stream() {
            // Else the connection would be polled once more, only to say so.
            break;
        }
    }
    let decoded = decoding.finish()?;
    share.grow(decoded.len()).await?;
    let lent = Lent {
        bytes: decoded,
        from: Arc::clone(&room.buffers),
    };
    Ok((Bytes::from_owner(lent), share.permit))
}

enum Decoder {
    Identity(Bounded),
    Gzip(Box<MultiGzDecoder<Bounded>>),
    Deflate(Box<ZlibDecoder<Bounded>>),
}

impl Decoder {
    fn of(headers: &HeaderMap, into: Bounded) -> Result<Self, Error> {
        let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
        let encoding = encodings
            .next()
            .map_or(Ok(""), |value| value.to_str())
            .map_err(|_| Error::UpstreamEncoding)?;
        if encodings.next().is_some() {
            return Err(Error::UpstreamEncoding);
        }
        match encoding.trim().to_ascii_lowercase().as_str() {
            "" | "identity" => Ok(Self::Identity(into)),
            "gzip" | "x-gzip" => Ok(Self::Gzip(Box::new(MultiGzDecoder::new(into)))),
            "deflate" => Ok(Self::Deflate(Box::new(ZlibDecoder::new(into)))),
            _ => Err(Error::UpstreamEncoding),
        }
    }

    fn bounded(&self) -> &Bounded {
        match self {
            Self::Identity(bounded) => bounded,
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Deflate(decoder) => decoder.get_ref(),
        }
    }

    fn push(&mut self, data: &[u8]) -> Result<(), Error> {
        let pushed = match self {
            Self::Identity(bounded) => bounded.write_all(data),
            Self::Gzip(decoder) => decoder.write_all(data),
            Self::Deflate(decoder) => decoder.write_all(data),
        };
        pushed.map_err(|error| classify(&error))
    }

    fn finish(self) -> Result<Vec<u8>, Error> {
        let finished = match self {
            Self::Identity(bounded) => Ok(bounded),
            Self::Gzip(decoder) => decoder.finish(),
            Self::Deflate(decoder) => decoder.finish(),
        };
        Ok(finished.map_err(|error| classify(&error))?.bytes)
    }
}

fn classify(error: &io::Error) -> Error {
    if error.kind() == io::ErrorKind::FileTooLarge {
        Error::UpstreamTooLarge
    } else {
        Error::UpstreamBroken
    }
}

/// Bytes up to a limit: a bomb stops here, not in memory.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() > self.most - self.bytes.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

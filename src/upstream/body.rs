//! Reading upstream's body: bounded, decoded, and with room for it reserved before it is kept.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;

/// Reads `body` to its end, undoing its Content-Encoding: at most `most` bytes, each with a permit of `room`, which holds
/// `limits.body_bytes` of them. The copy is exactly as long as the body, since it may be kept for days.
///
/// # Errors
/// When it breaks off, is too large, or is encoded in an unknown way.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Incoming,
    most: usize,
    room: &Arc<Semaphore>,
) -> Result<(Bytes, OwnedSemaphorePermit), Error> {
    let announced = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > most) {
        return Err(Error::UpstreamTooLarge);
    }
    let mut decoding = Decoder::of(
        headers,
        Bounded {
            bytes: Vec::new(),
            most,
        },
    )?;
    let mut reserved = reserve(room, announced.unwrap_or(0)).await?;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Error::UpstreamBroken)?.into_data() else {
            continue;
        };
        decoding.push(&data)?;
        let missing = decoding.bounded().bytes.len().saturating_sub(reserved.num_permits());
        if missing > 0 {
            reserved.merge(reserve(room, missing).await?);
        }
    }
    let decoded = decoding.finish()?;
    let missing = decoded.len().saturating_sub(reserved.num_permits());
    if missing > 0 {
        reserved.merge(reserve(room, missing).await?);
    }
    Ok((Bytes::from(decoded.into_boxed_slice()), reserved))
}

async fn reserve(room: &Arc<Semaphore>, bytes: usize) -> Result<OwnedSemaphorePermit, Error> {
    let bytes = u32::try_from(bytes).map_err(|_| Error::UpstreamTooLarge)?;
    // The semaphore is never closed.
    Arc::clone(room)
        .acquire_many_owned(bytes)
        .await
        .map_err(|_| Error::Internal)
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

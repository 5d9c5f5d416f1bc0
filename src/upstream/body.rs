//! Reading upstream's body: bounded, decoded, and with room for it reserved before it is kept.

use std::future::poll_fn;
use std::io::{self, Write};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::Error;

/// `limits.body_bytes`, as permits: half of them to read with, half for what is read and not kept, until its clients have it.
/// So reading never waits for a client that does not read. Bodies that do not say how long they are take room as they grow; so
/// that they can never all wait for each other, room for one largest body is set aside, and whoever has it needs no more.
pub(super) struct Room {
    shared: Arc<Semaphore>,
    set_aside: Arc<Semaphore>,
    held: Arc<Semaphore>,
    /// `upstream.max_body`.
    most: usize,
    buffers: Arc<Buffers>,
}

impl Room {
    pub(super) fn new(body_bytes: usize, max_body: usize) -> Self {
        let held = body_bytes / 2;
        let shared = (body_bytes - held).saturating_sub(max_body);
        let permits = |bytes: usize| Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        Self {
            shared: permits(shared),
            set_aside: permits(1),
            held: permits(held),
            most: max_body,
            buffers: Arc::default(),
        }
    }

    /// Room for a body of so many bytes that is read.
    ///
    /// # Errors
    /// [`Error::NoRoom`] when clients that take their time have it.
    pub(super) async fn hold(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Error> {
        let bytes = u32::try_from(bytes).map_err(|_| Error::UpstreamTooLarge)?;
        let held = timeout(PATIENCE, Arc::clone(&self.held).acquire_many_owned(bytes)).await;
        // The semaphore is never closed.
        held.map_err(|_| Error::NoRoom)?.map_err(|_| Error::Internal)
    }
}

/// How long a body that is read waits for those that clients are taking: whoever reads at all has taken one by then. The room
/// that it was read with waits, too.
const PATIENCE: Duration = Duration::from_millis(500);

/// One body's part of the room.
struct Share<'a> {
    room: &'a Room,
    bytes: usize,
    permit: Option<OwnedSemaphorePermit>,
    /// Whether it has had to wait.
    has_waited: &'a mut bool,
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
            // Neither is to be had at once.
            () = poll_fn(|_| {
                *self.has_waited = true;
                Poll::Pending
            }) => {}
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
        let spare = self.0.lock().pop();
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
        let mut spare = self.from.0.lock();
        if self.bytes.capacity() <= LARGEST_BUFFER && spare.len() < MOST_BUFFERS {
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.clear();
            spare.push(bytes);
        }
    }
}

/// Reads `body` to its end, undoing its Content-Encoding: at most `upstream.max_body` bytes, with room for each. Notes in
/// `has_waited` when there is none at once.
///
/// # Errors
/// When it breaks off, is too large, or cannot be decoded.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Incoming,
    room: &Room,
    has_waited: &mut bool,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Error> {
    let most = room.most;
    // Nothing where it does not say how long it is.
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > most {
        return Err(Error::UpstreamTooLarge);
    }
    let bounded = Bounded {
        bytes: room.buffers.lend(),
        most,
    };
    let mut share = Share {
        room,
        bytes: 0,
        permit: None,
        has_waited,
    };
    share.grow(announced).await?;
    let mut data = next(&mut body).await?;
    let mut decoding = match data {
        Some(_) => Decoder::of(headers, bounded)?,
        // No bytes are none, whatever they are said to be encoded in.
        None => Decoder::Identity(bounded),
    };
    while let Some(bytes) = data {
        decoding.push(&bytes)?;
        share.grow(decoding.bounded().bytes.len()).await?;
        data = next(&mut body).await?;
    }
    let decoded = decoding.finish()?;
    share.grow(decoded.len()).await?;
    let lent = Lent {
        bytes: decoded,
        from: Arc::clone(&room.buffers),
    };
    Ok((Bytes::from_owner(lent), share.permit))
}

/// The next bytes; `None` at the end.
async fn next(body: &mut Incoming) -> Result<Option<Bytes>, Error> {
    // At its end the connection would be polled once more, only to say so.
    while !body.is_end_stream()
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|_| Error::UpstreamBroken)?;
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
    Ok(None)
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
        // Where it breaks off, that is known before.
        Error::UpstreamEncoding
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::{Instant, sleep};

    use super::super::Fetched;
    use super::super::tests::in_memory;
    use super::*;
    use crate::account::ApiKey;
    use crate::budget::Permit;
    use crate::task::TaskId;

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_room_in_vain_is_not_upstreams_failure() {
        let (upstream, mut connections, _) = in_memory();
        let room = &upstream.0.room;
        let key = ApiKey::new("ak_one").unwrap();
        let task = TaskId::new("a").unwrap();
        let pool = upstream.pool();
        let all = u32::try_from(room.shared.available_permits()).unwrap();
        for (is_full, body, expected) in [
            (false, "{}", Ok(())),
            (false, "{", Err(Error::UpstreamTimeout)),
            (true, "{}", Err(Error::NoRoom)),
        ] {
            let taken = is_full.then(|| (room.shared.try_acquire_many(all), room.set_aside.try_acquire()));
            let ready = pool.connect(&task, true).await.unwrap();
            let mut far = connections.recv().await.unwrap();
            let permit = Permit::until(Instant::now() + Duration::from_millis(10));
            let answering = async {
                far.read_u8().await.unwrap();
                let head = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
                far.write_all([head, body].concat().as_bytes()).await.unwrap();
            };
            let (sent, ()) = tokio::join!(ready.send(permit, &key, &task, None), answering);
            assert_eq!(sent.map(|Fetched { .. }| ()).map_err(|failed| failed.error), expected);
            drop(taken);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_that_clients_take_their_time_for_leave_room_to_read() {
        let room = Room::new(2048, 1024);
        let held = room.hold(1000).await.unwrap();
        assert_eq!(room.hold(1000).await.unwrap_err(), Error::NoRoom);
        let small = room.hold(24).await.unwrap();
        let mut has_waited = false;
        let mut share = Share {
            room: &room,
            bytes: 0,
            permit: None,
            has_waited: &mut has_waited,
        };
        share.grow(1024).await.unwrap();
        drop((share, small));
        assert!(!has_waited);
        // Whoever reads makes room.
        let (next, ()) = tokio::join!(room.hold(1000), async {
            sleep(PATIENCE / 2).await;
            drop(held);
        });
        drop(next.unwrap());
    }
}

//! A TCP stream whose reads carry the kernel's own stamp of when the bytes came in.
//!
//! The strict limiter must not count how busy this process is: a request that waited in the socket's buffer arrived when
//! the network brought it. Linux gives that instant, on the wall clock, with `SO_TIMESTAMPNS`.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, cmsg_space, recvmsg, setsockopt, sockopt::ReceiveTimestampns};
use nix::sys::time::TimeSpec;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

use super::link::Link;

/// The most bytes of one read: more would only be zeroed in vain.
const READ: usize = 16 * 1024;

/// Nanoseconds of the wall clock.
pub(super) fn unix_ns(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Asks for stamps from the first connection on: the kernel begins to stamp a moment after the first socket asked.
pub(super) fn stamp_arrivals(listener: &TcpListener) -> io::Result<()> {
    Ok(setsockopt(listener, ReceiveTimestampns, &true)?)
}

/// See the module.
pub(super) struct StampedStream {
    stream: TcpStream,
    link: Arc<Link>,
    control: [u8; cmsg_space::<TimeSpec>()],
}

impl StampedStream {
    pub(super) fn new(stream: TcpStream, link: Arc<Link>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        setsockopt(&stream, ReceiveTimestampns, &true)?;
        Ok(Self {
            stream,
            link,
            control: [0; cmsg_space::<TimeSpec>()],
        })
    }
}

impl Drop for StampedStream {
    fn drop(&mut self) {
        if self.link.is_reset() {
            // A socket that lingers for no time is closed by a reset.
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for StampedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let room = buf.remaining().min(READ);
        if room == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(this.stream.poll_read_ready(cx))?;
            let into = buf.initialize_unfilled_to(room);
            let (fd, control) = (this.stream.as_raw_fd(), &mut this.control);
            match this.stream.try_io(Interest::READABLE, || receive(fd, into, control)) {
                Ok((bytes, stamp)) => {
                    buf.advance(bytes);
                    if bytes > 0 {
                        this.link.received(stamp.unwrap_or_else(|| unix_ns(SystemTime::now())));
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

/// Reads what is there, and when it came in.
fn receive(fd: i32, into: &mut [u8], control: &mut [u8]) -> io::Result<(usize, Option<u64>)> {
    let mut slices = [IoSliceMut::new(into)];
    let message = recvmsg::<()>(fd, &mut slices, Some(control), MsgFlags::empty())?;
    let stamp = message.cmsgs().ok().into_iter().flatten().find_map(|control| {
        let ControlMessageOwned::ScmTimestampns(at) = control else {
            return None;
        };
        let seconds = u64::try_from(at.tv_sec()).ok()?;
        let nanos = u64::try_from(at.tv_nsec()).ok()?;
        Some(seconds * 1_000_000_000 + nanos)
    });
    Ok((message.bytes, stamp))
}

impl AsyncWrite for StampedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.link.wrote();
        Pin::new(&mut this.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.link.wrote();
        Pin::new(&mut this.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

//! The body of an answer that is streamed through, and the connection that it comes on: that ends with it.
//!
//! hyper would end it by itself, but first has to write what it holds of the request; and an upstream that reads no more, be it
//! hung or done with an upload that it has refused, can have it wait for ever.

use std::error::Error as _;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderMap, Response, Version};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

use super::pool::Slot;
use crate::dial::Stream;

/// How long a request may still be sent when its answer is whole. Then its client's connection ends, too: nobody reads it.
const GRACE: Duration = Duration::from_secs(15);

/// For how long upstream may take nothing of a request, as with nginx's `proxy_send_timeout`. While it takes nothing, nothing
/// is read of the client either, which may have left long ago.
const STALLED: Duration = Duration::from_mins(1);

/// A stream on which writes fail once nothing has been taken for so long.
pub(super) fn impatient(stream: Box<dyn Stream>) -> Box<dyn Stream> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(STALLED));
    Box::new(Box::pin(stream))
}

/// Whether that is why there is no answer.
pub(super) fn has_stalled(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

/// Whoever waits for an answer. Dropped, it takes the connection along.
#[derive(Debug)]
pub(super) struct Interest(oneshot::Sender<Whole>);

/// The answer has come to its end.
#[derive(Debug)]
struct Whole;

impl Interest {
    /// Lets `connection` do its work in `slot`, for as long as anybody waits for what it brings.
    pub(super) fn in_connection(connection: impl Future<Output: Send> + Send + 'static, slot: Slot) -> Self {
        let (interest, ended) = oneshot::channel();
        tokio::spawn(async move {
            // Given back when all else is closed.
            let _slot = slot;
            let mut connection = pin!(connection);
            // How it ends, the request and its body tell.
            tokio::select! {
                _ = &mut connection => {}
                ended = ended => if let Ok(Whole) = ended {
                    // What is not sent by then is not sent.
                    let _ = timeout(GRACE, connection).await;
                }
            }
        });
        Self(interest)
    }
}

/// Upstream's body, as it comes. Dropped before its end, it closes the connection; after it, what is left of the request may
/// still be sent.
#[derive(Debug)]
pub struct Streamed {
    body: Incoming,
    has_ended: bool,
    ends_request: bool,
    interest: Option<Interest>,
}

impl Streamed {
    pub(super) fn in_response(response: Response<Incoming>, interest: Interest) -> Response<Self> {
        let ends_request = is_last(&response);
        response.map(|body| Self {
            body,
            has_ended: false,
            ends_request,
            interest: Some(interest),
        })
    }

    /// Whether upstream reads no more of the request, once this is at its end.
    pub fn ends_request(&self) -> bool {
        self.ends_request
    }

    /// Whether all of it was taken.
    pub fn is_whole(&self) -> bool {
        self.has_ended || self.body.is_end_stream()
    }
}

/// Whether upstream closes its connection with this response (RFC 9112 §9.3).
fn is_last<B>(response: &Response<B>) -> bool {
    let mut options = connection_options(response.headers());
    response.version() < Version::HTTP_11 || options.any(|option| option.eq_ignore_ascii_case("close"))
}

/// What the Connection lines of a message name: fields that are meant for the next hop only, and `close` (RFC 9110 §7.6.1).
pub fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(CONNECTION).iter();
    lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .map(str::trim)
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        this.has_ended = frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        if self.is_whole()
            && let Some(Interest(ended)) = self.interest.take()
        {
            // Else the connection is over already.
            let _ = ended.send(Whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use http_body_util::{BodyExt as _, Full};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::sync::mpsc;
    use tokio::time::sleep;

    use super::super::tests::in_memory;
    use super::*;

    const UPLOAD: usize = 1 << 20;

    fn upload() -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::from(vec![b'x'; UPLOAD]));
        *request.method_mut() = http::Method::POST;
        request
    }

    /// Reads the beginning of a request and no more, and answers it.
    async fn answer(connections: &mut mpsc::UnboundedReceiver<DuplexStream>, answer: &str) -> DuplexStream {
        let mut far = connections.recv().await.unwrap();
        far.read_u8().await.unwrap();
        far.write_all(answer.as_bytes()).await.unwrap();
        far
    }

    const HALF: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha";
    const HALF_CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nha\r\n";
    const WHOLE: [&str; 3] = [
        "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\n\r\n",
    ];

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_upstream_reads_no_more_is_left_with_whoever_leaves() {
        let (upstream, mut connections, metrics) = in_memory();
        let open = || metrics.upstream_connections.get();
        {
            let mut unanswered = pin!(upstream.stream(upload()));
            let _far = tokio::select! {
                _ = &mut unanswered => panic!("answered"),
                far = answer(&mut connections, "") => far,
            };
            assert_eq!(open(), 1);
        }
        sleep(Duration::from_millis(1)).await;
        assert_eq!(open(), 0, "never answered");
        for half in [HALF, HALF_CHUNKED] {
            let (response, _far) = tokio::join!(upstream.stream(upload()), answer(&mut connections, half));
            let mut response = response.unwrap();
            response.body_mut().frame().await.unwrap().unwrap();
            assert_eq!(open(), 1);
            drop(response);
            sleep(Duration::from_millis(1)).await;
            assert_eq!(open(), 0, "{half}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_upstream_reads_no_more_outlives_a_whole_answer_by_a_while() {
        let (upstream, mut connections, metrics) = in_memory();
        for whole in WHOLE {
            let (response, _far) = tokio::join!(upstream.stream(upload()), answer(&mut connections, whole));
            response.unwrap().collect().await.unwrap();
            sleep(GRACE.mul_f64(0.99)).await;
            assert_eq!(metrics.upstream_connections.get(), 1, "{whole}");
            sleep(GRACE.mul_f64(0.02)).await;
            assert_eq!(metrics.upstream_connections.get(), 0, "{whole}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_goes_on_behind_its_answer() {
        let (upstream, mut connections, metrics) = in_memory();
        for whole in WHOLE {
            let (response, mut far) = tokio::join!(upstream.stream(upload()), answer(&mut connections, whole));
            response.unwrap().collect().await.unwrap();
            sleep(GRACE / 2).await;
            let mut seen = 0;
            while seen < UPLOAD {
                let read = far.read(&mut [0; 1024]).await.unwrap();
                assert!(read > 0, "{seen} bytes behind {whole}");
                seen += read;
            }
            // hyper does not look any more whether anybody has another request.
            sleep(GRACE).await;
            assert_eq!(metrics.upstream_connections.get(), 0, "{whole}");
        }
    }
}

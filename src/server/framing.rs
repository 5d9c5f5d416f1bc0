//! Follows one connection's bytes from request to request: where heads begin, what of the bytes may go on to hyper.
//!
//! Bodies are followed only to know where the next head begins; they are not kept. What is refused ends the connection, so
//! there is no way back from a refusal.

use super::chunks::Chunks;
use super::head::{self, Body, Most, Scan};
use super::plain::Plain;
use crate::error::Error;
use crate::gateway::PlainPoll;

/// Where a connection's requests are.
#[derive(Debug)]
pub(super) struct Framing {
    most: Most,
    plain: Plain,
    state: State,
    /// A request that offered another protocol is not yet answered.
    offered: bool,
}

#[derive(Debug)]
enum State {
    /// A head begins here, or goes on.
    Head(Scan),
    /// So many bytes of a body are to come, at least one.
    Length(u64),
    Chunked(Chunks),
}

/// What of some bytes may go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Followed {
    /// This many may. The rest is the beginning of a head, or of what is refused.
    pub(super) through: usize,
    /// Requests of which the head is among them.
    pub(super) heads: usize,
    /// Why nothing more may, ever.
    pub(super) refused: Option<Refused>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) error: Error,
    /// The fault is in the body of a request whose head went on before.
    pub(super) in_body: bool,
}

impl Framing {
    pub(super) fn new(most: Most) -> Self {
        Self {
            most,
            plain: Plain::default(),
            state: State::Head(Scan::default()),
            offered: false,
        }
    }

    /// Everything that went on is answered.
    pub(super) fn answered(&mut self) {
        self.offered = false;
    }

    /// The poll that `bytes` begin with, and the length of its head, if it may be answered here and now: they are what came
    /// since the last request, which is answered.
    pub(super) fn plain<'b>(&mut self, bytes: &'b [u8]) -> Option<(usize, PlainPoll<'b>)> {
        if !self.is_between_requests() {
            return None;
        }
        self.plain.read(bytes, &self.most)
    }

    /// Whether all of every request is there.
    pub(super) fn is_between_requests(&self) -> bool {
        matches!(self.state, State::Head(_))
    }

    /// The poll that was found is taken; a head begins behind it.
    pub(super) fn passed(&mut self) {
        self.state = State::Head(Scan::default());
        self.offered = false;
    }

    /// Follows the requests through `bytes`: what came since the last call, and before it what was left then.
    pub(super) fn follow(&mut self, bytes: &[u8]) -> Followed {
        let (mut at, mut heads) = (0, 0);
        // Where the request began whose body is followed, if it began in these bytes.
        let mut began = None;
        let refused = loop {
            let rest = &bytes[at..];
            match &mut self.state {
                State::Head(_) if rest.is_empty() => break None,
                // Whether they belong to the other protocol or to this one, nobody can say.
                State::Head(_) if self.offered => {
                    let error = Error::Malformed("more bytes while an Upgrade is not yet answered");
                    break Some(Refused { error, in_body: false });
                }
                State::Head(scan) => {
                    let head = match head::check(rest, scan, &self.most) {
                        Ok(Some(head)) => head,
                        Ok(None) => break None,
                        Err(error) => break Some(Refused { error, in_body: false }),
                    };
                    began = Some(at);
                    at += head.length;
                    heads += 1;
                    self.offered = head.upgrades;
                    self.state = match head.body {
                        Body::Length(0) => State::Head(Scan::default()),
                        Body::Length(length) => State::Length(length),
                        Body::Chunked => State::Chunked(Chunks::new(self.most.body, self.most.headers)),
                    };
                }
                State::Length(left) => {
                    let here = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    *left -= here as u64;
                    at += here;
                    if *left > 0 {
                        break None;
                    }
                    self.state = State::Head(Scan::default());
                }
                State::Chunked(chunks) => match chunks.follow(rest) {
                    Ok(own) => {
                        at += own;
                        if !chunks.has_ended() {
                            break None;
                        }
                        self.state = State::Head(Scan::default());
                    }
                    Err(error) => {
                        // Nobody has seen its head yet: nobody shall.
                        if let Some(began) = began {
                            at = began;
                            heads -= 1;
                        }
                        let in_body = began.is_none();
                        break Some(Refused { error, in_body });
                    }
                },
            }
        };
        Followed {
            through: at,
            heads,
            refused,
        }
    }
}

#[cfg(test)]
mod tests;

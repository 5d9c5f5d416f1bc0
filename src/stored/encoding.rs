//! An answer as it is kept outside this process: on disk, or in a store that replicas share.
//!
//! It is sealed (ChaCha20-Poly1305) with a key that follows from the API key it was fetched with, and bound to version,
//! account and task. That API key is the one secret that every restart and every replica has without being given another;
//! so whoever can read or write the place where answers are kept, and has no key of the account, can neither read nor
//! forge one, and an answer that opens tells which key upstream accepted, and when. An account opens with each of its
//! keys: where a key is rotated, what was sealed with the old one is a miss as soon as that is listed no longer. A key
//! that can be guessed can be guessed from the file, too; upstream's cannot.
//!
//! Whatever is not as it was written is a miss: another version, account, task or key, a byte too many or too few, a time
//! to come. What the answer means is read anew from its bytes, and it is kept no longer than both then and now say.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest;
use ring::rand::{SecureRandom as _, SystemRandom};
use secrecy::{ExposeSecret as _, SecretBox};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Answer, Draft, Keeping};
use crate::account::ApiKey;
use crate::config;
use crate::moment::{Moment, millis};
use crate::task::{self, TaskId};

/// The first byte. What is sealed under another version is a miss, so a change of the form needs no migration.
const VERSION: u8 = 1;

/// How far the clock of whoever wrote may be ahead of ours: what is further ahead does not open.
pub const MOST_AHEAD: Duration = Duration::from_secs(10);

/// An account as restarts and replicas know it, where an `AccountId` means something to one process only: it follows from
/// the configured name, or from the key that forms an account of its own. No key can be read from it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Owner([u8; digest::SHA256_OUTPUT_LEN]);

impl Owner {
    /// The account that is configured under `name`.
    pub fn listed(name: &str) -> Self {
        Self(sha256(&[b"crun-gateway account by name", name.as_bytes()]))
    }

    /// The account that an unlisted `key` forms.
    pub fn unlisted(key: &ApiKey) -> Self {
        Self(key.derive(b"crun-gateway account by key"))
    }

    /// The account within `context`: what is sealed for it opens nowhere else.
    #[must_use]
    pub fn within(&self, context: &[u8]) -> Self {
        Self(sha256(&[b"crun-gateway account within", &self.0, context]))
    }

    /// Under what the answer about `task` is kept: 128 bits of a digest of account and task.
    pub fn place(&self, task: &TaskId) -> u128 {
        let digest = sha256(&[b"crun-gateway place", &self.0, task.as_str().as_bytes()]);
        digest
            .iter()
            .take(16)
            .fold(0, |place, byte| place << 8 | u128::from(*byte))
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Owner(…)")
    }
}

/// What is sealed before the body, as JSON: small beside a body, and it says what it means.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    status: u16,
    /// Each byte as the character of that number: JSON has no bytes.
    content_type: Option<String>,
    /// In milliseconds since 1970, as all instants here.
    asked: u64,
    received: u64,
    /// How long it was to be kept, in milliseconds.
    keep: u64,
    settling_since: Option<u64>,
}

/// Seals answers that were fetched with one key, and opens them again.
pub struct Seal(SecretBox<[u8; 32]>);

impl Seal {
    /// The seal that follows from `key`.
    pub fn of(key: &ApiKey) -> Self {
        Self(SecretBox::new(Box::new(key.derive(b"crun-gateway answer"))))
    }

    /// The answer as it may be kept outside; `None` for one that is not kept at all.
    pub fn close(&self, owner: Owner, task: &TaskId, answer: &Answer, now: Moment) -> Option<Vec<u8>> {
        let keeping = answer.keeping()?;
        let content_type = answer.content_type();
        let head = serde_json::to_vec(&Head {
            status: answer.status().as_u16(),
            content_type: content_type.map(|value| value.as_bytes().iter().copied().map(char::from).collect()),
            asked: now.unix_ms(answer.asked()),
            received: now.unix_ms(answer.received()),
            keep: millis(keeping.keep),
            settling_since: keeping.settling_since.map(|since| now.unix_ms(since)),
        })
        .ok()?;
        // By chance: the same twice in 2^32 answers of one key has odds of one in 2^33, and 15 a second take nine years.
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut sealed = Vec::with_capacity(1 + NONCE_LEN + 4 + head.len() + answer.body_len() + 16);
        sealed.push(VERSION);
        sealed.extend(nonce);
        sealed.extend(u32::try_from(head.len()).ok()?.to_be_bytes());
        sealed.extend(head);
        sealed.extend_from_slice(&answer.body());
        let (_, plain) = sealed.split_at_mut(1 + NONCE_LEN);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self
            .cipher()?
            .seal_in_place_separate_tag(nonce, bound(owner, task), plain);
        sealed.extend(tag.ok()?.as_ref());
        Some(sealed)
    }

    /// The answer that was sealed, as it may be served now; `None` on any doubt. In place: a body may be large.
    pub fn open(
        &self,
        owner: Owner,
        task: &TaskId,
        mut sealed: Vec<u8>,
        now: Moment,
        cache: &config::Cache,
    ) -> Option<Draft> {
        let (&mut VERSION, rest) = sealed.split_first_mut()? else {
            return None;
        };
        let (nonce, plain) = rest.split_first_chunk_mut::<NONCE_LEN>()?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.cipher()?.open_in_place(nonce, bound(owner, task), plain);
        let length = opened.ok()?.len();
        let mut head = Bytes::from(sealed).slice(1 + NONCE_LEN..).slice(..length);
        let head_length = usize::try_from(u32::from_be_bytes(*head.first_chunk()?)).ok()?;
        let body_at = head_length.checked_add(4).filter(|at| *at <= length)?;
        let body = head.split_off(body_at);
        let head: Head = serde_json::from_slice(head.get(4..)?).ok()?;
        head.answer(body, task, now, cache)
    }

    fn cipher(&self) -> Option<LessSafeKey> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, self.0.expose_secret());
        key.ok().map(LessSafeKey::new)
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal(***)")
    }
}

impl Head {
    fn answer(self, body: Bytes, task: &TaskId, now: Moment, cache: &config::Cache) -> Option<Draft> {
        let (asked, received) = (instant(self.asked, now)?, instant(self.received, now)?);
        let settling_since = match self.settling_since {
            Some(since) => Some(instant(since, now)?),
            None => None,
        };
        let reading = task::read(self.status, &body, task);
        let mut keeping = Keeping::since(&reading, settling_since, received, self.received / 1000, cache)?;
        keeping.keep = keeping.keep.min(Duration::from_millis(self.keep));
        let status = StatusCode::from_u16(self.status).ok()?;
        let content_type = match self.content_type {
            Some(kept) => {
                let bytes: Result<Vec<u8>, _> = kept.chars().map(u8::try_from).collect();
                Some(HeaderValue::try_from(bytes.ok()?).ok()?)
            }
            None => None,
        };
        let is_kept = now.at.saturating_duration_since(received) < keeping.keep;
        is_kept.then_some(Draft {
            content_type,
            keeping: Some(keeping),
            ..Draft::new(status, body, reading, asked, received)
        })
    }
}

/// What is not kept with an answer, and has to be the same when it is opened.
fn bound(owner: Owner, task: &TaskId) -> Aad<Vec<u8>> {
    let mut bound = vec![VERSION];
    bound.extend(owner.0);
    bound.extend(task.as_str().as_bytes());
    Aad::from(bound)
}

/// A digest of parts, each with its length, so that none can pass for another.
fn sha256(parts: &[&[u8]]) -> [u8; digest::SHA256_OUTPUT_LEN] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut digest = [0; digest::SHA256_OUTPUT_LEN];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// The instant that was `unix_ms`; now for one that is just ahead, `None` for one further ahead.
fn instant(unix_ms: u64, now: Moment) -> Option<Instant> {
    let then = Duration::from_millis(unix_ms);
    if then > now.unix + MOST_AHEAD {
        return None;
    }
    now.at.checked_sub(now.unix.saturating_sub(then))
}

#[cfg(test)]
mod tests;

//! The words for who asks: the secret that a client presents, and the account it stands for.
//!
//! Pure: no I/O, no clock. Which key belongs to which account is `gateway::accounts`' business; what is
//! kept, and what is told of it, goes by an [`AccountId`]; the key itself travels only to where it is sent or unseals.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;

use constant_time_eq::constant_time_eq;
use http::{HeaderName, HeaderValue};
use ring::hmac;
use secrecy::{ExposeSecret, SecretString};

/// The header that carries an API key, to us and upstream.
pub const API_KEY_HEADER: &str = "x-api-key";

/// The same as a [`HeaderName`], so that a header map need not parse it at each look-up.
pub const API_KEY: HeaderName = HeaderName::from_static(API_KEY_HEADER);

/// The most characters that a key may have. Upstream's have some 40; each unlisted one is kept, and strangers choose them.
pub const LONGEST_KEY: usize = 512;

/// An API key: zeroised when its last clone is dropped, compared in constant time, never printed. Cheap to clone.
///
/// Maps keyed by it hash with SipHash under a random key, so neither a bucket nor a comparison tells an outsider how
/// much of a guess was right.
#[derive(Clone)]
pub struct ApiKey(Arc<SecretString>);

impl ApiKey {
    /// A key from configuration or from a request's header. `None` when it is empty, could not be sent as a header
    /// value (anything but visible ASCII), or is longer than [`LONGEST_KEY`].
    pub fn new(key: &str) -> Option<Self> {
        let visible = (1..=LONGEST_KEY).contains(&key.len()) && key.bytes().all(|b| (0x21..=0x7e).contains(&b));
        visible.then(|| Self(Arc::new(key.into())))
    }

    /// The value for the `x-api-key` header, marked sensitive so that no `Debug` of a header map prints it.
    pub fn header_value(&self) -> HeaderValue {
        // `new` let nothing else in.
        let value = HeaderValue::from_str(self.0.expose_secret());
        let mut value = value.unwrap_or_else(|_| HeaderValue::from_static(""));
        value.set_sensitive(true);
        value
    }

    /// 256 bits that follow from the key and from nothing else, and from which it does not (HMAC-SHA-256): a secret for
    /// `purpose`, the same after a restart and in every replica.
    pub fn derive(&self, purpose: &[u8]) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.0.expose_secret().as_bytes());
        let mut derived = [0; 32];
        derived.copy_from_slice(hmac::sign(&key, purpose).as_ref());
        derived
    }

    /// The secret itself, for whoever has to present it: to log, print or keep it is a bug.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// What stands for the key where replicas have to mean the same one: 128 bits from which it does not follow.
    pub fn digest(&self) -> String {
        let derived = self.derive(b"crun-gateway account");
        let half = derived.first_chunk().map_or(0, |half| u128::from_be_bytes(*half));
        format!("{half:032x}")
    }

    /// How many characters the key has: what `check` may print of it.
    pub fn length(&self) -> usize {
        self.0.expose_secret().len()
    }
}

/// A key's text, to look it up by without a copy: hashed and compared as an [`ApiKey`] is.
pub trait KeyText {
    /// The characters of the key.
    fn text(&self) -> &str;
}

impl KeyText for ApiKey {
    fn text(&self) -> &str {
        self.0.expose_secret()
    }
}

impl KeyText for &str {
    fn text(&self) -> &str {
        self
    }
}

impl<'a> Borrow<dyn KeyText + 'a> for ApiKey {
    fn borrow(&self) -> &(dyn KeyText + 'a) {
        self
    }
}

impl PartialEq for dyn KeyText + '_ {
    fn eq(&self, other: &Self) -> bool {
        constant_time_eq(self.text().as_bytes(), other.text().as_bytes())
    }
}

impl Eq for dyn KeyText + '_ {}

impl Hash for dyn KeyText + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}

impl PartialEq for ApiKey {
    fn eq(&self, other: &Self) -> bool {
        let own: &dyn KeyText = self;
        own == other as &dyn KeyText
    }
}

impl Eq for ApiKey {}

impl Hash for ApiKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text().hash(state);
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

/// An account within this process: what cached answers, flights and budgets are kept under.
///
/// Derived from the account's configured name, or from the key that forms an account of its own, by a keyed hash of 128
/// bits; so an account that was idle, forgotten and came back finds its cached answers again, and nobody who sees an id
/// learns a key from it. The default is nobody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AccountId(u128);

impl AccountId {
    /// 64 of the bits, drawn by a hash of their own.
    #[allow(clippy::cast_possible_truncation, reason = "half of them are wanted")]
    pub fn half(self) -> u64 {
        self.0 as u64
    }
}

/// Makes [`AccountId`]s: two independently keyed SipHashes, the keys drawn at random when the process starts.
#[derive(Clone, Debug, Default)]
pub struct AccountIds(RandomState, RandomState);

impl AccountIds {
    /// The id of the account that is configured under `name`.
    pub fn listed(&self, name: &str) -> AccountId {
        self.id(&("name", name))
    }

    /// The id of the account that an unlisted `key` forms.
    pub fn unlisted(&self, key: &ApiKey) -> AccountId {
        self.id(&("key", key))
    }

    fn id(&self, of: &impl Hash) -> AccountId {
        let half = |state: &RandomState| u128::from(state.hash_one(of));
        AccountId(half(&self.0) << 64 | half(&self.1))
    }
}

/// Who stands behind a poll, as far as the gateway knows for sure.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Caller {
    /// The client token's configured name.
    Token(Arc<str>),
    /// Without a token, the name in the connection's verified certificate.
    Certificate(Arc<str>),
    /// With neither, the peer's address.
    Address(IpAddr),
}

impl From<IpAddr> for Caller {
    /// One address is one caller, however it is written.
    fn from(address: IpAddr) -> Self {
        Self::Address(address.to_canonical())
    }
}

/// The unit of fairness: a caller, and within it the name that it gave itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client {
    /// Token, certificate or address.
    pub caller: Caller,
    /// Free text from `client_header`; anybody may claim any name, so it counts within the caller only.
    pub name: Option<Arc<str>>,
}

impl Client {
    /// The caller's client without a name, which the many share.
    #[must_use]
    pub fn nameless(&self) -> Self {
        Self {
            caller: self.caller.clone(),
            name: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_never_printed() {
        let key = ApiKey::new("ak_secret").unwrap();
        assert!(!format!("{key:?}").contains("secret"));
        assert!(!format!("{:?}", key.header_value()).contains("secret"));
    }

    #[test]
    fn a_digest_stands_for_one_key_in_every_process() {
        let digest = |key| ApiKey::new(key).unwrap().digest();
        assert_eq!(digest("ak_one"), "f7c52ea88182a8fae3321bf284f1e72a");
        assert_ne!(digest("ak_one"), digest("ak_two"));
    }

    #[test]
    fn a_key_that_no_header_could_carry_is_no_key() {
        assert!(ApiKey::new("").is_none());
        assert!(ApiKey::new(&"a".repeat(LONGEST_KEY)).is_some());
        assert!(ApiKey::new(&"a".repeat(LONGEST_KEY + 1)).is_none());
        assert!(ApiKey::new("a b").is_none());
        assert!(ApiKey::new("a\r\nx: y").is_none());
        assert!(ApiKey::new("ключ").is_none());
    }

    #[test]
    fn ids_are_stable_and_a_name_is_not_a_key() {
        let ids = AccountIds::default();
        let key = ApiKey::new("music").unwrap();
        assert_eq!(ids.unlisted(&key), ids.unlisted(&key.clone()));
        assert_ne!(ids.unlisted(&key), ids.listed("music"));
    }
}

//! What a request presents: an account's key, or a client token that stands for one.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::header::{AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION};
use http::{HeaderMap, HeaderValue};

use super::Gateway;
use crate::account::{API_KEY, API_KEY_HEADER, ApiKey};
use crate::error::Error;

impl Gateway {
    /// The key or client token that a request presents: `x-api-key`, or a Bearer that is a client token, once or several
    /// times the same. Any other Bearer is no business of TaskInfo's.
    pub(super) fn credential(&self, headers: &HeaderMap) -> Result<Option<ApiKey>, Error> {
        let mut presented = presented_key(headers)?;
        for token in self.tokens(headers) {
            match &presented {
                Some(before) if *before != token => return Err(Error::MalformedKey),
                Some(_) | None => presented = Some(token),
            }
        }
        Ok(presented)
    }

    /// The client tokens among a request's Bearers.
    fn tokens(&self, headers: &HeaderMap) -> impl Iterator<Item = ApiKey> {
        bearers(headers).filter(|key| self.accounts.is_token(key.expose()))
    }

    /// Tells whether a header's value has a client token in it, whatever its scheme: as a word of its own, or as
    /// `Authorization: Basic` hides it.
    pub(super) fn has_token(&self) -> impl Fn(&HeaderValue) -> bool {
        let shortest = self.accounts.shortest_token();
        move |value| {
            let Some(shortest) = shortest else { return false };
            let is_token = |part: &str| self.accounts.is_token(part);
            let text = String::from_utf8_lossy(value.as_bytes());
            // Or a long list of nothing would take a while.
            let mut parts = parts(&text).filter(|part| part.len() >= shortest);
            parts.any(|part| is_token(part) || basic(part).iter().any(|part| is_token(part)))
        }
    }
}

/// Marks what may be a secret in a request, so that no `Debug` of its headers prints it, ours or a dependency's.
pub(super) fn hide(headers: &mut HeaderMap) {
    for (name, value) in headers.iter_mut() {
        if *name == API_KEY_HEADER || [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION].contains(name) {
            value.set_sensitive(true);
        }
    }
}

/// The key that a request presents: `x-api-key`, once or several times the same.
fn presented_key(headers: &HeaderMap) -> Result<Option<ApiKey>, Error> {
    let mut presented = None;
    for value in headers.get_all(API_KEY) {
        let text = value.to_str().map_err(|_| Error::MalformedKey)?.trim();
        if text.is_empty() {
            continue;
        }
        let key = ApiKey::new(text).ok_or(Error::MalformedKey)?;
        match &presented {
            Some(before) if *before != key => return Err(Error::MalformedKey),
            Some(_) | None => presented = Some(key),
        }
    }
    Ok(presented)
}

/// The keys in `Authorization: Bearer`, which the vendor's LLM paths take: one, unless a client, or somebody between who
/// joined two lines into one, sends more than it should.
pub(super) fn bearers(headers: &HeaderMap) -> impl Iterator<Item = ApiKey> {
    let values = headers
        .get_all(AUTHORIZATION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let credentials = values.flat_map(|value| std::iter::once(value).chain(value.split(',')));
    credentials.filter_map(|credential| {
        let (scheme, key) = credential.trim().split_once([' ', '\t'])?;
        let is_bearer = scheme.eq_ignore_ascii_case("bearer");
        is_bearer.then(|| ApiKey::new(key.trim())).flatten()
    })
}

/// What may be a token in a header's value: all of it, its members, each without its scheme; its words, each without the
/// name that it is given.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let members = std::iter::once(text).chain(text.split(',')).map(str::trim);
    let words = text.split(|c: char| !c.is_ascii_graphic() || ",;:'\"&?".contains(c));
    let members = members.flat_map(|member| [Some(member), behind(member, &[' ', '\t'])]);
    let words = words.flat_map(|word| [Some(word), behind(word, &['='])]);
    members.chain(words).flatten()
}

fn behind<'t>(text: &'t str, separators: &[char]) -> Option<&'t str> {
    text.split_once(separators).map(|(_, rest)| rest.trim())
}

/// User and password, as `Authorization: Basic` hides them.
fn basic(credentials: &str) -> Vec<String> {
    const PADDED_OR_NOT: GeneralPurpose = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let decoded = PADDED_OR_NOT.decode(credentials).unwrap_or_default();
    let decoded = String::from_utf8_lossy(&decoded);
    decoded.splitn(2, ':').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_debug_of_a_requests_headers_prints_a_secret() {
        let mut headers = HeaderMap::new();
        for name in [API_KEY_HEADER, "authorization", "cookie", "proxy-authorization"] {
            headers.append(name, HeaderValue::from_static("ak_secret"));
            headers.append(name, HeaderValue::from_static("Bearer ak_secret"));
        }
        headers.append("accept", HeaderValue::from_static("application/json"));
        hide(&mut headers);
        let printed = format!("{headers:?}");
        assert!(
            !printed.contains("secret") && printed.contains("application/json"),
            "{printed}"
        );
    }
}

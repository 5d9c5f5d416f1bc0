//! The status page: one file without any external asset, which draws `/status.json`.
//!
//! Its style and script may run because the policy names their hashes; nothing else may, so that a client that calls itself
//! `<script>` stays a name even if the page had a fault.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Response};
use http_body_util::Full;
use ring::digest::{SHA256, digest};

const HTML: &str = include_str!("status.html");

/// The page, and what its browser is told to let it do.
#[derive(Debug)]
pub(super) struct Page {
    policy: HeaderValue,
}

impl Page {
    /// # Errors
    /// Only for a bug: a page without style or script.
    pub(super) fn new() -> anyhow::Result<Self> {
        let hash_of = |tag: &str| {
            let (_, rest) = HTML.split_once(&format!("<{tag}>"))?;
            let (text, _) = rest.split_once(&format!("</{tag}>"))?;
            Some(STANDARD.encode(digest(&SHA256, text.as_bytes())))
        };
        let (Some(style), Some(script)) = (hash_of("style"), hash_of("script")) else {
            anyhow::bail!("the status page has no style or no script");
        };
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        Ok(Self {
            policy: HeaderValue::try_from(policy)?,
        })
    }

    pub(super) fn response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from_static(HTML.as_bytes())));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

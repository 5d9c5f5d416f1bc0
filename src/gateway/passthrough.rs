//! Every other path: streamed through untouched, never cached, never retried, on nobody's budget.
//!
//! But nothing that upstream might count as a TaskInfo query passes unpaid. Which spellings its router takes for TaskInfo
//! is unknown, so this does not guess one router's rules: a path in which the word `taskinfo` stands between any two
//! separators, after any number of decodings and in any case, is answered 404 unless it is TaskInfo itself.

use http::header::{EXPECT, HOST, TRANSFER_ENCODING, VIA};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use hyper::body::Body as _;
use percent_encoding::percent_decode_str;
use scopeguard::{ScopeGuard, guard};

use super::Gateway;
use super::body::Body;
use super::credential::bearers;
use super::request_body::RequestBody;
use super::response::{self, REQUEST_ID};
use super::traced::{self, Trace};
use crate::account::{API_KEY, ApiKey};
use crate::error::Error;
use crate::otlp::Span;
use crate::upstream::Streamed;

/// Headers by which some servers let a request stand for another path or method: with one, an innocent path could be a
/// query after all. Which is why a name is read as the most tolerant server reads it: `-` is whatever is no letter or digit.
const REWRITING_HEADERS: [&str; 15] = [
    "x-original-url",
    "x-original-uri",
    "x-original-path",
    "x-original-method",
    "x-envoy-original-path",
    "x-ms-original-url",
    "x-waws-unencoded-url",
    "x-rewrite-url",
    "x-forwarded-uri",
    "x-forwarded-path",
    "x-forwarded-method",
    "x-replaced-path",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
];

/// What may pass: where to, and the key in place of a client token.
struct Admitted {
    path: PathAndQuery,
    key: Option<ApiKey>,
}

/// More decodings than any chain of servers makes.
const MOST_DECODINGS: usize = 8;

impl Gateway {
    /// Streams a request through, or says why not.
    pub(super) async fn pass_through(
        &self,
        request: Request<RequestBody>,
        request_id: &HeaderValue,
        trace: &Trace,
        broken: impl Fn() -> Option<Error>,
    ) -> Response<Body> {
        let result = match self.admit(&request) {
            Ok(admitted) => self.send_on(request, admitted, request_id, trace, &broken).await,
            Err(error) => Err(broken().unwrap_or(error)),
        };
        let response = match result {
            Ok(response) => {
                trace.passed(response.status());
                response::streamed(response, request_id)
            }
            Err(error) => self.refused(&error, None, request_id, trace),
        };
        self.metrics.passed_through(response.status().as_u16());
        response
    }

    /// Sends on what may pass; what becomes of it is logged, since upstream may carry out what it does not answer.
    async fn send_on(
        &self,
        request: Request<RequestBody>,
        admitted: Admitted,
        request_id: &HeaderValue,
        trace: &Trace,
        broken: impl Fn() -> Option<Error>,
    ) -> Result<Response<Streamed>, Error> {
        let method = traced::method_name(request.method()).attribute;
        let log = |code: Option<StatusCode>, detail: Option<&str>, upstream_request_id: Option<&str>| {
            tracing::info!(
                request_id = request_id.to_str().unwrap_or_default(),
                trace_id = %trace.id(),
                method,
                code = code.map(|code| code.as_u16()),
                detail,
                upstream_request_id,
                "request passed through"
            );
        };
        let left = guard((), |()| log(None, Some("unanswered"), None));
        let call = trace.call(request.method());
        let result = self.upstream.stream(self.rewritten(request, admitted, call)).await;
        ScopeGuard::into_inner(left);
        // Upstream's end of it, or ours, is but what came of that.
        let result = broken().map_or(result, Err);
        match &result {
            Ok(response) => log(Some(response.status()), None, upstreams_request_id(response)),
            Err(error) => log(Some(error.status()), Some(error.detail()), None),
        }
        result
    }

    fn admit(&self, request: &Request<RequestBody>) -> Result<Admitted, Error> {
        let path = request.uri().path();
        let is_open = self
            .config
            .load()
            .passthrough
            .iter()
            .any(|prefix| path.starts_with(prefix.as_str()));
        if !is_open || !is_innocent(path) {
            return Err(Error::NotFound);
        }
        let path = request.uri().path_and_query().cloned().ok_or(Error::NotFound)?;
        let headers = request.headers();
        let presented = match self.credential(headers)? {
            Some(key) => vec![key],
            None => bearers(headers).collect(),
        };
        let listed = presented.iter().find_map(|key| self.accounts.listed(key));
        let key = match listed {
            Some(asker) if !asker.may_pass_through() => return Err(Error::TokenMayNotPass),
            Some(asker) => asker.has_token().then(|| asker.fit_key().secret.clone()),
            None if self.accounts.forwards_unknown() => None,
            None if presented.is_empty() => return Err(Error::MissingKey),
            None => return Err(Error::UnknownKey),
        };
        Ok(Admitted { path, key })
    }

    fn rewritten(&self, request: Request<RequestBody>, admitted: Admitted, call: &Span) -> Request<RequestBody> {
        let Admitted { path, key } = admitted;
        let (mut head, body) = request.into_parts();
        // Origin form: a client may have sent an absolute one, naming us.
        head.uri = Uri::from(path);
        head.version = http::Version::HTTP_11;
        response::strip_hop_by_hop(&mut head.headers);
        if !body.is_end_stream() && body.size_hint().exact().is_none() {
            // Without it hyper sends a GET or HEAD of unknown length with no body at all.
            head.headers
                .insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        // A token is ours and goes nowhere, whether it was understood or not.
        let has_token = self.has_token();
        response::strip(&mut head.headers, |name, value| rewrites(name) || has_token(value));
        // What it stands for goes in its place.
        if let Some(key) = key {
            head.headers.insert(API_KEY, key.header_value());
        }
        traced::settle(&mut head.headers, self.config.load().upstream.traceparent, call);
        // hyper has answered, or will answer, `100-continue` itself.
        head.headers.remove(EXPECT);
        head.headers.insert(HOST, self.upstream.host().clone());
        head.headers.append(VIA, response::VIA_GATEWAY.clone());
        head.extensions = http::Extensions::new();
        Request::from_parts(head, body)
    }
}

/// What upstream calls the request: who asks its support has to say so, and its client is told our own.
fn upstreams_request_id(answer: &Response<Streamed>) -> Option<&str> {
    let id = answer.headers().get(REQUEST_ID)?.to_str().ok()?;
    response::is_request_id(id.as_bytes()).then_some(id)
}

/// Whether a header may make a server read another path or method.
fn rewrites(name: &HeaderName) -> bool {
    let read = name.as_str().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    REWRITING_HEADERS.contains(&&*read)
}

/// Whether a raw path stays what it looks like, and is not TaskInfo, however a server may read it.
fn is_innocent(path: &str) -> bool {
    let mut text = path.to_owned();
    for decodings in 0..MOST_DECODINGS {
        if has_broken_escape(&text, decodings) {
            return false;
        }
        let Ok(decoded) = percent_decode_str(&text).decode_utf8() else {
            return false;
        };
        if decoded == text {
            // Some servers leave out a `%` that is no escape.
            let readings = [text.replace('%', ""), text];
            return !readings.iter().any(|text| climbs(text) || names_task_info(text));
        }
        text = decoded.into_owned();
    }
    false
}

/// A `%` that two hexadecimal digits do not follow. Once decoded, it may stand for itself, but `%u0054` for a letter.
fn has_broken_escape(text: &str, decodings: usize) -> bool {
    text.split('%').skip(1).map(str::as_bytes).any(|rest| {
        let is_escape = rest
            .get(..2)
            .is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let may_be_letter = matches!(rest.first(), Some(b'u' | b'U'));
        !is_escape && (decodings == 0 || may_be_letter)
    })
}

/// A dot segment: the path would leave the prefix that opens it.
fn climbs(text: &str) -> bool {
    text.split(['/', '\\']).any(|segment| {
        let name = segment.split(';').next().unwrap_or_default();
        matches!(
            name.trim_matches(|c: char| c.is_control() || c.is_whitespace()),
            "." | ".."
        )
    })
}

fn names_task_info(text: &str) -> bool {
    // Upper and then lower: there are letters that only become `s` or `k` that way round.
    // And `İ` becomes `i` with a dot on it, which a server that folds letter by letter leaves out.
    let folded = text.to_uppercase().to_lowercase().replace('\u{307}', "");
    folded
        .split(|c: char| !c.is_alphanumeric())
        .any(|word| word == "taskinfo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_task_info_is_found_out() {
        for path in [
            "/api/v1/client/job/taskinfo",
            "/api/v1/client/job/TASKINFO",
            "/api/v1/client/job/TaskInfo/",
            "/api/v1/client/job//TaskInfo",
            "/api/v1//client/job/TaskInfo",
            "/api/v1/client/job/./TaskInfo",
            "/api/v1/client/job/x/../TaskInfo",
            "/api/v1/client/job/x/..;/TaskInfo",
            "/api/v1/client/job/TaskInfo;x=1",
            "/api/v1/client/job/TaskInfo;%2f..",
            "/api/v1/client/job/TaskInfo.css",
            "/api/v1/client/job/TaskInfo/x.css",
            "/api/v1/client/job/TaskInf%6f",
            "/api/v1/client/job/TaskInf%256f",
            "/api/v1/client/job/TaskInf%25256f",
            "/api/v1/client/job%2fTaskInfo",
            "/api/v1/client/job%5cTaskInfo",
            "/api/v1/client/job/TaskInfo%3ftask_id=x",
            "/api/v1/client/job/TaskInfo%23",
            "/api/v1/client/job/TaskInfo%00",
            "/api/v1/client/job/TaskInfo%20",
            "/api/v1/client/job/%20TaskInfo",
            "/api/v1/client/job/Ta%C5%BFkInfo",
            "/api/v1/client/job/Tas%E2%84%AAInfo",
            "/api/v1/client/job/Task%C4%B0nfo",
            "/api/v1/client/job/Task%C4%B1nfo",
            "/api/v1/client/job/%u0054askInfo",
            "/api/v1/client/job/TaskInf%c1%af",
            "/api/v1/client/job/TaskInfo%",
            "/api/v1/client/job/%25u0054askInfo",
            "/api/v1/client/job/Task%25Info",
            "/api/v1/client/job/TaskInfo%25",
            "/api/v1/client/job/%2525%54askInfo",
        ] {
            assert!(!is_innocent(path), "{path}");
        }
    }

    #[test]
    fn a_path_cannot_climb_out_of_its_prefix() {
        for path in [
            "/api/v1/../admin",
            "/api/v1/%2e%2e/admin",
            "/api/v1/%252e%252e/x",
            "/api/v1/..;a=b/x",
            "/api/v1/a/..",
            "/api/v1/.%25./admin",
        ] {
            assert!(!is_innocent(path), "{path}");
        }
    }

    #[test]
    fn the_vendors_other_paths_pass() {
        for path in [
            "/api/v1/client/job/CreateTask",
            "/api/v1/client/job/TaskInfos",
            "/api/v1/client/job/Models/owner%2Fname",
            "/api/v1/client/account/balance",
            "/api/v1/chat/completions",
            "/api/v1/files/%D0%BD%D0%BE%D1%87%D1%8C.mp3",
            "/api/v1/files/a..b",
            "/api/v1/files/100%25.mp3",
            "/api/v1/files/100%25%20of%20it",
            "/api/v1/files/50%25-100%25",
        ] {
            assert!(is_innocent(path), "{path}");
        }
    }
}

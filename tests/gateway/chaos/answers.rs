//! What a poll in the chaos may be answered with, by the task's id; anything else is a fault.

use serde::Deserialize;

use crate::harness::raw::RawReply;

/// What upstream says about a task, sooner or later.
#[derive(Clone, Copy, Debug)]
pub enum Due {
    /// The state of this very task.
    Task,
    /// An error of upstream's with this code, in either form.
    Code(u16),
    /// These bytes somewhere, and no state of the task's.
    Bytes(&'static str),
    /// Nothing that could be passed on.
    Nothing,
}

/// How upstream behaves well, but not always the same way.
pub const GOOD: &[&str] = &[
    "ended",
    "ended-failed",
    "failed-501",
    "failed",
    "media-urls",
    "media-info",
    "no-media",
    "lyrics",
    "bom",
    "gzip",
    "deep",
    "big-1MiB",
    "no-content-type",
    "no-store",
    "slow-1s",
    "flaky-close",
    // What comes after such an answer goes with its connection.
    "extra",
];

/// How it misbehaves.
pub const BAD: &[(&str, Due)] = &[
    ("http-404", Due::Code(404)),
    ("body-404", Due::Code(404)),
    ("http-455", Due::Code(455)),
    ("body-500", Due::Code(500)),
    ("http-503", Due::Code(503)),
    ("http-302", Due::Code(302)),
    ("body-505", Due::Code(505)),
    ("html", Due::Bytes("200 from the edge")),
    ("html-502", Due::Bytes("502 from the edge")),
    ("data-null", Due::Bytes("null")),
    ("code-string", Due::Bytes("\"200\"")),
    ("status-archived", Due::Bytes("archived")),
    ("wrong-id", Due::Bytes("another-task")),
    ("trailing", Due::Bytes("\"trailing\":true")),
    ("duplicate", Due::Bytes("\"running\",\"status\":\"success\"")),
    ("invalid-utf8", Due::Bytes("title")),
    ("short-length", Due::Bytes("\"task_id\":")),
    ("bomb", Due::Nothing),
    ("big-50MiB", Due::Nothing),
    ("brotli-claimed", Due::Nothing),
    ("cut", Due::Nothing),
    ("cut-head", Due::Nothing),
    ("close", Due::Nothing),
    ("reset", Due::Nothing),
    ("hang", Due::Nothing),
    ("drip", Due::Nothing),
    ("slow-10s", Due::Nothing),
    ("garbage", Due::Nothing),
    ("length-and-chunked", Due::Nothing),
    ("endless-interim", Due::Nothing),
    ("endless-headers", Due::Nothing),
];

/// How it limits.
pub const LIMITED: &[(&str, Due)] = &[
    ("http-429", Due::Code(429)),
    ("body-429", Due::Code(429)),
    ("first-429", Due::Task),
];

/// What is looked at of an answer's body, and no deeper: one of them is nested deeply.
#[derive(Deserialize)]
struct Envelope {
    code: Option<u16>,
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    task_id: Option<String>,
}

/// What kind of answer `reply` to a poll of `task` is.
///
/// # Errors
/// When it is none that the client of this account may get; `known` are the bytes that this account always gets.
pub fn judge(task: &str, due: Due, known: Option<&[u8]>, reply: &RawReply) -> Result<String, String> {
    let body = String::from_utf8_lossy(&reply.body);
    let status = reply.head[9..12].parse::<u16>().unwrap();
    let fault = |what: &str| {
        let body: String = body.chars().take(300).collect();
        Err(format!("{task}: {what}: {}{body}", reply.head))
    };
    if body.contains("crun-gateway") {
        return match status {
            429 if reply.header("retry-after").is_none() => fault("does not say when to come back"),
            429 | 502 | 503 | 504 => Ok(format!("refused with {status}")),
            _ => fault("a refusal without a reason"),
        };
    }
    if known.is_some_and(|known| known != reply.body) {
        return fault("another account's bytes, or nobody's");
    }
    let envelope: Option<Envelope> = serde_json::from_str(body.trim_start_matches('\u{feff}')).ok();
    let code = envelope.as_ref().and_then(|envelope| envelope.code);
    let told = envelope.and_then(|envelope| envelope.data?.task_id);
    let effective = if status == 200 { code } else { Some(status) };
    let is_due = match due {
        // Upstream may limit any query of an account that it limits.
        _ if effective == Some(429) => {
            matches!(due, Due::Code(429)) || LIMITED.iter().any(|(word, _)| prefix(task) == *word)
        }
        Due::Task => status == 200 && matches!(code, Some(200 | 501)) && told.as_deref() == Some(task),
        Due::Code(due) => effective == Some(due),
        Due::Bytes(bytes) => body.contains(bytes),
        Due::Nothing => false,
    };
    if !is_due {
        return fault("a wrong answer");
    }
    let cache_status = reply.header("cache-status").unwrap_or_default();
    let kinds = [("detail=", "snapshot"), ("; hit", "hit"), ("collapsed", "collapsed")];
    let kind = kinds.iter().find(|(sign, _)| cache_status.contains(sign));
    Ok(kind.map_or("forwarded", |(_, kind)| kind).to_owned())
}

/// The word that a task's id begins with.
pub fn prefix(task: &str) -> &str {
    task.split('.').next().unwrap_or(task)
}

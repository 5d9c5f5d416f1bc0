//! The words for a task, and what upstream's answer says about one.
//!
//! Pure: no I/O, no clock. An answer is classified by parsing it, never by searching its text: `param` echoes whatever
//! a client sent, lyrics that spell `"status":"success"` included. The effective code and the top-level `data.status`
//! decide, and no other field contradicts them. What upstream calls `pending` and `running` is one class, live, to
//! everybody else. What cannot be read without a doubt is passed on and not stored.

mod id;
mod lifetime;
mod object;
mod retry_after;

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;
use strum::{AsRefStr, IntoStaticStr, VariantArray};

pub use id::{TaskId, TaskIdError};
pub use lifetime::{Timestamp, media_lifetime};
use object::{Member, Object, members};
pub use retry_after::retry_after;

/// What an answer of upstream's means, or that there is none: the `outcome` of metrics, log and spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, AsRefStr, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Class {
    /// The task goes on.
    Live,
    /// The task succeeded, but none of its media are there: they may follow.
    #[strum(serialize = "live")]
    Settling,
    /// The task has ended, well or badly.
    Terminal,
    /// Effective code 404. A task just created may not be visible yet.
    NotFound,
    /// Effective code 429.
    RateLimited,
    /// Effective code 401, 402, 403 or 422.
    Refused,
    /// Effective code 455, 502, 503 or 504; no connection; a time-out.
    Unavailable,
    /// Effective code 408 or 500 and above that is not another class: 501 of a task that has not failed is one.
    Failed,
    /// A code, or a body with a code of success, that means nothing to us.
    Unrecognised,
    /// HTTP 200 to 203 with a body that is not one JSON object with one integer `code` and at most one `data`; or any other
    /// 2xx, which brings a part of something, or nothing (RFC 9110 §15.3).
    #[strum(serialize = "unrecognised")]
    Unreadable,
}

impl Class {
    /// Whether a live snapshot is served instead, where there is one.
    pub fn yields_to_snapshot(self) -> bool {
        match self {
            Self::RateLimited | Self::Unavailable | Self::Failed | Self::Unreadable => true,
            Self::Live | Self::Settling | Self::Terminal | Self::NotFound | Self::Refused | Self::Unrecognised => false,
        }
    }

    /// Whether such an answer may be kept for later polls.
    pub fn is_stored(self) -> bool {
        match self {
            Self::Live | Self::Settling | Self::Terminal | Self::NotFound => true,
            Self::RateLimited
            | Self::Refused
            | Self::Unavailable
            | Self::Failed
            | Self::Unrecognised
            | Self::Unreadable => false,
        }
    }
}

/// How far a task has come; the order is the one in which a task goes through it.
///
/// Of two answers that may have come out of order the one of the later stage counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Upstream does not know the task (yet).
    NotFound,
    /// `pending`.
    Pending,
    /// `running`.
    Running,
    /// `success`, without any media so far.
    Settling,
    /// `failed`, or `success` with media.
    Ended,
}

impl Stage {
    /// The class of an answer that tells of this stage.
    pub fn class(self) -> Class {
        match self {
            Self::NotFound => Class::NotFound,
            Self::Pending | Self::Running => Class::Live,
            Self::Settling => Class::Settling,
            Self::Ended => Class::Terminal,
        }
    }
}

/// What one answer of upstream's says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// What it means.
    pub class: Class,
    /// How far the task has come: there for every class that is stored, and for no other.
    pub stage: Option<Stage>,
    /// The HTTP status when it is not 2xx, else the body's `code`, of which more than an `i64` holds counts as the
    /// nearest. `None` when unreadable.
    pub effective_code: Option<i64>,
    /// `data.complete_at`; absent for every class but live, settling and terminal.
    pub complete_at: Timestamp,
    /// `data.create_at`; likewise.
    pub create_at: Timestamp,
}

impl Reading {
    fn of_code(class: Class, effective_code: i64) -> Self {
        Self {
            class,
            stage: (class == Class::NotFound).then_some(Stage::NotFound),
            effective_code: Some(effective_code),
            complete_at: Timestamp::Absent,
            create_at: Timestamp::Absent,
        }
    }

    fn of_task(task: Task, effective_code: i64) -> Self {
        Self {
            class: task.stage.class(),
            stage: Some(task.stage),
            effective_code: Some(effective_code),
            complete_at: task.complete_at,
            create_at: task.create_at,
        }
    }

    fn unreadable() -> Self {
        Self {
            class: Class::Unreadable,
            stage: None,
            effective_code: None,
            complete_at: Timestamp::Absent,
            create_at: Timestamp::Absent,
        }
    }
}

/// Whether an HTTP status says what an answer means, whatever its body is. Of an error in HTTP's form only the body of 501
/// can change the meaning, and a success is nothing without one.
pub fn says_enough(http_status: u16) -> bool {
    !(200..300).contains(&http_status) && http_status != 501
}

/// Reads upstream's answer to the question about the task `asked`: its HTTP status and its whole, decoded body.
pub fn read(http_status: u16, body: &[u8], asked: &TaskId) -> Reading {
    let is_success = (200..204).contains(&http_status);
    let envelope = (!says_enough(http_status)).then(|| Envelope::read(body)).flatten();
    let code = match (is_success, &envelope) {
        (false, _) if (204..300).contains(&http_status) => return Reading::unreadable(),
        (false, _) => i64::from(http_status),
        (true, Some(envelope)) => envelope.code,
        (true, None) => return Reading::unreadable(),
    };
    let task = || Task::of(envelope.as_ref()?.data.as_ref()?, asked);
    match code {
        200 => match task() {
            Some(task) => Reading::of_task(task, code),
            None => Reading::of_code(Class::Unrecognised, code),
        },
        501 => match task().filter(|task| task.has_failed) {
            Some(task) => Reading::of_task(task, code),
            None => Reading::of_code(Class::Failed, code),
        },
        404 => Reading::of_code(Class::NotFound, code),
        429 => Reading::of_code(Class::RateLimited, code),
        401..=403 | 422 => Reading::of_code(Class::Refused, code),
        455 | 502..=504 => Reading::of_code(Class::Unavailable, code),
        408 | 500.. => Reading::of_code(Class::Failed, code),
        _ => Reading::of_code(Class::Unrecognised, code),
    }
}

/// What every answer has in common.
struct Envelope<'a> {
    code: i64,
    data: Option<Data<'a>>,
}

/// What `data` holds.
enum Data<'a> {
    /// Read with all the rest.
    Usual(UsualTask<'a>),
    /// Its text: of what it holds under an error nothing is asked.
    Unread(&'a str),
}

impl<'a> Envelope<'a> {
    fn read(body: &'a [u8]) -> Option<Self> {
        // The whole body is checked: a client that decodes it strictly would stumble over a bad byte anywhere.
        let text = str::from_utf8(body).ok()?;
        let json = text.strip_prefix('\u{feff}').unwrap_or(text);
        Self::usual(json).or_else(|| Self::any(json))
    }

    /// Of an answer about a task in which every member that is asked for is there at most once, and of the kind that it should
    /// be, as almost every answer is: it is read in one go. Whatever is unusual is no matter of this.
    fn usual(json: &'a str) -> Option<Self> {
        let Object(UsualEnvelope {
            code,
            data: Object(task),
        }) = serde_json::from_str(json).ok()?;
        Some(Self {
            code,
            data: Some(Data::Usual(task)),
        })
    }

    fn any(json: &'a str) -> Option<Self> {
        let [code, data] = members(json, &["code", "data"])?;
        if data.is_repeated() {
            return None;
        }
        Some(Self {
            code: integer(code.only()?)?,
            data: data.only().map(Data::Unread),
        })
    }
}

#[derive(Deserialize)]
struct UsualEnvelope<'a> {
    code: i64,
    #[serde(borrow)]
    data: Object<UsualTask<'a>>,
}

#[derive(Deserialize)]
struct UsualTask<'a> {
    #[serde(borrow)]
    task_id: Cow<'a, str>,
    #[serde(borrow)]
    status: Cow<'a, str>,
    #[serde(borrow)]
    result: Option<Object<UsualResult<'a>>>,
    #[serde(borrow)]
    complete_at: Option<&'a RawValue>,
    #[serde(borrow)]
    create_at: Option<&'a RawValue>,
}

/// The places where media are: which one depends on the model.
#[derive(Deserialize)]
struct UsualResult<'a> {
    #[serde(borrow)]
    suno_data: Option<&'a RawValue>,
    #[serde(borrow)]
    media_urls: Option<&'a RawValue>,
    #[serde(borrow)]
    media_info: Option<&'a RawValue>,
}

/// What `data` says, when it is about the task that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Task {
    stage: Stage,
    has_failed: bool,
    complete_at: Timestamp,
    create_at: Timestamp,
}

impl Task {
    fn of<'a>(data: &Data<'a>, asked: &TaskId) -> Option<Self> {
        match data {
            Data::Usual(task) => {
                let text = |member: Option<&'a RawValue>| member.map(RawValue::get);
                let media = || {
                    let Object(result) = task.result.as_ref()?;
                    Some([result.suno_data, result.media_urls, result.media_info].map(text))
                };
                let times = [text(task.complete_at), text(task.create_at)];
                Self::said(asked, &task.task_id, &task.status, media, times)
            }
            Data::Unread(json) => {
                let names = &["task_id", "status", "result", "complete_at", "create_at"];
                let [task_id, status, result, complete_at, create_at] = members(json, names)?;
                let media = || {
                    let media = members(result.last()?, &["suno_data", "media_urls", "media_info"])?;
                    Some(media.map(Member::last))
                };
                let (task_id, status) = (string(task_id.only()?)?, string(status.only()?)?);
                Self::said(
                    asked,
                    &task_id,
                    &status,
                    media,
                    [complete_at, create_at].map(Member::last),
                )
            }
        }
    }

    /// What the members say, as JSON texts; `media` is what `result` holds in the places where media are.
    fn said<'a>(
        asked: &TaskId,
        task_id: &str,
        status: &str,
        media: impl FnOnce() -> Option<[Option<&'a str>; 3]>,
        [complete_at, create_at]: [Option<&str>; 2],
    ) -> Option<Self> {
        let has_media = || media().is_some_and(|media| media.into_iter().flatten().any(|media| !is_empty(media)));
        let stage = match status {
            "pending" => Stage::Pending,
            "running" => Stage::Running,
            "success" if !has_media() => Stage::Settling,
            "success" | "failed" => Stage::Ended,
            _ => return None,
        };
        (task_id == asked.as_str()).then(|| Self {
            stage,
            has_failed: status == "failed",
            complete_at: Timestamp::read(complete_at),
            create_at: Timestamp::read(create_at),
        })
    }
}

/// Whether a JSON value is `null`, or a list, an object or a string with nothing in it.
fn is_empty(json: &str) -> bool {
    let inside = |open, close| json.strip_prefix(open)?.strip_suffix(close);
    let hollow = |open, close| inside(open, close).is_some_and(|inside: &str| inside.trim_ascii().is_empty());
    json == "null" || json == "\"\"" || hollow('[', ']') || hollow('{', '}')
}

/// A JSON integer; beyond the range of an `i64`, the nearest. Neither `"200"` nor `200.0` nor `2e2` is one.
fn integer(json: &str) -> Option<i64> {
    let digits = json.strip_prefix('-').unwrap_or(json);
    let is_integer = digits.bytes().all(|byte| byte.is_ascii_digit());
    let nearest = if digits.len() < json.len() { i64::MIN } else { i64::MAX };
    is_integer.then(|| json.parse().unwrap_or(nearest))
}

/// A JSON string, unescaped.
fn string(json: &str) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

    let Text(text) = serde_json::from_str(json).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests;

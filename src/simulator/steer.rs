//! How a task's id steers its behaviour. The table of all cases is `steering.txt`. Pure.

use std::time::Duration;

use bytesize::ByteSize;

use super::unwritable::Unwritable;

/// The table of all cases, for `--help`.
pub(super) const HELP: &str = concat!(
    "Task ids: the part up to the first `.` steers the task (failed.abc).\n\n",
    include_str!("steering.txt"),
    "\nKeys: one that contains `refused` is answered with HTTP 401, `refused-body` with HTTP 200 and code 401, `disabled` \
     with HTTP 403, `no-credits` with HTTP 402.\n\nGET /__stats tells what was counted; POST /__reset forgets it and \
     all tasks."
);

/// The most that `big-SIZE` pads.
const BIGGEST: u64 = 4 << 30;

/// What an id asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Case {
    Runs,
    Ended,
    Failed,
    EndedFailed,
    Failed501,
    Pending,
    Running,
    Http(u16),
    Body(u16),
    CodeString,
    DataNull,
    NoMedia,
    MediaUrls,
    MediaInfo,
    Status(String),
    WrongId,
    Html(u16),
    NoContentType,
    Bom,
    Trailing,
    InvalidUtf8,
    Duplicate,
    Lyrics,
    Deep,
    Big(u64),
    Gzip,
    Bomb,
    BrotliClaimed,
    Maimed(Maiming),
    Unwritable(Unwritable),
    Drip,
    Slow(Duration),
    NoStore,
    First429,
}

/// How an answer is kept from arriving whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maiming {
    Cut,
    CutHead,
    Close,
    Reset,
    Hang,
    /// Like `Close` the first time, and not maimed after that.
    FlakyClose,
}

impl Case {
    /// The latency that the case has of its own.
    pub(super) fn latency(&self) -> Option<Duration> {
        if let Self::Slow(latency) = self {
            Some(*latency)
        } else {
            None
        }
    }
}

/// The case that `id` asks for; [`Case::Runs`] when it asks for none.
pub(super) fn case(id: &str) -> Case {
    let word = id.split_once('.').map_or(id, |(word, _)| word);
    exact(word).or_else(|| with_argument(word)).unwrap_or(Case::Runs)
}

fn exact(word: &str) -> Option<Case> {
    Some(match word {
        "ended" => Case::Ended,
        "failed" => Case::Failed,
        "ended-failed" => Case::EndedFailed,
        "failed-501" => Case::Failed501,
        "pending" => Case::Pending,
        "running" => Case::Running,
        "code-string" => Case::CodeString,
        "data-null" => Case::DataNull,
        "no-media" => Case::NoMedia,
        "media-urls" => Case::MediaUrls,
        "media-info" => Case::MediaInfo,
        "wrong-id" => Case::WrongId,
        "html" => Case::Html(200),
        "no-content-type" => Case::NoContentType,
        "bom" => Case::Bom,
        "trailing" => Case::Trailing,
        "invalid-utf8" => Case::InvalidUtf8,
        "duplicate" => Case::Duplicate,
        "lyrics" => Case::Lyrics,
        "deep" => Case::Deep,
        "gzip" => Case::Gzip,
        "bomb" => Case::Bomb,
        "brotli-claimed" => Case::BrotliClaimed,
        "cut" => Case::Maimed(Maiming::Cut),
        "cut-head" => Case::Maimed(Maiming::CutHead),
        "close" => Case::Maimed(Maiming::Close),
        "reset" => Case::Maimed(Maiming::Reset),
        "hang" => Case::Maimed(Maiming::Hang),
        "garbage" => Case::Unwritable(Unwritable::Garbage),
        "extra" => Case::Unwritable(Unwritable::Extra),
        "short-length" => Case::Unwritable(Unwritable::ShortLength),
        "length-and-chunked" => Case::Unwritable(Unwritable::LengthAndChunked),
        "endless-interim" => Case::Unwritable(Unwritable::EndlessInterim),
        "endless-headers" => Case::Unwritable(Unwritable::EndlessHeaders),
        "drip" => Case::Drip,
        "no-store" => Case::NoStore,
        "flaky-close" => Case::Maimed(Maiming::FlakyClose),
        "first-429" => Case::First429,
        _ => return None,
    })
}

fn with_argument(word: &str) -> Option<Case> {
    let (kind, argument) = word.split_once('-')?;
    match kind {
        "http" => http_status(argument).map(Case::Http),
        "body" => argument.parse().ok().map(Case::Body),
        "html" => http_status(argument).map(Case::Html),
        "status" => Some(Case::Status(argument.to_owned())),
        "big" => argument
            .parse::<ByteSize>()
            .ok()
            .map(|size| Case::Big(size.as_u64().min(BIGGEST))),
        "slow" => humantime::parse_duration(argument).ok().map(Case::Slow),
        _ => None,
    }
}

/// A final status: an interim one is no answer.
fn http_status(text: &str) -> Option<u16> {
    text.parse().ok().filter(|status| (200..=999).contains(status))
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyCase {
    Accepted,
    Refused,
    RefusedInBody,
    Disabled,
    NoCredits,
}

/// The case that `key` asks for.
pub(super) fn key_case(key: &str) -> KeyCase {
    if key.contains("refused-body") {
        KeyCase::RefusedInBody
    } else if key.contains("refused") {
        KeyCase::Refused
    } else if key.contains("disabled") {
        KeyCase::Disabled
    } else if key.contains("no-credits") {
        KeyCase::NoCredits
    } else {
        KeyCase::Accepted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_table_steers() {
        let table = include_str!("steering.txt").lines().skip(1);
        for word in table.filter_map(|line| line.split_whitespace().next()) {
            let id = word
                .replace("NNN", "404")
                .replace("SIZE", "10MiB")
                .replace("DURATION", "2s");
            assert_ne!(case(&id), Case::Runs, "{word}");
            assert_ne!(case(&format!("{id}.one.two")), Case::Runs, "{word}");
        }
    }

    #[test]
    fn arguments_are_read() {
        assert_eq!(case("http-404.x"), Case::Http(404));
        assert_eq!(case("body-455.x"), Case::Body(455));
        assert_eq!(case("html-502"), Case::Html(502));
        assert_eq!(case("status-SUCCESS.x"), Case::Status("SUCCESS".into()));
        assert_eq!(case("big-10MiB.x"), Case::Big(10 << 20));
        assert_eq!(case("slow-2s.x"), Case::Slow(Duration::from_secs(2)));
    }

    #[test]
    fn any_other_id_is_a_task_that_runs() {
        for id in [
            "",
            ".",
            ".ended",
            "d6956973-2f17-43d4-8514-af6cc3a2f55d",
            "endedx.1",
            "http-99",
            "http-x",
            "slow-",
            "big-x",
            "Ended.1",
        ] {
            assert_eq!(case(id), Case::Runs, "{id}");
        }
    }

    #[test]
    fn keys_steer_too() {
        assert_eq!(key_case("ak_1"), KeyCase::Accepted);
        assert_eq!(key_case("ak_refused_1"), KeyCase::Refused);
        assert_eq!(key_case("refused-body"), KeyCase::RefusedInBody);
        assert_eq!(key_case("disabled"), KeyCase::Disabled);
        assert_eq!(key_case("x-no-credits"), KeyCase::NoCredits);
    }
}

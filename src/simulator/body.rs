//! The bodies of `TaskInfo` answers, shaped like `tests/fixtures`. Pure: the same arguments give the same bytes.

use std::borrow::Cow;

/// A task's end takes this long when it ended before it was first seen.
pub(super) const PAST_RUN: u64 = 104;

const PARAM: &str = r#"{"model":"suno/music-generate","callback_url":null,"input":{"mode":"custom","model":"v5","instrumental":false,"title":"Midnight Addiction","tags":"Western R&B, female vocal, dark, sensual","lyrics":"[Verse 1] I still taste your words in the dark..."}}"#;
const LYRICS_PARAM: &str = r#"{"model":"suno/music-generate","status":{"status":"success"},"input":{"lyrics":"She said {\"status\":\"success\"} and \"status\":\"success\"","data":{"status":"success"}}}"#;
const PROMPT: &str = r#""[Verse 1] I still taste your words in the dark...\n[Chorus] «ночь» 夜 🌙\n[Verse 2] The city hums below, a low and patient spark\n[Outro] and I am gone before the light""#;

/// A task's answer, before it is written out. The fields are JSON text, save for those that are numbers.
pub(super) struct TaskBody<'a> {
    pub(super) code: &'static str,
    pub(super) id: &'a str,
    pub(super) status: Cow<'a, str>,
    pub(super) param: &'static str,
    pub(super) create_at: u64,
    pub(super) result: Option<String>,
    pub(super) complete_at: Option<u64>,
}

impl<'a> TaskBody<'a> {
    /// A live task.
    pub(super) fn live(id: &'a str, status: &'static str, create_at: u64) -> Self {
        Self {
            code: "200",
            id,
            status: Cow::Borrowed(status),
            param: PARAM,
            create_at,
            result: None,
            complete_at: None,
        }
    }

    /// A task that ended well, with two tracks.
    pub(super) fn success(id: &'a str, create_at: u64, complete_at: u64) -> Self {
        Self {
            result: Some(two_tracks(create_at)),
            complete_at: Some(complete_at),
            ..Self::live(id, "success", create_at)
        }
    }

    /// A task that ended as failed.
    pub(super) fn failed(id: &'a str, create_at: u64, complete_at: u64) -> Self {
        Self {
            result: Some(r#"{"code":501,"message":"The lyrics were rejected by moderation."}"#.into()),
            complete_at: Some(complete_at),
            ..Self::live(id, "failed", create_at)
        }
    }

    /// With words in the lyrics, and objects in param, that look like a status.
    pub(super) fn with_misleading_param(self) -> Self {
        Self {
            param: LYRICS_PARAM,
            ..self
        }
    }

    /// The answer, as text.
    pub(super) fn text(&self) -> String {
        let (before, after) = self.around_param();
        before + self.param + &after
    }

    /// The answer's text before and after `param`.
    pub(super) fn around_param(&self) -> (String, String) {
        let before = format!(
            r#"{{"code":{},"message":"success","data":{{"task_id":{},"provider":"Suno","model_version":"sunov5","status":{},"param":"#,
            self.code,
            quoted(self.id),
            quoted(&self.status),
        );
        let number = |number: Option<u64>| number.map_or_else(|| "null".to_owned(), |number| number.to_string());
        let duration = self
            .complete_at
            .map(|complete_at| complete_at.saturating_sub(self.create_at));
        let credits = if self.complete_at.is_some() {
            r#","credits":12"#
        } else {
            ""
        };
        let after = format!(
            r#","create_at":{},"result":{},"duration_s":{}{credits},"complete_at":{},"source":"api"}}}}"#,
            self.create_at,
            self.result.as_deref().unwrap_or("null"),
            number(duration),
            number(self.complete_at),
        );
        (before, after)
    }
}

/// The result of a task that made media without Suno's fields.
pub(super) fn media_urls() -> String {
    r#"{"code":200,"message":"success","media_urls":["https://resource.crun.ai/a.mp4"],"usage":{}}"#.into()
}

/// The result of a vocal separation.
pub(super) fn media_info() -> String {
    r#"{"media_info":{"vocal_url":"https://resource.crun.ai/v.mp3","instrumental_url":"https://resource.crun.ai/i.mp3"}}"#.into()
}

fn two_tracks(create_at: u64) -> String {
    let track = |number: u64| {
        format!(
            r#"{{"suno_id":"7c1f0b5e-0000-4000-8000-00000000000{number}","title":"Midnight Addiction","prompt":{PROMPT},"tags":"Western R&B, female vocal, dark, sensual","suno_audio_url":"https://cdn1.suno.ai/7c1f0b5e-{number}.mp3","suno_image_url":"https://cdn2.suno.ai/image_7c1f0b5e-{number}.jpeg","suno_image_large_url":"https://cdn2.suno.ai/image_large_7c1f0b5e-{number}.jpeg","suno_model_name":"chirp-crow","duration":18{number}.44,"created_at":{}}}"#,
            create_at + 10 + number,
        )
    };
    format!(r#"{{"suno_data":[{},{}]}}"#, track(1), track(2))
}

/// The envelope of a code other than 200.
pub(super) fn envelope(code: u16) -> String {
    let message = match code {
        200 => "success",
        401 => "Unauthorized",
        402 => "Insufficient credits",
        403 => "API key disabled",
        404 => "Task not found",
        405 => "Method not allowed",
        422 => {
            return r#"{"code":422,"message":"Missing Params or Type Error","errors":["task_id"]}"#.into();
        }
        429 => "Rate limit exceeded",
        455 => "Service unavailable",
        500 => "Internal server error",
        501 => "Generation failed",
        505 => "Feature disabled",
        _ => "Error",
    };
    message_envelope(code, message)
}

/// The envelope of `code` with a message of its own.
pub(super) fn message_envelope(code: u16, message: &str) -> String {
    format!(r#"{{"code":{code},"message":{},"data":null}}"#, quoted(message))
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn fixture(name: &str) -> Value {
        let path = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn fields(value: &Value) -> Vec<&String> {
        let mut fields: Vec<_> = value.as_object().unwrap().keys().collect();
        fields.retain(|name| *name != "credits");
        fields.sort();
        fields
    }

    #[test]
    fn bodies_have_the_fields_of_the_fixtures() {
        let cases = [
            (TaskBody::live("t", "running", 1), "running.json"),
            (TaskBody::success("t", 1, 105), "success.json"),
            (TaskBody::failed("t", 1, 13), "failed.json"),
        ];
        for (body, name) in cases {
            let (body, fixture): (Value, _) = (serde_json::from_str(&body.text()).unwrap(), fixture(name));
            assert_eq!(fields(&body["data"]), fields(&fixture["data"]), "{name}");
            if name == "success.json" {
                let track = |value: &Value| value["data"]["result"]["suno_data"][0].clone();
                assert_eq!(fields(&track(&body)), fields(&track(&fixture)));
            }
        }
    }

    #[test]
    fn envelopes_are_those_of_the_fixtures() {
        for code in [401, 402, 403, 404, 422, 429, 455, 500, 501, 505] {
            let body: Value = serde_json::from_str(&envelope(code)).unwrap();
            assert_eq!(body, fixture(&format!("code_{code}.json")));
        }
    }

    #[test]
    fn an_id_is_escaped() {
        let id = "a\"\\\n«🌙";
        let body: Value = serde_json::from_str(&TaskBody::success(id, 1, 2).text()).unwrap();
        assert_eq!(body["data"]["task_id"], id);
    }

    #[test]
    fn a_success_is_as_long_as_a_real_one() {
        let length = TaskBody::success("d6956973-2f17-43d4-8514-af6cc3a2f55d", 1_768_900_378, 1_768_900_482)
            .text()
            .len();
        assert!((1500..=2000).contains(&length), "{length}");
    }
}

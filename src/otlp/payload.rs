//! Spans as OTLP/JSON (opentelemetry-proto, `trace.proto`): ids in hexadecimal, 64-bit integers as text.

use serde::{Serialize, Serializer};

use super::span::{Ended, Value};
use crate::trace::{SpanId, TraceContext, TraceId};

/// `ExportTraceServiceRequest` of these spans, of the process with this `service.instance.id`.
pub(super) fn request(spans: &[Ended], instance: &str) -> Vec<u8> {
    let resource = [
        ("service.name", Value::from("crun-gateway")),
        ("service.version", Value::from(env!("CARGO_PKG_VERSION"))),
        ("service.instance.id", Value::from(instance)),
    ];
    let request = Request {
        resource_spans: [ResourceSpans {
            resource: Resource {
                attributes: attributes(&resource),
            },
            scope_spans: [ScopeSpans {
                scope: Scope { name: "crun_gateway" },
                spans: spans.iter().map(span).collect(),
            }],
        }],
    };
    // Numbers and text always serialise.
    serde_json::to_vec(&request).unwrap_or_default()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    resource_spans: [ResourceSpans<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResourceSpans<'a> {
    resource: Resource<'a>,
    scope_spans: [ScopeSpans<'a>; 1],
}

#[derive(Serialize)]
struct Resource<'a> {
    attributes: Vec<Attribute<'a>>,
}

#[derive(Serialize)]
struct ScopeSpans<'a> {
    scope: Scope,
    spans: Vec<Exported<'a>>,
}

#[derive(Serialize)]
struct Scope {
    name: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Exported<'a> {
    #[serde(serialize_with = "text")]
    trace_id: TraceId,
    #[serde(serialize_with = "text")]
    span_id: SpanId,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_span_id: Option<String>,
    name: &'a str,
    kind: u8,
    #[serde(serialize_with = "text")]
    start_time_unix_nano: u128,
    #[serde(serialize_with = "text")]
    end_time_unix_nano: u128,
    attributes: Vec<Attribute<'a>>,
    links: Vec<Link>,
    status: Status,
}

#[derive(Serialize)]
struct Attribute<'a> {
    key: &'a str,
    value: AnyValue<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum AnyValue<'a> {
    StringValue(&'a str),
    #[serde(serialize_with = "text")]
    IntValue(u64),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Link {
    #[serde(serialize_with = "text")]
    trace_id: TraceId,
    #[serde(serialize_with = "text")]
    span_id: SpanId,
}

/// `code` is 2 for an error, else unset.
#[derive(Serialize)]
struct Status {
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u8>,
}

fn span(ended: &Ended) -> Exported<'_> {
    let link = |link: &TraceContext| Link {
        trace_id: link.trace,
        span_id: link.span,
    };
    Exported {
        trace_id: ended.context.trace,
        span_id: ended.context.span,
        parent_span_id: ended.parent.map(|parent| parent.to_string()),
        name: &ended.name,
        kind: ended.kind as u8,
        start_time_unix_nano: ended.began.as_nanos(),
        end_time_unix_nano: (ended.began + ended.took).as_nanos(),
        attributes: attributes(&ended.attributes),
        links: ended.links.iter().map(link).collect(),
        status: Status {
            code: ended.has_failed.then_some(2),
        },
    }
}

fn attributes<'a>(attributes: &'a [(&'static str, Value)]) -> Vec<Attribute<'a>> {
    let attribute = |(key, value): &'a (&'static str, Value)| Attribute {
        key,
        value: match value {
            Value::Text(text) => AnyValue::StringValue(text),
            Value::Number(number) => AnyValue::IntValue(*number),
        },
    };
    attributes.iter().map(attribute).collect()
}

fn text<T: ToString, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

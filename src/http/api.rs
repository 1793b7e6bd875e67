//! `GET /openapi.json` and `GET /asyncapi.json`: what this gateway takes and answers, from its configuration and from the tables
//! that its handlers use.

use actix_web::{HttpRequest, HttpResponse, http::header};
use serde_json::{Map, Value, json};

use super::{App, error::Code};
use crate::{event::TYPE_BYTES_MAX, subject::BYTES_MAX};

const LICENSE: &str = "Apache-2.0";
const DESCRIPTION: &str = "Server-Sent Events from NATS JetStream, which resume exactly where they stopped. An EventSource gives up for good on \
     anything but 200, so a temporary refusal of a stream is 200 with one event `tidegate.refused` to clients that accept \
     `text/event-stream`, and a status code to all others. Query parameters that begin with `_` are ignored.";

/// The document in OpenAPI 3.2, whose `itemSchema` describes the items of a stream; with `?version=3.1` in OpenAPI 3.1, where the
/// schema of a stream is that of one item.
pub(super) fn openapi(app: &App, request: &HttpRequest) -> HttpResponse {
    let mut document = document(app, request);
    if request.query_string().split('&').any(|pair| pair == "version=3.1") {
        document["openapi"] = json!("3.1.0");
        rename(&mut document, "itemSchema", "schema");
    }
    answer(&document)
}

pub(super) fn asyncapi(app: &App, request: &HttpRequest) -> HttpResponse {
    answer(&channels(app, request))
}

fn answer(document: &Value) -> HttpResponse {
    HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-cache")).json(document)
}

fn rename(value: &mut Value, from: &str, to: &str) {
    match value {
        Value::Object(fields) => {
            if let Some(renamed) = fields.remove(from) {
                fields.insert(to.to_owned(), renamed);
            }
            fields.values_mut().for_each(|inner| rename(inner, from, to));
        }
        Value::Array(items) => items.iter_mut().for_each(|inner| rename(inner, from, to)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn server(app: &App, request: &HttpRequest) -> String {
    let is_https = request.peer_addr().is_some_and(|peer| app.proxies.say_https(peer.ip(), request.headers()));
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    format!("{}://{host}", if is_https { "https" } else { "http" })
}

fn document(app: &App, request: &HttpRequest) -> Value {
    let event_bytes = app.limits.borrow().event_bytes;
    let security = security(app);
    let mut document = json!({
        "openapi": "3.2.0",
        "info": {
            "title": "Tidegate",
            "version": env!("CARGO_PKG_VERSION"),
            "description": DESCRIPTION,
            "license": { "name": LICENSE, "identifier": LICENSE },
        },
        "servers": [{ "url": server(app, request) }],
        "tags": [{ "name": "subscribe" }, { "name": "publish" }],
        "paths": {
            "/events/{subject}": {
                "get": subscribe("subscribe", &[path("subject", "A filter: `*` is one token, `>` the rest.", "Filter")]),
                "head": head(),
                "post": publish(event_bytes),
            },
            "/events": {
                "get": subscribe("subscribeSeveral", &[query(
                    "subject",
                    "A filter; several times for several filters on one connection.",
                    json!({ "type": "array", "items": { "$ref": "#/components/schemas/Filter" }, "minItems": 1 }),
                    true,
                )]),
                "post": publish_batch(),
            },
        },
        "components": { "schemas": schemas(), "responses": responses(), "securitySchemes": security },
    });
    if !security.is_empty() {
        let alternatives = security.keys().map(|name| json!({ name: [] })).chain([json!({})]);
        document["security"] = alternatives.collect();
    }
    document
}

fn security(app: &App) -> Map<String, Value> {
    let mut schemes = Map::new();
    if app.auth.is_open() {
        return schemes;
    }
    let bearer = "A token (JWT), or an API key (`tgk_...`).";
    schemes.insert("bearer".into(), json!({ "type": "http", "scheme": "bearer", "description": bearer }));
    schemes.insert("cookie".into(), json!({ "type": "apiKey", "in": "cookie", "name": app.auth.cookie() }));
    if app.auth.takes_query_token() {
        schemes.insert("query".into(), json!({ "type": "apiKey", "in": "query", "name": "token" }));
    }
    schemes
}

fn path(name: &str, description: &str, schema: &str) -> Value {
    let schema = json!({ "$ref": format!("#/components/schemas/{schema}") });
    json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema })
}

fn query(name: &str, description: &str, schema: Value, required: bool) -> Value {
    json!({ "name": name, "in": "query", "required": required, "description": description, "schema": schema })
}

fn header_field(name: &str, description: &str, schema: Value) -> Value {
    json!({ "name": name, "in": "header", "description": description, "schema": schema })
}

fn rate(description: &str) -> Value {
    let schema = json!({ "type": "integer", "minimum": 1, "maximum": super::subscribe::RATE_MAX });
    query("rate", description, schema, false)
}

/// The parameters of every stream beside its filters.
fn stream_parameters() -> Vec<Value> {
    let text = || json!({ "type": "string" });
    vec![
        query(
            "from",
            "`now` (the default), `first`, `snapshot`, an id, a time (RFC 3339), how long ago (`-15m`), or how many (`-100`).",
            text(),
            false,
        ),
        query(
            "new",
            "Where filters begin that the id does not know. With `now` or `snapshot`, ids name all filters of a connection.",
            json!({ "enum": ["lowest", "now", "snapshot"] }),
            false,
        ),
        query(
            "type",
            "A type of events, a family such as `order.*`, or nothing for events without one; several times for several.",
            json!({ "type": "array", "items": text(), "maxItems": crate::sieve::TYPES_MAX }),
            false,
        ),
        query(
            "where",
            "What has to be true of an event: the inside of an RFC 9535 filter over the object of `format=json`, such as `@.data.amount > 100`.",
            json!({ "type": "string", "maxLength": crate::sieve::WHERE_BYTES_MAX }),
            false,
        ),
        query(
            "every",
            "An interval, from `100ms` to `1h`: of each subject its last event in each such interval, and no other.",
            text(),
            false,
        ),
        rate("Most events in a second."),
        query("format", "How events are written.", json!({ "enum": ["raw", "json", "ndjson"] }), false),
        query("lastEventId", "As the header `Last-Event-ID`, for clients that can't set headers.", text(), false),
        query("limit", "End after this many events.", json!({ "type": "integer", "minimum": 1 }), false),
        query("until", "`now`, an id, or a time: end when everything up to there has been sent.", text(), false),
        query("follow", "`0` is `until=now`.", json!({ "enum": ["0", "1"] }), false),
        query("wait", "With `follow=0`: how long to wait for a first event, at most `5m`.", text(), false),
        header_field("Last-Event-ID", "The last id that the client got. Wins over `from`.", text()),
    ]
}

fn subscribe(operation: &str, filters: &[Value]) -> Value {
    let parameters: Vec<_> = filters.iter().cloned().chain(stream_parameters()).collect();
    let item = |schema: &str| json!({ "itemSchema": { "$ref": format!("#/components/schemas/{schema}") } });
    json!({
        "operationId": operation,
        "tags": ["subscribe"],
        "summary": "Opens a stream of events",
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "Events, until the connection ends",
                "content": {
                    "text/event-stream": item("StreamEvent"),
                    "application/x-ndjson": item("Line"),
                },
            },
            "204": { "description": "The id that an EventSource presents is at or past `until`: it stops for good" },
            "default": { "$ref": "#/components/responses/Problem" },
        },
    })
}

fn head() -> Value {
    json!({
        "operationId": "checkSubscribe",
        "tags": ["subscribe"],
        "summary": "The checks and the head of a stream, without a stream",
        "parameters": [path("subject", "A filter.", "Filter")],
        "responses": { "200": { "description": "A GET would open a stream" }, "default": { "description": "It would not" } },
    })
}

fn publish(event_bytes: usize) -> Value {
    json!({
        "operationId": "publish",
        "tags": ["publish"],
        "summary": "Publishes the body as one event",
        "parameters": [
            path("subject", "Where to.", "Subject"),
            query("type", "The event's type.", json!({ "type": "string", "minLength": 1, "maxLength": TYPE_BYTES_MAX }), false),
            query("ttl", "How long the event is kept: `90s`, `10m`, `7d`.", json!({ "type": "string" }), false),
            header_field("Idempotency-Key", "A retry with the same subject and key is stored once.", json!({ "type": "string", "minLength": 1, "maxLength": 255 })),
            header_field("If-Match", "Store only if the subject's last event has this id, in double quotes.", json!({ "type": "string" })),
            header_field("If-None-Match", "Store only if the subject has no event.", json!({ "enum": ["*"] })),
        ],
        "requestBody": {
            "description": format!("At most {event_bytes} bytes, as they are to be delivered."),
            "required": false,
            "content": { "*/*": { "schema": {} } },
        },
        "responses": {
            "201": {
                "description": "Stored",
                "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Receipt" } } },
            },
            "default": { "$ref": "#/components/responses/Problem" },
        },
    })
}

fn publish_batch() -> Value {
    json!({
        "operationId": "publishBatch",
        "tags": ["publish"],
        "summary": "Publishes one event a line, also of an endless body",
        "parameters": [
            rate("Most lines that are read in a second."),
            header_field(
                "Tidegate-Events",
                "How many events the batch has: it is refused (409) if these would evict more than three quarters of what is kept.",
                json!({ "type": "integer", "minimum": 0 }),
            ),
        ],
        "requestBody": {
            "required": true,
            "content": { "application/x-ndjson": { "itemSchema": { "$ref": "#/components/schemas/BatchLine" } } },
        },
        "responses": {
            "200": {
                "description": "One line for each line that is not blank, in order",
                "content": { "application/x-ndjson": { "itemSchema": { "$ref": "#/components/schemas/BatchAnswer" } } },
            },
            "default": { "$ref": "#/components/responses/Problem" },
        },
    })
}

fn responses() -> Value {
    json!({
        "Problem": {
            "description": "A problem (RFC 9457). 429 and 503 have `Retry-After`, in seconds.",
            "headers": { "X-Request-Id": { "schema": { "type": "string" } }, "Retry-After": { "schema": { "type": "integer" } } },
            "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
        },
    })
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({ "type": "object", "required": required, "properties": properties })
}

fn schemas() -> Value {
    let codes: Vec<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
    let text = || json!({ "type": "string" });
    let id = || json!({ "$ref": "#/components/schemas/Id" });
    let subject = || json!({ "$ref": "#/components/schemas/Subject" });
    json!({
        "Subject": {
            "type": "string", "minLength": 1, "maxLength": BYTES_MAX,
            "pattern": r"^[A-Za-z0-9_~:@+=,-]+(\.[A-Za-z0-9_~:@+=,-]+)*$",
        },
        "Filter": { "type": "string", "minLength": 1, "maxLength": BYTES_MAX, "examples": ["orders.eu", "orders.*", "orders.>"] },
        "Id": {
            "type": "string", "description": "An event's id, or a position that begins with one. Opaque apart from that.",
            "pattern": r"^[0-9a-z]{6}-\d+", "examples": ["0k3f9x-1042", "0k3f9x-1042.mgk2x9vc"],
        },
        "StreamEvent": object(&["data"], json!({
            "id": id(), "event": text(), "data": text(), "retry": { "type": "integer" },
        })),
        "Event": object(&["id", "subject", "time", "type"], json!({
            "position": id(), "id": id(), "subject": subject(),
            "time": { "type": "string", "format": "date-time" },
            "type": { "type": ["string", "null"] },
            "data": { "type": "string", "description": "The payload, if it is UTF-8." },
            "data_base64": { "type": "string", "contentEncoding": "base64" },
        })),
        "Signal": object(&["type"], json!({
            "type": { "enum": ["tidegate.position", "tidegate.gap", "tidegate.token-expiring", "tidegate.end"] },
            "id": id(), "requested": text(), "resumed": id(), "reason": text(), "expires": { "type": "string", "format": "date-time" },
        })),
        "Line": { "anyOf": [{ "$ref": "#/components/schemas/Event" }, { "$ref": "#/components/schemas/Signal" }] },
        "Gap": object(&["requested", "resumed", "reason"], json!({
            "requested": text(), "resumed": id(), "reason": { "enum": ["expired", "recreated", "rewound", "unknown-id"] },
        })),
        "Receipt": object(&["id", "subject", "duplicate"], json!({
            "id": id(), "subject": subject(), "duplicate": { "type": "boolean" },
        })),
        "BatchLine": object(&["subject"], json!({
            "subject": subject(), "data": {}, "data_base64": text(), "type": text(), "ttl": text(),
            "idempotency_key": text(), "if_match": text(), "if_none_match": { "enum": ["*"] },
        })),
        "BatchAnswer": object(&["line"], json!({
            "line": { "type": "integer" }, "id": id(), "subject": subject(), "duplicate": { "type": "boolean" },
            "status": { "type": "integer" }, "code": { "enum": codes }, "title": text(), "detail": text(),
        })),
        "Problem": object(&["status", "code", "title"], json!({
            "status": { "type": "integer" }, "code": { "enum": codes }, "title": text(), "detail": text(),
            "request_id": text(), "last_id": id(),
        })),
    })
}

fn channels(app: &App, request: &HttpRequest) -> Value {
    let url = server(app, request);
    let (scheme, host) = url.split_once("://").expect("a URL has a scheme");
    let message = |name: &str, summary: &str, payload: Value| json!({ "name": name, "title": name, "summary": summary, "contentType": "application/json", "payload": payload });
    let reason = |reasons: &[&str]| object(&["reason"], json!({ "reason": { "enum": reasons } }));
    let all = schemas();
    let refusals: Vec<_> =
        Code::ALL.iter().filter(|code| matches!(code.status().as_u16(), 429 | 503)).map(|code| code.as_str()).collect();
    let messages = json!({
        "event": { "name": "event", "title": "event", "summary": "An event of the subject. Its type is the name of the SSE event.", "payload": {} },
        "binary": message("tidegate.binary", "An event whose payload is not UTF-8", json!({ "type": "object" })),
        "gap": message("tidegate.gap", "Events after `requested`, up to and including `resumed`, can't be delivered", all["Gap"].clone()),
        "position": message("tidegate.position", "Nothing happened; the id is the client's position", json!({ "type": "object" })),
        "tokenExpiring": message("tidegate.token-expiring", "The stream ends with its token then", object(&["expires"], json!({ "expires": { "type": "string", "format": "date-time" } }))),
        "bye": message("tidegate.bye", "The gateway ends the stream", reason(&["draining", "max_life", "token_expired", "caught-up", "until", "limit"])),
        "refused": message("tidegate.refused", "The stream is refused for now", reason(&refusals)),
    });
    let references: Vec<_> = ["event", "binary", "gap", "position", "tokenExpiring", "bye", "refused"]
        .map(|name| json!({ "$ref": format!("#/channels/events/messages/{name}") }))
        .into();
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tidegate",
            "version": env!("CARGO_PKG_VERSION"),
            "description": DESCRIPTION,
            "license": { "name": LICENSE },
        },
        "defaultContentType": "application/octet-stream",
        "servers": { "gateway": {
            "host": host, "protocol": scheme,
            "description": format!("Events of at most {} bytes", app.limits.borrow().event_bytes),
        } },
        "channels": { "events": {
            "address": "/events/{subject}",
            "description": "A subject, or for subscribers a filter.",
            "parameters": { "subject": { "description": "A subject or filter", "examples": ["orders.eu", "orders.>"] } },
            "messages": messages,
        } },
        "components": { "schemas": { "Id": all["Id"] } },
        "operations": {
            "subscribe": { "action": "send", "channel": { "$ref": "#/channels/events" }, "summary": "What subscribers get (GET)", "messages": references },
            "publish": { "action": "receive", "channel": { "$ref": "#/channels/events" }, "summary": "What publishers send (POST)", "messages": [references[0]] },
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::{publish, subscribe};
    use super::*;

    fn names(parameters: &[Value], place: &str) -> BTreeSet<String> {
        let of_place = parameters.iter().filter(|parameter| parameter["in"] == place);
        of_place.map(|parameter| parameter["name"].as_str().unwrap().to_owned()).collect()
    }

    fn known(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn every_parameter_of_the_handlers_is_described_and_no_other() {
        assert_eq!(names(&stream_parameters(), "query"), known(subscribe::OF_ONE.known));
        let mut of_several = names(&stream_parameters(), "query");
        of_several.insert("subject".into());
        assert_eq!(of_several, known(subscribe::OF_SEVERAL.known));
        let described = super::publish(1)["parameters"].as_array().unwrap().clone();
        assert_eq!(names(&described, "query"), known(publish::PARAMETERS.known));
    }

    #[test]
    fn references_lead_somewhere() {
        fn collect(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Object(fields) => {
                    found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                    fields.values().for_each(|inner| collect(inner, found));
                }
                Value::Array(items) => items.iter().for_each(|inner| collect(inner, found)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        let document = json!({
            "paths": [super::subscribe("x", &[]), super::publish(1), publish_batch(), head()],
            "components": { "schemas": schemas(), "responses": responses() },
        });
        let mut references = BTreeSet::new();
        collect(&document, &mut references);
        assert!(references.len() > 8);
        for reference in references {
            assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
        }
    }
}

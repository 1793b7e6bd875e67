//! What a request or a line of a batch wants to be published: the same parts, under other names.

use std::time::Duration;

use actix_web::HttpRequest;
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::{
    error::{ApiError, Code},
    query::Query,
};
use crate::{
    auth::Principal,
    broker::{Condition, Publication, Published},
    config::parse_duration,
    event::{EventIdError, EventType},
    position::Position,
    subject::Subject,
};

/// Longest idempotency key, in bytes.
pub const KEY_BYTES_MAX: usize = 255;

/// What a publisher is told of a stored event.
#[derive(Serialize)]
pub struct Receipt<'a> {
    pub id: String,
    pub subject: &'a str,
    pub duplicate: bool,
}

impl<'a> Receipt<'a> {
    pub fn new(published: Published, subject: &'a Subject) -> Receipt<'a> {
        Receipt { id: published.id.to_string(), subject: subject.as_str(), duplicate: published.duplicate }
    }
}

/// The publication that a request describes beside its body: parameters of its query, and headers. Its payload is empty.
///
/// # Errors
/// When a parameter or a header has a value that it can't have.
pub(super) fn of_request(request: &HttpRequest, query: &Query, subject: Subject) -> Result<Publication, ApiError> {
    let kind = query.one("type")?.map(parse_type).transpose()?;
    let ttl = query.one("ttl")?.map(parse_ttl).transpose();
    let ttl = ttl.map_err(|why| ApiError::new(Code::InvalidParameter, format!("ttl: {why}")))?;
    let key = header_text(request, "Idempotency-Key")?.map(parse_key).transpose();
    let key = key.map_err(|why| ApiError::new(Code::InvalidHeader, why))?;
    Ok(Publication { subject, kind, payload: Bytes::new(), ttl, key, condition: condition(request)? })
}

pub fn parse_subject(text: &str) -> Result<Subject, ApiError> {
    Subject::parse(text).map_err(|error| ApiError::new(Code::InvalidSubject, error.to_string()))
}

pub fn parse_type(text: &str) -> Result<EventType, ApiError> {
    EventType::parse(text).map_err(|error| ApiError::new(Code::InvalidType, error.to_string()))
}

// What a request has as a header or parameter, a line of a batch has as a field: the caller says where it is wrong.

pub fn parse_ttl(text: &str) -> Result<Duration, String> {
    // NATS counts TTLs in whole seconds (ADR-43).
    let ttl = parse_duration(text).filter(|ttl| ttl.subsec_nanos() == 0);
    ttl.ok_or_else(|| format!("a time to live is in whole seconds, such as 90s, 10m or 7d, not {text:?}"))
}

pub fn parse_key(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > KEY_BYTES_MAX || text.chars().any(char::is_control) {
        return Err(format!("an idempotency key has 1 to {KEY_BYTES_MAX} bytes and no control characters"));
    }
    Ok(text.to_owned())
}

/// An idempotency key of this principal's, which is no other's: no principal learns of, or takes the place of, an event of
/// another by guessing a key. Of the same length, whatever names and keys are.
pub fn key_of(principal: &Principal, key: &str) -> String {
    // A key has no control characters: it begins behind the last.
    let digest = Sha256::new().chain_update(principal.name()).chain_update([0]).chain_update(key).finalize();
    URL_SAFE_NO_PAD.encode(digest)
}

/// The id of an event as a receipt has it, or as the `id:` of a stream of one filter has it.
pub fn parse_last(text: &str) -> Result<Condition, String> {
    let position = text.parse::<Position>().ok();
    let id = position.as_ref().and_then(Position::id).ok_or_else(|| EventIdError.to_string())?;
    let witness = position.and_then(|position| position.witness());
    // Another event's time says nothing of this one.
    Ok(Condition::LastIs(id, witness.filter(|witness| witness.sequence == id.sequence)))
}

/// `If-Match: "<id>"` or `If-None-Match: *` (RFC 9110, sections 13.1.1 and 13.1.2).
fn condition(request: &HttpRequest) -> Result<Option<Condition>, ApiError> {
    let wrong = |detail: &str| Err(ApiError::new(Code::InvalidHeader, detail));
    match (header_text(request, "If-Match")?, header_text(request, "If-None-Match")?) {
        (None, None) => Ok(None),
        (None, Some("*")) => Ok(Some(Condition::NoneYet)),
        (None, Some(_)) => wrong("If-None-Match takes only *"),
        (Some(quoted), None) => match quoted.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
            Some(id) => parse_last(id).map(Some).or_else(|why| wrong(&why)),
            None => wrong("If-Match takes one event id in double quotes"),
        },
        (Some(_), Some(_)) => wrong("If-Match and If-None-Match exclude each other"),
    }
}

fn header_text<'a>(request: &'a HttpRequest, name: &str) -> Result<Option<&'a str>, ApiError> {
    let mut values = request.headers().get_all(name);
    let value = values.next().map(|value| std::str::from_utf8(value.as_bytes()));
    match (value, values.next()) {
        (None, _) => Ok(None),
        (Some(Ok(text)), None) => Ok(Some(text)),
        (Some(Ok(_)), Some(_)) => Err(ApiError::new(Code::InvalidHeader, format!("{name} may be given only once"))),
        (Some(Err(_)), _) => Err(ApiError::new(Code::InvalidHeader, format!("{name} is not UTF-8"))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    subject: String,
    #[serde(default, borrow, deserialize_with = "even_null")]
    data: Option<&'a RawValue>,
    data_base64: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    ttl: Option<String>,
    idempotency_key: Option<String>,
    if_match: Option<String>,
    if_none_match: Option<String>,
}

/// `null` is JSON data like any other; only a field that is not there is none.
fn even_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// The publication that a line of a batch is.
///
/// # Errors
/// When it is none; the detail names the field.
pub(super) fn of_line(line: &[u8], event_bytes_max: usize) -> Result<Publication, ApiError> {
    let invalid = |detail: String| ApiError::new(Code::InvalidLine, detail);
    // The line that serde_json counts is not the batch's.
    let malformed = |error: serde_json::Error| invalid(error.to_string().replace("at line 1 column", "at column"));
    // An array would be taken for the fields in their order.
    if !line.trim_ascii_start().starts_with(b"{") {
        return Err(invalid(r#"a line is one JSON object, such as {"subject":"demo","data":"hello"}"#.into()));
    }
    let fields: Fields<'_> = serde_json::from_slice(line).map_err(malformed)?;
    let payload: Bytes = match (fields.data, fields.data_base64) {
        // A text may yet turn out to be none: half of a surrogate pair is only found here.
        (Some(text), None) if text.get().starts_with('"') => {
            serde_json::from_str::<String>(text.get()).map_err(malformed)?.into()
        }
        (Some(json), None) => json.get().to_owned().into(),
        (None, Some(text)) => STANDARD.decode(text).map_err(|error| invalid(format!("data_base64: {error}")))?.into(),
        (Some(_), Some(_)) => return Err(invalid("data and data_base64 exclude each other".into())),
        (None, None) => return Err(invalid("data (text or any JSON) or data_base64 is missing".into())),
    };
    if payload.len() > event_bytes_max {
        return Err(ApiError::new(Code::EventTooLarge, format!("an event has at most {event_bytes_max} bytes")));
    }
    let condition = match (&fields.if_match, fields.if_none_match.as_deref()) {
        (None, None) => None,
        (Some(id), None) => Some(field("if_match", id, parse_last)?),
        (None, Some("*")) => Some(Condition::NoneYet),
        (None, Some(_)) => return Err(invalid(r#"if_none_match takes only "*""#.into())),
        (Some(_), Some(_)) => return Err(invalid("if_match and if_none_match exclude each other".into())),
    };
    Ok(Publication {
        subject: parse_subject(&fields.subject)?,
        kind: fields.kind.as_deref().map(parse_type).transpose()?,
        payload,
        ttl: fields.ttl.as_deref().map(|text| field("ttl", text, parse_ttl)).transpose()?,
        key: fields.idempotency_key.as_deref().map(|text| field("idempotency_key", text, parse_key)).transpose()?,
        condition,
    })
}

/// The value of a field that a request has as a header or parameter.
fn field<T>(name: &str, text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, ApiError> {
    parse(text).map_err(|why| ApiError::new(Code::InvalidLine, format!("{name}: {why}")))
}

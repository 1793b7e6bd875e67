//! `POST /events/{subject}`: publishes the body as one event.

use std::time::Duration;

use actix_web::{HttpRequest, HttpResponse, http::header, web};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{
    App, authenticate,
    error::{ApiError, Code},
    middleware::caller,
    query::{Parameters, subject_in_path},
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

const PARAMETERS: Parameters = Parameters {
    known: &["type", "ttl"],
    advice: &[
        (&["topic", "topics", "channel", "subject"], "the subject stands in the path: /events/{subject}"),
        (&["id"], "ids are given by the broker; what may be sent twice has an Idempotency-Key header"),
        (&["data", "payload", "message"], "the body of the request is the event's data"),
        (&["event"], "did you mean \"type\"?"),
        (&["key"], "an idempotency key comes as the header Idempotency-Key, an API key as Authorization: Bearer"),
        authenticate::ADVICE,
    ],
};

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

/// `POST /events/{subject}`
pub async fn publish(app: web::Data<App>, request: HttpRequest, payload: web::Payload) -> HttpResponse {
    match store(&app, &request, payload).await {
        Ok(response) => response,
        Err(error) => app.refuse(&request, &error),
    }
}

async fn store(app: &App, request: &HttpRequest, payload: web::Payload) -> Result<HttpResponse, ApiError> {
    let query = app.query(request, &PARAMETERS)?;
    let principal = authenticate::authenticate(app, request, &query).await?;
    authenticate::authorize_page(app, request)?;
    let subject = parse_subject(&subject_in_path(request)?)?;
    authenticate::authorize_publish(&principal, &subject)?;
    let kind = query.one("type")?.map(parse_type).transpose()?;
    let ttl = query.one("ttl")?.map(parse_ttl).transpose();
    let ttl = ttl.map_err(|why| ApiError::new(Code::InvalidParameter, format!("ttl: {why}")))?;
    let key = header_text(request, "Idempotency-Key")?.map(parse_key).transpose();
    let key = key.map_err(|why| ApiError::new(Code::InvalidHeader, why))?;
    let condition = condition(request)?;
    check_coding(request)?;
    let caller = caller(request, &principal);
    app.shares.publish(&caller).map_err(|wait| ApiError::over_rate(Code::TooManyPublishes, wait))?;
    let payload = read_body(app, request, payload).await?;
    let bytes = app.shares.publish_bytes(&caller, payload.len());
    bytes.map_err(|wait| ApiError::over_rate(Code::TooManyBytes, wait))?;
    let key = key.map(|key| key_of(&principal, &key));
    let publication = Publication { subject: subject.clone(), kind, payload, ttl, key, condition };
    let published = app.publish(&principal, publication).await?.await?;
    Ok(HttpResponse::Created().json(Receipt::new(published, &subject)))
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

/// An idempotency key of this principal's, which is no other's: nobody learns of, or takes the place of, an event of
/// somebody else by guessing a key. Of the same length, whatever names and keys are.
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

/// Refuses bodies that are not what they will be delivered as: compressed ones, and forms with parts. Any other type
/// is taken as it is; curl's `-d` says `application/x-www-form-urlencoded` of everything.
pub fn check_coding(request: &HttpRequest) -> Result<(), ApiError> {
    let header = |name| request.headers().get(name).map(|value| value.to_str().unwrap_or("?").to_ascii_lowercase());
    if header(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") {
        return Err(ApiError::new(
            Code::UnsupportedMediaType,
            "bodies are taken as they are: without Content-Encoding",
        ));
    }
    if header(header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("multipart/")) {
        let detail = "the body is the event: with curl, use --data-binary @file instead of -F";
        return Err(ApiError::new(Code::UnsupportedMediaType, detail));
    }
    Ok(())
}

/// The whole body, which may pause, and may as a whole take, only for so long: bytes that come one by one for ever are
/// none that anybody waits for.
async fn read_body(app: &App, request: &HttpRequest, payload: web::Payload) -> Result<Bytes, ApiError> {
    let within = app.limits.borrow().body;
    let read = tokio::time::timeout(within, read_pieces(app, request, payload));
    read.await.unwrap_or_else(|_| Err(ApiError::new(Code::BodyTimeout, "it did not arrive whole in time")))
}

async fn read_pieces(app: &App, request: &HttpRequest, mut payload: web::Payload) -> Result<Bytes, ApiError> {
    let (bytes_max, pause) = {
        let limits = app.limits.borrow();
        (limits.event_bytes, limits.body_pause)
    };
    let too_large = || ApiError::new(Code::EventTooLarge, format!("an event has at most {bytes_max} bytes"));
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > bytes_max as u64) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    loop {
        let piece = tokio::time::timeout(pause, payload.next()).await;
        match piece.map_err(|_| ApiError::new(Code::BodyTimeout, "nothing more arrived for too long"))? {
            None => return Ok(body.freeze()),
            Some(Err(error)) => return Err(ApiError::new(Code::BodyIncomplete, error.to_string())),
            Some(Ok(piece)) if body.len() + piece.len() > bytes_max => return Err(too_large()),
            Some(Ok(piece)) => body.extend_from_slice(&piece),
        }
    }
}

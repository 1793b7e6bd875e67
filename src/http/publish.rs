//! `POST /events/{subject}`: publishes the body as one event.

use actix_web::{HttpRequest, HttpResponse, http::header, web};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::{
    App, authenticate,
    error::{ApiError, Code},
    middleware::caller,
    publication::{self, Receipt, key_of, parse_subject},
    query::{Parameters, subject_in_path},
};
use crate::broker::Publication;

pub(super) const PARAMETERS: Parameters = Parameters {
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
    let publication = publication::of_request(request, &query, subject.clone())?;
    check_coding(request)?;
    let caller = caller(request, &principal);
    app.shares.publish(&caller).map_err(|wait| ApiError::over_rate(Code::TooManyPublishes, wait))?;
    let payload = read_body(app, request, payload).await?;
    let bytes = app.shares.publish_bytes(&caller, payload.len());
    bytes.map_err(|wait| ApiError::over_rate(Code::TooManyBytes, wait))?;
    let key = publication.key.map(|key| key_of(&principal, &key));
    let publication = Publication { payload, key, ..publication };
    let published = app.publish(&principal, publication).await?.await?;
    Ok(HttpResponse::Created().json(Receipt::new(published, &subject)))
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

//! Errors as clients see them: RFC 9457 problems with stable codes, and refusals that an EventSource survives.

use std::time::Duration;

use actix_web::{
    HttpRequest, HttpResponse,
    http::{StatusCode, header},
};
use serde::Serialize;

use super::{
    middleware::request_id,
    subscribe::{event_stream, presented_id},
};
use crate::{
    auth::Refusal,
    broker::{BrokerError, Condition, PublishError},
    event::EventId,
    limits::{Exhausted, RetryAfter, TooManyBatches},
    wire::{self, Format},
};

/// Set by a proxy that wants a status code even where an EventSource would be answered 200, to try the next node.
pub const REFUSAL_HEADER: &str = "Tidegate-Refusal";
/// How long a client is asked to wait after a refusal that will pass.
const RETRY_AFTER: Duration = Duration::from_secs(2);

macro_rules! codes {
    ($($variant:ident = $status:literal $code:literal $title:literal $explanation:literal;)*) => {
        /// What went wrong, as a closed set: every code that a client can see.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code { $($variant),* }

        impl Code {
            pub const ALL: &[Code] = &[$(Code::$variant),*];

            pub fn status(self) -> StatusCode {
                let status: u16 = match self { $(Code::$variant => $status),* };
                StatusCode::from_u16(status).expect("the table has valid statuses")
            }

            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $code),* }
            }

            pub fn title(self) -> &'static str {
                match self { $(Code::$variant => $title),* }
            }

            /// When a client gets this code, in Markdown: for the reference.
            pub fn explanation(self) -> &'static str {
                match self { $(Code::$variant => $explanation),* }
            }
        }
    };
}

codes! {
    InvalidSubject = 400 "invalid_subject" "Invalid subject"
        "The subject or filter is empty, over-long or malformed; has a `/` in place of a dot (`detail` has it with dots); or has a wildcard where none is allowed.";
    MissingSubject = 400 "missing_subject" "Missing subject"
        "`GET /events` without `?subject=`.";
    TooManyFilters = 400 "too_many_filters" "Too many filters"
        "More than `limits.filters` on one connection.";
    UnknownParameter = 400 "unknown_parameter" "Unknown query parameter"
        "`detail` names the parameter that was probably meant.";
    InvalidParameter = 400 "invalid_parameter" "Invalid query parameter"
        "A query parameter has an invalid value.";
    InvalidWhere = 400 "invalid_where" "Invalid where"
        "`where` is not an expression, or one that is refused; `detail` has three lines: what is wrong, the expression, and a `^` under the place.";
    InvalidHeader = 400 "invalid_header" "Invalid header"
        "`If-Match`, `If-None-Match`, `Idempotency-Key` or `Tidegate-Events` has an invalid value, or one of the first three was sent with a batch, whose lines have fields for them.";
    InvalidType = 400 "invalid_type" "Invalid event type"
        "The event type is empty, too long, reserved, or has control characters.";
    InvalidLine = 400 "invalid_line" "Invalid line"
        "A line of a batch is not an event; `detail` names the field.";
    MalformedRequest = 400 "malformed_request" "Malformed request"
        "The bytes that arrived are not an HTTP request; the connection is closed.";
    AmbiguousToken = 400 "ambiguous_token" "Ambiguous token"
        "Different tokens in header, cookie and query, or in several cookies of one name.";
    BodyIncomplete = 400 "body_incomplete" "Incomplete body"
        "The connection ended before the body did.";
    Unauthenticated = 401 "unauthenticated" "Authentication required"
        "This needs a token or an API key.";
    InvalidToken = 401 "invalid_token" "Invalid token or API key"
        "The token or API key is malformed, unknown, expired, or not for this gateway.";
    Forbidden = 403 "forbidden" "Forbidden"
        "This token or API key does not have the right.";
    OpenOnlyLocally = 403 "open_only_locally" "Open to local clients only"
        "The gateway has no authentication configured and was reached from elsewhere; `detail` says what to do.";
    HostNotAllowed = 403 "host_not_allowed" "Host not allowed"
        "The admin listener was asked under a name that is not in `admin.hosts`.";
    OriginNotAllowed = 403 "origin_not_allowed" "Origin not allowed"
        "Pages of this origin may not do this; see `cors.origins`.";
    NotFound = 404 "not_found" "Not found"
        "There is no resource at this path.";
    MethodNotAllowed = 405 "method_not_allowed" "Method not allowed"
        "`Allow` has the methods of this resource.";
    HeadTimeout = 408 "head_timeout" "Request head timeout"
        "The head of the request did not arrive within `limits.request_head`.";
    BodyTimeout = 408 "body_timeout" "Request body timeout"
        "Nothing of the body arrived for `limits.body_pause`, or not all of it within `limits.body`.";
    WouldEvict = 409 "would_evict" "Would evict history"
        "The batch said by `Tidegate-Events` how many events it has, and so many would leave less than a quarter of what the stream keeps. Nothing was stored.";
    ConditionFailed = 412 "condition_failed" "Condition failed"
        "The subject's last event is another one, or, for `If-None-Match`, there is one. `last_id` names the last event if the sender may read the subject.";
    EventTooLarge = 413 "event_too_large" "Event too large"
        "The payload has more than `limits.event_bytes`.";
    LineTooLong = 413 "line_too_long" "Line too long"
        "A line of a batch has more than `limits.line_bytes`.";
    TargetTooLong = 414 "target_too_long" "Request target too long"
        "Path and query are longer than `limits.target_bytes`.";
    UnsupportedMediaType = 415 "unsupported_media_type" "Unsupported media type or content encoding"
        "A batch that is not NDJSON, or a compressed or multipart body.";
    IdempotencyKeyReused = 422 "idempotency_key_reused" "Idempotency key reused"
        "This key was sent with another type or body before; nothing was stored.";
    TooManyAttempts = 429 "too_many_attempts" "Too many attempts from this address"
        "The address has asked for streams, or sent invalid tokens, more often than `limits.address_attempts`.";
    TooManyStreamsOfAddress = 429 "too_many_streams_of_address" "Too many streams of this address"
        "The address has `limits.address_streams` open.";
    TooManyStreamsOfPrincipal = 429 "too_many_streams_of_principal" "Too many streams of this principal"
        "The principal has `limits.principal_streams` open.";
    TooManyBatchesOfAddress = 429 "too_many_batches_of_address" "Too many batches of this address"
        "The address has `limits.address_batches` open.";
    TooManyBatchesOfPrincipal = 429 "too_many_batches_of_principal" "Too many batches of this principal"
        "The principal has `limits.principal_batches` open.";
    TooManyFiltersOfAddress = 429 "too_many_filters_of_address" "Too many filters of this address"
        "The open streams of the address have `limits.address_filters`.";
    TooManyFiltersOfPrincipal = 429 "too_many_filters_of_principal" "Too many filters of this principal"
        "The open streams of the principal have `limits.principal_filters`.";
    TooManyPublishes = 429 "too_many_publishes" "Publish rate exceeded (events)"
        "More events than `limits.publishes`.";
    TooManyBytes = 429 "too_many_bytes" "Publish rate exceeded (bytes)"
        "More bytes of events than `limits.publish_bytes`.";
    HeadTooLarge = 431 "head_too_large" "Request head too large"
        "Target and headers are larger than `limits.head_bytes`, or there are more than 96 headers.";
    Internal = 500 "internal" "Internal error"
        "A defect of the gateway; the log has it under the request id.";
    BrokerUnavailable = 503 "broker_unavailable" "Broker unavailable"
        "The broker can't be reached. Of a publish, nothing was stored.";
    BrokerRefused = 503 "broker_refused" "Refused by the broker"
        "The broker refused the event; `detail` has its reason. Nothing was stored.";
    Draining = 503 "draining" "Shutting down"
        "This node is shutting down; another one serves the request.";
    MemoryShort = 503 "memory_short" "Out of memory budget"
        "`limits.memory` is used up.";
    TooManyStreams = 503 "too_many_streams" "Too many streams"
        "`limits.streams` are open on this node.";
    TooManySieves = 503 "too_many_sieves" "Too many sieves"
        "`limits.sieves` different selections (`type=`, `where=`, `every=`) of the readers of one filter are in use on this node.";
    TooManyBatches = 503 "too_many_batches" "Too many batches"
        "`limits.batches` are open on this node, or half of `limits.connections`.";
    TooManyConnections = 503 "too_many_connections" "Too many connections"
        "`limits.connections` are open on this node, or `limits.address_connections` from this address.";
    KeysUnavailable = 503 "keys_unavailable" "Token keys unavailable"
        "The keys that verify tokens can't be fetched now.";
    OutcomeUnknown = 504 "outcome_unknown" "Outcome unknown"
        "The broker did not answer: the event may or may not be stored. Retry with the same idempotency key.";
}

/// An error with what its client is told.
#[derive(Clone, Debug)]
pub struct ApiError {
    pub code: Code,
    /// Where the code's own is not all that is to be said.
    title: Option<&'static str>,
    detail: String,
    /// The subject's last event, where a condition on it failed.
    last_id: Option<EventId>,
    allow: Option<&'static str>,
    /// How long it takes until the same request may succeed, where that is known.
    wait: Option<Duration>,
}

#[derive(Serialize)]
pub struct Problem<'a> {
    pub status: u16,
    pub code: &'static str,
    pub title: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
}

impl ApiError {
    pub fn new(code: Code, detail: impl Into<String>) -> ApiError {
        ApiError { code, title: None, detail: detail.into(), last_id: None, allow: None, wait: None }
    }

    /// The refusal of a request that went over a rate.
    pub fn over_rate(code: Code, RetryAfter(wait): RetryAfter) -> ApiError {
        ApiError { wait: Some(wait), ..ApiError::new(code, "") }
    }

    pub fn method_not_allowed(allow: &'static str) -> ApiError {
        ApiError { allow: Some(allow), ..ApiError::new(Code::MethodNotAllowed, format!("allowed here: {allow}")) }
    }

    pub fn target_too_long(bytes_max: usize) -> ApiError {
        ApiError::new(Code::TargetTooLong, format!("path and query have at most {bytes_max} bytes"))
    }

    /// The refusal of an event whose condition does not hold. The last event is told to publishers that may read the subject.
    pub fn condition_failed(condition: Condition, last: Option<EventId>) -> ApiError {
        let title = match condition {
            Condition::LastIs(..) => None,
            Condition::NoneYet => Some("Subject not empty"),
        };
        let detail = last.map(|last| format!("its last event is {last}")).unwrap_or_default();
        ApiError { title, last_id: last, ..ApiError::new(Code::ConditionFailed, detail) }
    }

    pub fn problem(&self) -> Problem<'_> {
        Problem {
            status: self.code.status().as_u16(),
            code: self.code.as_str(),
            title: self.title.unwrap_or(self.code.title()),
            detail: &self.detail,
            last_id: self.last_id.map(|id| id.to_string()),
            request_id: None,
        }
    }

    /// Whether the same request may succeed later.
    fn will_pass(&self) -> bool {
        let status = self.code.status();
        status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::SERVICE_UNAVAILABLE
    }

    /// What a client is to bring (RFC 6750, section 3).
    fn challenge(&self) -> Option<&'static str> {
        match self.code {
            Code::Unauthenticated => Some("Bearer"),
            Code::InvalidToken => Some(r#"Bearer error="invalid_token""#),
            Code::Forbidden => Some(r#"Bearer error="insufficient_scope""#),
            _ => None,
        }
    }

    /// The answer to a request that is not for a stream.
    pub fn response(&self, request: &HttpRequest) -> HttpResponse {
        let mut response = HttpResponse::build(self.code.status());
        response.content_type("application/problem+json").insert_header((header::CACHE_CONTROL, "no-store"));
        if let Some(allow) = self.allow {
            response.insert_header((header::ALLOW, allow));
        }
        if let Some(challenge) = self.challenge() {
            response.insert_header((header::WWW_AUTHENTICATE, challenge));
        }
        if self.will_pass() {
            let seconds = self.wait.unwrap_or(RETRY_AFTER).as_secs_f64().ceil().max(1.0);
            response.insert_header((header::RETRY_AFTER, seconds as u64));
        }
        let request_id = request_id(request);
        let problem = Problem { request_id: request_id.as_deref(), ..self.problem() };
        response.body(serde_json::to_string(&problem).expect("strings and numbers always serialize"))
    }

    /// The answer to a request for a stream. An EventSource gives up for good on anything but 200 (WHATWG HTML,
    /// section 9.2.3), so a refusal that will pass is a stream that ends at once, unless a proxy asks for the status.
    pub fn stream_response(&self, request: &HttpRequest, retry: Duration) -> HttpResponse {
        let wants =
            |name, value| request.headers().get_all(name).filter_map(|v| v.to_str().ok()).any(|v| accepts(v, value));
        let is_event_source = wants(header::ACCEPT, "text/event-stream");
        let asks_for_status =
            request.headers().get(REFUSAL_HEADER).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"status"));
        if !self.will_pass() || !is_event_source || asks_for_status {
            return self.response(request);
        }
        // Clients that are to wait for a rate come back spread out like all others.
        let retry = self.wait.unwrap_or_default() + retry;
        event_stream(Format::Raw).body(wire::refused(retry, self.code.as_str(), presented_id(request).as_deref()))
    }
}

/// Whether an Accept header names `wanted` as one of its media ranges.
pub(super) fn accepts(header: &str, wanted: &str) -> bool {
    header.split(',').filter_map(|range| range.split(';').next()).any(|range| range.trim().eq_ignore_ascii_case(wanted))
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        match refusal {
            Refusal::Invalid(why) => ApiError::new(Code::InvalidToken, why),
            Refusal::KeysAway => ApiError::new(Code::KeysUnavailable, ""),
        }
    }
}

impl From<BrokerError> for ApiError {
    fn from(error: BrokerError) -> ApiError {
        tracing::warn!(%error, "broker request failed");
        ApiError::new(Code::BrokerUnavailable, "")
    }
}

impl From<Exhausted> for ApiError {
    fn from(too_many: Exhausted) -> ApiError {
        let code = match too_many {
            Exhausted::OfAddress => Code::TooManyStreamsOfAddress,
            Exhausted::OfPrincipal => Code::TooManyStreamsOfPrincipal,
            Exhausted::FiltersOfAddress => Code::TooManyFiltersOfAddress,
            Exhausted::FiltersOfPrincipal => Code::TooManyFiltersOfPrincipal,
        };
        ApiError::new(code, "")
    }
}

impl From<TooManyBatches> for ApiError {
    fn from(too_many: TooManyBatches) -> ApiError {
        let code = match too_many {
            TooManyBatches::OfNode => Code::TooManyBatches,
            TooManyBatches::OfAddress => Code::TooManyBatchesOfAddress,
            TooManyBatches::OfPrincipal => Code::TooManyBatchesOfPrincipal,
        };
        ApiError::new(code, "")
    }
}

impl From<PublishError> for ApiError {
    fn from(error: PublishError) -> ApiError {
        let code = match &error {
            PublishError::Unavailable => Code::BrokerUnavailable,
            PublishError::OutcomeUnknown => Code::OutcomeUnknown,
            PublishError::ConditionFailed => Code::ConditionFailed,
            PublishError::KeyReused => Code::IdempotencyKeyReused,
            PublishError::Refused(_) => Code::BrokerRefused,
        };
        let detail = match &error {
            PublishError::OutcomeUnknown => "try again with the same idempotency key: it is stored once".into(),
            PublishError::KeyReused => {
                "an event with this key was stored on this subject, with another type or payload; this one was not"
                    .into()
            }
            PublishError::Refused(reason) => format!("{reason}; nothing was stored"),
            PublishError::Unavailable => "nothing was stored".into(),
            PublishError::ConditionFailed => String::new(),
        };
        ApiError::new(code, detail)
    }
}

//! `GET /events/{filter}` and `GET /events?subject={filter}`: opens a stream. HEAD: the same checks and head, and no
//! stream.

use std::{
    borrow::Cow,
    convert::Infallible,
    num::NonZeroU32,
    ops::RangeInclusive,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use actix_web::{
    HttpRequest, HttpResponse, HttpResponseBuilder,
    body::{BodySize, BoxBody, MessageBody},
    http::{Method, Version, header},
    web,
};
use bytes::Bytes;
use jiff::{Timestamp, fmt::temporal::Pieces};

use super::{
    App, authenticate,
    connection::{Handoff, SharedSocket},
    error::{ApiError, Code, accepts},
    middleware::{address, caller},
    query::{Parameters, Query, decode_query, subject_in_path},
};
use crate::{
    auth::Principal,
    broker::{BrokerError, Health},
    config::parse_duration,
    hub::{Ends, NewFilters, Opening, Selection, Start, StartAt, SubscribeOptions, Until},
    sieve::{Condition, Sieve, Types},
    subject::{Filter, SubjectError},
    wire::{Format, Framing},
};

/// The parameters of a stream.
#[rustfmt::skip]
const KNOWN: &[&str] = &[
    "subject", "from", "new", "type", "where", "every", "rate", "format", "lastEventId", "limit", "until", "follow", "wait",
];
/// Without `subject`: the filter stands in the path.
pub(super) const OF_ONE: Parameters = Parameters {
    known: KNOWN.split_at(1).1,
    advice: &[
        (&["topic", "topics", "channel"], "the subject stands in the path: /events/{subject}"),
        ID,
        DATA,
        KEY,
        POLL,
        authenticate::ADVICE,
    ],
};
pub(super) const OF_SEVERAL: Parameters = Parameters {
    known: KNOWN,
    advice: &[
        (&["topic", "topics", "channel"], "did you mean \"subject\"?"),
        ID,
        DATA,
        KEY,
        POLL,
        authenticate::ADVICE,
    ],
};
type Advice = (&'static [&'static str], &'static str);
const ID: Advice =
    (&["id", "since", "after"], "the id after which a stream begins is from, or lastEventId, which wins over it");
const DATA: Advice = (&["data", "payload", "message"], "events are published by POST, with the data as the body");
const KEY: Advice = (&["key"], "an API key comes as Authorization: Bearer");

const POLL: Advice =
    (&["poll", "once", "end", "max", "count", "timeout"], "a stream ends by limit=N, until=, or follow=0");

/// The longest that a stream with `follow=0` waits for a first event.
const WAIT_MAX: Duration = Duration::from_secs(5 * 60);
/// The intervals that `every` may have.
const EVERY: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60 * 60);
/// The highest `rate`.
pub(super) const RATE_MAX: u32 = 1_000_000;
/// How much of a `Last-Event-ID` is looked at. None of ours is longer.
const ID_CHARS_MAX: usize = 16 * 1024;

/// `GET /events/{filter}`
pub async fn filter_in_path(app: web::Data<App>, request: HttpRequest) -> HttpResponse {
    let filters = |_: &Query| Ok(vec![parse_filter(&subject_in_path(&request)?)?]);
    respond(&app, &request, &OF_ONE, filters).await
}

/// `GET /events?subject={filter}`, once or several times
pub async fn filters_in_query(app: web::Data<App>, request: HttpRequest) -> HttpResponse {
    let filters = |query: &Query| {
        let filters = query.all("subject").map(parse_filter).collect::<Result<Vec<_>, _>>()?;
        if filters.is_empty() {
            let detail = "say what to stream, as in /events/orders.eu, /events/orders.> or /events?subject=orders.*";
            return Err(ApiError::new(Code::MissingSubject, detail));
        }
        let filters_max = app.limits.borrow().filters;
        if filters.len() > filters_max {
            let detail = format!("one connection takes at most {filters_max} filters, not {}", filters.len());
            return Err(ApiError::new(Code::TooManyFilters, detail));
        }
        Ok(Filter::fold(filters))
    };
    respond(&app, &request, &OF_SEVERAL, filters).await
}

async fn respond(
    app: &App,
    request: &HttpRequest,
    parameters: &Parameters,
    filters: impl FnOnce(&Query) -> Result<Vec<Filter>, ApiError>,
) -> HttpResponse {
    let opened = async {
        let attempt = app.shares.attempt(address(request));
        attempt.map_err(|wait| ApiError::over_rate(Code::TooManyAttempts, wait))?;
        let query = app.query(request, parameters)?;
        let principal = authenticate::authenticate(app, request, &query).await?;
        let wanted = SubscribeRequest::read(filters(&query)?, &query, request)?;
        authenticate::authorize_subscribe(&principal, &wanted.filters)?;
        open(app, request, wanted, &principal).await
    };
    opened.await.unwrap_or_else(|error| app.refuse_stream(request, &error))
}

/// What a client asks for.
struct SubscribeRequest {
    filters: Vec<Filter>,
    start: Start,
    options: SubscribeOptions,
}

impl SubscribeRequest {
    fn read(filters: Vec<Filter>, query: &Query, request: &HttpRequest) -> Result<SubscribeRequest, ApiError> {
        let at = match query.one("from")? {
            Some(text) => parse_start(text)?,
            None => StartAt::Now,
        };
        let new = match query.one("new")? {
            None | Some("lowest") => NewFilters::Lowest,
            Some("now") => NewFilters::Now,
            Some("snapshot") => NewFilters::Snapshot,
            Some(other) => {
                let detail = format!(
                    "new is where filters begin that the id does not know: \"lowest\" (the default), \"now\" or \"snapshot\", not {other:?}"
                );
                return Err(ApiError::new(Code::InvalidParameter, detail));
            }
        };
        let format = match query.one("format")? {
            None if accepts_ndjson_alone(request) => Format::Ndjson,
            None | Some("raw") => Format::Raw,
            Some("json") => Format::Json,
            Some("ndjson") => Format::Ndjson,
            Some(other) => {
                let detail = format!("format is \"raw\" (the default), \"json\" or \"ndjson\", not {other:?}");
                return Err(ApiError::new(Code::InvalidParameter, detail));
            }
        };
        let framing = if request.version() > Version::HTTP_10 { Framing::Chunked } else { Framing::Close };
        // At most once.
        query.one("lastEventId")?;
        let ends = parse_ends(query)?;
        let types = Types::parse(query.all("type"));
        let types = types.map_err(|error| ApiError::new(Code::InvalidParameter, error.to_string()))?;
        let condition = query.one("where")?.map(Condition::parse).transpose();
        let condition = condition.map_err(|error| ApiError::new(Code::InvalidWhere, error.to_string()))?;
        let selection = Selection { sieve: Sieve::new(types, condition), every: parse_every(query)? };
        Ok(SubscribeRequest {
            filters,
            start: Start { last_event_id: presented_id(request), at, new },
            options: SubscribeOptions { format, framing, ends, selection, rate: parse_rate(query)? },
        })
    }
}

async fn open(
    app: &App,
    request: &HttpRequest,
    wanted: SubscribeRequest,
    principal: &Principal,
) -> Result<HttpResponse, ApiError> {
    if app.is_draining() {
        return Err(ApiError::new(Code::Draining, ""));
    }
    if app.memory.is_full() {
        return Err(ApiError::new(Code::MemoryShort, ""));
    }
    let place = app.shares.open_stream(&caller(request, principal), wanted.filters.len())?;
    let permit = app.deliveries.admit(place).ok_or_else(|| ApiError::new(Code::TooManyStreams, ""))?;
    let SubscribeOptions { format, framing, .. } = wanted.options;
    let body = if request.method() == Method::HEAD {
        if let Health::Away(why) = app.broker.health() {
            return Err(BrokerError::Unavailable(why).into());
        }
        BoxBody::new(NoBody)
    } else {
        let socket_share =
            request.conn_data::<Rc<SharedSocket>>().expect("every connection carries its shared socket").clone();
        let SubscribeRequest { filters, start, options } = wanted;
        let sieves_max = app.limits.borrow().sieves;
        let is_over = |filter: &Filter| app.hub.other_selections(filter, &options.selection) >= sieves_max;
        if !options.selection.is_everything() && filters.iter().any(is_over) {
            let detail = format!(
                "readers of one filter have {sieves_max} different selections (type=, where=, every=) here, and more are not taken: put what is different for each reader into the subject"
            );
            return Err(ApiError::new(Code::TooManySieves, detail));
        }
        let (is_back, until) = (start.last_event_id.is_some(), options.ends.until.clone());
        let (opening, cursor) = app.hub.subscribe(&filters, start, options).await?;
        if let Some(Until::Position(until)) = until
            && !until.epoch.is_named(cursor.epoch())
        {
            let detail = "until is an id of another stream: it would never be reached";
            return Err(ApiError::new(Code::InvalidParameter, detail));
        }
        // An EventSource comes back after any end but this.
        if is_back && format != Format::Ndjson && matches!(opening, Opening::Position(_)) && cursor.is_past_its_end() {
            return Ok(HttpResponse::NoContent().insert_header((header::CACHE_CONTROL, "no-store")).finish());
        }
        let (client, expires) = (authenticate::client(request, principal), principal.expires());
        BoxBody::new(Handoff::new(socket_share, move |socket| {
            if let Err(error) = permit.deliver((socket, framing), opening, cursor, client, expires) {
                tracing::warn!(%error, "could not take over the socket of a stream");
            }
        }))
    };
    let mut response = event_stream(format).body(body);
    response.head_mut().no_chunking(framing == Framing::Close);
    Ok(response)
}

/// The head of every answer that is a stream.
pub(super) fn event_stream(format: Format) -> HttpResponseBuilder {
    let mut response = HttpResponse::Ok();
    response
        .content_type(format.content_type())
        // Proxies that compress (webpack-dev-server, express `compression`) would hold every byte back.
        .insert_header((header::CACHE_CONTROL, "no-store, no-transform"))
        // Tells nginx, wherever one is in between, to pass every byte on at once.
        .insert_header(("X-Accel-Buffering", "no"))
        .force_close();
    response
}

/// The last event id that a request presents, in a header or else in the query, whether it is one of ours or not.
pub(super) fn presented_id(request: &HttpRequest) -> Option<String> {
    let headers = request.headers().get_all("Last-Event-ID");
    let headers = headers.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let parameters = request.query_string().split('&').filter_map(|pair| pair.strip_prefix("lastEventId="));
    let parameters = parameters.filter_map(|value| decode_query(value).ok());
    // Empty is what an EventSource has before its first id.
    let id = headers.chain(parameters).find(|id| !id.is_empty())?;
    Some(id.chars().take(ID_CHARS_MAX).collect())
}

/// The body of the answer to a HEAD, of which the HTTP server writes the head of a stream.
struct NoBody;

impl MessageBody for NoBody {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, Infallible>>> {
        Poll::Ready(None)
    }
}

/// Whether the request names NDJSON and not `text/event-stream`, which is the default.
fn accepts_ndjson_alone(request: &HttpRequest) -> bool {
    let names =
        |kind| request.headers().get_all(header::ACCEPT).filter_map(|v| v.to_str().ok()).any(|v| accepts(v, kind));
    names(Format::Ndjson.content_type()) && !names(Format::Raw.content_type())
}

/// Reads where the stream ends: `limit`, `until`, `follow` and `wait`.
fn parse_ends(query: &Query) -> Result<Ends, ApiError> {
    let wrong = |detail: &str| Err(ApiError::new(Code::InvalidParameter, detail));
    let limit = match query.one("limit")?.map(str::parse) {
        None => None,
        Some(Ok(limit @ 1..)) => Some(limit),
        Some(Ok(0) | Err(_)) => return wrong("limit is a number of events, at least 1"),
    };
    let follow = match query.one("follow")? {
        None => None,
        Some("0") => Some(false),
        Some("1") => Some(true),
        Some(_) => return wrong("follow is 0 (end when everything there is has been sent) or 1 (the default)"),
    };
    let until = match (query.one("until")?, follow) {
        (None, None | Some(true)) => None,
        (None | Some("now"), Some(false)) | (Some("now"), None) => Some(Until::Now),
        (Some(_), Some(true)) => return wrong("until ends a stream, and follow=1 does not: give one of them"),
        (Some(_), Some(false)) => return wrong("follow=0 is until=now: give one of them"),
        (Some(text), None) => match (text.parse(), parse_time(text)) {
            (Ok(position), _) => Some(Until::Position(position)),
            (Err(_), Some(time)) => Some(Until::Time(time)),
            (Err(_), None) => return wrong("until is now, an event id, or a time such as 2026-01-31T12:00:00Z"),
        },
    };
    let wait = match query.one("wait")?.map(parse_duration) {
        None => Duration::ZERO,
        Some(_) if until != Some(Until::Now) => {
            return wrong("wait goes with follow=0: how long to wait for a first event");
        }
        Some(Some(wait)) if wait <= WAIT_MAX => wait,
        Some(_) => return wrong("wait is a time such as 30s, at most 5m"),
    };
    Ok(Ends { limit, until, wait })
}

fn parse_every(query: &Query) -> Result<Option<Duration>, ApiError> {
    let every = query.one("every")?.map(|text| parse_duration(text).filter(|every| EVERY.contains(every)));
    let detail = "every is the interval in which each subject has one event at most, from 100ms to 1h";
    every.map(|every| every.ok_or_else(|| ApiError::new(Code::InvalidParameter, detail))).transpose()
}

/// Reads `rate`, of a stream or of a batch: events in a second.
pub(super) fn parse_rate(query: &Query) -> Result<Option<NonZeroU32>, ApiError> {
    let rate = query.one("rate")?.map(|text| text.parse().ok().filter(|rate: &NonZeroU32| rate.get() <= RATE_MAX));
    let detail = format!("rate is how many events there may be in a second, from 1 to {RATE_MAX}");
    rate.map(|rate| rate.ok_or_else(|| ApiError::new(Code::InvalidParameter, detail))).transpose()
}

fn parse_filter(text: &str) -> Result<Filter, ApiError> {
    Filter::parse(text).map_err(|error| ApiError::new(Code::InvalidSubject, explain(&error)))
}

fn explain(error: &SubjectError) -> String {
    match error {
        SubjectError::Character(' ') => format!("{error} (in a query + is a blank: write %2B)"),
        other => other.to_string(),
    }
}

/// Reads `from`: `now`, `first`, `snapshot`, an event id, a time (RFC 3339), how long ago (`-15m`), or how many (`-100`).
pub(super) fn parse_start(text: &str) -> Result<StartAt, ApiError> {
    if let Some(ago) = text.strip_prefix('-').and_then(parse_duration) {
        let time = SystemTime::now().checked_sub(ago).and_then(|time| Timestamp::try_from(time).ok());
        return Ok(StartAt::Time(time.unwrap_or(Timestamp::MIN)));
    }
    let is_number = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(count) = text.strip_prefix('-').filter(is_number).and_then(|count| count.parse().ok()) {
        return Ok(StartAt::Last(count));
    }
    match text {
        "now" => Ok(StartAt::Now),
        "first" => Ok(StartAt::First),
        "snapshot" => Ok(StartAt::Snapshot),
        _ => text.parse().map(StartAt::After).ok().or_else(|| parse_time(text).map(StartAt::Time)).ok_or_else(|| {
            let detail =
                "from is now, first, snapshot, an event id, a time such as 2026-01-31T12:00:00Z, how long ago, such as -15m, or how many events, such as -100";
            ApiError::new(Code::InvalidParameter, detail)
        }),
    }
}

/// Reads a time as RFC 3339 has it. One that is finer than times here are, or further off, is the nearest that there is.
fn parse_time(text: &str) -> Option<Timestamp> {
    let text = with_sign(&with_nanoseconds(text));
    text.parse().ok().or_else(|| nearest(&text))
}

/// The time with its offset's sign: in a query, a `+` that was not encoded is a blank.
fn with_sign(text: &str) -> String {
    let at = text.len().saturating_sub("+02:00".len());
    match text.get(at..).and_then(|offset| offset.strip_prefix(' ')) {
        Some(offset) => format!("{}+{offset}", &text[..at]),
        None => text.to_owned(),
    }
}

/// The time with nine digits of a fraction at most.
fn with_nanoseconds(text: &str) -> Cow<'_, str> {
    let Some((seconds, rest)) = text.split_once('.') else { return text.into() };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    format!("{seconds}.{}{}", &rest[..digits.min(9)], &rest[digits..]).into()
}

fn nearest(text: &str) -> Option<Timestamp> {
    let pieces = Pieces::parse(text).ok()?;
    let time = pieces.date().to_datetime(pieces.time()?);
    match pieces.to_numeric_offset()?.to_timestamp(time) {
        Ok(_) => None,
        Err(_) => Some(if time.year() > 0 { Timestamp::MAX } else { Timestamp::MIN }),
    }
}

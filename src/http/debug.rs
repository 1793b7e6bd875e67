//! `GET /debug/streams` and `GET /debug/feeds` of the admin listener: streams and feeds, page by page. See
//! docs/src/troubleshooting.md.

use std::{net::IpAddr, num::NonZeroU32};

use actix_web::{HttpRequest, HttpResponse, http::header, web};
use serde::Serialize;

use super::{
    App,
    error::{ApiError, Code},
    query::{Parameters, Query},
};
use crate::{
    delivery::{Ended, StreamRecord},
    hub::DerivedSeen,
    subject::Filter,
};

#[derive(Serialize)]
struct Streams {
    streams: Vec<Stream>,
    /// Where the next page begins, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<u64>,
    ended: Vec<EndedStream>,
}

#[derive(Serialize)]
struct Stream {
    number: u64,
    address: Option<IpAddr>,
    principal: Option<String>,
    request_id: Option<String>,
    opened: String,
    last_id: String,
    /// The most of its filters.
    behind: Option<u64>,
    filters: Vec<Place>,
    /// What the client wants of them, if that is not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    selection: Option<String>,
    /// Events in a second, if it said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<NonZeroU32>,
    events: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Place {
    filter: String,
    position: u64,
    /// Sequences of the stream, which other filters' events have, too. `None`: its feed is gone, or is being replaced.
    behind: Option<u64>,
}

#[derive(Serialize)]
struct EndedStream {
    ended: String,
    reason: &'static str,
    #[serde(flatten)]
    stream: Stream,
}

/// A part of a feed that some of its readers want.
#[derive(Serialize)]
struct DerivedFeed {
    /// As in `orders.> where @.data.amount > 100 every 1s`.
    name: String,
    readers: usize,
    events: usize,
    bytes: usize,
}

impl DerivedFeed {
    fn of(filter: &Filter, seen: &DerivedSeen) -> DerivedFeed {
        let name = format!("{filter} {}", seen.selection);
        DerivedFeed { name, readers: seen.readers, events: seen.events, bytes: seen.bytes }
    }
}

#[derive(Serialize)]
struct Feeds {
    feeds: Vec<Feed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Serialize)]
struct Feed {
    filter: String,
    readers: usize,
    /// The id up to which it is complete, once it has started.
    proven: Option<String>,
    events: usize,
    bytes: usize,
    /// It is being read for, because something may be missing.
    in_doubt: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    derived: Vec<DerivedFeed>,
}

/// `GET /debug/streams`
pub async fn streams(app: web::Data<App>, request: HttpRequest) -> HttpResponse {
    respond(&request, list_streams(&app, &request))
}

/// `GET /debug/feeds`
pub async fn feeds(app: web::Data<App>, request: HttpRequest) -> HttpResponse {
    respond(&request, list_feeds(&app, &request))
}

fn respond(request: &HttpRequest, listed: Result<impl Serialize, ApiError>) -> HttpResponse {
    match listed {
        Ok(listed) => HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(listed),
        Err(error) => error.response(request),
    }
}

fn list_streams(app: &App, request: &HttpRequest) -> Result<Streams, ApiError> {
    let known = &["after", "limit", "address", "principal", "filter"];
    let query = Query::parse(request, &Parameters { known, advice: &[] }, None)?;
    let after = parsed(&query, "after", "the number of a stream")?.unwrap_or(0);
    let limit = limit(app, &query)?;
    let wanted = Wanted::read(&query)?;
    let register = app.deliveries.registry();
    let mut open = register.open_after(after, limit + 1, |record| wanted.is(record));
    let more = open.len() > limit;
    open.truncate(limit);
    let next = if more { open.last().map(|record| record.number) } else { None };
    let ended = register.ended(limit, |record| wanted.is(record));
    Ok(Streams {
        streams: open.iter().map(|record| describe(app, record)).collect(),
        next,
        ended: ended.iter().map(|ended| describe_ended(app, ended)).collect(),
    })
}

/// Which streams an operator asks for.
struct Wanted<'a> {
    address: Option<IpAddr>,
    principal: Option<&'a str>,
    /// Streams that read all of it.
    filter: Option<Filter>,
}

impl Wanted<'_> {
    fn read(query: &Query) -> Result<Wanted<'_>, ApiError> {
        let filter = query.one("filter")?.map(Filter::parse).transpose();
        Ok(Wanted {
            address: parsed(query, "address", "an IP address")?,
            principal: query.one("principal")?,
            filter: filter.map_err(|error| ApiError::new(Code::InvalidSubject, error.to_string()))?,
        })
    }

    fn is(&self, record: &StreamRecord) -> bool {
        let reads = |wanted: &Filter| record.progress.places().any(|(filter, _)| filter.covers(wanted));
        self.address.is_none_or(|address| record.client.address == Some(address))
            && self.principal.is_none_or(|principal| *record.client.principal == *principal)
            && self.filter.as_ref().is_none_or(reads)
    }
}

fn describe(app: &App, record: &StreamRecord) -> Stream {
    let epoch = record.progress.epoch();
    let place = |(filter, position): (&Filter, u64)| Place {
        filter: filter.to_string(),
        position,
        behind: app.hub.behind(filter, &record.progress.selection, epoch, position),
    };
    let filters: Vec<_> = record.progress.places().map(place).collect();
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Stream {
        number: record.number,
        address: record.client.address,
        principal: some(&record.client.principal),
        request_id: record.client.request_id.as_deref().and_then(some),
        opened: record.opened.to_string(),
        last_id: record.progress.position().to_string(),
        behind: filters.iter().filter_map(|place| place.behind).max(),
        filters,
        selection: some(&record.progress.selection.to_string()),
        rate: record.progress.rate,
        events: record.events(),
        bytes: record.bytes(),
    }
}

fn describe_ended(app: &App, ended: &Ended) -> EndedStream {
    EndedStream { ended: ended.at.to_string(), reason: ended.reason, stream: describe(app, &ended.record) }
}

fn list_feeds(app: &App, request: &HttpRequest) -> Result<Feeds, ApiError> {
    let query = Query::parse(request, &Parameters { known: &["after", "limit"], advice: &[] }, None)?;
    let limit = limit(app, &query)?;
    let after = query.one("after")?.unwrap_or_default();
    let mut feeds = app.hub.feeds_after(after, limit + 1);
    let more = feeds.len() > limit;
    feeds.truncate(limit);
    let next = if more { feeds.last().map(|feed| feed.filter.to_string()) } else { None };
    let feeds = feeds.into_iter().map(|feed| Feed {
        filter: feed.filter.to_string(),
        readers: feed.readers,
        proven: feed.proven.map(|id| id.to_string()),
        events: feed.events,
        bytes: feed.bytes,
        in_doubt: feed.in_doubt,
        derived: feed.derived.iter().map(|derived| DerivedFeed::of(&feed.filter, derived)).collect(),
    });
    Ok(Feeds { feeds: feeds.collect(), next })
}

/// How many are asked for, of those that one answer may have.
fn limit(app: &App, query: &Query) -> Result<usize, ApiError> {
    let limit = parsed(query, "limit", "how many are wanted")?.unwrap_or(app.debug.page);
    Ok(limit.clamp(1, app.debug.page))
}

fn parsed<T: std::str::FromStr>(query: &Query, name: &str, what: &str) -> Result<Option<T>, ApiError> {
    let parse = |text: &str| {
        text.parse().map_err(|_| ApiError::new(Code::InvalidParameter, format!("{name} is {what}, not {text:?}")))
    };
    query.one(name)?.map(parse).transpose()
}

//! `POST /events`: publishes a batch, one JSON object a line (`application/x-ndjson`), also an endless one.
//!
//! Lines are published as they arrive, in their order, a bounded number of them waiting for the broker. Every line gets
//! its own answer line, in the same order. Memory is bounded by the window and one line; a client that does not read the
//! answers is not read from either.
//!
//! The HTTP server closes a connection on which an answer begins before the body has been read. So the answer waits for
//! the end of the batch: a moment, if there is no telling when that comes, or somewhat longer if its length was announced.
//!
//! Behind nginx the answer begins only when the batch has ended, has paused, or has more answers than are kept: once a
//! response has begun, nginx (1.22, and later ones) stops sending the rest of a body for good as soon as one write of it
//! has to wait.

use std::{
    convert::Infallible,
    num::NonZeroU32,
    ops::ControlFlow,
    pin::Pin,
    time::{Duration, Instant},
};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{Version, header},
    web,
};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{
    StreamExt,
    future::BoxFuture,
    stream::{self, FuturesOrdered},
};
use serde::Serialize;

use super::{
    App,
    authenticate::{self, Sender},
    error::{ApiError, Code, Problem, REFUSAL_HEADER},
    middleware::caller,
    publication::{self, Receipt, key_of},
    publish::check_coding,
    query::Parameters,
    subscribe::parse_rate,
};
use crate::{
    broker::Publication,
    limits::{Caller, ClientPermit, Limits, RetryAfter},
    memory::{Held, Memory, Part},
    metrics::Counted,
    pace::Pace,
    subject::Subject,
};

/// Types that mean one JSON value a line.
const TYPES: [&str; 3] = ["application/x-ndjson", "application/ndjson", "application/jsonl"];

/// A batch that brings nothing for so long has paused.
const PAUSE: Duration = Duration::from_secs(1);
/// Answers that are kept while a batch behind nginx has neither ended nor paused: about 10,000 of them.
const PROXIED_ANSWER_BYTES_MAX: usize = 1 << 20;
/// The same of any other batch, which loses only its connection by an answer that begins early; and how long that waits
/// for the end of a batch of announced length, and of one that may be endless.
const ANSWER_BYTES_MAX: usize = 64 << 10;
const ANNOUNCED_END_WITHIN: Duration = Duration::from_secs(1);
const END_WITHIN: Duration = Duration::from_millis(50);

/// Headers of a single event, and the field of a line that says the same.
const HEADERS_OF_ONE: [(&str, &str); 3] =
    [("Idempotency-Key", "idempotency_key"), ("If-Match", "if_match"), ("If-None-Match", "if_none_match")];

/// How many events a batch has, if its sender says so: it is refused if there is no room for them.
const EVENTS_HEADER: &str = "Tidegate-Events";

const PARAMETERS: Parameters = Parameters {
    known: &["rate"],
    advice: &[
        (&["topic", "topics", "channel", "subject"], "each line of a batch names its \"subject\""),
        (&["id", "key"], "each line of a batch may have an \"idempotency_key\"; ids are given by the broker"),
        (&["data", "payload", "message", "type", "ttl", "event"], "each line of a batch has it as a field"),
        authenticate::ADVICE,
    ],
};

/// What some editors and libraries put in front of a text.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// After how many lines, or so many bytes, others on this thread get their turn: other publishers, and those who send
/// events to the broker, which then works on them while more are read.
const TURN_LINES: usize = 16;
const TURN_BYTES: usize = 64 << 10;
/// The longest line that is read in such a turn: one of 2 MB takes ten milliseconds.
const SMALL_LINE_BYTES: usize = 64 << 10;

/// `POST /events`
pub async fn publish(app: web::Data<App>, request: HttpRequest, payload: web::Payload) -> HttpResponse {
    let Checked { sender, caller, places, rate } = match check(&app, &request).await {
        Ok(checked) => checked,
        Err(error) => return app.refuse(&request, &error),
    };
    let has = |name| request.headers().contains_key(name);
    let (behind_proxy, is_announced) = (has(REFUSAL_HEADER), !has(header::TRANSFER_ENCODING.as_str()));
    let bytes_max = app.limits.borrow().line_bytes;
    let mut batch = Batch {
        lines: Lines::new(payload, bytes_max, Throttle::new(app.shares.clone(), caller, rate), &app.memory),
        waiting: FuturesOrdered::new(),
        ended: false,
        sender,
        _places: places,
        _counted: Counted::in_gauge(&app.metrics.batches),
        app,
    };
    let (first, next) = match (behind_proxy, is_announced) {
        (true, _) => batch.answers_until_pause(PROXIED_ANSWER_BYTES_MAX).await,
        (false, true) => batch.answers_within(ANNOUNCED_END_WITHIN, ANSWER_BYTES_MAX).await,
        (false, false) => batch.answers_within(END_WITHIN, ANSWER_BYTES_MAX).await,
    };
    let mut response = HttpResponse::Ok();
    response
        .content_type("application/x-ndjson")
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header(("X-Accel-Buffering", "no"));
    if let Next::End = next {
        return response.body(first);
    }
    let rest = stream::unfold(batch, |mut batch| async move {
        loop {
            match batch.next_answer(Duration::MAX).await {
                Next::Answer(answer) => return Some((Ok::<_, Infallible>(answer), batch)),
                Next::Pause => {}
                Next::End => return None,
            }
        }
    });
    let knows_chunks = request.version() > Version::HTTP_10;
    if !knows_chunks {
        response.force_close();
    }
    let mut response = response.streaming(stream::iter((!first.is_empty()).then_some(Ok(first))).chain(rest));
    // Without chunks (RFC 9112, section 6.1) the answer is as long as its connection.
    response.head_mut().no_chunking(!knows_chunks);
    response
}

/// A batch that may begin.
struct Checked {
    sender: Sender,
    caller: Caller,
    places: [ClientPermit; 2],
    /// Most lines that are read in a second.
    rate: Option<NonZeroU32>,
}

async fn check(app: &App, request: &HttpRequest) -> Result<Checked, ApiError> {
    let query = app.query(request, &PARAMETERS)?;
    let rate = parse_rate(&query)?;
    let mut sender = Sender::authenticate(app, request, query).await?;
    let principal = sender.now(app).await?;
    authenticate::check_publish_anything(principal)?;
    let caller = caller(request, principal);
    if let Some((header, field)) = HEADERS_OF_ONE.iter().find(|(header, _)| request.headers().contains_key(*header)) {
        let fields = HEADERS_OF_ONE.map(|(_, field)| field).join(", ");
        let detail = format!(
            "{header} is a header of a single event; in a batch each line has its own, as the field {field:?} (fields: {fields})"
        );
        return Err(ApiError::new(Code::InvalidHeader, detail));
    }
    check_coding(request)?;
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let kind = kind.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if !TYPES.contains(&&*kind) {
        let detail = format!(
            "a batch is {}, one JSON object a line; a single event goes to /events/{{subject}}, in any type",
            TYPES[0]
        );
        return Err(ApiError::new(Code::UnsupportedMediaType, detail));
    }
    if app.is_draining() {
        return Err(ApiError::new(Code::Draining, ""));
    }
    check_room(app, request).await?;
    let places = app.shares.open_batch(&caller)?;
    Ok(Checked { sender, caller, places, rate })
}

/// Refuses a batch that says how many events it has, and that these would evict most of what is kept.
async fn check_room(app: &App, request: &HttpRequest) -> Result<(), ApiError> {
    let Some(announced) = request.headers().get(EVENTS_HEADER) else { return Ok(()) };
    let Some(events) = announced.to_str().ok().and_then(|text| text.parse().ok()) else {
        return Err(ApiError::new(
            Code::InvalidHeader,
            format!("{EVENTS_HEADER} is the number of events in the batch"),
        ));
    };
    let stock = app.broker.stock().await?;
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let bytes = length.unwrap_or_else(|| stock.bytes_of(events));
    if stock.has_room_for(events, bytes) {
        return Ok(());
    }
    let detail = format!(
        "{events} events more, about {bytes} bytes, would evict more than three quarters of what the stream keeps ({} events, {} bytes): send fewer, or store them in another stream",
        stock.events, stock.bytes
    );
    Err(ApiError::new(Code::WouldEvict, detail))
}

struct Batch {
    sender: Sender,
    _places: [ClientPermit; 2],
    _counted: Counted,
    app: web::Data<App>,
    lines: Lines,
    waiting: FuturesOrdered<BoxFuture<'static, Answer>>,
    ended: bool,
}

/// What comes next in a batch.
enum Next {
    Answer(Bytes),
    Pause,
    End,
}

/// The answer to one line.
enum Answer {
    Stored(String),
    Refused(u64, ApiError),
}

impl Batch {
    /// The answers up to the batch's end, its first pause, or as many bytes as are kept; and which of these came.
    async fn answers_until_pause(&mut self, bytes_max: usize) -> (Bytes, Next) {
        let mut answers = BytesMut::new();
        while answers.len() < bytes_max {
            match self.next_answer(PAUSE).await {
                Next::Answer(answer) => answers.extend_from_slice(&answer),
                // A sender that is made to wait has not paused: it would be made to wait for ever by the nginx above.
                Next::Pause if self.lines.throttle.is_owed() => {}
                last @ (Next::Pause | Next::End) => return (answers.freeze(), last),
            }
        }
        (answers.freeze(), Next::Pause)
    }

    /// The answers up to the batch's end, the end of this time, or as many bytes as are kept; and which of these came.
    async fn answers_within(&mut self, limit: Duration, bytes_max: usize) -> (Bytes, Next) {
        let until = Instant::now() + limit;
        let mut answers = BytesMut::new();
        while answers.len() < bytes_max {
            match self.next_answer(until.saturating_duration_since(Instant::now())).await {
                Next::Answer(answer) => answers.extend_from_slice(&answer),
                last @ (Next::Pause | Next::End) => return (answers.freeze(), last),
            }
        }
        (answers.freeze(), Next::Pause)
    }

    /// Reads on while the window has room, until an answer is ready, or for as long as `pause` brings neither.
    async fn next_answer(&mut self, pause: Duration) -> Next {
        loop {
            if self.app.is_draining() {
                // Lines that were read are answered; the others are for another node.
                self.ended = true;
            }
            // Where the node has no memory left, one line at a time.
            let has_room = self.waiting.is_empty() || !self.app.memory.is_full();
            let reads = !self.ended && has_room && self.waiting.len() < self.app.limits.borrow().batch_window;
            if !reads && self.waiting.is_empty() {
                return Next::End;
            }
            let app = self.app.clone();
            tokio::select! {
                biased;
                Some(answer) = self.waiting.next(), if !self.waiting.is_empty() => {
                    return Next::Answer(self.write(answer));
                }
                line = self.lines.next(), if reads => match line {
                    ControlFlow::Break(()) => self.ended = true,
                    ControlFlow::Continue(line) => self.take(line).await,
                },
                () = app.drained(), if reads => {}
                () = tokio::time::sleep(pause) => return Next::Pause,
            }
        }
    }

    /// Hands one line to the broker; its answer waits in its turn.
    async fn take(&mut self, line: Line) {
        let number = self.lines.number;
        let line = match line {
            Line::Whole(line) => line,
            Line::Dropped(Dropped::TooLong) => {
                let detail = format!("a line has at most {} bytes", self.lines.bytes_max);
                return self.answer(Answer::Refused(number, ApiError::new(Code::LineTooLong, detail)));
            }
            Line::Dropped(Dropped::NoMemory) => {
                let error = ApiError::new(Code::MemoryShort, "this line was not stored; send it again later");
                return self.answer(Answer::Refused(number, error));
            }
        };
        let held = self.app.memory.hold(Part::Batches, line.len());
        match self.publish(line).await {
            Err(error) => self.answer(Answer::Refused(number, error)),
            Ok((subject, receipt)) => self.waiting.push_back(Box::pin(async move {
                let _held = held;
                match receipt.await {
                    Ok(published) => Answer::stored(number, &Receipt::new(published, &subject)),
                    Err(error) => Answer::Refused(number, error),
                }
            })),
        }
    }

    /// Hands an event to the broker, if its sender may publish it now.
    async fn publish(&mut self, line: Bytes) -> Result<(Subject, super::Receipt), ApiError> {
        let mut publication = self.parse(line).await?;
        let principal = self.sender.now(&self.app).await?;
        authenticate::authorize_publish(principal, &publication.subject)?;
        publication.key = publication.key.map(|key| key_of(principal, &key));
        let subject = publication.subject.clone();
        let receipt = self.app.publish(principal, publication).await?;
        Ok((subject, receipt))
    }

    /// Reads a line here, or, if that may take long, on a thread that serves no connections.
    async fn parse(&self, line: Bytes) -> Result<Publication, ApiError> {
        let event_bytes_max = self.app.limits.borrow().event_bytes;
        if line.len() <= SMALL_LINE_BYTES {
            return publication::of_line(&line, event_bytes_max);
        }
        let permit = self.app.large_lines.clone().acquire_owned().await.expect("it is never closed");
        let parsed = web::block(move || {
            let _permit = permit;
            publication::of_line(&line, event_bytes_max)
        });
        parsed.await.unwrap_or_else(|_| Err(ApiError::new(Code::Internal, "")))
    }

    fn answer(&mut self, answer: Answer) {
        self.waiting.push_back(Box::pin(std::future::ready(answer)));
    }

    fn write(&self, answer: Answer) -> Bytes {
        #[derive(Serialize)]
        struct Refused<'a> {
            line: u64,
            #[serde(flatten)]
            problem: Problem<'a>,
        }
        let mut text = match answer {
            Answer::Stored(text) => text,
            Answer::Refused(line, error) => {
                self.app.count_refusal(&error);
                let refused = Refused { line, problem: error.problem() };
                serde_json::to_string(&refused).expect("strings and numbers always serialize")
            }
        };
        text.push('\n');
        text.into()
    }
}

impl Answer {
    fn stored(line: u64, receipt: &Receipt<'_>) -> Answer {
        #[derive(Serialize)]
        struct Stored<'a> {
            line: u64,
            #[serde(flatten)]
            receipt: &'a Receipt<'a>,
        }
        let text = serde_json::to_string(&Stored { line, receipt }).expect("strings and numbers always serialize");
        Answer::Stored(text)
    }
}

/// The lines of a body as it arrives, no faster than its sender may publish.
struct Lines {
    payload: web::Payload,
    bytes: BytesMut,
    /// The first bytes that are known to have no line end among them, so many.
    searched: usize,
    /// Of the line read last, from 1.
    number: u64,
    /// Why what comes of the line that is arriving is dropped, if it is.
    dropped: Option<Dropped>,
    memory: Held,
    bytes_max: usize,
    /// What has been read and is still to be counted.
    held: Option<Line>,
    throttle: Throttle,
}

enum Line {
    Whole(Bytes),
    Dropped(Dropped),
}

/// Why a line is not kept.
#[derive(Clone, Copy)]
enum Dropped {
    TooLong,
    NoMemory,
}

impl Lines {
    fn new(payload: web::Payload, bytes_max: usize, throttle: Throttle, memory: &Memory) -> Lines {
        let (bytes, memory) = (BytesMut::new(), memory.hold(Part::Batches, 0));
        Lines { payload, bytes, searched: 0, number: 0, dropped: None, memory, bytes_max, held: None, throttle }
    }

    /// The next line that is not blank, without its end, once it may be published. Breaks at the end of the body, or where
    /// it broke off.
    ///
    /// May be dropped at any await and called again; nothing is lost.
    async fn next(&mut self) -> ControlFlow<(), Line> {
        loop {
            self.throttle.pay().await;
            if let Some(line) = self.held.take() {
                return ControlFlow::Continue(line);
            }
            if let Some(line) = self.split_line() {
                self.hold(line);
                continue;
            }
            match Pin::new(&mut self.payload).next().await {
                Some(Ok(piece)) => {
                    self.throttle.owe_bytes(piece.len());
                    self.bytes.extend_from_slice(&piece);
                    self.memory.resize(self.bytes.len());
                }
                // A line that broke off with its connection is no line.
                Some(Err(_)) => return ControlFlow::Break(()),
                None if self.bytes.is_empty() && self.dropped.is_none() => return ControlFlow::Break(()),
                None => {
                    let line = self.bytes.split();
                    self.hold(line);
                }
            }
        }
    }

    /// Takes a line from what has arrived, if one has arrived whole.
    fn split_line(&mut self) -> Option<BytesMut> {
        if let Some(end) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') {
            let mut line = self.bytes.split_to(self.searched + end + 1);
            line.truncate(line.len() - 1);
            self.searched = 0;
            return Some(line);
        }
        if self.bytes.len() > self.bytes_max {
            self.dropped = Some(Dropped::TooLong);
        } else if self.bytes.len() > SMALL_LINE_BYTES && self.memory.memory().is_full() {
            self.dropped = Some(Dropped::NoMemory);
        }
        if self.dropped.is_some() {
            self.bytes = BytesMut::new();
            self.memory.resize(0);
        }
        self.searched = self.bytes.len();
        None
    }

    /// Counts a line, and keeps it unless it is blank.
    fn hold(&mut self, mut line: BytesMut) {
        self.number += 1;
        self.searched = 0;
        self.throttle.owe_line();
        if self.number == 1 && line.starts_with(BYTE_ORDER_MARK) {
            line.advance(BYTE_ORDER_MARK.len());
        }
        self.held = if let Some(dropped) = self.dropped.take() {
            Some(Line::Dropped(dropped))
        } else if line.len() > self.bytes_max {
            Some(Line::Dropped(Dropped::TooLong))
        } else if line.trim_ascii().is_empty() {
            None
        } else {
            Some(Line::Whole(line.freeze()))
        };
    }
}

/// What a batch owes for what was read of it: every line, blank and bad ones, too, and every byte counts against what its
/// sender may publish; and after some of either, others have their turn.
struct Throttle {
    shares: Limits,
    caller: Caller,
    /// How fast the sender wants to be read, if it said so; and whether the line that was read has its turn by that still to come.
    pace: Option<Pace>,
    waits_for_pace: bool,
    line: bool,
    bytes: usize,
    /// Since others had their turn, in lines and as many bytes as take no longer.
    work: usize,
}

impl Throttle {
    fn new(shares: Limits, caller: Caller, rate: Option<NonZeroU32>) -> Throttle {
        let pace = rate.map(Pace::new);
        Throttle { shares, caller, pace, waits_for_pace: false, line: false, bytes: 0, work: 0 }
    }

    /// Takes one line into account; what was owed before has been paid.
    fn owe_line(&mut self) {
        self.line = true;
        self.waits_for_pace = self.pace.is_some();
        self.work += 1;
    }

    fn owe_bytes(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.work += bytes / (TURN_BYTES / TURN_LINES);
    }

    /// Whether the sender has to wait.
    fn is_owed(&self) -> bool {
        self.line || self.bytes > 0
    }

    /// Waits until everything is paid. May be dropped at any await and called again.
    async fn pay(&mut self) {
        while let Err(RetryAfter(wait)) = self.charge() {
            tokio::time::sleep(wait).await;
        }
        if self.work >= TURN_LINES {
            self.work = 0;
            tokio::task::yield_now().await;
        }
    }

    fn charge(&mut self) -> Result<(), RetryAfter> {
        if let Some(pace) = self.pace.as_mut().filter(|_| self.waits_for_pace) {
            let now = tokio::time::Instant::now();
            if pace.allows(now) == 0 {
                return Err(RetryAfter(pace.next().saturating_duration_since(now)));
            }
            pace.take(1, now);
            self.waits_for_pace = false;
        }
        if self.line {
            self.shares.publish(&self.caller)?;
            self.line = false;
        }
        if self.bytes > 0 {
            self.shares.publish_bytes(&self.caller, self.bytes)?;
            self.bytes = 0;
        }
        Ok(())
    }
}

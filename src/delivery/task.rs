//! Writes one stream to one client: a lean task that owns the socket, from the first event to the last byte.
//!
//! The response's head has been written before (see `http::connection`); from here on there are only plain bytes, the
//! same for everyone. A client that reads slowly is written to when its socket has room; what waits for it waits in the
//! feed or in history, never here: at most one frame that has been begun.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    io::IoSlice,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use jiff::Timestamp;
use rand::RngExt;
use tokio::{net::TcpStream, time::Instant};

use super::{Deliveries, Record, Shared, peer};
use crate::{
    hub::{Cursor, Frame, jittered},
    sse,
};

/// A client that takes nothing for so long is not only slow for a moment: what waits for it is given back.
const PATIENCE: Duration = Duration::from_millis(250);
/// Bytes that a client may send after its request, all ignored, before it is taken for broken.
const UNASKED_BYTES_MAX: u32 = 64 * 1024;
/// Frames that one write carries at most; the kernel takes 1,024 pieces.
const PIECES_MAX: usize = 64;

/// Why a stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    ClientClosed,
    /// It acknowledged nothing for two heartbeats.
    ClientGone,
    /// It is there, and has taken nothing for longer than is allowed.
    Stalled,
    WriteFailed,
    Drained,
    /// Drained while its client did not read: within a frame, after which nothing may be written.
    Cut,
    /// It has lived for as long as a stream may.
    Aged,
    /// The client's token has expired.
    Expired,
    /// So it has, while the client did not read.
    ExpiredUnread,
}

/// How much of some frames the socket had room for.
enum Wrote {
    All,
    Some,
}

pub(super) struct Delivery {
    pub socket: TcpStream,
    pub cursor: Cursor,
    pub deliveries: Arc<Shared>,
    pub record: Arc<Record>,
    /// Empty once it has been written.
    pub opening: Bytes,
    pub unasked_bytes: u32,
    /// In seconds since [`Shared::began`]: an instant would take four times as much of every stream.
    pub ages_at: u32,
    pub expiry: Option<Box<Expiry>>,
}

/// The end of a client's right to its stream, where that has one.
pub(super) struct Expiry {
    expires: Timestamp,
    warn_at: Instant,
    at: Instant,
    warned: bool,
}

impl Expiry {
    pub fn new(expires: Timestamp, warning: Duration) -> Expiry {
        let now = Instant::now();
        let left = Duration::try_from(expires.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO);
        Expiry { expires, warn_at: now + left.saturating_sub(warning), at: now + left, warned: warning.is_zero() }
    }

    /// When there is something to do about it.
    fn next(&self) -> Instant {
        if self.warned { self.at } else { self.warn_at }
    }
}

/// What a delivery waits for.
enum Next {
    Frames(Vec<Frame>),
    Beat,
    Draining,
    Closed(End),
}

impl Delivery {
    pub async fn run(&mut self) -> End {
        match self.stream().await {
            Ok(never) => match never {},
            Err(end) => {
                let retry = || Deliveries(self.deliveries.clone()).retry();
                match end {
                    End::Drained => self.say_farewell(retry(), "this node is going away, please reconnect"),
                    End::Aged => self.say_farewell(retry() / 10, "to spread the load, please reconnect"),
                    End::Expired => {
                        self.say_farewell(retry(), "the token has expired, please reconnect with a fresh one")
                    }
                    End::ClientClosed
                    | End::ClientGone
                    | End::Stalled
                    | End::WriteFailed
                    | End::Cut
                    | End::ExpiredUnread => {}
                }
                end
            }
        }
    }

    fn say_farewell(&self, retry: Duration, why: &str) {
        let _ = self.socket.try_write(&sse::farewell(retry, why));
    }

    async fn stream(&mut self) -> Result<std::convert::Infallible, End> {
        let heartbeat = self.deliveries.sse.heartbeat;
        // Also the moment of what is due about the client's token; once the node drains, of this stream's end.
        let beat = tokio::time::sleep_until(self.beat_after(jittered(heartbeat)));
        tokio::pin!(beat);
        let draining = self.deliveries.draining.clone().cancelled_owned();
        tokio::pin!(draining);
        let mut ends = false;
        let mut written_at = Instant::now();

        let opening = std::mem::take(&mut self.opening);
        self.write_all(opening).await?;
        loop {
            // Waits that outlast an event stay registered across it: making them anew costs more than the event. And
            // most often it is an event: the others are looked at when there is none.
            let next = tokio::select! {
                biased;
                frames = self.cursor.next() => Next::Frames(frames),
                closed = closed(&self.socket, &mut self.unasked_bytes) => Next::Closed(closed),
                () = &mut beat => Next::Beat,
                () = &mut draining, if !ends => Next::Draining,
            };
            match next {
                Next::Frames(frames) => {
                    self.write(frames).await?;
                    written_at = Instant::now();
                }
                Next::Closed(end) => return Err(end),
                Next::Beat if ends => return Err(End::Drained),
                Next::Beat if self.expiry.as_ref().is_some_and(|expiry| expiry.next() <= Instant::now()) => {
                    Box::pin(self.expire()).await?;
                    beat.as_mut().reset(self.beat_after(jittered(heartbeat)));
                }
                Next::Beat if self.deliveries.age() >= self.ages_at => return Err(End::Aged),
                Next::Beat => {
                    // Re-armed here and not at every write, which would cost each event a turn of the timer.
                    self.check_peer()?;
                    let quiet = written_at.elapsed();
                    let mut next = jittered(heartbeat);
                    if quiet < heartbeat / 2 {
                        next = next.saturating_sub(quiet);
                    } else {
                        // The position itself is not kept while writing: it would cost every stream its size.
                        let (block, has_moved) = match self.cursor.quiet_position() {
                            Some(id) => (sse::position(&id), true),
                            None => (Bytes::from_static(sse::HEARTBEAT), false),
                        };
                        self.write_all(block).await?;
                        if has_moved {
                            self.cursor.tell(&self.record.whereabouts, u64::MAX);
                        }
                    }
                    beat.as_mut().reset(self.beat_after(next));
                }
                Next::Draining => {
                    ends = true;
                    let moment = self.deliveries.drain.spread.mul_f64(rand::rng().random_range(0.0..1.0));
                    beat.as_mut().reset(self.beat_after(moment));
                }
            }
        }
    }

    /// The next beat: after this time, or when something is due about the client's token.
    fn beat_after(&self, time: Duration) -> Instant {
        let at = Instant::now() + time;
        self.expiry.as_ref().map_or(at, |expiry| at.min(expiry.next()))
    }

    /// Warns of the token's end, or ends the stream at it.
    async fn expire(&mut self) -> Result<(), End> {
        let Some(expiry) = &mut self.expiry else { return Ok(()) };
        if std::mem::replace(&mut expiry.warned, true) {
            return Err(End::Expired);
        }
        let warning = sse::token_expiring(expiry.expires);
        self.write_all(warning).await
    }

    /// Writes frames as the socket has room. When it has none for a while, what was not begun goes back to the cursor.
    async fn write(&mut self, frames: Vec<Frame>) -> Result<(), End> {
        let mut frames = VecDeque::from(frames);
        match self.try_write(&mut frames)? {
            Wrote::All => Ok(()),
            Wrote::Some => Box::pin(self.write_slowly(frames)).await,
        }
    }

    async fn write_slowly(&mut self, mut frames: VecDeque<Frame>) -> Result<(), End> {
        loop {
            match tokio::time::timeout(PATIENCE, self.room()).await {
                Ok(room) => room?,
                Err(_elapsed) => {
                    frames.truncate(1);
                    self.cursor.give_back_after(frames[0].sequence);
                    self.room().await?;
                }
            }
            if let Wrote::All = self.try_write(&mut frames)? {
                return Ok(());
            }
        }
    }

    /// Writes as much of `frames` as there is room for.
    fn try_write(&mut self, frames: &mut VecDeque<Frame>) -> Result<Wrote, End> {
        while let Some(first) = frames.front() {
            let written = if frames.len() == 1 && first.id_line.is_empty() {
                // Most often there is one.
                self.socket.try_write(&first.block)
            } else {
                let pieces = frames.iter().flat_map(|frame| [&frame.id_line, &frame.block]);
                let pieces = pieces.filter(|piece| !piece.is_empty()).take(PIECES_MAX);
                let pieces: Vec<_> = pieces.map(|piece| IoSlice::new(piece)).collect();
                self.socket.try_write_vectored(&pieces)
            };
            match written {
                Ok(written) => {
                    let metrics = &self.deliveries.metrics;
                    metrics.writes.inc();
                    metrics.bytes_delivered.inc_by(written as u64);
                    let Whole { count, reached, newest_stored } = take_off(frames, written);
                    metrics.events_delivered.inc_by(count);
                    self.record.wrote(count, written);
                    if let Some(reached) = reached {
                        self.cursor.tell(&self.record.whereabouts, reached);
                    }
                    if let Some(stored) = newest_stored {
                        metrics.delivery_seconds.observe(seconds_since(stored));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Wrote::Some),
                Err(_) => return Err(End::WriteFailed),
            }
        }
        Ok(Wrote::All)
    }

    async fn write_all(&mut self, mut bytes: Bytes) -> Result<(), End> {
        while bytes.has_remaining() {
            match self.socket.try_write(&bytes) {
                Ok(written) => {
                    self.deliveries.metrics.bytes_delivered.inc_by(written as u64);
                    self.record.wrote(0, written);
                    bytes.advance(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.cursor.let_go();
                    Box::pin(self.room()).await?;
                }
                Err(_) => return Err(End::WriteFailed),
            }
        }
        Ok(())
    }

    /// Waits until the client has taken some of what was written: as long as it is there, and not longer than allowed.
    async fn room(&mut self) -> Result<(), End> {
        let stalled_at = Instant::now() + self.deliveries.limits.borrow().stall;
        let heartbeat = self.deliveries.sse.heartbeat;
        let expires_at = self.expiry.as_ref().map(|expiry| expiry.at);
        loop {
            tokio::select! {
                writable = self.socket.writable() => return writable.map_err(|_| End::WriteFailed),
                closed = closed(&self.socket, &mut self.unasked_bytes) => return Err(closed),
                () = tokio::time::sleep_until(stalled_at) => return Err(End::Stalled),
                () = tokio::time::sleep(heartbeat) => self.check_peer()?,
                () = tokio::time::sleep_until(expires_at.unwrap_or(stalled_at)), if expires_at.is_some() => {
                    return Err(End::ExpiredUnread);
                }
                () = self.deliveries.draining.cancelled() => {
                    // It may not read again within the time that is left. What it lacks it will ask for.
                    let moment = self.deliveries.drain.spread;
                    return match tokio::time::timeout(moment, self.socket.writable()).await {
                        Ok(Ok(())) => Ok(()),
                        _ => Err(End::Cut),
                    };
                }
            }
        }
    }

    fn check_peer(&self) -> Result<(), End> {
        if peer::is_gone(&self.socket, 2 * self.deliveries.sse.heartbeat) { Err(End::ClientGone) } else { Ok(()) }
    }
}

/// The frames that were written to their end.
struct Whole {
    count: u64,
    /// The sequence of the last of them.
    reached: Option<u64>,
    newest_stored: Option<Timestamp>,
}

/// Takes what was written off the front of `frames`.
fn take_off(frames: &mut VecDeque<Frame>, mut written: usize) -> Whole {
    let mut whole = Whole { count: 0, reached: None, newest_stored: None };
    while let Some(frame) = frames.front_mut() {
        for piece in [&mut frame.id_line, &mut frame.block] {
            let part = piece.len().min(written);
            piece.advance(part);
            written -= part;
        }
        if !frame.block.is_empty() {
            break;
        }
        whole.count += 1;
        whole.reached = Some(frame.sequence);
        whole.newest_stored = frame.stored.or(whole.newest_stored);
        frames.pop_front();
    }
    whole
}

/// By two clocks: the broker's and this node's.
fn seconds_since(stored: Timestamp) -> f64 {
    Timestamp::now().duration_since(stored).as_secs_f64().max(0.0)
}

/// Resolves when the client has closed its side. Whatever else it sends is ignored, up to a bound.
async fn closed(socket: &TcpStream, unasked_bytes: &mut u32) -> End {
    poll_fn(|cx| {
        while ready!(socket.poll_read_ready(cx)).is_ok() {
            // Not kept while waiting: there are as many of these as clients.
            let mut ignored = [0; 512];
            match socket.try_read(&mut ignored) {
                Ok(0) => break,
                Ok(read) => *unasked_bytes += read as u32,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => break,
            }
            if *unasked_bytes > UNASKED_BYTES_MAX {
                break;
            }
        }
        Poll::Ready(End::ClientClosed)
    })
    .await
}

impl End {
    pub fn as_str(self) -> &'static str {
        match self {
            End::ClientClosed => "client-closed",
            End::ClientGone => "client-gone",
            End::Stalled => "stalled",
            End::WriteFailed => "write-failed",
            End::Drained => "drained",
            End::Cut => "cut",
            End::Aged => "aged",
            End::Expired | End::ExpiredUnread => "token-expired",
        }
    }
}

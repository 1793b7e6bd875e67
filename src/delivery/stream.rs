//! One client's stream: what is written to its socket, and when that ends.
//!
//! The response's head has been written before (see `http::connection`); from here on there are only the bytes of its body,
//! the same for everyone, the heads of chunks included. Each function does what can be done now and returns: a stream waits for its feeds (its waker), for
//! its socket, and for the moment at which it is [`Stream::due`], all at once.
//!
//! A client that reads slowly is written to when its socket has room; what waits for it waits in the feed or in history,
//! never here: at most one frame that has been begun.

use std::{
    collections::VecDeque,
    fmt::Display,
    io::{self, IoSlice},
    os::fd::AsRawFd,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use jiff::Timestamp;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, send},
};
use rand::RngExt;
use tokio::{net::TcpStream, time::Instant};

use super::{Common, OpenCount, StreamRecord, liveness, worker::Wakers};
use crate::{
    backoff::jittered,
    hub::{Completed, Cursor, Frame},
    limits::ClientPermit,
    position::Position,
    wire::{self, Format, Framing},
};

/// After this long without write progress, queued frames that have not been started go back to the cursor.
const GIVE_BACK_AFTER: Duration = Duration::from_millis(250);
/// What a client holds of events that it has begun, in bytes, above which it is looked at more often.
const LARGE_BYTES: usize = 16 * 1024;
/// Where the node is short of memory, a client of large events that has taken so long is let go.
const LARGE_FOR: Duration = Duration::from_secs(2);
/// Bytes that a client may send after its request, all ignored, before it is taken for broken.
const UNASKED_BYTES_MAX: u32 = 64 * 1024;
/// Pieces that one write carries at most; the kernel takes 1,024.
const PIECES_MAX: usize = 256;

/// Why a stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    ClientClosed,
    /// It acknowledged nothing for two heartbeats.
    ClientGone,
    /// It is there, and has taken nothing for longer than is allowed.
    Stalled,
    /// It is slow to take a large event, and the node is short of memory.
    Memory,
    WriteFailed,
    Drained,
    /// Drained while its client did not read: within a frame, after which nothing may be written.
    Cut,
    /// It has lived for as long as a stream may.
    MaxLifetime,
    /// The client's token has expired.
    Expired,
    /// So it has, while the client did not read.
    ExpiredUnread,
    /// At the end that its client wished, and told so.
    Completed(Completed),
    /// By a defect of this gateway, which has been logged.
    Failed,
}

pub(super) struct Stream {
    socket: TcpStream,
    framing: Framing,
    cursor: Cursor,
    record: Arc<StreamRecord>,
    /// What the socket had no room for.
    held: Option<Box<PendingWrite>>,
    written_at: Instant,
    /// The next heartbeat; of a stream that drains, its end.
    beat_at: Instant,
    drains: bool,
    /// The last words are written, or on their way.
    completed: Option<Completed>,
    unasked_bytes: u32,
    /// In seconds since [`Common::began`]: an instant would take four times as much of every stream.
    ages_at: u32,
    expiry: Option<Box<Expiry>>,
    _open_count: OpenCount,
    _place: ClientPermit,
}

/// A stream's turn to do something.
pub(super) struct Turn<'t> {
    pub common: &'t Common,
    pub wakers: &'t Wakers,
    /// When it began, or a little before.
    pub now: Instant,
}

/// What waits for room in the socket.
struct PendingWrite {
    buffer: WriteBuffer,
    began: Instant,
    /// When the client last took something.
    since: Instant,
    /// Whether nothing but what had been begun is held any more.
    is_least: bool,
    look_at: Instant,
    cut_at: Option<Instant>,
}

/// What is being written.
struct WriteBuffer {
    framing: Framing,
    /// What comes before the frames, and is no event.
    plain: Bytes,
    frames: VecDeque<Frame>,
    /// How much of the first frame has been written, in bytes.
    begun: usize,
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

impl Stream {
    /// A stream that has written nothing yet, and will begin with `opening`.
    pub fn new(
        common: &Common,
        (socket, framing): (TcpStream, Framing),
        opening: &str,
        cursor: Cursor,
        record: Arc<StreamRecord>,
        expiry: Option<Expiry>,
        (open_count, place): (OpenCount, ClientPermit),
    ) -> Stream {
        common.metrics.streams.inc();
        let now = Instant::now();
        let opening = WriteBuffer::plain(framing, framing.frame(opening));
        Stream {
            socket,
            framing,
            cursor,
            record,
            held: Some(Box::new(PendingWrite::new(opening, now, common))),
            written_at: now,
            beat_at: now + jittered(common.sse.heartbeat),
            drains: false,
            completed: None,
            unasked_bytes: 0,
            ages_at: common.end_of_a_life(),
            expiry: expiry.map(Box::new),
            _open_count: open_count,
            _place: place,
        }
    }

    /// When it has something to do, whatever happens until then.
    pub fn due(&self, common: &Common) -> Instant {
        let flowing = || {
            let expires = self.expiry.as_ref().map(|expiry| expiry.next());
            [expires, self.cursor.due()].into_iter().flatten().fold(self.beat_at, Instant::min)
        };
        let held = |held: &PendingWrite| {
            let stalls = Some(held.since + common.limits.borrow().stall);
            let patience = (!held.is_least).then_some(held.since + GIVE_BACK_AFTER);
            let expires = self.expiry.as_ref().map(|expiry| expiry.at);
            [stalls, patience, expires, held.cut_at].into_iter().flatten().fold(held.look_at, Instant::min)
        };
        self.held.as_deref().map_or_else(flowing, held)
    }

    /// Writes the opening, and what there is for its client already.
    pub fn begin(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        if let Some(held) = self.held.take() {
            let mut buffer = held.buffer;
            if let Poll::Ready(frames) = self.next_frames(turn) {
                buffer.frames = frames.into();
            }
            self.write(turn, buffer)?;
        }
        self.attend(turn)
    }

    /// Does what is due.
    pub fn act(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        if self.held.is_some() {
            self.wait_on(turn)
        } else if self.expiry.as_ref().is_some_and(|expiry| expiry.next() <= turn.now) {
            self.expire(turn)
        } else if self.beat_at <= turn.now {
            self.beat(turn)
        } else {
            // The worker goes on with `flow`, which sees what has come to its end.
            Ok(())
        }
    }

    /// Takes what there is for its client and writes it, as long as the socket has room.
    pub fn flow(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        while self.held.is_none() && self.completed.is_none() {
            let Poll::Ready(frames) = self.next_frames(turn) else {
                self.completed = self.cursor.completed();
                let Some(completed) = self.completed else { return Ok(()) };
                let last_words =
                    [&self.framing.frame(&self.bye(turn.common.retry(), completed.as_str())), self.framing.end()];
                self.write_plain(turn, last_words.concat().into())?;
                break;
            };
            self.written_at = turn.now;
            self.write(turn, WriteBuffer { frames: frames.into(), ..WriteBuffer::plain(self.framing, Bytes::new()) })?;
        }
        match self.completed {
            Some(completed) if self.held.is_none() => Err(End::Completed(completed)),
            Some(_) | None => Ok(()),
        }
    }

    fn next_frames(&mut self, turn: &Turn<'_>) -> Poll<Vec<Frame>> {
        self.cursor.poll_next(&mut Context::from_waker(&turn.wakers.feeds))
    }

    /// Looks after the socket: ignores what its client sends, writes on where it has room again.
    pub fn attend(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        let mut cx = Context::from_waker(&turn.wakers.socket);
        self.ignore(&mut cx)?;
        self.go_on(turn)?;
        self.flow(turn)
    }

    /// Reads what its client sends, up to a bound, and finds out whether it has closed.
    fn ignore(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        while let Poll::Ready(ready) = self.socket.poll_read_ready(cx) {
            let mut ignored = [0; 512];
            match ready.and_then(|()| self.socket.try_read(&mut ignored)) {
                Ok(0) => return Err(End::ClientClosed),
                Ok(read) => self.unasked_bytes += read as u32,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(End::ClientClosed),
            }
            if self.unasked_bytes > UNASKED_BYTES_MAX {
                return Err(End::ClientClosed);
            }
        }
        Ok(())
    }

    /// Writes what is held, as the socket has room.
    fn go_on(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        while let Some(mut held) = self.held.take() {
            let has_room = self.socket.poll_write_ready(&mut Context::from_waker(&turn.wakers.socket)).is_ready();
            let wrote = if has_room { self.write_some(turn.common, &mut held.buffer)? } else { Wrote::Nothing };
            match wrote {
                Wrote::All if held.cut_at.is_some() && !self.drains => self.leave_later(turn),
                Wrote::All => {}
                Wrote::Some => held.since = turn.now,
                Wrote::Nothing => {}
            }
            if !matches!(wrote, Wrote::All) {
                self.held = Some(held);
            }
            if !has_room {
                break;
            }
        }
        Ok(())
    }

    /// Is to end at a moment of its own; if its client does not read, when the time for that is over.
    pub fn drain(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        match &mut self.held {
            // It may not read again within the time that is left. What it lacks it will ask for.
            Some(held) => held.cut_at = Some(turn.now + turn.common.drain.spread),
            None => self.leave_later(turn),
        }
        Ok(())
    }

    fn leave_later(&mut self, turn: &Turn<'_>) {
        self.drains = true;
        self.beat_at = turn.now + moment_within(turn.common.drain.spread);
    }

    /// Says why it ends, where its client is to know, and lets go of everything. The body gets no last chunk: there is
    /// more to come, on another connection.
    pub fn end(mut self, end: End, common: &Common) {
        let farewell = match end {
            End::Drained => Some((common.retry(), "draining")),
            End::MaxLifetime => Some((common.retry() / 10, "max_life")),
            End::Expired => Some((common.retry(), "token_expired")),
            End::ClientClosed
            | End::ClientGone
            | End::Stalled
            | End::Memory
            | End::WriteFailed
            | End::Cut
            | End::ExpiredUnread
            | End::Completed(_)
            | End::Failed => None,
        };
        if let Some((retry, reason)) = farewell {
            let reason = if self.cursor.format() == Format::Ndjson { end.as_str() } else { reason };
            let bye = self.bye(retry, reason);
            let _ = self.socket.try_write(&self.framing.frame(&bye));
        }
        let Stream { record, socket, cursor, _open_count, _place, .. } = self;
        // Before the metric says so, there is room for another.
        drop((socket, cursor, _open_count, _place));
        common.metrics.streams.dec();
        common.metrics.streams_ended.with_label_values(&[end.as_str()]).inc();
        common.registry.close(record, end.as_str()).log();
    }

    /// The last event of the stream.
    fn bye(&mut self, retry: Duration, reason: &str) -> String {
        let id = self.cursor.settled_position();
        wire::bye(self.cursor.format(), retry, reason, id.as_ref().map(|id| id as &dyn Display))
    }

    /// Warns of the token's end, or ends at it.
    fn expire(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        let Some(expiry) = &mut self.expiry else { return Ok(()) };
        if std::mem::replace(&mut expiry.warned, true) {
            return Err(End::Expired);
        }
        let id = self.cursor.settled_position();
        let warning =
            wire::token_expiring(self.cursor.format(), expiry.expires, id.as_ref().map(|id| id as &dyn Display));
        self.write_plain(turn, self.framing.frame(&warning))
    }

    fn beat(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        if self.drains {
            return Err(End::Drained);
        }
        if turn.common.age() >= self.ages_at {
            return Err(End::MaxLifetime);
        }
        self.check_peer(turn.common)?;
        let heartbeat = turn.common.sse.heartbeat;
        let mut next = jittered(heartbeat);
        // Looked at here and not at every write, which would cost each event a turn of the timer.
        let quiet = turn.now.saturating_duration_since(self.written_at);
        if quiet < heartbeat / 2 {
            next = next.saturating_sub(quiet);
        } else if let Some(id) = self.beat_position() {
            self.write_plain(turn, self.framing.frame(&wire::position(self.cursor.format(), &id)))?;
            self.cursor.tell(&self.record.progress, u64::MAX);
        } else {
            self.write_plain(turn, self.framing.heartbeat())?;
        }
        self.beat_at = turn.now + next;
        Ok(())
    }

    /// The position that a heartbeat tells. An NDJSON reader knows no comments: its heartbeats are positions.
    fn beat_position(&mut self) -> Option<Position> {
        match self.cursor.format() {
            Format::Raw | Format::Json => self.cursor.quiet_position(),
            Format::Ndjson => self.cursor.settled_position(),
        }
    }

    /// Has waited for room until now.
    fn wait_on(&mut self, turn: &Turn<'_>) -> Result<(), End> {
        let (common, now) = (turn.common, turn.now);
        let Some(held) = &mut self.held else { return Ok(()) };
        if held.cut_at.is_some_and(|at| at <= now) {
            return Err(End::Cut);
        }
        if self.expiry.as_ref().is_some_and(|expiry| expiry.at <= now) {
            return Err(End::ExpiredUnread);
        }
        if held.since + common.limits.borrow().stall <= now {
            return Err(End::Stalled);
        }
        if !held.is_least && held.since + GIVE_BACK_AFTER <= now {
            held.is_least = true;
            let WriteBuffer { frames, begun, .. } = &mut held.buffer;
            let mut events = frames.iter().skip(1).map(|frame| u64::from(frame.events)).sum();
            frames.truncate(1);
            if let Some(first) = frames.front_mut() {
                if let Some((event, written, left)) = first.begun_event(*begun, &common.memory) {
                    (*first, *begun, events) = (event, written, events + left);
                }
                self.cursor.give_back_after(first.sequence, events);
            }
        }
        let is_slow = common.memory.is_high() && held.began + LARGE_FOR <= now;
        // One that takes nothing at all is let go sooner: others come as fast as events do.
        let is_stuck = common.memory.is_high() && held.since + GIVE_BACK_AFTER <= now;
        if held.is_large() && (is_slow || is_stuck) {
            return Err(End::Memory);
        }
        if held.look_at <= now {
            held.look_at = now + held.look_every(common);
            self.check_peer(common)?;
        }
        Ok(())
    }

    fn write_plain(&mut self, turn: &Turn<'_>, plain: Bytes) -> Result<(), End> {
        self.write(turn, WriteBuffer::plain(self.framing, plain))
    }

    /// Writes, and holds what there is no room for.
    fn write(&mut self, turn: &Turn<'_>, mut buffer: WriteBuffer) -> Result<(), End> {
        if let Wrote::All = self.write_some(turn.common, &mut buffer)? {
            return Ok(());
        }
        if buffer.frames.is_empty() {
            self.cursor.let_go();
        }
        self.held = Some(Box::new(PendingWrite::new(buffer, turn.now, turn.common)));
        self.go_on(turn)
    }

    /// Writes as much as there is room for, and takes it off `buffer`.
    fn write_some(&mut self, common: &Common, buffer: &mut WriteBuffer) -> Result<Wrote, End> {
        let mut wrote = Wrote::Nothing;
        while !buffer.is_empty() {
            match buffer.write_to(&self.socket) {
                Ok(written) => {
                    wrote = Wrote::Some;
                    let metrics = &common.metrics;
                    metrics.bytes_delivered.inc_by(written as u64);
                    metrics.writes.inc_by(u64::from(!buffer.frames.is_empty()));
                    let Whole { count, reached, newest_stored } = buffer.take_off(written);
                    metrics.events_delivered.inc_by(count);
                    self.record.wrote(count, written);
                    if let Some(reached) = reached {
                        self.cursor.tell(&self.record.progress, reached);
                    }
                    if let Some(stored) = newest_stored {
                        metrics.delivery_seconds.observe(seconds_since(stored));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(wrote),
                Err(_) => return Err(End::WriteFailed),
            }
        }
        Ok(Wrote::All)
    }

    fn check_peer(&self, common: &Common) -> Result<(), End> {
        if liveness::is_gone(&self.socket, 2 * common.sse.heartbeat) { Err(End::ClientGone) } else { Ok(()) }
    }
}

/// How much the socket had room for.
enum Wrote {
    Nothing,
    Some,
    All,
}

impl PendingWrite {
    fn new(buffer: WriteBuffer, since: Instant, common: &Common) -> PendingWrite {
        let is_least = buffer.frames.is_empty();
        let cut_at = common.draining.is_cancelled().then_some(since + common.drain.spread);
        let mut held = PendingWrite { buffer, began: since, since, is_least, look_at: since, cut_at };
        held.look_at = since + held.look_every(common);
        held
    }

    fn look_every(&self, common: &Common) -> Duration {
        if self.is_large() { GIVE_BACK_AFTER.min(common.sse.heartbeat) } else { common.sse.heartbeat }
    }

    fn is_large(&self) -> bool {
        self.buffer.frames.iter().map(|frame| frame.block.len()).sum::<usize>() > LARGE_BYTES
    }
}

/// The frames that were written to their end.
#[derive(Default)]
struct Whole {
    count: u64,
    /// The sequence of the last of them.
    reached: Option<u64>,
    newest_stored: Option<Timestamp>,
}

impl WriteBuffer {
    fn plain(framing: Framing, plain: Bytes) -> WriteBuffer {
        WriteBuffer { framing, plain, frames: VecDeque::new(), begun: 0 }
    }

    fn is_empty(&self) -> bool {
        self.plain.is_empty() && self.frames.is_empty()
    }

    fn write_to(&self, socket: &TcpStream) -> io::Result<usize> {
        let mut begun = self.begun;
        let pieces = self.frames.iter().flat_map(|frame| frame.pieces(self.framing)).map(|piece| {
            let written = begun.min(piece.len());
            begun -= written;
            &piece[written..]
        });
        let mut pieces = std::iter::once(&*self.plain).chain(pieces).filter(|piece| !piece.is_empty());
        match (pieces.next(), pieces.next()) {
            // Most often there is one, and room for it: tokio, which keeps what it knows of that elsewhere, need not be
            // asked.
            (Some(only), None) => match send(socket.as_raw_fd(), only, MsgFlags::MSG_NOSIGNAL) {
                Err(Errno::EWOULDBLOCK) => socket.try_write(only),
                sent => Ok(sent?),
            },
            (first, second) => {
                let pieces = first.into_iter().chain(second).chain(pieces).take(PIECES_MAX);
                let pieces: Vec<_> = pieces.map(IoSlice::new).collect();
                socket.try_write_vectored(&pieces)
            }
        }
    }

    /// Takes what was written off the front.
    fn take_off(&mut self, written: usize) -> Whole {
        let mut whole = Whole::default();
        let part = self.plain.len().min(written);
        self.plain.advance(part);
        self.begun += written - part;
        while let Some(frame) = self.frames.front() {
            let length: usize = frame.pieces(self.framing).iter().map(|piece| piece.len()).sum();
            if self.begun < length {
                break;
            }
            self.begun -= length;
            whole.count += u64::from(frame.events);
            whole.reached = Some(frame.sequence);
            whole.newest_stored = frame.stored.or(whole.newest_stored);
            self.frames.pop_front();
        }
        whole
    }
}

/// A moment within `spread`, another one for each stream, so that clients of a node that drains do not return together.
fn moment_within(spread: Duration) -> Duration {
    spread.mul_f64(rand::rng().random_range(0.0..1.0))
}

/// By two clocks: the broker's and this node's.
fn seconds_since(stored: Timestamp) -> f64 {
    Timestamp::now().duration_since(stored).as_secs_f64().max(0.0)
}

impl End {
    pub fn as_str(self) -> &'static str {
        match self {
            End::ClientClosed => "client-closed",
            End::ClientGone => "client-gone",
            End::Stalled => "stalled",
            End::Memory => "memory",
            End::WriteFailed => "write-failed",
            End::Drained => "drained",
            End::Cut => "cut",
            End::MaxLifetime => "aged",
            End::Expired | End::ExpiredUnread => "token-expired",
            End::Completed(completed) => completed.as_str(),
            End::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_a_node_that_drains_end_all_over_the_time_that_is_left() {
        let spread = Duration::from_secs(10);
        let mut tenths = [0; 10];
        for _ in 0..10_000 {
            tenths[moment_within(spread).as_secs() as usize] += 1;
        }
        assert!(tenths.iter().all(|count| (800..1200).contains(count)), "{tenths:?}");
    }
}

//! Writes one stream to one client: a lean task that owns the socket, from the first event to the last byte.
//!
//! The response's head has been written before (see `http::connection`); from here on there are only plain bytes, the
//! same for everyone. A client that reads slowly is written to when its socket has room; what waits for it waits in the
//! feed or in history, never here: at most one frame that has been begun.

mod peer;

use std::{collections::VecDeque, io, io::IoSlice, net::TcpStream as StdTcpStream, sync::Arc, time::Duration};

use bytes::{Buf, Bytes};
use rand::RngExt;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{self, Config},
    hub::{Cursor, Frame, Opening, jittered},
    metrics::Metrics,
    shutdown::Tasks,
    sse,
};

/// How much a client that does not read holds in the kernel, beyond what it has not acknowledged, in bytes. Without it:
/// 2.8 MB (measured).
const NOTSENT_BYTES: u32 = 16 * 1024;
/// A client that takes nothing for so long is not only slow for a moment: what waits for it is given back.
const PATIENCE: Duration = Duration::from_millis(250);
/// Bytes that a client may send after its request, all ignored, before it is taken for broken.
const UNASKED_BYTES_MAX: usize = 64 * 1024;
/// Frames that one write carries at most; the kernel takes 1,024 pieces.
const PIECES_MAX: usize = 64;

/// All streams of this node: counts and caps them, and ends them on drain.
#[derive(Clone)]
pub struct Deliveries {
    slots: Arc<Semaphore>,
    sse: config::Sse,
    stall: Duration,
    drain: config::Drain,
    draining: CancellationToken,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

/// The right to open one stream.
pub struct Admission {
    deliveries: Deliveries,
    slot: OwnedSemaphorePermit,
}

/// Why a stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    ClientClosed,
    /// It acknowledged nothing for two heartbeats.
    ClientGone,
    /// It is there, and has taken nothing for longer than is allowed.
    Stalled,
    WriteFailed,
    Drained,
    /// Drained while its client did not read: within a frame, after which nothing may be written.
    Cut,
}

impl Deliveries {
    /// Streams whose tasks run on, and are counted by, `tasks`.
    pub fn new(config: &Config, metrics: Arc<Metrics>, tasks: Tasks) -> Deliveries {
        Deliveries {
            slots: Arc::new(Semaphore::new(config.limits.streams.min(Semaphore::MAX_PERMITS))),
            sse: config.sse.clone(),
            stall: config.limits.stall,
            drain: config.drain.clone(),
            draining: CancellationToken::new(),
            metrics,
            tasks,
        }
    }

    /// Room for one more stream, if there is.
    pub fn admit(&self) -> Option<Admission> {
        let slot = self.slots.clone().try_acquire_owned().ok()?;
        Some(Admission { deliveries: self.clone(), slot })
    }

    /// Ends every stream at its own moment, and waits until the last has ended.
    pub async fn drain(&self) {
        self.draining.cancel();
        self.tasks.finished().await;
    }

    /// How long this client is to wait before it reconnects: between one and two times the configured time, so that
    /// clients that lost their connections together do not return together.
    pub fn retry(&self) -> Duration {
        self.sse.retry.mul_f64(rand::rng().random_range(1.0..2.0))
    }
}

impl Admission {
    /// Delivers what `cursor` yields to `socket` until one of the two, or this node, ends.
    ///
    /// # Errors
    /// When the socket can't be taken over by this runtime.
    pub fn deliver(self, socket: StdTcpStream, opening: Opening, cursor: Cursor) -> io::Result<()> {
        let Admission { deliveries, slot } = self;
        let tasks = deliveries.tasks.clone();
        // The latency of the last piece of a burst is worth more than full packets.
        socket.set_nodelay(true)?;
        socket2::SockRef::from(&socket).set_tcp_notsent_lowat(NOTSENT_BYTES)?;
        tasks.spawn_uncut(async move {
            let metrics = deliveries.metrics.clone();
            let end = match TcpStream::from_std(socket) {
                Ok(socket) => {
                    metrics.streams.inc();
                    let end = Delivery { socket, cursor, deliveries, unasked_bytes: 0 }.run(opening).await;
                    // Before the metric says so, there is room for another.
                    drop(slot);
                    metrics.streams.dec();
                    end
                }
                Err(_) => End::WriteFailed,
            };
            metrics.streams_ended.with_label_values(&[end.as_str()]).inc();
        });
        Ok(())
    }
}

struct Delivery {
    socket: TcpStream,
    cursor: Cursor,
    deliveries: Deliveries,
    unasked_bytes: usize,
}

impl Delivery {
    async fn run(mut self, opening: Opening) -> End {
        match self.stream(opening).await {
            Ok(never) => match never {},
            Err(End::Drained) => {
                let farewell = sse::farewell(self.deliveries.retry(), "this node is going away, please reconnect");
                let _ = self.socket.try_write(&farewell);
                End::Drained
            }
            Err(end) => end,
        }
    }

    async fn stream(&mut self, opening: Opening) -> Result<std::convert::Infallible, End> {
        let draining = self.deliveries.draining.clone();
        let mut end_at = None;
        let heartbeat = self.deliveries.sse.heartbeat;
        let beat = tokio::time::sleep(jittered(heartbeat));
        tokio::pin!(beat);
        let mut written_at = Instant::now();

        self.open(opening).await?;
        loop {
            tokio::select! {
                frames = self.cursor.next() => {
                    self.write(frames).await?;
                    written_at = Instant::now();
                }
                closed = closed(&self.socket, &mut self.unasked_bytes) => return Err(closed),
                () = &mut beat => {
                    // Re-armed here and not at every write, which would cost each event a turn of the timer.
                    self.check_peer()?;
                    let quiet = written_at.elapsed();
                    let mut next = jittered(heartbeat);
                    if quiet < heartbeat / 2 {
                        next = next.saturating_sub(quiet);
                    } else {
                        let block = match self.cursor.quiet_position() {
                            Some(id) => sse::position(&id),
                            None => Bytes::from_static(sse::HEARTBEAT),
                        };
                        self.write_all(block).await?;
                    }
                    beat.as_mut().reset(Instant::now() + next);
                }
                () = draining.cancelled(), if end_at.is_none() => {
                    let moment = self.deliveries.drain.spread.mul_f64(rand::rng().random_range(0.0..1.0));
                    end_at = Some(Instant::now() + moment);
                }
                () = tokio::time::sleep_until(end_at.unwrap_or_else(Instant::now)), if end_at.is_some() => {
                    return Err(End::Drained);
                }
            }
        }
    }

    async fn open(&mut self, opening: Opening) -> Result<(), End> {
        let retry = self.deliveries.retry();
        match opening {
            Opening::Position(id) => self.write_all(sse::opening(retry, Some(&id))).await,
            Opening::Snapshot => self.write_all(sse::opening(retry, None)).await,
            Opening::Gap(gap) => {
                self.write_all(sse::opening(retry, None)).await?;
                self.write_all(gap.bytes).await
            }
        }
    }

    /// Writes frames as the socket has room. When it has none for a while, what was not begun goes back to the cursor.
    async fn write(&mut self, frames: Vec<Frame>) -> Result<(), End> {
        let mut frames = VecDeque::from(frames);
        while !frames.is_empty() {
            let pieces =
                frames.iter().flat_map(|frame| [&frame.id_line, &frame.block]).filter(|piece| !piece.is_empty());
            let pieces: Vec<_> = pieces.take(PIECES_MAX).map(|piece| IoSlice::new(piece)).collect();
            match self.socket.try_write_vectored(&pieces) {
                Ok(written) => {
                    self.deliveries.metrics.bytes_delivered.inc_by(written as u64);
                    let whole = take_off(&mut frames, written);
                    self.deliveries.metrics.events_delivered.inc_by(whole);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Ok(room) = tokio::time::timeout(PATIENCE, self.room()).await {
                        room?;
                        continue;
                    }
                    frames.truncate(1);
                    self.cursor.give_back_after(frames[0].sequence);
                    self.room().await?;
                }
                Err(_) => return Err(End::WriteFailed),
            }
        }
        Ok(())
    }

    async fn write_all(&mut self, mut bytes: Bytes) -> Result<(), End> {
        while bytes.has_remaining() {
            match self.socket.try_write(&bytes) {
                Ok(written) => {
                    self.deliveries.metrics.bytes_delivered.inc_by(written as u64);
                    bytes.advance(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.room().await?,
                Err(_) => return Err(End::WriteFailed),
            }
        }
        Ok(())
    }

    /// Waits until the client has taken some of what was written: as long as it is there, and not longer than allowed.
    async fn room(&mut self) -> Result<(), End> {
        let stalled_at = Instant::now() + self.deliveries.stall;
        let heartbeat = self.deliveries.sse.heartbeat;
        loop {
            tokio::select! {
                writable = self.socket.writable() => return writable.map_err(|_| End::WriteFailed),
                closed = closed(&self.socket, &mut self.unasked_bytes) => return Err(closed),
                () = tokio::time::sleep_until(stalled_at) => return Err(End::Stalled),
                () = tokio::time::sleep(heartbeat) => self.check_peer()?,
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

/// Takes what was written off the front of `frames`, and says how many of them that was to the end.
fn take_off(frames: &mut VecDeque<Frame>, mut written: usize) -> u64 {
    let mut whole = 0;
    while let Some(frame) = frames.front_mut() {
        for piece in [&mut frame.id_line, &mut frame.block] {
            let part = piece.len().min(written);
            piece.advance(part);
            written -= part;
        }
        if !frame.block.is_empty() {
            break;
        }
        frames.pop_front();
        whole += 1;
    }
    whole
}

/// Resolves when the client has closed its side. Whatever else it sends is ignored, up to a bound.
async fn closed(socket: &TcpStream, unasked_bytes: &mut usize) -> End {
    let mut ignored = [0; 512];
    loop {
        if socket.readable().await.is_err() {
            return End::ClientClosed;
        }
        match socket.try_read(&mut ignored) {
            Ok(0) => return End::ClientClosed,
            Ok(read) => *unasked_bytes += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => return End::ClientClosed,
        }
        if *unasked_bytes > UNASKED_BYTES_MAX {
            return End::ClientClosed;
        }
    }
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            End::ClientClosed => "client-closed",
            End::ClientGone => "client-gone",
            End::Stalled => "stalled",
            End::WriteFailed => "write-failed",
            End::Drained => "drained",
            End::Cut => "cut",
        }
    }
}

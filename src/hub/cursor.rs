//! One client's place in a feed. Ahead of the log it waits; in the log it takes everything available; behind the log it
//! reads history until it is inside again. Keeps a place, not a queue: what a client has not taken is not kept for it.

use std::collections::VecDeque;

use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::watch;

use super::{
    Hub,
    backoff::Backoff,
    feed::{Reader, Take},
    resume,
};
use crate::{
    broker::{From, Page, Read},
    event::EventId,
    sse::{self, Format, Frame, GapReason},
};

pub struct Cursor {
    reader: Reader,
    moved: watch::Receiver<()>,
    format: Format,
    /// Everything up to here has been handed over, or is known not to exist.
    position: EventId,
    /// Frames of a page that were not handed over yet.
    ahead: VecDeque<Frame>,
    /// Where the page that they came from proves its reader to be after them.
    ahead_proven: u64,
    /// What is being fetched. Kept here, so that [`Cursor::next`] can be dropped and called again.
    fetching: Option<BoxFuture<'static, Fetched>>,
}

enum Fetched {
    Page(Page),
    /// The feed was closed; this is the place in the one that follows it, and what is missing in between.
    Moved(Reader, EventId, Option<Frame>),
}

impl Cursor {
    pub(super) fn new(reader: Reader, position: EventId, format: Format, ahead: VecDeque<Frame>) -> Cursor {
        let moved = reader.feed.moved();
        Cursor { reader, moved, format, position, ahead, ahead_proven: 0, fetching: None }
    }

    /// Waits for the next frames: at least one, and at most a write's worth, unless a single one is larger.
    ///
    /// May be dropped at any await and called again; nothing is lost or repeated.
    pub async fn next(&mut self) -> Vec<Frame> {
        loop {
            if let Some(fetching) = &mut self.fetching {
                let fetched = fetching.await;
                self.fetching = None;
                if let Some(gap) = self.arrive(fetched) {
                    return vec![gap];
                }
            }
            if !self.ahead.is_empty() {
                return self.take_ahead();
            }
            // Seen before looking, so that what moves after the look wakes us.
            self.moved.mark_unchanged();
            let hub = &self.reader.hub;
            match self.reader.feed.take(self.position.sequence, self.format, hub.0.settings.write_bytes) {
                Take::Frames(frames) => {
                    self.position.sequence = frames.last().expect("at least one frame").sequence;
                    return frames;
                }
                // The feed lives as long as `reader`, so its sender does.
                Take::Nothing { .. } => self.moved.changed().await.expect("the feed is kept by its reader"),
                Take::Behind => self.fetching = Some(self.read_history()),
                Take::Closed => self.fetching = Some(self.resume()),
            }
        }
    }

    /// Gives back what was handed over after `sequence` and can't be delivered now: it will come again. Lets go of
    /// everything that was read ahead, so that a client that does not read costs no more than an idle one.
    pub fn give_back_after(&mut self, sequence: u64) {
        self.position.sequence = self.position.sequence.min(sequence);
        self.ahead.clear();
    }

    /// The position to tell a client that has been handed everything there is, if it has moved without an event.
    pub fn quiet_position(&mut self) -> Option<EventId> {
        let at_rest = self.fetching.is_none() && self.ahead.is_empty();
        match self.reader.feed.take(self.position.sequence, self.format, 0) {
            Take::Nothing { proven } if at_rest && proven > self.position.sequence => {
                self.position.sequence = proven;
                Some(self.position)
            }
            _ => None,
        }
    }

    fn take_ahead(&mut self) -> Vec<Frame> {
        let bytes_max = self.reader.hub.0.settings.write_bytes;
        let mut bytes = 0;
        let mut frames = vec![];
        while let Some(frame) = self.ahead.front() {
            if !frames.is_empty() && bytes + frame.bytes.len() > bytes_max {
                break;
            }
            bytes += frame.bytes.len();
            frames.extend(self.ahead.pop_front());
        }
        let last = frames.last().expect("`ahead` is not empty").sequence;
        self.position.sequence = if self.ahead.is_empty() { last.max(self.ahead_proven) } else { last };
        frames
    }

    /// Takes over what was fetched. A gap goes alone, so that nothing after it is ever given back across it.
    fn arrive(&mut self, fetched: Fetched) -> Option<Frame> {
        match fetched {
            Fetched::Moved(reader, position, gap) => {
                self.moved = reader.feed.moved();
                self.reader = reader;
                self.position = position;
                gap
            }
            Fetched::Page(page) if page.epoch != self.position.epoch => {
                self.reader.retire();
                None
            }
            Fetched::Page(page) => {
                let EventId { epoch, sequence } = self.position;
                let gap = (page.first > sequence + 1).then(|| {
                    let resumed = EventId { epoch, sequence: page.first - 1 };
                    self.reader.hub.gap(&self.position.to_string(), resumed, GapReason::Expired)
                });
                let kept = page.events.iter().filter(|event| event.sequence >= page.first);
                self.ahead = kept.map(|event| sse::event(epoch, event, self.format)).collect();
                self.ahead_proven = page.proven;
                let resumed = gap.as_ref().map_or(sequence, |gap| gap.sequence);
                self.position.sequence = if self.ahead.is_empty() { resumed.max(page.proven) } else { resumed };
                gap
            }
        }
    }

    fn read_history(&self) -> BoxFuture<'static, Fetched> {
        let hub = self.reader.hub.clone();
        let filter = self.reader.feed.filter.clone();
        let from = From::After(self.position.sequence);
        async move {
            let mut backoff = Backoff::new();
            loop {
                match hub.read_history(Read { filter: filter.clone(), from, until: 0 }).await {
                    Ok(page) => return Fetched::Page(page),
                    Err(error) => tracing::debug!(%filter, %error, "reading history failed"),
                }
                backoff.wait().await;
            }
        }
        .boxed()
    }

    fn resume(&self) -> BoxFuture<'static, Fetched> {
        let hub: Hub = self.reader.hub.clone();
        let filter = self.reader.feed.filter.clone();
        let (position, format) = (self.position, self.format);
        async move {
            let mut backoff = Backoff::new();
            loop {
                match resume::again(hub.clone(), filter.clone(), position, format).await {
                    Ok((reader, position, gap)) => return Fetched::Moved(reader, position, gap),
                    Err(error) => tracing::debug!(%filter, %error, "resuming failed"),
                }
                backoff.wait().await;
            }
        }
        .boxed()
    }
}

//! A client that believes what it is told, and a judge of whether it was told everything.

use std::collections::{HashMap, HashSet};

use futures_util::FutureExt;
use proptest::sample::Index;

use super::{
    selections::{WANTED, Wanted},
    stream::{Stored, Stream, Streams},
};
use crate::{
    event::{Epoch, Event, EventId},
    hub::{Cursor, Hub, NewFilters, Opening, Start, StartAt, tests::frames_of},
    position::{Position, Tag},
    subject::Filter,
    wire::{Format, Framing},
};

/// Where a client begins.
#[derive(Clone, Debug)]
pub enum Begin {
    Now,
    First,
    Last(u64),
    AtTimeOf(Index),
    Snapshot,
    /// With the last id of another one, whatever its filters.
    WhereIs(usize),
}

impl Begin {
    pub fn start(&self, streams: &Streams) -> Option<StartAt> {
        let stored = &streams.now().stored;
        match self {
            Begin::Now => Some(StartAt::Now),
            Begin::First => Some(StartAt::First),
            Begin::Last(count) => Some(StartAt::Last(*count)),
            Begin::AtTimeOf(_) if stored.is_empty() => None,
            Begin::AtTimeOf(index) => Some(StartAt::Time(stored[index.index(stored.len())].event.time)),
            Begin::Snapshot => Some(StartAt::Snapshot),
            Begin::WhereIs(_) => None,
        }
    }
}

pub struct Client {
    cursor: Option<Cursor>,
    filters: Vec<Filter>,
    /// What it wants, and after which places that was something else.
    wanted: &'static Wanted,
    wanted_before: Vec<(&'static Wanted, Position)>,
    /// The last id that it was told.
    pub position: Option<Position>,
    /// After this, everything is owed; and, of a snapshot, these as long as they are kept.
    begun: Option<Position>,
    state: Vec<(Epoch, u64)>,
    got: Vec<(usize, Event)>,
    gaps: Vec<Gap>,
}

impl Default for Client {
    fn default() -> Client {
        Client {
            cursor: None,
            filters: vec![],
            wanted: &WANTED[0],
            wanted_before: vec![],
            position: None,
            begun: None,
            state: vec![],
            got: vec![],
            gaps: vec![],
        }
    }
}

#[derive(Debug)]
struct Gap {
    requested: Position,
    resumed: Position,
}

impl Client {
    pub async fn join(hub: &Hub, streams: &Streams, filters: &[&str], at: StartAt, wanted: &'static Wanted) -> Client {
        let filters = filters.iter().map(|text| Filter::parse(text).unwrap()).collect();
        let mut client = Client { filters, wanted, ..Client::default() };
        let start = Start { last_event_id: None, at: at.clone(), new: NewFilters::Lowest };
        let Ok((opening, cursor)) = hub.subscribe(&client.filters, start, wanted.options()).await else {
            return client;
        };
        client.cursor = Some(cursor);
        client.begun = client.open(streams, opening);
        if client.begun.is_none() {
            let stream = streams.now();
            client.begun = Some(EventId { epoch: stream.epoch, sequence: stream.last() }.into());
            let state = stream.snapshot(&client.filters, stream.last());
            let state = state.filter(|event| wanted.passes(stream.epoch, event));
            client.state = state.map(|event| (stream.epoch, event.sequence)).collect();
        }
        client.check_beginning(streams, at);
        client
    }

    /// Takes an opening; the position that it tells, if any. After a gap, what was asked for is owed or named.
    fn open(&mut self, streams: &Streams, opening: Opening) -> Option<Position> {
        match opening {
            Opening::Snapshot => None,
            Opening::Position(position) => {
                self.moves_to(streams, position.clone());
                Some(position)
            }
            Opening::Gap(gap) => {
                self.receive(streams, gap.block(Format::Raw).text());
                self.gaps.last().map(|gap| &gap.requested).or(self.position.as_ref()).cloned()
            }
        }
    }

    /// That it begins where it asked to.
    fn check_beginning(&self, streams: &Streams, at: StartAt) {
        let (Some(position), stream) = (&self.position, streams.now()) else { return };
        for filter in &self.filters {
            let passes = |event: &&Event| filter.matches(&event.subject) && self.wanted.passes(stream.epoch, event);
            let kept = || stream.kept(stream.last()).filter(passes);
            let owed = kept().filter(|event| event.sequence > position.of(Tag::of(filter))).count();
            match &at {
                StartAt::First => assert_eq!(owed, kept().count(), "not from the first"),
                StartAt::Last(count) => {
                    let first = self.first_of_last(stream, filter, *count as usize);
                    assert_eq!(owed, kept().filter(|event| event.sequence >= first).count(), "not the last {count}");
                }
                StartAt::Time(time) => {
                    assert_eq!(owed, kept().filter(|event| event.time >= *time).count(), "not from {time}");
                }
                StartAt::Now | StartAt::After(_) | StartAt::Snapshot => {}
            }
        }
    }

    /// With which event a filter begins that is to begin with its last so many: filters that overlap, directly or by way of
    /// others, begin together, with the earliest.
    fn first_of_last(&self, stream: &Stream, filter: &Filter, count: usize) -> u64 {
        let mut together = vec![filter];
        while let Some(more) = self
            .filters
            .iter()
            .find(|other| !together.contains(other) && together.iter().any(|filter| filter.overlaps(other)))
        {
            together.push(more);
        }
        let first = |filter: &Filter| {
            let kept = stream.kept(stream.last()).filter(|event| filter.matches(&event.subject));
            kept.rev().take(count).last().map_or(u64::MAX, |event| event.sequence)
        };
        together.into_iter().map(first).min().expect("there is at least the filter itself")
    }

    /// A client that was told no id yet resumes without one.
    pub fn leave(&mut self) {
        self.cursor = None;
        if self.position.is_none() {
            *self = Client::default();
        }
    }

    pub async fn come_back(&mut self, hub: &Hub, streams: &Streams, wanted: Option<&'static Wanted>) {
        let (None, Some(position)) = (&self.cursor, self.position.clone()) else { return };
        if let Some(wanted) = wanted {
            self.wanted_before.push((std::mem::replace(&mut self.wanted, wanted), position.clone()));
        }
        let start = Start { last_event_id: Some(position.to_string()), at: StartAt::Now, new: NewFilters::Lowest };
        if let Ok((opening, cursor)) = hub.subscribe(&self.filters, start, self.wanted.options()).await {
            self.cursor = Some(cursor);
            if let Opening::Position(told) = &opening {
                let stands =
                    |position: &Position| self.filters.iter().map(|filter| position.of(Tag::of(filter))).collect();
                let [told, asked]: [Vec<u64>; 2] = [stands(told), stands(&position)];
                assert_eq!(told, asked, "it goes on elsewhere");
            }
            self.open(streams, opening);
        }
    }

    /// Takes frames if there are any, of which so many arrive.
    pub async fn take(&mut self, streams: &Streams, arrive: usize) {
        let Some(cursor) = &mut self.cursor else { return };
        for _turn in 0..20 {
            if let Some(frames) = frames_of(cursor).now_or_never() {
                let Some(last) = arrive.min(frames.len()).checked_sub(1) else {
                    return self.leave();
                };
                cursor.give_back_after(frames[last].sequence, 0);
                for frame in &frames[..=last] {
                    self.receive(streams, &frame.pieces(Framing::Close).concat());
                }
                return;
            }
            tokio::task::yield_now().await;
        }
        cursor.let_go();
    }

    pub async fn take_all(&mut self, streams: &Streams) {
        loop {
            let Some(cursor) = &mut self.cursor else { return };
            let Ok(frames) = tokio::time::timeout(super::SETTLES, frames_of(cursor)).await else { return };
            for frame in frames {
                self.receive(streams, &frame.pieces(Framing::Close).concat());
            }
        }
    }

    pub fn beat(&mut self, streams: &Streams) {
        if let Some(position) = self.cursor.as_mut().and_then(Cursor::quiet_position) {
            self.moves_to(streams, position);
        }
    }

    /// Takes one block: an event or a gap.
    fn receive(&mut self, streams: &Streams, block: &[u8]) {
        let text = std::str::from_utf8(block).unwrap();
        let (fields, id) = text.rsplit_once("\nid: ").unwrap_or_else(|| panic!("no id: {text}"));
        let position: Position = id.trim_end().parse().unwrap();
        match fields.split_once("data: ").unwrap() {
            ("event: tidegate.gap\n", data) => self.miss(streams, serde_json::from_str(data).unwrap()),
            (_, data) => {
                let data: serde_json::Value = serde_json::from_str(data).unwrap();
                self.get(streams, data["id"].as_str().unwrap().parse().unwrap());
            }
        }
        self.moves_to(streams, position);
    }

    /// Each event once, each subject's in order, and none that was not asked for.
    fn get(&mut self, streams: &Streams, id: EventId) {
        let number = streams.number(id.epoch);
        let event = &streams.0[number].stored[id.sequence as usize - 1].event;
        assert!(self.filters.iter().any(|filter| filter.matches(&event.subject)), "{id} was not asked for");
        assert!(self.wanted.passes(id.epoch, event), "{id} is sifted out");
        let before = self.got.iter().rev().find(|(_, before)| before.subject == event.subject);
        let in_order = before.is_none_or(|(then, before)| (*then, before.sequence) < (number, id.sequence));
        assert!(in_order, "{id} is repeated or out of order");
        self.got.push((number, event.clone()));
    }

    /// A gap is told only where something is gone. (Of a time or a count, nobody knows whether it was of these.)
    fn miss(&mut self, streams: &Streams, data: serde_json::Value) {
        let text = |key: &str| data[key].as_str().unwrap_or_else(|| panic!("{data} has no {key}"));
        if text("requested").starts_with('-') || text("requested").ends_with('Z') {
            assert!(streams.now().first > 1, "nothing has been dropped: {data}");
            return;
        }
        let parsed = |key| text(key).parse::<Position>().unwrap_or_else(|_| panic!("{data} has no {key}"));
        let gap = Gap { requested: parsed("requested"), resumed: parsed("resumed") };
        let Gap { requested, resumed } = &gap;
        let stream = &streams.0[streams.number(resumed.epoch)];
        match text("reason") {
            "expired" => {
                assert_eq!(requested.epoch, resumed.epoch);
                let lost = |filter: &Filter| requested.of(Tag::of(filter)) + 1 < stream.first;
                assert!(self.filters.iter().any(lost), "nothing has expired after {requested}");
            }
            "recreated" => assert!(streams.number(requested.epoch) < streams.number(resumed.epoch), "{data}"),
            other => panic!("there is no reason to say {other}"),
        }
        self.gaps.push(gap);
    }

    /// Nobody is told of what is not stored, or goes back, unless it is over nothing that the filter matches.
    fn moves_to(&mut self, streams: &Streams, position: Position) {
        let stream = &streams.0[streams.number(position.epoch)];
        for filter in &self.filters {
            let now = position.of(Tag::of(filter));
            assert!(now <= stream.last(), "{position} is beyond the stream's end");
            if let Some(before) = self.position.as_ref().filter(|before| before.epoch == position.epoch) {
                let again = stream
                    .stored
                    .iter()
                    .skip(now as usize)
                    .take_while(|stored| stored.event.sequence <= before.of(Tag::of(filter)));
                // What was removed is not there to be handed over again.
                let is_matched = |Stored { event, is_removed }: &Stored| {
                    !is_removed && filter.matches(&event.subject) && self.wanted.passes(stream.epoch, event)
                };
                assert!(!again.into_iter().any(is_matched), "from {before} back to {position}");
            }
        }
        self.position = Some(position);
    }

    /// That everything owed was delivered, or named in a gap; or, where there is an interval, something newer of its subject was.
    pub fn check(&self, streams: &Streams) {
        let Some(begun) = &self.begun else { return };
        let got: HashSet<_> = self.got.iter().map(|(number, event)| (*number, event.sequence)).collect();
        let oldest = streams.number(begun.epoch);
        let mut settled = HashMap::new();
        let newest_first = || streams.0.iter().enumerate().skip(oldest).rev();
        let all =
            newest_first().flat_map(|(number, stream)| stream.stored.iter().rev().map(move |s| (number, stream, s)));
        for (number, stream, Stored { event, is_removed }) in all {
            let by: Vec<_> = self.filters.iter().filter(|filter| filter.matches(&event.subject)).collect();
            let is_behind = |position: &Position| self.is_behind(streams, number, event, position);
            let wanted = self.wanted_then(streams, number, event);
            if by.is_empty() || is_behind(begun) || !wanted.passes(stream.epoch, event) {
                continue;
            }
            let is_told = self.gaps.iter().any(|gap| gap.names(streams, stream, event.sequence, &by));
            let is_settled = *is_removed || is_told || got.contains(&(number, event.sequence));
            let is_newer_settled = settled.get(&event.subject).copied().unwrap_or(false);
            let is_fine = is_settled || wanted.every.is_some() && is_newer_settled;
            assert!(is_fine, "{}-{} is missing: {:?}", stream.epoch, event.sequence, self.gaps);
            settled.insert(event.subject.clone(), is_settled || is_newer_settled);
        }
        let (now, number) = (streams.now(), streams.0.len() - 1);
        for (_, sequence) in self.state.iter().filter(|(epoch, _)| *epoch == now.epoch) {
            let Some(event) = now.kept(now.last()).find(|event| event.sequence == *sequence) else { continue };
            let wanted = self.wanted_then(streams, number, event);
            let is_newer = |(_, got): &&(usize, Event)| got.subject == event.subject && got.sequence > event.sequence;
            let is_replaced = wanted.every.is_some() && self.got.iter().any(|got| is_newer(&got));
            let has = got.contains(&(number, *sequence)) || is_replaced || !wanted.passes(now.epoch, event);
            assert!(has, "{sequence} is missing of the snapshot");
        }
    }

    /// Whether an event lies behind a position. What lies behind one filter that matches it, is not owed by another.
    fn is_behind(&self, streams: &Streams, number: usize, event: &Event, position: &Position) -> bool {
        let at = streams.number(position.epoch);
        let matching = || self.filters.iter().filter(|filter| filter.matches(&event.subject));
        number < at || number == at && matching().any(|filter| event.sequence <= position.of(Tag::of(filter)))
    }

    /// What it wanted when an event was to come.
    fn wanted_then(&self, streams: &Streams, number: usize, event: &Event) -> &'static Wanted {
        let before = self.wanted_before.iter().find(|(_, up_to)| self.is_behind(streams, number, event, up_to));
        before.map_or(self.wanted, |(wanted, _)| *wanted)
    }
}

impl Gap {
    /// Whether it tells one of these filters that the event is missing.
    fn names(&self, streams: &Streams, stream: &Stream, sequence: u64, filters: &[&Filter]) -> bool {
        let [from, at, to] =
            [self.requested.epoch, stream.epoch, self.resumed.epoch].map(|epoch| streams.number(epoch));
        filters.iter().any(|filter| {
            let after = from < at || from == at && self.requested.of(Tag::of(filter)) < sequence;
            let before = at < to || at == to && sequence <= self.resumed.of(Tag::of(filter));
            after && before
        })
    }
}

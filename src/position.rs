//! How far a client has read, for each filter of its connection: what stands in an `id:`, and comes back in
//! `Last-Event-ID`.
//!
//! Opaque to clients. It has up to three parts:
//!
//! - *An event's id*, `0k3f9x-1042`: everything up to this sequence has been seen.
//! - *A witness*, `.mgk2x9vc`: when an event was stored, in milliseconds, as a number in base 36. It is the event of that id;
//!   another one is so many sequences before it (`.mgk2x9vc-3`) or after it (`.mgk2x9vc.3`). A stream that has lost its end
//!   counts anew: its ids are those of other events, and a gateway that has not seen that can tell by the time. Positions
//!   without a witness are valid; of those the gateway believes the id.
//! - *Differences*, `~Wq3x_Ab7.kP0dF9z2`: with several filters, which stand at different places, the id is that of the lowest,
//!   and each filter that stands further on has a tag of its name and the difference. Filters that have been quiet may
//!   stand anywhere between their last event and what is proven, so most have no need to be written.

use std::{fmt, num::NonZeroU64, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::{
    event::{Epoch, Event, EventId},
    subject::Filter,
};

/// Differences that an id may hold. Far more than a connection has filters by default, and few enough to be harmless.
const AHEAD_MAX: usize = 1024;

/// Where a client stands. Everything of a filter up to and including its sequence has been seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub epoch: Epoch,
    /// Where every filter stands that is not told apart.
    base: u64,
    witness: Option<Witness>,
    /// Sorted by tag; the differences are above 0.
    ahead: Vec<(Tag, u64)>,
}

/// When the event of a sequence was stored: another time, another event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Witness {
    pub sequence: u64,
    /// In milliseconds since 1970, and not before.
    millis: NonZeroU64,
}

/// Stands for a filter's name: 36 bits of its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag([u8; Tag::CHARS]);

/// A text that is no position of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an id of this gateway: an id is taken as it is from the `id:` of an event")]
pub struct PositionError;

impl Tag {
    const CHARS: usize = 6;

    pub fn of(filter: &Filter) -> Tag {
        let text = URL_SAFE_NO_PAD.encode(&Sha256::digest(filter.as_str())[..6]);
        Tag(text.as_bytes()[..Tag::CHARS].try_into().expect("48 bits are 8 characters"))
    }
}

impl Position {
    /// The position at which the filters stand at least at `base`, and some further on.
    pub fn new(epoch: Epoch, base: u64, filters: impl IntoIterator<Item = (Tag, u64)>) -> Position {
        let further = filters.into_iter().filter(|(_, sequence)| *sequence > base);
        let mut ahead: Vec<_> = further.map(|(tag, sequence)| (tag, sequence - base)).collect();
        ahead.sort_unstable();
        Position { epoch, base, witness: None, ahead }
    }

    /// The position behind an event, which is its own witness.
    pub fn behind(epoch: Epoch, event: &Event) -> Position {
        let witness = Witness::new(event.sequence, event.time);
        Position { epoch, base: event.sequence, witness, ahead: vec![] }
    }

    /// The same position with another witness, if there is one.
    pub fn with_witness(self, witness: Option<Witness>) -> Position {
        Position { witness: witness.or(self.witness), ..self }
    }

    /// An event that tells by its time whether the stream is still the one that this is a position of.
    pub fn witness(&self) -> Option<Witness> {
        self.witness
    }

    /// The id without anything else, if there is nothing else but a witness.
    pub fn id(&self) -> Option<EventId> {
        self.ahead.is_empty().then_some(EventId { epoch: self.epoch, sequence: self.base })
    }

    /// Whether it tells filters apart.
    pub fn names_filters(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Whether it names this filter: it stands above the lowest.
    pub fn names(&self, tag: Tag) -> bool {
        self.ahead.binary_search_by_key(&tag, |(tag, _)| *tag).is_ok()
    }

    /// Where the filter with this tag stands. One that the position does not know begins at the lowest.
    pub fn of(&self, tag: Tag) -> u64 {
        match self.ahead.binary_search_by_key(&tag, |(tag, _)| *tag) {
            Ok(at) => self.base.saturating_add(self.ahead[at].1),
            Err(_) => self.base,
        }
    }
}

impl From<EventId> for Position {
    fn from(id: EventId) -> Position {
        Position { epoch: id.epoch, base: id.sequence, witness: None, ahead: vec![] }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", EventId { epoch: self.epoch, sequence: self.base })?;
        if let Some(Witness { sequence, millis }) = self.witness {
            write!(f, ".{}", Base36(millis.get()))?;
            match (sequence.checked_sub(self.base), self.base.checked_sub(sequence)) {
                (Some(after @ 1..), _) => write!(f, ".{}", Base36(after))?,
                (_, Some(before @ 1..)) => write!(f, "-{}", Base36(before))?,
                _ => {}
            }
        }
        for (number, (Tag(tag), difference)) in self.ahead.iter().enumerate() {
            let separator = if number == 0 { '~' } else { '.' };
            let tag = str::from_utf8(tag).expect("base64 is ASCII");
            write!(f, "{separator}{tag}{}", Base36(*difference))?;
        }
        Ok(())
    }
}

impl FromStr for Position {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Position, PositionError> {
        let (id, ahead) = match text.split_once('~') {
            None => (text, vec![]),
            Some((id, ahead)) => (id, ahead.split('.').map(parse_difference).collect::<Result<_, _>>()?),
        };
        let (id, witness) = match id.split_once('.') {
            None => (id, None),
            Some((id, witness)) => (id, Some(witness)),
        };
        let EventId { epoch, sequence: base } = id.parse().map_err(|_| PositionError)?;
        let witness = witness.map(|text| Witness::parse(text, base)).transpose()?;
        let sorted = ahead.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let possible = ahead.iter().all(|(_, difference)| base.checked_add(*difference).is_some());
        if !sorted || !possible || ahead.len() > AHEAD_MAX {
            return Err(PositionError);
        }
        Ok(Position { epoch, base, witness, ahead })
    }
}

impl Witness {
    /// `None` for what was stored before 1970.
    pub fn new(sequence: u64, time: Timestamp) -> Option<Witness> {
        let millis = u64::try_from(time.as_millisecond()).ok().and_then(NonZeroU64::new)?;
        Some(Witness { sequence, millis })
    }

    /// The millisecond in which the event was stored: its beginning.
    pub fn time(self) -> Timestamp {
        let millis = i64::try_from(self.millis.get()).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(millis).unwrap_or(Timestamp::MAX)
    }

    /// Whether an event that was stored at `time` may be this one.
    pub fn is_of(self, time: Timestamp) -> bool {
        Witness::new(self.sequence, time) == Some(self)
    }

    /// Parses what stands behind the point, in a position with this sequence.
    fn parse(text: &str, base: u64) -> Result<Witness, PositionError> {
        let (time, sequence) = match text.find(['.', '-']) {
            None => (text, base),
            Some(at) => {
                let difference = base36(&text[at + 1..])?;
                let is_after = text.as_bytes()[at] == b'.';
                let sequence = if is_after { base.checked_add(difference) } else { base.checked_sub(difference) };
                (&text[..at], sequence.ok_or(PositionError)?)
            }
        };
        let millis = NonZeroU64::new(base36(time)?).ok_or(PositionError)?;
        Ok(Witness { sequence, millis })
    }
}

/// A number above 0 in base 36, written in the one way that there is.
fn base36(text: &str) -> Result<u64, PositionError> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase());
    if !is_number || text.starts_with('0') {
        return Err(PositionError);
    }
    u64::from_str_radix(text, 36).map_err(|_| PositionError)
}

fn parse_difference(text: &str) -> Result<(Tag, u64), PositionError> {
    let (tag, difference) = text.split_at_checked(Tag::CHARS).ok_or(PositionError)?;
    let is_tag = tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if !is_tag {
        return Err(PositionError);
    }
    let tag = tag.as_bytes().try_into().map_err(|_| PositionError)?;
    Ok((Tag(tag), base36(difference)?))
}

/// A number in base 36, without leading zeros.
struct Base36(u64);

impl fmt::Display for Base36 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 36 {
            Base36(self.0 / 36).fmt(f)?;
        }
        let digit = char::from_digit((self.0 % 36) as u32, 36).expect("less than 36");
        write!(f, "{digit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tag(name: &str) -> Tag {
        Tag::of(&Filter::parse(name).unwrap())
    }

    proptest! {
        #[test]
        fn positions_round_trip(
            seed: u64,
            base in 0..u64::MAX / 2,
            steps in prop::collection::vec(0..u64::MAX / 2, 0..70),
            witness in prop::option::of((0..u64::MAX / 2, 1..4_000_000_000_000i64)),
        ) {
            let epoch = Epoch::from_seed(seed);
            let filters = steps.iter().enumerate().map(|(n, step)| (tag(&format!("f.{n}")), base + step));
            let witness = witness.and_then(|(sequence, millis)| Witness::new(sequence, Timestamp::from_millisecond(millis).unwrap()));
            let position = Position::new(epoch, base, filters).with_witness(witness);
            prop_assert_eq!(position.to_string().parse(), Ok(position.clone()));
            prop_assert_eq!(position.witness(), witness);
            for (n, step) in steps.iter().enumerate() {
                prop_assert_eq!(position.of(tag(&format!("f.{n}"))), base + step);
            }
            prop_assert_eq!(position.of(tag("another")), base);
        }

        #[test]
        fn nothing_else_is_a_position(text in "([0-9a-z]{6}-[0-9]{1,3}(\\.[0-9a-z]{0,9}([.-][0-9a-z]{0,3})?)?(~[A-Za-z0-9_.~-]{0,30})?|\\PC{0,40})") {
            if let Ok(position) = text.parse::<Position>() {
                prop_assert_eq!(position.to_string(), text);
            }
        }
    }

    #[test]
    fn near_misses_are_no_positions() {
        for text in [
            "000000-1~",
            "000000-1~abcdef",
            "000000-1~abcdef0",
            "000000-1~abcdef01",
            "000000-1~abcdef1.",
            "000000-1~abcdef1.abcdef1",
            "000000-1~bbcdef1.abcdef1",
            "000000-1~abcdefA",
            "000000-1~abcdef1~",
            "000000-18446744073709551615~abcdef1",
            "000000-1~abcdé1",
            "~abcdef1",
            "000000-1.",
            "000000-1.0",
            "000000-1.01",
            "000000-1.A",
            "000000-1.a.",
            "000000-1.a.0",
            "000000-1.a.1.1",
            "000000-1.a-2",
            "000000-1.a+1",
            "000000-18446744073709551615.a.1",
            "000000-1.zzzzzzzzzzzzzz",
        ] {
            assert_eq!(text.parse::<Position>(), Err(PositionError), "{text:?}");
        }
        let forged = format!("000000-1~{}", (0..10_000).map(|n| format!("{n:06}1")).collect::<Vec<_>>().join("."));
        assert_eq!(forged.parse::<Position>(), Err(PositionError));
    }

    #[test]
    fn a_witness_is_an_event_before_or_after_the_id_or_of_it() {
        let time = Timestamp::from_millisecond(1_764_000_000_123).unwrap();
        for (sequence, text) in [(7, "000000-7.midc1z7f"), (4, "000000-7.midc1z7f-3"), (44, "000000-7.midc1z7f.11")] {
            let id = EventId { epoch: Epoch::of(0), sequence: 7 };
            let position = Position::from(id).with_witness(Witness::new(sequence, time));
            assert_eq!(position.to_string(), text);
            assert_eq!((position.id(), position.witness().unwrap().time()), (Some(id), time));
        }
        let witness = Witness::new(7, time).unwrap();
        assert!(witness.is_of(time + std::time::Duration::from_micros(999)));
        assert!(!witness.is_of(time + std::time::Duration::from_millis(1)));
    }

    #[test]
    fn sixty_four_filters_of_which_a_dozen_were_busy_fit_two_hundred_bytes() {
        let filters =
            (0..64).map(|n| (tag(&format!("users.{n}.inbox")), if n < 12 { 1_000_000 + n * 977 } else { 999_000 }));
        let position = Position::new(Epoch::from_seed(1), 999_000, filters);
        assert!(position.to_string().len() < 200, "{position}");
    }
}

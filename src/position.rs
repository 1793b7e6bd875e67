//! How far a client has read, for each filter of its connection: what stands in an `id:`, and comes back in
//! `Last-Event-ID`.
//!
//! Opaque to clients. With one filter it is written like an event's id, `0k3f9x-1042`. With several, the filters stand at
//! different places: the lowest is written so, and behind it, for each filter that stands further on, a tag of its
//! name and the difference: `0k3f9x-1042~Wq3x_Ab7.kP0dF9z2`. Filters that have been quiet may stand anywhere between
//! their last event and what is proven, so most have no need to be written.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use crate::{
    event::{Epoch, EventId},
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
    /// Sorted by tag; the differences are above 0.
    ahead: Vec<(Tag, u64)>,
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
        Position { epoch, base, ahead }
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
        Position { epoch: id.epoch, base: id.sequence, ahead: vec![] }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", EventId { epoch: self.epoch, sequence: self.base })?;
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
        let EventId { epoch, sequence: base } = id.parse().map_err(|_| PositionError)?;
        let sorted = ahead.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let possible = ahead.iter().all(|(_, difference)| base.checked_add(*difference).is_some());
        if !sorted || !possible || ahead.len() > AHEAD_MAX {
            return Err(PositionError);
        }
        Ok(Position { epoch, base, ahead })
    }
}

fn parse_difference(text: &str) -> Result<(Tag, u64), PositionError> {
    let (tag, difference) = text.split_at_checked(Tag::CHARS).ok_or(PositionError)?;
    let is_tag = tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    let is_number = difference.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase());
    if !is_tag || !is_number || difference.starts_with('0') {
        return Err(PositionError);
    }
    let tag = tag.as_bytes().try_into().map_err(|_| PositionError)?;
    Ok((Tag(tag), u64::from_str_radix(difference, 36).map_err(|_| PositionError)?))
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
        fn positions_round_trip(seed: u64, base in 0..u64::MAX / 2, steps in prop::collection::vec(0..u64::MAX / 2, 0..70)) {
            let epoch = Epoch::from_seed(seed);
            let filters = steps.iter().enumerate().map(|(n, step)| (tag(&format!("f.{n}")), base + step));
            let position = Position::new(epoch, base, filters);
            prop_assert_eq!(position.to_string().parse(), Ok(position.clone()));
            for (n, step) in steps.iter().enumerate() {
                prop_assert_eq!(position.of(tag(&format!("f.{n}"))), base + step);
            }
            prop_assert_eq!(position.of(tag("another")), base);
        }

        #[test]
        fn nothing_else_is_a_position(text in "([0-9a-z]{6}-[0-9]{1,3}(~[A-Za-z0-9_.~-]{0,30})?|\\PC{0,40})") {
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
        ] {
            assert_eq!(text.parse::<Position>(), Err(PositionError), "{text:?}");
        }
        let forged = format!("000000-1~{}", (0..10_000).map(|n| format!("{n:06}1")).collect::<Vec<_>>().join("."));
        assert_eq!(forged.parse::<Position>(), Err(PositionError));
    }

    #[test]
    fn sixty_four_filters_of_which_a_dozen_were_busy_fit_two_hundred_bytes() {
        let filters =
            (0..64).map(|n| (tag(&format!("users.{n}.inbox")), if n < 12 { 1_000_000 + n * 977 } else { 999_000 }));
        let position = Position::new(Epoch::from_seed(1), 999_000, filters);
        assert!(position.to_string().len() < 200, "{position}");
    }
}

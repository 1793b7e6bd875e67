//! An event, and the id by which a client says how far it has read.

use std::{fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use jiff::Timestamp;

use crate::subject::Subject;

/// One event as the broker stored it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its place in the stream, from 1. Sequences grow with every stored event, whatever its subject.
    pub sequence: u64,
    pub subject: Subject,
    /// When the broker stored it.
    pub time: Timestamp,
    /// When its sender wants it gone, if at all.
    pub expires: Option<Timestamp>,
    pub kind: Option<EventType>,
    pub payload: Bytes,
}

/// The name that a browser listens for (`addEventListener(type, ..)`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventType(Arc<str>);

/// Longest event type, in bytes.
pub const TYPE_BYTES_MAX: usize = 128;
/// Types that begin so are the gateway's own.
pub const TYPE_RESERVED: &str = "tidegate.";

/// Why a text is no event type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventTypeError {
    #[error("an event type has 1 to {TYPE_BYTES_MAX} bytes, this one has {0}")]
    Length(usize),
    #[error("an event type has no control characters (CR, LF, NUL and the like) and no blanks around it")]
    Character,
    #[error("event types beginning with {TYPE_RESERVED:?} are reserved for the gateway")]
    Reserved,
}

impl Event {
    /// Whether its sender wants it gone by now. The stream has dropped it; the node has only not forgotten it yet.
    pub fn has_expired(&self) -> bool {
        self.expires.is_some_and(|at| at <= Timestamp::now())
    }
}

impl EventType {
    /// Parses a type that a publisher named.
    ///
    /// # Errors
    /// When it is empty, longer than [`TYPE_BYTES_MAX`], has control characters or blanks around it (neither an SSE
    /// field nor a NATS header can carry them), or is reserved.
    pub fn parse(text: &str) -> Result<EventType, EventTypeError> {
        if text.is_empty() || text.len() > TYPE_BYTES_MAX {
            return Err(EventTypeError::Length(text.len()));
        }
        if text.chars().any(char::is_control) || text.trim() != text {
            return Err(EventTypeError::Character);
        }
        if text.starts_with(TYPE_RESERVED) {
            return Err(EventTypeError::Reserved);
        }
        Ok(EventType(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which incarnation of the stream a sequence belongs to. A stream that was deleted and made again counts from 1 once
/// more, and has another epoch.
///
/// A stream that has lost its end, and counts anew from there, is another incarnation with the same name: gateways that
/// saw it tell them apart (its *era*), and ids, which have the name alone, do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch {
    name: u32,
    era: u32,
}

impl Epoch {
    const DIGITS: usize = 6;
    const COUNT: u64 = 36u64.pow(Self::DIGITS as u32);

    /// Folds any number that tells incarnations apart into an epoch.
    pub fn from_seed(seed: u64) -> Epoch {
        // SplitMix64's finalizer: seeds are often times, close to one another.
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Epoch { name: ((z ^ (z >> 31)) % Self::COUNT) as u32, era: 0 }
    }

    /// The epoch as a number that fits an atomic.
    pub(crate) fn number(self) -> u32 {
        self.name
    }

    /// The epoch with this [`Epoch::number`].
    pub(crate) fn of(number: u32) -> Epoch {
        Epoch { name: number, era: 0 }
    }

    /// The epoch of the same stream once it counts anew.
    pub(crate) fn rewound(self) -> Epoch {
        Epoch { era: self.era + 1, ..self }
    }

    /// Whether both have the same name in ids.
    pub fn is_named(self, other: Epoch) -> bool {
        self.name == other.name
    }

    /// Whether the stream has counted anew before, as far as this gateway knows.
    pub(crate) fn has_rewound(self) -> bool {
        self.era > 0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [0u8; Self::DIGITS];
        let mut rest = self.name;
        for digit in digits.iter_mut().rev() {
            *digit = b"0123456789abcdefghijklmnopqrstuvwxyz"[(rest % 36) as usize];
            rest /= 36;
        }
        f.write_str(str::from_utf8(&digits).expect("digits are ASCII"))
    }
}

/// A position in the stream: everything up to and including `sequence` has been seen.
///
/// Opaque to clients; written `epoch-sequence`, as in `0k3f9x-1042`: six base-36 digits, a dash, a decimal number
/// without leading zeros. Sequence 0 is the position before the first event.
///
/// ```
/// use tidegate::event::{Epoch, EventId};
/// let id = EventId { epoch: Epoch::from_seed(7), sequence: 1042 };
/// assert_eq!(id.to_string().parse(), Ok(id));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventId {
    pub epoch: Epoch,
    pub sequence: u64,
}

/// A text that is no event id of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an event id of this gateway: an id is taken as it is from the `id:` of an event")]
pub struct EventIdError;

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.sequence)
    }
}

impl FromStr for EventId {
    type Err = EventIdError;

    fn from_str(text: &str) -> Result<EventId, EventIdError> {
        let (epoch, sequence) = text.split_once('-').ok_or(EventIdError)?;
        let base36 = |b: u8| b.is_ascii_digit() || b.is_ascii_lowercase();
        if epoch.len() != Epoch::DIGITS || !epoch.bytes().all(base36) {
            return Err(EventIdError);
        }
        let canonical = sequence == "0" || !sequence.starts_with('0');
        if !canonical || !sequence.bytes().all(|b| b.is_ascii_digit()) {
            return Err(EventIdError);
        }
        Ok(EventId {
            epoch: Epoch::of(u32::from_str_radix(epoch, 36).map_err(|_| EventIdError)?),
            sequence: sequence.parse().map_err(|_| EventIdError)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ids_round_trip(seed: u64, sequence: u64) {
            let id = EventId { epoch: Epoch::from_seed(seed), sequence };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        #[test]
        fn nothing_else_is_an_id(text in "([0-9a-z]{4,7}-[0-9]{1,22}|\\PC{0,40}|[0-9a-zA-Z+. -]{0,12})") {
            if let Ok(id) = text.parse::<EventId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn near_misses_are_no_ids() {
        for text in [
            "",
            "-",
            "000000-",
            "000000",
            "-1",
            "000000-01",
            "000000-+1",
            "000000--1",
            "00000-1",
            "0000000-1",
            "00000A-1",
            "000000-1 ",
            " 000000-1",
            "000000-18446744073709551616",
            "000000-1\n",
            "00000é-1",
        ] {
            assert_eq!(text.parse::<EventId>(), Err(EventIdError), "{text:?}");
        }
    }

    #[test]
    fn types_that_would_break_the_wire_or_pose_as_ours_are_refused() {
        for (text, error) in [
            ("", EventTypeError::Length(0)),
            ("a\nb", EventTypeError::Character),
            ("a\rb", EventTypeError::Character),
            ("a\0b", EventTypeError::Character),
            (" a", EventTypeError::Character),
            ("a ", EventTypeError::Character),
            ("tidegate.gap", EventTypeError::Reserved),
        ] {
            assert_eq!(EventType::parse(text), Err(error), "{text:?}");
        }
        assert_eq!(EventType::parse(&"x".repeat(129)), Err(EventTypeError::Length(129)));
        assert_eq!(EventType::parse("Bestellung bezahlt ✓").unwrap().as_str(), "Bestellung bezahlt ✓");
    }
}

//! Which events of its filters a reader wants, beside their subjects: by type. A sieve saves bytes; it grants nothing.

use std::{fmt, sync::Arc};

use crate::event::{Event, EventType, EventTypeError};

/// Most types that one reader may name.
pub const TYPES_MAX: usize = 32;

/// What a reader wants. Sieves that want the same are equal. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sieve(Arc<Vec<Pattern>>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Pattern {
    /// Events without a type.
    Untyped,
    Exact(EventType),
    /// All types with this beginning, such as `order.`.
    Family(Box<str>),
}

/// Why types are not such.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SieveError {
    #[error("{0:?} is not the type of any event: {1}")]
    Type(String, EventTypeError),
    #[error("one stream takes at most {TYPES_MAX} types, not {0}")]
    TooMany(usize),
}

impl Sieve {
    /// A sieve that lets events of any of these types pass: a type, a family such as `order.*`, or "" for events without one. `None`
    /// if there are none: everything passes.
    ///
    /// # Errors
    /// When one can't be a type, or there are more than [`TYPES_MAX`].
    pub fn of_types<'t>(types: impl Iterator<Item = &'t str>) -> Result<Option<Sieve>, SieveError> {
        let mut patterns = types.map(Pattern::parse).collect::<Result<Vec<_>, _>>()?;
        if patterns.len() > TYPES_MAX {
            return Err(SieveError::TooMany(patterns.len()));
        }
        patterns.sort_unstable();
        patterns.dedup();
        Ok((!patterns.is_empty()).then(|| Sieve(Arc::new(patterns))))
    }

    /// Whether an event is wanted.
    pub fn passes(&self, event: &Event) -> bool {
        self.0.iter().any(|pattern| match (pattern, &event.kind) {
            (Pattern::Untyped, kind) => kind.is_none(),
            (Pattern::Exact(_) | Pattern::Family(_), None) => false,
            (Pattern::Exact(wanted), Some(kind)) => wanted == kind,
            (Pattern::Family(beginning), Some(kind)) => kind.as_str().starts_with(&**beginning),
        })
    }
}

impl Pattern {
    fn parse(text: &str) -> Result<Pattern, SieveError> {
        if text.is_empty() {
            return Ok(Pattern::Untyped);
        }
        let kind = EventType::parse(text).map_err(|error| SieveError::Type(text.to_owned(), error))?;
        match text.strip_suffix('*') {
            Some(beginning) if beginning.is_empty() || beginning.ends_with('.') => {
                Ok(Pattern::Family(beginning.into()))
            }
            Some(_) | None => Ok(Pattern::Exact(kind)),
        }
    }
}

/// As in the query of a request.
impl fmt::Display for Sieve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, pattern) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { "&" };
            match pattern {
                Pattern::Untyped => write!(f, "{separator}type=")?,
                Pattern::Exact(kind) => write!(f, "{separator}type={}", kind.as_str())?,
                Pattern::Family(beginning) => write!(f, "{separator}type={beginning}*")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::subject::Subject;

    fn of(types: &[&str]) -> Sieve {
        Sieve::of_types(types.iter().copied()).unwrap().unwrap()
    }

    fn event(kind: &str) -> Event {
        Event {
            sequence: 1,
            subject: Subject::stored("a"),
            time: Timestamp::UNIX_EPOCH,
            expires: None,
            kind: EventType::parse(kind).ok(),
            payload: "".into(),
        }
    }

    #[test]
    fn types_families_and_none_pass() {
        for (types, passing) in [
            (&["order.paid"][..], &["order.paid"][..]),
            (&["order.*"], &["order.paid", "order.eu.sent", "order."]),
            (&["*"], &["order.paid", "order.eu.sent", "order.", "orders", "x"]),
            (&[""], &[""]),
            (&["", "x"], &["", "x"]),
            (&["order*"], &[]),
        ] {
            let sieve = of(types);
            let all = ["", "order.paid", "order.eu.sent", "order.", "orders", "x"];
            let passed: Vec<_> = all.into_iter().filter(|kind| sieve.passes(&event(kind))).collect();
            assert_eq!(passed, passing, "{types:?}");
        }
    }

    #[test]
    fn the_same_wish_is_the_same_sieve() {
        assert_eq!(of(&["b", "a.*", "b"]), of(&["a.*", "b"]));
        assert_eq!(of(&["b", "", "a.*"]).to_string(), "type=&type=b&type=a.*");
        assert_eq!(Sieve::of_types(std::iter::empty()), Ok(None));
        assert!(matches!(Sieve::of_types(["a\n"].into_iter()), Err(SieveError::Type(..))));
        assert!(matches!(Sieve::of_types(["tidegate.gap"].into_iter()), Err(SieveError::Type(..))));
        assert_eq!(Sieve::of_types(vec!["a"; 33].into_iter()), Err(SieveError::TooMany(33)));
    }
}

//! `type=`: which types of events are wanted.

use std::fmt;

use super::SieveError;
use crate::event::EventType;

/// Most types that one reader may name.
pub const TYPES_MAX: usize = 32;

/// Types of which an event has to have one. Those that name the same are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Types(Vec<Pattern>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Pattern {
    /// Events without a type.
    Untyped,
    Exact(EventType),
    /// All types with this beginning, such as `order.`.
    Family(Box<str>),
}

impl Types {
    /// Any of these: a type, a family such as `order.*`, or "" for events without one. `None` if there are none.
    ///
    /// # Errors
    /// When one can't be a type, or there are more than [`TYPES_MAX`].
    pub fn parse<'t>(types: impl Iterator<Item = &'t str>) -> Result<Option<Types>, SieveError> {
        let mut patterns = types.map(Pattern::parse).collect::<Result<Vec<_>, _>>()?;
        if patterns.len() > TYPES_MAX {
            return Err(SieveError::TooMany(patterns.len()));
        }
        patterns.sort_unstable();
        patterns.dedup();
        Ok((!patterns.is_empty()).then_some(Types(patterns)))
    }

    pub fn contain(&self, kind: Option<&EventType>) -> bool {
        self.0.iter().any(|pattern| match (pattern, kind) {
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

/// As in `type order.*, order.paid`; events without a type are "".
impl fmt::Display for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, pattern) in self.0.iter().enumerate() {
            f.write_str(if number == 0 { "type " } else { ", " })?;
            match pattern {
                Pattern::Untyped => f.write_str("\"\"")?,
                Pattern::Exact(kind) => f.write_str(kind.as_str())?,
                Pattern::Family(beginning) => write!(f, "{beginning}*")?,
            }
        }
        Ok(())
    }
}

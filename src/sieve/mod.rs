//! Which events of its filters a reader wants, beside their subjects: by type (`type=`) and by content (`where=`). A sieve saves
//! bytes; it grants nothing.

mod condition;
mod document;
#[cfg(test)]
mod fuzz;
mod parse;
#[cfg(test)]
mod tests;
mod types;

use std::{fmt, sync::Arc};

pub use self::{
    condition::Condition,
    document::Document,
    parse::{PARENTHESES_MAX, TERMS_MAX, WHERE_BYTES_MAX, WhereError},
    types::{TYPES_MAX, Types},
};
use crate::event::EventTypeError;

/// What a reader wants: both of these, where both are given. Sieves that want the same are equal. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sieve(Arc<(Option<Types>, Option<Condition>)>);

/// Why types are not such.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SieveError {
    #[error("{0:?} is not the type of any event: {1}")]
    Type(String, EventTypeError),
    #[error("one stream takes at most {TYPES_MAX} types, not {0}")]
    TooMany(usize),
}

impl Sieve {
    /// `None` where nothing is asked for: everything passes.
    pub fn new(types: Option<Types>, condition: Option<Condition>) -> Option<Sieve> {
        (types.is_some() || condition.is_some()).then(|| Sieve(Arc::new((types, condition))))
    }

    /// Whether an event is wanted.
    pub fn passes(&self, document: &Document<'_>) -> bool {
        let (types, condition) = &*self.0;
        types.as_ref().is_none_or(|types| types.contain(document.event.kind.as_ref()))
            && condition.as_ref().is_none_or(|condition| condition.holds(document))
    }
}

/// As in `type order.* where @.data.amount > 100`.
impl fmt::Display for Sieve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            (None, None) => Ok(()),
            (Some(types), None) => write!(f, "{types}"),
            (None, Some(condition)) => write!(f, "where {condition}"),
            (Some(types), Some(condition)) => write!(f, "{types} where {condition}"),
        }
    }
}

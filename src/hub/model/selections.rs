//! What clients of the model want of their filters.

use std::{num::NonZeroU32, time::Duration};

use crate::{
    event::{Epoch, Event},
    hub::{Selection, SubscribeOptions},
    sieve::{Condition, Document, Sieve, Types},
    wire::Format,
};

#[derive(Debug)]
pub struct Wanted {
    types: &'static [&'static str],
    condition: Option<&'static str>,
    pub every: Option<Duration>,
    rate: Option<NonZeroU32>,
}

const ALL: Wanted = Wanted { types: &[], condition: None, every: None, rate: None };

pub const WANTED: [Wanted; 9] = [
    ALL,
    Wanted { types: &["x", ""], ..ALL },
    Wanted { condition: Some("@.data.n > 1"), ..ALL },
    Wanted { types: &["y.*"], condition: Some("@.data.n != 2 || @.subject == 'c'"), ..ALL },
    Wanted { every: Some(Duration::from_millis(100)), ..ALL },
    Wanted { every: Some(Duration::from_secs(3)), ..ALL },
    Wanted { condition: Some("@.data.n > 1"), every: Some(Duration::from_secs(1)), ..ALL },
    Wanted { rate: NonZeroU32::new(20), ..ALL },
    Wanted {
        condition: Some("@.data.n < 3"),
        every: Some(Duration::from_millis(200)),
        rate: NonZeroU32::new(20),
        ..ALL
    },
];

impl Wanted {
    fn sieve(&self) -> Option<Sieve> {
        let types = Types::parse(self.types.iter().copied()).unwrap();
        Sieve::new(types, self.condition.map(|text| Condition::parse(text).unwrap()))
    }

    pub fn options(&self) -> SubscribeOptions {
        let selection = Selection { sieve: self.sieve(), every: self.every };
        SubscribeOptions { selection, rate: self.rate, ..SubscribeOptions::all(Format::Raw) }
    }

    pub fn passes(&self, epoch: Epoch, event: &Event) -> bool {
        self.sieve().is_none_or(|sieve| sieve.passes(&Document::new(epoch, event)))
    }
}

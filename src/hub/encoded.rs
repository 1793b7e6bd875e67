//! An event as its readers get it: encoded when it is first asked for in a format, and never again. What the encoded bytes
//! take counts in the node's memory budget for as long as anybody holds them.

use std::sync::OnceLock;

use jiff::Timestamp;

use crate::{
    event::{Epoch, Event},
    memory::{Memory, Part},
    sse::{self, Block, Format},
};

pub(super) struct EncodedEvent {
    pub event: Event,
    raw: OnceLock<Block>,
    json: OnceLock<Block>,
}

/// How the events of one stream of NATS are encoded for one reader.
#[derive(Clone, Copy)]
pub(super) struct Encoder<'m> {
    pub epoch: Epoch,
    pub format: Format,
    pub memory: &'m Memory,
}

impl EncodedEvent {
    pub fn new(event: Event) -> EncodedEvent {
        EncodedEvent { event, raw: OnceLock::new(), json: OnceLock::new() }
    }

    pub fn block(&self, encoder: Encoder<'_>) -> Block {
        let encoded = match encoder.format {
            Format::Raw => &self.raw,
            Format::Json => &self.json,
        };
        encoded.get_or_init(|| encoder.encode(&self.event)).clone()
    }

    /// Whether its sender wants it gone by now. The stream has dropped it; the node has only not forgotten it yet.
    pub fn has_expired(&self) -> bool {
        self.event.expires.is_some_and(|at| at <= Timestamp::now())
    }
}

impl Encoder<'_> {
    pub fn encode(self, event: &Event) -> Block {
        let block = sse::event(self.epoch, event, self.format);
        let held = self.memory.hold(Part::Frames, block.len());
        block.keeping(held)
    }
}

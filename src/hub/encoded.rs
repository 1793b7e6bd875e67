//! An event as its readers get it: encoded when it is first asked for in a format, and never again. What the encoded bytes
//! take counts in the node's memory budget for as long as anybody holds them.

use std::sync::OnceLock;

use crate::{
    event::{Epoch, Event},
    memory::{Memory, Part},
    wire::{self, Block, Format},
};

pub(super) struct EncodedEvent {
    pub event: Event,
    raw: OnceLock<Block>,
    json: OnceLock<Block>,
    /// Boxed, because few events are asked for so.
    ndjson: OnceLock<Box<Block>>,
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
        EncodedEvent { event, raw: OnceLock::new(), json: OnceLock::new(), ndjson: OnceLock::new() }
    }

    /// What it takes as it came, in bytes.
    pub fn bytes(&self) -> usize {
        size_of::<EncodedEvent>() + self.event.payload.len()
    }

    pub fn encoded(&self, encoder: Encoder<'_>) -> Block {
        let encode = || encoder.encode(&self.event);
        match encoder.format {
            Format::Raw => self.raw.get_or_init(encode).clone(),
            Format::Json => self.json.get_or_init(encode).clone(),
            Format::Ndjson => Block::clone(self.ndjson.get_or_init(|| Box::new(encode()))),
        }
    }
}

impl Encoder<'_> {
    pub fn encode(self, event: &Event) -> Block {
        let block = wire::event(self.epoch, event, self.format);
        let held = self.memory.hold(Part::Frames, block.len());
        block.keeping(held)
    }
}

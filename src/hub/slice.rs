//! The next frames of a reader, whatever they come from: a feed's log, a page of history, a page of a snapshot.

use std::sync::Arc;

use jiff::Timestamp;

use super::encoded::{EncodedEvent, Encoder};
use crate::{
    event::Event,
    memory::{Memory, Part},
    wire::Block,
};

/// What follows a position.
pub(super) struct Slice {
    pub blocks: Vec<Found>,
    /// Everything up to here has been looked at.
    pub reached: u64,
}

/// A block at a sequence.
#[derive(Clone)]
pub(super) struct Found {
    pub sequence: u64,
    pub block: Block,
    /// When its event was stored, if it is of one.
    pub stored: Option<Timestamp>,
    /// How many events it is: several, where they are joined; of word of a gap, none.
    pub events: u32,
    /// Where they are joined, the end of each.
    pub joints: Option<Arc<[Joint]>>,
}

/// The end of an event within a block of several.
#[derive(Clone, Copy, Debug)]
pub struct Joint {
    pub sequence: u64,
    pub events: u32,
    /// In bytes.
    pub end: usize,
}

/// How much a reader takes at once. Word of a gap counts as an event.
#[derive(Clone, Copy)]
pub(super) struct Room {
    pub bytes: usize,
    /// At least one.
    pub events: usize,
    /// Whether several events may be one block: the reader wants all there is, under ids that all have, in chunks.
    pub joined: bool,
}

/// Something that may be next for a reader: an event, or word of a gap.
pub(super) trait Item {
    fn sequence(&self) -> u64;
    fn event(&self) -> Option<&Event>;
    fn block(&self, encoder: Encoder<'_>) -> Block;
}

impl Item for EncodedEvent {
    fn sequence(&self) -> u64 {
        self.event.sequence
    }

    fn event(&self) -> Option<&Event> {
        Some(&self.event)
    }

    fn block(&self, encoder: Encoder<'_>) -> Block {
        self.encoded(encoder)
    }
}

impl Slice {
    /// What comes after `position`, in order, but for what has expired or the reader `skips`: as much as there is room for, but
    /// at least one block.
    pub fn of<'i, I: Item + 'i>(
        items: impl IntoIterator<Item = &'i I>,
        position: u64,
        encoder: Encoder<'_>,
        room: Room,
        skips: impl Fn(&Event) -> bool,
    ) -> Slice {
        let (mut blocks, mut bytes, mut reached) = (vec![], 0, position);
        for item in items {
            if !item.event().is_some_and(|event| event.has_expired() || skips(event)) {
                if blocks.len() >= room.events {
                    break;
                }
                let block = item.block(encoder);
                if !blocks.is_empty() && bytes + block.len() > room.bytes {
                    break;
                }
                bytes += block.len();
                let stored = item.event().map(|event| event.time);
                blocks.push(Found {
                    sequence: item.sequence(),
                    block,
                    stored,
                    events: u32::from(stored.is_some()),
                    joints: None,
                });
            }
            reached = item.sequence();
        }
        Slice { blocks, reached }
    }

    /// All its blocks, of which there are several, as one.
    pub fn joined(&self, memory: &Memory) -> Found {
        let block = Block::joined(self.blocks.iter().map(|found| &found.block));
        let held = memory.hold(Part::Frames, block.len());
        let mut end = 0;
        let joints = self.blocks.iter().map(|found| {
            end += found.block.len();
            Joint { sequence: found.sequence, events: found.events, end }
        });
        Found {
            joints: Some(joints.collect()),
            sequence: self.blocks.last().map_or(self.reached, |last| last.sequence),
            block: block.keeping(held),
            stored: self.newest(),
            events: self.blocks.iter().map(|found| found.events).sum(),
        }
    }

    /// When the newest of its events was stored.
    pub fn newest(&self) -> Option<Timestamp> {
        self.blocks.iter().rev().find_map(|found| found.stored)
    }
}

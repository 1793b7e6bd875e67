//! The memory budget of a node (`limits.memory`): how many bytes the node holds on behalf of its clients, and whether that is
//! too much.
//!
//! Nothing here is refused. What is held is counted, by part, for as long as it is held ([`Held`]); the owners of the parts
//! look at the budget and give memory back:
//!
//! | the budget is | what the owners do |
//! |---|---|
//! | [high](Memory::is_high): above five eighths | feeds keep only small events, and other readers are served from history; streams end whose clients have been slow to take a large event |
//! | [full](Memory::is_full): above thirteen sixteenths | new streams are refused, live events are not kept until they are looked at, but read again |
//!
//! The rest is for what the allocator keeps to use it again.
//!
//! Large live events that wait to be looked at have a quarter of the budget at most; what is beyond is read again. (64 filters that
//! match one subject are 64 copies of each of its events.)
//!
//! Reads of history wait for [room](Memory::reserve) before the budget is high, so that they leave room for live events.
//!
//! Bytes of encoded events are counted once, however many clients wait for them: they count for as long as anybody holds them.
//! What the embedded broker keeps has limits of its own (`embedded.bytes`), and is not part of this.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

/// What is not larger is kept even where the node is short of memory: readers of small events notice nothing.
pub const SMALL_BYTES: usize = 8 * 1024;
/// The budget where neither the machine nor its cgroup says how much memory there is, in bytes.
const UNKNOWN_BUDGET: usize = 256 << 20;

/// A handle to the budget of one node.
#[derive(Clone)]
pub struct Memory(Arc<Shared>);

struct Shared {
    limit: AtomicUsize,
    used: AtomicUsize,
    parts: [AtomicUsize; Part::ALL.len()],
    became_high: Notify,
    has_room: Notify,
    /// Those that wait for room, in the order in which they came.
    queue: tokio::sync::Mutex<()>,
}

/// What memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Events in the logs of feeds, as they came.
    Logs,
    /// Events as they are sent: in logs, in pages, and begun by clients.
    Frames,
    /// Events in pages of history, as they came.
    Pages,
    /// Live events that wait to be looked at.
    Hints,
    /// Lines of batches that wait for the broker.
    Batches,
}

/// Some bytes that are held, until this is dropped.
pub struct Held {
    memory: Memory,
    part: Part,
    bytes: usize,
}

impl Part {
    pub const ALL: [Part; 5] = [Part::Logs, Part::Frames, Part::Pages, Part::Hints, Part::Batches];

    pub fn as_str(self) -> &'static str {
        match self {
            Part::Logs => "logs",
            Part::Frames => "frames",
            Part::Pages => "pages",
            Part::Hints => "hints",
            Part::Batches => "batches",
        }
    }
}

impl Memory {
    /// A budget of so many bytes; 0 is a quarter of what there is.
    pub fn new(limit: usize) -> Memory {
        let memory = Memory(Arc::new(Shared {
            limit: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
            parts: Default::default(),
            became_high: Notify::new(),
            has_room: Notify::new(),
            queue: tokio::sync::Mutex::default(),
        }));
        memory.set_limit(limit);
        memory
    }

    /// From now on the budget is another one.
    pub fn set_limit(&self, limit: usize) {
        let limit = if limit == 0 { a_quarter_of_this_machine() } else { limit };
        self.0.limit.store(limit, Ordering::Relaxed);
        if self.is_high() {
            self.0.became_high.notify_one();
        }
        self.0.has_room.notify_waiters();
    }

    pub fn limit(&self) -> usize {
        self.0.limit.load(Ordering::Relaxed)
    }

    /// What one part uses now, in bytes.
    pub fn used_by(&self, part: Part) -> usize {
        self.0.parts[part as usize].load(Ordering::Relaxed)
    }

    /// Whether memory is to be given back: more than five eighths of the budget are used.
    pub fn is_high(&self) -> bool {
        self.0.used.load(Ordering::Relaxed) > self.high()
    }

    /// Whether nothing new is to be begun.
    pub fn is_full(&self) -> bool {
        self.0.used.load(Ordering::Relaxed) > self.limit() / 16 * 13
    }

    /// Whether a part is not to hold so many bytes more: nothing new is to be begun, or the part would have more than a quarter
    /// of the budget. For what can be had again.
    pub fn is_full_for(&self, part: Part, bytes: usize) -> bool {
        self.is_full() || self.used_by(part) + bytes > self.limit() / 4
    }

    /// Counts bytes that are held from now on.
    pub fn hold(&self, part: Part, bytes: usize) -> Held {
        self.take(part, bytes);
        Held { memory: self.clone(), part, bytes }
    }

    /// Resolves when the budget has become high since the last call.
    pub async fn until_high(&self) {
        self.0.became_high.notified().await;
    }

    /// Counts bytes that are to be held, as soon as they do not make the budget high, or the part has no more than a quarter of
    /// it with them. A part that holds nothing gets what it asks for. Served in order: a reader that asks for much would
    /// else wait for ever behind those that ask for little.
    pub async fn reserve(&self, part: Part, bytes: usize) -> Held {
        let _turn = self.0.queue.lock().await;
        loop {
            // Before looking, so that what is given back after the look wakes.
            let has_room = self.0.has_room.notified();
            let (used, of_part) = (self.0.used.load(Ordering::Relaxed), self.used_by(part));
            if used + bytes <= self.high() || of_part + bytes <= self.limit() / 4 || of_part == 0 {
                return self.hold(part, bytes);
            }
            has_room.await;
        }
    }

    fn high(&self) -> usize {
        self.limit() / 8 * 5
    }

    fn take(&self, part: Part, bytes: usize) {
        self.0.parts[part as usize].fetch_add(bytes, Ordering::Relaxed);
        let before = self.0.used.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > self.high() {
            self.0.became_high.notify_one();
        }
    }

    fn give_back(&self, part: Part, bytes: usize) {
        self.0.parts[part as usize].fetch_sub(bytes, Ordering::Relaxed);
        let before = self.0.used.fetch_sub(bytes, Ordering::Relaxed);
        // Below a quarter, no reservation waits.
        if before > self.limit() / 4 {
            self.0.has_room.notify_waiters();
        }
    }
}

impl Held {
    /// The budget that these bytes are part of.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Says that more is held than before, or less.
    pub fn resize(&mut self, bytes: usize) {
        match bytes.checked_sub(self.bytes) {
            Some(0) => {}
            Some(more) => self.memory.take(self.part, more),
            None => self.memory.give_back(self.part, self.bytes - bytes),
        }
        self.bytes = bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.resize(0);
    }
}

fn a_quarter_of_this_machine() -> usize {
    let of_machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total(&text));
    let of_cgroup = cgroup_limits(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
    of_machine.into_iter().chain(of_cgroup).min().map_or(UNKNOWN_BUDGET, |bytes| bytes / 4)
}

/// `MemTotal:  16384000 kB`
fn mem_total(text: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// The limits of the groups that this process is in, and of all above them: version 2 (`0::/a/b`) and version 1
/// (`5:memory:/a/b`).
fn cgroup_limits(groups: &str) -> Vec<usize> {
    let mut limits = vec![];
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers.split(',').any(|name| name == "memory") {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false if controllers.is_empty() => ("/sys/fs/cgroup", "memory.max"),
            false => continue,
        };
        for folder in Path::new(group.trim_start_matches('/')).ancestors() {
            let text = fs::read_to_string(Path::new(root).join(folder).join(file)).unwrap_or_default();
            limits.extend(text.trim().parse::<usize>());
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn what_is_held_counts_until_it_is_dropped() {
        let memory = Memory::new(100);
        let mut logs = memory.hold(Part::Logs, 45);
        let pages = memory.hold(Part::Pages, 15);
        assert!(!memory.is_high());
        assert!(memory.until_high().now_or_never().is_none());
        logs.resize(46);
        assert!(memory.is_high() && !memory.is_full());
        assert!(memory.until_high().now_or_never().is_some());
        logs.resize(60);
        assert!(!memory.is_full() && memory.reserve(Part::Pages, 11).now_or_never().is_none());
        assert!(memory.reserve(Part::Pages, 10).now_or_never().is_some(), "a quarter is for each part");
        let mut waits = Box::pin(memory.reserve(Part::Pages, 11));
        assert!(futures_util::poll!(&mut waits).is_pending());
        assert_eq!((memory.used_by(Part::Logs), memory.used_by(Part::Pages)), (60, 15));
        logs.resize(94);
        assert!(memory.is_full());
        logs.resize(34);
        assert!(waits.now_or_never().is_some());
        drop(pages);
        assert!(
            memory.reserve(Part::Pages, 1000).now_or_never().is_some(),
            "a part that holds nothing is not kept from it"
        );
        drop(logs);
        assert_eq!(memory.0.used.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_wait_for_much_room_is_not_passed_by_waits_for_little() {
        let memory = Memory::new(160);
        let [logs, first] = [memory.hold(Part::Logs, 60), memory.hold(Part::Pages, 40)];
        let mut much = Box::pin(memory.reserve(Part::Pages, 60));
        assert!(futures_util::poll!(&mut much).is_pending());
        let mut little = Box::pin(memory.reserve(Part::Pages, 10));
        assert!(futures_util::poll!(&mut little).is_pending());
        drop(logs);
        assert!(futures_util::poll!(&mut little).is_pending(), "there is room for it, and it is not its turn");
        assert!(futures_util::poll!(&mut much).is_ready());
        drop(first);
        assert!(futures_util::poll!(&mut little).is_ready());
    }

    #[test]
    fn the_default_is_a_part_of_what_there_is() {
        assert_eq!(mem_total("MemFree: 1 kB\nMemTotal:       16384000 kB\n"), Some(16_384_000 * 1024));
        assert_eq!(mem_total("MemTotal: much"), None);
        assert_eq!(cgroup_limits("3:cpu:/a\nnonsense\n"), Vec::<usize>::new());
        let limit = Memory::new(0).limit();
        assert!((1 << 20..1 << 45).contains(&limit), "{limit}");
    }
}

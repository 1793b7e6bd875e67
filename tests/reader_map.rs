//! Every order of the steps in which threads take, leave and forget the same thing (loom).

mod sync {
    pub use loom::sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    };
}

#[path = "../src/hub/reader_map.rs"]
#[expect(dead_code, reason = "not all of it is tried here")]
mod reader_map;

use reader_map::{ReaderMap, Readers, Removed};
use sync::{Arc, AtomicUsize, Ordering};

const NAME: u8 = 7;

/// Something that is told when it is forgotten, as a feed is closed then.
#[derive(Default)]
struct Thing {
    readers: Readers,
    closed: AtomicUsize,
}

impl AsRef<Readers> for Thing {
    fn as_ref(&self) -> &Readers {
        &self.readers
    }
}

struct World {
    reader_map: ReaderMap<u8, Thing>,
    forgotten: AtomicUsize,
    made: AtomicUsize,
}

impl World {
    fn new() -> Arc<World> {
        Arc::new(World { reader_map: ReaderMap::new(), forgotten: AtomicUsize::new(0), made: AtomicUsize::new(0) })
    }

    /// Comes, reads, leaves, and after a while forgets what nobody has wanted since.
    fn read_once(&self) {
        let thing = self.reader_map.take(&NAME, || {
            self.made.fetch_add(1, Ordering::AcqRel);
            Thing::default()
        });
        assert_eq!(thing.closed.load(Ordering::Acquire), 0, "what is read is not forgotten");
        loom::thread::yield_now();
        assert_eq!(thing.closed.load(Ordering::Acquire), 0, "what is read is not forgotten");
        let Some(generation) = thing.readers.leave() else { return };
        if self.reader_map.remove(&NAME, &thing, |thing| thing.readers.any_since(generation)) == Removed::Now {
            thing.closed.store(1, Ordering::Release);
            self.forgotten.fetch_add(1, Ordering::AcqRel);
        }
    }
}

#[test]
fn what_is_read_is_kept_and_what_nobody_reads_is_forgotten_once() {
    let mut orders = loom::model::Builder::new();
    // Switches from a thread that could go on. Any order takes hours; defects that take more than two are rare.
    orders.preemption_bound = Some(2);
    orders.check(|| {
        let world = World::new();
        let others: Vec<_> = (0..2)
            .map(|_| {
                let world = world.clone();
                loom::thread::spawn(move || world.read_once())
            })
            .collect();
        world.read_once();
        others.into_iter().for_each(|other| other.join().unwrap());

        assert!(world.reader_map.all().is_empty(), "nobody reads any more");
        assert_eq!(world.forgotten.load(Ordering::Acquire), world.made.load(Ordering::Acquire), "each once");
    });
}

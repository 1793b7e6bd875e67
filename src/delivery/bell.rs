//! How a porter learns which of its streams have something to do: each has a waker that rings with its number.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// Rings for any number of streams, and is heard by one porter.
#[derive(Default)]
pub(super) struct Bell {
    rung: Mutex<Rung>,
    porter: AtomicWaker,
}

/// The numbers of those that have rung, each once, in the order in which they did.
#[derive(Default)]
struct Rung {
    numbers: Vec<usize>,
    /// One bit each, so that one that rings a thousand times unheard takes no more room than one that rings once.
    marks: Vec<u64>,
}

struct Cord {
    bell: Arc<Bell>,
    number: usize,
}

impl Bell {
    /// What rings with this number.
    pub fn cord(self: &Arc<Bell>, number: usize) -> Waker {
        Arc::new(Cord { bell: self.clone(), number }).into()
    }

    /// The numbers that have rung since the last time. Whoever rings from here on is among the next.
    pub fn poll_rung(&self, cx: &mut Context<'_>) -> Poll<Vec<usize>> {
        self.porter.register(cx.waker());
        let mut rung = self.rung();
        if rung.numbers.is_empty() {
            return Poll::Pending;
        }
        rung.marks.fill(0);
        let numbers = Vec::with_capacity(rung.numbers.len());
        Poll::Ready(std::mem::replace(&mut rung.numbers, numbers))
    }

    fn ring(&self, number: usize) {
        let mut rung = self.rung();
        let (word, bit) = (number / 64, 1 << (number % 64));
        if rung.marks.len() <= word {
            rung.marks.resize(word + 1, 0);
        }
        if rung.marks[word] & bit != 0 {
            return;
        }
        rung.marks[word] |= bit;
        rung.numbers.push(number);
        let is_first = rung.numbers.len() == 1;
        drop(rung);
        if is_first {
            self.porter.wake();
        }
    }

    fn rung(&self) -> MutexGuard<'_, Rung> {
        self.rung.lock().expect("no panic happens while a bell is held")
    }
}

impl Wake for Cord {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.bell.ring(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_that_has_rung_is_heard_once_and_again_when_it_rings_again() {
        let bell = Arc::new(Bell::default());
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(bell.poll_rung(&mut cx), Poll::Pending);

        let cords = [3, 200, 3].map(|number| bell.cord(number));
        cords.iter().for_each(Waker::wake_by_ref);

        assert_eq!(bell.poll_rung(&mut cx), Poll::Ready(vec![3, 200]));
        assert_eq!(bell.poll_rung(&mut cx), Poll::Pending);
        cords[0].wake_by_ref();
        assert_eq!(bell.poll_rung(&mut cx), Poll::Ready(vec![3]));
    }
}

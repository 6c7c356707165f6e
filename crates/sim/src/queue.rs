//! What happens when: a heap of times, in the order of their coming and of their making, and the events
//! beside it, which stay where they are while the heap is put in order.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use base::Instant;

/// Events that are still to come.
pub(crate) struct Queue<E> {
    /// When, the how manieth, and where its event is.
    heap: BinaryHeap<Reverse<(Instant, u64, usize)>>,
    next: u64,
    events: Vec<Option<E>>,
    /// Places without an event.
    free: Vec<usize>,
}

impl<E> Queue<E> {
    pub(crate) fn new() -> Self {
        let (heap, events) = (BinaryHeap::with_capacity(1024), Vec::with_capacity(1024));
        Self { heap, next: 0, events, free: Vec::with_capacity(1024) }
    }

    /// `event` happens at `at`, after whatever else was said to happen then.
    pub(crate) fn push(&mut self, at: Instant, event: E) {
        self.next += 1;
        let place = self.free.pop().unwrap_or(self.events.len());
        if place == self.events.len() {
            self.events.push(Some(event));
        } else {
            self.events[place] = Some(event);
        }
        self.heap.push(Reverse((at, self.next, place)));
    }

    /// The next event.
    pub(crate) fn pop(&mut self) -> Option<(Instant, E)> {
        let Reverse((at, _, place)) = self.heap.pop()?;
        let event = self.events[place].take().expect("an event happens once");
        self.free.push(place);
        Some((at, event))
    }
}

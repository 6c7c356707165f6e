//! A bounded queue, many senders, one receiver (D. Vyukov's, with one consumer). Nobody waits
//! for anybody: a sender that is preempted half-way hides the messages behind its own until it
//! goes on, and then notifies.

use std::mem::MaybeUninit;

use super::sync::{AtomicUsize, Ordering, UnsafeCell};

struct Slot<T> {
    /// `position`: free for the message of that position. `position + 1`: holds it.
    turn: AtomicUsize,
    value: UnsafeCell<MaybeUninit<T>>,
}

pub(crate) struct Queue<T> {
    slots: Box<[Slot<T>]>,
    /// The next position to send to.
    tail: AtomicUsize,
    /// The next position to receive from.
    head: AtomicUsize,
}

// SAFETY: messages move between threads (T: Send); a slot is accessed only by the thread that
// its `turn` has assigned it to.
unsafe impl<T: Send> Sync for Queue<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Queue<T> {}

impl<T> Queue<T> {
    /// A queue for `capacity` messages, rounded up to a power of two above one.
    pub(crate) fn new(capacity: usize) -> Self {
        let slots = (0..capacity.max(2).next_power_of_two())
            .map(|position| Slot {
                turn: AtomicUsize::new(position),
                value: UnsafeCell::new(MaybeUninit::uninit()),
            })
            .collect();
        Self { slots, tail: AtomicUsize::new(0), head: AtomicUsize::new(0) }
    }

    fn slot(&self, position: usize) -> &Slot<T> {
        &self.slots[position & (self.slots.len() - 1)]
    }

    /// Puts `message` at the end, or gives it back if the queue is full.
    pub(crate) fn push(&self, message: T) -> Result<(), T> {
        let mut position = self.tail.load(Ordering::Relaxed);
        loop {
            let slot = self.slot(position);
            let turn = slot.turn.load(Ordering::Acquire);
            if turn == position {
                let next = position.wrapping_add(1);
                match self.tail.compare_exchange_weak(
                    position,
                    next,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => {
                        slot.value.with_mut(|value| {
                            // SAFETY: `turn` was `position`, so the receiver is done with the
                            // slot, and moving `tail` gave this position to this thread alone.
                            unsafe { (*value).write(message) };
                        });
                        slot.turn.store(next, Ordering::Release);
                        return Ok(());
                    }
                    Err(tail) => position = tail,
                }
            } else if turn.wrapping_sub(position).cast_signed() < 0 {
                return Err(message); // still holds the message of one round ago
            } else {
                position = self.tail.load(Ordering::Relaxed);
            }
        }
    }

    /// Takes the first message.
    ///
    /// # Safety
    /// Only one thread at a time calls this.
    pub(crate) unsafe fn pop(&self) -> Option<T> {
        let position = self.head.load(Ordering::Relaxed);
        let slot = self.slot(position);
        if slot.turn.load(Ordering::Acquire) != position.wrapping_add(1) {
            return None;
        }
        let message = slot.value.with_mut(|value| {
            // SAFETY: `turn` says that the sender has finished writing the slot, and no other
            // receiver exists (the caller's promise).
            let value = unsafe { &*value };
            // SAFETY: written by the sender, and read once: `head` and `turn` move on below.
            unsafe { value.assume_init_read() }
        });
        self.head.store(position.wrapping_add(1), Ordering::Relaxed);
        slot.turn.store(position.wrapping_add(self.slots.len()), Ordering::Release);
        Some(message)
    }
}

impl<T> Drop for Queue<T> {
    fn drop(&mut self) {
        // SAFETY: `&mut self`: no other thread has the queue.
        while let Some(message) = unsafe { self.pop() } {
            drop(message);
        }
    }
}

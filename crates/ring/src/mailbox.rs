//! A bounded queue into a reactor's thread, from any number of threads.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::queue::Queue;
use crate::wake::Wakeup;

struct Shared<T> {
    queue: Queue<T>,
    closed: AtomicBool,
    wakeup: Wakeup,
}

/// The sending end of a mailbox. Clones send into the same mailbox.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

/// The receiving end of a mailbox; stays with the reactor's owner.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
}

/// A message that was not sent, given back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrySendError<T> {
    /// The mailbox is full. Try again later, or tell whoever asked that it is overloaded.
    #[error("the mailbox is full")]
    Full(T),
    /// The receiver is gone.
    #[error("the reactor is gone")]
    Closed(T),
}

pub(crate) fn mailbox<T: Send>(capacity: usize, wakeup: Wakeup) -> (Sender<T>, Receiver<T>) {
    let closed = AtomicBool::new(false);
    let shared = Arc::new(Shared { queue: Queue::new(capacity), closed, wakeup });
    (Sender { shared: Arc::clone(&shared) }, Receiver { shared })
}

impl<T: Send> Sender<T> {
    /// Sends `message` and wakes the reactor if it sleeps. Never blocks.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        if self.shared.closed.load(Ordering::Acquire) {
            return Err(TrySendError::Closed(message));
        }
        self.shared.queue.push(message).map_err(TrySendError::Full)?;
        self.shared.wakeup.wake();
        Ok(())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

impl<T: Send> Receiver<T> {
    /// The next message, if there is one. Call it after each turn until it gives `None`, or make
    /// the next turn a busy one: a message that was left behind does not wake the reactor again.
    pub fn receive(&mut self) -> Option<T> {
        // SAFETY: this is the mailbox's only receiver (it cannot be cloned), borrowed mutably.
        unsafe { self.shared.queue.pop() }
    }

    /// True if every sender is gone; what is still in the mailbox can be received.
    pub fn is_orphaned(&self) -> bool {
        Arc::strong_count(&self.shared) == 1
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        // What nobody will receive is dropped here, not with the last sender.
        // SAFETY: this is the mailbox's only receiver.
        while unsafe { self.shared.queue.pop() }.is_some() {}
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receiver")
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// The queue as it is in production (the model check has it on loom's primitives), small
    /// enough for Miri, which sees a race or a message that is read before it is there.
    #[test]
    fn messages_of_two_threads_arrive_once_each_and_in_order() {
        const EACH: u32 = 40;
        let queue = Queue::new(4);
        let mut received = Vec::new();
        thread::scope(|scope| {
            for sender in 0..2 {
                let queue = &queue;
                scope.spawn(move || {
                    for number in 0..EACH {
                        let mut message = Box::new((sender, number));
                        while let Err(refused) = queue.push(message) {
                            message = refused;
                            thread::yield_now();
                        }
                    }
                });
            }
            while received.len() < 2 * EACH as usize {
                // SAFETY: this is the only thread that pops.
                match unsafe { queue.pop() } {
                    Some(message) => received.push(*message),
                    None => thread::yield_now(),
                }
            }
        });
        for sender in 0..2 {
            let numbers = received.iter().filter(|message| message.0 == sender);
            assert!(numbers.map(|message| message.1).eq(0..EACH));
        }
    }
}

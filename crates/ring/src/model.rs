//! The mailbox under loom: every interleaving of its atomics, weak memory included.

use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

mod sync {
    pub(crate) use loom::cell::UnsafeCell;
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
}
#[path = "flag.rs"]
#[expect(dead_code, reason = "the model does not poll")]
mod flag;
#[path = "queue.rs"]
mod queue;

use flag::Flag;
use queue::Queue;

/// Stands for the wake-up eventfd: a level that a signal raises and a wait takes.
#[derive(Default)]
struct Event {
    raised: Mutex<bool>,
    condition: Condvar,
}

impl Event {
    fn signal(&self) {
        *self.raised.lock().unwrap() = true;
        self.condition.notify_one();
    }

    fn wait(&self) {
        let mut raised = self.raised.lock().unwrap();
        while !*raised {
            raised = self.condition.wait(raised).unwrap();
        }
        *raised = false;
    }
}

struct Shared {
    queue: Queue<Box<u32>>,
    flag: Flag,
    event: Event,
}

fn check(senders: u32, each: u32, capacity: usize, preemptions: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let shared = Arc::new(Shared {
            queue: Queue::new(capacity),
            flag: Flag::new(),
            event: Event::default(),
        });
        let threads: Vec<_> = (0..senders)
            .map(|sender| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    for message in 0..each {
                        shared.queue.push(Box::new(sender * each + message)).unwrap();
                        if shared.flag.notify() {
                            shared.event.signal();
                        }
                    }
                })
            })
            .collect();
        // The reactor: as `Reactor::turn` does it, followed by its owner's draining. A wake-up
        // that is lost leaves it waiting for ever, which loom reports as a deadlock.
        let mut received = Vec::new();
        while received.len() < (senders * each) as usize {
            let notified = shared.flag.take();
            if !notified && shared.flag.prepare_sleep() {
                shared.event.wait();
                shared.flag.take();
            }
            // SAFETY: this is the only thread that pops.
            while let Some(message) = unsafe { shared.queue.pop() } {
                received.push(*message);
            }
        }
        for thread in threads {
            thread.join().unwrap();
        }
        for sender in 0..senders {
            let of_sender: Vec<_> = received.iter().filter(|m| *m / each == sender).collect();
            assert!(of_sender.is_sorted(), "a sender's messages keep their order");
        }
        received.sort_unstable();
        assert_eq!(received, (0..senders * each).collect::<Vec<_>>());
    });
}

#[test]
fn one_sender_wakes_the_reactor_every_time() {
    check(1, 2, 2, 4);
}

#[test]
fn two_senders_lose_neither_message_nor_wake_up() {
    check(2, 1, 2, 3);
}

/// A full queue refuses; what was refused is whole.
#[test]
fn a_full_queue_gives_the_message_back() {
    loom::model(|| {
        let queue = Arc::new(Queue::new(2));
        let other = Arc::clone(&queue);
        let thread = thread::spawn(move || {
            let taken = other.push(Box::new(1)).is_ok();
            let taken_too = other.push(Box::new(2)).is_ok();
            usize::from(taken) + usize::from(taken_too)
        });
        let mut sent = usize::from(queue.push(Box::new(3)).is_ok());
        sent += thread.join().unwrap();
        assert_eq!(sent, 2);
        let mut received = 0;
        // SAFETY: the other thread has ended.
        while unsafe { queue.pop() }.is_some() {
            received += 1;
        }
        assert_eq!(received, 2);
    });
}

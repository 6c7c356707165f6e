//! When a sleeping reactor is to be woken, and when it must not go to sleep.
//!
//! ```text
//!            notify                    prepare_sleep
//! NOTIFIED <--------- RUNNING ------------------------> SLEEPING
//!     |      take         ^        take (woke up)          | notify: signal!
//!     +-------------------+--------------------------------+--> NOTIFIED
//! ```
//!
//! Notifying and preparing to sleep change the same word, so one comes first. If it is the
//! notification, `prepare_sleep` refuses. If it is the preparation, whoever notifies sees
//! SLEEPING and signals the eventfd that ends the sleep. Checked under every interleaving by the
//! model in `model.rs`.

use super::sync::{AtomicU32, Ordering};

const RUNNING: u32 = 0;
const NOTIFIED: u32 = 1;
const SLEEPING: u32 = 2;

pub(crate) struct Flag(AtomicU32);

impl Flag {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(RUNNING))
    }

    /// Leaves a notification. True if the reactor sleeps and the caller must signal it.
    /// What the caller wrote before is seen by whoever takes the notification.
    pub(crate) fn notify(&self) -> bool {
        self.0.swap(NOTIFIED, Ordering::AcqRel) == SLEEPING
    }

    /// Takes the notification, if there is one; the reactor is running.
    pub(crate) fn take(&self) -> bool {
        self.0.swap(RUNNING, Ordering::AcqRel) == NOTIFIED
    }

    /// True if there is a notification; for polling.
    pub(crate) fn is_notified(&self) -> bool {
        self.0.load(Ordering::Relaxed) == NOTIFIED
    }

    /// True if the reactor may sleep: from now on, notifying it signals. False if there is a
    /// notification.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.0.compare_exchange(RUNNING, SLEEPING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

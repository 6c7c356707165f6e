//! The primitives under the mailbox. Its model check puts loom's in their place.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// `std`'s cell with loom's interface.
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Runs `access` with a pointer to the value; whether it may be used is up to the caller.
    pub(crate) fn with_mut<R>(&self, access: impl FnOnce(*mut T) -> R) -> R {
        access(self.0.get())
    }
}

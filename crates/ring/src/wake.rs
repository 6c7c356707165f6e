//! Waking a reactor from another thread.

/// Wakes a reactor from any thread: its [`turn`](crate::Reactor::turn) returns, now or the next
/// time it is called. Cheap (one atomic operation) unless the reactor sleeps.
#[derive(Clone, Debug)]
pub struct Wakeup {}

impl Wakeup {
    /// Makes the reactor's current turn, or else its next one, return without sleeping.
    pub fn wake(&self) {
        todo!()
    }
}

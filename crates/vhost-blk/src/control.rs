//! What the control thread asks of the device, and how it waits for the answer.

use core::fmt;

/// A message from a socket's control thread to its device. The shell passes it unopened from its
/// [`ControlSink`] to [`Device::control`](crate::Device::control), in order. Dropping it
/// unanswered ends the front end's connection.
pub struct Control {
    private: (),
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control {{ {:?} }}", self.private)
    }
}

/// The reactor that owned the device is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device's reactor is gone")]
pub struct SinkClosed;

/// How control messages reach the reactor thread that owns the device: usually a mailbox and an
/// eventfd. Called from the control thread; it may block while the mailbox is full, but it does
/// not wait for the answer (the control thread does, with a deadline).
pub trait ControlSink: Send {
    /// Delivers `control`. Messages arrive in the order of delivery.
    fn deliver(&mut self, control: Control) -> Result<(), SinkClosed>;
}

impl<F: FnMut(Control) -> Result<(), SinkClosed> + Send> ControlSink for F {
    fn deliver(&mut self, control: Control) -> Result<(), SinkClosed> {
        self(control)
    }
}

//! A bounded queue into a reactor's thread, from any number of threads.

use std::marker::PhantomData;

/// The sending end of a mailbox. Clones send into the same mailbox.
pub struct Sender<T> {
    _message: PhantomData<T>,
}

/// The receiving end of a mailbox; stays with the reactor's owner.
pub struct Receiver<T> {
    _message: PhantomData<T>,
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

impl<T: Send> Sender<T> {
    /// Sends `message` and wakes the reactor if it sleeps. Never blocks.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        let _ = message;
        todo!()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        todo!()
    }
}

impl<T: Send> Receiver<T> {
    /// The next message, if there is one. Call it after each turn until it gives `None`, or make
    /// the next turn a busy one: a message that was left behind does not wake the reactor again.
    pub fn receive(&mut self) -> Option<T> {
        todo!()
    }

    /// True if every sender is gone; what is still in the mailbox can be received.
    pub fn is_orphaned(&self) -> bool {
        todo!()
    }
}

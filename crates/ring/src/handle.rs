//! Names for what a reactor owns. All are small, `Copy`, and checked when used: a handle that
//! outlived what it named is refused, never mistaken for its successor.

/// The owner's name for an operation; comes back in its completion. The reactor does not look
/// at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub(crate) Key);
    };
}

/// Index and generation of a slab's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

handle! {
    /// An open file or block device.
    DeviceHandle
}
handle! {
    /// A stream socket, TCP or Unix. Valid until its [`Closed`](crate::Completion::Closed).
    ConnectionHandle
}
handle! {
    /// A listening socket.
    ListenerHandle
}
handle! {
    /// A watched eventfd.
    WatchHandle
}

//! Errors: of setting up ([`Error`]), of an operation ([`IoError`]), of a full queue
//! ([`SendError`]).

use std::io;

/// Why something could not be set up. Says what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {kind}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<io::Error>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    pub(crate) fn os(kind: ErrorKind, context: impl Into<String>, source: io::Error) -> Self {
        Self { kind, context: context.into(), source: Some(source) }
    }

    /// What kind of error it is.
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operating system's error number, if it came from there.
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// The kinds of [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// The kernel is older than 6.1.
    #[error("this kernel is too old: Linux 6.1 or later is required")]
    KernelTooOld,
    /// io_uring is switched off or filtered.
    #[error(
        "io_uring is not permitted: set `sysctl kernel.io_uring_disabled=0`, and let the \
         container's seccomp profile pass io_uring_setup, io_uring_enter and io_uring_register"
    )]
    IoUringDenied,
    /// RLIMIT_MEMLOCK is too low for the buffers.
    #[error(
        "the limit on locked memory is too low for the buffers: raise it (LimitMEMLOCK=infinity \
         in the unit, `ulimit -l unlimited`) or configure fewer buffers"
    )]
    LockedMemory,
    /// No memory.
    #[error("out of memory")]
    OutOfMemory,
    /// No file descriptors.
    #[error("out of file descriptors: raise LimitNOFILE")]
    FileDescriptors,
    /// The configuration makes no sense.
    #[error("invalid configuration")]
    InvalidConfig,
    /// Not an address.
    #[error("not an address: use IP:PORT or unix:PATH")]
    InvalidAddress,
    /// There is nothing at this path.
    #[error("not found")]
    NotFound,
    /// The permissions do not allow it.
    #[error("permission denied")]
    PermissionDenied,
    /// Another process (or another part of this one) has the device or the address.
    #[error("in use by another process")]
    InUse,
    /// Neither a regular file nor a block device.
    #[error("neither a regular file nor a block device")]
    NotADevice,
    /// The file system does not do direct I/O.
    #[error("the file system does not support direct I/O (O_DIRECT); use another one")]
    DirectIoUnsupported,
    /// Not an eventfd.
    #[error("not an eventfd")]
    NotAnEventFd,
    /// Any other error of the operating system.
    #[error("the operating system refused")]
    Os,
}

/// Why an operation failed. Nothing is known of the effect of a failed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The operating system's error number.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// The device ended, or stopped making progress, after `done` bytes.
    #[error("only {done} bytes were transferred")]
    Short {
        /// Bytes that were transferred.
        done: usize,
    },
    /// The kernel or the device does not do this (discard).
    #[error("not supported here")]
    Unsupported,
    /// Cancelled, by closing the connection or the reactor.
    #[error("cancelled")]
    Cancelled,
    /// The time allowed for it was over.
    #[error("timed out")]
    TimedOut,
    /// The handle names nothing that is open.
    #[error("closed")]
    Closed,
    /// The range is outside the device or the buffer, or not aligned; or the device is read-only.
    #[error("invalid: {0}")]
    Invalid(&'static str),
}

/// Why a part was not taken into a connection's send queue. The part is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue holds [`SEND_PARTS_MAX`](crate::SEND_PARTS_MAX) parts; a
    /// [`Writable`](crate::Completion::Writable) follows when half of it is free.
    #[error("the send queue is full")]
    Full,
    /// The connection is closed, closing, or has failed.
    #[error("the connection is closed")]
    Closed,
}

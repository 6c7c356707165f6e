//! Kick and call eventfds, which the front end made and still shares.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Reads (and so clears) an eventfd that polled readable. `Ok` also if it was clear already.
/// For shells that poll; an io_uring read of 8 bytes does as well.
pub fn read_eventfd(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut count = [0_u8; 8];
    // SAFETY: `count` is writable for the 8 bytes given, and lives through the call.
    let result = unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    clear_or_error(result)
}

/// Adds one to an eventfd. `Ok` also if it is full, since then the other side is signalled.
pub(crate) fn signal_eventfd(fd: BorrowedFd<'_>) -> io::Result<()> {
    let one = 1_u64.to_ne_bytes();
    // SAFETY: `one` is readable for the 8 bytes given, and lives through the call.
    let result = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    clear_or_error(result)
}

fn clear_or_error(result: isize) -> io::Result<()> {
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock { Ok(()) } else { Err(error) }
}

/// Accepts `file` as an eventfd and makes it non-blocking: anything else a front end passes
/// could block the reactor. (A front end that makes it blocking again *and* fills its counter can
/// still do so; front ends are trusted that far.)
pub(crate) fn checked_eventfd(file: File) -> io::Result<OwnedFd> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if !link.to_string_lossy().starts_with("anon_inode:[eventfd") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is not an eventfd", link.display()),
        ));
    }
    let fd = OwnedFd::from(file);
    make_nonblocking(fd.as_fd())?;
    Ok(fd)
}

/// What reads of the descriptor would wait for, they fail with `WouldBlock` instead.
pub(crate) fn make_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL on an open descriptor has no memory effects.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL on an open descriptor has no memory effects.
    let set = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

//! Looks at the next message of a front end before the `vhost` crate takes it: that crate keeps the
//! back-end channel's socket to itself and has no sender for the one message that a disk needs (see
//! `capacity`). Peeking leaves the message, and its descriptors, where they are.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;
/// Request, flags, size: 4 bytes each.
const HEADER_BYTES: usize = 12;
/// Room for the ancillary data of a message with a few more descriptors than it should have.
const CONTROL_WORDS: usize = 8;

/// Waits for the next message; a new descriptor of its socket if it hands over the back-end channel.
pub(crate) fn next_channel(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut header = [0; HEADER_BYTES];
    let flags = libc::MSG_PEEK | libc::MSG_WAITALL;
    loop {
        // SAFETY: `header` is valid for writes of its length for the call's duration.
        let got = unsafe {
            libc::recv(stream.as_raw_fd(), header.as_mut_ptr().cast(), header.len(), flags)
        };
        match usize::try_from(got) {
            Ok(HEADER_BYTES) => break,
            // The end, or a header cut short by it: the reader will say so.
            Ok(_) => return Ok(None),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    let request = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
    if request == SET_BACKEND_REQ_FD { peek_descriptor(stream) } else { Ok(None) }
}

/// A duplicate of the first descriptor of the message at hand, if it has one.
fn peek_descriptor(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0_u8; 1];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    let mut control = [0_u64; CONTROL_WORDS];
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points to `part` and `control`, which are valid for the call's duration.
    if unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut first = None;
    // SAFETY: `message` was filled in by the kernel.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: not null, so it points to a whole header within `control`.
        let entry = unsafe { *header };
        if entry.cmsg_level == libc::SOL_SOCKET && entry.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: the data of this header begins there.
            let data = unsafe { libc::CMSG_DATA(header) };
            // SAFETY: the length of an empty header is a constant.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (entry.cmsg_len as usize).saturating_sub(empty) / size_of::<libc::c_int>();
            for index in 0..count {
                // SAFETY: `count` descriptors lie there, and index is below that.
                let bytes = unsafe { data.add(index * size_of::<libc::c_int>()) };
                // SAFETY: as above; bytes need no alignment.
                let bytes = unsafe { bytes.cast::<[u8; size_of::<libc::c_int>()]>().read() };
                let fd = libc::c_int::from_ne_bytes(bytes);
                // SAFETY: the kernel has just made it for us; nobody else knows it. Those that are not
                // wanted are closed.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                first.get_or_insert(fd);
            }
        }
        // SAFETY: `header` is one of `message`'s.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(first)
}

//! A vhost-user front end made of raw messages, for what a well-behaved library would not send.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_LOG_BASE: u32 = 6;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;
pub(crate) const SET_DEVICE_STATE_FD: u32 = 42;
pub(crate) const CHECK_DEVICE_STATE: u32 = 43;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

pub(crate) struct FrontEnd {
    pub(crate) socket: UnixStream,
}

pub(crate) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = halves(&[code, flags, u32::try_from(body.len()).unwrap()]);
    bytes.extend_from_slice(body);
    bytes
}

impl FrontEnd {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { socket }
    }

    /// Sends bytes as they are, with descriptors. False if the other side is gone.
    pub(crate) fn raw(&mut self, bytes: &[u8], fds: &[RawFd]) -> bool {
        self.socket.send_with_fds(&[bytes], fds).is_ok()
    }

    /// A message without a reply.
    pub(crate) fn send(&mut self, code: u32, body: &[u8]) {
        assert!(self.raw(&message(code, VERSION, body), &[]));
    }

    /// A message that is acknowledged; true if with success.
    pub(crate) fn set(&mut self, code: u32, body: &[u8], fds: &[RawFd]) -> bool {
        self.raw(&message(code, VERSION | NEED_REPLY, body), fds)
            && self.reply().is_some_and(|(body, _)| body == words(&[0]))
    }

    /// A message that has an answer of its own.
    pub(crate) fn get(&mut self, code: u32, body: &[u8]) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        self.send(code, body);
        self.reply()
    }

    pub(crate) fn get_u64(&mut self, code: u32) -> u64 {
        let (body, _) = self.get(code, &[]).unwrap();
        u64::from_le_bytes(body.try_into().unwrap())
    }

    /// The next message's body and descriptor; `None` at the end of the connection.
    pub(crate) fn reply(&mut self) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        let mut header = [0_u8; 12];
        let mut iovec =
            [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() }];
        let mut fds = [-1; 1];
        // SAFETY: the vector describes `header`, which lives through the call.
        let received = unsafe { self.socket.recv_with_fds(&mut iovec, &mut fds) };
        let (bytes, count) = match received {
            Ok(received) => received,
            Err(error) => {
                assert_ne!(error.errno(), libc::EAGAIN, "neither an answer nor the end in time");
                return None;
            }
        };
        // SAFETY: the descriptor was just received and belongs to nobody else.
        let fd = (count == 1).then(|| unsafe { OwnedFd::from_raw_fd(fds[0]) });
        if bytes != header.len() {
            return None;
        }
        let length = u32::from_le_bytes(header[8..].try_into().unwrap());
        let mut body = vec![0; length as usize];
        self.socket.read_exact(&mut body).ok()?;
        Some((body, fd))
    }

    /// True if the back end has closed the connection.
    pub(crate) fn is_dropped(&mut self) -> bool {
        let _ = self.socket.write_all(&[]);
        self.reply().is_none()
    }

    /// Features and protocol features, all that is offered.
    pub(crate) fn negotiate(&mut self) -> u64 {
        self.send(SET_OWNER, &[]);
        let features = self.get_u64(GET_FEATURES);
        let protocol = self.get_u64(GET_PROTOCOL_FEATURES);
        self.send(SET_PROTOCOL_FEATURES, &words(&[protocol]));
        // Not LOG_ALL: that is for migrations.
        assert!(self.set(SET_FEATURES, &words(&[features & !(1 << 26)]), &[]));
        features
    }

    /// One queue on memory that starts at guest and user address `base` and is all of `memory`.
    pub(crate) fn set_up_queue(
        &mut self,
        memory: &impl AsRawFd,
        bytes: u64,
        base: u64,
        size: u32,
        start: u32,
        eventfds: (RawFd, RawFd),
    ) {
        let (kick, call) = eventfds;
        assert!(self.set(ADD_MEM_REG, &words(&[0, base, bytes, base, 0]), &[memory.as_raw_fd()]));
        assert!(self.set(SET_VRING_NUM, &halves(&[0, size]), &[]));
        assert!(self.set(SET_VRING_BASE, &halves(&[0, start]), &[]));
        let mut addresses = halves(&[0, 0]);
        addresses.extend(words(&[base, base + 0x2000, base + 0x1000, 0]));
        assert!(self.set(SET_VRING_ADDR, &addresses, &[]));
        assert!(self.set(SET_VRING_CALL, &words(&[0]), &[call]));
        assert!(self.set(SET_VRING_KICK, &words(&[0]), &[kick]));
        assert!(self.set(SET_VRING_ENABLE, &halves(&[0, 1]), &[]));
    }
}

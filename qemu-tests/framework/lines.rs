//! Lines from a socket, each awaited with a deadline.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::wait::{Deadline, wait_until};

/// The longest line a peer may send, in bytes: a QMP reply or a line of base64.
const LINE_BYTES_MAX: usize = 1 << 20;

/// A connected socket that is read by line.
#[derive(Debug)]
pub(crate) struct Lines {
    socket: UnixStream,
    received: Vec<u8>,
}

impl Lines {
    /// Connects to the socket at `path`, which may still be about to appear. `alive` reports the
    /// death of the process that should make it.
    pub(crate) fn connect(
        path: &Path,
        deadline: Deadline,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let socket = wait_until(&path.display().to_string(), deadline, || {
            alive()?;
            Ok(UnixStream::connect(path).ok())
        })?;
        Ok(Self { socket, received: Vec::new() })
    }

    /// The next line, without its line break. `None` when the deadline passed before one came.
    pub(crate) fn next(&mut self, deadline: Deadline) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            ensure!(self.received.len() < LINE_BYTES_MAX, "a line longer than {LINE_BYTES_MAX}");
            let Some(remaining) = deadline.remaining() else { return Ok(None) };
            self.socket.set_read_timeout(Some(remaining))?;
            let mut chunk = [0; 16 * 1024];
            match self.socket.read(&mut chunk) {
                Ok(0) => bail!("the peer closed the connection"),
                Ok(length) => self.received.extend_from_slice(&chunk[..length]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error).context("reading from the peer"),
            }
        }
    }

    /// Sends a line; `line` has no line break.
    pub(crate) fn send(&mut self, line: &str, deadline: Deadline) -> Result<()> {
        let remaining = deadline.remaining().context("no time left to send")?;
        self.socket.set_write_timeout(Some(remaining))?;
        self.socket.write_all(format!("{line}\n").as_bytes()).context("sending to the peer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pair() -> (Lines, UnixStream) {
        let (socket, peer) = UnixStream::pair().unwrap();
        (Lines { socket, received: Vec::new() }, peer)
    }

    #[test]
    fn lines_arrive_whole_however_they_are_cut() {
        let (mut lines, mut peer) = pair();
        peer.write_all(b"one\r\ntw").unwrap();
        assert_eq!(lines.next(Deadline::seconds(5)).unwrap().as_deref(), Some("one"));
        let soon = Deadline::after(Duration::from_millis(5));
        assert_eq!(lines.next(soon).unwrap(), None);
        peer.write_all(b"o\nthree\n").unwrap();
        assert_eq!(lines.next(Deadline::seconds(5)).unwrap().as_deref(), Some("two"));
        assert_eq!(lines.next(Deadline::seconds(5)).unwrap().as_deref(), Some("three"));
    }

    #[test]
    fn a_peer_that_goes_away_is_an_error() {
        let (mut lines, peer) = pair();
        drop(peer);
        assert!(lines.next(Deadline::seconds(5)).is_err());
    }

    #[test]
    fn a_socket_that_never_appears_is_an_error_with_its_name() {
        let deadline = Deadline::after(Duration::from_millis(5));
        let error = Lines::connect(Path::new("/nonexistent/s"), deadline, || Ok(())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/s"));
    }
}

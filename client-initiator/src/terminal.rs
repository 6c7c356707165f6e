//! A terminal taken over for a while: another screen, keys one by one, and back as it was. Plain
//! ECMA-48 and xterm sequences, which every terminal of today knows.

use std::io::{self, IsTerminal, Read, Stdin, Stdout, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The alternate screen, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// What a key press means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// q, Escape, Ctrl-C or Ctrl-D, or nobody is there any more.
    Quit,
    /// Any other.
    Other,
}

/// The terminal on standard input and output. Dropping it gives it back.
pub(crate) struct Terminal {
    stdin: Stdin,
    stdout: Stdout,
    before: Termios,
}

impl Terminal {
    /// Takes it over; `None` if it is no terminal.
    pub(crate) fn take() -> io::Result<Option<Self>> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        if !stdin.is_terminal() || !stdout.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        // Keys come at once and are not shown; Ctrl-C is a key, so that the screen is given back.
        raw.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        let terminal = Self { stdin, stdout, before };
        terminal.write(ENTER)?;
        Ok(Some(terminal))
    }

    /// Shows these lines, as far as they fit.
    pub(crate) fn draw(&self, lines: &[String]) -> io::Result<()> {
        let size = tcgetwinsize(&self.stdout)?;
        let (rows, columns) = (usize::from(size.ws_row).max(1), usize::from(size.ws_col).max(1));
        let mut text = "\x1b[H".to_owned();
        for (index, line) in lines.iter().take(rows).enumerate() {
            if index > 0 {
                text.push_str("\r\n");
            }
            // What others told may hold anything; a control character would move the cursor.
            text.extend(line.chars().filter(|c| !c.is_control()).take(columns));
            text.push_str("\x1b[K");
        }
        text.push_str("\x1b[J");
        self.write(&text)
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut stdout = self.stdout.lock();
        stdout.write_all(text.as_bytes())?;
        stdout.flush()
    }

    /// Waits for a key.
    pub(crate) fn key(&self, wait: Duration) -> io::Result<Option<Key>> {
        let mut events = [PollFd::new(&self.stdin, PollFlags::IN)];
        let timeout = Timespec::try_from(wait).map_err(io::Error::other)?;
        match poll(&mut events, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut bytes = [0; 16];
        let count = self.stdin.lock().read(&mut bytes)?;
        Ok(Some(meaning(&bytes[..count])))
    }
}

fn meaning(bytes: &[u8]) -> Key {
    match bytes {
        [] | [b'q' | b'Q' | 0x1b | 3 | 4, ..] if bytes.len() <= 1 => Key::Quit,
        _ => Key::Other,
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = self.write(LEAVE);
        let _ = tcsetattr(&self.stdin, OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        for quit in [&b"q"[..], b"Q", b"\x1b", b"\x03", b""] {
            assert_eq!(meaning(quit), Key::Quit);
        }
        // An arrow begins with Escape, too.
        for other in [&b"x"[..], b"\x1b[A", b" "] {
            assert_eq!(meaning(other), Key::Other);
        }
    }
}

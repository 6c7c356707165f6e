//! Commands in the guest: the host's side of the protocol that `guest/init` speaks.
//!
//! `run ID SECONDS BASE64` is answered by `done ID STATUS`, lines of base64, and `end ID`. Frames
//! of a command that the host gave up on carry another id and are skipped.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lines::Lines;
use crate::wait::Deadline;

/// How much longer than the guest the host waits for a command, for the answer to travel.
const ANSWER_GRACE: Duration = Duration::from_secs(10);

/// What a command in the guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status, as the shell has it (137: killed at its deadline).
    pub status: i32,
    /// What it printed, standard output and error together.
    pub text: String,
}

/// The connection to the guest's agent.
#[derive(Debug)]
pub(crate) struct Agent {
    lines: Lines,
    last_id: u64,
}

impl Agent {
    /// Connects to the guest's port, before the guest runs.
    pub(crate) fn connect(
        path: &Path,
        deadline: Deadline,
        alive: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        Ok(Self { lines: Lines::connect(path, deadline, alive)?, last_id: 0 })
    }

    /// Waits until the guest's init serves commands.
    pub(crate) fn wait_ready(&mut self, deadline: Deadline) -> Result<()> {
        while let Some(line) = self.lines.next(deadline)? {
            if line == "ready" {
                return Ok(());
            }
        }
        bail!("the guest did not come up")
    }

    /// Goes on with the numbers of the connection that the guest had before it came here.
    pub(crate) fn succeed(&mut self, source: &Self) {
        self.last_id = source.last_id;
    }

    /// Runs a shell command in the guest; it is killed there after `limit`.
    pub(crate) fn run(
        &mut self,
        command: &str,
        limit: Duration,
        deadline: Deadline,
    ) -> Result<Output> {
        self.last_id += 1;
        let id = self.last_id;
        let deadline = deadline.min(Deadline::after(limit + ANSWER_GRACE));
        let seconds = limit.as_secs().max(1);
        let code = base64_encode(command.as_bytes());
        self.lines.send(&format!("run {id} {seconds} {code}"), deadline)?;

        let (opening, closing) = (format!("done {id} "), format!("end {id}"));
        let mut status = None;
        let mut encoded = String::new();
        loop {
            let line = self.lines.next(deadline)?;
            let line = line.with_context(|| format!("the guest did not answer: {command}"))?;
            match &status {
                None => {
                    if let Some(text) = line.strip_prefix(&opening) {
                        status = Some(text.parse().context("an exit status")?);
                    }
                }
                Some(status) if line == closing => {
                    let bytes = base64_decode(&encoded)?;
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    return Ok(Output { status: *status, text });
                }
                Some(_) => encoded.push_str(&line),
            }
        }
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 (RFC 4648 section 4) on one line.
fn base64_encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut group = 0_u32;
        for index in 0..3 {
            group = group << 8 | u32::from(chunk.get(index).copied().unwrap_or(0));
        }
        for index in 0..4 {
            let digit = (group >> (18 - 6 * index)) & 63;
            let is_padding = index > chunk.len();
            out.push(if is_padding { '=' } else { char::from(ALPHABET[digit as usize]) });
        }
    }
    out
}

fn base64_decode(text: &str) -> Result<Vec<u8>> {
    ensure!(text.len().is_multiple_of(4), "base64 of {} characters was cut short", text.len());
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for chunk in text.as_bytes().chunks(4) {
        let padding = chunk.iter().rev().take_while(|&&character| character == b'=').count();
        let mut group = 0_u32;
        for &character in chunk {
            let digit = match character {
                b'A'..=b'Z' => character - b'A',
                b'a'..=b'z' => character - b'a' + 26,
                b'0'..=b'9' => character - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                b'=' => 0,
                _ => bail!("not base64: {}", chunk.escape_ascii()),
            };
            group = group << 6 | u32::from(digit);
        }
        let [_, bytes @ ..] = group.to_be_bytes();
        out.extend_from_slice(&bytes[..3_usize.saturating_sub(padding)]);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_standard_one() {
        // RFC 4648 section 10
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64_encode(plain.as_bytes()), encoded);
            assert_eq!(base64_decode(encoded).unwrap(), plain.as_bytes());
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(base64_decode(&base64_encode(&all)).unwrap(), all);
        assert!(base64_decode("Zg=").is_err());
        assert!(base64_decode("Z!==").is_err());
    }
}

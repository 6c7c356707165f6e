//! When QEMU asked its back end for what: its trace of vhost-user messages.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

/// The messages that are looked for, as vhost-user numbers them.
pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const GET_VRING_BASE: u32 = 11;

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    /// Wall clock.
    pub(super) at: Duration,
    pub(super) request: u32,
    /// True for what the back end answered.
    pub(super) is_answer: bool,
}

/// Everything that was said since the trace had `from` bytes.
pub(super) fn messages(path: &Path, from: u64) -> Result<Vec<Message>> {
    let bytes = std::fs::read(path)?;
    let start = usize::try_from(from)?.min(bytes.len());
    let text = String::from_utf8_lossy(&bytes[start..]).into_owned();
    Ok(text.lines().filter_map(parse).collect())
}

/// How long the trace is.
pub(super) fn length(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.len())
}

/// `123@1700000000.123456:vhost_user_write req:11 flags:0x1`
fn parse(line: &str) -> Option<Message> {
    let (head, rest) = line.split_once(":vhost_user_")?;
    let (_pid, at) = head.split_once('@')?;
    let (seconds, micros) = at.split_once('.')?;
    let (what, rest) = rest.split_once(" req:")?;
    let at =
        Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    let request = rest.split_whitespace().next()?.parse().ok()?;
    Some(Message { at, request, is_answer: what == "read" })
}

/// How long the back end took to answer a request, all of them together.
pub(super) fn time_to_answer(messages: &[Message], request: u32) -> Duration {
    let mut asked = None;
    let mut total = Duration::ZERO;
    for message in messages.iter().filter(|message| message.request == request) {
        if message.is_answer {
            total += asked.take().map_or(Duration::ZERO, |asked| message.at.saturating_sub(asked));
        } else {
            asked = Some(message.at);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_trace() {
        let said = "12@1700000000.000100:vhost_user_write req:11 flags:0x1\n\
                    something else\n\
                    12@1700000000.000900:vhost_user_read req:11 flags:0x5\n\
                    12@1700000001.500000:vhost_user_write req:6 flags:0x1\n";
        let messages: Vec<Message> = said.lines().filter_map(parse).collect();
        assert_eq!(messages.len(), 3);
        assert_eq!(time_to_answer(&messages, GET_VRING_BASE), Duration::from_micros(800));
        assert_eq!(time_to_answer(&messages, SET_LOG_BASE), Duration::ZERO, "not answered");
    }
}

//! Connections that were not taken, for the log: a flood of them must not become a flood of lines.

use std::net::IpAddr;
use std::time::Duration;

use base::Instant;
use nvme::target::Refusal;

/// From one line to the next, at least.
const EVERY: Duration = Duration::from_secs(10);

/// When it was said last, and what was not said since.
#[derive(Default)]
pub(crate) struct Refusals {
    said: Option<Instant>,
    unsaid: u64,
}

impl Refusals {
    /// A connection was refused.
    pub(crate) fn note(&mut self, now: Instant, from: Option<IpAddr>, refusal: Refusal) {
        if let Some(before) = self.due(now) {
            let from = from.map_or_else(|| "somebody".to_owned(), |address| address.to_string());
            tracing::warn!(before, "a connection from {from} is refused: {refusal}");
        }
    }

    /// How many were refused without a word since the last line, if it is time for the next.
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|at| at + EVERY > now) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_now_and_then() {
        let mut refusals = Refusals::default();
        let at = |ms| Instant::ZERO + Duration::from_millis(ms);
        let lines: Vec<u64> = (0..25_000).filter_map(|ms| refusals.due(at(ms))).collect();
        assert_eq!(lines, [0, 9_999, 9_999]);
    }
}

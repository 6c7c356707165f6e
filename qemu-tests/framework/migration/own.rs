//! What the destination's back end says that the guest waited for it, by its own clock.

use std::time::Duration;

use anyhow::{Context, Result};

use super::PATIENCE_SECONDS;
use crate::wait::{Deadline, wait_until};

/// How a back end begins to say it.
const SAID: &str = "the guest's first request is answered";

/// The stations of a guest's way to its disk, all from the moment at which its first ring started.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waited {
    /// Until the lease was had.
    pub(super) lease: Duration,
    /// Until the volume was open.
    pub(super) opened: Duration,
    /// Until the first request was taken out of the rings.
    pub(super) asked: Duration,
    /// Until it was answered.
    pub(super) answered: Duration,
}

impl Waited {
    /// The back end's own part of it: the opening, and what the first request took, without what the guest
    /// let pass before it asked.
    pub(super) fn own(&self) -> Duration {
        self.opened + self.answered.saturating_sub(self.opened.max(self.asked))
    }
}

/// What a back end said last, once it has said so after its log had `from` bytes.
pub(super) fn wait_for(said: impl Fn() -> Result<String>, from: usize) -> Result<Waited> {
    wait_until("the guest's first request", Deadline::seconds(PATIENCE_SECONDS), || {
        let said = said()?;
        let new = said.get(from..).context("a log only grows")?;
        new.lines().rev().find(|line| line.contains(SAID)).map(parse).transpose()
    })
}

fn parse(line: &str) -> Result<Waited> {
    let number = |name: &str| {
        let (_, rest) = line.split_once(name).with_context(|| format!("{name} in {line}"))?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        Ok::<_, anyhow::Error>(Duration::from_micros(digits.parse()?))
    };
    Ok(Waited {
        lease: number("lease_us=")?,
        opened: number("opened_us=")?,
        asked: number("asked_us=")?,
        answered: number("answered_us=")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_line_counts() {
        let line = |answered: u32| {
            format!(
                "2026-01-01T00:00:00.000001Z  INFO {SAID} socket=/a/b.sock lease_us=7 \
                 opened_us=90 asked_us=80 answered_us={answered}\n"
            )
        };
        let old = line(99);
        let said = || Ok(format!("{old}something else\n{}{}more\n", line(100), line(101)));
        let micros = Duration::from_micros;
        let waited = wait_for(said, old.len()).unwrap();
        let (lease, opened, asked, answered) = (micros(7), micros(90), micros(80), micros(101));
        assert_eq!(waited, Waited { lease, opened, asked, answered });
        assert_eq!(waited.own(), micros(101), "it asked before the volume was open");
        assert_eq!(Waited { asked: micros(98), ..waited }.own(), micros(93));
        assert!(parse("lease_us=1 opened_us=").is_err());
    }
}

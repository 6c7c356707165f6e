//! What the destination's back end says that the guest waited for it, by its own clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::PATIENCE_SECONDS;
use crate::machine::Stretch;
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

    /// When these two were, if the request was answered at `end`.
    pub(super) fn own_at(&self, end: Instant) -> [Stretch; 2] {
        let start = end.checked_sub(self.answered).unwrap_or(end);
        let taken = (start + self.opened.max(self.asked)).min(end);
        [(start, start + self.opened), (taken, end)]
    }
}

/// What a back end said last, once it has said so after its log had `from` bytes, and when that was.
pub(super) fn wait_for(
    said: impl Fn() -> Result<String>,
    from: usize,
) -> Result<(Waited, Instant)> {
    wait_until("the guest's first request", Deadline::seconds(PATIENCE_SECONDS), || {
        let said = said()?;
        let new = said.get(from..).context("a log only grows")?;
        let line = new.lines().rev().find(|line| line.contains(SAID));
        line.map(|line| Ok((parse(line)?, written_at(line)?))).transpose()
    })
}

/// When a line of a log of today was written, by this process's clock.
fn written_at(line: &str) -> Result<Instant> {
    const DAY: Duration = Duration::from_hours(24);
    let time_of_day = |line: &str| {
        let (time, _) = line.split_once('T')?.1.split_once('Z')?;
        let mut seconds = 0.0;
        for part in time.split(':') {
            seconds = seconds * 60.0 + part.parse::<f64>().ok()?;
        }
        Duration::try_from_secs_f64(seconds).ok()
    };
    let then = time_of_day(line).with_context(|| format!("the time in {line}"))?;
    let (now, instant) = (SystemTime::now().duration_since(UNIX_EPOCH)?, Instant::now());
    let today = Duration::from_secs(now.as_secs() % DAY.as_secs())
        + Duration::from_nanos(now.subsec_nanos().into());
    let ago = (today + DAY).saturating_sub(then);
    let ago = ago.checked_sub(DAY).unwrap_or(ago);
    instant.checked_sub(ago).context("a line of before this machine started")
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
        let (waited, _) = wait_for(said, old.len()).unwrap();
        let (lease, opened, asked, answered) = (micros(7), micros(90), micros(80), micros(101));
        assert_eq!(waited, Waited { lease, opened, asked, answered });
        assert_eq!(waited.own(), micros(101), "it asked before the volume was open");
        assert_eq!(Waited { asked: micros(98), ..waited }.own(), micros(93));
        assert!(parse("lease_us=1 opened_us=").is_err());
    }

    #[test]
    fn when_a_line_was_written() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let then = now.checked_sub(Duration::from_secs(5)).unwrap();
        let (day, micros) = (then.as_secs() % 86_400, then.subsec_micros());
        let (hour, minute, second) = (day / 3600, day / 60 % 60, day % 60);
        let line =
            format!("2026-01-01T{hour:02}:{minute:02}:{second:02}.{micros:06}Z  INFO {SAID}");
        let ago = written_at(&line).unwrap().elapsed();
        assert!(ago >= Duration::from_secs(5) && ago < Duration::from_secs(10), "{ago:?}");
        assert!(written_at("no time").is_err());
    }

    #[test]
    fn what_was_its_own_part() {
        let start = Instant::now();
        let micros = Duration::from_micros;
        let (lease, opened, asked, answered) = (micros(7), micros(80), micros(90), micros(101));
        let waited = Waited { lease, opened, asked, answered };
        let end = start + answered;
        let own = waited.own_at(end);
        assert_eq!(own, [(start, start + opened), (start + asked, end)]);
        let took: Duration = own.iter().map(|(from, to)| *to - *from).sum();
        assert_eq!(took, waited.own());
    }
}

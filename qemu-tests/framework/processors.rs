//! Whether the machine stands still: a thread on each processor that wakes every few milliseconds, and knows how
//! long it waited for others of this machine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::machine::{STALL, Stretch};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(2);

/// Of each processor that may be used its number, and what looks at it once, from a thread of its own.
#[expect(clippy::type_complexity, reason = "what it looks like says most about it")]
pub(crate) fn standstills()
-> Result<Vec<(usize, impl FnMut() -> Result<Option<Stretch>> + Send + 'static)>> {
    let allowed = sched_getaffinity(None)?;
    let numbers = (0..CpuSet::MAX_CPU).filter(|number| allowed.is_set(*number));
    Ok(numbers
        .map(|number| {
            let mut sleeper = None;
            let look = move || {
                if let Some(sleeper) = &mut sleeper {
                    return Sleeper::look(sleeper);
                }
                sleeper = Some(Sleeper::bound_to(number)?);
                Ok(None)
            };
            (number, look)
        })
        .collect())
}

/// A thread that is bound to a processor.
struct Sleeper {
    /// What the kernel counts of it (`Documentation/scheduler/sched-stats.rst`).
    counts: File,
    /// So long it had waited for the processor.
    waited: Duration,
}

impl Sleeper {
    fn bound_to(processor: usize) -> Result<Self> {
        let mut only = CpuSet::new();
        only.set(processor);
        sched_setaffinity(None, &only)?;
        let counts = File::open("/proc/thread-self/schedstat")?;
        let waited = waited(&counts)?;
        Ok(Self { counts, waited })
    }

    /// Sleeps for a moment. Whoever wakes late and has not waited for a thread of this machine was not run by the
    /// host, and nobody else was.
    fn look(&mut self) -> Result<Option<Stretch>> {
        let due = Instant::now() + EVERY;
        std::thread::sleep(EVERY);
        let late = due.elapsed();
        let waited = waited(&self.counts)?;
        let behind_others = waited.saturating_sub(std::mem::replace(&mut self.waited, waited));
        Ok(standstill(late, behind_others).map(|stood_still| (due, due + stood_still)))
    }
}

/// How much of a delay is nobody's of this machine, if that is worth a note.
fn standstill(late: Duration, behind_others: Duration) -> Option<Duration> {
    Some(late.saturating_sub(behind_others)).filter(|rest| *rest > STALL)
}

/// How long a thread has waited for a processor while it could have run.
fn waited(counts: &File) -> Result<Duration> {
    let mut text = [0; 96];
    let length = counts.read_at(&mut text, 0)?;
    let text = std::str::from_utf8(&text[..length])?;
    let mut numbers = text.split_whitespace().map(str::parse);
    ensure!(numbers.clone().count() == 3, "three numbers, not {text:?}");
    Ok(Duration::from_nanos(numbers.nth(1).context("the second")??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_take_is_not_the_machine() {
        let of = |late, behind| {
            standstill(Duration::from_millis(late), Duration::from_millis(behind))
                .map(|rest| rest.as_millis())
        };
        assert_eq!(
            [of(9, 0), of(40, 0), of(40, 5), of(40, 35), of(40, 50)],
            [None, Some(40), Some(35), None, None]
        );
    }

    /// A thread that shares its processor with many waits most of the time, and the kernel says so.
    #[test]
    fn waiting_for_others_is_known() {
        let allowed = sched_getaffinity(None).unwrap();
        let number = (0..CpuSet::MAX_CPU).find(|number| allowed.is_set(*number)).unwrap();
        let spin = move |long: Duration| {
            let sleeper = Sleeper::bound_to(number).unwrap();
            let begun = Instant::now();
            while begun.elapsed() < long {}
            waited(&sleeper.counts).unwrap().saturating_sub(sleeper.waited)
        };
        let (long, others) = (Duration::from_millis(300), Duration::from_millis(600));
        let hogs: Vec<_> = (0..8).map(|_| std::thread::spawn(move || spin(others))).collect();
        let behind = std::thread::spawn(move || spin(long)).join().unwrap();
        for hog in hogs {
            hog.join().unwrap();
        }
        assert!(behind > long / 3, "{behind:?} of {long:?}");
    }
}

//! What the machine does to everybody, noted beside a benchmark: when the one disk that all servers share
//! stalls, and when the machine itself stands still, as virtual ones do while their host runs others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::disk::stalls_of_disk;
use crate::lab::Lab;
use crate::processors::standstills;

/// Shorter ones are not noted.
pub(crate) const STALL: Duration = Duration::from_millis(10);

/// Stalls that are remembered of each kind; the oldest are forgotten.
const STALLS_MAX: usize = 4096;

/// A stretch of time.
pub type Stretch = (Instant, Instant);

/// Notes when the disk or the machine stalled.
#[derive(Debug)]
pub struct MachineProbe(Vec<Watcher>);

impl MachineProbe {
    /// Of the disk that the lab is on, and of every processor.
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut watchers = vec![Watcher::start("disk", stalls_of_disk(lab)?)?];
        for (number, look) in standstills()? {
            watchers.push(Watcher::start(&format!("processor {number}"), look)?);
        }
        Ok(Self(watchers))
    }

    /// For how much of these times together something stalled.
    pub fn stalled(&self, times: &[Stretch]) -> Duration {
        let stalls = self.stalls();
        times.iter().map(|time| overlap(*time, &stalls)).sum()
    }

    /// The longest of some pauses, each without the time in which something stalled; `None` if there are none.
    pub fn beyond(&self, pauses: &[Stretch]) -> Option<Duration> {
        longest_beyond(pauses, &self.stalls())
    }

    fn stalls(&self) -> Vec<Stretch> {
        joined(self.0.iter().flat_map(Watcher::stalls).collect())
    }
}

/// A thread that looks again and again, each time for a while, and says if there was a stall.
#[derive(Debug)]
struct Watcher {
    stalls: Arc<Mutex<Vec<Stretch>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(
        what: &str,
        mut look: impl FnMut() -> Result<Option<Stretch>> + Send + 'static,
    ) -> Result<Self> {
        let (stalls, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (noted, stopped) = (Arc::clone(&stalls), Arc::clone(&stop));
        let name = what.to_owned();
        let body = move || {
            while !stopped.load(Ordering::Relaxed) {
                match look() {
                    Ok(None) => {}
                    Ok(Some(stall)) => {
                        let mut stalls = noted.lock().unwrap_or_else(PoisonError::into_inner);
                        if stalls.len() == STALLS_MAX {
                            stalls.remove(0);
                        }
                        stalls.push(stall);
                    }
                    Err(error) => {
                        eprintln!("the {name} is not watched any more: {error:#}");
                        return;
                    }
                }
            }
        };
        let thread = thread::Builder::new().name(what.to_owned()).spawn(body)?;
        Ok(Self { stalls, stop, thread: Some(thread) })
    }

    fn stalls(&self) -> Vec<Stretch> {
        self.stalls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no result, and has said what was wrong.
            let _ = thread.join();
        }
    }
}

/// The same times, none of which overlap each other.
fn joined(mut stretches: Vec<Stretch>) -> Vec<Stretch> {
    stretches.sort_unstable();
    let mut joined: Vec<Stretch> = Vec::with_capacity(stretches.len());
    for (from, to) in stretches {
        match joined.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            Some(_) | None => joined.push((from, to)),
        }
    }
    joined
}

/// How much of a time is in one of the `stalls`, which do not overlap each other.
fn overlap((began, ended): Stretch, stalls: &[Stretch]) -> Duration {
    let common =
        |(from, to): &Stretch| (*to).min(ended).saturating_duration_since((*from).max(began));
    stalls.iter().map(common).sum()
}

fn longest_beyond(pauses: &[Stretch], stalls: &[Stretch]) -> Option<Duration> {
    let beyond = |pause: &Stretch| (pause.1 - pause.0).saturating_sub(overlap(*pause, stalls));
    pauses.iter().map(beyond).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_machine() {
        let start = Instant::now();
        let stretch = |from: u64, to: u64| {
            (start + Duration::from_millis(from), start + Duration::from_millis(to))
        };
        let pauses = [stretch(100, 190), stretch(300, 320)];
        let longest = |stalls: &[Stretch]| {
            longest_beyond(&pauses, &joined(stalls.to_vec())).unwrap().as_millis()
        };
        assert_eq!(longest(&[]), 90);
        // Stalls count where they overlap a pause, and only there.
        assert_eq!(longest(&[stretch(90, 130), stretch(180, 200)]), 50);
        assert_eq!(longest(&[stretch(90, 200)]), 20);
        assert_eq!(longest(&[stretch(200, 250), stretch(290, 400)]), 90);
        // Those of the disk and of the machine count once where they are together.
        assert_eq!(longest(&[stretch(150, 200), stretch(90, 130), stretch(120, 160)]), 20);
        assert_eq!(longest(&[stretch(110, 160), stretch(120, 130), stretch(310, 312)]), 40);
        assert_eq!(longest_beyond(&[], &[stretch(0, 1)]), None);
    }

    #[test]
    fn a_machine_is_watched() {
        crate::test(0, |lab| {
            let probe = MachineProbe::start(lab)?;
            thread::sleep(Duration::from_millis(100));
            let now = Instant::now();
            let pause = Duration::from_secs(1);
            // What was noted before it began has nothing to do with it.
            assert_eq!(probe.beyond(&[(now, now + pause)]), Some(pause));
            Ok(())
        });
    }
}

//! What the disk does to everybody: small writes of our own beside a benchmark's, to tell pauses of a volume from
//! those of the one disk that all its servers share.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::fs::OFlags;

use crate::lab::Lab;

const SYNC_AND_DIRECT: i32 = OFlags::DSYNC.union(OFlags::DIRECT).bits().cast_signed();

/// One page.
const BYTES: usize = 4096;

/// Between two writes: few enough to be in nobody's way.
const EVERY: Duration = Duration::from_millis(10);

/// A write that takes longer is a stall of the disk.
const STALL: Duration = Duration::from_millis(10);

/// Stalls that are remembered; the oldest are forgotten.
const STALLS_MAX: usize = 4096;

/// A page of a file of its own, which is written through to the disk.
#[derive(Debug)]
pub(crate) struct Page {
    file: File,
    path: PathBuf,
    memory: Vec<u8>,
}

impl Page {
    pub(crate) fn new(lab: &Lab, name: &str) -> Result<Self> {
        let path = lab.written_file(name, 1 << 16)?;
        let file = File::options().write(true).custom_flags(SYNC_AND_DIRECT).open(&path)?;
        Ok(Self { file, path, memory: vec![0; 2 * BYTES] })
    }

    /// Writes it.
    pub(crate) fn write(&self) -> Result<()> {
        let start = self.memory.as_ptr().align_offset(BYTES);
        Ok(self.file.write_all_at(&self.memory[start..][..BYTES], 0)?)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // The directory goes with the lab.
        let _ = fs::remove_file(&self.path);
    }
}

/// A stretch of time.
pub type Stretch = (Instant, Instant);

/// Writes a page a hundred times a second, and notes when that was slow.
#[derive(Debug)]
pub struct DiskProbe {
    stalls: Arc<Mutex<Vec<Stretch>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DiskProbe {
    /// Of the disk that the lab is on.
    pub fn start(lab: &Lab) -> Result<Self> {
        let page = Page::new(lab, "probe")?;
        let (stalls, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (noted, stopped) = (Arc::clone(&stalls), Arc::clone(&stop));
        let body = move || {
            while !stopped.load(Ordering::Relaxed) {
                let before = Instant::now();
                if let Err(error) = page.write() {
                    eprintln!("the disk is not watched any more: {error:#}");
                    return;
                }
                let after = Instant::now();
                if after - before > STALL {
                    let mut stalls = noted.lock().unwrap_or_else(PoisonError::into_inner);
                    if stalls.len() == STALLS_MAX {
                        stalls.remove(0);
                    }
                    stalls.push((before, after));
                }
                thread::sleep(EVERY);
            }
        };
        let thread = thread::Builder::new().name("disk".to_owned()).spawn(body)?;
        Ok(Self { stalls, stop, thread: Some(thread) })
    }

    /// For how much of these times together the disk stalled.
    pub fn stalled(&self, times: &[Stretch]) -> Duration {
        let stalls = self.stalls.lock().unwrap_or_else(PoisonError::into_inner);
        times.iter().map(|time| overlap(*time, &stalls)).sum()
    }

    /// The longest of some pauses, each without the time in which the disk stalled; `None` if there are none.
    pub fn beyond(&self, pauses: &[Stretch]) -> Option<Duration> {
        let stalls = self.stalls.lock().unwrap_or_else(PoisonError::into_inner);
        longest_beyond(pauses, &stalls)
    }
}

impl Drop for DiskProbe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no result, and has said what was wrong.
            let _ = thread.join();
        }
    }
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
    fn what_is_beyond_the_disk() {
        let start = Instant::now();
        let stretch = |from: u64, to: u64| {
            (start + Duration::from_millis(from), start + Duration::from_millis(to))
        };
        let pauses = [stretch(100, 190), stretch(300, 320)];
        let longest = |stalls: &[Stretch]| longest_beyond(&pauses, stalls).unwrap().as_millis();
        assert_eq!(longest(&[]), 90);
        // Stalls count where they overlap a pause, and only there.
        assert_eq!(longest(&[stretch(90, 130), stretch(180, 200)]), 50);
        assert_eq!(longest(&[stretch(90, 200)]), 20);
        assert_eq!(longest(&[stretch(200, 250), stretch(290, 400)]), 90);
        assert_eq!(longest_beyond(&[], &[stretch(0, 1)]), None);
    }

    #[test]
    fn a_disk_is_watched() {
        crate::test(0, |lab| {
            let probe = DiskProbe::start(lab)?;
            thread::sleep(Duration::from_millis(100));
            let now = Instant::now();
            let pause = Duration::from_secs(1);
            // What was noted before it began has nothing to do with it.
            assert_eq!(probe.beyond(&[(now, now + pause)]), Some(pause));
            Ok(())
        });
    }
}

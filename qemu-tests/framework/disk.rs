//! What the disk does to everybody: small writes of our own beside a benchmark's, to tell pauses of a volume from
//! those of the one disk that all its servers share.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::fs::OFlags;

use crate::lab::Lab;
use crate::machine::{STALL, Stretch};

const SYNC_AND_DIRECT: i32 = OFlags::DSYNC.union(OFlags::DIRECT).bits().cast_signed();

/// One page.
const BYTES: usize = 4096;

/// Between two writes: few enough to be in nobody's way.
const EVERY: Duration = Duration::from_millis(10);

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

/// Writes a page of a file of its own a hundred times a second, and says when that was slow.
pub(crate) fn stalls_of_disk(
    lab: &Lab,
) -> Result<impl FnMut() -> Result<Option<Stretch>> + Send + 'static> {
    let page = Page::new(lab, "probe")?;
    Ok(move || {
        std::thread::sleep(EVERY);
        let before = Instant::now();
        page.write()?;
        let after = Instant::now();
        Ok((after - before > STALL).then_some((before, after)))
    })
}

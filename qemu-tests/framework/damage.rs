//! Damage to a file that another process works on.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};

const DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits().cast_signed();

/// What direct I/O is aligned to.
const ALIGNMENT: u64 = 4096;

/// Overwrites bytes of a file that another process writes to past the page cache; the blocks that they
/// are in are read and written whole.
///
/// Past the page cache, too: where the other's writes meet a dirty page of the cache, Linux can not say
/// which of the two is newer, and fails the next `fsync` of the file with EIO, ours or theirs.
pub fn overwrite(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let change = || -> Result<()> {
        let file = File::options().read(true).write(true).custom_flags(DIRECT).open(path)?;
        let first = offset / ALIGNMENT * ALIGNMENT;
        let end = (offset + bytes.len() as u64).next_multiple_of(ALIGNMENT);
        let mut memory = vec![0; usize::try_from(end - first + ALIGNMENT)?];
        let start = memory.as_ptr().align_offset(usize::try_from(ALIGNMENT)?);
        let blocks = &mut memory[start..][..usize::try_from(end - first)?];
        file.read_exact_at(blocks, first)?;
        blocks[usize::try_from(offset - first)?..][..bytes.len()].copy_from_slice(bytes);
        Ok(file.write_all_at(blocks, first)?)
    };
    change().with_context(|| {
        format!("overwriting {} bytes at {offset} of {}", bytes.len(), path.display())
    })
}

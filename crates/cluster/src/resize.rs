//! Making a volume larger.
//!
//! The record comes first: from then on every head that opens the volume knows the size. The head that
//! serves it at the time hears of it from its process's healer, which watches the store, and tells the
//! members and then the guests. Nothing else is asked for: a volume that nobody has attached has its
//! new size when somebody attaches it.

use base::limits::VOLUME_BYTES_MAX;
use base::{BlockSize, VolumeId};

use crate::error::{StoreError, StoreErrorKind};
use crate::placement::{Picture, short_of_room};
use crate::records::VolumeEntry;
use crate::store::ClusterStore;
use crate::volumes::ATTEMPTS;

/// Why a volume was not resized. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It would lose its end.
    #[error(
        "volume '{volume}' has {current} bytes, and volumes only grow: what lies beyond {asked} bytes \
         would be lost; for a smaller one create a volume and copy what is needed"
    )]
    Shrinks {
        /// The volume's name.
        volume: String,
        /// Its size in bytes.
        current: u64,
        /// The size asked for.
        asked: u64,
    },
    /// The size is not a multiple of the block size.
    #[error(
        "size {size_bytes} is not a multiple of the block size {block_size}; the next one is {}",
        size_bytes.next_multiple_of(u64::from(block_size.bytes()))
    )]
    SizeNotMultiple {
        /// The size asked for.
        size_bytes: u64,
        /// The volume's block size.
        block_size: BlockSize,
    },
    /// The size is too large for any volume.
    #[error("size {0} is out of range: a volume has up to {VOLUME_BYTES_MAX} bytes")]
    SizeOutOfRange(u64),
    /// Pools of its members' servers are too small.
    #[error(
        "volume '{volume}' cannot have {size_bytes} bytes, since its replicas would not fit: {}; \
         delete volumes there, or `holdfast server drain` one of them so that its replicas go to \
         another server, or ask for less",
        lacking.join("; ")
    )]
    NoRoom {
        /// The volume's name.
        volume: String,
        /// The size asked for.
        size_bytes: u64,
        /// Servers, and what they lack.
        lacking: Vec<String>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What [`resize`] has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resized {
    /// The volume as it is now.
    pub entry: VolumeEntry,
    /// Its size before, in bytes; the same if there was nothing to do.
    pub before_bytes: u64,
}

/// Makes a volume `size_bytes` large, if its members' servers have room. The same size again changes
/// nothing.
pub fn resize(
    store: &dyn ClusterStore,
    id: VolumeId,
    size_bytes: u64,
) -> Result<Resized, ResizeError> {
    let mut attempt = 0;
    loop {
        // Whatever else takes room changes it.
        let revision = store.revision()?;
        let picture = Picture::of(&store.volumes()?, store.servers()?);
        let found = store.volume(id)?.filter(|entry| !entry.deleted);
        let mut entry = found.ok_or_else(|| no_volume(store, id))?;
        check(&entry, size_bytes, &picture)?;
        let before_bytes = entry.volume.size_bytes;
        if size_bytes == before_bytes {
            return Ok(Resized { entry, before_bytes });
        }
        entry.volume.size_bytes = size_bytes;
        attempt += 1;
        match store.update_volume_at(&entry, revision) {
            Ok(versions) => {
                return Ok(Resized { entry: VolumeEntry { versions, ..entry }, before_bytes });
            }
            Err(error) if error.is_conflict() && attempt < ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn no_volume(store: &dyn ClusterStore, id: VolumeId) -> StoreError {
    StoreError { store: store.address(), kind: StoreErrorKind::NoVolume(id) }
}

fn check(entry: &VolumeEntry, size_bytes: u64, picture: &Picture) -> Result<(), ResizeError> {
    let volume = entry.volume.name.clone();
    let current = entry.volume.size_bytes;
    if size_bytes < current {
        return Err(ResizeError::Shrinks { volume, current, asked: size_bytes });
    }
    if size_bytes > VOLUME_BYTES_MAX {
        return Err(ResizeError::SizeOutOfRange(size_bytes));
    }
    let block_size = entry.volume.block_size;
    if block_size.blocks(size_bytes).is_none() {
        return Err(ResizeError::SizeNotMultiple { size_bytes, block_size });
    }
    let lacking = short_of_room(entry, size_bytes, picture);
    if lacking.is_empty() {
        Ok(())
    } else {
        Err(ResizeError::NoRoom { volume, size_bytes, lacking })
    }
}

//! Metadata regions.

use base::PoolId;

use crate::layout::{Areas, FormatWrite, Geometry};

/// Pages that a checkpoint of so many replicas, segments and chunks takes, at most.
pub(crate) fn checkpoint_pages(replicas: u32, segments: u64, chunks: u64) -> u64 {
    (u64::from(replicas) * 128 + segments * 64 + chunks * 16).div_ceil(3968) + 4
}

/// The writes that make both copies of the metadata area an empty pool.
pub(crate) fn fresh(_pool: PoolId, _geometry: &Geometry, _areas: &[Areas]) -> Vec<FormatWrite> {
    Vec::new()
}

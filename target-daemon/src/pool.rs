//! Whose the configured devices are, looked up before anything is started.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use base::{ClusterId, PoolId, ServerId};
use rustix::fs::{FlockOperation, flock};
use shell::control::PoolDevices;
use store::{DeviceRole, LABEL_AREA_BYTES, LABEL_COPY_OFFSET, Label, LabelError};

/// Whose a pool is, as its labels say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolIdentity {
    /// The pool.
    pub pool: PoolId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its server.
    pub server: ServerId,
}

/// Why a device is not usable as configured.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// It could not be opened or read.
    #[error("pool device {}: {source}", path.display())]
    Device {
        /// The device.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// What it holds is not what was expected.
    #[error("pool device {}: {error}", path.display())]
    Label {
        /// The device.
        path: PathBuf,
        /// What is wrong.
        error: LabelError,
    },
    /// Another process has locked it.
    #[error(
        "pool device {} is in use by another process; stop that daemon first (`fuser {}` names it)",
        path.display(),
        path.display()
    )]
    InUse {
        /// The device.
        path: PathBuf,
    },
}

/// Reads the label of the device at `path`.
pub fn read_label(path: &Path) -> Result<Label, PoolError> {
    let device = |source| PoolError::Device { path: path.to_owned(), source };
    let first = read_start(&mut File::open(path).map_err(device)?).map_err(device)?;
    store::identify(&first).map_err(|error| PoolError::Label { path: path.to_owned(), error })
}

/// The first bytes of a device: as many as labels take, or fewer if it is shorter.
pub fn read_start(file: &mut File) -> io::Result<Vec<u8>> {
    let mut first = Vec::with_capacity(LABEL_AREA_BYTES);
    match file.take(LABEL_AREA_BYTES as u64).read_to_end(&mut first) {
        Ok(_) => Ok(first),
        Err(error) => read_halves(file).ok_or(error),
    }
}

/// A label area of which something cannot be read, with other bytes in its place, if there is a label
/// in the rest: each half has a copy.
fn read_halves(file: &File) -> Option<Vec<u8>> {
    let mut area = vec![u8::MAX; LABEL_AREA_BYTES];
    for (number, half) in area.chunks_exact_mut(LABEL_COPY_OFFSET).enumerate() {
        let offset = (number * LABEL_COPY_OFFSET) as u64;
        if file.read_exact_at(half, offset).is_err() {
            half.fill(u8::MAX);
        }
    }
    store::identify(&area).is_ok().then_some(area)
}

/// Takes the lock that whoever opens or formats a pool holds on each of its devices. It is held
/// until `file` is closed.
pub fn lock(path: &Path, file: &File) -> Result<(), PoolError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(PoolError::InUse { path: path.to_owned() }),
        Err(errno) => Err(PoolError::Device { path: path.to_owned(), source: errno.into() }),
    }
}

/// Whose the pool on these devices is. They must be exactly its devices, in their order and
/// roles, and no other process may have them locked at this moment.
pub fn identify(devices: &PoolDevices) -> Result<PoolIdentity, PoolError> {
    let fast = devices.fast.iter().map(|path| (path, DeviceRole::Fast));
    let all = fast.chain(devices.mass.iter().map(|path| (path, DeviceRole::Mass)));
    let count = devices.fast.len() + devices.mass.len();
    let mut first: Option<PoolIdentity> = None;
    for (index, (path, role)) in all.enumerate() {
        let source = |source| PoolError::Device { path: path.clone(), source };
        lock(path, &File::open(path).map_err(source)?)?;
        let label = read_label(path)?;
        let own = PoolIdentity { pool: label.pool, cluster: label.cluster, server: label.server };
        let expected = *first.get_or_insert(own);
        check(&label, expected, index, count, role)
            .map_err(|error| PoolError::Label { path: path.clone(), error })?;
    }
    // The configuration has at least one fast device.
    first.ok_or_else(|| PoolError::Device {
        path: PathBuf::new(),
        source: io::Error::other("no device is configured"),
    })
}

fn check(
    label: &Label,
    expected: PoolIdentity,
    index: usize,
    count: usize,
    role: DeviceRole,
) -> Result<(), LabelError> {
    if label.pool != expected.pool {
        return Err(LabelError::WrongPool { found: label.pool, expected: expected.pool });
    }
    if usize::from(label.devices) != count {
        let expected = u16::try_from(count).unwrap_or(u16::MAX);
        return Err(LabelError::WrongDeviceCount { found: label.devices, expected });
    }
    if usize::from(label.device.0) != index {
        return Err(LabelError::WrongDevice { found: label.device });
    }
    if label.role != role {
        return Err(LabelError::WrongRole);
    }
    Ok(())
}

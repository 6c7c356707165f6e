//! Opening a pool's devices: locks, labels, sizes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base::{BufferMut, Instant};
use ring::{Completion, DeviceHandle, DeviceOptions, ErrorKind, Reactor, Token};
use store::{DeviceIndex, DeviceInfo, DeviceRole, LABEL_AREA_BYTES, LABEL_COPY_OFFSET};

use crate::control::{PoolConfig, StartError};

/// The open devices of a pool, in the order of their indexes: fast ones first.
pub(crate) struct Devices {
    handles: Vec<DeviceHandle>,
    paths: Vec<PathBuf>,
}

impl Devices {
    /// Opens and locks every device and checks that its label is there and this server's.
    pub(crate) fn open(
        reactor: &mut Reactor,
        config: &PoolConfig,
    ) -> Result<(Self, Vec<DeviceInfo>), StartError> {
        let fast = config.devices.fast.iter().map(|path| (path, DeviceRole::Fast));
        let mass = config.devices.mass.iter().map(|path| (path, DeviceRole::Mass));
        let mut devices = Self { handles: Vec::new(), paths: Vec::new() };
        let mut infos = Vec::new();
        for (path, role) in fast.chain(mass) {
            let options = DeviceOptions { read_only: false, exclusive: true };
            let handle = reactor.open_device(path, options).map_err(|error| {
                if error.kind() == ErrorKind::InUse {
                    StartError::PoolInUse { path: path.clone() }
                } else {
                    pool_error(path, &error)
                }
            })?;
            let info = reactor.device_info(handle).expect("it was opened just now");
            check_label(reactor, handle, path, info.size_bytes)?;
            devices.handles.push(handle);
            devices.paths.push(path.clone());
            infos.push(DeviceInfo { bytes: info.size_bytes, role });
        }
        Ok((devices, infos))
    }

    /// Closes all devices, each when nothing is under way on it any more, and so unlocks them.
    pub(crate) fn close(self, reactor: &mut Reactor) {
        for handle in self.handles {
            reactor.close_device(handle);
        }
    }

    pub(crate) fn handle(&self, device: DeviceIndex) -> DeviceHandle {
        self.handles[usize::from(device.0)]
    }

    /// The path of a device, for messages.
    pub(crate) fn path(&self, device: DeviceIndex) -> &Path {
        &self.paths[usize::from(device.0)]
    }
}

fn pool_error(path: &Path, reason: &impl ToString) -> StartError {
    StartError::Pool { path: path.to_owned(), reason: reason.to_string() }
}

/// Reads a device's first bytes and has the store say whose they are. What belongs together the
/// store checks again when it opens; here the error names the path.
fn check_label(
    reactor: &mut Reactor,
    device: DeviceHandle,
    path: &Path,
    size_bytes: u64,
) -> Result<(), StartError> {
    let length = usize::try_from(size_bytes).unwrap_or(usize::MAX).min(LABEL_AREA_BYTES) & !4095;
    if length == 0 {
        return Err(pool_error(path, &"it is too short to be a pool device"));
    }
    let mut read = |offset: usize, length: usize| {
        let buffer = reactor.buffers().take(LABEL_AREA_BYTES).expect("no buffer is in use yet");
        reactor.read(device, offset as u64, buffer, 0, length, Token(0));
        wait_for_read(reactor, path)
    };
    let label = match read(0, length) {
        Ok(buffer) => store::identify(&buffer.payload()[..length]),
        Err(error) if length < LABEL_AREA_BYTES => return Err(error),
        Err(error) => {
            // A sector of it is bad; each half has a copy of the label.
            let mut area = vec![u8::MAX; LABEL_AREA_BYTES];
            for half in area.chunks_exact_mut(LABEL_COPY_OFFSET).enumerate() {
                let (number, half) = half;
                if let Ok(buffer) = read(number * LABEL_COPY_OFFSET, LABEL_COPY_OFFSET) {
                    half.copy_from_slice(&buffer.payload()[..LABEL_COPY_OFFSET]);
                }
            }
            match store::identify(&area) {
                Ok(label) => Ok(label),
                Err(_) => return Err(error),
            }
        }
    };
    label.map(|_| ()).map_err(|error| pool_error(path, &error))
}

fn wait_for_read(reactor: &mut Reactor, path: &Path) -> Result<BufferMut, StartError> {
    let deadline: Instant = ring::now() + Duration::from_secs(30);
    while ring::now() < deadline {
        reactor.turn(Some(deadline), false).map_err(|error| pool_error(path, &error))?;
        match reactor.next_completion() {
            Some(Completion::Read { buffer, result: Ok(()), .. }) => return Ok(buffer),
            Some(Completion::Read { result: Err(error), .. }) => {
                return Err(pool_error(path, &format!("its label cannot be read: {error}")));
            }
            _ => {}
        }
    }
    Err(pool_error(path, &"its label could not be read within 30 seconds"))
}

//! One front end's connection: the vhost-user messages, checked and passed on to the device.
//!
//! Runs on the listener's control thread. What is slow or may fail (mapping memory, checking
//! descriptors) happens here; the device gets finished objects.

use core::time::Duration;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::config::CONFIG_BYTES;
use crate::control::{Request, ask};
use crate::dirty::DirtyLog;
use crate::eventfd::{checked_eventfd, make_nonblocking};
use crate::inflight::{self, InflightBuffer};
use crate::memory::{GuestMemory, Mapping, REGIONS_MAX, Region};
use crate::ring::RingAddresses;
use crate::{ControlSink, DeviceConfig};

/// How long the reactor may take for a message that waits for nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The largest configuration space a front end may ask for: what virtio-blk may ever define.
const CONFIG_BYTES_MAX: usize = 256;

pub(crate) struct Session {
    config: DeviceConfig,
    sink: Box<dyn ControlSink>,
    regions: Vec<Region>,
    /// Where a front end writes the state that this device shall load: to be looked at when it says
    /// that it is done.
    loading: Option<File>,
    /// A front end has asked for the state and not yet whether it is good.
    saving: bool,
}

/// Turns an error of ours into one that ends the connection with its reason.
fn refuse(error: impl core::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn unsupported(what: &'static str) -> Error {
    Error::InvalidOperation(what)
}

impl Session {
    pub(crate) fn new(config: DeviceConfig, sink: Box<dyn ControlSink>) -> Self {
        Self { config, sink, regions: Vec::new(), loading: None, saving: false }
    }

    /// Starts serving a new connection.
    pub(crate) fn connected(&mut self) -> Result<()> {
        self.ask(Request::Connected)?;
        self.regions.clear();
        (self.loading, self.saving) = (None, false);
        Ok(())
    }

    /// Lets the requests under way finish; false if they did not in time.
    pub(crate) fn quiesce(&mut self) -> bool {
        ask(&mut *self.sink, Request::Quiesce, self.config.drain_timeout).is_ok()
    }

    /// Makes the device forget the connection.
    pub(crate) fn disconnected(&mut self) {
        if let Err(error) = self.ask(Request::Disconnected) {
            tracing::debug!(%error, "the device was not told that its front end is gone");
        }
        // Only now, so that unmapping, which takes a while for a large guest, happens here and
        // not on the reactor thread.
        self.regions.clear();
        (self.loading, self.saving) = (None, false);
    }

    fn ask(&mut self, request: Request) -> Result<()> {
        ask(&mut *self.sink, request, ANSWER_TIMEOUT).map(|_| ()).map_err(refuse)
    }

    fn send_memory(&mut self, regions: Vec<Region>) -> Result<()> {
        let memory = GuestMemory::new(regions.clone()).map_err(refuse)?;
        self.ask(Request::Memory(Arc::new(memory)))?;
        self.regions = regions;
        Ok(())
    }

    fn queue(index: u32) -> Result<u16> {
        u16::try_from(index).map_err(|_| Error::InvalidParam)
    }
}

fn map(region: &VhostUserMemoryRegion, file: &File) -> Result<Region> {
    let mapping = Mapping::new(file, region.mmap_offset, region.memory_size).map_err(refuse)?;
    Ok(Region { gpa: region.guest_phys_addr, user: region.user_addr, mapping: Arc::new(mapping) })
}

/// Reads the state that a front end has written, which must be none. It has closed its end before it
/// asks, so nothing is waited for.
fn empty_state(file: &mut File) -> Result<()> {
    make_nonblocking(file.as_fd()).map_err(Error::ReqHandlerError)?;
    match file.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(unsupported("the state of another kind of device")),
        Err(error) => Err(Error::ReqHandlerError(error)),
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated, and front ends disagree on what it means: nothing, as in libvhost-user.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(unsupported("RESET_DEVICE was not offered"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.config.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.ask(Request::Features(features))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mapped: Result<Vec<Region>> =
            regions.iter().zip(&files).map(|(region, file)| map(region, file)).collect();
        self.send_memory(mapped?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let queue = Self::queue(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.ask(Request::RingSize { queue, size })
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let queue = Self::queue(index)?;
        let logs = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        let addresses = RingAddresses {
            descriptors: descriptor,
            available,
            used,
            used_log: logs.then_some(log),
        };
        self.ask(Request::RingAddresses { queue, addresses })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = Self::queue(index)?;
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ask(Request::RingBase { queue, base })
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = Self::queue(index)?;
        let timeout = self.config.drain_timeout;
        let base = ask(&mut *self.sink, Request::RingStop { queue }, timeout).map_err(refuse)?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let file = fd.ok_or(unsupported("a ring without a kick eventfd (busy polling)"))?;
        let fd = Arc::new(checked_eventfd(file).map_err(Error::ReqHandlerError)?);
        self.ask(Request::Kick { queue: index.into(), fd })
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.map(checked_eventfd).transpose().map_err(Error::ReqHandlerError)?;
        self.ask(Request::Call { queue: index.into(), fd })
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.map(checked_eventfd).transpose().map_err(Error::ReqHandlerError)?;
        self.ask(Request::Error { queue: index.into(), fd })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered == 0 { Ok(()) } else { Err(Error::FeatureMismatch) }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.config.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = Self::queue(index)?;
        // Disabling drains, as stopping does.
        let timeout = if enable { ANSWER_TIMEOUT } else { self.config.drain_timeout };
        let request = Request::RingEnable { queue, enable };
        ask(&mut *self.sink, request, timeout).map(|_| ()).map_err(refuse)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let mut space = [0; CONFIG_BYTES_MAX];
        space[..CONFIG_BYTES].copy_from_slice(&self.config.config_space());
        let start = usize::try_from(offset).map_err(|_| Error::InvalidParam)?;
        let bytes = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        let end = start.checked_add(bytes).ok_or(Error::InvalidParam)?;
        space.get(start..end).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // No field is writable (the write cache cannot be switched); a guest that writes anyway
        // is ignored, as virtio says of read-only fields.
        tracing::debug!(offset, bytes = buf.len(), "write to the configuration space ignored");
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(unsupported("a GPU socket for a disk"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(unsupported("SHARED_OBJECT was not offered"))
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if queues > self.config.queues || size > self.config.queue_size_max {
            return Err(refuse(inflight::InflightError::Layout { queues, size }));
        }
        let file = inflight::create(queues, size).map_err(refuse)?;
        let bytes = inflight::buffer_bytes(queues, size);
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if queues > self.config.queues || size > self.config.queue_size_max {
            return Err(refuse(inflight::InflightError::Layout { queues, size }));
        }
        let buffer =
            InflightBuffer::map(&file, inflight.mmap_offset, inflight.mmap_size, queues, size)
                .map_err(refuse)?;
        self.ask(Request::Inflight(Arc::new(buffer)))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let mut regions = self.regions.clone();
        regions.push(map(region, &fd)?);
        self.send_memory(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (gpa, user, bytes) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let mut regions = self.regions.clone();
        let same = |known: &Region| {
            known.gpa == gpa && known.user == user && known.mapping.len() as u64 == bytes
        };
        let Some(at) = regions.iter().position(same) else {
            return Err(unsupported("removal of a memory region that is not there"));
        };
        regions.remove(at);
        self.send_memory(regions)
    }

    /// There is no state: rings are drained whole before a pause is acknowledged, and what the guest
    /// sees of the disk is the volume. So what is saved is empty, and only that is loaded.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        match phase {
            VhostTransferStatePhase::STOPPED => {}
        }
        match direction {
            // Closed without a byte: the end of the state.
            VhostTransferStateDirection::SAVE => {
                drop(fd);
                self.saving = true;
            }
            VhostTransferStateDirection::LOAD => self.loading = Some(fd),
        }
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        if core::mem::take(&mut self.saving) {
            // Without this the destination would start behind requests that nobody has answered.
            self.ask(Request::Drained)?;
        }
        match self.loading.take() {
            None => Ok(()),
            Some(mut file) => empty_state(&mut file),
        }
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(unsupported("SHMEM was not offered"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::new(&file, log.mmap_offset, log.mmap_size).map_err(refuse)?;
        self.ask(Request::Log(Arc::new(log)))
    }
}

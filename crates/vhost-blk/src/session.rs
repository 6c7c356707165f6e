//! One front end's connection: the vhost-user messages, checked and passed on to the device.
//!
//! Runs on the listener's control thread. What is slow or may fail (mapping memory, checking
//! descriptors) happens here; the device gets finished objects.

use core::time::Duration;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::config::{CONFIG_BYTES, F_PROTOCOL_FEATURES};
use crate::control::{Request, ask, ask_drained};
use crate::dirty::DirtyLog;
use crate::eventfd::{checked_eventfd, make_nonblocking};
use crate::handover::{ConnectionState, FdIndex, FdTable, Fds, HandoverError, RingState};
use crate::inflight::{self, InflightBuffer, Keeper};
use crate::memory::{GuestMemory, Mapping, REGIONS_MAX, Region};
use crate::record::{KnownInflight, KnownLog, KnownRegion, Record};
use crate::ring::RingAddresses;
use crate::{ControlSink, DeviceConfig};

/// How long the reactor may take for a message that waits for nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a front end that drains a queue is kept waiting for a head that is not there: one may be
/// about to open.
const HOPEFUL: Duration = Duration::from_secs(2);

/// The largest configuration space a front end may ask for: what virtio-blk may ever define.
const CONFIG_BYTES_MAX: usize = 256;

pub(crate) struct Session {
    config: DeviceConfig,
    sink: Box<dyn ControlSink>,
    /// What the front end has said.
    record: Record,
    /// The in-flight buffer was replaced while rings may have been running: which of them is in
    /// use is not known.
    inflight_unclear: bool,
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
        let record = Record::new(config.queues);
        Self { config, sink, record, inflight_unclear: false, loading: None, saving: false }
    }

    /// Starts serving a new connection.
    pub(crate) fn connected(&mut self) -> Result<()> {
        self.attach()?;
        // Should the front end keep a buffer, it replaces this one.
        let (queues, size) = (self.config.queues, self.config.queue_size_max);
        let file = inflight::create(queues, size).map_err(refuse)?;
        let bytes = inflight::buffer_bytes(queues, size);
        self.use_inflight(KnownInflight { offset: 0, bytes, queues, size, own: true, file })
    }

    /// Begins a connection of which nothing is known yet.
    pub(crate) fn attach(&mut self) -> Result<()> {
        self.config.capacity.forget_front_end();
        self.ask(Request::Connected)?;
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        self.record = Record::new(self.config.queues);
        self.inflight_unclear = false;
        (self.loading, self.saving) = (None, false);
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
        self.config.capacity.forget_front_end();
        // Only now, so that unmapping, which takes a while for a large guest, happens here and
        // not on the reactor thread.
        self.forget();
    }

    /// The connection as plain data, if it [is clear](Session::is_clear).
    pub(crate) fn export(
        &mut self,
        stream: FdIndex,
        table: &mut FdTable,
    ) -> (ConnectionState, Vec<Region>) {
        let channel = self.config.capacity.take_channel();
        core::mem::take(&mut self.record).export(channel, stream, table)
    }

    /// True if the connection could be handed over.
    pub(crate) fn is_clear(&self) -> bool {
        !self.inflight_unclear && self.loading.is_none() && !self.saving
    }

    /// Says everything again that a front end has said to another process. The features first: see
    /// [`crate::listener`]. Rings start when the device is next polled.
    pub(crate) fn resume(
        &mut self,
        state: &ConnectionState,
        fds: &mut Fds,
    ) -> core::result::Result<(), HandoverError> {
        let refused = |error: Error| HandoverError::Refused { reason: error.to_string() };
        if state.rings.len() > usize::from(self.config.queues) {
            let reason =
                format!("{} queues, the device has {}", state.rings.len(), self.config.queues);
            return Err(HandoverError::Refused { reason });
        }
        let mut memory = Vec::new();
        for region in &state.memory {
            let file = File::from(fds.take(region.file)?);
            let (gpa, user) = (region.gpa, region.user);
            let known = map(gpa, user, region.bytes, region.offset, file);
            memory.push(known.map_err(refused)?);
        }
        self.send_memory(memory).map_err(refused)?;
        if let Some(known) = &state.inflight {
            let file = File::from(fds.take(known.file)?);
            self.use_inflight(KnownInflight {
                offset: known.offset,
                bytes: known.bytes,
                queues: known.queues,
                size: known.size,
                own: known.own,
                file,
            })
            .map_err(refused)?;
        }
        if let Some(log) = &state.log {
            let file = File::from(fds.take(log.file)?);
            self.use_log(log.offset, log.bytes, file).map_err(refused)?;
        }
        // Before the rings: whoever starts one may have to be told of a new size.
        if let Some(channel) = &state.channel {
            let socket = fds.take(channel.socket)?;
            self.config.capacity.resume_channel(socket, channel.known_blocks);
        }
        for (index, ring) in state.rings.iter().enumerate() {
            let queue = u16::try_from(index).expect("fewer than the device's queues");
            self.resume_ring(queue, ring, fds)?;
        }
        Ok(())
    }

    fn resume_ring(
        &mut self,
        queue: u16,
        ring: &RingState,
        fds: &mut Fds,
    ) -> core::result::Result<(), HandoverError> {
        let refused = |error: Error| HandoverError::Refused { reason: error.to_string() };
        let small = u8::try_from(queue).expect("at most 64 queues");
        let index = u32::from(queue);
        if let Some(size) = ring.size {
            self.set_vring_num(index, size.into()).map_err(refused)?;
        }
        if let Some(base) = ring.base {
            self.set_vring_base(index, base.into()).map_err(refused)?;
        }
        if let Some(addresses) = ring.addresses {
            self.use_addresses(queue, addresses.into()).map_err(refused)?;
        }
        if let Some(fd) = ring.call {
            self.set_vring_call(small, Some(fds.take(fd)?.into())).map_err(refused)?;
        }
        if let Some(fd) = ring.error {
            self.set_vring_err(small, Some(fds.take(fd)?.into())).map_err(refused)?;
        }
        if ring.enabled {
            self.set_vring_enable(index, true).map_err(refused)?;
        }
        if let Some(fd) = ring.kick {
            self.set_vring_kick(small, Some(fds.take(fd)?.into())).map_err(refused)?;
        }
        Ok(())
    }

    /// The front end reads messages of the device there.
    pub(crate) fn set_channel(&mut self, channel: OwnedFd) {
        self.config.capacity.set_channel(channel);
    }

    fn ask(&mut self, request: Request) -> Result<()> {
        ask(&mut *self.sink, request, ANSWER_TIMEOUT).map(|_| ()).map_err(refuse)
    }

    fn send_memory(&mut self, known: Vec<KnownRegion>) -> Result<()> {
        let regions = known.iter().map(|known| known.region.clone()).collect();
        let memory = GuestMemory::new(regions).map_err(refuse)?;
        self.ask(Request::Memory(Arc::new(memory)))?;
        self.record.memory = known;
        Ok(())
    }

    fn use_inflight(&mut self, known: KnownInflight) -> Result<()> {
        let KnownInflight { offset, bytes, queues, size, own, ref file } = known;
        if queues > self.config.queues || size > self.config.queue_size_max {
            return Err(refuse(inflight::InflightError::Layout { queues, size }));
        }
        let keeper = if own { Keeper::BackEnd } else { Keeper::FrontEnd };
        let buffer =
            InflightBuffer::map(file, offset, bytes, queues, size, keeper).map_err(refuse)?;
        self.ask(Request::Inflight(Arc::new(buffer)))?;
        self.inflight_unclear |= self.record.any_started();
        self.record.inflight = Some(known);
        Ok(())
    }

    fn use_log(&mut self, offset: u64, bytes: u64, file: File) -> Result<()> {
        let log = DirtyLog::new(&file, offset, bytes).map_err(refuse)?;
        self.ask(Request::Log(Arc::new(log)))?;
        self.record.log = Some(KnownLog { offset, bytes, file });
        Ok(())
    }

    fn use_addresses(&mut self, queue: u16, addresses: RingAddresses) -> Result<()> {
        self.ask(Request::RingAddresses { queue, addresses })?;
        self.record.ring(queue).addresses = Some(addresses);
        Ok(())
    }

    fn queue(index: u32) -> Result<u16> {
        u16::try_from(index).map_err(|_| Error::InvalidParam)
    }
}

fn map(gpa: u64, user: u64, bytes: u64, offset: u64, file: File) -> Result<KnownRegion> {
    let mapping = Arc::new(Mapping::new(&file, offset, bytes).map_err(refuse)?);
    Ok(KnownRegion { region: Region { gpa, user, mapping }, offset, file })
}

/// A descriptor of an eventfd for the record.
fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().map_err(Error::ReqHandlerError)
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
        self.ask(Request::Features(features))?;
        self.record.features = Some(features);
        if features & F_PROTOCOL_FEATURES == 0 {
            for ring in &mut self.record.rings {
                ring.enabled = true;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let known: Result<Vec<KnownRegion>> = regions
            .iter()
            .zip(files)
            .map(|(region, file)| {
                let (gpa, user) = (region.guest_phys_addr, region.user_addr);
                map(gpa, user, region.memory_size, region.mmap_offset, file)
            })
            .collect();
        self.send_memory(known?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let queue = Self::queue(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.ask(Request::RingSize { queue, size })?;
        self.record.ring(queue).size = Some(size);
        Ok(())
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
        self.use_addresses(queue, addresses)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = Self::queue(index)?;
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ask(Request::RingBase { queue, base })?;
        self.record.ring(queue).base = Some(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = Self::queue(index)?;
        let timeout = self.config.drain_timeout;
        let request = (queue, Request::RingStop { queue });
        let base = ask_drained(&mut *self.sink, request, HOPEFUL, timeout).map_err(refuse)?;
        let ring = self.record.ring(queue);
        ring.base = Some(base);
        ring.kick = None;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let file = fd.ok_or(unsupported("a ring without a kick eventfd (busy polling)"))?;
        let fd = Arc::new(checked_eventfd(file).map_err(Error::ReqHandlerError)?);
        let kept = duplicate(&fd)?;
        self.ask(Request::Kick { queue: index.into(), fd })?;
        self.record.ring(index.into()).kick = Some(kept);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.map(checked_eventfd).transpose().map_err(Error::ReqHandlerError)?;
        let kept = fd.as_ref().map(duplicate).transpose()?;
        self.ask(Request::Call { queue: index.into(), fd })?;
        self.record.ring(index.into()).call = kept;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.map(checked_eventfd).transpose().map_err(Error::ReqHandlerError)?;
        let kept = fd.as_ref().map(duplicate).transpose()?;
        self.ask(Request::Error { queue: index.into(), fd })?;
        self.record.ring(index.into()).error = kept;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::DEVICE_STATE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.record.protocol_features = Some(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.config.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = Self::queue(index)?;
        let request = Request::RingEnable { queue, enable };
        if enable {
            self.ask(request)?;
        } else {
            // It drains, as stopping does.
            let timeout = self.config.drain_timeout;
            ask_drained(&mut *self.sink, (queue, request), HOPEFUL, timeout).map_err(refuse)?;
        }
        self.record.ring(queue).enabled = enable;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        self.config.blocks = self.config.capacity.at_least(self.config.blocks);
        self.config.capacity.read(self.config.blocks);
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
        let (offset, bytes) = (inflight.mmap_offset, inflight.mmap_size);
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        self.use_inflight(KnownInflight { offset, bytes, queues, size, own: false, file })
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
        let (gpa, user) = (region.guest_phys_addr, region.user_addr);
        let known = map(gpa, user, region.memory_size, region.mmap_offset, fd)?;
        let mut regions = self.record.regions();
        regions.push(known.region.clone());
        let memory = GuestMemory::new(regions).map_err(refuse)?;
        self.ask(Request::Memory(Arc::new(memory)))?;
        self.record.memory.push(known);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (gpa, user, bytes) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let same = |known: &Region| {
            known.gpa == gpa && known.user == user && known.mapping.len() as u64 == bytes
        };
        let mut regions = self.record.regions();
        let Some(at) = regions.iter().position(same) else {
            return Err(unsupported("removal of a memory region that is not there"));
        };
        regions.remove(at);
        let memory = GuestMemory::new(regions).map_err(refuse)?;
        self.ask(Request::Memory(Arc::new(memory)))?;
        self.record.memory.remove(at);
        Ok(())
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
        self.use_log(log.mmap_offset, log.mmap_size, file)
    }
}

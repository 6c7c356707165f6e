//! Files and block devices, with direct I/O.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use base::limits::{HEADER_BYTES, PAGE_BYTES};
use base::{Buffer, BufferMut};
use rustix::fs::{
    Advice, AtFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags, fadvise, flock,
    open, seek, stat, statx,
};
use rustix::io::Errno;

use crate::WRITE_PARTS_MAX;
use crate::clock::now;
use crate::completion::Completion;
use crate::config::{DeviceInfo, DeviceOptions};
use crate::error::{Error, ErrorKind, IoError};
use crate::handle::{DeviceHandle, Token};
use crate::operation::{Gather, Operation, Read, Target, Write};
use crate::reactor::Reactor;

/// How long to wait for the lock of a process that is going away.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(5);

pub(crate) struct Device {
    pub(crate) file: OwnedFd,
    pub(crate) target: Target,
    pub(crate) info: DeviceInfo,
    /// Operations under way.
    pub(crate) outstanding: u32,
    pub(crate) closing: bool,
}

impl Device {
    /// Checks that `length` bytes at `offset` may be transferred.
    fn check(&self, offset: u64, length: u64) -> Result<(), IoError> {
        let block_bytes = u64::from(self.info.block_bytes);
        if length == 0 {
            return Err(IoError::Invalid("the length is zero"));
        }
        if !offset.is_multiple_of(block_bytes) || !length.is_multiple_of(block_bytes) {
            return Err(IoError::Invalid("the range is not a whole number of the device's blocks"));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.info.size_bytes => Ok(()),
            _ => Err(IoError::Invalid("the range ends after the device")),
        }
    }

    fn check_memory(&self, memory: *const u8) -> Result<(), IoError> {
        if memory.addr().is_multiple_of(self.info.memory_alignment as usize) {
            Ok(())
        } else {
            Err(IoError::Invalid("the memory is not aligned for direct I/O"))
        }
    }

    fn check_writable(&self) -> Result<(), IoError> {
        if self.info.read_only {
            return Err(IoError::Invalid("the device is open read-only"));
        }
        Ok(())
    }
}

/// Takes the lock. A process that was killed keeps it until the kernel has taken its ring apart,
/// some milliseconds later; the ring's file table is what holds it. That is as it should be: as
/// long as a write of the dead process may still reach the device, nobody else has it.
fn lock(file: &OwnedFd) -> rustix::io::Result<()> {
    let deadline = now() + LOCK_PATIENCE;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if now() < deadline => std::thread::sleep(LOCK_RETRY),
            result => return result,
        }
    }
}

/// Opens, locks and measures what `path` names.
fn open_file(path: &Path, options: DeviceOptions) -> Result<(OwnedFd, DeviceInfo), Error> {
    let context = || path.display().to_string();
    let failed = |error: Errno| {
        let kind = match error {
            Errno::NOENT | Errno::NOTDIR => ErrorKind::NotFound,
            Errno::ACCESS | Errno::PERM | Errno::ROFS => ErrorKind::PermissionDenied,
            Errno::BUSY | Errno::WOULDBLOCK | Errno::TXTBSY => ErrorKind::InUse,
            Errno::MFILE | Errno::NFILE => ErrorKind::FileDescriptors,
            _ => ErrorKind::Os,
        };
        Error::os(kind, context(), error.into())
    };
    let is_block_device = match FileType::from_raw_mode(stat(path).map_err(failed)?.st_mode) {
        FileType::RegularFile => false,
        FileType::BlockDevice => true,
        _ => return Err(Error::new(ErrorKind::NotADevice, context())),
    };
    let mut flags = OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY;
    flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    if options.exclusive && is_block_device {
        flags |= OFlags::EXCL; // without CREATE: refuse a device that is mounted or claimed
    }
    let file = open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::INVAL => Error::os(ErrorKind::DirectIoUnsupported, context(), error.into()),
        other => failed(other),
    })?;
    if options.exclusive {
        lock(&file).map_err(failed)?;
    }
    let wanted = StatxFlags::TYPE | StatxFlags::SIZE | StatxFlags::DIOALIGN;
    let status = statx(&file, "", AtFlags::EMPTY_PATH, wanted).map_err(failed)?;
    if (FileType::from_raw_mode(status.stx_mode.into()) == FileType::BlockDevice) != is_block_device
    {
        return Err(Error::new(ErrorKind::InUse, format!("{} was replaced", path.display())));
    }
    let known = StatxFlags::from_bits_retain(status.stx_mask).contains(StatxFlags::DIOALIGN);
    if known && status.stx_dio_offset_align == 0 {
        return Err(Error::new(ErrorKind::DirectIoUnsupported, context()));
    }
    // What does not say (tmpfs) takes whole pages.
    let page = u32::try_from(PAGE_BYTES).expect("a page is small");
    let (block_bytes, memory_alignment) = match (known, is_block_device) {
        (true, _) => (status.stx_dio_offset_align, status.stx_dio_mem_align.max(1)),
        (false, true) => (rustix::fs::ioctl_blksszget(&file).map_err(failed)?, page),
        (false, false) => (page, page),
    };
    let size_bytes = if is_block_device {
        seek(&file, SeekFrom::End(0)).map_err(failed)?
    } else {
        status.stx_size
    };
    if !is_block_device {
        // What the page cache holds of it (a file just made, a backup just restored) would send
        // each write through a kernel worker, to drop its page first. Advice only.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
    }
    let read_only = options.read_only;
    let info = DeviceInfo { size_bytes, block_bytes, memory_alignment, is_block_device, read_only };
    Ok((file, info))
}

impl Reactor {
    /// Opens a regular file or a block device for direct I/O. Blocks for as long as the file
    /// system does, and up to half a second for an exclusive lock that is taken.
    pub fn open_device(
        &mut self,
        path: &Path,
        options: DeviceOptions,
    ) -> Result<DeviceHandle, Error> {
        let (file, info) = open_file(path, options)?;
        let target = self.files.install(&self.uring, file.as_fd());
        let device = Device { file, target, info, outstanding: 0, closing: false };
        Ok(DeviceHandle(self.devices.insert(device)))
    }

    /// What is known of a device; `None` if the handle is no longer valid.
    pub fn device_info(&self, device: DeviceHandle) -> Option<DeviceInfo> {
        self.devices.get(device.0).map(|device| device.info)
    }

    /// Closes a device once the operations under way on it have completed; no more are taken.
    /// Completes with [`Completion::DeviceClosed`].
    pub fn close_device(&mut self, device: DeviceHandle) {
        if let Some(entry) = self.devices.get_mut(device.0)
            && !entry.closing
        {
            entry.closing = true;
            self.finish_device(device);
        }
    }

    /// Closes a closing device with nothing under way.
    fn finish_device(&mut self, device: DeviceHandle) {
        if self.devices.get(device.0).is_some_and(|entry| entry.closing && entry.outstanding == 0)
            && let Some(entry) = self.devices.remove(device.0)
        {
            self.files.remove(&self.uring, entry.target);
            // Explicitly: the kernel may hold its reference to the file a little longer.
            let _ = flock(&entry.file, FlockOperation::Unlock);
            drop(entry.file);
            self.completions.push_back(Completion::DeviceClosed { device });
        }
    }

    /// Releases every lock; no operation is under way.
    pub(crate) fn unlock_devices(&mut self) {
        for device in self.devices.values() {
            let _ = flock(&device.file, FlockOperation::Unlock);
        }
    }

    /// The operation on `device` is over.
    pub(crate) fn device_operation_ended(&mut self, device: DeviceHandle) {
        if let Some(entry) = self.devices.get_mut(device.0) {
            entry.outstanding -= 1;
            self.finish_device(device);
        }
    }

    /// The device, if it takes operations and `check` agrees; counts the operation.
    fn begin(
        &mut self,
        device: DeviceHandle,
        check: impl FnOnce(&Device) -> Result<(), IoError>,
    ) -> Result<(Target, usize), IoError> {
        let entry = self.devices.get_mut(device.0).ok_or(IoError::Closed)?;
        if entry.closing {
            return Err(IoError::Closed);
        }
        check(entry)?;
        entry.outstanding += 1;
        Ok((entry.target, entry.info.block_bytes as usize))
    }

    /// Reads `length` bytes at byte `offset` into `buffer`'s payload at `start`. Completes with
    /// [`Completion::Read`].
    pub fn read(
        &mut self,
        device: DeviceHandle,
        offset: u64,
        mut buffer: BufferMut,
        start: usize,
        length: usize,
        token: Token,
    ) {
        let begun = self.begin(device, |entry| {
            entry.check(offset, length as u64)?;
            let payload = buffer.payload_mut();
            match start.checked_add(length) {
                Some(end) if end <= payload.len() => entry.check_memory(&raw const payload[start]),
                _ => Err(IoError::Invalid("the range ends after the buffer")),
            }
        });
        match begun {
            Ok((target, block_bytes)) => {
                self.start(Operation::Read(Read {
                    device: device.0,
                    target,
                    token,
                    offset,
                    buffer,
                    start: HEADER_BYTES + start,
                    length,
                    done: 0,
                    block_bytes,
                    retries: 0,
                }));
            }
            Err(error) => {
                self.completions.push_back(Completion::Read { token, buffer, result: Err(error) });
            }
        }
    }

    /// Writes `parts`, one after the other, at byte `offset`: one contiguous write of up to
    /// [`WRITE_PARTS_MAX`] parts. Each part's memory and length are aligned as [`DeviceInfo`]
    /// says (pages always are). Completes with [`Completion::Written`].
    pub fn write(
        &mut self,
        device: DeviceHandle,
        offset: u64,
        parts: impl IntoIterator<Item = Buffer>,
        token: Token,
    ) {
        let mut gather = self.gathers.pop().unwrap_or_default();
        gather.set(parts);
        let length: usize = gather.parts.iter().map(Buffer::len).sum();
        let begun = self.begin(device, |entry| {
            entry.check_writable()?;
            entry.check(offset, length as u64)?;
            if gather.parts.len() > WRITE_PARTS_MAX {
                return Err(IoError::Invalid("too many parts"));
            }
            if u32::try_from(length).is_err() {
                return Err(IoError::Invalid("more than 4 GiB in one write"));
            }
            gather.parts.iter().try_for_each(|part| {
                if !part.len().is_multiple_of(entry.info.block_bytes as usize) {
                    return Err(IoError::Invalid("a part is not a whole number of blocks"));
                }
                entry.check_memory(part.bytes().as_ptr())
            })
        });
        match begun {
            Ok((target, block_bytes)) => {
                self.start(Operation::Write(Write {
                    device: device.0,
                    target,
                    token,
                    offset,
                    gather,
                    length,
                    done: 0,
                    block_bytes,
                    retries: 0,
                }));
            }
            Err(error) => {
                self.recycle(gather);
                self.completions.push_back(Completion::Written { token, result: Err(error) });
            }
        }
    }

    /// Drops a gather's parts and keeps its storage for the next write.
    pub(crate) fn recycle(&mut self, mut gather: Box<Gather>) {
        gather.clear();
        self.gathers.push(gather);
    }

    /// Puts on media what was written before (fdatasync): every write that had completed when
    /// this was called. Completes with [`Completion::Synced`].
    pub fn sync(&mut self, device: DeviceHandle, token: Token) {
        match self.begin(device, Device::check_writable) {
            Ok((target, _)) => {
                self.start(Operation::Sync { device: device.0, target, token, retries: 0 });
            }
            Err(error) => {
                self.completions.push_back(Completion::Synced { token, result: Err(error) });
            }
        }
    }

    /// Gives the range's space back (hole punching; the size stays). It reads as zeroes. Completes
    /// with [`Completion::Discarded`].
    pub fn discard(&mut self, device: DeviceHandle, offset: u64, length: u64, token: Token) {
        let begun = self.begin(device, |entry| {
            entry.check_writable()?;
            entry.check(offset, length)
        });
        match begun {
            Ok((target, _)) => {
                let device = device.0;
                self.start(Operation::Discard {
                    device,
                    target,
                    token,
                    offset,
                    length,
                    retries: 0,
                });
            }
            Err(error) => {
                self.completions.push_back(Completion::Discarded { token, result: Err(error) });
            }
        }
    }
}

/// The table of files registered with the kernel, which spares it looking descriptors up.
pub(crate) struct FileTable {
    free: Vec<u32>,
}

impl FileTable {
    /// Entries asked for; never more than RLIMIT_NOFILE allows.
    const ENTRIES: u32 = 1024;

    pub(crate) fn new(uring: &crate::uring::Uring) -> Result<Self, Error> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let entries = limit.map_or(Self::ENTRIES, |limit| {
            u32::try_from(limit).unwrap_or(u32::MAX).min(Self::ENTRIES)
        });
        uring
            .submitter()
            .register_files_sparse(entries)
            .map_err(|error| Error::os(ErrorKind::Os, "registering a file table", error))?;
        Ok(Self { free: (0..entries).rev().collect() })
    }

    /// Registers `file`; without room in the table, its descriptor has to do.
    pub(crate) fn install(
        &mut self,
        uring: &crate::uring::Uring,
        file: std::os::fd::BorrowedFd<'_>,
    ) -> Target {
        let descriptor = file.as_raw_fd();
        if let Some(index) = self.free.pop() {
            match uring.submitter().register_files_update(index, &[descriptor]) {
                Ok(1) => return Target::Registered(index),
                _ => self.free.push(index),
            }
        }
        Target::Descriptor(descriptor)
    }

    /// Takes `target` out of the table; nothing that uses it is under way.
    pub(crate) fn remove(&mut self, uring: &crate::uring::Uring, target: Target) {
        if let Target::Registered(index) = target
            && let Ok(1) = uring.submitter().register_files_update(index, &[-1])
        {
            self.free.push(index);
        }
    }
}

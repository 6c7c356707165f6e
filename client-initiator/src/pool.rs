//! `holdfast pool format`.
//!
//! Everything is checked before anything is written: paths, sizes, locks, what the devices hold,
//! the cluster store and the server's name. What is written last, after a sync of the rest, are
//! the labels that make the devices a pool.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base::PoolId;
use cluster::{Create, servers};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use serde::Serialize;
use store::{
    DeviceIndex, DeviceInfo, DeviceRole, FormatConfig, FormatError, FormatWrite, LABEL_AREA_BYTES,
    LabelError,
};
use target_daemon::pool::{PoolError, lock, read_start};
use target_daemon::size::format_size;

use crate::arguments::{FormatArguments, StoreArgument};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::signature::{self, TAIL_BYTES};

/// The JSON of `pool format`.
#[derive(Serialize)]
struct FormatView {
    /// UUID.
    pool: String,
    /// UUID.
    server: String,
    /// UUID.
    cluster: String,
    /// The server's name.
    name: String,
    devices: Vec<DeviceView>,
}

/// A device of a pool.
#[derive(Serialize)]
struct DeviceView {
    path: PathBuf,
    /// `fast` or `mass`.
    role: &'static str,
    bytes: u64,
    /// The file was made.
    created: bool,
}

/// A device as it was asked for.
struct Wanted<'a> {
    path: &'a Path,
    role: DeviceRole,
    /// If it is a file to be made.
    size: Option<u64>,
}

/// An opened, locked device.
struct Device {
    path: PathBuf,
    file: File,
    role: DeviceRole,
    bytes: u64,
    created: bool,
}

pub(crate) fn format(
    store: &StoreArgument,
    arguments: &FormatArguments,
    output: &Output,
) -> Result<(), Failure> {
    let address = store.address()?;
    let store = cluster::open(address, Create::IfMissing)?;
    let server = servers::id_for(store.as_ref(), &arguments.name, arguments.force)?;
    let cluster = store.cluster_id()?;
    let mut devices = Devices::open(&wanted(arguments), arguments.force)?;
    let config = FormatConfig {
        pool: PoolId::from_bytes(cluster::new_id()),
        cluster,
        server,
        devices: devices
            .list
            .iter()
            .map(|device| DeviceInfo { bytes: device.bytes, role: device.role })
            .collect(),
        log_bytes: arguments.log_size.unwrap_or(0),
        segment_bytes: 0,
        chunk_bytes: 0,
        replicas_max: 0,
    };
    let writes = store::format(&config).map_err(|error| unfit(&error, &devices.list))?;
    write_pool(&devices.list, &writes).map_err(|(index, error)| {
        let path = devices.list[index].path.display();
        let text = format!("{path}: {error}; the pool was not made, format it again");
        Failure::new(Exit::Failed, text)
    })?;
    devices.keep();
    servers::register(store.as_ref(), server, &arguments.name, config.pool).map_err(|error| {
        let failure = Failure::from(error);
        let text = format!(
            "the pool was made but its server is not registered: {}; give the same command \
             with --force",
            failure.message
        );
        Failure::new(failure.exit, text)
    })?;
    let view = FormatView {
        pool: config.pool.to_string(),
        server: server.to_string(),
        cluster: cluster.to_string(),
        name: arguments.name.clone(),
        devices: devices.list.iter().map(device_view).collect(),
    };
    output.print(&view, || {
        let device = |device: &DeviceView| {
            format!("\n  {}  {}  {}", device.role, format_size(device.bytes), device.path.display())
        };
        let list: String = view.devices.iter().map(device).collect();
        format!("formatted pool {} of server {}:{list}", view.pool, view.name)
    });
    Ok(())
}

fn role_name(role: DeviceRole) -> &'static str {
    match role {
        DeviceRole::Fast => "fast",
        DeviceRole::Mass => "mass",
    }
}

fn device_view(device: &Device) -> DeviceView {
    DeviceView {
        path: device.path.clone(),
        role: role_name(device.role),
        bytes: device.bytes,
        created: device.created,
    }
}

fn wanted(arguments: &FormatArguments) -> Vec<Wanted<'_>> {
    let fast = arguments.fast.iter().map(|path| Wanted {
        path,
        role: DeviceRole::Fast,
        size: arguments.fast_size.or(arguments.size),
    });
    let mass = arguments.mass.iter().map(|path| Wanted {
        path,
        role: DeviceRole::Mass,
        size: arguments.mass_size.or(arguments.size),
    });
    fast.chain(mass).collect()
}

fn unfit(error: &FormatError, devices: &[Device]) -> Failure {
    let text = match error {
        FormatError::TooSmall { device, bytes, need } => {
            let path = devices[usize::from(device.0)].path.display();
            let (bytes, least) = (format_size(*bytes), format_size(*need));
            format!(
                "{path} has {bytes}, which is too small: a pool of this shape needs {least} of it ({need} bytes)"
            )
        }
        FormatError::NoHome => "no space is left for the home: give a mass device, or --log-size \
                                so that a part of the fast ones is home"
            .to_owned(),
        FormatError::Devices | FormatError::Value { .. } => error.to_string(),
    };
    Failure::new(Exit::Usage, text)
}

/// The devices to format. Files that were made for it are removed again unless they are kept.
struct Devices {
    list: Vec<Device>,
    kept: bool,
}

impl Devices {
    /// Opens, locks and checks all of them; every problem is told at once.
    fn open(wanted: &[Wanted<'_>], force: bool) -> Result<Self, Failure> {
        let mut devices = Self { list: Vec::new(), kept: false };
        let mut seen = BTreeSet::new();
        let mut failures: Vec<Failure> = Vec::new();
        for wanted in wanted {
            // A file that the first mention made is there at the second.
            let identity = fs::metadata(wanted.path).map(|file| (file.dev(), file.ino()));
            if identity.is_ok_and(|identity| seen.contains(&identity)) {
                let text = format!("{}: it is given twice", wanted.path.display());
                failures.push(Failure::new(Exit::Usage, text));
                continue;
            }
            match open_device(wanted, force) {
                Ok(device) => {
                    let identity = device.file.metadata().map(|file| (file.dev(), file.ino()));
                    seen.extend(identity.ok());
                    devices.list.push(device);
                }
                Err(failure) => failures.push(failure),
            }
        }
        let Some(first) = failures.first() else { return Ok(devices) };
        let exit = first.exit;
        let text: Vec<_> = failures.into_iter().map(|failure| failure.message).collect();
        Err(Failure::new(exit, text.join("\n")))
    }

    fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for device in self.list.iter().filter(|device| device.created && !self.kept) {
            // The failure that led here is what the user has to read.
            drop(fs::remove_file(&device.path));
        }
    }
}

fn open_device(wanted: &Wanted<'_>, force: bool) -> Result<Device, Failure> {
    let path = wanted.path;
    let failed = |error: io::Error| {
        let advice = match error.raw_os_error() {
            Some(code) if code == rustix::io::Errno::BUSY.raw_os_error() => {
                "; it is mounted or used by another program: is it the right device?"
            }
            Some(_) | None => "",
        };
        Failure::new(Exit::Failed, format!("{}: {error}{advice}", path.display()))
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => create_file(wanted),
        Err(error) => Err(failed(error)),
        Ok(metadata) => {
            let kind = metadata.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                let text = format!("{} is neither a file nor a block device", path.display());
                return Err(Failure::new(Exit::Usage, text));
            }
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            if kind.is_block_device() {
                // Refused by the kernel while it is mounted or part of something.
                options.custom_flags(OFlags::EXCL.bits().cast_signed());
            }
            let mut file = options.open(path).map_err(failed)?;
            lock(path, &file).map_err(|error| lock_failure(&error))?;
            let mut bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
            if bytes == 0
                && kind.is_file()
                && let Some(size) = wanted.size
            {
                allocate(&file, size).map_err(failed)?;
                bytes = size;
            }
            check_content(path, &mut file, bytes, force)?;
            let path = fs::canonicalize(path).map_err(failed)?;
            Ok(Device { path, file, role: wanted.role, bytes, created: false })
        }
    }
}

fn lock_failure(error: &PoolError) -> Failure {
    let exit = match error {
        PoolError::InUse { .. } => Exit::Conflict,
        PoolError::Device { .. } | PoolError::Label { .. } => Exit::Failed,
    };
    Failure::new(exit, error.to_string())
}

fn create_file(wanted: &Wanted<'_>) -> Result<Device, Failure> {
    let path = wanted.path;
    let shown = path.display();
    if path.starts_with("/dev") {
        return Err(Failure::new(
            Exit::Usage,
            format!("there is no device {shown}; check the name"),
        ));
    }
    let Some(size) = wanted.size else {
        let role = role_name(wanted.role);
        let text = format!(
            "there is no {shown}; check the path, or give --size or --{role}-size to make a file"
        );
        return Err(Failure::new(Exit::Usage, text));
    };
    let failed = |error: io::Error| Failure::new(Exit::Failed, format!("{shown}: {error}"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let ready = lock(path, &file)
        .map_err(|error| lock_failure(&error))
        .and_then(|()| allocate(&file, size).map_err(failed))
        .and_then(|()| fs::canonicalize(path).map_err(failed));
    match ready {
        Ok(path) => Ok(Device { path, file, role: wanted.role, bytes: size, created: true }),
        Err(failure) => {
            drop(fs::remove_file(path));
            Err(failure)
        }
    }
}

/// Gives the file its space now: a pool that cannot grow is better found out before it is used.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => Ok(()),
        // A file system without preallocation: the size at least.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes),
        Err(errno) => Err(errno.into()),
    }
}

/// Refuses a device that holds something, unless forced to.
fn check_content(path: &Path, file: &mut File, bytes: u64, force: bool) -> Result<(), Failure> {
    let shown = path.display();
    let failed = |error: io::Error| Failure::new(Exit::Failed, format!("{shown}: {error}"));
    if force {
        return Ok(());
    }
    file.rewind().map_err(failed)?;
    let start = read_start(file).map_err(failed)?;
    let tail = bytes.saturating_sub(TAIL_BYTES as u64);
    file.seek(SeekFrom::Start(tail)).map_err(failed)?;
    let mut end = Vec::new();
    file.take(TAIL_BYTES as u64).read_to_end(&mut end).map_err(failed)?;
    let held = match store::identify(&start) {
        Ok(label) => Some(format!(
            "a Holdfast pool ({}, of server {} in cluster {})",
            label.pool, label.server, label.cluster
        )),
        Err(LabelError::Newer { .. } | LabelError::Damaged) => {
            Some("a Holdfast pool of a newer version or with a damaged label".to_owned())
        }
        // Blank, foreign or too short; what is wrong with a label alone cannot be asked here.
        Err(_) => signature::detect(&start, &end).map(str::to_owned),
    };
    match held {
        None => Ok(()),
        Some(held) => {
            let text = format!(
                "{shown} holds {held}; check the path, or give --force to destroy what is there"
            );
            Err(Failure::new(Exit::Conflict, text))
        }
    }
}

/// Writes the pool: no labels of before, then everything else, then the labels. On an error, the
/// index of the device.
fn write_pool(devices: &[Device], writes: &[FormatWrite]) -> Result<(), (usize, io::Error)> {
    let sync_all = || {
        for (index, device) in devices.iter().enumerate() {
            device.file.sync_all().map_err(|error| (index, error))?;
        }
        Ok(())
    };
    let write = |index: usize, bytes: &[u8], offset: u64| {
        devices[index].file.write_all_at(bytes, offset).map_err(|error| (index, error))
    };
    for (index, device) in devices.iter().enumerate() {
        // Backup partition tables too, or the kernel would find them again.
        let bytes = device.bytes.min(LABEL_AREA_BYTES as u64);
        let blank = vec![0; usize::try_from(bytes).expect("at most the label area's length")];
        write(index, &blank, 0)?;
        write(index, &blank, device.bytes - bytes)?;
    }
    sync_all()?;
    let is_label = |write: &&FormatWrite| write.offset < LABEL_AREA_BYTES as u64;
    let at = |device: DeviceIndex| usize::from(device.0);
    for part in writes.iter().filter(|part| !is_label(part)) {
        write(at(part.device), &part.bytes, part.offset)?;
    }
    sync_all()?;
    for part in writes.iter().filter(is_label) {
        write(at(part.device), &part.bytes, part.offset)?;
    }
    sync_all()?;
    for (index, device) in devices.iter().enumerate().filter(|(_, device)| device.created) {
        let parent = device.path.parent().unwrap_or(Path::new("/"));
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(|error| (index, error))?;
    }
    Ok(())
}

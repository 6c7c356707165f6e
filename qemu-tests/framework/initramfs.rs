//! What a guest boots from: Debian's kernel and modules, busybox, our init, and a disk with fio,
//! e2fsprogs and sfdisk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::binaries::{cache_directory, holdfast_binary, system_binary, work_directory};
use crate::cpio::Archive;

/// The guest's first process.
const INIT: &str = include_str!("../guest/init");

/// The programs besides busybox.
const PROGRAMS: [&str; 5] = ["fio", "mkfs.ext4", "e2fsck", "sfdisk", "blockdev"];

/// The modules that make virtio devices work.
const MODULES: [&str; 7] = [
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/char/virtio_console.ko",
    "drivers/block/virtio_blk.ko",
];

/// The size of the disk with the tools: fio comes with some eighty megabytes of libraries.
const TOOLS_MIB: u32 = 256;

/// What a guest boots from.
#[derive(Debug, Clone)]
pub(crate) struct BootFiles {
    /// The kernel image.
    pub(crate) kernel: PathBuf,
    /// The initramfs, built for this kernel: modules, busybox and init.
    pub(crate) initramfs: PathBuf,
    /// A read-only disk with the programs, which would fill the guest's memory.
    pub(crate) tools: PathBuf,
}

/// The verifying writer, as the guest knows it.
pub(crate) const WRITER: &str = "bin/guest_writer";

/// Finds the kernel and builds the rest, unless it is there, made from the same parts. `writer`: the
/// guest is to have the verifying writer.
pub(crate) fn boot_files(writer: bool) -> Result<BootFiles> {
    let cache = cache_directory()?;
    let kernel_root = cache.join("kernel");
    ensure!(
        kernel_root.join("complete").exists(),
        "no guest kernel in {}: run scripts/install",
        kernel_root.display()
    );
    let kernel = only_entry(&kernel_root.join("boot"), "vmlinuz-")?;
    let modules = only_entry(&kernel_root.join("lib/modules"), "")?;
    let modules = module_files(&modules);
    let tools = tool_files()?;

    // Test processes start together: one builds, the others wait for it.
    let lock = File::create(cache.join("guest-files.lock"))?;
    lock.lock()?;
    let initramfs = cached(&cache, "initramfs", &modules, |unfinished| {
        Ok(fs::write(unfinished, build_initramfs(&modules)?)?)
    })?;
    let tools = cached(&cache, "tools", &tools, |unfinished| build_tools(&tools, unfinished))?;
    let initramfs = if writer { with_writer(&initramfs)? } else { initramfs };
    Ok(BootFiles { kernel, initramfs, tools })
}

/// The initramfs with the verifying writer in a second archive behind the first: it is ours, of this
/// build, so it belongs neither into the cache nor to the other programs.
fn with_writer(initramfs: &Path) -> Result<PathBuf> {
    let program = holdfast_binary("guest_writer")?;
    let directory = work_directory()?;
    fs::create_dir_all(&directory)?;
    let stripped = tempfile::NamedTempFile::new_in(&directory)?;
    // Without what debuggers need it is a tenth as large; the guest has little memory.
    let mut strip = Command::new(system_binary("strip")?);
    let output = strip.arg("-o").args([stripped.path(), &program]).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "strip {} failed: {text}", program.display());
    let mut archive = Archive::default();
    archive.directory("bin");
    archive.file(WRITER, 0o755, fs::read(stripped.path())?);
    let mut bytes = fs::read(initramfs)?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(archive.encode());
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let path = directory.join(format!("initramfs-{:016x}", hasher.finish()));
    if !path.exists() {
        let mut unfinished = tempfile::NamedTempFile::new_in(&directory)?;
        unfinished.write_all(&bytes)?;
        unfinished.persist(&path)?;
    }
    Ok(path)
}

/// Files to copy: path in the guest, path on the host.
type Parts = BTreeMap<String, PathBuf>;

/// The file in the cache made from `parts`; older ones of its kind are removed.
fn cached(
    cache: &Path,
    kind: &str,
    parts: &Parts,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let wanted = cache.join(format!("{kind}-{:016x}", fingerprint(parts)?));
    if !wanted.exists() {
        for entry in fs::read_dir(cache)? {
            let path = entry?.path();
            if file_name(&path).starts_with(&format!("{kind}-")) {
                fs::remove_file(&path)?;
            }
        }
        let unfinished = cache.join(format!("{kind}-unfinished"));
        build(&unfinished)?;
        fs::rename(&unfinished, &wanted)?;
    }
    Ok(wanted)
}

fn module_files(modules: &Path) -> Parts {
    let mut parts = Parts::new();
    for module in MODULES {
        let path = modules.join("kernel").join(module);
        // Some kernels have it built in.
        if path.exists() {
            parts.insert(format!("modules/{}", file_name(&path)), path);
        }
    }
    parts
}

fn tool_files() -> Result<Parts> {
    let mut parts = Parts::new();
    for name in PROGRAMS {
        let program = system_binary(name)?;
        for library in shared_libraries(&program)? {
            parts.insert(in_usr(&library), PathBuf::from(&library));
        }
        parts.insert(format!("bin/{name}"), program);
    }
    Ok(parts)
}

/// Where a library of the host goes: `/lib` and `/lib64` are links in the guest.
fn in_usr(library: &str) -> String {
    let path = library.trim_start_matches('/');
    if path.starts_with("usr/") { path.to_owned() } else { format!("usr/{path}") }
}

/// The libraries a program needs, as the host's dynamic linker finds them.
fn shared_libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "ldd {} failed: {text}", program.display());
    let found = text.lines().filter_map(|line| {
        // "libz.so.1 => /lib/libz.so.1 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
        let place = line.split("=>").last()?.trim();
        place.starts_with('/').then(|| place.split(' ').next().unwrap_or(place).to_owned())
    });
    Ok(found.collect())
}

fn fingerprint(parts: &Parts) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    (INIT, MODULES, TOOLS_MIB).hash(&mut hasher);
    for (name, path) in parts {
        let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
        (name, metadata.len(), metadata.mtime(), metadata.ino()).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn build_initramfs(modules: &Parts) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "tmp", "mnt", "etc", "tools", "bin"] {
        archive.directory(directory);
    }
    for (link, target) in [
        ("sbin", "bin"),
        ("lib", "tools/usr/lib"),
        ("lib64", "tools/usr/lib64"),
        ("usr/lib", "../tools/usr/lib"),
    ] {
        archive.link(link, target);
    }
    // The kernel opens it before init has mounted anything.
    archive.device("dev/console", 5, 1);
    archive.file("init", 0o755, INIT.as_bytes().to_vec());
    archive.file("bin/busybox", 0o755, fs::read(system_binary("busybox")?)?);
    for applet in applets()? {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    for (path, source) in modules {
        let content = fs::read(source).with_context(|| source.display().to_string())?;
        archive.file(path, 0o644, content);
    }
    let names = MODULES.map(|module| file_name(Path::new(module)));
    let present = names.iter().filter(|name| modules.contains_key(&format!("modules/{name}")));
    let list: Vec<&str> = present.map(String::as_str).collect();
    archive.file("modules/list", 0o644, list.join("\n").into_bytes());
    Ok(archive.encode())
}

/// Makes an ext4 image that holds the tools.
fn build_tools(tools: &Parts, image: &Path) -> Result<()> {
    let staging = tempfile::tempdir()?;
    for (path, source) in tools {
        let path = staging.path().join(path);
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::copy(source, &path).with_context(|| source.display().to_string())?;
    }
    File::create(image)?.set_len(u64::from(TOOLS_MIB) << 20)?;
    let output = Command::new(system_binary("mkfs.ext4")?)
        .args(["-q", "-F", "-O", "^has_journal", "-d"])
        .args([staging.path(), image])
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mkfs.ext4 of the guest's tools failed: {text}");
    Ok(())
}

fn applets() -> Result<Vec<String>> {
    let output = Command::new(system_binary("busybox")?).arg("--list").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(|| directory.display().to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| file_name(path).starts_with(prefix))
        .collect();
    ensure!(found.len() == 1, "{} has {} kernels, not one", directory.display(), found.len());
    Ok(found.remove(0))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

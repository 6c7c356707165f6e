//! The archive format of an initramfs: cpio "newc" (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeMap;

/// Regular file, directory, symbolic link and character device in `mode`.
const FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// What an archive holds, by path without the leading slash.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Archive {
    /// Adds a file with its permission bits, and the directories above it.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: Vec<u8>) {
        self.add(path, Entry { mode: FILE | permissions, device: (0, 0), content });
    }

    /// Adds an empty directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.add(path, Entry { mode: DIRECTORY | 0o755, device: (0, 0), content: Vec::new() });
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        let content = target.as_bytes().to_vec();
        self.add(path, Entry { mode: LINK | 0o777, device: (0, 0), content });
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        let device = (major, minor);
        self.add(path, Entry { mode: CHARACTER_DEVICE | 0o600, device, content: Vec::new() });
    }

    fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        let parents = path.match_indices('/').map(|(at, _)| path[..at].to_owned());
        for parent in parents {
            self.entries.entry(parent).or_insert_with(|| Entry {
                mode: DIRECTORY | 0o755,
                device: (0, 0),
                content: Vec::new(),
            });
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// The archive's bytes. A directory sorts, and so comes, before what is in it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (index, (path, entry)) in self.entries.iter().enumerate() {
            append(&mut out, index + 1, path, entry);
        }
        let end = Entry { mode: 0, device: (0, 0), content: Vec::new() };
        append(&mut out, 0, "TRAILER!!!", &end);
        out
    }
}

fn append(out: &mut Vec<u8>, inode: usize, path: &str, entry: &Entry) {
    let links = if entry.mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
    let fields = [
        inode,
        entry.mode as usize,
        0, // user
        0, // group
        links,
        0, // modification time
        entry.content.len(),
        0, // device the file is on
        0,
        entry.device.0 as usize,
        entry.device.1 as usize,
        path.len() + 1,
        0, // checksum, of the other variant
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        assert!(u32::try_from(field).is_ok(), "{path}: too large for an initramfs");
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(&entry.content);
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn busybox_reads_what_we_write() {
        let mut archive = Archive::default();
        archive.file("/usr/bin/tool", 0o755, b"#!/bin/sh\n".to_vec());
        archive.link("/bin", "usr/bin");
        archive.directory("/empty");
        let directory = tempfile::tempdir().unwrap();
        let mut unpack = Command::new("/bin/busybox")
            .args(["cpio", "-i", "-d"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("busybox is installed: run scripts/install");
        unpack.stdin.take().unwrap().write_all(&archive.encode()).unwrap();
        assert!(unpack.wait().unwrap().success());
        let tool = directory.path().join("bin/tool");
        assert_eq!(std::fs::read(tool).unwrap(), b"#!/bin/sh\n");
        assert!(directory.path().join("empty").is_dir());
    }

    #[test]
    fn the_format_is_the_kernels() {
        let mut archive = Archive::default();
        archive.file("a", 0o644, b"xyz".to_vec());
        let bytes = archive.encode();
        // A header of 110 bytes, the name padded to 4, the content padded to 4.
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081a4");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..116], b"xyz\0");
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}

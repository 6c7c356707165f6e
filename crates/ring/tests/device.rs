//! Files with direct I/O.
#![allow(clippy::unwrap_used, reason = "in a test, panicking is reporting")]

mod support;

use std::path::Path;

use base::Buffer;
use ring::{Completion, Config, DeviceOptions, ErrorKind, IoError, Reactor, Token};
use support::{Fixture, config, pattern};

const EXCLUSIVE: DeviceOptions = DeviceOptions { read_only: false, exclusive: true };

fn written(completion: &Completion) -> Option<(Token, Result<(), IoError>)> {
    match completion {
        Completion::Written { token, result } => Some((*token, *result)),
        _ => None,
    }
}

fn read(completion: &Completion) -> Option<(Token, Result<(), IoError>)> {
    match completion {
        Completion::Read { token, result, .. } => Some((*token, *result)),
        _ => None,
    }
}

#[test]
fn what_was_written_in_parts_is_read_back_in_one_piece() {
    for register_buffers in [true, false] {
        let config = Config { register_buffers, ..config() };
        let mut fixture = Fixture::with(&config);
        let directory = tempfile::tempdir().unwrap();
        let (device, path) = fixture.device(&directory, 1 << 20);
        let info = fixture.reactor.device_info(device).unwrap();
        assert_eq!(
            (info.size_bytes, info.is_block_device, info.read_only),
            (1 << 20, false, false)
        );
        assert!(4096 % info.block_bytes == 0 && 4096 % info.memory_alignment == 0, "{info:?}");

        // A header page with its payload (neighbours in memory), and two separate pages.
        let mut first = fixture.reactor.buffers().take(8192).unwrap();
        first.slot_mut()[..12288].fill(0xAB);
        let first = first.freeze();
        let parts = [
            first.header(4096),
            first.payload(8192),
            fixture.payload(4096, |index| pattern(1, index)),
            fixture.payload(4096, |index| pattern(2, index)),
        ];
        let total: usize = parts.iter().map(Buffer::len).sum();
        let expected: Vec<u8> = parts.iter().flat_map(|part| part.bytes().to_vec()).collect();
        fixture.reactor.write(device, 8192, parts, Token(7));
        drop(first);
        assert_eq!(fixture.wait(written).1, (Token(7), Ok(())));
        fixture.reactor.sync(device, Token(8));
        let synced = fixture.next();
        assert!(matches!(synced, Completion::Synced { token: Token(8), result: Ok(()) }));

        let buffer = fixture.reactor.buffers().take(65536).unwrap();
        fixture.reactor.read(device, 8192, buffer, 4096, total, Token(9));
        let (completion, result) = fixture.wait(read);
        assert_eq!(result, (Token(9), Ok(())));
        let Completion::Read { buffer, .. } = completion else { unreachable!() };
        assert_eq!(&buffer.payload()[4096..4096 + total], &expected[..]);
        drop(buffer);
        assert_eq!(std::fs::read(&path).unwrap()[8192..8192 + total], expected);
        fixture.assert_buffers_are_back(&config);
    }
}

#[test]
fn discarded_blocks_read_as_zeroes() {
    let mut fixture = Fixture::new();
    let directory = tempfile::tempdir().unwrap();
    let (device, _) = fixture.device(&directory, 1 << 20);
    let part = fixture.payload(65536, |_| 0xFF);
    fixture.reactor.write(device, 0, [part], Token(1));
    assert_eq!(fixture.wait(written).1.1, Ok(()));
    fixture.reactor.discard(device, 4096, 8192, Token(2));
    let completion = fixture.next();
    assert!(
        matches!(completion, Completion::Discarded { token: Token(2), result: Ok(()) }),
        "{completion:?}"
    );
    let buffer = fixture.reactor.buffers().take(65536).unwrap();
    fixture.reactor.read(device, 0, buffer, 0, 65536, Token(3));
    let Completion::Read { buffer, result, .. } = fixture.next() else { panic!("a read") };
    assert_eq!(result, Ok(()));
    for (index, byte) in buffer.payload()[..65536].iter().enumerate() {
        let expected = if (4096..12288).contains(&index) { 0 } else { 0xFF };
        assert_eq!(*byte, expected, "at {index}");
    }
    assert_eq!(fixture.reactor.device_info(device).unwrap().size_bytes, 1 << 20);
}

#[test]
fn invalid_ranges_fail_and_give_the_buffer_back() {
    let config = config();
    let mut fixture = Fixture::new();
    let directory = tempfile::tempdir().unwrap();
    let (device, path) = fixture.device(&directory, 65536);
    let invalid_reads = [
        (100, 0, 4096),             // offset not aligned
        (0, 0, 100),                // length not aligned
        (0, 0, 0),                  // nothing
        (65536, 0, 4096),           // after the end
        (61440, 0, 8192),           // over the end
        (u64::MAX - 4095, 0, 4096), // overflow
        (0, 131_072, 4096),         // after the buffer
        (0, usize::MAX, 4096),      // overflow in the buffer
    ];
    for (offset, start, length) in invalid_reads {
        let buffer = fixture.reactor.buffers().take(131_072).unwrap();
        fixture.reactor.read(device, offset, buffer, start, length, Token(offset));
        let (_, (token, result)) = fixture.wait(read);
        assert_eq!(token, Token(offset));
        assert!(matches!(result, Err(IoError::Invalid(_))), "{offset} {start} {length} {result:?}");
    }
    let page = || fixture.payload(4096, |_| 1);
    let mut invalid_writes: Vec<(u64, Vec<Buffer>)> = vec![
        (0, vec![]),
        (0, vec![page().slice(0..100)]),
        (100, vec![page()]),
        (65536, vec![page()]),
    ];
    invalid_writes.push((0, vec![page().slice(1..513)]));
    for (offset, parts) in invalid_writes {
        fixture.reactor.write(device, offset, parts, Token(0));
        let (_, (_, result)) = fixture.wait(written);
        assert!(matches!(result, Err(IoError::Invalid(_))), "{offset} {result:?}");
    }
    fixture.reactor.close_device(device);
    let closed = fixture.next();
    assert!(matches!(closed, Completion::DeviceClosed { device: d } if d == device));
    let part = fixture.payload(4096, |_| 1);
    fixture.reactor.write(device, 0, [part], Token(0));
    assert_eq!(fixture.wait(written).1.1, Err(IoError::Closed));

    let options = DeviceOptions { read_only: true, exclusive: false };
    let device = fixture.reactor.open_device(&path, options).unwrap();
    let part = fixture.payload(4096, |_| 1);
    fixture.reactor.write(device, 0, [part], Token(0));
    assert!(matches!(fixture.wait(written).1.1, Err(IoError::Invalid(_))));
    fixture.assert_buffers_are_back(&config);
}

/// A file that became shorter than it was when it was opened.
#[test]
fn a_short_read_is_an_error() {
    let mut fixture = Fixture::new();
    let directory = tempfile::tempdir().unwrap();
    let (device, path) = fixture.device(&directory, 65536);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let buffer = fixture.reactor.buffers().take(16384).unwrap();
    fixture.reactor.read(device, 0, buffer, 0, 16384, Token(0));
    assert_eq!(fixture.wait(read).1.1, Err(IoError::Short { done: 4096 }));
    let buffer = fixture.reactor.buffers().take(16384).unwrap();
    fixture.reactor.read(device, 8192, buffer, 0, 4096, Token(0));
    assert_eq!(fixture.wait(read).1.1, Err(IoError::Short { done: 0 }));
}

#[test]
fn a_device_has_one_owner() {
    let mut fixture = Fixture::new();
    let directory = tempfile::tempdir().unwrap();
    let (device, path) = fixture.device(&directory, 65536);
    let mut other = Fixture::new();
    let error = other.reactor.open_device(&path, EXCLUSIVE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    assert!(error.to_string().contains("device: in use"), "{error}");
    // A read under way keeps it; it is free as soon as DeviceClosed comes.
    let buffer = fixture.reactor.buffers().take(4096).unwrap();
    fixture.reactor.read(device, 0, buffer, 0, 4096, Token(0));
    fixture.reactor.close_device(device);
    assert_eq!(other.reactor.open_device(&path, EXCLUSIVE).unwrap_err().kind(), ErrorKind::InUse);
    assert_eq!(fixture.wait(read).1.1, Ok(()));
    fixture.wait(|completion| matches!(completion, Completion::DeviceClosed { .. }).then_some(()));
    assert_eq!(fixture.reactor.device_info(device), None);
    other.reactor.open_device(&path, EXCLUSIVE).unwrap();
}

#[test]
fn wrong_paths_are_told_apart() {
    let mut fixture = Fixture::new();
    let directory = tempfile::tempdir().unwrap();
    let options = DeviceOptions { read_only: true, exclusive: true };
    let none = directory.path().join("none");
    for (path, expected) in [
        (none.as_path(), ErrorKind::NotFound),
        (directory.path(), ErrorKind::NotADevice),
        (Path::new("/dev/null"), ErrorKind::NotADevice),
        (Path::new("/proc/version"), ErrorKind::DirectIoUnsupported),
    ] {
        let error = fixture.reactor.open_device(path, options).unwrap_err();
        assert_eq!(error.kind(), expected, "{error}");
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    }
}

/// More operations than the submission ring, the completion ring and the slab were made for.
#[test]
fn a_full_ring_loses_nothing() {
    let config = Config { entries: 2, small_buffers: 200, large_buffers: 0, ..config() };
    let mut fixture = Fixture::with(&config);
    let directory = tempfile::tempdir().unwrap();
    let (device, _) = fixture.device(&directory, 200 * 4096);
    for index in 0..200 {
        let part = fixture.payload(4096, |at| pattern(index, at));
        fixture.reactor.write(device, index as u64 * 4096, [part], Token(index as u64));
    }
    let mut tokens: Vec<u64> = (0..200)
        .map(|_| {
            let (_, (token, result)) = fixture.wait(written);
            assert_eq!(result, Ok(()));
            token.0
        })
        .collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..200).collect::<Vec<_>>());
    for index in 0..200 {
        let buffer = fixture.reactor.buffers().take(4096).unwrap();
        fixture.reactor.read(device, index * 4096, buffer, 0, 4096, Token(index));
    }
    for _ in 0..200 {
        let (completion, (token, result)) = fixture.wait(read);
        assert_eq!(result, Ok(()));
        let Completion::Read { buffer, .. } = completion else { unreachable!() };
        let seed = usize::try_from(token.0).unwrap();
        assert!(buffer.payload().iter().enumerate().all(|(at, byte)| *byte == pattern(seed, at)));
    }
    fixture.assert_buffers_are_back(&config);
}

/// A write of many parts that do not lie next to each other.
#[test]
fn many_parts_make_one_write() {
    let config = Config { small_buffers: 100, ..config() };
    let mut fixture = Fixture::with(&config);
    let directory = tempfile::tempdir().unwrap();
    let (device, path) = fixture.device(&directory, 1 << 20);
    for round in 0..3 {
        let parts: Vec<_> =
            (0..100).map(|part| fixture.payload(4096, |at| pattern(part + round, at))).collect();
        fixture.reactor.write(device, 0, parts.into_iter().rev(), Token(0));
        assert_eq!(fixture.wait(written).1.1, Ok(()));
        let bytes = std::fs::read(&path).unwrap();
        for (index, block) in bytes[..100 * 4096].chunks(4096).enumerate() {
            let seed = 99 - index + round;
            assert!(block.iter().enumerate().all(|(at, byte)| *byte == pattern(seed, at)));
        }
    }
    fixture.assert_buffers_are_back(&config);
}

#[test]
fn impossible_configurations_are_refused() {
    for entries in [0, 3, 100] {
        let error = Reactor::new(&Config { entries, ..config() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }
    let huge =
        |large_buffers| Reactor::new(&Config { large_buffers, ..config() }).unwrap_err().kind();
    assert_eq!(huge(usize::MAX), ErrorKind::InvalidConfig);
    assert_eq!(huge(1 << 31), ErrorKind::OutOfMemory); // 256 TiB: more than addresses
}

/// A loop device, detached when dropped.
struct Loop(std::path::PathBuf);

impl Loop {
    /// `None` where loop devices cannot be made.
    fn attach(file: &std::path::Path) -> Option<Self> {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", "4096"])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_devices_work_like_files() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let Some(disk) = Loop::attach(&file) else {
        println!("SKIPPED: no loop device (needs root and losetup)");
        return;
    };
    let mut fixture = Fixture::new();
    let device = fixture.reactor.open_device(&disk.0, EXCLUSIVE).unwrap();
    let info = fixture.reactor.device_info(device).unwrap();
    assert_eq!((info.size_bytes, info.block_bytes, info.is_block_device), (1 << 20, 4096, true));
    let mut other = Fixture::new();
    assert_eq!(other.reactor.open_device(&disk.0, EXCLUSIVE).unwrap_err().kind(), ErrorKind::InUse);
    let part = fixture.payload(16384, |at| pattern(5, at));
    fixture.reactor.write(device, 4096, [part], Token(0));
    assert_eq!(fixture.wait(written).1.1, Ok(()));
    fixture.reactor.sync(device, Token(0));
    assert!(matches!(fixture.next(), Completion::Synced { result: Ok(()), .. }));
    fixture.reactor.discard(device, 8192, 4096, Token(0));
    let completion = fixture.next();
    assert!(matches!(completion, Completion::Discarded { result: Ok(()), .. }), "{completion:?}");
    let buffer = fixture.reactor.buffers().take(16384).unwrap();
    fixture.reactor.read(device, 4096, buffer, 0, 16384, Token(0));
    let Completion::Read { buffer, result, .. } = fixture.next() else { panic!("a read") };
    assert_eq!(result, Ok(()));
    for (at, byte) in buffer.payload()[..16384].iter().enumerate() {
        let expected = if (4096..8192).contains(&at) { 0 } else { pattern(5, at) };
        assert_eq!(*byte, expected, "at {at}");
    }
    drop(fixture); // gives up the device
    other.reactor.open_device(&disk.0, EXCLUSIVE).unwrap();
    drop(other);
}

//! The whole crate against a client that was written elsewhere: libblkio's vhost-user driver.

use std::mem::MaybeUninit;
use std::time::Duration;

use crate::support::{Backend, wait_for};
use base::BlockSize;
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use vhost_blk::DeviceConfig;

const REGION_BYTES: usize = 8 << 20;

pub(crate) struct Client {
    blkio: Blkio,
    pub(crate) queues: Vec<Blkioq>,
    region: MemoryRegion,
}

impl Client {
    pub(crate) fn connect(path: &std::path::Path, queues: i32) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", path.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", queues).unwrap();
        let outcome = blkio.start().unwrap();
        let region = blkio.alloc_mem_region(REGION_BYTES).unwrap();
        blkio.map_mem_region(&region).unwrap();
        Self { blkio, queues: outcome.queues, region }
    }

    pub(crate) fn fill(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= REGION_BYTES);
        // SAFETY: the region is mapped for REGION_BYTES, and the range is within it; the back
        // end reads it only between submission and completion.
        unsafe {
            let to = (self.region.addr as *mut u8).add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    pub(crate) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= REGION_BYTES);
        // SAFETY: as in `fill`.
        unsafe { std::slice::from_raw_parts((self.region.addr as *const u8).add(offset), len) }
            .to_vec()
    }

    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        (self.region.addr + offset) as *mut u8
    }

    /// Waits for `count` completions of a queue; returns their results by user data.
    pub(crate) fn complete(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut done = Vec::new();
        while done.len() < count {
            let mut completions: [MaybeUninit<Completion>; 64] =
                std::array::from_fn(|_| MaybeUninit::uninit());
            let want = (count - done.len()).min(64);
            let mut timeout = Duration::from_secs(10);
            let got = self.queues[queue]
                .do_io(&mut completions[..want], want, Some(&mut timeout), None)
                .unwrap();
            for completion in &completions[..got] {
                // SAFETY: `do_io` wrote the first `got` completions.
                let completion = unsafe { completion.assume_init_ref() };
                done.push((completion.user_data, completion.ret));
            }
        }
        done
    }

    fn one(&mut self, queue: usize) -> i32 {
        self.complete(queue, 1)[0].1
    }

    fn write(&mut self, start: u64, bytes: &[u8]) -> i32 {
        self.fill(0, bytes);
        let at = self.at(0);
        self.queues[0].write(start, at, bytes.len(), 0, ReqFlags::empty());
        self.one(0)
    }

    pub(crate) fn read(&mut self, start: u64, len: usize) -> Vec<u8> {
        let at = self.at(0);
        self.queues[0].read(start, at, len, 0, ReqFlags::empty());
        assert_eq!(self.one(0), 0);
        self.bytes(0, len)
    }
}

pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .collect()
}

pub(crate) fn config(block_size: BlockSize) -> DeviceConfig {
    let bytes: u64 = 16 << 20;
    let mut config =
        DeviceConfig::new(bytes / u64::from(block_size.bytes()), block_size, "holdfast-test");
    config.queues = 4;
    config
}

#[test]
fn reads_writes_flushes_discards_and_zeroes() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let dir = tempfile::tempdir().unwrap();
        let backend = Backend::start(&dir.path().join("disk"), &config(block_size));
        let mut client = Client::connect(&backend.path, 1);
        assert_eq!(client.blkio.get_u64("capacity").unwrap(), 16 << 20);
        let block = block_size.bytes() as usize;
        assert_eq!(
            client.blkio.get_i32("request-alignment").unwrap(),
            block_size.bytes().cast_signed()
        );

        for (start, bytes) in
            [(0, block), (block, 4096), (8192, 128 * 1024), (1 << 20, 4 << 20), (12288, 300 * 4096)]
        {
            let data = pattern(start as u64, bytes);
            assert_eq!(client.write(start as u64, &data), 0, "{bytes} bytes at {start}");
            client.fill(0, &vec![0xee; bytes]);
            assert_eq!(client.read(start as u64, bytes), data, "{bytes} bytes at {start}");
            let disk = backend.shared.disk.lock().unwrap();
            assert_eq!(disk[start..start + bytes], data);
        }

        client.queues[0].flush(0, ReqFlags::empty());
        assert_eq!(client.one(0), 0);
        assert_eq!(backend.shared.flushes.load(std::sync::atomic::Ordering::Relaxed), 1);

        client.queues[0].discard(1 << 20, 1 << 20, 0, ReqFlags::empty());
        assert_eq!(client.one(0), 0);
        client.queues[0].write_zeroes(3 << 20, 1 << 20, 0, ReqFlags::empty());
        assert_eq!(client.one(0), 0);
        for start in [1_u64 << 20, 3 << 20] {
            assert_eq!(client.read(start, 1 << 20), vec![0; 1 << 20]);
        }
        assert_eq!(client.read(2 << 20, 1 << 20), pattern(1 << 20, 4 << 20)[1 << 20..2 << 20]);

        // Beyond the end.
        let at = client.at(0);
        client.queues[0].read(16 << 20, at, 4096, 0, ReqFlags::empty());
        assert_ne!(client.one(0), 0);
        drop(client);
        backend.stop();
    }
}

#[test]
fn many_requests_on_many_queues_keep_their_data() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start(&dir.path().join("disk"), &config(BlockSize::B4096));
    let mut client = Client::connect(&backend.path, 4);
    let mut model = vec![0_u8; 16 << 20];
    for round in 0..8_u64 {
        for queue in 0..4_usize {
            for slot in 0..32_usize {
                // Each queue has a quarter of the disk and of the memory, each slot its own block.
                let buffer = (queue * 32 + slot) * 16384;
                let block = (slot * 7 + usize::try_from(round).unwrap()) % 64;
                let start = queue * (4 << 20) + block * 65536 + (slot % 2) * 16384;
                let bytes = 4096 * (1 + (slot + queue) % 4);
                let data = pattern(round << 32 | (queue * 1000 + slot) as u64, bytes);
                client.fill(buffer, &data);
                model[start..start + bytes].copy_from_slice(&data);
                let at = client.at(buffer);
                client.queues[queue].write(start as u64, at, bytes, slot, ReqFlags::empty());
            }
        }
        for queue in 0..4 {
            let done = client.complete(queue, 32);
            assert!(done.iter().all(|(_, result)| *result == 0), "round {round} queue {queue}");
        }
    }
    assert!(*backend.shared.disk.lock().unwrap() == model, "the disk is what was written");
    for start in (0..16_usize << 20).step_by(1 << 20) {
        assert!(client.read(start as u64, 1 << 20) == model[start..start + (1 << 20)]);
    }
    drop(client);
    backend.stop();
}

#[test]
fn a_front_end_that_leaves_with_requests_under_way_can_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let backend = Backend::start(&dir.path().join("disk"), &config(BlockSize::B512));
    for round in 0..5_u64 {
        let mut client = Client::connect(&backend.path, 2);
        let data = pattern(round, 4096);
        assert_eq!(client.write(round * 4096, &data), 0);
        if round > 0 {
            assert_eq!(client.read((round - 1) * 4096, 4096), pattern(round - 1, 4096));
        }
        backend.shared.stall.store(true, std::sync::atomic::Ordering::Release);
        let at = client.at(0);
        for slot in 0..16 {
            client.queues[1].read(slot * 4096, at, 4096, 0, ReqFlags::empty());
        }
        let mut timeout = Duration::ZERO;
        let submitted = client.queues[1].do_io(&mut [], 0, Some(&mut timeout), None);
        assert_eq!(submitted.unwrap(), 0);
        wait_for("requests under way", || {
            backend.shared.busy.load(std::sync::atomic::Ordering::Acquire) == 16
        });
        drop(client);
        wait_for("the end of the connection", || {
            !backend.shared.attached.load(std::sync::atomic::Ordering::Acquire)
        });
        backend.shared.stall.store(false, std::sync::atomic::Ordering::Release);
        backend.wake();
    }
    wait_for("the last replies", || {
        backend.shared.busy.load(std::sync::atomic::Ordering::Acquire) == 0
            && !backend.shared.live.load(std::sync::atomic::Ordering::Acquire)
    });
    backend.stop();
}

#[test]
fn a_read_only_disk_refuses_writes_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(BlockSize::B512);
    config.read_only = true;
    let backend = Backend::start(&dir.path().join("disk"), &config);
    backend.shared.disk.lock().unwrap()[..512].fill(7);
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", backend.path.to_str().unwrap()).unwrap();
    let refused = blkio.connect().and_then(|()| blkio.start().map(|_| ()));
    assert!(refused.is_err(), "blkio wants to be told that the disk is read-only");
    drop(blkio);
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", backend.path.to_str().unwrap()).unwrap();
    blkio.set_bool("read-only", true).unwrap();
    blkio.connect().unwrap();
    let queues = blkio.start().unwrap().queues;
    let region = blkio.alloc_mem_region(REGION_BYTES).unwrap();
    blkio.map_mem_region(&region).unwrap();
    let mut client = Client { blkio, queues, region };
    assert_eq!(client.read(0, 512), vec![7; 512]);
    assert_ne!(client.write(0, &[1; 512]), 0);
    assert_eq!(client.read(0, 512), vec![7; 512]);
    drop(client);
    backend.stop();
}

#[test]
fn several_sockets_live_in_one_process_and_go_at_run_time() {
    let dir = tempfile::tempdir().unwrap();
    let backends: Vec<Backend> = (0..3)
        .map(|n| Backend::start(&dir.path().join(format!("disk{n}")), &config(BlockSize::B512)))
        .collect();
    let mut clients: Vec<Client> =
        backends.iter().map(|backend| Client::connect(&backend.path, 1)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.write(0, &pattern(n as u64, 8192)), 0);
    }
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read(0, 8192), pattern(n as u64, 8192));
    }
    for (backend, client) in backends.into_iter().zip(clients) {
        let path = backend.path.clone();
        // With the front end still connected.
        backend.stop();
        assert!(!path.exists());
        drop(client);
    }
}

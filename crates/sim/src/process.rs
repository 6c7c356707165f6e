//! A simulated process: a node, the disks under it, and what of it dies with it.

use core::net::SocketAddr;
use core::time::Duration;

use base::limits::PAGE_BYTES;
use base::{BufferPool, ClusterId, Epoch, HolderId, Instant, PoolId, ServerId, Slab};
use node::{HeadHandle, Node, NodeConfig, ServerConfig};
use nvme::TargetConfig;
use store::{
    DeviceInfo, DeviceRole, DiskKind, DiskOperation, FlushPolicy, FormatConfig, StoreConfig,
};
use volume::Tunables;

use crate::clock::Clock;
use crate::cluster_store::Lease;
use crate::disk::Disk;
use crate::random::Random;
use crate::world::{Healer, Leaving, Successor};

const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);
const MASS_BYTES: u64 = 64 << 20;

/// A server, or (without disks) a diskless head.
pub(crate) struct Process {
    pub(crate) index: usize,
    pub(crate) node: Option<Node>,
    /// Grows with every start: events of an earlier life are void.
    pub(crate) life: u64,
    pub(crate) disks: Vec<Disk>,
    pub(crate) open: bool,
    pub(crate) head: Option<RunningHead>,
    /// Requests of its front end that are not answered.
    pub(crate) begun: usize,
    pub(crate) lease: Lease,
    pub(crate) healer: Healer,
    /// Restarted by every start of the process.
    pub(crate) clock: Clock,
    /// Stopped until then: what happens to it waits.
    pub(crate) paused_until: Instant,
    /// The machine is there, whether or not the process is.
    pub(crate) machine_up: bool,
    /// It hands everything over to a next process.
    pub(crate) leaving: Option<Leaving>,
    /// What it has handed over, for whoever starts next.
    pub(crate) successor: Option<Successor>,
    /// It was given everything by another process, and is to die.
    pub(crate) doomed: bool,
    /// Whoever connects is not refused: the listening socket is there, or is about to be taken over.
    pub(crate) listens: bool,
    /// A device has failed: the next start comes with a better one.
    pub(crate) device_failed: bool,
    /// Disk operations under way.
    pub(crate) operations: Slab<DiskOperation>,
    /// The time, on its own clock, at which a tick is due already.
    pub(crate) tick_at: Option<Instant>,
    /// Ticks in a row that were due at once.
    ticks_at_once: u32,
    layout: PoolLayout,
    /// Buffers of this life and of those before it.
    buffers: Buffers,
    /// Buffers of this life's front end.
    pub(crate) guest_buffers: BufferPool,
}

/// The pools of a process, which its next life takes over if all buffers have come back: to make twenty
/// megabytes anew at every start took a sixth of the simulator's time.
#[derive(Default)]
struct Buffers([Option<BufferPool>; 5]);

impl Buffers {
    fn pool(&mut self, which: usize, small: usize, large: usize) -> BufferPool {
        let whole = |pool: &BufferPool| pool.available() == (small, large);
        let kept = self.0[which].take().filter(whole);
        let pool = kept.unwrap_or_else(|| BufferPool::on_demand(small, large));
        self.0[which] = Some(pool.clone());
        pool
    }
}

/// A head in a process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunningHead {
    pub(crate) handle: HeadHandle,
    pub(crate) epoch: Epoch,
    pub(crate) opened: bool,
    /// How large it says the volume is.
    pub(crate) blocks: u64,
    /// Nobody has used it since it was told to rest.
    pub(crate) rests: bool,
}

pub(crate) fn id(index: usize, kind: u8) -> [u8; 16] {
    let mut bytes = [kind; 16];
    bytes[0] = u8::try_from(index + 1).expect("few processes");
    bytes
}

/// Who a process is to servers and to the cluster store.
pub(crate) fn host_id(index: usize) -> [u8; 16] {
    id(index, 0x40)
}

pub(crate) fn server_id(index: usize) -> ServerId {
    ServerId::from_bytes(id(index, 0x5e))
}

pub(crate) fn pool_id(index: usize) -> PoolId {
    PoolId::from_bytes(id(index, 0x70))
}

pub(crate) fn address(index: usize) -> SocketAddr {
    let port = u16::try_from(4420 + index).expect("few processes");
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// How large a log is, and when it goes home.
#[derive(Clone, Copy, Debug)]
pub struct PoolLayout {
    /// Bytes of the fast device.
    pub fast_bytes: u64,
    /// Devices that data goes home to: with two, no copy of the journal is where all of it is.
    pub mass_devices: usize,
    /// Bytes of a log segment.
    pub segment_bytes: u64,
    /// When data goes home.
    pub flush: FlushPolicy,
    /// How fast home is read for damage; zero: not at all.
    pub scrub_bytes_per_second: u64,
}

impl PoolLayout {
    /// A log that a quiet run does not fill.
    pub fn roomy() -> Self {
        Self {
            fast_bytes: 16 << 20,
            mass_devices: 1,
            segment_bytes: 512 << 10,
            flush: FlushPolicy::default(),
            scrub_bytes_per_second: 0,
        }
    }

    /// A log that is always being flushed and trimmed.
    pub fn busy() -> Self {
        Self {
            fast_bytes: 8 << 20,
            mass_devices: 2,
            segment_bytes: 512 << 10,
            flush: FlushPolicy {
                log_fill_percent: 10,
                age: Duration::from_millis(200),
                idle: Duration::from_millis(50),
                ..FlushPolicy::default()
            },
            scrub_bytes_per_second: 0,
        }
    }

    /// A log that is full as soon as the way home is slow.
    pub fn tight() -> Self {
        Self { fast_bytes: 7 << 20, ..Self::busy() }
    }
}

fn devices(layout: PoolLayout) -> Vec<DeviceInfo> {
    let fast = DeviceInfo { bytes: layout.fast_bytes, role: DeviceRole::Fast };
    let mass = DeviceInfo { bytes: MASS_BYTES, role: DeviceRole::Mass };
    core::iter::once(fast).chain((0..layout.mass_devices).map(|_| mass)).collect()
}

fn format(index: usize, layout: PoolLayout) -> FormatConfig {
    FormatConfig {
        pool: pool_id(index),
        cluster: CLUSTER,
        server: server_id(index),
        devices: devices(layout),
        log_bytes: 0,
        segment_bytes: layout.segment_bytes,
        chunk_bytes: 64 * 1024,
        replicas_max: 8,
    }
}

impl Process {
    /// A process that is not running; a server's disks are formatted.
    pub(crate) fn new(index: usize, is_server: bool, layout: PoolLayout) -> Self {
        let mut disks = Vec::new();
        if is_server {
            disks = devices(layout).iter().map(|_| Disk::default()).collect();
            let writes =
                store::format(&format(index, layout)).expect("the simulated disks suffice");
            for write in writes {
                disks[usize::from(write.device.0)].write(write.offset, &write.bytes);
            }
            for disk in &mut disks {
                disk.sync(Instant::ZERO).expect("a new disk syncs");
            }
        }
        Self {
            index,
            node: None,
            life: 0,
            disks,
            open: false,
            head: None,
            begun: 0,
            lease: Lease::Idle,
            healer: Healer::default(),
            clock: Clock::new(Instant::ZERO, 0, 0),
            paused_until: Instant::ZERO,
            machine_up: true,
            leaving: None,
            successor: None,
            doomed: false,
            listens: false,
            device_failed: false,
            operations: Slab::with_capacity(64),
            tick_at: None,
            ticks_at_once: 0,
            layout,
            buffers: Buffers::default(),
            guest_buffers: BufferPool::on_demand(1, 1),
        }
    }

    /// The bytes of a device that hold a copy of the pool's metadata, if any do.
    pub(crate) fn metadata(&self, device: usize) -> Option<core::ops::Range<u64>> {
        let copies = store::metadata_copies(&format(self.index, self.layout)).expect("it was made");
        let of_device = |(of, _): &(store::DeviceIndex, _)| usize::from(of.0) == device;
        copies.into_iter().find(of_device).map(|(_, bytes)| bytes)
    }

    pub(crate) fn has_metadata(&self, device: usize) -> bool {
        self.metadata(device).is_some()
    }

    pub(crate) fn is_metadata(&self, device: usize, page: u64) -> bool {
        let offset = page * PAGE_BYTES as u64;
        self.metadata(device).is_some_and(|bytes| bytes.contains(&offset))
    }

    pub(crate) fn is_server(&self) -> bool {
        !self.disks.is_empty()
    }

    /// True if nothing reaches its node any more.
    pub(crate) fn has_let_go(&self) -> bool {
        self.leaving.is_some_and(Leaving::has_let_go)
    }

    /// Starts the process; gives what it took over from the one before, if that has handed anything over.
    pub(crate) fn start(
        &mut self,
        now: Instant,
        drift: i64,
        random: &mut Random,
    ) -> Option<Successor> {
        self.life += 1;
        self.open = !self.is_server();
        self.machine_up = true;
        let successor = self.successor.take();
        self.listens = successor.is_some();
        self.doomed = false;
        let clock = Clock::new(now, random.below(1 << 40), drift);
        // The machine's, which the one before had, too.
        self.clock = successor.as_ref().map_or(clock, |successor| successor.clock);
        self.tick_at = None;
        self.guest_buffers = self.buffers.pool(0, 256, 32);
        let of_store = (StoreConfig::SMALL_BUFFERS_MIN, StoreConfig::LARGE_BUFFERS_MIN);
        let buffers = &mut self.buffers;
        let server = (!self.disks.is_empty()).then(|| ServerConfig {
            server: server_id(self.index),
            pool: pool_id(self.index),
            store: StoreConfig {
                pool: Some(pool_id(self.index)),
                cluster: CLUSTER,
                server: server_id(self.index),
                buffers: buffers.pool(1, of_store.0, of_store.1),
                flush: self.layout.flush,
                scrub_bytes_per_second: self.layout.scrub_bytes_per_second,
            },
            devices: devices(self.layout),
            target: TargetConfig::new(server_id(self.index)),
            target_buffers: buffers.pool(2, 128, 24),
            offer_volumes: true,
        });
        let mut node = Node::new(NodeConfig {
            host: HolderId::from_bytes(host_id(self.index)),
            jitter_seed: random.bits(),
            head_buffers: buffers.pool(3, 64, 16),
            peer_buffers: buffers.pool(4, 64, 24),
            tunables: Tunables {
                member_bytes_max: 1 << 20,
                backlog_bytes_max: 256 << 10,
                ..Tunables::default()
            },
            state_messages: true,
            server,
        });
        if let Some(legacy) = successor.as_ref().and_then(|successor| successor.legacy.clone()) {
            node.inherit(legacy);
        }
        self.node = Some(node);
        successor
    }

    /// Free buffers, small and large: of guests, the store, the target, heads and peers.
    pub(crate) fn free_buffers(&self) -> [Option<(usize, usize)>; 5] {
        self.buffers.0.each_ref().map(|pool| pool.as_ref().map(BufferPool::available))
    }

    /// Notes that a tick is due in `nanos`.
    ///
    /// # Panics
    /// If the node goes on asking for ticks that change nothing: in a real process it would spin.
    pub(crate) fn count_tick(&mut self, nanos: u64) {
        self.ticks_at_once = if nanos == 0 { self.ticks_at_once + 1 } else { 0 };
        assert!(self.ticks_at_once < 1000, "process {} spins on its deadline", self.index);
    }

    /// `kill -9`, or the power goes.
    /// True if what was not on media may be gone.
    pub(crate) fn stop(&mut self, power_cut: bool, random: &mut Random) -> bool {
        self.settle_writes(random);
        self.node = None;
        self.open = false;
        self.head = None;
        self.lease = Lease::Idle;
        self.healer = Healer::default();
        self.paused_until = Instant::ZERO;
        self.machine_up = !power_cut;
        self.leaving = None;
        self.listens = false;
        self.device_failed = false;
        self.operations = Slab::with_capacity(64);
        self.life += 1;
        let mut lost = power_cut;
        for disk in &mut self.disks {
            lost |= disk.process_died(random);
            if power_cut {
                disk.power_cut(random);
            }
        }
        lost
    }

    /// The power goes while it is down, and whoever was about to take over from it is gone, too.
    pub(crate) fn lose_power(&mut self, random: &mut Random) {
        self.machine_up = false;
        self.listens = false;
        self.successor = None;
        self.disks.iter_mut().for_each(|disk| disk.power_cut(random));
    }

    /// Writes under way when their process dies have reached the disk, page by page, or not.
    fn settle_writes(&mut self, random: &mut Random) {
        for (_, operation) in self.operations.iter() {
            let DiskKind::Write { offset, parts } = &operation.kind else { continue };
            if random.one_in(3) {
                continue;
            }
            let torn = random.one_in(2);
            let mut at = *offset;
            for page in parts.iter().flat_map(|part| part.bytes().chunks_exact(PAGE_BYTES)) {
                if !torn || random.one_in(2) {
                    self.disks[usize::from(operation.device.0)].write(at, page);
                }
                at += PAGE_BYTES as u64;
            }
        }
    }

    /// True if a disk write is under way.
    pub(crate) fn is_writing(&self) -> bool {
        let mut operations = self.operations.iter();
        operations.any(|(_, operation)| matches!(operation.kind, DiskKind::Write { .. }))
    }
}

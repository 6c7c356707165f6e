//! A synchronous back end for tests: one thread that owns a device and a disk in memory, polls
//! the kick eventfds and answers block requests itself, in a shuffled order.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::{BlockReply, BlockRequest, BufferPool, Operation, Status};
use vhost_blk::handover::Handover;
use vhost_blk::{
    Control, Device, DeviceConfig, Event, Listener, ListenerError, SinkClosed, read_eventfd,
};

/// What a test sees of, and tells, the back end.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) disk: Mutex<Vec<u8>>,
    pub(crate) flushes: AtomicUsize,
    pub(crate) busy: AtomicUsize,
    pub(crate) attached: AtomicBool,
    pub(crate) live: AtomicBool,
    /// Requests are taken, not answered, while set.
    pub(crate) stall: AtomicBool,
    /// The disk is to have so many blocks; 0: leave it.
    pub(crate) grow: AtomicU64,
    stop: AtomicBool,
}

pub(crate) struct Backend {
    pub(crate) shared: Arc<Shared>,
    pub(crate) path: PathBuf,
    listener: Option<Listener>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

struct Reactor {
    device: Device,
    config: DeviceConfig,
    shared: Arc<Shared>,
    kicks: BTreeMap<u16, Arc<OwnedFd>>,
    waiting: VecDeque<BlockRequest>,
    random: u64,
}

impl Backend {
    pub(crate) fn start(path: &Path, config: &DeviceConfig) -> Self {
        let bytes = usize::try_from(config.blocks).unwrap() * config.block_size.bytes() as usize;
        let shared = Arc::new(Shared { disk: Mutex::new(vec![0; bytes]), ..Shared::default() });
        Self::start_on(path, config, shared)
    }

    pub(crate) fn start_on(path: &Path, config: &DeviceConfig, shared: Arc<Shared>) -> Self {
        let (sink, wake, thread) = reactor(config, &shared);
        let listener = Listener::start(path, config.clone(), sink).unwrap();
        Self { shared, path: path.into(), listener: Some(listener), wake, thread: Some(thread) }
    }

    /// Goes on where another back end left off.
    pub(crate) fn resume(
        handover: Handover,
        config: &DeviceConfig,
        shared: Arc<Shared>,
    ) -> Result<Self, ListenerError> {
        let path = handover.state().path.clone();
        let (sink, wake, thread) = reactor(config, &shared);
        let mut backend = Self { shared, path, listener: None, wake, thread: Some(thread) };
        backend.listener = Some(Listener::resume(handover, config.clone(), sink)?);
        Ok(backend)
    }

    /// Reads the front end's messages after `resume`.
    pub(crate) fn go(&mut self) {
        self.listener.as_mut().unwrap().go();
    }

    /// Ends as it is, requests under way or not, and leaves the front end connected.
    pub(crate) fn hand_over(mut self) -> Handover {
        let listener = self.listener.take().unwrap();
        assert!(listener.pause(Duration::from_secs(10)));
        self.end_thread();
        listener.hand_over()
    }

    /// Stops the listener with a drain, then the reactor.
    pub(crate) fn stop(mut self) {
        self.listener.take().unwrap().stop();
        self.end_thread();
    }

    fn end_thread(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        (&self.wake).write_all(&[0]).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.shared.stop.store(false, Ordering::Release);
    }

    pub(crate) fn wake(&self) {
        (&self.wake).write_all(&[0]).unwrap();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(self.listener.take());
        if self.thread.is_some() && !std::thread::panicking() {
            self.end_thread();
        }
    }
}

type Sink = Box<dyn FnMut(Control) -> Result<(), SinkClosed> + Send>;

/// A thread that owns a device: how messages get there, and how it is woken.
fn reactor(config: &DeviceConfig, shared: &Arc<Shared>) -> (Sink, UnixStream, JoinHandle<()>) {
    let (mail, mailbox) = channel();
    let (wake, woken) = UnixStream::pair().unwrap();
    woken.set_nonblocking(true).unwrap();
    let sink_wake = wake.try_clone().unwrap();
    let sink = move |control: Control| {
        mail.send(control).map_err(|_| SinkClosed)?;
        (&sink_wake).write_all(&[0]).map_err(|_| SinkClosed)
    };
    let (config, shared) = (config.clone(), Arc::clone(shared));
    let thread = std::thread::spawn(move || {
        // Few buffers, so that large requests wait for them.
        let device = Device::new(config.clone(), BufferPool::heap(16, 5));
        let reactor = Reactor {
            device,
            config,
            shared,
            kicks: BTreeMap::new(),
            waiting: VecDeque::new(),
            random: 0x9e37_79b9_7f4a_7c15,
        };
        reactor.run(&mailbox, &woken);
    });
    (Box::new(sink), wake, thread)
}

/// Waits for `condition`, at most ten seconds.
pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::yield_now();
    }
}

impl Reactor {
    fn run(mut self, mailbox: &Receiver<Control>, woken: &UnixStream) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.wait(woken);
            while let Ok(control) = mailbox.try_recv() {
                self.device.control(control);
            }
            self.grow();
            let waiting = &mut self.waiting;
            while self.device.poll(7, &mut |request| waiting.push_back(request)) {
                if self.shared.stall.load(Ordering::Acquire) {
                    self.device.poll(1000, &mut |request| waiting.push_back(request));
                    break;
                }
                let shuffle = self.random;
                Self::answer(&self.shared, &self.config, &mut self.device, waiting, shuffle);
            }
            if !self.shared.stall.load(Ordering::Acquire) {
                while !waiting.is_empty() {
                    self.random = self.random.rotate_left(13).wrapping_mul(0x2545_f491_4f6c_dd1d);
                    let shuffle = self.random;
                    Self::answer(&self.shared, &self.config, &mut self.device, waiting, shuffle);
                    // Freed buffers let more in.
                    self.device.poll(7, &mut |request| waiting.push_back(request));
                }
            }
            while let Some(event) = self.device.poll_event() {
                match event {
                    Event::WatchKick { queue, fd } => drop(self.kicks.insert(queue, fd)),
                    Event::UnwatchKick { queue } => drop(self.kicks.remove(&queue)),
                    Event::FrontEnd { .. } => {}
                    Event::Started => self.shared.live.store(true, Ordering::Release),
                    Event::Stopped { .. } => self.shared.live.store(false, Ordering::Release),
                    Event::Superseded => unreachable!("this back end supersedes nothing"),
                }
            }
            self.device.flush_notifications();
            self.shared.busy.store(self.device.busy(), Ordering::Release);
            self.shared.attached.store(self.device.is_attached(), Ordering::Release);
        }
    }

    fn grow(&mut self) {
        let blocks = self.shared.grow.swap(0, Ordering::AcqRel);
        if blocks > 0 {
            let bytes = blocks << self.config.block_size.log2();
            let mut disk = self.shared.disk.lock().unwrap();
            let bytes = usize::try_from(bytes).unwrap().max(disk.len());
            disk.resize(bytes, 0);
            drop(disk);
            self.device.resize(blocks);
        }
    }

    fn wait(&mut self, woken: &UnixStream) {
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut entries = vec![entry(woken.as_raw_fd())];
        entries.extend(self.kicks.values().map(|fd| entry(fd.as_raw_fd())));
        let count = libc::nfds_t::try_from(entries.len()).unwrap();
        // SAFETY: `entries` has `count` entries and lives through the call.
        let ready = unsafe { libc::poll(entries.as_mut_ptr(), count, 10_000) };
        assert!(ready >= 0);
        drop((&*woken).read(&mut [0; 64]));
        for ((queue, fd), entry) in self.kicks.iter().zip(&entries[1..]) {
            if entry.revents != 0 {
                read_eventfd(fd.as_fd()).unwrap();
                self.device.kicked(*queue);
            }
        }
    }

    /// Answers one waiting request, not always the oldest, never a flush before earlier ones.
    fn answer(
        shared: &Shared,
        config: &DeviceConfig,
        device: &mut Device,
        waiting: &mut VecDeque<BlockRequest>,
        random: u64,
    ) {
        let pick = usize::try_from(random % waiting.len().max(1) as u64).unwrap();
        let Some(request) = waiting.remove(pick) else { return };
        let block = config.block_size.bytes() as usize;
        let start = usize::try_from(request.lba.0).unwrap() * block;
        let bytes = request.blocks.0 as usize * block;
        let mut disk = shared.disk.lock().unwrap();
        let mut data = None;
        match request.operation {
            Operation::Read { mut buffer } => {
                buffer.payload_mut()[..bytes].copy_from_slice(&disk[start..start + bytes]);
                data = Some(buffer.freeze().payload(bytes));
            }
            Operation::Write { buffer, fua: _ } => {
                disk[start..start + bytes].copy_from_slice(&buffer.payload()[..bytes]);
            }
            Operation::Flush => {
                shared.flushes.fetch_add(1, Ordering::Relaxed);
            }
            Operation::Discard | Operation::WriteZeroes { fua: _ } => {
                disk[start..start + bytes].fill(0);
            }
        }
        drop(disk);
        device.complete(BlockReply { id: request.id, status: Status::Ok, data });
    }
}

//! The admin connection: the way to a session, keep-alive and asynchronous events.

use core::time::Duration;

use base::{BlockSize, BufferMut, Instant};

use super::wire::Wire;
use super::{DownReason, End, Initiator, Namespace, Output, Side, State};
use crate::codec::command::{Command, Completion, Sgl, admin};
use crate::codec::fabrics::{
    CAP, CC, CC_ENABLE, CONTROLLER_ANY, CSTS, CSTS_READY, Connect, property_get, property_set,
};
use crate::codec::identify::{IDENTIFY_BYTES, cns};
use crate::codec::log::page;
use crate::codec::pdu::{FLAG_LAST, FLAG_SUCCESS, FatalError, PduType, Transfer};
use crate::codec::{u16_at, u32_at, u64_at};
use crate::link::{Arrived, Pdu, Sink, Violation};
use crate::nqn::{self, Subsystem};
use crate::outbox::Data;
use crate::state;
use base::Buffer;

/// Entries of the admin queue.
const ADMIN_ENTRIES: u16 = 32;
/// How soon to ask again whether the controller is ready.
const READY_POLL: Duration = Duration::from_millis(10);
/// Keep Alive is sent so many times in a keep-alive time.
const KEEP_ALIVES: u32 = 3;
/// CC: enable, entry sizes of 64 and 16 bytes.
const CONFIGURATION: u32 = CC_ENABLE | (6 << 16) | (4 << 20);
/// Feature 07h, Number of Queues.
const FEATURE_QUEUES: u32 = 0x07;
/// Feature 0Bh, Asynchronous Event Configuration.
const FEATURE_EVENTS: u32 = 0x0b;
/// Namespace attribute and ANA notices.
const EVENTS: u32 = (1 << 8) | (1 << 11);

/// Command ids of the admin queue: there is at most one command of each kind.
mod id {
    pub(super) const STEP: u16 = 1;
    pub(super) const KEEP_ALIVE: u16 = 2;
    pub(super) const EVENT: u16 = 3;
    pub(super) const READING: u16 = 4;
}

/// What is waited for on the way to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The admin connection, and its ICResp.
    Initialize,
    Connect,
    Capabilities,
    Enable,
    Status,
    Identify,
    Queues,
    Events,
    Namespace,
    /// The I/O connection, and its ICResp.
    IoInitialize,
    IoConnect,
}

/// What is being read from the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// For the handshake's step.
    Step,
    /// The namespace, after it changed.
    Namespace,
    /// A log page.
    Log(u8),
}

/// The state of the admin queue.
#[derive(Default)]
pub(super) struct Admin {
    controller_id: u16,
    /// Ask for the controller's status again at this time.
    pub(super) poll_at: Option<Instant>,
    keep_alive_at: Option<Instant>,
    keep_alive_sent: bool,
    reading: Option<(u16, Reading)>,
    data: Option<BufferMut>,
    data_bytes: usize,
    completion: Option<Completion>,
    /// In-capsule data of I/O commands, at most.
    pub(super) capsule_bytes: usize,
    pub(super) namespace: Option<Namespace>,
    /// Log pages and the namespace to be read, in this order: state, namespaces, ANA, namespace.
    wanted: [bool; 4],
    last_state: u64,
}

impl Admin {
    /// When to send the next Keep Alive; `None` while one is on its way.
    pub(super) fn next_keep_alive(&self) -> Option<Instant> {
        if self.keep_alive_sent { None } else { self.keep_alive_at }
    }

    /// Data of an admin command has come.
    pub(super) fn on_data(&mut self, arrived: Arrived) {
        if let Arrived::Buffer(buffer) = arrived {
            self.data = Some(buffer);
        }
    }
}

impl Initiator {
    pub(super) fn on_admin_pdu(&mut self, wire: &mut Wire, pdu: &Pdu) -> Result<Option<Sink>, End> {
        match pdu.kind {
            PduType::C2hTermReq => {
                Err(DownReason::Protocol("the peer terminated the connection").into())
            }
            PduType::IcResp if !wire.initialized => {
                wire.on_initialized(&pdu.header).map_err(DownReason::Unsupported)?;
                Ok(Some(Sink::Discard))
            }
            PduType::CapsuleResp if wire.initialized => {
                self.admin.completion = Some(Completion::decode(&pdu.header[8..24]));
                Ok(Some(Sink::Discard))
            }
            PduType::C2hData if wire.initialized => self.on_admin_data(pdu),
            PduType::IcReq
            | PduType::IcResp
            | PduType::H2cTermReq
            | PduType::CapsuleCmd
            | PduType::CapsuleResp
            | PduType::H2cData
            | PduType::C2hData
            | PduType::R2t => {
                let violation = Violation::of(pdu, FatalError::Sequence, 0);
                Err(End::Violation(violation, "a PDU came out of sequence"))
            }
        }
    }

    fn on_admin_data(&mut self, pdu: &Pdu) -> Result<Option<Sink>, End> {
        let transfer = Transfer::decode(&pdu.header);
        let start = self.admin.data_bytes;
        let expected = self.admin.reading.is_some_and(|(id, _)| id == transfer.command_id);
        let length = pdu.data_bytes;
        let fits = transfer.length as usize == length
            && transfer.offset as usize == start
            && start + length <= IDENTIFY_BYTES;
        if !expected || !fits || length == 0 {
            let violation = Violation::of(pdu, FatalError::DataOutOfRange, 12);
            return Err(End::Violation(violation, "data that was not asked for"));
        }
        let buffer = match self.admin.data.take() {
            Some(buffer) => buffer,
            None => match self.pool.take(IDENTIFY_BYTES) {
                Some(buffer) => buffer,
                None => return Ok(None),
            },
        };
        self.admin.data_bytes += length;
        if pdu.flags & (FLAG_LAST | FLAG_SUCCESS) == FLAG_LAST | FLAG_SUCCESS {
            let status = crate::codec::status::StatusCode::SUCCESS;
            let id = transfer.command_id;
            self.admin.completion = Some(Completion { result: 0, queue_head: 0, id, status });
        }
        Ok(Some(Sink::Buffer { buffer, header: 0..0, payload: start..start + length }))
    }

    /// A PDU of the admin connection has been taken in, with its data.
    pub(super) fn on_admin_end(&mut self, wire: &mut Wire) -> Result<(), End> {
        if wire.initialized
            && let State::Connecting { step: Step::Initialize, .. } = self.state
        {
            self.send_step_on(wire, Step::Connect);
            return Ok(());
        }
        let Some(completion) = self.admin.completion.take() else { return Ok(()) };
        match completion.id {
            id::STEP => self.on_step(wire, completion),
            id::KEEP_ALIVE => {
                self.admin.keep_alive_sent = false;
                if !completion.status.is_success() {
                    return Err(DownReason::Refused(completion.status.code()).into());
                }
                Ok(())
            }
            id::EVENT => {
                self.on_event(wire, completion);
                Ok(())
            }
            id::READING => self.on_read(wire, completion),
            _ => Err(DownReason::Protocol("a completion of an unknown command").into()),
        }
    }

    /// Sends the command of `step` on the admin connection.
    pub(super) fn send_step(&mut self, step: Step) {
        let Some(mut wire) = self.wires[Side::Admin.index()].take() else { return };
        self.send_step_on(&mut wire, step);
        self.wires[Side::Admin.index()] = Some(wire);
    }

    fn send_step_on(&mut self, wire: &mut Wire, next: Step) {
        let State::Connecting { step, .. } = &mut self.state else { return };
        *step = next;
        let command = match next {
            Step::Connect => {
                self.send_connect(wire, 0);
                return;
            }
            Step::IoConnect => {
                self.send_connect(wire, 1);
                return;
            }
            Step::IoInitialize => {
                self.open(Side::Io);
                return;
            }
            Step::Initialize => return,
            Step::Capabilities => property_get(CAP, true),
            Step::Enable => property_set(CC, CONFIGURATION),
            Step::Status => property_get(CSTS, false),
            Step::Identify => {
                self.read(wire, id::STEP, Reading::Step, identify(cns::CONTROLLER, 0));
                return;
            }
            Step::Namespace => {
                self.read(wire, id::STEP, Reading::Step, identify(cns::NAMESPACE, 1));
                return;
            }
            // One I/O queue of each kind, 0-based.
            Step::Queues => set_features(FEATURE_QUEUES, 0),
            Step::Events => set_features(FEATURE_EVENTS, EVENTS),
        };
        wire.send(&mut self.outbox, &Command { id: id::STEP, ..command }, Data::None);
    }

    fn send_connect(&mut self, wire: &Wire, queue_id: u16) {
        let keep_alive_ms = if queue_id == 0 {
            u32::try_from(self.config.keep_alive.as_millis()).unwrap_or(u32::MAX).max(1)
        } else {
            0
        };
        let (queue_size, controller_id) = if queue_id == 0 {
            (ADMIN_ENTRIES - 1, CONTROLLER_ANY)
        } else {
            (self.config.queue_entries - 1, self.admin.controller_id)
        };
        let connect = Connect {
            queue_id,
            queue_size,
            no_flow_control: true,
            keep_alive_ms,
            host_id: self.config.host.bytes(),
            controller_id,
            subsystem_nqn: self.config.subsystem.to_string(),
            host_nqn: nqn::host(self.config.host),
        };
        let data = Buffer::copied_from(&connect.data());
        let command = Command { id: id::STEP, ..connect.command() };
        wire.send(&mut self.outbox, &command, Data::Parts(&[&data]));
    }

    /// Sends a command whose answer is data.
    fn read(&mut self, wire: &Wire, id: u16, reading: Reading, command: Command) {
        self.admin.reading = Some((id, reading));
        self.admin.data_bytes = 0;
        let length = u32::try_from(IDENTIFY_BYTES).unwrap_or(0);
        let command = Command { id, sgl: Sgl::Transport { length }, ..command };
        wire.send(&mut self.outbox, &command, Data::None);
    }

    fn on_step(&mut self, wire: &mut Wire, completion: Completion) -> Result<(), End> {
        let State::Connecting { step, .. } = self.state else {
            return Err(DownReason::Protocol("a completion of an unknown command").into());
        };
        if !completion.status.is_success() {
            return Err(DownReason::Refused(completion.status.code()).into());
        }
        let data = self.take_reading(Reading::Step);
        let volume = matches!(self.config.subsystem, Subsystem::Volume(_));
        let next = match step {
            Step::Initialize | Step::IoInitialize | Step::IoConnect => {
                return Err(DownReason::Protocol("a completion of an unknown command").into());
            }
            Step::Connect => {
                let [low, high, ..] = completion.result.to_le_bytes();
                self.admin.controller_id = u16::from_le_bytes([low, high]);
                self.admin.keep_alive_at = Some(self.now + self.keep_alive_interval());
                Step::Capabilities
            }
            Step::Capabilities => {
                let [low, high, ..] = completion.result.to_le_bytes();
                let entries_max = u16::from_le_bytes([low, high]).saturating_add(1);
                if entries_max < 2 {
                    return Err(DownReason::Unsupported("queues").into());
                }
                self.config.queue_entries = self.config.queue_entries.min(entries_max);
                Step::Enable
            }
            Step::Enable => Step::Status,
            Step::Status => {
                if completion.result & u64::from(CSTS_READY) == 0 {
                    self.admin.poll_at = Some(self.now + READY_POLL);
                    return Ok(());
                }
                Step::Identify
            }
            Step::Identify => {
                self.on_controller(data.as_ref())?;
                Step::Queues
            }
            Step::Queues if volume => Step::Events,
            Step::Queues => Step::IoInitialize,
            Step::Events => Step::Namespace,
            Step::Namespace => {
                self.admin.namespace = Some(namespace(data.as_ref())?);
                Step::IoInitialize
            }
        };
        if next == Step::IoInitialize {
            self.park(wire);
        }
        self.send_step_on(wire, next);
        Ok(())
    }

    /// Identify Controller has come.
    fn on_controller(&mut self, data: Option<&BufferMut>) -> Result<(), End> {
        let data = data.ok_or(DownReason::Protocol("Identify without data"))?;
        let capsule = usize::try_from(u32_at(data.payload(), 1792)).unwrap_or(0);
        self.admin.capsule_bytes = capsule.saturating_mul(16).saturating_sub(64);
        let needed = match self.config.subsystem {
            Subsystem::Replica(_) => {
                base::limits::PAYLOAD_BYTES_MAX + base::limits::RECORD_HEADER_BYTES_MAX
            }
            Subsystem::Volume(_) | Subsystem::Discovery => 0,
        };
        if self.admin.capsule_bytes < needed {
            return Err(DownReason::Unsupported("records in capsules").into());
        }
        Ok(())
    }

    /// The data of a finished read, if all of it has come.
    fn take_reading(&mut self, reading: Reading) -> Option<BufferMut> {
        let data = self.admin.data.take();
        match self.admin.reading {
            Some((_, current)) if current == reading => {
                self.admin.reading = None;
                data.filter(|_| self.admin.data_bytes == IDENTIFY_BYTES)
            }
            Some(_) | None => None,
        }
    }

    /// Parks an Asynchronous Event Request.
    fn park(&mut self, wire: &Wire) {
        let command = Command { id: id::EVENT, ..Command::new(admin::ASYNC_EVENT, 0) };
        wire.send(&mut self.outbox, &command, Data::None);
    }

    fn on_event(&mut self, wire: &mut Wire, completion: Completion) {
        if !completion.status.is_success() {
            // Not told of changes from now on: nothing depends on being told.
            return;
        }
        let [_, _, log_page, ..] = completion.result.to_le_bytes();
        match log_page {
            state::LOG_PAGE => self.admin.wanted[0] = true,
            page::CHANGED_NAMESPACES => self.admin.wanted[1] = true,
            page::ANA => self.admin.wanted[2] = true,
            _ => {}
        }
        self.park(wire);
        self.read_next(wire);
    }

    /// Reads the next thing that an event asked for.
    fn read_next(&mut self, wire: &mut Wire) {
        if self.admin.reading.is_some() {
            return;
        }
        let Some(index) = self.admin.wanted.iter().position(|&wanted| wanted) else { return };
        self.admin.wanted[index] = false;
        let (reading, command) = match index {
            0 => (Reading::Log(state::LOG_PAGE), get_log_page(state::LOG_PAGE)),
            1 => (Reading::Log(page::CHANGED_NAMESPACES), get_log_page(page::CHANGED_NAMESPACES)),
            2 => (Reading::Log(page::ANA), get_log_page(page::ANA)),
            _ => (Reading::Namespace, identify(cns::NAMESPACE, 1)),
        };
        self.read(wire, id::READING, reading, command);
    }

    fn on_read(&mut self, wire: &mut Wire, completion: Completion) -> Result<(), End> {
        let Some((id::READING, reading)) = self.admin.reading else {
            return Err(DownReason::Protocol("a completion of an unknown command").into());
        };
        let data = self.take_reading(reading);
        if let (true, Some(data)) = (completion.status.is_success(), data) {
            match reading {
                Reading::Log(state::LOG_PAGE) => self.on_states(data.payload())?,
                Reading::Log(page::CHANGED_NAMESPACES) => {
                    // Only a volume subsystem has a namespace to look at.
                    self.admin.wanted[3] = self.admin.namespace.is_some();
                }
                Reading::Namespace => {
                    let namespace = namespace(Some(&data))?;
                    let old = self.admin.namespace.map(|old| old.block_size);
                    if old.is_some_and(|old| old != namespace.block_size) {
                        // Requests under way are counted in the old blocks.
                        return Err(DownReason::Unsupported("a change of block size").into());
                    }
                    if self.admin.namespace != Some(namespace) {
                        self.admin.namespace = Some(namespace);
                        self.outbox.push(Output::NamespaceChanged(namespace));
                    }
                }
                Reading::Log(_) | Reading::Step => {}
            }
        }
        self.read_next(wire);
        Ok(())
    }

    /// Tells what is new in the state log.
    fn on_states(&mut self, log: &[u8]) -> Result<(), End> {
        let last = &mut self.admin.last_state;
        let outbox = &mut self.outbox;
        let read = state::decode_log(log, |entry| {
            if entry.number > *last {
                *last = entry.number;
                outbox.push(Output::State(entry));
            }
        });
        read.map_err(|_| DownReason::Unsupported("this version of the volume-state log").into())
    }

    fn keep_alive_interval(&self) -> Duration {
        self.config.keep_alive / KEEP_ALIVES
    }

    pub(super) fn send_keep_alive(&mut self) {
        self.admin.keep_alive_at = Some(self.now + self.keep_alive_interval());
        let Some(wire) = &self.wires[Side::Admin.index()] else { return };
        let command = Command { id: id::KEEP_ALIVE, ..Command::new(admin::KEEP_ALIVE, 0) };
        wire.send(&mut self.outbox, &command, Data::None);
        self.admin.keep_alive_sent = true;
    }

    /// ICResp of the I/O connection has come.
    pub(super) fn connect_io(&mut self, wire: &mut Wire) {
        self.send_step_on(wire, Step::IoConnect);
    }

    /// The I/O queue is connected: the session is up.
    pub(super) fn on_io_connected(&mut self, completion: Completion) -> Result<(), End> {
        let expected = matches!(self.state, State::Connecting { step: Step::IoConnect, .. });
        if completion.id != id::STEP || !expected {
            return Err(DownReason::Protocol("a completion of an unknown command").into());
        }
        if !completion.status.is_success() {
            return Err(DownReason::Refused(completion.status.code()).into());
        }
        self.state = State::Up { since: self.now };
        self.queue.resize(self.config.queue_entries - 1);
        self.outbox.push(Output::Up { namespace: self.admin.namespace });
        Ok(())
    }
}

fn identify(structure: u8, nsid: u32) -> Command {
    let mut command = Command::new(admin::IDENTIFY, nsid);
    command.cdw10[0] = u32::from(structure);
    command
}

fn set_features(feature: u32, value: u32) -> Command {
    let mut command = Command::new(admin::SET_FEATURES, 0);
    command.cdw10[0] = feature;
    command.cdw10[1] = value;
    command
}

/// Get Log Page of [`IDENTIFY_BYTES`], clearing the event.
fn get_log_page(log_page: u8) -> Command {
    let mut command = Command::new(admin::GET_LOG_PAGE, crate::codec::command::NSID_ALL);
    let dwords = u32::try_from(IDENTIFY_BYTES / 4 - 1).unwrap_or(0);
    command.cdw10[0] = u32::from(log_page) | (dwords << 16);
    command
}

/// What Identify Namespace says of namespace 1.
fn namespace(data: Option<&BufferMut>) -> Result<Namespace, End> {
    let data = data.ok_or(DownReason::Protocol("Identify without data"))?.payload();
    // FLBAS and the LBA format that it names: metadata bytes, log2 of the data bytes.
    let format = 128 + 4 * usize::from(data[26] & 0x0f);
    let block_size = BlockSize::from_log2(data[format + 2])
        .filter(|_| u16_at(data, format) == 0)
        .ok_or(DownReason::Unsupported("blocks of 512 or 4096 bytes"))?;
    Ok(Namespace { blocks: u64_at(data, 0), block_size, read_only: data[99] & 1 != 0 })
}

//! A controller: one host's association with one subsystem.

use core::time::Duration;
use std::collections::VecDeque;

use base::{Instant, ReplicaKey};

use crate::codec::replica::HANDLES_MAX;
use crate::io::SessionId;
use crate::nqn::Subsystem;
use crate::state::{STATE_ENTRIES_MAX, StateEntry, StateMessage};

/// Asynchronous Event Requests that a host may park.
pub(super) const EVENT_REQUESTS_MAX: usize = 4;

/// What a host can be told by an asynchronous event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Namespace Attribute Changed.
    Namespace,
    /// Asymmetric Namespace Access Change.
    Access,
    /// Discovery Log Page Change.
    Discovery,
    /// Vendor specific: log page C0h has something new.
    State,
}

impl Event {
    const ALL: [Self; 4] = [Self::Namespace, Self::Access, Self::Discovery, Self::State];

    const fn bit(self) -> u8 {
        match self {
            Self::Namespace => 1,
            Self::Access => 2,
            Self::Discovery => 4,
            Self::State => 8,
        }
    }

    /// DW0 of the completion: type, information, log page (base 2.0, figure 146).
    pub(super) const fn result(self) -> u64 {
        match self {
            Self::Namespace => 0x04_00_02,
            Self::Access => 0x0c_03_02,
            Self::Discovery => 0x70_f0_02,
            Self::State => 0xc0_00_07,
        }
    }

    /// The log page that clears it.
    pub(super) const fn log_page(self) -> u8 {
        match self {
            Self::Namespace => 0x04,
            Self::Access => 0x0c,
            Self::Discovery => 0x70,
            Self::State => 0xc0,
        }
    }

    /// Its bit in feature 0Bh, Asynchronous Event Configuration; 0: always on.
    const fn configuration_bit(self) -> u32 {
        match self {
            Self::Namespace => 1 << 8,
            Self::Access => 1 << 11,
            Self::Discovery => 1 << 31,
            Self::State => 0,
        }
    }
}

/// See the module.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) subsystem: Subsystem,
    pub(super) controller_id: u16,
    pub(super) host_nqn: String,
    pub(super) host_id: [u8; 16],
    /// Slab index of the admin connection.
    pub(super) admin: u16,
    /// A bit for each I/O queue that is connected.
    pub(super) queues: u128,
    /// Zero: no timer.
    pub(super) keep_alive: Duration,
    pub(super) last_heard: Instant,
    /// Property CC.
    pub(super) configuration: u32,
    /// Property CSTS.
    pub(super) status: u32,
    /// Feature 0Bh.
    pub(super) event_configuration: u32,
    /// Feature 06h: the host wants completed writes to be volatile or not.
    pub(super) volatile_cache: bool,
    /// Command ids of parked Asynchronous Event Requests.
    parked: [u16; EVENT_REQUESTS_MAX],
    parked_count: usize,
    /// Events that happened and were not told.
    pending: u8,
    /// Events that were told and whose log page was not read.
    masked: u8,
    /// Namespace 1 is in the Changed Namespace List.
    pub(super) namespace_changed: bool,
    pub(super) states: VecDeque<StateEntry>,
    states_count: u64,
    /// What handles mean, by handle - 1.
    handles: Vec<Option<ReplicaKey>>,
}

impl Session {
    pub(super) fn new(id: SessionId, subsystem: Subsystem, controller_id: u16) -> Self {
        Self {
            id,
            subsystem,
            controller_id,
            host_nqn: String::new(),
            host_id: [0; 16],
            admin: 0,
            queues: 0,
            keep_alive: Duration::ZERO,
            last_heard: Instant::ZERO,
            configuration: 0,
            status: 0,
            event_configuration: 0,
            volatile_cache: true,
            parked: [0; EVENT_REQUESTS_MAX],
            parked_count: 0,
            pending: 0,
            masked: 0,
            namespace_changed: false,
            states: VecDeque::new(),
            states_count: 0,
            handles: Vec::new(),
        }
    }

    /// When the host must have been heard of again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.keep_alive.is_zero()).then(|| self.last_heard + self.keep_alive)
    }

    /// Binds `handle`; false if it is not in range.
    pub(super) fn bind(&mut self, handle: u32, key: ReplicaKey) -> bool {
        if handle == 0 || handle > HANDLES_MAX {
            return false;
        }
        let index = handle as usize - 1;
        if self.handles.len() <= index {
            self.handles.resize(index + 1, None);
        }
        self.handles[index] = Some(key);
        true
    }

    /// What `handle` means.
    pub(super) fn key(&self, handle: u32) -> Option<ReplicaKey> {
        let index = usize::try_from(handle).ok()?.checked_sub(1)?;
        self.handles.get(index).copied().flatten()
    }

    /// Parks an Asynchronous Event Request; false if there are too many.
    pub(super) fn park(&mut self, id: u16) -> bool {
        if self.parked_count == EVENT_REQUESTS_MAX {
            return false;
        }
        self.parked[self.parked_count] = id;
        self.parked_count += 1;
        true
    }

    pub(super) fn is_parked(&self, id: u16) -> bool {
        self.parked[..self.parked_count].contains(&id)
    }

    /// Takes a parked request out (Abort); false if it is not there.
    pub(super) fn unpark(&mut self, id: u16) -> bool {
        let Some(at) = self.parked[..self.parked_count].iter().position(|&other| other == id)
        else {
            return false;
        };
        self.parked.copy_within(at + 1..self.parked_count, at);
        self.parked_count -= 1;
        true
    }

    /// Notes an event.
    pub(super) fn raise(&mut self, event: Event) {
        let bit = event.configuration_bit();
        if bit == 0 || self.event_configuration & bit != 0 {
            self.pending |= event.bit();
        }
    }

    /// The next completion of a parked request, if an event can be told.
    pub(super) fn next_event(&mut self) -> Option<(u16, Event)> {
        if self.parked_count == 0 {
            return None;
        }
        let ready = self.pending & !self.masked;
        let event = Event::ALL.into_iter().find(|event| ready & event.bit() != 0)?;
        self.pending &= !event.bit();
        self.masked |= event.bit();
        let id = self.parked[0];
        self.unpark(id);
        Some((id, event))
    }

    /// The host has read a log page without retaining its event.
    pub(super) fn clear_event(&mut self, log_page: u8) {
        for event in Event::ALL.into_iter().filter(|event| event.log_page() == log_page) {
            self.masked &= !event.bit();
        }
    }

    /// Adds a state message; the oldest goes if there are too many.
    pub(super) fn add_state(&mut self, key: Option<ReplicaKey>, message: StateMessage) {
        if self.states.len() == STATE_ENTRIES_MAX {
            self.states.pop_front();
        }
        self.states_count += 1;
        self.states.push_back(StateEntry { number: self.states_count, key, message });
        self.raise(Event::State);
    }
}

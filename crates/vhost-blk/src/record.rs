//! What a front end has said, kept so that it can be said again to the device of another process.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::handover::{
    AddressState, ChannelState, ConnectionState, FdIndex, FdTable, InflightState, LogState,
    RegionState, RingState,
};
use crate::memory::Region;
use crate::ring::RingAddresses;

/// A region, and the file it was mapped from.
#[derive(Debug)]
pub(crate) struct KnownRegion {
    pub(crate) region: Region,
    pub(crate) offset: u64,
    pub(crate) file: File,
}

#[derive(Debug)]
pub(crate) struct KnownInflight {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) queues: u16,
    pub(crate) size: u16,
    pub(crate) own: bool,
    pub(crate) file: File,
}

#[derive(Debug)]
pub(crate) struct KnownLog {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) file: File,
}

#[derive(Debug, Default)]
pub(crate) struct KnownRing {
    pub(crate) size: Option<u16>,
    pub(crate) base: Option<u16>,
    pub(crate) addresses: Option<RingAddresses>,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<OwnedFd>,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) error: Option<OwnedFd>,
}

/// One connection's. Only what the device has accepted.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) features: Option<u64>,
    pub(crate) protocol_features: Option<u64>,
    pub(crate) memory: Vec<KnownRegion>,
    pub(crate) inflight: Option<KnownInflight>,
    pub(crate) log: Option<KnownLog>,
    pub(crate) rings: Vec<KnownRing>,
}

impl Record {
    pub(crate) fn new(queues: u16) -> Self {
        let rings = (0..queues).map(|_| KnownRing::default()).collect();
        Self { rings, ..Self::default() }
    }

    /// The record of a queue; the device has said that there is one.
    pub(crate) fn ring(&mut self, queue: u16) -> &mut KnownRing {
        &mut self.rings[usize::from(queue)]
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        self.memory.iter().map(|known| known.region.clone()).collect()
    }

    /// True if a ring has a kick eventfd, so it may run.
    pub(crate) fn any_started(&self) -> bool {
        self.rings.iter().any(|ring| ring.kick.is_some())
    }

    /// As plain data, with the descriptors in `table`; and the mappings. `channel`: the back-end
    /// channel, which the device has, and the size that the front end was given last.
    pub(crate) fn export(
        self,
        channel: Option<(OwnedFd, Option<u64>)>,
        stream: FdIndex,
        table: &mut FdTable,
    ) -> (ConnectionState, Vec<Region>) {
        let mut mapped = Vec::new();
        let mut memory = Vec::new();
        for KnownRegion { region, offset, file } in self.memory {
            memory.push(RegionState {
                gpa: region.gpa,
                user: region.user,
                bytes: region.mapping.len() as u64,
                offset,
                file: table.add(file),
            });
            mapped.push(region);
        }
        let state = ConnectionState {
            stream,
            features: self.features,
            protocol_features: self.protocol_features,
            memory,
            inflight: self.inflight.map(|known| InflightState {
                offset: known.offset,
                bytes: known.bytes,
                queues: known.queues,
                size: known.size,
                own: known.own,
                file: table.add(known.file),
            }),
            log: self.log.map(|known| LogState {
                offset: known.offset,
                bytes: known.bytes,
                file: table.add(known.file),
            }),
            rings: self.rings.into_iter().map(|ring| ring.export(table)).collect(),
            channel: channel.map(|(socket, known_blocks)| ChannelState {
                socket: table.add(socket),
                known_blocks,
            }),
        };
        (state, mapped)
    }
}

impl KnownRing {
    fn export(self, table: &mut FdTable) -> RingState {
        RingState {
            size: self.size,
            base: self.base,
            addresses: self.addresses.map(AddressState::from),
            enabled: self.enabled,
            kick: self.kick.map(|fd| table.add(fd)),
            call: self.call.map(|fd| table.add(fd)),
            error: self.error.map(|fd| table.add(fd)),
        }
    }
}

impl From<RingAddresses> for AddressState {
    fn from(addresses: RingAddresses) -> Self {
        let RingAddresses { descriptors, available, used, used_log } = addresses;
        Self { descriptors, available, used, used_log }
    }
}

impl From<AddressState> for RingAddresses {
    fn from(state: AddressState) -> Self {
        let AddressState { descriptors, available, used, used_log } = state;
        Self { descriptors, available, used, used_log }
    }
}

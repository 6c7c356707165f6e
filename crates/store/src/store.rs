//! The store.

use std::collections::VecDeque;

use base::{Instant, ReplicaKey};

use crate::api::{Input, Output, ReplicaInfo, StoreConfig, Usage};
use crate::layout::DeviceInfo;

/// One pool of one server.
pub struct Store {
    outputs: VecDeque<Output>,
}

impl Store {
    /// Begins to open the pool on `devices`, which are in the order of their indexes. Nothing is
    /// known until [`Output::Opened`] comes.
    ///
    /// # Panics
    /// If the configuration has fewer buffers than a store needs.
    pub fn open(_config: StoreConfig, _devices: &[DeviceInfo]) -> Self {
        Self { outputs: VecDeque::new() }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, _now: Instant, _input: Input) {}

    /// The next thing to do, until there is none. Call it after the inputs of a turn: appends
    /// that came together are written together.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to come back with [`Input::Tick`] if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Asserts what must hold between any two calls. For tests and the simulator: it walks
    /// everything.
    pub fn check_invariants(&self) {}

    /// The replicas and what is known of them, in the order of their keys.
    pub fn replicas(&self) -> impl Iterator<Item = (ReplicaKey, ReplicaInfo)> + '_ {
        core::iter::empty()
    }

    /// What is known of one replica.
    pub fn replica(&self, _key: ReplicaKey) -> Option<ReplicaInfo> {
        None
    }

    /// How full the pool is.
    pub fn usage(&self) -> Usage {
        Usage::default()
    }
}

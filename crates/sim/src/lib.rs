//! Deterministic simulation of a cluster: time, disks, network, oracle and checkers (L3).

//! A server or an initiator composed of store, nvme and volume; the one ack gate (L1, sans-I/O).

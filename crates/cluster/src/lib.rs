//! The cluster store: volume records, shard records, servers and placement (L2).

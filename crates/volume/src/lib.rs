//! The head of a volume: opening, ordered replication, quorum, reads, membership (L1, sans-I/O).

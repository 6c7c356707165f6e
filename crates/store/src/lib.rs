//! A pool: log, index, home, checkpoint, flush, trim and recovery (L1, sans-I/O).

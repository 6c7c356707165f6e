//! The reactor: io_uring, buffers, sockets, timers and mailboxes (L2).

//! vhost-user-blk devices: sessions, guest memory, queues, in-flight buffer, dirty log (L2).

//! NVMe over TCP: PDU codec, commands, target and initiator machines (L1, sans-I/O).

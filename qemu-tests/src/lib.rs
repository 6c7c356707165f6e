//! Boots real guests under QEMU and tests volumes through them.

//! Bytes of PDUs, commands, completions, identify structures, features and log pages, and what
//! they mean. Little-endian throughout. Names and offsets follow the NVMe base specification 2.0
//! ("base"), the NVM command set specification 1.0 ("NVM") and the NVMe/TCP transport
//! specification 1.0 ("TCP").

pub mod command;
pub mod fabrics;
pub mod identify;
pub mod log;
pub mod pdu;
pub mod replica;
pub mod status;

/// Copies `value` to `at`.
pub(crate) fn put(out: &mut [u8], at: usize, value: &[u8]) {
    out[at..at + value.len()].copy_from_slice(value);
}

/// Copies ASCII `text` to `at`, padded with spaces to `length` (base 2.0, 1.4.2).
pub(crate) fn put_text(out: &mut [u8], at: usize, length: usize, text: &str) {
    let used = text.len().min(length);
    put(out, at, &text.as_bytes()[..used]);
    out[at + used..at + length].fill(b' ');
}

/// The `N` bytes at `at`; zeroes past the end.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(found) = bytes.get(at..at + N) {
        value.copy_from_slice(found);
    }
    value
}

/// The u16 at `at`; zero past the end.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(take(bytes, at))
}

/// The u32 at `at`; zero past the end.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

/// The u64 at `at`; zero past the end.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

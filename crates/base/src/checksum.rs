//! CRC32C (Castagnoli), the one checksum of the project: records, blocks, disk structures and
//! NVMe/TCP digests (NVMe/TCP transport specification 1.x, 3.3.1.1 uses the same polynomial).

/// CRC32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// CRC32C of the concatenation of what gave `crc` and `bytes`.
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

/// CRC32C of `bytes` with the four bytes at `field` taken as zero: for structures that carry
/// their own checksum inside.
///
/// # Panics
/// If `field..field + 4` is not within `bytes`.
pub fn crc32c_without(bytes: &[u8], field: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..field]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[field + 4..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn own_field_is_taken_as_zero() {
        let mut bytes = [9_u8; 64];
        bytes[8..12].fill(0);
        let crc = crc32c(&bytes);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(crc32c_without(&bytes, 8), crc);
    }
}

//! What a device holds that is not ours, told by well-known signatures, so that formatting does
//! not destroy it by mistake.
//!
//! Offsets and magics are from the formats' own definitions as `wipefs`(8) and the kernel's file
//! systems know them.

/// The bytes at a device's end that are looked at: backup partition tables and RAID superblocks.
pub(crate) const TAIL_BYTES: usize = 128 * 1024;

struct Signature {
    name: &'static str,
    offset: usize,
    magic: &'static [u8],
}

const fn signature(name: &'static str, offset: usize, magic: &'static [u8]) -> Signature {
    Signature { name, offset, magic }
}

/// Of the first bytes; those that are more telling first.
const AT_START: &[Signature] = &[
    signature("a LUKS encrypted device", 0, b"LUKS\xba\xbe"),
    signature("an XFS file system", 0, b"XFSB"),
    signature("a squashfs file system", 0, b"hsqs"),
    signature("a qcow2 disk image", 0, b"QFI\xfb"),
    signature("an LVM physical volume", 512, b"LABELONE"),
    signature("an LVM physical volume", 0, b"LABELONE"),
    signature("a GPT partition table", 512, b"EFI PART"),
    signature("a GPT partition table", 4096, b"EFI PART"),
    signature("a Linux RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    signature("a Linux RAID member", 4096, b"\xfc\x4e\x2b\xa9"),
    signature("an ext2, ext3 or ext4 file system", 1080, b"\x53\xef"),
    signature("an F2FS file system", 1024, b"\x10\x20\xf5\xf2"),
    signature("swap space", 4086, b"SWAPSPACE2"),
    signature("swap space", 65526, b"SWAPSPACE2"),
    signature("an ISO 9660 file system", 32769, b"CD001"),
    signature("a Btrfs file system", 65600, b"_BHRfS_M"),
    signature("a bcachefs or bcache device", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    signature("a Ceph device", 0, b"bluestore block device"),
    signature("an NTFS file system", 3, b"NTFS    "),
    signature("an exFAT file system", 3, b"EXFAT   "),
    signature("a FAT file system", 82, b"FAT32"),
    signature("a FAT file system", 54, b"FAT1"),
    signature("a partition table", 510, b"\x55\xaa"),
];

/// What a device with these first and last bytes holds, as far as it can be told; `None` if they
/// are all zero.
pub(crate) fn detect(start: &[u8], end: &[u8]) -> Option<&'static str> {
    let matches = |signature: &&Signature| {
        start.get(signature.offset..).is_some_and(|rest| rest.starts_with(signature.magic))
    };
    if let Some(found) = AT_START.iter().find(matches) {
        return Some(found.name);
    }
    if contains_sector(end, b"EFI PART") {
        return Some("a GPT partition table (its backup)");
    }
    if contains_sector(end, b"\xfc\x4e\x2b\xa9") {
        return Some("a Linux RAID member");
    }
    let blank = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    (!blank(start) || !blank(end)).then_some("data of an unknown kind")
}

/// True if one of the 512-byte sectors, counted from the end, begins with `magic`.
fn contains_sector(end: &[u8], magic: &[u8]) -> bool {
    end.rchunks_exact(512).any(|sector| sector.starts_with(magic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_found_and_blank_is_blank() {
        let blank = vec![0; 128 * 1024];
        assert_eq!(detect(&blank, &blank), None);
        for signature in AT_START {
            let mut start = blank.clone();
            start[signature.offset..signature.offset + signature.magic.len()]
                .copy_from_slice(signature.magic);
            assert_eq!(detect(&start, &blank), Some(signature.name));
        }
        let mut end = blank.clone();
        let at = end.len() - 512;
        end[at..at + 8].copy_from_slice(b"EFI PART");
        assert_eq!(detect(&blank, &end), Some("a GPT partition table (its backup)"));
        let mut odd = blank.clone();
        odd[77] = 1;
        assert_eq!(detect(&odd, &blank), Some("data of an unknown kind"));
        assert_eq!(detect(&[], &[]), None);
        assert_eq!(detect(b"XF", &[]), Some("data of an unknown kind"));
    }
}

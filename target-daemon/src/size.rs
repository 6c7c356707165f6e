//! Sizes as people write them: `4096`, `512K`, `256M`, `4G`, `2T` (powers of 1024).

/// A text that is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a size: {reason} (examples: 4096, 512K, 256M, 4G, 2T; powers of 1024)")]
pub struct InvalidSize {
    text: String,
    reason: &'static str,
}

/// The size in bytes that `text` means.
pub fn parse_size(text: &str) -> Result<u64, InvalidSize> {
    let invalid = |reason| InvalidSize { text: text.chars().take(40).collect(), reason };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(invalid("it must begin with a whole number"));
    }
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(invalid("the unit is not known")),
    };
    let number: u64 = number.parse().map_err(|_| invalid("it is too large"))?;
    number.checked_mul(1 << shift).ok_or_else(|| invalid("it is too large"))
}

/// `bytes` for people: exact if it is a whole number of a unit, else with one decimal.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >> shift > 0 {
            let whole = bytes >> shift;
            let tenths = ((u128::from(bytes) * 10) >> shift) % 10;
            return if bytes.trailing_zeros() >= shift {
                format!("{whole} {unit}")
            } else {
                format!("{whole}.{tenths} {unit}")
            };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512K", 512 << 10), ("4g", 4 << 30), ("2TiB", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for bad in ["", "G", "-1", "1.5G", "4 G", "4X", "99999999999999999999", "20000000T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        for (bytes, text) in [
            (17, "17 B"),
            (4 << 30, "4 GiB"),
            ((4 << 30) + (1 << 29), "4.5 GiB"),
            (1536, "1.5 KiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }
}

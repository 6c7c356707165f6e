//! Names that people give to volumes and servers.

use base::limits::NAME_BYTES_MAX;

/// A name that a volume or server cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{name}' cannot be a name: {reason}")]
pub struct InvalidName {
    name: String,
    reason: &'static str,
}

/// Checks a name: 1 to [`NAME_BYTES_MAX`] letters, digits, `.`, `_` and `-`, beginning with a
/// letter or digit, and not itself a UUID, since commands take a name or an id.
pub fn check_name(name: &str) -> Result<(), InvalidName> {
    let refuse = |reason| Err(InvalidName { name: name.chars().take(80).collect(), reason });
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return refuse("it must have 1 to 63 characters");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return refuse("only letters, digits, '.', '_' and '-' are allowed");
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return refuse("it must begin with a letter or digit");
    }
    if uuid::Uuid::parse_str(name).is_ok() {
        return refuse("it looks like an id");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_and_bad_names() {
        for good in ["a", "db-1", "vm.7_disk", "9", &"x".repeat(63)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        let long = "x".repeat(64);
        let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        for bad in ["", "-a", ".a", "a b", "a/b", "ü", "a\0", &long, id] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}

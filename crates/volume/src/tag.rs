//! A command's tag says what it was for, so that no table of commands is needed: its kind, the
//! member's session it was sent in, and a number whose meaning depends on the kind.

/// What a command was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Seal,
    Append,
    Read,
    Flush,
    Scan,
    Truncate,
    Trim,
    Release,
    Renew,
    Hello,
    HealthOf,
    Install,
    /// A read of what another member cannot read.
    Mend,
    Grow,
}

const KIND_SHIFT: u32 = 60;
const SESSION_SHIFT: u32 = 40;
const SESSION_MASK: u64 = (1 << (KIND_SHIFT - SESSION_SHIFT)) - 1;
/// The bits of a tag's number.
pub(crate) const NUMBER_MASK: u64 = (1 << SESSION_SHIFT) - 1;

impl Kind {
    /// True if a replica takes note of the commit seq in such a command.
    pub(crate) const fn tells_commit(self) -> bool {
        matches!(self, Self::Append | Self::Trim | Self::Release)
    }

    /// True if the replica may carry it out long after commands that came later: what a Seal says of the log is
    /// true only once such a command is answered. All others take effect, or fail, in the order in which they came.
    pub(crate) const fn outlives_a_seal(self) -> bool {
        match self {
            Self::Seal | Self::Truncate | Self::Install | Self::Grow => true,
            Self::Append
            | Self::Read
            | Self::Flush
            | Self::Scan
            | Self::Trim
            | Self::Release
            | Self::Renew
            | Self::Hello
            | Self::HealthOf
            | Self::Mend => false,
        }
    }

    const fn code(self) -> u64 {
        match self {
            Self::Seal => 1,
            Self::Append => 2,
            Self::Read => 3,
            Self::Flush => 4,
            Self::Scan => 5,
            Self::Truncate => 6,
            Self::Trim => 7,
            Self::Release => 8,
            Self::Renew => 9,
            Self::Hello => 10,
            Self::HealthOf => 11,
            Self::Install => 12,
            Self::Mend => 13,
            Self::Grow => 14,
        }
    }

    const fn from_code(code: u64) -> Option<Self> {
        match code {
            1 => Some(Self::Seal),
            2 => Some(Self::Append),
            3 => Some(Self::Read),
            4 => Some(Self::Flush),
            5 => Some(Self::Scan),
            6 => Some(Self::Truncate),
            7 => Some(Self::Trim),
            8 => Some(Self::Release),
            9 => Some(Self::Renew),
            10 => Some(Self::Hello),
            11 => Some(Self::HealthOf),
            12 => Some(Self::Install),
            13 => Some(Self::Mend),
            14 => Some(Self::Grow),
            _ => None,
        }
    }
}

/// The tag of a command of `kind` in a member's `session`.
pub(crate) const fn tag(kind: Kind, session: u64, number: u64) -> u64 {
    kind.code() << KIND_SHIFT | (session & SESSION_MASK) << SESSION_SHIFT | (number & NUMBER_MASK)
}

/// Kind and number of `tag`, if it is one of `session`.
pub(crate) const fn parse(tag: u64, session: u64) -> Option<(Kind, u64)> {
    if (tag >> SESSION_SHIFT) & SESSION_MASK != session & SESSION_MASK {
        return None;
    }
    match Kind::from_code(tag >> KIND_SHIFT) {
        Some(kind) => Some((kind, tag & NUMBER_MASK)),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_of_another_session_is_not_ours() {
        let one = tag(Kind::Append, 7, 12);
        assert_eq!(parse(one, 7), Some((Kind::Append, 12)));
        assert_eq!(parse(one, 8), None);
        assert_eq!(parse(12, 0), None);
    }
}

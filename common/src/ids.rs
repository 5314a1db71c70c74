//! Identifiers. Each is checked where it enters a process, by its constructor or while it is deserialised; a value of one of
//! these types is valid, so nothing behind the boundary checks again.

use std::fmt;
use std::str::FromStr;

/// A sandbox's id: `[a-z0-9][a-z0-9-]{0,62}`. It is a path component, a part of a kernel name and a label of logs, so the
/// grammar leaves out everything that is special in any of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "ipc", serde(try_from = "String", into = "String"))]
pub struct SandboxId(String);

/// Longest sandbox id, in bytes.
pub const MAX_SANDBOX_ID: usize = 63;

/// Why a string or number is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not of the grammar.
    #[error("a sandbox id is 1 to 63 of a-z, 0-9 and '-', and does not start with '-'")]
    SandboxId,
    /// Outside 1..=32767.
    #[error("a slot is 1 to 32767, not {0}")]
    Slot(u32),
}

impl SandboxId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SandboxId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        let bytes = text.as_bytes();
        let fits = (1..=MAX_SANDBOX_ID).contains(&bytes.len())
            && bytes[0] != b'-'
            && bytes
                .iter()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if fits { Ok(Self(text)) } else { Err(IdError::SandboxId) }
    }
}

impl FromStr for SandboxId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::try_from(text.to_owned())
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A sandbox's place in the network plan, 1..=32767: 2n+1 must stay inside the veth range 10.12.0.0/16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "ipc", serde(try_from = "u32", into = "u32"))]
pub struct Slot(u16);

impl Slot {
    /// The lowest slot.
    pub const MIN: Self = Self(1);
    /// The highest slot.
    pub const MAX: Self = Self(32767);

    /// The slot's number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for Slot {
    type Error = IdError;

    fn try_from(number: u32) -> Result<Self, IdError> {
        match u16::try_from(number) {
            Ok(number) if (Self::MIN.0..=Self::MAX.0).contains(&number) => Ok(Self(number)),
            _ => Err(IdError::Slot(number)),
        }
    }
}

impl From<Slot> for u32 {
    fn from(slot: Slot) -> Self {
        u32::from(slot.0)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_strings_of_the_grammar_become_sandbox_ids() {
        for good in ["a", "0", "cl-0123456789abcdefghijklmno", &"x".repeat(63), "a-", "a--b"] {
            assert!(good.parse::<SandboxId>().is_ok(), "{good:?} was refused");
        }
        let long = "x".repeat(64);
        for bad in [
            "",
            "-a",
            "A",
            "a_b",
            "a.b",
            "..",
            "a/b",
            "a b",
            "a\0",
            "é",
            "a\n",
            "%2e",
            long.as_str(),
        ] {
            assert_eq!(
                bad.parse::<SandboxId>(),
                Err(IdError::SandboxId),
                "{bad:?} was accepted"
            );
        }
    }

    #[test]
    fn only_numbers_of_the_plan_become_slots() {
        assert_eq!(Slot::try_from(1).map(Slot::get), Ok(1));
        assert_eq!(Slot::try_from(32767).map(Slot::get), Ok(32767));
        for bad in [0, 32768, 65536, 65537, u32::MAX] {
            assert_eq!(Slot::try_from(bad), Err(IdError::Slot(bad)));
        }
    }
}

//! Judges a `state.json` before it is kept: whether it is JSON to its end, and what memory it describes. What the state means is
//! the VMM's business, and it is read again only by a VMM in the same cage.
//!
//! The shape, as of cloud-hypervisor v53 (`vm-migration/src/lib.rs`, `vmm/src/memory_manager.rs`): a tree of components,
//! `{"snapshots": {<id>: <component>…}, "snapshot_data": {"state": <text>} | null}`, in which `state` is itself JSON, as text.
//! That of `memory-manager` lists the ranges of `memory-ranges` in the order of the file, and the mappings that a restore makes.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// The VMM refuses ranges that are not whole pages when it restores on demand.
const PAGE: u64 = 4096;

/// What is wrong with a state. Its text was written by a VMM, so none of it is quoted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not JSON, or cut off, or nested too deeply, or something behind it.
    #[error("it {problem} at line {line}, column {column}")]
    Json {
        /// A clause.
        problem: &'static str,
        /// From 1.
        line: usize,
        /// From 1; 0 at a line's end.
        column: usize,
    },
    /// No memory in it.
    #[error("it does not describe any memory")]
    NoMemory,
    /// Memory that no VM has.
    #[error("it describes memory that is not whole pages, or more than there can be")]
    Ranges,
}

impl From<serde_json::Error> for StateError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json {
            problem: match error.classify() {
                serde_json::error::Category::Eof => "ends early",
                serde_json::error::Category::Data => "is not what a VMM writes",
                serde_json::error::Category::Syntax | serde_json::error::Category::Io => "is not JSON",
            },
            line: error.line(),
            column: error.column(),
        }
    }
}

/// Memory, as a state describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// Bytes in `memory-ranges`.
    pub(super) saved: u64,
    /// Bytes that a restored VM has.
    pub(super) mapped: u64,
}

/// Checks that `text` is JSON from its first byte to its last. Takes no memory for what it reads, and follows no nesting deeper
/// than `serde_json`'s limit of 128.
pub(super) fn check(text: &[u8]) -> Result<(), StateError> {
    let Anything = serde_json::from_slice(text)?;
    Ok(())
}

/// What memory a state of cloud-hypervisor describes.
pub(super) fn memory(text: &[u8]) -> Result<Memory, StateError> {
    let vm: Component<Components> = serde_json::from_slice(text)?;
    let manager = vm.snapshots.memory.and_then(|memory| memory.snapshot_data);
    let manager: MemoryManager = serde_json::from_str(&manager.ok_or(StateError::NoMemory)?.state)?;
    let ranges = manager.memory_ranges.data.iter().map(|range| (range.gpa, range.length));
    let mappings = manager
        .guest_ram_mappings
        .iter()
        .map(|mapping| (mapping.gpa, mapping.size));
    Ok(Memory {
        saved: total(ranges)?,
        mapped: total(mappings)?,
    })
}

fn total(ranges: impl Iterator<Item = (u64, u64)>) -> Result<u64, StateError> {
    let mut total = 0u64;
    for (start, length) in ranges {
        let whole = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && start.checked_add(length).is_some();
        total = total.checked_add(length).filter(|_| whole).ok_or(StateError::Ranges)?;
    }
    Ok(total)
}

#[derive(serde::Deserialize)]
struct Component<S> {
    snapshots: S,
    snapshot_data: Option<Data>,
}

#[derive(serde::Deserialize)]
struct Components {
    #[serde(rename = "memory-manager")]
    memory: Option<Component<de::IgnoredAny>>,
}

#[derive(serde::Deserialize)]
struct Data {
    state: String,
}

#[derive(serde::Deserialize)]
struct MemoryManager {
    memory_ranges: Table,
    guest_ram_mappings: Vec<Mapping>,
}

#[derive(serde::Deserialize)]
struct Table {
    data: Vec<Range>,
}

#[derive(serde::Deserialize)]
struct Range {
    gpa: u64,
    length: u64,
}

#[derive(serde::Deserialize)]
struct Mapping {
    gpa: u64,
    size: u64,
}

/// Any JSON value, read and forgotten. Not [`de::IgnoredAny`]: that one is read without recursion, so that no limit of depth holds.
struct Anything;

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Forget)
    }
}

struct Forget;

impl<'de> Visitor<'de> for Forget {
    type Value = Anything;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_str<E>(self, _: &str) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_unit<E>(self) -> Result<Anything, E> {
        Ok(Anything)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Anything, A::Error> {
        while let Some(Anything) = elements.next_element()? {}
        Ok(Anything)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Anything, A::Error> {
        while let Some((Anything, Anything)) = entries.next_entry()? {}
        Ok(Anything)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A state as v53 writes it, with most of what else its parts hold left out.
    pub(in crate::snapshot) fn sample(ranges: &[(u64, u64)], mappings: &[(u64, u64)]) -> Value {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(gpa, length)| json!({ "gpa": gpa, "length": length }))
            .collect();
        let mappings: Vec<_> = mappings
            .iter()
            .map(|(gpa, size)| json!({ "slot": 0, "gpa": gpa, "size": size, "zone_id": "mem0", "file_offset": 0 }))
            .collect();
        let manager = json!({
            "memory_ranges": { "data": ranges },
            "guest_ram_mappings": mappings,
            "start_of_device_area": 1u64 << 36, "boot_ram": 1u64 << 29, "current_ram": 1u64 << 29,
            "arch_mem_regions": [], "hotplug_slots": [], "next_memory_slot": 1, "selected_slot": 0, "next_hotplug_slot": 0,
        });
        let part = |state: Value| json!({ "snapshots": {}, "snapshot_data": { "state": state.to_string() } });
        json!({
            "snapshots": {
                "cpu-manager": { "snapshots": { "0": part(json!({ "Kvm": {} })) }, "snapshot_data": null },
                "device-manager": part(json!({ "device_tree": {}, "device_id_cnt": 0 })),
                "memory-manager": part(manager),
            },
            "snapshot_data": { "state": "{\"common_cpuid\":[]}" },
        })
    }

    #[test]
    fn memory_is_summed_over_its_ranges() {
        let gap = [(0, 3 << 30), (4 << 30, 1 << 30)];
        let found = memory(sample(&gap, &gap).to_string().as_bytes());
        let all = 4 << 30;
        assert_eq!(
            found,
            Ok(Memory {
                saved: all,
                mapped: all
            })
        );
    }

    #[test]
    fn memory_that_no_vm_has_is_refused() {
        for bad in [
            &[(1, 4096)][..],
            &[(0, 4095)],
            &[(0, !4095), (0, !4095)],
            &[(!4095, 8192)],
        ] {
            let good = [(0, 4096)];
            assert_eq!(
                memory(sample(bad, &good).to_string().as_bytes()),
                Err(StateError::Ranges),
                "{bad:?}"
            );
            assert_eq!(
                memory(sample(&good, bad).to_string().as_bytes()),
                Err(StateError::Ranges),
                "{bad:?}"
            );
        }
        for none in [
            json!({ "snapshots": {}, "snapshot_data": null }),
            json!({ "snapshots": { "memory-manager": { "snapshots": {}, "snapshot_data": null } }, "snapshot_data": null }),
        ] {
            assert_eq!(memory(none.to_string().as_bytes()), Err(StateError::NoMemory), "{none}");
        }
        for other in [
            json!([]),
            json!({ "standin": "53.0.0" }),
            json!({ "snapshots": 5, "snapshot_data": null }),
        ] {
            assert!(memory(other.to_string().as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn json_counts_only_when_it_is_whole_and_shallow() {
        let whole = sample(&[(0, 4096)], &[(0, 4096)]).to_string();
        assert_eq!(check(whole.as_bytes()), Ok(()));
        for end in [0, 1, whole.len() / 2, whole.len() - 1] {
            assert!(check(&whole.as_bytes()[..end]).is_err(), "the first {end} bytes");
        }
        assert!(check(format!("{whole}\0").as_bytes()).is_err(), "something behind it");
        assert!(
            check(format!("{whole}{whole}").as_bytes()).is_err(),
            "a second one behind it"
        );
        assert!(check(b"{\"a\": \"\xff\"}").is_err(), "not UTF-8");
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let nested = |depth: usize| format!("{}0{}", open.repeat(depth), close.repeat(depth));
            assert_eq!(check(nested(100).as_bytes()), Ok(()));
            assert!(check(nested(200).as_bytes()).is_err());
            assert!(check(nested(1 << 20).as_bytes()).is_err());
        }
    }

    #[test]
    fn no_text_of_a_state_is_quoted() {
        let hostile = json!({ "snapshots": "\u{1b}[31mboo", "snapshot_data": null }).to_string();
        let error = memory(hostile.as_bytes()).expect_err("no components");
        assert_eq!(error.to_string(), "it is not what a VMM writes at line 1, column 49");
    }
}

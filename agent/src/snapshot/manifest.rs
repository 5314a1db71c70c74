//! What we know of a snapshot: `manifest.json`, written last, so that a generation without one is none.

use std::fs::File;
use std::ops::RangeInclusive;
use std::path::Path;

use roost_common::shim::RestoreMode;
use roost_common::units::{Bytes, Mebibytes, Sectors, Vcpus};
use serde::{Deserialize, Serialize};

use super::cpu::Cpu;
use super::seal::MAX_STATE;
use super::{CONFIG, MANIFEST, MEMORY, STATE, SnapshotDir, SnapshotError, check_length};
use crate::guest::Nonces;

/// Version of the format.
pub(super) const VERSION: u32 = 1;
/// Longest manifest that is read back; the flags of a CPU are most of it.
const MAX_MANIFEST: u64 = 1 << 20;

/// What a generation is, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format, 1.
    pub version: u32,
    /// Of which VM.
    pub about: About,
    /// Its files.
    pub files: Files,
}

/// What VM a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The VMM's version.
    pub vmm_version: String,
    /// The guest kernel's version, [`Kernel::version`](crate::host::kernels::Kernel).
    pub kernel_version: String,
    /// Whether it was booted with an initramfs.
    pub initramfs: bool,
    /// The version of the envd in it.
    pub envd_version: String,
    /// Whether that envd repeats nonces. Of manifests before this was looked at nobody knows.
    #[serde(default)]
    pub nonces: Nonces,
    /// The CPU that it ran on.
    pub cpu: Cpu,
    /// What the VM has.
    pub size: Size,
    /// Which devices.
    pub devices: Devices,
    /// What the memory file is.
    pub memory_file: MemoryFile,
    /// Whether all of the guest's programs had stopped, so that it may be woken more than once: none of them runs before it has been told
    /// who it is, and draws the random numbers that its twin draws.
    #[serde(default)]
    pub held: bool,
    /// How its memory may be restored at most: where this is [`RestoreMode::Copy`], not on demand.
    pub restore: RestoreMode,
    /// When it was made, in seconds since 1970.
    pub made_at_unix: i64,
}

/// What a VM has; the same before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Virtual CPUs.
    pub vcpus: Vcpus,
    /// Memory.
    pub memory: Mebibytes,
    /// Its disk.
    pub disk: Sectors,
}

/// Devices as they stand in the state: a restore must name the same ones by the same ids. A VM with others gets another variant,
/// which an agent that does not know it refuses to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Devices {
    /// Disk `rootfs`, network `net0`, random numbers, a balloon that reports free pages, a serial port on the VMM's terminal.
    RootfsNet0BalloonSerial,
}

/// What a memory file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryFile {
    /// cloud-hypervisor's: memory byte by byte, range behind range, in the order of the state.
    Raw,
    /// A stand-in's: something that only it can read.
    Stream,
}

impl MemoryFile {
    /// What the VMM of a version writes. A stand-in for it says in its version that it is one.
    pub fn of_version(version: &str) -> Self {
        if version.ends_with("-standin") {
            Self::Stream
        } else {
            Self::Raw
        }
    }
}

/// A generation's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// `state.json`.
    #[serde(rename = "state.json")]
    pub state: StateFile,
    /// `memory-ranges`.
    #[serde(rename = "memory-ranges")]
    pub memory: LargeFile,
}

/// A file that is small enough for a checksum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFile {
    /// Its length.
    pub length: Bytes,
    /// What it takes on disk.
    pub allocated: Bytes,
    /// SHA-256 of its content, in hexadecimal.
    pub sha256: String,
}

/// A file that is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LargeFile {
    /// Its length.
    pub length: Bytes,
    /// What it takes on disk.
    pub allocated: Bytes,
}

impl Files {
    pub(super) fn new(state: &[u8], state_allocated: Bytes, memory: Bytes, memory_allocated: Bytes) -> Self {
        Self {
            state: StateFile {
                length: Bytes(state.len() as u64),
                allocated: state_allocated,
                sha256: sha256(state),
            },
            memory: LargeFile {
                length: memory,
                allocated: memory_allocated,
            },
        }
    }

    /// What the generation takes on disk.
    pub fn allocated(&self) -> Bytes {
        Bytes(self.state.allocated.0.saturating_add(self.memory.allocated.0))
    }
}

impl Manifest {
    pub(super) fn new(about: About, files: Files) -> Self {
        Self {
            version: VERSION,
            about,
            files,
        }
    }

    /// Reads the manifest of a generation.
    ///
    /// # Errors
    /// [`SnapshotError`]; where there is no manifest, a [`SnapshotError::File`] that says so.
    pub fn read(generation: &Path) -> Result<Self, SnapshotError> {
        Self::read_in(&SnapshotDir::open(generation)?)
    }

    pub(super) fn read_in(dir: &SnapshotDir) -> Result<Self, SnapshotError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let content = dir.read_bounded(MANIFEST, 1..=MAX_MANIFEST)?;
        let versioned: Versioned = serde_json::from_slice(&content).map_err(SnapshotError::Manifest)?;
        if versioned.version != VERSION {
            return Err(SnapshotError::Version(versioned.version));
        }
        serde_json::from_slice(&content).map_err(SnapshotError::Manifest)
    }

    /// Checks that a generation holds what was sealed, and nothing else but a `config.json`, which every restore writes anew.
    /// Memory is checked by its length alone.
    ///
    /// # Errors
    /// [`SnapshotError`], saying what is not as it was.
    pub fn verify(&self, generation: &Path) -> Result<(), SnapshotError> {
        self.open_verified(&SnapshotDir::open(generation)?).map(drop)
    }

    /// The same for a template's, which sandboxes that are being made [share](super::share).
    ///
    /// # Errors
    /// [`SnapshotError`], saying what is not as it was.
    pub fn verify_template(&self, generation: &Path) -> Result<(), SnapshotError> {
        self.open_template(&SnapshotDir::open(generation)?).map(drop)
    }

    /// As [`verify`](Self::verify); returns the state's text and the memory file.
    pub(super) fn open_verified(&self, dir: &SnapshotDir) -> Result<(Vec<u8>, File), SnapshotError> {
        Ok((self.state(dir)?, self.memory(dir, dir.open_regular(MEMORY)?)?))
    }

    /// As [`verify_template`](Self::verify_template); returns the state's text and the memory file.
    pub(super) fn open_template(&self, dir: &SnapshotDir) -> Result<(Vec<u8>, File), SnapshotError> {
        Ok((self.state(dir)?, self.memory(dir, dir.open_named(MEMORY)?)?))
    }

    fn state(&self, dir: &SnapshotDir) -> Result<Vec<u8>, SnapshotError> {
        let known = [STATE, MEMORY, MANIFEST, CONFIG];
        for name in dir.names()? {
            if !known.iter().any(|known| known.as_bytes() == name) {
                let name = name[..name.len().min(64)].escape_ascii().to_string();
                return Err(SnapshotError::Unexpected { name });
            }
        }
        check_length(STATE, self.files.state.length.0, 1..=MAX_STATE)?;
        let state = dir.read_bounded(STATE, exactly(self.files.state.length))?;
        if sha256(&state) != self.files.state.sha256 {
            return Err(SnapshotError::Checksum { name: STATE });
        }
        Ok(state)
    }

    fn memory(&self, dir: &SnapshotDir, memory: File) -> Result<File, SnapshotError> {
        let found = memory
            .metadata()
            .map_err(|error| dir.error("inspecting", MEMORY, error))?
            .len();
        check_length(MEMORY, found, exactly(self.files.memory.length))?;
        Ok(memory)
    }
}

fn exactly(length: Bytes) -> RangeInclusive<u64> {
    length.0..=length.0
}

fn sha256(content: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, content);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::seal::tests::Attempt;

    pub(in crate::snapshot) fn about() -> About {
        About {
            vmm_version: "53.0.0".into(),
            kernel_version: "6.1.0-41".into(),
            initramfs: true,
            envd_version: "0.1.0".into(),
            nonces: Nonces::Repeated,
            cpu: Cpu {
                vendor: "GenuineIntel".into(),
                model_name: "Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz".into(),
                family: 6,
                model: 85,
                stepping: 7,
                flags: ["avx2", "avx512f", "fpu"].map(String::from).into(),
            },
            size: Size {
                vcpus: Vcpus(2),
                memory: Mebibytes(64),
                disk: Mebibytes(1024).sectors(),
            },
            devices: Devices::RootfsNet0BalloonSerial,
            memory_file: MemoryFile::Raw,
            held: true,
            restore: RestoreMode::OnDemand,
            made_at_unix: 1_700_000_000,
        }
    }

    #[test]
    fn a_manifest_is_for_people_too() {
        let files = Files::new(b"{}", Bytes(4096), Bytes(64 << 20), Bytes(8192));
        let manifest = Manifest::new(about(), files);
        let text = serde_json::to_value(&manifest).expect("serialised");
        let golden = serde_json::json!({
            "version": 1,
            "about": {
                "vmm_version": "53.0.0",
                "kernel_version": "6.1.0-41",
                "initramfs": true,
                "envd_version": "0.1.0",
                "nonces": "repeated",
                "cpu": {
                    "vendor": "GenuineIntel",
                    "model_name": "Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz",
                    "family": 6,
                    "model": 85,
                    "stepping": 7,
                    "flags": ["avx2", "avx512f", "fpu"],
                },
                "size": { "vcpus": 2, "memory": 64, "disk": 2_097_152 },
                "devices": "rootfs_net0_balloon_serial",
                "memory_file": "raw",
                "held": true,
                "restore": "OnDemand",
                "made_at_unix": 1_700_000_000,
            },
            "files": {
                "state.json": {
                    "length": 2,
                    "allocated": 4096,
                    "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
                },
                "memory-ranges": { "length": 64 << 20, "allocated": 8192 },
            },
        });
        assert_eq!(text, golden);
    }

    #[test]
    fn stored_manifests_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let read = |stored: &str| {
            fs::write(dir.path().join(MANIFEST), stored).expect("written");
            Manifest::read(dir.path()).expect("read")
        };
        let now = read(include_str!("samples/manifest-1.json"));
        assert_eq!((now.about.nonces, now.about.held), (Nonces::Repeated, true));
        assert_eq!(now.about.size.memory, Mebibytes(256));
        // Of an agent that wrote down whether the guest was frozen, and not what it repeats and whether all of it had stopped.
        let first = read(include_str!("samples/manifest-1-first.json"));
        assert_eq!((first.about.nonces, first.about.held), (Nonces::Unknown, false));
        let about = About {
            nonces: now.about.nonces,
            held: now.about.held,
            ..first.about
        };
        assert_eq!(Manifest { about, ..first }, now);
    }

    #[test]
    fn a_manifest_of_another_version_or_of_nobody_is_refused() {
        let attempt = Attempt::new();
        attempt.seal().expect("sealed");
        let path = attempt.generation.join(MANIFEST);
        let good = fs::read_to_string(&path).expect("read");
        let with = |content: String| {
            fs::write(&path, content).expect("written");
            Manifest::read(&attempt.generation).expect_err("refused")
        };
        assert!(matches!(
            with("{\"version\": 2, \"new\": {}}".into()),
            SnapshotError::Version(2)
        ));
        for bad in [
            good[..good.len() - 2].to_owned(),
            good.replace("rootfs_net0_balloon_serial", "two_disks"),
            good.replace("\"memory-ranges\"", "\"memory\""),
            format!("{good}{good}"),
            "{}".to_owned(),
        ] {
            assert!(matches!(with(bad.clone()), SnapshotError::Manifest(_)), "{bad}");
        }
        assert!(matches!(with(String::new()), SnapshotError::Length { .. }));
        assert!(matches!(with(" ".repeat(2 << 20)), SnapshotError::Length { .. }));
        fs::remove_file(&path).expect("removed");
        assert!(matches!(
            Manifest::read(&attempt.generation),
            Err(SnapshotError::File(_))
        ));
    }

    #[test]
    fn what_is_not_as_sealed_is_named() {
        let sealed = || {
            let attempt = Attempt::new();
            let manifest = attempt.seal().expect("sealed");
            (attempt, manifest)
        };
        let outcome = |(attempt, manifest): &(Attempt, Manifest)| manifest.verify(&attempt.generation);

        let it = sealed();
        fs::write(it.0.generation.join(CONFIG), "{}").expect("written");
        outcome(&it).expect("config.json is written at every restore");

        let it = sealed();
        fs::write(it.0.generation.join("x\n"), "").expect("written");
        let error = outcome(&it).expect_err("something else");
        assert!(
            matches!(&error, SnapshotError::Unexpected { name } if name == "x\\n"),
            "{error}"
        );

        let it = sealed();
        let state = OpenOptions::new().write(true).open(it.0.generation.join(STATE));
        state.expect("opened").write_all_at(b"[", 0).expect("written");
        assert!(matches!(outcome(&it), Err(SnapshotError::Checksum { name: STATE })));

        for name in [STATE, MEMORY] {
            let it = sealed();
            let file = OpenOptions::new()
                .write(true)
                .open(it.0.generation.join(name))
                .expect("opened");
            file.set_len(100).expect("cut short");
            let error = outcome(&it).expect_err("cut short");
            assert!(matches!(error, SnapshotError::Length { found: 100, .. }), "{error}");

            let it = sealed();
            fs::remove_file(it.0.generation.join(name)).expect("removed");
            assert!(matches!(outcome(&it), Err(SnapshotError::File(_))));
            std::os::unix::fs::symlink("/dev/zero", it.0.generation.join(name)).expect("linked");
            assert!(matches!(outcome(&it), Err(SnapshotError::NotRegular { .. })));
        }

        let mut it = sealed();
        it.1.files.state.length = Bytes(u64::MAX);
        assert!(matches!(outcome(&it), Err(SnapshotError::Length { name: STATE, .. })));
    }
}

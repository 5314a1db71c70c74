//! A kernel's modules, as `depmod` has listed them: which files a module needs, in which order they are loaded.
//!
//! ```text
//! <dir>/modules.dep       kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio.ko.xz …    the last to be loaded first
//! <dir>/modules.builtin   kernel/drivers/virtio/virtio.ko                                                what needs no file
//! ```
//!
//! Compressed modules are unpacked, by the program that can: not every guest's kernel unpacks them itself.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cpio::Archive;

/// Ends of file names, and the program that unpacks such a file from its standard input.
const COMPRESSIONS: &[(&str, &str)] = &[(".xz", "xz"), (".zst", "zstd"), (".gz", "gzip")];

/// A module by its name, in which `-` and `_` are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// It must be there, or built into the kernel.
    Needed(&'a str),
    /// It may be missing.
    Helpful(&'a str),
}

/// Why modules cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no such module.
    #[error("{} has no module {name}, and it is not built into the kernel", dir.display())]
    Missing {
        /// The module.
        name: String,
        /// The directory of the kernel's modules.
        dir: PathBuf,
    },
    /// A module is compressed, and there is nothing that unpacks it.
    #[error("cannot run {program}, which {} needs to be unpacked", path.display())]
    NoProgram {
        /// The program.
        program: &'static str,
        /// The module.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It did not unpack it.
    #[error("{program} cannot unpack {}: {said}", path.display())]
    Damaged {
        /// The program.
        program: &'static str,
        /// The module.
        path: PathBuf,
        /// What it said of it.
        said: String,
    },
    /// Not a kernel module at all.
    #[error("{} is no ELF file", path.display())]
    NoModule {
        /// The file.
        path: PathBuf,
    },
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    dir: PathBuf,
    /// Path below `dir`, and paths of what it needs, the last to be loaded first.
    rows: Vec<(String, Vec<String>)>,
    builtin: Vec<String>,
}

impl Modules {
    /// Those in a directory such as `/lib/modules/<version>`.
    ///
    /// # Errors
    /// [`ModuleError::Read`] where there is no `modules.dep`.
    pub fn read(dir: &Path) -> Result<Self, ModuleError> {
        let rows = rows(&read_text(&dir.join("modules.dep"))?);
        // Of kernels that were not installed by a package it may be missing.
        let builtin = match fs::read_to_string(dir.join("modules.builtin")) {
            Ok(text) => text.lines().map(name_of).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                let path = dir.join("modules.builtin");
                return Err(ModuleError::Read { path, source });
            }
        };
        Ok(Self {
            dir: dir.to_owned(),
            rows,
            builtin,
        })
    }

    /// Adds these modules and all they need as `/modules/*.ko`, and `/modules/order` with one file name a line in the order in which they can be
    /// loaded.
    ///
    /// # Errors
    /// Any [`ModuleError`].
    pub fn add_to(&self, archive: &mut Archive, wanted: &[Wanted<'_>]) -> Result<(), ModuleError> {
        archive.directory("modules");
        let mut order = String::new();
        for path in self.load_order(wanted)? {
            let (path, program) = COMPRESSIONS
                .iter()
                .find_map(|(end, program)| Some((path.strip_suffix(end)?, Some((*end, *program)))))
                .unwrap_or((path, None));
            let file = path.rsplit('/').next().unwrap_or(path);
            let data = match program {
                Some((end, program)) => unpack(&self.dir.join(format!("{path}{end}")), program)?,
                None => read(&self.dir.join(path))?,
            };
            if !data.starts_with(b"\x7fELF") {
                let path = self.dir.join(path);
                return Err(ModuleError::NoModule { path });
            }
            archive.file(&format!("modules/{file}"), 0o644, &data);
            order.push_str(file);
            order.push('\n');
        }
        archive.file("modules/order", 0o644, order.as_bytes());
        Ok(())
    }

    /// Paths, dependencies before what needs them, each once.
    fn load_order(&self, wanted: &[Wanted<'_>]) -> Result<Vec<&str>, ModuleError> {
        let mut order: Vec<&str> = Vec::new();
        for wanted in wanted {
            let (Wanted::Needed(name) | Wanted::Helpful(name)) = *wanted;
            let name = name.replace('-', "_");
            let Some((path, needs)) = self.rows.iter().find(|(path, _)| name_of(path) == name) else {
                if matches!(wanted, Wanted::Helpful(_)) || self.builtin.contains(&name) {
                    continue;
                }
                let dir = self.dir.clone();
                return Err(ModuleError::Missing { name, dir });
            };
            for needed in needs.iter().rev().chain([path]) {
                if !order.contains(&needed.as_str()) {
                    order.push(needed);
                }
            }
        }
        Ok(order)
    }
}

fn rows(table: &str) -> Vec<(String, Vec<String>)> {
    let lines = table.lines().filter_map(|line| line.split_once(':'));
    lines
        .map(|(path, needs)| (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
        .collect()
}

/// The name of the module in a file.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>, ModuleError> {
    fs::read(path).map_err(|source| ModuleError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_text(path: &Path) -> Result<String, ModuleError> {
    fs::read_to_string(path).map_err(|source| ModuleError::Read {
        path: path.to_owned(),
        source,
    })
}

fn unpack(path: &Path, program: &'static str) -> Result<Vec<u8>, ModuleError> {
    let file = File::open(path).map_err(|source| ModuleError::Read {
        path: path.to_owned(),
        source,
    })?;
    let output = Command::new(program).arg("-dc").stdin(Stdio::from(file)).output();
    let output = output.map_err(|source| ModuleError::NoProgram {
        program,
        path: path.to_owned(),
        source,
    })?;
    if !output.status.success() {
        return Err(ModuleError::Damaged {
            program,
            path: path.to_owned(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
        kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n\
        kernel/drivers/virtio/virtio_ring.ko:\n\
        kernel/drivers/char/hw_random/virtio-rng.ko.gz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n";

    /// A kernel's directory with the table above.
    fn kernel() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("modules.dep"), TABLE).expect("written");
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").expect("written");
        for row in rows(TABLE) {
            let path = dir.path().join(row.0);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(&path, b"\x7fELF of a module").expect("written");
        }
        let compressed = dir.path().join("kernel/drivers/char/hw_random/virtio-rng.ko");
        fs::write(&compressed, b"\x7fELF of virtio-rng").expect("written");
        let status = Command::new("gzip").arg("-f").arg(&compressed).status();
        assert!(status.expect("gzip runs").success());
        dir
    }

    #[test]
    fn modules_are_loaded_after_what_they_need_and_once() {
        let dir = kernel();
        let modules = Modules::read(dir.path()).expect("read");
        let order = modules.load_order(&[Wanted::Needed("virtio_rng"), Wanted::Needed("virtio")]);
        let order = order.expect("all there");
        let files: Vec<&str> = order
            .iter()
            .map(|path| path.rsplit('/').next().unwrap_or(path))
            .collect();
        assert_eq!(files, ["virtio_ring.ko", "virtio.ko", "virtio-rng.ko.gz"]);
    }

    #[test]
    fn what_is_built_in_or_only_helps_may_be_missing_and_nothing_else() {
        let dir = kernel();
        let modules = Modules::read(dir.path()).expect("read");
        let none = modules.load_order(&[Wanted::Needed("ext4"), Wanted::Helpful("crc32c_intel")]);
        assert_eq!(none.expect("nothing is needed"), [""; 0]);
        let error = modules
            .load_order(&[Wanted::Needed("virtio_net")])
            .expect_err("refused");
        assert!(error.to_string().contains("virtio_net"), "{error}");
        assert!(Modules::read(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_compressed_module_is_in_the_archive_as_it_was_before() {
        let dir = kernel();
        let modules = Modules::read(dir.path()).expect("read");
        let mut archive = Archive::default();
        modules
            .add_to(&mut archive, &[Wanted::Needed("virtio-rng")])
            .expect("added");
        let bytes = archive.finish();
        let contains = |what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
        assert!(contains(b"modules/virtio-rng.ko\0"));
        assert!(contains(b"\x7fELF of virtio-rng"));
        assert!(contains(b"virtio_ring.ko\nvirtio.ko\nvirtio-rng.ko\n"));
    }

    #[test]
    fn a_module_that_is_damaged_or_none_is_refused() {
        let dir = kernel();
        let modules = Modules::read(dir.path()).expect("read");
        let wanted = [Wanted::Needed("virtio-rng")];
        fs::write(dir.path().join("kernel/drivers/virtio/virtio.ko"), "text").expect("written");
        let refused = modules.add_to(&mut Archive::default(), &wanted).expect_err("refused");
        assert!(matches!(refused, ModuleError::NoModule { .. }), "{refused}");
        fs::write(dir.path().join("kernel/drivers/virtio/virtio.ko"), b"\x7fELF").expect("written");
        fs::write(
            dir.path().join("kernel/drivers/char/hw_random/virtio-rng.ko.gz"),
            "text",
        )
        .expect("written");
        let refused = modules.add_to(&mut Archive::default(), &wanted).expect_err("refused");
        assert!(matches!(refused, ModuleError::Damaged { .. }), "{refused}");
    }
}

//! The numbered directories below a sandbox's `vm`: attempts and generations, told apart by the record, which names the one that
//! counts.

use std::fs;
use std::io;
use std::path::Path;

use crate::errors::FileError;

/// The numbers of the directories in `vm_dir`, ascending. Links to directories are none.
///
/// # Errors
/// [`FileError`] naming what could not be read.
pub fn generations(vm_dir: &Path) -> Result<Vec<u32>, FileError> {
    let mut found = Vec::new();
    for (number, entry) in numbered(vm_dir)? {
        let kind = entry
            .file_type()
            .map_err(|error| FileError::new("inspecting", &entry.path(), error))?;
        if kind.is_dir() {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// A number that is higher than that of anything in `vm_dir`.
///
/// # Errors
/// [`FileError`] when it cannot be read, or when there is no higher number.
pub fn next_number(vm_dir: &Path) -> Result<u32, FileError> {
    let highest = numbered(vm_dir)?.into_iter().map(|(number, _)| number).max();
    highest
        .map_or(Some(1), |number| number.checked_add(1))
        .ok_or_else(|| FileError::new("numbering a directory in", vm_dir, io::ErrorKind::StorageFull.into()))
}

/// What has a number for a name, written as we write numbers.
fn numbered(vm_dir: &Path) -> Result<Vec<(u32, fs::DirEntry)>, FileError> {
    let listing = |error| FileError::new("listing", vm_dir, error);
    let mut found = Vec::new();
    for entry in fs::read_dir(vm_dir).map_err(listing)? {
        let entry = entry.map_err(listing)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| Some((name, name.parse::<u32>().ok()?)));
        if let Some((name, number)) = number
            && number.to_string() == name
        {
            found.push((number, entry));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbered_directories_are_generations() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(generations(dir.path()).expect("read"), [0; 0]);
        assert_eq!(next_number(dir.path()).expect("numbered"), 1);
        for name in ["10", "9", "0", "+7", "007", "-1", "4294967296", "x", ".5"] {
            fs::create_dir(dir.path().join(name)).expect("made");
        }
        fs::write(dir.path().join("12"), "").expect("written");
        std::os::unix::fs::symlink("10", dir.path().join("11")).expect("linked");
        assert_eq!(generations(dir.path()).expect("read"), [0, 9, 10]);
        assert_eq!(next_number(dir.path()).expect("numbered"), 13, "no name that is taken");
        fs::create_dir(dir.path().join(u32::MAX.to_string())).expect("made");
        assert!(next_number(dir.path()).is_err());
        assert!(generations(&dir.path().join("gone")).is_err());
    }
}

//! Archives of any bytes, for the fuzzers: what holds of whatever is taken.

use std::fs;
use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tar::Header;

use super::archive::Archive;
use super::build::BuildError;
use super::ext4::Need;
use super::oci::Store;
use super::tree::{Kind, Meaning, Tree};

/// Content and unpacked bytes that one of them may have.
const MOST: u64 = 1 << 20;

/// A directory that goes with this value.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("roost-judge-{}-{number}", std::process::id()));
        fs::create_dir(&dir).expect("a directory of our own");
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Every header with a checksum that is right: a change would be found by that alone, and nothing behind it be tried.
fn with_checksums(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
    }
    bytes
}

/// Reads an archive as a layer, twice as two layers. Whether it is one.
pub(crate) fn judge_archive(bytes: &[u8]) -> bool {
    let (dir, bytes) = (Dir::new(), with_checksums(bytes));
    let mut tree = Tree::new(&dir.0, MOST);
    let stop = AtomicBool::new(false);
    let added = (0..2).all(|_| {
        tree.add(&mut Archive::new(bytes.as_slice()), Meaning::Layer, &stop)
            .is_ok()
    });
    check(&tree, &dir.0);
    added
}

/// Reads an archive as an image. Whether it is one.
pub(crate) fn judge_image(bytes: &[u8]) -> bool {
    // A layer within it is what its own sum says, so it is left as it is where that is enough.
    is_image(bytes) || is_image(&with_checksums(bytes))
}

fn is_image(bytes: &[u8]) -> bool {
    let dir = Dir::new();
    let path = dir.0.join("image");
    let mut file = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .expect("made");
    file.write_all(bytes).expect("written");
    file.rewind().expect("rewound");
    let spool = dir.0.join("spool");
    fs::create_dir(&spool).expect("made");
    let mut tree = Tree::new(&spool, MOST);
    let read = || -> Result<(), BuildError> {
        let store = Store::index(file)?;
        let mut budget = MOST;
        for layer in store.layers(None)? {
            layer.read(&mut budget, |archive| {
                let added = tree.add(archive, Meaning::Layer, &AtomicBool::new(false));
                added.map_err(BuildError::from)
            })?;
        }
        Ok(())
    };
    let is_image = read().is_ok();
    check(&tree, &spool);
    is_image
}

/// What holds of every tree: names are single ones, each file has as many as it knows of, and what is kept of contents is what is in it.
fn check(tree: &Tree, spool: &Path) {
    let (mut contents, mut names) = (0, 1);
    for node in tree.nodes() {
        match &node.kind {
            Kind::Directory(directory) => {
                names += directory.len();
                for name in directory.keys() {
                    let is_single =
                        !name.is_empty() && name.len() <= 255 && !name.iter().any(|byte| b"/\0\n\r".contains(byte));
                    assert!(
                        is_single && !matches!(name.as_slice(), b"." | b".."),
                        "{}",
                        name.escape_ascii()
                    );
                }
            }
            Kind::File(content) => contents += usize::from(content.number.is_some()),
            Kind::Symlink(_) | Kind::Fifo | Kind::Char(..) | Kind::Block(..) => {}
        }
    }
    let known: usize = tree.nodes().map(|node| node.names as usize).sum();
    assert_eq!(known, names);
    let kept = fs::read_dir(spool).expect("ours").count();
    // What a refused entry has left goes with the rest.
    assert!(
        (contents..=contents + 1).contains(&kept),
        "{kept} files for {contents} contents"
    );
    let _: Need = Need::of(tree);
}

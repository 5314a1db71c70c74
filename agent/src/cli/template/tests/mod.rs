//! Images that are made here, and then read as anybody's.

mod archive;
mod image;
mod oci;
mod tree;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use ring::digest::{SHA256, digest};
use tar::{EntryType, Header};

use super::archive::Archive;
use super::tree::{Kind, Meaning, Node, Tree, TreeError};

/// More than any of these needs.
const MOST: u64 = 64 << 20;

/// An archive in the making.
#[derive(Default, Clone)]
struct Tar(Vec<u8>);

impl Tar {
    /// An entry with a header of its own, whatever that says.
    fn raw(mut self, path: &[u8], kind: EntryType, content: &[u8], change: impl FnOnce(&mut Header)) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len().min(100)].copy_from_slice(&path[..path.len().min(100)]);
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, content: &str) -> Self {
        self.raw(path.as_bytes(), EntryType::Regular, content.as_bytes(), |_| {})
    }

    fn dir(self, path: &str) -> Self {
        self.raw(path.as_bytes(), EntryType::Directory, b"", |_| {})
    }

    fn link(self, kind: EntryType, path: &str, to: &str) -> Self {
        self.raw(path.as_bytes(), kind, b"", |header| {
            header.as_old_mut().linkname[..to.len()].copy_from_slice(to.as_bytes());
        })
    }

    fn symlink(self, path: &str, to: &str) -> Self {
        self.link(EntryType::Symlink, path, to)
    }

    fn hard(self, path: &str, to: &str) -> Self {
        self.link(EntryType::Link, path, to)
    }

    /// pax records for the entry that comes next.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let content: Vec<u8> = records
            .iter()
            .flat_map(|(keyword, value)| record(keyword, value))
            .collect();
        self.raw(b"pax", EntryType::XHeader, &content, |_| {})
    }

    /// The archive, ended.
    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// A record of pax: its length is its own length's too.
fn record(keyword: &str, value: &[u8]) -> Vec<u8> {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {keyword}=").as_bytes(), value, b"\n"].concat()
}

fn sha256(content: &[u8]) -> String {
    let sum = digest(&SHA256, content);
    sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Adds an archive to a tree.
fn add(tree: &mut Tree, archive: &[u8], meaning: Meaning) -> Result<(), TreeError> {
    tree.add(&mut Archive::new(archive), meaning, &AtomicBool::new(false))
}

/// The tree of layers, lowest first.
fn layered(spool: &Path, layers: &[Vec<u8>]) -> Result<Tree, TreeError> {
    let mut tree = Tree::new(spool, MOST);
    for layer in layers {
        add(&mut tree, layer, Meaning::Layer)?;
    }
    Ok(tree)
}

/// All files of a tree: by path, what is in them, where they lead to, or what they are.
fn listing(tree: &Tree) -> BTreeMap<String, String> {
    fn below(tree: &Tree, node: &Node, path: &str, into: &mut BTreeMap<String, String>) {
        let Kind::Directory(names) = &node.kind else { return };
        for (name, to) in names {
            let (path, node) = (format!("{path}/{}", name.escape_ascii()), tree.node(to.node));
            into.insert(path.clone(), described(tree, node));
            below(tree, node, &path, into);
        }
    }
    let mut into = BTreeMap::new();
    below(tree, tree.root(), "", &mut into);
    into
}

fn described(tree: &Tree, node: &Node) -> String {
    match &node.kind {
        Kind::Directory(_) => "directory".into(),
        Kind::Symlink(target) => format!("-> {}", target.escape_ascii()),
        Kind::Fifo => "fifo".into(),
        Kind::Char(major, minor) => format!("c {major},{minor}"),
        Kind::Block(major, minor) => format!("b {major},{minor}"),
        Kind::File(content) => {
            let mut text = String::new();
            if let Some(number) = content.number {
                let mut file = std::fs::File::open(tree.content(number)).expect("kept");
                file.read_to_string(&mut text).expect("UTF-8");
            }
            text
        }
    }
}

/// An error with its sources, as people see it.
fn said(error: &(dyn std::error::Error + 'static)) -> String {
    crate::errors::Chain(error).to_string()
}

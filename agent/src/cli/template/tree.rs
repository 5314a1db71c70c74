//! The files of an image, merged from layers: names and attributes in memory, contents in a directory of our own.
//!
//! ```text
//! entries of layer after layer --> [`Tree`]: names, kinds, owners, modes, times, attributes, links
//!                         \--> spool/<number>: content of a file; spool/x<number>: value of an extended attribute
//! ```
//!
//! Holds: no name of an image is ever a name here, so none can lead anywhere: files of the spool are numbered, and paths, symbolic links
//! on their way included, are resolved in the tree alone, where `..` ends at its root. What a later layer replaces or hides is removed from
//! the spool. Everything that an image says of itself is bounded (the constants below).

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::archive::{Archive, ArchiveError, Entry, EntryKind, Time, shown};
use super::spool::{Content, Spool};

/// Longest name of a file and longest path, in bytes, and levels of directories.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;
const MAX_DEPTH: usize = 256;
/// Most files of all kinds.
const MAX_NODES: usize = 1_000_000;
/// Most symbolic links on the way to one file: the kernel's.
const MAX_LINKS: usize = 40;
/// Most bytes of extended attributes of one file, names and 16 bytes for each included: what an ext4 block of them holds.
const MAX_XATTRS: usize = 4000;
/// Largest numbers of a device: the kernel's, and debugfs's. Most names of one file: ext4's.
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xffff;
const MAX_NAMES: u32 = 65_000;
/// What a name in a layer begins with that hides what is below; and the one that hides all of a directory.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const RESERVED: &[u8] = b".wh..wh.";

/// Why there is no tree.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    /// The archive.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// An entry that cannot be in an image.
    #[error("{path}: {fault}")]
    Entry {
        /// Its path, escaped.
        path: String,
        /// What is wrong.
        fault: Fault,
    },
    /// Content that could not be read.
    #[error("{path}: its content cannot be read")]
    Content {
        /// Of which entry.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Content that could not be kept.
    #[error("{} cannot be written", path.display())]
    Spool {
        /// A file of the spool.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More content than the image may have.
    #[error("the image has more than {} MiB of content; --size-mb says how large it may be", .0 >> 20)]
    TooLarge(u64),
    /// Somebody has had enough.
    #[error("stopped")]
    Stopped,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("its path has `..` in it, which could lead out of the image")]
    Parent,
    #[error("its name is longer than {MAX_NAME} bytes, or its path than {MAX_PATH}")]
    Long,
    #[error("it is more than {MAX_DEPTH} directories deep")]
    Deep,
    #[error("its name or target has a NUL, a line feed or a carriage return in it")]
    Character,
    #[error("the root of an image is a directory, and nothing else")]
    Root,
    #[error("a part of its path is there already and is no directory")]
    NoDirectory,
    #[error("more than {MAX_LINKS} symbolic links are on its path")]
    Loop,
    #[error("it is a hard link to something that is not there, or is a directory")]
    HardLink,
    #[error("it is one of more than {MAX_NAMES} names of one file")]
    Names,
    #[error("a symbolic link leads to a path of 1 to {MAX_PATH} bytes")]
    Target,
    #[error("a device has a major number of at most {MAX_MAJOR} and a minor one of at most {MAX_MINOR}")]
    Device,
    #[error("its extended attributes take more than the {MAX_XATTRS} bytes that ext4 has for them")]
    Xattrs,
    #[error("a whiteout names what it hides")]
    Whiteout,
    #[error("the image has more than {MAX_NODES} files")]
    Many,
}

impl Fault {
    fn of(self, path: &[u8]) -> TreeError {
        TreeError::Entry {
            path: shown(path),
            fault: self,
        }
    }
}

/// What a file has besides content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Time,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Attributes {
    /// Of what nobody has described: root's, open to all who look.
    pub(super) fn usual(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            modified: Time::default(),
            xattrs: BTreeMap::new(),
        }
    }
}

/// Place of a file among all.
pub(super) type NodeId = usize;

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name {
    pub(super) node: NodeId,
    /// The last layer that has said something of it.
    layer: u32,
}

/// What a file is.
#[derive(Debug)]
pub(super) enum Kind {
    Directory(BTreeMap<Vec<u8>, Name>),
    File(Content),
    Symlink(Vec<u8>),
    Fifo,
    Char(u32, u32),
    Block(u32, u32),
}

/// A file of any kind.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) attributes: Attributes,
    /// Names that it has.
    pub(super) names: u32,
}

/// How the names of an archive are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// As they stand.
    Plain,
    /// As a layer's, in which whiteouts hide what is below.
    Layer,
}

/// What was left out of an image, for its maker to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct LeftOut {
    /// Access control lists in text.
    pub(super) acls: u64,
    /// Extended attributes of namespaces that Linux does not have.
    pub(super) xattrs: u64,
    /// Sockets.
    pub(super) sockets: u64,
}

/// The files of an image.
#[derive(Debug)]
pub(super) struct Tree {
    /// The first is the root. Those that have gone stay as empty files without names.
    nodes: Vec<Node>,
    layer: u32,
    spool: Spool,
    pub(super) left_out: LeftOut,
}

const ROOT: NodeId = 0;

impl Tree {
    /// A tree of nothing but a root. Content goes into `spool`, an empty directory of ours, and is at most `most` bytes.
    pub(super) fn new(spool: &Path, most: u64) -> Self {
        let root = Node {
            kind: Kind::Directory(BTreeMap::new()),
            attributes: Attributes::usual(0o755),
            names: 1,
        };
        Self {
            nodes: vec![root],
            layer: 0,
            spool: Spool::new(spool, most),
            left_out: LeftOut::default(),
        }
    }

    /// All of an archive, as the next layer. `stop` ends it between two pieces.
    pub(super) fn add<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        meaning: Meaning,
        stop: &AtomicBool,
    ) -> Result<(), TreeError> {
        self.layer += 1;
        while let Some(entry) = archive.next()? {
            self.put(entry, archive, meaning, stop)?;
        }
        Ok(())
    }

    /// One file, whatever was in its place; what its content says is read from `content`.
    pub(super) fn put(
        &mut self,
        mut entry: Entry,
        content: &mut impl Read,
        meaning: Meaning,
        stop: &AtomicBool,
    ) -> Result<(), TreeError> {
        if stop.load(Ordering::Relaxed) {
            return Err(TreeError::Stopped);
        }
        let path = std::mem::take(&mut entry.path);
        let fault = |fault: Fault| fault.of(&path);
        let parts = parts(&path).map_err(fault)?;
        let attributes = self.attributes(&entry).map_err(fault)?;
        let Some((name, above)) = parts.split_last() else {
            if entry.kind != EntryKind::Directory {
                return Err(fault(Fault::Root));
            }
            self.nodes[ROOT].attributes = attributes;
            return Ok(());
        };
        if meaning == Meaning::Layer && name.starts_with(WHITEOUT) {
            return self.hide(above, name).map_err(fault);
        }
        if self.nodes.len() > MAX_NODES {
            return Err(fault(Fault::Many));
        }
        let kind = match entry.kind {
            EntryKind::HardLink => {
                let linked = self.linked(&entry.link).map_err(fault)?;
                // Itself under its own name again.
                let directory = self.directory(above).map_err(fault)?;
                if self.child(directory, name).is_some_and(|there| there.node == linked) {
                    return Ok(());
                }
                if self.nodes[linked].names >= MAX_NAMES {
                    return Err(fault(Fault::Names));
                }
                self.nodes[linked].names += 1;
                self.name(directory, name, linked);
                return Ok(());
            }
            EntryKind::Directory => {
                let directory = self.directory(above).map_err(fault)?;
                if let Some(there) = self.child(directory, name)
                    && matches!(self.nodes[there.node].kind, Kind::Directory(_))
                {
                    self.nodes[there.node].attributes = attributes;
                    let layer = self.layer;
                    self.names_mut(directory).insert(
                        name.to_vec(),
                        Name {
                            node: there.node,
                            layer,
                        },
                    );
                    return Ok(());
                }
                Kind::Directory(BTreeMap::new())
            }
            EntryKind::File => Kind::File(self.spool.keep(&path, entry.size, content, stop)?),
            EntryKind::Symlink => Kind::Symlink(target(&entry.link).map_err(fault)?),
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Char | EntryKind::Block => {
                let (major, minor) = entry.device;
                if major > MAX_MAJOR || minor > MAX_MINOR {
                    return Err(fault(Fault::Device));
                }
                match entry.kind {
                    EntryKind::Char => Kind::Char(major, minor),
                    _ => Kind::Block(major, minor),
                }
            }
        };
        let directory = self.directory(above).map_err(fault)?;
        let node = self.nodes.len();
        self.nodes.push(Node {
            kind,
            attributes,
            names: 1,
        });
        self.name(directory, name, node);
        Ok(())
    }

    /// Attributes of an entry, without what Linux has no place for.
    fn attributes(&mut self, entry: &Entry) -> Result<Attributes, Fault> {
        self.left_out.acls += u64::from(entry.has_acl);
        let is_known = |name: &[u8]| {
            ["user.", "trusted.", "security."]
                .iter()
                .any(|space| name.len() > space.len() && name.starts_with(space.as_bytes()))
                || [&b"system.posix_acl_access"[..], b"system.posix_acl_default"].contains(&name)
        };
        let mut xattrs = entry.xattrs.clone();
        xattrs.retain(|name, _| is_known(name));
        self.left_out.xattrs += (entry.xattrs.len() - xattrs.len()) as u64;
        if xattrs.keys().any(|name| name.len() > MAX_NAME || !is_writable(name)) {
            return Err(Fault::Character);
        }
        let size: usize = xattrs.iter().map(|(name, value)| name.len() + value.len() + 16).sum();
        if size > MAX_XATTRS {
            return Err(Fault::Xattrs);
        }
        Ok(Attributes {
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            modified: entry.modified,
            xattrs,
        })
    }

    /// Hides what layers below have of a name, or of all of a directory.
    fn hide(&mut self, above: &[&[u8]], name: &[u8]) -> Result<(), Fault> {
        let hidden = &name[WHITEOUT.len()..];
        if name != OPAQUE && name.starts_with(RESERVED) {
            // Other names of the kind are a union filesystem's own notes.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Fault::Whiteout);
        }
        // Where there is no such directory there is nothing to hide.
        let Some(directory) = self.find(above, Links::Followed)? else {
            return Ok(());
        };
        let Kind::Directory(names) = &self.nodes[directory].kind else {
            return Ok(());
        };
        if name == OPAQUE {
            let all: Vec<Vec<u8>> = names.keys().cloned().collect();
            for name in all {
                self.prune(directory, &name);
            }
        } else {
            self.prune(directory, hidden);
        }
        Ok(())
    }

    /// Removes what layers below have of a name; what this layer has put there, and the directories on its way, stay.
    fn prune(&mut self, directory: NodeId, name: &[u8]) {
        let Some(there) = self.child(directory, name) else {
            return;
        };
        let mut is_kept = there.layer == self.layer;
        if let Kind::Directory(names) = &self.nodes[there.node].kind {
            let below: Vec<Vec<u8>> = names.keys().cloned().collect();
            for name in below {
                self.prune(there.node, &name);
            }
            is_kept |= matches!(&self.nodes[there.node].kind, Kind::Directory(names) if !names.is_empty());
        }
        if !is_kept {
            self.names_mut(directory).remove(name);
            self.drop_name(there.node);
        }
    }

    /// Gives a file a name, in place of whatever had it.
    fn name(&mut self, directory: NodeId, name: &[u8], node: NodeId) {
        let layer = self.layer;
        let before = self.names_mut(directory).insert(name.to_vec(), Name { node, layer });
        if let Some(before) = before {
            self.drop_name(before.node);
        }
    }

    /// Takes a name from a file; the last one takes its content with it.
    fn drop_name(&mut self, node: NodeId) {
        self.nodes[node].names -= 1;
        if self.nodes[node].names > 0 {
            return;
        }
        let gone = std::mem::replace(&mut self.nodes[node].kind, Kind::File(Content::EMPTY));
        match gone {
            Kind::Directory(names) => names.into_values().for_each(|name| self.drop_name(name.node)),
            Kind::File(content) => self.spool.forget(content),
            Kind::Symlink(_) | Kind::Fifo | Kind::Char(..) | Kind::Block(..) => {}
        }
    }

    /// What a hard link leads to.
    fn linked(&self, link: &[u8]) -> Result<NodeId, Fault> {
        let parts = parts(link)?;
        let (name, above) = parts.split_last().ok_or(Fault::HardLink)?;
        let directory = self.find(above, Links::Followed)?.ok_or(Fault::HardLink)?;
        let there = self.child(directory, name).ok_or(Fault::HardLink)?;
        match self.nodes[there.node].kind {
            Kind::Directory(_) => Err(Fault::HardLink),
            _ => Ok(there.node),
        }
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<Name> {
        match &self.nodes[directory].kind {
            Kind::Directory(names) => names.get(name).copied(),
            _ => None,
        }
    }

    fn names_mut(&mut self, directory: NodeId) -> &mut BTreeMap<Vec<u8>, Name> {
        match &mut self.nodes[directory].kind {
            Kind::Directory(names) => names,
            _ => unreachable!("only directories are given names"),
        }
    }

    /// The directory of a path, made where it is missing.
    fn directory(&mut self, path: &[&[u8]]) -> Result<NodeId, Fault> {
        loop {
            match self.walk(path, Links::Followed)? {
                Step::There(node) => {
                    return match self.nodes[node].kind {
                        Kind::Directory(_) => Ok(node),
                        _ => Err(Fault::NoDirectory),
                    };
                }
                Step::Missing(directory, name) => {
                    if self.nodes.len() > MAX_NODES {
                        return Err(Fault::Many);
                    }
                    let node = self.nodes.len();
                    self.nodes.push(Node {
                        kind: Kind::Directory(BTreeMap::new()),
                        attributes: Attributes::usual(0o755),
                        names: 1,
                    });
                    self.name(directory, &name, node);
                }
            }
        }
    }

    /// What is at a path, if anything.
    fn find(&self, path: &[&[u8]], links: Links) -> Result<Option<NodeId>, Fault> {
        match self.walk(path, links)? {
            Step::There(node) => Ok(Some(node)),
            Step::Missing(..) => Ok(None),
        }
    }

    /// Goes along a path as the kernel would below a root of its own: over symbolic links, and no further up than the root.
    fn walk(&self, path: &[&[u8]], links: Links) -> Result<Step, Fault> {
        let mut way = vec![ROOT];
        let mut ahead: VecDeque<Vec<u8>> = path.iter().map(|part| part.to_vec()).collect();
        let mut followed = 0;
        while let Some(part) = ahead.pop_front() {
            if part == b".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let here = *way.last().expect("the root stays");
            if !matches!(self.nodes[here].kind, Kind::Directory(_)) {
                return Err(Fault::NoDirectory);
            }
            let Some(there) = self.child(here, &part) else {
                // By way of links a path may be deeper than it looks.
                return if way.len() > MAX_DEPTH {
                    Err(Fault::Deep)
                } else {
                    Ok(Step::Missing(here, part))
                };
            };
            match &self.nodes[there.node].kind {
                Kind::Symlink(target) if links == Links::Followed || !ahead.is_empty() => {
                    followed += 1;
                    if followed > MAX_LINKS {
                        return Err(Fault::Loop);
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    let parts = target.split(|byte| *byte == b'/');
                    let parts = parts.filter(|part| !matches!(*part, b"" | b"."));
                    for part in parts.rev() {
                        ahead.push_front(part.to_vec());
                    }
                }
                _ => way.push(there.node),
            }
        }
        Ok(Step::There(*way.last().expect("the root stays")))
    }

    /// What is at a path, without following a link at its end.
    #[cfg(test)]
    pub(super) fn at(&self, path: &str) -> Option<&Node> {
        let parts = parts(path.as_bytes()).expect("a path");
        let found = self.find(&parts, Links::NotTheLast).expect("resolved");
        found.map(|node| &self.nodes[node])
    }

    pub(super) fn is_empty(&self) -> bool {
        matches!(&self.nodes[ROOT].kind, Kind::Directory(names) if names.is_empty())
    }

    pub(super) fn root(&self) -> &Node {
        &self.nodes[ROOT]
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    /// All that have a name.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.names > 0)
    }

    /// Where the content of a file is.
    pub(super) fn content(&self, number: u64) -> PathBuf {
        self.spool.path(number)
    }
}

/// Whether a symbolic link at the end of a path is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    Followed,
    #[cfg(test)]
    NotTheLast,
}

/// Where a path leads.
enum Step {
    There(NodeId),
    /// To this name, which the directory does not have.
    Missing(NodeId, Vec<u8>),
}

/// Whether a text can be written in a line.
pub(super) fn is_writable(text: &[u8]) -> bool {
    !text.iter().any(|byte| matches!(byte, 0 | b'\n' | b'\r'))
}

/// The names that a path of an archive is made of. A slash before it counts for nothing, as with tar.
fn parts(path: &[u8]) -> Result<Vec<&[u8]>, Fault> {
    if path.len() > MAX_PATH {
        return Err(Fault::Long);
    }
    if !is_writable(path) {
        return Err(Fault::Character);
    }
    let parts = path.split(|byte| *byte == b'/');
    let parts: Vec<&[u8]> = parts.filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&&b".."[..]) {
        return Err(Fault::Parent);
    }
    if parts.iter().any(|part| part.len() > MAX_NAME) {
        return Err(Fault::Long);
    }
    if parts.len() > MAX_DEPTH {
        return Err(Fault::Deep);
    }
    Ok(parts)
}

fn target(link: &[u8]) -> Result<Vec<u8>, Fault> {
    if link.is_empty() || link.len() > MAX_PATH {
        return Err(Fault::Target);
    }
    if !is_writable(link) {
        return Err(Fault::Character);
    }
    Ok(link.to_vec())
}

//! An ext4 image of a tree, as any user and without mounting anything: `mke2fs` makes an empty filesystem, one `debugfs` fills it by a list
//! of commands, `e2fsck` looks it through.
//!
//! `mke2fs -d` would copy a directory, whose files would have the owners and attributes that this user may give them, under the names of
//! the image. debugfs takes each content from a file of the spool, and everything else from its commands: twenty thousand files in three
//! seconds. Its messages are the only sign of what failed, so any message is a failure, and the result is checked as a whole.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::archive::{Time, shown};
use super::tree::{Attributes, Kind, NodeId, Tree, is_writable};

/// Bytes of a block, and of an inode.
const BLOCK: u64 = 4096;
const INODE: u64 = 256;
/// The journal does not grow with the filesystem, so it has a size that suits larger disks.
const JOURNAL_MIB: u64 = 16;
/// Free space in a template; a sandbox's disk is usually larger, and envd grows the filesystem.
const SLACK_MIB: u64 = 64;
/// Inodes beside those of the image: at least so many, and a quarter more than it has. A filesystem that grows gets more.
const SPARE_INODES: u64 = 8192;
/// Longest line that debugfs reads.
const MAX_LINE: usize = 8000;
/// Longest target that is kept in the inode of a symbolic link.
const SHORT_TARGET: usize = 59;
/// Bytes of a directory's block that names fill at least before the next one does not fit: all but its checksum and the longest name.
const USABLE: usize = 3800;
/// The directory that mke2fs makes.
const LOST_AND_FOUND: &[u8] = b"lost+found";
/// How much is read of what a tool says.
const MAX_SAID: u64 = 16 << 10;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ext4Error {
    /// A program that is not there.
    #[error("{0} is not installed; it is part of Debian's e2fsprogs")]
    NoTool(&'static str),
    /// A program that could not be run.
    #[error("cannot run {tool}")]
    Run {
        /// Which one.
        tool: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program that failed.
    #[error("{tool} failed: {said}")]
    Tool {
        /// Which one.
        tool: &'static str,
        /// Its first words.
        said: String,
    },
    /// A size that is too small.
    #[error("the image needs {needed} MiB at least, and --size-mb is {given}")]
    TooSmall {
        /// What it needs, without any free space.
        needed: u64,
        /// What it was to have.
        given: u64,
    },
    /// A name that debugfs cannot be told.
    #[error("{0}: its path is too long to be a hard link")]
    Long(String),
    /// A file of the spool, or the image.
    #[error("{} cannot be written", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a filesystem of a tree takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    inodes: u64,
    /// MiB without free space.
    least: u64,
}

impl Need {
    pub(super) fn of(tree: &Tree) -> Self {
        let (mut nodes, mut blocks) = (0, 0);
        for node in tree.nodes() {
            nodes += 1;
            blocks += match &node.kind {
                // Beside the content the blocks that say where it is, where it is in many parts.
                Kind::File(content) => content.data / BLOCK + content.data / (64 << 20),
                // A third of a directory's blocks may stay empty, where names are long.
                Kind::Directory(names) => {
                    let bytes: u64 = names.keys().map(|name| 8 + name.len().next_multiple_of(4) as u64).sum();
                    1 + bytes * 3 / 2 / BLOCK
                }
                Kind::Symlink(target) => u64::from(target.len() > SHORT_TARGET),
                Kind::Fifo | Kind::Char(..) | Kind::Block(..) => 0,
            };
            blocks += u64::from(!node.attributes.xattrs.is_empty());
        }
        let inodes = nodes + SPARE_INODES.max(nodes / 4);
        let bytes = blocks * BLOCK + inodes * INODE;
        // Bitmaps, copies of the superblock, and what is kept for the descriptors of a larger filesystem.
        let tables = bytes / 50 + (6 << 20);
        Self {
            inodes,
            least: (bytes + tables).div_ceil(1 << 20) + JOURNAL_MIB,
        }
    }

    /// MiB of an image with some free space, or of the size that is asked for.
    pub(super) fn size(&self, wanted: Option<u64>) -> Result<u64, Ext4Error> {
        match wanted {
            None => Ok(self.least + SLACK_MIB),
            Some(given) if given < self.least => Err(Ext4Error::TooSmall {
                needed: self.least,
                given,
            }),
            Some(given) => Ok(given),
        }
    }
}

/// Makes an image of `size` MiB at `image`, which must not be there. `work` is a directory for what is needed on the way.
pub(super) fn make(tree: &Tree, need: Need, size: u64, image: &Path, work: &Path) -> Result<(), Ext4Error> {
    let root = &tree.root().attributes;
    let mut mke2fs = tool("mke2fs")?;
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-L", "rootfs", "-m", "0"])
        .args(["-b", "4096", "-I", "256", "-N", &need.inodes.to_string()])
        .args(["-J", &format!("size={JOURNAL_MIB}")])
        // Lazy initialisation would have every guest write into its copy-on-write disk for nothing.
        .arg("-E")
        .arg(format!(
            "lazy_itable_init=0,lazy_journal_init=0,root_owner={}:{}",
            root.uid, root.gid
        ))
        .arg(image)
        .arg(format!("{size}M"));
    run("mke2fs", mke2fs, work, Said::Errors)?;
    let commands = work.join("commands");
    let failed = |source| Ext4Error::File {
        path: commands.clone(),
        source,
    };
    let file = File::create_new(&commands).map_err(failed)?;
    let mut script = Script {
        tree,
        work,
        out: BufWriter::new(file),
        names: Vec::new(),
        linked: HashMap::new(),
        xattrs: 0,
    };
    script.all()?;
    script.out.flush().map_err(failed)?;
    let mut debugfs = tool("debugfs")?;
    debugfs.args(["-w", "-f"]).arg(&commands).arg(image);
    run("debugfs", debugfs, work, Said::Anything)?;
    let mut e2fsck = tool("e2fsck")?;
    e2fsck.args(["-f", "-n"]).arg(image);
    run("e2fsck", e2fsck, work, Said::Errors)
}

/// A program of e2fsprogs: ordinary users do not have its directory on their path.
fn tool(name: &'static str) -> Result<Command, Ext4Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = places.map(|place| place.join(name)).find(|program| program.is_file());
    let mut command = Command::new(found.ok_or(Ext4Error::NoTool(name))?);
    command.env("LC_ALL", "C");
    Ok(command)
}

/// What makes a program's run a failure besides its status.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    Errors,
    /// Any message but the first line, which is its version.
    Anything,
}

fn run(tool: &'static str, mut command: Command, work: &Path, said: Said) -> Result<(), Ext4Error> {
    let messages = work.join("messages");
    let failed = |source| Ext4Error::Run { tool, source };
    let file = File::create(&messages).map_err(failed)?;
    let out = if said == Said::Anything {
        // An echo of each command.
        Stdio::null()
    } else {
        file.try_clone().map_err(failed)?.into()
    };
    let status = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(file)
        .status()
        .map_err(failed)?;
    let mut text = Vec::new();
    let opened = File::open(&messages).and_then(|file| file.take(MAX_SAID).read_to_end(&mut text));
    opened.map_err(failed)?;
    let text = String::from_utf8_lossy(&text).replace(|c: char| c.is_control() && c != '\n', "?");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut lines = lines
        .filter(|line| !line.starts_with("debugfs 1.") && !line.starts_with("e2fsck 1."))
        .filter(|line| !line.starts_with("Pass "));
    let first = lines.next();
    if status.success() && (said == Said::Errors || first.is_none()) {
        return Ok(());
    }
    Err(Ext4Error::Tool {
        tool,
        said: match first {
            Some(first) => [first].into_iter().chain(lines.take(3)).collect::<Vec<_>>().join("; "),
            None => status.to_string(),
        },
    })
}

/// A word of a command: in quotes, of which those in it are doubled (`lib/ss/parse.c` of e2fsprogs).
struct Word<'a>(&'a [u8]);

impl Word<'_> {
    fn bytes(&self) -> Vec<u8> {
        let mut quoted = vec![b'"'];
        for byte in self.0 {
            if *byte == b'"' {
                quoted.push(b'"');
            }
            quoted.push(*byte);
        }
        quoted.push(b'"');
        quoted
    }
}

/// The commands that make all files of a tree, directory by directory.
struct Script<'a> {
    tree: &'a Tree,
    work: &'a Path,
    out: BufWriter<File>,
    /// The names on the way to where we are.
    names: Vec<Vec<u8>>,
    /// The first path of each file that has several.
    linked: HashMap<NodeId, Vec<u8>>,
    /// Values of extended attributes that have been written.
    xattrs: u64,
}

impl Script<'_> {
    fn all(&mut self) -> Result<(), Ext4Error> {
        let root = self.tree.root();
        if let Kind::Directory(names) = &root.kind
            && let Some(name) = names.get(LOST_AND_FOUND)
            && !matches!(self.tree.node(name.node).kind, Kind::Directory(_))
        {
            self.line(format_args!("rmdir"), &[LOST_AND_FOUND])?;
        }
        self.directory(&root.kind)?;
        self.attributes(b"/", &root.attributes, 0o040_000, 1)
    }

    fn directory(&mut self, kind: &Kind) -> Result<(), Ext4Error> {
        let Kind::Directory(names) = kind else { return Ok(()) };
        // Whatever else debugfs makes gets a directory more blocks where it needs some; a link does not.
        if names.values().any(|name| self.tree.node(name.node).names > 1) {
            let bytes: usize = names.keys().map(|name| 8 + name.len().next_multiple_of(4)).sum();
            for _ in 0..=bytes / USABLE {
                self.line(format_args!("expand_dir"), &[b"."])?;
            }
        }
        for (name, to) in names {
            self.file(name, to.node)?;
        }
        Ok(())
    }

    fn file(&mut self, name: &[u8], id: NodeId) -> Result<(), Ext4Error> {
        let node = self.tree.node(id);
        // What makes a file takes its name as it is; what looks for one would take `<12>` for an inode's number, and `-x` for an option.
        let path = [b"./", name].concat();
        if let Some(first) = self.linked.get(&id).cloned() {
            self.line(format_args!("ln"), &[&first, name])?;
            return Ok(());
        }
        let kind = match &node.kind {
            Kind::Directory(_) => {
                if !(self.names.is_empty() && name == LOST_AND_FOUND) {
                    self.line(format_args!("mkdir"), &[name])?;
                }
                self.line(format_args!("cd"), &[&path])?;
                self.names.push(name.to_vec());
                self.directory(&node.kind)?;
                self.names.pop();
                self.line(format_args!("cd"), &[b"./.."])?;
                0o040_000
            }
            Kind::File(content) => {
                let from = match content.number {
                    Some(number) => self.tree.content(number),
                    None => PathBuf::from("/dev/null"),
                };
                self.line(format_args!("write"), &[from.as_os_str().as_bytes(), name])?;
                0o100_000
            }
            Kind::Symlink(target) => {
                self.line(format_args!("symlink"), &[name, target])?;
                0o120_000
            }
            Kind::Fifo => {
                self.line(format_args!("mknod"), &[name, b"p"])?;
                0o010_000
            }
            Kind::Char(major, minor) => {
                self.device(name, b"c", *major, *minor)?;
                0o020_000
            }
            Kind::Block(major, minor) => {
                self.device(name, b"b", *major, *minor)?;
                0o060_000
            }
        };
        if node.names > 1 && kind != 0o040_000 {
            let whole = self.names.iter().map(Vec::as_slice).chain([name]);
            let whole = whole.flat_map(|name| [b"/", name]).collect::<Vec<_>>().concat();
            self.linked.insert(id, whole);
        }
        self.attributes(&path, &node.attributes, kind, node.names)
    }

    fn device(&mut self, name: &[u8], kind: &[u8], major: u32, minor: u32) -> Result<(), Ext4Error> {
        let (major, minor) = (major.to_string(), minor.to_string());
        self.line(format_args!("mknod"), &[name, kind, major.as_bytes(), minor.as_bytes()])
    }

    fn attributes(&mut self, path: &[u8], of: &Attributes, kind: u32, names: u32) -> Result<(), Ext4Error> {
        // Last of all: a directory's times change with what is made in it.
        for (name, value) in &of.xattrs {
            let file = self.work.join(format!("x{}", self.xattrs));
            self.xattrs += 1;
            fs::write(&file, value).map_err(|source| Ext4Error::File {
                path: file.clone(),
                source,
            })?;
            debug_assert!(is_writable(name));
            self.line(format_args!("ea_set -f"), &[file.as_os_str().as_bytes(), path, name])?;
        }
        let mut set = |field: &str, value: fmt::Arguments<'_>| {
            let value = value.to_string();
            self.line(format_args!("sif"), &[path, field.as_bytes(), value.as_bytes()])
        };
        set("mode", format_args!("0{:o}", kind | of.mode))?;
        set("uid", format_args!("{}", of.uid))?;
        set("gid", format_args!("{}", of.gid))?;
        if names > 1 && kind != 0o040_000 {
            set("links_count", format_args!("{names}"))?;
        }
        let (seconds, extra) = encoded(of.modified);
        for time in ["atime", "ctime", "mtime"] {
            set(time, format_args!("@{seconds}"))?;
            set(&format!("{time}_extra"), format_args!("{extra}"))?;
        }
        Ok(())
    }

    fn line(&mut self, command: fmt::Arguments<'_>, words: &[&[u8]]) -> Result<(), Ext4Error> {
        let mut line = command.to_string().into_bytes();
        for word in words {
            line.push(b' ');
            line.extend(Word(word).bytes());
        }
        if line.len() > MAX_LINE {
            return Err(Ext4Error::Long(shown(words.last().unwrap_or(&&b""[..]))));
        }
        line.push(b'\n');
        self.out.write_all(&line).map_err(|source| Ext4Error::File {
            path: self.work.join("commands"),
            source,
        })
    }
}

/// A time as ext4 has it: the seconds that fit into 32 bits with a sign, and a word with two more bits of them and the nanoseconds
/// (`ext4_encode_extra_time` in `fs/ext4/ext4.h`). Of what is earlier than 1970 or later than 2446, these.
fn encoded(time: Time) -> (u64, u32) {
    const LAST: i64 = (1 << 34) - (1 << 31) - 1;
    let seconds = time.seconds.clamp(0, LAST);
    let epoch = (seconds + (1 << 31)) >> 32;
    let low = u64::from_ne_bytes((seconds & 0xffff_ffff).to_ne_bytes());
    let epoch = u32::try_from(epoch).expect("two bits");
    (low, (time.nanoseconds << 2) | epoch)
}

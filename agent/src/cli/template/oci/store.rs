//! Where the parts of an image are, and how they are opened by their names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use ring::digest::{Context, SHA256};

use super::super::archive::{Archive, EntryKind, shown};
use super::{BUFFER, OciError, Sha256, is_sha256, same};

/// Most bytes of a manifest, an index or a config: what registries take.
pub(super) const MAX_DOCUMENT: u64 = 4 << 20;
/// Most members of an archive.
const MAX_MEMBERS: usize = 100_000;
/// Most symbolic links from one member of an archive to the next.
const MAX_LINKS: usize = 8;

/// Where the parts of an image are.
#[derive(Debug)]
pub(in super::super) enum Store {
    /// Files of a directory.
    Directory(PathBuf),
    /// Members of an archive, which is not compressed.
    Archive { file: File, members: Members },
}

/// Members of an archive by name.
type Members = BTreeMap<Vec<u8>, Member>;

#[derive(Debug)]
pub(in super::super) enum Member {
    /// Where it begins, and how long it is.
    File(u64, u64),
    /// A symbolic link, to this name.
    Link(Vec<u8>),
}

/// Whether the first name of an archive is that of a part of an image, and no file of a root filesystem.
pub(in super::super) fn is_part(name: &[u8]) -> bool {
    const PARTS: [&str; 5] = ["blobs", "oci-layout", "index.json", "manifest.json", "repositories"];
    let Some(Ok(first)) = parts(name).next().map(std::str::from_utf8) else {
        return false;
    };
    let stem = first
        .strip_suffix(".json")
        .or(first.strip_suffix(".tar"))
        .unwrap_or(first);
    PARTS.contains(&first) || is_sha256(stem)
}

fn parts(name: &[u8]) -> impl Iterator<Item = &[u8]> {
    name.split(|byte| *byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
}

impl Store {
    /// Finds the members of an archive.
    pub(in super::super) fn index(file: File) -> Result<Self, OciError> {
        let mut members = Members::new();
        {
            let mut archive = Archive::new(BufReader::with_capacity(BUFFER, &file));
            while let Some(entry) = archive.next()? {
                let name = parts(&entry.path).collect::<Vec<_>>().join(&b'/');
                let member = match entry.kind {
                    EntryKind::File => Member::File(archive.position(), entry.size),
                    EntryKind::Symlink => {
                        let above = name.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
                        Member::Link(normal(&[&name[..above], &entry.link].concat()))
                    }
                    EntryKind::HardLink => Member::Link(normal(&entry.link)),
                    EntryKind::Directory | EntryKind::Fifo | EntryKind::Char | EntryKind::Block => continue,
                };
                if members.len() == MAX_MEMBERS {
                    return Err(OciError::TooMany {
                        what: "members",
                        most: MAX_MEMBERS,
                    });
                }
                members.insert(name, member);
            }
        }
        Ok(Self::Archive { file, members })
    }

    /// Opens a part by its name, which is no path that leads anywhere else: of a directory only names that we made are asked for.
    pub(super) fn open(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64), OciError> {
        let missing = || OciError::Missing(shown(name.as_bytes()));
        match self {
            Self::Directory(dir) => {
                let failed = |source: io::Error| match source.kind() {
                    io::ErrorKind::NotFound => missing(),
                    _ => OciError::Read {
                        what: shown(name.as_bytes()),
                        source,
                    },
                };
                let file = File::open(dir.join(name)).map_err(failed)?;
                let length = file.metadata().map_err(failed)?.len();
                Ok((Box::new(file), length))
            }
            Self::Archive { file, members } => {
                let mut name = normal(name.as_bytes());
                for _ in 0..=MAX_LINKS {
                    match members.get(&name).ok_or_else(missing)? {
                        Member::File(at, length) => {
                            let section = Section {
                                file,
                                at: *at,
                                left: *length,
                            };
                            return Ok((Box::new(section), *length));
                        }
                        Member::Link(to) => name = to.clone(),
                    }
                }
                Err(missing())
            }
        }
    }

    /// A whole document, and whether it is the one that was asked for.
    pub(super) fn document(&self, name: &str, expected: Option<&Sha256>) -> Result<Vec<u8>, OciError> {
        let (reader, _) = self.open(name)?;
        let what = shown(name.as_bytes());
        let mut content = Vec::new();
        let read = reader.take(MAX_DOCUMENT + 1).read_to_end(&mut content);
        read.map_err(|source| OciError::Read {
            what: what.clone(),
            source,
        })?;
        if content.len() as u64 > MAX_DOCUMENT {
            return Err(OciError::Long { what });
        }
        if let Some(expected) = expected {
            let mut context = Context::new(&SHA256);
            context.update(&content);
            same(&what, expected, &Sha256::of(context))?;
        }
        Ok(content)
    }
}

/// A name of a member of an archive, without what is not needed in it; `..` ends at its root.
fn normal(name: &[u8]) -> Vec<u8> {
    let mut normal: Vec<&[u8]> = Vec::new();
    for part in parts(name) {
        if part == b".." {
            normal.pop();
        } else {
            normal.push(part);
        }
    }
    normal.join(&b'/')
}

/// A part of a file.
struct Section<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let some = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let read = self.file.read_at(&mut buffer[..some], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

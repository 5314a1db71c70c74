//! Reading tar archives, from anybody, as a stream: one entry after the other, each followed by its content.
//!
//! ustar, GNU (long names, numbers in base 256) and pax. What an entry says of itself is taken as it stands and judged by
//! [`super::tree`]; here it is only bounded: a pax header to [`MAX_PAX`], a name to [`MAX_NAME`].
//!
//! Headers are decoded by the `tar` crate. Entries are not iterated by it, because it takes names and pax headers of any size into memory,
//! and splits the values of extended attributes, which are binary, at line feeds.

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::Header;

/// Bytes of a block, in which archives are written.
const BLOCK: u64 = 512;
/// Most bytes of pax records of one entry. Extended attributes are the largest of them, at most 64 KiB each in Linux.
pub(super) const MAX_PAX: u64 = 1 << 20;
/// Most bytes of a name of GNU's kind: longer than any path that the kernel takes.
pub(super) const MAX_NAME: u64 = 64 << 10;
/// Prefix of the pax records that hold extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Why an archive cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The stream below.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// It ends before its end is marked.
    #[error("the archive is cut off at byte {0}")]
    CutOff(u64),
    /// No header where one is due.
    #[error("no tar archive, or a damaged one: the header at byte {0} has a wrong checksum")]
    Checksum(u64),
    /// A number in a header that is none.
    #[error("{path}: its {field} is no number that a file can have")]
    Number {
        /// Of which entry.
        path: String,
        /// Which one.
        field: &'static str,
    },
    /// A file with holes in one of GNU's ways.
    #[error("{0}: sparse entries cannot be read; make the archive without --sparse")]
    Sparse(String),
    /// A kind of entry that is no kind of file.
    #[error("{path}: entries of type {kind:?} cannot be read")]
    Kind {
        /// Of which entry.
        path: String,
        /// Its type flag.
        kind: char,
    },
    /// A pax header that is not a list of records.
    #[error("the pax header at byte {0} is damaged")]
    Pax(u64),
    /// A header that only takes memory.
    #[error("the {what} at byte {at} has {size} bytes, more than {most}")]
    TooLong {
        /// What.
        what: &'static str,
        /// Where.
        at: u64,
        /// What it says.
        size: u64,
        /// What it may have.
        most: u64,
    },
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    Char,
    Block,
}

/// A moment, in seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

/// One entry, as it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryKind,
    /// Bytes of content that follow; 0 for anything but a file.
    pub(super) size: u64,
    /// Permissions with set-id bits and sticky bit.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Time,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Whether it has access control lists in star's text form, which are not taken over.
    pub(super) has_acl: bool,
    /// What a link leads to.
    pub(super) link: Vec<u8>,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
}

/// pax records by keyword.
type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// An archive that is being read. As a [`Read`] it is the content of the entry that came last.
pub(super) struct Archive<R> {
    reader: R,
    /// Bytes that have been read of it.
    at: u64,
    /// Bytes left of the content, and of what fills its last block.
    left: u64,
    fill: u64,
    global: Records,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            at: 0,
            left: 0,
            fill: 0,
            global: Records::new(),
        }
    }

    /// Where in the archive the content of the last entry begins, as long as none of it has been read.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// The next entry; `None` at the archive's end. What is left of the content before it is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let (mut path, mut link) = (None, None);
        let mut records = self.global.clone();
        loop {
            self.skip()?;
            let at = self.at;
            let mut header = Header::new_old();
            self.fill_exactly(header.as_mut_bytes())?;
            if header.as_bytes().iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            if !has_checksum(&header) {
                return Err(ArchiveError::Checksum(at));
            }
            let kind = header.entry_type().as_byte();
            let size = numeric(&header.as_old().size, header.entry_size());
            let size = size.map_err(|_| number(&header.path_bytes(), "size"));
            match kind {
                b'L' => path = Some(self.name(at, size?)?),
                b'K' => link = Some(self.name(at, size?)?),
                b'x' => records.extend(self.records(at, size?)?),
                b'g' => {
                    // For all entries from here on.
                    let global = self.records(at, size?)?;
                    self.global.extend(global);
                    records = self.global.clone();
                }
                // The name of a volume.
                b'V' => {}
                _ => {
                    records.extend(path.map(|path| (b"path".to_vec(), path)));
                    records.extend(link.map(|link| (b"linkpath".to_vec(), link)));
                    let entry = entry(&header, size, &records)?;
                    self.left = entry.size;
                    self.fill = fill_of(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The content of a header that is itself a name, ended by a NUL.
    fn name(&mut self, at: u64, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.small("name", at, size, MAX_NAME)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn records(&mut self, at: u64, size: u64) -> Result<Records, ArchiveError> {
        let content = self.small("pax header", at, size, MAX_PAX)?;
        pax(&content).ok_or(ArchiveError::Pax(at))
    }

    fn small(&mut self, what: &'static str, at: u64, size: u64, most: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > most {
            return Err(ArchiveError::TooLong { what, at, size, most });
        }
        let mut content = vec![0; usize::try_from(size).expect("bounded above")];
        self.fill_exactly(&mut content)?;
        self.fill = fill_of(size);
        Ok(content)
    }

    fn fill_exactly(&mut self, buffer: &mut [u8]) -> Result<(), ArchiveError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.reader.read(&mut buffer[filled..]) {
                Ok(0) => return Err(ArchiveError::CutOff(self.at)),
                Ok(read) => {
                    filled += read;
                    self.at += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ArchiveError::Read(error)),
            }
        }
        Ok(())
    }

    fn skip(&mut self) -> Result<(), ArchiveError> {
        let mut buffer = [0; 16 << 10];
        let mut rest = self.left + self.fill;
        (self.left, self.fill) = (0, 0);
        while rest > 0 {
            let some = usize::try_from(rest).map_or(buffer.len(), |rest| rest.min(buffer.len()));
            self.fill_exactly(&mut buffer[..some])?;
            rest -= some as u64;
        }
        Ok(())
    }
}

impl<R: Read> Read for Archive<R> {
    /// The content of the last entry. Where the archive ends before it, [`io::ErrorKind::UnexpectedEof`].
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let some = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if some == 0 {
            return Ok(0);
        }
        let read = self.reader.read(&mut buffer[..some])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        self.at += read as u64;
        Ok(read)
    }
}

/// Bytes that fill the last block of content of this size.
fn fill_of(size: u64) -> u64 {
    size.next_multiple_of(BLOCK) - size
}

/// Whether a header has the checksum of its bytes, with the checksum itself as spaces. Ancient programs summed up signed bytes.
fn has_checksum(header: &Header) -> bool {
    let Ok(said) = header.cksum() else { return false };
    let bytes = header.as_bytes().iter().enumerate();
    let bytes = bytes.map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte });
    let unsigned: u32 = bytes.clone().map(u32::from).sum();
    let signed: i32 = bytes.map(|byte| i32::from(byte.cast_signed())).sum();
    said == unsigned || i64::from(said) == i64::from(signed)
}

fn number(path: &[u8], field: &'static str) -> ArchiveError {
    ArchiveError::Number {
        path: shown(path),
        field,
    }
}

/// A name for a message: what is no printable ASCII escaped, and cut short.
pub(crate) fn shown(name: &[u8]) -> String {
    const MOST: usize = 200;
    let cut = if name.len() > MOST { "…" } else { "" };
    format!("{}{cut}", name[..name.len().min(MOST)].escape_ascii())
}

/// The entry of a header and of the pax records before it, which count where both say something. `size` is the header's.
fn entry(header: &Header, size: Result<u64, ArchiveError>, records: &Records) -> Result<Entry, ArchiveError> {
    let record = |keyword: &str| records.get(keyword.as_bytes()).map(Vec::as_slice);
    let path = record("path").map_or_else(|| header.path_bytes().into_owned(), <[u8]>::to_vec);
    let flag = header.entry_type().as_byte();
    if flag == b'S' || records.keys().any(|keyword| keyword.starts_with(b"GNU.sparse.")) {
        return Err(ArchiveError::Sparse(shown(&path)));
    }
    let kind = match flag {
        // Before there were types, a directory was a name with a slash at its end.
        0 | b'0' if path.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' | b'7' => EntryKind::File,
        b'1' => EntryKind::HardLink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::Char,
        b'4' => EntryKind::Block,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        other => {
            return Err(ArchiveError::Kind {
                path: shown(&path),
                kind: char::from(other),
            });
        }
    };
    // A record where there is one, else the header's field.
    let field = |name: &'static str, of_header: Result<u64, ArchiveError>| match record(name) {
        Some(text) => decimal(text).ok_or_else(|| number(&path, name)),
        None => of_header,
    };
    let small = |value: u64, name| u32::try_from(value).map_err(|_| number(&path, name));
    let of_header = |value: io::Result<u64>, name| value.map_err(|_| number(&path, name));
    let uid = field("uid", of_header(numeric(&header.as_old().uid, header.uid()), "uid"))?;
    let gid = field("gid", of_header(numeric(&header.as_old().gid, header.gid()), "gid"))?;
    let modified = match record("mtime") {
        Some(text) => moment(text).ok_or_else(|| number(&path, "mtime"))?,
        None => Time {
            // Before 1970 it is a negative number, which nobody means.
            seconds: of_header(numeric(&header.as_old().mtime, header.mtime()), "mtime")?
                .try_into()
                .unwrap_or(0),
            nanoseconds: 0,
        },
    };
    let device = if matches!(kind, EntryKind::Char | EntryKind::Block) {
        let part = |value: io::Result<Option<u32>>, name| match value {
            Ok(Some(value)) => Ok(value),
            Ok(None) | Err(_) => Err(number(&path, name)),
        };
        (
            part(header.device_major(), "major")?,
            part(header.device_minor(), "minor")?,
        )
    } else {
        (0, 0)
    };
    let xattrs = records.iter().filter_map(|(keyword, value)| {
        let name = keyword.strip_prefix(XATTR)?;
        Some((name.to_vec(), value.clone()))
    });
    Ok(Entry {
        kind,
        // What has no content has none, whatever its header says: of some programs that is the size of what a link leads to.
        size: if kind == EntryKind::File {
            field("size", size)?
        } else {
            0
        },
        mode: numeric(&header.as_old().mode, header.mode()).map_err(|_| number(&path, "mode"))? & 0o7777,
        uid: small(uid, "uid")?,
        gid: small(gid, "gid")?,
        modified,
        xattrs: xattrs.collect(),
        has_acl: records.keys().any(|keyword| keyword.starts_with(b"SCHILY.acl.")),
        link: record("linkpath").map_or_else(
            || header.link_name_bytes().unwrap_or_default().into_owned(),
            <[u8]>::to_vec,
        ),
        device,
        path,
    })
}

/// A number of a header. A field that nobody has filled in is 0.
fn numeric<T: From<u8>>(field: &[u8], value: io::Result<T>) -> io::Result<T> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(T::from(0));
    }
    value
}

fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A moment as `1700000000.123456789`.
fn moment(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 64 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    Some(Time {
        seconds: seconds.parse().ok()?,
        nanoseconds: digits.parse().ok()?,
    })
}

/// Records of the form `<length> <keyword>=<value>\n`, the length being that of all of it, in decimal.
fn pax(mut content: &[u8]) -> Option<Records> {
    let mut records = Records::new();
    while !content.is_empty() {
        let space = content.iter().take(20).position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&content[..space]).ok()?.parse().ok()?;
        let record = content.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        records.insert(record[..equals].to_vec(), record[equals + 1..].to_vec());
        content = &content[length..];
    }
    Some(records)
}

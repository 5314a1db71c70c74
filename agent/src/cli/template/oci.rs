//! Images of containers: which layers an OCI image layout or an archive of `docker save` has, and the layers themselves.
//!
//! ```text
//! OCI:     index.json --> [index -->] manifest of this machine's architecture --> layers; each a blob named by its SHA-256
//! docker:  manifest.json --> config (named by its SHA-256, lists the SHA-256 of each layer's tar), layers
//! ```
//!
//! Holds: nothing is used whose SHA-256 is not the one by which it was asked for; documents are bounded in size, layers in number, and what
//! all layers unpack to in sum ([`MAX_UNPACKED`]). Layers are checked to their last byte after they were read: whoever reads them throws
//! away what came of it when that fails.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::rc::Rc;

use ring::digest::{Context, SHA256};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::archive::{Archive, ArchiveError, EntryKind, shown};

/// Most bytes of a manifest, an index or a config: what registries take.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most layers of an image, most members of an archive, most indexes within indexes.
const MAX_LAYERS: usize = 512;
const MAX_MEMBERS: usize = 100_000;
const MAX_INDEXES: usize = 4;
/// Most symbolic links from one member of an archive to the next.
const MAX_LINKS: usize = 8;
/// Most bytes that all layers of an image, or an archive, are unpacked to.
pub(super) const MAX_UNPACKED: u64 = 64 << 30;
/// How much is read at a time.
const BUFFER: usize = 256 << 10;
/// Media types of indexes, manifests and layers.
const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const LAYERS: [&str; 9] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// Why there are no layers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OciError {
    /// Something that should be there.
    #[error("the image has no {0}")]
    Missing(String),
    /// Something that cannot be read.
    #[error("{what} of the image cannot be read")]
    Read {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A document that is too long.
    #[error("{what} of the image has more than {MAX_DOCUMENT} bytes")]
    Long {
        /// Which one.
        what: String,
    },
    /// A document that is none.
    #[error("{what} of the image is not what it should be")]
    Document {
        /// Which one.
        what: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A digest of a kind that we do not know.
    #[error("{0:?} is no digest of the form sha256:<64 hexadecimal digits>")]
    Digest(String),
    /// Something that is not what was asked for.
    #[error("{what} of the image is damaged: its SHA-256 is {found}, not {expected}")]
    Damaged {
        /// What.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A length that is not the one that was said.
    #[error("{what} of the image is damaged: it has {found} bytes, not {expected}")]
    Length {
        /// What.
        what: String,
        /// What it should have.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// A kind of manifest or layer that we do not know.
    #[error("{what} of the image has the media type {media_type:?}, which cannot be read")]
    MediaType {
        /// What.
        what: &'static str,
        /// Its type.
        media_type: String,
    },
    /// None for this machine.
    #[error("the image is for {found}, and not for linux/{wanted}")]
    Architecture {
        /// What it is for.
        found: String,
        /// What this machine is.
        wanted: &'static str,
    },
    /// Several to choose from.
    #[error("there are several images; --image says which: {0}")]
    Several(String),
    /// None of that name.
    #[error("there is no image {wanted:?}; there are: {found}")]
    NoSuch {
        /// What was asked for.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// More than anybody needs.
    #[error("the image has more than {most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        most: usize,
    },
    /// A docker image whose layers and config do not go together.
    #[error("the image has {layers} layers, and its config lists {listed}")]
    Layers {
        /// How many there are.
        layers: usize,
        /// How many the config has.
        listed: usize,
    },
    /// The archive that all of it is in.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// A SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sha256(String);

impl Sha256 {
    fn parse(digest: &str) -> Result<Self, OciError> {
        let hex = digest.strip_prefix("sha256:").filter(|hex| is_sha256(hex));
        hex.map(|hex| Self(hex.to_owned()))
            .ok_or_else(|| OciError::Digest(shown(digest.as_bytes())))
    }

    fn of(context: Context) -> Self {
        Self(
            context
                .finish()
                .as_ref()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }
}

fn is_sha256(hex: &str) -> bool {
    hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    layers: Vec<Descriptor>,
    config: Descriptor,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Where the parts of an image are.
#[derive(Debug)]
pub(super) enum Store {
    /// Files of a directory.
    Directory(PathBuf),
    /// Members of an archive, which is not compressed.
    Archive { file: File, members: Members },
}

/// Members of an archive by name.
type Members = BTreeMap<Vec<u8>, Member>;

#[derive(Debug)]
pub(super) enum Member {
    /// Where it begins, and how long it is.
    File(u64, u64),
    /// A symbolic link, to this name.
    Link(Vec<u8>),
}

/// Whether the first name of an archive is that of a part of an image, and no file of a root filesystem.
pub(super) fn is_part(name: &[u8]) -> bool {
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
    pub(super) fn index(file: File) -> Result<Self, OciError> {
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
    fn open(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64), OciError> {
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
    fn document(&self, name: &str, expected: Option<&Sha256>) -> Result<Vec<u8>, OciError> {
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

    fn blob<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T, OciError> {
        let digest = Sha256::parse(&descriptor.digest)?;
        parse(&blob_name(&digest), &self.document(&blob_name(&digest), Some(&digest))?)
    }

    /// The layers of the image, lowest first. `image` chooses one where there are several.
    pub(super) fn layers(&self, image: Option<&str>) -> Result<Vec<Layer<'_>>, OciError> {
        // The names in a manifest of docker's are anybody's: good for looking up members, and no paths to be opened here.
        let layers = match self {
            Self::Archive { members, .. } if !members.contains_key(&b"index.json"[..]) => {
                self.layers_of_saved(image)?
            }
            Self::Archive { .. } | Self::Directory(_) => self.layers_of_index(image)?,
        };
        if layers.len() > MAX_LAYERS {
            return Err(OciError::TooMany {
                what: "layers",
                most: MAX_LAYERS,
            });
        }
        Ok(layers)
    }

    fn layers_of_index(&self, image: Option<&str>) -> Result<Vec<Layer<'_>>, OciError> {
        let index: Index = parse("index.json", &self.document("index.json", None)?)?;
        let named = index
            .manifests
            .into_iter()
            .map(|found| (names_of(&found), found))
            .collect();
        let mut found = choose(named, image)?;
        // At most so many indexes are asked before there is a manifest.
        for _ in 0..MAX_INDEXES {
            if !INDEXES.contains(&found.media_type.as_str()) {
                break;
            }
            let index: Index = self.blob(&found)?;
            found = of_this_machine(index.manifests)?;
        }
        if !MANIFESTS.contains(&found.media_type.as_str()) {
            return Err(OciError::MediaType {
                what: "a manifest",
                media_type: shown(found.media_type.as_bytes()),
            });
        }
        let manifest: Manifest = self.blob(&found)?;
        let config: Config = self.blob(&manifest.config)?;
        is_for_this_machine(&config)?;
        let layers = manifest.layers.iter().map(|layer| {
            if !LAYERS.contains(&layer.media_type.as_str()) {
                return Err(OciError::MediaType {
                    what: "a layer",
                    media_type: shown(layer.media_type.as_bytes()),
                });
            }
            let digest = Sha256::parse(&layer.digest)?;
            let name = blob_name(&digest);
            let (_, length) = self.open(&name)?;
            if length != layer.size {
                return Err(OciError::Length {
                    what: name,
                    expected: layer.size,
                    found: length,
                });
            }
            Ok(Layer {
                store: self,
                name,
                packed: Some(digest),
                unpacked: None,
            })
        });
        layers.collect()
    }

    fn layers_of_saved(&self, image: Option<&str>) -> Result<Vec<Layer<'_>>, OciError> {
        let saved: Vec<Saved> = parse("manifest.json", &self.document("manifest.json", None)?)?;
        let named = saved
            .into_iter()
            .map(|saved| (saved.repo_tags.clone().unwrap_or_default(), saved));
        let found = choose(named.collect(), image)?;
        // `<digest>.json`, or `blobs/sha256/<digest>`.
        let file = found.config.rsplit('/').next().unwrap_or_default();
        let digest = Sha256::parse(&format!("sha256:{}", file.strip_suffix(".json").unwrap_or(file)))?;
        let config: Config = parse("its config", &self.document(&found.config, Some(&digest))?)?;
        is_for_this_machine(&config)?;
        let ids = &config.rootfs.diff_ids;
        if ids.len() != found.layers.len() {
            return Err(OciError::Layers {
                layers: found.layers.len(),
                listed: ids.len(),
            });
        }
        let layers = found.layers.into_iter().zip(ids).map(|(name, id)| {
            drop(self.open(&name)?);
            Ok(Layer {
                store: self,
                name,
                packed: None,
                unpacked: Some(Sha256::parse(id)?),
            })
        });
        layers.collect()
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

fn blob_name(digest: &Sha256) -> String {
    format!("blobs/sha256/{}", digest.0)
}

fn parse<T: DeserializeOwned>(what: &str, content: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(content).map_err(|source| OciError::Document {
        what: what.to_owned(),
        source,
    })
}

fn same(what: &str, expected: &Sha256, found: &Sha256) -> Result<(), OciError> {
    if expected == found {
        return Ok(());
    }
    Err(OciError::Damaged {
        what: what.to_owned(),
        expected: expected.0.clone(),
        found: found.0.clone(),
    })
}

/// What an image is called in an index.
fn names_of(descriptor: &Descriptor) -> Vec<String> {
    ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
        .iter()
        .filter_map(|annotation| descriptor.annotations.get(*annotation).cloned())
        .collect()
}

/// The one of a name, or the only one.
fn choose<T: Choice>(mut found: Vec<(Vec<String>, T)>, image: Option<&str>) -> Result<T, OciError> {
    let names = |found: &[(Vec<String>, T)]| {
        let all = found.iter().flat_map(|(names, _)| names);
        let all: Vec<String> = all.take(20).map(|name| shown(name.as_bytes())).collect();
        if all.is_empty() {
            "none with a name".to_owned()
        } else {
            all.join(", ")
        }
    };
    if let Some(image) = image {
        let place = found
            .iter()
            .position(|(names, _)| names.iter().any(|name| name == image));
        return match place {
            Some(place) => Ok(found.swap_remove(place).1),
            None => Err(OciError::NoSuch {
                wanted: image.to_owned(),
                found: names(&found),
            }),
        };
    }
    // An index of one image for several machines looks like several images.
    if found.len() > 1 {
        found.retain(|(_, one)| one.may_be_for_this_machine());
    }
    match found.len() {
        0 => Err(OciError::Missing(format!("manifest for linux/{}", architecture()))),
        1 => Ok(found.remove(0).1),
        _ => Err(OciError::Several(names(&found))),
    }
}

/// What one can be chosen from.
trait Choice {
    fn may_be_for_this_machine(&self) -> bool;
}

impl Choice for Descriptor {
    fn may_be_for_this_machine(&self) -> bool {
        self.platform.as_ref().is_none_or(Platform::is_this_machine)
    }
}

impl Choice for Saved {
    fn may_be_for_this_machine(&self) -> bool {
        true
    }
}

impl Platform {
    fn is_this_machine(&self) -> bool {
        self.os == "linux" && self.architecture == architecture()
    }
}

fn of_this_machine(manifests: Vec<Descriptor>) -> Result<Descriptor, OciError> {
    let platforms = manifests.iter().filter_map(|one| one.platform.as_ref());
    let found: Vec<String> = platforms
        .take(20)
        .map(|platform| shown(format!("{}/{}", platform.os, platform.architecture).as_bytes()))
        .collect();
    let ours = manifests
        .into_iter()
        .find(|one| one.platform.as_ref().is_some_and(Platform::is_this_machine));
    ours.ok_or(OciError::Architecture {
        found: if found.is_empty() {
            "no machine".to_owned()
        } else {
            found.join(", ")
        },
        wanted: architecture(),
    })
}

fn is_for_this_machine(config: &Config) -> Result<(), OciError> {
    let is_ours = config.os == "linux" && config.architecture == architecture();
    is_ours.then_some(()).ok_or_else(|| OciError::Architecture {
        found: shown(format!("{}/{}", config.os, config.architecture).as_bytes()),
        wanted: architecture(),
    })
}

/// What images call this machine.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A layer: an archive, perhaps compressed.
#[derive(Debug)]
pub(super) struct Layer<'a> {
    store: &'a Store,
    pub(super) name: String,
    /// What it must be as it lies there, or unpacked.
    packed: Option<Sha256>,
    unpacked: Option<Sha256>,
}

impl Layer<'_> {
    /// Has `use_it` read the layer, and then checks that it is the one that was asked for. `budget` is what may still be unpacked.
    pub(super) fn read<E: From<OciError>>(
        &self,
        budget: &mut u64,
        use_it: impl FnOnce(&mut Archive<&mut dyn Read>) -> Result<(), E>,
    ) -> Result<(), E> {
        let what = shown(self.name.as_bytes());
        let failed = |source| OciError::Read {
            what: what.clone(),
            source,
        };
        let (reader, _) = self.store.open(&self.name)?;
        let packed = Rc::new(RefCell::new(Summed::new(reader)));
        let limited = Limited {
            reader: unpack(Shared(packed.clone())).map_err(failed)?,
            left: *budget,
        };
        let mut unpacked = Summed::new(limited);
        use_it(&mut Archive::new(&mut unpacked))?;
        // What is behind the end of the archive, and of the compressed stream, is part of both sums.
        io::copy(&mut unpacked, &mut io::sink()).map_err(failed)?;
        io::copy(&mut Shared(packed.clone()), &mut io::sink()).map_err(failed)?;
        *budget = unpacked.reader.left;
        if let Some(expected) = &self.unpacked {
            same(&what, expected, &Sha256::of(unpacked.sum))?;
        }
        if let Some(expected) = &self.packed {
            same(&what, expected, &Sha256::of(packed.borrow().sum.clone()))?;
        }
        Ok(())
    }
}

/// What comes out of a stream that may be compressed: by gzip or zstd, which their first bytes tell.
pub(super) fn unpack<'a>(mut reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut first = Vec::new();
    reader.by_ref().take(4).read_to_end(&mut first)?;
    let whole = BufReader::with_capacity(BUFFER, Cursor::new(first.clone()).chain(reader));
    Ok(match first.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        // A window of 128 MiB at most.
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

/// A stream of which no more than so many bytes are read.
pub(super) struct Limited<R> {
    pub(super) reader: R,
    pub(super) left: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.left = self
            .left
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other(format!("it unpacks to more than {} GiB", MAX_UNPACKED >> 30)))?;
        Ok(read)
    }
}

/// A stream with the sum of what has been read of it.
struct Summed<R> {
    reader: R,
    sum: Context,
}

impl<R> Summed<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            sum: Context::new(&SHA256),
        }
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.sum.update(&buffer[..read]);
        Ok(read)
    }
}

/// A stream that somebody else reads to its end.
struct Shared<R>(Rc<RefCell<R>>);

impl<R: Read> Read for Shared<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
    }
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

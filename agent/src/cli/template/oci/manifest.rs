//! The documents of an image: which one of several it is, whether it is for this machine, and which layers it has.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::super::archive::shown;
use super::layer::Layer;
use super::{OciError, Sha256, Store};

/// Most layers of an image, most indexes within indexes.
const MAX_LAYERS: usize = 512;
const MAX_INDEXES: usize = 4;
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

impl Store {
    /// The layers of the image, lowest first. `image` chooses one where there are several.
    pub(in super::super) fn layers(&self, image: Option<&str>) -> Result<Vec<Layer<'_>>, OciError> {
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

    fn blob<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T, OciError> {
        let digest = Sha256::parse(&descriptor.digest)?;
        parse(&blob_name(&digest), &self.document(&blob_name(&digest), Some(&digest))?)
    }
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
pub(in super::super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

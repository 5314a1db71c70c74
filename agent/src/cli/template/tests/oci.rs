use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::super::build::BuildError;
use super::super::oci::{MAX_UNPACKED, Store, architecture, is_part};
use super::super::tree::{Meaning, Tree};
use super::{MOST, Tar, listing, sha256};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image layout in a directory.
struct Layout(tempfile::TempDir);

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("blobs/sha256")).expect("made");
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).expect("written");
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = sha256(content);
        fs::write(self.path().join("blobs/sha256").join(&digest), content).expect("written");
        json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() })
    }

    fn json(&self, media_type: &str, content: &Value) -> Value {
        self.blob(media_type, content.to_string().as_bytes())
    }

    /// A manifest of layers, for an architecture.
    fn manifest(&self, architecture: &str, layers: &[Value]) -> Value {
        let config =
            json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
        let config = self.json("application/vnd.oci.image.config.v1+json", &config);
        self.json(
            MANIFEST,
            &json!({ "schemaVersion": 2, "config": config, "layers": layers }),
        )
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        fs::write(self.path().join("index.json"), index).expect("written");
    }

    fn read(&self, image: Option<&str>) -> Result<Vec<(String, String)>, String> {
        read(&Store::Directory(self.path().to_owned()), image)
    }

    /// All of it as an archive, in any order.
    fn archive(&self) -> File {
        let mut builder = tar::Builder::new(tempfile::tempfile().expect("made"));
        builder.append_dir_all(".", self.path()).expect("written");
        let mut file = builder.into_inner().expect("ended");
        std::io::Seek::rewind(&mut file).expect("rewound");
        file
    }
}

fn read(store: &Store, image: Option<&str>) -> Result<Vec<(String, String)>, String> {
    let spool = tempfile::tempdir().expect("a directory");
    let mut tree = Tree::new(spool.path(), MOST);
    let mut budget = MAX_UNPACKED;
    let mut read = || -> Result<(), BuildError> {
        for layer in store.layers(image)? {
            layer.read(&mut budget, |archive| {
                let added = tree.add(archive, Meaning::Layer, &AtomicBool::new(false));
                added.map_err(BuildError::from)
            })?;
        }
        Ok(())
    };
    read().map_err(|error| super::said(&error))?;
    Ok(listing(&tree).into_iter().collect())
}

fn listed(files: &[(&str, &str)]) -> Vec<(String, String)> {
    files
        .iter()
        .map(|(path, what)| ((*path).to_owned(), (*what).to_owned()))
        .collect()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).expect("written");
    encoder.finish().expect("ended")
}

fn with_platform(mut descriptor: Value, os: &str, architecture: &str) -> Value {
    descriptor["platform"] = json!({ "os": os, "architecture": architecture });
    descriptor
}

fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    descriptor
}

/// A layout of one layer.
fn simple() -> (Layout, Value) {
    let layout = Layout::new();
    let layer = layout.blob(LAYER, &Tar::default().file("a", "a").end());
    let manifest = layout.manifest(architecture(), &[layer]);
    layout.index(std::slice::from_ref(&manifest));
    (layout, manifest)
}

#[test]
fn layers_are_read_in_order_however_they_are_compressed_and_packed() {
    let layout = Layout::new();
    let layers = [
        layout.blob(LAYER, &Tar::default().file("a", "1").file("b", "1").end()),
        layout.blob(
            &format!("{LAYER}+gzip"),
            &gzip(&Tar::default().file("b", "2").file(".wh.a", "").end()),
        ),
        layout.blob(
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
            &zstd::encode_all(Tar::default().file("c", "3").end().as_slice(), 1).expect("compressed"),
        ),
    ];
    let ours = with_platform(layout.manifest(architecture(), &layers), "linux", architecture());
    let other = with_platform(layout.manifest("other", &[]), "linux", "other");
    let attestation = with_platform(layout.manifest("unknown", &[]), "unknown", "unknown");
    let all = layout.json(
        INDEX,
        &json!({ "manifests": [other, ours.clone(), attestation.clone()] }),
    );
    let wanted = listed(&[("/b", "2"), ("/c", "3")]);
    for manifests in [vec![all], vec![ours.clone()], vec![attestation, ours]] {
        layout.index(&manifests);
        assert_eq!(layout.read(None).as_ref(), Ok(&wanted));
        assert_eq!(
            read(&Store::index(layout.archive()).expect("indexed"), None).as_ref(),
            Ok(&wanted)
        );
    }
}

#[test]
fn one_of_several_images_is_chosen_by_its_name() {
    let layout = Layout::new();
    let image = |content: &str| {
        let layer = layout.blob(LAYER, &Tar::default().file("a", content).end());
        layout.manifest(architecture(), &[layer])
    };
    layout.index(&[named(image("1"), "one"), named(image("2"), "two")]);
    assert_eq!(layout.read(Some("two")), Ok(listed(&[("/a", "2")])));
    assert_eq!(
        layout.read(None),
        Err("there are several images; --image says which: one, two".into())
    );
    assert_eq!(
        layout.read(Some("x")),
        Err("there is no image \"x\"; there are: one, two".into())
    );
}

#[test]
fn what_is_not_what_it_should_be_is_refused_by_name() {
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().expect("a digest");
        format!("blobs/sha256/{}", &digest["sha256:".len()..])
    };
    let (layout, _) = simple();
    fs::remove_file(layout.path().join("index.json")).expect("removed");
    assert_eq!(layout.read(None), Err("the image has no index.json".into()));
    fs::write(layout.path().join("index.json"), " ".repeat((4 << 20) + 1)).expect("written");
    assert_eq!(
        layout.read(None),
        Err("index.json of the image has more than 4194304 bytes".into())
    );
    fs::write(layout.path().join("index.json"), "{").expect("written");
    assert!(
        layout
            .read(None)
            .expect_err("refused")
            .starts_with("index.json of the image is not what it should be: EOF")
    );

    // A layer with another byte, with one more, one that is missing, and one behind whose archive there is something else.
    let (layout, _) = simple();
    let layer = layout.blob(LAYER, &Tar::default().file("a", "a").end());
    let path = layout.path().join(blob(&layer));
    let good = fs::read(&path).expect("read");
    for at in [600, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).expect("written");
        let expected = format!(
            "{} of the image is damaged: its SHA-256 is {}, not {}",
            blob(&layer),
            sha256(&bad),
            sha256(&good)
        );
        assert_eq!(layout.read(None), Err(expected));
    }
    fs::write(&path, [good.as_slice(), b"x"].concat()).expect("written");
    let length = good.len();
    let expected = format!(
        "{} of the image is damaged: it has {} bytes, not {length}",
        blob(&layer),
        length + 1
    );
    assert_eq!(layout.read(None), Err(expected));
    fs::remove_file(&path).expect("removed");
    assert_eq!(layout.read(None), Err(format!("the image has no {}", blob(&layer))));

    // A manifest with another byte.
    let (layout, manifest) = simple();
    fs::write(layout.path().join(blob(&manifest)), "{}").expect("written");
    let said = layout.read(None).expect_err("refused");
    assert!(
        said.starts_with(&format!("{} of the image is damaged: its SHA-256 is", blob(&manifest))),
        "{said}"
    );
}

#[test]
fn what_is_for_others_or_of_another_kind_is_refused_by_name() {
    let layout = Layout::new();
    let refusal = |manifests: &[Value]| {
        layout.index(manifests);
        layout.read(None).expect_err("refused")
    };
    let machine = architecture();
    let other = layout.manifest("other", &[]);
    assert_eq!(
        refusal(std::slice::from_ref(&other)),
        format!("the image is for linux/other, and not for linux/{machine}")
    );
    let two = layout.json(
        INDEX,
        &json!({ "manifests": [with_platform(other.clone(), "linux", "riscv64"), other] }),
    );
    assert_eq!(
        refusal(&[two]),
        format!("the image is for linux/riscv64, and not for linux/{machine}")
    );
    assert_eq!(refusal(&[]), format!("the image has no manifest for linux/{machine}"));

    let layer = layout.blob("application/vnd.oci.image.layer.v1.tar+encrypted", b"x");
    assert_eq!(
        refusal(&[layout.manifest(machine, &[layer])]),
        "a layer of the image has the media type \"application/vnd.oci.image.layer.v1.tar+encrypted\", which cannot be read"
    );
    let mut odd = layout.manifest(machine, &[]);
    odd["mediaType"] = "text/html".into();
    assert_eq!(
        refusal(&[odd]),
        "a manifest of the image has the media type \"text/html\", which cannot be read"
    );
    for digest in ["sha512:00", "sha256:../../../etc/passwd", "", "sha256:ABC"] {
        let mut bad = layout.manifest(machine, &[]);
        bad["digest"] = digest.into();
        assert_eq!(
            refusal(&[bad]),
            format!("{digest:?} is no digest of the form sha256:<64 hexadecimal digits>")
        );
    }
    let layer = layout.blob(LAYER, &Tar::default().end());
    assert_eq!(
        refusal(&[layout.manifest(machine, &vec![layer; 513])]),
        "the image has more than 512 layers"
    );
    // Indexes within indexes, without end.
    let mut index = with_platform(layout.manifest(machine, &[]), "linux", machine);
    for _ in 0..6 {
        index = with_platform(layout.json(INDEX, &json!({ "manifests": [index] })), "linux", machine);
    }
    assert_eq!(
        refusal(&[index]),
        format!("a manifest of the image has the media type {INDEX:?}, which cannot be read")
    );
    let layer = layout.blob(
        &format!("{LAYER}+gzip"),
        &gzip(&Tar::default().file("a", "a").end())[..40],
    );
    let said = refusal(&[layout.manifest(machine, &[layer])]);
    assert!(said.starts_with("the archive cannot be read: "), "{said}");
}

#[test]
fn a_layer_that_unpacks_to_too_much_is_given_up() {
    let layout = Layout::new();
    let zeros = vec![0; 8 << 20];
    let bomb = Tar::default()
        .raw(b"zeros", tar::EntryType::Regular, &zeros, |_| {})
        .end();
    let layer = layout.blob(&format!("{LAYER}+gzip"), &gzip(&bomb));
    layout.index(&[layout.manifest(architecture(), &[layer])]);
    let store = Store::Directory(layout.path().to_owned());
    let layers = store.layers(None).expect("layers");
    let spool = tempfile::tempdir().expect("a directory");
    let mut tree = Tree::new(spool.path(), MOST);
    let mut budget = 4 << 20;
    let read = layers[0].read(&mut budget, |archive| {
        let added = tree.add(archive, Meaning::Layer, &AtomicBool::new(false));
        added.map_err(BuildError::from)
    });
    let said = super::said(&read.expect_err("given up"));
    assert_eq!(
        said,
        "zeros: its content cannot be read: it unpacks to more than 64 GiB"
    );
}

/// What `docker save` writes, with layers under these names.
fn saved(layers: &[(&str, Vec<u8>)], change: impl FnOnce(&mut Value, &mut Value)) -> File {
    let ids: Vec<String> = layers
        .iter()
        .map(|(_, layer)| format!("sha256:{}", sha256(layer)))
        .collect();
    let mut config = json!({ "architecture": architecture(), "os": "linux", "rootfs": { "diff_ids": ids } });
    let names: Vec<&str> = layers.iter().map(|(name, _)| *name).collect();
    let mut manifest = json!([{ "RepoTags": ["web:1"], "Layers": names }]);
    change(&mut config, &mut manifest);
    let config = config.to_string();
    let name = format!("{}.json", sha256(config.as_bytes()));
    if manifest[0]["Config"].is_null() {
        manifest[0]["Config"] = name.as_str().into();
    }
    let mut tar = Tar::default().file(&name, &config);
    for (name, layer) in layers {
        tar = tar.raw(name.as_bytes(), tar::EntryType::Regular, layer, |_| {});
    }
    let archive = tar
        .symlink("other/layer.tar", "../first.tar")
        .file("manifest.json", &manifest.to_string())
        .end();
    let mut file = tempfile::tempfile().expect("made");
    file.write_all(&archive).expect("written");
    std::io::Seek::rewind(&mut file).expect("rewound");
    file
}

#[test]
fn an_archive_of_docker_is_read_and_its_layers_compared_with_its_config() {
    let layers = [
        ("first.tar", Tar::default().file("a", "1").file("b", "1").end()),
        ("x/layer.tar", Tar::default().file(".wh.a", "").file("c", "2").end()),
    ];
    let read = |file: File, image: Option<&str>| read(&Store::index(file).expect("indexed"), image);
    let wanted = listed(&[("/b", "1"), ("/c", "2")]);
    assert_eq!(read(saved(&layers, |_, _| {}), None), Ok(wanted.clone()));
    assert_eq!(read(saved(&layers, |_, _| {}), Some("web:1")), Ok(wanted));
    // By way of the link that docker makes where layers are the same.
    let linked = |_: &mut Value, manifest: &mut Value| {
        manifest[0]["Layers"][0] = "./other/layer.tar".into();
    };
    assert_eq!(
        read(saved(&layers, linked), None),
        Ok(listed(&[("/b", "1"), ("/c", "2")]))
    );

    let swapped =
        |config: &mut Value, _: &mut Value| config["rootfs"]["diff_ids"].as_array_mut().expect("a list").reverse();
    let expected = format!(
        "first.tar of the image is damaged: its SHA-256 is {}, not {}",
        sha256(&layers[0].1),
        sha256(&layers[1].1)
    );
    assert_eq!(read(saved(&layers, swapped), None), Err(expected));
    let one =
        |config: &mut Value, _: &mut Value| drop(config["rootfs"]["diff_ids"].as_array_mut().expect("a list").pop());
    assert_eq!(
        read(saved(&layers, one), None),
        Err("the image has 2 layers, and its config lists 1".into())
    );
    let missing = |_: &mut Value, manifest: &mut Value| manifest[0]["Layers"][1] = "../../etc/passwd".into();
    assert_eq!(
        read(saved(&layers, missing), None),
        Err("the image has no ../../etc/passwd".into())
    );
    let other = |_: &mut Value, manifest: &mut Value| manifest[0]["Config"] = "first.tar".into();
    assert_eq!(
        read(saved(&layers, other), None),
        Err("\"sha256:first.tar\" is no digest of the form sha256:<64 hexadecimal digits>".into())
    );
    let foreign = |config: &mut Value, _: &mut Value| config["architecture"] = "other".into();
    assert_eq!(
        read(saved(&layers, foreign), None),
        Err(format!(
            "the image is for linux/other, and not for linux/{}",
            architecture()
        ))
    );
}

#[test]
fn an_archive_of_an_image_is_told_from_one_of_files() {
    let hex = "0".repeat(64);
    for part in [
        "blobs/",
        "./index.json",
        "oci-layout",
        "manifest.json",
        "repositories",
        &format!("{hex}/"),
        &format!("{hex}.json"),
        &format!("./{hex}.tar"),
    ] {
        assert!(is_part(part.as_bytes()), "{part}");
    }
    for file in [
        "bin",
        "./etc/",
        ".dockerenv",
        "",
        "./",
        "abc.json",
        "blobs2/x",
        &hex[1..],
    ] {
        assert!(!is_part(file.as_bytes()), "{file}");
    }
}

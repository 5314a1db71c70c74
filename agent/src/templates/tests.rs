use std::os::unix::fs::symlink;

use super::*;
use crate::host::images::{self, ImageError};

fn which(n: u128) -> TemplateRef {
    TemplateRef {
        team: Uuid::from_u128(7),
        template: Uuid::from_u128(n),
    }
}

fn make(images: &Path, n: u128, content: &[u8]) -> Result<Bytes, TemplateError> {
    let making = Making::begin(images, which(n))?;
    fs::write(making.rootfs(), content).expect("written");
    making.finish(&TemplateFile::new("x".into(), None))
}

fn left(images: &Path) -> Vec<String> {
    let mut left = names(&images.join("teams/7")).expect("read");
    left.sort();
    left
}

#[test]
fn a_template_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().expect("a directory");
    let images = dir.path();
    let making = Making::begin(images, which(1)).expect("begun");
    fs::write(making.rootfs(), [0; 4096]).expect("written");
    assert!(matches!(images::open(images, which(1)), Err(ImageError::Unknown(..))));
    drop(making);
    assert_eq!(left(images), [""; 0]);
    let size = make(images, 1, &[1; 8192]).expect("made");
    assert!((8192..1 << 20).contains(&size.0), "{size}");
    assert_eq!(images::open(images, which(1)).expect("there").size.0, 16);
    assert!(memory(&which(1).dir(images)).expect("read").is_none());
}

#[test]
fn there_is_one_template_of_a_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let images = dir.path();
    let [first, second] = [0, 1].map(|_| Making::begin(images, which(1)).expect("begun"));
    for making in [&first, &second] {
        fs::write(making.rootfs(), [0; 4096]).expect("written");
    }
    let file = TemplateFile::new("x".into(), None);
    first.finish(&file).expect("made");
    assert!(matches!(second.finish(&file), Err(TemplateError::Exists { .. })));
    assert_eq!(left(images), ["1"], "the other one is gone");
    assert!(matches!(make(images, 1, &[0; 4096]), Err(TemplateError::Exists { .. })));
    // Whatever has the name: it is not replaced.
    symlink("/nonexistent", images.join("teams/7/2")).expect("linked");
    assert!(matches!(make(images, 2, &[0; 4096]), Err(TemplateError::Exists { .. })));
}

#[test]
fn the_platforms_own_image_is_neither_made_nor_deleted() {
    let dir = tempfile::tempdir().expect("a directory");
    let own = TemplateRef::default();
    assert!(matches!(Making::begin(dir.path(), own), Err(TemplateError::Own)));
    assert!(matches!(delete(dir.path(), own), Err(TemplateError::Own)));
}

#[test]
fn a_deleted_template_is_found_by_its_sandboxes_alone_and_goes_with_the_last() {
    let dir = tempfile::tempdir().expect("a directory");
    let images = dir.path();
    assert!(!delete(images, which(1)).expect("absent"));
    make(images, 1, &[1; 4096]).expect("made");
    let origin = images::open(images, which(1)).expect("there").origin;
    assert!(delete(images, which(1)).expect("deleted"));
    assert!(!delete(images, which(1)).expect("absent"));
    assert!(matches!(images::open(images, which(1)), Err(ImageError::Unknown(..))));
    let open = |origin| images::open_origin(images, which(1), origin);
    assert_eq!(open(Some(origin)).expect("found").origin, origin);

    // Another of the same name is not taken for it.
    make(images, 1, &[2; 8192]).expect("made again");
    let other = images::open(images, which(1)).expect("there").origin;
    assert_ne!(origin, other);
    assert_eq!(open(Some(origin)).expect("found").origin, origin);
    assert_eq!(open(Some(other)).expect("found").origin, other);

    let needed = BTreeSet::from([named(which(1))]);
    sweep(images, &needed, Sweep::Deleted).expect("swept");
    assert_eq!(left(images).len(), 2);
    sweep(images, &BTreeSet::new(), Sweep::Deleted).expect("swept");
    assert_eq!(left(images), ["1"]);
    assert!(matches!(open(Some(origin)), Err(ImageError::Replaced { .. })));
}

#[test]
fn a_start_removes_what_was_being_made_and_leaves_what_it_does_not_know() {
    let dir = tempfile::tempdir().expect("a directory");
    let images = dir.path();
    make(images, 1, &[1; 4096]).expect("made");
    let making = Making::begin(images, which(2)).expect("begun");
    for name in [".making", ".deleted-", "notes"] {
        fs::write(images.join("teams/7").join(name), "").expect("written");
    }
    fs::write(images.join("teams/readme"), "").expect("written");
    sweep(images, &BTreeSet::new(), Sweep::Deleted).expect("swept");
    assert_eq!(left(images).len(), 5, "{:?}", left(images));
    sweep(images, &BTreeSet::new(), Sweep::DeletedAndUnfinished).expect("swept");
    assert_eq!(left(images), [".deleted-", ".making", "1", "notes"]);
    drop(making);
    sweep(&images.join("absent"), &BTreeSet::new(), Sweep::DeletedAndUnfinished).expect("nothing to sweep");
}

#[test]
fn memory_without_a_readable_file_beside_it_is_an_error() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir(dir.path().join(SNAPSHOT)).expect("made");
    let failed = || memory(dir.path()).expect_err("it was read").to_string();
    assert!(failed().contains(FILE));
    for torn in [
        "",
        "{\"version\": 1",
        "{}",
        "{\"version\": 2, \"name\": \"\", \"made_at_unix\": 1, \"token\": \"a\"}",
    ] {
        fs::write(dir.path().join(FILE), torn).expect("written");
        assert!(failed().contains("no template of this version"), "{torn}");
    }
    let file = TemplateFile::new("x".into(), Some(Token::random()));
    fs::write(dir.path().join(FILE), serde_json::to_vec(&file).expect("serialised")).expect("written");
    assert!(matches!(memory(dir.path()), Err(TemplateError::Snapshot(_))));
}

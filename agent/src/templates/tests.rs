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
    making.finish(&TemplateFile::new("x".into(), None, Sums::sample()))
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
    let file = TemplateFile::new("x".into(), None, Sums::sample());
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
    let file = TemplateFile::new("x".into(), Some(Token::random()), Sums::sample());
    fs::write(dir.path().join(FILE), serde_json::to_vec(&file).expect("serialised")).expect("written");
    assert!(matches!(memory(dir.path()), Err(TemplateError::Snapshot(_))));
}

#[test]
fn what_is_known_of_a_template_is_for_people_and_for_later_agents() {
    let sums = Sums {
        memory: Some(Sums::sample().rootfs),
        ..Sums::sample()
    };
    let mut file = TemplateFile::new("web".into(), None, sums);
    file.made_at_unix = 1_700_000_000;
    let digest = format!("sha256-1m:{}", "0".repeat(64));
    let golden = serde_json::json!({
        "version": 1,
        "name": "web",
        "made_at_unix": 1_700_000_000,
        "token": null,
        "rootfs": { "length": 4096, "digest": digest },
        "memory": { "length": 4096, "digest": digest },
    });
    assert_eq!(serde_json::to_value(&file).expect("serialised"), golden);
    assert_eq!(serde_json::from_value::<TemplateFile>(golden).expect("read"), file);
    // Of an agent that took no checksums.
    let earlier = r#"{"version": 1, "name": "web", "made_at_unix": 1700000000, "token": null}"#;
    let earlier: TemplateFile = serde_json::from_str(earlier).expect("read");
    assert_eq!((earlier.rootfs, earlier.memory), (None, None));
}

#[test]
fn a_file_that_is_no_template_of_this_version_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    assert!(TemplateFile::read(dir.path()).expect("none").is_none());
    for bad in [
        "",
        "{}",
        r#"{"version": 2, "name": "", "made_at_unix": 0, "token": null}"#,
        r#"{"version": 1, "name": "", "made_at_unix": 0, "token": null, "rootfs": {"length": 1, "digest": "sha256:0"}}"#,
    ] {
        fs::write(dir.path().join(FILE), bad).expect("written");
        assert!(
            matches!(TemplateFile::read(dir.path()), Err(TemplateError::Format { .. })),
            "{bad}"
        );
    }
}

#[test]
fn a_template_of_an_operator_or_an_earlier_agent_is_listed_and_unchecked() {
    use std::sync::atomic::AtomicBool;
    let dir = tempfile::tempdir().expect("a directory");
    let images = dir.path();
    make(images, 1, &[1; 4096]).expect("made");
    let place = which(1).dir(images);
    let stop = AtomicBool::new(false);
    fs::remove_file(place.join(FILE)).expect("removed");
    fs::create_dir(images.join("minimal")).expect("made");
    fs::write(images.join("minimal").join(ROOTFS), [0; 8192]).expect("written");
    for stray in [
        "teams/x-y",
        "teams/7/.making-3-x",
        "teams/7/.deleted-4-x",
        "teams/7/UPPER",
    ] {
        fs::create_dir_all(images.join(stray)).expect("made");
    }
    let listed = look::list(images).expect("listed");
    let names: Vec<_> = listed
        .iter()
        .map(|template| (template.which, template.name.as_str()))
        .collect();
    assert_eq!(names, [(TemplateRef::default(), "minimal"), (which(1), "")]);
    assert!(
        listed
            .iter()
            .all(|template| template.broken.is_none() && template.rootfs_digest.is_none())
    );
    let found = look::verify(&place, &stop).expect("read");
    assert_eq!(
        found.iter().map(|file| &file.outcome).collect::<Vec<_>>(),
        [&look::Outcome::Unchecked]
    );
    check(&place, Bytes(4096)).expect("nobody knows better");
    assert!(look::look(images, which(2)).is_none());
}

#[test]
fn a_stored_template_is_read_and_one_of_a_newer_version_is_refused_and_left() {
    let dir = tempfile::tempdir().expect("a directory");
    let (place, memory_of) = (dir.path(), || memory(dir.path()));
    let snapshot = place.join(SNAPSHOT);
    fs::create_dir(&snapshot).expect("made");
    let manifest = include_str!("../snapshot/samples/manifest-1.json");
    fs::write(snapshot.join("manifest.json"), manifest).expect("written");
    fs::write(place.join(FILE), include_str!("samples/template-1.json")).expect("written");
    assert!(memory_of().expect("read").is_some(), "it has memory");
    let newer = include_str!("samples/template-1.json").replace("\"version\": 1", "\"version\": 2");
    for content in [newer.as_str(), "{\"version\": 2, \"new\": {}}"] {
        fs::write(place.join(FILE), content).expect("written");
        let error = memory_of().expect_err("refused");
        assert!(
            error
                .to_string()
                .contains("template.json is no template of this version"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(place.join(FILE)).expect("there"), content);
    }
}

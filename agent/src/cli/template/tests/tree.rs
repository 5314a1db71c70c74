use std::sync::atomic::AtomicBool;

use tar::EntryType;

use super::super::tree::{Meaning, Tree, TreeError};
use super::{MOST, Tar, add, layered, listing};

fn spool() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

/// The paths of a tree of layers.
fn paths(layers: &[Tar]) -> Vec<String> {
    let spool = spool();
    let layers: Vec<Vec<u8>> = layers.iter().cloned().map(Tar::end).collect();
    let tree = layered(spool.path(), &layers).expect("a tree");
    listing(&tree).into_keys().collect()
}

#[test]
fn a_whiteout_hides_what_is_below_and_nothing_of_its_own_layer() {
    let below = Tar::default()
        .file("a/x", "1")
        .file("a/y", "1")
        .file("b", "1")
        .file("c/d/e", "1");
    let above = Tar::default()
        .file("a/.wh.x", "")
        .file(".wh.b", "")
        .file(".wh.none", "")
        .file("no/.wh.such", "");
    assert_eq!(paths(&[below.clone(), above]), ["/a", "/a/y", "/c", "/c/d", "/c/d/e"]);
    // Before and behind a file of the same name and layer.
    for above in [
        Tar::default().file(".wh.c", "").file("c/d/new", "2"),
        Tar::default().file("c/d/new", "2").file(".wh.c", ""),
    ] {
        assert_eq!(
            paths(&[below.clone(), above]),
            ["/a", "/a/x", "/a/y", "/b", "/c", "/c/d", "/c/d/new"]
        );
    }
    // In a root filesystem that is no layer it is a name like others.
    let spool = spool();
    let mut tree = Tree::new(spool.path(), MOST);
    add(&mut tree, &Tar::default().file(".wh.a", "").end(), Meaning::Plain).expect("added");
    assert!(tree.at(".wh.a").is_some());
}

#[test]
fn an_opaque_directory_has_what_its_own_layer_has() {
    let below = Tar::default().file("a/x", "1").file("a/s/y", "1").file("b", "1");
    for above in [
        Tar::default().dir("a").file("a/.wh..wh..opq", "").file("a/s/new", "2"),
        Tar::default()
            .dir("a")
            .dir("a/s")
            .file("a/s/new", "2")
            .file("a/.wh..wh..opq", ""),
    ] {
        assert_eq!(paths(&[below.clone(), above]), ["/a", "/a/s", "/a/s/new", "/b"]);
    }
    let all = Tar::default().file(".wh..wh..opq", "").file(".wh..wh.plnk", "");
    assert_eq!(paths(&[below, all]), [""; 0]);
}

#[test]
fn a_later_file_takes_the_place_of_an_earlier_one_and_its_content_goes() {
    let spool = spool();
    let below = Tar::default()
        .file("a", "first")
        .dir("d")
        .file("d/x", "x")
        .file("f", "f")
        .symlink("s", "d");
    let above = Tar::default()
        .file("a", "second")
        .file("d", "no directory")
        .dir("f")
        .dir("s")
        .file("s/y", "");
    let tree = layered(spool.path(), &[below.end(), above.end()]).expect("a tree");
    let listing = listing(&tree);
    let shown: Vec<_> = listing
        .iter()
        .map(|(path, what)| (path.as_str(), what.as_str()))
        .collect();
    assert_eq!(
        shown,
        [
            ("/a", "second"),
            ("/d", "no directory"),
            ("/f", "directory"),
            ("/s", "directory"),
            ("/s/y", "")
        ]
    );
    assert_eq!(
        std::fs::read_dir(spool.path()).expect("read").count(),
        2,
        "contents of files that have gone"
    );
}

#[test]
fn attributes_are_kept_and_those_of_an_earlier_layer_replaced() {
    let spool = spool();
    let below = Tar::default().raw(b"d", EntryType::Directory, b"", |header| header.set_mode(0o1777));
    let above = Tar::default()
        .pax(&[
            ("SCHILY.xattr.user.a", b"\n\0"),
            ("SCHILY.xattr.com.apple.x", b"1"),
            ("SCHILY.acl.access", b"user::rwx"),
        ])
        .raw(b"d", EntryType::Directory, b"", |header| {
            header.set_mode(0o2750);
            header.set_uid(70_000);
            header.set_gid(5);
        })
        .raw(b"null", EntryType::Char, b"", |header| {
            header.set_device_major(1).expect("ustar");
            header.set_device_minor(3).expect("ustar");
        })
        .raw(b"pipe", EntryType::Fifo, b"", |_| {});
    let tree = layered(spool.path(), &[below.end(), above.end()]).expect("a tree");
    let d = &tree.at("d").expect("there").attributes;
    assert_eq!(
        (d.mode, d.uid, d.gid, d.modified.seconds),
        (0o2750, 70_000, 5, 1_700_000_000)
    );
    let xattrs: Vec<_> = d
        .xattrs
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .collect();
    assert_eq!(xattrs, [(&b"user.a"[..], &b"\n\0"[..])]);
    assert_eq!((tree.left_out.xattrs, tree.left_out.acls), (1, 1));
    let listing = listing(&tree);
    assert_eq!(
        (listing["/null"].as_str(), listing["/pipe"].as_str()),
        ("c 1,3", "fifo")
    );
}

#[test]
fn paths_go_over_symbolic_links_within_the_tree_and_never_out_of_it() {
    let below = Tar::default()
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("out", "../../../../etc")
        .symlink("abs", "/usr/../usr/./lib")
        .symlink("nowhere", "made/late");
    let above = Tar::default()
        .file("lib/a", "a")
        .file("out/passwd", "p")
        .file("abs/b", "b")
        .file("nowhere/c", "c")
        .file("/leading//./slash", "s");
    assert_eq!(
        paths(&[below, above]),
        [
            "/abs",
            "/etc",
            "/etc/passwd",
            "/leading",
            "/leading/slash",
            "/lib",
            "/made",
            "/made/late",
            "/made/late/c",
            "/nowhere",
            "/out",
            "/usr",
            "/usr/lib",
            "/usr/lib/a",
            "/usr/lib/b"
        ]
    );
}

#[test]
fn names_of_one_file_are_counted() {
    let spool = spool();
    let below = Tar::default()
        .file("a", "content")
        .hard("b", "a")
        .hard("c", "./b")
        .hard("a", "c");
    let above = Tar::default()
        .file(".wh.a", "")
        .hard("d/e", "/b")
        .symlink("s", "d")
        .hard("f", "s/e");
    let tree = layered(spool.path(), &[below.end(), above.end()]).expect("a tree");
    for path in ["b", "c", "d/e", "f"] {
        assert_eq!(tree.at(path).expect("there").names, 4, "{path}");
    }
    assert!(tree.at("a").is_none());
}

#[test]
fn what_no_image_can_hold_is_refused_by_name() {
    let deep = vec!["d"; 257].join("/");
    let long = "x".repeat(256);
    let path = vec!["y".repeat(200); 21].join("/");
    let pax = |path: &str| Tar::default().pax(&[("path", path.as_bytes())]).file("x", "");
    let device = |major: u32, minor: u32| {
        let set = |header: &mut tar::Header| {
            header.set_device_major(major).expect("ustar");
            header.set_device_minor(minor).expect("ustar");
        };
        Tar::default().raw(b"dev", EntryType::Block, b"", set)
    };
    let loops = Tar::default().symlink("a", "b").symlink("b", "a");
    let big = vec![b'v'; 5000];
    let dots = "its path has `..` in it, which could lead out of the image";
    let name = "its name or target has a NUL, a line feed or a carriage return in it";
    let too_long = "its name is longer than 255 bytes, or its path than 4095";
    let link = "it is a hard link to something that is not there, or is a directory";
    let major = "a device has a major number of at most 4095 and a minor one of at most 65535";
    for (archive, message) in [
        (
            Tar::default().file("../etc/passwd", ""),
            format!("../etc/passwd: {dots}"),
        ),
        (Tar::default().file("a/../../b", ""), format!("a/../../b: {dots}")),
        (Tar::default().hard("a", "../b"), format!("a: {dots}")),
        (pax("a\nb"), format!("a\\nb: {name}")),
        (pax("a\rb"), format!("a\\rb: {name}")),
        (pax("a\0b"), format!("a\\x00b: {name}")),
        (
            Tar::default().pax(&[("linkpath", b"a\0b")]).symlink("l", "x"),
            format!("l: {name}"),
        ),
        (pax(&long), format!("{}…: {too_long}", &long[..200])),
        (pax(&path), format!("{}…: {too_long}", &path[..200])),
        (
            pax(&deep),
            format!("{}…: it is more than 256 directories deep", &deep[..200]),
        ),
        (
            Tar::default().file(".", ""),
            ".: the root of an image is a directory, and nothing else".into(),
        ),
        (
            Tar::default().symlink(".", "x"),
            ".: the root of an image is a directory, and nothing else".into(),
        ),
        (
            Tar::default().file("f", "").file("f/x", ""),
            "f/x: a part of its path is there already and is no directory".into(),
        ),
        (
            loops.clone().file("a/x", ""),
            "a/x: more than 40 symbolic links are on its path".into(),
        ),
        (Tar::default().hard("a", "none"), format!("a: {link}")),
        (Tar::default().dir("d").hard("a", "d"), format!("a: {link}")),
        (Tar::default().hard("a", "."), format!("a: {link}")),
        (
            Tar::default().symlink("a", ""),
            "a: a symbolic link leads to a path of 1 to 4095 bytes".into(),
        ),
        (device(4096, 0), format!("dev: {major}")),
        (device(0, 1 << 16), format!("dev: {major}")),
        (
            Tar::default().pax(&[("SCHILY.xattr.user.v", &big)]).file("a", ""),
            "a: its extended attributes take more than the 4000 bytes that ext4 has for them".into(),
        ),
        (
            Tar::default().file(".wh.", ""),
            ".wh.: a whiteout names what it hides".into(),
        ),
        (
            Tar::default().file("d/.wh...", ""),
            "d/.wh...: a whiteout names what it hides".into(),
        ),
    ] {
        let spool = spool();
        let mut tree = Tree::new(spool.path(), MOST);
        let error = add(&mut tree, &archive.end(), Meaning::Layer);
        let said = error.map_err(|error| super::said(&error));
        assert_eq!(said, Err(message));
    }
}

#[test]
fn content_is_bounded_zeros_are_holes_and_a_stop_is_heard() {
    use std::os::unix::fs::MetadataExt as _;
    let spool = spool();
    let file = |size: usize, byte: u8| {
        let archive = Tar::default().raw(b"f", EntryType::Regular, &vec![byte; size], |_| {});
        archive.end()
    };
    let mut tree = Tree::new(spool.path(), 2 << 20);
    add(&mut tree, &file(8 << 20, 0), Meaning::Plain).expect("holes count for nothing");
    let kept = std::fs::read_dir(spool.path())
        .expect("read")
        .next()
        .expect("a file")
        .expect("read");
    let kept = kept.metadata().expect("metadata");
    assert_eq!((kept.size(), kept.blocks()), (8 << 20, 0));
    for _ in 0..5 {
        add(&mut tree, &file(1 << 20, 1), Meaning::Plain).expect("what is replaced makes room");
    }
    let mut tree = Tree::new(spool.path().join("no").as_path(), 1 << 20);
    let error = add(&mut tree, &file(1, 1), Meaning::Plain).expect_err("nowhere to keep it");
    assert!(
        super::said(&error).ends_with("no/0 cannot be written: No such file or directory (os error 2)"),
        "{error}"
    );
    let other = tempfile::tempdir().expect("a directory");
    let mut tree = Tree::new(other.path(), 1 << 20);
    let error = add(&mut tree, &file((1 << 20) + 1, 1), Meaning::Plain).expect_err("too large");
    assert_eq!(
        super::said(&error),
        "the image has more than 1 MiB of content; --size-mb says how large it may be"
    );
    let mut archive = super::super::archive::Archive::new(&b""[..]);
    let stopped = tree.add(&mut archive, Meaning::Plain, &AtomicBool::new(true));
    assert!(stopped.is_err(), "an empty archive is cut off");
    let whole = Tar::default().file("a", "a").end();
    let mut archive = super::super::archive::Archive::new(whole.as_slice());
    let stopped = tree.add(&mut archive, Meaning::Plain, &AtomicBool::new(true));
    assert!(matches!(stopped, Err(TreeError::Stopped)));
}

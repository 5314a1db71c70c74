use std::path::{Path, PathBuf};
use std::process::Command;

use tar::EntryType;

use super::super::ext4::{Ext4Error, Need, make};
use super::super::tree::{Meaning, Tree};
use super::{MOST, Tar, add, layered};

/// Makes an image of a tree; `make` has e2fsck look it through.
fn image(tree: &Tree, work: &Path, size: Option<u64>) -> Result<PathBuf, Ext4Error> {
    let (need, image) = (Need::of(tree), work.join("image"));
    make(tree, need, need.size(size)?, &image, work)?;
    Ok(image)
}

/// What debugfs says of an image.
fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("/sbin/debugfs")
        .args(["-R", request])
        .arg(image)
        .output()
        .expect("debugfs runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The value behind a word in what debugfs says of a file.
fn field(stat: &str, name: &str) -> String {
    let after = stat.split_once(name).unwrap_or_else(|| panic!("no {name} in {stat}")).1;
    after.split_whitespace().next().expect("a value").to_owned()
}

#[test]
fn an_image_has_all_that_a_tree_has() {
    let spool = tempfile::tempdir().expect("a directory");
    let work = tempfile::tempdir().expect("a directory");
    let capability = b"\x01\x00\x00\x02\n\x00=\x00\n\n\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let long = "t".repeat(300);
    let large: Vec<u8> = (0..3_000_000_u32).map(|at| (at / 4096 % 251) as u8).collect();
    let mut sparse = vec![0; 2 << 20];
    sparse[1 << 20] = 7;
    let tar = Tar::default()
        .raw(b".", EntryType::Directory, b"", |header| header.set_mode(0o711))
        .pax(&[
            ("mtime", b"4500000000.123456789"),
            ("SCHILY.xattr.security.capability", capability),
        ])
        .raw(b"suid", EntryType::Regular, b"program", |header| {
            header.set_mode(0o4755);
            header.set_uid(1000);
            header.set_gid(70_000);
        })
        .raw(b"large", EntryType::Regular, &large, |_| {})
        .raw(b"sparse", EntryType::Regular, &sparse, |_| {})
        .file("empty", "")
        .file("<12>", "a number")
        .file("-x", "an option")
        .file("a \"quoted\" \\ name\t", "quotes")
        .raw("\u{e4}\u{f6}".as_bytes(), EntryType::Regular, b"umlauts", |_| {})
        .raw(b"\xff\xfe", EntryType::Regular, b"no UTF-8", |_| {})
        .symlink("short", "a \"b\" c")
        .pax(&[("linkpath", long.as_bytes())])
        .symlink("long", "x")
        .dir("d/e")
        .hard("d/e/second", "suid")
        .raw(b"null", EntryType::Char, b"", |header| {
            header.set_device_major(1).expect("ustar");
            header.set_device_minor(3).expect("ustar");
        })
        .raw(b"disk", EntryType::Block, b"", |header| {
            header.set_device_major(259).expect("ustar");
            header.set_device_minor(60_000).expect("ustar");
        })
        .raw(b"pipe", EntryType::Fifo, b"", |_| {})
        .raw(b"lost+found", EntryType::Directory, b"", |header| {
            header.set_mode(0o700)
        })
        .file("lost+found/x", "x");
    let tree = layered(spool.path(), &[tar.end()]).expect("a tree");
    let image = image(&tree, work.path(), None).expect("an image");
    for (path, content) in [
        ("/suid", &b"program"[..]),
        ("/d/e/second", b"program"),
        ("/large", &large),
        ("/sparse", &sparse),
        ("/empty", b""),
        ("/<12>", b"a number"),
        ("/-x", b"an option"),
        ("/\u{e4}\u{f6}", b"umlauts"),
        ("/lost+found/x", b"x"),
    ] {
        let to = work.path().join("read");
        debugfs(&image, &format!("dump \"{path}\" {}", to.display()));
        assert!(std::fs::read(&to).expect("read") == content, "{path}");
    }
    assert_eq!(debugfs(&image, "cat \"/a \"\"quoted\"\" \\ name\t\""), "quotes");
    let suid = debugfs(&image, "stat /suid");
    assert_eq!(
        (field(&suid, "Mode:"), field(&suid, "User:"), field(&suid, "Group:")),
        ("04755".into(), "1000".into(), "70000".into())
    );
    assert_eq!(field(&suid, "Links:"), "2");
    assert_eq!(
        field(&suid, "Inode:"),
        field(&debugfs(&image, "stat /d/e/second"), "Inode:")
    );
    // 4500000000 is 0x1_0c38_8d00: the epoch's bit and the nanoseconds are in the second word.
    assert_eq!(
        field(&suid, "mtime:"),
        format!("0x0c388d00:{:08x}", (123_456_789 << 2) | 1)
    );
    assert_eq!(field(&debugfs(&image, "stat /"), "Mode:"), "0711");
    assert_eq!(field(&debugfs(&image, "stat /lost+found"), "Mode:"), "0700");
    let hex: String = capability.iter().map(|byte| format!("{byte:02x} ")).collect();
    let found = debugfs(&image, "ea_get -x /suid security.capability");
    assert!(found.contains(hex.trim_end()), "{found}");
    assert!(debugfs(&image, "stat /short").contains("Fast link dest: \"a \"b\" c\""));
    assert_eq!(field(&debugfs(&image, "stat /long"), "Size:"), "300");
    assert!(debugfs(&image, "stat /null").contains("Device major/minor number: 01:03"));
    assert!(debugfs(&image, "stat /disk").contains("Device major/minor number: 259:60000"));
    assert_eq!(field(&debugfs(&image, "stat /pipe"), "Type:"), "FIFO");
    // Sparse files stay so.
    let blocks: u64 = field(&debugfs(&image, "stat /sparse"), "Blockcount:")
        .parse()
        .expect("a number");
    assert!(blocks <= 16, "{blocks} sectors of a file with one block");
}

#[test]
fn directories_of_many_names_and_many_links_fit_into_the_size_that_is_computed() {
    let spool = tempfile::tempdir().expect("a directory");
    let work = tempfile::tempdir().expect("a directory");
    let mut tar = Tar::default().file("origin", "o");
    for number in 0..3000 {
        let name = format!("{number:090}");
        tar = match number % 3 {
            0 => tar.hard(&name, "origin"),
            1 => tar.file(&name, &"x".repeat(4097)),
            _ => tar.symlink(&name, "origin"),
        };
    }
    let tree = layered(spool.path(), &[tar.end()]).expect("a tree");
    let image = image(&tree, work.path(), None).expect("an image");
    assert_eq!(field(&debugfs(&image, "stat /origin"), "Links:"), "1001");
    let stats = debugfs(&image, "stats");
    let number = |name: &str| field(&stats, name).parse::<u64>().expect("a number");
    let free = (number("Free blocks:") * 4096) >> 20;
    // What is asked for besides the content, and not much more.
    assert!((60..100).contains(&free), "{free} MiB are free");
}

#[test]
fn a_size_that_is_too_small_and_what_debugfs_cannot_do_are_errors() {
    let spool = tempfile::tempdir().expect("a directory");
    let mut tree = Tree::new(spool.path(), MOST);
    let content = vec![1; 20 << 20];
    let tar = Tar::default().raw(b"f", EntryType::Regular, &content, |_| {});
    add(&mut tree, &tar.end(), Meaning::Plain).expect("added");
    let work = tempfile::tempdir().expect("a directory");
    let error = image(&tree, work.path(), Some(30)).expect_err("too small");
    let said = super::said(&error);
    assert!(
        said.starts_with("the image needs 4") && said.ends_with(" MiB at least, and --size-mb is 30"),
        "{said}"
    );
    // Smaller than what it needs, whatever was computed: debugfs says so on its way, and nothing else.
    let need = Need::of(&tree);
    let error = make(&tree, need, 30, &work.path().join("image"), work.path()).expect_err("does not fit");
    assert!(
        matches!(
            error,
            Ext4Error::Tool {
                tool: "debugfs" | "mke2fs",
                ..
            }
        ),
        "{}",
        super::said(&error)
    );
}

#[test]
fn a_directory_becomes_the_image_of_its_files() {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    let root = tempfile::tempdir().expect("a directory");
    let at = |path: &str| root.path().join(path);
    fs::create_dir_all(at("a/b")).expect("made");
    fs::write(at("a/file"), "content").expect("written");
    fs::set_permissions(at("a/file"), fs::Permissions::from_mode(0o4711)).expect("set");
    fs::hard_link(at("a/file"), at("a/b/second")).expect("linked");
    symlink("/etc/passwd", at("out")).expect("linked");
    nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRUSR).expect("made");
    drop(std::os::unix::net::UnixListener::bind(at("socket")).expect("bound"));
    let spool = tempfile::tempdir().expect("a directory");
    let mut tree = Tree::new(spool.path(), MOST);
    let stop = std::sync::atomic::AtomicBool::new(false);
    super::super::directory::add(&mut tree, root.path(), &stop).expect("read");
    let listing = super::listing(&tree);
    let shown: Vec<_> = listing
        .iter()
        .map(|(path, what)| (path.as_str(), what.as_str()))
        .collect();
    assert_eq!(
        shown,
        [
            ("/a", "directory"),
            ("/a/b", "directory"),
            ("/a/b/second", "content"),
            ("/a/file", "content"),
            ("/out", "-> /etc/passwd"),
            ("/pipe", "fifo"),
        ]
    );
    let file = tree.at("a/file").expect("there");
    assert_eq!((file.names, file.attributes.mode), (2, 0o4711));
    assert_eq!(file.attributes.uid, nix::unistd::geteuid().as_raw());
    assert_eq!(tree.left_out.sockets, 1);
    let error = super::super::directory::add(&mut tree, &at("none"), &stop).expect_err("not there");
    assert!(
        super::said(&error).ends_with("none/ cannot be read: No such file or directory (os error 2)"),
        "{error}"
    );
}

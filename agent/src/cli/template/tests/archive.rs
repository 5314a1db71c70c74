use std::io::Read;

use tar::EntryType;

use super::super::archive::{Archive, ArchiveError, Entry, EntryKind, MAX_NAME, MAX_PAX, Time};
use super::{Tar, record};

/// All entries with their contents.
fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, ArchiveError> {
    let mut archive = Archive::new(archive);
    let mut found = Vec::new();
    while let Some(entry) = archive.next()? {
        let mut content = Vec::new();
        archive.read_to_end(&mut content).map_err(ArchiveError::Read)?;
        found.push((entry, content));
    }
    Ok(found)
}

fn refusal(archive: Tar) -> String {
    let error = read(&archive.end()).expect_err("refused");
    super::said(&error)
}

#[test]
fn what_another_program_wrote_is_read() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o4755);
    header.set_uid(1000);
    // In base 256: the field has no room for its octal digits.
    header.set_gid(70_000_000);
    header.set_mtime(1_700_000_000);
    builder.append_data(&mut header, &long, &b"hello"[..]).expect("written");
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", &long).expect("written");
    let found = read(&builder.into_inner().expect("ended")).expect("read");
    let [(file, content), (link, _)] = found.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!(
        (file.path.as_slice(), file.kind, content.as_slice()),
        (long.as_bytes(), EntryKind::File, &b"hello"[..])
    );
    assert_eq!((file.mode, file.uid, file.gid), (0o4755, 1000, 70_000_000));
    assert_eq!((link.kind, link.link.as_slice()), (EntryKind::Symlink, long.as_bytes()));
}

#[test]
fn pax_records_count_for_more_than_the_header_and_may_be_binary() {
    let capability = b"\x01\x00\x00\x02\n\x00=\x00\n\n\x00\x00";
    let name = "\u{e4}/".to_owned() + &"x".repeat(150);
    let archive = Tar::default()
        .raw(b"pax", EntryType::XGlobalHeader, &record("uid", b"7"), |_| {})
        .pax(&[
            ("path", name.as_bytes()),
            ("size", b"3"),
            ("gid", b"4294967295"),
            ("mtime", b"-5.25"),
            ("SCHILY.xattr.security.capability", capability),
            ("comment", b"x"),
        ])
        .raw(b"short", EntryType::Regular, b"abc", |header| header.set_size(77))
        .file("next", "n")
        .end();
    let found = read(&archive).expect("read");
    let (first, content) = &found[0];
    assert_eq!(
        (first.path.as_slice(), content.as_slice()),
        (name.as_bytes(), &b"abc"[..])
    );
    assert_eq!((first.uid, first.gid), (7, u32::MAX));
    assert_eq!(
        first.modified,
        Time {
            seconds: -5,
            nanoseconds: 250_000_000
        }
    );
    assert_eq!(first.xattrs[&b"security.capability"[..]], capability);
    let (next, _) = &found[1];
    assert_eq!((next.path.as_slice(), next.uid, next.gid), (&b"next"[..], 7, 0));
    assert!(next.xattrs.is_empty());
}

#[test]
fn what_has_no_content_has_none_whatever_its_size_says() {
    let archive = Tar::default()
        .raw(b"a", EntryType::Symlink, b"", |header| header.set_size(1 << 40))
        .raw(b"old/", EntryType::new(0), b"", |_| {})
        .file("b", "b")
        .end();
    let kinds: Vec<_> = read(&archive)
        .expect("read")
        .into_iter()
        .map(|(entry, _)| entry.kind)
        .collect();
    assert_eq!(kinds, [EntryKind::Symlink, EntryKind::Directory, EntryKind::File]);
}

#[test]
fn an_archive_that_is_cut_off_anywhere_is_refused_there() {
    let whole = Tar::default()
        .pax(&[("path", b"a")])
        .file("x", "0123456789")
        .dir("d")
        .end();
    read(&whole).expect("whole");
    // All but the last block, of zeros like the one before it.
    for length in 0..whole.len() - 1023 {
        let error = read(&whole[..length]).expect_err("cut off");
        let text = super::said(&error);
        assert!(
            text.contains("cut off") || text.contains("unexpected end of file"),
            "{length}: {text}"
        );
    }
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let file = |change: fn(&mut tar::Header)| Tar::default().raw(b"a\nb", EntryType::Regular, b"", change);
    let pax = |content: &[u8]| {
        Tar::default()
            .raw(b"pax", EntryType::XHeader, content, |_| {})
            .file("a", "")
    };
    let kind = |kind: u8| Tar::default().raw(b"a", EntryType::new(kind), b"", |_| {});
    let large =
        |kind: u8, size: u64| Tar::default().raw(b"a", EntryType::new(kind), b"", |header| header.set_size(size));
    for (archive, message) in [
        (
            Tar(vec![b'x'; 512]),
            "no tar archive, or a damaged one: the header at byte 0 has a wrong checksum",
        ),
        (
            file(|header| header.as_old_mut().uid = *b"not one\0"),
            "a\\nb: its uid is no number that a file can have",
        ),
        (
            file(|header| header.as_old_mut().size = [b'9'; 12]),
            "a\\nb: its size is no number that a file can have",
        ),
        (
            Tar::default().pax(&[("uid", b"4294967296")]).file("a", ""),
            "a: its uid is no number that a file can have",
        ),
        (
            Tar::default().pax(&[("mtime", b"1.x")]).file("a", ""),
            "a: its mtime is no number that a file can have",
        ),
        (
            kind(b'S'),
            "a: sparse entries cannot be read; make the archive without --sparse",
        ),
        (
            Tar::default().pax(&[("GNU.sparse.major", b"1")]).file("a", ""),
            "a: sparse entries cannot be read; make the archive without --sparse",
        ),
        (kind(b'M'), "a: entries of type 'M' cannot be read"),
        (pax(b"99 a=b\n"), "the pax header at byte 0 is damaged"),
        (pax(b"a=b\n"), "the pax header at byte 0 is damaged"),
        (pax(b"6 a=bc"), "the pax header at byte 0 is damaged"),
        (pax(b"0 a=b\n"), "the pax header at byte 0 is damaged"),
        (
            large(b'x', MAX_PAX + 1),
            "the pax header at byte 0 has 1048577 bytes, more than 1048576",
        ),
        (
            large(b'L', MAX_NAME + 1),
            "the name at byte 0 has 65537 bytes, more than 65536",
        ),
        (
            large(b'K', u64::MAX),
            "the name at byte 0 has 18446744073709551615 bytes, more than 65536",
        ),
    ] {
        assert_eq!(refusal(archive), message);
    }
}

//! What is in files: `/files` of a real envd, up and down.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{Envd, can_become_another_user};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

const RAW: (&str, &str) = ("Content-Type", "application/octet-stream");
const GZIP: (&str, &str) = ("Content-Encoding", "gzip");
const FORM: (&str, &str) = ("Content-Type", "multipart/form-data; boundary=XX");

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", self.text()))
    }
}

/// One call, with a body of any bytes; the answer's body without its chunks.
fn call(envd: &Envd, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let length = format!("Content-Length: {}\r\n", body.len());
    send(envd, method, path, headers, &length, body)
}

fn send(envd: &Envd, method: &str, path: &str, headers: &[(&str, &str)], length: &str, body: &[u8]) -> Answer {
    let extra: String = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let mut stream = TcpStream::connect(envd.address).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: envd\r\nConnection: close\r\n{length}{extra}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    // The server may refuse before it has read all.
    stream.write_all(body).ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    parse(&answer)
}

fn parse(answer: &[u8]) -> Answer {
    let end = answer
        .windows(4)
        .position(|bytes| bytes == b"\r\n\r\n")
        .expect("a head");
    let head = String::from_utf8(answer[..end].to_vec()).unwrap().to_ascii_lowercase();
    let mut body = answer[end + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = unchunk(&body);
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend_from_slice(&bytes[end + 2..end + 2 + size]);
        bytes = &bytes[end + 2 + size + 2..];
    }
    body
}

fn compressed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn form(files: &[(&str, &str)]) -> Vec<u8> {
    let part = |(name, text): &(&str, &str)| {
        format!("--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{text}\r\n")
    };
    let mut body: String = files.iter().map(part).collect();
    body += "--XX--\r\n";
    body.into_bytes()
}

/// Names in the home of the user that envd runs as.
fn home(envd: &Envd) -> Vec<String> {
    let entries = fs::read_dir(envd.root.join("home")).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_goes_up_and_comes_down_as_it_was() {
    let envd = Envd::start();
    let up = call(&envd, "POST", "/files?path=a/b/file.txt", &[RAW], b"some text");
    let path = envd.root.join("home/a/b/file.txt");
    let expected = serde_json::json!([{"name": "file.txt", "type": "file", "path": path.to_str().unwrap()}]);
    assert_eq!((up.status, up.json()), (200, expected));
    let down = call(&envd, "GET", "/files?path=~/a/b/file.txt", &[], b"");
    assert_eq!((down.status, down.text().as_str()), (200, "some text"));
    for part in [
        "content-length: 9\r\n",
        "content-disposition: inline; filename=\"file.txt\"",
        "content-type: text/plain",
        "last-modified: ",
    ] {
        assert!(down.head.contains(part), "{part}: {}", down.head);
    }
    let head = call(&envd, "HEAD", "/files?path=a/b/file.txt", &[], b"");
    assert!(head.status == 200 && head.head.contains("content-length: 9") && head.body.is_empty());
    let part = call(&envd, "GET", "/files?path=a/b/file.txt", &[("Range", "bytes=5-6")], b"");
    assert_eq!((part.status, part.text().as_str()), (206, "te"));
    assert!(part.head.contains("content-range: bytes 5-6/9"), "{}", part.head);
    let outside = call(&envd, "GET", "/files?path=a/b/file.txt", &[("Range", "bytes=9-")], b"");
    assert!(outside.status == 416 && outside.head.contains("content-range: bytes */9"));
    assert_eq!(call(&envd, "PUT", "/files?path=x", &[], b"").status, 405);
    // The length of what the kernel makes up is not known before.
    let made_up = call(&envd, "GET", "/files?path=/proc/self/status", &[], b"");
    assert!(
        made_up.status == 200 && made_up.text().contains("VmRSS"),
        "{}",
        made_up.text()
    );
}

#[test]
fn a_form_carries_several_files_and_each_goes_to_its_name() {
    let envd = Envd::start();
    let body = form(&[("one", "1"), ("sub/two", "22\r\n--X not a boundary")]);
    let up = call(&envd, "POST", "/files", &[FORM], &body);
    assert_eq!(up.status, 200, "{}", up.text());
    assert_eq!(up.json().as_array().unwrap().len(), 2);
    let read = |name: &str| fs::read_to_string(envd.root.join("home").join(name)).unwrap();
    assert_eq!(
        (read("one").as_str(), read("sub/two").as_str()),
        ("1", "22\r\n--X not a boundary")
    );
    let up = call(
        &envd,
        "POST",
        "/files?path=named",
        &[FORM, GZIP],
        &compressed(&form(&[("x", "33")])),
    );
    assert_eq!((up.status, read("named").as_str()), (200, "33"));
    let twice = call(
        &envd,
        "POST",
        "/files?path=twice",
        &[FORM],
        &form(&[("x", "4"), ("y", "5")]),
    );
    assert_eq!((twice.status, read("twice").as_str()), (400, "4"));
    // Fields of other names are passed over.
    let body = b"--XX\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nhello\r\n--XX--\r\n";
    let up = call(&envd, "POST", "/files", &[FORM], body);
    assert_eq!((up.status, up.text().as_str()), (200, "[]"));
}

#[test]
fn compression_works_both_ways() {
    let envd = Envd::start();
    let text = "many times the same ".repeat(10_000);
    let up = call(
        &envd,
        "POST",
        "/files?path=file",
        &[RAW, GZIP],
        &compressed(text.as_bytes()),
    );
    assert_eq!(up.status, 200, "{}", up.text());
    assert_eq!(fs::read_to_string(envd.root.join("home/file")).unwrap(), text);
    let down = call(
        &envd,
        "GET",
        "/files?path=file",
        &[("Accept-Encoding", "gzip, deflate")],
        b"",
    );
    assert!(down.head.contains("content-encoding: gzip") && down.body.len() < text.len() / 10);
    let mut plain = String::new();
    GzDecoder::new(down.body.as_slice()).read_to_string(&mut plain).unwrap();
    assert_eq!(plain, text);
    let none = call(
        &envd,
        "GET",
        "/files?path=file",
        &[("Accept-Encoding", "identity;q=0")],
        b"",
    );
    assert_eq!(none.status, 406);
    let unknown = call(
        &envd,
        "POST",
        "/files?path=file",
        &[RAW, ("Content-Encoding", "br")],
        b"x",
    );
    assert_eq!(unknown.status, 415);
}

#[test]
fn a_body_that_breaks_off_changes_nothing_and_leaves_nothing() {
    let envd = Envd::start();
    fs::write(envd.root.join("home/old"), "before").unwrap();
    let gzip = compressed(&vec![b'x'; 100_000]);
    let whole = form(&[("old", "new text")]);
    let truncated = [
        ("gzip", vec![RAW, GZIP], gzip[..gzip.len() - 4].to_vec()),
        ("gzip without its head", vec![RAW, GZIP], gzip[4..].to_vec()),
        (
            "gzip with more behind it",
            vec![RAW, GZIP],
            [gzip.as_slice(), b"more"].concat(),
        ),
        ("a form without its end", vec![FORM], whole[..whole.len() - 10].to_vec()),
        (
            "a form without any boundary",
            vec![FORM],
            b"nothing of the kind".to_vec(),
        ),
        ("an empty form", vec![FORM], Vec::new()),
        (
            "a form without a boundary's name",
            vec![("Content-Type", "multipart/form-data")],
            whole.clone(),
        ),
        ("no kind of body", vec![], b"x".to_vec()),
        ("json", vec![("Content-Type", "application/json")], b"{}".to_vec()),
    ];
    for (what, headers, body) in truncated {
        for path in ["old", "new"] {
            let answer = call(&envd, "POST", &format!("/files?path={path}"), &headers, &body);
            assert_eq!(answer.status, 400, "{what}: {}", answer.text());
            assert!(answer.json()["message"].is_string(), "{what}");
        }
    }
    // A length that promises more than comes.
    let mut stream = TcpStream::connect(envd.address).unwrap();
    let head = "POST /files?path=old HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n";
    stream
        .write_all(format!("{head}Content-Length: 1000\r\n\r\nhalf").as_bytes())
        .unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).ok();
    // A sender that goes away.
    let mut stream = TcpStream::connect(envd.address).unwrap();
    stream
        .write_all(format!("{head}Content-Length: 1000\r\n\r\nhalf").as_bytes())
        .unwrap();
    drop(stream);
    assert_eq!(home(&envd), ["old"]);
    assert_eq!(fs::read_to_string(envd.root.join("home/old")).unwrap(), "before");
}

#[test]
fn bad_paths_and_users_are_refused_with_their_codes() {
    let envd = Envd::start();
    fs::create_dir(envd.root.join("home/directory")).unwrap();
    fs::write(envd.root.join("home/file"), "x").unwrap();
    let long = "n".repeat(300);
    let cases = [
        ("GET", "path=missing".to_owned(), 404),
        ("GET", "path=directory".to_owned(), 400),
        ("GET", String::new(), 400),
        ("GET", "path=/dev/zero".to_owned(), 400),
        ("GET", "path=a%00b".to_owned(), 400),
        ("GET", "path=~other/x".to_owned(), 400),
        ("GET", format!("path={long}"), 400),
        ("GET", format!("path=/{}", "a/".repeat(3000)), 400),
        ("GET", "path=file/below".to_owned(), 404),
        ("GET", "path=file&username=no-such-user".to_owned(), 401),
        ("GET", "path=file&signature_expiration=soon".to_owned(), 400),
        ("POST", String::new(), 400),
        ("POST", "path=directory".to_owned(), 400),
        ("POST", "path=/".to_owned(), 400),
        ("POST", "path=a%00b".to_owned(), 400),
        ("POST", "path=file/below".to_owned(), 400),
        ("POST", format!("path={long}"), 400),
        ("POST", "path=x&username=no-such-user".to_owned(), 401),
    ];
    for (method, query, status) in cases {
        let answer = call(&envd, method, &format!("/files?{query}"), &[RAW], b"x");
        assert_eq!(answer.status, status, "{method} {query}: {}", answer.text());
        assert!(answer.json()["code"].is_string() && answer.json()["message"].is_string());
    }
    assert_eq!(home(&envd), ["directory", "file"]);
    // `..` leads where the kernel says.
    let answer = call(&envd, "GET", "/files?path=directory/../file", &[], b"");
    assert_eq!((answer.status, answer.text().as_str()), (200, "x"));
}

#[test]
fn a_signature_opens_one_path_for_one_thing_until_it_expires() {
    let envd = Envd::start();
    fs::write(envd.root.join("home/file"), "text").unwrap();
    let init = call(&envd, "POST", "/init", &[], br#"{"accessToken": "secret"}"#);
    assert_eq!(init.status, 204);
    let sign = |text: String| {
        use base64::Engine as _;
        use sha2::Digest as _;
        let signature = base64::prelude::BASE64_STANDARD_NO_PAD.encode(sha2::Sha256::digest(text));
        format!("v1_{}", signature.replace('+', "%2B").replace('/', "%2F"))
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (later, before) = (now + 1000, now - 10);
    let read = sign("file:read::secret".to_owned());
    let timed = sign(format!("file:read::secret:{later}"));
    let expired = sign(format!("file:read::secret:{before}"));
    let negative = sign("file:read::secret:-5".to_owned());
    let user = sign("file:read:tester:secret".to_owned());
    let write = sign("file:write::secret".to_owned());
    let cases = [
        ("GET", format!("path=file&signature={read}"), 200),
        ("HEAD", format!("path=file&signature={read}"), 200),
        (
            "GET",
            format!("path=file&signature={timed}&signature_expiration={later}"),
            200,
        ),
        ("GET", format!("path=file&username=tester&signature={user}"), 200),
        ("POST", format!("path=file&signature={write}"), 200),
        ("GET", "path=file".to_owned(), 401),
        ("GET", "path=file&signature=".to_owned(), 401),
        ("GET", format!("path=./file&signature={read}"), 401),
        ("GET", format!("path=file&username=tester&signature={read}"), 401),
        ("GET", format!("path=file&signature={write}"), 401),
        ("POST", format!("path=file&signature={read}"), 401),
        ("GET", format!("path=file&signature={timed}"), 401),
        (
            "GET",
            format!("path=file&signature={timed}&signature_expiration={now}"),
            401,
        ),
        (
            "GET",
            format!("path=file&signature={read}&signature_expiration={later}"),
            401,
        ),
        (
            "GET",
            format!("path=file&signature={expired}&signature_expiration={before}"),
            401,
        ),
        (
            "GET",
            format!("path=file&signature={negative}&signature_expiration=-5"),
            401,
        ),
    ];
    for (method, query, status) in cases {
        let answer = call(&envd, method, &format!("/files?{query}"), &[RAW], b"");
        assert_eq!(answer.status, status, "{method} {query}: {}", answer.text());
    }
    // A token that is wrong is not made good by a signature, and nothing else takes one.
    let query = format!("/files?path=file&signature={read}");
    assert_eq!(
        call(&envd, "GET", &query, &[("X-Access-Token", "wrong")], b"").status,
        401
    );
    assert_eq!(
        call(&envd, "GET", "/files?path=file", &[("X-Access-Token", "secret")], b"").status,
        200
    );
    assert_eq!(call(&envd, "GET", &query, &[("X-Access-Token", "")], b"").status, 200);
    assert_eq!(
        call(&envd, "GET", "/files?path=file", &[("X-Access-Token", "")], b"").status,
        401
    );
    let compose = format!("/files/compose?signature={write}");
    assert_eq!(call(&envd, "POST", &compose, &[], b"{}").status, 401);
    assert_eq!(
        call(&envd, "GET", &format!("/envs?signature={read}"), &[], b"").status,
        401
    );
}

#[test]
fn parts_are_joined_in_their_order_and_go() {
    let envd = Envd::start();
    for (name, text) in [("p1", "one "), ("p2", "two "), ("p3", "three")] {
        fs::write(envd.root.join("home").join(name), text).unwrap();
    }
    let compose = |body: &str| call(&envd, "POST", "/files/compose", &[], body.as_bytes());
    for (body, status) in [
        ("{}", 400),
        (r#"{"source_paths": [], "destination": "x"}"#, 400),
        (r#"{"source_paths": ["p1"], "destination": ""}"#, 400),
        (r#"{"source_paths": ["p1"], "destination": "p1"}"#, 400),
        (r#"{"source_paths": ["p1", "missing"], "destination": "x"}"#, 404),
        (r#"{"source_paths": ["."], "destination": "x"}"#, 400),
        (
            r#"{"source_paths": ["p1"], "destination": "x", "username": "nobody-here"}"#,
            401,
        ),
    ] {
        let answer = compose(body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
    }
    assert_eq!(home(&envd), ["p1", "p2", "p3"]);
    let answer = compose(r#"{"source_paths": ["p1", "p2", "p3"], "destination": "sub/whole"}"#);
    assert_eq!((answer.status, answer.json()["name"].as_str()), (200, Some("whole")));
    assert_eq!(home(&envd), ["sub"]);
    assert_eq!(
        fs::read_to_string(envd.root.join("home/sub/whole")).unwrap(),
        "one two three"
    );
}

#[test]
fn metadata_comes_with_the_file_and_goes_with_the_next() {
    let envd = Envd::start();
    let headers = [RAW, ("X-Metadata-Purpose", "test"), ("X-Metadata-Two", "2")];
    let up = call(&envd, "POST", "/files?path=file", &headers, b"x");
    assert_eq!(up.status, 200, "{}", up.text());
    if up.json()[0].get("metadata").is_none() {
        // A filesystem without attributes: nothing is claimed that is not there.
        assert!(
            xattr::get(envd.root.join("home/file"), "user.e2b.purpose")
                .ok()
                .flatten()
                .is_none()
        );
        return;
    }
    assert_eq!(
        up.json()[0]["metadata"],
        serde_json::json!({"purpose": "test", "two": "2"})
    );
    let up = call(&envd, "POST", "/files?path=file", &[RAW, ("X-Metadata-Two", "3")], b"y");
    assert_eq!(up.json()[0]["metadata"], serde_json::json!({"two": "3"}));
    let long = "v".repeat(5000);
    let refused = call(
        &envd,
        "POST",
        "/files?path=file",
        &[RAW, ("X-Metadata-Two", &long)],
        b"z",
    );
    assert_eq!(refused.status, 400);
    assert_eq!(fs::read_to_string(envd.root.join("home/file")).unwrap(), "y");
}

#[test]
fn files_are_their_user_s_and_what_is_closed_to_it_stays_closed() {
    if !can_become_another_user() {
        return;
    }
    let envd = Envd::start();
    let open = envd.root.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let query = |path: &std::path::Path| format!("/files?username=nobody&path={}", path.display());
    let up = call(&envd, "POST", &query(&open.join("sub/file")), &[RAW], b"x");
    assert_eq!(up.status, 200, "{}", up.text());
    for path in [open.join("sub"), open.join("sub/file")] {
        let made = fs::metadata(&path).unwrap();
        assert_eq!((made.uid(), made.gid()), (65534, 65534), "{path:?}");
    }
    assert_eq!(fs::metadata(open.join("sub/file")).unwrap().mode() & 0o777, 0o644);
    let secret = envd.root.join("secret");
    fs::write(&secret, "root's").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    for (method, path) in [
        ("GET", secret.clone()),
        ("POST", secret.clone()),
        ("POST", envd.root.join("new")),
    ] {
        let answer = call(&envd, method, &query(&path), &[RAW], b"x");
        assert_eq!(answer.status, 403, "{method} {path:?}: {}", answer.text());
    }
    assert_eq!(fs::read_to_string(&secret).unwrap(), "root's");
    // A file of its own in a directory that is not keeps its place and its owner.
    let own = envd.root.join("own");
    fs::write(&own, "before").unwrap();
    std::os::unix::fs::chown(&own, Some(65534), Some(65534)).unwrap();
    assert_eq!(call(&envd, "POST", &query(&own), &[RAW], b"after").status, 200);
    assert_eq!(fs::read_to_string(&own).unwrap(), "after");
}

#[test]
fn a_full_disk_is_507_and_loses_nothing() {
    if !can_become_another_user() {
        return;
    }
    let envd = Envd::start();
    let disk = envd.root.join("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = nix::mount::mount(
        Some("none"),
        &disk,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=1m"),
    );
    if mounted.is_err() {
        // In a container that may not mount.
        return;
    }
    let path = disk.join("file");
    fs::write(&path, "before").unwrap();
    let url = |name: &str| format!("/files?path={}", disk.join(name).display());
    let big = vec![b'x'; 3 << 20];
    let answers = [
        call(&envd, "POST", &url("file"), &[RAW], &big).status,
        call(&envd, "POST", &url("new"), &[RAW], &big).status,
        // There is room for it once, and not a second time.
        call(&envd, "POST", &url("file"), &[RAW], &big[..700 << 10]).status,
    ];
    let kept = fs::read_to_string(&path).unwrap();
    let names = fs::read_dir(&disk).unwrap().count();
    nix::mount::umount(&disk).unwrap();
    assert_eq!(answers, [507, 507, 507]);
    assert_eq!((kept.as_str(), names), ("before", 1));
}

#[test]
fn files_larger_than_memory_go_both_ways_in_bounded_memory() {
    let envd = Envd::start();
    let big = vec![b'x'; 64 << 20];
    call(&envd, "POST", "/files?path=small", &[RAW], b"x");
    let before = envd.peak_memory();
    let grown = || envd.peak_memory() - before;
    assert_eq!(call(&envd, "POST", "/files?path=big", &[RAW], &big).status, 200);
    assert!(grown() < 16 << 10, "raw: {} KiB", grown());
    let mut body = b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"form\"\r\n\r\n".to_vec();
    body.extend_from_slice(&big);
    body.extend_from_slice(b"\r\n--XX--\r\n");
    assert_eq!(call(&envd, "POST", "/files", &[FORM], &body).status, 200);
    assert!(grown() < 16 << 10, "a form: {} KiB", grown());
    let bomb = compressed(&big);
    assert_eq!(call(&envd, "POST", "/files?path=bomb", &[RAW, GZIP], &bomb).status, 200);
    assert!(grown() < 16 << 10, "compressed: {} KiB", grown());
    for name in ["big", "form", "bomb"] {
        assert_eq!(
            fs::metadata(envd.root.join("home").join(name)).unwrap().len(),
            64 << 20,
            "{name}"
        );
    }
    let down = call(&envd, "GET", "/files?path=big", &[], b"");
    assert!(down.body == big, "what came down is not what went up");
    let down = call(&envd, "GET", "/files?path=big", &[("Accept-Encoding", "gzip")], b"");
    let mut plain = Vec::new();
    GzDecoder::new(down.body.as_slice()).read_to_end(&mut plain).unwrap();
    assert!(plain == big);
    // One without any boundary is not taken into memory either.
    assert_eq!(call(&envd, "POST", "/files", &[FORM], &big).status, 400);
    assert!(grown() < 16 << 10, "all: {} KiB", grown());
}

#[test]
fn a_frozen_guest_takes_files_once_it_is_thawed() {
    let envd = Envd::start();
    assert_eq!(call(&envd, "POST", "/fsfreeze", &[], b"").status, 204);
    let address = envd.address;
    let upload = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let head = "POST /files?path=file HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n";
        let kind = "Content-Type: application/octet-stream\r\n\r\nx";
        stream.write_all(format!("{head}{kind}").as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let early = stream.read(&mut [0; 16]);
        stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
        (early.is_err(), stream)
    });
    let (waited, mut stream) = upload.join().unwrap();
    assert!(waited && home(&envd).is_empty());
    assert_eq!(call(&envd, "POST", "/fsthaw", &[], b"").status, 204);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(parse(&answer).status, 200);
    assert_eq!(home(&envd), ["file"]);
}

#[test]
fn what_envd_does_not_do_is_501() {
    let envd = Envd::start();
    for path in ["/freeze", "/unfreeze", "/upgrade"] {
        let answer = call(&envd, "POST", path, &[], b"");
        assert_eq!(
            (answer.status, answer.json()["code"].as_str()),
            (501, Some("unimplemented")),
            "{path}"
        );
    }
}

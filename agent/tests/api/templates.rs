//! Templates that are imported, and what is to be known of them. Nothing is booted.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use roost_agent::config::Config;
use roost_agent::tls;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{Agent, TEAM, enveloped};

const IMPORT: &str = "/roost.v1.RoostService/ImportTemplate";
const TEMPLATE: &str = "22222222-2222-3333-4444-555555555555";

fn header(length: u64, data: u64) -> Value {
    json!({ "header": { "teamId": TEAM, "templateId": TEMPLATE, "name": "web", "length": length, "dataBytes": data } })
}

fn piece(offset: u64, size: usize) -> Value {
    json!({ "piece": { "offset": offset, "data": BASE64_STANDARD.encode(vec![7; size]) } })
}

fn end(digest: &str) -> Value {
    json!({ "end": { "digest": digest } })
}

fn stream(messages: &[Value]) -> Vec<u8> {
    messages
        .iter()
        .flat_map(|message| enveloped(&message.to_string()))
        .collect()
}

impl Agent {
    /// The answer to an import of these messages: what was made, or code and message of the error.
    async fn import(&self, messages: &[Value]) -> Result<Value, (String, String)> {
        let (_, body) = self.post(IMPORT, "application/connect+json", stream(messages)).await;
        let mut answer = Value::Null;
        let mut rest = &body[..];
        while let [flags, a, b, c, d, more @ ..] = rest {
            let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
            let message: Value = serde_json::from_slice(&more[..length]).expect("JSON");
            rest = &more[length..];
            if flags & 2 == 0 {
                answer = message;
            } else if let Some(error) = message.get("error") {
                let word = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                return Err((word("code"), word("message")));
            }
        }
        assert!(answer.is_object(), "{}", String::from_utf8_lossy(&body));
        Ok(answer)
    }

    pub(super) fn team(&self) -> PathBuf {
        let teams = fs::read_dir(self.dir.path().join("lib/images/teams"));
        let team = teams.into_iter().flatten().flatten().map(|entry| entry.path());
        team.last().unwrap_or_else(|| self.dir.path().join("none"))
    }

    /// What there is of templates, made or in the making.
    pub(super) fn on_disk(&self) -> Vec<String> {
        let names = fs::read_dir(self.team()).into_iter().flatten().flatten();
        names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    async fn lists(&self) -> Value {
        let output = self.roost(&["template", "ls", "--json"]).await;
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Runs the command line with a directory for what is on the way, and this on standard input.
    pub(super) async fn build(&self, work: &Path, args: &[&str], input: Vec<u8>) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_roost"));
        command
            .args(["--host", &self.address.to_string(), "--pki"])
            .arg(self.pki());
        command.args(["template", "build"]).args(args).env("TMPDIR", work);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let run = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().expect("roost runs");
            let mut stdin = child.stdin.take().expect("asked for");
            // One that has read enough closes it.
            drop(stdin.write_all(&input));
            drop(stdin);
            child.wait_with_output().expect("ended")
        });
        run.await.expect("no panic")
    }
}

/// A root filesystem of one file.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a directory");
    fs::create_dir(root.path().join("etc")).expect("made");
    fs::write(root.path().join("etc/hostname"), "sandbox\n").expect("written");
    root
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[tokio::test]
async fn an_import_that_is_not_as_announced_is_refused_and_leaves_nothing() {
    let agent = Agent::start().await;
    let good = [header(1 << 20, 8192), piece(4096, 4096), piece(65536, 4096), end("")];
    let with = |at: usize, message: Value| {
        let mut messages = good.to_vec();
        messages[at] = message;
        messages
    };
    let changed = |name: &str, value: Value| {
        let mut first = header(1 << 20, 8192);
        first["header"][name] = value;
        with(0, first)
    };
    let not_a_piece = |size: usize, offset: u64| {
        format!(
            "a piece of {size} bytes at {offset} is not 4096 to 4194304 bytes in whole blocks of 4096, behind the one before and within the \
             image"
        )
    };
    let bad_length = |length: u64| {
        let most = u64::from(Config::default().max_disk_mb) << 20;
        format!("the image has {length} bytes, and not 4096 to {most} in whole blocks of 4096")
    };
    let sum = format!("sha256-1m:{}", "0".repeat(64));
    let invalid = "invalid_argument";
    for (messages, code, message) in [
        (
            vec![],
            invalid,
            "the first message of an import is its header".to_owned(),
        ),
        (
            with(0, piece(0, 4096)),
            invalid,
            "the first message of an import is its header".into(),
        ),
        (
            with(1, header(4096, 0)),
            invalid,
            "an import has one header, before its pieces".into(),
        ),
        (good[..3].to_vec(), invalid, "an import ends with its end".into()),
        (changed("length", json!(0)), invalid, bad_length(0)),
        (changed("length", json!(5000)), invalid, bad_length(5000)),
        (
            changed("length", json!("1152921504606846976")),
            invalid,
            bad_length(1 << 60),
        ),
        (
            changed("dataBytes", json!(2 << 20)),
            invalid,
            "the pieces have more than the 1048576 bytes that the header announced".into(),
        ),
        (
            changed("dataBytes", json!(4096)),
            invalid,
            "the pieces have more than the 4096 bytes that the header announced".into(),
        ),
        (with(1, piece(4095, 4096)), invalid, not_a_piece(4096, 4095)),
        (with(1, piece(4096, 4095)), invalid, not_a_piece(4095, 4096)),
        (with(1, piece(4096, 0)), invalid, not_a_piece(0, 4096)),
        (with(1, piece(1 << 20, 4096)), invalid, not_a_piece(4096, 1 << 20)),
        (
            with(1, piece(u64::MAX - 4095, 4096)),
            invalid,
            not_a_piece(4096, u64::MAX - 4095),
        ),
        (
            with(1, piece(0, (4 << 20) + 4096)),
            invalid,
            not_a_piece((4 << 20) + 4096, 0),
        ),
        (with(2, piece(4096, 4096)), invalid, not_a_piece(4096, 4096)),
        (
            with(3, end("md5:0")),
            invalid,
            "digest is no checksum: \"md5:0\" is no checksum of the form sha256-1m:<64 hexadecimal digits>".into(),
        ),
        (
            changed("templateId", json!("web")),
            invalid,
            "template_id \"web\" is no UUID".into(),
        ),
        (changed("name", json!("a\nb")), invalid, "name".into()),
    ] {
        let (found, said) = agent.import(&messages).await.expect_err("refused");
        assert!(
            found == code && said.contains(&message),
            "{found}: {said}, not {code}: {message}"
        );
        assert_eq!(agent.on_disk(), [""; 0], "{message}");
    }
    let (code, said) = agent.import(&with(3, end(&sum))).await.expect_err("another image");
    assert!(
        code == "data_loss" && said.ends_with(&format!("and the one that was sent {sum}")),
        "{code}: {said}"
    );
    let own = json!({ "header": { "length": 4096, "dataBytes": 0 } });
    let (code, said) = agent.import(&[own, end("")]).await.expect_err("the platform's own");
    assert!(
        code == "invalid_argument" && said.contains("the platform's own"),
        "{code}: {said}"
    );
    assert_eq!(agent.on_disk(), [""; 0]);

    let made = agent.import(&good).await.expect("imported");
    assert!(made["digest"].as_str().expect("a digest").starts_with("sha256-1m:"));
    let (code, said) = agent.import(&good).await.expect_err("there is one");
    assert!(
        code == "already_exists" && said.contains("is there already"),
        "{code}: {said}"
    );
    let stored = fs::read(agent.team().join(&agent.on_disk()[0]).join("rootfs.ext4")).expect("stored");
    let is_data = |at: usize| (4096..8192).contains(&at) || (65536..69632).contains(&at);
    let is_as_sent = stored
        .iter()
        .enumerate()
        .all(|(at, byte)| *byte == if is_data(at) { 7 } else { 0 });
    assert!(stored.len() == 1 << 20 && is_as_sent);
}

#[tokio::test]
async fn of_two_imports_of_one_name_one_is_made() {
    let agent = Agent::start().await;
    let messages = [header(1 << 20, 4096), piece(0, 4096), end("")];
    let (first, second) = tokio::join!(agent.import(&messages), agent.import(&messages));
    let errors: Vec<_> = [&first, &second]
        .into_iter()
        .filter_map(|made| made.as_ref().err())
        .collect();
    assert!(
        errors.len() == 1 && errors[0].0 == "already_exists",
        "{first:?} {second:?}"
    );
    assert_eq!(agent.on_disk().len(), 1);
}

#[tokio::test]
async fn an_import_whose_sender_goes_away_leaves_nothing() {
    let agent = Agent::start().await;
    let mut config = (*tls::client(&agent.pki()).expect("usable")).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(agent.address).await.expect("connected");
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(agent.address.ip().into(), tcp);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls.await.expect("trusted")))
            .await
            .expect("h2");
    let connection = tokio::spawn(connection);
    let (messages, body) = tokio::sync::mpsc::channel::<Vec<u8>>(4);
    let body = futures::stream::unfold(body, |mut body| async {
        let message = body.recv().await?;
        Some((Ok::<_, std::io::Error>(Frame::data(bytes::Bytes::from(message))), body))
    });
    let request = http::Request::post(format!("https://{}{IMPORT}", agent.address))
        .header("content-type", "application/connect+json")
        .body(StreamBody::new(body).boxed_unsync())
        .expect("a request");
    let answer = tokio::spawn(sender.send_request(request));
    messages
        .send(stream(&[header(1 << 20, 8192), piece(0, 4096)]))
        .await
        .expect("taken");
    let eventually = async |what: &str, is: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what} takes too long");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    eventually("a template in the making", &|| !agent.on_disk().is_empty()).await;
    connection.abort();
    drop((messages, answer));
    eventually("its end", &|| agent.on_disk().is_empty()).await;
}

#[tokio::test]
async fn a_built_template_is_listed_verified_and_deleted() {
    let (agent, root, work) = (Agent::start().await, root(), tempfile::tempdir().expect("a directory"));
    let source = root.path().to_str().expect("UTF-8");
    let built = agent
        .build(work.path(), &["--no-envd", "--name", "web", source], vec![])
        .await;
    assert!(built.status.success(), "{}", text(&built.stderr));
    assert!(built.stderr.is_empty(), "{}", text(&built.stderr));
    let id = text(&built.stdout);
    let listed = agent.lists().await;
    let [template] = listed["templates"].as_array().expect("a list").as_slice() else {
        panic!("{listed}")
    };
    assert_eq!(
        (template["templateId"].as_str(), template["name"].as_str()),
        (Some(id.as_str()), Some("web"))
    );
    let number = |name: &str| {
        template[name]
            .as_str()
            .expect("a number")
            .parse::<u64>()
            .expect("a number")
    };
    // Sparse: what is in it, the tables of its filesystem, and its journal's first block.
    assert!(
        number("rootfsLength") > 80 << 20 && number("rootfsAllocated") < 8 << 20,
        "{template}"
    );
    let table = text(&agent.roost(&["template", "ls"]).await.stdout);
    assert!(
        table.starts_with("TEMPLATE") && table.contains(&id) && table.contains("web"),
        "{table}"
    );
    let shown = text(&agent.roost(&["template", "inspect", "web"]).await.stdout);
    assert!(shown.contains("sha256-1m:") && shown.contains(&id), "{shown}");
    let verified = agent.roost(&["template", "verify", &id]).await;
    assert_eq!(
        (verified.status.code(), text(&verified.stdout).as_str()),
        (Some(0), "rootfs.ext4  ok")
    );
    // By its name as far as a host without a kernel comes.
    let said = agent.refusal(&["create", "--template", "web"]).await;
    assert!(said.contains("no guest kernel in"), "{said}");
    let said = agent.refusal(&["create", "--template", "wep"]).await;
    assert_eq!(
        said.trim(),
        "roost: no template \"wep\" on this host; `roost template ls` lists them"
    );

    let rootfs = agent.team().join(&agent.on_disk()[0]).join("rootfs.ext4");
    let file = fs::OpenOptions::new().write(true).open(&rootfs).expect("opened");
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 1024 + 120).expect("written");
    let verified = agent.roost(&["template", "verify", "web"]).await;
    let said = text(&verified.stdout);
    assert_eq!(verified.status.code(), Some(1));
    assert!(
        said.starts_with("rootfs.ext4  differs: its checksum is sha256-1m:"),
        "{said}"
    );
    // One that has been cut short is noticed at each create.
    let length = file.metadata().expect("metadata").len();
    file.set_len(length - 4096).expect("cut short");
    let said = agent.refusal(&["create", "--template", &id]).await;
    let expected = format!(
        "has {} bytes, and had {length} when the template was made: it is damaged",
        length - 4096
    );
    assert!(said.contains(&expected), "{said}");
    assert!(
        agent.lists().await["templates"][0]["broken"]
            .as_str()
            .expect("broken")
            .contains(&expected)
    );
    fs::remove_file(&rootfs).expect("removed");
    let verified = agent.roost(&["template", "verify", "web"]).await;
    assert_eq!(
        (verified.status.code(), text(&verified.stdout).as_str()),
        (Some(1), "rootfs.ext4  missing")
    );

    let removed = agent.roost(&["template", "rm", "web"]).await;
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(agent.on_disk(), [""; 0]);
    let said = agent.refusal(&["template", "rm", "web"]).await;
    assert!(said.contains("no template \"web\""), "{said}");
    assert_eq!(
        fs::read_dir(work.path()).expect("read").count(),
        0,
        "something is left of the build"
    );
}

#[tokio::test]
async fn names_need_not_be_the_only_ones_and_uuids_are() {
    let (agent, root, work) = (Agent::start().await, root(), tempfile::tempdir().expect("a directory"));
    let source = root.path().to_str().expect("UTF-8");
    let mut ids = Vec::new();
    for team in [&[][..], &["--team", TEAM]] {
        let args = [&["--no-envd", "--name", "web", source][..], team].concat();
        let built = agent.build(work.path(), &args, vec![]).await;
        assert!(built.status.success(), "{}", text(&built.stderr));
        ids.push(text(&built.stdout));
    }
    let said = agent.refusal(&["template", "rm", "web"]).await;
    assert!(
        said.contains("\"web\" is the name of several templates") && ids.iter().all(|id| said.contains(id)),
        "{said}"
    );
    for which in [&["web", "--team", TEAM][..], &[&ids[0]]] {
        let removed = agent.roost(&[&["template", "rm"], which].concat()).await;
        assert!(removed.status.success(), "{}", text(&removed.stderr));
    }
    assert_eq!(agent.lists().await["templates"], Value::Null);
}

#[tokio::test]
async fn a_build_that_fails_says_why_and_leaves_nothing() {
    let (agent, work) = (Agent::start().await, tempfile::tempdir().expect("a directory"));
    let root = root();
    let source = root.path().to_str().expect("UTF-8");
    let mut evil = tar::Builder::new(Vec::new());
    let mut entry = tar::Header::new_gnu();
    entry.as_old_mut().name[..11].copy_from_slice(b"../evil.txt");
    entry.set_size(0);
    entry.set_cksum();
    evil.append(&entry, std::io::empty()).expect("written");
    let evil = evil.into_inner().expect("ended");
    let empty = vec![0; 1024];
    for (args, input, message) in [
        (
            &["--no-envd", "-"][..],
            evil,
            "../evil.txt: its path has `..` in it, which could lead out of the image",
        ),
        (&["--no-envd", "-"], vec![], "the archive is cut off at byte 0"),
        (
            &["--no-envd", "-"],
            b"no archive".to_vec(),
            "the archive is cut off at byte 10",
        ),
        (&["--no-envd", "-"], empty, "- has no files"),
        (
            &["--no-envd", "/nonexistent"],
            vec![],
            "/nonexistent cannot be read: No such file or directory (os error 2)",
        ),
        (
            &["--envd", "/nonexistent", source],
            vec![],
            "no guest agent at /nonexistent: install roost-guest-tools, say where it is by --envd, or leave it out by --no-envd: No such \
             file or directory (os error 2)",
        ),
        (
            &["--no-envd", "--name", "a\nb", source],
            vec![],
            "name is no name of a template: up to 128 printable characters",
        ),
        (
            &["--no-envd", "--size-mb", "2", source],
            vec![],
            "the image needs 25 MiB at least, and --size-mb is 2",
        ),
    ] {
        let built = agent.build(work.path(), args, input).await;
        assert_eq!(
            (built.status.code(), text(&built.stderr)),
            (Some(1), format!("roost: {message}")),
            "{args:?}"
        );
    }
    for bad in [
        &[][..],
        &["--debian", "--x"],
        &["--debian", "sid", source],
        &["--include", "python3", source],
        &["--mirror", "http://localhost/debian", source],
        &["--team", "web", source],
        &["--size-mb", "0", source],
    ] {
        let built = agent.build(work.path(), bad, vec![]).await;
        assert_eq!(built.status.code(), Some(2), "{bad:?}: {}", text(&built.stderr));
    }
    assert_eq!(agent.on_disk(), [""; 0]);
    assert_eq!(fs::read_dir(work.path()).expect("read").count(), 0);
}

#[tokio::test]
async fn a_host_without_room_or_that_is_drained_takes_no_template() {
    let (root, work) = (root(), tempfile::tempdir().expect("a directory"));
    let args = ["--no-envd", root.path().to_str().expect("UTF-8")];
    let agent = Agent::start_as(Config {
        disk_reserve_mb: 1 << 20,
        ..Config::default()
    });
    let agent = agent.await.recover().await;
    roost_agent::watermark::start(agent.registry.clone()).await;
    let said = text(&agent.build(work.path(), &args, vec![]).await.stderr);
    assert!(
        said.contains("this host's disk has no room for") && said.contains("unavailable"),
        "{said}"
    );
    let agent = Agent::start().await;
    assert!(agent.roost(&["drain"]).await.status.success());
    let said = text(&agent.build(work.path(), &args, vec![]).await.stderr);
    assert!(said.contains("this host is being drained"), "{said}");
}

#[tokio::test]
async fn an_interrupted_build_removes_what_it_has_made() {
    let (agent, work) = (Agent::start().await, tempfile::tempdir().expect("a directory"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_roost"))
        .args(["--host", &agent.address.to_string(), "--pki"])
        .arg(agent.pki())
        .args(["template", "build", "--no-envd", "-"])
        .env("TMPDIR", work.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("roost runs");
    let begun = Instant::now();
    while fs::read_dir(work.path()).expect("read").count() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing is begun");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
    // There is no sign of its handler being there, nor of its having heard the signal, but that it catches it.
    let catches = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))
            .expect("a mask")
            .trim();
        u64::from_str_radix(mask, 16).expect("a mask") & 2 != 0
    };
    while !catches() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "it does not catch the signal"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("sent");
    // Its input ends, and with it what it reads, only after that.
    tokio::time::sleep(Duration::from_millis(500)).await;
    drop(child.stdin.take());
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output().expect("ended"));
    let ended = ended.await.expect("no panic");
    assert_eq!(
        (ended.status.code(), text(&ended.stderr).as_str()),
        (Some(1), "roost: interrupted; no template was made")
    );
    assert_eq!(fs::read_dir(work.path()).expect("read").count(), 0);
}

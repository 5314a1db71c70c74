//! A real envd on a port of its own, and a client for it.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses a part")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use connectrpc::ConnectError;
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use roost_common::guest::process::process_event::data_event::Output;
use roost_common::guest::process::process_event::{EndEvent, Event};
use roost_common::guest::process::{ProcessClient, ProcessConfig, ProcessEvent, StartRequest, StartResponse};

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// An envd with `--no-init` and a root of its own, whose users are root (or whoever runs the test) and nobody.
pub struct Envd {
    child: Child,
    pub address: SocketAddr,
    pub root: PathBuf,
}

impl Envd {
    pub fn start() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("envd-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::create_dir_all(root.join("home")).unwrap();
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let home = root.join("home");
        let home = home.display();
        let own = format!("tester:x:{uid}:{gid}::{home}:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/sh\n");
        std::fs::write(root.join("etc/passwd"), own).unwrap();
        std::fs::write(root.join("etc/group"), "users:x:100:nobody\n").unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--no-init", "--listen", "127.0.0.1:0", "--root"])
            .arg(&root)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("envd: listening on ")
            .and_then(|rest| rest.split(' ').next())
            .expect(&line)
            .parse()
            .unwrap();
        Self { child, address, root }
    }

    pub fn client(&self) -> ProcessClient<HttpClient> {
        let config = ClientConfig::new(format!("http://{}", self.address).parse().unwrap());
        ProcessClient::new(HttpClient::plaintext(), config)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that envd has had resident, in KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Direct children of envd, dead ones included.
    pub fn children(&self) -> Vec<u32> {
        let mut children = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap() {
            let text = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
            children.extend(text.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
        }
        children
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    /// Sends bytes, returns all that comes back until the server closes or says nothing for a while.
    pub fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // The server may refuse before it has read all.
        stream.write_all(request).ok();
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(read) => answer.extend_from_slice(&buffer[..read]),
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One HTTP call; the status and the body.
    pub fn http(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
        let extra: String = headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: envd\r\nConnection: close\r\nContent-Length: {length}\r\n{extra}\r\n{body}"
        );
        let answer = self.raw(request.as_bytes());
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect(&answer);
        (status, answer.split_once("\r\n\r\n").expect(&answer).1.to_owned())
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().unwrap();
        std::fs::remove_dir_all(&self.root).unwrap();
    }
}

/// `/bin/bash -c script`, reading nothing.
pub fn bash(script: &str) -> StartRequest {
    command("/bin/bash", &["-c", script])
}

pub fn command(program: &str, args: &[&str]) -> StartRequest {
    let config = ProcessConfig {
        cmd: program.to_owned(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        ..Default::default()
    };
    StartRequest {
        process: config.into(),
        stdin: Some(false),
        ..Default::default()
    }
}

/// The header that names the user.
pub fn as_user(name: &str) -> CallOptions {
    let credentials = base64::prelude::BASE64_STANDARD.encode(format!("{name}:"));
    CallOptions::default().with_header("authorization", format!("Basic {credentials}"))
}

/// Whether a test that becomes another user can run. Where all tests must (`CI=true`, or `ROOST_CI` set), it is no choice.
pub fn can_become_another_user() -> bool {
    let can = nix::unistd::geteuid().is_root();
    let must = std::env::var("CI").is_ok_and(|value| value == "true") || std::env::var_os("ROOST_CI").is_some();
    assert!(
        can || !must,
        "this test must run as root, to become another user: CI or ROOST_CI is set"
    );
    if !can {
        // Past libtest, which would keep it to itself.
        let said = writeln!(std::io::stderr(), "\nNOT TESTED: only root can become another user");
        said.expect("standard error");
    }
    can
}

/// All that a process said.
#[derive(Debug, Default)]
pub struct Ran {
    pub pid: u32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Of the terminal.
    pub pty: Vec<u8>,
    /// Where the last data ended, by its offset; every event with an offset was checked against it.
    pub offset: Option<u64>,
    /// All that was cut.
    pub cut: u64,
    pub keepalives: usize,
    pub largest: usize,
    pub end: EndEvent,
}

impl Ran {
    pub fn out(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

/// Runs a process to its end.
pub async fn run(envd: &Envd, request: StartRequest, options: CallOptions) -> Result<Ran, ConnectError> {
    tokio::time::timeout(PATIENCE, async {
        let mut stream = envd.client().start_with_options(request, options).await?;
        let mut ran = Ran::default();
        let mut events = Vec::new();
        while let Some(message) = stream.message::<StartResponse>().await? {
            take(
                &mut ran,
                &mut events,
                message.to_owned_message().event.into_option().unwrap(),
            );
        }
        assert_eq!(events.first(), Some(&"start"), "{events:?}");
        assert_eq!(events.last(), Some(&"end"), "{events:?}");
        Ok(ran)
    })
    .await
    .expect("the process ends in time")
}

/// Adds an event to what is known.
pub fn take(ran: &mut Ran, events: &mut Vec<&'static str>, event: ProcessEvent) {
    if !matches!(event.event, Some(Event::Keepalive(_))) {
        let cut = event.cut.unwrap_or_default();
        if let Some(before) = ran.offset {
            assert_eq!(before, event.offset.expect("counted") - cut, "a hole that is not told");
        }
        ran.offset = event.offset;
        ran.cut += cut;
    }
    events.push(match event.event.expect("an event says what it is") {
        Event::Start(start) => {
            ran.pid = start.pid;
            "start"
        }
        Event::Data(data) => {
            let (to, bytes) = match data.output.expect("data is of a stream") {
                Output::Stdout(bytes) => (&mut ran.stdout, bytes),
                Output::Stderr(bytes) => (&mut ran.stderr, bytes),
                Output::Pty(bytes) => (&mut ran.pty, bytes),
            };
            ran.offset = ran.offset.map(|offset| offset + bytes.len() as u64);
            ran.largest = ran.largest.max(bytes.len());
            to.extend_from_slice(&bytes);
            "data"
        }
        Event::End(end) => {
            ran.end = *end;
            "end"
        }
        Event::Keepalive(_) => {
            ran.keepalives += 1;
            "keepalive"
        }
    });
}

/// Waits until something holds.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

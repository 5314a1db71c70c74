//! The process service of a real envd, over TCP.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{Envd, PATIENCE, Ran, as_user, bash, can_become_another_user, command, eventually, exists, run, take};
use connectrpc::client::{CallOptions, ClientConfig, ClientTransport, HttpClient, ServerStream};
use connectrpc::{ConnectError, ErrorCode};
use roost_common::guest::process::process_input::Input;
use roost_common::guest::process::process_selector::Selector;
use roost_common::guest::process::pty;
use roost_common::guest::process::{
    CloseStdinRequest, ConnectRequest, ConnectResponse, ConnectResponseView, ListRequest, ListResponse, PTY,
    ProcessClient, ProcessEvent, ProcessInput, ProcessSelector, SendInputRequest, SendSignalRequest, Signal,
    StartRequest, StartResponse, StartResponseView, UpdateRequest,
};

fn pid(pid: u32) -> ProcessSelector {
    ProcessSelector {
        selector: Some(Selector::Pid(pid)),
        ..Default::default()
    }
}

fn tag(tag: &str) -> ProcessSelector {
    ProcessSelector {
        selector: Some(Selector::Tag(tag.to_owned())),
        ..Default::default()
    }
}

fn signal(process: ProcessSelector, signal: Signal) -> SendSignalRequest {
    SendSignalRequest {
        process: process.into(),
        signal: signal.into(),
        ..Default::default()
    }
}

async fn list(envd: &Envd) -> ListResponse {
    envd.client().list(ListRequest::default()).await.unwrap().into_owned()
}

#[tokio::test]
async fn output_is_split_and_the_exit_code_is_told() {
    let envd = Envd::start();
    let ran = run(&envd, bash("echo out; echo err >&2; exit 3"), CallOptions::default())
        .await
        .unwrap();
    assert_eq!(
        (ran.stdout.as_slice(), ran.stderr.as_slice()),
        (b"out\n".as_slice(), b"err\n".as_slice())
    );
    assert_eq!(
        (ran.end.exit_code, ran.end.exited, ran.end.status.as_str()),
        (3, true, "exit status 3")
    );
    let ran = run(&envd, bash("true"), CallOptions::default()).await.unwrap();
    assert_eq!((ran.end.exit_code, ran.end.exited, ran.end.error), (0, true, None));
}

#[tokio::test]
async fn a_process_has_the_user_s_environment_and_nothing_of_envd_s() {
    let envd = Envd::start();
    let mut request = bash("env; pwd; ls /proc/self/fd; ulimit -n; cat /proc/self/oom_score_adj; umask");
    request
        .process
        .get_or_insert_default()
        .envs
        .insert("GREETING".to_owned(), "hello".to_owned());
    request
        .process
        .get_or_insert_default()
        .envs
        .insert("SHELL".to_owned(), "/bin/mine".to_owned());
    let ran = run(&envd, request, CallOptions::default()).await.unwrap();
    let out = ran.out();
    let home = envd.root.join("home").display().to_string();
    for line in [
        "GREETING=hello",
        "SHELL=/bin/mine",
        "USER=tester",
        "LOGNAME=tester",
        "E2B_SANDBOX=true",
    ] {
        assert!(out.lines().any(|got| got == line), "{line} is not in {out}");
    }
    assert!(
        out.contains(&format!("HOME={home}\n")) && out.contains(&format!("\n{home}\n")),
        "{out}"
    );
    assert!(!out.contains("CARGO"), "{out}");
    assert!(out.contains("\n0\n1\n2\n3\n1024\n100\n0022\n"), "{out}");
}

#[tokio::test]
async fn a_process_leads_a_session_and_no_signal_is_blocked_or_ignored() {
    let envd = Envd::start();
    let script = "ps -o sid= -o pgid= -p $$ | tr -s ' '; grep -E '^Sig(Blk|Ign)' /proc/self/status";
    let ran = run(&envd, command("/bin/bash", &["-c", script]), CallOptions::default())
        .await
        .unwrap();
    let out = ran.out();
    let ids: Vec<u32> = out
        .lines()
        .next()
        .unwrap()
        .split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect();
    assert_eq!(ids, [ran.pid, ran.pid]);
    assert!(
        out.contains("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"),
        "{out}"
    );
}

#[tokio::test]
async fn another_user_has_its_ids_and_groups() {
    if !can_become_another_user() {
        return;
    }
    let envd = Envd::start();
    let ran = run(&envd, bash("id -u; id -g; id -G; pwd; echo $PATH"), as_user("nobody"))
        .await
        .unwrap();
    let path = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
    assert_eq!(ran.out(), format!("65534\n65534\n65534 100\n/\n{path}\n"));
}

#[tokio::test]
async fn what_cannot_start_is_refused_with_its_code_and_leaves_nothing() {
    let envd = Envd::start();
    let file = envd.root.join("home/plain");
    std::fs::write(&file, "not a program").unwrap();
    let in_directory = |directory: &str| {
        let mut request = bash("true");
        request.process.get_or_insert_default().cwd = Some(directory.to_owned());
        request
    };
    let plain = file.display().to_string();
    let mut nul = bash("true");
    nul.process
        .get_or_insert_default()
        .envs
        .insert("A=B".to_owned(), "x".to_owned());
    let default = CallOptions::default;
    let cases = [
        (
            "a program that is not there",
            command("/no/such/program", &[]),
            default(),
            ErrorCode::NotFound,
        ),
        (
            "a name that is not in PATH",
            command("no-such-program", &[]),
            default(),
            ErrorCode::NotFound,
        ),
        (
            "a file that is no program",
            command(&plain, &[]),
            default(),
            ErrorCode::PermissionDenied,
        ),
        ("no program", command("", &[]), default(), ErrorCode::InvalidArgument),
        (
            "no process",
            StartRequest::default(),
            default(),
            ErrorCode::InvalidArgument,
        ),
        (
            "a NUL in an argument",
            command("/bin/true", &["a\0b"]),
            default(),
            ErrorCode::InvalidArgument,
        ),
        ("a variable that is none", nul, default(), ErrorCode::InvalidArgument),
        (
            "a directory that is not there",
            in_directory("/no/such/directory"),
            default(),
            ErrorCode::NotFound,
        ),
        (
            "a directory that is a file",
            in_directory(&plain),
            default(),
            ErrorCode::NotFound,
        ),
        (
            "a user that is not there",
            bash("true"),
            as_user("no-such-user"),
            ErrorCode::InvalidArgument,
        ),
    ];
    let (children, files) = (envd.children(), envd.open_files());
    for (what, request, options, code) in cases {
        let refusal = run(&envd, request, options).await.expect_err(what);
        assert_eq!(refusal.code, code, "{what}: {refusal}");
    }
    assert_eq!(list(&envd).await.processes, []);
    assert_eq!(envd.children(), children);
    // Connections of the clients above may linger for a moment.
    eventually("descriptors are closed", || envd.open_files() <= files).await;
    let malformed = CallOptions::default().with_header("authorization", "Basic !!!");
    assert_eq!(
        run(&envd, bash("true"), malformed).await.unwrap_err().code,
        ErrorCode::InvalidArgument
    );
}

#[tokio::test]
async fn a_user_without_the_right_to_a_directory_is_refused() {
    if !can_become_another_user() {
        return;
    }
    let envd = Envd::start();
    let directory = envd.root.join("closed");
    std::fs::create_dir(&directory).unwrap();
    std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut request = bash("true");
    request.process.get_or_insert_default().cwd = Some(directory.display().to_string());
    let refusal = run(&envd, request, as_user("nobody")).await.unwrap_err();
    assert_eq!(refusal.code, ErrorCode::PermissionDenied, "{refusal}");
}

#[tokio::test]
async fn signals_reach_what_the_process_started_and_the_end_says_which() {
    let envd = Envd::start();
    for (sent, status) in [
        (Signal::SIGNAL_SIGTERM, "signal: terminated"),
        (Signal::SIGNAL_SIGKILL, "signal: killed"),
    ] {
        let mut request = bash("sleep 1000 & echo $!; wait");
        request.tag = Some("sleeper".to_owned());
        let mut stream = envd.client().start(request).await.unwrap();
        let (mut ran, mut events) = (Ran::default(), Vec::new());
        while ran.stdout.is_empty() {
            take(&mut ran, &mut events, next(&mut stream).await);
        }
        let child: u32 = ran.out().trim().parse().unwrap();
        assert!(exists(child));
        envd.client().send_signal(signal(tag("sleeper"), sent)).await.unwrap();
        while events.last() != Some(&"end") {
            take(&mut ran, &mut events, next(&mut stream).await);
        }
        assert_eq!(
            (ran.end.exit_code, ran.end.exited, ran.end.status.as_str()),
            (-1, false, status)
        );
        eventually("the child of the process is gone too", || !is_running(child)).await;
        let late = envd.client().send_signal(signal(pid(ran.pid), sent)).await.unwrap_err();
        assert_eq!(late.code, ErrorCode::NotFound);
    }
    let bad = envd
        .client()
        .send_signal(signal(tag("x"), Signal::SIGNAL_UNSPECIFIED))
        .await
        .unwrap_err();
    assert_eq!(bad.code, ErrorCode::InvalidArgument);
}

/// Whether a process is there and not only its exit status, which nobody here can take.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

type Stream = ServerStream<<HttpClient as ClientTransport>::ResponseBody, StartResponseView<'static>>;

async fn next(stream: &mut Stream) -> ProcessEvent {
    let message = tokio::time::timeout(PATIENCE, stream.message::<StartResponse>())
        .await
        .expect("an event in time");
    message
        .unwrap()
        .expect("the stream has not ended")
        .to_owned_message()
        .event
        .into_option()
        .unwrap()
}

#[tokio::test]
async fn what_runs_is_listed_until_it_ends() {
    let envd = Envd::start();
    let mut request = bash("sleep 1000");
    request.tag = Some("listed".to_owned());
    let mut stream = envd.client().start(request).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    take(&mut ran, &mut events, next(&mut stream).await);
    let processes = list(&envd).await.processes;
    assert_eq!(processes.len(), 1);
    assert_eq!(
        (processes[0].pid, processes[0].tag.as_deref()),
        (ran.pid, Some("listed"))
    );
    assert_eq!(processes[0].config.cmd, "/bin/bash");
    envd.client()
        .send_signal(signal(pid(ran.pid), Signal::SIGNAL_SIGKILL))
        .await
        .unwrap();
    take(&mut ran, &mut events, next(&mut stream).await);
    assert_eq!(events, ["start", "end"]);
    assert_eq!(list(&envd).await.processes, []);
}

#[tokio::test]
async fn output_larger_than_memory_streams_whole_and_in_bounded_memory() {
    let envd = Envd::start();
    let before = envd.peak_memory();
    let mut stream = envd
        .client()
        .start(bash("head -c 67108864 /dev/zero; echo done >&2"))
        .await
        .unwrap();
    let (mut bytes, mut ran, mut events) = (0, Ran::default(), Vec::new());
    while events.last() != Some(&"end") {
        take(&mut ran, &mut events, next(&mut stream).await);
        bytes += std::mem::take(&mut ran.stdout).len();
        events.drain(..events.len() - 1);
    }
    assert_eq!(
        (bytes, ran.stderr.as_slice(), ran.largest),
        (64 << 20, b"done\n".as_slice(), 32 << 10)
    );
    let grown = envd.peak_memory() - before;
    assert!(grown < 16 << 10, "memory grew by {grown} KiB");
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_process_and_costs_little() {
    let envd = Envd::start();
    let before = envd.peak_memory();
    let log = envd.root.join("written");
    let script = format!(
        "for i in $(seq 1024); do head -c 65536 /dev/zero; echo $i > {}; done",
        log.display()
    );
    let mut stream = envd.client().start(bash(&script)).await.unwrap();
    let written = || {
        std::fs::read_to_string(&log)
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok())
            .unwrap_or(0)
    };
    // It stands still once every buffer on the way is full: the same number several times in a row.
    let (mut last, mut same) = (0, 0);
    let deadline = Instant::now() + PATIENCE;
    while same < 10 {
        assert!(Instant::now() < deadline, "the process goes on writing");
        tokio::time::sleep(Duration::from_millis(50)).await;
        same = if written() == last && last > 0 { same + 1 } else { 0 };
        last = written();
    }
    assert!(last < 1024, "all was written, but nobody read");
    assert!(envd.peak_memory() - before < 16 << 10);
    // Nothing is lost by having waited.
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    while events.last() != Some(&"end") {
        take(&mut ran, &mut events, next(&mut stream).await);
    }
    assert_eq!((ran.stdout.len(), ran.end.exit_code), (64 << 20, 0));
}

#[tokio::test]
async fn a_client_that_leaves_neither_ends_nor_stops_the_process() {
    let envd = Envd::start();
    let done = envd.root.join("done");
    let script = format!(
        "read -t 0.2 < <(sleep 1); head -c 4194304 /dev/zero; echo ok > {}",
        done.display()
    );
    let mut stream = envd.client().start(bash(&script)).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    take(&mut ran, &mut events, next(&mut stream).await);
    drop(stream);
    eventually("the process has written all of it", || done.exists()).await;
    eventually("the process is reaped", || envd.children().is_empty()).await;
    assert_eq!(list(&envd).await.processes, []);
}

#[tokio::test]
async fn a_second_client_reads_from_when_it_came_and_a_late_one_the_end() {
    let envd = Envd::start();
    let mut request = bash("read line; echo got $line");
    request.stdin = Some(true);
    let mut first = envd.client().start(request).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    take(&mut ran, &mut events, next(&mut first).await);
    let request = ConnectRequest {
        process: pid(ran.pid).into(),
        ..Default::default()
    };
    let mut second = envd.client().connect(request.clone()).await.unwrap();
    let input = ProcessInput {
        input: Some(Input::Stdin(b"this\n".to_vec())),
        ..Default::default()
    };
    let send = SendInputRequest {
        process: pid(ran.pid).into(),
        input: input.into(),
        ..Default::default()
    };
    envd.client().send_input(send.clone()).await.unwrap();
    let (mut other, mut others_events) = (Ran::default(), Vec::new());
    while let Some(message) = second.message::<ConnectResponse>().await.unwrap() {
        take(
            &mut other,
            &mut others_events,
            message.to_owned_message().event.into_option().unwrap(),
        );
    }
    while events.last() != Some(&"end") {
        take(&mut ran, &mut events, next(&mut first).await);
    }
    assert_eq!(
        (others_events.first(), others_events.last()),
        (Some(&"start"), Some(&"end"))
    );
    assert_eq!(
        (ran.out(), other.out(), other.pid),
        ("got this\n".to_owned(), "got this\n".to_owned(), ran.pid)
    );
    // One that comes after the end, and says what it has.
    let late = connect(&envd, pid(ran.pid), Some(4)).await.unwrap();
    assert_eq!((late.out().as_str(), late.cut, late.end), ("this\n", 0, ran.end));
    // Without saying so it is handed what nobody was.
    let late = connect(&envd, pid(ran.pid), None).await.unwrap();
    assert_eq!((late.out().as_str(), late.offset), ("", Some(9)));
    let beyond = connect(&envd, pid(ran.pid), Some(10)).await.unwrap_err();
    assert_eq!(beyond.code, ErrorCode::InvalidArgument);
    let nobody = connect(&envd, tag("no such"), None).await.unwrap_err();
    assert_eq!(nobody.code, ErrorCode::NotFound);
    assert_eq!(
        envd.client().send_input(send).await.unwrap_err().code,
        ErrorCode::NotFound
    );
}

type ConnectStream = ServerStream<<HttpClient as ClientTransport>::ResponseBody, ConnectResponseView<'static>>;

/// Reads a process from `offset` on, to its end.
async fn connect(envd: &Envd, process: ProcessSelector, offset: Option<u64>) -> Result<Ran, ConnectError> {
    read(&mut attach(envd, process, offset).await?).await
}

async fn attach(envd: &Envd, process: ProcessSelector, offset: Option<u64>) -> Result<ConnectStream, ConnectError> {
    let request = ConnectRequest {
        process: process.into(),
        offset,
        ..Default::default()
    };
    envd.client().connect(request).await
}

async fn read(stream: &mut ConnectStream) -> Result<Ran, ConnectError> {
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    let read = async {
        // A stream that refuses says so in its first message.
        while let Some(message) = stream.message::<ConnectResponse>().await? {
            let event = message.to_owned_message().event.into_option().unwrap();
            take(&mut ran, &mut events, event);
        }
        Ok::<_, ConnectError>(())
    };
    tokio::time::timeout(PATIENCE, read).await.expect("an end in time")?;
    assert_eq!((events.first(), events.last()), (Some(&"start"), Some(&"end")));
    Ok(ran)
}

/// Numbered lines: any byte that is missing, doubled or moved shows.
const NUMBERS: &str = "seq 1000000 1099999";

fn numbers() -> String {
    (1_000_000..1_100_000).map(|number| format!("{number}\n")).collect()
}

#[tokio::test]
async fn a_client_that_leaves_and_comes_back_at_its_offset_misses_and_repeats_nothing() {
    let envd = Envd::start();
    // What is written before the line that it waits for is all kept, whoever reads.
    let mut request = bash("seq 1000000 1029999; read line; seq 1030000 1099999; exit 4");
    request.stdin = Some(true);
    request.tag = Some("numbers".to_owned());
    let mut stream = envd.client().start(request).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    while ran.stdout.len() < 100_000 {
        take(&mut ran, &mut events, next(&mut stream).await);
    }
    drop(stream);
    let mut back = attach(&envd, tag("numbers"), ran.offset).await.unwrap();
    send_line(&envd).await;
    let rest = read(&mut back).await.unwrap();
    assert_eq!((rest.cut, rest.end.exit_code), (0, 4));
    assert!([ran.stdout, rest.stdout].concat() == numbers().as_bytes());
}

/// Gives the process with the tag `numbers` the line that it waits for, once somebody may read it.
async fn send_line(envd: &Envd) {
    let newline = ProcessInput {
        input: Some(Input::Stdin(b"\n".to_vec())),
        ..Default::default()
    };
    let send = SendInputRequest {
        process: tag("numbers").into(),
        input: newline.into(),
        ..Default::default()
    };
    envd.client().send_input(send).await.unwrap();
}

#[tokio::test]
async fn what_nobody_read_is_cut_exactly_and_the_exit_is_kept() {
    let envd = Envd::start();
    let mut request = bash(&format!("read line; {NUMBERS}; exit 6"));
    request.stdin = Some(true);
    request.tag = Some("numbers".to_owned());
    let mut stream = envd.client().start(request).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    take(&mut ran, &mut events, next(&mut stream).await);
    drop(stream);
    send_line(&envd).await;
    eventually("it has ended", || envd.children().is_empty()).await;
    // To the end: its last output may still be on its way, and a client that reads would hold it.
    let whole = connect(&envd, tag("numbers"), None).await.unwrap();
    let numbers = numbers();
    assert_eq!(whole.offset, Some(numbers.len() as u64));
    assert_eq!(whole.cut as usize + whole.stdout.len(), numbers.len());
    assert!(numbers.as_bytes().ends_with(&whole.stdout) && whole.stdout.len() >= 128 << 10);
    assert_eq!(whole.end.exit_code, 6);
    let again = connect(&envd, pid(ran.pid), Some(1000)).await.unwrap();
    assert!(again.cut + 1000 >= whole.cut && numbers.as_bytes().ends_with(&again.stdout));
    let late = envd
        .client()
        .send_signal(signal(tag("numbers"), Signal::SIGNAL_SIGKILL))
        .await
        .unwrap_err();
    assert_eq!(late.code, ErrorCode::NotFound);
    assert_eq!(list(&envd).await.processes, []);
}

#[tokio::test]
async fn of_two_processes_with_one_tag_the_newest_is_meant_also_when_it_has_ended() {
    let envd = Envd::start();
    let tagged = |script: &str| {
        let mut request = bash(script);
        request.tag = Some("same".to_owned());
        request
    };
    let mut first = envd.client().start(tagged("sleep 1000")).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    take(&mut ran, &mut events, next(&mut first).await);
    let second = run(&envd, tagged("echo second"), CallOptions::default()).await.unwrap();
    let late = connect(&envd, tag("same"), Some(0)).await.unwrap();
    assert_eq!((late.pid, late.out().as_str()), (second.pid, "second\n"));
    // A signal is for the one that runs.
    let kill = signal(tag("same"), Signal::SIGNAL_SIGKILL);
    envd.client().send_signal(kill).await.unwrap();
    while events.last() != Some(&"end") {
        take(&mut ran, &mut events, next(&mut first).await);
    }
}

#[tokio::test]
async fn standard_input_ends_when_it_is_closed() {
    let envd = Envd::start();
    let mut request = command("/bin/cat", &[]);
    request.stdin = None;
    let mut stream = envd.client().start(request).await.unwrap();
    let (mut ran, mut events) = (Ran::default(), Vec::new());
    take(&mut ran, &mut events, next(&mut stream).await);
    let big = vec![b'x'; 300_000];
    let input = ProcessInput {
        input: Some(Input::Stdin(big.clone())),
        ..Default::default()
    };
    let send = SendInputRequest {
        process: pid(ran.pid).into(),
        input: input.into(),
        ..Default::default()
    };
    let reader = tokio::spawn(async move {
        while events.last() != Some(&"end") {
            take(&mut ran, &mut events, next(&mut stream).await);
        }
        ran
    });
    envd.client().send_input(send.clone()).await.unwrap();
    let selector = send.process.clone();
    let close = CloseStdinRequest {
        process: selector,
        ..Default::default()
    };
    envd.client().close_stdin(close).await.unwrap();
    let ran = reader.await.unwrap();
    assert_eq!(
        (ran.stdout.len(), ran.stdout == big, ran.end.exit_code),
        (300_000, true, 0)
    );
    // With stdin false, it is at its end from the start.
    let ran = run(&envd, command("/bin/cat", &[]), CallOptions::default())
        .await
        .unwrap();
    assert_eq!((ran.out().as_str(), ran.end.exit_code), ("", 0));
}

#[tokio::test]
async fn at_its_deadline_a_process_is_killed_and_the_end_says_so() {
    let envd = Envd::start();
    let started = Instant::now();
    // The header alone: with_timeout would have the client itself give up, and never read the end.
    let options = CallOptions::default().with_header("connect-timeout-ms", "500");
    let ran = run(&envd, bash("echo begun; sleep 1000 & sleep 1000"), options)
        .await
        .unwrap();
    assert!(started.elapsed() >= Duration::from_millis(500) && started.elapsed() < PATIENCE);
    assert_eq!(
        (ran.out().as_str(), ran.end.exit_code, ran.end.exited),
        ("begun\n", -1, false)
    );
    assert_eq!(ran.end.status, "signal: killed");
    assert_eq!(
        ran.end.error.as_deref(),
        Some("killed at the deadline of its call: signal: killed")
    );
    // One that ends before its deadline is not touched.
    let options = CallOptions::default().with_header("connect-timeout-ms", "15000");
    assert_eq!(run(&envd, bash("true"), options).await.unwrap().end.error, None);
}

#[tokio::test]
async fn a_deadline_holds_while_the_client_does_not_read() {
    let envd = Envd::start();
    let options = CallOptions::default().with_header("connect-timeout-ms", "500");
    let stream = envd
        .client()
        .start_with_options(command("/usr/bin/yes", &[]), options)
        .await
        .unwrap();
    eventually("it runs", || !envd.children().is_empty()).await;
    eventually("it was killed", || envd.children().is_empty()).await;
    drop(stream);
}

#[tokio::test]
async fn a_deadline_too_near_to_start_in_leaves_nothing_running() {
    let envd = Envd::start();
    for millis in ["0", "1", "2", "3", "5"] {
        let options = CallOptions::default().with_header("connect-timeout-ms", millis);
        // Either it never started, or it was killed: both are right, and both must leave nothing.
        if let Ok(ran) = run(&envd, bash("sleep 1000"), options).await {
            assert_eq!(ran.end.exit_code, -1);
        }
    }
    eventually("nothing is left", || envd.children().is_empty()).await;
}

#[tokio::test]
async fn starts_that_fail_and_starts_that_do_not_never_take_each_other_s_status() {
    let envd = std::sync::Arc::new(Envd::start());
    let mut both = Vec::new();
    for _ in 0..50 {
        let envd = std::sync::Arc::clone(&envd);
        both.push(tokio::spawn(async move {
            let refused = run(&envd, command("/no/such/program", &[]), CallOptions::default()).await;
            let ran = run(&envd, bash("exit 5"), CallOptions::default()).await;
            (refused.unwrap_err().code, ran.unwrap().end.exit_code)
        }));
    }
    for both in both {
        assert_eq!(both.await.unwrap(), (ErrorCode::NotFound, 5));
    }
    assert_eq!(envd.children(), [] as [u32; 0]);
}

#[tokio::test]
async fn http_2_without_tls_carries_many_streams() {
    let envd = Envd::start();
    let config = ClientConfig::new(format!("http://{}", envd.address).parse().unwrap());
    let client = ProcessClient::new(HttpClient::plaintext_http2_only(), config);
    let mut streams = Vec::new();
    for number in 0..20 {
        streams.push(client.start(bash(&format!("sleep 0.2; echo {number}"))).await.unwrap());
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let (mut ran, mut events) = (Ran::default(), Vec::new());
        while events.last() != Some(&"end") {
            take(&mut ran, &mut events, next(stream).await);
        }
        assert_eq!(ran.out(), format!("{number}\n"));
    }
}

#[tokio::test]
async fn a_background_program_does_not_hold_back_the_end_and_lives_on() {
    let envd = Envd::start();
    let started = Instant::now();
    let script = "(trap '' HUP; while sleep 0.01; do echo noise; done) & echo $!";
    let ran = run(&envd, bash(script), CallOptions::default()).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    let out = ran.out();
    let background: u32 = out.lines().find(|line| *line != "noise").unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(is_running(background), "it lost its pipe and died of it");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(background as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

#[tokio::test]
async fn silence_is_broken_by_keepalives() {
    let envd = Envd::start();
    let options = CallOptions::default().with_header("keepalive-ping-interval", "1");
    let ran = run(&envd, bash("sleep 2.5"), options).await.unwrap();
    assert_eq!(ran.keepalives, 2);
}

#[tokio::test]
async fn many_short_processes_at_once_all_tell_their_own_exit_code() {
    let envd = std::sync::Arc::new(Envd::start());
    let runs: Vec<_> = (0..200)
        .map(|number| {
            let envd = std::sync::Arc::clone(&envd);
            tokio::spawn(async move {
                let ran = run(
                    &envd,
                    command("/bin/sh", &["-c", &format!("exit {number}")]),
                    CallOptions::default(),
                )
                .await;
                ran.unwrap().end.exit_code
            })
        })
        .collect();
    for (number, run) in runs.into_iter().enumerate() {
        assert_eq!(run.await.unwrap(), number as i32);
    }
    assert_eq!(envd.children(), [] as [u32; 0]);
}

fn terminal(cols: u32, rows: u32) -> PTY {
    let size = pty::Size {
        cols,
        rows,
        ..Default::default()
    };
    PTY {
        size: size.into(),
        ..Default::default()
    }
}

fn in_terminal(mut request: StartRequest, cols: u32, rows: u32) -> StartRequest {
    request.pty = terminal(cols, rows).into();
    request.tag = Some("terminal".to_owned());
    request
}

async fn type_in(envd: &Envd, input: Input) -> Result<(), ConnectError> {
    let input = ProcessInput {
        input: Some(input),
        ..Default::default()
    };
    let send = SendInputRequest {
        process: tag("terminal").into(),
        input: input.into(),
        ..Default::default()
    };
    envd.client().send_input(send).await.map(drop)
}

fn keys(text: &str) -> Input {
    Input::Pty(text.as_bytes().to_vec())
}

async fn resize(envd: &Envd, cols: u32, rows: u32) -> Result<(), ConnectError> {
    let update = UpdateRequest {
        process: tag("terminal").into(),
        pty: terminal(cols, rows).into(),
        ..Default::default()
    };
    envd.client().update(update).await.map(drop)
}

/// Reads until the terminal has shown `text`.
async fn until_shown(stream: &mut Stream, ran: &mut Ran, text: &str) {
    let mut events = Vec::new();
    while !String::from_utf8_lossy(&ran.pty).contains(text) {
        assert_ne!(events.last(), Some(&"end"), "{}", String::from_utf8_lossy(&ran.pty));
        take(ran, &mut events, next(stream).await);
    }
}

async fn until_end(stream: &mut Stream, ran: &mut Ran) {
    let mut events = Vec::new();
    while events.last() != Some(&"end") {
        take(ran, &mut events, next(stream).await);
    }
}

#[tokio::test]
async fn a_terminal_echoes_has_a_size_and_passes_its_keys_on() {
    let envd = Envd::start();
    let script = "trap 'echo size $(stty size)' WINCH; tty; echo $TERM; stty size; echo ready; \
        while true; do read line && echo \"<$line>\"; done";
    let mut stream = envd.client().start(in_terminal(bash(script), 100, 30)).await.unwrap();
    let mut ran = Ran::default();
    until_shown(&mut stream, &mut ran, "ready\r\n").await;
    let shown = String::from_utf8_lossy(&ran.pty).into_owned();
    assert!(
        shown.starts_with("/dev/pts/") && shown.contains("xterm-256color\r\n30 100\r\n"),
        "{shown}"
    );
    type_in(&envd, keys("hello\r")).await.unwrap();
    until_shown(&mut stream, &mut ran, "hello\r\n<hello>\r\n").await;
    resize(&envd, 132, 43).await.unwrap();
    // The shell tells it once it has waited out the line that it reads.
    type_in(&envd, keys("\r")).await.unwrap();
    until_shown(&mut stream, &mut ran, "size 43 132").await;
    assert_eq!(
        resize(&envd, 70_000, 1).await.unwrap_err().code,
        ErrorCode::InvalidArgument
    );
    let pipe = type_in(&envd, Input::Stdin(b"x".to_vec())).await.unwrap_err();
    assert_eq!(pipe.code, ErrorCode::FailedPrecondition);
    let close = CloseStdinRequest {
        process: tag("terminal").into(),
        ..Default::default()
    };
    let close = envd.client().close_stdin(close).await.unwrap_err();
    assert_eq!(close.code, ErrorCode::FailedPrecondition);
    // Ctrl-C ends it.
    type_in(&envd, keys("\u{3}")).await.unwrap();
    until_end(&mut stream, &mut ran).await;
    assert_eq!(ran.end.status, "signal: interrupt");
    assert!(ran.stdout.is_empty() && ran.stderr.is_empty() && ran.largest <= 16 << 10);
    assert_eq!(resize(&envd, 80, 24).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_process_with_pipes_has_no_terminal() {
    let envd = Envd::start();
    let mut request = command("/bin/cat", &[]);
    request.stdin = None;
    request.tag = Some("terminal".to_owned());
    let mut stream = envd.client().start(request).await.unwrap();
    let mut ran = Ran::default();
    take(&mut ran, &mut Vec::new(), next(&mut stream).await);
    for refused in [type_in(&envd, keys("x")).await, resize(&envd, 80, 24).await] {
        assert_eq!(refused.unwrap_err().code, ErrorCode::FailedPrecondition);
    }
    type_in(&envd, Input::Stdin(b"x".to_vec())).await.unwrap();
    let close = CloseStdinRequest {
        process: tag("terminal").into(),
        ..Default::default()
    };
    envd.client().close_stdin(close).await.unwrap();
    until_end(&mut stream, &mut ran).await;
    assert_eq!(ran.out(), "x");
}

#[tokio::test]
async fn what_a_terminal_showed_last_arrives_and_what_is_still_in_it_is_hung_up() {
    let envd = Envd::start();
    let script = "(trap 'exit 0' HUP; while true; do sleep 0.01; done) & echo $!; seq 1000000 1029999; exit 5";
    let mut stream = envd.client().start(in_terminal(bash(script), 0, 0)).await.unwrap();
    let mut ran = Ran::default();
    until_end(&mut stream, &mut ran).await;
    assert_eq!(ran.end.exit_code, 5);
    let shown = String::from_utf8(ran.pty).unwrap();
    let (background, rest) = shown.split_once("\r\n").unwrap();
    let expected: String = (1_000_000..1_030_000).map(|number| format!("{number}\r\n")).collect();
    // The background program may have a word about its end.
    assert!(
        rest.starts_with(&expected),
        "{} bytes of {}",
        rest.len(),
        expected.len()
    );
    let background = background.parse().unwrap();
    eventually("it is hung up", || !is_running(background)).await;
    // Without any size, it is what is usual; one that no terminal can have is refused.
    let mut request = bash("stty size");
    request.pty = PTY::default().into();
    assert_eq!(
        run(&envd, request, CallOptions::default()).await.unwrap().pty,
        b"24 80\r\n"
    );
    let refusal = run(&envd, in_terminal(bash("true"), 1, 70_000), CallOptions::default()).await;
    assert_eq!(refusal.unwrap_err().code, ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn a_terminal_is_its_user_s() {
    if !can_become_another_user() {
        return;
    }
    let envd = Envd::start();
    let request = in_terminal(bash("echo opened > $(tty) && stat -c %U $(tty)"), 80, 24);
    let ran = run(&envd, request, as_user("nobody")).await.unwrap();
    assert_eq!(String::from_utf8(ran.pty).unwrap(), "opened\r\nnobody\r\n");
}

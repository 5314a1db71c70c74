//! What callers do in a sandbox: processes and their output, terminals, files, the proxy, metrics.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use roost_tests::roost::{
    self, PKI, Sandbox, call, certificates, curl, enveloped, kill_9, messages, pids, roost, wait_for_agent,
};
use roost_tests::{eventually, in_rig, is_full_size, show};
use serde_json::{Value, json};

/// Counts to 60, five a second, and ends with 7.
const COUNTER: &str = "for n in $(seq 60); do echo line $n; echo side $n >&2; sleep 0.2; done; exit 7";

#[test]
fn output_is_whole_though_the_agent_is_killed_and_started_anew_meanwhile() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let mut reader = Command::new("roost")
            .args(["exec", &sandbox.id, "--", "/bin/sh", "-c", COUNTER])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let mut stdout = reader.stdout.take().expect("a pipe");
        let mut first = [0; 1];
        stdout
            .read_exact(&mut first)
            .expect("output comes while the command runs");
        kill_9("roost-agent");
        wait_for_agent();
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).expect("text");
        let output = reader.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(7), "{said}");
        let numbered = |word: &str| (1..=60).map(|n| format!("{word} {n}\n")).collect::<String>();
        assert_eq!(format!("{}{rest}", char::from(first[0])), numbered("line"));
        assert_eq!(said, numbered("side"), "nothing is lost, twice, or said besides");
    });
}

#[test]
fn a_command_that_was_left_is_found_again_and_says_what_was_lost() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let id = &sandbox.id;
        let started = call(
            "StartBackground",
            &json!({"sandboxId": id, "cmd": "/bin/sh", "args": ["-c", "seq 200000; sleep 1000"], "tag": "counter"}),
        );
        assert_eq!(started.body["tag"], "counter", "{started:?}");
        let pid = started.body["pid"].as_u64().expect("a pid");
        let listed = call("ListProcesses", &json!({"sandboxId": id}));
        assert_eq!(listed.body["processes"][0]["pid"], pid, "{listed:?}");
        assert_eq!(listed.body["processes"][0]["tag"], "counter", "{listed:?}");
        // 200,000 numbers are more than is kept of them: the beginning is lost, and said to be.
        let all: u64 = (1..=200_000_u64).map(|n| n.to_string().len() as u64 + 1).sum();
        let (mut offset, mut lost, mut kept) = (0, 0, Vec::new());
        let events = eventually("all of it to be written", || {
            let events = streamed(
                "ConnectProcess",
                &json!({"sandboxId": id, "tag": "counter", "offset": "0"}),
                "5",
            );
            let end = |event: &Value| number(&event["offset"]) + data(event).len() as u64;
            (events.iter().map(end).max() == Some(all)).then_some(events)
        });
        for event in &events {
            lost += number(&event["cut"]);
            assert_eq!(number(&event["offset"]), offset + number(&event["cut"]), "{event}");
            kept.extend(data(event));
            offset = number(&event["offset"]) + data(event).len() as u64;
        }
        assert_eq!(offset, all);
        assert!(
            lost > 0 && lost + kept.len() as u64 == all,
            "{lost} lost, {} kept",
            kept.len()
        );
        assert!(kept.ends_with(b"\n199999\n200000\n"));
        show(&format!(
            "NOTE: of {all} bytes that nobody read, {} were kept",
            kept.len()
        ));

        let request = json!({"sandboxId": id, "pid": pid, "signal": "SIGTERM"});
        assert_eq!(call("KillProcess", &request).status, 200);
        eventually("it to end", || {
            let listed = call("ListProcesses", &json!({"sandboxId": id}));
            listed.body.get("processes").is_none().then_some(())
        });
        assert_eq!(call("KillProcess", &request).body["code"], "not_found");
        // Its end is kept for whoever asks.
        let ended = streamed("ConnectProcess", &json!({"sandboxId": id, "tag": "counter"}), "30");
        assert_eq!(ended.last().expect("an end")["end"]["exitCode"], 143, "{ended:?}");
    });
}

#[test]
fn a_terminal_has_a_size_and_keys_and_outlives_its_reader() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let id = &sandbox.id;
        // `script` is a terminal for roost.
        let mut terminal = Command::new("script")
            .args(["--quiet", "--return", "--command"])
            .arg(format!("stty rows 41 cols 97; roost exec -it {id} -- /bin/bash --norc"))
            .arg("/dev/null")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script runs");
        let mut keys = terminal.stdin.take().expect("a pipe");
        keys.write_all(b"stty size; tty; echo $TERM | wc -c; sleep 1000\n")
            .expect("typed");
        let mut shown = String::new();
        let mut screen = terminal.stdout.take().expect("a pipe");
        let mut piece = [0; 4096];
        let mut until = |word: &str, shown: &mut String| {
            while !shown.contains(word) {
                let read = screen.read(&mut piece).expect("read");
                assert!(read > 0, "{word:?} never came: {shown:?}");
                shown.push_str(&String::from_utf8_lossy(&piece[..read]));
            }
        };
        until("41 97", &mut shown);
        until("/dev/pts/", &mut shown);
        // Ctrl-C ends the sleep, and not the shell.
        eventually("the sleep", || sandbox.sh("pgrep -x sleep || true").parse::<u32>().ok());
        keys.write_all(b"\x03").expect("typed");
        eventually("the sleep to be gone", || {
            sandbox
                .sh("pgrep -x sleep || echo none")
                .ends_with("none")
                .then_some(())
        });
        keys.write_all(b"exit 5\n").expect("typed");
        drop(keys);
        assert_eq!(terminal.wait().expect("it ends").code(), Some(5), "{shown:?}");

        // The protocol's own terminal: started by one call, typed into by others, and read again by a second stream.
        let request = json!({"sandboxId": id, "tag": "shell", "cmd": "/bin/cat", "cols": 90, "rows": 20});
        let events = streamed("PtyAttach", &request, "3");
        assert_eq!(events[0]["started"]["tag"], "shell", "{events:?}");
        let typed = json!({"sandboxId": id, "tag": "shell", "data": "aGVsbG8K"});
        assert_eq!(call("PtySendInput", &typed).status, 200);
        assert_eq!(
            call(
                "PtyResize",
                &json!({"sandboxId": id, "tag": "shell", "cols": 100, "rows": 30})
            )
            .status,
            200
        );
        eventually("the echo, and cat's own line", || {
            let events = streamed(
                "PtyAttach",
                &json!({"sandboxId": id, "tag": "shell", "offset": "0"}),
                "3",
            );
            let text: Vec<u8> = events
                .iter()
                .flat_map(|event| decode(&event["output"]["data"]))
                .collect();
            (text == b"hello\r\nhello\r\n").then_some(())
        });
        assert_eq!(call("PtyKill", &json!({"sandboxId": id, "tag": "shell"})).status, 200);
        assert_eq!(call("PtySendInput", &typed).body["code"], "not_found");

        edits_within_tmux(&sandbox);
    });
}

/// An editor in `roost exec -it` in tmux, a terminal within a terminal: it draws, is typed into, and follows its window's size.
fn edits_within_tmux(sandbox: &Sandbox) {
    let tmux = |arguments: &[&str]| {
        let output = Command::new("tmux")
            .args(["-L", "roost-tests"])
            .args(arguments)
            .env("LANG", "C.UTF-8")
            .output()
            .expect("tmux runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        said
    };
    let screen = || tmux(&["capture-pane", "-p"]);
    let shows = |word: &str| {
        eventually(&format!("{word:?} on the screen"), || {
            screen().contains(word).then_some(())
        })
    };
    // By a file, since tmux itself does not always notice: on one processor it never waits for what has ended.
    let status = "/tmp/edited.status";
    drop(std::fs::remove_file(status));
    let command = format!(
        "roost exec -it {} -- vi -u NONE /root/written; echo $? > {status}; sleep 1000",
        sandbox.id
    );
    tmux(&["new-session", "-d", "-x", "90", "-y", "25", &command]);
    // The lines of an empty file, which may come behind its name.
    shows("written");
    shows("~");
    let keys = |keys: &[&str]| tmux(&[&["send-keys"], keys].concat());
    // Asked again where no answer comes: an editor that is still starting throws away what has been typed. But not at once: one that
    // has more to read draws nothing.
    let has_columns = |columns: u16| {
        eventually("the editor to have its size", || {
            keys(&["Escape", ":set columns?", "Enter"]);
            (0..50).find_map(|_| {
                std::thread::sleep(Duration::from_millis(100));
                screen().contains(&format!("columns={columns}")).then_some(())
            })
        });
    };
    has_columns(90);
    tmux(&["resize-window", "-x", "101", "-y", "31"]);
    has_columns(101);
    keys(&["Escape", "ihello", "Enter", "world", "Escape", "ggxp"]);
    shows("ehllo");
    keys(&[":wq", "Enter"]);
    let ended = eventually("the editor to have ended", || {
        std::fs::read_to_string(status).ok().filter(|text| text.ends_with('\n'))
    });
    assert_eq!(ended, "0\n");
    assert_eq!(sandbox.sh("cat /root/written"), "ehllo\nworld");
    tmux(&["kill-server"]);
}

#[test]
fn files_go_in_and_out_whole_and_the_agent_holds_none_of_them() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "512", "--disk", "4096"]);
        let id = &sandbox.id;
        let dir = "/tmp/copied";
        drop(std::fs::remove_dir_all(dir));
        std::fs::create_dir_all(format!("{dir}/tree/below")).expect("made");
        std::fs::write(format!("{dir}/tree/program"), "#!/bin/sh\necho it runs\n").expect("written");
        std::fs::write(format!("{dir}/tree/below/empty"), "").expect("written");
        std::fs::write(format!("{dir}/tree/below/a name with 'signs' & \u{e4}"), [0, 255, 10]).expect("written");
        std::os::unix::fs::symlink("program", format!("{dir}/tree/link")).expect("linked");
        sh(&format!("chmod 755 {dir}/tree/program"));
        roost::ok(&["cp", &format!("{dir}/tree"), &format!("{id}:/root/tree")]);
        assert_eq!(sandbox.sh("/root/tree/link"), "it runs");
        roost::ok(&["cp", &format!("{id}:/root/tree"), &format!("{dir}/back")]);
        sh(&format!(
            "diff -r --no-dereference {dir}/tree {dir}/back && test -x {dir}/back/program"
        ));

        let mebibytes = if is_full_size() { 1024 } else { 64 };
        let large = format!("{dir}/large");
        sh(&format!("head -c {mebibytes}M /dev/urandom > {large}"));
        let before = peak();
        roost::ok(&["cp", &large, &format!("{id}:/root/large")]);
        let up = peak();
        roost::ok(&["cp", &format!("{id}:/root/large"), &format!("{large}.back")]);
        let down = peak();
        sh(&format!("cmp {large} {large}.back"));
        show(&format!(
            "NOTE: {mebibytes} MiB up and down: the agent's peak {before} KiB, then {up}, then {down}"
        ));
        // Two pieces of each copy and what allocators keep; nothing that grows with the file.
        assert!(
            down < before + 24 * 1024,
            "the agent held a file: {before}, {up}, {down} KiB"
        );

        let error = roost::fails(&["cp", &format!("{id}:/root/nothing"), dir]);
        assert!(error.contains("/root/nothing"), "{error}");
        drop(std::fs::remove_dir_all(dir));
    });
}

#[test]
fn a_file_that_breaks_off_on_its_way_is_as_it_was() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let id = &sandbox.id;
        sandbox.sh("echo before > /root/kept");
        // An envelope that says more than comes.
        let meta = json!({"meta": {"sandboxId": id, "path": "/root/kept"}});
        let chunk = json!({"chunk": "YWZ0ZXI="});
        let mut body = [enveloped(&meta), enveloped(&chunk)].concat();
        body.extend([0, 0, 0, 1, 0, b'{']);
        std::fs::write("/tmp/broken", body).expect("written");
        let certificates = certificates(PKI);
        let mut args: Vec<&str> = certificates.iter().map(String::as_str).collect();
        let url = "https://127.0.0.1:50051/hostagent.v1.HostAgentService/WriteFileStream";
        args.extend([
            "-H",
            "Content-Type: application/connect+json",
            "--data-binary",
            "@/tmp/broken",
            url,
        ]);
        let answer = curl(&args);
        assert!(answer.text.contains("\"error\""), "{answer:?}");
        assert_eq!(sandbox.sh("cat /root/kept"), "before");
    });
}

#[test]
fn every_call_of_a_guest_answers_what_it_is_asked_and_refuses_what_it_cannot() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let id = &sandbox.id;
        let fine = |procedure: &str, mut request: Value| {
            request["sandboxId"] = json!(id);
            let answer = call(procedure, &request);
            assert_eq!(answer.status, 200, "{procedure} {request}: {answer:?}");
            answer.body
        };
        let made = fine("MakeDir", json!({"path": "/root/dir/below"}));
        assert_eq!(made["entry"]["type"], "directory", "{made}");
        fine("WriteFile", json!({"path": "/root/dir/file", "content": "AAH/"}));
        assert_eq!(fine("ReadFile", json!({"path": "/root/dir/file"}))["content"], "AAH/");
        let listed = fine("ListDir", json!({"path": "/root/dir", "depth": 1}));
        let mut names: Vec<&str> = listed["entries"]
            .as_array()
            .expect("entries")
            .iter()
            .map(|entry| entry["name"].as_str().expect("a name"))
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["below", "file"], "{listed}");
        fine("RemovePath", json!({"path": "/root/dir"}));
        sandbox.sh("! test -e /root/dir");
        eventually("samples", || {
            let metrics = fine("GetSandboxMetrics", json!({"range": "5m"}));
            let points = metrics["points"].as_array()?;
            let is_sound =
                |point: &Value| number(&point["memBytes"]) > 1 << 20 && number(&point["diskBytes"]) > 1 << 20;
            points.iter().any(is_sound).then_some(())
        });
        let watched = curl(&["http://127.0.0.1:50052/metrics"]).text;
        for line in [
            "roost_sandboxes{state=\"running\"} 1",
            "roost_operation_seconds_count{kind=\"create\",outcome=\"ok\"}",
            "roost_privd_call_seconds_count{kind=\"open_disk\",outcome=\"ok\"}",
        ] {
            assert!(watched.contains(line), "{line} is not in {watched}");
        }
        assert!(!watched.contains(id.as_str()), "no time series is one sandbox's");
        let flushed = fine("FlushSandboxMetrics", json!({}));
        for ring in ["points10m", "points2h", "points24h"] {
            assert!(
                !flushed[ring].as_array().expect("points").is_empty(),
                "{ring}: {flushed}"
            );
        }
        let events = streamed(
            "ExecStream",
            &json!({"sandboxId": id, "cmd": "/bin/sh", "args": ["-c", "echo out; exit 3"]}),
            "30",
        );
        assert!(
            events[0]["start"]["pid"].as_u64().is_some_and(|pid| pid > 0),
            "{events:?}"
        );
        assert_eq!(data(&events[1]), b"out\n");
        assert_eq!(events[2]["end"]["exitCode"], 3, "{events:?}");

        for (procedure, request, code) in [
            ("WriteFile", json!({"path": ""}), "invalid_argument"),
            ("WriteFile", json!({"path": "/proc/nothing/here"}), "not_found"),
            ("ReadFile", json!({"path": "/root/absent"}), "not_found"),
            ("ReadFile", json!({"path": "/root"}), "invalid_argument"),
            ("ReadFile", json!({"path": "a\u{0}b"}), "invalid_argument"),
            ("ReadFile", json!({"path": "x".repeat(5000)}), "invalid_argument"),
            ("ListDir", json!({"path": "/root/absent"}), "not_found"),
            ("ListDir", json!({"path": "/", "depth": 101}), "invalid_argument"),
            ("MakeDir", json!({"path": "/root"}), "already_exists"),
            ("RemovePath", json!({"path": "/"}), "invalid_argument"),
            ("StartBackground", json!({"cmd": ""}), "invalid_argument"),
            ("StartBackground", json!({"cmd": "/bin/absent"}), "invalid_argument"),
            (
                "StartBackground",
                json!({"cmd": "a", "tag": "x".repeat(257)}),
                "invalid_argument",
            ),
            (
                "StartBackground",
                json!({"cmd": "a", "envs": {"A=B": "c"}}),
                "invalid_argument",
            ),
            ("KillProcess", json!({}), "invalid_argument"),
            ("KillProcess", json!({"pid": 1}), "not_found"),
            ("KillProcess", json!({"pid": 1, "signal": "SIGHUP"}), "invalid_argument"),
            ("PtySendInput", json!({"tag": "nobody"}), "not_found"),
            ("PtySendInput", json!({"tag": ""}), "invalid_argument"),
            ("PtyResize", json!({"tag": "nobody", "cols": 65536}), "invalid_argument"),
            ("PtyKill", json!({"tag": "nobody"}), "not_found"),
            ("GetSandboxMetrics", json!({"range": "7m"}), "invalid_argument"),
        ] {
            let mut request = request;
            request["sandboxId"] = json!(id);
            let answer = call(procedure, &request);
            assert_eq!(answer.body["code"], code, "{procedure} {request}: {answer:?}");
        }
        for procedure in [
            "WriteFile",
            "ReadFile",
            "ListDir",
            "MakeDir",
            "RemovePath",
            "ListProcesses",
            "FlushSandboxMetrics",
        ] {
            let answer = call(procedure, &json!({"sandboxId": "nobody", "path": "/a"}));
            assert_eq!(answer.body["code"], "not_found", "{procedure}: {answer:?}");
        }
        sandbox.pause();
        for procedure in ["ReadFile", "ListProcesses"] {
            let answer = call(procedure, &json!({"sandboxId": id, "path": "/a"}));
            assert_eq!(answer.body["code"], "failed_precondition", "{procedure}: {answer:?}");
        }
        let listing = roost::ok(&["logs", id]);
        assert_eq!(listing, "", "what a VM of before wrote has gone with it");
    });
}

/// Answers every request with its first line, from the guest's own loopback alone.
const SERVER: &str = "use IO::Socket::INET; $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 8080, Listen => 9, ReuseAddr => 1) or die;
    while ($c = $s->accept) { $line = <$c>; while (<$c>) { last if /^\\r?$/ } $line =~ s/\\s+$//;
    print $c \"HTTP/1.1 200 OK\\r\\nContent-Length: \" . length($line) . \"\\r\\nConnection: close\\r\\n\\r\\n$line\"; close $c }";

#[test]
fn a_port_of_a_guest_is_reached_through_the_proxy_and_by_forward() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let id = sandbox.id.clone();
        roost::ok(&["exec", "--detach", &id, "--", "perl", "-e", SERVER]);
        let proxied = |path: &str| {
            let url = format!("https://127.0.0.1:50051/proxy/{id}/{path}");
            let certificates = certificates(PKI);
            let mut args: Vec<&str> = certificates.iter().map(String::as_str).collect();
            args.extend(["--path-as-is", &url]);
            curl(&args)
        };
        // What listens on the loopback is forwarded within a second or so.
        eventually("the server", || (proxied("8080/").status == 200).then_some(()));
        let answer = proxied("8080/a%2Fb//c/../d?x=%20&y");
        assert_eq!(answer.text, "GET /a%2Fb//c/../d?x=%20&y HTTP/1.1");
        assert_eq!(
            proxied("49983/health").status,
            403,
            "envd is not for whoever may see a preview"
        );
        assert_eq!(proxied("0/").status, 400);
        assert_eq!(proxied("8081/").status, 502);

        let mut forward = Command::new("roost")
            .args(["forward", &id, "18080:8080"])
            .stdout(Stdio::null())
            .spawn()
            .expect("started");
        eventually("the forwarded port", || {
            let answer = curl(&["http://127.0.0.1:18080/forwarded"]);
            (answer.text == "GET /forwarded HTTP/1.1").then_some(())
        });
        forward.kill().expect("killed");
        forward.wait().expect("it ends");

        sandbox.pause();
        assert_eq!(proxied("8080/").status, 503);
        sandbox.resume();
        eventually("the server, which has slept", || {
            (proxied("8080/").status == 200).then_some(())
        });
    });
}

#[test]
fn a_sandbox_for_one_command_leaves_nothing() {
    in_rig(|| {
        let output = roost(&["run", "--memory", "256", "--", "/bin/sh", "-c", "echo once; exit 4"]);
        assert_eq!(
            (output.status.code(), &output.stdout[..]),
            (Some(4), &b"once\n"[..]),
            "{output:?}"
        );
        let top = roost::ok(&["top"]);
        assert_eq!(top.lines().count(), 1, "{top}");
    });
}

/// The messages of a stream, for as many seconds as it goes on or is read.
fn streamed(procedure: &str, request: &Value, seconds: &str) -> Vec<Value> {
    std::fs::write("/tmp/stream-request", enveloped(request)).expect("written");
    let output = Command::new("curl")
        .args(["--silent", "--no-buffer", "--max-time", seconds])
        .args(certificates(PKI))
        .args([
            "-H",
            "Content-Type: application/connect+json",
            "--data-binary",
            "@/tmp/stream-request",
        ])
        .arg(format!(
            "https://127.0.0.1:50051/hostagent.v1.HostAgentService/{procedure}"
        ))
        .output()
        .expect("curl runs");
    messages(procedure, &output.stdout)
}

/// The bytes of a message with output.
fn data(event: &Value) -> Vec<u8> {
    decode(&event["data"]["stdout"])
}

fn decode(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap_or_default();
    BASE64_STANDARD.decode(text).expect("base64")
}

/// A number of JSON, where those of 64 bits are texts and those that are 0 may be absent.
fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.parse().expect("digits"),
        Value::Number(number) => number.as_u64().expect("not negative"),
        _ => 0,
    }
}

/// The agent's highest use of memory since it was last asked for, in KiB.
fn peak() -> u64 {
    let pid = *pids("roost-agent").first().expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a line of every process");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn sh(script: &str) {
    let output = Command::new("/bin/bash")
        .args(["-c", script])
        .output()
        .expect("bash runs");
    assert!(
        output.status.success(),
        "{script}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

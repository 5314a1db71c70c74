//! The API as its page shows it, many streams of it at a time, and what its logs say of a caller's trace.

use std::path::Path;
use std::process::{Child, Command};

use roost_tests::roost::{self, PKI, Sandbox, certificates, enveloped, messages, pids};
use roost_tests::{in_rig, show};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../agent/proto/README.md");

/// Of whom what is said does not matter.
const ANYTHING: &str = "…";

/// A script of the page, and the answers that it must have; none where the page shows none.
#[derive(Debug, PartialEq)]
pub(crate) struct Example<'a> {
    pub(crate) script: &'a str,
    answers: Option<&'a str>,
}

pub(crate) fn examples(page: &str) -> Vec<Example<'_>> {
    let mut examples = Vec::new();
    let mut rest = page;
    while let Some((_, block)) = rest.split_once("```sh\n") {
        let (script, after) = block.split_once("```\n").expect("a block ends");
        let (answers, after) = match after.strip_prefix("```json\n") {
            Some(block) => {
                let (answers, after) = block.split_once("```\n").expect("a block ends");
                (Some(answers), after)
            }
            None => (None, after),
        };
        examples.push(Example { script, answers });
        rest = after;
    }
    examples
}

/// Why an answer is not what the page says; what the page leaves out may be there.
fn difference(said: &Value, shown: &Value) -> Option<String> {
    match (said, shown) {
        (_, Value::String(text)) if text == ANYTHING => None,
        (Value::Object(said), Value::Object(shown)) => shown.iter().find_map(|(name, shown)| match said.get(name) {
            Some(said) => difference(said, shown),
            None => Some(format!("{name} is missing")),
        }),
        (Value::Array(said), Value::Array(shown)) if said.len() == shown.len() => {
            said.iter().zip(shown).find_map(|(said, shown)| difference(said, shown))
        }
        (said, shown) if said == shown => None,
        (said, shown) => Some(format!("{said} is not {shown}")),
    }
}

fn values(text: &str) -> Vec<Value> {
    let values: Result<_, _> = serde_json::Deserializer::from_str(text).into_iter().collect();
    values.unwrap_or_else(|error| panic!("{error} in {text}"))
}

#[test]
fn the_examples_of_the_api_page_have_the_answers_that_it_shows() {
    let examples = examples(PAGE);
    assert!(examples.len() > 12, "the page has fewer examples than groups of calls");
    let groups = PAGE.lines().filter(|line| line.starts_with("## ")).count();
    let shown = examples.iter().filter(|example| example.answers.is_some()).count();
    assert!(shown >= groups, "{groups} groups, {shown} examples with an answer");
    in_rig(|| {
        // One shell, as of who reads it from top to bottom.
        let script =
            |(number, example): (usize, &Example<'_>)| format!("{{\n{}}} > /tmp/api-page.{number}\n", example.script);
        let script: String = examples.iter().enumerate().map(script).collect();
        // Where a call fails that an example waits for, it would wait for ever.
        let output = Command::new("timeout")
            .args(["300", "bash", "-euc", &script])
            .output()
            .expect("bash runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {error}", output.status);
        for (number, example) in examples.iter().enumerate() {
            let said = std::fs::read_to_string(format!("/tmp/api-page.{number}")).expect("written");
            let (said, shown) = (values(&said), values(example.answers.unwrap_or_default()));
            assert_eq!(
                said.len(),
                shown.len(),
                "{}: {said:?} where the page has {shown:?}",
                example.script
            );
            for (said, shown) in said.iter().zip(&shown) {
                if let Some(difference) = difference(said, shown) {
                    panic!(
                        "{difference}: {} says {said} where the page has {shown}",
                        example.script
                    );
                }
            }
        }
    });
}

/// Connections at a time: an emulated host shakes few hands a second, and a client has ten seconds for its own.
const CONNECTIONS: usize = 4;
/// Processes that each connection reads, and readers of each process: no more than 16 clients may read one.
const PROCESSES: usize = 5;
const READERS: usize = 10;
/// Streams of a connection, and all of them.
const STREAMS: usize = PROCESSES * READERS;
const ALL: usize = CONNECTIONS * STREAMS;

#[test]
fn two_hundred_streams_at_a_time_each_have_all_of_it() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "512"]);
        let id = &sandbox.id;
        // It begins when it is told to, and goes on for some seconds, so that all read at once.
        let counter = "until test -e /tmp/go; do sleep 0.2; done; for n in $(seq 40); do echo line $n; sleep 0.1; done";
        let dir = Path::new("/tmp/streams");
        drop(std::fs::remove_dir_all(dir));
        std::fs::create_dir(dir).expect("made");
        for process in 0..CONNECTIONS * PROCESSES {
            let tag = format!("counter-{process}");
            let request = json!({"sandboxId": id, "cmd": "/bin/sh", "args": ["-c", counter], "tag": tag});
            let started = roost::call("StartBackground", &request);
            assert_eq!(started.status, 200, "{started:?}");
            let request = enveloped(&json!({"sandboxId": id, "tag": tag, "offset": "0"}));
            std::fs::write(dir.join(format!("request-{process}")), request).expect("written");
        }
        let before = resident();
        let mut readers: Vec<Child> = (0..CONNECTIONS).map(|connection| read_by(connection, dir)).collect();
        // Each has been told which process it reads.
        roost_tests::eventually("all to read", || {
            let reads = |reader: &usize| {
                let read = std::fs::metadata(dir.join(reader.to_string()));
                read.is_ok_and(|metadata| metadata.len() > 0)
            };
            (0..ALL).all(|reader| reads(&reader)).then_some(())
        });
        let meanwhile = resident();
        sandbox.sh("touch /tmp/go");
        for reader in &mut readers {
            assert!(reader.wait().expect("it ends").success(), "a stream failed");
        }
        let whole: String = (1..=40).map(|n| format!("line {n}\n")).collect();
        for reader in 0..ALL {
            let (text, end) = output(&std::fs::read(dir.join(reader.to_string())).expect("written"));
            assert_eq!((text.as_str(), end), (whole.as_str(), 1), "reader {reader}");
        }
        show(&format!(
            "NOTE: {ALL} streams at a time: the agent has {before} KiB before, {meanwhile} KiB meanwhile"
        ));
        // Buffers of a stream and its two connections, and of what allocators keep.
        assert!(
            meanwhile < before + ALL as u64 * 256,
            "{before} KiB, then {meanwhile} KiB"
        );
        assert_eq!(sandbox.sh("echo more"), "more");
    });
}

/// A curl that reads the output of its processes, each several times, on one connection.
fn read_by(connection: usize, dir: &Path) -> Child {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--parallel", "--no-progress-meter"]);
    for stream in 0..STREAMS {
        if stream > 0 {
            curl.arg("--next");
        }
        let process = connection * PROCESSES + stream / READERS;
        curl.args(certificates(PKI))
            .args(["--silent", "--http2", "--no-buffer", "--max-time", "300"])
            .args(["--header", "Content-Type: application/connect+json"])
            .arg("--data-binary")
            .arg(format!("@{}/request-{process}", dir.display()))
            .arg("--output")
            .arg(dir.join((connection * STREAMS + stream).to_string()))
            .arg("https://127.0.0.1:50051/hostagent.v1.HostAgentService/ConnectProcess");
    }
    curl.spawn().expect("curl runs")
}

/// The output in a stream's messages, and how many ends there are.
fn output(stream: &[u8]) -> (String, usize) {
    use base64::Engine as _;
    let (mut text, mut ends) = (String::new(), 0);
    for message in messages("ConnectProcess", stream) {
        let data = message["data"]["stdout"].as_str().unwrap_or_default();
        let bytes = base64::prelude::BASE64_STANDARD.decode(data).expect("base64");
        text.push_str(&String::from_utf8(bytes).expect("text"));
        ends += usize::from(message.get("end").is_some());
    }
    (text, ends)
}

/// The agent's memory, in KiB.
fn resident() -> u64 {
    let pid = *pids("roost-agent").first().expect("it runs");
    let pages = std::fs::read_to_string(format!("/proc/{pid}/statm")).expect("it runs");
    let pages: u64 = pages.split(' ').nth(1).expect("a column").parse().expect("a number");
    pages * 4
}

#[test]
fn a_callers_trace_is_found_in_the_logs_of_the_agent_and_of_privd() {
    in_rig(|| {
        let trace = format!("0af7651916cd43dd{:016x}", std::process::id());
        let certificates = certificates(PKI);
        let mut args: Vec<&str> = certificates.iter().map(String::as_str).collect();
        let parent = format!("traceparent: 00-{trace}-b7ad6b7169203331-01");
        let id = "cl-traced";
        let request = json!({"sandboxId": id, "memoryMb": 128}).to_string();
        args.extend(["--header", "Content-Type: application/json", "--header", &parent]);
        args.extend(["--data", &request]);
        args.push("https://127.0.0.1:50051/hostagent.v1.HostAgentService/CreateSandbox");
        let made = roost::curl(&args);
        assert_eq!(made.status, 200, "{made:?}");
        roost::ok(&["rm", id]);
        let journal = |unit: &str| {
            let output = Command::new("journalctl")
                .args(["--quiet", "--output", "cat", "--unit", unit, "--grep", &trace])
                .output()
                .expect("journalctl runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        roost_tests::eventually("privd's lines", || {
            let lines = journal("roost-privd");
            (lines.contains("open_disk") && lines.contains("open_network")).then_some(())
        });
        let lines = journal("roost-agent");
        assert!(lines.contains("CreateSandbox") && lines.contains(id), "{lines}");
        assert!(!lines.contains("to=\"stopping\""), "another call's line: {lines}");
    });
}

//! The REST API: HTTP/1.1 with keep-alive on the listener that was passed in, a thread per connection. Requests take
//! effect one after the other, behind the VMM's lock.
//!
//! Status codes are cloud-hypervisor's: 200 with a body, 204 without, 400 for a bad request, 404 for an unknown path or a
//! VM that is not created, 500 for the rest; an error's body is the chain of messages as a JSON array. What the real one
//! knows and this one does not is 501.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

use crate::vm::{Refusal, Vmm};

const ROOT: &str = "/api/v1/";
const MAX_BODY: usize = 4 << 20;
const MAX_HEAD: u64 = 16 << 10;

/// Serves for as long as the process lives.
pub(crate) fn serve(listener: &UnixListener, vmm: &Arc<Vmm>) {
    for stream in listener.incoming() {
        let vmm = Arc::clone(vmm);
        let spawned = stream.and_then(|stream| {
            thread::Builder::new().name("http".to_owned()).spawn(move || {
                if let Err(error) = converse(stream, &vmm) {
                    eprintln!("standin-vmm: API connection: {error}");
                }
            })
        });
        if let Err(error) = spawned {
            eprintln!("standin-vmm: API: {error}");
        }
    }
}

struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    body: Option<Value>,
    /// The process ends once the answer is out.
    last: bool,
}

fn converse(stream: UnixStream, vmm: &Vmm) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader, &mut writer)? {
        let answer = answer(&request, vmm);
        write(&mut writer, &answer)?;
        if answer.last {
            vmm.stop();
        }
    }
    Ok(())
}

/// The next request, or nothing at the connection's orderly end.
fn read(reader: &mut BufReader<UnixStream>, writer: &mut UnixStream) -> io::Result<Option<Request>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut head = reader.by_ref().take(MAX_HEAD);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(path), Some("HTTP/1.1" | "HTTP/1.0")) = (words.next(), words.next(), words.next()) else {
        return Err(bad("not an HTTP request"));
    };
    let (method, path) = (method.to_owned(), path.split('?').next().unwrap_or(path).to_owned());
    let (mut length, mut expects) = (0, false);
    loop {
        line.clear();
        if head.read_line(&mut line)? == 0 {
            return Err(bad("the request's head is cut short or too long"));
        }
        let field = line.trim_end();
        if field.is_empty() {
            break;
        }
        let (name, value) = field.split_once(':').ok_or_else(|| bad("a header without a colon"))?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().map_err(|_| bad("content-length"))?,
            "expect" => expects = value.trim().eq_ignore_ascii_case("100-continue"),
            "transfer-encoding" => return Err(bad("chunked bodies are not supported, as in the real one")),
            _ => {}
        }
    }
    if length > MAX_BODY {
        return Err(bad("the body is too large"));
    }
    if expects && length > 0 {
        writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { method, path, body }))
}

fn write(writer: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    let mut text = format!(
        "HTTP/1.1 {} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n",
        answer.status
    );
    match &answer.body {
        Some(body) => {
            let body = body.to_string();
            text.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            ));
        }
        // A 204 has no length.
        None => text.push_str("\r\n"),
    }
    writer.write_all(text.as_bytes())
}

fn answer(request: &Request, vmm: &Vmm) -> Answer {
    let Some(action) = request.path.strip_prefix(ROOT) else {
        return failure(404, vec!["Not Found".to_owned()]);
    };
    let body = || -> Result<Value, Refusal> {
        serde_json::from_slice(&request.body).map_err(|error| Refusal::BadRequest(error.to_string()))
    };
    let outcome = match (request.method.as_str(), action) {
        ("GET", "vmm.ping") => Ok(Some(vmm.ping())),
        ("GET", "vm.info") => vmm.info().map(Some),
        ("GET", "vm.counters") => vmm.counters().map(Some),
        ("PUT", "vm.boot") => vmm.boot().map(|()| None),
        ("PUT", "vm.pause") => vmm.pause().map(|()| None),
        ("PUT", "vm.resume") => vmm.resume().map(|()| None),
        ("PUT", "vm.snapshot") => body().and_then(|body| vmm.snapshot(&body)).map(|()| None),
        ("PUT", "vm.shutdown") => vmm.shutdown().map(|()| None),
        ("PUT", "vm.delete") => {
            vmm.delete();
            Ok(None)
        }
        ("PUT", "vmm.shutdown") => {
            vmm.delete();
            return Answer {
                status: 204,
                body: None,
                last: true,
            };
        }
        (_, "vmm.ping" | "vm.info" | "vm.counters" | "vm.boot" | "vm.pause" | "vm.resume" | "vm.snapshot")
        | (_, "vm.shutdown" | "vm.delete" | "vmm.shutdown") => Err(Refusal::BadRequest("Bad Request".to_owned())),
        (_, action) if action.starts_with("vm.") => {
            return failure(501, vec![format!("the stand-in does not know {action}")]);
        }
        _ => return failure(404, vec!["Not Found".to_owned()]),
    };
    match outcome {
        Ok(Some(body)) => Answer {
            status: 200,
            body: Some(body),
            last: false,
        },
        Ok(None) => Answer {
            status: 204,
            body: None,
            last: false,
        },
        Err(Refusal::NotCreated) => failure(404, vec!["Error from API".to_owned(), "VM is not created".to_owned()]),
        Err(Refusal::BadRequest(text)) => failure(400, vec![text]),
        Err(Refusal::Failed(error)) => {
            let chain = error.chain().map(ToString::to_string);
            failure(500, std::iter::once("Error from API".to_owned()).chain(chain).collect())
        }
    }
}

fn failure(status: u16, chain: Vec<String>) -> Answer {
    Answer {
        status,
        body: Some(json!(chain)),
        last: false,
    }
}

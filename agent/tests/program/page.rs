//! The status page in a Chromium, as a person sees it: figures of a busy host, and ids and findings that try to be more than text.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use roost_agent::config::Config;
use roost_agent::doctor::{Finding, State};
use roost_agent::host::Host;
use roost_agent::page::{self, Change, Disk, Memory, Sandbox, Status};
use roost_agent::registry::Registry;
use tokio::net::TcpListener;

/// Time that passes for the page; a browser that is told so does not wait for it.
const PAGE_MILLIS: &str = "--virtual-time-budget=4000";
const HOSTILE: &str = "<img src=x onerror=document.title='taken'>";

/// A sandbox whose use goes up and down.
fn sandbox(number: u64, state: &'static str) -> Sandbox {
    let wave = |height: u64, floor: u64| {
        let value = |at: u64| floor + height * ((at * (number + 2)) % 17) / 17;
        (0..40)
            .map(|at| (at > number * 3).then(|| value(at)))
            .collect::<Vec<_>>()
    };
    let is_paused = state == "paused";
    Sandbox {
        id: format!("cl-0w4c6e1m9xk2u7q3d5h8t0b{number:02}"),
        state,
        held: false,
        vcpus: 2,
        created_at_unix: 1_790_000_000 - 700 * i64::try_from(number * number).expect("small"),
        cpu_percent: if is_paused { vec![None; 40] } else { wave(70, 5) },
        memory_mb: if is_paused { vec![None; 40] } else { wave(300, 200) },
        memory_limit_mb: 1024,
        disk_mb: if is_paused { vec![None; 40] } else { wave(20, 1_200) },
    }
}

fn finding(state: State, check: &'static str, said: &str, advice: Option<&str>) -> Finding {
    Finding {
        check,
        state,
        said: said.into(),
        advice: advice.map(str::to_owned),
    }
}

fn status() -> Status {
    let registry = Registry::new(Arc::new(Host::new(Config::default())));
    let mut status = Status::look(&registry, true, Vec::new());
    status.unix = 1_790_000_000;
    status.host.sandboxes = 5;
    status.host.disk = Some(Disk {
        free: 42 << 30,
        reserve: 9 << 30,
    });
    status.host.memory = Some(Memory {
        available: 21 << 30,
        total: 64 << 30,
    });
    (status.host.load, status.host.processors) = (Some(2.37), 16);
    let states = ["running", "running", "resuming", "paused", "unreachable"];
    status.sandboxes = (0..)
        .zip(states)
        .map(|(number, state)| sandbox(number, state))
        .collect();
    status.more = 3;
    let change = |ago, number: usize, from, to| Change {
        unix: status.unix - ago,
        id: status.sandboxes[number].id.clone(),
        from,
        to,
    };
    status.changes = vec![
        change(4, 2, "paused", "resuming"),
        change(90, 3, "pausing", "paused"),
        change(91, 3, "running", "pausing"),
        change(700, 1, "creating", "running"),
    ];
    status.findings = vec![
        finding(State::Ok, "kernel", "6.1.0-41-cloud-amd64", None),
        finding(
            State::Warning,
            "certificates",
            "/etc/roost/pki/server.pem holds for 9 days more",
            Some("make others: roost pki init, systemctl reload roost-agent"),
        ),
    ];
    status
}

/// Serves the page with these figures, as the agent does; its address, and whether it was asked for anything else.
async fn serve(status: Status) -> (std::net::SocketAddr, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let strayed = Arc::new(AtomicBool::new(false));
    let noted = strayed.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (status, noted) = (status.clone(), noted.clone());
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let path = request.uri().path().to_owned();
                    let answer = page::answer(&path, request.headers(), || status.clone()).unwrap_or_else(|| {
                        noted.fetch_or(path != "/favicon.ico", Ordering::SeqCst);
                        let mut missing = Response::new(Full::default());
                        *missing.status_mut() = StatusCode::NOT_FOUND;
                        missing
                    });
                    async move { Ok::<_, Infallible>(answer) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                drop(server.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    (address, strayed)
}

/// Opens a page with further options; what it writes.
async fn chromium(options: &[&str], url: &str) -> String {
    let program = std::env::var_os("CHROMIUM").expect("CHROMIUM is set by cargo xtask page");
    let profile = tempfile::tempdir().expect("a directory");
    let mut command = tokio::process::Command::new(program);
    command
        .args([
            "--headless",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ])
        // It asks this machine for a page of ours, and its own sandbox wants not to be root.
        .args(["--no-sandbox", PAGE_MILLIS])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(options)
        .arg(url);
    let output = command.output().await.expect("Chromium runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
#[ignore = "needs a Chromium: cargo xtask page runs it"]
async fn the_page_shows_a_busy_host() {
    let (address, strayed) = serve(status()).await;
    let url = format!("http://{address}/");
    let dom = chromium(&["--dump-dom"], &url).await;
    for part in [
        "serving; as of",
        "cl-0w4c6e1m9xk2u7q3d5h8t0b00",
        "<span class=\"unreachable\">unreachable</span>",
        "5 of at most 4096",
        "42 GiB free; 9.0 GiB kept",
        "21 GiB of 64 GiB available",
        "2.37 on 16 processors",
        "and 3 more",
        "paused → resuming",
        "certificates: /etc/roost/pki/server.pem holds for 9 days more",
        "aria-label=\"Memory: ",
    ] {
        assert!(dom.contains(part), "{part:?} is not in\n{dom}");
    }
    assert!(!dom.contains("6.1.0-41"), "what is well is not among the findings");
    // Two lines for each sandbox that runs, in some of which there is a gap.
    assert!(dom.matches("<polyline").count() >= 9, "{dom}");
    let pictures = PathBuf::from(std::env::var_os("PICTURES").expect("PICTURES is set by cargo xtask page"));
    for (name, size, dark) in [
        ("page", "1000,900", "false"),
        ("dark", "1000,900", "true"),
        ("narrow", "400,1500", "false"),
    ] {
        let picture = pictures.join(format!("{name}.png"));
        let options = [
            format!("--screenshot={}", picture.display()),
            format!("--window-size={size}"),
            format!(
                "--blink-settings=preferredColorScheme={}",
                if dark == "true" { 0 } else { 1 }
            ),
        ];
        chromium(&options.each_ref().map(String::as_str), &url).await;
        let bytes = std::fs::read(&picture).expect("a picture");
        assert!(
            bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000,
            "{name}: {} bytes",
            bytes.len()
        );
    }
    assert!(!strayed.load(Ordering::SeqCst), "the page asks for what is not its own");
}

#[tokio::test]
#[ignore = "needs a Chromium: cargo xtask page runs it"]
async fn whatever_the_figures_are_they_stay_text() {
    let mut status = status();
    for sandbox in &mut status.sandboxes {
        sandbox.id = HOSTILE.into();
        sandbox.memory_limit_mb = 0;
        sandbox.disk_mb = vec![Some(u64::MAX), None];
    }
    status.changes[0].id = format!("</code><script>document.title='taken'</script>{HOSTILE}");
    status.findings = vec![finding(State::Problem, "odd", HOSTILE, Some(HOSTILE))];
    let (address, strayed) = serve(status).await;
    let dom = chromium(&["--dump-dom"], &format!("http://{address}/")).await;
    assert!(dom.contains("<title>roost</title>"), "{dom}");
    assert_eq!(dom.matches("&lt;img src=x").count(), 5 + 2 + 1, "{dom}");
    assert!(!dom.contains("<img") && dom.matches("<script").count() == 1, "{dom}");
    assert!(
        !strayed.load(Ordering::SeqCst),
        "something was loaded that is not the page's"
    );
}

#[tokio::test]
#[ignore = "needs a Chromium: cargo xtask page runs it"]
async fn a_page_that_gets_no_figures_says_so() {
    let mut status = status();
    status.sandboxes.clear();
    status.findings.clear();
    status.changes.clear();
    status.host.disk = None;
    status.host.memory = None;
    status.host.load = None;
    let (address, _) = serve(status).await;
    let dom = chromium(&["--dump-dom"], &format!("http://{address}/")).await;
    for part in ["Not looked yet.", "None since the agent was started.", "serving; as of"] {
        assert!(dom.contains(part), "{part:?} is not in\n{dom}");
    }
    // By another name that leads here, not even the page itself is there.
    let resolved = ["--dump-dom", "--host-resolver-rules=MAP evil.example 127.0.0.1"];
    let dom = chromium(&resolved, &format!("http://evil.example:{}/", address.port())).await;
    assert!(dom.contains("by its own name") && !dom.contains("page.js"), "{dom}");
}

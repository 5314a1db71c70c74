//! `proxy`: ports through the agent's proxy, against nginx as reverse proxy for the same servers and the same client.
//!
//! ```text
//! client --TLS--> agent or nginx --> the guest's address, port 8080: server.c in the guest
//!                                '-> the same address, port 8081:   server.c on the host, by a rule of ours for what the host sends
//! ```
//!
//! An emulated guest is slow, and both proxies wait for it: what a guest's pages are like to callers. In front of the host's server, which
//! the agent takes for the guest, the proxies themselves are what is waited for.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use roost_tests::eventually;
use roost_tests::internet::run as run_command;
use roost_tests::roost::{PKI, ok, pids};
use serde_json::json;

use crate::Bench;
use crate::figure::{Figure, Goal, Samples};
use crate::http::Http;
use crate::sandboxes::Sandbox;
use crate::scale::cpu_seconds;

/// The server's program, see `tests/bench/server.c`.
const SERVER: &str = "/root/bench-server";
/// Where it listens in the guest.
const IN_GUEST: u16 = 8080;
/// Where it listens on the host.
const ON_HOST: u16 = 8081;
/// Where nginx listens.
const NGINX: &str = "127.0.0.1:8443";
/// How long requests are made for a sample.
const ROUND: Duration = Duration::from_secs(2);
/// Bytes of a small answer.
const SMALL: usize = 100;
/// Bytes of large answers on one connection, and on each of many.
const LARGE: (usize, usize) = (32 << 20, 1 << 20);

pub(crate) fn run(bench: &Bench) {
    let mut agent = Http::agent();
    let sandbox = Sandbox::create(&mut agent, 256);
    ok(&["cp", SERVER, &format!("{}:/root/server", sandbox.id)]);
    sandbox.exec(&mut agent, "/bin/chmod", &["755", "/root/server"]);
    let request = json!({"sandboxId": sandbox.id, "cmd": "/root/server", "args": [IN_GUEST.to_string()]});
    agent.ask("StartBackground", &request);
    let _redirect = Redirect::of(&sandbox.host);
    let _server = Process::start(SERVER, &[&ON_HOST.to_string()]);
    let _nginx = nginx(&sandbox.host);
    let direct = |port| eventually("a server", || Http::plain((&*sandbox.host, port)).ok());
    for (server, port, rounds) in [("", ON_HOST, 8), ("guest.", IN_GUEST, 4)] {
        latency(bench, server, &sandbox, port, direct(port));
        for connections in [1, if bench.smoke { 4 } else { 64 }] {
            let size = if connections == 1 && !bench.smoke {
                LARGE.0
            } else {
                LARGE.1
            };
            let path = |bytes| {
                (
                    format!("/proxy/{}/{port}/{bytes}", sandbox.id),
                    format!("/{port}/{bytes}"),
                )
            };
            let (to_agent, to_nginx) = path(SMALL);
            let mut subject = Load::new(connections, Http::agent, &to_agent, "roost-agent");
            let mut baseline = Load::new(connections, || Http::tls(NGINX), &to_nginx, "nginx");
            let rounds = bench.samples(rounds);
            let [small, large] = [SMALL, size].map(|bytes| {
                let (to_agent, to_nginx) = path(bytes);
                let [mut ours, mut theirs] = <[Rates; 2]>::default();
                for _ in 0..rounds {
                    subject.round(&to_agent, bytes, bench.time(ROUND), &mut ours);
                    baseline.round(&to_nginx, bytes, bench.time(ROUND), &mut theirs);
                }
                (ours, theirs)
            });
            tell(
                &format!("proxy.{server}requests.{connections}"),
                "/s",
                &small.0.requests,
                &small.1.requests,
                Goal::AtLeastTimes(0.9),
            );
            tell(
                &format!("proxy.{server}bytes.{connections}"),
                "MiB/s",
                &large.0.mebibytes,
                &large.1.mebibytes,
                Goal::AtLeastTimes(0.9),
            );
            tell(
                &format!("proxy.{server}cpu.{connections}"),
                "us of CPU each",
                &small.0.cpu,
                &small.1.cpu,
                Goal::Seen,
            );
        }
    }
}

/// What a request takes beside one of the server itself.
fn latency(bench: &Bench, server: &str, sandbox: &Sandbox, port: u16, mut direct: Http) {
    let mut agent = Http::agent();
    let path = format!("/proxy/{}/{port}/{SMALL}", sandbox.id);
    // Handshakes are no part of it.
    get(&mut agent, &path, SMALL);
    get(&mut direct, &format!("/{SMALL}"), SMALL);
    let [mut proxied, mut bare] = <[Samples; 2]>::default();
    for _ in 0..bench.samples(200) {
        proxied.time(|| get(&mut agent, &path, SMALL));
        bare.time(|| get(&mut direct, &format!("/{SMALL}"), SMALL));
    }
    Figure {
        name: &format!("proxy.{server}direct"),
        unit: "ms",
        subject: &proxied,
        baseline: Some(("the server itself, without TLS", &bare)),
        goal: Goal::Seen,
        unmet: "",
    }
    .tell();
}

fn tell(name: &str, unit: &'static str, subject: &Samples, baseline: &Samples, goal: Goal) {
    Figure {
        name,
        unit,
        subject,
        baseline: Some(("nginx", baseline)),
        goal,
        unmet: "proxy.cpu says what a request costs each: ours passes through hyper's server and its client, which is a task of its own, where \
                nginx has one loop. Next: the guest's headers built in one pass, and its connection driven by the request's own task",
    }
    .tell();
}

/// A request that must be answered with so many bytes.
fn get(http: &mut Http, path: &str, bytes: usize) {
    let mut got = 0;
    let status = http.stream("GET", path, "text/plain", b"", |piece| got += piece.len());
    assert_eq!((status.expect("an answer"), got), (200, bytes), "{path}");
}

/// Connections that are kept, on each of which a thread makes one request after another.
struct Load {
    connections: Vec<Http>,
    /// Name of the processes that answer.
    server: &'static str,
}

/// What rounds have shown.
#[derive(Default)]
struct Rates {
    requests: Samples,
    mebibytes: Samples,
    /// Of the proxy's processor time, for each request.
    cpu: Samples,
}

impl Load {
    /// Makes one request on each, so that no sample has a handshake in it, and both sides' connections are there.
    fn new(connections: usize, connect: impl Fn() -> Http, path: &str, server: &'static str) -> Self {
        let mut load = Self {
            connections: (0..connections).map(|_| connect()).collect(),
            server,
        };
        load.round(path, SMALL, Duration::ZERO, &mut Rates::default());
        load
    }

    /// Makes requests for a while.
    fn round(&mut self, path: &str, bytes: usize, limit: Duration, rates: &mut Rates) {
        let cpu = |server| pids(server).into_iter().map(cpu_seconds).sum::<f64>();
        let (before, began) = (cpu(self.server), Instant::now());
        let count: u32 = thread::scope(|scope| {
            let asking: Vec<_> = self
                .connections
                .iter_mut()
                .map(|http| {
                    scope.spawn(move || {
                        let mut count = 0;
                        while count == 0 || began.elapsed() < limit {
                            get(http, path, bytes);
                            count += 1;
                        }
                        count
                    })
                })
                .collect();
            asking.into_iter().map(|asking| asking.join().expect("answered")).sum()
        });
        let seconds = began.elapsed().as_secs_f64();
        let cpu = cpu(self.server) - before;
        rates.requests.add(f64::from(count) / seconds);
        rates
            .mebibytes
            .add(f64::from(count) * bytes as f64 / f64::from(1 << 20) / seconds);
        rates.cpu.add(cpu * 1e6 / f64::from(count));
    }
}

/// Has what the host sends to a guest's port [`ON_HOST`] reach a server of the host's, until it is dropped.
struct Redirect;

impl Redirect {
    fn of(guest: &str) -> Self {
        let file = "/run/bench-redirect.nft";
        let rule = format!("ip daddr {guest} tcp dport {ON_HOST} redirect");
        let table = format!("table ip bench {{\nchain output {{ type nat hook output priority -100; {rule}; }}\n}}\n");
        fs::write(file, table).expect("written");
        run_command(&format!("nft -f {file}"));
        Self
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        run_command("nft delete table ip bench");
    }
}

/// A process that ends with this value.
struct Process(Child);

impl Process {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn();
        Self(child.unwrap_or_else(|error| panic!("{program}: {error}")))
    }
}

impl Drop for Process {
    /// By SIGTERM, at which nginx ends its workers.
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).ok();
        drop(self.0.wait());
    }
}

/// nginx with the agent's certificates, on as many processors, with connections kept on both sides, and without logs or temporary files.
fn nginx(guest: &str) -> Process {
    let processors = thread::available_parallelism().expect("known");
    let upstreams: String = [IN_GUEST, ON_HOST]
        .map(|port| {
            format!("upstream port{port} {{ server {guest}:{port}; keepalive 64; keepalive_requests 1000000000; }}\n")
        })
        .concat();
    let places: String = [IN_GUEST, ON_HOST]
        .map(|port| format!("location /{port}/ {{ proxy_pass http://port{port}/; }}\n"))
        .concat();
    let config = format!(
        "daemon off; pid /run/bench-nginx.pid; user www-data; worker_processes {processors};
         error_log stderr warn;
         events {{ worker_connections 4096; }}
         http {{
           access_log off;
           keepalive_requests 1000000000;
           keepalive_timeout 600;
           {upstreams}
           server {{
             listen {NGINX} ssl;
             ssl_certificate {PKI}/server.pem;
             ssl_certificate_key {PKI}/server-key.pem;
             ssl_client_certificate {PKI}/ca.pem;
             ssl_verify_client on;
             ssl_protocols TLSv1.3;
             proxy_http_version 1.1;
             proxy_set_header Connection \"\";
             proxy_set_header X-Forwarded-Host $http_host;
             proxy_set_header X-Forwarded-Proto https;
             proxy_buffers 16 64k;
             proxy_buffer_size 64k;
             proxy_busy_buffers_size 128k;
             proxy_max_temp_file_size 0;
             {places}
           }}
         }}\n"
    );
    let file = "/run/bench-nginx.conf";
    fs::write(file, config).expect("written");
    Process::start("/usr/sbin/nginx", &["-c", file])
}

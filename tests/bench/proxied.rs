//! `proxy`: a port of a guest through the agent's proxy.

use std::path::Path;
use std::time::Instant;

use roost_tests::eventually;
use serde_json::json;

use crate::Bench;
use crate::figure::{Figure, Goal, Samples, not_measured};
use crate::http::Http;
use crate::sandboxes::Sandbox;

/// Answers each request of a connection that is kept.
const SERVER: &str = "use IO::Socket::INET; $SIG{CHLD} = 'IGNORE';
    $s = IO::Socket::INET->new(LocalAddr => '0.0.0.0', LocalPort => 8080, Listen => 99, ReuseAddr => 1) or die;
    while ($c = $s->accept) { if (fork) { close $c; next } $c->autoflush(1);
    while (<$c>) { print $c \"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello\" if /^\\r?$/ } exit }";
/// Where nginx would be.
const NGINX: &str = "/usr/sbin/nginx";

pub(crate) fn run(bench: &Bench) {
    let mut agent = Http::agent();
    let sandbox = Sandbox::create(&mut agent, 256);
    let request = json!({"sandboxId": sandbox.id, "cmd": "/usr/bin/perl", "args": ["-e", SERVER]});
    agent.ask("StartBackground", &request);
    let direct = || Http::plain((&*sandbox.host, 8080));
    let mut server = eventually("the guest's server", || direct().ok());
    let path = format!("/proxy/{}/8080/", sandbox.id);
    let ask = |http: &mut Http, path: &str, times: &mut Samples| {
        let began = Instant::now();
        let (status, body) = http.call("GET", path, "text/plain", b"").expect("an answer");
        times.add_time(began.elapsed());
        assert_eq!((status, &body[..]), (200, &b"hello"[..]));
    };
    let [mut proxied, mut bare] = <[Samples; 2]>::default();
    for _ in 0..bench.samples(200) {
        ask(&mut agent, &path, &mut proxied);
        ask(&mut server, "/", &mut bare);
    }
    Figure {
        name: "proxy.direct",
        unit: "ms",
        subject: &proxied,
        baseline: Some(("the guest's server itself", &bare)),
        goal: Goal::Seen,
        unmet: "",
    }
    .tell();
    if !Path::new(NGINX).exists() {
        not_measured(
            "proxy.nginx.1",
            "no nginx in the rig, which the ordinary image does not have",
        );
        not_measured(
            "proxy.nginx.64",
            "no nginx in the rig, which the ordinary image does not have",
        );
    }
}

//! What a guest may reach under a policy of its own: addresses, names, and what happens to both when it changes.

use std::fs;
use std::path::PathBuf;

use roost_tests::in_rig;
use roost_tests::internet::{HOST, Internet, SERVER};
use roost_tests::roost::{self, Sandbox, kill_9, ok, wait_for_agent};
use serde_json::Value;

/// A second server on the internet.
const OTHER: &str = "198.51.100.7";
/// An address where nobody is.
const NOWHERE: &str = "192.0.2.66";

/// What the agent says of a sandbox's policy and of what came of it.
fn explained(sandbox: &Sandbox) -> Value {
    serde_json::from_str(&ok(&["egress", "--json", &sandbox.id])).expect("JSON")
}

/// Packets that a rule has matched, of those with this destination.
fn packets(answer: &Value, rule: &str, network: &str) -> u64 {
    let rows = answer["rules"].as_array().expect("rules");
    let row = rows
        .iter()
        .find(|row| row["rule"] == rule && row["network"].as_str().unwrap_or_default() == network);
    // Numbers of 64 bits are text in protobuf's JSON, and zero is left out.
    row.map_or(0, |row| {
        row["packets"]
            .as_str()
            .map_or(0, |number| number.parse().expect("a number"))
    })
}

#[test]
fn a_policy_holds_over_pauses_and_restarts_changes_at_once_and_says_what_it_dropped() {
    in_rig(|| {
        let mut internet = Internet::connect();
        internet.add_address(OTHER);
        for server in [SERVER, OTHER] {
            internet.serve(&format!("{server}:8080"));
        }
        let sandbox = Sandbox::create(&["--memory", "256", "--deny", SERVER]);
        assert_eq!(sandbox.reach(SERVER, 8080), "closed");
        assert_eq!(sandbox.reach(OTHER, 8080), HOST);
        let answer = explained(&sandbox);
        assert!(packets(&answer, "denied", "203.0.113.2/32") > 0, "{answer}");
        assert!(packets(&answer, "internet", "") > 0, "{answer}");
        assert_eq!(answer["egress"]["deny"][0], "203.0.113.2/32");

        // Only what is listed.
        ok(&["egress", "--allow", "203.0.113.0/24", &sandbox.id]);
        assert_eq!(sandbox.reach(SERVER, 8080), HOST);
        assert_eq!(sandbox.reach(OTHER, 8080), "closed");
        let text = ok(&["egress", &sandbox.id]);
        assert!(text.starts_with("reaches only 203.0.113.0/24"), "{text}");
        assert!(text.contains("not-listed"), "{text}");

        // It outlives a pause, in which it can be changed, and an agent.
        sandbox.pause();
        ok(&["egress", "--no-internet", &sandbox.id]);
        kill_9("roost-agent");
        wait_for_agent();
        assert!(ok(&["egress", &sandbox.id]).starts_with("reaches nothing outside"));
        sandbox.resume();
        assert_eq!(sandbox.reach(SERVER, 8080), "closed");
        assert!(packets(&explained(&sandbox), "no-internet", "") > 0);
        kill_9("roost-agent");
        wait_for_agent();
        assert!(ok(&["egress", &sandbox.id]).starts_with("reaches nothing outside"));
        ok(&["egress", "--open", &sandbox.id]);
        assert_eq!(sandbox.reach(SERVER, 8080), HOST);

        for (policy, why) in [
            (&["--allow", "203.0.113.1/24"][..], "allow"),
            (&["--deny", "example.com"], "deny"),
            (&["--allow-name", "*"], "allow_names"),
            (&["--no-internet", "--allow", "203.0.113.0/24"], "no_internet"),
        ] {
            let said = roost::fails(&[&["egress"], policy, &[&sandbox.id]].concat());
            assert!(said.contains(why), "{said}");
            let said = roost::fails(&[&["create"], policy].concat());
            assert!(said.contains(why), "{said}");
        }
        assert_eq!(sandbox.reach(SERVER, 8080), HOST, "a refused policy changed something");
    });
}

/// Lines of the host's /etc/hosts, for as long as this value lives.
struct Names {
    before: String,
}

impl Names {
    fn add(lines: &str) -> Self {
        let before = fs::read_to_string("/etc/hosts").unwrap_or_default();
        fs::write("/etc/hosts", format!("{before}\n{lines}")).expect("written");
        Self { before }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        fs::write("/etc/hosts", &self.before).expect("written");
    }
}

/// A certificate of no authority, and its key.
fn certificate() -> (PathBuf, PathBuf) {
    let dir = std::env::temp_dir();
    let (certificate, key) = (dir.join("by-name.pem"), dir.join("by-name-key.pem"));
    let made = std::process::Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ])
        .args(["-subj", "/CN=server", "-out"])
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key)
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (certificate, key)
}

/// What curl says in a guest: the answer's body and status, or curl's error. The guest takes `name` for `address`, whatever it is.
fn curl(sandbox: &Sandbox, url: &str, name: &str, address: &str) -> String {
    sandbox.sh(&format!(
        "curl -ksS --max-time 60 --resolve {name}:80:{address} --resolve {name}:443:{address} -w ' %{{http_code}}' {url} 2>&1 || true"
    ))
}

#[test]
fn a_server_is_reached_by_its_name_and_by_nothing_else() {
    in_rig(|| {
        let mut internet = Internet::connect();
        internet.add_address(OTHER);
        internet.add_address("10.99.0.1");
        for server in [SERVER, OTHER, "10.99.0.1"] {
            internet.serve_http(&format!("{server}:80"));
            internet.serve(&format!("{server}:8080"));
        }
        let (certificate, key) = certificate();
        let _tls = internet.serve_tls(&format!("{OTHER}:443"), &certificate, &key);
        let _names = Names::add(&format!(
            "{OTHER} good.example sub.wide.example other.example\n10.99.0.1 inside.example\n{HOST} host.example\n"
        ));
        let policy = [
            "good.example",
            "*.wide.example",
            "inside.example",
            "host.example",
            "unknown.example",
        ];
        let policy = policy.iter().flat_map(|name| ["--allow-name", *name]);
        let arguments: Vec<&str> = ["--memory", "256"].into_iter().chain(policy).collect();
        let sandbox = Sandbox::create(&arguments);

        // Wherever the guest believes the name to be, it is led to where it is.
        for address in [OTHER, SERVER, NOWHERE, "169.254.169.254"] {
            let answer = curl(&sandbox, "http://good.example/x", "good.example", address);
            assert_eq!(answer, format!("{OTHER} GET /x good.example 200"), "{address}");
        }
        let answer = curl(&sandbox, "http://sub.wide.example/", "sub.wide.example", NOWHERE);
        assert_eq!(answer, format!("{OTHER} GET / sub.wide.example 200"));
        let answer = curl(&sandbox, "https://good.example/", "good.example", NOWHERE);
        assert!(answer.contains("TLSv1.3") && answer.ends_with(" 200"), "{answer}");

        // Other names, and names that lead to private addresses or to the host itself.
        for (name, why) in [
            ("other.example", "does not list"),
            ("wide.example", "does not list"),
            ("inside.example", "no public address"),
            ("host.example", "no public address"),
            ("unknown.example", "not resolved"),
        ] {
            let answer = curl(&sandbox, &format!("http://{name}/"), name, OTHER);
            assert!(answer.contains(why), "{name}: {answer}");
            let answer = curl(&sandbox, &format!("https://{name}/"), name, OTHER);
            assert!(answer.contains("curl: (35)"), "{name}: {answer}");
        }
        // By address, on other ports, and what is no HTTP.
        assert!(curl(&sandbox, &format!("http://{OTHER}/"), "x", OTHER).ends_with(" 400"));
        assert!(curl(&sandbox, &format!("https://{OTHER}/"), "x", OTHER).contains("curl: ("));
        assert_eq!(sandbox.reach(OTHER, 8080), "closed");
        assert_eq!(sandbox.reach(SERVER, 8080), "closed");
        // The agent's own ports, without being led there.
        let [_, agent, _] = sandbox.slot_addresses();
        for port in [19080, 19443, 50051, 50052] {
            assert_eq!(sandbox.reach(&agent, port), "closed", "{port}");
        }
        let answer = explained(&sandbox);
        assert!(packets(&answer, "by-name", "") > 0, "{answer}");
        assert!(packets(&answer, "not-listed", "") > 0, "{answer}");
        let refused = answer["lastRefusedNames"].as_array().expect("refused names");
        for name in ["other.example", "inside.example", "host.example", "unknown.example"] {
            assert!(refused.iter().any(|row| row["name"] == name), "{name}: {answer}");
        }
        let text = ok(&["egress", &sandbox.id]);
        assert!(
            text.contains("by name: ") && text.contains("  other.example: "),
            "{text}"
        );

        // It holds after a pause and with another agent, until it changes.
        sandbox.pause();
        kill_9("roost-agent");
        wait_for_agent();
        sandbox.resume();
        let answer = curl(&sandbox, "http://good.example/", "good.example", NOWHERE);
        assert!(answer.ends_with(" 200"), "{answer}");
        kill_9("roost-agent");
        wait_for_agent();
        let answer = curl(&sandbox, "http://good.example/", "good.example", NOWHERE);
        assert!(answer.ends_with(" 200"), "{answer}");
        ok(&["egress", "--allow-name", "other.example", &sandbox.id]);
        let answer = curl(&sandbox, "http://good.example/", "good.example", OTHER);
        assert!(answer.ends_with(" 403"), "{answer}");
        let answer = curl(&sandbox, "http://other.example/", "other.example", NOWHERE);
        assert!(answer.ends_with(" 200"), "{answer}");
    });
}

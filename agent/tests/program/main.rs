//! The agent as a program: what it says of its configuration, and that it takes up another one while it serves.

mod page;

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_agent::pki;
use tempfile::TempDir;

/// Time for anything here to happen.
const SOON: Duration = Duration::from_secs(30);

/// Waits for a value.
fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(began.elapsed() < SOON, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A host's directories with a configuration in them, and an agent if it was started.
struct Host {
    dir: TempDir,
    address: SocketAddr,
    agent: Option<Child>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        for name in [
            "etc/agent.toml.d",
            "lib/kernels",
            "lib/images",
            "lib/sandboxes",
            "lib/tombstones",
            "run",
        ] {
            fs::create_dir_all(dir.path().join(name)).expect("made");
        }
        let free = || {
            TcpListener::bind("127.0.0.1:0")
                .expect("bound")
                .local_addr()
                .expect("an address")
        };
        let (address, status) = (free(), free());
        let host = Self {
            dir,
            address,
            agent: None,
        };
        pki::init(&host.at("etc/pki"), &[]).expect("certificates");
        let text = format!(
            "listen = \"{address}\"\nstatus_listen = \"{status}\"\ndir = {:?}\nvm_run_dir = {:?}\npki_dir = {:?}\n\
             privd_socket = {:?}\nshim_socket = {:?}\n",
            host.at("lib"),
            host.at("run"),
            host.at("etc/pki"),
            host.at("no-privd"),
            host.at("no-shim"),
        );
        fs::write(host.at("etc/agent.toml"), text).expect("written");
        host
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_roost-agent"));
        command.arg("--config").arg(self.at("etc/agent.toml"));
        command.env_remove("ROOST_DIR").env_remove("RUST_LOG");
        command
    }

    fn say(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("it runs")
    }

    /// An addition to the configuration.
    fn add(&self, text: &str) {
        fs::write(self.at("etc/agent.toml.d/50-test.toml"), text).expect("written");
    }

    fn start(&mut self) {
        let log = File::create(self.at("log")).expect("made");
        self.agent = Some(self.command().stderr(log).spawn().expect("started"));
        eventually("the agent to serve", || {
            self.ls(&self.at("etc/pki")).status.success().then_some(())
        });
    }

    fn log(&self) -> String {
        fs::read_to_string(self.at("log")).expect("a log")
    }

    /// Has the agent read its configuration again, and waits until it says something with `what` in it.
    fn reload(&self, what: &str) {
        let said = self.log().len();
        let agent = self.agent.as_ref().expect("an agent");
        kill(Pid::from_raw(agent.id().cast_signed()), Signal::SIGHUP).expect("told");
        eventually(what, || self.log()[said..].contains(what).then_some(()));
    }

    fn ls(&self, pki: &Path) -> Output {
        let mut roost = Command::new(env!("CARGO_BIN_EXE_roost"));
        roost
            .args(["--host", &self.address.to_string(), "--pki"])
            .arg(pki)
            .arg("ls");
        roost.output().expect("roost runs")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            agent.kill().expect("killed");
            agent.wait().expect("reaped");
        }
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn check_config_names_everything_that_is_wrong_and_what_was_read() {
    let host = Host::new();
    let good = host.say(&["--check-config"]);
    assert!(good.status.success(), "{}", text(&good.stderr));
    let file = host.at("etc/agent.toml");
    assert!(
        text(&good.stdout).contains(&format!("read {}\n", file.display())),
        "{}",
        text(&good.stdout)
    );

    host.add("max_vcpus = 0\nlistne = 1\n");
    let bad = host
        .command()
        .arg("--check-config")
        .env("ROOST_AGENT_DNS", "[1]")
        .output()
        .expect("it runs");
    assert!(!bad.status.success());
    let (addition, said) = (host.at("etc/agent.toml.d/50-test.toml"), text(&bad.stderr));
    for (part, from) in [
        (":1: max_vcpus = 0", &*addition),
        (":2: listne", &addition),
        ("ROOST_AGENT_DNS", Path::new("")),
    ] {
        assert!(
            said.contains(&format!("{}{part}", from.display())),
            "{part} is not in\n{said}"
        );
    }
    assert!(text(&bad.stdout).contains(&format!("read {}\n", addition.display())));
    let refused = host.say(&[]);
    assert!(
        !refused.status.success() && text(&refused.stderr).contains("listne"),
        "it starts with that"
    );

    host.add("max_vcpus = 3\n");
    fs::write(host.at("etc/pki/server.pem"), "nothing").expect("written");
    let bad = host.say(&["--check-config"]);
    assert!(
        !bad.status.success() && text(&bad.stderr).contains("server.pem"),
        "{}",
        text(&bad.stderr)
    );
    let all = host.say(&["--print-config"]);
    assert!(all.status.success() && text(&all.stdout).contains("50-test.toml:1\nmax_vcpus = 3\n"));
    let usual = host.say(&["--default-config"]);
    assert_eq!(text(&usual.stdout), include_str!("../../../packaging/etc/agent.toml"));
}

#[test]
fn a_running_agent_takes_up_another_configuration_or_keeps_the_one_it_has() {
    let mut host = Host::new();
    host.start();
    let pki = host.at("etc/pki");

    host.add("viewer_names = [\"roost-cli\"]\nclient_names = [\"somebody\"]\nlog_filter = \"debug\"\n");
    host.reload("changed=\"client_names viewer_names log_filter\"");
    assert!(host.ls(&pki).status.success(), "a viewer may look");
    host.add("client_names = [\"somebody\"]\n");
    host.reload("changed=\"viewer_names log_filter\"");
    let refused = host.ls(&pki);
    assert!(
        !refused.status.success() && text(&refused.stderr).contains("client_names"),
        "{}",
        text(&refused.stderr)
    );

    // What is wrong changes nothing, not even what is right beside it.
    host.add("client_names = [\"roost-cli\"]\nmax_vcpus = 0\n");
    host.reload("50-test.toml:2: max_vcpus = 0");
    assert!(!host.ls(&pki).status.success());
    fs::write(pki.join("server.pem"), "nothing").expect("written");
    host.add("client_names = [\"roost-cli\"]\n");
    host.reload("the certificates cannot be used");
    assert!(!host.ls(&pki).status.success());

    // Certificates of another CA, and a key that waits.
    let before = host.at("etc/pki-before");
    fs::rename(&pki, &before).expect("renamed");
    pki::init(&host.at("etc/pki-new"), &[]).expect("certificates");
    fs::create_dir(&pki).expect("made");
    for name in fs::read_dir(host.at("etc/pki-new")).expect("listed") {
        let name = name.expect("listed").file_name();
        fs::copy(host.at("etc/pki-new").join(&name), pki.join(&name)).expect("copied");
    }
    host.add("client_names = [\"roost-cli\"]\nlisten = \"127.0.0.1:1\"\n");
    host.reload("keys=\"listen\"");
    assert!(host.ls(&pki).status.success(), "{}", text(&host.ls(&pki).stderr));
    assert!(
        !host.ls(&before).status.success(),
        "the CA from before names callers still"
    );
}

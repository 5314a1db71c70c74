//! Templates of a Debian by the real mmdebstrap, from a repository that is made here: what is in its packages is this machine's.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::Agent;
use super::templates::text;

/// Makes a repository of release `tiny`: an essential package with what installs packages, a required one, and one besides.
const REPOSITORY: &str = r#"set -eu; umask 022; cd "$1"
package() { # its name and further fields; its files lie in a directory of that name
    mkdir $1/DEBIAN
    printf 'Package: %s\nVersion: 1\nArchitecture: %s\nMaintainer: nobody <nobody@example>\nDescription: for a test\n%b' \
        $1 $(dpkg --print-architecture) "$2" > $1/DEBIAN/control
    dpkg-deb --root-owner-group -Znone --build $1 $1.deb > /dev/null
    dpkg-deb --field $1.deb >> Packages
    printf 'Filename: %s\nSize: %s\nSHA256: %s\n\n' $1.deb $(stat -c %s $1.deb) $(sha256sum < $1.deb | cut -c-64) >> Packages
    rm -r $1
}
mkdir -p base/usr/bin base/usr/sbin base/usr/lib base/usr/lib64 base/etc base/tmp base/var/lib/dpkg
ln -s usr/bin usr/sbin usr/lib usr/lib64 base
for program in sh rm tar env diff dpkg dpkg-deb dpkg-split ldconfig start-stop-daemon; do
    program=$(PATH=/usr/bin:/usr/sbin command -v $program)
    for file in $program $(ldd $program 2> /dev/null | grep -o '/[^ ]*'); do
        mkdir -p base$(dirname $file); cp -L $file base$file
    done
done
package base 'Essential: yes\nPriority: required\n'
mkdir -p required/srv; echo of the release > required/srv/required; chmod 4755 required/srv/required; package required 'Priority: required\n'
mkdir -p extra/srv; echo asked for > extra/srv/extra; package extra 'Priority: optional\n'
mkdir -p other/srv; echo not asked for > other/srv/other; package other 'Priority: optional\n'
printf 'Suite: tiny\nCodename: tiny\nSHA256:\n %s %s Packages\n' $(sha256sum < Packages | cut -c-64) $(stat -c %s Packages) > Release"#;

/// A directory that mmdebstrap can use as another user than this one, as it does where it is not run by root.
fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("opened");
    dir
}

/// Whether mmdebstrap is there. Where all tests must run (`CI=true`, or `ROOST_CI` set), it is no choice.
fn can_test() -> bool {
    let must = std::env::var("CI").is_ok_and(|value| value == "true") || std::env::var_os("ROOST_CI").is_some();
    let is_there = Command::new("mmdebstrap")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    assert!(is_there || !must, "this test needs mmdebstrap: CI or ROOST_CI is set");
    if !is_there {
        // Past libtest, which would keep it to itself.
        writeln!(std::io::stderr(), "\nNOT TESTED: mmdebstrap is not installed").expect("standard error");
    }
    is_there
}

/// What debugfs says of an image.
fn debugfs(image: &Path, request: &str) -> String {
    let output = Command::new("/sbin/debugfs").args(["-R", request]).arg(image).output();
    text(&output.expect("debugfs runs").stdout)
}

impl Agent {
    /// The image of the only template.
    fn image(&self) -> PathBuf {
        let [template] = &self.on_disk()[..] else {
            panic!("one template: {:?}", self.on_disk())
        };
        self.team().join(template).join("rootfs.ext4")
    }
}

#[tokio::test]
async fn a_debian_is_made_of_the_packages_of_a_repository() {
    if !can_test() {
        return;
    }
    let (agent, work, repository) = (Agent::start().await, open_dir(), open_dir());
    let path = repository.path().to_str().expect("UTF-8");
    let made = Command::new("bash")
        .args(["-c", REPOSITORY, "repository", path])
        .output();
    let made = made.expect("bash runs");
    assert!(made.status.success(), "{}", text(&made.stderr));
    let mirror = format!("deb [trusted=yes] copy://{path} ./");
    let base = ["--no-envd", "--name", "deb", "--mirror", &mirror, "--debian"];

    let built = agent
        .build(
            work.path(),
            &[&base[..], &["tiny", "--include", "extra"]].concat(),
            vec![],
        )
        .await;
    assert!(built.status.success(), "{}", text(&built.stderr));
    assert_eq!(text(&built.stderr), "");
    let image = agent.image();
    assert_eq!(debugfs(&image, "cat /srv/required"), "of the release");
    assert_eq!(debugfs(&image, "cat /srv/extra"), "asked for");
    assert_eq!(debugfs(&image, "cat /srv/other"), "");
    assert_eq!(debugfs(&image, "cat /etc/apt/sources.list"), mirror);
    let status = debugfs(&image, "cat /var/lib/dpkg/status");
    assert_eq!(status.matches("Status: install ok installed").count(), 3, "{status}");
    for (file, words) in [
        (
            "/srv/required",
            &["Type: regular", "Mode:  04755", "User:     0   Group:     0"][..],
        ),
        ("/bin", &["Type: symlink", "\"usr/bin\""]),
        (
            "/dev/null",
            &[
                "Type: character special",
                "Mode:  0666",
                "Device major/minor number: 01:03",
            ],
        ),
    ] {
        let shown = debugfs(&image, &format!("stat {file}"));
        for word in words {
            assert!(shown.contains(word), "{file}: {word}: {shown}");
        }
    }
    assert!(agent.roost(&["template", "rm", "deb"]).await.status.success());

    for (args, said) in [
        (
            &["tiny", "--include", "nothing"][..],
            "\nE: Unable to locate package nothing\n",
        ),
        (
            &["tiny", "--mirror", "deb [trusted=yes] copy:///nonexistent ./"],
            "/nonexistent",
        ),
    ] {
        let built = agent.build(work.path(), &[&base[..], args].concat(), vec![]).await;
        let error = text(&built.stderr);
        assert!(
            built.status.code() == Some(1) && error.starts_with("roost: mmdebstrap failed (exit status: "),
            "{error}"
        );
        assert!(error.contains(said), "{error}");
    }
    // What came of it is read to its end, and it is told what is wrong with that.
    let built = agent
        .build(work.path(), &[&base[..], &["tiny", "--size-mb", "1"]].concat(), vec![])
        .await;
    assert_eq!(
        text(&built.stderr),
        "roost: the image has more than 1 MiB of content; --size-mb says how large it may be"
    );
    assert_eq!(agent.on_disk(), [""; 0]);
    assert_eq!(fs::read_dir(work.path()).expect("read").count(), 0);

    // Debian's own, as nobody has to be asked for.
    if std::env::var_os("ROOST_TESTS_ALL").is_some() {
        let args = ["--no-envd", "--debian", "bookworm", "--include", "python3-minimal"];
        let built = agent.build(work.path(), &args, vec![]).await;
        assert!(built.status.success(), "{}", text(&built.stderr));
        let image = agent.image();
        let version = debugfs(&image, "cat /etc/debian_version");
        assert!(version.starts_with("12."), "{version}");
        let python = debugfs(&image, "stat /usr/bin/python3");
        assert!(python.contains("Type: symlink"), "{python}");
    }
}

#[tokio::test]
async fn an_interrupted_build_ends_mmdebstrap_and_what_it_has_started() {
    if !can_test() {
        return;
    }
    // A mirror whose answer has no end.
    let mirror = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let line = format!(
        "deb [trusted=yes] http://{} tiny main",
        mirror.local_addr().expect("it is bound")
    );
    let (agent, work) = (Agent::start().await, open_dir());
    let child = Command::new(env!("CARGO_BIN_EXE_roost"))
        .args(["--host", &agent.address.to_string(), "--pki"])
        .arg(agent.pki())
        .args(["template", "build", "--no-envd", "--debian", "tiny", "--mirror", &line])
        .env("TMPDIR", work.path())
        // Whatever leads elsewhere.
        .env("no_proxy", "127.0.0.1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("roost runs");
    let asked = tokio::time::timeout(Duration::from_secs(60), mirror.accept()).await;
    let (mut apt, _) = asked.expect("apt asks in time").expect("a connection");
    let answer = tokio::spawn(async move {
        while apt.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
    kill(pid, Signal::SIGTERM).expect("sent");
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output().expect("ended"));
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
    let ended = ended.expect("it ends").expect("no panic");
    let error = text(&ended.stderr);
    assert!(
        ended.status.code() == Some(1) && error == "roost: interrupted; no template was made",
        "{error}"
    );
    let gone = tokio::time::timeout(Duration::from_secs(60), answer).await;
    gone.expect("apt has ended").expect("no panic");
    assert_eq!(fs::read_dir(work.path()).expect("read").count(), 0);
}

//! Templates made of sandboxes and of a container's image, and sandboxes made of those.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use roost_tests::disk::run;
use roost_tests::roost::{self, Sandbox, TEAM, Template, find, find_paused, kill_9, wait_for_agent};
use roost_tests::saved::Saved;
use roost_tests::{eventually, in_rig};
use serde_json::Value;

/// Makes the n-th template of a sandbox.
fn template_of(call: &str, sandbox: &str, n: u8) -> Template {
    let template = Template::named(n);
    roost::ok(&[&[call, sandbox], &template.arguments()[..]].concat());
    template
}

/// Makes a sandbox of a template; what its create said of it.
fn create(template: &Template, args: &[&str]) -> (Sandbox, Value) {
    let made = roost::ok(&[&["create", "--json"], &template.arguments()[..], args].concat());
    let made: Value = serde_json::from_str(&made).expect("JSON");
    let id = made["sandboxId"].as_str().expect("an id").to_owned();
    (Sandbox { id }, made["metadata"].clone())
}

/// What there is below the team's directory.
fn on_disk() -> Vec<String> {
    let teams = std::fs::read_dir("/var/lib/roost/images/teams")
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<String> = teams
        .flat_map(|team| std::fs::read_dir(team.path()).into_iter().flatten().flatten())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    found
}

fn rootfs() -> PathBuf {
    let output = Command::new("find")
        .args(["/var/lib/roost/images/teams", "-name", "rootfs.ext4"])
        .output()
        .expect("find runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    PathBuf::from(text.lines().next().expect("a template"))
}

/// Nothing is wrong with the filesystem of an image, which nobody has mounted since it was made.
fn fsck(image: &Path) {
    let output = Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(image)
        .output()
        .expect("e2fsck runs");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A program that counts in memory and remembers uuids as it goes, a file in memory, and a file on disk. It waits without `sleep`: on
/// emulated processors a few such guests would have no time for anything but its starts.
const CANARIES: &str = "mkdir -p /dev/shm && head -c 2000000 /dev/urandom > /dev/shm/canary && sha256sum < /dev/shm/canary > /root/memory.sum
    head -c 3000000 /dev/urandom > /root/disk && sha256sum < /root/disk > /root/disk.sum
    setsid bash -c 'i=0; exec 9<> <(:); until read -rt 0.2 -u 9; do i=$((i+1)); echo $i > /dev/shm/count; read u < /proc/sys/kernel/random/uuid; echo $u >> /dev/shm/uuids; done' >/dev/null 2>&1 &
    until test -s /dev/shm/uuids; do sleep 0.1; done; sync";
const CHECK: &str = "sha256sum < /dev/shm/canary | diff - /root/memory.sum && sha256sum < /root/disk | diff - /root/disk.sum \
    && ! dmesg | grep -i 'ext4.*error' && echo 1 > /root/written && sync && cat /dev/shm/count";

fn count(sandbox: &Sandbox) -> u64 {
    sandbox.sh(CHECK).parse().expect("a number")
}

fn goes_on(sandbox: &Sandbox) {
    let before = count(sandbox);
    eventually("the counter to go on", || (count(sandbox) > before).then_some(()));
}

fn uuids(sandbox: &Sandbox) -> BTreeSet<String> {
    sandbox.sh("cat /dev/shm/uuids").lines().map(str::to_owned).collect()
}

#[test]
fn sandboxes_made_of_a_snapshot_go_on_where_it_was_and_are_not_each_other() {
    in_rig(|| {
        let source = Sandbox::create(&["--memory", "192", "--env", "COLOUR=teal"]);
        source.sh(CANARIES);
        let boot = source.sh("cat /proc/sys/kernel/random/boot_id");
        let template = template_of("snapshot", &source.id, 1);
        // It runs on, and so does what runs in it.
        assert_eq!(find(&source.id).expect("listed")["status"], "running");
        goes_on(&source);
        fsck(&rootfs());
        let error = roost::fails(&[&["snapshot", &source.id], &template.arguments()[..]].concat());
        assert!(error.contains("already"), "{error}");

        // As it must be for VMs to read the file itself; where it is not, each would have a copy.
        let memory = rootfs().with_file_name("snapshot/memory-ranges");
        let stat = Command::new("stat")
            .args(["-c", "%U:%G %a"])
            .arg(&memory)
            .output()
            .expect("stat runs");
        assert_eq!(String::from_utf8_lossy(&stat.stdout), "roost:roost-vm 640\n");
        let changed_at = || std::fs::metadata(&memory).expect("there").ctime_nsec();
        let before = changed_at();

        let (first, metadata) = create(&template, &[]);
        assert_eq!(metadata["restored"], "true", "{metadata}");
        // It had another name for a while.
        assert_ne!(changed_at(), before, "the memory was copied");
        let (second, _) = create(&template, &["--memory", "192"]);
        assert_ne!(first.host_ip(), second.host_ip());
        for clone in [&first, &second] {
            goes_on(clone);
            assert_eq!(
                clone.sh("cat /proc/sys/kernel/random/boot_id"),
                boot,
                "it was booted, not restored"
            );
            assert_eq!(clone.sh("cat /run/e2b/.E2B_SANDBOX_ID"), clone.id);
        }
        assert_eq!(source.sh("cat /run/e2b/.E2B_SANDBOX_ID"), source.id);
        // What they have in common is what there was before the snapshot.
        let [of_source, of_first, of_second] = [&source, &first, &second].map(uuids);
        let common: Vec<_> = of_first.intersection(&of_second).collect();
        assert!(!common.is_empty(), "they do not come from one memory");
        let foreign: Vec<_> = common.iter().filter(|uuid| !of_source.contains(**uuid)).collect();
        assert!(foreign.is_empty(), "two clones had the same uuids: {foreign:?}");
        let of_clone: Vec<_> = of_first.difference(&of_source).collect();
        assert!(!of_clone.is_empty(), "the clone made no uuid of its own");
        // A disk of their own.
        first.sh("echo first > /root/own; sync");
        assert_eq!(second.sh("test -e /root/own && echo there || echo none"), "none");

        // Of another size it is booted, from the same disk.
        let (booted, metadata) = create(&template, &["--memory", "256"]);
        assert_eq!(metadata["restored"], "false", "{metadata}");
        assert_ne!(booted.sh("cat /proc/sys/kernel/random/boot_id"), boot);
        assert_eq!(
            booted.sh("sha256sum < /root/disk | diff - /root/disk.sum && echo same"),
            "same"
        );
        drop(booted);

        // Deleted while in use: nothing new is made of it, and those there are keep it.
        first.pause();
        roost::ok(&[&["rmi"], &template.arguments()[..]].concat());
        let error = roost::fails(&[&["create"], &template.arguments()[..]].concat());
        assert!(error.contains("no template"), "{error}");
        assert!(!on_disk().is_empty(), "its files are needed");
        kill_9("roost-agent");
        wait_for_agent();
        first.resume();
        goes_on(&first);
        goes_on(&second);
        drop(first);
        assert!(!on_disk().is_empty(), "its files are needed");
        drop(second);
        eventually("its files to go", || on_disk().is_empty().then_some(()));
    });
}

#[test]
fn a_paused_sandbox_becomes_a_template_and_stays_paused() {
    in_rig(|| {
        let source = Sandbox::create(&["--memory", "192"]);
        source.sh(CANARIES);
        source.pause();
        let template = template_of("snapshot", &source.id, 2);
        assert!(find_paused(&source.id).is_some());
        fsck(&rootfs());
        source.resume();
        goes_on(&source);
        drop(source);
        let (clone, metadata) = create(&template, &[]);
        assert_eq!(metadata["restored"], "true", "{metadata}");
        goes_on(&clone);
        // As any other: it can be paused and resumed itself.
        clone.pause();
        clone.resume();
        goes_on(&clone);
        drop(clone);
        drop(template);
        assert_eq!(on_disk(), [""; 0]);
    });
}

#[test]
fn a_flattened_root_filesystem_is_booted_and_whoever_asks_twice_gets_one() {
    in_rig(|| {
        let source = Sandbox::create(&["--memory", "192"]);
        source.sh(CANARIES);
        let template = Template::named(3);
        let call = [&["flatten", source.id.as_str()], &template.arguments()[..]].concat();
        // One caller goes away, the others are answered with the same.
        let mut first = roost::start(&call);
        let others = [0, 1].map(|_| roost::start(&call));
        std::thread::sleep(std::time::Duration::from_millis(300));
        first.kill().expect("killed");
        first.wait().expect("reaped");
        let answered: Vec<_> = others
            .into_iter()
            .map(|other| other.wait_with_output().expect("it ends"))
            .collect();
        let made = answered.iter().filter(|output| output.status.success()).count();
        assert!(made >= 1, "{answered:?}");
        goes_on(&source);
        fsck(&rootfs());
        assert!(!rootfs().with_file_name("snapshot").exists());
        let (booted, metadata) = create(&template, &[]);
        assert_eq!(metadata["restored"], Value::Null, "{metadata}");
        assert_eq!(
            booted.sh("sha256sum < /root/disk | diff - /root/disk.sum && echo same"),
            "same"
        );
        // A paused one has a disk too.
        source.pause();
        let other = template_of("flatten", &source.id, 4);
        source.resume();
        goes_on(&source);
        drop(booted);
        drop((template, other));
        eventually("their files to go", || on_disk().is_empty().then_some(()));
    });
}

#[test]
fn no_template_is_made_of_what_is_not_there_nor_in_place_of_the_platforms_own() {
    in_rig(|| {
        let template = Template::named(5);
        let error = roost::fails(&[&["snapshot", "nobody"], &template.arguments()[..]].concat());
        assert!(error.contains("no sandbox"), "{error}");
        let sandbox = Sandbox::create(&["--memory", "128"]);
        for call in ["snapshot", "flatten"] {
            let zero = "00000000-0000-0000-0000-000000000000";
            let error = roost::fails(&[call, &sandbox.id, "--team", zero, "--template", zero]);
            assert!(error.contains("own image") || error.contains("platform"), "{error}");
            let error = roost::fails(&[call, &sandbox.id, "--team", TEAM, "--template", "../../etc"]);
            assert!(error.to_lowercase().contains("uuid"), "{error}");
        }
        // What is absent is as good as deleted.
        roost::ok(&[&["rmi"], &template.arguments()[..]].concat());
        assert_eq!(on_disk(), [""; 0]);
    });
}

#[test]
fn a_containers_image_becomes_a_template_and_damage_to_it_is_noticed() {
    in_rig(|| {
        let image = Saved::new(&["stat", "setpriv"]);
        let envd = format!("{}/envd", image.path());
        run(
            "debugfs",
            &[
                "-R",
                &format!("dump /usr/bin/envd {envd}"),
                "/var/lib/roost/images/minimal/rootfs.ext4",
            ],
        );
        let built = once_it_boots(|| {
            image.build(&[
                "--envd",
                &envd,
                "--name",
                "web",
                "--snapshot",
                "--memory",
                "192",
                "web.tar",
            ])
        });
        let id = built.trim();
        let listed: Value = serde_json::from_str(&roost::ok(&["template", "ls", "--json"])).expect("JSON");
        let listed = listed["templates"].as_array().expect("a list");
        let listed: Vec<_> = listed.iter().filter(|template| template["name"] == "web").collect();
        assert!(
            listed.len() == 1 && listed[0]["templateId"] == id && listed[0]["hasMemory"] == true,
            "{listed:?}"
        );
        fsck(&rootfs());

        let made = roost::ok(&["create", "--json", "--template", "web", "--memory", "192"]);
        let made: Value = serde_json::from_str(&made).expect("JSON");
        let sandbox = Sandbox {
            id: made["sandboxId"].as_str().expect("an id").to_owned(),
        };
        assert_eq!(made["metadata"]["restored"], "true", "{made}");
        assert_eq!(sandbox.sh("stat -c '%u:%g %a' /srv/suid"), "1234:70000 4755");
        assert_eq!(
            sandbox.sh("echo $(</srv/changed) $(</bin/note); test -L /bin && test -e /srv/hidden || echo gone"),
            "second by way of a link\ngone"
        );
        assert_eq!(
            sandbox
                .sh("stat -c '%h' /srv/name; stat -c '%i' /srv/name /srv/other | { read a; read b; echo $((a - b)); }"),
            "2\n0"
        );
        let as_nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
        assert_eq!(
            sandbox.sh(&format!(
                "{as_nobody} /srv/reader /srv/secret; {as_nobody} cat /srv/secret 2>/dev/null || echo refused"
            )),
            "secret\nrefused"
        );
        assert_eq!(
            sandbox.sh("echo $(</proc/1/comm); test -e /sbin/init || echo no init"),
            "envd\nno init"
        );

        let verify = || roost::roost(&["template", "verify", "web"]);
        let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned();
        let good = verify();
        assert!(
            good.status.success()
                && said(&good) == "rootfs.ext4  ok\nsnapshot/state.json  ok\nsnapshot/memory-ranges  ok\n",
            "{good:?}"
        );
        let memory = rootfs().with_file_name("snapshot/memory-ranges");
        for (file, at, name) in [
            (rootfs(), 1024 + 120, "rootfs.ext4"),
            (memory, 4096, "snapshot/memory-ranges"),
        ] {
            let flip = || flip_byte(&file, at);
            flip();
            let bad = verify();
            assert!(
                !bad.status.success() && said(&bad).contains(&format!("{name}  differs: ")),
                "{bad:?}"
            );
            flip();
        }
        assert!(verify().status.success());
        drop(sandbox);
        roost::ok(&["template", "rm", "web"]);
        eventually("its files to go", || on_disk().is_empty().then_some(()));
    });
}

/// Standard output of a build with `--snapshot`, once more where an emulated guest was lost.
fn once_it_boots(build: impl Fn() -> std::process::Output) -> String {
    let mut output = build();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if said.contains("the guest did not answer within") || said.contains("rebooting") {
        roost::excuse_a_lost_guest(&said);
        output = build();
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn flip_byte(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("opened");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("written");
    file.sync_all().expect("synced");
}

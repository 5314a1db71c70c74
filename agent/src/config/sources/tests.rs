//! What configurations hold, and what is said of those that are wrong.

use super::*;

#[test]
fn unknown_keys_and_bad_values_are_errors_that_name_them() {
    for (text, named) in [
        ("listne = \"0.0.0.0:1\"", "listne"),
        ("listen = \"nowhere\"", "listen"),
        ("status_listen = \"0.0.0.0:50052\"", "status_listen"),
        ("max_sandboxes = 0", "max_sandboxes"),
        ("max_sandboxes = 5000", "max_sandboxes"),
        ("shim = \"docker\"", "shim"),
        ("client_names = []", "client_names"),
        ("client_names = [\"\"]", "client_names"),
        ("viewer_names = [\"\"]", "viewer_names"),
        ("max_calls_per_sec = 0", "max_calls_per_sec"),
        ("log_format = \"xml\"", "log_format"),
        ("log_filter = \"a=b=c\"", "log_filter"),
        ("dir = \"here\"", "dir"),
        ("shim_args = [1]", "shim_args"),
        ("max_exec_output = 0", "max_exec_output"),
        ("max_sandboxes = -1", "max_sandboxes"),
        ("max_sandboxes = 1.5", "max_sandboxes"),
        ("max_sandboxes = { a = 1 }", "max_sandboxes"),
        ("rate_limits = 1", "rate_limits"),
        ("[dns]\na = 1", "dns"),
        ("[[control_plane]]\nurl = \"https://x\"", "control_plane"),
        ("dns = [\"1.1.1.1\", \"::1\"]", "dns"),
        (
            "dns = [\"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\", \"1.1.1.1\"]",
            "dns",
        ),
        ("[control_plane]\nca_file = \"x\"", "ca_file"),
        ("[rate_limits]\ndisk_mb_per_sec = 0", "disk_mb_per_sec"),
        ("[rate_limits]\nnetwork_mb = 1", "network_mb"),
        ("status_page = \"yes\"", "status_page"),
        ("max_vcpus = 65", "max_vcpus"),
        ("max_memory_mb = 63", "max_memory_mb"),
        ("max_disk_mb = 2097153", "max_disk_mb"),
        ("default_disk_mb = 0", "default_disk_mb"),
        ("disk_reserve_mb = 1048577", "disk_reserve_mb"),
        ("boot_timeout_sec = 9", "boot_timeout_sec"),
        ("boot_timeout_sec = 3601", "boot_timeout_sec"),
        ("restore_memory = \"lazy\"", "restore_memory"),
        ("busy_cpu_percent = 0", "busy_cpu_percent"),
        ("busy_cpu_percent = 101", "busy_cpu_percent"),
        ("busy_network_bytes = 0", "busy_network_bytes"),
        ("busy_network_bytes = 1073741825", "busy_network_bytes"),
        ("busy_disk_bytes = 0", "busy_disk_bytes"),
        ("busy_disk_bytes = 1073741825", "busy_disk_bytes"),
        ("[control_plane]\nulr = \"https://x\"", "ulr"),
        ("[control_plane]\nurl = \"x\"", "url"),
        ("[control_plane]\nurl = \"ftp://x\"", "url"),
        ("[control_plane]\naddress = \"192.0.2.1\"", "address"),
        ("[control_plane]\naddress = \"0.0.0.0:50051\"", "address"),
        ("[control_plane]\naddress = \"192.0.2.1:0\"", "address"),
        ("[control_plane]\naddress = \"a b:1\"", "address"),
        ("[control_plane]\nca_file = 1", "ca_file"),
    ] {
        let said = of_text(text).expect_err(text).to_string();
        assert!(said.contains(named), "{text}: {said}");
    }
}

#[test]
fn every_error_is_told_with_its_line_and_what_would_be_right() {
    let text = "# a comment\nlistne = 1\n\nmax_vcpus = 65\n[rate_limits]\ndisk_mb_per_sec = \"much\"\nurl = 1\n";
    let said = of_text(text).expect_err("errors").to_string();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 4, "{said}");
    for (line, parts) in lines.iter().zip([
        &["agent.toml:2: listne is not a key"][..],
        &["agent.toml:4: max_vcpus = 65 is out of range: 1 to 64 vCPUs"],
        &[
            "agent.toml:6: rate_limits.disk_mb_per_sec = \"much\" is out of range",
            "invalid type",
        ],
        &["agent.toml:7: rate_limits.url is not a key of this agent, but control_plane.url is"],
    ]) {
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    let said = of_text("listen = \"0.0.0.0:1\"\nmax_vcpus = \n")
        .expect_err("no TOML")
        .to_string();
    assert!(said.starts_with("agent.toml:2: "), "{said}");
    let said = of_text("dir = \"/a\"\ndir = \"/b\"\n").expect_err("twice").to_string();
    assert!(said.starts_with("agent.toml:2: "), "{said}");
}

#[test]
fn the_last_of_file_directory_environment_and_command_line_holds_key_by_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("agent.toml");
    let more = dir.path().join("agent.toml.d");
    std::fs::create_dir(&more).expect("made");
    let write = |path: &Path, text: &str| std::fs::write(path, text).expect("written");
    write(
        &file,
        "max_vcpus = 1\nmax_memory_mb = 64\nbusy_cpu_percent = 1\n[rate_limits]\ndisk_mb_per_sec = 1\nnetwork_mb_per_sec = 1\n",
    );
    write(
        &more.join("10-a.toml"),
        "max_vcpus = 2\nmax_memory_mb = 65\nrate_limits.disk_mb_per_sec = 2\n",
    );
    write(&more.join("9-b.toml"), "max_vcpus = 3\nmax_memory_mb = 66\n");
    write(&more.join(".hidden.toml"), "max_vcpus = 99\n");
    write(&more.join("10-a.toml~"), "max_vcpus = 99\n");
    let environment = [
        ("ROOST_AGENT_MAX_MEMORY_MB", "67"),
        ("ROOST_AGENT_CONTROL_PLANE_URL", "https://a.example"),
        ("ROOST_AGENT_CLIENT_NAMES", "[\"a\", \"b\"]"),
        ("ROOST_DIR", "/data"),
        ("ROOST_AGENT", "of somebody else"),
        ("ROOST_TESTS_ALL", "1"),
    ];
    let mut sources = Sources {
        file: Some(file.clone()),
        environment: environment.map(|(name, value)| (name.into(), value.into())).into(),
        options: vec![("control_plane.url", "--control-plane", "https://b.example".into())],
    };
    let loaded = sources.load().expect("a configuration");
    let config = &loaded.config;
    assert_eq!(
        (config.max_vcpus, config.max_memory_mb, config.busy_cpu_percent),
        (3, 67, 1)
    );
    let limits = config.rate_limits;
    assert_eq!(limits.disk_mb_per_sec.map(std::num::NonZeroU32::get), Some(2));
    assert_eq!(limits.network_mb_per_sec.map(std::num::NonZeroU32::get), Some(1));
    assert_eq!(
        config.control_plane.url.as_ref().expect("set").to_string(),
        "https://b.example"
    );
    assert_eq!(
        (&*config.dir, &*config.client_names),
        (Path::new("/data"), &["a".to_owned(), "b".into()][..])
    );
    let names = ["agent.toml", "agent.toml.d/10-a.toml", "agent.toml.d/9-b.toml"];
    assert_eq!(loaded.files, names.map(|name| dir.path().join(name)));
    let said = loaded.describe();
    for line in [
        &*format!("# {}:1\nmax_vcpus = 3\n", more.join("9-b.toml").display()),
        &*format!("# {}:6\nrate_limits.network_mb_per_sec = 1\n", file.display()),
        "# ROOST_AGENT_MAX_MEMORY_MB in the environment\nmax_memory_mb = 67\n",
        "# --control-plane\ncontrol_plane.url = \"https://b.example\"\n",
        "# default\nmax_sandboxes = 4096\n",
        "# dns is not set\n",
    ] {
        assert!(said.contains(line), "{line:?} is not in\n{said}");
    }
    assert_eq!(
        format!("{config:?}"),
        format!("{:?}", of_text(&said).expect("as TOML").config)
    );
    // The agent's own name goes before the general one.
    sources.environment.push(("ROOST_AGENT_DIR".into(), "'/own'".into()));
    assert_eq!(&*sources.load().expect("a configuration").config.dir, Path::new("/own"));
}

#[test]
fn a_bad_environment_is_an_error_that_names_the_variable() {
    use std::os::unix::ffi::OsStringExt as _;

    let text = |text: &str| OsString::from(text);
    for (name, value) in [
        ("ROOST_AGENT_LISTNE", text("0.0.0.0:1")),
        ("ROOST_AGENT_", text("1")),
        ("ROOST_AGENT_MAX_VCPUS", text("65")),
        ("ROOST_AGENT_MAX_VCPUS", text("")),
        ("ROOST_AGENT_MAX_VCPUS", text("1\nmax_disk_mb = 1")),
        ("ROOST_AGENT_CLIENT_NAMES", text("a")),
        ("ROOST_AGENT_LISTEN", text("nowhere")),
        ("ROOST_AGENT_DIR", OsString::from_vec(vec![b'/', 0xff])),
        ("ROOST_DIR", text("relative")),
    ] {
        let sources = Sources {
            file: Some("/dev/null".into()),
            environment: vec![(name.into(), value.clone())],
            options: vec![],
        };
        let said = sources.load().expect_err(name).to_string();
        assert!(
            said.starts_with(&format!("{name} in the environment: ")),
            "{value:?}: {said}"
        );
    }
}

#[test]
fn files_that_cannot_be_read_are_errors_and_only_the_usual_one_may_be_missing() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let load = |name: &str| {
        Sources {
            file: Some(at(name)),
            ..Sources::default()
        }
        .load()
    };
    let said = load("missing.toml").expect_err("missing").to_string();
    assert!(said.contains("missing.toml"), "{said}");
    std::fs::write(at("bytes.toml"), [0xff]).expect("written");
    std::fs::write(at("good.toml"), "").expect("written");
    std::fs::create_dir_all(at("good.toml.d/dir.toml")).expect("made");
    std::fs::write(at("other.toml"), "").expect("written");
    std::fs::write(at("other.toml.d"), "").expect("written");
    for name in ["bytes.toml", "good.toml", "other.toml"] {
        let said = load(name).expect_err(name).to_string();
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn the_examples_of_the_readme_and_the_manual_page_are_configurations() {
    for (page, begin, end) in [
        (include_str!("../../../../README.md"), "```toml\n", "```"),
        (include_str!("../../../../packaging/man/agent.toml.5"), ".EX\n", ".EE"),
    ] {
        let (_, rest) = page.split_once(begin).expect("an example");
        let (example, _) = rest.split_once(end).expect("its end");
        of_text(&example.replace('\\', "")).expect(example);
    }
}

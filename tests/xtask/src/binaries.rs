//! This build: the daemons, the command line, the stand-in VMM and the guest's static envd, and where the rig has them.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Error, Result, ensure};

use crate::cache;
use crate::rig::install;
use crate::step::{shown, step};
use crate::test::TEST_FEATURES;

/// Installed in /usr/bin of the rig.
const PROGRAMS: &[&str] = &[
    "roost-privd",
    "roost-vmmshim",
    "roost-cage-probe",
    "roost-agent",
    "roost",
    "roost-mkinitramfs",
    "standin-vmm",
];

/// Folder below `packaging/` and where its files go.
const PACKAGING: &[(&str, &str)] = &[
    ("etc", "etc/roost"),
    ("systemd", "usr/lib/systemd/system"),
    ("sysusers.d", "usr/lib/sysusers.d"),
    ("tmpfiles.d", "usr/lib/tmpfiles.d"),
    ("udev", "usr/lib/udev/rules.d"),
    ("sysctl.d", "usr/lib/sysctl.d"),
    ("modules-load.d", "usr/lib/modules-load.d"),
];

/// Tells this program that cargo runs it in place of the compiler, and which program is to be static.
const STATIC: &str = "ROOST_XTASK_STATIC";

/// Which VMM the rig's sandboxes run on.
pub(crate) enum Vmm {
    /// Ours, over Debian's QEMU.
    StandIn,
    /// The real one, this file.
    CloudHypervisor(PathBuf),
}

/// Built programs.
pub(crate) struct Binaries {
    dir: PathBuf,
    /// The guest's init and agent, static.
    pub(crate) envd: PathBuf,
    /// The rig's test program.
    pub(crate) tests: PathBuf,
    vmm: Vmm,
}

/// How programs are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Profile {
    /// For tests: little optimised, and with the features of [`TEST_FEATURES`].
    Dev,
    /// As packaged, but that a shim takes the stand-in's profile.
    Release,
}

/// Builds everything that a rig needs.
pub(crate) fn build() -> Result<Binaries> {
    build_as(Profile::Dev, "rig")
}

/// As [`build`], with another of the test programs.
pub(crate) fn build_as(profile: Profile, tests: &str) -> Result<Binaries> {
    let vmm = Vmm::choose()?;
    let tests = step("building the daemons and what runs in the rig", || {
        build_programs(profile, tests)
    })?;
    let envd = build_envd()?;
    let dir = match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    };
    Ok(Binaries {
        dir: cache::target().join(dir),
        envd,
        tests,
        vmm,
    })
}

/// Builds what is installed, and the test program; where cargo says that is.
///
/// One call for the whole workspace and with tests in it: so every crate that we use has the features that `cargo test --workspace` has
/// compiled it with, and is not compiled once more. Not all binaries: this program must not be replaced while it runs.
fn build_programs(profile: Profile, tests: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--workspace", "--test", tests]);
    match profile {
        Profile::Dev => command.args(["--features", TEST_FEATURES]),
        Profile::Release => command.args(["--release", "--features", "roost-vmmshim/foreign-profiles"]),
    };
    command.arg("--message-format=json-render-diagnostics");
    PROGRAMS.iter().for_each(|program| {
        command.args(["--bin", program]);
    });
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo build: {}", output.status);
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let messages = lines.filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
    let mut executables = messages.filter_map(|message| {
        let ours = message.pointer("/target/name")? == tests && message.pointer("/target/kind/0")? == "test";
        ours.then(|| message.get("executable")?.as_str().map(PathBuf::from))
            .flatten()
    });
    executables
        .next_back()
        .with_context(|| format!("cargo built no {tests}"))
}

/// Builds the guest's envd, statically linked and without what debuggers read, as each guest reads it from its disk.
///
/// The flags are for the program alone: what it depends on is the same code either way, and given to cargo they would have every
/// crate compiled once more. So cargo has this program call the compiler, see [`compile`].
pub(crate) fn build_envd() -> Result<PathBuf> {
    // No examples are there: with them asked for, crates have the features that tests give them, as in the other builds.
    let finished = build_static(&["--workspace", "--features", TEST_FEATURES, "--examples"])?;
    Ok(finished.join("debug/envd"))
}

/// Builds envd alone, statically, with these arguments of `cargo build`; the folder in which cargo has its profiles' folders.
pub(crate) fn build_static(arguments: &[&str]) -> Result<PathBuf> {
    let itself = env::current_exe().context("this program has no path")?;
    // The compiled crates are those of the other builds; the program has a folder of its own, or theirs would take its place.
    let target = cache::target();
    let finished = target.join("static");
    step("building envd", || {
        shown(
            cargo()
                .arg("build")
                .args(arguments)
                .args(["--bin", "envd"])
                .env("CARGO_TARGET_DIR", &finished)
                .env("CARGO_BUILD_BUILD_DIR", &target)
                .env("RUSTC_WORKSPACE_WRAPPER", itself)
                .env(STATIC, "envd"),
        )
    })?;
    Ok(finished)
}

/// Where cargo has called this program in place of the compiler: calls that, and has it link [`STATIC`] statically. Only returns with
/// an error.
pub(crate) fn compile() -> Option<Error> {
    let program = env::var_os(STATIC)?;
    let mut arguments = env::args_os().skip(1);
    let mut compiler = Command::new(arguments.next()?);
    let arguments: Vec<OsString> = arguments.collect();
    compiler.args(&arguments);
    if arguments
        .windows(2)
        .any(|pair| pair[0] == "--crate-name" && pair[1] == program)
    {
        compiler.args(["-C", "target-feature=+crt-static", "-C", "strip=debuginfo"]);
    }
    Some(compiler.exec().into())
}

/// cargo in the workspace, without what the `cargo run` that started us has set for us alone.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"));
        if ours || name == "LD_LIBRARY_PATH" {
            command.env_remove(name);
        }
    }
    command.current_dir(cache::workspace());
    command
}

impl Vmm {
    fn choose() -> Result<Self> {
        if let Some(path) = env::var_os("CLOUD_HYPERVISOR").filter(|path| !path.is_empty()) {
            let path = PathBuf::from(path);
            ensure!(path.is_file(), "CLOUD_HYPERVISOR={}: no such file", path.display());
            return Ok(Self::CloudHypervisor(path));
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let found = env::split_paths(&path)
            .map(|dir| dir.join("cloud-hypervisor"))
            .find(|path| path.is_file());
        Ok(found.map_or(Self::StandIn, Self::CloudHypervisor))
    }
}

impl Binaries {
    /// What the rig's sandboxes run on, in a word.
    pub(crate) fn vmm(&self) -> &'static str {
        match self.vmm {
            Vmm::StandIn => "the stand-in",
            Vmm::CloudHypervisor(_) => "cloud-hypervisor",
        }
    }

    /// Puts programs, units and configuration into the tree that is unpacked over the rig's root.
    pub(crate) fn install(&self, overlay: &Path) -> Result<()> {
        for program in PROGRAMS {
            install(overlay, &format!("usr/bin/{program}"), &self.read(program)?, 0o755)?;
        }
        let workspace = cache::workspace();
        for (folder, destination) in PACKAGING {
            let folder = workspace.join("packaging").join(folder);
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
                let entry = entry?;
                let name = entry
                    .file_name()
                    .into_string()
                    .ok()
                    .context("a file in packaging/ has an odd name")?;
                install(
                    overlay,
                    &format!("{destination}/{name}"),
                    &fs::read(entry.path())?,
                    0o644,
                )?;
            }
        }
        self.install_vmm(overlay, "etc/roost/vmmshim.env")
    }

    /// A program of this build.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        if name == "envd" {
            self.envd.clone()
        } else {
            self.dir.join(name)
        }
    }

    fn read(&self, program: &str) -> Result<Vec<u8>> {
        fs::read(self.program(program)).with_context(|| format!("cannot read {program}"))
    }

    /// Puts what packages do not have into that tree: the VMM, and at `shim_env` what tells shims of it.
    pub(crate) fn install_vmm(&self, overlay: &Path, shim_env: &str) -> Result<()> {
        let workspace = cache::workspace();
        let shim = match &self.vmm {
            Vmm::StandIn => {
                install(overlay, "usr/bin/standin-vmm", &self.read("standin-vmm")?, 0o755)?;
                eprintln!(
                    "rig: VMM is the STAND-IN (QEMU behind cloud-hypervisor's interface, without the VMM's filter of system calls, which the cage \
                     probe alone runs under); CLOUD_HYPERVISOR=<path> uses the real one"
                );
                let profile = fs::read(workspace.join("tests/standin/profile.json"))?;
                install(overlay, "usr/share/roost-tests/standin-profile.json", &profile, 0o644)?;
                "--vmm /usr/bin/standin-vmm --profile /usr/share/roost-tests/standin-profile.json"
            }
            Vmm::CloudHypervisor(path) => {
                eprintln!("rig: VMM is the REAL cloud-hypervisor, {}", path.display());
                let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                install(overlay, "usr/bin/cloud-hypervisor", &data, 0o755)?;
                "--vmm /usr/bin/cloud-hypervisor"
            }
        };
        install(
            overlay,
            shim_env,
            format!("ROOST_SHIM_ARGS=\"{shim}\"\n").as_bytes(),
            0o644,
        )?;
        // Wanted by the rig's tests, not by its boot: the prepare script starts the units when users and keys are there.
        let link = overlay.join("usr/share/roost-tests/vmm");
        fs::create_dir_all(link.parent().expect("the link lies in a folder"))?;
        symlink(
            if matches!(self.vmm, Vmm::StandIn) {
                "/usr/bin/standin-vmm"
            } else {
                "/usr/bin/cloud-hypervisor"
            },
            link,
        )?;
        Ok(())
    }
}

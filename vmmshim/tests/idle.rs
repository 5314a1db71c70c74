//! A shim that launches nothing: how it starts, what it refuses, how it ends.

mod harness;

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};

use harness::{Place, Shim, null};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use roost_common::ipc;
use roost_common::shim::{FromShim, Lendable, ShimError, SpecField, Start, Status, ToShim, VmSpec};
use roost_common::units::{Mebibytes, Vcpus};

const NOTHING: [&str; 0] = [];

fn exit_code(arguments: &[&str], stdin: Stdio) -> Option<i32> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_roost-vmmshim"));
    command.args(arguments).stdin(stdin).stderr(Stdio::null());
    command.status().expect("the shim starts").code()
}

#[test]
fn unknown_arguments_and_relative_programs_are_refused() {
    for bad in [
        &["--nope"][..],
        &["--vmm"],
        &["--vmm", "cloud-hypervisor"],
        &["x"],
        &["--child", ""],
    ] {
        assert_eq!(exit_code(bad, Stdio::null()), Some(2), "{bad:?}");
    }
}

#[cfg(not(feature = "foreign-profiles"))]
#[test]
fn a_packaged_build_knows_no_foreign_profile() {
    let profile = concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/cloud-hypervisor.json");
    assert_eq!(exit_code(&["--profile", profile], Stdio::null()), Some(2));
}

#[cfg(feature = "foreign-profiles")]
#[test]
fn a_profile_that_is_none_is_refused() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    assert_eq!(exit_code(&["--profile", manifest], Stdio::null()), Some(2));
    assert_eq!(exit_code(&["--profile", "/nonexistent"], Stdio::null()), Some(2));
}

#[test]
fn without_a_packet_connection_on_descriptor_0_it_does_not_start() {
    assert_eq!(exit_code(&[], Stdio::null()), Some(1));
}

#[test]
fn it_says_hello_and_ends_when_the_agent_goes_before_a_launch() {
    let mut shim = Shim::start(NOTHING);
    let agent = std::mem::replace(&mut shim.agent, harness::Agent(null())).hello();
    drop(agent);
    assert_eq!(shim.ended().code(), Some(0));
}

#[test]
fn an_agent_that_is_gone_before_the_shim_starts_leaves_no_shim() {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a socket pair");
    drop(ours);
    assert_eq!(exit_code(&[], Stdio::from(theirs)), Some(0));
}

#[test]
fn kill_ends_a_shim_that_has_launched_nothing() {
    let mut shim = Shim::start(NOTHING);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    assert!(matches!(
        shim.agent.ask(&ToShim::Status),
        FromShim::Status(Status::Idle)
    ));
    assert!(matches!(shim.agent.ask(&ToShim::Kill), FromShim::Killed));
    assert_eq!(shim.ended().code(), Some(0));
    assert!(shim.agent.is_closed());
}

#[test]
fn garbage_ends_the_connection_and_with_it_an_idle_shim() {
    for garbage in [&[0xff; 40][..], &[], &[0], &[200, 1]] {
        let mut shim = Shim::start(NOTHING);
        assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
        send(shim.agent.0.as_raw_fd(), garbage, MsgFlags::empty()).expect("sent");
        assert_eq!(shim.ended().code(), Some(0), "{garbage:?}");
        assert!(shim.agent.is_closed());
    }
}

#[test]
fn a_peer_that_reads_nothing_is_dropped_rather_than_waited_for() {
    let mut shim = Shim::start(NOTHING);
    // Never reads: answers pile up until the shim cannot send one.
    let request = ipc::Packet::encode(&ToShim::Status).expect("encoded");
    let mut sent = 0;
    while request.send(shim.agent.0.as_fd()).is_ok() {
        sent += 1;
        assert!(sent < 1_000_000, "the shim took a million requests");
    }
    assert_eq!(shim.ended().code(), Some(0));
}

#[test]
fn requests_that_need_a_vmm_are_refused() {
    let shim = Shim::start(NOTHING);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    for request in [
        ToShim::Lend(Lendable::Disk),
        ToShim::Lend(Lendable::Memory { attempt: 1 }),
        ToShim::Publish { attempt: 1 },
    ] {
        let answer = shim.agent.ask(&request);
        assert!(
            matches!(answer, FromShim::Refused(ShimError::NotRunning)),
            "{request:?}: {answer:?}"
        );
    }
}

#[test]
fn a_refused_launch_leaves_nothing_and_the_shim_idle() {
    let place = Place::new();
    let good = place.spec("exit 0");
    let shim = Shim::start(NOTHING);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    let start = |kernel: &str| Start::Boot {
        kernel: kernel.into(),
        initramfs: None,
    };
    #[rustfmt::skip]
    let bad = [
        (SpecField::Vcpus, VmSpec { vcpus: Vcpus(0), ..good.clone() }),
        (SpecField::Memory, VmSpec { memory: Mebibytes(1), ..good.clone() }),
        (SpecField::Directory, VmSpec { run_dir: "/run/roost/vm/other".into(), ..good.clone() }),
        (SpecField::Directory, VmSpec { vm_dir: "/tmp/../sandboxes/cl-1/vm".into(), ..good.clone() }),
        (SpecField::Start, VmSpec { start: start("vmlinux"), ..good.clone() }),
        // Neither descriptor is a device of ours.
        (SpecField::Disk, good),
    ];
    for (field, spec) in bad {
        let answer = shim.agent.launch(&spec);
        assert!(
            matches!(&answer, FromShim::Refused(ShimError::BadSpec { field: got }) if *got == field),
            "{field:?}: {answer:?}"
        );
        assert!(place.run_files().is_empty(), "{field:?} left {:?}", place.run_files());
    }
    assert!(matches!(
        shim.agent.ask(&ToShim::Status),
        FromShim::Status(Status::Idle)
    ));
}

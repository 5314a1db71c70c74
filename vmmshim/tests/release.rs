//! What a shim lets go of, and when. A process of its own with one test: a copy of a descriptor in another test's child, for the
//! moment between fork and exec, would look like the shim's.

mod harness;

use std::io::Read;

use harness::{Place, Shim, null};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use roost_common::shim::FromShim;

const PROFILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/probe-profile.json");
const PROBE: &str = env!("CARGO_BIN_EXE_roost-cage-probe");

#[test]
fn the_connection_ends_only_when_disk_and_tap_have_been_closed() {
    for _ in 0..20 {
        let place = Place::new();
        let shim = Shim::start(["--vmm", PROBE, "--profile", PROFILE, "--child"]);
        assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
        let (disk, ours) = std::io::pipe()
            .map(|(reader, writer)| (writer, reader))
            .expect("a pipe");
        let started = shim.agent.launch_with(&place.spec("exit 0"), null(), disk.into());
        assert!(matches!(started, FromShim::Started(_)), "{started:?}");
        while shim.agent.receive().is_ok() {}
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("F_SETFL");
        // An end of file: no copy of the writing end is left.
        assert_eq!((&ours).read(&mut [0; 1]).expect("the disk is still held"), 0);
    }
}

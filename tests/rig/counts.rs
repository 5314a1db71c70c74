//! What operations ask of the host has ceilings: exact numbers, so a test may hold them.

use roost_tests::counts::{Counts, wakes_of_an_uncalled_privd};
use roost_tests::roost::{Sandbox, vmm_command};
use roost_tests::{in_rig, show};

/// What an operation may ask for at most. A sync pair is that of a file and that of its directory.
struct Ceiling {
    privd: u64,
    syncs: usize,
    programs: usize,
}

impl Ceiling {
    fn holds(&self, what: &str, counts: &Counts) {
        show(&format!("{what}: {counts:?}"));
        let privd: u64 = counts.privd.values().sum();
        assert!(privd <= self.privd, "{what}: {counts:?}");
        assert!(counts.syncs <= self.syncs, "{what}: {counts:?}");
        assert!(counts.programs.len() <= self.programs, "{what}: {counts:?}");
    }
}

fn most(privd: u64, syncs: usize, programs: usize) -> Ceiling {
    Ceiling { privd, syncs, programs }
}

/// Shim and VMM; the stand-in is two programs, its own and QEMU. None of udev's: `packaging/udev`.
fn programs_of_a_vm() -> usize {
    if vmm_command() == "standin-vmm" { 3 } else { 2 }
}

#[test]
fn an_operation_asks_the_host_for_no_more_than_it_needs() {
    in_rig(|| {
        // The first one has the shim ask the VMM its version, once for each file that is one.
        drop(Sandbox::create(&["--memory", "256"]));
        let vm = programs_of_a_vm();

        let (sandbox, create) = Counts::of(|| Sandbox::create(&["--memory", "256"]));
        assert_eq!(create.syncs, 4, "the trace sees syncs: {create:?}");
        assert!(
            create.programs.iter().any(|path| path.ends_with("/roost-vmmshim")),
            "{create:?}"
        );
        most(2, 4, vm).holds("create", &create);
        let links = std::fs::read_dir("/proc/sys/net/ipv4/conf")
            .expect("there is one")
            .flatten();
        let filters = links
            .filter(|link| link.file_name().to_string_lossy().starts_with("roost-v"))
            .map(|link| std::fs::read_to_string(link.path().join("rp_filter")).expect("read"));
        assert_eq!(
            filters.collect::<Vec<_>>(),
            ["1\n"],
            "the link is strict about where packets come from, also once udev has seen it"
        );

        let ((), exec) = Counts::of(|| drop(sandbox.sh("true")));
        most(0, 0, 0).holds("exec", &exec);
        assert_eq!(wakes_of_an_uncalled_privd(), 0, "an idle sandbox wakes privd");

        let ((), pause) = Counts::of(|| sandbox.pause());
        most(0, 10, 0).holds("pause", &pause);
        let ((), resume) = Counts::of(|| sandbox.resume());
        most(2, 6, vm).holds("resume", &resume);
        let ((), destroy) = Counts::of(|| drop(sandbox));
        most(0, 1, 0).holds("destroy", &destroy);
    });
}

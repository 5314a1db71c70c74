//! Requests of a hijacked agent, drawn at random: of every verb, with descriptors of every kind in every field, numbers from the edges, and
//! calls that are given up halfway. privd answers each, stays what it was, and leaves nothing.
//!
//! `ROOST_SEED` plays the same requests again, `ROOST_OPERATIONS` has another number of them.

use roost_tests::random::{Random, number, seed};
use roost_tests::{is_full_size, show};

use super::*;

/// Requests of an ordinary run, and of one at full size.
const FEW: usize = 400;
const MANY: usize = 10_000;
/// What privd's memory stays below, in KiB, whatever it is asked.
const MOST_MEMORY: u64 = 8 << 10;
/// Most disks and networks that are held at a time.
const HELD: usize = 6;

/// Descriptors that a request may carry, each opened anew.
struct Pool<'a> {
    rig: &'a Rig,
    images: [PathBuf; 2],
    cows: Vec<PathBuf>,
}

impl Pool<'_> {
    fn draw(&self, random: &mut Random, network: Option<&Network>) -> PassedFd {
        let read = || OpenOptions::new().read(true).to_owned();
        let both = || OpenOptions::new().read(true).write(true).to_owned();
        let path_only = || read().custom_flags(nix::libc::O_PATH).to_owned();
        let image = &self.images[random.below(self.images.len())];
        let cow = &self.cows[random.below(self.cows.len())];
        match random.below(16) {
            // Twice: what is right is drawn often enough to be there.
            0 | 1 => opened(&read(), image),
            2 | 3 => opened(&both(), cow),
            4 => opened(&both(), image),
            5 => opened(&read(), cow),
            6 => opened(&path_only(), cow),
            7 => opened(&read(), &self.rig.place),
            8 => opened(&both(), Path::new("/dev/null")),
            9 => opened(&both(), Path::new("/dev/net/tun")),
            10 => opened(&both(), Path::new("/dev/mapper/control")),
            11 => opened(&read(), Path::new("/proc/self/maps")),
            12 => opened(&read(), Path::new("/etc/shadow")),
            13 => nix::unistd::pipe().expect("a pipe").0.into(),
            14 => memory().into(),
            _ => match network {
                Some(network) => network.tap.clone(),
                None => try_connect().expect("a socket").into(),
            },
        }
    }
}

/// A file in memory that cannot be changed any more.
fn memory() -> OwnedFd {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = memfd_create("roost-test", MFdFlags::MFD_ALLOW_SEALING).expect("a file in memory");
    nix::unistd::ftruncate(&file, 1 << 20).expect("sized");
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all())).expect("sealed");
    file
}

fn policy(random: &mut Random) -> EgressPolicy {
    let ranges = |random: &mut Random| {
        let count = random.one_of(&[0, 0, 1, 3, 64, 65]);
        let range = |random: &mut Random| Cidr {
            network: Ipv4Addr::from_bits(random.one_of(&[0, 0x0a00_0000, 0xcb00_7100, u32::MAX])),
            length: random.one_of(&[0, 8, 24, 32, 33, 255]),
        };
        (0..count).map(|_| range(random)).collect()
    };
    EgressPolicy {
        internet: random.one_of(&[Internet::Open, Internet::Listed, Internet::Closed]),
        allowed: ranges(random),
        denied: ranges(random),
        resolvers: vec![Ipv4Addr::LOCALHOST; random.one_of(&[0, 1, 8, 9, 300])],
        proxied: random.below(2) == 0,
    }
}

/// Most memory that a process has had at a time, in KiB.
fn most_memory(child: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.expect("a number")
}

/// Descriptors that a process has open.
fn descriptors(child: &Child) -> usize {
    let all = fs::read_dir(format!("/proc/{}/fd", child.id())).expect("it runs");
    all.count()
}

#[test]
fn random_requests_leave_privd_as_it_was_and_nothing_behind() {
    let wanted = number("ROOST_OPERATIONS").map(|wanted| usize::try_from(wanted).expect("a count"));
    let (seed, requests) = (seed(), wanted.unwrap_or(if is_full_size() { MANY } else { FEW }));
    show(&format!("NOTE: ROOST_SEED={seed} ROOST_OPERATIONS={requests}"));
    in_rig(|| {
        let mut rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let images = [rig.image("a.img", 4 << 20, 7), rig.image("b.img", 8 << 20, 8)];
        let cows = (0..4).map(|n| rig.cow(&format!("{n}.cow"), size)).collect();
        let census = Census::take();
        // Calls that are answered, so that what it keeps open is open: its socket that tells of the host's addresses too.
        rig.inventory();
        drop(rig.open_network(199, EgressPolicy::of(Internet::Open)).expect("opened"));
        eventually("that network to be gone", || {
            Census::take().differences(&census).is_empty().then_some(())
        });
        let before = (census, descriptors(&rig.child));
        let outcomes = {
            let pool = Pool {
                rig: &rig,
                images,
                cows,
            };
            play(&pool, seed, requests)
        };
        show(&format!("NOTE: {outcomes:?}"));
        // Some of every kind, or nothing was shown.
        let [done, refused, given_up] = outcomes;
        assert!(
            done > requests / 20 && refused > requests / 4 && given_up > 0,
            "{outcomes:?}"
        );
        assert!(rig.child.try_wait().expect("asked").is_none(), "privd has ended");
        let most = most_memory(&rig.child);
        show(&format!("NOTE: privd had at most {most} KiB"));
        assert!(most < MOST_MEMORY, "{most} KiB");
        eventually("privd to have closed what it was shown", || {
            (descriptors(&rig.child) <= before.1).then_some(())
        });
        eventually("all of it to be gone", || {
            Census::take().differences(&before.0).is_empty().then_some(())
        });
        assert!(rig.inventory().is_empty());
        // It still does what it is for.
        rig.disk("after", 9, size);
        rig.kill_and_restart();
    });
}

/// How many requests were done, refused, and given up.
fn play(pool: &Pool<'_>, seed: u64, requests: usize) -> [usize; 3] {
    let rig = pool.rig;
    let (runtime, client) = rig.runtime();
    let (mut disks, mut networks): (Vec<Disk>, Vec<Network>) = (Vec::new(), Vec::new());
    let mut outcomes = [0; 3];
    for turn in 0..requests {
        let mut random = Random::of_turn(seed, turn);
        // A short one is given up wherever it then is; what it was to make must not stay. From no time at all to 3 ms, of which a disk
        // takes more.
        let mut context = patient();
        let is_hasty = random.below(16) == 0;
        if is_hasty {
            context.deadline =
                Instant::now() + Duration::from_micros(100 * u64::try_from(random.below(30)).expect("small"));
        }
        let network = (!networks.is_empty()).then(|| random.below(networks.len()));
        let network = network.map(|at| &networks[at]);
        let answer = match random.below(8) {
            0..=2 => {
                // Ids and slots that nobody else has, but now and then: who waits for one that is taken waits for five seconds.
                let id = if random.below(400) == 0 {
                    "same".to_owned()
                } else {
                    format!("r-{turn}")
                };
                let request = OpenDisk {
                    sandbox: id.parse().expect("an id"),
                    origin: pool.draw(&mut random, network),
                    cow: pool.draw(&mut random, network),
                    size: Sectors(random.one_of(&[0, 8, 8193, 16384, 16384, 16384, 1 << 32, u64::MAX])),
                    owner: random.one_of(&[0, 0, 61184, 65519, 1000, u32::MAX]),
                };
                let answer = runtime.block_on(client.open_disk(context, request));
                answer.map(|answer| answer.map(|disk| disks.push(disk)))
            }
            3 => {
                let slot = 200 + turn % 30_000;
                let request = OpenNetwork {
                    slot: Slot::try_from(u32::try_from(slot).expect("small")).expect("a slot"),
                    policy: policy(&mut random),
                };
                let answer = runtime.block_on(client.open_network(context, request));
                answer.map(|answer| answer.map(|network| networks.push(network)))
            }
            4 | 5 => {
                let request = SetPolicy {
                    tap: pool.draw(&mut random, network),
                    policy: policy(&mut random),
                };
                runtime.block_on(client.set_policy(context, request))
            }
            6 => {
                let request = ReadCounters {
                    tap: pool.draw(&mut random, network),
                };
                let answer = runtime.block_on(client.network_counters(context, request));
                answer.map(|answer| answer.map(drop))
            }
            _ => {
                let cursor = InventoryCursor(random.one_of(&[0, 1, 255, u64::MAX]));
                let answer = runtime.block_on(client.inventory(context, cursor));
                answer.map(|answer| answer.map(drop))
            }
        };
        match answer {
            Ok(Ok(())) => outcomes[0] += 1,
            Ok(Err(PrivdError::Kernel { step, errno })) => {
                panic!("turn {turn}: what privd should have refused, the kernel did: {step} ({errno})")
            }
            Ok(Err(_)) => outcomes[1] += 1,
            Err(_) if is_hasty => outcomes[2] += 1,
            Err(error) => panic!("turn {turn}: {error}"),
        }
        while disks.len() > HELD {
            drop(disks.remove(random.below(disks.len())));
        }
        while networks.len() > HELD {
            drop(networks.remove(random.below(networks.len())));
        }
    }
    outcomes
}

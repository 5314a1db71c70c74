//! A kernel for tests: loops and devices that live and die by descriptors, as the real ones do.
//!
//! An open descriptor is a memory file with a name of its own. It is open while this process has a descriptor of that name, so
//! whatever the code under test does with it (drops, passes on, forgets) has the consequence that it would have, and a copy that
//! another test's child has inherited does not count.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use roost_common::privd::{DiskNode, Step};
use roost_common::units::Sectors;

use super::{Access, DiskKernel, Found, Map, Table, Target};
use crate::check::{DiskSpec, Image};
use crate::kernel::loopdev::{Loop, LoopUse};

#[derive(Default)]
pub(super) struct FakeKernel {
    state: RefCell<State>,
    at_next_open: Event,
    at_next_create: Event,
    at_next_wait: Event,
}

/// Something that happens elsewhere, once.
type Event = RefCell<Option<Box<dyn FnOnce()>>>;

fn happens(event: &Event) -> bool {
    // Taken out first: what happens may come by here again.
    let event = event.borrow_mut().take();
    event.map(|event| event()).is_some()
}

#[derive(Default)]
struct State {
    devices: BTreeMap<String, Device>,
    loops: BTreeMap<u32, Opens>,
    made: u32,
    fail_at: Option<Step>,
    /// Who owns the node behind a descriptor, by minor number.
    owners: BTreeMap<u32, u32>,
    watched: Vec<(u32, bool)>,
}

#[derive(Default)]
struct Device {
    minor: u32,
    loaded: Option<Vec<Target>>,
    active: Option<Vec<Target>>,
    deferred: bool,
    is_foreign: bool,
    opens: Opens,
}

/// What is open, each by what its descriptors lead to.
#[derive(Default)]
struct Opens(Vec<PathBuf>);

impl Opens {
    fn open(&mut self) -> OwnedFd {
        /// All tests of a process see its descriptors.
        static OPENED: AtomicU32 = AtomicU32::new(0);
        let name = format!("opened-{}", OPENED.fetch_add(1, Ordering::Relaxed));
        let file = memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC).expect("a memory file");
        self.0.push(leads_to(&file));
        file
    }

    fn any(&mut self) -> bool {
        if self.0.is_empty() {
            return false;
        }
        // Other tests open and close descriptors meanwhile, so one that was listed may have gone.
        let open: Vec<PathBuf> = std::fs::read_dir("/proc/self/fd")
            .expect("descriptors")
            .filter_map(|entry| entry.and_then(|entry| std::fs::read_link(entry.path())).ok())
            .collect();
        self.0.retain(|file| open.contains(file));
        !self.0.is_empty()
    }
}

fn leads_to(descriptor: &OwnedFd) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).expect("a descriptor")
}

impl Device {
    fn targets(&self) -> impl Iterator<Item = &Target> {
        self.loaded.iter().chain(&self.active).flatten()
    }
}

impl State {
    /// Removes what has nothing left that keeps it.
    fn settle(&mut self) {
        loop {
            let used: Vec<u32> = self
                .devices
                .values()
                .flat_map(Device::targets)
                .filter_map(|target| match target.map {
                    Map::Snapshot { origin, .. } => Some(origin.minor),
                    Map::Linear { .. } | Map::Zero => None,
                })
                .collect();
            let before = self.devices.len();
            self.devices
                .retain(|_, device| !device.deferred || device.opens.any() || used.contains(&device.minor));
            if self.devices.len() == before {
                break;
            }
        }
        let used: Vec<u32> = self
            .devices
            .values()
            .flat_map(Device::targets)
            .filter_map(|target| match target.map {
                Map::Linear { number } => Some(number),
                Map::Snapshot { cow, .. } => Some(cow),
                Map::Zero => None,
            })
            .collect();
        self.loops.retain(|number, opens| opens.any() || used.contains(number));
    }

    /// What shows to a watcher.
    fn changes(&self) -> Vec<(u32, bool)> {
        let devices = self.devices.values();
        devices.map(|device| (device.minor, device.active.is_some())).collect()
    }

    fn fail(&mut self, step: Step) -> io::Result<()> {
        self.settle();
        if self.fail_at == Some(step) {
            // Once: what undoes the steps before must not fail likewise.
            self.fail_at = None;
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn device(&mut self, name: &str) -> io::Result<&mut Device> {
        self.devices
            .get_mut(name)
            .ok_or(io::Error::from_raw_os_error(libc::ENXIO))
    }
}

fn either(name: &str, origin: Step, snapshot: Step) -> Step {
    if name.starts_with("roost-o-") { origin } else { snapshot }
}

impl FakeKernel {
    pub(super) fn failing_at(step: Step) -> Self {
        let kernel = Self::default();
        kernel.fail_at(step);
        kernel
    }

    pub(super) fn fail_at(&self, step: Step) {
        self.state.borrow_mut().fail_at = Some(step);
    }

    /// Something that happens elsewhere right before the next device is opened.
    pub(super) fn at_next_open(&self, event: impl FnOnce() + 'static) {
        *self.at_next_open.borrow_mut() = Some(Box::new(event));
    }

    /// Something that happens elsewhere right before the next device is created.
    pub(super) fn at_next_create(&self, event: impl FnOnce() + 'static) {
        *self.at_next_create.borrow_mut() = Some(Box::new(event));
    }

    /// Something that happens elsewhere while a change is waited for.
    pub(super) fn at_next_wait(&self, event: impl FnOnce() + 'static) {
        *self.at_next_wait.borrow_mut() = Some(Box::new(event));
    }

    /// A device that somebody else has made.
    pub(super) fn create_foreign(&self, name: &str, table: Option<Vec<Target>>) {
        self.create(name).expect("created");
        let mut state = self.state.borrow_mut();
        let device = state.device(name).expect("created");
        (device.is_foreign, device.active) = (true, table);
    }

    /// All devices and loops there are.
    pub(super) fn inventory(&self) -> Vec<String> {
        let mut state = self.state.borrow_mut();
        state.settle();
        let loops = state.loops.keys().map(|number| format!("loop {number}"));
        state.devices.keys().cloned().chain(loops).collect()
    }

    pub(super) fn owner(&self, node: DiskNode) -> Option<u32> {
        self.state.borrow().owners.get(&node.minor).copied()
    }
}

impl DiskKernel for FakeKernel {
    fn attach(&self, _: BorrowedFd<'_>, usage: LoopUse) -> io::Result<Loop> {
        let mut state = self.state.borrow_mut();
        state.fail(match usage {
            LoopUse::Origin => Step::AttachOriginLoop,
            LoopUse::Cow => Step::AttachCowLoop,
        })?;
        state.made += 1;
        let number = state.made;
        let device = state.loops.entry(number).or_default().open();
        Ok(Loop::new(number, device))
    }

    fn find(&self, name: &str) -> io::Result<Option<Found>> {
        let mut state = self.state.borrow_mut();
        state.settle();
        Ok(state.devices.get(name).map(|device| Found {
            node: DiskNode { minor: device.minor },
            is_ours: !device.is_foreign,
            table: match &device.active {
                None => Table::None,
                Some(table) => Table::Active(
                    table
                        .iter()
                        .map(|target| (target.map.kind().to_owned(), target.length))
                        .collect(),
                ),
            },
        }))
    }

    fn create(&self, name: &str) -> io::Result<DiskNode> {
        happens(&self.at_next_create);
        let mut state = self.state.borrow_mut();
        state.fail(either(name, Step::CreateOrigin, Step::CreateSnapshot))?;
        if state.devices.contains_key(name) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        state.made += 1;
        let minor = state.made;
        let device = Device {
            minor,
            ..Device::default()
        };
        state.devices.insert(name.to_owned(), device);
        Ok(DiskNode { minor })
    }

    fn load(&self, name: &str, table: &[Target], _: Access) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.fail(either(name, Step::LoadOrigin, Step::LoadSnapshot))?;
        for target in table {
            match target.map {
                Map::Zero => {}
                Map::Linear { number } => assert!(state.loops.contains_key(&number), "the loop has gone"),
                Map::Snapshot { origin, cow } => {
                    assert!(state.loops.contains_key(&cow), "the loop has gone");
                    let mut devices = state.devices.values();
                    assert!(
                        devices.any(|device| device.minor == origin.minor && device.active.is_some()),
                        "the origin has gone"
                    );
                }
            }
        }
        state.device(name)?.loaded = Some(table.to_vec());
        Ok(())
    }

    fn resume(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.fail(either(name, Step::ResumeOrigin, Step::ResumeSnapshot))?;
        let device = state.device(name)?;
        device.active = device.loaded.take();
        Ok(())
    }

    fn open(&self, node: DiskNode, access: Access) -> io::Result<OwnedFd> {
        happens(&self.at_next_open);
        let mut state = self.state.borrow_mut();
        state.fail(match access {
            Access::ReadOnly => Step::OpenOrigin,
            Access::ReadWrite => Step::OpenSnapshot,
        })?;
        let mut devices = state.devices.values_mut();
        match devices.find(|device| device.minor == node.minor) {
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            Some(device) => Ok(device.opens.open()),
        }
    }

    fn remove_when_unused(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.fail(either(name, Step::DeferOriginRemoval, Step::DeferRemoval))?;
        state.device(name)?.deferred = true;
        state.settle();
        Ok(())
    }

    fn give(&self, device: &OwnedFd, owner: u32) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.fail(Step::GiveNode)?;
        let file = leads_to(device);
        let given = state
            .devices
            .values()
            .find(|listed| listed.opens.0.contains(&file))
            .expect("an open device")
            .minor;
        state.owners.insert(given, owner);
        Ok(())
    }

    fn watch(&self) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.settle();
        state.watched = state.changes();
        Ok(())
    }

    fn wait(&self, _: Instant) -> io::Result<bool> {
        happens(&self.at_next_wait);
        let mut state = self.state.borrow_mut();
        state.settle();
        // Nothing happens by itself, so without a change the deadline comes at once.
        Ok(state.changes() != state.watched)
    }
}

impl DiskSpec {
    /// A disk of `size` sectors over an image of 16.
    pub(super) fn sample(id: &str, size: u64) -> Self {
        let file = || OwnedFd::from(File::open("/dev/null").expect("/dev/null"));
        Self {
            sandbox: id.parse().expect("an id"),
            origin: file(),
            image: Image {
                device: 1,
                inode: 2,
                length: Sectors(16),
            },
            cow: file(),
            size: Sectors(size),
            owner: 61184,
        }
    }
}

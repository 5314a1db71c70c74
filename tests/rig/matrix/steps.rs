//! The operations, their steps, and which cases a run takes.

use super::fault::Fault;

/// What is done to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Create,
    /// A create from a template that carries memory.
    Clone,
    Pause,
    Resume,
    /// A resume from the disk alone.
    ResumeDisk,
    Destroy,
    Snapshot,
    Flatten,
    /// A snapshot of a paused sandbox.
    SnapshotPaused,
    FlattenPaused,
}

/// What a fault at a step can still change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// Everything: a failure takes the operation back.
    Open,
    /// A failure takes the operation back, but the VM is needed no more: all of it is on disk.
    Whole,
    /// A failure takes the operation back, and the guest has run: so does a VM that is lost, where that is known before the operation is
    /// recorded as done.
    Booted,
    /// The step cannot fail, but a VM that is lost takes the operation back.
    Recorded,
    /// The guest has run. A VM that is lost takes the operation back where that is known before it is recorded as done.
    Thawed,
    /// Nothing: the operation is done, or goes on whatever happens.
    Done,
}

/// A step of an operation, by the agent's name for it (`agent/src/failpoint.rs`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) operation: Operation,
    pub(super) name: &'static str,
    pub(super) point: Point,
}

/// Each operation's steps in their order: those at which it can fail, and the rest.
type Row = (Operation, &'static [&'static str], &'static [(&'static str, Point)]);

const OPERATIONS: &[Row] = &[
    (
        Operation::Create,
        &["create.files", "create.acquired", "create.launched", "create.up"],
        &[("create.recorded", Point::Done)],
    ),
    (
        Operation::Clone,
        &[
            "create.files",
            "create.acquired",
            "clone.offered",
            "create.launched",
            "clone.restored",
            "clone.woken",
            "clone.gated",
            "create.up",
        ],
        &[("create.recorded", Point::Done)],
    ),
    (
        Operation::Pause,
        &[
            "pause.prepared",
            "pause.frozen",
            "pause.stopped",
            "pause.synced",
            "pause.written",
        ],
        &[("pause.sealed", Point::Whole), ("pause.recorded", Point::Done)],
    ),
    (
        Operation::Resume,
        &[
            "resume.ready",
            "resume.acquired",
            "resume.offered",
            "resume.launched",
            "resume.restored",
            "resume.woken",
            "resume.gated",
        ],
        &[
            ("resume.recorded", Point::Recorded),
            ("resume.thawed", Point::Thawed),
            ("resume.running", Point::Done),
        ],
    ),
    (
        Operation::ResumeDisk,
        &["resume.ready", "resume.acquired", "resume.offered", "resume.launched"],
        &[("resume.gated", Point::Booted), ("resume.running", Point::Done)],
    ),
    (
        Operation::Destroy,
        &[],
        &[
            ("destroy.begun", Point::Done),
            ("destroy.killed", Point::Done),
            ("destroy.removed", Point::Done),
        ],
    ),
    (
        Operation::Snapshot,
        &[
            "snapshot.prepared",
            "snapshot.frozen",
            "snapshot.stopped",
            "snapshot.synced",
            "snapshot.written",
            "snapshot.sealed",
            "snapshot.flattened",
            "snapshot.thawed",
            "snapshot.copied",
        ],
        &[("snapshot.finished", Point::Done)],
    ),
    (
        Operation::Flatten,
        &[
            "flatten.prepared",
            "flatten.frozen",
            "flatten.stopped",
            "flatten.synced",
            "flatten.flattened",
            "flatten.thawed",
        ],
        &[("flatten.finished", Point::Done)],
    ),
    (
        Operation::SnapshotPaused,
        &["snapshot.flattened", "snapshot.copied"],
        &[("snapshot.finished", Point::Done)],
    ),
    (
        Operation::FlattenPaused,
        &["flatten.flattened"],
        &[("flatten.finished", Point::Done)],
    ),
];

/// Every operation, in the order of the cases.
pub(super) fn operations() -> impl Iterator<Item = Operation> {
    OPERATIONS.iter().map(|(operation, ..)| *operation)
}

/// Every case there is, in a fixed order: the number of one is its place.
pub(super) fn cases() -> Vec<(Step, Fault)> {
    let steps = OPERATIONS.iter().flat_map(|(operation, open, rest)| {
        let open = open.iter().map(|name| (*name, Point::Open));
        let step = |(name, point)| Step {
            operation: *operation,
            name,
            point,
        };
        open.chain(rest.iter().copied()).map(step)
    });
    steps
        .flat_map(|step| Fault::ALL.map(|fault| (step, fault)))
        .filter(|(step, fault)| {
            matches!(step.point, Point::Open | Point::Whole | Point::Booted) || !fault.fails_the_step()
        })
        .collect()
}

/// The numbers of the cases that `wish` names:
///
/// - `all`;
/// - `k/n`: each n-th from the k-th on, counted from 0, so that n runs can share the whole, and each has some of every operation;
/// - `k/n from N`: those of them that have the number N or a higher one, for a run that was cut off;
/// - `sample N`: one case of each operation, others for another N; a CI passes the number of its run;
/// - any words: the cases whose operation, step or fault each of them is, as in `pause.sealed Enospc`.
///
/// # Panics
/// When it names none.
pub(super) fn choose(cases: &[(Step, Fault)], wish: &str) -> Vec<usize> {
    let chosen: Vec<usize> = if wish == "all" {
        (0..cases.len()).collect()
    } else if let Some(turn) = wish.strip_prefix("sample ") {
        sample(cases, turn.parse().expect("ROOST_MATRIX: a number after sample"))
    } else if let Some((first, runs, from)) = share(wish) {
        let share = (first..cases.len()).step_by(runs);
        share.filter(|number| *number >= from).collect()
    } else {
        let is_meant = |(step, fault): &(Step, Fault)| {
            let names = [
                format!("{:?}", step.operation),
                step.name.to_owned(),
                format!("{fault:?}"),
            ];
            wish.split_whitespace()
                .all(|word| names.iter().any(|name| name.eq_ignore_ascii_case(word)))
        };
        (0..cases.len()).filter(|number| is_meant(&cases[*number])).collect()
    };
    assert!(!chosen.is_empty(), "ROOST_MATRIX={wish:?} names no case");
    chosen
}

/// First, step, and the number to begin at.
fn share(wish: &str) -> Option<(usize, usize, usize)> {
    let (share, from) = wish.split_once(" from ").unwrap_or((wish, "0"));
    let (first, runs) = share.split_once('/')?;
    Some((first.parse().ok()?, runs.parse().ok()?, from.parse().ok()?))
}

/// One case of each operation but those that are slow. The strides have no factor in common with what they go through, mostly, so
/// that the cases of one turn are of different faults, and a few turns have had each.
fn sample(cases: &[(Step, Fault)], turn: usize) -> Vec<usize> {
    let quick: Vec<Fault> = Fault::ALL.into_iter().filter(|fault| !fault.is_slow()).collect();
    let one_of = |(place, operation): (usize, Operation)| {
        let of_operation: Vec<usize> = (0..cases.len())
            .filter(|number| cases[*number].0.operation == operation)
            .collect();
        let wanted = quick[(place * 7 + turn * 5) % quick.len()];
        let with_fault: Vec<usize> = of_operation
            .iter()
            .copied()
            .filter(|number| cases[*number].1 == wanted)
            .collect();
        // A fault that makes the step fail has no place in an operation that cannot fail.
        let candidates = if with_fault.is_empty() {
            of_operation
        } else {
            with_fault
        };
        candidates[(place * 3 + turn) % candidates.len()]
    };
    operations().enumerate().map(one_of).collect()
}

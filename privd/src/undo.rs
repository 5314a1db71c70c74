//! What to take back when a call fails half-way: only for the few steps after which no descriptor holds the new object yet.

use std::io;

use roost_common::privd::Step;

/// Reverts steps, newest first, unless it is committed.
#[must_use]
#[derive(Default)]
pub(crate) struct Undo<'a>(Vec<(Step, Revert<'a>)>);

type Revert<'a> = Box<dyn FnOnce() -> io::Result<()> + 'a>;

impl<'a> Undo<'a> {
    /// Adds how to revert `step`, which has just succeeded.
    pub(crate) fn add(&mut self, step: Step, revert: impl FnOnce() -> io::Result<()> + 'a) {
        self.0.push((step, Box::new(revert)));
    }

    /// From here on a descriptor holds everything: nothing is reverted any more.
    pub(crate) fn commit(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        while let Some((step, revert)) = self.0.pop() {
            if let Err(error) = revert() {
                tracing::error!(?step, %error, "undo failed; the next start removes what is left");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn steps_are_reverted_newest_first_and_past_failures() {
        let seen = RefCell::new(Vec::new());
        let mut undo = Undo::default();
        undo.add(Step::CreateOrigin, || {
            seen.borrow_mut().push(1);
            Ok(())
        });
        undo.add(Step::LoadSnapshot, || {
            seen.borrow_mut().push(2);
            Err(io::ErrorKind::NotFound.into())
        });
        drop(undo);
        assert_eq!(*seen.borrow(), [2, 1]);
    }

    #[test]
    fn a_committed_undo_does_nothing() {
        let mut undo = Undo::default();
        undo.add(Step::CreateOrigin, || panic!("reverted after all"));
        undo.commit();
    }
}

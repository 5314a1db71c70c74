//! Terminals: a pair of descriptors, of which a program has one end as its terminal, and envd the other.
//!
//! Holds: when envd's end is closed the terminal hangs up, and whoever is still in it is told by SIGHUP; so all of envd's
//! copies go when the process has ended and its output is taken.

use std::os::fd::{AsFd as _, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::unistd::{Uid, fchown};

/// Where a caller does not say.
const SIZE: Size = Size { columns: 80, rows: 24 };

/// In character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

impl Size {
    /// `None` for a size that no terminal can have. 0 is taken for what is usual.
    pub(super) fn new(columns: u32, rows: u32) -> Option<Self> {
        let or = |cells: u32, default| match u16::try_from(cells) {
            Ok(0) => Some(default),
            cells => cells.ok(),
        };
        Some(Self {
            columns: or(columns, SIZE.columns)?,
            rows: or(rows, SIZE.rows)?,
        })
    }
}

impl Default for Size {
    fn default() -> Self {
        SIZE
    }
}

/// Both ends of a terminal.
pub(super) struct Terminal {
    pub(super) ours: OwnedFd,
    pub(super) programs: OwnedFd,
}

impl Terminal {
    /// Opens a terminal that is `owner`'s, who can then open it by its name too.
    ///
    /// # Errors
    /// The kernel's; ENOSPC when there are too many.
    pub(super) fn open(size: Size, owner: Uid) -> Result<Self, Errno> {
        let size = Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // Until they are marked another child may inherit them; it closes them itself (`ChildSetup`).
        let OpenptyResult { master, slave } = openpty(&size, None)?;
        for end in [&master, &slave] {
            fcntl(end.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        // Without privilege it is envd's own already.
        fchown(&slave, Some(owner), None).ok();
        Ok(Self {
            ours: master,
            programs: slave,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_a_terminal_can_have() {
        let size = |columns, rows| Size::new(columns, rows).map(|size| (size.columns, size.rows));
        assert_eq!(size(120, 40), Some((120, 40)));
        assert_eq!(size(0, 0), Some((80, 24)));
        assert_eq!(size(65_535, 1), Some((65_535, 1)));
        assert_eq!(size(65_536, 1), None);
        assert_eq!(size(1, u32::MAX), None);
    }
}

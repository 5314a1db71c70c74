//! Roost's own kernel objects, a page at a time. Read anew for each page: nothing is kept between calls.

use roost_common::names::PREFIX;
use roost_common::privd::{INVENTORY_PAGE, InventoryCursor, InventoryPage, InventoryRow, PrivdError, Step};

use crate::kernel::{at, dm, netns};

/// Rows come in this order; a cursor is the kind in its upper half and the number of the next row in its lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Device,
    Loop,
    Veth,
}

impl Kind {
    fn at(self, number: u32) -> InventoryCursor {
        InventoryCursor((self as u64) << 32 | u64::from(number))
    }
}

/// The page that starts at `cursor`. Any cursor is good: one that was never handed out starts at the next row there is.
///
/// # Errors
/// [`Step::ListDevices`], [`Step::ListLinks`].
pub(crate) fn page(cursor: InventoryCursor) -> Result<InventoryPage, PrivdError> {
    let devices = dm::RealKernel::open().map_err(at(Step::ListDevices))?;
    let devices = devices.list(PREFIX).map_err(at(Step::ListDevices))?;
    let mut loops: Vec<_> = devices.iter().flat_map(|device| device.loops.iter().copied()).collect();
    loops.sort_unstable();
    loops.dedup();
    let mut rows: Vec<(InventoryCursor, InventoryRow)> = Vec::new();
    for device in devices {
        let row = InventoryRow::Device {
            name: device.name,
            node: device.node,
            open_count: device.open_count,
            status: device.status,
        };
        rows.push((Kind::Device.at(device.node.minor), row));
    }
    for number in loops {
        rows.push((Kind::Loop.at(number), InventoryRow::Loop { number }));
    }
    for slot in netns::list()? {
        rows.push((Kind::Veth.at(slot.into()), InventoryRow::Veth { slot }));
    }
    Ok(cut(rows, cursor))
}

fn cut(mut rows: Vec<(InventoryCursor, InventoryRow)>, cursor: InventoryCursor) -> InventoryPage {
    rows.sort_by_key(|(at, _)| at.0);
    let mut rest = rows.into_iter().filter(|(at, _)| at.0 >= cursor.0);
    let rows = rest.by_ref().take(INVENTORY_PAGE).map(|(_, row)| row).collect();
    InventoryPage {
        rows,
        next: rest.next().map(|(at, _)| at),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use roost_common::ids::Slot;

    use super::*;

    #[test]
    fn pages_list_every_row_once_and_end() {
        let all: Vec<_> = (0..300)
            .map(|number| (Kind::Loop.at(number), InventoryRow::Loop { number }))
            .chain((1..=400).map(|n| {
                let slot = Slot::try_from(n).expect("a slot");
                (Kind::Veth.at(n), InventoryRow::Veth { slot })
            }))
            .collect();
        let (mut cursor, mut seen) = (Some(InventoryCursor::default()), Vec::new());
        while let Some(at) = cursor {
            let page = cut(all.clone(), at);
            assert!(page.rows.len() <= INVENTORY_PAGE);
            seen.extend(page.rows.iter().map(|row| format!("{row:?}")));
            cursor = page.next;
        }
        assert_eq!(seen.len(), 700);
        assert_eq!(seen.into_iter().collect::<BTreeSet<_>>().len(), 700);
    }

    #[test]
    fn a_cursor_that_was_never_handed_out_is_answered() {
        let one = vec![(Kind::Loop.at(4), InventoryRow::Loop { number: 4 })];
        for (cursor, rows) in [
            (Kind::Device.at(77), 1),
            (Kind::Veth.at(0), 0),
            (InventoryCursor(u64::MAX), 0),
        ] {
            let page = cut(one.clone(), cursor);
            assert_eq!((page.rows.len(), page.next), (rows, None));
        }
    }
}

//! Which connections are to end. A snapshot should hold none: when the guest wakes, nobody is at their other end.
//!
//! Not here: how a connection ends (`http`).

use std::time::Duration;

use tokio::sync::watch;

/// How long a connection of an earlier life has for an answer that it is giving. `/init` itself may be one of them.
const GRACE: Duration = Duration::from_secs(2);

/// What all connections are told.
#[derive(Default)]
pub(crate) struct Connections(watch::Sender<Marks>);

/// Moments are counted rather than timed: the clock of a guest that wakes is stepped.
#[derive(Debug, Clone, Copy, Default)]
struct Marks {
    /// Moments so far at which the connections that were open were told to close.
    closes: u64,
    /// The last of these moments from which the connections are also cut.
    cut: u64,
}

/// One connection's view.
#[derive(Clone)]
pub(crate) struct Connection {
    /// [`Marks::closes`] when it was opened.
    opened: u64,
    marks: watch::Receiver<Marks>,
}

impl Connections {
    /// A new connection, which nothing from before concerns.
    pub(crate) fn open(&self) -> Connection {
        let marks = self.0.subscribe();
        let opened = marks.borrow().closes;
        Connection { opened, marks }
    }

    /// Has the connections that are open now end: idle ones at once, the others after the answer that they are giving,
    /// however long that takes, because the guest may go on running.
    pub(crate) fn close(&self) {
        self.0.send_modify(|marks| marks.closes += 1);
    }

    /// As [`Connections::close`], but bounded: the guest has woken, and an answer that is still being given has lost its
    /// reader.
    pub(crate) fn cut(&self) {
        self.0.send_modify(|marks| {
            marks.closes += 1;
            marks.cut = marks.closes;
        });
    }
}

impl Connection {
    /// Whether the answer that it gives next is its last.
    pub(crate) fn is_closing(&self) -> bool {
        self.marks.borrow().closes > self.opened
    }

    /// Returns when it is to end after the answer that it is giving.
    pub(crate) async fn closing(&self) {
        self.reach(|marks| marks.closes).await;
    }

    /// Returns when it is to end whatever it is doing.
    pub(crate) async fn cut(&self) {
        self.sentenced().await;
        tokio::time::sleep(GRACE).await;
    }

    async fn sentenced(&self) {
        self.reach(|marks| marks.cut).await;
    }

    async fn reach(&self, mark: impl Fn(&Marks) -> u64) {
        let mut marks = self.marks.clone();
        if marks.wait_for(|marks| mark(marks) > self.opened).await.is_err() {
            // The guest's state is gone, and with it whoever could tell us to end.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn only_what_was_open_is_to_close() {
        let connections = Connections::default();
        let before = connections.open();
        assert!(!before.is_closing());
        connections.close();
        let after = connections.open();
        assert!(before.is_closing() && !after.is_closing());
    }

    #[test]
    fn a_cut_spares_what_comes_later() {
        let connections = Connections::default();
        let before = connections.open();
        connections.close();
        let between = connections.open();
        let is_cut = |connection: &Connection| connection.sentenced().now_or_never().is_some();
        assert!(!is_cut(&before), "closing is not cutting");
        connections.cut();
        let after = connections.open();
        assert!(before.is_closing() && between.is_closing() && !after.is_closing());
        assert!(is_cut(&before) && is_cut(&between) && !is_cut(&after));
    }

    #[tokio::test]
    async fn a_cut_has_a_grace() {
        let connections = Connections::default();
        let connection = connections.open();
        connections.cut();
        assert!(connection.closing().now_or_never().is_some());
        assert!(connection.cut().now_or_never().is_none());
    }
}

//! The output of one process: the last of it is kept, and every client reads from it at its own offset.
//!
//! ```text
//! pipes --append--> [ ring: the newest RING bytes ] --> client at offset 70000
//!          waits while the slowest client             --> client at offset 98304
//!          needs what would have to go
//! ```
//!
//! Holds: memory is bounded, whatever is written and whoever reads. A client that is attached loses nothing: what it has
//! not been handed stays, and the process waits. Without a client the oldest goes, and whoever comes next is told how
//! much. An offset counts bytes of all kinds of output together, so it names the same byte to every client.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use roost_common::guest::process::ProcessEvent;
use roost_common::guest::process::process_event::{DataEvent, EndEvent, StartEvent, data_event};
use tokio::sync::watch;

/// Output that is kept of a process.
pub(super) const RING: usize = 256 * 1024;

/// Changes between kinds of output within the ring; each costs as much memory as a few bytes.
const MAX_RUNS: usize = 4096;

/// Clients that may read one process at a time.
const MAX_CLIENTS: usize = 16;

/// What the process wrote to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Stdout,
    Stderr,
    Terminal,
}

impl Kind {
    /// The most that one `data` event carries. A reader of a terminal is a person, who is shown less more often.
    pub(super) fn chunk(self) -> usize {
        match self {
            Kind::Stdout | Kind::Stderr => 32 * 1024,
            Kind::Terminal => 16 * 1024,
        }
    }

    fn event(self, bytes: Vec<u8>) -> DataEvent {
        let output = match self {
            Kind::Stdout => data_event::Output::Stdout(bytes),
            Kind::Stderr => data_event::Output::Stderr(bytes),
            Kind::Terminal => data_event::Output::Pty(bytes),
        };
        DataEvent {
            output: Some(output),
            ..Default::default()
        }
    }
}

/// Why a client cannot attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttachError {
    TooMany,
    /// The output has not come to this offset; it ends at `end`.
    Beyond {
        end: u64,
    },
}

/// The output of a process, until its end and beyond.
#[derive(Default)]
pub(super) struct Output(watch::Sender<State>);

#[derive(Default)]
struct State {
    ring: VecDeque<u8>,
    /// Where each run of bytes of one kind begins; the first is where the ring begins.
    runs: VecDeque<(u64, Kind)>,
    /// Of the byte after the newest.
    end: u64,
    /// Up to here some client was handed the output.
    handed: u64,
    /// What each attached client is handed next.
    clients: BTreeMap<u64, u64>,
    next_client: u64,
    /// How the process ended, once all of its output is here.
    ended: Option<EndEvent>,
}

/// One client's place in the output; it is attached until this is dropped.
pub(super) struct Client {
    output: Arc<Output>,
    number: u64,
    view: watch::Receiver<State>,
    at: u64,
    /// The `start` event, until it was handed over.
    start: Option<ProcessEvent>,
    ended: bool,
}

impl Output {
    /// Adds output; waits for as long as an attached client needs what would have to go.
    pub(super) async fn append(&self, kind: Kind, bytes: &[u8]) {
        debug_assert!(bytes.len() <= RING, "more than a ring at once would never fit");
        let mut view = self.0.subscribe();
        loop {
            // The sender is ours: no error.
            view.wait_for(|state| state.has_room(kind, bytes.len())).await.ok();
            // The other pipe's output may have taken the room meanwhile.
            if self.0.send_if_modified(|state| state.append(kind, bytes)) {
                return;
            }
        }
    }

    /// Says how the process ended. No output comes after.
    pub(super) fn end(&self, end: EndEvent) {
        self.0.send_modify(|state| {
            state.ring.shrink_to_fit();
            state.ended = Some(end);
        });
    }

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.0.borrow().ring.len()
    }

    /// Lets go of what no attached client needs.
    pub(super) fn forget(&self) {
        self.0.send_modify(|state| {
            state.drop_until(state.needed());
            state.ring.shrink_to_fit();
        });
    }

    /// Adds a client, which reads from `offset` on, or, without one, from what no client was handed yet.
    ///
    /// # Errors
    /// Nothing has changed.
    pub(super) fn attach(self: &Arc<Self>, pid: u32, offset: Option<u64>) -> Result<Client, AttachError> {
        let mut attached = Err(AttachError::TooMany);
        self.0.send_if_modified(|state| {
            attached = state.attach(offset);
            attached.is_ok()
        });
        let (number, at, cut) = attached?;
        let start = StartEvent {
            pid,
            ..Default::default()
        };
        Ok(Client {
            output: Arc::clone(self),
            number,
            view: self.0.subscribe(),
            at,
            start: Some(ProcessEvent {
                event: start.into(),
                offset: Some(at),
                cut: (cut > 0).then_some(cut),
                ..Default::default()
            }),
            ended: false,
        })
    }
}

impl Client {
    /// The next event: `start`, data, `end`, then nothing. A call that is given up has taken nothing.
    pub(super) async fn next(&mut self) -> Option<ProcessEvent> {
        if let Some(start) = self.start.take() {
            return Some(start);
        }
        if self.ended {
            return None;
        }
        let at = self.at;
        // The sender lives as long as the output, of which we hold a share.
        let end = self
            .view
            .wait_for(|state| state.end > at || state.ended.is_some())
            .await
            .ok()?;
        let event = match end.read(at) {
            Some((kind, bytes)) => {
                self.at += bytes.len() as u64;
                kind.event(bytes).into()
            }
            None => {
                self.ended = true;
                end.ended.clone().expect("waited for output or an end").into()
            }
        };
        // Before the state is changed, which this would hold up.
        drop(end);
        self.output.0.send_modify(|state| state.hand(self.number, self.at));
        Some(ProcessEvent {
            event,
            offset: Some(at),
            ..Default::default()
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.output.0.send_modify(|state| {
            state.clients.remove(&self.number);
        });
    }
}

impl State {
    fn begin(&self) -> u64 {
        self.end - self.ring.len() as u64
    }

    /// From here on attached clients need the output.
    fn needed(&self) -> u64 {
        self.clients.values().copied().min().unwrap_or(self.end)
    }

    /// Where the ring has to begin for `len` more bytes of `kind` to fit.
    fn begin_for(&self, kind: Kind, len: usize) -> u64 {
        let for_bytes = (self.end + len as u64).saturating_sub(RING as u64).max(self.begin());
        let is_new_run = self.runs.back().is_none_or(|(_, last)| *last != kind);
        match self.runs.get(1) {
            Some((second, _)) if is_new_run && self.runs.len() >= MAX_RUNS => for_bytes.max(*second),
            _ => for_bytes,
        }
    }

    fn has_room(&self, kind: Kind, len: usize) -> bool {
        self.begin_for(kind, len) <= self.needed()
    }

    /// Whether it did: there may be no room.
    fn append(&mut self, kind: Kind, bytes: &[u8]) -> bool {
        if !self.has_room(kind, bytes.len()) {
            return false;
        }
        self.drop_until(self.begin_for(kind, bytes.len()));
        if self.runs.back().is_none_or(|(_, last)| *last != kind) && !bytes.is_empty() {
            self.runs.push_back((self.end, kind));
        }
        self.ring.extend(bytes);
        self.end += bytes.len() as u64;
        true
    }

    fn drop_until(&mut self, offset: u64) {
        let gone = offset.saturating_sub(self.begin()) as usize;
        self.ring.drain(..gone);
        let begin = self.begin();
        while self
            .runs
            .get(1)
            .map_or(begin == self.end, |(second, _)| *second <= begin)
            && !self.runs.is_empty()
        {
            self.runs.pop_front();
        }
        if let Some((first, _)) = self.runs.front_mut() {
            *first = begin;
        }
    }

    /// The client's number, its offset, and how much is lost before that.
    fn attach(&mut self, offset: Option<u64>) -> Result<(u64, u64, u64), AttachError> {
        let wanted = offset.unwrap_or(self.handed);
        if wanted > self.end {
            return Err(AttachError::Beyond { end: self.end });
        }
        if self.clients.len() >= MAX_CLIENTS {
            return Err(AttachError::TooMany);
        }
        let at = wanted.max(self.begin());
        let number = self.next_client;
        self.next_client += 1;
        self.clients.insert(number, at);
        Ok((number, at, at - wanted))
    }

    /// As much as one event carries of what begins at `at`; nothing where the output ends there.
    fn read(&self, at: u64) -> Option<(Kind, Vec<u8>)> {
        let run = self.runs.partition_point(|(begin, _)| *begin <= at).checked_sub(1)?;
        let kind = self.runs[run].1;
        let run_end = self.runs.get(run + 1).map_or(self.end, |(begin, _)| *begin);
        let from = (at - self.begin()) as usize;
        let len = kind.chunk().min((run_end - at) as usize);
        (len > 0).then(|| (kind, self.ring.range(from..from + len).copied().collect()))
    }

    fn hand(&mut self, client: u64, at: u64) {
        self.clients.insert(client, at);
        self.handed = self.handed.max(at);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use roost_common::guest::process::process_event::Event;

    use super::*;

    fn output() -> Arc<Output> {
        Arc::default()
    }

    /// All that a client can be handed at once: offset, cut, and the bytes in their kinds.
    fn drain(client: &mut Client) -> Vec<(u64, Option<u64>, Event)> {
        let mut events = Vec::new();
        // Without a budget: many events are taken in one poll.
        while let Some(Some(event)) = tokio::task::unconstrained(client.next()).now_or_never() {
            events.push((event.offset.expect("counted"), event.cut, event.event.unwrap()));
        }
        events
    }

    fn text(events: &[(u64, Option<u64>, Event)]) -> String {
        let of = |event: &Event| match event {
            Event::Data(data) => match data.output.as_ref().unwrap() {
                data_event::Output::Stdout(bytes) => String::from_utf8(bytes.clone()).unwrap(),
                data_event::Output::Stderr(bytes) => format!("({})", str::from_utf8(bytes).unwrap()),
                data_event::Output::Pty(_) => unreachable!("there was no terminal"),
            },
            Event::Start(_) => "<".to_owned(),
            Event::End(_) => ">".to_owned(),
            Event::Keepalive(_) => unreachable!("the stream makes these"),
        };
        events.iter().map(|(_, _, event)| of(event)).collect()
    }

    #[tokio::test]
    async fn kinds_keep_their_order_and_offsets_count_all_of_them() {
        let output = output();
        let mut client = output.attach(7, None).unwrap();
        for (kind, bytes) in [
            (Kind::Stdout, "one"),
            (Kind::Stdout, "two"),
            (Kind::Stderr, "bad"),
            (Kind::Stdout, "three"),
        ] {
            output.append(kind, bytes.as_bytes()).await;
        }
        output.end(EndEvent::default());
        let events = drain(&mut client);
        assert_eq!(text(&events), "<onetwo(bad)three>");
        let offsets: Vec<u64> = events.iter().map(|(offset, _, _)| *offset).collect();
        assert_eq!(offsets, [0, 0, 6, 9, 14]);
        assert!(events.iter().all(|(_, cut, _)| cut.is_none()));
    }

    #[tokio::test]
    async fn a_client_that_comes_back_goes_on_at_its_offset_and_one_without_at_what_nobody_had() {
        let output = output();
        output.append(Kind::Stdout, b"0123456789").await;
        let mut first = output.attach(7, None).unwrap();
        assert_eq!(text(&drain(&mut first)), "<0123456789");
        drop(first);
        output.append(Kind::Stdout, b"abc").await;
        assert_eq!(text(&drain(&mut output.attach(7, Some(4)).unwrap())), "<456789abc");
        output.append(Kind::Stdout, b"def").await;
        let mut new = output.attach(7, None).unwrap();
        let events = drain(&mut new);
        assert_eq!((text(&events).as_str(), events[0].0), ("<def", 13));
        assert!(output.attach(7, Some(16)).is_ok());
        assert_eq!(output.attach(7, Some(17)).err(), Some(AttachError::Beyond { end: 16 }));
    }

    #[tokio::test]
    async fn without_a_client_the_oldest_goes_and_the_cut_says_how_much() {
        let output = output();
        let chunk = vec![b'x'; 32 * 1024];
        for _ in 0..20 {
            output.append(Kind::Stdout, &chunk).await;
        }
        assert_eq!(output.kept(), RING);
        let lost = 20 * chunk.len() as u64 - RING as u64;
        let events = drain(&mut output.attach(7, None).unwrap());
        assert_eq!((events[0].0, events[0].1), (lost, Some(lost)));
        assert_eq!(text(&events).len(), 1 + RING);
        let events = drain(&mut output.attach(7, Some(100)).unwrap());
        assert_eq!((events[0].0, events[0].1), (lost, Some(lost - 100)));
        output.forget();
        assert_eq!(output.kept(), 0);
        let events = drain(&mut output.attach(7, Some(lost)).unwrap());
        assert_eq!((events.len(), events[0].1), (1, Some(RING as u64)));
    }

    #[tokio::test]
    async fn an_attached_client_holds_the_process_up_until_it_reads_or_leaves() {
        let output = output();
        let mut slow = output.attach(7, None).unwrap();
        output.append(Kind::Stdout, &vec![b'x'; RING]).await;
        let mut more = Box::pin(output.append(Kind::Stderr, b"more"));
        assert!(more.as_mut().now_or_never().is_none());
        // What it needs is not forgotten either.
        output.forget();
        assert_eq!(output.kept(), RING);
        slow.next().await;
        slow.next().await;
        assert!(more.as_mut().now_or_never().is_some());
        assert_eq!(text(&drain(&mut slow)).len(), RING - (32 << 10) + "(more)".len());
        output.append(Kind::Stdout, &vec![b'y'; RING]).await;
        let mut blocked = Box::pin(output.append(Kind::Stdout, b"z"));
        assert!(blocked.as_mut().now_or_never().is_none());
        drop(slow);
        assert!(blocked.as_mut().now_or_never().is_some());
    }

    #[tokio::test]
    async fn output_that_changes_its_kind_with_every_byte_is_bounded_too() {
        let output = output();
        for number in 0..3 * MAX_RUNS {
            let kind = if number % 2 == 0 { Kind::Stdout } else { Kind::Stderr };
            output.append(kind, b"x").await;
        }
        assert_eq!((output.kept(), output.0.borrow().runs.len()), (MAX_RUNS, MAX_RUNS));
        let mut client = output.attach(7, None).unwrap();
        let events = drain(&mut client);
        assert_eq!((events.len(), events[0].1), (1 + MAX_RUNS, Some(2 * MAX_RUNS as u64)));
        assert!(
            matches!(&events[1].2, Event::Data(data) if matches!(data.output, Some(data_event::Output::Stdout(_))))
        );
    }

    #[tokio::test]
    async fn an_end_is_told_to_whoever_comes_later_but_not_to_too_many_at_once() {
        let output = output();
        output.append(Kind::Stderr, b"last words").await;
        output.end(EndEvent {
            exit_code: 3,
            ..Default::default()
        });
        for _ in 0..2 {
            let mut client = output.attach(7, Some(0)).unwrap();
            let events = drain(&mut client);
            assert_eq!(text(&events), "<(last words)>");
            assert_eq!(events[2].0, 10);
            assert!(client.next().await.is_none());
        }
        let clients: Vec<_> = (0..MAX_CLIENTS).map(|_| output.attach(7, None).unwrap()).collect();
        assert_eq!(output.attach(7, None).err(), Some(AttachError::TooMany));
        drop(clients);
        assert!(output.attach(7, None).is_ok());
    }
}
